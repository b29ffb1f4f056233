# SPDX-License-Identifier: Apache-2.0
"""One tile of attention in the registers of a Hopper warpgroup: masks, softmax, sums.

A ``wgmma`` accumulator tile [64, n] gives each thread four values per 8 columns j: (row g, column
2t), (row g, 2t+1), (row g+8, 2t), (row g+8, 2t+1) with g = lane // 4 and t = lane % 4. Register
4j + 2h + c therefore belongs to row half h and column parity c. Functions take and return lists of
such registers and touch nothing but `pallas_kernels._ptx`.

A score that a mask forbids is overwritten with a value no product can have; the maximum never
chooses it, and its probability is set to zero after everything else.
"""

from __future__ import annotations

import dataclasses
import math
import struct

from pallas_kernels import _ptx as ptx

LOG2E = math.log2(math.e)
# P is stored as e4m3, whose largest value is 448. The factor cancels in O / l.
E4M3_MAX = 448.0
# Start of the running maximum. Finite: a row with nothing to attend must not form inf - inf.
NO_MAX = -1e30
INT_MIN = -(2**31)
ROWS = 64  # query rows of one warpgroup: the M of wgmma


@dataclasses.dataclass(frozen=True)
class Variant:
    """Formats of one kernel.

    Args:
        qk: format of Q and K: "int8", "e4m3" or "half" (16 bits, as they came).
        pv: format of P and V: "e4m3" or "half".
        half: "bfloat16" or "float16".
        soft_cap: bound of the logits, or None.
    """

    qk: str = "int8"
    pv: str = "e4m3"
    half: str = "bfloat16"
    soft_cap: float | None = None

    @property
    def qk_bytes(self) -> int:
        """Bytes per element of Q and K."""
        return 2 if self.qk == "half" else 1

    @property
    def pv_bytes(self) -> int:
        """Bytes per element of V."""
        return 2 if self.pv == "half" else 1

    @property
    def ones(self) -> int:
        """Rows of ones below V^T, whose products are the row sums; 16-bit V has none."""
        return 8 if self.pv == "e4m3" else 0

    @property
    def p_log2(self) -> float:
        """Binary logarithm of the factor on P."""
        return math.log2(E4M3_MAX) if self.pv == "e4m3" else 0.0

    def logit_factor(self, scale: float) -> float:
        """What turns a product of Q and K into the argument of `_logit`."""
        return scale * LOG2E * (1.0 if self.soft_cap is None else 2.0 / self.soft_cap)


def thread_row_col():
    """This thread's first row in the tile (its second is 8 below) and its first column."""
    tid = ptx.thread()
    warp, lane = ptx.div(tid, ptx.i32(32)), ptx.rem(tid, ptx.i32(32))
    row = ptx.add(ptx.mul(warp, ptx.i32(16)), ptx.div(lane, ptx.i32(4)))
    return row, ptx.mul(ptx.rem(lane, ptx.i32(4)), ptx.i32(2))


