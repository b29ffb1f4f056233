"""The cache types that models, compressors and the decode loop share.

A model sees one :class:`LayerCache` per layer and three calls: ``update``, ``read``, ``mask``.
Nothing in a layer cache is tied to a model, and every cache is an immutable pytree: an update
returns a new cache, so a fork is simply the old value.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


@runtime_checkable
class LayerCache(Protocol):
    """What an attention layer asks of its cache; any pytree with these members serves.

    Shapes: query ``B T N H``, key and value ``B S K H``. Keys arrive after RoPE and are never
    rotated again, so a slot may move while its ``positions`` entry stays.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> isinstance(DenseCache.init(1, 1, 4, 1, 8).layers[0], LayerCache)
        True

    References:
        R-KV (arXiv 2505.24133), section 3.1; KVzip (arXiv 2505.23416), section 3.
    """

    def update(
        self,
        k: jax.Array,
        v: jax.Array,
        *,
        positions: jax.Array,
        valid: jax.Array | None = None,
        queries: jax.Array | None = None,
    ) -> LayerCache:
        """Return the cache with the tokens of this call appended."""
        ...

    def read(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Return keys and values ``[B, S, K, H]``; slots that are not live hold zeros."""
        ...

    def mask(self, positions: jax.Array, window: int | None = None) -> jax.Array:
        """Return which slots each query may see, bool ``[B, K, T, S]``."""
        ...


