# SPDX-License-Identifier: Apache-2.0
"""What threads of the sm90 cache kernels share: memory, products, and codes as operands."""

from __future__ import annotations

import dataclasses

from pallas_kernels import _ptx as ptx


@dataclasses.dataclass(frozen=True)
class Store:
    """How codes lie in memory and what they are computed as.

    Args:
        bits: per code.
        half: 16-bit type of the products.
        order: channels of eight codes in the order in which widening yields them.
        tile: channels that share an e4m3 scale; 0 for one float32 scale per slot, or none.
        whole: keys are multiplied as integers, and values as float16 with something added.
    """

    bits: int
    half: str = "float16"
    order: tuple[int, ...] = tuple(range(8))
    tile: int = 0
    whole: bool = False


_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
STORES = {
    "bfloat16": Store(16, "bfloat16"),
    "float16": Store(16),
    "int8": Store(8, whole=True),
    "fp8_e4m3": Store(8),
    "fp8_e5m2": Store(8),
    "int4": Store(4, order=_NIBBLES, whole=True),
    "nvfp4": Store(4, order=_NIBBLES, tile=16),
}


# -- memory ----------------------------------------------------------------------------------------


def bytes_at(index, size: int):
    """Offset in bytes, i64, of an item."""
    return ptx.mul(ptx.widen(index), ptx.i64(size))


def load(ref, offset, size: int, cache: str = "", outs: str | None = None):
    """The 4, 8 or 16 bytes at an offset as words."""
    n = size // 4
    names = ", ".join(f"${i}" for i in range(n))
    names = names if n == 1 else f"{{{names}}}"
    width = "" if n == 1 else f".v{n}"
    text = f"ld.global.nc{cache}{width}.b32 {names}, [${n}];"
    return ptx.asm(text, outs or "r" * n, [ptx.address(ref, offset)], effects=True)


def int_at(ref, index):
    """The i32 of an array with an index."""
    return load(ref, bytes_at(index, 4), 4)[0]


def read_shared(ref, offset, n: int, kind: str = "f", shift: int = 0):
    """Floats or words of shared memory."""
    names = ", ".join(f"${i}" for i in range(n))
    target, width = ("$0", "") if n == 1 else (f"{{{names}}}", f".v{n}")
    text = f"ld.shared{width}.b32 {target}, [${n}+{shift}];"
    return ptx.asm(text, kind * n, [ptx.address(ref, offset)], effects=True)


def copy(source, shared, place, shift: int = 0):
    """Starts a copy of 16 bytes at an address to shared memory."""
    text = f"cp.async.cg.shared.global [$0+{shift}], [$1], 16;"
    ptx.asm(text, "", [ptx.address(shared, place), source], effects=True)


def commit():
    """Makes a group of the copies that the thread started since the last one."""
    ptx.asm("cp.async.commit_group;", "", [], effects=True)


def wait(groups: int):
    """Waits for the copies of the warp's threads, but those of the last ``groups`` groups."""
    text = f"cp.async.wait_group {groups};\nbar.warp.sync -1;"
    ptx.asm(text, "", [], effects=True)


def barrier(group=None):
    """Waits for the block's four warps, or those of one warpgroup of it."""
    if group is None:
        ptx.asm("bar.sync 0;", "", [], effects=True)
    else:
        ptx.asm("bar.sync $0, 128;", "", [ptx.add(group, ptx.i32(1))], effects=True)


def warp_barrier():
    """Waits for the warp's threads."""
    ptx.asm("bar.warp.sync -1;", "", [], effects=True)


def from_lane(x, lane):
    """The value of another lane of the warp."""
    return ptx.asm("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "f", [x, lane], effects=True)[0]


# -- arithmetic ------------------------------------------------------------------------------------


def word_of(value: int):
    """A constant of 32 bits, given without sign."""
    return ptx.i32(value - 2**32 if value >= 2**31 else value)


def permute(a, b, selector: int):
    """Four bytes out of eight."""
    return ptx.asm(f"prmt.b32 $0, $1, $2, {selector};", "r", [a, b])[0]


def bytes_of(words, which: int):
    """One byte of each of some words, four in a word."""
    near, found = 0x11 * which + 0x40, []
    for i in range(0, len(words), 4):
        a, b, c, d = words[i : i + 4]
        found.append(permute(permute(a, b, near), permute(c, d, near), 0x5410))
    return found


def halves(word, half: str):
    """Two float32 from two 16-bit numbers."""
    if half == "bfloat16":
        text = (
            "{ .reg .b32 lo, hi; shl.b32 lo, $2, 16; and.b32 hi, $2, -65536;\n"
            "mov.b32 $0, lo; mov.b32 $1, hi; }"
        )
    else:
        text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }"
    return ptx.asm(text, "ff", [word])


