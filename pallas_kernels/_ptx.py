# SPDX-License-Identifier: Apache-2.0
"""What one thread of a GPU kernel computes: arithmetic on registers, and inline PTX.

The Hopper kernels spell their inner loops in registers, because instruction count is their limit.
They do so through the functions of this module only; a test can put others in their place that
compute with NumPy for all 128 threads of a warpgroup at once, and so run the same code on a CPU.

A value is an MLIR value of type i1, i32, i64 or f32; `arith` and `llvm` infer the rest.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

_LETTERS = {"r": "i32", "l": "i64", "f": "f32"}


def _type(letter: str) -> ir.Type:
    return ir.Type.parse(_LETTERS[letter])


# -- constants and arithmetic ----------------------------------------------------------------------


def i32(value: int):
    """A constant."""
    return arith.constant(ir.IntegerType.get_signless(32), value)


def i64(value: int):
    """A constant."""
    return arith.constant(ir.IntegerType.get_signless(64), value)


def f32(value: float):
    """A constant."""
    return arith.constant(ir.F32Type.get(), float(value))


def add(a, b):
    """Sum of integers."""
    return arith.addi(a, b)


def sub(a, b):
    """Difference of integers."""
    return arith.subi(a, b)


def mul(a, b):
    """Product of integers."""
    return arith.muli(a, b)


def div(a, b):
    """Quotient of non-negative integers."""
    return arith.divui(a, b)


def rem(a, b):
    """Remainder of non-negative integers."""
    return arith.remui(a, b)


def xor(a, b):
    """Bitwise exclusive or."""
    return arith.xori(a, b)


def land(a, b):
    """Bitwise conjunction of integers."""
    return arith.andi(a, b)


def lor(a, b):
    """Bitwise disjunction of integers."""
    return arith.ori(a, b)


def shr(a, b):
    """Logical shift to the right."""
    return arith.shrui(a, b)


def shl(a, b):
    """Shift to the left."""
    return arith.shli(a, b)


def bits(a):
    """The i32 whose bits are those of a float32."""
    return arith.bitcast(ir.IntegerType.get_signless(32), a)


def from_bits(a):
    """The float32 with the bits of an i32."""
    return arith.bitcast(ir.F32Type.get(), a)


def imax(a, b):
    """Larger signed integer."""
    return arith.maxsi(a, b)


def imin(a, b):
    """Smaller signed integer."""
    return arith.minsi(a, b)


def lt(a, b):
    """``a < b`` of signed integers."""
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def ge(a, b):
    """``a >= b`` of signed integers."""
    return arith.cmpi(arith.CmpIPredicate.sge, a, b)


def eq(a, b):
    """``a == b`` of integers."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def both(a, b):
    """Conjunction of truth values."""
    return arith.andi(a, b)


def either(a, b):
    """Disjunction of truth values."""
    return arith.ori(a, b)


def select(condition, yes, no):
    """``yes`` where the condition holds, else ``no``."""
    return arith.select(condition, yes, no)


def fadd(a, b):
    """Sum."""
    return arith.addf(a, b)


def fsub(a, b):
    """Difference."""
    return arith.subf(a, b)


def fmul(a, b):
    """Product."""
    return arith.mulf(a, b)


def fdiv(a, b):
    """Quotient."""
    return arith.divf(a, b)


def fmax(a, b):
    """Larger number; NaN if either is."""
    return arith.maximumf(a, b)


def fmin(a, b):
    """Smaller number; NaN if either is."""
    return arith.minimumf(a, b)


def fge(a, b):
    """``a >= b`` of numbers, false for NaN."""
    return arith.cmpf(arith.CmpFPredicate.OGE, a, b)


def fneg(a):
    """The number with the other sign."""
    return arith.negf(a)


def fabs(a):
    """Magnitude."""
    return mlir_math.absf(a)


def feq(a, b):
    """``a == b`` of numbers, false for NaN."""
    return arith.cmpf(arith.CmpFPredicate.OEQ, a, b)


def to_float(a):
    """float32 of a signed integer."""
    return arith.sitofp(ir.F32Type.get(), a)


