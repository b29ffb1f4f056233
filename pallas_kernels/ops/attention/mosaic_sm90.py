"""Quantised attention for Hopper: INT8 scores, FP8 probabilities, float32 sums.

One kernel computes ``softmax(scale * Q K^T) V`` from INT8 ``Q`` and ``K`` and FP8 ``V``. Two or three
*compute* warpgroups own 64 query rows each; one *memory* warpgroup feeds them K and V tiles through a
ring in shared memory. Per K/V tile a compute warpgroup

1. multiplies INT8 rows into an s32 tile (``wgmma``, exact),
2. turns it into probabilities ``P = e4m3(448 * exp2(x - m))``, which stay in registers,
3. multiplies ``P`` with ``[V^T; 1]`` into a *fresh* float32 tile, whose last eight columns are row sums,
4. adds that tile to the float32 output: ``out = alpha * out + tile``.

Step 3 starts from zero every time because the FP8 tensor-core accumulator keeps only about 14 bits:
a running sum drifts by 18 % when the values have a mean ("two-level accumulation").

What makes it fast, in the order of what it bought (all figures: docs of the attention benchmark):

* The tensor-core tiles start from zero by the *scale-d* predicate of ``wgmma`` instead of by writing
  zeros, so two-level accumulation costs no instruction more than one running accumulator.
* The row maximum is taken on the raw integers (three-input integer maximum, two scores per
  instruction); conversion to float happens later, in the shadow of the ``exp2`` unit.
* ``exp2``, scaling and the conversion to e4m3 are emitted as PTX, four scores at a time.
* A schedule barrier lets one warpgroup multiply while the other computes its softmax.
* A persistent grid overlaps one tile's epilogue with the next tile's loads; with causal masks the
  longest query tiles go first.

References: SageAttention2 (arXiv 2411.10958), section 3; FlashAttention-3 (arXiv 2407.08608),
section 3; PTX ISA, ``wgmma.mma_async``.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

LOG2E = math.log2(math.e)
# P is stored as e4m3, whose largest value is 448: the factor sits in the exponent and cancels in O / l.
LOG2_P_MAX = math.log2(448.0)
# Float 1.5 * 2**23: adding a small integer to its bits adds the same integer to its value.
MAGIC_BITS = 0x4B400000
MAGIC = 12582912.0
# Start value of the running maximum. Finite, so that a row with nothing to attend never forms inf - inf.
NO_MAX = -1e30
ROWS = 64  # query rows of one warpgroup: the M of wgmma
INT_MIN = -(2**31)
SMEM_LIMIT = 232448  # bytes one block may use on sm90 (227 KiB)

_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COL = plgpu.Layout.WGMMA.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles and schedule of the kernel.

    Args:
        num_compute: compute warpgroups per block, each with 64 query rows.
        block_kv: keys per step; a multiple of the K scale block.
        num_stages: K/V tiles held in shared memory.
        order: "simple", "fused" (values of one tile and scores of the next issued together) or "ahead"
            (the softmax of the next tile also runs while the values are summed).
        schedule: "none", "pair" (two warpgroups meet twice per step) or "turn" (they pass a token).
        persistent: one block per SM walks over many query tiles.
        head_group: heads whose query tiles are interleaved, longest first.
        registers: registers per thread of a compute warpgroup.
        memory_registers: registers per thread of the memory warpgroup.
        convert: how an s32 score becomes a float: "cvt" or "magic" (integer addition to 1.5 * 2**23).
        poly: of every ``poly[1]`` groups of 4 scores, the first ``poly[0]`` use a polynomial exp2.
    """

    num_compute: int = 2
    block_kv: int = 256
    num_stages: int = 2
    order: str = "simple"
    schedule: str = "pair"
    persistent: bool = True
    head_group: int = 8
    registers: int = 232
    memory_registers: int = 40
    convert: str = "cvt"
    poly: tuple[int, int] = (0, 8)
    qk_split: int = 1
    exp_half: bool = False
    num_sms: int = 132
    chunk: int = 4
    ablate: str = ""

    @property
    def block_q(self) -> int:
        return self.num_compute * ROWS


# --- Register-level building blocks -----------------------------------------------------------------
# A wgmma accumulator tile [64, n] gives each thread, for every 8 columns j, four values in this order:
# (row g, col 2t), (row g, col 2t+1), (row g+8, col 2t), (row g+8, col 2t+1) with g = lane // 4 and
# t = lane % 4. Register 4*j + 2*h + c therefore belongs to row half h and column parity c.


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _f32(value: float) -> ir.Value:
    return arith.constant(ir.F32Type.get(), float(value))


def _scalars(array: mgpu.FragmentedArray, as_type: ir.Type | None = None) -> list[ir.Value]:
    """Returns this thread's elements, register by register, optionally as 32-bit words."""
    out = []
    for reg in array.registers.flat:
        if as_type is not None:
            words = utils.bitwidth(reg.type) // 32
            reg = vector.bitcast(ir.VectorType.get((words,), as_type), reg)
        for i in range(ir.VectorType(reg.type).shape[0]):
            out.append(llvm.extractelement(reg, _i32(i)))
    return out


def _pack(values, shape, layout, dtype, is_signed=None) -> mgpu.FragmentedArray:
    """Builds an array of ``layout`` from 32-bit words in register order."""
    layout = layout.to_mgpu()
    element = utils.dtype_to_ir_type(dtype)
    words = layout.vector_length * utils.bitwidth(element) // 32
    reg_shape = layout.registers_shape(shape)
    regs = np.empty(math.prod(reg_shape), dtype=object)
    for i in range(regs.size):
        chunk = values[i * words : (i + 1) * words]
        reg = llvm.mlir_undef(ir.VectorType.get((words,), chunk[0].type))
        for j, word in enumerate(chunk):
            reg = llvm.insertelement(reg, word, _i32(j))
        regs[i] = vector.bitcast(ir.VectorType.get((layout.vector_length,), element), reg)
    return mgpu.FragmentedArray(
        _registers=regs.reshape(reg_shape), _layout=layout, _is_signed=is_signed
    )


def _constraint(ty: ir.Type) -> str:
    if isinstance(ty, ir.F32Type):
        return "f"
    return "l" if utils.bitwidth(ty) == 64 else "r"


