# SPDX-License-Identifier: Apache-2.0
"""SageBwd's gradient on Hopper: INT8 where it is faster, which is not everywhere.

The kernel of queries is that of ``mosaic_sm90_backward_s32``: ``Q K^T`` and ``dQ = dS K`` are INT8
products. The kernel of keys here makes ``Q K^T`` from the same codes, and dV and dK in 16 bits::

    Q K^T         codes of K - mean(K) and of Q (a scale per row), both in shared memory
    dV = P^T dO   P^T from registers
    dK = dS^T Q   dS^T from registers; Q in 16 bits beside its codes

In INT8 both need a scale for each key that grows while the sums are made, eight instructions for
each pair of P and dS where 16 bits need one, and dO and Q turned round. That takes longer than what
the faster products save; docs/sparse.md has the times. Gradients are nearer to float32, too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels.masks import BlockMask
from pallas_kernels.ops.attention import mosaic_sm90_backward_s32 as s32
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.attention.mosaic_sm90_backward import (
    _ACC,
    _ROW,
    Registers,
    accumulate,
    both_sides,
    position_of,
    shared,
    thread_columns,
    whole,
)
from pallas_kernels.ops.attention.mosaic_sm90_kernel import (
    _SCALAR,
    _inline,
    _k_major,
    _opaque,
    _shape,
    _swizzle,
    _transforms,
    _wait,
)
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config, Plan, div
from pallas_kernels.ops.attention.mosaic_sm90_tile import ROWS, Position, Variant

CONFIGS = {
    "q": s32.CONFIGS["q"],
    "kv": Config(block_kv=64, num_stages=4, qk_split=1, schedule="ahead"),
}
NUMBERS = 3  # per query: shift and scale of its logits, then minus delta


def gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rest: jax.Array,
    *,
    scale: float,
    smooth_k: bool = True,
    scale_block: int = 128,
    v_codes: bool = False,
    min_diff: int | None = None,
    max_diff: int | None = None,
    blocks: BlockMask | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `mosaic_sm90_backward_s32.gradient`, with dV and dK in 16 bits."""
    arrays = operands(
        query, key, value, d_out, lse, delta, rest, scale=scale, smooth_k=smooth_k,
        scale_block=max(s32.K_BLOCK, scale_block), v_codes=v_codes,
    )  # fmt: skip
    variant = Variant("int8", "half", str(query.dtype))
    sizes = query.shape, key.shape, min_diff, max_diff

    def make(side, plan):
        return s32.Running(side, plan, scale, 1) if side == "q" else Keys(side, plan, scale)

    return both_sides(make, CONFIGS, variant, sizes, arrays, blocks)


def operands(
    query, key, value, d_out, lse, delta, rest, *, scale, smooth_k, scale_block, v_codes=False
) -> dict:
    """What both kernels read, by name.

    Args as `gradient`.

    Returns:
        Arrays: those of `s32.of_the_queries`, "q", and "of_queries", which has for each tile shift
        and scale of its queries, then minus delta.
    """
    keys = s32.codes_of_keys(key, value, smooth_k, scale_block, v_codes)
    queries = s32.codes_of_queries(query, keys[2])
    arrays = s32.of_the_queries(
        queries, keys, value, d_out, lse, delta, rest, scale=scale, block=CONFIGS["q"].block_kv
    )
    pairs = jnp.stack([arrays["minus_lse"], arrays["q_scale"]], -1)
    lead, block = pairs.shape[:2], CONFIGS["kv"].block_kv
    parts = [
        x.reshape(*lead, -1, n) for x, n in ((pairs, 2 * block), (arrays["minus_delta"], block))
    ]
    return arrays | {"q": whole(query), "of_queries": jnp.concatenate(parts, -1).reshape(*lead, -1)}


