# SPDX-License-Identifier: Apache-2.0
"""Many rows times stored weights on Hopper: codes become the register operand of ``wgmma``.

``out^T = W^T x^T``: two *compute* warpgroups own 64 outputs each and all rows of a tile of x; a
*memory* warpgroup feeds both through a ring in shared memory. At each step of 128 bytes of x a
compute warpgroup starts the products of this step, reads the next step's codes meanwhile, waits for
the products, and finishes the operand. So the weights are widened once for a whole tile of x, in
the shadow of the tensor cores, and never written anywhere.

* `FourBit`: packed 4-bit weights times bfloat16. Codes are widened in the shadow and multiplied by
  their scale after the wait: were the whole operand made there, ptxas would let one group of
  products wait for the other.
* `Int8`: INT8 weights ``[k, n]`` times INT8 rows, in int32. The 8-bit ``wgmma`` wants neighbours
  along the contraction in a register, which weights with outputs side by side do not have:
  ``ldmatrix`` transposes pairs of them, and a byte permutation the rest.
* `Int4Int8`: packed INT4 weights times INT8 rows, a step's sums in int32, which are scaled by their
  group's scale and added in float32. Two codes of a byte are neighbours along the contraction, so
  nothing is transposed. (Groups of 16 or 32 inputs would be scaled so often that the float32 units
  took longer than the tensor cores win over bfloat16; they are not served.)

The rows of an operand are outputs in an order that puts neighbours into one thread, which then
reads the codes of both with one load and writes them as one word. Blocks of a cluster work on the
same rows of x: each fetches a part of them for all.

What is rounded: a 4-bit weight once, to bfloat16 (E2M1 times an e4m3 or e8m0 scale is exact), and
the result. Scales of a tensor, a row or an output multiply the finished sum.

References: Marlin (arXiv 2408.11743), section 3; PTX ISA 8.4, ``wgmma.mma_async``, ``ldmatrix``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels._device import current_device
from pallas_kernels.formats import QTensor
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _inline, _transforms
from pallas_kernels.ops.matmul import mosaic_sm90_codes as codes
from pallas_kernels.ops.matmul import xla
from pallas_kernels.ops.matmul.mosaic_sm90_codes import Weights
from pallas_kernels.ops.matmul.mosaic_sm90_groups import COMPUTE, launch, warpgroups
from pallas_kernels.ops.matmul.spec import FP8_KINDS, UNIT, MatmulSpec

OWN = 64  # outputs of a warpgroup
COLUMNS = COMPUTE * OWN  # outputs of a block
ROW_BYTES = 128  # of x in a step; rows of all tiles in shared memory are so wide
GROUPS = ROW_BYTES // 32  # products of a step, 32 bytes of a row each
_MAGIC, _MAGIC_BITS = 1.5 * 2**23, 0x4B400000  # whose last place is 1
_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that change speed only.

    Args:
        tile_m: rows of x of a block, a multiple of 16 up to 256.
        num_stages: slots of the ring.
        cluster: blocks that share the same rows of x: 1 or 2.
        across: tiles of x that run side by side.
    """

    tile_m: int = 256
    num_stages: int = 4
    cluster: int = 2
    across: int = 8


# -- registers and shared memory -------------------------------------------------------------------


def _array(shape, dtype, layout):
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def _multiply(acc, a, x, rows: int, kind: str):
    """Starts ``acc += A @ x^T`` for a step; A in registers, x [rows, 128 bytes] in memory."""
    base = mma_utils.encode_descriptor(
        x, leading_byte_offset=0, stride_byte_offset=8 * ROW_BYTES, swizzle=ROW_BYTES
    )
    k = 16 if "bf16" in kind else 32
    flags = "" if kind.startswith("s32") else ", 1, 1, 0" if k == 16 else ", 1, 1"
    count = len(acc)
    tile = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    lines, operands = [], []
    for group in range(GROUPS):
        names = [f"${2 * count + 5 * group + i}" for i in range(5)]
        operands += [*a[4 * group : 4 * group + 4], ptx.add(base, ptx.i64(32 * group >> 4))]
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{rows}k{k}.{kind} {tile}, "
            f"{{{','.join(names[:4])}}}, {names[4]}, yes{flags};"
        )
    text = "\n".join(
        ["{ .reg .pred yes;", "setp.ne.b32 yes, 1, 0;", "wgmma.fence.sync.aligned;", *lines,
         "wgmma.commit_group.sync.aligned;", "}"]
    )  # fmt: skip
    return ptx.asm(text, "", operands, tied=acc, effects=True)


