# SPDX-License-Identifier: Apache-2.0
"""Many rows times stored weights on Hopper: codes become the register operand of ``wgmma``.

``out^T = W^T x^T``: two *compute* warpgroups own 64 outputs each and all rows of a tile of x; a
*memory* warpgroup feeds both through a ring in shared memory. At each step of 128 bytes of x a
compute warpgroup starts the products of this step, reads the next step's codes meanwhile, waits for
the products, and finishes the operand. So the weights are widened once for a whole tile of x, in
the shadow of the tensor cores, and never written anywhere.

* `FourBit`: packed 4-bit weights times bfloat16, which the codes of INT8 and FP8 rows are too.
  Weights are widened in the shadow and multiplied by their scale after the wait: were the whole
  operand made there, ptxas would let one group of products wait for the other.
* `Int8`: INT8 weights ``[k, n]`` times INT8 rows, in int32. The 8-bit ``wgmma`` wants neighbours
  along the contraction in a register, which weights with outputs side by side do not have:
  ``ldmatrix`` transposes pairs of them, and a byte permutation the rest.
* `Fp8`: FP8 likewise. The tensor core drops what of a product lies 14 bits below the sum, so each
  step's sums are added to others in float32.
* `Packed`: packed 4-bit weights whose scales of an output are whole multiples of one number, times
  INT8 rows. A byte permutation looks codes up among their eight multiples, once among those without
  and once among those with a sign. (NVFP4's scales of a tensor have too many values for that, FP8
  rows of such weights would lose bits in the sum; both are multiplied as bfloat16.)

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
from pallas_kernels.ops.matmul.spec import CODE_RANGE, CODES, FP8_KINDS, UNIT, MatmulSpec

OWN = 64  # outputs of a warpgroup
COLUMNS = COMPUTE * OWN  # outputs of a block
ROW_BYTES = 128  # of x in a step; rows of all tiles in shared memory are so wide
GROUPS = ROW_BYTES // 32  # products of a step, 32 bytes of a row each
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
    """Starts ``acc += A @ x^T`` for a step; A in registers, x [rows, 128 bytes] in memory.

    Without ``acc`` (None) the sums start from zero.
    """
    base = mma_utils.encode_descriptor(
        x, leading_byte_offset=0, stride_byte_offset=8 * ROW_BYTES, swizzle=ROW_BYTES
    )
    k = 16 if "bf16" in kind else 32
    flags = "" if kind.startswith("s32") else ", 1, 1, 0" if k == 16 else ", 1, 1"
    count = rows // 2
    first = count if acc is None else 2 * count
    tile = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    lines, operands = [], []
    for group in range(GROUPS):
        names = [f"${first + 5 * group + i}" for i in range(5)]
        more = "no" if acc is None and group == 0 else "yes"
        operands += [*a[4 * group : 4 * group + 4], ptx.add(base, ptx.i64(32 * group >> 4))]
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{rows}k{k}.{kind} {tile}, "
            f"{{{','.join(names[:4])}}}, {names[4]}, {more}{flags};"
        )
    text = "\n".join(
        ["{ .reg .pred yes, no;", "setp.ne.b32 yes, 1, 0;", "setp.ne.b32 no, 0, 0;",
         "wgmma.fence.sync.aligned;", *lines, "wgmma.commit_group.sync.aligned;", "}"]
    )  # fmt: skip
    fresh = "f" * count if acc is None else ""
    return ptx.asm(text, fresh, operands, tied=acc or (), effects=True)


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


class _PackedRing:
    """How packed 4-bit codes and their scales come into the ring.

    Of the weights it wants ``step``, ``group`` (inputs that share a scale), ``last_group`` and
    ``scale_dtype``.
    """

    copies = 2

    @property
    def groups(self) -> int:
        """Groups of a step: rows of scales."""
        return max(self.step // self.group, 1)

    def smem(self, stages: int):
        """What the ring holds beside x."""
        shape = (stages, self.step // 2, COLUMNS)
        return {
            "codes": plgpu.SMEM(shape, jnp.uint8, transforms=_transforms(ROW_BYTES)),
            "scale": plgpu.SMEM((stages, self.groups, COLUMNS), self.scale_dtype),
        }

    def load(self, refs, smem, slot, step, column, barrier):
        """Starts the copies of a step."""
        size, columns = self.step // 2, pl.ds(column, COLUMNS)
        source = refs["codes"].at[pl.ds(step * size, size), columns]
        plgpu.copy_gmem_to_smem(source, smem["codes"].at[slot], barrier)
        group = step * self.groups
        if self.group > self.step:
            group = lax.div(step * self.step, jnp.int32(self.group))
            group = jnp.minimum(group, self.last_group)
        source = refs["scale"].at[pl.ds(group, self.groups), columns]
        plgpu.copy_gmem_to_smem(source, smem["scale"].at[slot], barrier)

    def refs(self, smem, slot):
        """References that `fetch` reads, with their transforms."""
        return [(smem["codes"].at[slot], _transforms(ROW_BYTES)), (smem["scale"].at[slot], ())]


@dataclasses.dataclass(frozen=True)
class FourBit(_PackedRing):
    """Packed 4-bit weights, bfloat16 rows.

    Args:
        weights: facts.
        m: rows.
    """

    weights: Weights
    m: int
    step = ROW_BYTES // 2  # inputs
    x_dtype, acc_dtype = jnp.bfloat16, jnp.float32
    kind = "f32.bf16.bf16"
    promotes = False

    @property
    def k(self) -> int:
        """Inputs."""
        return self.weights.inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.weights.group

    @property
    def last_group(self) -> int:
        """The last row of scales."""
        return self.k // self.group - 1

    @property
    def scale_dtype(self):
        """Of the array of scales."""
        return jnp.float32 if self.weights.scale == "float32" else jnp.uint8

    @property
    def _rests(self) -> int:
        return self.weights.scale == "float32"

    @property
    def types(self):
        """Operand A, and scales."""
        count = 2 * self.groups * (1 + self._rests)
        shapes = [(OWN, self.step), (OWN, -(-count // 4) * UNIT)]
        return [_array(shape, jnp.bfloat16, plgpu.Layout.WGMMA) for shape in shapes]

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
        return [refs[self.weights.factor]] if self.weights.factor else []

    def scaled(self, values, row, column, factor=None):
        """Two neighbouring outputs of a row."""
        del column
        if factor is None:
            return values
        rows = self.m if self.weights.factor == "row_scale" else 1
        number = codes.row_factor(factor, row, rows)
        return [ptx.fmul(x, number) for x in values]


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
    promotes = False  # a step's sums are added to others in float32

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
        factor = codes.row_factor(row_scale, row, self.m)
        where = ptx.address(column_scale, ptx.mul(ptx.widen(column), ptx.i64(4)))
        pair = ptx.asm("ld.global.nc.v2.b32 {$0, $1}, [$2];", "ff", [where])
        values = [ptx.fmul(self.number(x), factor) for x in values]
        return [ptx.fmul(x, y) for x, y in zip(values, pair, strict=True)]

    def number(self, x):
        """A sum as float32."""
        return ptx.to_float(x)


@dataclasses.dataclass(frozen=True)
class Fp8(Int8):
    """FP8 likewise, by its bytes; a step's sums have about 14 bits.

    Args:
        k: inputs.
        m: rows.
        kinds: "e4m3" or "e5m2", of the weights and of the rows.
    """

    kinds: tuple[str, str] = ("e4m3", "e4m3")
    acc_dtype = jnp.float32
    promotes = True

    @property
    def kind(self):
        """Types in the name of the instruction."""
        return f"f32.{self.kinds[0]}.{self.kinds[1]}"

    def number(self, x):
        """A sum as float32, which it is."""
        return x


@dataclasses.dataclass(frozen=True)
class Packed(_PackedRing, Int8):
    """Packed 4-bit weights with an integer per group of inputs and output, INT8 rows.

    Args:
        k: inputs, padded to a multiple of 128.
        m: rows.
        code: "e2m1", whose codes are taken twice, or "int4".
        group: inputs that share a multiplier: 32, 64 or a multiple of 128, or all of them.
        scales: rows of multipliers.
    """

    code: str = "e2m1"
    group: int = 32
    scales: int = 1
    scale_dtype = jnp.uint8

    @property
    def last_group(self) -> int:
        """The last row of multipliers."""
        return self.scales - 1

    def fetch(self, w, s, wg):
        """One step's operand, each byte 128 too large: `finish` has something to do."""
        i32 = ptx.i32
        first, c = _place(wg)
        piece, within = ptx.div(first, i32(16)), ptx.rem(first, i32(16))
        offsets = [8 * ROW_BYTES * i for i in range(2 * GROUPS)]
        rows = []
        for odd in range(2):
            start = _swizzled(ptx.add(ptx.mul(c, i32(2)), i32(odd)), piece)
            out = "r" * len(offsets)
            rows.append(_loads(w, ptx.add(start, within), offsets, "ld.shared.u16", out))
        offsets = [COLUMNS * i for i in range(self.groups)]
        pairs = _loads(s, first, offsets, "ld.shared.u16", "r" * self.groups)
        tables = [self._tables(pair) for pair in pairs]
        words = []
        for i, pair in enumerate(zip(*rows, strict=True)):
            words += self._looked_up(pair, tables[i * self.groups // (2 * GROUPS)])
        return [words]

    def _tables(self, pair):
        """For two outputs, bytes of 128 and the multiples of codes 0 to 7, then of 8 to 15."""
        if self.code == "e2m1":  # twice the number; the upper half has the sign
            values = (0x03020100, 0x0C080604), (-0x03020100, -0x0C080604)
        else:
            values = (0x03020100, 0x07060504), (-0x05060708, -0x01020304)
        text, constants = "{ .reg .b32 i;\n", []
        for output, take in enumerate(("and.b32 i, $8, 255;", "shr.u32 i, $8, 8;")):
            text += take + "\n"
            for entry, value in enumerate((*values[0], *values[1])):
                name = 4 * output + entry
                text += f"mul.lo.s32 ${name}, i, ${9 + entry}; "
                text += f"add.s32 ${name}, ${name}, $13;\n"
                constants.append(value % 2**32)
        constants = [*map(codes.word, constants[:4]), codes.word(0x80808080)]
        return ptx.asm(text + "}", "r" * 8, [pair, *constants])

    def _looked_up(self, pair, tables):
        """Four codes of either output, from two bytes of either."""
        text = (
            "{ .reg .b32 w, o, s, p, n, m;\n"
            "prmt.b32 w, $2, $3, 20800; shl.b32 o, w, 4; and.b32 s, w, $12;\n"  # 0x5140
        )
        for output, signs in enumerate((0x9D8C, 0xBFAE)):  # the sign of a byte, eight times
            if output:
                text += "shr.u32 s, s, 16;\n"
            first = 4 + 4 * output
            text += (
                f"prmt.b32 p, ${first}, ${first + 1}, s; "
                f"prmt.b32 n, ${first + 2}, ${first + 3}, s;\n"
                f"prmt.b32 m, w, o, {signs}; xor.b32 n, n, p; and.b32 n, n, m;\n"
                f"xor.b32 ${output}, p, n;\n"
            )
        return ptx.asm(text + "}", "rr", [*pair, *tables, codes.word(0x77777777)])

    def finish(self, words):
        """The operand."""
        offset = codes.word(0x80808080)
        return [ptx.xor(word, offset) for word in words]


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

    weights: FourBit | Int8 | Fp8 | Packed
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
            def body(a, x, *acc):
                return [_multiply(acc[0] if acc else None, a, x, tile_m, weights.kind)]

            x = (smem["x"].at[slot], _transforms(ROW_BYTES, itemsize))
            sums = [] if acc is None else [(acc, _ACC)]
            return _inline(body, [(a, a_layout), x, *sums], [acc_type])[0]

        def wait(acc, a):
            body = lambda acc, a: [_wait(acc, a)]  # noqa: E731
            return _inline(body, [(acc, _ACC), (a, a_layout)], [acc_type])[0]

        def added(total, acc):
            body = lambda *pair: [[ptx.fadd(x, y) for x, y in zip(*pair, strict=True)]]  # noqa: E731
            return _inline(body, [(total, _ACC), (acc, _ACC)], [acc_type])[0]

        def one_step(step, state):
            total, a = state
            slot, then = lax.rem(step, i32(stages)), lax.rem(step + 1, i32(stages))
            with jax.named_scope("wgmma"):
                acc = multiply(None if weights.promotes else total, a, slot)
            plgpu.barrier_wait(ready.at[then])
            with jax.named_scope("dequant"):
                words = fetch(then)
            acc = wait(acc, a)
            plgpu.barrier_arrive(free.at[slot])
            return added(total, acc) if weights.promotes else acc, finish(words)

        def zeros():
            make = ptx.f32 if acc_type.dtype == jnp.float32 else ptx.i32
            return _inline(lambda: [[make(0)] * (tile_m // 2)], [], [acc_type])[0]

        plgpu.barrier_wait(ready.at[0])
        state = (zeros(), finish(fetch(i32(0))))
        total, a = lax.fori_loop(i32(0), i32(plan.steps - 1), one_step, state)
        slot = (plan.steps - 1) % stages
        acc = wait(multiply(None if weights.promotes else total, a, slot), a)
        acc = added(total, acc) if weights.promotes else acc
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

    With two sums, those of FP8, a tile of more than 160 rows does not fit into the registers.
    """
    wanted = 3 * (current_device().num_sms or 132) // 4
    tiles = (160, 128) if spec.direct == "fp8" else (256, 128)
    fits = [t for t in tiles if pl.cdiv(spec.m, t) * pl.cdiv(spec.n, COLUMNS) >= wanted]
    return Config(tile_m=fits[0] if fits else 64)


def matmul(
    lhs: jax.Array | QTensor, rhs: QTensor, spec: MatmulSpec, config: Config | None = None
) -> jax.Array:
    """Computes the same as `reference.matmul`, with 4-bit weights rounded to bfloat16.

    Weights that are INT8 numbers (``spec.integer``) are not rounded.

    Args:
      lhs: bfloat16 [..., m, k], or an INT8 or FP8 QTensor with a scale per row.
      rhs: packed 4-bit QTensor [k, n], or INT8 or FP8 with a scale per output.
      spec: static facts.
      config: sizes; None chooses.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
    weights: FourBit | Int8 | Fp8 | Packed
    if spec.integer:
        weights, arrays = _integer(lhs, rhs, spec)
    elif spec.widened:
        packed, arrays = codes.prepare(lhs, rhs, spec, (8, FourBit.step, COLUMNS))
        weights = FourBit(packed, spec.m)
    else:
        weights, arrays = _eight_bit(lhs, rhs, spec)
    n = arrays["codes"].shape[1]
    out = _launch(Plan(weights, spec.m, n, spec.out_dtype, config or heuristic(spec)), arrays)
    return out[:, : spec.n].reshape(*lhs.shape[:-1], spec.n)


def _eight_bit(lhs: QTensor, rhs: QTensor, spec: MatmulSpec):
    """8-bit weights and their arrays, padded with zeros."""
    k, n = (-(-size // 128) * 128 for size in (spec.k, spec.n))
    column_scale = xla.spread(rhs.scale.T, rhs.qvalue.shape[1:]).reshape(spec.n)
    if rhs.tensor_scale is not None:
        column_scale = column_scale * rhs.tensor_scale.reshape(())
    arrays = {
        "x": _rows_of_bytes(lhs, spec, k),
        "codes": jnp.pad(_bytes(rhs.qvalue), ((0, k - spec.k), (0, n - spec.n))),
        "row_scale": xla.row_scales(lhs),
        "column_scale": jnp.pad(column_scale, (0, n - spec.n)),
    }
    if spec.direct == "int8":
        return Int8(k, spec.m), arrays
    return Fp8(k, spec.m, (FP8_KINDS[spec.rhs.code_dtype], FP8_KINDS[spec.lhs.code_dtype])), arrays


def _integer(lhs: QTensor, rhs: QTensor, spec: MatmulSpec):
    """4-bit weights that become INT8 numbers and their arrays, padded with zeros.

    A scale is a multiplier times the factor of its output, ``top / steps``. One that is NaN makes
    its output NaN, whatever its codes.
    """
    k, n = (-(-size // 128) * 128 for size in (spec.rhs.stored_k, spec.n))
    columns, steps = (0, n - spec.n), spec.rhs.steps
    scale = rhs.scale.astype(jnp.float32)
    is_nan = jnp.isnan(scale)
    scale = jnp.where(is_nan, 0.0, scale)
    top = jnp.max(scale, axis=0)
    multipliers = jnp.rint(scale / jnp.where(top == 0, 1.0, top) * steps).astype(jnp.uint8)
    factor = top * (CODE_RANGE[spec.rhs.packed][1] / steps)
    if rhs.tensor_scale is not None:
        factor = factor * rhs.tensor_scale.reshape(())
    arrays = {
        "x": _rows_of_bytes(lhs, spec, k),
        "codes": jnp.pad(rhs.qvalue, ((0, k // 2 - rhs.qvalue.shape[0]), columns)),
        "scale": jnp.pad(multipliers, ((0, 0), columns)),
        "row_scale": xla.row_scales(lhs),
        "column_scale": jnp.pad(jnp.where(is_nan.any(0), jnp.nan, factor), columns),
    }
    group = k if spec.rhs.k_tiles == 1 else spec.rhs.group
    return Packed(k, spec.m, CODES[spec.rhs.packed], group, spec.rhs.k_tiles), arrays


def _rows_of_bytes(lhs: QTensor, spec: MatmulSpec, k: int) -> jax.Array:
    x = _bytes(lhs.qvalue).reshape(spec.m, spec.k)
    return jnp.pad(x, ((0, -spec.m % 8), (0, k - spec.k)))


def _bytes(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.int8)
