# SPDX-License-Identifier: Apache-2.0
"""SageBwd's gradient on Hopper: ``mosaic_sm90_backward`` with INT8 products where they pay.

8-bit ``wgmma`` reads both operands with the contraction contiguous, which decides what comes from
where::

    Q K^T         codes of Q (a scale per row) and of K - mean(K), both in shared memory
    dQ = dS K     codes of dS from registers; K^T from shared memory
    dO V^T        16 bits
    dV = P^T dO   16 bits, P^T from registers
    dK = dS^T Q   16 bits, dS^T from registers; Q in 16 bits beside its codes

The scores of both kernels are those of the forward to the bit, so that its log-sum-exp fits them:
rows of P add up to one. (Scores in 16 bits do not, and leave dK and dV a cosine of .996 with
float32 where Q and K have a standard deviation of 3.)

A product whose scales change from tile to tile must start in fresh registers, be converted and be
added in float32: two or three instructions for each number of a sum. So sums of dQ are s32 from the
first tile to the last, and what is summed over, keys, must not have a scale. It moves to the other
factor, where it costs nothing: what is rounded is ``dS sK``. What is left is a scale for each
query: a power of two that holds for all tiles so far. Where a tile has something larger it grows,
and the sums, which are in its units, are shifted; a warp in which no row grows skips that.

Measured and left out (docs/sparse.md): dV and dK in INT8 by the same means, which takes 3.44
instead of 3.12 ms at B 4, T = S = 4096, N 32, H 128, since of a warpgroup's 64 rows one grows in
three tiles out of five, for P and again for dS; scales that are no powers of two, which are nearer
to float32, and multiply where these shift (queries 2.08 instead of 1.87 ms); sums in float32 (1.99
and 4.01 ms).

K^T is the codes of K turned round, once, before the kernels. Tokens are permuted within 16 as in
the forward kernel, so that registers of dS are operands as they stand.

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
    _ACC,
    Registers,
    accumulate,
    both_sides,
    position_of,
    settled,
    shared,
    thread_columns,
    whole,
)
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _ACC as _SUM
from pallas_kernels.ops.attention.mosaic_sm90_kernel import (
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
    turn_codes,
)

CONFIGS = {
    "q": Config(
        block_kv=128, num_stages=2, qk_split=1, schedule="ahead", registers=240, memory_registers=24
    ),
    "kv": Config(block_kv=64, num_stages=4, qk_split=1, schedule="ahead"),
}
K_BLOCK = 128  # keys that share scales at least
LINE = 32  # numbers in which the scales of a tile are copied, most of them unused
NUMBERS = 3  # per query, for the kernel of keys: shift and scale of its logits, then minus delta
SMALLEST = 2.0**-126  # the scale of sums of nothing
MAGIC = 1.5 * 2**23  # added to a small number, it leaves its nearest integer in the lowest bits
START = 0x4B400000  # its bits: what products of Q and K are added to


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
    """As `mosaic_sm90_backward.gradient`, with INT8 products.

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
    kinds = {"q": Queries, "kv": Keys}
    make = lambda side, plan: kinds[side](side, plan, scale)  # noqa: E731
    return both_sides(make, CONFIGS, variant, sizes, arrays, blocks)