def _asm(text, outs, ins, *, tied=(), effects=True) -> list[ir.Value]:
    """Inline PTX. Operands are numbered: tied outputs, other outputs, tied inputs, other inputs."""
    out_types = [v.type for v in tied] + list(outs)
    constraints = [f"={_constraint(v.type)}" for v in tied]
    constraints += [f"=&{_constraint(t)}" for t in outs]
    constraints += [str(i) for i in range(len(tied))]
    constraints += [_constraint(v.type) for v in ins]
    result_type = out_types[0] if len(out_types) == 1 else llvm.StructType.get_literal(out_types)
    result = llvm.inline_asm(
        result_type, [*tied, *ins], text, ",".join(constraints), has_side_effects=effects, asm_dialect=0
    )
    if len(out_types) == 1:
        return [result]
    return [llvm.extractvalue(t, result, [i]) for i, t in enumerate(out_types)]


def _descriptors(ref: ir.Value, swizzle: int) -> list[ir.Value]:
    """wgmma descriptors of a K-major 8-bit operand [rows, k], one per 32 columns.

    The operand is tiled (rows/8, k/swizzle, 8, swizzle) in shared memory.
    """
    k_tiles = ir.MemRefType(ref.type).shape[1]
    atom = 8 * swizzle
    base = mma_utils.encode_descriptor(
        ref, leading_byte_offset=0, stride_byte_offset=k_tiles * atom, swizzle=swizzle
    )
    i64 = ir.IntegerType.get_signless(64)
    offsets = [a * atom + 32 * i for a in range(k_tiles) for i in range(swizzle // 32)]
    return [llvm.add(base, arith.constant(i64, off >> 4), overflow_flags=llvm.IntegerOverflowFlags.none) for off in offsets]


def _wgmma(n, a, b, acc_type: ir.Type, kind: str) -> list[ir.Value]:
    """Issues ``fresh tile [64, n] = A @ B`` as one group of wgmma and commits it.

    ``a`` is a list over steps of one descriptor or of four registers, ``b`` a list of descriptors. The
    first step ignores the accumulator's old contents, so no instruction is spent on clearing it.
    """
    count = n // 2
    number = count
    operands, lines = [], []
    for step, (a_step, b_step) in enumerate(zip(a, b, strict=True)):
        a_step = a_step if isinstance(a_step, list) else [a_step]
        names = ["$%d" % (number + i) for i in range(len(a_step) + 1)]
        number += len(names)
        operands += [*a_step, b_step]
        a_text = names[0] if len(a_step) == 1 else "{" + ",".join(names[:-1]) + "}"
        acc = "{" + ",".join("$%d" % i for i in range(count)) + "}"
        flags = "" if kind.startswith("s32") else ", 1, 1"
        predicate = "later" if step else "first"
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k32.{kind} {acc}, {a_text}, {names[-1]}, {predicate}{flags};"
        )
    text = "\n".join(
        [
            "{ .reg .pred first, later;",
            "setp.ne.b32 first, 0, 0;",
            "setp.ne.b32 later, 1, 0;",
            "wgmma.fence.sync.aligned;",
            *lines,
            "wgmma.commit_group.sync.aligned;",
            "}",
        ]
    )
    return _asm(text, [acc_type] * count, operands)


def _wait(n: int, values: list[ir.Value], keep: list[ir.Value] = ()) -> list[ir.Value]:
    """Waits until at most ``n`` groups are in flight; ``keep`` stays alive until then."""
    return _asm(f"wgmma.wait_group.sync.aligned {n};", [], list(keep), tied=values)


def _opaque(values: list[ir.Value]) -> list[ir.Value]:
    """Pins values to this point of the program, in order with barriers."""
    return _asm("", [], [], tied=values)


def _fma(a, b, c):
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [ir.F32Type.get()], [a, b, c], effects=False)[0]


def _exp2(x):
    return _asm("ex2.approx.ftz.f32 $0, $1;", [ir.F32Type.get()], [x], effects=False)[0]


def _quad_max(x):
    """Maximum over the four threads that share a row."""
    for distance in (1, 2):
        x = arith.maximumf(x, utils.shfl_bfly(x, distance))
    return x


def _poly_exp2(x: str, tmp: str) -> list[str]:
    """2**x by splitting off the integer part; the cubic is accurate to 1e-4, e4m3 keeps 6e-2."""
    return [
        f"max.f32 {x}, {x}, 0fC2FC0000;",  # -126: keeps the exponent arithmetic in range
        f"add.f32 {tmp}, {x}, 0f4B400000;",
        f"sub.f32 {tmp}p, {tmp}, 0f4B400000;",
        f"sub.f32 {x}, {x}, {tmp}p;",  # in [-0.5, 0.5]
        f"fma.rn.f32 {tmp}p, {x}, 0f3D6522B2, 0f3E76DF0F;",
        f"fma.rn.f32 {tmp}p, {tmp}p, {x}, 0f3F317151;",
        f"fma.rn.f32 {tmp}p, {tmp}p, {x}, 0f3F7FFF9A;",
        f"mov.b32 {tmp}i, {tmp};",
        f"shl.b32 {tmp}i, {tmp}i, 23;",
        f"mov.b32 {tmp}j, {tmp}p;",
        f"add.s32 {tmp}i, {tmp}i, {tmp}j;",
        f"mov.b32 {x}, {tmp}i;",
    ]


def _probabilities(words, scales, offsets, config: Config, *, poly=False, floats=False) -> ir.Value:
    """Four neighbouring P as e4m3 in one register: ``e4m3(exp2(score * scale + offset))``.

    ``words`` are raw s32 scores, or finished floats when a mask was applied (``floats``).
    """
    lines = ["{ .reg .f32 x<4>, t, tp; .reg .b32 r<4>, ti, tj; .reg .b16 lo, hi; .reg .b32 u<2>;"]
    for i in range(4):
        c = i % 2
        if floats:
            lines.append(f"mov.b32 x{i}, ${1 + i};")
        elif config.convert == "cvt":
            lines.append(f"cvt.rn.f32.s32 x{i}, ${1 + i};")
        else:
            lines += [f"add.s32 r{i}, ${1 + i}, {MAGIC_BITS};", f"mov.b32 x{i}, r{i};"]
        lines.append(f"fma.rn.f32 x{i}, x{i}, ${5 + c}, ${7 + c};")
    if config.exp_half:
        for i in range(2):
            lines.append(f"cvt.rn.f16x2.f32 u{i}, x{2 * i + 1}, x{2 * i};")
            lines.append(f"ex2.approx.f16x2 u{i}, u{i};")
            lines.append(f"cvt.rn.satfinite.e4m3x2.f16x2 {('lo', 'hi')[i]}, u{i};")
    else:
        for i in range(4):
            if "exp" not in config.ablate:
                lines += _poly_exp2(f"x{i}", "t") if poly else [f"ex2.approx.ftz.f32 x{i}, x{i};"]
        if "cvt8" in config.ablate:
            raise NotImplementedError
        lines.append("cvt.rn.satfinite.e4m3x2.f32 lo, x1, x0;")
        lines.append("cvt.rn.satfinite.e4m3x2.f32 hi, x3, x2;")
    lines.append("mov.b32 $0, {lo, hi}; }")
    i32 = ir.IntegerType.get_signless(32)
    ins = [*words, scales[0], scales[1], offsets[0], offsets[1]]
    return _asm("\n".join(lines), [i32], ins, effects=False)[0]


