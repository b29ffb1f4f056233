# SPDX-License-Identifier: Apache-2.0
"""Scores of cached slots from attention that was never materialised.

KVzip wants, for every slot, the largest weight that any query of its repeat pass gave it; R-KV the
mean weight of the last few queries. Both follow from logits and a log-sum-exp, block by block, and
both read keys as they are stored. A pass costs one product ``Q Kᵀ`` and memory of one block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._device import current_device
from pallas_kernels._dispatch import Explanation, choose, register_explainer, resolve
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention.by_head import by_head
from pallas_kernels.ops.decode_attention.reference import plain
from pallas_kernels.ops.decode_attention.spec import device_reason


def max_attention_weights(
    query: jax.Array,
    key: jax.Array | QTensor,
    lse: jax.Array,
    length: jax.Array | None = None,
    *,
    query_valid: jax.Array | None = None,
    scale: float | None = None,
    query_block: int = 128,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the largest softmax weight that each slot got: KVzip's score.

    ``score_j = max over rows i and heads g of a group of exp(scale q_ig · k_j - lse_ig)``.

    Args:
      query: [B, A, N, H], floating.
      key: [B, K, C, H], an array or a QTensor with scales per slot.
      lse: float32 [B, A, N], log-sum-exp of the attention that the queries really did, over
        whatever they saw.
      length: int32 [B, K] or [B], live slots; None: all C.
      query_valid: bool [B, A], real rows; None: all.
      scale: factor on the logits; None: ``H ** -0.5``.
      query_block: rows per block of "xla".
      implementation: None, "xla" or "mosaic" (Hopper; keeps no logits at all).

    Returns:
      float32 [B, K, C]; -inf on dead slots, 0 where no row is real.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the implementation does not serve the call.

    >>> q, k = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 3, 4))
    >>> lse = jnp.full((1, 2, 2), 2.0 + jnp.log(3.0))
    >>> [round(x, 4) for x in max_attention_weights(q, k, lse)[0, 0].tolist()]
    [0.3333, 0.3333, 0.3333]

    References: KVzip (arXiv 2505.23416), equation 2 and section 3.4.
    """
    batch, rows, _, head_dim = query.shape
    heads, slots = _sizes(query, key)
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse has shape {lse.shape}; expected {query.shape[:3]}")
    scale = head_dim**-0.5 if scale is None else scale
    real = jnp.ones((batch, rows), bool) if query_valid is None else query_valid
    live = _live(length, batch, heads, slots)
    reasons = _score_reasons(query, key)
    if resolve("max_attention_weights", implementation, reasons) == "mosaic":
        from pallas_kernels.ops.decode_attention import mosaic_sm90_scores

        best = mosaic_sm90_scores.max_weights(query, key, lse, real, float(scale))
        return jnp.where(live, best, -jnp.inf)
    block = min(query_block, rows)
    pad = -rows % block
    k = jnp.where(live[..., None], plain(key), 0.0)

    def by_block(x):
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    def one_block(best, item):
        q, total, ok = item
        q = q.astype(jnp.float32).reshape(batch, block, heads, -1, head_dim)
        x = jnp.einsum("bakgh,bksh->bkgas", q, k, precision=lax.Precision.HIGHEST) * scale
        total = jnp.moveaxis(total.reshape(batch, block, heads, -1), 1, 3)[..., None]
        seen = ok[:, None, None, :, None] & ~jnp.isneginf(total)
        weight = jnp.where(seen, jnp.exp(jnp.where(seen, x - total, 0.0)), 0.0)
        return jnp.maximum(best, jnp.max(weight, axis=(2, 3))), None

    best, _ = lax.scan(
        one_block,
        jnp.zeros((batch, heads, slots)),
        tuple(by_block(x) for x in (query, lse, real)),
    )
    return jnp.where(live, best, -jnp.inf)


