# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention for any backend in plain JAX: only listed tiles are read and multiplied.

Each row of query tiles walks its own list of key tiles under an online softmax; the backward pass
walks the same lists for dQ and the transposed lists for dK and dV. Rows are worked on from the
longest list down, so that the rows of one step end together and the time follows the number of
listed tiles; heads and batch entries work side by side, and wait for the longest list among them.
Memory grows with T and S. With an INT8 backward (SageBwd) the gradient's products
are rounded tile by tile, in the same two walks.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import quant as numerics
from pallas_kernels.ops.attention import xla
from pallas_kernels.ops.attention.reference import clean
from pallas_kernels.ops.attention.spec import AttentionSpec

# Tiles in work at once, over batch, heads and rows: enough for parallel hardware, and on a CPU the
# logits of 16 tiles of 128 x 128 still fit its cache.
_TILES_AT_ONCE = 16
_LOG2_E = math.log2(math.e)


class SparseResult(NamedTuple):
    """What block-sparse attention gives.

    Args:
      out: [B, T, N, H] in the dtype of the query.
      lse: float32 [B, T, N], natural log-sum-exp, -inf where nothing is attended.
      skipped: int32 [B, N], listed tiles whose product with V was left out, or None without a
        `pv_threshold`.
    """

    out: jax.Array
    lse: jax.Array
    skipped: jax.Array | None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    blocks: BlockMask,
    spec: AttentionSpec,
    pv_threshold: jax.Array | None = None,
) -> SparseResult:
    """Attention over the pairs that a `BlockMask` allows, with work for its listed tiles only.

    A quantised variant rounds P against the running maximum after each tile of the block mask.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      sinks: [N] or None.
      blocks: tiles to visit and the token rule inside them.
      spec: static facts.
      pv_threshold: float32 [N], in powers of two, or None. A tile whose logits all lie more than
        this below the running maximum of their row adds nothing, neither to the sum nor to the
        output (SpargeAttn's second stage); the last tile of a row is always added. The gradient
        takes no notice of it.

    Returns:
      `SparseResult`.

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.4; SageBwd: SageAttention3,
      arXiv 2505.11594, algorithms 2 and 3.
    """
    arrays = xla.same_axes((query, key, value, sinks, blocks, pv_threshold))
    return SparseResult(*_attention(*arrays, spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, sinks, blocks, pv_threshold, spec):
    return _forward(query, key, value, sinks, blocks, pv_threshold, spec)[0]


def whole(mask: Mask, spec: AttentionSpec) -> BlockMask:
    """The tiles of a token rule in the sizes of an INT8 gradient."""
    sizes = {"block_q": spec.quant.block_q, "block_kv": spec.quant.block_kv}
    return BlockMask.from_mask(mask, spec.q_len, spec.kv_len, **sizes)


# -- walking the lists -------------------------------------------------------------------------


def _walk(blocks: BlockMask, spec: AttentionSpec, own, start, step, finish=lambda state: state):
    """Folds `step` over the listed tiles of every row of tiles.

    Args:
      blocks: the lists; R rows of every head are in work at once.
      spec: static facts.
      own: pytree of [B, K, G or 1, nq, ...] arrays: what belongs to a row.
      start: state before the first tile, from the row's own arrays [B, K, G or 1, R, ...].
      step: ``(state, own, i, j, turn) -> state`` for row i [B, K, 1, R] and tile j [B, K, G, R],
        with turn = (live, last), bool [B, K, G, R]: the tile is really listed; it is the last one.
      finish: from the last state to what is kept, [B, K, G or 1, R, ...].

    Returns:
      What `finish` gives, [B, K, G or 1, nq, ...].
    """
    b, k, g = spec.batch, spec.num_kv_heads, spec.groups
    heads = lambda x: jnp.broadcast_to(x, (b, k * g, *x.shape[2:])).reshape(b, k, g, *x.shape[2:])  # noqa: E731
    count, index = heads(blocks.kv_num_blocks), heads(blocks.kv_indices)
    number = count.shape[-1]
    rows = min(number, max(1, _TILES_AT_ONCE // (b * k * g)))
    pad = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, -number % rows),) + ((0, 0),) * (x.ndim - 4))  # noqa: E731
    count, index, own = jax.tree.map(pad, (count, index, own))
    order = jnp.argsort(-count.max(2), axis=-1)  # [B, K, nq']
    turns = jnp.moveaxis(order.reshape(b, k, -1, rows), 2, 0)

    def one_turn(carry, i):  # i: [B, K, R]
        counts, tiles, mine = (_rows(x, i) for x in (count, index, own))

        def visit(turn, state):
            j = lax.dynamic_index_in_dim(tiles, turn, 4, keepdims=False)  # [B, K, G, R]
            return step(state, mine, i[:, :, None], j, (turn < counts, turn == counts - 1))

        state = xla.same_axes(start(mine), (counts, mine))
        return carry, finish(lax.fori_loop(0, counts.max(), visit, state))

    _, found = lax.scan(one_turn, None, turns)
    back = jnp.argsort(order, axis=-1)[..., :number]

    def in_order(x):  # [turns, B, K, G, R, ...] -> [B, K, G, nq, ...]
        x = jnp.moveaxis(x, 0, 3)
        return _rows(x.reshape(*x.shape[:3], -1, *x.shape[5:]), back)

    return jax.tree.map(in_order, found)


