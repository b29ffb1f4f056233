# SPDX-License-Identifier: Apache-2.0
"""Quantisation of attention operands on Hopper: two passes over K and V, one over Q.

`quantize_qkv` turns 16-bit ``Q [B, T, N, H]``, ``K, V [B, S, K, H]`` into what the 8-bit attention
kernel reads: Q with a scale per row, ``K - mean(K)`` with eight scales per block of keys, FP8 V
transposed to ``[B, K, H, S]`` with a scale per channel. Memory is the bound:

* statistics: K and V are read once, giving partial sums of K and partial maxima of V,
* one kernel each for Q, K and V reads 2 and writes 1 byte per element. That of Q also gives
  ``q · mean(K)``, what smoothing takes from each row of logits. The attention kernel can do the
  part of Q itself, which saves writing its codes and reading them again.

Every thread owns 8 neighbouring channels (one 16-byte load). The encoders lay the heads of a token
side by side, so that blocks that run at the same time read whole rows of memory. Maxima stay within
a warp: no shared memory is used. Tokens beyond a sequence's length are never read, so that NaN
there cannot spread.

Measured and left out, for 4 x 4096 tokens and 32 heads of 128. On an H100: a cluster of blocks per
head that takes the statistics, meets at the cluster's barrier and encodes from the cache (291 us
for K and V, against some 270), and statistics of K and V apart, by rows of memory and with sixteen
loads in flight (137 us, against some 110). On an H200: one launch in which a few heads' statistics
are taken just before their codes, so that the codes read from the cache, and blocks wait for each
other through counters in memory. It takes as long as the two passes (207 us, against 205), with one
to eight heads at a time and whatever lay between; a copy of what it has to move would take 120.

References: SageAttention (arXiv 2410.02367), sections 4.2 and 4.6; SageAttention2
(arXiv 2411.10958), sections 3.1 to 3.3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx

HEAD_DIMS = (64, 96, 128, 192, 256)
SEQ_PAD = 128  # tokens: outputs are padded to this, with zeros
ROW_TAIL = 192  # numbers after the rows' scales, which keep the loads of the last tile in bounds
TINY = 1e-12  # smallest group maximum: a group of zeros gets a positive scale and zero codes
LARGEST = {"int8": 127.0, "e4m3": 448.0}
_DTYPES = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
_SCALAR = plgpu.Layout.WG_SPLAT(())
# Within 16 tokens V is stored in this order; position 4t+{0,1} holds token 2t+{0,1} and position
# 4t+{2,3} token 8+2t+{0,1}. Then registers of the score tile are an 8-bit operand as they stand.
V_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


class AttentionOperands(NamedTuple):
    """What the attention kernel reads.

    Args:
        q: int8 or e4m3 [B, Tp, N, H], Tp = T rounded up to 128, zeros beyond T; or 16-bit
            [B, T, N, H].
        k: same format, [B, Sp, K, H], Sp = S rounded up to the scale block; or 16-bit [B, S, K, H].
        v: e4m3 [B, K, H, Sv], tokens permuted within 16, Sv = S rounded up to 128; or 16-bit
            [B, S, K, H].
        q_scale: float32 [B, N, Tp + 192], a scale per row; the tail only keeps loads in bounds.
        k_scale: float32 [B, K, Sp / scale_block, 8], by token index modulo 8.
        v_scale: float32 [B, K, H].
        row_const: float32 [B, N, Tp + 192], ``q · mean(K)``, or None without smoothing.
        k_mean: float32 [B, K, H], or None without smoothing. Where Q is left 16-bit beside an 8-bit
            K, the attention kernel quantises it, and takes ``q · mean(K)`` with this.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_scale: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    row_const: jax.Array | None = None
    k_mean: jax.Array | None = None


# -- what one thread does --------------------------------------------------------------------------


def _offset(parts, itemsize: int):
    """``sum(index * stride) * itemsize`` in 64 bits from i32 indices."""
    total = ptx.i64(0)
    for index, stride in parts:
        total = ptx.add(total, ptx.mul(ptx.widen(index), ptx.i64(stride * itemsize)))
    return total


