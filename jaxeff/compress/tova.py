"""TOVA: keep what the last token attends to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import check_queries, live_slots, masked_softmax
from jaxeff.compress.rkv import group_logits
from jaxeff.compress.scorer import Scorer


def scores(
    queries: jax.Array,
    keys: jax.Array,
    *,
    length: jax.Array | None = None,
    query_valid: jax.Array | None = None,
    window: int = 1,
    scale: float | None = None,
) -> jax.Array:
    """Score slots by the last query's attention, averaged over all heads.

    Args:
        queries: float ``[B, A, N, H]`` after RoPE; the paper has ``A = 1``, more are averaged.
        keys: float ``[B, S, K, H]`` after RoPE.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        query_valid: bool ``[B, A]``, real queries; ``None``: all.
        window: last live slots that always stay, in tokens, 0 or more.
        scale: softmax scale; ``None``: ``H ** -0.5``.

    Returns:
        f32 ``[B, K, S]``, the same for all heads, ``+inf`` on the window, ``-inf`` on dead slots.

    Raises:
        ValueError: if the window is negative or head counts do not divide.

    Examples:
        >>> scores(jnp.ones((1, 1, 2, 4)), jnp.ones((1, 2, 1, 4))).tolist()
        [[[0.5, inf]]]

    References:
        TOVA (arXiv 2401.06104), section 3.2.
    """
    if window < 0:
        raise ValueError(f"window={window}; expected 0 or more tokens")
    check_queries(queries, keys)
    live = live_slots(keys, length)
    if query_valid is None:
        query_valid = jnp.ones(queries.shape[:2], bool)
    real = query_valid[:, None, None, :, None]
    weights = masked_softmax(group_logits(queries, keys, scale), live[:, :, None, None] & real)
    count = jnp.maximum(jnp.sum(query_valid, axis=1), 1)[:, None]
    mean = jnp.sum(jnp.mean(weights, axis=(1, 2)), axis=1) / count  # [B, S]
    recent = jnp.arange(keys.shape[1]) >= jnp.sum(live, axis=-1, keepdims=True) - window
    return jnp.where(live, jnp.where(recent, jnp.inf, mean[:, None]), -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(Scorer):
    """Drops the entries that the newest token attends to least; one set for all heads of a layer.

    Args:
        budget: entries kept per head, in tokens; the last always stays.
        scale: softmax scale; ``None``: ``H ** -0.5``.
        buffer, window, num_sinks, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`. The paper has ``buffer=1``.

    Examples:
        >>> TOVA(budget=64).query_window
        1

    References:
        TOVA (arXiv 2401.06104), section 3.2.
    """

    scale: float | None = None

    name: ClassVar[str] = "tova"

    @property
    def query_window(self) -> int:
        """One: the last query."""
        return 1

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return :func:`scores` of a layer with its last query."""
        del index
        return scores(
            jnp.swapaxes(layer.queries, 1, 2),
            layer.read(jnp.float32)[0],
            length=layer.length,
            query_valid=layer.query_positions >= 0,
            window=self.window,
            scale=self.scale,
        )