@functools.partial(jax.vmap, in_axes=(0, 0))
@functools.partial(jax.vmap, in_axes=(0, 0))
def _rows(tree, i):
    """Rows i [B, K, R] of arrays [B, K, G, nq, ...]."""
    return jax.tree.map(lambda x: jnp.take(x, i, axis=1, mode="clip"), tree)


def _tiles(tree, j):
    """Tiles j [B, K, G, R] of arrays [B, K, G or 1, n, ...]; an axis of size 1 is shared."""

    def pick(x, j):
        if x.shape[2] != 1:
            take = jax.vmap(lambda x, j: jnp.take(x, j, axis=0, mode="clip"))
            return jax.vmap(jax.vmap(take))(x, j)
        take = lambda x, j: jnp.take(x[0], j, axis=0, mode="clip")  # noqa: E731
        return jax.vmap(jax.vmap(take))(x, j)

    return jax.tree.map(lambda x: pick(x, j), tree)


def _allowed(blocks: BlockMask, i, j, live, spec: AttentionSpec):
    """bool [B, K, G, R, bq, bk]: pairs of query tile i and key tile j that take part."""
    wide = lambda x: x[..., None, None]  # noqa: E731
    t = wide(i) * blocks.block_q + jnp.arange(blocks.block_q)[:, None]
    s = wide(j) * blocks.block_kv + jnp.arange(blocks.block_kv)
    ok = wide(live) & (t < spec.q_len) & (s < spec.kv_len)
    if blocks.mask is None or blocks.mask.is_trivial:
        return ok
    b = jnp.arange(spec.batch).reshape(-1, 1, 1, 1, 1, 1)
    n = jnp.arange(spec.num_heads).reshape(1, spec.num_kv_heads, spec.groups, 1, 1, 1)
    return ok & blocks.mask.at(b, n, t, s, spec.q_len, spec.kv_len)


def _seen(blocks: BlockMask, x: jax.Array, ok: jax.Array, axis: int) -> jax.Array:
    """Zeroes the tokens of a tile [B, K, G, R, tokens, H] that the token rule leaves with nothing.

    Listed tiles and rule together may do that where each alone does not; see `reference.clean`.
    """
    if blocks.mask is None or blocks.mask.is_trivial:
        return x
    return jnp.where(ok.any(axis)[..., None], x, 0)


