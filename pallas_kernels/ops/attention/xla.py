# SPDX-License-Identifier: Apache-2.0
"""Attention for any backend in plain JAX, with memory that grows with T, not with T·S.

Keys and values are read in chunks under an online softmax; the backward pass recomputes the
probabilities of each chunk from the saved log-sum-exp. Where all logits fit in one small chunk
the loop, the recomputation and the custom gradient are left out.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention import quant as numerics
from pallas_kernels.ops.attention.reference import clean
from pallas_kernels.ops.attention.spec import AttentionSpec

# Up to this many logits per head, one pass without a loop is as fast as any and still small.
SINGLE_CHUNK = 1024 * 1024
# Logits of one chunk over all heads (128 MiB of float32); a single chunk may hold twice as many.
_CHUNK_LOGITS = 2**25


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    mask: Mask,
    spec: AttentionSpec,
    block_kv: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the same as `reference.attention` in chunks of keys.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      bias: [B or 1, N or 1, T or 1, S or 1] or None.
      sinks: [N] or None.
      mask: which pairs take part.
      spec: static facts.
      block_kv: keys per chunk; None chooses, and uses a single chunk for small T·S.

    Returns:
      Output [B, T, N, H] in the dtype of `query`, and log-sum-exp float32 [B, T, N].
    """
    logits = spec.q_len * spec.kv_len
    fits = spec.batch * spec.num_heads * logits <= 2 * _CHUNK_LOGITS
    single = block_kv is None and logits <= SINGLE_CHUNK and (fits or spec.q_len == 1)
    if spec.quant is None and single:
        ok = None if mask.is_trivial else mask.dense(spec.q_len, spec.kv_len)
        q, k, v = clean(query, key, value, mask, spec, ok)
        return _single(q, k, v, bias, sinks, ok, spec)
    if block_kv is None:
        block_kv = _heuristic_block_kv(spec)
    arrays = same_axes((query, key, value, bias, sinks, mask))
    return _flash(*arrays, spec, block_kv)


