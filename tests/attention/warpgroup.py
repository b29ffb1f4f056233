# SPDX-License-Identifier: Apache-2.0
"""A warpgroup in NumPy: runs the kernels' register code, inline PTX included, on a CPU.

`installed` puts functions that compute for all 128 threads at once in the place of those of
`pallas_kernels._ptx`, a loop over blocks in the place of the quantisers' launch, and a loop over
tiles in the place of the attention kernel's launch. What stays untested is what only the hardware
has: wgmma descriptors, copies to shared memory and barriers.
"""

import contextlib
import functools
import re
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import _ptx as ptx
from pallas_kernels.ops.attention import mosaic_sm90
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.quantize import mosaic_sm90 as quantize

LANES = np.arange(128)
E4M3 = ml_dtypes.float8_e4m3fn
COPIES: list[list] = [[]]  # groups on their way, and the one that copies are put in


# -- registers -------------------------------------------------------------------------------------


class Address:
    """A byte of an array in memory, per thread."""

    def __init__(self, array, offset):
        self.array, self.offset = array, offset

    def items(self, size, active):
        """Indices of the active threads' items of ``size`` bytes; an access outside fails."""
        where = self.offset[active]
        assert (where % size == 0).all(), "not aligned"
        assert (where >= 0).all() and (where + size <= self.array.nbytes).all(), "out of bounds"
        return where

    def further(self, offset):
        """The address so many bytes on."""
        return Address(self.array, self.offset + offset)

    def bytes(self):
        """All bytes of the array."""
        return self.array.reshape(-1).view(np.uint8)

    def rows(self, size):
        """Indices of the bytes of every thread's item, [128, size]."""
        return self.items(size, np.ones(128, bool))[:, None] + np.arange(size)


def full(dtype):
    return lambda value: np.full(128, value, dtype)


def flushed(x):
    x = x.astype(np.float32)
    return np.where(np.abs(x) < 2.0**-126, np.float32(0), x)


def quiet(function, a, b):
    """Infinities are part of the arithmetic."""
    with np.errstate(all="ignore"):
        return function(a, b)


ARITHMETIC = {
    "i32": full(np.int32),
    "i64": full(np.int64),
    "f32": full(np.float32),
    "add": lambda a, b: a.further(b) if isinstance(a, Address) else np.add(a, b),
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.floor_divide,
    "rem": np.remainder,
    "xor": np.bitwise_xor,
    "land": np.bitwise_and,
    "lor": np.bitwise_or,
    "shr": lambda a, b: (a.view(np.uint32) >> b.view(np.uint32)).view(np.int32),
    "shl": np.left_shift,
    "bits": lambda a: a.astype(np.float32).view(np.int32),
    "from_bits": lambda a: a.view(np.float32),
    "imax": np.maximum,
    "imin": np.minimum,
    "lt": np.less,
    "ge": np.greater_equal,
    "eq": np.equal,
    "both": np.logical_and,
    "either": np.logical_or,
    "select": np.where,
    "fadd": lambda a, b: quiet(np.add, a, b),
    "fsub": lambda a, b: quiet(np.subtract, a, b),
    "fmul": lambda a, b: quiet(np.multiply, a, b),
    "fdiv": lambda a, b: quiet(np.divide, a, b),
    "fmax": np.maximum,
    "fmin": np.minimum,
    "fge": np.greater_equal,
    "fneg": np.negative,
    "fabs": np.abs,
    "feq": np.equal,
    "to_float": lambda a: a.astype(np.float32),
    "widen": lambda a: a.astype(np.int64),
    "flag": lambda a: a.astype(np.int32),
    "shuffle_xor": lambda a, distance: a[LANES ^ distance],
    "thread": lambda: LANES.astype(np.int32),
    "shape": np.shape,
    "address": Address,
}


def loop(count, body, state):
    count = np.broadcast_to(count, 128)
    assert (count == count[0]).all(), "threads of a block disagree"
    for i in range(int(count[0])):
        state = body(np.full(128, i, np.int32), state)
    return state


def branch(condition, yes, no):
    assert (condition == condition[0]).all(), "threads of a block disagree"
    (yes if condition[0] else no)()


CONTROL = {"loop": loop, "branch": branch}


# -- PTX -------------------------------------------------------------------------------------------