def _split(x: jax.Array, block: int) -> jax.Array:
    """[B, K, G, L, ...] -> [B, K, G, ceil(L / block), block, ...], padded with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[3] = (0, -x.shape[3] % block)
    return jnp.pad(x, pad).reshape(*x.shape[:3], -1, block, *x.shape[4:])


def _joined(x: jax.Array, length: int) -> jax.Array:
    """[B, K, G, n, block, ...] -> [B, K, G, length, ...]."""
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :length]


def _key_tiles(x: jax.Array, block: int) -> jax.Array:
    """[B, S, K, H] -> [B, K, 1, nk, block, H]."""
    return _split(x.transpose(0, 2, 1, 3)[:, :, None], block)


def _query_tiles(x: jax.Array, block: int, spec: AttentionSpec) -> jax.Array:
    """[B, T, N] or [B, T, N, H] -> [B, K, G, nq, block] or [..., H]."""
    grouped = xla._grouped_query if x.ndim == 4 else xla._grouped_rows
    return _split(grouped(x, spec), block)


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


# -- forward -----------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """Operands of the two products, and what finishing the rows needs."""

    q: jax.Array  # [B, T, N, H]; 2 H where Q was smoothed
    k: jax.Array  # [B, S, K, H]; like q
    v: jax.Array
    const: jax.Array | None = None  # float32 [B, T, N]: what smoothing took from the logits
    v_scale: jax.Array | None = None
    v_mean: jax.Array | None = None
    k_mean: jax.Array | None = None  # float32 [B, 1, K, H]


def _inputs(query, key, value, blocks: BlockMask, spec: AttentionSpec) -> _Inputs:
    mask, quant = blocks.as_mask(), spec.quant
    if quant is None:
        return _Inputs(*clean(query, key, value, mask, spec))
    ops = numerics.operands(query, key, value, mask, spec)
    q, k = ops.q * ops.q_scale[..., None], ops.k * ops.k_scale[..., None]
    if ops.q_mean is not None:
        # One product over 2 H gives the quantised part and the smooth part of the logits.
        mean = jnp.repeat(ops.q_mean, quant.block_q, axis=1)[:, : spec.q_len]
        q, k = jnp.concatenate([q, mean], -1), jnp.concatenate([k, ops.k_smooth], -1)
    const = None if ops.row_const is None else ops.row_const * spec.scale
    return _Inputs(q, k, ops.v, const, ops.v_scale, ops.v_mean, ops.k_mean)


def _forward(query, key, value, sinks, blocks, pv_threshold, spec: AttentionSpec):
    quant, f32 = spec.quant, jnp.float32
    x = _inputs(query, key, value, blocks, spec)
    k, v = _key_tiles(x.k, blocks.block_kv), _key_tiles(x.v, blocks.block_kv)
    own = {"q": _query_tiles(x.q, blocks.block_q, spec)}
    capped = x.const is not None and spec.soft_cap is not None
    if capped:  # the cap is not linear: it needs the true logits
        own["const"] = _query_tiles(x.const, blocks.block_q, spec)
    if pv_threshold is not None:
        limit = pv_threshold.reshape(spec.num_kv_heads, spec.groups, 1)

    def start(own):
        rows = own["q"].shape[:-1]  # [B, K, G, R, bq]
        skipped = None if pv_threshold is None else jnp.zeros(rows[:-1], jnp.int32)
        acc = jnp.zeros((*rows, spec.head_dim), f32)
        return jnp.full(rows, -jnp.inf), jnp.zeros(rows), acc, skipped

    def step(state, own, i, j, turn):
        m, l, acc, skipped = state
        kj, vj = _tiles((k, v), j)
        ok = _allowed(blocks, i, j, turn[0], spec)
        vj = _seen(blocks, vj, ok, -2)
        logits = _dot("bkgrth,bkgrch->bkgrtc", own["q"], kj) * spec.scale
        if capped:
            logits = logits + own["const"][..., None]
        logits, _ = xla._finish(logits, None, ok, spec)
        top = logits.max(-1)
        m_new = jnp.maximum(m, top)
        m_safe = xla._zero_if_inf(m_new)
        p = jnp.exp(logits - m_safe[..., None])
        if pv_threshold is not None:
            rise = jnp.where(jnp.isneginf(top), -jnp.inf, top - m).max(-1)
            skip = (rise * _LOG2_E + limit <= 0) & ~turn[1]
            p = jnp.where(skip[..., None, None], 0.0, p)
            skipped = skipped + (skip & turn[0])
        alpha = jnp.exp(m - m_safe)
        equation = "bkgrtc,bkgrch->bkgrth"
        if quant is None:
            pv = _dot(equation, p.astype(vj.dtype), vj)
        else:
            low = numerics.quantize_p(p, quant, spec.dtype)
            pv = numerics.multiply_pv(low, vj, quant, equation)
        return m_new, l * alpha + p.sum(-1), acc * alpha[..., None] + pv, skipped

    m, l, acc, skipped = _walk(blocks, spec, own, start, step)
    m, l, acc = (_joined(state, spec.q_len) for state in (m, l, acc))
    const = None if x.const is None or capped else xla._grouped_rows(x.const, spec)
    channels = lambda x: None if x is None else x.swapaxes(1, 2)[:, :, None]  # noqa: E731
    out, lse = xla.finish_rows(
        m, l, acc, sinks, spec, const, channels(x.v_scale), channels(x.v_mean)
    )
    if skipped is not None:
        skipped = skipped.sum(-1).reshape(spec.batch, spec.num_heads)
    return (out, lse, skipped), (query, key, value, sinks, blocks, out, lse)


# -- backward ----------------------------------------------------------------------------------


def _backward(spec: AttentionSpec, saved, cotangents):
    query, key, value, sinks, blocks, out, lse = saved
    d_out, f32 = cotangents[0], jnp.float32
    rounded = spec.quant is not None and spec.quant.backward == "int8"
    exact = clean(query, key, value, blocks.as_mask(), spec)
    if rounded:
        x = _inputs(query, key, value, blocks, spec)
    else:
        centred = numerics.centred_keys(*exact[:2], blocks.as_mask(), spec)
        x = _Inputs(exact[0], centred.key, exact[2], centred.const, k_mean=centred.mean)

    rows = xla.row_terms(out, lse, sinks, cotangents)
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    # Smoothing took `const` from the logits, so P comes from what is left of the log-sum-exp.
    of_logits = lse if x.const is None else lse - x.const

    query_side = lambda y: _query_tiles(y, blocks.block_q, spec)  # noqa: E731
    key_side = lambda y: _key_tiles(y, blocks.block_kv)  # noqa: E731
    queries = {"q": x.q, "g": d_out, "lse": of_logits, "delta": rows.delta}
    queries = {name: query_side(y) for name, y in queries.items()}
    keys = {"k": key_side(x.k), "v": key_side(exact[2])}
    if rounded:  # psi(dO), once per tile
        queries["low_g"] = numerics.int8_tiles(queries["g"].astype(f32))
    low = numerics.int8_tiles if rounded else lambda y: y

    def tile(queries, keys, ok):
        """P and dS of a tile, float32 [B, K, G, R, bq, bk]."""
        logits = _dot("bkgrth,bkgrch->bkgrtc", queries["q"], keys["k"]) * spec.scale
        logits, slope = xla._finish(logits, None, ok, spec)
        p = jnp.exp(logits - queries["lse"][..., None])
        dp = _dot("bkgrth,bkgrch->bkgrtc", queries["g"], keys["v"])
        ds = p * (dp - queries["delta"][..., None])
        return p, ds if slope is None else ds * slope

    def seen(queries, keys, ok):
        queries = queries | {"q": _seen(blocks, queries["q"], ok, -1)}
        return queries, {name: _seen(blocks, y, ok, -2) for name, y in keys.items()}

    def for_queries(dq, own, i, j, turn):
        ok = _allowed(blocks, i, j, turn[0], spec)
        own, theirs = seen(own, _tiles(keys, j), ok)
        _, ds = tile(own, theirs, ok)
        ds = (low(ds) * spec.scale).astype(own["q"].dtype)
        return dq + _dot("bkgrtc,bkgrch->bkgrth", ds, theirs["k"])

    def for_keys(state, own, j, i, turn):
        dk, dv = state
        theirs = _tiles(queries, i)
        own = {name: jnp.broadcast_to(y, (*i.shape, *y.shape[4:])) for name, y in own.items()}
        ok = _allowed(blocks, i, j, turn[0], spec)
        theirs, own = seen(theirs, own, ok)
        p, ds = tile(theirs, own, ok)
        ds = (low(ds) * spec.scale).astype(theirs["q"].dtype)
        g = theirs["low_g"] if rounded else theirs["g"]
        dk = dk + _dot("bkgrtc,bkgrth->bkgrch", ds, theirs["q"])
        return dk, dv + _dot("bkgrtc,bkgrth->bkgrch", low(p).astype(g.dtype), g)

    zeros = lambda y: jnp.zeros((*y.shape[:2], spec.groups, *y.shape[3:]), f32)  # noqa: E731
    dq = _walk(blocks, spec, queries, lambda own: zeros(own["q"]), for_queries)
    dq = xla._ungrouped(_joined(dq, spec.q_len))
    start = lambda own: (zeros(own["k"]), zeros(own["v"]))  # noqa: E731
    over_heads = lambda state: jax.tree.map(lambda y: y.sum(2, keepdims=True), state)  # noqa: E731
    dk, dv = _walk(blocks.transpose(), spec, keys, start, for_keys, over_heads)
    dk, dv = (_joined(y, spec.kv_len)[:, :, 0].transpose(0, 2, 1, 3) for y in (dk, dv))

    if x.k_mean is not None:  # the mean key drops out where the rows of dS sum to zero
        mean = jnp.repeat(x.k_mean, spec.groups, axis=2)  # [B, 1, N, H]
        dq = dq + rows.sums[..., None] * mean * spec.scale
    dtypes = query.dtype, key.dtype, value.dtype
    grads = (y.astype(dtype) for y, dtype in zip((dq, dk, dv), dtypes, strict=True))
    return *grads, rows.d_sinks, None, None


_attention.defvjp(_forward, _backward)
