# SPDX-License-Identifier: Apache-2.0
"""Decode attention on any backend: one split of the cache at a time, merged by log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention.reference import by_head, plain, visible
from pallas_kernels.ops.decode_attention.spec import DecodeSpec


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint parts of a cache.

    Args:
      outs: float32 [parts, ..., H], each normalised within its part.
      lses: float32 [parts, ...], -inf where a part saw nothing.

    Returns:
      float32 [..., H] and [...]; zeros and -inf where no part saw anything.
    """
    top = jnp.max(lses, axis=0)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(lses - top)  # [parts, ...]
    total = jnp.sum(weights, axis=0)
    some = total > 0
    out = jnp.sum(outs * weights[..., None], axis=0) / jnp.where(some, total, 1.0)[..., None]
    return out, jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def attention(
    query: jax.Array,
    key: jax.Array | QTensor,
    value: jax.Array | QTensor,
    length: jax.Array,
    positions: jax.Array,
    query_positions: jax.Array,
    table: jax.Array | None,
    key_offset: jax.Array | None,
    sinks: jax.Array | None,
    spec: DecodeSpec,
) -> tuple[jax.Array, jax.Array]:
    """Computes the same as `reference.attention`; only one split is ever dequantised.

    Splits beyond the longest head are skipped.

    Args:
      query: [B, T, N, H].
      key: store [B, K, C, H], or pool [B, P, t, H] with a table; value alike.
      value: store.
      length: int32 [B, K].
      positions: int32 [B, K, C], or pool [B, P, t].
      query_positions: int32 [B, T].
      table: int32 [B, K, M] or None.
      key_offset: float32 [B, K, 1, H] or None.
      sinks: float32 [N] or None.
      spec: static facts.

    Returns:
      Output [B, T, N, H] in the dtype of `query`, log-sum-exp float32 [B, T, N].
    """
    batch, steps, heads = spec.batch, spec.q_len, spec.num_kv_heads
    q = query.astype(jnp.float32).reshape(batch, steps, heads, spec.groups, spec.head_dim)
    # The query heads of a group are rows of one product with their key head.
    q = jnp.moveaxis(q, 1, 3).reshape(batch, heads, spec.groups * steps, spec.head_dim) * spec.scale
    bias = None if key_offset is None else jnp.einsum("bkrh,bkih->bkri", q, key_offset)

    def one_split(start):
        k, v = (_part(x, table, start, spec) for x in (key, value))
        place = _part(positions, table, start, spec, -1)
        slots = start + jnp.arange(spec.split_size)
        ok = visible(slots, place, query_positions, length, spec)  # [B, K, T, split]
        some = jnp.any(ok, axis=2)[..., None]
        k, v = (jnp.where(some, plain(x), 0.0) for x in (k, v))
        x = jnp.einsum("bkrh,bksh->bkrs", q, k, precision=lax.Precision.HIGHEST)
        x = x if bias is None else x + bias
        if spec.soft_cap is not None:
            x = spec.soft_cap * jnp.tanh(x / spec.soft_cap)
        ok = jnp.broadcast_to(ok[:, :, None], (batch, heads, spec.groups, *ok.shape[2:]))
        x = jnp.where(ok.reshape(x.shape), x, -jnp.inf)
        top = jnp.max(x, axis=-1, keepdims=True)
        p = jnp.exp(x - jnp.where(jnp.isneginf(top), 0.0, top))
        total = jnp.sum(p, axis=-1, keepdims=True)
        seen = total > 0
        p = p / jnp.where(seen, total, 1.0)
        out = jnp.einsum("bkrs,bksh->bkrh", p, v, precision=lax.Precision.HIGHEST)
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
        return out, lse[..., 0]

    rows = (batch, heads, spec.groups * steps)
    if spec.capacity <= spec.split_size:
        parts = tuple(x[None] for x in one_split(0))
    else:
        longest = jnp.max(length)

        def unless_dead(start):
            nothing = (jnp.zeros((*rows, spec.head_dim)), jnp.full(rows, -jnp.inf))
            return lax.cond(start < longest, one_split, lambda _: nothing, start)

        parts = lax.map(unless_dead, jnp.arange(0, spec.capacity, spec.split_size))
    if sinks is not None:
        extra = jnp.repeat(sinks.astype(jnp.float32).reshape(1, heads, -1), steps, axis=2)
        nothing = jnp.zeros((1, *rows, spec.head_dim))
        extra = jnp.broadcast_to(extra, rows)[None]
        parts = tuple(jnp.concatenate(p) for p in zip(parts, (nothing, extra), strict=True))
    out, lse = merge(*parts)
    out = out.reshape(batch, heads, spec.groups, steps, spec.head_dim)
    out = jnp.moveaxis(out, 3, 1).reshape(query.shape).astype(query.dtype)
    lse = lse.reshape(batch, heads * spec.groups, steps).swapaxes(1, 2)
    return out, lse


def _part(store, table: jax.Array | None, start: jax.Array | int, spec: DecodeSpec, fill: int = 0):
    """Slots ``start … start + split - 1`` of every head, as stored, [B, K, split, ...]."""
    if table is None:
        # A last split that is not whole reads zeros; `visible` hides them.
        pad = -spec.capacity % spec.split_size

        def cut(x):
            x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), *((0, 0),) * (x.ndim - 3))) if pad else x
            return lax.dynamic_slice_in_dim(x, start, spec.split_size, axis=2)

        return jax.tree.map(cut, store)
    tiles = spec.split_size // spec.tile
    pad = -table.shape[2] % tiles
    table = jnp.pad(table, ((0, 0), (0, 0), (0, pad)), constant_values=-1)
    here = lax.dynamic_slice_in_dim(table, start // spec.tile, tiles, axis=2)
    return jax.tree.map(lambda x: by_head(x, here, fill), store)
