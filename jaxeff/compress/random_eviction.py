"""Random eviction: the floor that every method has to beat."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import live_slots
from jaxeff.compress.scorer import Scorer


def scores(
    keys: jax.Array,
    *,
    length: jax.Array | None = None,
    positions: jax.Array | None = None,
    seed: int = 0,
    layer: int = 0,
) -> jax.Array:
    """Draw a uniform score for every (head, position), the same whenever it is asked for.

    Args:
        keys: ``[B, S, K, H]``; only their shape counts.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        positions: int32 ``[B, K, S]``, logical positions; ``None``: ``0 … S-1``.
        seed: changes all scores.
        layer: changes the scores from layer to layer.

    Returns:
        f32 ``[B, K, S]`` in [0, 1), ``-inf`` on dead slots.

    Examples:
        >>> got = scores(jnp.ones((1, 100, 1, 2)))
        >>> bool(((got >= 0) & (got < 1)).all()), bool(abs(got.mean() - 0.5) < 0.1)
        (True, True)

    References:
        The mixing function is the finaliser of MurmurHash3 (A. Appleby, 2011).
    """
    live = live_slots(keys, length)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(keys.shape[1]), live.shape)
    # Not jax.random: a token keeps its score while its slot moves, in any batch.
    code = _mix(jnp.uint32(seed & 0xFFFFFFFF) ^ jnp.uint32(0x9E3779B9))
    code = _mix(code ^ jnp.uint32(layer))
    code = _mix(code ^ jnp.arange(keys.shape[2], dtype=jnp.uint32))[:, None]  # [K, 1]
    code = _mix(code ^ positions.astype(jnp.uint32))
    return jnp.where(live, (code >> 8).astype(jnp.float32) * 2.0**-24, -jnp.inf)


def _mix(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """Evicts at random, reproducibly.

    Args:
        budget: entries kept per head, in tokens.
        seed: changes the choice.
        buffer, window, num_sinks, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> Random(budget=64, seed=1).seed
        1

    References:
        KVzip (arXiv 2505.23416), section 4 compares against it.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return :func:`scores` of a layer."""
        keys = jnp.zeros((layer.length.shape[0], layer.capacity, layer.length.shape[1], 1))
        return scores(
            keys, length=layer.length, positions=layer.positions, seed=self.seed, layer=index
        )