class Keys(Registers):
    """`Registers` of the side of keys, with INT8 scores.

    Args:
        side: "kv".
        plan: sizes.
        scale: factor on the logits, which "q_scale" holds already.
    """

    def __init__(self, side: str, plan: Plan, scale: float):
        super().__init__(side, plan, scale)
        self.own = ("k8", "v")
        self.ring = ("q8", "of_queries"), ("d_out",), ("q",)
        self.early = (0, 1), (0,)  # codes of Q are needed for the first products only
        self.names = ("k8", "v", "q8", "of_queries", "d_out", "q", "k_rows")
        self.rows8 = _transforms(_swizzle(plan.head_dim))
        tile = (ROWS, plan.config.block_kv)
        self.pending_types = (_shape(tile, jnp.int32, _ACC), self.tile_type)
        self.copied = {"of_queries": NUMBERS * plan.config.block_kv}

    def memory(self, name: str, lead: tuple[int, ...], rows: int):
        """As `Half.memory`."""
        if name in self.copied:
            return plgpu.SMEM((*lead, self.copied[name]), jnp.float32)
        if name in ("q8", "k8"):
            shape = (*lead, rows, self.plan.head_dim)
            return plgpu.SMEM(shape, jnp.int8, transforms=self.rows8)
        return super().memory(name, lead, rows)

    def source(self, ref, name: str, b, head, rows):
        """As `Half.source`."""
        if name in self.copied:
            size = self.copied[name]
            return ref.at[b, head, pl.ds(div(rows.start, rows.size) * size, size)]
        return super().source(ref, name, b, head, rows)

    def of_owner(self, load):
        """As `Half.of_owner`."""
        return [load("k_rows")]

    def issue_scores(self, own, streamed):
        """Starts ``K Q^T``, added to `s32.START`."""
        block = self.plan.config.block_kv

        def body(a, b):
            operands = (_k_major(x, self.rows8[1].swizzle) for x in (a, b))
            start = [ptx.i32(s32.START)] * (block // 2)
            return [accumulate(block, *operands, start, "s32.s8.s8")]

        inputs = [(own, self.rows8), (streamed, self.rows8)]
        return _inline(body, inputs, [self.pending_types[0]])[0]

    def prepare(self, pending, slots, fixed, where, sums):
        """As `Registers.prepare`."""
        position, block = position_of(self.plan, where), self.plan.config.block_kv
        inputs = [*((x, _ACC) for x in pending), (fixed[0], _ROW), (slots[0][1], ())]
        inputs += [(x, _SCALAR) for x in position.values()]

        def body(scores, d_p, row_scale, lines, *place):
            # Keys eight apart share a scale, so both row halves do.
            scale, shift, minus = _numbers(lines, row_scale[0], block)
            scores = _wait(1, scores)
            if position:
                fields = dict(zip(position, (x[0] for x in place), strict=True))
                scores = tile_math.mask_scores(scores, Position(**fields), is_int=True)
            p = s32.probabilities(scores, scale, shift, bool(position))
            words = _opaque(self.operand(p))
            pairs = enumerate(zip(p, _wait(0, d_p), strict=True))
            d_s = [ptx.fmul(x, ptx.fadd(y, minus(i))) for i, (x, y) in pairs]
            if position:  # what lies beyond the end may be anything
                zero = ptx.f32(0.0)
                d_s = [ptx.select(ptx.feq(x, zero), zero, y) for x, y in zip(p, d_s, strict=True)]
            return [_opaque(self.operand(d_s)), words]

        return sums, _inline(body, inputs, [self.operand_type] * 2)

    def last(self, slots):
        """As `Registers.last`."""
        return [slots[2][0], slots[1][0]]


def _numbers(lines, row_scale, block: int):
    """Scale and shift of S, and minus delta, of element i of a tile, as functions of i."""
    pairs, deltas = {}, {}

    def pair(i):
        j = i // 4
        if (j, 0) not in pairs:
            values = shared(lines, thread_columns(j, 2), 4)
            for c in range(2):
                scale = ptx.fmul(row_scale, values[2 * c + 1])
                pairs[j, c] = scale, s32.shift_of(values[2 * c], scale)
        return pairs[j, i % 2]

    def minus(i):
        j = i // 4
        if j not in deltas:
            place = ptx.add(thread_columns(j, 1), ptx.i64(4 * 2 * block))
            deltas[j] = shared(lines, place, 2)
        return deltas[j][i % 2]

    return lambda i: pair(i)[0], lambda i: pair(i)[1], minus
