# SPDX-License-Identifier: Apache-2.0
"""Many rows times 4-bit weights on Hopper: codes become the register operand of ``wgmma``.

``out^T = W^T x^T``: two *compute* warpgroups own 64 outputs each and all rows of a tile of x; a
*memory* warpgroup feeds both through a ring in shared memory. At each step of 64 inputs a compute
warpgroup starts the products of this step, turns the next step's codes into bfloat16 operands
meanwhile, and then waits for the products. So the weights are dequantised once for a whole tile of
x, in the shadow of the tensor cores, and never written anywhere.

The rows of an operand are outputs in an order that puts neighbours into one thread, which then
reads the codes of both with one load and writes them as one word. Blocks of a cluster work on the
same rows of x: each fetches a part of them for all.

What is rounded: a weight once, to bfloat16 (E2M1 times an e4m3 or e8m0 scale is exact), and the
result. A scale of the tensor multiplies the float32 sum.

References: Marlin (arXiv 2408.11743), section 3; PTX ISA 8.4, ``wgmma.mma_async``.
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
from pallas_kernels.formats import QTensor
from pallas_kernels.ops.matmul import mosaic_sm90_codes as codes
from pallas_kernels.ops.matmul.mosaic_sm90_codes import Weights
from pallas_kernels.ops.matmul.spec import UNIT, MatmulSpec

COMPUTE = 2  # warpgroups
OWN = 64  # outputs of a warpgroup
COLUMNS = COMPUTE * OWN  # outputs of a block
STEP = 64  # inputs of a step: 128 bytes of x, 32 rows of bytes of codes
UNITS = STEP // UNIT
_SWIZZLE = 128
_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that change speed only.

    Args:
        tile_m: rows of x of a block, a multiple of 8 up to 256.
        num_stages: slots of the ring.
        cluster: blocks that share the same rows of x: 1 or 2.
        across: tiles of x that run side by side.
        late: scales are multiplied after the wait for the products; else before, and the loop has
            two steps, without which ptxas would let one group of products wait for another.
    """

    tile_m: int = 256
    num_stages: int = 5
    cluster: int = 2
    across: int = 8
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of the kernel.

    Args:
        weights: of the weights.
        m: rows of x.
        out_dtype: name of the dtype of the result.
        config: sizes.
    """

    weights: Weights
    m: int
    out_dtype: str
    config: Config

    @property
    def steps(self) -> int:
        """Steps of a block."""
        return pl.cdiv(2 * self.weights.rows, STEP)

    @property
    def row_tiles(self) -> int:
        """Tiles of x."""
        return pl.cdiv(self.m, self.config.tile_m)

    @property
    def clusters(self) -> int:
        """Clusters for one tile of x."""
        return pl.cdiv(self.weights.n, COLUMNS * self.config.cluster)

    @property
    def groups(self) -> int:
        """Groups of a step: rows of scales."""
        return max(STEP // self.weights.group, 1)

    def tile_of(self, block):
        """Tile of x and cluster of a block's number; neighbours share both as far as possible."""
        across = min(self.config.across, self.row_tiles)
        band, rest = lax.div(block, across * self.clusters), lax.rem(block, across * self.clusters)
        wide = jnp.minimum(across, self.row_tiles - band * across)
        return band * across + lax.rem(rest, wide), lax.div(rest, wide)


