# SPDX-License-Identifier: Apache-2.0
"""How the products of many rows share a block: a memory warpgroup feeds two that multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTE = 2  # warpgroups that multiply; one more copies


def warpgroups(smem, arrivals: int, config, memory, compute):
    """Runs both roles of a block around a ring of stages.

    Args:
        smem: what lies in shared memory, by name.
        arrivals: at the barrier of a stage that is filled.
        config: with "num_stages" and "cluster".
        memory: ``(smem, ready, free)``, of the memory warpgroup.
        compute: ``(warpgroup, smem, ready, free)``, of the others.
    """
    ready = plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.num_stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.num_stages)
    if config.cluster > 1:
        free = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=COMPUTE, num_barriers=config.num_stages
        )

    def body(smem, ready, free):
        wg = lax.axis_index("wg")

        @pl.when(wg == COMPUTE)
        def _memory():
            plgpu.set_max_registers(40, action="decrease")
            memory(smem, ready, free)

        @pl.when(wg < COMPUTE)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            compute(wg, smem, ready, free)

    pl.run_scoped(body, smem, ready, free, collective_axes="wg")


def launch(kernel, plan, blocks: int, *arrays: jax.Array) -> jax.Array:
    """Runs a kernel of such blocks.

    Args:
        kernel: of references to the arrays and to the output.
        plan: with "m", "n", "out_dtype" and "config".
        blocks: clusters of blocks.
        arrays: operands.

    Returns:
        [m, n].
    """
    cluster = {}
    if plan.config.cluster > 1:
        cluster = {"cluster": (plan.config.cluster,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.dtype(plan.out_dtype)),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        **cluster,
    )(*arrays)
