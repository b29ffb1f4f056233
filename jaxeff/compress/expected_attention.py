"""ExpectedAttention: keep what queries still to come are expected to attend to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.compress.base import live_slots, masked_softmax
from jaxeff.compress.scorer import Scorer

_HIGHEST = jax.lax.Precision.HIGHEST


def scores(
    mean: jax.Array,
    covariance: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    length: jax.Array | None = None,
    epsilon: float = 0.0,
    scale: float | None = None,
) -> jax.Array:
    """Score slots by the attention expected from Gaussian queries, times the size of the value.

    ``z_j = s k_jᵀμ + s² k_jᵀΣk_j / 2``, ``p = softmax_j(z)``, averaged over the query heads of a
    group, and ``score_j = (p_j + ε) ‖v_j‖``.

    Args:
        mean: f32 ``[B, N, H]``, mean of the queries to come, after RoPE (:func:`turned`).
        covariance: f32 ``[B, N, H, H]``, their covariance.
        keys: float ``[B, S, K, H]`` after RoPE.
        values: float ``[B, S, K, H]``.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        epsilon: ``ε``, 0 or more.
        scale: softmax scale ``s``; ``None``: ``H ** -0.5``.

    Returns:
        f32 ``[B, K, S]``, ``-inf`` on dead slots.

    Raises:
        ValueError: if head counts do not divide.

    Examples:
        >>> k = jnp.ones((1, 2, 1, 4))
        >>> scores(jnp.ones((1, 1, 4)), jnp.zeros((1, 1, 4, 4)), k, k).tolist()
        [[[1.0, 1.0]]]

    References:
        Expected Attention (arXiv 2510.00636), section 3.
    """
    batch, num_heads, head_dim = mean.shape
    heads = keys.shape[2]
    if num_heads % heads:
        raise ValueError(
            f"keys has {heads} heads; query heads ({num_heads}) must be a multiple of it"
        )
    scale = head_dim**-0.5 if scale is None else scale
    live = live_slots(keys, length)
    k = jnp.swapaxes(keys.astype(jnp.float32), 1, 2)  # [B, K, S, H]
    mean = mean.reshape(batch, heads, -1, head_dim)
    covariance = covariance.reshape(batch, heads, -1, head_dim, head_dim)
    first = jnp.einsum("bksh,bkgh->bkgs", k, mean, precision=_HIGHEST)
    turned_k = jnp.einsum("bksh,bkghi->bkgsi", k, covariance, precision=_HIGHEST)
    second = jnp.einsum("bkgsi,bksi->bkgs", turned_k, k, precision=_HIGHEST)
    weights = masked_softmax(scale * first + scale**2 / 2 * second, live[:, :, None])
    size = jnp.linalg.norm(jnp.swapaxes(values.astype(jnp.float32), 1, 2), axis=-1)
    return jnp.where(live, (jnp.mean(weights, axis=2) + epsilon) * size, -jnp.inf)


def rotate(x: jax.Array, positions: jax.Array, frequencies: tuple[float, ...]) -> jax.Array:
    """Rotate ``x [B, T, N, H]`` by RoPE at ``positions [B, T]``, which may be negative.

    Examples:
        >>> x = jnp.ones((1, 1, 1, 2))
        >>> back = rotate(rotate(x, jnp.array([[3]]), (1.0,)), jnp.array([[-3]]), (1.0,))
        >>> [round(v, 5) for v in back.ravel().tolist()]
        [1.0, 1.0]

    References:
        RoFormer (arXiv 2104.09864), section 3.4.2, on halves of a head.
    """
    angle = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1)


def turned(
    mean: jax.Array,
    covariance: jax.Array,
    first: jax.Array,
    frequencies: tuple[float, ...],
    *,
    future: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Return mean and covariance after the average rotation of the next positions.

    ``R̄`` is the mean of the RoPE matrices at ``first … first + future - 1``; the result is
    ``R̄μ`` and ``R̄ΣR̄ᵀ``.

    Args:
        mean: f32 ``[B, N, H]`` before RoPE.
        covariance: f32 ``[B, N, H, H]`` before RoPE.
        first: int32 ``[B]``, the next position.
        frequencies: ``H / 2`` RoPE frequencies, radians per token.
        future: positions to average over.

    Returns:
        The pair, of the same shapes.

    Examples:
        >>> m, c = turned(jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2, 2)), jnp.array([0]), (0.0,))
        >>> m.tolist()
        [[[1.0, 1.0]]]

    References:
        Expected Attention (arXiv 2510.00636), section 3.
    """
    angle = (first[:, None, None] + jnp.arange(future)[:, None]).astype(jnp.float32)
    angle = angle * jnp.asarray(frequencies, jnp.float32)  # [B, future, H / 2]
    cos, sin = jnp.mean(jnp.cos(angle), axis=1), jnp.mean(jnp.sin(angle), axis=1)  # [B, H / 2]
    diagonal = jax.vmap(jnp.diag)
    rotation = jnp.concatenate(
        [
            jnp.concatenate([diagonal(cos), -diagonal(sin)], axis=-1),
            jnp.concatenate([diagonal(sin), diagonal(cos)], axis=-1),
        ],
        axis=-2,
    )  # [B, H, H]
    mean = jnp.einsum("bij,bnj->bni", rotation, mean, precision=_HIGHEST)
    covariance = jnp.einsum(
        "bij,bnjk,blk->bnil", rotation, covariance, rotation, precision=_HIGHEST
    )
    return mean, covariance