def power_above(x):
    """The power of two above a number (within 2^±124), and its inverse."""
    bits = ptx.asm("{ .reg .b32 t; mov.b32 t, $1; shr.u32 $0, t, 23; }", "r", [x])[0]
    bits = ptx.imin(ptx.imax(bits, ptx.i32(2)), ptx.i32(250))
    exponents = ptx.add(bits, ptx.i32(1)), ptx.sub(ptx.i32(253), bits)
    text = "{ .reg .b32 t; shl.b32 t, $1, 23; mov.b32 $0, t; }"
    return [ptx.asm(text, "f", [e])[0] for e in exponents]


def mma(acc, a, b, half: str):
    """``acc + A B`` for A [16, 16] and B [16, 8]."""
    name = {"bfloat16": "bf16", "float16": "f16"}[half]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{$0, $1, $2, $3}}, "
        "{$8, $9, $10, $11}, {$12, $13}, {$0, $1, $2, $3};"
    )
    return ptx.asm(text, "", [*a, *b], tied=acc, effects=True)


def mma_whole(acc, a, b):
    """``acc + A B`` in integers for A [16, 32] and B [32, 8]."""
    text = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, "
        "{$8, $9, $10, $11}, {$12, $13}, {$0, $1, $2, $3};"
    )
    return ptx.asm(text, "", [*a, *b], tied=acc, effects=True)


# -- codes -----------------------------------------------------------------------------------------


def _and_xor(word, mask: int, other: int):
    """``(word & mask) ^ other``."""
    text = "{ .reg .b32 t; and.b32 t, $1, $2; xor.b32 $0, t, $3; }"
    return ptx.asm(text, "r", [word, word_of(mask), word_of(other)])[0]


def whole_keys(store: str, words):
    """Codes of a key as bytes, in the order of `Store.order`; those of int4 times 16."""
    if store == "int8":
        return words
    text = "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, $3; and.b32 $1, $2, $3; }"
    return [part for word in words for part in ptx.asm(text, "rr", [word, word_of(0xF0F0F0F0)])]


# Of the even and the odd channels of `whole_values`: what was added, and the factor before.
ADDED = {"int8": ((1152.0, 1.0), (1152.0, 1.0)), "int4": ((1032.0, 1.0), (1152.0, 16.0))}


def whole_values(store: str, first, second):
    """Codes of two tokens as words (first's, second's) of float16, one per channel, in order.

    A code is the mantissa of 1024 and what makes it positive: see `ADDED`.
    """
    out = []
    for a, b in zip(first, second, strict=True):
        if store == "int8":
            pairs = [permute(a, b, selector) for selector in (0x4400, 0x5511, 0x6622, 0x7733)]
            out += [_and_xor(pair, 0x00FF00FF, 0x64806480) for pair in pairs]
            continue
        for selector in (0x5410, 0x7632):
            low = permute(a, b, selector)
            for word in (low, ptx.shr(low, ptx.i32(8))):
                out += [_and_xor(word, 0x000F000F, 0x64086408)]
                out += [_and_xor(word, 0x00F000F0, 0x64806480)]
    return out