FLOATS = {
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "add.f32": np.add,
    "add.rn.f32": np.add,
    "mul.rn.f32": lambda a, b: quiet(np.multiply, a, b),
    "add.rm.f32": lambda a, b: rounded_down(a.astype(np.float64) + b),
    "fma.rm.f32": lambda a, b, c: rounded_down(a.astype(np.float64) * b + c),
    "div.rn.f32": np.divide,
    "rcp.rn.f32": lambda a: quiet(np.divide, np.float32(1), a),
    "ex2.approx.ftz.f32": lambda a: flushed(np.exp2(a)),
    "lg2.approx.f32": np.log2,
    "rcp.approx.ftz.f32": lambda a: flushed(1 / a),
    "max.NaN.f32": np.maximum,
    "min.NaN.f32": np.minimum,
    "cvt.rzi.s32.f32": lambda a: np.clip(np.nan_to_num(a), -(2.0**31), 2**31 - 1).astype(np.int32),
    "mul.f32": lambda a, b: quiet(np.multiply, a, b),
    "cvt.rni.s32.f32": lambda a: np.rint(np.nan_to_num(a)).astype(np.int32),
}


def rounded_down(x):
    near = x.astype(np.float32)
    return np.where(near > x, np.nextafter(near, np.float32(-np.inf)), near)


def words(x):
    """16-bit numbers [128, 2] as words."""
    return np.ascontiguousarray(x).view(np.int32)[:, 0]


def halves(word, dtype=np.float16):
    return np.ascontiguousarray(word).view(np.uint8).reshape(128, 4).view(dtype)


def wide(word):
    """Two bfloat16 as float64; by hand, since XLA's threads take subnormal numbers for zeros."""
    bits = halves(word, np.uint16).astype(np.int64)
    exponent, mantissa = bits >> 7 & 255, bits & 127
    size = np.ldexp((mantissa + 128 * (exponent > 0)).astype(float), np.maximum(exponent, 1) - 134)
    size = np.where(exponent == 255, np.where(mantissa, np.nan, np.inf), size)
    return np.where(bits >> 15, -size, size)


def bf16_words(x):
    return words(x.astype(ml_dtypes.bfloat16))


def permute(a, b, selector):
    both = [np.ascontiguousarray(x).view(np.uint8).reshape(128, 4) for x in (a, b)]
    both, picked = np.concatenate(both, 1), []
    for i in range(4):
        which = selector >> 4 * i & 15
        byte = both[LANES, which & 7]
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)  # with bit 3: its sign, eight times
        picked.append(np.where(which & 8, sign, byte))
    return np.ascontiguousarray(np.stack(picked, 1)).view(np.int32)[:, 0]


def widen8(dtype):
    def run(pair):
        codes = np.stack([pair & 255, pair >> 8 & 255], 1).astype(np.uint8).view(dtype)
        return words(codes.astype(np.float16))

    return run


