"""SnapKV: keep what the last queries of the prompt attend to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import check_queries, live_slots, masked_softmax
from jaxeff.compress.rkv import group_logits, importance
from jaxeff.compress.scorer import Scorer

# What each code base computes: softmax over all keys (causally) or over the candidates only; rows
# of the window, then query heads of a group, then neighbouring slots, are put together.
VARIANTS = {
    "original": {"causal": True, "rows": "sum", "group": "mean", "pooling": "avg", "kernel": 5},
    "kvpress": {"causal": True, "rows": "mean", "group": "mean", "pooling": "avg", "kernel": 5},
    "kvzip": {"causal": True, "rows": "mean", "group": "mean", "pooling": "max", "kernel": 7},
    "rkv": {"causal": False, "rows": "mean", "group": "max_logit", "pooling": "max", "kernel": 7},
}


def scores(
    queries: jax.Array,
    keys: jax.Array,
    *,
    length: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    positions: jax.Array | None = None,
    window: int | None = None,
    variant: str = "rkv",
    kernel_size: int | None = None,
    pooling: str | None = None,
    group: str | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Score slots by the pooled attention of the last queries.

    Args:
        queries: float ``[B, A, N, H]``, the last queries after RoPE.
        keys: float ``[B, S, K, H]`` after RoPE.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        query_positions: int32 ``[B, A]``, logical positions, -1 for no query; ``None``: the
            queries are those of the last ``A`` live slots, in order.
        positions: int32 ``[B, K, S]``, logical positions of the slots; ``None``: ``0 … S-1``.
        window: last live slots that always stay; ``None``: ``A``.
        variant: ``"original"`` (causal softmax over all keys, rows summed, heads of a group
            averaged, average of 5 neighbours), ``"kvpress"`` (rows averaged instead), ``"kvzip"``
            (maximum of 7 neighbours) or ``"rkv"`` (largest logit of a group, softmax over the
            candidates only, rows averaged, maximum of 7).
        kernel_size: odd number of neighbours; ``None``: the variant's.
        pooling: ``"avg"`` or ``"max"`` over neighbours; ``None``: the variant's.
        group: ``"mean"`` or ``"max"`` of the weights over a group (not for ``"rkv"``); ``None``:
            the variant's.
        scale: softmax scale; ``None``: ``H ** -0.5``.

    Returns:
        f32 ``[B, K, S]``, ``+inf`` on the window, ``-inf`` on dead slots.

    Raises:
        ValueError: if a switch is unknown or head counts do not divide.

    Examples:
        >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 4, 1, 4))
        >>> scores(q, k, variant="original", kernel_size=1).tolist()
        [[[0.25, 0.25, 0.25, inf]]]

    References:
        SnapKV (arXiv 2404.14469), section 4; the ``"rkv"`` form: R-KV (arXiv 2505.24133), equations
        2 to 4.
    """
    kernel_size, pooling, group = _settings(variant, kernel_size, pooling, group)
    chosen = VARIANTS[variant]
    check_queries(queries, keys)
    rows, slots = queries.shape[1], keys.shape[1]
    window = rows if window is None else window
    live = live_slots(keys, length)
    count = jnp.sum(live, axis=-1, keepdims=True)
    candidates = live & (jnp.arange(slots) < count - window)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(slots), live.shape)
    if query_positions is None:
        last = jnp.max(jnp.where(live, positions, -1), axis=(1, 2))[:, None]
        query_positions = last - rows + 1 + jnp.arange(rows)
    real = query_positions >= 0  # [B, A]
    if not chosen["causal"]:
        found = importance(
            queries,
            keys,
            candidates=candidates,
            query_valid=real,
            kernel_size=kernel_size if pooling == "max" else 1,
            pooling="mean" if group == "mean" else "max",
            scale=scale,
        )
        found = found if pooling == "max" else _pool(found, candidates, kernel_size, pooling)
    else:
        seen = live[:, :, None] & (positions[:, :, None] <= query_positions[:, None, :, None])
        seen = (seen & real[:, None, :, None])[:, :, None]  # [B, K, 1, A, S]
        weights = masked_softmax(group_logits(queries, keys, scale), seen)
        total = jnp.sum(weights, axis=3)  # [B, K, G, S]
        if chosen["rows"] == "mean":
            total = total / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None, None, None]
        # Heads of a group are joined after pooling, which for a mean is the same.
        total = _pool(total, candidates[:, :, None], kernel_size, pooling)
        found = jnp.max(total, axis=2) if group == "max" else jnp.mean(total, axis=2)
    return jnp.where(candidates, found, jnp.where(live, jnp.inf, -jnp.inf))


def _pool(x: jax.Array, candidates: jax.Array, kernel_size: int, pooling: str) -> jax.Array:
    """Pool neighbours along the last axis among the candidates; borders count as in torch."""
    shape = (1,) * (x.ndim - 1) + (kernel_size,)
    ones = (1,) * x.ndim
    if pooling == "max":
        x = jnp.where(candidates, x, -jnp.inf)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, ones, "SAME")
    x = jnp.where(candidates, x, 0.0)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, ones, "SAME") / kernel_size


def _settings(
    variant: str, kernel_size: int | None, pooling: str | None, group: str | None
) -> tuple[int, str, str]:
    """Return kernel size, pooling and group of a variant, or as they are given."""
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}; expected one of {', '.join(VARIANTS)}")
    chosen = VARIANTS[variant]
    kernel_size = chosen["kernel"] if kernel_size is None else kernel_size
    pooling = chosen["pooling"] if pooling is None else pooling
    group = chosen["group"] if group is None else group
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling={pooling!r}; expected 'avg' or 'max'")
    if group not in ("mean", "max") and group != chosen["group"]:
        raise ValueError(f"group={group!r}; expected 'mean' or 'max'")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}; expected an odd number of slots, 1 or more")
    return kernel_size, pooling, group


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """Keeps the window and what it attends to, at the prompt's end and again while decoding.

    Args:
        budget: entries kept per head, in tokens, window included.
        window: last tokens whose queries score and that always stay; the original uses 32.
        variant, kernel_size, pooling, group, scale: see :func:`scores`.
        buffer, num_sinks, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> SnapKV(budget=1024, window=32, variant="original").kernel_size is None
        True

    References:
        SnapKV (arXiv 2404.14469), section 4 (there for prompts only; while decoding it compacts
        when R-KV would, as in R-KV's comparison).
    """

    window: int = 8
    variant: str = "rkv"
    kernel_size: int | None = None
    pooling: str | None = None
    group: str | None = None
    scale: float | None = None

    name: ClassVar[str] = "snapkv"

    def __post_init__(self):
        super().__post_init__()
        _settings(self.variant, self.kernel_size, self.pooling, self.group)

    @property
    def query_window(self) -> int:
        """Queries that the cache must remember per layer."""
        return self.window

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return :func:`scores` of a layer with its query ring."""
        del index
        return scores(
            jnp.swapaxes(layer.queries, 1, 2),
            layer.read(jnp.float32)[0],
            length=layer.length,
            query_positions=layer.query_positions,
            positions=layer.positions,
            window=self.window,
            variant=self.variant,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            group=self.group,
            scale=self.scale,
        )