@dataclasses.dataclass(frozen=True)
class QueryStatistics:
    """Carries the first two moments of the queries before RoPE.

    Args:
        frequencies: ``H / 2`` RoPE frequencies; queries arrive rotated and are turned back.
        skip: first tokens of a row that do not count.

    Examples:
        >>> QueryStatistics((1.0,)).init(1, 4, 2, 1, 2)[1]["outer"].shape
        (1, 2, 2, 2)

    References:
        Expected Attention (arXiv 2510.00636), section 3.
    """

    frequencies: tuple[float, ...]
    skip: int = 4

    def init(self, batch, capacity, num_heads, num_kv_heads, head_dim):
        """Return nothing per slot, and empty sums per row."""
        del capacity, num_kv_heads
        state = {
            "count": jnp.zeros(batch, jnp.float32),
            "sum": jnp.zeros((batch, num_heads, head_dim), jnp.float32),
            "outer": jnp.zeros((batch, num_heads, head_dim, head_dim), jnp.float32),
        }
        return None, state

    def observe(self, layer, slot_state, row_state, queries, positions, valid):
        """Return the sums with these queries added."""
        del layer
        real = valid & (positions >= self.skip)
        plain = rotate(queries, -positions, self.frequencies)
        plain = jnp.where(real[..., None, None], plain, 0.0)
        outer = jnp.einsum("btnh,btni->bnhi", plain, plain, precision=_HIGHEST)
        return slot_state, {
            "count": row_state["count"] + jnp.sum(real, axis=1),
            "sum": row_state["sum"] + jnp.sum(plain, axis=1),
            "outer": row_state["outer"] + outer,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """Guesses the queries to come from those so far, and keeps what they would attend to.

    Args:
        budget: entries kept per head, in tokens.
        num_sinks: first tokens that are never evicted, and whose queries are not counted.
        future: positions ahead whose rotations are averaged, in tokens.
        epsilon: added to every expected weight.
        frequencies: RoPE frequencies of the model, ``H / 2`` of them; ``generate`` fills them in.
        scale: softmax scale; ``None``: ``H ** -0.5``.
        buffer, window, slot_order, scope, compress_prefill, spare_frozen, storage: see
            :class:`~jaxeff.compress.Scorer`.

    Examples:
        >>> ExpectedAttention(budget=64).future
        512

    References:
        Expected Attention (arXiv 2510.00636), section 3. Statistics run over all queries so far,
        of prompt and answer; the original takes the prompt's.
    """

    num_sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    frequencies: tuple[float, ...] | None = None
    scale: float | None = None

    name: ClassVar[str] = "expected_attention"

    def __post_init__(self):
        super().__post_init__()
        if self.future < 1:
            raise ValueError(f"future={self.future}; expected 1 or more tokens")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon={self.epsilon}; expected 0 or more")
        if self.frequencies is not None:
            values = tuple(float(f) for f in np.asarray(self.frequencies))
            object.__setattr__(self, "frequencies", values)

    @property
    def observer(self) -> QueryStatistics:
        """The running statistics of the queries."""
        if self.frequencies is None:
            raise ValueError(
                "frequencies is None; give the model's RoPE frequencies (generate() does)"
            )
        return QueryStatistics(self.frequencies, self.num_sinks)

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return :func:`scores` of a layer with its query statistics."""
        del index
        if not isinstance(layer.observer, QueryStatistics):
            raise ValueError(
                "the cache carries no query statistics; make it with "
                "observer=ExpectedAttention.observer"
            )
        state = layer.row_state
        count = jnp.maximum(state["count"], 1.0)[:, None, None]
        mean = state["sum"] / count
        outer = jnp.einsum("bnh,bni->bnhi", mean, mean, precision=_HIGHEST)
        covariance = state["outer"] / count[..., None] - outer
        first = jnp.max(layer.positions, axis=(1, 2)) + 1
        mean, covariance = turned(mean, covariance, first, self.frequencies, future=self.future)
        keys, values = layer.read(jnp.float32)
        return scores(
            mean,
            covariance,
            keys,
            values,
            length=layer.length,
            epsilon=self.epsilon,
            scale=self.scale,
        )
