# SPDX-License-Identifier: Apache-2.0
"""The oracle: attention written out in float32 with all logits in memory."""

from __future__ import annotations

import functools

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
    if spec.quant is not None and spec.quant.backward == "int8":
        return _int8(query, key, value, sinks, mask, spec)
    if spec.quant is not None:
        return _quantized(query, key, value, bias, sinks, mask, spec)
    f32, high = jnp.float32, lax.Precision.HIGHEST
    ok = mask.dense(spec.q_len, spec.kv_len)
    q, k, v = clean(query, key, value, mask, spec, ok)
    k, v = to_heads(k.astype(f32), spec.groups), to_heads(v.astype(f32), spec.groups)
    x = jnp.einsum("btnh,bsnh->bnts", q.astype(f32), k, precision=high) * spec.scale
    if spec.soft_cap is not None:
        x = spec.soft_cap * jnp.tanh(x / spec.soft_cap)
    if bias is not None:
        x = x + bias.astype(f32)
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


def _quantized(query, key, value, bias, sinks, mask, spec):
    """The same with quantised operands; P is quantised against the running maximum of its tile."""
    from pallas_kernels.ops.attention import quant as numerics

    quant, high = spec.quant, lax.Precision.HIGHEST
    ops = numerics.operands(query, key, value, mask, spec)
    repeat = lambda x: to_heads(x, spec.groups) if x.shape[2] == spec.num_kv_heads else x  # noqa: E731
    x = jnp.einsum(
        "btnh,bsnh->bnts",
        ops.q * ops.q_scale[..., None],
        repeat(ops.k * ops.k_scale[..., None]),
        precision=high,
    )
    if ops.q_mean is not None:
        ds = jnp.einsum("bqnh,bsnh->bnqs", ops.q_mean, repeat(ops.k_smooth), precision=high)
        x = x + jnp.repeat(ds, quant.block_q, axis=2)[:, :, : spec.q_len]
    x = x * spec.scale
    const = jnp.zeros((1, 1, 1, 1)) if ops.row_const is None else ops.row_const * spec.scale
    const = const if ops.row_const is None else const.swapaxes(1, 2)[..., None]  # [B, N, T, 1]
    if spec.soft_cap is not None:
        # The cap is not linear: it needs the logits as they were before smoothing.
        x, const = spec.soft_cap * jnp.tanh((x + const) / spec.soft_cap), 0.0 * const
    if bias is not None:
        x = x + bias.astype(jnp.float32)
    x = jnp.where(mask.dense(spec.q_len, spec.kv_len), x, -jnp.inf)

    block = quant.block_kv
    pad = numerics.padded_length(spec.kv_len, block) - spec.kv_len
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, pad)), constant_values=-jnp.inf)
    x = x.reshape(*x.shape[:3], -1, block)  # [B, N, T, tiles, block]
    v = jnp.pad(repeat(ops.v), ((0, 0), (0, pad), (0, 0), (0, 0)))
    v = v.reshape(v.shape[0], -1, block, *v.shape[2:])  # [B, tiles, block, N, H]

    running = lax.cummax(x.max(-1), axis=3)  # [B, N, T, tiles]
    m = running[..., -1:]
    safe = jnp.where(jnp.isneginf(running), 0.0, running)[..., None]
    p = jnp.exp(x - safe)
    weight = jnp.exp(running - jnp.where(jnp.isneginf(m), 0.0, m))
    low = numerics.quantize_p(p, quant, spec.dtype)
    tile = numerics.multiply_pv(
        low, v.transpose(0, 3, 1, 2, 4), quant, "bntjs,bnjsh->bntjh"
    )  # [B, N, T, tiles, H]
    acc = (tile * weight[..., None]).sum(3)
    l = (p.sum(-1) * weight).sum(-1, keepdims=True)  # [B, N, T, 1]

    top = m if sinks is None else jnp.maximum(m, sinks.astype(jnp.float32)[:, None, None] - const)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    alpha = jnp.exp(m - top)
    total = l * alpha
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32)[:, None, None] - const - top)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    heads_first = lambda x: jnp.moveaxis(repeat(x), 2, 1)  # noqa: E731  [B, N, 1, H]
    out = acc * heads_first(ops.v_scale) * (alpha / total)
    if ops.v_mean is not None:
        out = out + heads_first(ops.v_mean) * (l * alpha / total)
    lse = jnp.where(some, top + jnp.log(total) + const, -jnp.inf)[..., 0]
    return out.swapaxes(1, 2).astype(query.dtype), lse.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _int8(query, key, value, sinks, mask, spec):
    """A variant with SageBwd's gradient."""
    return _quantized(query, key, value, None, sinks, mask, spec)