def _element(shape, index, itemsize: int):
    """Byte offset of an element of a row-major array; ``index`` has an i32 register per axis."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return _offset(list(zip(index, strides, strict=True)), itemsize)


def _load8(ref, offset, ok, space="global.L1::no_allocate", shift: int = 0):
    """Eight 16-bit values as four words; zeros where ``ok`` is false.

    ``shift`` is added to the offset as part of the instruction, which saves a 64-bit product.
    """
    text = (
        "{ .reg .pred p; setp.ne.b32 p, $5, 0;\n"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;\n"
        f"@p ld.{space}.v4.b32 {{$0, $1, $2, $3}}, [$4+{shift}]; }}"
    )
    return ptx.asm(text, "rrrr", [ptx.address(ref, offset), ptx.flag(ok)], effects=True)


def _load_f32x8(ref, offset):
    out = []
    for part in (0, 16):
        where = ptx.address(ref, ptx.add(offset, ptx.i64(part)))
        out += ptx.asm("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "ffff", [where], effects=True)
    return out


def _load_limit(ref, b):
    """The length of sequence ``b``."""
    where = ptx.address(ref, _offset([(b, 1)], 4))
    return ptx.asm("ld.global.b32 $0, [$1];", "r", [where], effects=True)[0]


def _floats(words, is_bf16: bool):
    """Eight float32 from four words of 16-bit pairs."""
    if is_bf16:
        text = (
            "{ .reg .b32 lo, hi; shl.b32 lo, $2, 16; and.b32 hi, $2, -65536;\n"
            "mov.b32 $0, lo; mov.b32 $1, hi; }"
        )
    else:
        text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }"
    return [x for word in words for x in ptx.asm(text, "ff", [word])]


def _int8x4(values):
    """Four float32 rounded to nearest even and packed as int8, the first in the lowest byte."""
    text = (
        "{ .reg .s32 a, b, c, d; .reg .b32 t;\n"
        "cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2;\n"
        "cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;\n"
        "cvt.pack.sat.s8.s32.b32 t, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, t; }"
    )
    return ptx.asm(text, "r", values)[0]


def _abs_max(values, start=None):
    best = start
    for value in values:
        size = ptx.fabs(value)
        best = size if best is None else ptx.fmax(best, size)
    return best


def _over_lanes(combine, x, distances):
    for distance in distances:
        x = combine(x, ptx.shuffle_xor(x, distance))
    return x


class _Lanes:
    """How 128 threads cover heads or tokens: ``count`` lanes, a power of two, for one of a head.

    Each lane holds 8 channels; at head_dim 96 and 192 a quarter of them is idle.
    """

    def __init__(self, head_dim: int):
        self.head_dim = head_dim
        self.count = 1 << (head_dim // 8 - 1).bit_length()
        self.rows = 128 // self.count
        self.distances = [d for d in (1, 2, 4, 8, 16) if d < self.count]

    def place(self):
        """(row of lanes, first channel, channel exists)."""
        tid = ptx.thread()
        channel = ptx.mul(ptx.rem(tid, ptx.i32(self.count)), ptx.i32(8))
        return ptx.div(tid, ptx.i32(self.count)), channel, ptx.lt(channel, ptx.i32(self.head_dim))

    def place_heads(self, group, heads: int):
        """(head, first channel, both exist): the rows of lanes are heads of a group."""
        row, channel, exists = self.place()
        head = ptx.add(ptx.mul(group, ptx.i32(self.rows)), row)
        return head, channel, ptx.both(exists, ptx.lt(head, ptx.i32(heads)))


def _call(body, outs, grid, args):
    """Runs ``body(refs, axes)`` in blocks of 128 threads over a three-dimensional grid.

    Blocks that are neighbours along the first axis run at the same time.
    """
    names = ("x", "y", "z")
    count = len(args) + len(outs)

    def kernel(*refs):
        @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * count, (_SCALAR,) * 3))
        def run(ctx, refs, axes):
            del ctx
            body(refs, [ptx.unpack(a)[0] for a in axes])

        run(tuple(refs), tuple(lax.axis_index(name) for name in names))

    return plgpu.kernel(
        kernel,
        out_type=outs,
        grid=grid,
        grid_names=names,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*args)


# -- kernels ---------------------------------------------------------------------------------------


# Under `jit` of their own, calls that a forward and its backward have in common are one to XLA.
@functools.partial(jax.jit, static_argnames=("chunk",))
def kv_statistics(k, v, lengths, *, chunk=256):
    """Mean of K over tokens and largest magnitude of V per channel, in one pass over both.

    Args:
        k: bfloat16 or float16 [B, S, K, H], H one of `HEAD_DIMS`.
        v: like ``k``, or None.
        lengths: int32 [B], valid tokens.
        chunk: tokens per block of threads.

    Returns:
        mean float32 [B, K, H], amax float32 [B, K, H] or None without V.
    """
    batch, s_len, heads, head_dim = k.shape
    lanes, is_bf16 = _Lanes(head_dim), k.dtype == jnp.bfloat16
    chunks = pl.cdiv(s_len, chunk)
    partial = jax.ShapeDtypeStruct((batch, heads, chunks * 4, head_dim), jnp.float32)
    same_warp = [d for d in (1, 2, 4, 8, 16) if d >= lanes.count]
    row_bytes = 2 * heads * head_dim
    unroll = 4  # rows of lanes; all loads at once would take the registers of another block
    arrays = [k] if v is None else [k, v]
    add = lambda x, total: ptx.fadd(total, x)  # noqa: E731
    rules = (add, lambda x, top: _abs_max([x], top))[: len(arrays)]  # what numbers do to a result

    def body(refs, axes):
        array_refs, length_ref, out_refs = (
            refs[: len(arrays)],
            refs[len(arrays)],
            refs[-len(arrays) :],
        )
        piece, head, b = axes
        limit = _load_limit(length_ref, b)
        local, channel, exists = lanes.place()
        token = ptx.add(ptx.mul(piece, ptx.i32(chunk)), local)

        def take(i, found):
            first = ptx.add(token, ptx.mul(i, ptx.i32(unroll * lanes.rows)))
            offset = _element(k.shape, (b, first, head, channel), 2)
            steps = [j * lanes.rows for j in range(unroll)]
            valid = [ptx.both(exists, ptx.lt(ptx.add(first, ptx.i32(j)), limit)) for j in steps]
            loaded = [
                [
                    _load8(ref, offset, ok, shift=j * row_bytes)
                    for j, ok in zip(steps, valid, strict=True)
                ]
                for ref in array_refs
            ]
            results = []
            for words, rule, values in zip(loaded, rules, found, strict=True):
                for word in words:
                    pairs = zip(_floats(word, is_bf16), values, strict=True)
                    values = [rule(x, value) for x, value in pairs]
                results.append(values)
            return results

        zeros = [[ptx.f32(0.0)] * 8 for _ in arrays]
        found = ptx.loop(chunk // lanes.rows // unroll, take, zeros)
        found = [
            [_over_lanes(combine, x, same_warp) for x in values]
            for combine, values in zip((ptx.fadd, ptx.fmax), found, strict=False)
        ]
        warp, lane = (f(ptx.thread(), ptx.i32(32)) for f in (ptx.div, ptx.rem))
        slot = ptx.add(ptx.mul(piece, ptx.i32(4)), warp)
        offset = _element(partial.shape, (b, head, slot, channel), 4)
        first = ptx.both(exists, ptx.lt(lane, ptx.i32(lanes.count)))
        for ref, values in zip(out_refs, found, strict=True):
            ptx.store(ref, offset, values[:4], first)
            ptx.store(ref, ptx.add(offset, ptx.i64(16)), values[4:], first)

    grid = (chunks, heads, batch)
    sums, *tops = _call(body, [partial] * len(arrays), grid, (*arrays, lengths))
    mean = sums.sum(2) / jnp.maximum(lengths, 1)[:, None, None]
    return mean, tops[0].max(2) if tops else None


@functools.partial(jax.jit, static_argnames=("qk", "block"))
def quantize_q(q, lengths, mean=None, *, qk="int8", block=32):
    """Codes and a scale per row of Q, and its product with the mean key.

    Args:
        q: bfloat16 or float16 [B, T, N, H], H one of `HEAD_DIMS`.
        lengths: int32 [B], valid tokens; later rows give zeros.
        mean: float32 [B, K, H], mean key, or None.
        qk: "int8" or "e4m3".
        block: tokens per block of threads.

    Returns:
        Codes [B, Tp, N, H] with Tp = T rounded up to 128, scales float32 [B, N, Tp + 192], and
        ``q · mean`` of the same shape or None.
    """
    batch, t_len, heads, head_dim = q.shape
    lanes, is_bf16 = _Lanes(head_dim), q.dtype == jnp.bfloat16
    padded = pl.cdiv(t_len, SEQ_PAD) * SEQ_PAD
    codes = jax.ShapeDtypeStruct((batch, padded, heads, head_dim), _DTYPES[qk])
    rows_type = jax.ShapeDtypeStruct((batch, heads, padded + ROW_TAIL), jnp.float32)
    groups = 1 if mean is None else heads // mean.shape[1]

    def body(refs, axes):
        q_ref, length_ref, *mean_ref, codes_ref, scale_ref = refs[: 5 - (mean is None)]
        group, tile, b = axes
        limit = _load_limit(length_ref, b)
        head, channel, exists = lanes.place_heads(group, heads)
        first = ptx.both(exists, ptx.eq(channel, ptx.i32(0)))
        start = ptx.mul(tile, ptx.i32(block))
        rows = [ptx.add(start, ptx.i32(step)) for step in range(block)]
        words = [
            _load8(
                q_ref,
                _element(q.shape, (b, row, head, channel), 2),
                ptx.both(exists, ptx.lt(row, limit)),
            )
            for row in rows
        ]
        shift = None
        if mean is not None:
            # A lane without channels multiplies zeros; it must still read inside the array.
            channels, kv_head = (
                ptx.select(exists, x, ptx.i32(0)) for x in (channel, ptx.div(head, ptx.i32(groups)))
            )
            shift = _load_f32x8(mean_ref[0], _element(mean.shape, (b, kv_head, channels), 4))
        for row, word in zip(rows, words, strict=True):
            row_codes, scale, dot = _encode_row(word, is_bf16, lanes, qk, shift)
            place = _element(codes.shape, (b, row, head, channel), 1)
            ptx.store(codes_ref, place, row_codes, exists)
            place = _element(rows_type.shape, (b, head, row), 4)
            ptx.store(scale_ref, place, [scale], first)
            if dot is not None:
                ptx.store(refs[-1], place, [dot], first)

    args = (q, lengths) if mean is None else (q, lengths, mean)
    outs = [codes, rows_type] if mean is None else [codes, rows_type, rows_type]
    result = _call(body, outs, (pl.cdiv(heads, lanes.rows), padded // block, batch), args)
    return result if mean is not None else [*result, None]


def _encode_row(word, is_bf16: bool, lanes: _Lanes, qk: str, shift):
    """Two words of codes, the row's scale, and its product with ``shift`` or None."""
    encode = _int8x4 if qk == "int8" else ptx.e4m3x4
    x = _floats(word, is_bf16)
    top = ptx.fmax(_over_lanes(ptx.fmax, _abs_max(x), lanes.distances), ptx.f32(TINY))
    factor = ptx.fdiv(ptx.f32(LARGEST[qk]), top)
    scaled = [ptx.fmul(value, factor) for value in x]
    dot = None
    if shift is not None:
        dot = ptx.f32(0.0)
        for value, m in zip(x, shift, strict=True):
            dot = ptx.fma(value, m, dot)
        dot = _over_lanes(ptx.fadd, dot, lanes.distances)
    scale = ptx.fmul(top, ptx.f32(1 / LARGEST[qk]))
    return [encode(scaled[:4]), encode(scaled[4:])], scale, dot


