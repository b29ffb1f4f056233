# SPDX-License-Identifier: Apache-2.0
"""Gradient of attention on Hopper in 16 bits, from the saved log-sum-exp.

Two kernels of one shape. A block owns 128 rows of one side, 64 for each of two compute warpgroups,
and a memory warpgroup streams tiles of the other side past them::

    P = exp(scale Q K^T - lse)    dS = P (dO V^T - delta)    delta = sum(dO O) - d lse
    dQ = scale dS K               dK = scale dS^T Q          dV = P^T dO

The kernel of queries adds dQ up, the kernel of keys walks over all query heads of its key head and
adds dK and dV up, so that nothing is added in memory and repeated runs agree to the bit. The price
is that Q K^T and dO V^T are made twice: seven products, where atomic additions would need five. The
kernel of keys computes the transposes, whose P and dS are then operands as they lie in registers.

References: FlashAttention-2 (arXiv 2307.08691), section 3.1.2; FlashAttention-3 (arXiv 2407.08608),
appendix B.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ops.attention.mosaic_sm90_kernel import _swizzle, _transforms
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config, Plan, div
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, ROWS, Variant

HEAD_DIMS = (64, 128)
COMPUTE = 2  # warpgroups
_ACC = plgpu.Layout.WGMMA
_SIDE = {"q": _ACC.reduce(1), "kv": _ACC.reduce(0)}  # of numbers per query


def gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    min_diff: int | None = None,
    max_diff: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ, dK and dV of attention in which query t sees ``min_diff <= s - t <= max_diff``.

    Args:
        query: bfloat16 or float16 [B, T, N, H], H one of `HEAD_DIMS`.
        key: [B, S, K, H].
        value: [B, S, K, H].
        d_out: like the query.
        lse: natural log-sum-exp, float32 [B, N, T], -inf for rows with nothing to attend.
        delta: ``sum(d_out * out) - d_lse``, float32 [B, N, T].
        scale: factor on the logits.
        min_diff: lower bound, or None.
        max_diff: upper bound, or None.

    Returns:
        Arrays like query, key and value.
    """
    (batch, q_len, num_heads, head_dim), (_, kv_len, num_kv_heads, _) = query.shape, key.shape
    whole = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))  # noqa: E731
    # Rows without keys, and those beyond the end, get P = exp(-inf) = 0.
    pad = ((0, 0), (0, 0), (0, -q_len % 128))
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * LOG2E
    lse = jnp.pad(lse, pad, constant_values=jnp.inf)
    delta = jnp.pad(delta, pad)
    arrays = [*map(whole, (query, key, value, d_out)), lse, delta]
    low, high = (None if x is None else -x for x in (max_diff, min_diff))
    variant = Variant("half", "half", str(query.dtype))

    def plan(block, rows, columns, heads, *bounds):
        bounded = tuple(x is not None for x in bounds)
        config = Config(block_kv=block, num_stages=2 if block == 128 else 4, qk_split=1)
        return Plan(
            config, variant, batch, rows, columns, heads, num_kv_heads, head_dim, block, *bounds,
            bounded,
        )  # fmt: skip

    (dq,) = _launch("q", plan(128, q_len, kv_len, num_heads, min_diff, max_diff), arrays, scale)
    dk, dv = _launch(
        "kv", plan(64, kv_len, q_len, num_kv_heads, low, high), arrays, scale,
    )  # fmt: skip
    return dq, dk, dv


def _products(*operands, shape):
    """Products ``A B^T`` of pairs of references in shared memory."""

    def run(*sums):
        for total, (a, b) in zip(sums, operands, strict=True):
            plgpu.wgmma(total, a, b.transpose((1, 0)))
        return [total[...] for total in sums]

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * len(operands))


def _add(sums, operands):
    """``sum + A B`` for pairs of an array, rounded to 16 bits, and a reference."""

    def run(totals):
        for total, (a, b) in zip(totals, operands, strict=True):
            plgpu.wgmma(total, a.astype(b.dtype), b)

    return tuple(pl.run_state(run)(tuple(map(plgpu.ACC.init, sums))))