def same_axes(tree, like=None):
    """Lets every array vary over the mesh axes over which any of them varies.

    Under `jax.shard_map` a loop must start with arrays of the type that it returns, and a constant
    varies over nothing. The cast is the identity; its gradient is the sum over those axes that an
    array shared between devices needs. Outside `shard_map` nothing happens.

    Args:
      tree: pytree of arrays.
      like: pytree of arrays whose axes count too, or None.

    Returns:
      `tree`, cast.
    """
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves((tree, like))))

    def cast(x):
        missing = tuple(axes - _axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def _axes(x) -> frozenset:
    """Mesh axes over which an array inside `shard_map` varies."""
    return jax.typeof(x).manual_axis_type.varying


def _heuristic_block_kv(spec: AttentionSpec) -> int:
    """Keys per chunk: as many as fit the budget, between 128 and 1024, a multiple of 128."""
    rows = spec.batch * spec.num_heads * spec.q_len
    return max(128, min(1024, _CHUNK_LOGITS // rows // 128 * 128))


# -- layout ------------------------------------------------------------------------------------


def _grouped_query(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    b, t, _, h = x.shape
    x = x.reshape(b, t, spec.num_kv_heads, spec.groups, h)
    return x.transpose(0, 2, 3, 1, 4)


def _ungrouped(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B, T, N, ...]."""
    b, k, g, t = x.shape[:4]
    return jnp.moveaxis(x.reshape(b, k * g, t, *x.shape[4:]), 1, 2)


def _grouped_pairs(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B or 1, N or 1, T or 1, S or 1] -> [B or 1, K or 1, G or 1, ...]."""
    if x.shape[1] == 1:
        return x[:, :, None]
    return x.reshape(x.shape[0], spec.num_kv_heads, spec.groups, *x.shape[2:])


def _grouped_rows(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[B, T, N] -> [B, K, G, T]."""
    b, t, _ = x.shape
    return x.reshape(b, t, spec.num_kv_heads, spec.groups).transpose(0, 2, 3, 1)


def _pad_keys(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Appends zeros along `axis` up to `size`; axes of length 1 that broadcast stay."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad) if pad[axis][1] else x


def _slice(x: jax.Array | None, start: jax.Array, size: int, axis: int) -> jax.Array | None:
    if x is None or x.shape[axis] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, start, size, axis)


# -- one chunk ---------------------------------------------------------------------------------


def _scores(q, k):
    """[B, K, G, T, H] x [B, K, C, H] -> float32 [B, K, G, T, C]."""
    return jnp.einsum("bkgth,bkch->bkgtc", q, k, preferred_element_type=jnp.float32)


def _finish(x, bias, ok, spec: AttentionSpec):
    """Soft cap, bias and mask, in this order: a cap must not undo a large negative bias.

    Returns the logits, and the derivative of the soft cap (None without one).
    """
    slope = None
    if spec.soft_cap is not None:
        y = jnp.tanh(x / spec.soft_cap)
        x, slope = spec.soft_cap * y, 1.0 - y * y
    if bias is not None:
        x = x + bias.astype(jnp.float32)
    return (x if ok is None else jnp.where(ok, x, -jnp.inf)), slope


def _seen(ok, mask: Mask, rows, keys):
    """Zeroes what takes part in no pair of a chunk, where several rules decide that together.

    Args:
      ok: bool [B or 1, K or 1, G or 1, T, C], or None for all.
      mask: the rules.
      rows: tuple of [B, K, G, T, H].
      keys: tuple of [B, K, C, H].
    """
    if ok is None or not mask.is_joint:
        return *rows, *keys
    some = ok.any(4)[..., None], ok.any((2, 3))[..., None]
    zero = lambda x, live: jnp.where(live, x, 0)  # noqa: E731
    return *(zero(x, some[0]) for x in rows), *(zero(x, some[1]) for x in keys)


def _zero_if_inf(m):
    return jnp.where(jnp.isneginf(m), 0.0, m)


def _single(q, k, v, bias, sinks, ok, spec: AttentionSpec):
    """Everything at once; differentiated by JAX."""
    q = _grouped_query(q, spec)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, H]
    ok = None if ok is None else _grouped_pairs(ok, spec)
    bias = None if bias is None else _grouped_pairs(bias, spec)
    x, _ = _finish(_scores(q, k) * spec.scale, bias, ok, spec)
    m = lax.stop_gradient(x.max(-1, keepdims=True, initial=-jnp.inf))
    if sinks is not None:
        sinks = _grouped_sinks(sinks, spec)[..., None]  # [K, G, 1, 1]
        m = jnp.maximum(m, lax.stop_gradient(sinks))
    m = _zero_if_inf(m)
    p = jnp.exp(x - m)
    l = p.sum(-1, keepdims=True)  # [B, K, G, T, 1]
    if sinks is not None:
        l = l + jnp.exp(sinks - m)
    some = l > 0
    l = jnp.where(some, l, 1.0)
    out = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    lse = jnp.where(some, m + jnp.log(l), -jnp.inf)[..., 0]
    return _ungrouped((out / l).astype(spec.dtype)), _ungrouped(lse)


def _grouped_sinks(sinks, spec: AttentionSpec):
    """[N] -> float32 [K, G, 1]."""
    return sinks.astype(jnp.float32).reshape(spec.num_kv_heads, spec.groups, 1)


# -- online softmax over chunks ----------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _flash(query, key, value, bias, sinks, mask, spec, block_kv):
    return _flash_fwd(query, key, value, bias, sinks, mask, spec, block_kv)[0]


def _flash_fwd(query, key, value, bias, sinks, mask, spec, block_kv):
    if spec.quant is None:
        out, lse = _forward(query, key, value, bias, sinks, mask, spec, block_kv)
    else:
        out, lse = _forward_quantized(query, key, value, bias, sinks, mask, spec)
    return (out, lse), (query, key, value, bias, sinks, mask, out, lse)


def _chunks(spec: AttentionSpec, block_kv: int) -> tuple[int, int, int]:
    """Chunk size, number of chunks, padded number of keys."""
    size = min(block_kv, spec.kv_len)
    count = -(-spec.kv_len // size)
    return size, count, size * count


def _prepared(query, key, value, bias, mask, spec, padded):
    q, k, v = clean(query, key, value, mask, spec)
    k, v = (_pad_keys(x.transpose(0, 2, 1, 3), padded, 2) for x in (k, v))  # [B, K, S', H]
    if bias is not None:
        bias = _grouped_pairs(bias, spec)
        bias = bias if bias.shape[-1] == 1 else _pad_keys(bias, padded, 4)
    return _grouped_query(q, spec), k, v, bias


def _allowed(mask: Mask, start, size, padded, spec: AttentionSpec):
    """bool [B or 1, K or 1, G or 1, T, C] for the keys from `start`, or None for all."""
    if mask.is_trivial and padded == spec.kv_len:
        return None
    ok = mask.block(None, start + jnp.arange(size), spec.q_len, spec.kv_len)
    return _grouped_pairs(ok, spec)


def _forward(query, key, value, bias, sinks, mask, spec, block_kv):
    size, count, padded = _chunks(spec, block_kv)
    q, k, v, bias = _prepared(query, key, value, bias, mask, spec, padded)

    def step(carry, j):
        m, l, acc = carry
        start = j * size
        kj, vj = _slice(k, start, size, 2), _slice(v, start, size, 2)
        ok = _allowed(mask, start, size, padded, spec)
        (vj,) = _seen(ok, mask, (), (vj,))
        x, _ = _finish(_scores(q, kj) * spec.scale, _slice(bias, start, size, 4), ok, spec)
        m_new = jnp.maximum(m, x.max(-1))
        m_safe = _zero_if_inf(m_new)
        p = jnp.exp(x - m_safe[..., None])
        alpha = jnp.exp(m - m_safe)
        pv = jnp.einsum(
            "bkgtc,bkch->bkgth", p.astype(vj.dtype), vj, preferred_element_type=jnp.float32
        )
        return (m_new, l * alpha + p.sum(-1), acc * alpha[..., None] + pv), None

    rows = q.shape[:-1]  # [B, K, G, T]
    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32))
    (m, l, acc), _ = lax.scan(step, same_axes(start, q), jnp.arange(count))
    return finish_rows(m, l, acc, sinks, spec)


def finish_rows(m, l, acc, sinks, spec: AttentionSpec, const=None, v_scale=None, v_mean=None):
    """Adds the sinks, divides by the row sum, undoes the smoothing and forms the log-sum-exp.

    Args:
      m: float32 [B, K, G, T], largest logit of each row, -inf for an empty row.
      l: float32 [B, K, G, T], sum of ``exp(x - m)``.
      acc: float32 [B, K, G, T, H], sum of ``exp(x - m) v``.
      sinks: [N] or None.
      spec: static facts.
      const: float32 [B, K, G, T], what smoothing took from every logit of the row, or None.
      v_scale: scale of the values, broadcastable to `acc`, or None.
      v_mean: mean value that smoothing took away, broadcastable to `acc`, or None.

    Returns:
      Output [B, T, N, H] in ``spec.dtype`` and log-sum-exp float32 [B, T, N].
    """
    top = m
    if sinks is not None:
        sinks = _grouped_sinks(sinks, spec)
        sinks = sinks if const is None else sinks - const
        top = jnp.maximum(m, sinks)
    top = _zero_if_inf(top)
    alpha = jnp.exp(m - top)
    total = l * alpha
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = acc * (alpha / total)[..., None]
    out = out if v_scale is None else out * v_scale
    if v_mean is not None:
        out = out + v_mean * (l * alpha / total)[..., None]
    lse = top + jnp.log(total) + (0.0 if const is None else const)
    lse = jnp.where(some, lse, -jnp.inf)
    return _ungrouped(out.astype(spec.dtype)), _ungrouped(lse)


def _forward_quantized(query, key, value, bias, sinks, mask, spec: AttentionSpec):
    """The online softmax with quantised operands and the variant's own tile of keys."""
    quant, size = spec.quant, spec.quant.block_kv
    padded = numerics.padded_length(spec.kv_len, size)
    ops = numerics.operands(query, key, value, mask, spec)
    keys_first = lambda x: _pad_keys(x.swapaxes(1, 2), padded, 2)  # noqa: E731  [B, K, S', ...]
    q = _grouped_query(ops.q * ops.q_scale[..., None], spec)
    k, v = keys_first(ops.k * ops.k_scale[..., None]), keys_first(ops.v)
    q_mean = None if ops.q_mean is None else _grouped_query(ops.q_mean, spec)  # [B, K, G, nq, H]
    k_smooth = None if ops.q_mean is None else keys_first(ops.k_smooth)
    const = None if ops.row_const is None else _grouped_rows(ops.row_const, spec) * spec.scale
    if bias is not None:
        bias = _grouped_pairs(bias, spec)
        bias = bias if bias.shape[-1] == 1 else _pad_keys(bias, padded, 4)

    def step(carry, j):
        m, l, acc = carry
        start = j * size
        x = _scores(q, _slice(k, start, size, 2))
        if q_mean is not None:
            ds = _scores(q_mean, _slice(k_smooth, start, size, 2))  # [B, K, G, nq, C]
            x = x + jnp.repeat(ds, quant.block_q, axis=3)[..., : spec.q_len, :]
        x = x * spec.scale
        if const is not None and spec.soft_cap is not None:
            x = x + const[..., None]  # the cap is not linear: it needs the true logits
        ok = _allowed(mask, start, size, padded, spec)
        x, _ = _finish(x, _slice(bias, start, size, 4), ok, spec)
        m_new = jnp.maximum(m, x.max(-1))
        m_safe = _zero_if_inf(m_new)
        p = jnp.exp(x - m_safe[..., None])
        alpha = jnp.exp(m - m_safe)
        low = numerics.quantize_p(p, quant, spec.dtype)
        vj = _slice(v, start, size, 2)
        pv = numerics.multiply_pv(low, vj, quant, "bkgtc,bkch->bkgth")
        return (m_new, l * alpha + p.sum(-1), acc * alpha[..., None] + pv), None

    rows = q.shape[:-1]  # [B, K, G, T]
    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32))
    (m, l, acc), _ = lax.scan(step, same_axes(start, q), jnp.arange(padded // size))
    if spec.soft_cap is not None:
        const = None
    channels = lambda x: None if x is None else x.swapaxes(1, 2)[:, :, None]  # noqa: E731
    return finish_rows(m, l, acc, sinks, spec, const, channels(ops.v_scale), channels(ops.v_mean))


class RowTerms(NamedTuple):
    """What a flash backward knows of every row beforehand; zero for rows with nothing to attend.

    Attributes:
      delta: ``sum(d_out * out) - d_lse``, float32 [B, T, N].
      sums: what the rows of dS sum to, float32 [B, T, N].
      d_sinks: [N] in the dtype of the sinks, or None.
    """

    delta: jax.Array
    sums: jax.Array
    d_sinks: jax.Array | None


def row_terms(out, lse, sinks, cotangents) -> RowTerms:
    """The `RowTerms` of a call from its results and their cotangents.

    Args:
      out: [B, T, N, H].
      lse: float32 [B, T, N], -inf for rows with nothing to attend.
      sinks: [N] or None.
      cotangents: of both.

    Returns:
      `RowTerms`.
    """
    (d_out, d_lse), f32, empty = cotangents[:2], jnp.float32, jnp.isneginf(lse)
    d_lse = jnp.where(empty, 0.0, d_lse)
    delta = jnp.where(empty, 0.0, (d_out.astype(f32) * out.astype(f32)).sum(-1) - d_lse)
    if sinks is None:
        return RowTerms(delta, d_lse, None)
    p_sink = jnp.exp(sinks.astype(f32) - jnp.where(empty, 0.0, lse))
    d_sinks = -(p_sink * delta).sum((0, 1)).astype(sinks.dtype)
    return RowTerms(delta, d_lse + p_sink * delta, d_sinks)


def _flash_bwd(spec, block_kv, saved, cotangents):
    """Flash backward: probabilities of each chunk come back from the log-sum-exp."""
    query, key, value, bias, sinks, mask, out, lse = saved
    d_out = cotangents[0]
    f32 = jnp.float32
    size, count, padded = _chunks(spec, block_kv)
    query, key, value = clean(query, key, value, mask, spec)
    centred = numerics.centred_keys(query, key, mask, spec)
    q, k, v, bias_g = _prepared(query, centred.key, value, bias, mask, spec, padded)
    g = _grouped_query(d_out, spec)  # [B, K, G, T, H]
    rows = row_terms(out, lse, sinks, cotangents)
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    lse = lse if centred.const is None else lse - centred.const
    delta, lse = _grouped_rows(rows.delta, spec), _grouped_rows(lse, spec)
    keep_bias_rows = bias is not None and bias.shape[3] != 1

    def step(carry, j):
        dq, dk, dv, db = carry
        start = j * size
        kj, vj = _slice(k, start, size, 2), _slice(v, start, size, 2)
        ok = _allowed(mask, start, size, padded, spec)
        bj = _slice(bias_g, start, size, 4)
        qj, kj, vj = _seen(ok, mask, (q,), (kj, vj))
        x, slope = _finish(_scores(qj, kj) * spec.scale, bj, ok, spec)
        p = jnp.exp(x - lse[..., None])  # [B, K, G, T, C]
        dp = jnp.einsum("bkgth,bkch->bkgtc", g, vj, preferred_element_type=f32)
        ds = p * (dp - delta[..., None])
        if bias is not None:
            part = _sum_to(ds, bj.shape)
            db = (
                lax.dynamic_update_slice_in_dim(db, part, start, 4) if keep_bias_rows else db + part
            )
        ds = (ds if slope is None else ds * slope) * spec.scale
        ds = ds.astype(q.dtype)
        dq = dq + jnp.einsum("bkgtc,bkch->bkgth", ds, kj, preferred_element_type=f32)
        dkj = jnp.einsum("bkgtc,bkgth->bkch", ds, qj, preferred_element_type=f32)
        dvj = jnp.einsum("bkgtc,bkgth->bkch", p.astype(g.dtype), g, preferred_element_type=f32)
        dk = lax.dynamic_update_slice_in_dim(dk, dkj.astype(dk.dtype), start, 2)
        dv = lax.dynamic_update_slice_in_dim(dv, dvj.astype(dv.dtype), start, 2)
        return (dq, dk, dv, db), None

    db = None if bias is None else jnp.zeros(bias_g.shape, f32)
    init = (jnp.zeros(q.shape, f32), jnp.zeros_like(k), jnp.zeros_like(v), db)
    init = same_axes(init, q)
    (dq, dk, dv, db), _ = lax.scan(step, init, jnp.arange(count))
    dq = _ungrouped(dq)
    dq = dq if centred.mean is None else dq + centred.part(rows.sums, spec)
    dq = dq.astype(query.dtype)
    dk, dv = (x[:, :, : spec.kv_len].transpose(0, 2, 1, 3) for x in (dk, dv))
    if bias is not None:
        db = db[..., : bias.shape[3]].reshape(bias.shape).astype(bias.dtype)
    return dq, dk, dv, db, rows.d_sinks, None


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes along which `shape` was broadcast."""
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(axes, keepdims=True)


_flash.defvjp(_flash_fwd, _flash_bwd)