INTS = {
    "cvt.rn.f32.s32": lambda a: a.astype(np.float32),
    "shl.b32": np.left_shift,
    "add.s32": np.add,
    "sub.s32": np.subtract,
    # What is shifted by more than there are bits keeps its sign only.
    "shr.s32": lambda a, b: a >> np.minimum(b.view(np.uint32), 31).astype(np.int32),
    "mul.lo.s32": lambda a, b: quiet(np.multiply, a, b),
    "mul.hi.s32": lambda a, b: (a.astype(np.int64) * b >> 32).astype(np.int32),
    "shr.u32": lambda a, b: (a.view(np.uint32) >> b.view(np.uint32)).view(np.int32),
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "prmt.b32": permute,
    "sub.rn.f16x2": lambda a, b: words(halves(a) - halves(b)),
    "mul.rn.f16x2": lambda a, b: words(halves(a) * halves(b)),
    "mul.rn.bf16x2": lambda a, b: bf16_words(wide(a) * wide(b)),
    "sub.rn.bf16x2": lambda a, b: bf16_words(wide(a) - wide(b)),
    "fma.rn.bf16x2": lambda a, b, c: bf16_words(wide(a) * wide(b) + wide(c)),
    "cvt.rn.f16x2.e4m3x2": widen8(E4M3),
    "cvt.rn.f16x2.e5m2x2": widen8(ml_dtypes.float8_e5m2),
    "shfl.sync.bfly.b32": lambda a, distance, *_: a[LANES ^ distance],
    "shfl.sync.idx.b32": lambda a, lane, *_: a[LANES // 32 * 32 + lane],
    "cvt.pack.sat.s8.s32.b32": lambda a, b, c: (
        c << 16 | (np.clip(a, -128, 127) & 255) << 8 | (np.clip(b, -128, 127) & 255)
    ),
}
PAIRS = {
    "cvt.rn.satfinite.e4m3x2.f32": lambda a: (
        np.clip(a, -448, 448).astype(E4M3).view(np.uint8),
        8,
    ),
    "cvt.rn.satfinite.e5m2x2.f32": lambda a: (
        np.clip(a, -57344, 57344).astype(ml_dtypes.float8_e5m2).view(np.uint8),
        8,
    ),
    "cvt.rn.bf16x2.f32": lambda a: (a.astype(ml_dtypes.bfloat16).view(np.uint16), 16),
    "cvt.rn.f16x2.f32": lambda a: (a.astype(np.float16).view(np.uint16), 16),
}


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "gtu": lambda a, b: ~(a <= b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@functools.lru_cache
def parse(text):
    """Statements as (predicate or None, opcode, operands)."""
    text = text.strip()
    if text.startswith("{"):
        text = text[1 : text.rindex("}")]
    out = []
    for statement in text.split(";"):
        statement = statement.strip()
        while statement.startswith("{"):
            statement = statement[1:].strip()
        if not statement or statement.startswith((".reg", "}")) or statement.endswith(":"):
            continue
        # What is jumped over must be without effect then: a test of that as well.
        if statement.startswith("@") and " bra " in statement:
            continue
        found = re.fullmatch(r"(?:@(\w+) )?(\S+) ?(.*)", statement, re.DOTALL)
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
        out.append((found[1], found[2], operands))
    return out


@functools.lru_cache
def immediate(text):
    if text.startswith("0f"):
        return np.full(128, struct.unpack(">f", bytes.fromhex(text[2:]))[0], np.float32)
    return np.full(128, int(text), np.int32)


class Machine:
    """Registers of one piece of inline PTX."""

    def __init__(self, registers):
        self.registers = registers

    def read(self, name, dtype=np.int32):
        value = self.registers.get(name)
        if value is None:
            return immediate(name)
        return value if value.dtype.itemsize != 4 else value.view(dtype)

    def halves(self, name):
        return [x.strip() for x in name.strip("{}").split(",")]

    def run(self, predicate, opcode, operands):
        if opcode.startswith("cp.async."):
            return self.copy(opcode, operands)
        target, *sources = operands
        active = np.ones(128, bool) if predicate is None else self.registers[predicate]
        if opcode in FLOATS:
            self.registers[target] = FLOATS[opcode](*(self.read(x, np.float32) for x in sources))
        elif opcode.startswith("ldmatrix."):
            self.load_matrices(operands)
        elif opcode.startswith(("ld.", "st.")):
            self.memory(opcode, operands, active)
        elif opcode.startswith("mma."):
            self.mma(opcode, operands)
        elif opcode in ("bar.sync", "bar.warp.sync"):
            pass  # all threads run in step
        elif opcode == "mov.b32" and target.startswith("{"):
            word = self.read(sources[0])
            low, high = self.halves(target)
            self.registers[low], self.registers[high] = word & 0xFFFF, word >> 16 & 0xFFFF
        elif opcode == "mov.b32" and sources[0].startswith("{"):
            low, high = (self.registers[x] for x in self.halves(sources[0]))
            self.registers[target] = low.astype(np.int32) | high.astype(np.int32) << 16
        elif opcode == "mov.b32":
            self.registers[target] = self.read(sources[0])
        elif opcode == "cvt.f32.f16":
            bits = self.registers[sources[0]].astype(np.uint16)
            self.registers[target] = bits.view(np.float16).astype(np.float32)
        elif opcode.startswith("setp."):
            _, compare, kind = opcode.split(".")
            dtype = np.float32 if kind == "f32" else np.int32
            a, b = (self.read(x, dtype) for x in sources)
            self.registers[target] = COMPARISONS[compare](a, b)
        elif opcode == "or.pred":
            self.registers[target] = np.logical_or(*(self.registers[x] for x in sources))
        elif opcode == "vote.sync.any.pred":
            any_of_warp = self.registers[sources[0]].reshape(4, 32).any(1)
            self.registers[target] = any_of_warp.repeat(32)
        elif opcode == "selp.f32":
            a, b = (self.read(x, np.float32) for x in sources[:2])
            self.registers[target] = np.where(self.registers[sources[2]], a, b)
        elif opcode in PAIRS:
            (high, width), (low, _) = (PAIRS[opcode](self.read(x, np.float32)) for x in sources)
            self.registers[target] = high.astype(np.int32) << width | low.astype(np.int32)
        else:
            found = INTS[opcode](*(self.read(x) for x in sources))
            self.registers[target] = (
                found if predicate is None else np.where(active, found, self.read(target))
            )

    def mma(self, opcode, operands):
        """m16n8k16, or k32 of integers, warp by warp."""
        if ".m16n8k32." in opcode:
            return self.mma_whole(operands)
        dtype = np.float16 if ".f16.f16." in opcode else ml_dtypes.bfloat16
        d, a, b, c = (self.halves(x) for x in operands)
        lane = LANES % 32
        row, col, warp = lane // 4, lane % 4 * 2, LANES // 32
        left, right = np.zeros((4, 16, 16)), np.zeros((4, 16, 8))
        total = np.zeros((4, 16, 8), np.float32)
        for i in range(4):
            pair = halves(self.read(a[i]), dtype).astype(np.float64)
            for j in range(2):
                left[warp, row + i % 2 * 8, col + i // 2 * 8 + j] = pair[:, j]
                total[warp, row + i // 2 * 8, col + i % 2] = self.read(c[i], np.float32)
        for i in range(2):
            pair = halves(self.read(b[i]), dtype).astype(np.float64)
            for j in range(2):
                right[warp, col + 8 * i + j, row] = pair[:, j]
        total = (total + left @ right).astype(np.float32)
        for i in range(4):
            self.registers[d[i]] = total[warp, row + i // 2 * 8, col + i % 2]

    def mma_whole(self, operands):
        d, a, b, c = (self.halves(x) for x in operands)
        lane = LANES % 32
        row, col, warp = lane // 4, lane % 4, LANES // 32
        left, right = np.zeros((4, 16, 32), np.int64), np.zeros((4, 32, 8), np.int64)
        total = np.zeros((4, 16, 8), np.int64)
        codes = lambda name: halves(self.read(name), np.int8)  # noqa: E731
        for i in range(4):
            for j in range(4):
                left[warp, row + i % 2 * 8, 4 * col + i // 2 * 16 + j] = codes(a[i])[:, j]
            total[warp, row + i // 2 * 8, 2 * col + i % 2] = self.read(c[i])
        for i in range(2):
            for j in range(4):
                right[warp, 4 * col + 16 * i + j, row] = codes(b[i])[:, j]
        total += left @ right
        assert (abs(total) < 2**31).all(), "overflow"
        for i in range(4):
            found = total[warp, row + i // 2 * 8, 2 * col + i % 2]
            self.registers[d[i]] = found.astype(np.int32)

    def load_matrices(self, operands):
        """Four 8 x 8 matrices of 16 bits, transposed: lane 8 i + j names row j of matrix i."""
        names, address = self.halves(operands[0]), self.address(operands[1])
        where = address.items(16, np.ones(128, bool))
        raw = address.array.reshape(-1).view(np.uint8)[where[:, None] + np.arange(16)]
        rows = raw.view(np.uint16).reshape(4, 4, 8, 8)  # warp, matrix, row, column
        warp, g, c = LANES // 32, LANES % 32 // 4, LANES % 4
        for i, name in enumerate(names):
            pair = np.stack([rows[warp, i, 2 * c + h, g] for h in range(2)], 1)
            self.registers[name] = np.ascontiguousarray(pair).view(np.int32)[:, 0]

    def copy(self, opcode, operands):
        """A copy arrives as late as it may: when its group is waited for."""
        if opcode == "cp.async.commit_group":
            COPIES.append([])
        elif opcode == "cp.async.wait_group":
            while len(COPIES) > int(operands[0]) + 1:
                for target, source, size in COPIES.pop(0):
                    target.bytes()[target.rows(size)] = source.bytes()[source.rows(size)]
        else:
            COPIES[-1].append((*map(self.address, operands[:2]), int(operands[2])))

    def address(self, place):
        """Of ``[register]`` or ``[register+bytes]``."""
        name, _, offset = place.strip("[]").partition("+")
        base = self.registers[name]
        return Address(base.array, base.offset + int(offset)) if offset else base

    def memory(self, opcode, operands, active):
        place = next(x for x in operands if x.startswith("["))
        names = self.halves(next(x for x in operands if not x.startswith("[")))
        if opcode.endswith((".u8", ".u16")):
            size = int(opcode.rpartition(".u")[2]) // 8
            address_of = self.address(place)
            index = address_of.items(size, active)[:, None] + np.arange(size)
            narrow = np.zeros((128, 4), np.uint8)
            narrow[active, :size] = address_of.array.reshape(-1).view(np.uint8)[index]
            self.registers[names[0]] = narrow.view(np.int32)[:, 0]
            return
        address = self.address(place)
        where = address.items(4 * len(names), active)
        words = address.array.reshape(-1).view(np.uint8)
        for i, name in enumerate(names):
            index = where[:, None] + 4 * i + np.arange(4)
            if opcode.startswith("st."):
                words[index] = self.read(name)[active].view(np.uint8).reshape(-1, 4)
                continue
            value = self.registers.get(name, np.zeros(128, np.int32)).view(np.int32).copy()
            value[active] = words[index].reshape(-1, 4).copy().view(np.int32)[:, 0]
            self.registers[name] = value


def asm(text, outs, ins, *, tied=(), effects=False):
    with np.errstate(all="ignore"):
        return run_asm(text, outs, ins, tied)


def run_asm(text, outs, ins, tied):
    first = len(tied) + len(outs) + len(tied)
    registers = {f"${first + i}": x for i, x in enumerate(ins)}
    registers |= {f"${i}": x for i, x in enumerate(tied)}
    machine = Machine(registers)
    for statement in parse(text):
        machine.run(*statement)
    kinds = {"f": np.float32, "r": np.int32}
    new = [machine.read(f"${len(tied) + i}", kinds[k]) for i, k in enumerate(outs)]
    return [registers[f"${i}"].view(x.dtype) for i, x in enumerate(tied)] + new


# -- launches --------------------------------------------------------------------------------------


def run_blocks(body, outs, grid, args):
    """The quantisers' launch: every block in turn."""

    def run(*arrays):
        # Bytes that no thread writes stay recognisable.
        results = [
            np.full(int(np.prod(o.shape)) * o.dtype.itemsize, 0x7F, np.uint8)
            .view(o.dtype)
            .reshape(o.shape)
            for o in outs
        ]
        for index in np.ndindex(*grid):
            axes = [np.full(128, i, np.int32) for i in index]
            body([*map(np.asarray, arrays), *results], axes)
        return results

    return jax.pure_callback(run, outs, *args)


def accumulator(tile):
    """[64, n] as registers 4j + 2h + c."""
    row, col = 16 * (LANES // 32) + LANES % 32 // 4, LANES % 4 * 2
    return [
        tile[row + 8 * h, col + 8 * j + c]
        for j in range(tile.shape[1] // 8)
        for h in range(2)
        for c in range(2)
    ]


def from_accumulator(registers, width):
    tile = np.zeros((64, width), registers[0].dtype)
    row, col = 16 * (LANES // 32) + LANES % 32 // 4, LANES % 4 * 2
    for i, x in enumerate(registers):
        tile[row + i // 2 % 2 * 8, col + i // 4 * 8 + i % 2] = x
    return tile


def from_operand(words, dtype):
    """The matrix that wgmma sees in registers of A: 4 of them per 32 bytes of columns."""
    per = 4 // dtype.itemsize
    tile = np.zeros((64, len(words) // 4 * 8 * per), np.float64)
    row, col = 16 * (LANES // 32) + LANES % 32 // 4, LANES % 4 * per
    for i, word in enumerate(words):
        step, second, half = i // 4, i % 4 // 2, i % 2
        values = word.view(np.uint8).reshape(128, 4).copy().view(dtype).astype(np.float64)
        for j in range(per):
            tile[row + 8 * half, col + step * 8 * per + second * 4 * per + j] = values[:, j]
    return tile


def rows_of(values):
    """Per-row registers as [64]."""
    return from_accumulator([values[0], values[0], values[1], values[1]], 8)[:, 0]


def per_row(vector):
    row = 16 * (LANES // 32) + LANES % 32 // 4
    return [vector[row].astype(np.float32), vector[row + 8].astype(np.float32)]


def per_column(vector):
    col = LANES % 4 * 2
    return [vector[col + 8 * j + c] for j in range(len(vector) // 8) for c in range(2)]


def run_attention(plan, arrays, scale, out_dtype):
    """The attention kernel's launch: every query tile in turn, one warpgroup after the other."""
    rows = (plan.batch, plan.q_len, plan.num_heads)
    outs = [
        jax.ShapeDtypeStruct((*rows, plan.head_dim), jnp.float32),
        jax.ShapeDtypeStruct(rows, jnp.float32),
    ]
    run = functools.partial(run_tiles, plan, scale)
    out, lse = jax.pure_callback(run, outs, arrays)
    return out.astype(out_dtype), lse.swapaxes(1, 2)


def run_tiles(plan, scale, arrays):
    """All tiles of the attention kernel, as NumPy arrays [B, T, N, H] and [B, T, N]."""
    x = {name: np.asarray(a) for name, a in arrays.items()}
    shape = (plan.batch, plan.q_tiles * plan.config.block_q, plan.num_heads, plan.head_dim)
    out, lse = np.full(shape, np.nan, np.float32), np.full(shape[:3], np.nan, np.float32)
    for row in x["order"]:
        for index in row[1 : 1 + row[0]]:
            q_tile, b, n = plan.tile_of(int(index))
            for group in range(plan.config.num_compute):
                start = q_tile * plan.config.block_q + group * 64
                values, logs = one_group(plan, x, scale, q_tile, start, b, n)
                assert np.isnan(out[b, start, n]).all(), "a tile was computed twice"
                out[b, start : start + 64, n] = values
                lse[b, start : start + 64, n] = logs
    return out[:, : plan.q_len], lse[:, : plan.q_len]


def window(array, start, size, axis):
    """A slice that reads zeros beyond the array, as a copy to shared memory does."""
    array = np.take(array, range(start, min(start + size, array.shape[axis])), axis)
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, size - array.shape[axis])
    return np.pad(array.astype(np.float64), pad)


def encode_q(plan, x, q, b, head, limit):
    """Codes, scales and products of 64 rows, through a swizzled buffer as in shared memory."""
    width, half = plan.head_dim, jnp.dtype(plan.variant.half)
    swizzle = next(size for size in (128, 64, 32) if width % size == 0)
    codes = np.zeros(64 * width, np.int8 if plan.variant.qk == "int8" else E4M3)
    scales, dots = np.zeros((2, 64), np.float32)
    mean = (x["k_mean"], ptx.i32(b), ptx.i32(head)) if "k_mean" in x else None
    quantize.encode_q_tile(
        q.astype(half), codes, scales, dots, mean, ptx.i32(limit),
        dtype=half, qk=plan.variant.qk, swizzle=swizzle,
    )  # fmt: skip
    tiles = codes.reshape(8, width // swizzle, 8, swizzle // 16, 16)
    line = np.arange(8)[:, None] * swizzle // 128  # the 128-byte line that a row is in
    chunk = np.arange(swizzle // 16) ^ line % (swizzle // 16)
    tiles = np.take_along_axis(tiles, chunk[None, None, :, :, None], 3)
    rows = tiles.transpose(0, 2, 1, 3, 4).reshape(64, width)
    return rows.astype(np.float64), scales, dots if mean else None


def one_group(plan, x, scale, q_tile, q_start, b, n):
    """One compute warpgroup's walk over the keys of 64 queries."""
    config, variant = plan.config, plan.variant
    kv, head = config.block_kv, n // (plan.num_heads // plan.num_kv_heads)
    factor = np.float32(variant.logit_factor(scale))
    rows = lambda name: x[name][b, n, q_start : q_start + 64]  # noqa: E731
    q = window(x["q"][b, :, n], q_start, 64, 0)
    limits = (
        x["bounds"][b] if plan.dynamic else (plan.q_len, plan.kv_len, plan.min_diff, plan.max_diff)
    )
    scales = rows("q_scale") if "q_scale" in x else np.ones(64, np.float32)
    const = rows("row_const") if "row_const" in x else None
    if plan.raw_q:
        q, scales, const = encode_q(plan, x, q, b, head, int(limits[0]) - q_start)
    row_scale = per_row(scales * factor)
    shift = ()
    if variant.soft_cap is not None:
        shift = per_row(const * factor if const is not None else np.zeros(64))
    fields = dict(zip(("q_len", "kv_len", "min_diff", "max_diff"), limits, strict=True))
    for name, present in zip(("min_diff", "max_diff"), plan.bounded, strict=True):
        fields[name] = fields[name] if present else None
    fields = {name: None if v is None else ptx.i32(v) for name, v in fields.items()}
    if plan.listed:
        row = q_start // plan.listed
        lo, mid_lo, mid_hi, hi = x["ranges"][b % len(x["ranges"]), n % x["ranges"].shape[1], row]
        tiles = x["list"][b % len(x["list"]), n % x["list"].shape[1], row]
    else:
        lo, mid_lo, mid_hi, hi = x["tiles"][b, q_tile] if plan.dynamic else plan.kv_tiles(q_tile)
        tiles = np.arange(hi)
    joined, tile_kv = plan.joined, kv // plan.joined
    take = lambda array, parts, axis: np.concatenate(  # noqa: E731
        [window(array, tile * tile_kv, tile_kv, axis) for tile in parts], axis
    )
    out = [ptx.f32(0)] * (plan.head_dim // 2)
    total, m = [ptx.f32(0)] * 2, [ptx.f32(tile_math.NO_MAX)] * 2
    for place in range(hi - 1, lo - 1, -joined):
        places = range(place, place - joined, -1)
        parts = [int(tiles[max(p, 0)]) for p in places]
        k = take(x["k"][b, :, head], parts, 0)
        score_type = np.int32 if variant.qk == "int8" else np.float32
        scores = accumulator((q @ k.T).astype(score_type))
        masked = plan.needs_mask and not all(mid_lo <= p < mid_hi for p in places)
        for part, (p, tile) in enumerate(zip(places, parts, strict=True)):
            if not masked:
                break
            ids = {}
            first = tile * tile_kv
            if plan.segmented:
                ids = {
                    "q_ids": per_row(x["q_ids"][b, q_start : q_start + 64]),
                    "kv_ids": per_column(x["kv_ids"][b, first : first + tile_kv]),
                }
                ids["q_ids"] = [v.astype(np.int32) for v in ids["q_ids"]]
            limits = fields if p >= 0 else {**fields, "kv_len": ptx.i32(0)}
            where = tile_math.Position(ptx.i32(q_start), ptx.i32(first), **limits, **ids)
            own = slice(part * len(scores) // joined, (part + 1) * len(scores) // joined)
            scores[own] = tile_math.mask_scores(scores[own], where, variant.qk == "int8")
        blocks = tile_kv // plan.scale_block
        col_scale = []
        if "k_scale" in x:
            of = [x["k_scale"][b, head, tile * blocks : (tile + 1) * blocks] for tile in parts]
            col_scale = [s for block in np.concatenate(of) for s in per_column(block)]
        tops = ()
        if config.qk_split == 2:
            first = scores[: len(scores) // 2]
            tops = [tile_math.maximum(first[i::4], variant.qk == "int8") for i in range(4)]
        p, m, alpha, sums = tile_math.softmax(
            variant, scores, m, row_scale, col_scale, shift, masked=masked, tops=tops
        )
        if variant.pv == "half":
            v = take(x["v"][b, :, head], parts, 0)
        else:  # below the values lie rows of ones
            v = take(x["v"][b, head], parts, 1).T
            v = np.concatenate([v, np.ones((kv, 8))], 1)
        operand = from_operand(
            p, np.dtype(E4M3) if variant.pv == "e4m3" else jnp.dtype(variant.half)
        )
        new = accumulator((operand @ v).astype(np.float32))
        total = tile_math.add_sums(variant, total, alpha, new, plan.head_dim, sums)
        out = tile_math.add_tile(out, new, alpha)
    const = per_row(const * np.float32(scale)) if const is not None and not shift else None
    sink = ptx.f32(x["sinks"][n]) if "sinks" in x else None
    factor, lse = tile_math.finish(variant, total, m, const, sink)
    channel = per_column(x["v_scale"][b, head]) if "v_scale" in x else ()
    out = tile_math.scale_out(out, factor, channel)
    return from_accumulator(out, plan.head_dim), rows_of(lse)


def dequantized(ops, t, s, ordered=False):
    """Float32 query, key and value with the meaning of the kernel's operands.

    ``ordered`` takes the tokens of V as they lie, without undoing their permutation.
    """
    q, k, v = (np.asarray(x, np.float32) for x in ops[:3])
    const = ops.row_const
    if ops.k_scale is not None and ops.q_scale is None:  # as the kernel does it itself
        q = q[:, :t]
        is_int = ops.k.dtype == jnp.int8
        top, largest = np.abs(q).max(-1, keepdims=True), np.float32(127 if is_int else 448)
        top = np.maximum(top, np.float32(quantize.TINY))
        if ops.k_mean is not None:
            mean = np.repeat(ops.k_mean, q.shape[2] // k.shape[2], 1)
            const = np.einsum("btnh,bnh->bnt", np.nan_to_num(q), mean)
        scaled = q * (largest / top)  # a division by the scale would round ties otherwise
        codes = np.rint(scaled) if is_int else scaled.astype(E4M3).astype(np.float32)
        q = codes * (top * (1 / largest))
    if ops.q_scale is not None:
        q = q[:, :t] * np.asarray(ops.q_scale)[:, :, :t].swapaxes(1, 2)[..., None]
    if ops.k_scale is not None:
        scale = np.asarray(ops.k_scale)  # [B, K, blocks, 8]
        wide = np.tile(scale, k.shape[1] // scale.shape[2] // 8).reshape(*scale.shape[:2], -1)
        k = (k * wide.swapaxes(1, 2)[..., None])[:, :s]
    if ops.v_scale is not None:
        order = np.arange(16) if ordered else np.argsort(quantize.V_ORDER)
        v = v.reshape(*v.shape[:3], -1, 16)[..., order].reshape(v.shape)
        v = (v * np.asarray(ops.v_scale)[..., None]).transpose(0, 3, 1, 2)[:, :s]
    if const is not None:  # one more channel adds it to every logit of a row
        const = np.asarray(const)[:, :, :t].swapaxes(1, 2)[..., None]
        q, k = np.concatenate([q, const], -1), np.concatenate([k, np.ones_like(k[..., :1])], -1)
    return [jnp.asarray(x) for x in (q, k, v)]


def walk(steps, found, groups):
    """A gradient kernel's loops over one sequence, with every tile masked.

    Args:
        steps: `Queries` or `Keys`.
        found: arrays by name, as `operands` makes them.
        groups: query heads of a key head.

    Returns:
        [1, tokens of the owner, heads, H] for each sum.
    """
    plan, side = steps.plan, steps.side
    block = plan.config.block_kv
    x = {}
    for name, array in found.items():  # what lies beyond the end is copied as zeros
        token = {"q8": 1, "k8": 1, "q": 1, "v": 1, "d_out": 1}.get(name)
        pad = [(0, 384 * (i == token)) for i in range(array.ndim)]
        x[name] = np.pad(array, pad)[0]

    def piece(name, head, start, size):
        if name == "k_t":
            return x[name][head][start // size]
        if name in steps.copied:
            width = steps.copied[name]
            return np.ascontiguousarray(x[name][head][start // size * width :][:width])
        return x[name][start : start + size, head]

    results = [
        np.zeros((plan.q_tiles * plan.config.block_q, plan.num_heads, plan.head_dim))
        for _ in range(1 if side == "q" else 2)
    ]
    for head, first in np.ndindex(plan.num_heads, len(results[0]) // 64):
        row = first * 64
        own = [piece(name, head, row, 64) for name in steps.own]
        load = lambda name: per_row(x[name][head][row : row + 64])  # noqa: B023, E731
        fixed, sums = steps.of_owner(load), steps.start()
        streamed = [head // groups] if side == "q" else range(head * groups, (head + 1) * groups)
        for other in streamed:
            for start in range(0, plan.kv_len, block):
                ring = [[piece(name, other, start, block) for name in part] for part in steps.ring]
                where = {"row": row, "col": start, "first_col": start, "last_col": start + block}
                nothing = [lambda *_: None] * 4
                sums = steps.tile(own, ring, fixed, None, sums, where, *nothing)
        mean = x["k_mean"][head // groups] if side == "q" else None
        for result, total in zip(results, steps.finish(sums, load, mean), strict=True):
            result[row : row + 64, head] = from_accumulator(total, plan.head_dim)
    return [result[None, : plan.q_len] for result in results]


@contextlib.contextmanager
def installed():
    """Puts the NumPy warpgroup in the place of the GPU's; results must be waited for inside."""
    jax.clear_caches()  # What was traced before calls the GPU's.
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (ARITHMETIC | CONTROL).items():
            patch.setattr(ptx, name, function)
        patch.setattr(ptx, "asm", asm)
        patch.setattr(quantize, "_call", run_blocks)
        patch.setattr(mosaic_sm90, "launch", run_attention)
        yield
        jax.clear_caches()  # What was traced here calls NumPy.
