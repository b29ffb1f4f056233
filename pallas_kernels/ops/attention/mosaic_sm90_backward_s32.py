# SPDX-License-Identifier: Apache-2.0
"""SageBwd's gradient on Hopper: ``mosaic_sm90_backward`` with INT8 products that stay integers.

``dO V^T``, made in both kernels, stays in 16 bits. 8-bit ``wgmma`` reads both operands with the
contraction contiguous, which decides what comes from where::

    Q K^T         codes of Q (a scale per row) and of K - mean(K), both in shared memory
    dQ = dS K     dS from registers; K^T from shared memory
    dV = P^T dO   P^T from registers; dO^T from shared memory
    dK = dS^T Q   dS^T from registers; Q^T from shared memory

A product whose scales change from tile to tile must start in fresh registers, be converted and be
added in float32: two or three instructions for each number of a sum, of which there are more than
scores. Here the sums are s32 from the first tile to the last. So what is summed over must not have
a scale. Those of tokens move to the other factor, where they cost nothing: what is rounded is
``P sO`` and ``dS sQ`` (``dS sK`` for dQ), with sO in the shift of the exponential and ``sQ / sO``
in the subtraction of delta, a fused multiply-add anyway. What is left is a factor for each row of
the owner that holds for all tiles so far. Where a tile has something larger it shrinks, and the
sums, which are of codes, shrink with it. Keys look at their queries from the last to the first:
under a causal mask probabilities grow in that order.

A warp in which no row shrinks skips that. A warpgroup waits for the slowest of its four, and of 64
rows of keys one shrinks in three tiles out of five, for P and again for dS (T = S = 4096, normal
numbers): what a row has largest among 4096 numbers is some three times what it has among 64.
Finding the maxima and shrinking is a seventh of the kernel's time; docs/sparse.md has the
measurement, and ``mosaic_sm90_backward_mixed`` keeps this kernel for the queries only.

K^T, Q^T and dO^T are the same codes turned round, once, before the kernels, and lie tile by tile.
Tokens are permuted within 16 as in the forward kernel, so that registers of P and dS are operands
as they stand.

References: SageAttention3 (arXiv 2505.11594), algorithm 3; SageBwd (arXiv 2603.02170), sections 4
and 6: rows of dS sum to zero, so that the mean key drops out of dQ.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels.masks import BlockMask
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.attention.mosaic_sm90_backward import (
    PAD,
    accumulate,
    both_sides,
    settled,
    shared,
    thread_columns,
    whole,
)
from pallas_kernels.ops.attention.mosaic_sm90_backward_int8 import (
    K_BLOCK,
    LINE,
    MAGIC,
    Int8,
    _codes,
    _lines,
)
from pallas_kernels.ops.attention.mosaic_sm90_kernel import (
    _ACC,
    _COL,
    _ROW,
    _SCALAR,
    _inline,
    _k_major,
    _opaque,
    _shape,
    _swizzle,
    _transforms,
    _wait,
    _wgmma,
)
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config, Plan, div
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, ROWS, Position, Variant
from pallas_kernels.ops.quantize.mosaic_sm90 import (
    kv_statistics,
    quantize_k,
    quantize_q,
    quantize_turned,
    turn_codes,
)

CONFIGS = {
    "q": Config(
        block_kv=128, num_stages=2, qk_split=1, schedule="ahead", registers=240, memory_registers=24
    ),
    "kv": Config(
        block_kv=64, num_stages=4, qk_split=1, schedule="eager", registers=240, memory_registers=24
    ),
}
NUMBERS = 4  # per query: shift and scale of its logits, factor and summand of its dP
SMALLEST = 2.0**-126  # the scale of sums of nothing
START = 0x4B400000  # the bits of `MAGIC`: what products of Q and K are added to


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
    """As `mosaic_sm90_backward.gradient`, with INT8 products except ``dO V^T``.

    Args:
        query: bfloat16 or float16 [B, T, N, H], H 64 or 128.
        key: [B, S, K, H].
        value: [B, S, K, H].
        d_out: like the query.
        lse: natural log-sum-exp of the true logits, float32 [B, N, T].
        delta: ``sum(d_out * out) - d_lse``, float32 [B, N, T].
        rest: what rows of dS sum to, float32 [B, N, T]: the mean key counts that often in dQ.
        scale: factor on the logits.
        smooth_k: the mean key is subtracted before quantising.
        scale_block: keys that share eight scales in the forward: 64, 128 or 256. For 64 the scales
            are those of 128 all the same.
        v_codes: the forward quantises V, and has statistics of K and V.
        min_diff: lower bound of ``key - query``, or None.
        max_diff: upper bound, or None.
        blocks: tiles to visit, or None for all.

    Returns:
        Arrays like query, key and value.
    """
    arrays = operands(
        query, key, value, d_out, lse, delta, rest, scale=scale, smooth_k=smooth_k,
        scale_block=max(K_BLOCK, scale_block), v_codes=v_codes,
    )  # fmt: skip
    variant = Variant("int8", "half", str(query.dtype))
    sizes = query.shape, key.shape, min_diff, max_diff
    heads = {"q": 1, "kv": query.shape[2] // key.shape[2]}
    make = lambda side, plan: Running(side, plan, scale, heads[side])  # noqa: E731
    return both_sides(make, CONFIGS, variant, sizes, arrays, blocks)


def operands(
    query, key, value, d_out, lse, delta, rest, *, scale, smooth_k, scale_block, v_codes=False
) -> dict:
    """What both kernels read, by name.

    Args as `gradient`.

    Returns:
        Arrays: those of `of_the_queries`, and "of_queries", which has for each tile shift and
        scale of its queries, then factor and summand.
    """
    block = CONFIGS["kv"].block_kv
    keys = codes_of_keys(key, value, smooth_k, scale_block, v_codes)
    queries = codes_of_queries(query, keys[2])
    d_out_t, d_scale = quantize_turned(d_out, block=block)
    arrays = of_the_queries(
        queries, keys, value, d_out, lse, delta, rest, scale=scale, block=CONFIGS["q"].block_kv
    )
    ratio = queries[1] / d_scale
    numbers = (
        arrays["minus_lse"] + jnp.log2(d_scale), arrays["q_scale"],
        ratio, arrays["minus_delta"] * ratio,
    )  # fmt: skip
    tiles = (*ratio.shape[:2], -1, block, 2, 2)
    arrays["of_queries"] = (
        jnp.stack(numbers, -1).reshape(tiles).swapaxes(3, 4).reshape(*ratio.shape[:2], -1)
    )
    return arrays | {"q_t": turn_codes(queries[0], block=block), "d_out_t": d_out_t}


# Called as in the forward, so that a program with both computes them once.


def codes_of_keys(key, value, smooth_k: bool, scale_block: int, v_codes: bool):
    """Codes of K, scales, and the mean that was taken away, or None; arguments as `gradient`."""
    limit, mean = jnp.full(key.shape[:1], key.shape[1], jnp.int32), None
    if smooth_k:
        mean, _ = kv_statistics(key, value if v_codes else None, limit)
    return *quantize_k(key, limit, mean, scale_block=scale_block, qk="int8"), mean


def codes_of_queries(query, mean):
    """Codes of Q, a scale for each row, and rows times the mean key, or None."""
    limit = jnp.full(query.shape[:1], query.shape[1], jnp.int32)
    codes, *numbers = quantize_q(query, limit, mean, qk="int8")
    return codes, *(None if x is None else x[:, :, : codes.shape[1]] for x in numbers)


def of_the_queries(queries, keys, value, d_out, lse, delta, rest, *, scale, block) -> dict:
    """What the kernel of queries reads, by name, and "k_rows".

    Args:
        queries: codes, scales, and rows times the mean key or None.
        keys: from `codes_of_keys`.
        value: as in `gradient`; so are d_out, lse, delta, rest and scale.
        block: keys of a tile.

    Returns:
        Arrays. "minus_lse" is in units of log2 and without what smoothing took from the logits.
    """
    (q8, q_scale, const), (k8, k_scale, mean) = queries, keys
    q_len, scale_block = lse.shape[2], k8.shape[1] // k_scale.shape[2]
    pad = ((0, 0), (0, 0), (0, -q_len % PAD))
    minus_lse = -lse * LOG2E
    if const is not None:
        minus_lse += const[:, :, :q_len] * (scale * LOG2E)
    # Rows without keys, and those beyond the end, get P = exp(-inf) = 0.
    minus_lse = jnp.where(jnp.isneginf(lse), -jnp.inf, minus_lse)
    minus_lse = jnp.pad(minus_lse, pad, constant_values=-jnp.inf)
    arrays = {"q8": q8, "k8": k8, "v": whole(value), "d_out": whole(d_out)}
    arrays |= {"minus_lse": minus_lse, "minus_delta": jnp.pad(-delta, pad)}
    arrays["q_scale"] = q_scale * (scale * LOG2E)
    arrays["k_rows"] = jnp.tile(k_scale, scale_block // 8).reshape(*k_scale.shape[:2], -1)
    arrays["k_scale"] = _lines(jnp.repeat(k_scale, scale_block // block, axis=2))
    arrays["k_t"] = turn_codes(k8, block=block)
    if mean is not None:
        arrays |= {"rest": jnp.pad(rest, pad) * scale, "k_mean": mean}
    return arrays


# -- registers of one tile -------------------------------------------------------------------------


class Codes(NamedTuple):
    """8-bit codes of the numbers of a tile.

    Args:
        top: the largest.
        signed: s8, else u8 for numbers that are not negative.
        room: a scale is so many times larger than the first tile needs.
    """

    top: float
    signed: bool
    room: float

    @property
    def kind(self) -> str:
        """Types of a product with s8."""
        return "s32.s8.s8" if self.signed else "s32.u8.s8"


def probabilities(scores, scale, shift, masked: bool):
    """As in ``mosaic_sm90_backward_int8``, of scores that were added to `START`.

    Their bits are those of the number 12582912 + score: nothing is converted. ``shift`` has to take
    the constant away, see `shift_of`.
    """
    out = []
    for i, score in enumerate(scores):
        p = ptx.exp2(ptx.fma(ptx.from_bits(score), scale(i), shift(i)))
        if masked:
            p = ptx.select(ptx.eq(score, ptx.i32(tile_math.INT_MIN)), ptx.f32(0.0), p)
        out.append(p)
    return out


def shift_of(shift, scale):
    """The shift of scores that were added to `START`."""
    return ptx.fma(ptx.f32(-MAGIC), scale, shift)


def grow(sums, scales, values, codes: Codes):
    """Scales of rows that hold for one more tile, and the sums in their units.

    Args:
        sums: s32 registers, in units of the scales.
        scales: a power of two for each row half.
        values: float32 registers of the tile.
        codes: what is made of them.

    Returns:
        New sums and scales.
    """
    tops = []
    for h in range(2):
        own = [x for i, x in enumerate(values) if (i // 2) % 2 == h]
        if codes.signed:
            top = tile_math.maximum([ptx.fabs(x) for x in own], is_int=False)
        else:  # bits of such numbers are ordered as the numbers are
            top = ptx.from_bits(tile_math.maximum([ptx.bits(x) for x in own], is_int=True))
        tops.append(ptx.fmul(top, ptx.f32(1 / codes.top)))
    count = len(sums)
    first = 2 * (count + 2)
    lines = [".reg .pred more, some; .reg .f32 x<2>, y<2>; .reg .b32 w<2>, old<2>, by<2>;"]
    lines += [f"mov.b32 x{h}, ${first + h};" for h in range(2)]
    lines += [f"mov.b32 old{h}, ${count + h};" for h in range(2)]
    lines += [f"setp.gtu.f32 some, x0, ${count};", f"setp.gtu.f32 more, x1, ${count + 1};"]
    lines += ["or.pred some, some, more;", "vote.sync.any.pred more, some, -1;", "@!more bra DONE;"]
    for h in range(2):
        for distance in (1, 2):  # the four threads that share a row
            lines += [f"shfl.sync.bfly.b32 y{h}, x{h}, {distance}, 31, -1;"]
            lines += [f"max.NaN.f32 x{h}, x{h}, y{h};"]
        # The next power of two; what is not a number stays so.
        lines += [f"mov.b32 w{h}, x{h};", f"setp.nan.f32 more, x{h}, x{h};"]
        lines += [f"add.s32 w{h}, w{h}, 8388607;", f"and.b32 w{h}, w{h}, -8388608;"]
        lines += [f"mov.b32 y{h}, w{h};", f"selp.f32 y{h}, x{h}, y{h}, more;"]
        if codes.room > 1:  # in the first tile
            lines += [f"mul.f32 x{h}, y{h}, {tile_math._hex(codes.room)};"]
            lines += [f"setp.eq.s32 more, old{h}, {1 << 23};", f"selp.f32 y{h}, x{h}, y{h}, more;"]
        lines += [f"max.NaN.f32 y{h}, y{h}, ${count + h};", f"mov.b32 ${count + h}, y{h};"]
        lines += [f"mov.b32 w{h}, y{h};", f"sub.s32 by{h}, w{h}, old{h};"]
        lines += [f"shr.u32 by{h}, by{h}, 23;"]
    lines += [f"shr.s32 ${i}, ${i}, by{i // 2 % 2};" for i in range(count)]
    text = "{ " + "\n".join([*lines, "DONE:"]) + " }"
    found = ptx.asm(text, "", tops, tied=[*sums, *scales], effects=True)
    return found[:count], found[count:]


def encode(values, scales):
    """8-bit codes of rows with given scales, as an operand."""
    packed = [[], []]
    for h, scale in enumerate(scales):
        factor = ptx.from_bits(ptx.sub(ptx.i32(254 << 23), ptx.bits(scale)))  # 1 / scale
        columns = [values[i] for i in range(len(values)) if (i // 2) % 2 == h]
        packed[h] = [_codes(columns[i : i + 4], factor) for i in range(0, len(columns), 4)]
    return [word for pair in zip(*packed, strict=True) for word in pair]


# -- one compute warpgroup's steps -----------------------------------------------------------------


class Running(Int8):
    """`Int8` whose sums stay integers.

    Args:
        side: "q" or "kv".
        plan: sizes.
        scale: factor on the logits, which "q_scale" holds already.
        heads: streamed heads for each head of the owner.
    """

    latest_first = True

    def __init__(self, side: str, plan: Plan, scale: float, heads: int):
        self.side, self.plan, self.scale = side, plan, scale
        head_dim, block = plan.head_dim, plan.config.block_kv
        if side == "q":
            self.own, self.ring = ("q8", "d_out"), (("k8", "v", "k_scale"), ("k_t",))
            numbers = ("q_scale", "minus_lse", "minus_delta", "rest", "k_mean")
        else:
            self.own = ("k8", "v")
            self.ring = (("q8", "d_out", "of_queries"), ("q_t", "d_out_t"))
            numbers = ("k_rows",)
        self.count, self.fixed = (1, 3) if side == "q" else (2, 1)  # sums, numbers of a row
        self.names = (*self.own, *self.ring[0], *self.ring[1], *numbers)
        self.copied = {"of_queries": NUMBERS * block, "k_scale": LINE}
        self.rows8 = _transforms(_swizzle(head_dim))
        self.rows16 = _transforms(_swizzle(2 * head_dim), 2)
        self.columns8 = _transforms(_swizzle(block))
        self.tile_type = _shape((ROWS, block), jnp.int32, _ACC)
        self.float_type = _shape((ROWS, block), jnp.float32, _ACC)
        self.code_type = _shape((ROWS, block), jnp.int8, plgpu.Layout.WGMMA_8BIT)
        self.row_type = _shape((ROWS,), jnp.float32, _ROW)
        self.sum_type = _shape((ROWS, head_dim), jnp.int32, _ACC)
        # However long the walk, s32 holds it.
        steps = heads * -(-plan.kv_len // block) * block
        top = 2.0**31 / (128 * steps)
        # Of dS, and of P.
        self.codes = Codes(min(127.0, top), True, 1.0), Codes(min(255.0, top), False, 4.0)

    def source(self, ref, name: str, b, head, rows):
        """As `Half.source`; turned operands lie tile by tile."""
        if name.endswith("_t"):
            return ref.at[b, head, div(rows.start, rows.size)]
        return super().source(ref, name, b, head, rows)

    def start(self):
        """As `Half.start`: sums and the scales of their rows, one after the other."""
        width = self.plan.head_dim // 2

        def body():
            return [[ptx.i32(0)] * width, [ptx.f32(SMALLEST)] * 2] * self.count

        return tuple(_inline(body, [], [self.sum_type, self.row_type] * self.count))

    def tile(self, own, ring, fixed, load, sums, where, wait, release, take, give):
        """As `Half.tile`."""
        del load
        first8, first16, *numbers = ring[0]
        wait(0)
        scores, d_p = self.issue(own, (first8, first16))
        if self.plan.config.schedule == "hold":
            scores, d_p = self.settle((), (), (scores, d_p))[1]
        give()
        *sums, codes = self.encode(scores, d_p, fixed, numbers, where, sums)
        release(0)
        wait(1)
        take()
        sums, _ = self.settle(self.multiply(sums, codes, ring), codes, ())
        release(1)
        return sums

    # As in `Registers`.
    early = (0,), (0,)

    def begin(self, own, slots):
        """As `Registers.begin`."""
        return tuple(self.issue(own, slots[0][:2]))

    def prepare(self, pending, slots, fixed, where, sums):
        """As `Registers.prepare`."""
        *sums, codes = self.encode(*pending, fixed, slots[0][2:], where, sums)
        return tuple(sums), codes

    def advance(self, sums, operands, slots, own, next_slots, give):
        """As `Registers.advance`; there are registers for all four products."""
        sums = self.multiply(sums, operands, slots)
        pending = self.begin(own, next_slots)
        give()
        return self.settle(sums, operands, pending)

    def issue(self, own, streamed):
        """As `Int8.issue`; products of Q and K are added to `START`."""
        half = {"bfloat16": "f32.bf16.bf16", "float16": "f32.f16.f16"}[self.plan.variant.half]
        block = self.plan.config.block_kv

        def body(a8, a16, b8, b16):
            s8, s16 = self.rows8[1].swizzle, self.rows16[1].swizzle
            start = [ptx.i32(START)] * (block // 2)
            return [
                accumulate(block, _k_major(a8, s8), _k_major(b8, s8), start, "s32.s8.s8"),
                _wgmma(block, _k_major(a16, s16), _k_major(b16, s16), "f", half),
            ]

        inputs = [
            (x, t) for x, t in zip((*own, *streamed), (self.rows8, self.rows16) * 2, strict=True)
        ]
        return _inline(body, inputs, [self.tile_type, self.float_type])

    def settle(self, sums, operands, pending):
        """As `Registers.settle`."""
        given = [*sums[::2], *pending, *operands]
        types = [self.sum_type] * (len(sums) // 2)
        types += (self.tile_type, self.float_type)[: len(pending)]
        layouts = [_ACC] * len(types) + [self.code_type.layout] * len(operands)
        done = settled(given, layouts, types)
        totals, pending = done[: len(sums) // 2], done[len(sums) // 2 :]
        sums = tuple(x for pair in zip(totals, sums[1::2], strict=True) for x in pair)
        return sums, pending

    def encode(self, scores, d_p, fixed, numbers, where, sums):
        """Codes of dS, and on the side of keys those of P after them.

        Args:
            scores: from `issue`.
            d_p: from `issue`.
            fixed: from `of_owner`.
            numbers: reference to "k_scale" or "of_queries".
            where: as in `tile`.
            sums: as in `tile`.

        Returns:
            New sums and scales, and a list of operands.
        """
        position, count, block = self._position(where), self.count, self.plan.config.block_kv
        inputs = [(scores, _ACC), (d_p, _ACC)]
        inputs += [(x, t) for x, t in zip(sums, (_ACC, _ROW) * count, strict=True)]
        inputs += [*((x, _ROW) for x in fixed), (numbers[0], ())]
        inputs += [(x, _SCALAR) for x in position.values()]

        def body(scores, d_p, *rest):
            sums, rest = rest[: 2 * count], rest[2 * count :]
            fixed, lines, place = rest[: self.fixed], rest[self.fixed], rest[self.fixed + 1 :]
            scores = _wait(1, scores)
            if position:
                fields = dict(zip(position, (x[0] for x in place), strict=True))
                scores = tile_math.mask_scores(scores, Position(**fields), is_int=True)
            if self.side == "q":
                scale, shift, factor, summand = _rows_are_queries(fixed, lines)
            else:
                scale, shift, factor, summand = _rows_are_keys(fixed, lines, block)
            p = probabilities(scores, scale, shift, bool(position))
            waited = enumerate(zip(p, _wait(0, d_p), strict=True))
            d_s = [ptx.fmul(x, ptx.fma(y, factor(i), summand(i))) for i, (x, y) in waited]
            found, codes = [], []
            for values, total, scales, kind in zip(
                (d_s, p), sums[::2], sums[1::2], self.codes, strict=False
            ):
                total, scales = grow(total, scales, values, kind)
                found += [total, scales]
                codes.append(_opaque(encode(values, scales)))
            return [*found, *codes]

        outs = [self.sum_type, self.row_type] * count + [self.code_type] * count
        found = _inline(body, inputs, outs)
        return [*found[: 2 * count], found[2 * count :]]

    def multiply(self, sums, codes, slots):
        """Starts adding the products of codes and turned operands.

        Args:
            sums: dQ, or dK and dV, each with its scales.
            codes: from `encode`: an operand for each sum.
            slots: references as `ring` names them.
        """
        count, head_dim, turned = self.count, self.plan.head_dim, slots[1]
        inputs = [*((x, _ACC) for x in sums[::2]), *((x, self.code_type.layout) for x in codes)]
        inputs += [(x, self.columns8) for x in turned]

        def body(*given):
            totals, codes, turned = given[:count], given[count : 2 * count], given[2 * count :]
            out = []
            for total, words, ref, made in zip(totals, codes, turned, self.codes, strict=False):
                a = [words[i : i + 4] for i in range(0, len(words), 4)]
                b = _k_major(ref, self.columns8[1].swizzle)
                out.append(accumulate(head_dim, a, b, total, made.kind))
            return out

        totals = _inline(body, inputs, [self.sum_type] * count)
        return tuple(x for pair in zip(totals, sums[1::2], strict=True) for x in pair)

    def finish(self, sums, load, mean):
        """As `Half.finish`: dQ with the share of the mean key."""
        extra = []
        if self.side == "q" and mean is not None:
            extra = [(load("rest"), _ROW), (plgpu.load(mean, layout=_COL, optimized=False), _COL)]
        factors = (self.scale, 1.0)[: self.count]

        def body(*given):
            given, extra = given[: 2 * self.count], given[2 * self.count :]
            out = []
            for total, scales, factor in zip(given[::2], given[1::2], factors, strict=True):
                scales = [ptx.fmul(x, ptx.f32(factor)) for x in scales]
                total = [ptx.fmul(ptx.to_float(x), scales[i // 2 % 2]) for i, x in enumerate(total)]
                if extra:
                    rest, mean = extra
                    total = [
                        ptx.fma(rest[i // 2 % 2], mean[i // 4 * 2 + i % 2], x)
                        for i, x in enumerate(total)
                    ]
                out.append(total)
            return out

        stored = _shape((ROWS, self.plan.head_dim), jnp.float32, plgpu.Layout.WGMMA)
        inputs = [(x, t) for x, t in zip(sums, (_ACC, _ROW) * self.count, strict=True)]
        return _inline(body, [*inputs, *extra], [stored] * self.count)


def _rows_are_queries(fixed, lines):
    """Scale and shift of S, factor and summand of dP, of element i of a tile, as functions of i."""
    row_scale, minus_lse, minus_delta = fixed
    k_scale = shared(lines, thread_columns(0, 1), 2)
    scale = [[ptx.fmul(r, c) for c in k_scale] for r in row_scale]
    shift = [[shift_of(x, c) for c in own] for x, own in zip(minus_lse, scale, strict=True)]
    summand = [[ptx.fmul(x, c) for c in k_scale] for x in minus_delta]
    half = lambda i: (i // 2) % 2  # noqa: E731
    return (
        lambda i: scale[half(i)][i % 2],
        lambda i: shift[half(i)][i % 2],
        lambda i: k_scale[i % 2],
        lambda i: summand[half(i)][i % 2],
    )


def _rows_are_keys(fixed, lines, block):
    """The same for the transposed tile. Keys eight apart share a scale, so both row halves do."""
    ((row_scale, _),), found = fixed, {}

    def pair(i, part):
        """Two numbers of the thread's column; they are loaded where they are first needed."""
        j, c = i // 4, i % 2
        if (part, j, 0) not in found:
            column = ptx.mul(ptx.rem(ptx.thread(), ptx.i32(4)), ptx.i32(2))
            column = ptx.add(column, ptx.i32(8 * j + part * block))
            values = shared(lines, ptx.widen(ptx.mul(column, ptx.i32(8))), 4)
            for k in range(2):
                first, second = values[2 * k : 2 * k + 2]
                if part == 0:
                    second = ptx.fmul(row_scale, second)
                    first = shift_of(first, second)
                found[part, j, k] = first, second
        return found[part, j, c]

    return (
        lambda i: pair(i, 0)[1], lambda i: pair(i, 0)[0],
        lambda i: pair(i, 1)[0], lambda i: pair(i, 1)[1],
    )  # fmt: skip
