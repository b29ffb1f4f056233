"""StreamingLLM: keep the first tokens and the most recent ones."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import live_slots
from jaxeff.compress.scorer import Scorer


def scores(keys: jax.Array, *, length: jax.Array | None = None, num_sinks: int = 4) -> jax.Array:
    """Score slots by their age: ``score_j = j``, and ``+inf`` for the first ``num_sinks``.

    Args:
        keys: ``[B, S, K, H]``; only their shape counts.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        num_sinks: first slots that always stay.

    Returns:
        f32 ``[B, K, S]``, ``-inf`` on dead slots.

    Examples:
        >>> scores(jnp.ones((1, 4, 1, 2)), num_sinks=1).tolist()
        [[[inf, 1.0, 2.0, 3.0]]]

    References:
        StreamingLLM (arXiv 2309.17453), section 3.2. Kept keys hold their position; the original
        re-assigns positions inside the cache.
    """
    live = live_slots(keys, length)
    slot = jnp.arange(keys.shape[1], dtype=jnp.float32)
    return jnp.where(live, jnp.where(slot < num_sinks, jnp.inf, slot), -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Scorer):
    """Attention sinks and a sliding window.

    Args:
        budget: entries kept per head, in tokens.
        num_sinks: first tokens that are never evicted.
        buffer, window, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> StreamingLLM(budget=64).num_sinks
        4

    References:
        StreamingLLM (arXiv 2309.17453), section 3.2.
    """

    num_sinks: int = 4

    name: ClassVar[str] = "streaming_llm"

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return the logical position of every slot; the engine protects the sinks."""
        del index
        return layer.positions.astype(jnp.float32)
