# SPDX-License-Identifier: Apache-2.0
"""SageBwd's gradient on Hopper, with sums in float32: ``mosaic_sm90_backward`` with INT8 products.

``mosaic_sm90_backward_mixed`` is faster and what is used; this is there to compare.

``dO V^T``, made in both kernels, stays in 16 bits. 8-bit ``wgmma`` reads both operands with the
contraction contiguous, which decides what comes from where::

    Q K^T         codes of Q (a scale per row) and of K - mean(K), both in shared memory
    dQ = dS K     dS from registers, a scale per query and tile; K^T from shared memory
    dV = P^T dO   P^T from registers, a scale per key and tile;  dO^T from shared memory
    dK = dS^T Q   dS^T from registers, likewise;                 Q^T from shared memory

K^T, Q^T and dO^T are quantised and turned round once, before the kernels, with a scale per tile of
tokens and 32 channels. Every product starts in a fresh s32 tile and is added in float32. The
scales are finer than the paper's one per tile, since a warpgroup finds the maximum of a row without
talking to the others. Tokens are permuted within 16 as in the forward kernel, so that registers of
P and dS are operands as they stand.

On an H100 this is not faster than 16 bits: 1.98 and 3.95 ms at B 4, T = S = 4096, N 32, H 128, and
.65 for the operands, against 5.2 in all. Measured and left out: an integer addition in place of
the conversion of sums (2.16 and 4.2 ms); three warpgroups for the queries with tiles of 64 keys
(2.32); for the keys a whole product in flight at a time (3.82), and dK and dV in 16 bits after
INT8 scores (3.05, against 3.3 with 16-bit scores).

References: SageAttention3 (arXiv 2505.11594), algorithm 3; SageBwd (arXiv 2603.02170), sections 4
and 6: rows of dS sum to zero, so that the mean key drops out of dQ.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels.masks import BlockMask
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.attention.mosaic_sm90_backward import (
    PAD,
    both_sides,
    shared,
    thread_columns,
    whole,
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
    quantize_columns,
    quantize_k,
    quantize_q,
)

CONFIGS = {
    "q": Config(block_kv=128, num_stages=2, qk_split=1, schedule="none"),
    "kv": Config(
        block_kv=64, num_stages=4, qk_split=1, schedule="none", registers=240, memory_registers=24
    ),
}
# Columns of a fresh tile of sums, and such tiles in flight. The kernel of keys holds two sums.
PARTS = {"q": (64, 2), "kv": (32, 2)}
K_BLOCK = 128  # keys that share scales at least
LINE = 32  # numbers in which the scales of a tile are copied, most of them unused
CHANNELS = 32  # that share a scale
TINY = 1e-30  # smallest maximum of a row: a row of zeros gets zero codes
MAGIC = 1.5 * 2**23  # added to a small number, it leaves its nearest integer in the lowest bits


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
        v_codes: makes no difference here.
        min_diff: lower bound of ``key - query``, or None.
        max_diff: upper bound, or None.
        blocks: tiles to visit, or None for all.

    Returns:
        Arrays like query, key and value.
    """
    del v_codes
    arrays = operands(
        query, key, value, d_out, lse, delta, rest, scale=scale, smooth_k=smooth_k,
        scale_block=max(K_BLOCK, scale_block),
    )  # fmt: skip
    variant = Variant("int8", "half", str(query.dtype))
    sizes = query.shape, key.shape, min_diff, max_diff
    make = lambda side, plan: Int8(side, plan, scale)  # noqa: E731
    return both_sides(make, CONFIGS, variant, sizes, arrays, blocks)