def encode_q_tile(raw, codes, scales, dots, mean, limit, *, dtype, qk, swizzle, rows=64):
    """One warpgroup's rows of Q in shared memory: codes and scales, as `quantize_q` makes them.

    Args:
        raw: reference to 16-bit [rows, H].
        codes: reference to 8-bit [rows / 8, H / swizzle, 8, swizzle], swizzled.
        scales: reference to float32 [rows].
        dots: reference to float32 [rows] for ``q · mean``.
        mean: reference to float32 [B, K, H] and registers of the first two indices, or None.
        limit: register: later rows give zeros and may hold anything.
        dtype: of Q.
        qk: "int8" or "e4m3".
        swizzle: bytes of a swizzled row of ``codes``.
        rows: rows.
    """
    head_dim = ptx.shape(raw)[1]
    lanes, is_bf16 = _Lanes(head_dim), dtype == jnp.bfloat16
    start, channel, exists = lanes.place()
    first = ptx.eq(channel, ptx.i32(0))
    shift = None
    if mean is not None:
        ref, b, head = mean
        inside = ptx.select(exists, channel, ptx.i32(0))
        shift = _load_f32x8(ref, _element(ptx.shape(ref), (b, head, inside), 4))
    for step in range(0, rows, lanes.rows):
        row = ptx.add(start, ptx.i32(step))
        ok = ptx.both(exists, ptx.lt(row, limit))
        word = _load8(raw, _element((rows, head_dim), (row, channel), 2), ok, "shared")
        row_codes, scale, dot = _encode_row(word, is_bf16, lanes, qk, shift)
        place = ptx.widen(_swizzled(row, channel, head_dim, swizzle))
        ptx.store(codes, place, row_codes, exists, "shared")
        place = _element((rows,), (row,), 4)
        ptx.store(scales, place, [scale], first, "shared")
        if dot is not None:
            ptx.store(dots, place, [dot], first, "shared")