def _transforms(itemsize: int):
    return (plgpu.TilingTransform((8, _SWIZZLE // itemsize)), plgpu.SwizzleTransform(_SWIZZLE))


def _inline(body, inputs, outs=()):
    """Runs ``body`` on registers: a list of them per array, a memref per reference.

    Args:
        body: returns a list of registers per output.
        inputs: pairs of an array and its layout, or of a reference and its transforms.
        outs: shapes, dtypes and layouts of the results.
    """
    types = tuple(plgpu.RefType(t) if isinstance(t, tuple) else t for _, t in inputs)

    @plgpu.inline_mgpu(arg_types=types, return_type=tuple(outs) or None)
    def run(ctx, *given):
        del ctx
        refs = [isinstance(t, plgpu.RefType) for t in types]
        values = body(*[g if ref else ptx.unpack(g) for g, ref in zip(given, refs, strict=True)])
        if not outs:
            return None
        return tuple(
            ptx.pack(v, o.shape, o.layout, o.dtype) for v, o in zip(values, outs, strict=True)
        )

    result = run(*(x for x, _ in inputs))
    return list(result) if outs else []


def _multiply(acc, a, x, rows: int):
    """Starts ``acc += A @ x^T`` for a step; A in registers, x [rows, 64] in shared memory."""
    atom = 8 * _SWIZZLE
    base = mma_utils.encode_descriptor(
        x, leading_byte_offset=0, stride_byte_offset=atom, swizzle=_SWIZZLE
    )
    count = len(acc)
    tile = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    lines, operands = [], []
    for unit in range(UNITS):
        names = [f"${2 * count + 5 * unit + i}" for i in range(5)]
        operands += [*a[4 * unit : 4 * unit + 4], ptx.add(base, ptx.i64(32 * unit >> 4))]
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 {tile}, "
            f"{{{','.join(names[:4])}}}, {names[4]}, yes, 1, 1, 0;"
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


def _loads(ref, start, offsets, kind: str, out: str):
    """Loads of shared memory at constant distances from a place (i32)."""
    per = len(out) // len(offsets)
    lines = []
    for i, offset in enumerate(offsets):
        names = [f"${per * i + j}" for j in range(per)]
        names = names[0] if per == 1 else "{" + ", ".join(names) + "}"
        lines.append(f"ld.shared.{kind} {names}, [${len(out)}+{offset}];")
    return ptx.asm("\n".join(lines), out, [ptx.address(ref, ptx.widen(start))], effects=True)


def _fetch(weights: Weights, groups: int, w, s, wg):
    """Codes of one step's operand A as bfloat16, and words of their scales.

    Args:
        weights: facts.
        groups: rows of scales.
        w: codes in shared memory, uint8 [32, 128], swizzled.
        s: scales in shared memory, [groups, 128].
        wg: number of the warpgroup, i32.
    """
    first, c = _place(wg)
    # Row r of bytes lies swizzled: its 16-byte pieces are exchanged by r % 8.
    piece, within = ptx.div(first, ptx.i32(16)), ptx.rem(first, ptx.i32(16))
    halves = []
    for half in range(2):
        row = ptx.add(c, ptx.i32(4 * half))
        start = ptx.mul(ptx.xor(piece, row), ptx.i32(16))
        start = ptx.add(ptx.add(start, within), ptx.mul(row, ptx.i32(_SWIZZLE)))
        offsets = [8 * _SWIZZLE * unit for unit in range(UNITS)]
        halves.append(_loads(w, start, offsets, "u16", "r" * UNITS))
    size = weights.scale_bytes
    start = ptx.mul(first, ptx.i32(size))
    offsets = [size * COLUMNS * i for i in range(groups)]
    kind, out = ("v2.b32", "ff") if size == 4 else ("u16", "r")
    raw = _loads(s, start, offsets, kind, out * groups)
    per = len(out)
    scales = [codes.scale_pairs(weights.scale, raw[per * i : per * i + per]) for i in range(groups)]
    words = []
    for low, high in zip(*halves, strict=True):
        four = ptx.asm("prmt.b32 $0, $1, $2, 21520;", "r", [low, high])[0]  # 0x5410
        words += codes.code_pairs(weights.code, four)
    return words, [x for two in scales for pair in two for x in pair if x is not None]


def _scaled(words, scales, groups: int):
    """Operand A of a step: what `_fetch` returned, multiplied."""
    rests = len(scales) // (2 * groups) - 1
    out = []
    for i, pair in enumerate(words):
        at = (i // 4 * groups // UNITS * 2 + i % 2) * (1 + rests)
        out.append(codes.times(pair, (scales[at], scales[at + 1] if rests else None)))
    return out


def _store(plan: Plan, out, acc, factor, row, column, wg):
    """Writes a warpgroup's tile, two neighbouring outputs at a time."""
    first, c = _place(wg)
    column = ptx.add(column, first)
    there = ptx.lt(column, ptx.i32(plan.weights.n))
    row = ptx.add(row, ptx.mul(c, ptx.i32(2)))
    size = jnp.dtype(plan.out_dtype).itemsize
    for j in range(plan.config.tile_m // 8):
        for d in range(2):
            here = ptx.add(row, ptx.i32(8 * j + d))
            values = [acc[4 * j + d], acc[4 * j + 2 + d]]
            if factor is not None:
                values = [ptx.fmul(x, factor) for x in values]
            if size == 2:
                values = [ptx.half_x2(values, plan.out_dtype)]
            where = ptx.mul(ptx.widen(here), ptx.i64(plan.weights.n))
            where = ptx.mul(ptx.add(where, ptx.widen(column)), ptx.i64(size))
            ptx.store(out, where, values, ptx.both(there, ptx.lt(here, ptx.i32(plan.m))))


def _kernel(plan: Plan, names: tuple[str, ...]):
    """Builds the kernel's entry function; ``names`` are those of its operands."""
    config, weights = plan.config, plan.weights
    stages, tile_m, i32 = config.num_stages, config.tile_m, jnp.int32
    acc_type = plgpu.ShapeDtypeStruct((OWN, tile_m), jnp.float32, layout=_ACC)
    a_type = plgpu.ShapeDtypeStruct((OWN, STEP), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    scale_words = 2 * plan.groups * (2 if weights.scale == "float32" else 1)
    scales_type = plgpu.ShapeDtypeStruct(
        (OWN, -(-scale_words // 4) * 16), jnp.bfloat16, layout=plgpu.Layout.WGMMA
    )
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
        last = max(2 * weights.rows // weights.group, 1) - 1

        def load(step, _):
            slot = lax.rem(step, i32(stages))
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            source = refs["x"].at[pl.ds(row, tile_m), pl.ds(step * STEP, STEP)]
            plgpu.copy_gmem_to_smem(source, smem["x"].at[slot], ready.at[slot], **collective)
            source = refs["codes"].at[pl.ds(step * (STEP // 2), STEP // 2), pl.ds(column, COLUMNS)]
            plgpu.copy_gmem_to_smem(source, smem["codes"].at[slot], ready.at[slot])
            if weights.group < STEP:
                group = step * plan.groups
            else:
                group = jnp.minimum(lax.div(step * STEP, i32(weights.group)), last)
            source = refs["scale"].at[pl.ds(group, plan.groups), pl.ds(column, COLUMNS)]
            plgpu.copy_gmem_to_smem(source, smem["scale"].at[slot], ready.at[slot])
            return _

        lax.fori_loop(i32(0), i32(plan.steps), load, i32(0))
        # Nothing of another block may arrive after this one has ended.
        for step in range(max(plan.steps - stages, 0), plan.steps):
            plgpu.barrier_wait(free.at[step % stages])

    def compute_group(wg, refs, smem, ready, free):
        row, column = place()
        w_transforms, x_transforms = _transforms(1), _transforms(2)

        def fetch(slot):
            """Words of the operand, and of its scales if they are to be multiplied later."""

            def body(w, s, wg):
                words, scales = _fetch(weights, plan.groups, w, s, wg[0])
                if not config.late:
                    return [_scaled(words, scales, plan.groups)]
                return [words, scales + scales[:1] * (-len(scales) % 4)]

            inputs = [(smem["codes"].at[slot], w_transforms), (smem["scale"].at[slot], ())]
            outs = [a_type, *[scales_type] * config.late]
            return _inline(body, [*inputs, (wg, _SCALAR)], outs)

        def finish(words, *scales):
            if not config.late:
                return words
            body = lambda a, s: [_scaled(a, s[:scale_words], plan.groups)]  # noqa: E731
            inputs = [(words, a_type.layout), (scales[0], scales_type.layout)]
            return _inline(body, inputs, [a_type])[0]

        def multiply(acc, a, slot):
            body = lambda acc, a, x: [_multiply(acc, a, x, tile_m)]  # noqa: E731
            inputs = [(acc, _ACC), (a, a_type.layout), (smem["x"].at[slot], x_transforms)]
            return _inline(body, inputs, [acc_type])[0]

        def wait(acc, a):
            body = lambda acc, a: [_wait(acc, a)]  # noqa: E731
            return _inline(body, [(acc, _ACC), (a, a_type.layout)], [acc_type])[0]

        def one_step(step, state):
            acc, a = state
            slot, then = lax.rem(step, i32(stages)), lax.rem(step + 1, i32(stages))
            with jax.named_scope("wgmma"):
                acc = multiply(acc, a, slot)
            plgpu.barrier_wait(ready.at[then])
            with jax.named_scope("dequant"):
                following = fetch(then)
            acc = wait(acc, a)
            plgpu.barrier_arrive(free.at[slot])
            return acc, finish(*following)

        zeros = lambda: [[ptx.f32(0.0)] * (tile_m // 2)]  # noqa: E731
        acc = _inline(zeros, [], [acc_type])[0]
        plgpu.barrier_wait(ready.at[0])
        state = (acc, finish(*fetch(i32(0))))
        alone, per = (plan.steps - 1) % 2, 1 if config.late else 2
        if per == 2 and alone:
            state = one_step(i32(0), state)
        alone *= per - 1

        def some_steps(i, state):
            for j in range(per):
                state = one_step(alone + per * i + j, state)
            return state

        acc, a = lax.fori_loop(i32(0), i32((plan.steps - 1) // per), some_steps, state)
        slot = (plan.steps - 1) % stages
        acc = wait(multiply(acc, a, slot), a)
        plgpu.barrier_arrive(free.at[slot])
        scalars = [(x, _SCALAR) for x in (row, column, wg)]
        if weights.tensor_scale:
            scalars.append((refs["tensor_scale"][0], _SCALAR))

        def body(out, acc, row, column, wg, *factor):
            factor = factor[0][0] if factor else None
            _store(plan, out, acc, factor, row[0], column[0], wg[0])
            return []

        with jax.named_scope("epilogue"):
            _inline(body, [(refs["out"], ()), (acc, _ACC), *scalars])

    def entry(*refs):
        refs = dict(zip((*names, "out"), refs, strict=True))
        scale_dtype = jnp.float32 if weights.scale == "float32" else jnp.uint8
        smem = {
            "x": plgpu.SMEM((stages, tile_m, STEP), jnp.bfloat16, transforms=_transforms(2)),
            "codes": plgpu.SMEM((stages, STEP // 2, COLUMNS), jnp.uint8, transforms=_transforms(1)),
            "scale": plgpu.SMEM((stages, plan.groups, COLUMNS), scale_dtype),
        }
        ready = plgpu.Barrier(num_arrivals=3, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
        if config.cluster > 1:
            free = plgpu.ClusterBarrier(
                collective_axes=("cluster",), num_arrivals=COMPUTE, num_barriers=stages
            )

        def body(smem, ready, free):
            wg = lax.axis_index("wg")

            @pl.when(wg == COMPUTE)
            def _memory():
                plgpu.set_max_registers(40, action="decrease")
                memory_group(refs, smem, ready, free)

            @pl.when(wg < COMPUTE)
            def _compute():
                plgpu.set_max_registers(232, action="increase")
                compute_group(wg, refs, smem, ready, free)

        pl.run_scoped(body, smem, ready, free, collective_axes="wg")

    return entry


def matmul(
    lhs: jax.Array, rhs: QTensor, spec: MatmulSpec, config: Config | None = None
) -> jax.Array:
    """Computes the same as `reference.matmul` with weights rounded to bfloat16.

    Args:
      lhs: bfloat16 [..., m, k].
      rhs: packed 4-bit QTensor [k, n].
      spec: static facts.
      config: sizes; None chooses.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
    weights, arrays = codes.prepare(lhs, rhs, spec, (8, STEP, COLUMNS))
    plan = Plan(weights, spec.m, spec.out_dtype, config or Config())
    cluster = {}
    if plan.config.cluster > 1:
        cluster = {"cluster": (plan.config.cluster,), "cluster_names": ("cluster",)}
    out = plgpu.kernel(
        _kernel(plan, tuple(arrays)),
        out_type=jax.ShapeDtypeStruct((spec.m, weights.n), jnp.dtype(spec.out_dtype)),
        grid=(plan.row_tiles * plan.clusters,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        **cluster,
    )(*arrays.values())
    return out[:, : spec.n].reshape(*lhs.shape[:-1], spec.n)