def widen(a):
    """i64 of a signed i32."""
    return arith.extsi(ir.IntegerType.get_signless(64), a)


def flag(condition):
    """i32 1 or 0, the form in which a condition enters inline PTX."""
    return arith.extui(ir.IntegerType.get_signless(32), condition)


def shuffle_xor(a, distance: int):
    """The value of the lane whose number differs in one bit."""
    return utils.shfl_bfly(a, distance)


def thread():
    """Number of this thread in its warpgroup, 0 to 127."""
    return rem(utils.thread_idx(), i32(128))


def shape(ref) -> list[int]:
    """Shape of an array in memory."""
    return ir.MemRefType(ref.type).shape


def address(ref, offset):
    """Address of byte ``offset`` (i64) of an array in memory."""
    pointer = llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))
    return arith.addi(pointer, offset)


# -- control ---------------------------------------------------------------------------------------


def loop(count, body, state):
    """Runs ``state = body(i, state)`` for ``i = 0 … count - 1``.

    Args:
        count: int, or i32 that is the same for all threads of the warpgroup; a single iteration
            needs no loop.
        body: of an i32 and a pytree of values.
        state: pytree of values.

    Returns:
        The last state.
    """
    if isinstance(count, int):
        if count == 1:
            return body(i32(0), state)
        count = i32(count)
    leaves, tree = jax.tree.flatten(state)
    op = scf.ForOp(i32(0), count, i32(1), leaves)
    with ir.InsertionPoint(op.body):
        new = body(op.induction_variable, jax.tree.unflatten(tree, list(op.inner_iter_args)))
        scf.YieldOp(jax.tree.leaves(new))
    return jax.tree.unflatten(tree, list(op.results))


def branch(condition, yes, no):
    """Calls ``yes()`` where the condition holds, else ``no()``; neither returns anything.

    Args:
        condition: i1, the same for all threads of the warpgroup.
        yes: makes instructions.
        no: makes instructions.
    """
    op = scf.IfOp(condition, has_else=True)
    for block, make in ((op.then_block, yes), (op.else_block, no)):
        with ir.InsertionPoint(block):
            make()
            scf.YieldOp([])


# -- inline PTX ------------------------------------------------------------------------------------


def asm(text: str, outs: str, ins, *, tied=(), effects: bool = False) -> list:
    """Inline PTX.

    Args:
        text: instructions; ``$i`` are, in order: tied outputs, outputs, tied inputs, inputs.
        outs: a letter per output: "r" i32, "l" i64, "f" f32.
        ins: values.
        tied: values that the instructions change in place; their new values come first.
        effects: must not be moved or removed.

    Returns:
        New values of ``tied``, then the outputs.
    """
    types = [v.type for v in tied] + [_type(letter) for letter in outs]
    # An output of several instructions may be written before the last input is read.
    write = "=&" if text.count(";") > 1 else "="
    constraints = [f"={_letter(v.type)}" for v in tied]
    constraints += [f"{write}{letter}" for letter in outs]
    constraints += [str(i) for i in range(len(tied))]
    constraints += [_letter(v.type) for v in ins]
    if not types:
        result_type = ir.Type.parse("!llvm.void")
    else:
        result_type = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    result = llvm.inline_asm(
        result_type,
        [*tied, *ins],
        text,
        ",".join(constraints),
        has_side_effects=effects,
        asm_dialect=0,
    )
    if not types:
        return []
    if len(types) == 1:
        return [result]
    return [llvm.extractvalue(t, result, [i]) for i, t in enumerate(types)]


def _letter(ty: ir.Type) -> str:
    if isinstance(ty, ir.F32Type):
        return "f"
    return "l" if utils.bitwidth(ty) == 64 else "r"


