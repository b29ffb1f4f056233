# SPDX-License-Identifier: Apache-2.0
"""Quantised attention for Hopper: INT8 scores, FP8 probabilities, float32 sums.

One kernel computes ``softmax(scale * Q K^T) V`` from INT8 ``Q`` and ``K`` and FP8 ``V``. Two
*compute* warpgroups own 64 query rows each; a *memory* warpgroup feeds them K and V tiles through a
ring in shared memory. For each tile of keys a compute warpgroup

1. multiplies INT8 rows into an s32 tile (exact),
2. turns it into ``P = e4m3(448 * exp2(x - m))``, which stays in registers,
3. multiplies ``P`` with ``[V^T; 1]`` into a *fresh* float32 tile; its last eight columns are sums,
4. adds that tile to the float32 output: ``out = alpha * out + tile``.

Step 3 starts from zero every time because the FP8 accumulator of the tensor core keeps only about
14 bits: a running sum drifts by 18 % once the values have a mean ("two-level accumulation").

Where the speed comes from:

* Tensor-core tiles start from zero by the scale-d predicate of ``wgmma``, not by writing zeros, so
  two-level accumulation costs no more instructions than one running accumulator.
* The row maximum is taken on the raw integers: a three-input maximum serves two scores. Conversion
  to float, scaling, exp2 and conversion to e4m3 are PTX for four scores at a time.
* Row sums come out of the tensor core; the factor 448 sits in the exponent.
* A token lets one warpgroup multiply (values of one tile, scores of the next) while the other
  computes its softmax.
* A persistent grid hides one query tile's epilogue and the next one's first loads. A table made at
  trace time hands out tiles, longest first under a causal mask, as a dynamic scheduler would.

Measured and left out, since they did not help on an H200: starting the next tile's scores before
this tile's values are summed (ptxas inserts a full wait), 128 keys per tile with two or three
compute warpgroups, a cubic polynomial for part of the exp2, exp2 in half precision, integer
addition in place of the conversion to float, and cutting the softmax into slices that mix exp2
with conversions.

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

from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention import xla
from pallas_kernels.ops.attention.reference import clean
from pallas_kernels.ops.attention.spec import AttentionSpec
from pallas_kernels.ops.quantize.mosaic_sm90 import AttentionOperands, quantize_qkv

LOG2E = math.log2(math.e)
# P is stored as e4m3, whose largest value is 448. The factor cancels in O / l.
LOG2_P_MAX = math.log2(448.0)
# Start of the running maximum. Finite: a row with nothing to attend must not form inf - inf.
NO_MAX = -1e30
ROWS = 64  # query rows of one warpgroup: the M of wgmma
INT_MIN = -(2**31)
V_SWIZZLE = 128  # bytes
TILE_OVERHEAD = 0.7  # start and end of a query tile, in K/V tiles
SMEM_LIMIT = 232_448 - 2048  # bytes a block may use, less barriers and alignment
REGISTERS = 65536  # per multiprocessor

_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COL = plgpu.Layout.WGMMA.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles and schedule of the kernel.

    Args:
        num_compute: compute warpgroups per block, each with 64 query rows.
        block_kv: keys per tile: 128 or 256.
        num_stages: K/V tiles held in shared memory.
        qk_split: products that make up one tile of scores; 2 takes the maxima of the first half
            while the second is multiplied.
        schedule: "hold" passes a token so that one warpgroup at a time uses the tensor core,
            "none" leaves it to chance.
        persistent: one block per multiprocessor walks over many query tiles.
        head_group: heads whose query tiles are interleaved; their K and V should fit the L2 cache.
        registers: registers per thread of a compute warpgroup.
        memory_registers: registers per thread of the memory warpgroup.
        num_sms: blocks of a persistent grid.

    Raises:
        ValueError: sizes that the instruction or the register file cannot take.

    >>> Config().block_q
    128
    """

    num_compute: int = 2
    block_kv: int = 256
    num_stages: int = 2
    qk_split: int = 2
    schedule: str = "hold"
    persistent: bool = True
    head_group: int = 8
    registers: int = 232
    memory_registers: int = 40
    num_sms: int = 132

    def __post_init__(self):
        if self.block_kv not in (128, 256):
            raise ValueError(f"block_kv must be 128 or 256 keys; got {self.block_kv}")
        if self.qk_split not in (1, 2):
            raise ValueError(f"qk_split must be 1 or 2; got {self.qk_split}")
        if self.schedule not in ("hold", "none"):
            raise ValueError(f"schedule must be 'hold' or 'none'; got {self.schedule!r}")
        if self.num_stages < 2:
            raise ValueError(f"num_stages must be at least 2; got {self.num_stages}")
        for name in ("registers", "memory_registers"):
            count = getattr(self, name)
            if count % 8 or not 24 <= count <= 240:
                raise ValueError(f"{name} must be a multiple of 8 from 24 to 240; got {count}")
        used = 128 * (self.num_compute * self.registers + self.memory_registers)
        if used > REGISTERS:
            # The hardware does not fail here: the last warpgroup waits for registers for ever.
            raise ValueError(
                f"{self.num_compute} x {self.registers} + {self.memory_registers} registers for "
                f"128 threads each are {used}; one multiprocessor has {REGISTERS}"
            )

    @property
    def block_q(self) -> int:
        """Query rows per block."""
        return self.num_compute * ROWS

    def smem_bytes(self, head_dim: int, out_bytes: int = 2) -> int:
        """Shared memory of one block.

        Args:
            head_dim: H.
            out_bytes: bytes per element of the output.

        Returns:
            Bytes, barriers not counted.

        >>> Config().smem_bytes(128)
        184832
        """
        stage = self.block_kv * (2 * head_dim + 8)
        rows = self.block_q * (head_dim * (1 + out_bytes) + 4)
        return self.num_stages * stage + rows