def operands(query, key, value, d_out, lse, delta, rest, *, scale, smooth_k, scale_block) -> dict:
    """What both kernels read, by name.

    Args as `gradient`.

    Returns:
        Arrays. "minus_lse" is in units of log2 and without what smoothing took from the logits;
        "lse_scale" has it and the scale of each query side by side.
    """
    (batch, q_len, _, _), kv_len = query.shape, key.shape[1]
    limit = lambda length: jnp.full((batch,), length, jnp.int32)  # noqa: E731
    # As the forward has them, so that a program with both may compute them once.
    mean = kv_statistics(key, value, limit(kv_len))[0] if smooth_k else None
    # The codes of the forward, whose scales are one per query and eight for a block of keys.
    q8, q_scale, const = quantize_q(query, limit(q_len), mean)
    k8, k_scale = quantize_k(key, limit(kv_len), mean, scale_block=scale_block)
    padded = -(-q_len // PAD) * PAD
    pad = ((0, 0), (0, 0), (0, padded - q_len))
    minus_lse = -lse * LOG2E
    if const is not None:
        minus_lse += const[:, :, :q_len] * (scale * LOG2E)
    # Rows without keys, and those beyond the end, get P = exp(-inf) = 0.
    minus_lse = jnp.where(jnp.isneginf(lse), -jnp.inf, minus_lse)
    minus_lse = jnp.pad(minus_lse, pad, constant_values=-jnp.inf)
    q_scale = jnp.pad(q_scale[:, :, :q_len], pad) * (scale * LOG2E)
    k_rows = jnp.tile(k_scale, scale_block // 8).reshape(*k_scale.shape[:2], -1)
    arrays = {"q8": q8, "k8": k8, "v": whole(value), "d_out": whole(d_out), "k_rows": k_rows}
    arrays |= {"minus_lse": minus_lse, "q_scale": q_scale, "minus_delta": jnp.pad(-delta, pad)}
    arrays["lse_scale"] = jnp.stack([minus_lse, q_scale], -1).reshape(*q_scale.shape[:2], -1)
    streamed = {side: config.block_kv for side, config in CONFIGS.items()}
    arrays["k_scale"] = _lines(jnp.repeat(k_scale, scale_block // streamed["q"], axis=2))
    arrays["k_t"], found = quantize_columns(key, mean, block=streamed["q"])
    arrays["k_t_scale"] = _lines(found)
    arrays["q_t"], of_q = quantize_columns(query, block=streamed["kv"])
    arrays["d_out_t"], of_d_out = quantize_columns(d_out, block=streamed["kv"])
    arrays["q_side_scale"] = _lines(of_q, of_d_out)
    if smooth_k:
        arrays |= {"rest": jnp.pad(rest, pad) * scale, "k_mean": mean}
    return arrays


def _lines(*scales):
    """[B, heads, tiles, .] side by side, `LINE` numbers for each tile; [B, heads, tiles * LINE]."""
    x = jnp.concatenate(scales, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, LINE - x.shape[-1])))
    return x.reshape(*x.shape[:2], -1)


# -- registers of one tile -------------------------------------------------------------------------


def probabilities(scores, scale, shift, masked: bool):
    """``exp2(score * scale + shift)``, zero where masked.

    Args:
        scores: s32 registers of the tile.
        scale: register of element i, as a function of i.
        shift: likewise.
        masked: scores went through `mask_scores`.

    Returns:
        float32 registers of the tile.
    """
    out = []
    for i, score in enumerate(scores):
        p = ptx.exp2(ptx.fma(ptx.to_float(score), scale(i), shift(i)))
        if masked:
            p = ptx.select(ptx.eq(score, ptx.i32(tile_math.INT_MIN)), ptx.f32(0.0), p)
        out.append(p)
    return out


def encode(values):
    """INT8 codes with a scale per row.

    Args:
        values: float32 registers of a tile [64, n].

    Returns:
        Words of codes as an operand, and the scale of each row half.
    """
    packed, scales = [[], []], []
    for h in range(2):
        columns = [values[i] for i in range(len(values)) if (i // 2) % 2 == h]
        top = tile_math.maximum([ptx.fabs(x) for x in columns], is_int=False)
        for distance in (1, 2):  # the four threads that share a row
            top = ptx.fmax(top, ptx.shuffle_xor(top, distance))
        top = ptx.fmax(top, ptx.f32(TINY))
        scales.append(ptx.fmul(top, ptx.f32(1 / 127)))
        factor = ptx.fmul(ptx.reciprocal(top), ptx.f32(127.0))
        packed[h] = [_codes(columns[i : i + 4], factor) for i in range(0, len(columns), 4)]
    return [word for pair in zip(*packed, strict=True) for word in pair], scales


def _codes(values, factor):
    """Four products rounded to integers, in one word; their sizes must be at most 127."""
    magic = tile_math._hex(MAGIC)
    lines = [".reg .f32 x<4>; .reg .b32 w<4>, lo, hi;"]
    lines += [f"fma.rn.f32 x{i}, ${1 + i}, $5, {magic}; mov.b32 w{i}, x{i};" for i in range(4)]
    lines += ["prmt.b32 lo, w0, w1, 64; prmt.b32 hi, w2, w3, 64;"]  # the lowest byte of each
    lines += ["prmt.b32 $0, lo, hi, 21520;"]  # two bytes of each
    return ptx.asm("{ " + "\n".join(lines) + " }", "r", [*values, factor])[0]


def add_part(sums, tile, row_scale, channel_scale):
    """``sums + tile * row_scale * channel_scale``.

    Args:
        sums: float32 registers.
        tile: s32 registers of a product, as many.
        row_scale: of each row half.
        channel_scale: of each 32 columns.

    Returns:
        float32 registers.
    """
    scale = [[ptx.fmul(r, c) for c in channel_scale] for r in row_scale]
    return [
        ptx.fma(ptx.to_float(x), scale[(i // 2) % 2][i // 4 * 8 // CHANNELS], total)
        for i, (total, x) in enumerate(zip(sums, tile, strict=True))
    ]


# -- one compute warpgroup's steps -----------------------------------------------------------------


class Int8:
    """What `mosaic_sm90_backward.Half` does, with INT8 products.

    Args:
        side: "q" or "kv".
        plan: sizes.
        scale: factor on the logits, which "q_scale" holds already.
    """

    auto_barriers = False
    latest_first = False
    early: tuple | None = None

    def __init__(self, side: str, plan: Plan, scale: float):
        self.side, self.plan, self.scale = side, plan, scale
        head_dim, block = plan.head_dim, plan.config.block_kv
        self.part, self.depth = min(PARTS[side][0], head_dim), PARTS[side][1]
        if side == "q":
            self.own, self.ring = ("q8", "d_out"), (("k8", "v", "k_scale"), ("k_t", "k_t_scale"))
            numbers = ("q_scale", "minus_lse", "minus_delta", "rest", "k_mean")
        else:
            self.own = ("k8", "v")
            self.ring = (
                ("q8", "d_out", "lse_scale", "minus_delta"),
                ("q_t", "d_out_t", "q_side_scale"),
            )
            numbers = ("k_rows",)
        self.count, self.fixed = (1, 3) if side == "q" else (2, 1)  # sums, numbers of a row
        self.names = (*self.own, *self.ring[0], *self.ring[1], *numbers)
        # Numbers that are copied with a tile, for each of its rows or for all of it.
        self.copied = {"lse_scale": 2 * block, "minus_delta": block}
        self.copied |= dict.fromkeys(("k_scale", "k_t_scale", "q_side_scale"), LINE)
        self.rows8 = _transforms(_swizzle(head_dim))
        self.rows16 = _transforms(_swizzle(2 * head_dim), 2)
        self.columns8 = _transforms(_swizzle(block))
        self.tile_type = _shape((ROWS, block), jnp.int32, _ACC)
        self.float_type = _shape((ROWS, block), jnp.float32, _ACC)
        self.code_type = _shape((ROWS, block), jnp.int8, plgpu.Layout.WGMMA_8BIT)
        self.row_type = _shape((ROWS,), jnp.float32, _ROW)
        self.sum_type = _shape((ROWS, head_dim), jnp.float32, _ACC)

    def memory(self, name: str, lead: tuple[int, ...], rows: int):
        """As `Half.memory`."""
        head_dim = self.plan.head_dim
        if name.endswith("_t"):
            return plgpu.SMEM((*lead, head_dim, rows), jnp.int8, transforms=self.columns8)
        if name.endswith("8"):
            return plgpu.SMEM((*lead, rows, head_dim), jnp.int8, transforms=self.rows8)
        if name in self.copied:
            return plgpu.SMEM((*lead, self.copied[name]), jnp.float32)
        half = jnp.dtype(self.plan.variant.half)
        return plgpu.SMEM((*lead, rows, head_dim), half, transforms=self.rows16)

    def source(self, ref, name: str, b, head, rows):
        """As `Half.source`."""
        if name.endswith("_t"):
            return ref.at[b, head, :, rows]
        if name in self.copied:
            size = self.copied[name]
            return ref.at[b, head, pl.ds(div(rows.start, rows.size) * size, size)]
        return ref.at[b, rows, head]

    def of_owner(self, load):
        """As `Half.of_owner`."""
        names = ("q_scale", "minus_lse", "minus_delta") if self.side == "q" else ("k_rows",)
        return [load(name) for name in names]

    def start(self):
        """As `Half.start`."""
        body = lambda: [[ptx.f32(0.0)] * (self.plan.head_dim // 2)] * self.count  # noqa: E731
        return tuple(_inline(body, [], [self.sum_type] * self.count))

    def tile(self, own, ring, fixed, load, sums, where, wait, release, take, give):
        """As `Half.tile`."""
        del load
        (first8, first16, *numbers), (*turned, scales) = ring
        wait(0)
        scores, d_p = self.issue(own, (first8, first16))
        give()
        codes = self.encode(scores, d_p, fixed, numbers, where)
        release(0)
        wait(1)
        take()
        sums = self.add(sums, codes, turned, scales)
        release(1)
        return sums

    def issue(self, own, streamed):
        """Starts ``Q K^T`` and ``dO V^T``, or their transposes."""
        half = {"bfloat16": "f32.bf16.bf16", "float16": "f32.f16.f16"}[self.plan.variant.half]
        block = self.plan.config.block_kv

        def body(a8, a16, b8, b16):
            s8, s16 = self.rows8[1].swizzle, self.rows16[1].swizzle
            return [
                _wgmma(block, _k_major(a8, s8), _k_major(b8, s8), "r", "s32.s8.s8"),
                _wgmma(block, _k_major(a16, s16), _k_major(b16, s16), "f", half),
            ]

        inputs = [
            (x, t) for x, t in zip((*own, *streamed), (self.rows8, self.rows16) * 2, strict=True)
        ]
        return _inline(body, inputs, [self.tile_type, self.float_type])

    def encode(self, scores, d_p, fixed, numbers, where):
        """Codes and row scales of dS, and on the side of keys those of P after them.

        Args:
            scores: from `issue`.
            d_p: from `issue`.
            fixed: from `of_owner`.
            numbers: references to "k_scale", or to "lse_scale" and "minus_delta".
            where: as in `tile`.
        """

        position = self._position(where)
        inputs = [(scores, _ACC), (d_p, _ACC), *((x, _ROW) for x in fixed)]
        inputs += [(x, ()) for x in numbers] + [(x, _SCALAR) for x in position.values()]

        def body(scores, d_p, *rest):
            fixed, rest = rest[: self.fixed], rest[self.fixed :]
            numbers, place = rest[: len(rest) - len(position)], rest[len(rest) - len(position) :]
            scores = _wait(1, scores)
            if position:
                fields = dict(zip(position, (x[0] for x in place), strict=True))
                scores = tile_math.mask_scores(scores, Position(**fields), is_int=True)
            numbers_of = _rows_are_queries if self.side == "q" else _rows_are_keys
            scale, shift, delta = numbers_of(fixed, numbers)
            p = probabilities(scores, scale, shift, bool(position))
            of_p = [] if self.side == "q" else [*encode(p)]
            waited = enumerate(zip(p, _wait(0, d_p), strict=True))
            d_s = [ptx.fmul(x, ptx.fadd(y, delta(i))) for i, (x, y) in waited]
            found = [*encode(d_s), *of_p]
            return [_opaque(x) if i % 2 == 0 else x for i, x in enumerate(found)]

        return _inline(body, inputs, [self.code_type, self.row_type] * self.count)

    def _position(self, where) -> dict:
        """Fields of `Position`, in order; none without a mask."""
        if where is None:
            return {}
        plan, i32 = self.plan, jnp.int32
        fields = {
            "row": where["row"],
            "col": where["col"],
            "q_len": plan.q_len,
            "kv_len": plan.kv_len,
        }
        if plan.min_diff is not None:
            fields["min_diff"] = plan.min_diff
        if plan.max_diff is not None:
            fields["max_diff"] = plan.max_diff
        if "first_col" in where:
            fields["first_col"] = where["first_col"]
            fields["kv_len"] = jnp.minimum(where["last_col"], i32(plan.kv_len))
        return {name: jnp.asarray(x, i32) for name, x in fields.items()}

    def add(self, sums, codes, turned, scales):
        """Adds the products of codes and turned operands.

        Args:
            sums: dQ, or dK and dV.
            codes: from `encode`: an operand and its row scales for each sum.
            turned: references [H, block], one for each sum.
            scales: reference to the scales of each 32 channels, of one operand after the other.
        """
        count, head_dim, part = self.count, self.plan.head_dim, self.part
        inputs = [(x, _ACC) for x in sums]
        inputs += [
            (x, t) for x, t in zip(codes, (self.code_type.layout, _ROW) * count, strict=True)
        ]
        inputs += [*((x, self.columns8) for x in turned), (scales, ())]

        def body(*given):
            sums, codes = given[:count], given[count : 3 * count]
            *turned, scales = given[3 * count :]
            size, flight, out = part // 2, [], [[] for _ in sums]

            def finish(left):
                n, first, tile, words = flight.pop(0)
                tile = _wait(left, tile, keep=words)
                own = sums[n][first // 2 : first // 2 + size]
                place = ptx.i64(4 * (n * head_dim + first) // CHANNELS)
                channels = shared(scales, place, part // CHANNELS)
                out[n] += add_part(own, tile, codes[2 * n + 1], channels)

            for n in reversed(range(count)):  # dV first: its operand has waited longest
                words = codes[2 * n]
                a = [words[i : i + 4] for i in range(0, len(words), 4)]
                for first in range(0, head_dim, part):
                    b = _k_major(turned[n], self.columns8[1].swizzle, first)
                    flight.append((n, first, _wgmma(part, a, b, "r", "s32.s8.s8"), words))
                    if len(flight) == self.depth:
                        finish(self.depth - 1)
            while flight:
                finish(len(flight) - 1)
            return out

        return tuple(_inline(body, inputs, [self.sum_type] * count))

    def finish(self, sums, load, mean):
        """As `Half.finish`: dQ with the share of the mean key."""
        extra = []
        if self.side == "q" and mean is not None:
            extra = [(load("rest"), _ROW), (plgpu.load(mean, layout=_COL, optimized=False), _COL)]
        factors = (self.scale, 1.0)[: len(sums)]

        def body(*given):
            out = []
            for total, factor in zip(given[: len(sums)], factors, strict=True):
                total = [ptx.fmul(x, ptx.f32(factor)) for x in total]
                if extra:
                    rest, mean = given[len(sums) :]
                    total = [
                        ptx.fma(rest[(i // 2) % 2], mean[i // 4 * 2 + i % 2], x)
                        for i, x in enumerate(total)
                    ]
                out.append(total)
            return out

        stored = _shape((ROWS, self.plan.head_dim), jnp.float32, plgpu.Layout.WGMMA)
        return _inline(body, [*((x, _ACC) for x in sums), *extra], [stored] * len(sums))


def _rows_are_queries(fixed, numbers):
    """Scale, shift and minus delta of element i of a tile, as functions of i."""
    row_scale, minus_lse, minus_delta = fixed
    k_scale = shared(numbers[0], thread_columns(0, 1), 2)
    scale = [[ptx.fmul(r, c) for c in k_scale] for r in row_scale]
    half = lambda i: (i // 2) % 2  # noqa: E731
    return (
        lambda i: scale[half(i)][i % 2],
        lambda i: minus_lse[half(i)],
        lambda i: minus_delta[half(i)],
    )


def _rows_are_keys(fixed, numbers):
    """The same for the transposed tile. Keys eight apart share a scale, so both row halves do."""
    ((row_scale, _),), (lines, deltas) = fixed, numbers
    scales, shifts, minus_delta = {}, {}, {}

    def line(i):
        j = i // 4
        if (j, 0) not in scales:
            values = shared(lines, thread_columns(j, 2), 4)
            for c in range(2):
                shifts[j, c] = values[2 * c]
                scales[j, c] = ptx.fmul(row_scale, values[2 * c + 1])
        return j, i % 2

    def delta(i):
        j = i // 4
        if (j, 0) not in minus_delta:
            minus_delta[j, 0], minus_delta[j, 1] = shared(deltas, thread_columns(j, 1), 2)
        return minus_delta[j, i % 2]

    return lambda i: scales[line(i)], lambda i: shifts[line(i)], delta
