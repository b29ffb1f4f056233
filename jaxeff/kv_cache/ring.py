"""A cache for layers with a sliding window: the last tokens, written round and round."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.kv_cache.dense import DenseLayer, check_tokens, decode_keys, first_mean, scatter
from jaxeff.kv_cache.storage import decode, encode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingLayer(DenseLayer):
    """The last ``C`` tokens of a layer, position ``p`` in slot ``p % C``.

    A token older than the window is overwritten, which is all that a window asks for; nothing else
    may be evicted, so compressors leave these layers alone. When several tokens come at once,
    early ones still need keys that later ones overwrite: the call then sees the old ring and its
    own tokens side by side (:class:`RingView`), and ``KVCache.advance`` settles it.

    Args:
        window: tokens that a query sees, itself included; ``C`` is at most this (static).

    Examples:
        >>> layer = RingLayer.init_window(1, 3, 1, 4, dtype=jnp.float32)
        >>> for p in range(5):
        ...     k = jnp.full((1, 1, 1, 4), p, jnp.float32)
        ...     layer = layer.update(k, k, positions=jnp.array([[p]]))
        >>> layer.positions.tolist(), layer.length.tolist()
        ([[[3, 4, 2]]], [[3]])

    References:
        Mistral 7B (arXiv 2310.06825), section 2 (rolling buffer cache); Gemma 3 (arXiv 2503.19786),
        section 2.
    """

    window: int = dataclasses.field(default=0, metadata={"static": True})

    evictable: ClassVar[bool] = False

    @classmethod
    def init_window(
        cls,
        batch: int,
        window: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        limit: int | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> RingLayer:
        """Return an empty ring.

        Args:
            batch: rows.
            window: tokens that a query sees, itself included.
            num_kv_heads: KV heads.
            head_dim: size of a head.
            limit: tokens that will ever come; slots beyond it are not allocated. ``None``: any.
            dtype: storage, as in :meth:`DenseCache.init`.

        Returns:
            A layer of ``min(window, limit)`` slots.
        """
        capacity = window if limit is None else min(window, limit)
        layer = cls.init(batch, capacity, num_kv_heads, head_dim, dtype=dtype)
        return dataclasses.replace(layer, window=window)

    def free(self) -> jax.Array:
        """Return how many more tokens can come, int32 ``[B]``; no bound once it is a full ring."""
        if self.capacity == self.window:
            return jnp.full(self.length.shape[:1], jnp.iinfo(jnp.int32).max)
        return self.capacity - jnp.max(self.length, axis=1)

    def update(
        self,
        k: jax.Array,
        v: jax.Array,
        *,
        positions: jax.Array,
        valid: jax.Array | None = None,
        queries: jax.Array | None = None,
    ) -> Any:
        """Return the ring with the tokens written, or for several tokens a :class:`RingView`.

        Arguments and errors are those of :meth:`DenseLayer.update`; ``queries`` are not needed.
        ``overflow`` is set if a token the window still needs is overwritten, which a ring of fewer
        slots than its window allows.
        """
        batch, heads, capacity = self.positions.shape
        check_tokens(k, v, (batch, heads, self.k.shape[-1]), positions, valid)
        if valid is None:
            valid = jnp.ones(positions.shape, bool)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, T, H]
        offset = first_mean(self.offset, k, valid, self.length)
        store = self.store.removesuffix("_smooth")
        k, v = encode(k if offset is None else k - offset, store), encode(v, store)
        after = jnp.sum(valid, axis=1, keepdims=True) - jnp.cumsum(valid, axis=1)  # [B, T]
        slots = jnp.where(valid & (after < capacity), positions % capacity, capacity)
        slots = jnp.broadcast_to(slots[:, None], (batch, heads, slots.shape[1]))
        places = jnp.broadcast_to(positions[:, None].astype(jnp.int32), slots.shape)
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None]
        lost = (self.capacity < self.window) & jnp.any(self.length + count > capacity, axis=1)
        ring = dataclasses.replace(
            self,
            k=jax.tree.map(lambda s, n: scatter(s, slots, n), self.k, k),
            v=jax.tree.map(lambda s, n: scatter(s, slots, n), self.v, v),
            positions=scatter(self.positions, slots, places),
            length=jnp.minimum(self.length + count, capacity),
            overflow=self.overflow | lost,
            offset=offset,
        )
        if positions.shape[1] == 1:
            return ring
        old = dataclasses.replace(self, offset=offset)
        return RingView(old, ring, k, v, jnp.where(valid[:, None], places, -1))

    def gather(self, indices: jax.Array, *, capacity: int | None = None) -> DenseLayer:
        """Refuse: what a window still sees is kept, and nothing else is stored."""
        del indices, capacity
        raise NotImplementedError(
            f"a ring of window={self.window} tokens keeps exactly its window; compress the layers "
            "with evictable=True"
        )

    def extend(self, tokens: int) -> RingLayer:
        """Return the ring with up to ``tokens`` more slots, never more than its window."""
        capacity = min(self.window, self.capacity + tokens)
        if capacity == self.capacity:
            return self
        slots = jnp.where(self.positions >= 0, self.positions % capacity, capacity)

        def move(x, fill):
            pad = [(0, 0)] * x.ndim
            pad[2] = (0, capacity - self.capacity)
            empty = jnp.pad(jnp.full_like(x, fill), pad, constant_values=fill)
            return scatter(empty, slots, x)

        return dataclasses.replace(
            self,
            k=jax.tree.map(lambda x: move(x, 0), self.k),
            v=jax.tree.map(lambda x: move(x, 0), self.v),
            positions=move(self.positions, -1),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingView:
    """A ring during a call of several tokens: what it held, then the tokens themselves.

    Args:
        old: the ring before the call.
        new: the ring after it.
        k, v: the call's tokens as stored ``[B, K, T, H]``.
        positions: int32 ``[B, K, T]``, -1 where padding.

    Examples:
        >>> layer = RingLayer.init_window(1, 2, 1, 4, dtype=jnp.float32)
        >>> k = jnp.ones((1, 3, 1, 4))
        >>> view = layer.update(k, k, positions=jnp.arange(3)[None])
        >>> view.read()[0].shape, view.settle().positions.tolist()
        ((1, 5, 1, 4), [[[2, 1]]])

    References:
        Mistral 7B (arXiv 2310.06825), section 2 (pre-fill and chunking).
    """

    old: RingLayer
    new: RingLayer
    k: Any
    v: Any
    positions: jax.Array

    @property
    def overflow(self) -> jax.Array:
        """Rows that lost a token, bool ``[B]``."""
        return self.new.overflow

    def settle(self) -> RingLayer:
        """Return the ring after the call."""
        return self.new

    def read(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of the old ring, then of the call, ``[B, C + T, K, H]``."""
        keys, values = self.old.read(dtype)
        own = (decode_keys(self.k, self.old.offset, dtype), decode(self.v, dtype))
        own = [jnp.swapaxes(x, 1, 2) for x in own]
        return jnp.concatenate([keys, own[0]], 1), jnp.concatenate([values, own[1]], 1)

    def mask(self, positions: jax.Array, window: int | None = None) -> jax.Array:
        """Return which old slots and new tokens each query sees, bool ``[B, K, T, C + T]``."""
        window = self.old.window if window is None else window
        both = jnp.concatenate([self.old.positions, self.positions], axis=-1)[:, :, None]
        query = positions[:, None, :, None]
        return (both >= 0) & (both <= query) & (query - both < window)