def _int_max(values):
    """Maximum of s32 values as three-input maxima over four independent chains."""
    chains = [values[i::4] for i in range(4)]
    heads = []
    for chain in chains:
        best, rest = chain[0], chain[1:]
        for i in range(0, len(rest), 2):
            best = arith.maxsi(best, rest[i])
            if i + 1 < len(rest):
                best = arith.maxsi(best, rest[i + 1])
        heads.append(best)
    return arith.maxsi(arith.maxsi(heads[0], heads[1]), arith.maxsi(heads[2], heads[3]))


def _thread_row_col():
    """This thread's first row in the 64-row tile (its second is 8 below) and its first column."""
    tid = arith.remui(utils.thread_idx(), _i32(128))
    warp, lane = arith.divui(tid, _i32(32)), arith.remui(tid, _i32(32))
    row = arith.addi(arith.muli(warp, _i32(16)), arith.divui(lane, _i32(4)))
    return row, arith.muli(arith.remui(lane, _i32(4)), _i32(2))


@dataclasses.dataclass(frozen=True)
class _Mask:
    """Static facts of the mask: keys ``row + offset - left <= col <= row + offset + right``, ``col < kv_len``."""

    left: int | None
    right: int | None
    offset: int

    def bounds(self, q_start, col_start, q_len, kv_len):
        """Per row half: first allowed and first forbidden column, relative to this thread's columns."""
        row0, col0 = _thread_row_col()
        out = []
        for half in range(2):
            row = arith.addi(arith.addi(q_start, row0), _i32(8 * half))
            last = kv_len
            if self.right is not None:
                last = arith.minsi(last, arith.addi(row, _i32(self.offset + self.right + 1)))
            last = arith.select(arith.cmpi(arith.CmpIPredicate.slt, row, q_len), last, _i32(0))
            base = arith.addi(col_start, col0)
            first = None
            if self.left is not None:
                first = arith.subi(arith.addi(row, _i32(self.offset - self.left)), base)
            out.append((first, arith.subi(last, base)))
        return out