def _kernel(side: str, plan: Plan, groups: int, scale: float, dtype):
    """Builds one kernel's entry function.

    Args:
        side: "q" owns queries and streams keys, "kv" owns keys and streams queries.
        plan: sizes, in which "rows" are those of the owner.
        groups: query heads of a key head.
        scale: factor on the logits.
        dtype: of everything but lse and delta.
    """
    config, head_dim, block = plan.config, plan.head_dim, plan.config.block_kv
    stages, i32 = config.num_stages, jnp.int32
    of_queries = side == "q"
    heads = 1 if of_queries else groups  # streamed heads for each head of the owner
    transforms = _transforms(_swizzle(head_dim * 2), 2)

    def place():
        """Tile, batch and head of this block's rows; the longest walks come first."""
        index = lax.axis_index("block")
        head, tile = div(index, plan.q_tiles), lax.rem(index, i32(plan.q_tiles))
        if of_queries:
            tile = plan.q_tiles - 1 - tile
        return tile, div(head, plan.num_heads), lax.rem(head, i32(plan.num_heads))

    def streamed_head(head, j):
        return div(head, groups) if of_queries else head * groups + j

    def memory_group(own, ring, refs, ready, free):
        (own_ready, first_ready, second_ready) = ready
        tile, b, head = place()
        for w in range(COMPUTE):
            rows = pl.ds(tile * COMPUTE * ROWS + w * ROWS, ROWS)
            for ref, smem in zip(refs["own"], own, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, head], smem.at[w], own_ready.at[w])
        lo, _, _, hi = (jnp.asarray(x, i32) for x in plan.kv_tiles(tile))

        def load(step, _):
            slot = lax.rem(step, i32(stages))
            columns = pl.ds((lo + lax.rem(step, hi - lo)) * block, block)
            where = (b, columns, streamed_head(head, lax.div(step, hi - lo)))
            parts = zip(refs["ring"], ring, (first_ready, second_ready), free, strict=True)
            for ref, smem, filled, empty in parts:
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(ref.at[where], smem.at[slot], filled.at[slot])

        lax.fori_loop(i32(0), (hi - lo) * heads, load, None)

    def compute_group(wg, own, ring, refs, ready, free):
        (own_ready, first_ready, second_ready) = ready
        own_a, own_b = (smem.at[wg] for smem in own)
        tile, b, head = place()
        lo, mid_lo, mid_hi, hi = (jnp.asarray(x, i32) for x in plan.kv_tiles(tile))
        start = tile * COMPUTE * ROWS + wg * ROWS
        shape = (ROWS, block)

        def per_query(name, n, first, size):
            where = refs[name].at[b, n, pl.ds(first, size)]
            return plgpu.load(where, layout=_SIDE[side], optimized=False)

        def wide(x):
            return lax.broadcast_in_dim(x, shape, [0 if of_queries else 1])

        for slot in range(stages):
            for empty in free:
                plgpu.barrier_arrive(empty.at[slot])
        plgpu.barrier_wait(own_ready.at[wg])
        if of_queries:
            fixed = [per_query(name, head, start, ROWS) for name in ("lse", "delta")]

        def one_step(i, sums, j, is_masked):
            step = j * (hi - lo) + i - lo
            slot = lax.rem(step, i32(stages))
            first, second = (smem.at[slot] for smem in ring)
            lse, delta = fixed if of_queries else [
                per_query(name, streamed_head(head, j), i * block, block)
                for name in ("lse", "delta")
            ]  # fmt: skip
            plgpu.barrier_wait(first_ready.at[slot])
            plgpu.barrier_wait(second_ready.at[slot])

            scores, d_p = _products((own_a, first), (own_b, second), shape=shape)
            if of_queries:
                plgpu.barrier_arrive(free[1].at[slot])
            p = jnp.exp2(scores * (scale * LOG2E) - wide(lse))
            d_s = p * (d_p - wide(delta))
            if is_masked:
                ok = allowed(i)
                p, d_s = jnp.where(ok, p, 0.0), jnp.where(ok, d_s, 0.0)
            parts = ((d_s, first),) if of_queries else ((d_s, first), (p, second))
            sums = _add(sums, parts)
            if not of_queries:
                plgpu.barrier_arrive(free[1].at[slot])
            plgpu.barrier_arrive(free[0].at[slot])
            return sums

        def allowed(i):
            """Which pairs of the tile take part; zeros beyond the last key have a P as well."""
            row, column = (plgpu.broadcasted_iota(i32, shape, axis, layout=_ACC) for axis in (0, 1))
            column = column + i * block
            away = column - (row + start)
            ok = column < plan.kv_len
            if plan.max_diff is not None:
                ok &= away <= plan.max_diff
            if plan.min_diff is not None:
                ok &= away >= plan.min_diff
            return ok

        def one_head(j, sums):
            run = lambda is_masked: lambda i, sums: one_step(i, sums, j, is_masked)  # noqa: E731
            if not plan.needs_mask:
                return lax.fori_loop(lo, hi, run(False), sums)
            sums = lax.fori_loop(lo, mid_lo, run(True), sums)
            sums = lax.fori_loop(mid_lo, mid_hi, run(False), sums)
            return lax.fori_loop(mid_hi, hi, run(True), sums)

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), _ACC)
        sums = (zeros,) * (1 if of_queries else 2)
        sums = one_head(i32(0), sums) if heads == 1 else lax.fori_loop(0, heads, one_head, sums)
        factors = (scale, 1.0)  # of dQ or dK, and of dV
        rows = pl.ds(start, ROWS)
        for total, factor, smem, out in zip(sums, factors, own, refs["out"], strict=False):
            smem.at[wg][...] = (total * factor).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.at[wg], out.at[b, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def entry(q, k, v, d_out, lse, delta, *out):
        refs = {"own": (q, d_out), "ring": (k, v), "lse": lse, "delta": delta, "out": out}
        if not of_queries:
            refs["own"], refs["ring"] = refs["ring"], refs["own"]
        own = [plgpu.SMEM((COMPUTE, ROWS, head_dim), dtype, transforms=transforms)] * 2
        ring = [plgpu.SMEM((stages, block, head_dim), dtype, transforms=transforms)] * 2
        ready = [plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE)]
        ready += [plgpu.Barrier(num_barriers=stages)] * 2
        free = [plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)] * 2

        def body(own, ring, ready, free):
            wg = lax.axis_index("wg")

            @pl.when(wg == COMPUTE)
            def _memory():
                plgpu.set_max_registers(config.memory_registers, action="decrease")
                memory_group(own, ring, refs, ready, free)

            @pl.when(wg < COMPUTE)
            def _compute():
                plgpu.set_max_registers(config.registers, action="increase")
                compute_group(wg, own, ring, refs, ready, free)

        pl.run_scoped(body, own, ring, ready, free, collective_axes="wg")

    return entry


def _launch(side: str, plan: Plan, arrays, scale: float) -> list[jax.Array]:
    """One kernel's gradients, one for the side of queries and two for that of keys."""
    query, key = arrays[:2]
    groups = query.shape[2] // key.shape[2]
    like = query if side == "q" else key
    out = jax.ShapeDtypeStruct(like.shape, like.dtype)
    results = plgpu.kernel(
        _kernel(side, plan, groups, scale, query.dtype),
        out_type=[out] * (1 if side == "q" else 2),
        grid=(plan.total,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*arrays)
    return [x[:, : plan.q_len] for x in results]