def window_attention_weights(
    query: jax.Array,
    key: jax.Array | QTensor,
    length: jax.Array | None = None,
    *,
    window: int | None = None,
    query_valid: jax.Array | None = None,
    pooling: str = "max",
    scale: float | None = None,
) -> jax.Array:
    """Returns the mean weight that the last queries give to each slot before them: R-KV's window.

    ``mean over rows i of softmax_j(pool over heads g of a group of scale q_ig · k_j)``, where the
    softmax runs over the live slots before the window; the softmax is taken after pooling.

    Args:
      query: [B, A, N, H], floating; the last queries, in any order.
      key: [B, K, C, H], an array or a QTensor with scales per slot.
      length: int32 [B, K] or [B], live slots; None: all C.
      window: last live slots that do not compete; None: A.
      query_valid: bool [B, A], real rows; None: all.
      pooling: "max" or "mean" of the logits over a group.
      scale: factor on the logits; None: ``H ** -0.5``.

    Returns:
      float32 [B, K, C]; 0 outside the candidates.

    Raises:
      ValueError: shapes do not fit or `pooling` is unknown.

    >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4))
    >>> window_attention_weights(q, k)[0, 0].tolist()
    [0.5, 0.5, 0.0]

    References: R-KV (arXiv 2505.24133), section 3.2 and appendix A.2.
    """
    batch, rows, _, head_dim = query.shape
    heads, slots = _sizes(query, key)
    if pooling not in ("max", "mean"):
        raise ValueError(f"pooling={pooling!r}; expected 'max' or 'mean'")
    scale = head_dim**-0.5 if scale is None else scale
    real = jnp.ones((batch, rows), bool) if query_valid is None else query_valid
    live = _live(length, batch, heads, slots)
    window = rows if window is None else window
    last = jnp.sum(live, axis=-1, keepdims=True) - window
    able = live & (jnp.arange(slots) < last)
    k = jnp.where(live[..., None], plain(key), 0.0)
    q = query.astype(jnp.float32).reshape(batch, rows, heads, -1, head_dim)
    x = jnp.einsum("bakgh,bksh->bkgas", q, k, precision=lax.Precision.HIGHEST) * scale
    x = jnp.max(x, axis=2) if pooling == "max" else jnp.mean(x, axis=2)  # [B, K, A, C]
    ok = able[:, :, None] & real[:, None, :, None]
    x = jnp.where(ok, x, -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True)
    p = jnp.where(ok, jnp.exp(x - jnp.where(jnp.isneginf(top), 0.0, top)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1.0)
    return jnp.sum(p, axis=2) / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None, None]