def _swizzled(row, column, width: int, swizzle: int):
    """Byte of an 8-bit [rows, width] operand that is tiled (8, swizzle) and swizzled."""
    tile = ptx.mul(ptx.div(row, ptx.i32(8)), ptx.i32(width // swizzle))
    tile = ptx.add(tile, ptx.div(column, ptx.i32(swizzle)))
    line = ptx.add(ptx.mul(tile, ptx.i32(8)), ptx.rem(row, ptx.i32(8)))
    offset = ptx.add(ptx.mul(line, ptx.i32(swizzle)), ptx.rem(column, ptx.i32(swizzle)))
    # The hardware exchanges 16-byte chunks by the number of the 128-byte line they are in.
    turn = ptx.rem(ptx.div(offset, ptx.i32(128)), ptx.i32(swizzle // 16))
    return ptx.xor(offset, ptx.mul(turn, ptx.i32(16)))


@functools.partial(jax.jit, static_argnames=("scale_block", "qk"))
def quantize_k(k, lengths, mean=None, *, scale_block=256, qk="int8"):
    """Codes of ``K - mean`` and eight scales per block of keys, by token index modulo 8.

    Args:
        k: bfloat16 or float16 [B, S, K, H], H one of `HEAD_DIMS`.
        lengths: int32 [B], valid tokens; later ones give zeros.
        mean: float32 [B, K, H], or None to subtract nothing.
        scale_block: tokens per block; a multiple of 16.
        qk: "int8" or "e4m3".

    Returns:
        Codes [B, Sp, K, H] with Sp = S rounded up to the block, float32 [B, K, Sp / block, 8].
    """
    batch, s_len, heads, head_dim = k.shape
    lanes, is_bf16 = _Lanes(head_dim), k.dtype == jnp.bfloat16
    tiles, groups = pl.cdiv(s_len, scale_block), pl.cdiv(heads, lanes.rows)
    codes = jax.ShapeDtypeStruct((batch, tiles * scale_block, heads, head_dim), _DTYPES[qk])
    scales = jax.ShapeDtypeStruct((batch, heads, tiles, 8), jnp.float32)
    encode = _int8x4 if qk == "int8" else ptx.e4m3x4
    steps, row = range(0, scale_block, 8), heads * head_dim

    def body(refs, axes):
        k_ref, length_ref, *mean_ref, codes_ref, scale_ref = refs
        piece, tile, b = axes
        limit = _load_limit(length_ref, b)
        group, residue = ptx.rem(piece, ptx.i32(groups)), ptx.div(piece, ptx.i32(groups))
        head, channel, exists = lanes.place_heads(group, heads)
        shift = None
        if mean is not None:
            inside = [ptx.select(exists, x, ptx.i32(0)) for x in (head, channel)]
            shift = _load_f32x8(mean_ref[0], _element(mean.shape, (b, *inside), 4))

        def smoothed(word):
            values = _floats(word, is_bf16)
            if shift is None:
                return values
            return [ptx.fsub(x, m) for x, m in zip(values, shift, strict=True)]

        start = ptx.add(ptx.mul(tile, ptx.i32(scale_block)), residue)
        valid = [ptx.both(exists, ptx.lt(ptx.add(start, ptx.i32(j)), limit)) for j in steps]
        offset = _element(k.shape, (b, start, head, channel), 2)
        words = [
            _load8(k_ref, offset, ok, shift=2 * row * j) for j, ok in zip(steps, valid, strict=True)
        ]
        top = ptx.f32(TINY)
        for word, ok in zip(words, valid, strict=True):  # tokens that are not there are 0 - mean
            top = ptx.fmax(top, ptx.select(ok, _abs_max(smoothed(word)), ptx.f32(0.0)))
        top = _over_lanes(ptx.fmax, top, lanes.distances)
        factor = ptx.fdiv(ptx.f32(LARGEST[qk]), top)
        offset = _element(codes.shape, (b, start, head, channel), 1)
        for j, word, ok in zip(steps, words, valid, strict=True):
            scaled = [ptx.fmul(x, factor) for x in smoothed(word)]
            found = [ptx.select(ok, encode(part), ptx.i32(0)) for part in (scaled[:4], scaled[4:])]
            ptx.store(codes_ref, offset, found, exists, shift=row * j)
        place = _element(scales.shape, (b, head, tile, residue), 4)
        first = ptx.both(exists, ptx.eq(channel, ptx.i32(0)))
        ptx.store(scale_ref, place, [ptx.fmul(top, ptx.f32(1 / LARGEST[qk]))], first)

    args = (k, lengths) if mean is None else (k, lengths, mean)
    return _call(body, [codes, scales], (8 * groups, tiles, batch), args)


def quantize_v(v, scale, lengths):
    """FP8 codes of V over ``scale``, transposed to [B, K, H, Sv] and permuted within 16 tokens.

    Args:
        v: bfloat16 or float16 [B, S, K, H], H one of `HEAD_DIMS`.
        scale: float32 [B, K, H], the channel's largest magnitude over 448.
        lengths: int32 [B], valid tokens; later ones give zeros.

    Returns:
        e4m3 [B, K, H, Sv], Sv = S rounded up to 128.
    """
    batch, s_len, heads, head_dim = v.shape
    is_bf16, row_bytes = v.dtype == jnp.bfloat16, 2 * heads * head_dim
    tiles = pl.cdiv(s_len, SEQ_PAD)
    columns = head_dim // 32  # one warp: 128 tokens x 32 channels
    blocks = pl.cdiv(heads * columns, 4)
    out = jax.ShapeDtypeStruct((batch, heads, head_dim, tiles * SEQ_PAD), jnp.float8_e4m3fn)

    def body(refs, axes):
        v_ref, scale_ref, length_ref, codes_ref = refs
        block, tile, b = axes
        limit = _load_limit(length_ref, b)
        there, head, part, lane = _place_columns(block, heads, columns)
        channel = ptx.mul(part, ptx.i32(32))
        channel = ptx.add(channel, ptx.mul(ptx.rem(lane, ptx.i32(4)), ptx.i32(8)))
        token = ptx.mul(tile, ptx.i32(SEQ_PAD))
        token = ptx.add(token, ptx.mul(ptx.div(lane, ptx.i32(4)), ptx.i32(16)))
        scales = _load_f32x8(scale_ref, _element(scale.shape, (b, head, channel), 4))
        factors = [ptx.fdiv(ptx.f32(1.0), x) for x in scales]
        first = _element(v.shape, (b, token, head, channel), 2)
        packed = [[] for _ in range(8)]  # words of four tokens, by channel
        for start in range(0, 16, 4):  # codes take a quarter of the registers of numbers
            group = []
            for i in V_ORDER[start : start + 4]:
                ok = ptx.both(there, ptx.lt(ptx.add(token, ptx.i32(i)), limit))
                group.append(_floats(_load8(v_ref, first, ok, shift=i * row_bytes), is_bf16))
            for c, values in enumerate(zip(*group, strict=True)):
                packed[c].append(ptx.e4m3x4([ptx.fmul(x, factors[c]) for x in values]))
        where = _element(out.shape, (b, head, channel, token), 1)
        for c, codes in enumerate(packed):
            ptx.store(codes_ref, where, codes, there, shift=c * out.shape[3])

    return _call(body, [out], (blocks, tiles, batch), (v, scale, lengths))[0]


def turn_codes(codes, *, block=128):
    """INT8 codes with tokens contiguous, for products that sum over tokens.

    Args:
        codes: int8 [B, Lp, heads, H], H 64 or 128, Lp a multiple of 128.
        block: tokens of a tile: 64 or 128.

    Returns:
        int8 [B, heads, Lp / block, H, block], tokens permuted within 16 as `V_ORDER` says.
    """
    out, place_of, grid = _turning(codes.shape, block)

    def body(refs, axes):
        there, b, head, channels, token = place_of(axes)
        pairs = []
        for i in range(16):
            at = lambda c, i=i: _element(codes.shape, (b, ptx.add(token, ptx.i32(i)), head, c), 1)  # noqa: E731
            pairs.append([ptx.load_words(refs[0], at(c), 2, there) for c in channels])
        _store_turned(refs[1], out.shape, pairs, b, head, channels, token, there)

    return _call(body, [out], grid, (codes,))[0]


def _turning(shape, block: int):
    """How codes are turned round: the result's type, the place of a thread, and the grid.

    The place is (exists, batch, head, first channels of two eights, first of 16 tokens), a function
    of the grid's axes. The two lie half a head apart, so that lanes side by side read a line.
    """
    batch, padded, heads, head_dim = shape
    lanes = head_dim // 16
    tokens = 32 // lanes * 16  # of a warp
    out = jax.ShapeDtypeStruct((batch, heads, padded // block, head_dim, block), jnp.int8)

    def place(axes):
        group, tile, b = axes
        tid = ptx.thread()
        warp, lane = ptx.div(tid, ptx.i32(32)), ptx.rem(tid, ptx.i32(32))
        head = ptx.add(ptx.mul(group, ptx.i32(4)), warp)
        there = ptx.lt(head, ptx.i32(heads))
        head = ptx.select(there, head, ptx.i32(0))
        channel = ptx.mul(ptx.rem(lane, ptx.i32(lanes)), ptx.i32(8))
        channels = [channel, ptx.add(channel, ptx.i32(head_dim // 2))]
        token = ptx.mul(ptx.div(lane, ptx.i32(lanes)), ptx.i32(16))
        return there, b, head, channels, ptx.add(ptx.mul(tile, ptx.i32(tokens)), token)

    return out, place, (pl.cdiv(heads, 4), padded // tokens, batch)


def _store_turned(ref, shape, pairs, b, head, channels, token, there):
    """Stores 16 tokens with tokens contiguous; ``pairs[t]`` are two words for each 8 channels."""
    block = ptx.i32(shape[-1])
    tile, within = ptx.div(token, block), ptx.rem(token, block)
    for part, channel in enumerate(channels):
        first = _element(shape, (b, head, tile, channel, within), 1)
        for half in range(2):
            columns = [[], [], [], []]  # words of four tokens, by channel
            for i in range(0, 16, 4):
                quads = _turned_words([pairs[t][part][half] for t in V_ORDER[i : i + 4]])
                for words, word in zip(columns, quads, strict=True):
                    words.append(word)
            for c, words in enumerate(columns):
                ptx.store(ref, first, words, there, shift=(4 * half + c) * shape[-1])


def _turned_words(words):
    """Four words of four bytes, as the words of the first, the second, ... byte of each."""
    text = (
        "{ .reg .b32 x<4>;\n"
        "prmt.b32 x0, $4, $5, 20800; prmt.b32 x1, $6, $7, 20800;\n"  # two lowest bytes of each
        "prmt.b32 x2, $4, $5, 29538; prmt.b32 x3, $6, $7, 29538;\n"  # two highest
        "prmt.b32 $0, x0, x1, 21520; prmt.b32 $1, x0, x1, 30258;\n"
        "prmt.b32 $2, x2, x3, 21520; prmt.b32 $3, x2, x3, 30258; }"
    )
    return ptx.asm(text, "rrrr", words)


def _place_columns(block, heads: int, columns: int):
    """(exists, head, part of 32 channels, lane) of a warp that turns 128 tokens round."""
    tid = ptx.thread()
    warp, lane = ptx.div(tid, ptx.i32(32)), ptx.rem(tid, ptx.i32(32))
    column = ptx.add(ptx.mul(block, ptx.i32(4)), warp)
    there = ptx.lt(column, ptx.i32(heads * columns))
    column = ptx.select(there, column, ptx.i32(0))
    return there, ptx.div(column, ptx.i32(columns)), ptx.rem(column, ptx.i32(columns)), lane


@functools.partial(jax.jit, static_argnames=("scale_block", "smooth_k", "qk", "pv", "leave_q"))
def quantize_qkv(
    q, k, v, *, scale_block=256, smooth_k=True, qk="int8", pv="e4m3", q_lengths=None,
    kv_lengths=None, leave_q=False,
) -> AttentionOperands:  # fmt: skip
    """Quantises Q, K and V for `attention_forward`.

    Args:
        q: bfloat16 or float16 [B, T, N, H], H one of `HEAD_DIMS`.
        k: [B, S, K, H], same dtype.
        v: [B, S, K, H], same dtype.
        scale_block: keys that share a set of eight scales.
        smooth_k: subtract the mean key first.
        qk: "int8" or "e4m3".
        pv: "e4m3", or "half" to leave V as it is.
        q_lengths: int32 [B], valid queries, or None for all.
        kv_lengths: int32 [B], valid keys, or None for all.
        leave_q: leave Q to the attention kernel.

    Returns:
        `AttentionOperands`.

    Raises:
        NotImplementedError: other dtypes or head sizes.
    """
    for name, x in (("query", q), ("key", k), ("value", v)):
        _check(name, x)
    q_limit, kv_limit = (
        jnp.full(x.shape[:1], x.shape[1], jnp.int32)
        if limit is None
        else jnp.minimum(limit, x.shape[1]).astype(jnp.int32)
        for x, limit in ((q, q_lengths), (k, kv_lengths))
    )
    mean, top = kv_statistics(k, v if pv == "e4m3" else None, kv_limit)
    mean = mean if smooth_k else None
    k8, k_scale = quantize_k(k, kv_limit, mean, scale_block=scale_block, qk=qk)
    q_scale = row_const = v_scale = None
    if not leave_q:
        q, q_scale, row_const = quantize_q(q, q_limit, mean, qk=qk)
    if pv == "e4m3":
        v_scale = jnp.maximum(top, TINY) / LARGEST["e4m3"]
        v = quantize_v(v, v_scale, kv_limit)
    elif kv_lengths is not None:  # Zero times NaN beyond the length would be NaN.
        v = jnp.where((jnp.arange(v.shape[1]) < kv_limit[:, None])[..., None, None], v, 0)
    return AttentionOperands(q, k8, v, q_scale, k_scale, v_scale, row_const, mean)


def _check(name, x):
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{name} must be bfloat16 or float16 on sm90; got {x.dtype}")
    if x.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim of {name} must be one of {', '.join(map(str, HEAD_DIMS))} on sm90; "
            f"got {x.shape[-1]}: pad it with zeros"
        )