def _wait(acc, a):
    """Waits for the products; their operand stays alive until then."""
    return ptx.asm("wgmma.wait_group.sync.aligned 0;", "", a, tied=acc, effects=True)


def _place(wg):
    """First of the thread's two outputs within the block, and its lane's c, both i32."""
    tid = ptx.thread()
    lane = ptx.rem(tid, ptx.i32(32))
    first = ptx.add(ptx.mul(wg, ptx.i32(OWN)), ptx.mul(ptx.div(tid, ptx.i32(32)), ptx.i32(16)))
    first = ptx.add(first, ptx.mul(ptx.div(lane, ptx.i32(4)), ptx.i32(2)))
    return first, ptx.rem(lane, ptx.i32(4))


def _loads(ref, start, offsets, instruction: str, out: str):
    """Loads of shared memory at constant distances from a place (i32)."""
    per = len(out) // len(offsets)
    lines = []
    for i, offset in enumerate(offsets):
        names = [f"${per * i + j}" for j in range(per)]
        names = names[0] if per == 1 else "{" + ", ".join(names) + "}"
        lines.append(f"{instruction} {names}, [${len(out)}+{offset}];")
    return ptx.asm("\n".join(lines), out, [ptx.address(ref, ptx.widen(start))], effects=True)


def _swizzled(row, piece):
    """Byte of a 16-byte piece of a row: the hardware exchanges pieces by row % 8."""
    moved = ptx.xor(piece, ptx.rem(row, ptx.i32(8)))
    return ptx.add(ptx.mul(row, ptx.i32(ROW_BYTES)), ptx.mul(moved, ptx.i32(16)))