def operands(
    query, key, value, d_out, lse, delta, rest, *, scale, smooth_k, scale_block, v_codes=False
) -> dict:
    """What both kernels read, by name.

    Args as `gradient`.

    Returns:
        Arrays. "minus_lse" is in units of log2 and without what smoothing took from the logits;
        "of_queries" has for each tile shift and scale of its queries, then minus delta.
    """
    # The quantisers are called as in the forward: a program with both computes codes once.
    limit = lambda x: jnp.full(x.shape[:1], x.shape[1], jnp.int32)  # noqa: E731
    mean = None
    if smooth_k:
        mean, _ = kv_statistics(key, value if v_codes else None, limit(key))
    k8, k_scale = quantize_k(key, limit(key), mean, scale_block=scale_block, qk="int8")
    q8, q_scale, const = quantize_q(query, limit(query), mean, qk="int8")
    q_len, padded = query.shape[1], q8.shape[1]
    pad = ((0, 0), (0, 0), (0, padded - q_len))
    minus_lse = -lse * LOG2E
    if const is not None:
        minus_lse += const[:, :, :q_len] * (scale * LOG2E)
    # Rows without keys, and those beyond the end, get P = exp(-inf) = 0.
    minus_lse = jnp.where(jnp.isneginf(lse), -jnp.inf, minus_lse)
    minus_lse = jnp.pad(minus_lse, pad, constant_values=-jnp.inf)
    q_scale, minus_delta = q_scale[:, :, :padded] * (scale * LOG2E), jnp.pad(-delta, pad)
    arrays = {"q": whole(query), "q8": q8, "k8": k8, "v": whole(value), "d_out": whole(d_out)}
    arrays |= {"minus_lse": minus_lse, "minus_delta": minus_delta, "q_scale": q_scale}
    block = {side: config.block_kv for side, config in CONFIGS.items()}
    arrays["k_scale"] = _lines(jnp.repeat(k_scale, scale_block // block["q"], axis=2))
    arrays["k_rows"] = jnp.tile(k_scale, scale_block // 8).reshape(*k_scale.shape[:2], -1)
    arrays["k_t"] = turn_codes(k8, block=block["q"])
    pairs = jnp.stack([minus_lse, q_scale], -1)
    parts = (pairs, 2 * block["kv"]), (minus_delta, block["kv"])
    parts = [x.reshape(*lse.shape[:2], -1, width) for x, width in parts]
    arrays["of_queries"] = jnp.concatenate(parts, -1).reshape(*lse.shape[:2], -1)
    if smooth_k:
        arrays |= {"rest": jnp.pad(rest, pad) * scale, "k_mean": mean}
    return arrays


def _lines(scales):
    """[B, heads, tiles, 8] with `LINE` numbers for each tile; [B, heads, tiles * LINE]."""
    x = jnp.pad(scales, ((0, 0), (0, 0), (0, 0), (0, LINE - scales.shape[-1])))
    return x.reshape(*x.shape[:2], -1)


# -- registers of one tile -------------------------------------------------------------------------


def probabilities(scores, scale, shift, masked: bool):
    """``exp2(score * scale + shift)``, zero where masked.

    Args:
        scores: s32 registers of the tile, which were added to `START`. Their bits are those of the
            number 12582912 + score: nothing is converted.
        scale: register of element i, as a function of i.
        shift: likewise, from `shift_of`, which takes that constant away.
        masked: scores went through `mask_scores`.

    Returns:
        float32 registers of the tile.
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


def grow(sums, scales, values, top_code: float):
    """Scales of rows that hold for one more tile, and the sums in their units.

    Args:
        sums: s32 registers, in units of the scales.
        scales: a power of two for each row half.
        values: float32 registers of the tile.
        top_code: the largest code.

    Returns:
        New sums and scales.
    """
    tops = []
    for h in range(2):
        sizes = [ptx.fabs(x) for i, x in enumerate(values) if (i // 2) % 2 == h]
        top = tile_math.maximum(sizes, is_int=False)
        tops.append(ptx.fmul(top, ptx.f32(1 / top_code)))
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
        lines += [f"max.NaN.f32 y{h}, y{h}, ${count + h};", f"mov.b32 ${count + h}, y{h};"]
        lines += [f"mov.b32 w{h}, y{h};", f"sub.s32 by{h}, w{h}, old{h};"]
        lines += [f"shr.u32 by{h}, by{h}, 23;"]
    lines += [f"shr.s32 ${i}, ${i}, by{i // 2 % 2};" for i in range(count)]
    text = "{ " + "\n".join([*lines, "DONE:"]) + " }"
    found = ptx.asm(text, "", tops, tied=[*sums, *scales], effects=True)
    return found[:count], found[count:]


def encode(values, scales):
    """INT8 codes of rows with given scales, as an operand."""
    packed = [[], []]
    for h, scale in enumerate(scales):
        factor = ptx.from_bits(ptx.sub(ptx.i32(254 << 23), ptx.bits(scale)))  # 1 / scale
        columns = [values[i] for i in range(len(values)) if (i // 2) % 2 == h]
        packed[h] = [_codes(columns[i : i + 4], factor) for i in range(0, len(columns), 4)]
    return [word for pair in zip(*packed, strict=True) for word in pair]


def _codes(values, factor):
    """Four products rounded to integers, in one word; their sizes must be at most 127."""
    magic = tile_math._hex(MAGIC)
    lines = [".reg .f32 x<4>; .reg .b32 w<4>, lo, hi;"]
    lines += [f"fma.rn.f32 x{i}, ${1 + i}, $5, {magic}; mov.b32 w{i}, x{i};" for i in range(4)]
    lines += ["prmt.b32 lo, w0, w1, 64; prmt.b32 hi, w2, w3, 64;"]  # the lowest byte of each
    lines += ["prmt.b32 $0, lo, hi, 21520;"]  # two bytes of each
    return ptx.asm("{ " + "\n".join(lines) + " }", "r", [*values, factor])[0]


# -- one compute warpgroup's steps -----------------------------------------------------------------


class Queries:
    """What `mosaic_sm90_backward.Half` does for queries, in INT8.

    Args:
        side: "q".
        plan: sizes.
        scale: factor on the logits, which "q_scale" holds already.
    """

    auto_barriers = False
    latest_first = False
    early = (0,), (0,)  # as in `Registers`

    def __init__(self, side: str, plan: Plan, scale: float):
        self.side, self.plan, self.scale = side, plan, scale
        head_dim, block = plan.head_dim, plan.config.block_kv
        self.own, self.ring = ("q8", "d_out"), (("k8", "v", "k_scale"), ("k_t",))
        numbers = ("q_scale", "minus_lse", "minus_delta", "rest", "k_mean")
        self.names = (*self.own, *self.ring[0], *self.ring[1], *numbers)
        self.copied = {"k_scale": LINE}
        self.rows8 = _transforms(_swizzle(head_dim))
        self.rows16 = _transforms(_swizzle(2 * head_dim), 2)
        self.columns8 = _transforms(_swizzle(block))
        self.tile_type = _shape((ROWS, block), jnp.int32, _SUM)
        self.float_type = _shape((ROWS, block), jnp.float32, _SUM)
        self.code_type = _shape((ROWS, block), jnp.int8, plgpu.Layout.WGMMA_8BIT)
        self.row_type = _shape((ROWS,), jnp.float32, _ROW)
        self.sum_type = _shape((ROWS, head_dim), jnp.int32, _SUM)
        # However long the walk, s32 holds it.
        steps = -(-plan.kv_len // block) * block
        self.top_code = min(127.0, 2.0**31 / (128 * steps))

    def memory(self, name: str, lead: tuple[int, ...], rows: int):
        """As `Half.memory`."""
        head_dim = self.plan.head_dim
        if name == "k_t":
            return plgpu.SMEM((*lead, head_dim, rows), jnp.int8, transforms=self.columns8)
        if name.endswith("8"):
            return plgpu.SMEM((*lead, rows, head_dim), jnp.int8, transforms=self.rows8)
        if name in self.copied:
            return plgpu.SMEM((*lead, self.copied[name]), jnp.float32)
        half = jnp.dtype(self.plan.variant.half)
        return plgpu.SMEM((*lead, rows, head_dim), half, transforms=self.rows16)

    def source(self, ref, name: str, b, head, rows):
        """As `Half.source`."""
        if name == "k_t":
            return ref.at[b, head, div(rows.start, rows.size)]
        if name in self.copied:
            size = self.copied[name]
            return ref.at[b, head, pl.ds(div(rows.start, rows.size) * size, size)]
        return ref.at[b, rows, head]

    def of_owner(self, load):
        """As `Half.of_owner`."""
        return [load(name) for name in ("q_scale", "minus_lse", "minus_delta")]

    def start(self):
        """As `Half.start`: sums, and the scales of their rows."""
        width = self.plan.head_dim // 2
        body = lambda: [[ptx.i32(0)] * width, [ptx.f32(SMALLEST)] * 2]  # noqa: E731
        return tuple(_inline(body, [], [self.sum_type, self.row_type]))

    def tile(self, own, ring, fixed, load, sums, where, wait, release, take, give):
        """As `Half.tile`."""
        del load
        wait(0)
        pending = self.begin(own, ring)
        if self.plan.config.schedule == "hold":
            pending = self.settle((), (), pending)[1]
        give()
        sums, operands = self.prepare(pending, ring, fixed, where, sums)
        release(0)
        wait(1)
        take()
        sums, _ = self.settle(self.multiply(sums, operands, ring), operands, ())
        release(1)
        return sums

    def begin(self, own, slots):
        """As `Registers.begin`; products of Q and K are added to `START`."""
        half = {"bfloat16": "f32.bf16.bf16", "float16": "f32.f16.f16"}[self.plan.variant.half]
        block = self.plan.config.block_kv

        def body(a8, a16, b8, b16):
            s8, s16 = self.rows8[1].swizzle, self.rows16[1].swizzle
            start = [ptx.i32(START)] * (block // 2)
            return [
                accumulate(block, _k_major(a8, s8), _k_major(b8, s8), start, "s32.s8.s8"),
                _wgmma(block, _k_major(a16, s16), _k_major(b16, s16), "f", half),
            ]

        given = zip((*own, *slots[0][:2]), (self.rows8, self.rows16) * 2, strict=True)
        return tuple(_inline(body, list(given), [self.tile_type, self.float_type]))

    def prepare(self, pending, slots, fixed, where, sums):
        """As `Registers.prepare`: sums in the units of scales that hold, and codes of dS."""
        position = position_of(self.plan, where)
        inputs = [*((x, _SUM) for x in pending), (sums[0], _SUM), (sums[1], _ROW)]
        inputs += [*((x, _ROW) for x in fixed), (slots[0][2], ())]
        inputs += [(x, _SCALAR) for x in position.values()]

        def body(scores, d_p, total, scales, row_scale, minus_lse, minus_delta, lines, *place):
            scores = _wait(1, scores)
            if position:
                fields = dict(zip(position, (x[0] for x in place), strict=True))
                scores = tile_math.mask_scores(scores, Position(**fields), is_int=True)
            numbers = _numbers_of_keys(row_scale, minus_lse, minus_delta, lines)
            scale, shift, factor, summand = numbers
            p = probabilities(scores, scale, shift, bool(position))
            waited = enumerate(zip(p, _wait(0, d_p), strict=True))
            d_s = [ptx.fmul(x, ptx.fma(y, factor(i), summand(i))) for i, (x, y) in waited]
            total, scales = grow(total, scales, d_s, self.top_code)
            return [total, scales, _opaque(encode(d_s, scales))]

        *sums, codes = _inline(body, inputs, [self.sum_type, self.row_type, self.code_type])
        return tuple(sums), [codes]

    def advance(self, sums, operands, slots, own, next_slots, give):
        """As `Registers.advance`; there are registers for all three products."""
        sums = self.multiply(sums, operands, slots)
        pending = self.begin(own, next_slots)
        give()
        return self.settle(sums, operands, pending)

    def multiply(self, sums, operands, slots):
        """Starts adding the product of codes of dS and K^T."""
        (turned,) = slots[1]
        inputs = [(sums[0], _SUM), (operands[0], self.code_type.layout), (turned, self.columns8)]

        def body(total, words, ref):
            a = [words[i : i + 4] for i in range(0, len(words), 4)]
            b = _k_major(ref, self.columns8[1].swizzle)
            return [accumulate(self.plan.head_dim, a, b, total, "s32.s8.s8")]

        return (*_inline(body, inputs, [self.sum_type]), sums[1])

    def settle(self, sums, operands, pending):
        """As `Registers.settle`."""
        given = [*sums[:1], *pending, *operands]
        types = [self.sum_type] * len(sums[:1]) + [self.tile_type, self.float_type][: len(pending)]
        layouts = [_SUM] * len(types) + [self.code_type.layout] * len(operands)
        done = settled(given, layouts, types)
        return (*done[: len(sums[:1])], *sums[1:]), done[len(sums[:1]) :]

    def finish(self, sums, load, mean):
        """As `Half.finish`: dQ with the share of the mean key."""
        extra = []
        if mean is not None:
            extra = [(load("rest"), _ROW), (plgpu.load(mean, layout=_COL, optimized=False), _COL)]

        def body(total, scales, *extra):
            scales = [ptx.fmul(x, ptx.f32(self.scale)) for x in scales]
            total = [ptx.fmul(ptx.to_float(x), scales[i // 2 % 2]) for i, x in enumerate(total)]
            if extra:
                rest, mean = extra
                total = [
                    ptx.fma(rest[i // 2 % 2], mean[i // 4 * 2 + i % 2], x)
                    for i, x in enumerate(total)
                ]
            return [total]

        stored = _shape((ROWS, self.plan.head_dim), jnp.float32, plgpu.Layout.WGMMA)
        return _inline(body, [(sums[0], _SUM), (sums[1], _ROW), *extra], [stored])


def _numbers_of_keys(row_scale, minus_lse, minus_delta, lines):
    """Scale and shift of S, factor and summand of dP, of element i of a tile, as functions of i."""
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
        """Starts ``K Q^T``, added to `START`."""
        block = self.plan.config.block_kv

        def body(a, b):
            operands = (_k_major(x, self.rows8[1].swizzle) for x in (a, b))
            start = [ptx.i32(START)] * (block // 2)
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
            scale, shift, minus = _numbers_of_queries(lines, row_scale[0], block)
            scores = _wait(1, scores)
            if position:
                fields = dict(zip(position, (x[0] for x in place), strict=True))
                scores = tile_math.mask_scores(scores, Position(**fields), is_int=True)
            p = probabilities(scores, scale, shift, bool(position))
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


def _numbers_of_queries(lines, row_scale, block: int):
    """Scale and shift of S, and minus delta, of element i of a tile, as functions of i."""
    pairs, deltas = {}, {}

    def pair(i):
        j = i // 4
        if (j, 0) not in pairs:
            values = shared(lines, thread_columns(j, 2), 4)
            for c in range(2):
                scale = ptx.fmul(row_scale, values[2 * c + 1])
                pairs[j, c] = scale, shift_of(values[2 * c], scale)
        return pairs[j, i % 2]

    def minus(i):
        j = i // 4
        if j not in deltas:
            place = ptx.add(thread_columns(j, 1), ptx.i64(4 * 2 * block))
            deltas[j] = shared(lines, place, 2)
        return deltas[j][i % 2]

    return lambda i: pair(i)[0], lambda i: pair(i)[1], minus
