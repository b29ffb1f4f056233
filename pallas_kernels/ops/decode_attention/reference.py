# SPDX-License-Identifier: Apache-2.0
"""The oracle: everything dequantised, gathered, and all logits in memory, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention.spec import DecodeSpec


def plain(store: jax.Array | QTensor) -> jax.Array:
    """What a store holds, as float32.

    Args:
      store: array or QTensor.

    Returns:
      float32 array of the same shape.
    """
    return (
        store.dequantize(jnp.float32) if isinstance(store, QTensor) else store.astype(jnp.float32)
    )


def by_head(pool: jax.Array, table: jax.Array, fill: float = 0) -> jax.Array:
    """Reads a pool of tiles head by head.

    Args:
      pool: [B, P, t, ...].
      table: int32 [B, K, M], -1 for no tile.
      fill: what is read where no tile is.

    Returns:
      [B, K, M * t, ...].
    """
    batch, heads, tiles = table.shape
    index = jnp.where(table < 0, pool.shape[1], table)
    index = index.reshape(batch, -1, *(1,) * (pool.ndim - 2))
    got = jnp.take_along_axis(pool, index, axis=1, mode="fill", fill_value=fill)
    return got.reshape(batch, heads, tiles * pool.shape[2], *pool.shape[3:])


def visible(
    slots: jax.Array,
    positions: jax.Array,
    query_positions: jax.Array,
    length: jax.Array,
    spec: DecodeSpec,
) -> jax.Array:
    """Which slots each query sees.

    Args:
      slots: int32 [C'], numbers of the slots in question.
      positions: int32 [B, K, C'], their logical positions.
      query_positions: int32 [B, T], -1 for no query.
      length: int32 [B, K], live slots.
      spec: static facts.

    Returns:
      bool [B, K, T, C'].
    """
    place, query = positions[:, :, None, :], query_positions[:, None, :, None]
    live = (slots < length[..., None])[:, :, None] & (place >= 0)
    ok = live & (place <= query)
    if spec.window is not None:
        ok = ok & ((query - place < spec.window) | (place < spec.num_sinks))
    return ok


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
    """Attention over a cache by its definition.

    Args:
      query: [B, T, N, H].
      key: store [B, K, C, H], or pool [B, P, t, H] with a table; value alike.
      value: store.
      length: int32 [B, K].
      positions: int32 [B, K, C], or pool [B, P, t].
      query_positions: int32 [B, T].
      table: int32 [B, K, M] or None.
      key_offset: float32 [B, K, 1, H] to be added to every key, or None.
      sinks: float32 [N] or None; a logit per head that takes part in the sum and has no value.
      spec: static facts.

    Returns:
      Output [B, T, N, H] in the dtype of `query`, log-sum-exp float32 [B, T, N].
    """
    k, v = plain(key), plain(value)
    if table is not None:
        k, v, positions = by_head(k, table), by_head(v, table), by_head(positions, table, -1)
    ok = visible(jnp.arange(spec.capacity), positions, query_positions, length, spec)
    k = k if key_offset is None else k + key_offset
    # What nothing sees may be NaN, and 0 times NaN is NaN.
    some = jnp.any(ok, axis=2)[..., None]
    k, v = jnp.where(some, k, 0.0), jnp.where(some, v, 0.0)
    q = query.astype(jnp.float32).reshape(*query.shape[:2], spec.num_kv_heads, -1, spec.head_dim)
    x = jnp.einsum("btkgh,bksh->bkgts", q, k, precision=lax.Precision.HIGHEST) * spec.scale
    if spec.soft_cap is not None:
        x = spec.soft_cap * jnp.tanh(x / spec.soft_cap)
    x = jnp.where(ok[:, :, None], x, -jnp.inf)
    if sinks is not None:
        extra = sinks.astype(jnp.float32).reshape(1, spec.num_kv_heads, -1, 1, 1)
        x = jnp.concatenate([x, jnp.broadcast_to(extra, (*x.shape[:4], 1))], axis=-1)
    top = jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf)
    p = jnp.exp(x - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum(
        "bkgts,bksh->btkgh", p[..., : spec.capacity], v, precision=lax.Precision.HIGHEST
    )
    lse = jnp.where(total > 0, jnp.log(total) + top, -jnp.inf)[..., 0]  # [B, K, G, T]
    lse = lse.reshape(lse.shape[0], -1, spec.q_len).swapaxes(1, 2)
    return out.reshape(query.shape).astype(query.dtype), lse
