# SPDX-License-Identifier: Apache-2.0
"""The oracle: attention written out in float32 with all logits in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention.spec import AttentionSpec


def to_heads(x: jax.Array, groups: int) -> jax.Array:
    """Repeats what belongs to a key/value head for its query heads.

    Args:
      x: [B, S, K, ...].
      groups: G, query heads per key/value head.

    Returns:
      [B, S, K * G, ...]; query head n is served by key/value head ``n // G``.
    """
    return jnp.repeat(x, groups, axis=2)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    mask: Mask,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Attention by its definition: ``softmax(cap(scale Q K^T) + bias) V`` and its log-sum-exp.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      bias: [B or 1, N or 1, T or 1, S or 1] or None.
      sinks: [N] or None; a logit per head that takes part in the sum but has no value.
      mask: which pairs take part.
      spec: static facts.

    Returns:
      Output [B, T, N, H] in the dtype of `query`, and log-sum-exp float32 [B, T, N].
    """
    f32, high = jnp.float32, lax.Precision.HIGHEST
    q, k, v = clean(query, key, value, mask, spec)
    k, v = to_heads(k.astype(f32), spec.groups), to_heads(v.astype(f32), spec.groups)
    x = jnp.einsum("btnh,bsnh->bnts", q.astype(f32), k, precision=high) * spec.scale
    if spec.soft_cap is not None:
        x = spec.soft_cap * jnp.tanh(x / spec.soft_cap)
    if bias is not None:
        x = x + bias.astype(f32)
    ok = mask.dense(spec.q_len, spec.kv_len)
    x = jnp.where(ok, x, -jnp.inf)  # [B, N, T, S]

    m = lax.stop_gradient(x.max(-1, keepdims=True, initial=-jnp.inf))
    if sinks is not None:
        m = jnp.maximum(m, lax.stop_gradient(sinks.astype(f32)[:, None, None]))
    m = jnp.where(jnp.isneginf(m), 0.0, m)
    p = jnp.exp(x - m)
    l = p.sum(-1, keepdims=True)  # [B, N, T, 1]
    if sinks is not None:
        l = l + jnp.exp(sinks.astype(f32)[:, None, None] - m)
    some = l > 0
    l = jnp.where(some, l, 1.0)
    out = jnp.einsum("bnts,bsnh->btnh", p / l, v, precision=high)
    lse = jnp.where(some, m + jnp.log(l), -jnp.inf)[..., 0]
    return out.astype(query.dtype), lse.swapaxes(1, 2)


def clean(query, key, value, mask: Mask, spec: AttentionSpec):
    """Zeroes queries and keys that take part in nothing, so that NaN there cannot spread.

    A probability of zero times NaN is NaN; selecting zeros beforehand is the only cure.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      mask: which pairs take part.
      spec: static facts.

    Returns:
      The three arrays with dead rows replaced by zeros.
    """
    keys, queries = live_keys(mask, spec), mask.live_queries(spec.q_len, spec.kv_len)
    if keys is not None:
        key = jnp.where(keys[..., None], key, 0)
        value = jnp.where(keys[..., None], value, 0)
    if queries is not None:
        query = jnp.where(queries.swapaxes(1, 2)[..., None], query, 0)
    return query, key, value


def live_keys(mask: Mask, spec: AttentionSpec) -> jax.Array | None:
    """Keys that at least one query of their group attends to.

    Args:
      mask: which pairs take part.
      spec: static facts.

    Returns:
      bool [B or 1, S, K or 1], or None when all are.
    """
    live = mask.live_keys(spec.q_len, spec.kv_len)  # [B, N, S]
    if live is None:
        return None
    if live.shape[1] != 1:
        b, _, s = live.shape
        live = live.reshape(b, spec.num_kv_heads, spec.groups, s).any(2)
    return live.swapaxes(1, 2)
