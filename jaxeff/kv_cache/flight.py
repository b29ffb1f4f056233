"""Attention of many tokens over a cache without an array of what each token sees.

A dense layer's :meth:`mask` serves any order of slots, at a byte per head, query and slot. While a
text is read, slots are in order and the rule is causal, which kernels know without an array.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.kv_cache.base import KVCache, LayerCache
from jaxeff.kv_cache.dense import DenseLayer
from pallas_kernels import dot_product_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderedLayer:
    """A view of a dense layer that nothing was evicted from: slot ``i`` holds token ``i``.

    Args:
        inner: the layer.
        start: int32 ``[B]``, tokens before the last update.

    Examples:
        >>> view = OrderedLayer(DenseLayer.init(1, 4, 1, 8), jnp.zeros(1, jnp.int32))
        >>> view.attends_many
        True

    References:
        KVzip (arXiv 2505.23416), section 3.1 (prefill of the context).
    """

    inner: DenseLayer
    start: jax.Array

    attends_many: ClassVar[bool] = True  # `attend` takes any number of queries

    def update(self, k, v, *, positions, valid=None, queries=None) -> OrderedLayer:
        """Return the view with tokens appended; see :meth:`DenseLayer.update`."""
        start = jnp.max(self.inner.length, axis=1)
        inner = self.inner.update(k, v, positions=positions, valid=valid, queries=queries)
        return OrderedLayer(inner, start)

    def attend(
        self,
        queries: jax.Array,
        *,
        positions: jax.Array,
        window: int | None = None,
        scale: float | None = None,
    ) -> jax.Array:
        """Return the attention of the tokens of the last update.

        Args:
            queries: float ``[B, T, N, H]`` after RoPE; what padding gets has no meaning.
            positions: int32 ``[B, T]``; not looked at, they count on from ``start``.
            window: tokens in a sliding window, the query's own included; ``None``: no window.
            scale: softmax scale; ``None``: ``H ** -0.5``.

        Returns:
            ``[B, T, N, H]`` in the dtype of the queries.
        """
        del positions
        keys, values = self.inner.read(queries.dtype)
        return dot_product_attention(
            queries,
            keys,
            values,
            scale=scale,
            is_causal=True,
            causal_offset=self.start,
            local_window_size=None if window is None else (window - 1, 0),
        )

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """As :meth:`DenseLayer.read`, for an attention function that takes arrays."""
        return self.inner.read(dtype)

    def mask(self, positions: jax.Array, window: int | None = None) -> jax.Array:
        """As :meth:`DenseLayer.mask`."""
        return self.inner.mask(positions, window)


def read_in_order(cache: KVCache) -> KVCache:
    """Return a view of a cache for reading texts padded on the right, with counted positions.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> view = read_in_order(DenseCache.init(1, 1, 4, 1, 8))
        >>> type(view.layers[0]).__name__, type(was_read(view).layers[0]).__name__
        ('OrderedLayer', 'DenseLayer')

    References:
        KVzip (arXiv 2505.23416), section 3.1 (prefill of the context).
    """

    def view(layer: LayerCache) -> Any:
        if type(layer) is not DenseLayer:  # a ring has an order of its own
            return layer
        return OrderedLayer(layer, jnp.max(layer.length, axis=1))

    return dataclasses.replace(cache, layers=tuple(view(x) for x in cache.layers))


def was_read(cache: KVCache) -> KVCache:
    """Undo :func:`read_in_order`.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> was_read(DenseCache.init(1, 1, 4, 1, 8)).layers[0].capacity
        4

    References:
        KVzip (arXiv 2505.23416), section 3.1 (prefill of the context).
    """
    layers = (x.inner if isinstance(x, OrderedLayer) else x for x in cache.layers)
    return dataclasses.replace(cache, layers=tuple(layers))


def attend_with_input(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    input_keys: jax.Array,
    input_values: jax.Array,
    *,
    live: jax.Array,
    input_valid: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of an input over every live slot and, causally, over itself.

    Args:
        queries: float ``[B, A, N, H]``, the input's.
        keys, values: ``[B, S, K, H]``, cached.
        input_keys, input_values: ``[B, A, K, H]``.
        live: bool ``[B, K, S]``.
        input_valid: bool ``[B, A]``.
        scale: multiplies the logits; ``None``: ``H ** -0.5``.

    Returns:
        Output ``[B, A, N, H]`` in the dtype of the queries, and the log-sum-exp f32 ``[B, A, N]``.

    Examples:
        >>> one, own = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 2, 1, 4))
        >>> every, real = jnp.ones((1, 1, 3), bool), jnp.ones((1, 2), bool)
        >>> out, lse = attend_with_input(own, one, one, own, own, live=every, input_valid=real)
        >>> [round(float(x), 4) for x in jnp.exp(lse[0, :, 0] - 2.0)]  # so many keys are seen
        [4.0, 5.0]

    References:
        KVzip (arXiv 2505.23416), section 3.3 and equation 2.
    """
    batch, rows, num_heads, head_dim = queries.shape
    slots, heads = keys.shape[1:3]

    def fold(cached, own=None):
        """Heads may be of unequal length: each becomes a row of the batch."""
        own = own if cached is None else own.astype(cached.dtype)
        x = own if cached is None else jnp.concatenate([cached, own], axis=1)
        x = x.reshape(batch, x.shape[1], heads, -1, head_dim)
        return jnp.moveaxis(x, 2, 1).reshape(batch * heads, x.shape[1], -1, head_dim)

    own = jnp.broadcast_to(input_valid[:, None], (batch, heads, rows))
    seen = jnp.concatenate([live, own], axis=-1).reshape(batch * heads, -1)
    dtype = jnp.result_type(queries, keys)
    out, lse = dot_product_attention(
        fold(None, queries).astype(dtype),
        fold(keys.astype(dtype), input_keys),
        fold(values.astype(dtype), input_values),
        scale=scale,
        is_causal=True,
        causal_offset=slots,
        segment_ids=(jnp.ones((batch * heads, rows), jnp.int32), seen.astype(jnp.int32)),
        return_residual=True,
    )

    def unfold(x):
        x = x.reshape(batch, heads, rows, num_heads // heads, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(batch, rows, num_heads, *x.shape[4:])

    return unfold(out).astype(queries.dtype), unfold(lse)


def attend_passes(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    input_keys: jax.Array,
    input_values: jax.Array,
    *,
    length: jax.Array,
    passes: int,
    scale: float | None = None,
    quant: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of several inputs side by side, each over the whole cache and, causally, itself.

    All inputs share one call over the cache, which fills a GPU better than a call each; what an
    input says to itself is a second call. Both parts are joined by their log-sum-exp.

    Args:
        queries: float ``[B, P * A, N, H]``, of ``P`` inputs of ``A`` tokens, padded on the right.
        keys, values: ``[B, K, S, H]``, heads before slots, in the dtype of the queries.
        input_keys, input_values: ``[B, P * A, K, H]``.
        length: int32 ``[B, K]``, live slots of the cache.
        passes: ``P``.
        scale: multiplies the logits; ``None``: ``H ** -0.5``.
        quant: variant of the attention over the cache; ``None``: in full precision.

    Returns:
        Output ``[B, P * A, N, H]``, and f32 ``[B, P * A, N]`` each: the log-sum-exp over cache and
        input, and that over the input alone. What padding gets has no meaning.

    Examples:
        >>> one, own = jnp.ones((1, 1, 3, 4)), jnp.ones((1, 4, 1, 4))
        >>> live = jnp.full((1, 1), 3)
        >>> _, every, alone = attend_passes(own, one, one, own, own, length=live, passes=2)
        >>> [round(float(x), 4) for x in jnp.exp(every[0, :, 0] - 2.0)]  # so many keys are seen
        [4.0, 5.0, 4.0, 5.0]

    References:
        KVzip (arXiv 2505.23416), section 3.3; FlashInfer (arXiv 2501.01005), section 2.2 (joining).
    """
    batch, rows, _, head_dim = queries.shape
    heads, slots = keys.shape[1:3]
    by_head = fold_heads(queries, heads)  # [B * K, P * A, G, H]
    past, past_lse = dot_product_attention(
        by_head,
        keys.reshape(batch * heads, slots, 1, head_dim),
        values.reshape(batch * heads, slots, 1, head_dim),
        key_value_seq_lengths=length.reshape(-1),
        scale=scale,
        quant=quant,
        return_residual=True,
    )
    apart = lambda x: x.reshape(-1, rows // passes, *x.shape[2:])  # noqa: E731
    own, own_lse = dot_product_attention(
        apart(by_head),
        apart(fold_heads(input_keys.astype(queries.dtype), heads)),
        apart(fold_heads(input_values.astype(queries.dtype), heads)),
        is_causal=True,  # padding comes last, so this hides it
        scale=scale,
        return_residual=True,
    )
    own, own_lse = own.reshape(past.shape), own_lse.reshape(past_lse.shape)
    lse = jnp.logaddexp(past_lse, own_lse)
    share = jnp.exp(past_lse - lse)[..., None]
    out = past.astype(jnp.float32) * share + own.astype(jnp.float32) * (1 - share)
    unfold = lambda x: unfold_heads(x, batch)  # noqa: E731
    return unfold(out.astype(queries.dtype)), unfold(lse), unfold(own_lse)


def fold_heads(x: jax.Array, heads: int) -> jax.Array:
    """Return ``[B * K, T, G, ...]`` of ``[B, T, K * G, ...]``: key heads as rows of the batch.

    Examples:
        >>> fold_heads(jnp.zeros((2, 3, 8, 4)), 2).shape
        (4, 3, 4, 4)

    References:
        KVzip (arXiv 2505.23416), section 3.3.
    """
    x = x.reshape(*x.shape[:2], heads, -1, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(-1, *x.shape[2:])


def unfold_heads(x: jax.Array, batch: int) -> jax.Array:
    """Undo :func:`fold_heads`.

    Examples:
        >>> unfold_heads(jnp.zeros((4, 3, 4, 4)), 2).shape
        (2, 3, 8, 4)

    References:
        KVzip (arXiv 2505.23416), section 3.3.
    """
    x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