# -- masks -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a tile lies and which pairs are allowed in it, as i32 registers.

    Args:
        row: first query.
        col: first key.
        q_len: queries from here on see nothing.
        kv_len: keys from here on are not seen.
        min_diff: lower bound of ``key - query``, or None.
        max_diff: upper bound of it, or None.
        q_ids: segment of the thread's two rows, or None.
        kv_ids: segment of its columns, two for every 8, or None.
        first_col: keys before it are not seen, or None.
    """

    row: object
    col: object
    q_len: object
    kv_len: object
    min_diff: object = None
    max_diff: object = None
    q_ids: tuple = ()
    kv_ids: tuple = ()
    first_col: object = None


def mask_scores(scores, position: Position, is_int: bool):
    """Overwrites the scores of forbidden pairs.

    Args:
        scores: registers of the tile.
        position: where it lies.
        is_int: scores are s32, not float32.

    Returns:
        Registers of the tile.
    """
    none = ptx.i32(INT_MIN) if is_int else ptx.f32(-math.inf)
    out = list(scores)
    for half, (first, last) in enumerate(_columns(position)):
        for j in range(len(scores) // 4):
            for parity in range(2):
                column = ptx.i32(8 * j + parity)
                ok = ptx.lt(column, last)
                if first is not None:
                    ok = ptx.both(ok, ptx.ge(column, first))
                if position.kv_ids:
                    same = ptx.eq(position.q_ids[half], position.kv_ids[2 * j + parity])
                    ok = ptx.both(ok, same)
                i = 4 * j + 2 * half + parity
                out[i] = ptx.select(ok, scores[i], none)
    return out


def _columns(position: Position):
    """First allowed and first forbidden column for each row half, counted from the thread's own."""
    row0, col0 = thread_row_col()
    base = ptx.add(position.col, col0)
    out = []
    for half in range(2):
        row = ptx.add(ptx.add(position.row, row0), ptx.i32(8 * half))
        last = position.kv_len
        if position.max_diff is not None:
            last = ptx.imin(last, ptx.add(ptx.add(row, position.max_diff), ptx.i32(1)))
        last = ptx.select(ptx.lt(row, position.q_len), last, ptx.i32(0))
        first = None
        if position.min_diff is not None:
            first = ptx.sub(ptx.add(row, position.min_diff), base)
        if position.first_col is not None:
            start = ptx.sub(position.first_col, base)
            first = start if first is None else ptx.imax(first, start)
        out.append((first, ptx.sub(last, base)))
    return out


# -- softmax ---------------------------------------------------------------------------------------


def maximum(values, is_int: bool):
    """Largest value over four independent chains; s32 pairs become three-input instructions."""
    pick = ptx.imax if is_int else ptx.fmax
    heads = []
    for chain in (values[i::4] for i in range(min(4, len(values)))):
        best = chain[0]
        for value in chain[1:]:
            best = pick(best, value)
        heads.append(best)
    best = heads[0]
    for value in heads[1:]:
        best = pick(best, value)
    return best