def last_similar_keys(
    key: jax.Array | QTensor,
    live: jax.Array | None = None,
    *,
    threshold: float = 0.5,
    beta: int = 1,
    block_size: int = 128,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Finds for every slot the last other slots that hold a similar key: what R-KV exempts.

    ``max { j != i : k_i · k_j / (|k_i| |k_j|) > threshold }`` and the cosine there.

    Args:
      key: [B, K, C, H], an array or a QTensor with scales per slot.
      live: bool [B, K, C], slots that hold a token; None: all.
      threshold: cosine above which two keys are similar, in [0, 1).
      beta: so many last slots, in falling order.
      block_size: rows per block of "xla".
      implementation: None, "xla" or "mosaic" (Hopper, ``beta=1``; keeps no cosines at all).

    Returns:
      int32 [B, K, C, beta], -1 where there is none, and float32 [B, K, C, beta], the cosine there,
      0 where there is none.

    Raises:
      ValueError: a number is out of range.
      NotImplementedError: the implementation does not serve the call.

    >>> keys = jnp.array([[[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]]])
    >>> last_similar_keys(keys)[0][..., 0].tolist()
    [[[2, -1, 0]]]

    References: R-KV (arXiv 2505.24133), section 3.3.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}; expected a cosine in [0, 1)")
    if beta < 1:
        raise ValueError(f"beta={beta}; expected 1 or more slots")
    batch, heads, slots, head_dim = key.shape
    live = jnp.ones((batch, heads, slots), bool) if live is None else live
    reasons = {"mosaic": _similar_reason(key, beta), "xla": None}
    if resolve("last_similar_keys", implementation, reasons) == "mosaic":
        from pallas_kernels.ops.decode_attention import mosaic_sm90_scores

        plain_codes = key if isinstance(key, jax.Array) else key.unpack().qvalue
        codes = plain_codes.astype(jnp.float32)
        inverse = jnp.where(live, 1 / (jnp.sqrt(jnp.sum(codes * codes, axis=-1)) + 1e-8), 0.0)
        leaves, tree = jax.tree.flatten(key)

        def run(*x):
            stored = jax.tree.unflatten(tree, x[:-1])
            return mosaic_sm90_scores.last_similar(stored, x[-1], float(threshold))

        axes = ["bk"] * (len(leaves) + 1)
        last, cosine = by_head(run, axes, ["bk", "bk"])(*leaves, inverse)
        last = jnp.where(live, last, -1)
        return last[..., None], jnp.where(last >= 0, cosine, 0.0)[..., None]
    unit = plain(key)
    norm = jnp.sqrt(jnp.sum(unit * unit, axis=-1, keepdims=True))
    unit = jnp.where(live[..., None], unit / (norm + 1e-8), 0.0)
    block = min(block_size, slots)
    blocks = -(-slots // block)
    rows = jnp.pad(unit, ((0, 0), (0, 0), (0, blocks * block - slots), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(batch, heads, blocks, block, head_dim), 2, 0)
    column = jnp.arange(slots)

    def one_block(item):
        number, part = item
        cosine = jnp.einsum("bkih,bkjh->bkij", part, unit, precision=lax.Precision.HIGHEST)
        owner = number * block + jnp.arange(block)[:, None]
        similar = (cosine > threshold) & (owner != column) & live[:, :, None]
        chosen = []
        for _ in range(beta):
            last = jnp.max(jnp.where(similar, column, -1), axis=-1)  # [B, K, block]
            similar = similar & (column != last[..., None])
            value = jnp.take_along_axis(cosine, jnp.maximum(last, 0)[..., None], -1)[..., 0]
            chosen.append((last, jnp.where(last >= 0, value, 0.0)))
        return tuple(jnp.stack(parts, axis=-1) for parts in zip(*chosen, strict=True))

    found = lax.map(one_block, (jnp.arange(blocks), rows))
    return tuple(
        jnp.moveaxis(x, 0, 2).reshape(batch, heads, blocks * block, beta)[:, :, :slots]
        for x in found
    )


def _score_reasons(query, key) -> dict[str, str | None]:
    """By implementation: why it does not take the call, or None."""
    reason = device_reason(current_device())
    if reason is None:
        from pallas_kernels.ops.decode_attention import mosaic_sm90_scores  # needs Mosaic

        reason = mosaic_sm90_scores.unsupported_reason(query, key)
    return {"mosaic": reason, "xla": None}


def _similar_reason(key, beta: int) -> str | None:
    """Why the Hopper kernel of `last_similar_keys` does not take the call, or None."""
    reason = device_reason(current_device())
    if reason is None:
        from pallas_kernels.ops.decode_attention import mosaic_sm90_scores  # needs Mosaic

        reason = mosaic_sm90_scores.unsupported_similar_reason(key)
    if reason is None and beta > 1:
        reason = f"the sm90 similarity kernel finds one slot per key; got beta={beta}"
    return reason


def explain_scores(query, key, *args, implementation: str | None = None, **kwargs) -> Explanation:
    """Says which implementation a call of `max_attention_weights` would use, from shapes alone.

    Args:
      query: as there; `jax.ShapeDtypeStruct` will do.
      key: as there.
      *args: not looked at.
      implementation: as there.
      **kwargs: not looked at.

    Returns:
      An `Explanation`.
    """
    del args, kwargs
    reasons = _score_reasons(query, key)
    return choose("max_attention_weights", implementation, reasons)


register_explainer("max_attention_weights", explain_scores)


def _sizes(query: jax.Array, key: jax.Array | QTensor) -> tuple[int, int]:
    """Returns K and C, or says why query and key do not fit."""
    shape = key.shape
    if len(shape) != 4 or shape[0] != query.shape[0] or shape[3] != query.shape[3]:
        raise ValueError(f"key has shape {shape}; expected [B, K, C, H] to fit {query.shape}")
    if query.shape[2] % shape[1]:
        raise ValueError(
            f"key has {shape[1]} heads; query heads ({query.shape[2]}) must be a multiple of it"
        )
    return shape[1], shape[2]


def _live(length: jax.Array | None, batch: int, heads: int, slots: int) -> jax.Array:
    length = jnp.asarray(slots if length is None else length, jnp.int32)
    length = length[:, None] if length.ndim == 1 else length
    return jnp.arange(slots) < jnp.broadcast_to(length, (batch, heads))[..., None]