def _softmax_step(config, head_dim, mask, scores, m, q_scale, k_scale, position=None):
    """One tile of online softmax on this thread's registers.

    Returns the packed P registers, the new maxima and the factors that bring old sums to them.
    """
    del head_dim
    if position is None and config.chunk:
        return _sliced_softmax(config, scores, m, q_scale, k_scale)
    tiles = config.block_kv // 8
    blocks = len(k_scale) // 2  # scale blocks per tile; each has one scale per column parity here
    per_block = tiles // blocks
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    words = [[[scores[4 * j + 2 * h + c] for j in range(tiles)] for c in range(2)] for h in range(2)]
    allowed = None
    if position is not None:
        bounds = mask.bounds(*position)
        allowed = [[[None] * tiles for _ in range(2)] for _ in range(2)]
        for h in range(2):
            first, last = bounds[h]
            for c in range(2):
                for j in range(tiles):
                    col = _i32(8 * j + c)
                    ok = arith.cmpi(arith.CmpIPredicate.slt, col, last)
                    if first is not None:
                        ok = arith.andi(ok, arith.cmpi(arith.CmpIPredicate.sge, col, first))
                    allowed[h][c][j] = ok
                    words[h][c][j] = arith.select(ok, words[h][c][j], _i32(INT_MIN))
    new_m, alpha, packed = [], [], [[None] * (tiles // 2) for _ in range(2)]
    scale = [[[arith.mulf(q_scale[h], k_scale[2 * b + c]) for c in range(2)] for b in range(blocks)] for h in range(2)]
    for h in range(2):
        best = None
        for b in range(blocks):
            for c in range(2):
                top = _int_max(words[h][c][b * per_block : (b + 1) * per_block][: 4 if "max" in config.ablate else None])
                value = arith.mulf(arith.sitofp(f32, top), scale[h][b][c])
                if allowed is not None:
                    # A tile without one allowed key must not move the maximum.
                    empty = arith.cmpi(arith.CmpIPredicate.eq, top, _i32(INT_MIN))
                    value = arith.select(empty, _f32(NO_MAX), value)
                best = value if best is None else arith.maximumf(best, value)
        new_m.append(arith.maximumf(m[h], _quad_max(best)))
        alpha.append(_exp2(arith.subf(m[h], new_m[h])))
    group = 0
    for h in range(2):
        for b in range(blocks):
            shift = arith.subf(_f32(LOG2_P_MAX), new_m[h])
            offsets = [shift, shift]
            if config.convert == "magic" and allowed is None:
                offsets = [_fma(_f32(-MAGIC), s, shift) for s in scale[h][b]]
            for jj in range(b * per_block // 2, (b + 1) * per_block // 2):
                four = [words[h][i % 2][2 * jj + i // 2] for i in range(4)]
                if allowed is not None:
                    # Masked scores become -inf after conversion: exact zeros whatever the scale.
                    four = [
                        arith.select(
                            allowed[h][i % 2][2 * jj + i // 2], arith.sitofp(f32, w), _f32(-math.inf)
                        )
                        for i, w in enumerate(four)
                    ]
                    four = [llvm.bitcast(i32, w) for w in four]
                taken, of = config.poly
                poly = allowed is None and (group % of) < taken
                group += 1
                packed[h][jj] = _probabilities(
                    four, scale[h][b], offsets, config, poly=poly, floats=allowed is not None
                )
    # Operand order of an 8-bit A: per 16 columns, row half 0 then row half 1.
    p = [packed[h][jj] for jj in range(tiles // 2) for h in range(2)]
    return p, new_m, alpha


class _Slice:
    """One slice of the softmax as PTX: a basic block that ptxas schedules by itself.

    Left alone, ptxas puts all integer-to-float conversions first, then all exp2, then all conversions
    to e4m3, so the units wait for each other. A slice holds the exp2 of one group of scores, the
    preparation of the next and the packing of the last. It ends in a backward branch that is never
    taken, which nothing is moved across.
    """

    def __init__(self):
        self.lines, self.ins, self.outs = [], [], []

    def read(self, value) -> str:
        for i, (v, _) in enumerate(self.ins):
            if v is value:
                return f"@I{i}@"
        self.ins.append((value, None))
        return f"@I{len(self.ins) - 1}@"

    def write(self, ty) -> str:
        self.outs.append(ty)
        return f"@O{len(self.outs) - 1}@"

    def emit(self, never: ir.Value | None, number: int) -> list[ir.Value]:
        text = "\n".join(["{ .reg .b16 lo, hi; .reg .pred never;", *self.lines])
        if never is not None:
            mark = self.read(never)
            text += f"\nsetp.eq.b32 never, {mark}, {0x7FAB0000 + number};\n@never exit;"
        text += "\n}"
        for i in reversed(range(len(self.outs))):
            text = text.replace(f"@O{i}@", f"${i}")
        for i in reversed(range(len(self.ins))):
            text = text.replace(f"@I{i}@", f"${len(self.outs) + i}")
        return _asm(text, self.outs, [v for v, _ in self.ins])


def _sliced_softmax(config, scores, m, q_scale, k_scale):
    """`_softmax_step` for a tile without a mask, in slices of ``config.chunk`` groups of 4 scores."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    tiles = config.block_kv // 8
    blocks = len(k_scale) // 2
    never = llvm.bitcast(i32, q_scale[0])
    word = lambda h, c, j: scores[4 * j + 2 * h + c]
    scale = [
        [[arith.mulf(q_scale[h], k_scale[2 * b + c]) for c in range(2)] for b in range(blocks)]
        for h in range(2)
    ]
    per_block = tiles // blocks

    def finish_max(h, tops):
        best = None
        for b in range(blocks):
            for c in range(2):
                value = arith.mulf(arith.sitofp(f32, tops[b][c]), scale[h][b][c])
                best = value if best is None else arith.maximumf(best, value)
        new = arith.maximumf(m[h], _quad_max(best))
        return new, _exp2(arith.subf(m[h], new)), arith.subf(_f32(LOG2_P_MAX), new)

    span = lambda b: range(b * per_block, (b + 1) * per_block)
    tops0 = [[_int_max([word(0, c, j) for j in span(b)]) for c in range(2)] for b in range(blocks)]
    states = [finish_max(0, tops0), None]
    groups = [(h, jj) for h in range(2) for jj in range(tiles // 2)]
    chunks = [groups[i : i + config.chunk] for i in range(0, len(groups), config.chunk)]
    # The second row's maximum is taken while the first row is exponentiated.
    first_row = len(chunks) // 2
    todo = [(b, c, j) for b in range(blocks) for j in span(b) for c in range(2)]
    share = -(-len(todo) // max(first_row - 1, 1))
    running = {}
    packed = {}
    ready, done = {}, {}  # prepared exponents and finished exp2 by (group, index)

    def prepare(part, slice_, out):
        for h, jj in part:
            b = 2 * jj // per_block
            for i in range(4):
                dst = slice_.write(f32)
                src = slice_.read(word(h, i % 2, 2 * jj + i // 2))
                out.append(((h, jj, i), dst))
                yield [
                    f"cvt.rn.f32.s32 {dst}, {src};",
                    f"fma.rn.f32 {dst}, {dst}, {slice_.read(scale[h][b][i % 2])}, {slice_.read(states[h][2])};",
                ]

    def pack(part, slice_, out):
        for h, jj in part:
            x = [slice_.read(done[(h, jj, i)]) for i in range(4)]
            dst = slice_.write(i32)
            out.append(((h, jj), dst))
            yield [f"cvt.rn.satfinite.e4m3x2.f32 lo, {x[1]}, {x[0]};"]
            yield [f"cvt.rn.satfinite.e4m3x2.f32 hi, {x[3]}, {x[2]};", f"mov.b32 {dst}, {{lo, hi}};"]

    def power(part, slice_, out):
        for h, jj in part:
            for i in range(4):
                dst = slice_.write(f32)
                out.append(((h, jj, i), dst))
                yield [f"ex2.approx.ftz.f32 {dst}, {slice_.read(ready[(h, jj, i)])};"]

    def maxima(items, slice_, out):
        by_chain = {}
        for b, c, j in items:
            by_chain.setdefault((b, c, j % 4), []).append(j)
        for (b, c, lane), js in by_chain.items():
            dst = slice_.write(i32)
            names = [slice_.read(word(1, c, j)) for j in js]
            key = (b, c, lane)
            if key in running:
                names.insert(0, slice_.read(running[key]))
            out.append((key, dst))
            if len(names) == 1:
                yield [f"mov.b32 {dst}, {names[0]};"]
                continue
            steps = [f"max.s32 {dst}, {names[0]}, {names[1]};"]
            steps += [f"max.s32 {dst}, {dst}, {n};" for n in names[2:]]
            for i in range(0, len(steps), 2):
                yield steps[i : i + 2]

    def interleave(slice_, *streams):
        streams = [list(s) for s in streams]
        length = max(len(s) for s in streams)
        for i in range(length):
            for s in streams:
                lo, hi = i * len(s) // length, (i + 1) * len(s) // length
                for lines in s[lo:hi]:
                    slice_.lines += lines

    def run(k):
        """Slice k: exp2 of chunk k, preparation of chunk k + 1, packing of chunk k - 1."""
        slice_, names = _Slice(), [[], [], [], []]
        items = []
        if 0 <= k < first_row - 1:
            items = todo[k * share : (k + 1) * share]
        interleave(
            slice_,
            power(chunks[k] if 0 <= k < len(chunks) else [], slice_, names[0]),
            prepare(chunks[k + 1] if k + 1 < len(chunks) else [], slice_, names[1]),
            pack(chunks[k - 1] if k >= 1 else [], slice_, names[2]),
            maxima(items, slice_, names[3]),
        )
        results = slice_.emit(never, k + 1)
        number = lambda name: results[int(name[2:-1])]
        done.update({key: number(n) for key, n in names[0]})
        ready.update({key: number(n) for key, n in names[1]})
        packed.update({key: number(n) for key, n in names[2]})
        running.update({key: number(n) for key, n in names[3]})

    for k in range(-1, len(chunks) + 1):
        if k == first_row - 1:
            tops1 = []
            for b in range(blocks):
                lanes = [[running[(b, c, lane)] for lane in range(4)] for c in range(2)]
                tops1.append([_int_max(lane) for lane in lanes])
            states[1] = finish_max(1, tops1)
        run(k)
    p = [packed[(h, jj)] for jj in range(tiles // 2) for h in range(2)]
    return p, [s[0] for s in states], [s[1] for s in states]


# --- The same blocks as Pallas functions --------------------------------------------------------------


def _shape(shape, dtype, layout):
    return plgpu.ShapeDtypeStruct(tuple(shape), dtype, layout=layout)


def _transforms(swizzle):
    return (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))


class _Blocks:
    """The kernel's steps, bound to one configuration and head size."""

    def __init__(self, config: Config, head_dim: int, mask: _Mask, scale_blocks: int):
        self.config, self.head_dim, self.mask, self.scale_blocks = config, head_dim, mask, scale_blocks
        self.k_swizzle = min(128, head_dim)
        self.v_swizzle = 128
        kv = config.block_kv
        self.scores_type = _shape((ROWS, kv), jnp.int32, _ACC)
        self.p_type = _shape((ROWS, kv), jnp.float8_e4m3fn, plgpu.Layout.WGMMA_8BIT)
        self.row_type = _shape((ROWS,), jnp.float32, _ROW)
        self.tile_type = _shape((ROWS, head_dim + 8), jnp.float32, _ACC)
        self.out_type = _shape((ROWS, head_dim), jnp.float32, _ACC)

    def issue_scores(self, q_ref, k_ref):
        refs = (plgpu.RefType(_transforms(self.k_swizzle)),) * 2

        @plgpu.inline_mgpu(arg_types=refs, return_type=self.scores_type)
        def run(ctx, q, k):
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            a, b = _descriptors(q, self.k_swizzle), _descriptors(k, self.k_swizzle)
            regs = _wgmma(self.config.block_kv, a, b, i32, "s32.s8.s8")
            return _pack(regs, self.scores_type.shape, _ACC, jnp.int32, is_signed=True)

        return run(q_ref, k_ref)

    def wait_scores(self, scores, in_flight: int):
        @plgpu.inline_mgpu(arg_types=(_ACC,), return_type=self.scores_type)
        def run(ctx, scores):
            del ctx
            regs = _wait(in_flight, _scalars(scores))
            return _pack(regs, self.scores_type.shape, _ACC, jnp.int32, is_signed=True)

        return run(scores)

    def softmax(self, scores, m, q_scale, k_scale, position=None):
        position = () if position is None else tuple(position)
        args = (_ACC, _ROW, _ROW, (_COL,) * self.scale_blocks, (_SCALAR,) * len(position))

        @plgpu.inline_mgpu(arg_types=args, return_type=(self.p_type, self.row_type, self.row_type))
        def run(ctx, scores, m, q_scale, k_scale, position):
            del ctx
            p, new_m, alpha = _softmax_step(
                self.config,
                self.head_dim,
                self.mask,
                _scalars(scores),
                _scalars(m),
                _scalars(q_scale),
                [s for block in k_scale for s in _scalars(block)],
                [p.registers.flat[0] for p in position] or None,
            )
            p = _opaque(p)
            return (
                _pack(p, self.p_type.shape, plgpu.Layout.WGMMA_8BIT, jnp.float8_e4m3fn),
                _pack(new_m, (ROWS,), _ROW, jnp.float32),
                _pack(alpha, (ROWS,), _ROW, jnp.float32),
            )

        return run(scores, m, q_scale, tuple(k_scale), position)

    def issue_values(self, p, v_ref):
        refs = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType(_transforms(self.v_swizzle)))

        @plgpu.inline_mgpu(arg_types=refs, return_type=self.tile_type)
        def run(ctx, p, v):
            del ctx
            words = _scalars(p, ir.IntegerType.get_signless(32))
            a = [words[4 * i : 4 * i + 4] for i in range(len(words) // 4)]
            b = _descriptors(v, self.v_swizzle)
            regs = _wgmma(self.head_dim + 8, a, b, ir.F32Type.get(), "f32.e4m3.e4m3")
            return _pack(regs, self.tile_type.shape, _ACC, jnp.float32)

        return run(p, v_ref)

    def wait_values(self, tile, p, in_flight: int = 0):
        @plgpu.inline_mgpu(arg_types=(_ACC, plgpu.Layout.WGMMA_8BIT), return_type=self.tile_type)
        def run(ctx, tile, p):
            del ctx
            keep = _scalars(p, ir.IntegerType.get_signless(32))
            return _pack(_wait(in_flight, _scalars(tile), keep), self.tile_type.shape, _ACC, jnp.float32)

        return run(tile, p)

    def add_tile(self, out, total, tile, alpha):
        """``out = alpha * out + tile`` for the values and, from the columns of ones, the row sums."""

        @plgpu.inline_mgpu(
            arg_types=(_ACC, _ROW, _ACC, _ROW), return_type=(self.out_type, self.row_type)
        )
        def run(ctx, out, total, tile, alpha):
            del ctx
            old, new, factor = _scalars(out), _scalars(tile), _scalars(alpha)
            values = [_fma(o, factor[(i // 2) % 2], new[i]) if "add" not in self.config.ablate or i < 4 else o for i, o in enumerate(old)]
            sums = [_fma(t, factor[h], new[len(old) + 2 * h]) for h, t in enumerate(_scalars(total))]
            return (
                _pack(values, self.out_type.shape, _ACC, jnp.float32),
                _pack(sums, (ROWS,), _ROW, jnp.float32),
            )

        return run(out, total, tile, alpha)

    def start(self):
        """Zero output, zero row sum, lowest maximum."""

        @plgpu.inline_mgpu(return_type=(self.out_type, self.row_type, self.row_type))
        def run(ctx):
            del ctx
            zeros = [_f32(0.0)] * (self.head_dim // 2)
            return (
                _pack(zeros, self.out_type.shape, _ACC, jnp.float32),
                _pack([_f32(0.0)] * 2, (ROWS,), _ROW, jnp.float32),
                _pack([_f32(NO_MAX)] * 2, (ROWS,), _ROW, jnp.float32),
            )

        return run()

    def finish(self, out, total, m, v_scale):
        """Output ``out / total * v_scale`` and natural log-sum-exp; empty rows give 0 and -inf."""
        wgmma_type = _shape((ROWS, self.head_dim), jnp.float32, plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(
            arg_types=(_ACC, _ROW, _ROW, _COL), return_type=(wgmma_type, self.row_type)
        )
        def run(ctx, out, total, m, v_scale):
            del ctx
            factor, lse = [], []
            for t, mm in zip(_scalars(total), _scalars(m), strict=True):
                empty = arith.cmpf(arith.CmpFPredicate.OEQ, t, _f32(0.0))
                inverse = arith.divf(_f32(1.0), t)
                factor.append(arith.select(empty, _f32(0.0), inverse))
                log = _asm("lg2.approx.f32 $0, $1;", [ir.F32Type.get()], [t], effects=False)[0]
                value = arith.addf(mm, arith.subf(log, _f32(LOG2_P_MAX)))
                value = arith.mulf(value, _f32(math.log(2.0)))
                lse.append(arith.select(empty, _f32(-math.inf), value))
            channel = _scalars(v_scale)
            values = []
            for i, o in enumerate(_scalars(out)):
                j, h, c = i // 4, (i // 2) % 2, i % 2
                values.append(arith.mulf(arith.mulf(o, factor[h]), channel[2 * j + c]))
            return (
                _pack(values, wgmma_type.shape, plgpu.Layout.WGMMA, jnp.float32),
                _pack(lse, (ROWS,), _ROW, jnp.float32),
            )

        return run(out, total, m, v_scale)

    def write_ones(self, v_ref):
        """Fills the eight rows of ones below V^T in one stage. All bytes are equal: swizzle is moot."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_transforms(self.v_swizzle)),))
        def run(ctx, v):
            del ctx
            i64 = ir.IntegerType.get_signless(64)
            size = 8 * self.config.block_kv
            address = llvm.ptrtoint(i64, utils.memref_ptr(v))
            tid = arith.extui(i64, arith.remui(utils.thread_idx(), _i32(128)))
            for start in range(0, size, 128 * 4):
                offset = arith.addi(arith.muli(tid, arith.constant(i64, 4)), arith.constant(i64, self.head_dim * self.config.block_kv + start))
                where = llvm.add(address, offset, overflow_flags=llvm.IntegerOverflowFlags.none)
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"), [where, _i32(0x38383838)], "st.shared.b32 [$0], $1;", "l,r",
                    has_side_effects=True, asm_dialect=0,
                )

        run(v_ref)


def _kernel(config: Config, shapes, mask: _Mask, scale, ragged, has_lengths, out_dtype, with_lse):
    """Builds the kernel body; see `attention_forward` for the operands."""
    batch, t_len, num_heads, head_dim, s_len, num_kv_heads, scale_block = shapes
    kv, stages = config.block_kv, config.num_stages
    scale_blocks = kv // scale_block
    q_tiles = pl.cdiv(t_len, config.block_q)
    total = batch * num_heads * q_tiles
    group = math.gcd(config.head_group, batch * num_heads)
    num_blocks = min(config.num_sms, total) if config.persistent else total
    blocks = _Blocks(config, head_dim, mask, scale_blocks)
    masked = ragged or has_lengths or mask.left is not None or mask.right is not None
    i32 = jnp.int32

    def tile_of(index):
        """Query tile, batch and head of a linear index: groups of heads, longest tiles first."""
        outer, inner = lax.div(index, i32(q_tiles * group)), lax.rem(index, i32(q_tiles * group))
        q_tile = i32(q_tiles - 1) - lax.div(inner, i32(group))
        if mask.right is None:  # All tiles cost the same: neighbours share K and V.
            q_tile = lax.rem(inner, i32(q_tiles))
            head = outer * group + lax.div(inner, i32(q_tiles))
        else:
            head = outer * group + lax.rem(inner, i32(group))
        return q_tile, lax.div(head, i32(num_heads)), lax.rem(head, i32(num_heads))

    def kv_tiles(q_tile, kv_len):
        """First tile, end of the tiles free of a right mask, end; start of those free of a left one."""
        q_first = q_tile * config.block_q
        q_last = q_first + (config.block_q - 1)
        low, high = i32(0), kv_len
        full_high = kv_len
        full_low = i32(0)
        if mask.right is not None:
            high = jnp.minimum(high, q_last + (mask.offset + mask.right + 1))
            full_high = jnp.minimum(full_high, q_first + (mask.offset + mask.right + 1))
        if mask.left is not None:
            low = jnp.maximum(low, q_first + (mask.offset - mask.left))
            full_low = jnp.maximum(full_low, q_last + (mask.offset - mask.left))
        lo = lax.div(low, i32(kv))
        hi = jnp.maximum(lax.div(jnp.maximum(high, 0) + (kv - 1), i32(kv)), lo + 1)
        lo = jnp.minimum(lo, i32(pl.cdiv(s_len, kv) - 1))
        hi = jnp.maximum(jnp.minimum(hi, i32(pl.cdiv(s_len, kv))), lo + 1)
        mid_hi = jnp.clip(lax.div(jnp.maximum(full_high, 0), i32(kv)), lo, hi)
        mid_lo = jnp.clip(lax.div(full_low + (kv - 1), i32(kv)), lo, mid_hi)
        return lo, mid_lo, mid_hi, hi

    def body(refs, scratch):
        q_ref, k_ref, v_ref, qs_ref, ks_ref, vs_ref, order_ref, len_ref, out_ref, lse_ref = refs
        (q_smem, k_smem, v_smem, o_smem, lse_smem), (q_ready, k_ready, v_ready), (
            q_free,
            k_free,
            v_free,
        ), turn = scratch
        block, wg = lax.axis_index("block"), lax.axis_index("wg")

        def lengths(b):
            if not has_lengths:
                return i32(t_len), i32(s_len)
            return len_ref[b, 0], len_ref[b, 1]

        def for_each_tile(run):
            """Runs ``run(index, step) -> step`` over this block's tiles; odd rounds go backwards."""
            if not config.persistent:
                run(block, i32(0))
                return

            def one(round_, step):
                return run(order_ref[block, round_ + 1], step)

            lax.fori_loop(i32(0), order_ref[block, 0], one, i32(0))

        def slot_of(step):
            return lax.rem(step, i32(stages))

        @pl.when(wg == config.num_compute)
        def _memory():
            plgpu.set_max_registers(config.memory_registers, action="decrease")

            def one_tile(index, step):
                q_tile, b, n = tile_of(index)
                kv_head = lax.div(n, i32(num_heads // num_kv_heads))
                lo, _, _, hi = kv_tiles(q_tile, lengths(b)[1])
                for w in range(config.num_compute):
                    rows = pl.ds(q_tile * config.block_q + w * ROWS, ROWS)
                    plgpu.barrier_wait(q_free.at[w])
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[w], q_ready.at[w])

                def load(i, step):
                    tile, slot = hi - 1 - i, slot_of(step)
                    cols = pl.ds(tile * kv, kv)
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.copy_gmem_to_smem(k_ref.at[b, cols, kv_head], k_smem.at[slot], k_ready.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])
                    plgpu.copy_gmem_to_smem(
                        v_ref.at[b, kv_head, :, cols],
                        v_smem.at[slot, pl.ds(0, head_dim)],
                        v_ready.at[slot],
                    )
                    return step + 1

                return lax.fori_loop(i32(0), hi - lo, load, step)

            for_each_tile(one_tile)

        @pl.when(wg < config.num_compute)
        def _compute():
            plgpu.set_max_registers(config.registers, action="increase")
            for slot in range(stages):
                blocks.write_ones(v_smem.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
            plgpu.barrier_arrive(q_free.at[wg])
            plgpu.commit_smem()

            def meet():
                if config.schedule == "pair":
                    plgpu.barrier_arrive(turn.at[0])
                    plgpu.barrier_wait(turn.at[0])

            def take_turn():
                if config.schedule in ("turn", "hold"):
                    plgpu.barrier_wait(turn.at[wg])

            def pass_turn():
                if config.schedule in ("turn", "hold"):
                    plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, i32(config.num_compute))])

            if config.schedule == "pair":
                pl.when(wg == 1)(meet)
            if config.schedule in ("turn", "hold"):
                pl.when(wg == config.num_compute - 1)(pass_turn)

            def one_tile(index, step0):
                q_tile, b, n = tile_of(index)
                kv_head = lax.div(n, i32(num_heads // num_kv_heads))
                q_len, kv_len = lengths(b)
                lo, mid_lo, mid_hi, hi = kv_tiles(q_tile, kv_len)
                q_start = q_tile * config.block_q + wg * ROWS
                q_scale = plgpu.load(
                    qs_ref.at[b, n, pl.ds(q_start, ROWS)], layout=_ROW, optimized=False
                ) * jnp.float32(scale * LOG2E)

                def load_k_scale(tile):
                    first = tile * scale_blocks
                    return [
                        plgpu.load(ks_ref.at[b, kv_head, first + i], layout=_COL, optimized=False)
                        for i in range(scale_blocks)
                    ]

                def tile_at(step):
                    return hi - 1 - (step - step0)

                def position(tile, is_masked):
                    return (q_start, tile * kv, q_len, kv_len) if is_masked else None

                def release_q(step):
                    """After the tile's last scores Q may be overwritten by the next tile's."""
                    pl.when(step == step0 + (hi - lo - 1))(lambda: plgpu.barrier_arrive(q_free.at[wg]))

                def simple_step(step, carry, is_masked):
                    out, total_, m = carry
                    slot, tile = slot_of(step), tile_at(step)
                    k_scale = load_k_scale(tile)
                    plgpu.barrier_wait(k_ready.at[slot])
                    with jax.named_scope("scores"):
                        scores = blocks.issue_scores(q_smem.at[wg], k_smem.at[slot])
                        meet()
                        if config.schedule == "turn":
                            pass_turn()
                        scores = blocks.wait_scores(scores, 0)
                        if config.schedule == "hold":
                            pass_turn()
                    plgpu.barrier_arrive(k_free.at[slot])
                    release_q(step)
                    with jax.named_scope("softmax"):
                        p, m, alpha = blocks.softmax(scores, m, q_scale, k_scale, position(tile, is_masked))
                    if config.schedule == "pair":
                        plgpu.barrier_arrive(turn.at[0])
                    plgpu.barrier_wait(v_ready.at[slot])
                    if config.schedule == "pair":
                        plgpu.barrier_wait(turn.at[0])
                    take_turn()
                    with jax.named_scope("values"):
                        new = blocks.issue_values(p, v_smem.at[slot])
                        new = blocks.wait_values(new, p)
                    plgpu.barrier_arrive(v_free.at[slot])
                    out, total_ = blocks.add_tile(out, total_, new, alpha)
                    return out, total_, m

                def ahead_step(step, carry, is_masked):
                    # Scores of this tile and values of the last one are in flight together; the
                    # softmax of this tile hides the latter.
                    out, total_, m, p, alpha = carry
                    slot, last, tile = slot_of(step), slot_of(step - 1), tile_at(step)
                    k_scale = load_k_scale(tile)
                    plgpu.barrier_wait(k_ready.at[slot])
                    plgpu.barrier_wait(v_ready.at[last])
                    take_turn()
                    scores = blocks.issue_scores(q_smem.at[wg], k_smem.at[slot])
                    new = blocks.issue_values(p, v_smem.at[last])
                    pass_turn()
                    scores = blocks.wait_scores(scores, 1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    release_q(step)
                    p_new, m, alpha_new = blocks.softmax(scores, m, q_scale, k_scale, position(tile, is_masked))
                    new = blocks.wait_values(new, p)
                    plgpu.barrier_arrive(v_free.at[last])
                    out, total_ = blocks.add_tile(out, total_, new, alpha)
                    return out, total_, m, p_new, alpha_new

                def fused_step(step, carry, is_masked):
                    # Values of the last tile and scores of this one reach the tensor core back to back.
                    out, total_, m, p, alpha = carry
                    slot, last, tile = slot_of(step), slot_of(step - 1), tile_at(step)
                    k_scale = load_k_scale(tile)
                    plgpu.barrier_wait(v_ready.at[last])
                    plgpu.barrier_wait(k_ready.at[slot])
                    take_turn()
                    new = blocks.issue_values(p, v_smem.at[last])
                    scores = blocks.issue_scores(q_smem.at[wg], k_smem.at[slot])
                    if config.schedule == "turn":
                        pass_turn()
                    new = blocks.wait_values(new, p, 1)
                    plgpu.barrier_arrive(v_free.at[last])
                    out, total_ = blocks.add_tile(out, total_, new, alpha)
                    scores = blocks.wait_scores(scores, 0)
                    if config.schedule == "hold":
                        pass_turn()
                    plgpu.barrier_arrive(k_free.at[slot])
                    release_q(step)
                    p, m, alpha = blocks.softmax(scores, m, q_scale, k_scale, position(tile, is_masked))
                    return out, total_, m, p, alpha

                plgpu.barrier_wait(q_ready.at[wg])
                carry = blocks.start()
                first = step0
                if config.order != "simple":
                    out, total_, m = carry
                    slot, tile = slot_of(first), tile_at(first)
                    k_scale = load_k_scale(tile)
                    plgpu.barrier_wait(k_ready.at[slot])
                    take_turn()
                    scores = blocks.issue_scores(q_smem.at[wg], k_smem.at[slot])
                    pass_turn()
                    scores = blocks.wait_scores(scores, 0)
                    plgpu.barrier_arrive(k_free.at[slot])
                    release_q(first)
                    p, m, alpha = blocks.softmax(scores, m, q_scale, k_scale, position(tile, masked))
                    carry = out, total_, m, p, alpha
                    first = first + 1
                else:
                    take_turn()
                step_fn = {"simple": simple_step, "fused": fused_step, "ahead": ahead_step}[config.order]

                def run(begin, end, carry, is_masked):
                    return lax.fori_loop(
                        begin, end, functools.partial(step_fn, is_masked=is_masked), carry
                    )

                end = step0 + (hi - lo)
                if masked:
                    right_end = jnp.maximum(step0 + (hi - mid_hi), first)
                    carry = run(first, right_end, carry, True)
                    if mask.left is not None:
                        left_start = jnp.maximum(step0 + (hi - mid_lo), right_end)
                        carry = run(right_end, left_start, carry, False)
                        carry = run(left_start, end, carry, True)
                    else:
                        carry = run(right_end, jnp.maximum(end, right_end), carry, False)
                else:
                    carry = run(first, end, carry, False)
                if config.order != "simple":
                    out, total_, m, p, alpha = carry
                    last = slot_of(end - 1)
                    plgpu.barrier_wait(v_ready.at[last])
                    take_turn()
                    new = blocks.issue_values(p, v_smem.at[last])
                    pass_turn()
                    new = blocks.wait_values(new, p)
                    plgpu.barrier_arrive(v_free.at[last])
                    out, total_ = blocks.add_tile(out, total_, new, alpha)
                else:
                    pass_turn()
                    out, total_, m = carry
                with jax.named_scope("epilogue"):
                    v_scale = plgpu.load(vs_ref.at[b, kv_head], layout=_COL, optimized=False)
                    out, lse = blocks.finish(out, total_, m, v_scale)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_smem.at[wg][...] = out.astype(out_dtype)
                    if with_lse:
                        lse_smem.at[wg][...] = lse
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[b, pl.ds(q_start, ROWS), n])
                    if with_lse:
                        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, pl.ds(q_start, ROWS)])
                return end

            for_each_tile(one_tile)
            if config.schedule == "pair":
                pl.when(wg == 0)(meet)
            plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        if not has_lengths:
            refs = (*refs[:7], None, *refs[7:])
        if not with_lse:
            refs = (*refs, None)
        compute = config.num_compute
        out_swizzle = 128
        out_transforms = (
            plgpu.TilingTransform((8, out_swizzle // jnp.dtype(out_dtype).itemsize)),
            plgpu.SwizzleTransform(out_swizzle),
        )
        smem = plgpu.SMEM
        arrays = [
            smem((compute, ROWS, head_dim), jnp.int8, transforms=_transforms(blocks.k_swizzle)),
            smem((stages, kv, head_dim), jnp.int8, transforms=_transforms(blocks.k_swizzle)),
            smem((stages, head_dim + 8, kv), jnp.float8_e4m3fn, transforms=_transforms(blocks.v_swizzle)),
            smem((compute, ROWS, head_dim), out_dtype, transforms=() if t_len % 8 else out_transforms),
            smem((compute, ROWS), jnp.float32) if with_lse else None,
        ]
        ready = (
            plgpu.Barrier(num_barriers=compute),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        )
        free = (
            plgpu.Barrier(num_barriers=compute),
            plgpu.Barrier(num_arrivals=compute, num_barriers=stages),
            plgpu.Barrier(num_arrivals=compute, num_barriers=stages),
        )
        arrivals = compute if config.schedule == "pair" else 1
        turn = plgpu.Barrier(num_arrivals=arrivals, num_barriers=compute)
        pl.run_scoped(
            lambda *scratch: body(refs, scratch), arrays, ready, free, turn, collective_axes="wg"
        )

    return entry, num_blocks, _order(config, mask, num_blocks, batch * num_heads, q_tiles, group, s_len)


@functools.lru_cache
def _order(config, mask, num_blocks, heads, q_tiles, group, s_len) -> np.ndarray:
    """Which tiles each block walks over: row i is [count, tile, tile, ...].

    Tiles go, in the kernel's order (longest first within a group of heads), to the block that would
    be free first, as a dynamic scheduler would hand them out.
    """
    total = heads * q_tiles
    lists = [[] for _ in range(num_blocks)]
    free = [(0.0, i) for i in range(num_blocks)]
    for index in range(total):
        cost = 1.0
        if mask.right is not None:
            q_tile = q_tiles - 1 - (index % (q_tiles * group)) // group
            last = (q_tile + 1) * config.block_q + mask.offset + mask.right
            first = 0 if mask.left is None else q_tile * config.block_q + mask.offset - mask.left
            steps = math.ceil(min(max(last, 1), s_len) / config.block_kv) - max(first, 0) // config.block_kv
            cost = max(steps, 1) + 0.7
        when, block = heapq.heappop(free)
        lists[block].append(index)
        heapq.heappush(free, (when + cost, block))
    table = np.zeros((num_blocks, 1 + max(map(len, lists))), np.int32)
    for i, tiles in enumerate(lists):
        table[i, 0] = len(tiles)
        table[i, 1 : 1 + len(tiles)] = tiles
    return table


def attention_forward(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    *,
    scale,
    left=None,
    right=None,
    offset=0,
    lengths=None,
    seq_lens=None,
    out_dtype=jnp.bfloat16,
    with_lse=False,
    config: Config = Config(),
):
    batch, t_len, num_heads, head_dim = q.shape
    s_len, num_kv_heads = k.shape[1], k.shape[2]
    if seq_lens is not None:
        t_len, s_len = seq_lens
    scale_block = config.block_kv * pl.cdiv(s_len, config.block_kv) // k_scale.shape[2]
    mask = _Mask(left, right, offset)
    ragged = s_len % config.block_kv != 0
    shapes = (batch, t_len, num_heads, head_dim, s_len, num_kv_heads, scale_block)
    entry, num_blocks, order = _kernel(
        config, shapes, mask, scale, ragged, lengths is not None, out_dtype, with_lse
    )
    out_type = [jax.ShapeDtypeStruct((batch, t_len, num_heads, head_dim), out_dtype)]
    if with_lse:
        padded = pl.cdiv(t_len, 4) * 4
        out_type.append(jax.ShapeDtypeStruct((batch, num_heads, padded), jnp.float32))
    args = [q, k, v, q_scale, k_scale, v_scale, jnp.asarray(order)] + ([] if lengths is None else [lengths])
    result = plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=config.num_compute + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )(*args)
    out = result[0]
    return (out, result[1][:, :, :t_len]) if with_lse else out
