"""What every cache compressor shares: its hooks in a generation, and the choice of slots."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.kv_cache import KVCache, Observer
from pallas_kernels import largest_slots


class ContextPass(NamedTuple):
    """One extra forward over the context that a compressor asks for.

    Args:
        tokens: int32 ``[B, A]``, the model's input.
        valid: bool ``[B, A]``, which of them are real.
        start: first context slot that this pass scores, in tokens.

    Examples:
        >>> ContextPass(np.zeros((1, 4), np.int32), np.ones((1, 4), bool), 0).start
        0

    References:
        KVzip (arXiv 2505.23416), section 3.2.
    """

    tokens: np.ndarray
    valid: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressor:
    """Decides which cache entries live on; the base class keeps all of them.

    A compressor is a frozen dataclass, so it is a static argument of a compiled function. A
    generation calls its hooks in this order: :meth:`fit`, :meth:`after_prefill` (compiled with the
    prefill), :meth:`context_passes` with :meth:`observe` and :meth:`collect`, then
    :meth:`evict_context`, and :meth:`after_step` (compiled, once per decoded token). A method
    overrides the ones it needs.

    Args:
        storage: how the cache is stored (``"int8"``, ``"bfloat16"``, …); ``None``: as the caller
            asks.

    Examples:
        >>> Compressor().prefill_capacity(prompt=10, room=5)
        15

    References:
        R-KV (arXiv 2505.24133), section 3; KVzip (arXiv 2505.23416), section 3.
    """

    storage: str | None = None

    name: ClassVar[str] = "base"
    primary: ClassVar[str | None] = None  # the field that "name:value" sets

    @property
    def query_window(self) -> int:
        """Queries that the cache must remember per layer; 0 if scores need none."""
        return 0

    @property
    def observer(self) -> Observer | None:
        """What the cache must run along with every call; ``None`` if scores need nothing."""
        return None

    def bind(self, **facts: Any) -> Compressor:
        """Return an equal compressor that knows the model's facts where a setting was ``None``.

        Args:
            **facts: ``scale`` (softmax scale) and ``frequencies`` (of RoPE); a method takes those
                that are among its fields.
        """
        names = {field.name for field in dataclasses.fields(self)}
        missing = {k: v for k, v in facts.items() if k in names and getattr(self, k) is None}
        return dataclasses.replace(self, **missing) if missing else self

    @property
    def evicts_context(self) -> bool:
        """Whether :meth:`evict_context` makes the decode cache, even without passes."""
        return False

    def fit(self, *, prompt: int, room: int) -> Compressor:
        """Return an equal compressor that allocates no more than ``prompt + room`` slots."""
        del prompt, room
        return self

    def prefill_capacity(self, *, prompt: int, room: int) -> int:
        """Return the slots of the cache that the prefill fills, in tokens."""
        return prompt + room

    def after_prefill(self, cache: KVCache) -> KVCache:
        """Return the cache that decoding starts from; runs inside the compiled prefill."""
        return cache

    def context_passes(
        self, tokens: np.ndarray, lengths: np.ndarray, *, vocab_size: int
    ) -> list[ContextPass]:
        """Return the extra forwards over the prompt that the scores need; all of one shape."""
        del tokens, lengths, vocab_size
        return []

    @property
    def pass_format(self) -> str | None:
        """Format of the products in a context pass, ``"fp8"``; ``None``: as the model computes."""
        return None

    def most_passes(self, cache: KVCache) -> int:
        """Return how many passes one forward may take side by side over this cache."""
        del cache
        return 1

    def observe(self, cache: KVCache, start: jax.Array) -> KVCache:
        """Return a view of the cache that records scores while the model runs over it.

        ``start`` is that of a pass, or ``[P]`` of passes side by side, ``tokens [B, P * A]``.
        """
        raise NotImplementedError(f"{self.name} asks for no context passes")

    def collect(self, cache: KVCache) -> tuple[jax.Array, ...]:
        """Return the scores that a view recorded, one ``[B, K, S]`` per layer."""
        raise NotImplementedError(f"{self.name} asks for no context passes")

    def evict_context(self, cache: KVCache, scores: tuple[jax.Array, ...], *, room: int) -> KVCache:
        """Return the cache without the entries that score low; outside any compiled function."""
        raise NotImplementedError(f"{self.name} asks for no context passes")

    def after_step(self, cache: KVCache) -> KVCache:
        """Return the cache after a decoded token; runs inside the compiled decode loop."""
        return cache

    def due(self, cache: KVCache) -> jax.Array | None:
        """Return whether :meth:`after_step` would change the cache, a bool scalar.

        ``None``: it may always. A loop that knows runs from one change to the next and leaves the
        cache alone in between.
        """
        del cache
        return None

    def before_turn(self, cache: KVCache, *, tokens: int, room: int) -> KVCache:
        """Return a compressed cache with room for a question of ``tokens`` and what follows it."""
        return cache.extend(tokens + room)

    def after_turn(self, cache: KVCache, *, tokens: int) -> KVCache:
        """Return the cache after a question of ``tokens``; runs inside the compiled prefill."""
        del tokens
        return cache


def select(
    scores: jax.Array,
    budget: int,
    *,
    slot_order: str = "time",
    frozen: jax.Array | None = None,
    count: jax.Array | None = None,
) -> jax.Array:
    """Choose the ``budget`` slots with the highest scores, per row and head.

    ``-inf`` marks slots that cannot be chosen, ``+inf`` slots that must be. Equal scores: the
    lower slot wins.

    Args:
        scores: f32 ``[B, K, S]``, higher = keep.
        budget: slots to keep, in ``[0, S]``.
        slot_order: ``"time"``: the kept slots stay in their order. ``"score"``: descending score,
            then the slots forced with ``+inf`` in their order (what R-KV's code does).
        frozen: int32 ``[B, K]``, leading slots that come first in any order; ``None``: none.
        count: int32 ``[B, K]``, how many of the ``budget`` best a head really keeps; ``None``: all.

    Returns:
        int32 ``[B, K, budget]``, slot indices; -1, at the end, where fewer than ``budget`` slots
        could be chosen.

    Raises:
        ValueError: if the budget exceeds the slots or the order is unknown.

    Examples:
        >>> scores = jnp.array([[[0.1, 0.9, 0.5, jnp.inf, -jnp.inf]]])
        >>> select(scores, 3).tolist(), select(scores, 3, slot_order="score").tolist()
        ([[[1, 2, 3]]], [[[1, 2, 3]]])
        >>> select(scores, 5).tolist()
        [[[0, 1, 2, 3, -1]]]

    References:
        R-KV (arXiv 2505.24133), Algorithm 1.
    """
    slots = scores.shape[-1]
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer):
        raise ValueError(f"budget={budget!r}; expected a whole number of slots")
    if not 0 <= budget <= slots:
        raise ValueError(f"budget={budget} must be in [0, {slots}], the number of scored slots")
    if slot_order not in ("time", "score"):
        raise ValueError(f"slot_order={slot_order!r}; expected 'time' or 'score'")
    if slot_order == "time":
        return largest_slots(scores, budget, count)
    values, indices = jax.lax.top_k(scores, budget)  # [B, K, budget]
    if count is not None:
        values = jnp.where(jnp.arange(budget) < count[..., None], values, -jnp.inf)
    key = jnp.where(values == jnp.inf, budget + indices, jnp.arange(budget))
    if frozen is not None:
        key = jnp.where(indices < frozen[..., None], indices - slots, key)
    key = jnp.where(values > -jnp.inf, key, budget + slots)
    order = jnp.argsort(key, axis=-1)
    kept = jnp.where(values > -jnp.inf, indices, -1)
    return jnp.take_along_axis(kept, order, axis=-1).astype(jnp.int32)


def check_queries(queries: jax.Array, keys: jax.Array) -> None:
    """Say how queries ``[B, A, N, H]`` do not fit keys ``[B, S, K, H]``.

    Raises:
        ValueError: if an array has not four axes, sizes differ or ``K`` does not divide ``N``.

    Examples:
        >>> check_queries(jnp.ones((1, 2, 4, 8)), jnp.ones((1, 5, 2, 8)))

    References:
        R-KV (arXiv 2505.24133), equations 2 and 3 (groups of query heads).
    """
    for name, x, form in (("queries", queries, "[B, A, N, H]"), ("keys", keys, "[B, S, K, H]")):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; expected {form}")
    if queries.shape[::3] != keys.shape[::3]:
        raise ValueError(
            f"queries has shape {queries.shape}; expected [B, A, N, H] with B={keys.shape[0]} and "
            f"H={keys.shape[3]}, as keys has"
        )
    if queries.shape[2] % keys.shape[2]:
        raise ValueError(
            f"keys has {keys.shape[2]} heads; query heads ({queries.shape[2]}) must be a multiple "
            "of it"
        )


def live_slots(keys: jax.Array, length: jax.Array | None) -> jax.Array:
    """Return which slots are live, bool ``[B, K, S]``.

    Args:
        keys: ``[B, S, K, H]``.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all.

    Examples:
        >>> live_slots(jnp.ones((1, 3, 1, 2)), jnp.array([2])).tolist()
        [[[True, True, False]]]

    References:
        R-KV (arXiv 2505.24133), section 3.1.
    """
    batch, slots, heads, _ = keys.shape
    length = jnp.asarray(slots if length is None else length, jnp.int32)
    length = length[:, None] if length.ndim == 1 else length
    return jnp.arange(slots) < jnp.broadcast_to(length, (batch, heads))[..., None]


def masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the softmax over the last axis among the marked entries, zeros where none is marked.

    Args:
        logits: f32, any shape.
        mask: bool, broadcastable to it.

    Returns:
        f32 of the same shape; rows sum to 1, or to 0 if nothing is marked.

    Examples:
        >>> masked_softmax(jnp.zeros((2, 2)), jnp.array([[True, True], [False, False]])).tolist()
        [[0.5, 0.5], [0.0, 0.0]]

    References:
        R-KV (arXiv 2505.24133), equation 2.
    """
    top = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