def softmax(variant: Variant, scores, m, row_scale, col_scale, shift=(), *, masked=False, tops=()):
    """One tile of online softmax.

    Args:
        variant: formats.
        scores: registers of the tile, s32 for "int8" and float32 for others.
        m: running maximum in units of log2, per row half.
        row_scale: scale of the two rows, with `Variant.logit_factor` folded in.
        col_scale: scales of even and odd columns, for each scale block of the tile; empty for 1.
        shift: with a soft cap, what is added to the scaled scores of each row half; else empty.
        masked: scores went through `mask_scores`.
        tops: maxima over the first half of the tile per (row half, parity), if already taken.

    Returns:
        Registers of P as an operand, new maxima, factors that bring old sums to them, and sums of
        P per row half (empty where V has rows of ones).
    """
    tiles = len(scores) // 4
    blocks = max(1, len(col_scale) // 2)
    per_block = tiles // blocks
    is_int = variant.qk == "int8"
    scale = [
        [[ptx.fmul(r, s) for s in col_scale[2 * b : 2 * b + 2]] or [r, r] for b in range(blocks)]
        for r in row_scale
    ]
    new_m, alpha = [], []
    for h in range(2):
        best = None
        for b in range(blocks):
            for c in range(2):
                group = scores[4 * b * per_block : 4 * (b + 1) * per_block][2 * h + c :: 4]
                if tops and blocks == 1 and not masked:
                    group = [tops[2 * h + c], *group[tiles // 2 :]]
                elif tops and blocks == 2 and b == 0 and not masked:
                    group = [tops[2 * h + c]]
                top = maximum(group, is_int)
                value = ptx.to_float(top) if is_int else top
                value = _logit(variant, value, scale[h][b][c], shift[h] if shift else None)
                if masked:  # A tile without one allowed key must not move the maximum.
                    value = ptx.select(_is_none(top, is_int), ptx.f32(NO_MAX), value)
                best = value if best is None else ptx.fmax(best, value)
        for distance in (1, 2):  # the four threads that share a row
            best = ptx.fmax(best, ptx.shuffle_xor(best, distance))
        new_m.append(ptx.fmax(m[h], best))
        alpha.append(ptx.exp2(ptx.fsub(m[h], new_m[h])))

    width = 2 if variant.pv == "half" else 4  # columns of one register of P
    packed, sums = [[], []], [None, None]
    for h in range(2):
        constant = variant.p_log2 + (0.0 if variant.soft_cap is None else variant.soft_cap * LOG2E)
        offset = ptx.fsub(ptx.f32(constant), new_m[h])
        for start in range(0, 2 * tiles, width):
            places = [divmod(i, 2) for i in range(start, start + width)]
            words = [scores[4 * j + 2 * h + c] for j, c in places]
            scales = [scale[h][j // per_block][c] for j, c in places]
            word, *part = _probabilities(
                variant, words, scales, offset, shift[h] if shift else None, masked
            )
            packed[h].append(word)
            for x in part:
                sums[h] = x if sums[h] is None else ptx.fadd(sums[h], x)
    # Operand order of A: per 8 (16 bits) or 16 (8 bits) columns, row half 0 then row half 1.
    p = [word for pair in zip(*packed, strict=True) for word in pair]
    if variant.pv == "e4m3":
        return p, new_m, alpha, []
    for distance in (1, 2):
        sums = [ptx.fadd(x, ptx.shuffle_xor(x, distance)) for x in sums]
    return p, new_m, alpha, sums


def _is_none(score, is_int):
    if is_int:
        return ptx.eq(score, ptx.i32(INT_MIN))
    return ptx.feq(score, ptx.f32(-math.inf))


def _logit(variant: Variant, score, scale, shift):
    """Logit in units of log2: ``score * scale``, or ``cap log2(e) tanh(z)`` under a soft cap.

    There ``2 log2(e) z = score * scale + shift`` and ``tanh z = 1 - 2 / (1 + exp(2 z))``.
    """
    if variant.soft_cap is None:
        return ptx.fmul(score, scale)
    bound = variant.soft_cap * LOG2E
    r = ptx.reciprocal(ptx.fadd(ptx.exp2(ptx.fma(score, scale, shift)), ptx.f32(1.0)))
    return ptx.fma(r, ptx.f32(-2.0 * bound), ptx.f32(bound))


def _hex(x: float) -> str:
    """A float32 in PTX's spelling."""
    return "0f" + struct.pack(">f", x).hex().upper()


def _probabilities(variant: Variant, words, scales, offset, shift, masked):
    """Neighbouring P of one row in one register: ``exp2(logit + offset)``, zero where masked.

    Stage by stage, so that independent instructions stand next to each other.

    Args:
        variant: formats.
        words: two scores for a 16-bit P, four for an 8-bit one.
        scales: scale of each.
        offset: ``log2(factor of P) - m``, plus the soft cap in units of log2.
        shift: see `softmax`.
        masked: see `softmax`.

    Returns:
        The register, and for a 16-bit P the sum of its two numbers before rounding.
    """
    n, is_int, is_half = len(words), variant.qk == "int8", variant.pv == "half"
    first = 2 if is_half else 1  # operand number of the first word
    word = [f"${first + i}" for i in range(n)]
    scale = [f"${first + n + i}" for i in range(n)]
    offset_, shift_ = f"${first + 2 * n}", f"${first + 2 * n + 1}"
    x = [f"x{i}" for i in range(n)]
    lines = [f".reg .f32 x<{n}>; .reg .b16 lo, hi; .reg .pred p;"]
    source = word
    if is_int:
        lines += [f"cvt.rn.f32.s32 {a}, {w};" for a, w in zip(x, word, strict=True)]
        source = x
    add = offset_ if variant.soft_cap is None else shift_
    lines += [f"fma.rn.f32 {x[i]}, {source[i]}, {scale[i]}, {add};" for i in range(n)]
    if variant.soft_cap is not None:
        slope = _hex(-2.0 * variant.soft_cap * LOG2E)
        lines += [f"ex2.approx.ftz.f32 {a}, {a};" for a in x]
        lines += [f"add.f32 {a}, {a}, {_hex(1.0)};" for a in x]
        lines += [f"rcp.approx.ftz.f32 {a}, {a};" for a in x]
        lines += [f"fma.rn.f32 {a}, {a}, {slope}, {offset_};" for a in x]
    lines += [f"ex2.approx.ftz.f32 {a}, {a};" for a in x]
    if masked:
        kind, none = ("s32", str(INT_MIN)) if is_int else ("f32", _hex(-math.inf))
        for a, w in zip(x, word, strict=True):
            lines += [f"setp.eq.{kind} p, {w}, {none};", f"selp.f32 {a}, {_hex(0.0)}, {a}, p;"]
    if is_half:
        name = {"bfloat16": "bf16x2", "float16": "f16x2"}[variant.half]
        lines += ["add.f32 $1, x0, x1;", f"cvt.rn.{name}.f32 $0, x1, x0;"]
    else:
        lines += [
            "cvt.rn.satfinite.e4m3x2.f32 lo, x1, x0;",
            "cvt.rn.satfinite.e4m3x2.f32 hi, x3, x2;",
            "mov.b32 $0, {lo, hi};",
        ]
    text = "{ " + "\n".join(lines) + " }"
    ins = [*words, *scales, offset, *([] if shift is None else [shift])]
    return ptx.asm(text, "rf" if is_half else "r", ins)


# -- sums ------------------------------------------------------------------------------------------


def add_tile(out, tile, alpha):
    """``alpha * out + tile`` for the columns of ``out``.

    Args:
        out: float32 registers of the output.
        tile: float32 registers of a tile's product; it may have more columns.
        alpha: factor per row half.

    Returns:
        Registers of the output.
    """
    return [ptx.fma(o, alpha[(i // 2) % 2], tile[i]) for i, o in enumerate(out)]


def add_sums(variant: Variant, total, alpha, tile, width: int, sums):
    """``alpha * total + sum of the tile's P``.

    Args:
        variant: formats.
        total: row sums so far, per row half.
        alpha: factor per row half.
        tile: registers of the last part of the product, whose columns from ``width`` on are sums.
        width: columns of values in it.
        sums: row sums of P where there are no columns of ones.

    Returns:
        Row sums per row half.
    """
    if variant.ones:
        sums = [tile[width // 2 + 2 * h] for h in range(2)]
    return [ptx.fma(t, a, s) for t, a, s in zip(total, alpha, sums, strict=True)]


def finish(variant: Variant, total, m, const=None, sink=None):
    """Factor on the output and log-sum-exp; rows that attend to nothing give 0 and -inf.

    Args:
        variant: formats.
        total: row sums, per row half.
        m: maxima in units of log2, per row half.
        const: natural logits that smoothing took from each row, or None.
        sink: natural logit that joins the sum, or None.

    Returns:
        Factor and natural log-sum-exp, per row half.
    """
    factor, lse = [], []
    for h in range(2):
        t, top, scale = total[h], m[h], None
        if sink is not None:
            logit = sink if const is None else ptx.fsub(sink, const[h])
            logit = ptx.fmul(logit, ptx.f32(LOG2E))
            top = ptx.fmax(top, logit)
            scale = ptx.exp2(ptx.fsub(m[h], top))
            extra = ptx.exp2(ptx.fadd(ptx.fsub(logit, top), ptx.f32(variant.p_log2)))
            t = ptx.fma(t, scale, extra)
        empty = ptx.feq(t, ptx.f32(0.0))
        inverse = ptx.fdiv(ptx.f32(1.0), t)
        if scale is not None:
            inverse = ptx.fmul(inverse, scale)
        factor.append(ptx.select(empty, ptx.f32(0.0), inverse))
        value = ptx.fadd(top, ptx.fsub(ptx.log2(t), ptx.f32(variant.p_log2)))
        value = ptx.fmul(value, ptx.f32(math.log(2.0)))
        if const is not None:
            value = ptx.fadd(value, const[h])
        lse.append(ptx.select(empty, ptx.f32(-math.inf), value))
    return factor, lse


def scale_out(out, factor, channel):
    """The output times the row's factor and the channel's scale.

    Args:
        out: float32 registers.
        factor: per row half.
        channel: scales of the thread's columns, two for every 8, or empty.

    Returns:
        float32 registers.
    """
    scaled = [ptx.fmul(o, factor[(i // 2) % 2]) for i, o in enumerate(out)]
    if not channel:
        return scaled
    return [ptx.fmul(x, channel[2 * (i // 4) + i % 2]) for i, x in enumerate(scaled)]
