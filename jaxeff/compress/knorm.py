"""Knorm: keep the keys of small norm."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import live_slots
from jaxeff.compress.scorer import Scorer


def scores(keys: jax.Array, *, length: jax.Array | None = None) -> jax.Array:
    """Score slots by ``-‖k_j‖``.

    Args:
        keys: float ``[B, S, K, H]``.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.

    Returns:
        f32 ``[B, K, S]``, ``-inf`` on dead slots.

    Examples:
        >>> scores(jnp.array([[[[3.0, 4.0]], [[0.0, 1.0]]]])).tolist()
        [[[-5.0, -1.0]]]

    References:
        A simple and effective L2 norm-based strategy (arXiv 2406.11430), section 3.
    """
    norm = jnp.linalg.norm(jnp.swapaxes(keys.astype(jnp.float32), 1, 2), axis=-1)
    return jnp.where(live_slots(keys, length), -norm, -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knorm(Scorer):
    """Needs no queries: in trained models small keys draw much attention.

    Args:
        budget: entries kept per head, in tokens.
        buffer, window, num_sinks, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> Knorm(budget=64).window
        1

    References:
        A simple and effective L2 norm-based strategy (arXiv 2406.11430), section 3.
    """

    name: ClassVar[str] = "knorm"

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return :func:`scores` of a layer."""
        del index
        return scores(layer.read(jnp.float32)[0], length=layer.length)