def fma(a, b, c):
    """``a * b + c`` with one rounding."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", "f", [a, b, c])[0]


def exp2(a):
    """``2 ** a``, approximately; subnormal results are zero."""
    return asm("ex2.approx.ftz.f32 $0, $1;", "f", [a])[0]


def log2(a):
    """Binary logarithm, approximately."""
    return asm("lg2.approx.f32 $0, $1;", "f", [a])[0]


def reciprocal(a):
    """``1 / a``, approximately."""
    return asm("rcp.approx.ftz.f32 $0, $1;", "f", [a])[0]


def e4m3x4(values):
    """Four numbers as e4m3 in one word, the first in the lowest byte."""
    text = (
        "{ .reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;\n"
        "mov.b32 $0, {lo, hi}; }"
    )
    return asm(text, "r", values)[0]


def half_x2(values, dtype: str):
    """Two numbers as bfloat16 or float16 in one word, the first in the lower half."""
    name = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    return asm(f"cvt.rn.{name}.f32 $0, $2, $1;", "r", values)[0]


def load_words(ref, offset, count: int, ok=None, shift: int = 0):
    """Loads one, two or four 32-bit values from global memory.

    Args:
        ref: array in memory.
        offset: i64, byte of the first value.
        count: how many.
        ok: i1, load only where it holds, zeros elsewhere; None is everywhere.
        shift: bytes to add to the offset, part of the instruction.

    Returns:
        i32 values.
    """
    names = [f"${i}" for i in range(count)]
    target = names[0] if count == 1 else "{" + ", ".join(names) + "}"
    body = f"ld.global.{'' if count == 1 else f'v{count}.'}b32 {target}, [${count}+{shift}];"
    ins = [address(ref, offset)]
    if ok is not None:
        ins.append(flag(ok))
        zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
        body = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0;\n{zeros}\n@p {body} }}"
    return asm(body, "r" * count, ins, effects=True)


def store(ref, offset, values, ok=None, space: str = "global", shift: int = 0):
    """Stores one, two or four 32-bit values.

    Args:
        ref: array in memory.
        offset: i64, byte of the first value.
        values: i32 or f32.
        ok: i1, store only where it holds; None is everywhere.
        space: "global" or "shared".
        shift: bytes to add to the offset, part of the instruction.
    """
    n = len(values)
    body = ", ".join(f"${1 + i}" for i in range(n))
    place = f"[$0+{shift}]" if shift else "[$0]"
    body = (
        f"st.{space}.b32 {place}, {body};"
        if n == 1
        else f"st.{space}.v{n}.b32 {place}, {{{body}}};"
    )
    ins = [address(ref, offset), *values]
    if ok is not None:
        ins.append(flag(ok))
        body = f"{{ .reg .pred p; setp.ne.b32 p, ${n + 1}, 0; @p {body} }}"
    asm(body, "", ins, effects=True)


# -- arrays of a warpgroup -------------------------------------------------------------------------


def unpack(array: mgpu.FragmentedArray) -> list:
    """This thread's elements in register order; narrower ones packed in 32-bit integers."""
    out = []
    for reg in array.registers.flat:
        if not isinstance(reg.type, ir.VectorType):
            out.append(reg)
            continue
        if utils.bitwidth(array.mlir_dtype) < 32:
            count = utils.bitwidth(reg.type) // 32
            reg = vector.bitcast(ir.VectorType.get((count,), ir.IntegerType.get_signless(32)), reg)
        for i in range(ir.VectorType(reg.type).shape[0]):
            out.append(llvm.extractelement(reg, i32(i)))
    return out


def pack(values, shape, layout, dtype) -> mgpu.FragmentedArray:
    """An array of ``layout`` from 32-bit values in register order."""
    layout = layout.to_mgpu()
    element = utils.dtype_to_ir_type(dtype)
    words = layout.vector_length * utils.bitwidth(element) // 32
    reg_shape = layout.registers_shape(shape)
    regs = np.empty(math.prod(reg_shape), dtype=object)
    for i in range(regs.size):
        chunk = values[i * words : (i + 1) * words]
        reg = llvm.mlir_undef(ir.VectorType.get((words,), chunk[0].type))
        for j, word in enumerate(chunk):
            reg = llvm.insertelement(reg, word, i32(j))
        regs[i] = vector.bitcast(ir.VectorType.get((layout.vector_length,), element), reg)
    signed = True if np.issubdtype(np.dtype(dtype), np.signedinteger) else None
    return mgpu.FragmentedArray(
        _registers=regs.reshape(reg_shape), _layout=layout, _is_signed=signed
    )