# -- weights ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FourBit:
    """Packed 4-bit weights, bfloat16 rows.

    Args:
        weights: facts.
    """

    weights: Weights
    step = ROW_BYTES // 2  # inputs
    copies = 2
    x_dtype, acc_dtype = jnp.bfloat16, jnp.float32
    kind = "f32.bf16.bf16"

    @property
    def k(self) -> int:
        """Inputs."""
        return 2 * self.weights.rows

    @property
    def groups(self) -> int:
        """Groups of a step: rows of scales."""
        return max(self.step // self.weights.group, 1)

    @property
    def _rests(self) -> int:
        return self.weights.scale == "float32"

    @property
    def types(self):
        """Operand A, and scales."""
        count = 2 * self.groups * (1 + self._rests)
        shapes = [(OWN, self.step), (OWN, -(-count // 4) * UNIT)]
        return [_array(shape, jnp.bfloat16, plgpu.Layout.WGMMA) for shape in shapes]

    def smem(self, stages: int):
        """What the ring holds beside x."""
        dtype = jnp.float32 if self.weights.scale == "float32" else jnp.uint8
        shape = (stages, self.step // 2, COLUMNS)
        return {
            "codes": plgpu.SMEM(shape, jnp.uint8, transforms=_transforms(ROW_BYTES)),
            "scale": plgpu.SMEM((stages, self.groups, COLUMNS), dtype),
        }

    def load(self, refs, smem, slot, step, column, barrier):
        """Starts the copies of a step."""
        size, columns = self.step // 2, pl.ds(column, COLUMNS)
        source = refs["codes"].at[pl.ds(step * size, size), columns]
        plgpu.copy_gmem_to_smem(source, smem["codes"].at[slot], barrier)
        group = step * self.groups
        if self.weights.group > self.step:
            last = self.k // self.weights.group - 1
            group = jnp.minimum(lax.div(step * self.step, jnp.int32(self.weights.group)), last)
        source = refs["scale"].at[pl.ds(group, self.groups), columns]
        plgpu.copy_gmem_to_smem(source, smem["scale"].at[slot], barrier)

    def refs(self, smem, slot):
        """References that `fetch` reads, with their transforms."""
        return [(smem["codes"].at[slot], _transforms(ROW_BYTES)), (smem["scale"].at[slot], ())]

    def fetch(self, w, s, wg):
        """Codes of one step's operand as bfloat16, and words of their scales."""
        first, c = _place(wg)
        piece, within = ptx.div(first, ptx.i32(16)), ptx.rem(first, ptx.i32(16))
        halves = []
        for half in range(2):
            start = _swizzled(ptx.add(c, ptx.i32(4 * half)), piece)
            offsets = [8 * ROW_BYTES * unit for unit in range(GROUPS)]
            loads = _loads(w, ptx.add(start, within), offsets, "ld.shared.u16", "r" * GROUPS)
            halves.append(loads)
        size = self.weights.scale_bytes
        offsets = [size * COLUMNS * i for i in range(self.groups)]
        kind, out = ("v2.b32", "ff") if size == 4 else ("u16", "r")
        start = ptx.mul(first, ptx.i32(size))
        raw = _loads(s, start, offsets, f"ld.shared.{kind}", out * self.groups)
        per, scale = len(out), self.weights.scale
        scales = [
            word
            for i in range(self.groups)
            for pair in codes.scale_pairs(scale, raw[per * i : per * i + per])
            for word in pair
            if word is not None
        ]
        words = []
        for low, high in zip(*halves, strict=True):
            four = ptx.asm("prmt.b32 $0, $1, $2, 21520;", "r", [low, high])[0]  # 0x5410
            words += codes.code_pairs(self.weights.code, four)
        return [words, scales + scales[:1] * (-len(scales) % 4)]

    def finish(self, words, scales):
        """The operand: codes times scales."""
        out = []
        for i, pair in enumerate(words):
            at = (i // 4 * self.groups // GROUPS * 2 + i % 2) * (1 + self._rests)
            out.append(codes.times(pair, (scales[at], scales[at + 1] if self._rests else None)))
        return out

    def factors(self, refs):
        """References that `scaled` reads."""
        return [refs["tensor_scale"]] if self.weights.tensor_scale else []

    def scaled(self, values, row, column, tensor_scale=None):
        """Two neighbouring outputs of a row."""
        del row, column
        if tensor_scale is None:
            return values
        where = ptx.address(tensor_scale, ptx.i64(0))
        factor = ptx.asm("ld.global.nc.b32 $0, [$1];", "f", [where])[0]
        return [ptx.fmul(x, factor) for x in values]


@dataclasses.dataclass(frozen=True)
class Int8:
    """INT8 weights with a scale per output, INT8 rows with a scale each.

    Args:
        k: inputs.
        m: rows.
    """

    k: int
    m: int
    step = ROW_BYTES
    copies = 1
    x_dtype, acc_dtype = jnp.int8, jnp.int32
    kind = "s32.s8.s8"

    @property
    def types(self):
        """Operand A."""
        return [_array((OWN, self.step), jnp.int8, plgpu.Layout.WGMMA_8BIT)]

    def smem(self, stages: int):
        """What the ring holds beside x."""
        shape = (stages, self.step, COLUMNS)
        return {"codes": plgpu.SMEM(shape, jnp.int8, transforms=_transforms(ROW_BYTES))}

    def load(self, refs, smem, slot, step, column, barrier):
        """Starts the copy of a step."""
        source = refs["codes"].at[pl.ds(step * self.step, self.step), pl.ds(column, COLUMNS)]
        plgpu.copy_gmem_to_smem(source, smem["codes"].at[slot], barrier)

    def refs(self, smem, slot):
        """References that `fetch` reads, with their transforms."""
        return [(smem["codes"].at[slot], _transforms(ROW_BYTES))]

    def fetch(self, w, wg):
        """Codes of one step's operand, transposed by pairs of outputs.

        A lane names a row for `ldmatrix`, in the order that makes a thread's two rows of one matrix
        and two of the next four neighbours: 4c, 4c + 1 and 4c + 2, 4c + 3.
        """
        i32, tid = ptx.i32, ptx.thread()
        warp, lane = ptx.div(tid, i32(32)), ptx.rem(tid, i32(32))
        piece = ptx.add(ptx.mul(wg, i32(OWN // 16)), warp)
        matrix, line = ptx.div(lane, i32(8)), ptx.rem(lane, i32(8))
        row = ptx.add(ptx.mul(ptx.div(line, i32(2)), i32(4)), ptx.rem(line, i32(2)))
        row = ptx.add(row, ptx.mul(ptx.div(matrix, i32(2)), i32(16)))
        row = ptx.add(row, ptx.mul(ptx.rem(matrix, i32(2)), i32(2)))
        offsets = [32 * ROW_BYTES * group for group in range(GROUPS)]
        instruction = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
        return [_loads(w, _swizzled(row, piece), offsets, instruction, "rrrr" * GROUPS)]

    def finish(self, words):
        """The operand: four neighbours along the contraction in a register."""
        return [
            ptx.asm(f"prmt.b32 $0, $1, $2, {selector};", "r", words[i : i + 2])[0]
            for i in range(0, len(words), 2)
            for selector in (0x6420, 0x7531)
        ]

    def factors(self, refs):
        """References that `scaled` reads."""
        return [refs["row_scale"], refs["column_scale"]]

    def scaled(self, values, row, column, row_scale, column_scale):
        """Two neighbouring outputs of a row."""
        row = ptx.imin(row, ptx.i32(self.m - 1))
        where = ptx.address(row_scale, ptx.mul(ptx.widen(row), ptx.i64(4)))
        factor = ptx.asm("ld.global.nc.b32 $0, [$1];", "f", [where])[0]
        where = ptx.address(column_scale, ptx.mul(ptx.widen(column), ptx.i64(4)))
        pair = ptx.asm("ld.global.nc.v2.b32 {$0, $1}, [$2];", "ff", [where])
        values = [ptx.fmul(self.number(x), factor) for x in values]
        return [ptx.fmul(x, y) for x, y in zip(values, pair, strict=True)]

    def number(self, x):
        """A sum as float32."""
        return ptx.to_float(x)


@dataclasses.dataclass(frozen=True)
class Int4Int8(Int8):
    """Packed INT4 weights with a float32 scale per group of inputs and output, INT8 rows.

    The 8-bit operand is 16 times the code, a nibble moved to the upper half of its byte; the
    scale of the row makes up for it.

    Args:
        k: inputs, a multiple of 128.
        m: rows.
        groups: rows of scales.
    """

    groups: int = 1
    copies = 2

    @property
    def types(self):
        """Operand A before and after `finish`, and the scales of its outputs."""
        scales = _array((OWN, UNIT), jnp.bfloat16, plgpu.Layout.WGMMA)
        return [*super().types, scales]

    def smem(self, stages: int):
        """What the ring holds beside x."""
        shape = (stages, self.step // 2, COLUMNS)
        return {
            "codes": plgpu.SMEM(shape, jnp.uint8, transforms=_transforms(ROW_BYTES)),
            "scale": plgpu.SMEM((stages, 1, COLUMNS), jnp.float32),
        }

    def load(self, refs, smem, slot, step, column, barrier):
        """Starts the copies of a step."""
        size, columns = self.step // 2, pl.ds(column, COLUMNS)
        source = refs["codes"].at[pl.ds(step * size, size), columns]
        plgpu.copy_gmem_to_smem(source, smem["codes"].at[slot], barrier)
        # A scale serves whole steps.
        group = lax.div(step, jnp.int32(self.k // self.step // self.groups))
        plgpu.copy_gmem_to_smem(
            refs["scale"].at[pl.ds(group, 1), columns], smem["scale"].at[slot], barrier
        )

    def refs(self, smem, slot):
        """References that `fetch` reads, with their transforms."""
        return [(smem["codes"].at[slot], _transforms(ROW_BYTES)), (smem["scale"].at[slot], ())]

    def fetch(self, w, s, wg):
        """Bytes of one step's operand, each twice, and the scales of the thread's outputs."""
        i32 = ptx.i32
        first, c = _place(wg)
        piece, within = ptx.div(first, i32(16)), ptx.rem(first, i32(16))
        offsets = [8 * ROW_BYTES * i for i in range(2 * GROUPS)]
        rows = []
        for odd in range(2):
            start = _swizzled(ptx.add(ptx.mul(c, i32(2)), i32(odd)), piece)
            out = "r" * len(offsets)
            rows.append(_loads(w, ptx.add(start, within), offsets, "ld.shared.u16", out))
        words = [
            ptx.asm(f"prmt.b32 $0, $1, $2, {selector};", "r", pair)[0]
            for pair in zip(*rows, strict=True)
            for selector in (0x4400, 0x5511)
        ]
        pair = _loads(s, ptx.mul(first, i32(4)), [0], "ld.shared.v2.b32", "ff")
        return [words, [ptx.bits(x) for x in (*pair, *pair)]]

    def finish(self, words, scales):
        """The operand: four neighbours along the contraction in a register."""
        del scales
        text = "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 t, t, $2; and.b32 $0, $1, $3; "
        text += "or.b32 $0, $0, t; }"
        masks = [codes.word(0x00F000F0), codes.word(0xF000F000)]
        return [ptx.asm(text, "r", [word, *masks])[0] for word in words]

    def add(self, total, acc, scales):
        """``total + acc · scale``; the sums began at the number whose float has integers below."""
        out = []
        for i, (x, y) in enumerate(zip(total, acc, strict=True)):
            number = ptx.fsub(ptx.from_bits(y), ptx.f32(_MAGIC))
            out.append(ptx.fma(number, ptx.from_bits(scales[i // 2 % 2]), x))
        return out

    def factors(self, refs):
        """References that `scaled` reads."""
        return [refs["row_scale"]]

    def scaled(self, values, row, column, row_scale):
        """Two neighbouring outputs of a row."""
        del column
        row = ptx.imin(row, ptx.i32(self.m - 1))
        where = ptx.address(row_scale, ptx.mul(ptx.widen(row), ptx.i64(4)))
        factor = ptx.asm("ld.global.nc.b32 $0, [$1];", "f", [where])[0]
        return [ptx.fmul(x, factor) for x in values]


@dataclasses.dataclass(frozen=True)
class Fp8(Int8):
    """FP8 likewise, by its bytes; the sums stay in the tensor core, which keeps about 14 bits.

    Args:
        k: inputs.
        m: rows.
        kinds: "e4m3" or "e5m2", of the weights and of the rows.
    """

    kinds: tuple[str, str] = ("e4m3", "e4m3")
    acc_dtype = jnp.float32

    @property
    def kind(self):
        """Types in the name of the instruction."""
        return f"f32.{self.kinds[0]}.{self.kinds[1]}"

    def number(self, x):
        """A sum as float32, which it is."""
        return x


# -- the kernel ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of the kernel.

    Args:
        weights: which, and how they become an operand.
        m: rows of x.
        n: outputs, a multiple of 128.
        out_dtype: name of the dtype of the result.
        config: sizes.
    """

    weights: FourBit | Int8 | Int4Int8 | Fp8
    m: int
    n: int
    out_dtype: str
    config: Config

    @property
    def steps(self) -> int:
        """Steps of a block."""
        return pl.cdiv(self.weights.k, self.weights.step)

    @property
    def row_tiles(self) -> int:
        """Tiles of x."""
        return pl.cdiv(self.m, self.config.tile_m)

    @property
    def clusters(self) -> int:
        """Clusters for one tile of x."""
        return pl.cdiv(self.n, COLUMNS * self.config.cluster)

    def tile_of(self, block):
        """Tile of x and cluster of a block's number; neighbours share both as far as possible."""
        across = min(self.config.across, self.row_tiles)
        band, rest = lax.div(block, across * self.clusters), lax.rem(block, across * self.clusters)
        wide = jnp.minimum(across, self.row_tiles - band * across)
        return band * across + lax.rem(rest, wide), lax.div(rest, wide)


def _store(plan: Plan, out, acc, row, column, wg, factors):
    """Writes a warpgroup's tile, two neighbouring outputs at a time."""
    first, c = _place(wg)
    column = ptx.add(column, first)
    there = ptx.lt(column, ptx.i32(plan.n))
    column = ptx.imin(column, ptx.i32(plan.n - 2))
    row = ptx.add(row, ptx.mul(c, ptx.i32(2)))
    size = jnp.dtype(plan.out_dtype).itemsize
    for j in range(plan.config.tile_m // 8):
        for d in range(2):
            here = ptx.add(row, ptx.i32(8 * j + d))
            values = [acc[4 * j + d], acc[4 * j + 2 + d]]
            values = plan.weights.scaled(values, here, column, *factors)
            if size == 2:
                values = [ptx.half_x2(values, plan.out_dtype)]
            where = ptx.add(ptx.mul(ptx.widen(here), ptx.i64(plan.n)), ptx.widen(column))
            ok = ptx.both(there, ptx.lt(here, ptx.i32(plan.m)))
            ptx.store(out, ptx.mul(where, ptx.i64(size)), values, ok)


def _kernel(plan: Plan, names: tuple[str, ...]):
    """Builds the kernel's entry function; ``names`` are those of its operands."""
    config, weights = plan.config, plan.weights
    stages, tile_m, i32 = config.num_stages, config.tile_m, jnp.int32
    itemsize = jnp.dtype(weights.x_dtype).itemsize
    acc_type = _array((OWN, tile_m), weights.acc_dtype, _ACC)
    types = weights.types
    collective = {"collective_axes": ("cluster",)} if config.cluster > 1 else {}

    def place():
        """First row and first output of this block."""
        row_tile, cluster = plan.tile_of(lax.axis_index("block"))
        columns = cluster * config.cluster
        if config.cluster > 1:
            columns += lax.axis_index("cluster")
        return row_tile * tile_m, columns * COLUMNS

    def memory_group(refs, smem, ready, free):
        row, column = place()

        def load(step, _):
            slot = lax.rem(step, i32(stages))
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            source = refs["x"].at[pl.ds(row, tile_m), pl.ds(step * weights.step, weights.step)]
            plgpu.copy_gmem_to_smem(source, smem["x"].at[slot], ready.at[slot], **collective)
            weights.load(refs, smem, slot, step, column, ready.at[slot])
            return _

        lax.fori_loop(i32(0), i32(plan.steps), load, i32(0))
        # Nothing of another block may arrive after this one has ended.
        for step in range(max(plan.steps - stages, 0), plan.steps):
            plgpu.barrier_wait(free.at[step % stages])

    def compute_group(wg, refs, smem, ready, free):
        row, column = place()
        a_layout = types[0].layout

        def fetch(slot):
            body = lambda *given: weights.fetch(*given[:-1], given[-1][0])  # noqa: E731
            return _inline(body, [*weights.refs(smem, slot), (wg, _SCALAR)], types)

        def finish(words):
            body = lambda *given: [weights.finish(*given)]  # noqa: E731
            inputs = [(x, t.layout) for x, t in zip(words, types, strict=True)]
            return _inline(body, inputs, types[:1])[0]

        def multiply(acc, a, slot):
            body = lambda acc, a, x: [_multiply(acc, a, x, tile_m, weights.kind)]  # noqa: E731
            inputs = [
                (acc, _ACC),
                (a, a_layout),
                (smem["x"].at[slot], _transforms(ROW_BYTES, itemsize)),
            ]
            return _inline(body, inputs, [acc_type])[0]

        def wait(acc, a):
            body = lambda acc, a: [_wait(acc, a)]  # noqa: E731
            return _inline(body, [(acc, _ACC), (a, a_layout)], [acc_type])[0]

        def one_step(step, state):
            acc, a = state
            slot, then = lax.rem(step, i32(stages)), lax.rem(step + 1, i32(stages))
            with jax.named_scope("wgmma"):
                acc = multiply(acc, a, slot)
            plgpu.barrier_wait(ready.at[then])
            with jax.named_scope("dequant"):
                words = fetch(then)
            acc = wait(acc, a)
            plgpu.barrier_arrive(free.at[slot])
            return acc, finish(words)

        def filled(value, kind=acc_type):
            make = ptx.f32 if kind.dtype == jnp.float32 else ptx.i32
            return _inline(lambda: [[make(value)] * (tile_m // 2)], [], [kind])[0]

        def add(total, acc, scales):
            body = lambda *given: [weights.add(*given)]  # noqa: E731
            inputs = [(total, _ACC), (acc, _ACC), (scales, types[1].layout)]
            return _inline(body, inputs, [total_type])[0]

        def one_scaled_step(step, state):
            total, a, scales = state
            slot, then = lax.rem(step, i32(stages)), lax.rem(step + 1, i32(stages))
            with jax.named_scope("wgmma"):
                acc = multiply(filled(_MAGIC_BITS), a, slot)
            plgpu.barrier_wait(ready.at[then])
            with jax.named_scope("dequant"):
                words = fetch(then)
            acc = wait(acc, a)
            plgpu.barrier_arrive(free.at[slot])
            return add(total, acc, scales), finish(words), words[1]

        total_type = _array((OWN, tile_m), jnp.float32, _ACC)
        plgpu.barrier_wait(ready.at[0])
        words = fetch(i32(0))
        slot = (plan.steps - 1) % stages
        if isinstance(weights, Int4Int8):
            state = (filled(0, total_type), finish(words), words[1])
            state = lax.fori_loop(i32(0), i32(plan.steps - 1), one_scaled_step, state)
            total, a, scales = state
            acc = add(total, wait(multiply(filled(_MAGIC_BITS), a, slot), a), scales)
        else:
            state = (filled(0), finish(words))
            acc, a = lax.fori_loop(i32(0), i32(plan.steps - 1), one_step, state)
            acc = wait(multiply(acc, a, slot), a)
        plgpu.barrier_arrive(free.at[slot])

        def body(out, acc, row, column, wg, *factors):
            _store(plan, out, acc, row[0], column[0], wg[0], factors)
            return []

        inputs = [(refs["out"], ()), (acc, _ACC), *((x, _SCALAR) for x in (row, column, wg))]
        with jax.named_scope("epilogue"):
            _inline(body, [*inputs, *((ref, ()) for ref in weights.factors(refs))])

    def entry(*refs):
        refs = dict(zip((*names, "out"), refs, strict=True))
        shape = (stages, tile_m, weights.step)
        smem = {
            "x": plgpu.SMEM(shape, weights.x_dtype, transforms=_transforms(ROW_BYTES, itemsize)),
            **weights.smem(stages),
        }
        warpgroups(
            smem, 1 + weights.copies, config,
            lambda *given: memory_group(refs, *given),
            lambda wg, *given: compute_group(wg, refs, *given),
        )  # fmt: skip

    return entry


def _launch(plan: Plan, arrays: dict[str, jax.Array]) -> jax.Array:
    """Runs the kernel over "x" [m, k], "codes" and what the weights need; returns [m, n]."""
    kernel = _kernel(plan, tuple(arrays))
    return launch(kernel, plan, plan.row_tiles * plan.clusters, *arrays.values())


def heuristic(spec: MatmulSpec) -> Config:
    """Sizes: the largest tile of x of which three quarters of the multiprocessors get one.

    With two sums a tile of 256 rows does not fit into the registers.
    """
    wanted = 3 * (current_device().num_sms or 132) // 4
    tiles = (128,) if spec.scheme == "w4a8" else (256, 128)
    fits = [t for t in tiles if pl.cdiv(spec.m, t) * pl.cdiv(spec.n, COLUMNS) >= wanted]
    return Config(tile_m=fits[0] if fits else 64)


def matmul(
    lhs: jax.Array | QTensor, rhs: QTensor, spec: MatmulSpec, config: Config | None = None
) -> jax.Array:
    """Computes the same as `reference.matmul`, with 4-bit weights rounded to bfloat16.

    Args:
      lhs: bfloat16 [..., m, k]; for 8-bit weights an INT8 or FP8 QTensor with a scale per row; for
        INT4 weights either bfloat16 or INT8.
      rhs: packed 4-bit QTensor [k, n], or INT8 or FP8 with a scale per output.
      spec: static facts.
      config: sizes; None chooses.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
    weights: FourBit | Int8 | Int4Int8 | Fp8
    config = config or heuristic(spec)
    if spec.scheme == "w4a8":
        arrays = _int4_int8(lhs, rhs, spec)
        k, n = 2 * arrays["codes"].shape[0], arrays["codes"].shape[1]
        weights = Int4Int8(k, spec.m, arrays["scale"].shape[0])
    elif spec.scheme == "w8a8":
        k, n = (-(-size // 128) * 128 for size in (spec.k, spec.n))
        w, x = (lax.bitcast_convert_type(qt.qvalue, jnp.int8) for qt in (rhs, lhs))
        x = x.reshape(spec.m, spec.k)
        row_scale = xla.spread(lhs.scale, lhs.qvalue.shape[:-1]).reshape(spec.m)
        column_scale = xla.spread(rhs.scale.T, rhs.qvalue.shape[1:]).reshape(spec.n)
        for operand in (lhs, rhs):
            if operand.tensor_scale is not None:
                row_scale = row_scale * operand.tensor_scale.reshape(())
        arrays = {
            "x": jnp.pad(x, ((0, -spec.m % 8), (0, k - spec.k))),
            "codes": jnp.pad(w, ((0, k - spec.k), (0, n - spec.n))),
            "row_scale": row_scale,
            "column_scale": jnp.pad(column_scale, (0, n - spec.n)),
        }
        weights = Int8(k, spec.m)
        if spec.direct == "fp8":
            kinds = (FP8_KINDS[spec.rhs.code_dtype], FP8_KINDS[spec.lhs.code_dtype])
            weights = Fp8(k, spec.m, kinds)
    else:
        packed, arrays = codes.prepare(lhs, rhs, spec, (8, FourBit.step, COLUMNS))
        weights, n = FourBit(packed), packed.n
    plan = Plan(weights, spec.m, n, spec.out_dtype, config)
    out = _launch(plan, arrays)
    return out[:, : spec.n].reshape(*lhs.shape[:-1], spec.n)


def _int4_int8(lhs: QTensor, rhs: QTensor, spec: MatmulSpec) -> dict[str, jax.Array]:
    """Arrays as `Int4Int8` takes them, padded with zeros."""
    k, n = (-(-size // 128) * 128 for size in (2 * rhs.qvalue.shape[0], spec.n))
    columns = ((0, 0), (0, n - spec.n))
    x = lhs.qvalue.reshape(spec.m, spec.k)
    row_scale = xla.spread(lhs.scale, lhs.qvalue.shape[:-1]).reshape(spec.m)
    return {
        "x": jnp.pad(x, ((0, -spec.m % 8), (0, k - spec.k))),
        "codes": jnp.pad(rhs.qvalue, ((0, k // 2 - rhs.qvalue.shape[0]), columns[1])),
        "scale": jnp.pad(rhs.scale, columns),
        "row_scale": row_scale / 16,  # of codes that are moved by four bits
    }