# -- Register-level building blocks ---------------------------------------------------------------
# A wgmma accumulator tile [64, n] gives each thread, for every 8 columns j, four values in this
# order: (row g, col 2t), (row g, col 2t+1), (row g+8, col 2t), (row g+8, col 2t+1) with
# g = lane // 4 and t = lane % 4. Register 4*j + 2*h + c therefore belongs to row half h and column
# parity c.


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
        result_type,
        [*tied, *ins],
        text,
        ",".join(constraints),
        has_side_effects=effects,
        asm_dialect=0,
    )
    if len(out_types) == 1:
        return [result]
    return [llvm.extractvalue(t, result, [i]) for i, t in enumerate(out_types)]


def _descriptors(ref: ir.Value, swizzle: int, first_row: int = 0) -> list[ir.Value]:
    """wgmma descriptors, one per 32 columns, of a K-major 8-bit operand [rows, k].

    The operand is tiled (rows/8, k/swizzle, 8, swizzle) in shared memory.
    """
    k_tiles = ir.MemRefType(ref.type).shape[1]
    atom = 8 * swizzle
    base = mma_utils.encode_descriptor(
        ref, leading_byte_offset=0, stride_byte_offset=k_tiles * atom, swizzle=swizzle
    )
    i64 = ir.IntegerType.get_signless(64)
    start = first_row // 8 * k_tiles * atom
    offsets = [start + a * atom + 32 * i for a in range(k_tiles) for i in range(swizzle // 32)]
    return [
        llvm.add(base, arith.constant(i64, off >> 4), overflow_flags=llvm.IntegerOverflowFlags.none)
        for off in offsets
    ]


def _wgmma(n, a, b, acc_type: ir.Type, kind: str) -> list[ir.Value]:
    """Issues ``fresh tile [64, n] = A @ B`` as one group of wgmma and commits it.

    ``a`` is a list over steps of one descriptor or of four registers, ``b`` a list of descriptors.
    The first step ignores the accumulator's old contents: no instruction is spent on clearing it.
    """
    count = n // 2
    number = count
    operands, lines = [], []
    for step, (a_step, b_step) in enumerate(zip(a, b, strict=True)):
        a_step = a_step if isinstance(a_step, list) else [a_step]
        names = [f"${number + i}" for i in range(len(a_step) + 1)]
        number += len(names)
        operands += [*a_step, b_step]
        a_text = names[0] if len(a_step) == 1 else "{" + ",".join(names[:-1]) + "}"
        acc = "{" + ",".join(f"${i}" for i in range(count)) + "}"
        flags = "" if kind.startswith("s32") else ", 1, 1"
        predicate = "later" if step else "first"
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k32.{kind} "
            f"{acc}, {a_text}, {names[-1]}, {predicate}{flags};"
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


def _probabilities(words, scales, offset, *, floats=False) -> ir.Value:
    """Four neighbouring P in one register: ``e4m3(exp2(score * scale + offset))``.

    Args:
        words: four s32 scores, or float32 ones where a mask was applied (``floats``).
        scales: float32 scale of even and of odd columns.
        offset: float32, ``log2(448) - m``.
        floats: ``words`` are float32.
    """
    lines = ["{ .reg .f32 x<4>; .reg .b16 lo, hi;"]
    for i in range(4):
        lines.append(f"mov.b32 x{i}, ${1 + i};" if floats else f"cvt.rn.f32.s32 x{i}, ${1 + i};")
        lines.append(f"fma.rn.f32 x{i}, x{i}, ${5 + i % 2}, $7;")
    lines += [f"ex2.approx.ftz.f32 x{i}, x{i};" for i in range(4)]
    lines += [
        "cvt.rn.satfinite.e4m3x2.f32 lo, x1, x0;",
        "cvt.rn.satfinite.e4m3x2.f32 hi, x3, x2;",
        "mov.b32 $0, {lo, hi}; }",
    ]
    i32 = ir.IntegerType.get_signless(32)
    return _asm("\n".join(lines), [i32], [*words, *scales, offset], effects=False)[0]


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
    """Bounds on ``key - query``, as in `pallas_kernels.masks.Mask`; None is no bound."""

    min_diff: int | None
    max_diff: int | None

    def columns(self, q_start, col_start, q_len, kv_len):
        """First allowed and first forbidden column of a thread's rows, from its own column on."""
        row0, col0 = _thread_row_col()
        base = arith.addi(col_start, col0)
        out = []
        for half in range(2):
            row = arith.addi(arith.addi(q_start, row0), _i32(8 * half))
            last = kv_len
            if self.max_diff is not None:
                last = arith.minsi(last, arith.addi(row, _i32(self.max_diff + 1)))
            inside = arith.cmpi(arith.CmpIPredicate.slt, row, q_len)
            last = arith.select(inside, last, _i32(0))
            first = None
            if self.min_diff is not None:
                first = arith.subi(arith.addi(row, _i32(self.min_diff)), base)
            out.append((first, arith.subi(last, base)))
        return out

    def allowed(self, tiles, position):
        """i1 values [row half][column parity][8-column group]."""
        out = []
        for first, last in self.columns(*position):
            rows = []
            for c in range(2):
                row = []
                for j in range(tiles):
                    column = _i32(8 * j + c)
                    ok = arith.cmpi(arith.CmpIPredicate.slt, column, last)
                    if first is not None:
                        late = arith.cmpi(arith.CmpIPredicate.sge, column, first)
                        ok = arith.andi(ok, late)
                    row.append(ok)
                rows.append(row)
            out.append(rows)
        return out


def _softmax_step(block_kv, mask, scores, m, q_scale, k_scale, position=None, tops=()):
    """One tile of online softmax on this thread's registers.

    Args:
        block_kv: keys per tile.
        mask: used where ``position`` is given.
        scores: s32 registers of the tile.
        m: running maximum in units of log2, per row half.
        q_scale: scale of the two rows, with ``scale * log2(e)`` folded in.
        k_scale: scales of even and odd columns, for each scale block of the tile.
        position: i32 (first row, first column, query length, key length), or None without a mask.
        tops: maxima over the first half of the tile, if already taken.

    Returns:
        Registers of P as an operand, new maxima, factors that bring old sums to them.
    """
    tiles = block_kv // 8
    blocks = len(k_scale) // 2
    per_block = tiles // blocks
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    words = [
        [[scores[4 * j + 2 * h + c] for j in range(tiles)] for c in range(2)] for h in range(2)
    ]
    scale = [
        [[arith.mulf(q_scale[h], k_scale[2 * b + c]) for c in range(2)] for b in range(blocks)]
        for h in range(2)
    ]
    ok = None if position is None else mask.allowed(tiles, position)
    new_m, alpha, packed = [], [], [[None] * (tiles // 2) for _ in range(2)]
    for h in range(2):
        best = None
        for b in range(blocks):
            for c in range(2):
                span = range(b * per_block, (b + 1) * per_block)
                if ok is not None:
                    masked = [
                        arith.select(ok[h][c][j], words[h][c][j], _i32(INT_MIN)) for j in span
                    ]
                    top = _int_max(masked)
                elif tops and blocks == 1:
                    top = arith.maxsi(tops[2 * h + c], _int_max(words[h][c][tiles // 2 :]))
                else:
                    top = _int_max([words[h][c][j] for j in span])
                value = arith.mulf(arith.sitofp(f32, top), scale[h][b][c])
                if ok is not None:
                    # A tile without one allowed key must not move the maximum.
                    empty = arith.cmpi(arith.CmpIPredicate.eq, top, _i32(INT_MIN))
                    value = arith.select(empty, _f32(NO_MAX), value)
                best = value if best is None else arith.maximumf(best, value)
        new_m.append(arith.maximumf(m[h], _quad_max(best)))
        alpha.append(_exp2(arith.subf(m[h], new_m[h])))
    for h in range(2):
        offset = arith.subf(_f32(LOG2_P_MAX), new_m[h])
        for jj in range(tiles // 2):
            places = [(i % 2, 2 * jj + i // 2) for i in range(4)]
            four = [words[h][c][j] for c, j in places]
            if ok is not None:
                # -inf after conversion gives exact zeros whatever the scale.
                four = [arith.sitofp(f32, w) for w in four]
                four = [
                    llvm.bitcast(i32, arith.select(ok[h][c][j], w, _f32(-math.inf)))
                    for w, (c, j) in zip(four, places, strict=True)
                ]
            block = 2 * jj // per_block
            packed[h][jj] = _probabilities(four, scale[h][block], offset, floats=ok is not None)
    # Operand order of an 8-bit A: per 16 columns, row half 0 then row half 1.
    p = [packed[h][jj] for jj in range(tiles // 2) for h in range(2)]
    return p, new_m, alpha


# -- The same blocks as Pallas functions ----------------------------------------------------------


def _shape(shape, dtype, layout):
    return plgpu.ShapeDtypeStruct(tuple(shape), dtype, layout=layout)


def _transforms(swizzle):
    return (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))


class _Steps:
    """The kernel's steps, bound to one configuration and head size."""

    def __init__(self, config: Config, head_dim: int, mask: _Mask, scale_blocks: int):
        self.config, self.head_dim, self.mask, self.scale_blocks = (
            config,
            head_dim,
            mask,
            scale_blocks,
        )
        self.k_swizzle = min(128, head_dim)
        kv = config.block_kv
        self.scores_type = _shape((ROWS, kv // config.qk_split), jnp.int32, _ACC)
        self.tops_type = _shape((ROWS, 8), jnp.int32, _ACC)
        self.p_type = _shape((ROWS, kv), jnp.float8_e4m3fn, plgpu.Layout.WGMMA_8BIT)
        self.row_type = _shape((ROWS,), jnp.float32, _ROW)
        self.tile_type = _shape((ROWS, head_dim + 8), jnp.float32, _ACC)
        self.out_type = _shape((ROWS, head_dim), jnp.float32, _ACC)

    def issue_scores(self, q_ref, k_ref):
        """Starts Q K^T; with ``qk_split`` 2 as two products of half the keys each."""
        refs = (plgpu.RefType(_transforms(self.k_swizzle)),) * 2
        width = self.config.block_kv // self.config.qk_split

        @plgpu.inline_mgpu(arg_types=refs, return_type=(self.scores_type,) * self.config.qk_split)
        def run(ctx, q, k):
            del ctx
            i32 = ir.IntegerType.get_signless(32)
            out = []
            for part in range(self.config.qk_split):
                a = _descriptors(q, self.k_swizzle)
                b = _descriptors(k, self.k_swizzle, first_row=part * width)
                regs = _wgmma(width, a, b, i32, "s32.s8.s8")
                out.append(_pack(regs, self.scores_type.shape, _ACC, jnp.int32, is_signed=True))
            return tuple(out)

        return run(q_ref, k_ref)

    def wait_scores(self, scores):
        """Waits for Q K^T. The first half's maxima are taken while the second is multiplied."""
        split = self.config.qk_split
        types = (self.scores_type,) * split + (self.tops_type,) * (split - 1)

        @plgpu.inline_mgpu(arg_types=((_ACC,) * split,), return_type=types)
        def run(ctx, scores):
            del ctx
            halves, tops = [], []
            for part, half in enumerate(scores):
                left = split - 1 - part
                regs = _wait(left, _scalars(half))
                halves.append(_pack(regs, self.scores_type.shape, _ACC, jnp.int32, is_signed=True))
                if left:
                    best = [_int_max(regs[2 * h + c :: 4]) for h in range(2) for c in range(2)]
                    tops.append(_pack(_opaque(best), (ROWS, 8), _ACC, jnp.int32, is_signed=True))
            return (*halves, *tops)

        return run(tuple(scores))

    def softmax(self, scores, m, q_scale, k_scale, position):
        args = (
            (_ACC,) * len(scores),
            _ROW,
            _ROW,
            (_COL,) * self.scale_blocks,
            (_SCALAR,) * len(position),
        )

        @plgpu.inline_mgpu(arg_types=args, return_type=(self.p_type, self.row_type, self.row_type))
        def run(ctx, scores, m, q_scale, k_scale, position):
            del ctx
            p, new_m, alpha = _softmax_step(
                self.config.block_kv,
                self.mask,
                [r for half in scores[: self.config.qk_split] for r in _scalars(half)],
                _scalars(m),
                _scalars(q_scale),
                [s for block in k_scale for s in _scalars(block)],
                [p.registers.flat[0] for p in position] or None,
                tops=[r for x in scores[self.config.qk_split :] for r in _scalars(x)],
            )
            p = _opaque(p)
            return (
                _pack(p, self.p_type.shape, plgpu.Layout.WGMMA_8BIT, jnp.float8_e4m3fn),
                _pack(new_m, (ROWS,), _ROW, jnp.float32),
                _pack(alpha, (ROWS,), _ROW, jnp.float32),
            )

        return run(scores, m, q_scale, tuple(k_scale), position)

    def issue_values(self, p, v_ref):
        refs = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType(_transforms(V_SWIZZLE)))

        @plgpu.inline_mgpu(arg_types=refs, return_type=self.tile_type)
        def run(ctx, p, v):
            del ctx
            words = _scalars(p, ir.IntegerType.get_signless(32))
            a = [words[4 * i : 4 * i + 4] for i in range(len(words) // 4)]
            b = _descriptors(v, V_SWIZZLE)
            regs = _wgmma(self.head_dim + 8, a, b, ir.F32Type.get(), "f32.e4m3.e4m3")
            return _pack(regs, self.tile_type.shape, _ACC, jnp.float32)

        return run(p, v_ref)

    def wait_values(self, tile, p):
        @plgpu.inline_mgpu(arg_types=(_ACC, plgpu.Layout.WGMMA_8BIT), return_type=self.tile_type)
        def run(ctx, tile, p):
            del ctx
            keep = _scalars(p, ir.IntegerType.get_signless(32))
            return _pack(_wait(0, _scalars(tile), keep), self.tile_type.shape, _ACC, jnp.float32)

        return run(tile, p)

    def add_tile(self, out, total, tile, alpha):
        """``out = alpha * out + tile`` for values and, from the columns of ones, row sums."""

        @plgpu.inline_mgpu(
            arg_types=(_ACC, _ROW, _ACC, _ROW), return_type=(self.out_type, self.row_type)
        )
        def run(ctx, out, total, tile, alpha):
            del ctx
            old, new, factor = _scalars(out), _scalars(tile), _scalars(alpha)
            values = [_fma(o, factor[(i // 2) % 2], new[i]) for i, o in enumerate(old)]
            sums = [
                _fma(t, factor[h], new[len(old) + 2 * h]) for h, t in enumerate(_scalars(total))
            ]
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
        """Fills the eight rows of ones below V^T in one stage; with equal bytes swizzle is moot."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_transforms(V_SWIZZLE)),))
        def run(ctx, v):
            del ctx
            i64 = ir.IntegerType.get_signless(64)
            size = 8 * self.config.block_kv
            address = llvm.ptrtoint(i64, utils.memref_ptr(v))
            tid = arith.extui(i64, arith.remui(utils.thread_idx(), _i32(128)))
            for start in range(0, size, 128 * 4):
                offset = arith.addi(
                    arith.muli(tid, arith.constant(i64, 4)),
                    arith.constant(i64, self.head_dim * self.config.block_kv + start),
                )
                where = llvm.add(address, offset, overflow_flags=llvm.IntegerOverflowFlags.none)
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [where, _i32(0x38383838)],
                    "st.shared.b32 [$0], $1;",
                    "l,r",
                    has_side_effects=True,
                    asm_dialect=0,
                )

        run(v_ref)


def _div(a, b: int):
    """Quotient of non-negative numbers, traced or not."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _rem(a, b: int):
    return a % b if isinstance(a, int) else lax.rem(a, jnp.int32(b))


def _min(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _max(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one launch, and which piece of work is what."""

    config: Config
    mask: _Mask
    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale_block: int
    has_lengths: bool

    @property
    def q_tiles(self) -> int:
        return pl.cdiv(self.q_len, self.config.block_q)

    @property
    def total(self) -> int:
        return self.batch * self.num_heads * self.q_tiles

    @property
    def group(self) -> int:
        return math.gcd(self.config.head_group, self.batch * self.num_heads)

    @property
    def num_blocks(self) -> int:
        return min(self.config.num_sms, self.total) if self.config.persistent else self.total

    @property
    def needs_mask(self) -> bool:
        bounded = self.mask.min_diff is not None or self.mask.max_diff is not None
        return bounded or self.has_lengths or self.kv_len % self.config.block_kv != 0

    def tile_of(self, index):
        """Query tile, batch and head of a linear index, traced or not.

        Within a group of heads the longest tiles come first under a causal mask. Else all tiles
        cost the same, and those of one head, which share K and V in the L2 cache, are neighbours.
        """
        tiles, group = self.q_tiles, self.group
        outer, inner = _div(index, tiles * group), _rem(index, tiles * group)
        if self.mask.max_diff is None:
            q_tile, head = _rem(inner, tiles), outer * group + _div(inner, tiles)
        else:
            q_tile, head = tiles - 1 - _div(inner, group), outer * group + _rem(inner, group)
        return q_tile, _div(head, self.num_heads), _rem(head, self.num_heads)

    def kv_tiles(self, q_tile, q_len, kv_len):
        """K/V tiles [lo, hi) of a query tile, and [mid_lo, mid_hi), those that need no mask.

        Never empty: a query tile with nothing to attend walks over one tile that is masked out.
        """
        kv, block_q = self.config.block_kv, self.config.block_q
        first, last = q_tile * block_q, q_tile * block_q + block_q - 1
        low, high, full_low, full_high = 0, kv_len, 0, kv_len
        if self.mask.max_diff is not None:
            high = _min(high, last + self.mask.max_diff + 1)
            full_high = _min(full_high, first + self.mask.max_diff + 1)
        if self.mask.min_diff is not None:
            low = _max(low, first + self.mask.min_diff)
            full_low = _max(full_low, last + self.mask.min_diff)
        count = pl.cdiv(self.kv_len, kv)
        lo = _min(_div(low, kv), count - 1)
        hi = _max(_min(_div(_max(high, 0) + kv - 1, kv), count), lo + 1)
        mid_hi = _min(_max(_div(_max(full_high, 0), kv), lo), hi)
        if self.has_lengths:
            # Rows beyond the query length have to be masked in every tile.
            mid_hi = jnp.where(last < q_len, mid_hi, lo)
        mid_lo = _min(_max(_div(full_low + kv - 1, kv), lo), mid_hi)
        return lo, mid_lo, mid_hi, hi


@functools.lru_cache(maxsize=64)
def _work_table(plan: _Plan) -> np.ndarray:
    """Which query tiles each block walks over: row i is [count, tile, tile, ...].

    Every tile goes, in the order of `_Plan.tile_of`, to the block that would be free first.
    """
    uniform = dataclasses.replace(plan, has_lengths=False)
    lists = [[] for _ in range(plan.num_blocks)]
    free = [(0.0, i) for i in range(plan.num_blocks)]
    for index in range(plan.total):
        lo, _, _, hi = uniform.kv_tiles(plan.tile_of(index)[0], plan.q_len, plan.kv_len)
        when, block = heapq.heappop(free)
        lists[block].append(index)
        heapq.heappush(free, (when + (hi - lo) + TILE_OVERHEAD, block))
    table = np.zeros((plan.num_blocks, 1 + max(map(len, lists))), np.int32)
    for row, tiles in zip(table, lists, strict=True):
        row[0] = len(tiles)
        row[1 : 1 + len(tiles)] = tiles
    return table


def _kernel(plan: _Plan, scale: float, out_dtype):
    """Builds the kernel's entry function; its operands are those of `attention_forward`."""
    config, mask, head_dim = plan.config, plan.mask, plan.head_dim
    kv, stages, compute = config.block_kv, config.num_stages, config.num_compute
    scale_blocks = kv // plan.scale_block
    steps = _Steps(config, head_dim, mask, scale_blocks)
    i32 = jnp.int32

    def lengths(len_ref, b):
        if plan.has_lengths:
            return len_ref[b, 0], len_ref[b, 1]
        return i32(plan.q_len), i32(plan.kv_len)

    def kv_range(q_tile, q_len, kv_len):
        return [jnp.asarray(x, i32) for x in plan.kv_tiles(q_tile, q_len, kv_len)]

    def for_each_tile(order_ref, run):
        """Runs ``run(tile, step) -> step`` over this block's tiles; steps count K/V tiles."""
        block = lax.axis_index("block")
        lax.fori_loop(
            i32(0), order_ref[block, 0], lambda i, step: run(order_ref[block, i + 1], step), i32(0)
        )

    def slot_of(step):
        return lax.rem(step, i32(stages))

    def memory_group(inputs, smem, ready, free):
        q_ref, k_ref, v_ref, _, _, _, order_ref, len_ref = inputs
        q_smem, k_smem, v_smem, _, _ = smem
        (q_ready, k_ready, v_ready), (q_free, k_free, v_free) = ready, free

        def one_tile(index, step):
            q_tile, b, n = plan.tile_of(index)
            kv_head = _div(n, plan.num_heads // plan.num_kv_heads)
            lo, _, _, hi = kv_range(q_tile, *lengths(len_ref, b))
            for w in range(compute):
                rows = pl.ds(q_tile * config.block_q + w * ROWS, ROWS)
                plgpu.barrier_wait(q_free.at[w])
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[w], q_ready.at[w])

            def load(i, step):
                cols, slot = pl.ds((hi - 1 - i) * kv, kv), slot_of(step)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(
                    k_ref.at[b, cols, kv_head], k_smem.at[slot], k_ready.at[slot]
                )
                plgpu.barrier_wait(v_free.at[slot])
                v_rows = v_smem.at[slot, pl.ds(0, head_dim)]
                plgpu.copy_gmem_to_smem(v_ref.at[b, kv_head, :, cols], v_rows, v_ready.at[slot])
                return step + 1

            return lax.fori_loop(i32(0), hi - lo, load, step)

        for_each_tile(order_ref, one_tile)

    def compute_group(wg, inputs, outputs, smem, ready, free, turn):
        _, _, _, qs_ref, ks_ref, vs_ref, order_ref, len_ref = inputs
        out_ref, lse_ref = outputs
        q_smem, k_smem, v_smem, o_smem, lse_smem = smem
        (q_ready, k_ready, v_ready), (q_free, k_free, v_free) = ready, free
        hold = config.schedule == "hold"

        def take_token():
            if hold:
                plgpu.barrier_wait(turn.at[wg])

        def pass_token():
            if hold:
                plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, i32(compute))])

        for slot in range(stages):
            steps.write_ones(v_smem.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
        plgpu.barrier_arrive(q_free.at[wg])
        plgpu.commit_smem()
        pl.when(wg == compute - 1)(pass_token)

        def one_tile(index, step0):
            q_tile, b, n = plan.tile_of(index)
            kv_head = _div(n, plan.num_heads // plan.num_kv_heads)
            q_len, kv_len = lengths(len_ref, b)
            lo, mid_lo, mid_hi, hi = kv_range(q_tile, q_len, kv_len)
            end = step0 + (hi - lo)
            q_start = q_tile * config.block_q + wg * ROWS
            q_scale = plgpu.load(
                qs_ref.at[b, n, pl.ds(q_start, ROWS)], layout=_ROW, optimized=False
            ) * jnp.float32(scale * LOG2E)

            def one_step(step, carry, is_masked):
                out, total, m = carry
                slot, tile = slot_of(step), hi - 1 - (step - step0)
                k_scale = [
                    plgpu.load(
                        ks_ref.at[b, kv_head, tile * scale_blocks + i], layout=_COL, optimized=False
                    )
                    for i in range(scale_blocks)
                ]
                plgpu.barrier_wait(k_ready.at[slot])
                with jax.named_scope("scores"):
                    scores = steps.issue_scores(q_smem.at[wg], k_smem.at[slot])
                    scores = steps.wait_scores(scores)
                pass_token()
                plgpu.barrier_arrive(k_free.at[slot])
                # After a tile's last scores, the next tile's Q may be loaded.
                pl.when(step == end - 1)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                with jax.named_scope("softmax"):
                    position = (q_start, tile * kv, q_len, kv_len) if is_masked else ()
                    p, m, alpha = steps.softmax(scores, m, q_scale, k_scale, position)
                plgpu.barrier_wait(v_ready.at[slot])
                take_token()
                with jax.named_scope("values"):
                    new = steps.wait_values(steps.issue_values(p, v_smem.at[slot]), p)
                plgpu.barrier_arrive(v_free.at[slot])
                out, total = steps.add_tile(out, total, new, alpha)
                return out, total, m

            def run(begin, stop, carry, is_masked):
                step_fn = functools.partial(one_step, is_masked=is_masked)
                return lax.fori_loop(begin, stop, step_fn, carry)

            plgpu.barrier_wait(q_ready.at[wg])
            take_token()
            carry = steps.start()
            if plan.needs_mask:  # From the last keys to the first: masked, free of masks, masked.
                right_end = step0 + (hi - mid_hi)
                carry = run(step0, right_end, carry, True)
                left_start = step0 + (hi - mid_lo) if mask.min_diff is not None else end
                carry = run(right_end, left_start, carry, False)
                if mask.min_diff is not None:
                    carry = run(left_start, end, carry, True)
            else:
                carry = run(step0, end, carry, False)
            pass_token()
            with jax.named_scope("epilogue"):
                v_scale = plgpu.load(vs_ref.at[b, kv_head], layout=_COL, optimized=False)
                out, lse = steps.finish(*carry, v_scale)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem.at[wg][...] = out.astype(out_dtype)
                lse_smem.at[wg][...] = lse
                plgpu.commit_smem()
                rows = pl.ds(q_start, ROWS)
                plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[b, rows, n])
                plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, rows])
            return end

        for_each_tile(order_ref, one_tile)
        plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        *inputs, out_ref, lse_ref = refs
        if not plan.has_lengths:
            inputs.append(None)
        out_transforms = (
            plgpu.TilingTransform((8, 128 // jnp.dtype(out_dtype).itemsize)),
            plgpu.SwizzleTransform(128),
        )
        rows = (compute, ROWS)
        smem = [
            plgpu.SMEM((*rows, head_dim), jnp.int8, transforms=_transforms(steps.k_swizzle)),
            plgpu.SMEM((stages, kv, head_dim), jnp.int8, transforms=_transforms(steps.k_swizzle)),
            plgpu.SMEM(
                (stages, head_dim + 8, kv), jnp.float8_e4m3fn, transforms=_transforms(V_SWIZZLE)
            ),
            plgpu.SMEM((*rows, head_dim), out_dtype, transforms=out_transforms),
            plgpu.SMEM(rows, jnp.float32),
        ]
        ready = [plgpu.Barrier(num_barriers=count) for count in (compute, stages, stages)]
        free = [plgpu.Barrier(num_barriers=compute)]
        free += [plgpu.Barrier(num_arrivals=compute, num_barriers=stages) for _ in range(2)]

        def body(smem, ready, free, turn):
            wg = lax.axis_index("wg")

            @pl.when(wg == compute)
            def _memory():
                plgpu.set_max_registers(config.memory_registers, action="decrease")
                memory_group(inputs, smem, ready, free)

            @pl.when(wg < compute)
            def _compute():
                plgpu.set_max_registers(config.registers, action="increase")
                compute_group(wg, inputs, (out_ref, lse_ref), smem, ready, free, turn)

        turn = plgpu.Barrier(num_barriers=compute)
        pl.run_scoped(body, smem, ready, free, turn, collective_axes="wg")

    return entry


def attention_forward(
    operands: AttentionOperands,
    *,
    q_len: int,
    kv_len: int,
    scale: float,
    min_diff: int | None = None,
    max_diff: int | None = None,
    lengths: jax.Array | None = None,
    out_dtype=jnp.bfloat16,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention on quantised operands.

    Args:
        operands: from `quantize_qkv`, or of the same layout.
        q_len: T.
        kv_len: S.
        scale: factor on the logits.
        min_diff: lower bound of ``key - query`` in tokens, or None.
        max_diff: upper bound of it, 0 for a causal mask, or None.
        lengths: int32 [B, 2], valid queries and keys of each sequence, or None for all.
        out_dtype: bfloat16 or float16.
        config: tiles and schedule.

    Returns:
        Output [B, T, N, H], and the natural log-sum-exp of ``scale * Q (K - mean K)^T`` over the
        allowed keys, float32 [B, N, T]. Rows with nothing to attend are 0 and -inf.

    Raises:
        ValueError: the K scale block does not divide the tile.
        NotImplementedError: shared memory does not suffice.
    """
    config = config or Config()
    q, k = operands.q, operands.k
    batch, _, num_heads, head_dim = q.shape
    scale_block = k.shape[1] // operands.k_scale.shape[2]
    if config.block_kv % scale_block:
        raise ValueError(
            f"block_kv ({config.block_kv}) must be a multiple of the keys that share a set of "
            f"scales; got {scale_block}"
        )
    used = config.smem_bytes(head_dim)
    if used > SMEM_LIMIT:
        raise NotImplementedError(
            f"{config.num_stages} tiles of {config.block_kv} keys at head_dim {head_dim} take "
            f"{used} bytes of shared memory; a block has {SMEM_LIMIT}: use fewer stages"
        )
    plan = _Plan(
        config, _Mask(min_diff, max_diff), batch, q_len, kv_len, num_heads, k.shape[2], head_dim,
        scale_block, lengths is not None,
    )  # fmt: skip
    # Whole query tiles: a one-dimensional copy would run on into the next head's rows.
    padded = plan.q_tiles * config.block_q
    rows = pl.cdiv(q_len, 8) * 8  # The output is copied in tiles of 8 rows.
    args = [*operands[:6], jnp.asarray(_work_table(plan))]
    out, lse = plgpu.kernel(
        _kernel(plan, scale, out_dtype),
        out_type=[
            jax.ShapeDtypeStruct((batch, rows, num_heads, head_dim), out_dtype),
            jax.ShapeDtypeStruct((batch, num_heads, padded), jnp.float32),
        ],
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=config.num_compute + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )(*args, *([] if lengths is None else [lengths]))
    return out[:, :q_len], lse[:, :, :q_len]


# -- The implementation that the dispatcher calls -------------------------------------------------


def unsupported_reason(spec: AttentionSpec, mask: Mask) -> str | None:
    """Why this kernel cannot serve a call on sm90, or None when it can.

    Args:
        spec: the call.
        mask: its token rules.

    Returns:
        One sentence, or None.
    """
    quant = spec.quant
    if quant is None:
        return "the sm90 kernel serves 8-bit attention only; pass quant='sage2'"
    wanted = dict(qk="int8", pv="fp8_e4m3", v_granularity="per_channel", accumulator="float32")
    for field, value in wanted.items():
        if getattr(quant, field) != value:
            have = getattr(quant, field)
            return f"the sm90 kernel needs {field}={value!r}; {quant.name} has {have!r}"
    if quant.granularity == "per_tensor" or quant.v_max != 448.0 or not quant.two_level:
        return "the sm90 kernel needs scales per group of tokens, v_max=448 and two_level=True"
    if quant.smooth_q or quant.smooth_v:
        return "the sm90 kernel smooths K only; smooth_q and smooth_v must be False"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"the sm90 kernel takes bfloat16 or float16; got {spec.dtype}"
    if spec.head_dim not in (64, 128):
        return f"the sm90 kernel takes head_dim 64 or 128; got {spec.head_dim}"
    if spec.quantized_key or spec.quantized_value:
        return "the sm90 kernel quantises K and V itself; QTensor keys or values need 'xla'"
    for name, used in (
        ("bias", spec.has_bias),
        ("sinks", spec.has_sinks),
        ("logits_soft_cap", spec.soft_cap is not None),
        ("segment_ids", bool(mask.segments)),
        ("mask arrays", bool(mask.arrays or mask.tiles)),
    ):
        if used:
            return f"the sm90 kernel does not take {name}"
    bounds = (mask.min_diff, mask.max_diff)
    if not all(x is None or isinstance(x, int | np.integer) for x in bounds):
        return "the sm90 kernel needs causal_offset as a Python int; got an array"
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    mask: Mask,
    spec: AttentionSpec,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the same as `xla.attention` for an 8-bit variant.

    Q has a scale per row and K eight scales per 256 keys (by key index modulo 8), as fine as
    "per_thread" or finer; V has a scale per channel. The gradient is that of unquantised attention.

    Args:
        query: bfloat16 or float16 [B, T, N, H], H 64 or 128.
        key: [B, S, K, H].
        value: [B, S, K, H].
        bias: None.
        sinks: None.
        mask: causality, window and lengths.
        spec: static facts.
        config: tiles and schedule.

    Returns:
        Output [B, T, N, H] in the dtype of ``query``, and log-sum-exp float32 [B, T, N].

    Raises:
        NotImplementedError: `unsupported_reason` has one.
    """
    reason = unsupported_reason(spec, mask)
    if reason is not None:
        raise NotImplementedError(reason)
    return _attention(query, key, value, bias, sinks, mask, spec, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(query, key, value, bias, sinks, mask, spec, config):
    return _attention_fwd(query, key, value, bias, sinks, mask, spec, config)[0]


def _attention_fwd(query, key, value, bias, sinks, mask, spec, config):
    config = config or Config()
    q, k, v = clean(query, key, value, mask, spec)
    operands = quantize_qkv(q, k, v, scale_block=config.block_kv, smooth_k=spec.quant.smooth_k)
    lengths = None
    if mask.q_lengths is not None or mask.kv_lengths is not None:
        given = ((mask.q_lengths, spec.q_len), (mask.kv_lengths, spec.kv_len))
        full = [jnp.full((spec.batch,), n) if x is None else jnp.minimum(x, n) for x, n in given]
        lengths = jnp.stack(full, axis=1).astype(jnp.int32)
    out, lse = attention_forward(
        operands, q_len=spec.q_len, kv_len=spec.kv_len, scale=spec.scale, min_diff=mask.min_diff,
        max_diff=mask.max_diff, lengths=lengths, out_dtype=query.dtype, config=config,
    )  # fmt: skip
    lse = lse.swapaxes(1, 2)
    if operands.k_mean is not None:
        # Smoothing took q · mean(K) from every logit of a row.
        mean = jnp.repeat(operands.k_mean, spec.groups, axis=1)
        lse += spec.scale * jnp.einsum(
            "btnh,bnh->btn", q.astype(jnp.float32), mean, precision="highest"
        )
    return (out, lse), (query, key, value, bias, sinks, mask, out, lse)


def _attention_bwd(spec, config, saved, cotangents):
    del config
    return xla._flash_bwd(spec, xla._heuristic_block_kv(spec), saved, cotangents)


_attention.defvjp(_attention_fwd, _attention_bwd)
