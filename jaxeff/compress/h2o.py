"""H2O: keep the heavy hitters, the entries that collected the most attention so far."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import check_queries, live_slots, masked_softmax
from jaxeff.compress.rkv import group_logits
from jaxeff.compress.scorer import Scorer

STATISTICS = ("sum", "mean", "max")


def scores(
    queries: jax.Array,
    keys: jax.Array,
    *,
    length: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    positions: jax.Array | None = None,
    statistic: str = "sum",
    scale: float | None = None,
) -> jax.Array:
    """Score slots by the causal attention that they received from the given queries.

    ``sum``: ``Σ_i A[i, j]``; ``mean``: that over the queries that could see ``j``; ``max``:
    ``max_i A[i, j]``. Averaged (``max``: maximised) over the query heads of a group.

    Args:
        queries: float ``[B, T, N, H]`` after RoPE.
        keys: float ``[B, S, K, H]`` after RoPE.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        query_positions: int32 ``[B, T]``, -1 for no query; ``None``: the last ``T`` live slots.
        positions: int32 ``[B, K, S]``; ``None``: ``0 … S-1``.
        statistic: ``"sum"``, ``"mean"`` or ``"max"``.
        scale: softmax scale; ``None``: ``H ** -0.5``.

    Returns:
        f32 ``[B, K, S]``, ``-inf`` on dead slots.

    Raises:
        ValueError: if the statistic is unknown or head counts do not divide.

    Examples:
        >>> q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1, 4))
        >>> scores(q, k).tolist()
        [[[1.5, 0.5]]]

    References:
        H2O (arXiv 2306.14048), section 4; ``mean`` as in kvpress, ``max`` as in KVzip's comparison.
    """
    _check_statistic(statistic)
    check_queries(queries, keys)
    live = live_slots(keys, length)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(keys.shape[1]), live.shape)
    positions = jnp.where(live, positions, -1)
    if query_positions is None:
        last = jnp.max(positions, axis=(1, 2))[:, None]
        query_positions = last - queries.shape[1] + 1 + jnp.arange(queries.shape[1])
    mass = _mass(queries, keys, query_positions, positions, statistic, scale)
    if statistic == "mean":
        able = query_positions[:, None, :, None] >= positions[:, :, None]
        able = able & (query_positions >= 0)[:, None, :, None]
        mass = mass / jnp.maximum(jnp.sum(able, axis=2), 1)
    return jnp.where(live, mass, -jnp.inf)


def _check_statistic(statistic: str) -> None:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r}; expected 'sum', 'mean' or 'max'")


def _mass(queries, keys, query_positions, positions, statistic, scale, block=128):
    """Return summed (or largest) attention per slot ``[B, K, S]``, in blocks of queries."""
    batch, rows = query_positions.shape
    size = min(block, rows)
    blocks = -(-rows // size)
    pad = blocks * size - rows
    queries = jnp.pad(queries, ((0, 0), (0, pad), (0, 0), (0, 0)))
    queries = jnp.moveaxis(queries.reshape(batch, blocks, size, *queries.shape[2:]), 1, 0)
    places = jnp.pad(query_positions, ((0, 0), (0, pad)), constant_values=-1)
    places = jnp.moveaxis(places.reshape(batch, blocks, size), 1, 0)

    def one_block(total, item):
        part, place = item
        seen = (positions >= 0)[:, :, None] & (positions[:, :, None] <= place[:, None, :, None])
        weights = masked_softmax(group_logits(part, keys, scale), seen[:, :, None])
        if statistic == "max":
            return jnp.maximum(total, jnp.max(weights, axis=(2, 3))), None
        return total + jnp.sum(jnp.mean(weights, axis=2), axis=2), None

    start = jnp.zeros(positions.shape, jnp.float32)
    return jax.lax.scan(one_block, start, (queries, places))[0]


@dataclasses.dataclass(frozen=True)
class AttentionMass:
    """Carries the attention that each slot has received, through prefill, decoding, compaction.

    Args:
        statistic: ``"max"`` keeps the largest weight, else the sum.
        scale: softmax scale; ``None``: ``H ** -0.5``.

    Examples:
        >>> AttentionMass().init(1, 4, 2, 1, 8)[0].shape
        (1, 1, 4)

    References:
        H2O (arXiv 2306.14048), section 4.1.
    """

    statistic: str = "sum"
    scale: float | None = None

    def init(self, batch, capacity, num_heads, num_kv_heads, head_dim):
        """Return no attention for any slot, and nothing per row."""
        del num_heads, head_dim
        return jnp.zeros((batch, num_kv_heads, capacity), jnp.float32), None

    def observe(self, layer, slot_state, row_state, queries, positions, valid):
        """Return the state after the attention of these queries over the live slots."""
        keys, _ = layer.read(jnp.float32)
        places = jnp.where(valid, positions, -1)
        mass = _mass(queries, keys, places, layer.positions, self.statistic, self.scale)
        join = jnp.maximum if self.statistic == "max" else jnp.add
        return join(slot_state, mass), row_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Scorer):
    """Keeps recent entries and those with the most accumulated attention.

    The sums are carried in the cache from the first prompt token on, so an entry's score counts
    every query since, not only the last ones.

    Args:
        budget: entries kept per head, in tokens.
        window: recent entries that always stay; ``None``: half of the budget, as in the paper.
        statistic: ``"sum"``, ``"mean"`` (over the queries that could see an entry) or ``"max"``.
        scale: softmax scale; ``None``: ``H ** -0.5``.
        buffer, num_sinks, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> H2O(budget=64).window
        32

    References:
        H2O (arXiv 2306.14048), section 4. The entries that compete are those still in the cache.
    """

    window: int | None = None
    statistic: str = "sum"
    scale: float | None = None

    name: ClassVar[str] = "h2o"

    def __post_init__(self):
        if self.window is None and isinstance(self.budget, int):
            object.__setattr__(self, "window", max(self.budget // 2, 1))
        super().__post_init__()
        _check_statistic(self.statistic)

    @property
    def observer(self) -> AttentionMass:
        """The running attention mass."""
        statistic = "max" if self.statistic == "max" else "sum"
        return AttentionMass(statistic, self.scale)

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return the accumulated attention of every slot."""
        del index
        if not isinstance(layer.observer, AttentionMass):
            raise ValueError(
                "the cache carries no attention mass; make it with observer=H2O.observer"
            )
        mass = layer.slot_states()
        if self.statistic != "mean":
            return mass
        last = jnp.max(layer.positions, axis=(1, 2), keepdims=True)
        return mass / jnp.maximum(last - layer.positions + 1, 1)
