"""KeyDiff: keep the keys that differ from the others."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import live_slots
from jaxeff.compress.scorer import Scorer


def scores(keys: jax.Array, *, length: jax.Array | None = None) -> jax.Array:
    """Score slots by how little their key points where keys point on average.

    ``score_j = -cos(k_j, mean_i k̂_i)`` with ``k̂ = k / ‖k‖``, over the live slots.

    Args:
        keys: float ``[B, S, K, H]`` after RoPE.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.

    Returns:
        f32 ``[B, K, S]`` in [-1, 1], ``-inf`` on dead slots.

    Examples:
        >>> scores(jnp.array([[[[1.0, 0.0]], [[1.0, 0.0]], [[-1.0, 0.0]]]])).tolist()
        [[[-1.0, -1.0, 1.0]]]

    References:
        KeyDiff (arXiv 2504.15364), section 3.
    """
    live = live_slots(keys, length)
    unit = jnp.swapaxes(keys.astype(jnp.float32), 1, 2)  # [B, K, S, H]
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-8)
    anchor = jnp.sum(jnp.where(live[..., None], unit, 0.0), axis=2, keepdims=True)
    anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-8)
    return jnp.where(live, -jnp.sum(unit * anchor, axis=-1), -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Scorer):
    """Needs no queries: keeps distinctive keys.

    Args:
        budget: entries kept per head, in tokens.
        buffer, window, num_sinks, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> KeyDiff(budget=64).query_window
        0

    References:
        KeyDiff (arXiv 2504.15364), section 3.
    """

    name: ClassVar[str] = "keydiff"

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return :func:`scores` of a layer."""
        del index
        return scores(layer.read(jnp.float32)[0], length=layer.length)