@runtime_checkable
class Observer(Protocol):
    """What a method that learns from every query puts beside a cache; a static, hashable object.

    Its state lives in the cache, so it is donated, sharded, forked and compacted with it: slot
    state follows its slot, row state stays with its row.

    Examples:
        >>> from jaxeff.compress.h2o import AttentionMass
        >>> isinstance(AttentionMass(), Observer)
        True

    References:
        H2O (arXiv 2306.14048), section 4.1 (scores that run along with decoding).
    """

    def init(
        self, batch: int, capacity: int, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> tuple[Any, Any]:
        """Return the empty slot state (arrays ``[B, K, C, ...]``) and row state (``[B, ...]``)."""
        ...

    def observe(
        self,
        layer: LayerCache,
        slot_state: Any,
        row_state: Any,
        queries: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
    ) -> tuple[Any, Any]:
        """Return both states after a call's queries; ``layer`` already holds its tokens."""
        ...


CACHE_VERSION = 1  # raised when the meaning of a cache's arrays changes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The caches of all layers and how many tokens each row has seen.

    ``seen`` counts logical tokens and gives the next RoPE position; it never shrinks, while the
    ``length`` of a layer (slots in use, per row and KV head) falls when entries are evicted.

    Args:
        layers: one :class:`LayerCache` per layer; their capacities may differ.
        seen: int32 ``[B]``, tokens so far, 0 or more.
        version: layout of the arrays; caches of different versions never mix.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> cache = DenseCache.init(2, 1, 4, 1, 8, dtype=jnp.float32)
        >>> k = jnp.ones((1, 3, 1, 8))
        >>> positions = cache.seen[:, None] + jnp.arange(3)
        >>> layers = [layer.update(k, k, positions=positions) for layer in cache.layers]
        >>> cache = cache.advance(layers, jnp.ones((1, 3), bool))
        >>> cache.seen.tolist(), cache.lengths().tolist()
        ([3], [[[3]], [[3]]])

    References:
        R-KV (arXiv 2505.24133), section 3.1 and appendix C.1 (what a cache costs).
    """

    layers: tuple[LayerCache, ...]
    seen: jax.Array
    version: int = dataclasses.field(default=CACHE_VERSION, metadata={"static": True})

    @property
    def overflow(self) -> jax.Array:
        """Rows that lost a token because a layer was full, bool ``[B]``."""
        flags = [layer.overflow for layer in self.layers if hasattr(layer, "overflow")]
        start = jnp.zeros(self.seen.shape, bool)
        return start if not flags else jnp.any(jnp.stack(flags), axis=0)

    def advance(self, layers, valid: jax.Array) -> KVCache:
        """Return the cache with its layers replaced and ``seen`` moved on.

        Args:
            layers: the updated layers, as many as before.
            valid: bool ``[B, T]``, which tokens of this call are real.

        Returns:
            A new cache with ``seen + valid.sum(axis=1)``.

        Raises:
            ValueError: if the number of layers or of rows changed, or the cache is of another
                version than this code reads.
        """
        self.check_version()
        layers = tuple(layers)
        if len(layers) != len(self.layers):
            raise ValueError(f"layers has {len(layers)} entries; the cache has {len(self.layers)}")
        if valid.ndim != 2 or valid.shape[0] != self.seen.shape[0]:
            raise ValueError(
                f"valid has shape {valid.shape}; expected [{self.seen.shape[0]}, T] (bool)"
            )
        # A ring shows the tokens in flight beside what it holds; now they are behind us.
        layers = tuple(x.settle() if hasattr(x, "settle") else x for x in layers)
        seen = self.seen + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return dataclasses.replace(self, layers=layers, seen=seen)

    def check_version(self) -> None:
        """Raise ``ValueError`` if the cache is of another version than this code reads."""
        if self.version != CACHE_VERSION:
            raise ValueError(
                f"the cache has version {self.version}; this code reads version {CACHE_VERSION}. "
                "Make it anew from its tokens"
            )

    def lengths(self) -> jax.Array:
        """Return the live slots per layer, row and KV head, int32 ``[L, B, K]``."""
        return jnp.stack([layer.length for layer in self.layers])

    def kept_ratio(self) -> jax.Array:
        """Return live slots over tokens seen, averaged over layers and heads, f32 ``[B]``."""
        mean = jnp.mean(self.lengths().astype(jnp.float32), axis=(0, 2))  # [B]
        return mean / jnp.maximum(self.seen, 1)

    def allocated_bytes(self) -> int:
        """Return the bytes of all arrays of the cache: payload, scales, positions, counters."""
        return tree_bytes(self)

    def extend(self, tokens: int) -> KVCache:
        """Return the cache with room for ``tokens`` more entries per head, nothing dropped.

        Args:
            tokens: 0 or more.

        Returns:
            A larger cache with the same entries.

        Raises:
            ValueError: if ``tokens`` is negative.
        """
        if tokens < 0:
            raise ValueError(f"tokens={tokens}; expected 0 or more")
        layers = tuple(layer.extend(tokens) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def require_room(self, tokens: int) -> None:
        """Raise before an append of ``tokens`` per row would lose one; on concrete arrays.

        Args:
            tokens: tokens about to be appended to every row.

        Raises:
            ValueError: naming the layer, its capacity, and what is missing.
        """
        for number, layer in enumerate(self.layers):
            if not getattr(layer, "evictable", True):
                continue  # a ring forgets by design
            free = int(np.min(np.asarray(layer.free())))
            if tokens > free:
                raise ValueError(
                    f"layer {number} has room for {free} more tokens (capacity {layer.capacity}); "
                    f"{tokens} are to be appended. Use cache.extend({tokens - free}) first"
                )

    def fork(self) -> KVCache:
        """Return a copy with its own buffers, which survives a donation of this cache.

        Without donation no copy is needed: arrays never change, the old value is the fork.
        """
        return jax.tree.map(jnp.copy, self)

    def restore(self, fork: KVCache) -> KVCache:
        """Return a copy of ``fork`` if it could stand in the place of this cache.

        Args:
            fork: a cache made by :meth:`fork`, or by loading a checkpoint.

        Returns:
            A cache equal to ``fork`` with its own buffers, so that it can be restored again.

        Raises:
            ValueError: if the fork is of another version or layout, or one of its arrays has
                another shape or dtype; the message names the first that differs.
        """
        if not isinstance(fork, KVCache):
            raise ValueError(f"fork is a {type(fork).__name__}; expected a KVCache")
        if fork.version != self.version:
            raise ValueError(
                f"fork has cache version {fork.version}; this cache has version {self.version}"
            )
        own, own_tree = jax.tree_util.tree_flatten_with_path(self)
        other, other_tree = jax.tree_util.tree_flatten_with_path(fork)
        if own_tree != other_tree:
            kinds = [
                [f"{type(x).__name__}({getattr(x, 'store', '')})" for x in c.layers]
                for c in (fork, self)
            ]
            raise ValueError(
                f"fork is laid out differently: layers {kinds[0]} where this cache has {kinds[1]}, "
                "or another observer or query window"
            )
        for (path, mine), (_, its) in zip(own, other, strict=True):
            if mine.shape != its.shape or mine.dtype != its.dtype:
                raise ValueError(
                    f"fork{jax.tree_util.keystr(path)} is {its.dtype} of shape {its.shape}; "
                    f"this cache has {mine.dtype} of shape {mine.shape}"
                )
        return fork.fork()


def tree_bytes(tree: Any) -> int:
    """Return the bytes that the arrays of a pytree occupy.

    Args:
        tree: any pytree of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
        ``sum(size * itemsize)`` over the leaves, in bytes.

    Examples:
        >>> tree_bytes({"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(1, jnp.int8)})
        13

    References:
        R-KV (arXiv 2505.24133), appendix C.1.
    """
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def check_invariants(cache: KVCache, *, time_order: bool = True) -> None:
    """Check that a cache is well formed; for tests and debugging, on concrete arrays.

    Checked per row and head: slots ``0 … length-1`` are live and no others; live positions are
    unique, below ``seen`` and, with ``time_order``, increasing; ``frozen <= length <= capacity``.

    Args:
        cache: the cache to look at (not under ``jit``).
        time_order: also ask that positions increase along the slots (rings excepted).

    Raises:
        ValueError: naming the layer and the rule that is broken.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> check_invariants(DenseCache.init(1, 2, 4, 1, 8))

    References:
        R-KV (arXiv 2505.24133), section 3.1: the retained set is a subset of the past tokens.
    """
    seen = np.asarray(cache.seen)[:, None, None]  # [B, 1, 1]
    for number, layer in enumerate(cache.layers):
        positions = np.asarray(layer.positions)  # [B, K, C]
        length = np.asarray(layer.length)[..., None]  # [B, K, 1]
        capacity = positions.shape[-1]
        live = np.arange(capacity) < length
        both = live[..., 1:] & live[..., :-1]
        ordered = np.sort(np.where(live, positions, -1 - np.arange(capacity)), axis=-1)
        rules = {
            "length must be in [0, capacity]": ((length >= 0) & (length <= capacity)).all(),
            "positions >= 0 exactly on the live slots": ((positions >= 0) == live).all(),
            "live positions must be below seen": (positions < np.maximum(seen, 1)).all(),
            "live positions must be unique": (np.diff(ordered, axis=-1) > 0).all(),
            "frozen must be at most length": (np.asarray(layer.frozen)[..., None] <= length).all(),
        }
        if time_order and getattr(layer, "evictable", True):
            increasing = (np.diff(positions, axis=-1) > 0) | ~both
            rules["live positions must increase"] = increasing.all()
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"layer {number}: {rule}")
