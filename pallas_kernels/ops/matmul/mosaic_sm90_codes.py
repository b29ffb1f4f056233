# SPDX-License-Identifier: Apache-2.0
"""What the sm90 products of stored weights share: codes to bfloat16 in registers, and scales.

4-bit weights are read as `QTensor.pack` leaves them: a byte of row r has the codes of inputs 2r
(low nibble) and 2r + 1 of one output, and outputs lie side by side. So the two numbers that a
register of an operand wants, neighbours along the contraction, share a byte, and a word has four
outputs.

Every nibble goes to bfloat16 by bit operations, five and a quarter instructions a pair for E2M1
and three and a quarter for INT4, and without a rounding:

* E2M1: sign to the sign, exponent and mantissa to the lowest exponent bits and the highest mantissa
  bit; that is the number times 2^-126, and a product by 2^126 is exact.
* INT4: with its sign bit flipped the code is the low mantissa of 128 + 8 + code; 136 is taken off.

8-bit weights lie with one input a row of bytes. A pair takes two rows, and goes through float32 or
float16, from which rounding to bfloat16 changes nothing.

References: Marlin (arXiv 2408.11743), section 3.4; PTX ISA 8.4, ``prmt`` and ``mul.bf16x2``.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _ptx as ptx
from pallas_kernels.formats import QTensor
from pallas_kernels.ops.matmul import xla
from pallas_kernels.ops.matmul.spec import CODES, SCALES, UNIT, WIDE_CODES, MatmulSpec


@dataclasses.dataclass(frozen=True)
class Weights:
    """Static facts of a stored weight ``[k, n]``.

    Args:
        code: "e2m1" or "int4", packed, or "int8", "e4m3" or "e5m2".
        scale: "e4m3", "e8m0" or "float32".
        group: inputs that share a scale.
        rows: rows of bytes; their inputs are a multiple of 16.
        n: outputs, padded.
        factor: what the sums of a row are multiplied by: "row_scale", "tensor_scale" or nothing.
    """

    code: str
    scale: str
    group: int
    rows: int
    n: int
    factor: str | None

    @property
    def per_byte(self) -> int:
        """Inputs of a byte."""
        return 2 if self.code in ("e2m1", "int4") else 1

    @property
    def inputs(self) -> int:
        """Inputs, padded."""
        return self.per_byte * self.rows

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return 4 if self.scale == "float32" else 1


def prepare(lhs: jax.Array | QTensor, rhs: QTensor, spec: MatmulSpec, units: tuple[int, int, int]):
    """Arrays as the kernels take them, padded with zeros, which copies what has to be padded.

    Args:
        lhs: bfloat16 ``[..., m, k]``, or INT8 or FP8 with a scale per row: its codes are bfloat16
            numbers.
        rhs: QTensor ``[k, n]``.
        spec: static facts.
        units: what rows and inputs of x and outputs become multiples of.

    Returns:
        `Weights`, and the arrays "x" ``[m, k]``, "codes", "scale" (bytes where it is narrow)
        and maybe "row_scale" ``[m]`` or "tensor_scale" ``[1]``.
    """
    stored = spec.rhs.stored_k
    m, k, n = (-(-a // b) * b for a, b in zip((spec.m, stored, spec.n), units, strict=True))
    x = lhs.qvalue.astype(jnp.bfloat16) if isinstance(lhs, QTensor) else lhs
    x = x.reshape(spec.m, spec.k)
    x = jnp.pad(x, ((0, m - spec.m), (0, k - spec.k)))
    scale = rhs.scale
    if scale.dtype != jnp.float32:
        scale = lax.bitcast_convert_type(scale, jnp.uint8)
    codes = rhs.qvalue if spec.rhs.packed else lax.bitcast_convert_type(rhs.qvalue, jnp.uint8)
    codes, scale = (jnp.pad(a, ((0, 0), (0, n - spec.n))) for a in (codes, scale))
    per_unit = UNIT // (stored // codes.shape[0])  # rows of bytes
    codes = jnp.pad(codes, ((0, -codes.shape[0] % per_unit), (0, 0)))
    arrays = {"x": x, "codes": codes, "scale": scale}
    factor = None if rhs.tensor_scale is None else rhs.tensor_scale.reshape(1)
    if isinstance(lhs, QTensor):
        scales = xla.row_scales(lhs)
        arrays["row_scale"] = scales if factor is None else scales * factor
    elif factor is not None:
        arrays["tensor_scale"] = factor
    kind = CODES[spec.rhs.packed] if spec.rhs.packed else WIDE_CODES[spec.rhs.dtype]
    weights = Weights(
        kind,
        SCALES[spec.rhs.scale_dtype],
        spec.rhs.group if spec.rhs.k_tiles > 1 else codes.shape[0] * UNIT // per_unit,
        codes.shape[0],
        n,
        next((name for name in ("row_scale", "tensor_scale") if name in arrays), None),
    )
    return weights, arrays


# -- registers -------------------------------------------------------------------------------------


def word(value: int):
    """A constant of 32 bits, given without sign."""
    return ptx.i32(value - 2**32 if value >= 2**31 else value)


def code_pairs(code: str, four, table: bool = False):
    """A word of four bytes as four words of two bfloat16: of each byte the low code, then the high.

    Args:
        code: "e2m1" or "int4".
        four: i32.
        table: look E2M1 up, both bytes of a number in a table of eight, instead of moving bits.
    """
    if table and code == "e2m1":
        return _looked_up(four)
    # In E2M1 a code is moved to the upper nibble of both bytes of its half of a word: then its sign
    # is in place and what is left is two bits off. INT4 wants the lower nibbles.
    if code == "e2m1":
        other = ptx.asm("shl.b32 $0, $1, 4;", "r", [four])[0]
        low, high = other, four
        text = (
            "{ .reg .b32 p, s, v; prmt.b32 p, $1, $2, SELECTOR; and.b32 s, p, $3;\n"
            "shl.b32 v, p, 2; and.b32 v, v, $4; or.b32 v, v, s; mul.rn.bf16x2 $0, v, $5; }"
        )
        constants = [word(0x80008000), word(0x01C001C0), word(0x7E807E80)]
    else:
        other = ptx.asm("shr.u32 $0, $1, 4;", "r", [four])[0]
        low, high = four, other
        text = (
            "{ .reg .b32 p; prmt.b32 p, $1, $2, SELECTOR; and.b32 p, p, $3;\n"
            "xor.b32 p, p, $4; sub.rn.bf16x2 $0, p, $5; }"
        )
        constants = [word(0x000F000F), word(0x43084308), word(0x43084308)]
    out = []
    for byte in range(4):
        selector = 0x4400 + 0x1111 * byte  # bytes: the first's twice, then the second's
        body = text.replace("SELECTOR", str(selector))
        out += ptx.asm(body, "r", [low, high, *constants])
    return out


def _looked_up(four):
    """`code_pairs` of E2M1: three and three quarters integer instructions a pair, no product."""
    # A code without its sign is a selector; the sign of the lower one is moved to that of its byte.
    text = "{ .reg .b32 s, o, h, l, m;\nand.b32 s, $4, $5; shl.b32 o, $4, 4;\n"
    for i, (signs, shift) in enumerate(((0xD9C8, ""), (0xFBEA, "shr.u32 s, s, 16; "))):
        text += (
            f"{shift}prmt.b32 h, $6, $7, s; prmt.b32 l, $8, $9, s;\n"
            f"prmt.b32 m, o, $4, {signs}; and.b32 m, m, $10; or.b32 h, h, m;\n"
            f"prmt.b32 ${2 * i}, l, h, {0x5140}; prmt.b32 ${2 * i + 1}, l, h, {0x7362};\n"
        )
    high, low = (0x3F3F3F00, 0x40404040), (0xC0800000, 0xC0804000)
    constants = (0x77777777, *high, *low, 0x80808080)
    return ptx.asm(text + "}", "rrrr", [four, *map(word, constants)])


def byte_pairs(code: str, first, second):
    """Two words of four 8-bit codes as four words of two bfloat16, each of a byte of either.

    Args:
        code: "int8", "e4m3" or "e5m2".
        first: i32, codes of an input.
        second: i32, codes of the next input.
    """
    out = []
    if code == "int8":  # with its sign bit flipped, the low mantissa of 2^23 + 128 + code
        first, second = (ptx.xor(x, word(0x80808080)) for x in (first, second))
        text = (
            "{ .reg .b32 p; .reg .f32 a, b;\n"
            "prmt.b32 p, $1, $3, SELECTOR; mov.b32 a, p; add.f32 a, a, $4;\n"
            "prmt.b32 p, $2, $3, SELECTOR; mov.b32 b, p; add.f32 b, b, $4;\n"
            "cvt.rn.bf16x2.f32 $0, b, a; }"
        )
        constants = [word(0x4B000000), ptx.f32(-(2.0**23) - 128)]
        for byte in range(4):  # byte, 0, 0, 0x4B
            body = text.replace("SELECTOR", str(0x7440 + byte))
            out += ptx.asm(body, "r", [first, second, *constants])
        return out
    text = (
        "{ .reg .b16 lo, hi; .reg .b32 p; .reg .f32 a, b;\n"
        f"prmt.b32 p, $1, $2, SELECTOR; mov.b32 {{lo, hi}}, p; cvt.rn.f16x2.{code}x2 p, lo;\n"
        "mov.b32 {lo, hi}, p; cvt.f32.f16 a, lo; cvt.f32.f16 b, hi;\n"
        "cvt.rn.bf16x2.f32 $0, b, a; }"
    )
    for byte in range(4):
        body = text.replace("SELECTOR", str(byte + 16 * (4 + byte)))
        out += ptx.asm(body, "r", [first, second])
    return out


def float_scales(scale: str, words):
    """Scales as float32.

    Args:
        scale: "e4m3", "e8m0" or "float32".
        words: i32 of four scales each, or float32.
    """
    if scale == "float32":
        return list(words)
    out = []
    for four in words:
        if scale == "e4m3":
            text = (
                "{ .reg .b16 lo, hi, a, b; .reg .b32 t; mov.b32 {lo, hi}, $4;\n"
                "cvt.rn.f16x2.e4m3x2 t, lo; mov.b32 {a, b}, t;\n"
                "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;\n"
                "cvt.rn.f16x2.e4m3x2 t, hi; mov.b32 {a, b}, t;\n"
                "cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }"
            )
        else:  # the exponent of a float32 as it stands
            text = "{ .reg .b32 t;\n"
            for i in range(4):
                text += f"shl.b32 t, $4, {24 - 8 * i}; and.b32 t, t, -16777216;\n"
                text += f"shr.u32 t, t, 1; mov.b32 ${i}, t;\n"
            text += "}"
        out += ptx.asm(text, "ffff", [four])
    return out


def scale_pairs(scale: str, two):
    """Scales of two outputs, each as a word of twice the same bfloat16, and what rounding left.

    Args:
        scale: "e4m3", "e8m0" or "float32".
        two: a word with two scales in its low bytes, or two float32.

    Returns:
        Two pairs of a word and the rest's word, None where the scale is exact.
    """
    twice = "cvt.rn.bf16x2.f32 $0, $1, $1;"
    if scale == "e8m0":
        text = "{ .reg .b32 t; prmt.b32 t, $1, 0, SELECTOR; shl.b32 $0, t, 7; }"
        return [(ptx.asm(text.replace("SELECTOR", str(s)), "r", two)[0], None)
                for s in (0x4040, 0x4141)]  # fmt: skip
    if scale == "e4m3":
        text = (
            "{ .reg .b16 lo, hi; .reg .b32 t; mov.b32 {lo, hi}, $2;\n"
            "cvt.rn.f16x2.e4m3x2 t, lo; mov.b32 {lo, hi}, t;\n"
            "cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }"
        )
        return [(ptx.asm(twice, "r", [x])[0], None) for x in ptx.asm(text, "ff", two)]
    out = []
    for x in two:
        high = ptx.asm(twice, "r", [x])[0]
        rounded = ptx.asm("{ .reg .b32 t; shl.b32 t, $1, 16; mov.b32 $0, t; }", "f", [high])[0]
        out.append((high, ptx.asm(twice, "r", [ptx.fsub(x, rounded)])[0]))
    return out


def times(pair, scale):
    """A pair of codes times their scale; rounded once if the scale has a rest."""
    high, rest = scale
    if rest is None:
        return ptx.asm("mul.rn.bf16x2 $0, $1, $2;", "r", [pair, high])[0]
    text = "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }"
    return ptx.asm(text, "r", [pair, high, rest])[0]


def row_factor(ref, row, rows: int):
    """The factor of a row of x, float32: its own, or the one there is.

    Args:
        ref: float32 ``[rows]`` or ``[1]``, in global memory.
        row: i32, may lie beyond the last one.
        rows: how many factors there are.
    """
    place = ptx.i64(0)
    if rows > 1:
        place = ptx.mul(ptx.widen(ptx.imin(row, ptx.i32(rows - 1))), ptx.i64(4))
    return ptx.asm("ld.global.nc.b32 $0, [$1];", "f", [ptx.address(ref, place)])[0]


def shared_units(group: int, units: int) -> int:
    """Of so many consecutive units of 16 inputs, how many always share a scale."""
    return math.gcd(group // UNIT, units)
