# SPDX-License-Identifier: Apache-2.0
"""FP8 codes with a scale per 128 inputs on Hopper: sums are promoted to float32 and scaled there.

The tensor core's FP8 accumulator keeps about 14 bits, and scales change along the contraction. So
two *compute* warpgroups multiply 64 rows each by 128 columns over 128 inputs at a time, into a
fresh tile, and add it to float32 sums with the scales of its rows and columns; while one of them
adds, the other one multiplies. A *memory* warpgroup feeds both through a ring in shared memory.
The blocks of a cluster work on the same columns: each fetches a part of them for all.

Both operands lie with the contracted axis last, as 8-bit ``wgmma`` wants them.

References: DeepSeek-V3 (arXiv 2412.19437), section 3.3; PTX ISA 8.4, ``wgmma.mma_async``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels.formats import QTensor
from pallas_kernels.ops.attention.mosaic_sm90_kernel import (
    _inline,
    _k_major,
    _transforms,
    _wait,
    _wgmma,
)
from pallas_kernels.ops.matmul.mosaic_sm90_groups import COMPUTE, launch, warpgroups
from pallas_kernels.ops.matmul.spec import BLOCK_K, FP8_KINDS, MatmulSpec

ROWS = 64  # of a warpgroup
COLUMNS = 128  # of a block; also what shares a scale of square tiles
_SWIZZLE = 128
_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COL = plgpu.Layout.WGMMA.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that change speed only.

    Args:
        num_stages: slots of the ring.
        cluster: blocks that share the same columns: 1 or 2.
        across: clusters that run side by side on the same columns.
    """

    num_stages: int = 5
    cluster: int = 2
    across: int = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of the kernel.

    Args:
        m: rows of the left operand.
        n: rows of the right one, columns of the result.
        k: contracted length, a multiple of 128.
        kinds: "e4m3" or "e5m2" of both operands.
        column_scales: whether each column has scales of its own, else squares of 128 share one.
        out_dtype: name of the dtype of the result.
        config: sizes.
    """

    m: int
    n: int
    k: int
    kinds: tuple[str, str]
    column_scales: bool
    out_dtype: str
    config: Config

    @property
    def steps(self) -> int:
        """Steps of 128 inputs."""
        return self.k // BLOCK_K

    @property
    def row_clusters(self) -> int:
        """Clusters for one tile of columns."""
        return pl.cdiv(self.m, COMPUTE * ROWS * self.config.cluster)

    @property
    def column_tiles(self) -> int:
        """Tiles of columns."""
        return pl.cdiv(self.n, COLUMNS)

    def tile_of(self, block):
        """Cluster of rows and tile of columns of a block: bands of rows, column by column."""
        across = min(self.config.across, self.row_clusters)
        band, rest = (f(block, across * self.column_tiles) for f in (lax.div, lax.rem))
        wide = jnp.minimum(across, self.row_clusters - band * across)
        return band * across + lax.rem(rest, wide), lax.div(rest, wide)


def _promoted(total, tile, rows, columns, column_scales: bool):
    """``total + tile · rows · columns``; register 4j + 2h + c is row h and column 2j + c."""
    if column_scales:
        tile = [ptx.fmul(x, rows[i // 2 % 2]) for i, x in enumerate(tile)]
        factors = [columns[i // 4 * 2 + i % 2] for i in range(len(tile))]
    else:
        both = [ptx.fmul(x, columns[0]) for x in rows]
        factors = [both[i // 2 % 2] for i in range(len(tile))]
    return [ptx.fma(*x) for x in zip(tile, factors, total, strict=True)]


def _kernel(plan: Plan):
    """Builds the kernel's entry function of (a, b, a_scale, b_scale, out)."""
    config, i32 = plan.config, jnp.int32
    stages = config.num_stages
    transforms = _transforms(_SWIZZLE)
    tile_type = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, layout=_ACC)
    out_type = plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, layout=plgpu.Layout.WGMMA)
    shared = {"collective_axes": ("cluster",)} if config.cluster > 1 else {}

    def place():
        """First row and first column of this block."""
        cluster, column_tile = plan.tile_of(lax.axis_index("block"))
        tile = cluster * config.cluster
        if config.cluster > 1:
            tile += lax.axis_index("cluster")
        return tile * COMPUTE * ROWS, column_tile * COLUMNS

    def memory_group(a, b, smem, ready, free):
        row, column = place()

        def load(step, _):
            slot, inputs = lax.rem(step, i32(stages)), pl.ds(step * BLOCK_K, BLOCK_K)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for wg in range(COMPUTE):
                source = a.at[pl.ds(row + wg * ROWS, ROWS), inputs]
                plgpu.copy_gmem_to_smem(source, smem["a"].at[slot, wg], ready.at[slot])
            source = b.at[pl.ds(column, COLUMNS), inputs]
            plgpu.copy_gmem_to_smem(source, smem["b"].at[slot], ready.at[slot], **shared)
            return _

        lax.fori_loop(i32(0), i32(plan.steps), load, i32(0))
        # Nothing of another block may arrive after this one has ended.
        for step in range(max(plan.steps - stages, 0), plan.steps):
            plgpu.barrier_wait(free.at[step % stages])

    def compute_group(wg, a_scale, b_scale, out, smem, ready, free):
        row, column = place()
        row = row + wg * ROWS

        def scales(step):
            rows = a_scale.at[step, pl.ds(row, ROWS)]
            rows = plgpu.load(rows, layout=_ROW, optimized=False)
            if not plan.column_scales:
                return rows, b_scale[step, lax.div(column, i32(COLUMNS))]
            columns = b_scale.at[step, pl.ds(column, COLUMNS)]
            return rows, plgpu.load(columns, layout=_COL, optimized=False)

        def multiply(slot):
            kind = f"f32.{plan.kinds[0]}.{plan.kinds[1]}"
            body = lambda a, b: [  # noqa: E731
                _wgmma(COLUMNS, _k_major(a, _SWIZZLE), _k_major(b, _SWIZZLE), "f", kind)
            ]
            inputs = [(smem["a"].at[slot, wg], transforms), (smem["b"].at[slot], transforms)]
            return _inline(body, inputs, [tile_type])[0]

        def wait(tile):
            return _inline(lambda tile: [_wait(0, tile)], [(tile, _ACC)], [tile_type])[0]

        def add(total, tile, rows, columns):
            body = lambda *given: [_promoted(*given, plan.column_scales)]  # noqa: E731
            layout = _COL if plan.column_scales else _SCALAR
            inputs = [(total, _ACC), (tile, _ACC), (rows, _ROW), (columns, layout)]
            return _inline(body, inputs, [tile_type])[0]

        def one_step(step, state):
            total, rows, columns = state
            slot = lax.rem(step, i32(stages))
            plgpu.barrier_wait(ready.at[slot])
            with jax.named_scope("wgmma"):
                tile = multiply(slot)
            following = scales(jnp.minimum(step + 1, i32(plan.steps - 1)))
            tile = wait(tile)
            plgpu.barrier_arrive(free.at[slot])
            with jax.named_scope("promote"):
                return add(total, tile, rows, columns), *following

        zeros = lambda: [[ptx.f32(0.0)] * (ROWS * COLUMNS // 128)]  # noqa: E731
        state = (_inline(zeros, [], [tile_type])[0], *scales(i32(0)))
        total, *_ = lax.fori_loop(i32(0), i32(plan.steps), one_step, state)
        with jax.named_scope("epilogue"):
            total = _inline(lambda x: [x], [(total, _ACC)], [out_type])[0]
            smem["out"].at[wg][...] = total.astype(plan.out_dtype)
            plgpu.commit_smem()
            target = out.at[pl.ds(row, ROWS), pl.ds(column, COLUMNS)]
            plgpu.copy_smem_to_gmem(smem["out"].at[wg], target)
            plgpu.wait_smem_to_gmem(0)

    def entry(a, b, a_scale, b_scale, out):
        itemsize = jnp.dtype(plan.out_dtype).itemsize
        smem = {
            "a": plgpu.SMEM((stages, COMPUTE, ROWS, BLOCK_K), a.dtype, transforms=transforms),
            "b": plgpu.SMEM((stages, COLUMNS, BLOCK_K), b.dtype, transforms=transforms),
            "out": plgpu.SMEM(
                (COMPUTE, ROWS, COLUMNS),
                jnp.dtype(plan.out_dtype),
                transforms=_transforms(_SWIZZLE, itemsize),
            ),
        }
        warpgroups(
            smem, COMPUTE + 1, config,
            lambda *given: memory_group(a, b, *given),
            lambda wg, *given: compute_group(wg, a_scale, b_scale, out, *given),
        )  # fmt: skip

    return entry


def block_scaled(a, b, a_scale, b_scale, out_dtype="bfloat16", config: Config | None = None):
    """``sum over tiles of k of (a tile · b tileᵀ) · a_scale · b_scale``, in float32.

    Args:
        a: e4m3 or e5m2 [m, k], k a multiple of 128.
        b: e4m3 or e5m2 [n, k].
        a_scale: float32 [k / 128, m].
        b_scale: float32 [k / 128, n], or [k / 128, ceil(n / 128)] for squares.
        out_dtype: bfloat16, float16 or float32.
        config: sizes; None takes the usual ones.

    Returns:
        [m, n].
    """
    (m, k), n = a.shape, b.shape[0]
    column_scales = b_scale.shape[1] == n and n != pl.cdiv(n, COLUMNS)
    kinds = tuple(FP8_KINDS[str(x.dtype)] for x in (a, b))
    plan = Plan(m, n, k, kinds, column_scales, str(jnp.dtype(out_dtype)), config or Config())
    # Scales are read by plain loads, whose tiles must not end beyond the array.
    rows = plan.row_clusters * plan.config.cluster * COMPUTE * ROWS
    a_scale = jnp.pad(a_scale, ((0, 0), (0, rows - m)))
    if column_scales:
        b_scale = jnp.pad(b_scale, ((0, 0), (0, -n % COLUMNS)))
    blocks = plan.row_clusters * plan.column_tiles
    return launch(_kernel(plan), plan, blocks, a, b, a_scale, b_scale)


def matmul(lhs: QTensor, rhs: QTensor, spec: MatmulSpec) -> jax.Array:
    """Computes the same as `xla.matmul` for tiles of 128 inputs.

    Args:
        lhs: fp8 [..., m, k] with scales [..., m, k / 128].
        rhs: fp8 [k, n] with scales [k / 128, n] or [k / 128, n / 128].
        spec: static facts.

    Returns:
        [..., m, n] in ``spec.out_dtype``.
    """
    a = lhs.qvalue.reshape(spec.m, spec.k)
    a_scale = lhs.scale.reshape(spec.m, -1).T.astype(jnp.float32)
    out = block_scaled(a, rhs.qvalue.T, a_scale, rhs.scale.astype(jnp.float32), spec.out_dtype)
    return out.reshape(*lhs.shape[:-1], spec.n)