def _int8_fwd(query, key, value, sinks, mask, spec):
    out, lse = _quantized(query, key, value, None, sinks, mask, spec)
    return (out, lse), (query, key, value, sinks, mask, out, lse)


def _int8_bwd(spec, saved, cotangents):
    """SageAttention3 (arXiv 2505.11594), algorithm 3, with all pairs in memory."""
    from pallas_kernels.ops.attention import quant as numerics

    query, key, value, sinks, mask, out, lse = saved
    f32, high, quant = jnp.float32, lax.Precision.HIGHEST, spec.quant
    dot = functools.partial(jnp.einsum, precision=high)
    g, d_lse = cotangents[0].astype(f32), jnp.where(jnp.isneginf(lse), 0.0, cotangents[1])
    ops = numerics.operands(query, key, value, mask, spec)
    q = ops.q * ops.q_scale[..., None]
    k = to_heads(ops.k * ops.k_scale[..., None], spec.groups)
    v = to_heads(clean(query, key, value, mask, spec)[2].astype(f32), spec.groups)

    def psi(x, block_s):  # INT8 with one scale per tile of [B, N, T, S or H]
        pad = -x.shape[2] % quant.block_q, -x.shape[3] % block_s
        y = jnp.pad(x, ((0, 0), (0, 0), (0, pad[0]), (0, pad[1])))
        shape = y.shape
        y = y.reshape(*shape[:2], -1, quant.block_q, shape[3] // block_s, block_s)
        return numerics.int8_tiles(y, (3, 5)).reshape(shape)[:, :, : x.shape[2], : x.shape[3]]

    delta = (g * out.astype(f32)).sum(-1) - d_lse  # [B, T, N]
    const = 0.0 if ops.row_const is None else ops.row_const * spec.scale
    left = jnp.where(jnp.isneginf(lse), 0.0, lse - const).swapaxes(1, 2)[..., None]  # [B, N, T, 1]
    x = dot("btnh,bsnh->bnts", q, k) * spec.scale
    p = jnp.exp(jnp.where(mask.dense(spec.q_len, spec.kv_len), x, -jnp.inf) - left)
    low_g = psi(g.swapaxes(1, 2), spec.head_dim)
    dv = dot("bnts,bnth->bsnh", psi(p, quant.block_kv), low_g)
    ds = p * (dot("btnh,bsnh->bnts", g, v) - delta.swapaxes(1, 2)[..., None])
    ds = psi(ds, quant.block_kv) * spec.scale
    dq, dk = dot("bnts,bsnh->btnh", ds, k), dot("bnts,btnh->bsnh", ds, q)
    p_sink = (
        0.0 if sinks is None else jnp.exp(sinks.astype(f32) - jnp.where(lse > -jnp.inf, lse, 0))
    )
    if ops.k_mean is not None:  # what the mean key adds where a row of dS does not sum to zero
        dq += (d_lse + p_sink * delta)[..., None] * to_heads(ops.k_mean, spec.groups) * spec.scale
    grouped = lambda x: x.reshape(*x.shape[:2], -1, spec.groups, spec.head_dim).sum(3)  # noqa: E731
    d_sinks = None if sinks is None else -(p_sink * delta).sum((0, 1)).astype(sinks.dtype)
    grads = zip((dq, grouped(dk), grouped(dv)), (query, key, value), strict=True)
    return *(x.astype(like.dtype) for x, like in grads), d_sinks, None


_int8.defvjp(_int8_fwd, _int8_bwd)


def clean(query, key, value, mask: Mask, spec: AttentionSpec, ok: jax.Array | None = None):
    """Zeroes queries and keys that take part in nothing, so that NaN there cannot spread.

    A probability of zero times NaN is NaN; selecting zeros beforehand is the only cure.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      mask: which pairs take part.
      spec: static facts.
      ok: bool [B or 1, N or 1, T or 1, S or 1], the same pairs one by one; without it a token that
        only several rules together leave with nothing may count as alive.

    Returns:
      The three arrays with dead rows replaced by zeros.
    """
    if ok is not None and mask.is_joint:
        mask = Mask(arrays=(ok,))
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