def _code_bytes(store: str, word):
    """A word of codes as words of one code per byte.

    Integers are biased to be unsigned; e2m1 has its bits where those of a float16 are.
    """
    if store == "nvfp4":
        text = (
            "{ .reg .b32 s, v; shl.b32 s, $2, 4; and.b32 s, s, $3; shl.b32 v, $2, 1;\n"
            "and.b32 v, v, $4; or.b32 $0, s, v;\n"
            "and.b32 s, $2, $3; shr.u32 v, $2, 3; and.b32 v, v, $4; or.b32 $1, s, v; }"
        )
        return ptx.asm(text, "rr", [word, word_of(0x80808080), word_of(0x0E0E0E0E)])
    if store == "int8":
        return [ptx.asm("xor.b32 $0, $1, $2;", "r", [word, word_of(0x80808080)])[0]]
    if store == "int4":
        text = (
            "{ .reg .b32 t; xor.b32 t, $2, $3; and.b32 $0, t, $4;\n"
            "shr.u32 t, t, 4; and.b32 $1, t, $4; }"
        )
        return ptx.asm(text, "rr", [word, word_of(0x88888888), word_of(0x0F0F0F0F)])
    return [word]


def _widened(store: str, word):
    """Four codes, a byte each, as two words of two float16."""
    if store == "nvfp4":  # the byte is the upper one of a float16 2^14 times too small
        return [permute(word, ptx.i32(0), selector) for selector in (0x1404, 0x3424)]
    if store.startswith("fp8"):
        kind = store.removeprefix("fp8_")
        text = (
            f"{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, $2;\n"
            f"cvt.rn.f16x2.{kind}x2 $0, lo; cvt.rn.f16x2.{kind}x2 $1, hi; }}"
        )
        return ptx.asm(text, "rr", [word])
    # The byte is the mantissa of 1024 + code + bias; no rounding anywhere.
    text = (
        "{ .reg .b32 lo, hi; prmt.b32 lo, $2, $3, 16704; prmt.b32 hi, $2, $3, 17218;\n"
        "sub.rn.f16x2 $0, lo, $4; sub.rn.f16x2 $1, hi, $4; }"
    )
    offset = word_of(0x64806480 if store == "int8" else 0x64086408)  # 1024 + 128, 1024 + 8
    return ptx.asm(text, "rr", [word, word_of(0x64646464), offset])


# Products of nvfp4 are so many times too small: codes 2^14 times, scales as many times too large as
# float16 lets them be. All are exact.
SMALLER = 128.0


def _tile_scales(a, b=None):
    """Two e4m3 scales, times 2^7, as float16: those in the lower bytes of a word, or of two."""
    pair = a if b is None else permute(a, b, 0x0040)
    text = (
        "{ .reg .b16 lo, hi; .reg .b32 t; mov.b32 {lo, hi}, $1; cvt.rn.f16x2.e4m3x2 t, lo;\n"
        "mul.rn.f16x2 $0, t, $2; }"
    )
    return ptx.asm(text, "r", [pair, word_of(0x58005800)])[0]


def _times(word, scales):
    """Products of two pairs of float16."""
    return ptx.asm("mul.rn.f16x2 $0, $1, $2;", "r", [word, scales])[0]


def key_pairs(store: str, words):
    """Codes of one key as words of two 16-bit numbers, in the order of `Store.order`.

    With scales per tile the last word holds those of the codes' tiles.
    """
    if STORES[store].bits == 16:
        return words
    *words, tiles = words if STORES[store].tile else (*words, None)
    pairs = [[pair for part in _code_bytes(store, word) for pair in _widened(store, part)]
             for word in words]  # fmt: skip
    if tiles is not None:
        scales = _tile_scales(tiles)
        scales = [permute(scales, scales, selector) for selector in (0x1010, 0x3232)]
        per = STORES[store].tile * STORES[store].bits // 32  # words of a tile
        pairs = [[_times(pair, scales[i // per]) for pair in some] for i, some in enumerate(pairs)]
    return [pair for some in pairs for pair in some]


def value_pairs(store: str, first, second):
    """Codes of two tokens as words (first's, second's), one per channel, in `Store.order`.

    With scales per tile the last words hold that of the codes' tile.
    """
    scales = None
    if STORES[store].tile:
        *first, a = first
        *second, b = second
        scales = _tile_scales(a, b)
    out = []
    for a, b in zip(first, second, strict=True):
        if STORES[store].bits == 16:
            out += [permute(a, b, 0x5410), permute(a, b, 0x7632)]
            continue
        parts = zip(_code_bytes(store, a), _code_bytes(store, b), strict=True)
        for x, y in parts:
            for selector in (0x5140, 0x7362):
                out += _widened(store, permute(x, y, selector))
    return out if scales is None else [_times(pair, scales) for pair in out]
