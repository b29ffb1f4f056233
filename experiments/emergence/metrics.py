"""What to measure: how sparse attention is, when a plateau ends, and what emerges together.

The functions on attention weights take them with the keys last, ``[..., S]``, rows summing to 1.

Reference: Zucchet et al., arXiv 2505.17863, appendix D.1 (plateau length) and Fig. 17 (attention
metrics of the induction head); entropy, support, top-1 mass and Gini are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


def attention_on(weights: jax.Array, relevant: jax.Array) -> jax.Array:
    """Attention that falls on the relevant positions, ``Σ_{s relevant} α_s``.

    Args:
        weights: ``[..., S]``, rows summing to 1.
        relevant: bool, broadcastable to ``weights``.

    Returns:
        ``[...]`` in [0, 1].

    >>> float(attention_on(jnp.array([0.5, 0.25, 0.25]), jnp.array([True, True, False])))
    0.75
    """
    return jnp.sum(jnp.where(relevant, weights, 0.0), axis=-1)


def entropy(weights: jax.Array) -> jax.Array:
    """Shannon entropy ``−Σ α ln α`` of each row, in nats.

    Args:
        weights: ``[..., S]``, rows summing to 1; zeros count as nothing.

    Returns:
        ``[...]`` in [0, ln S].

    >>> round(float(entropy(jnp.full(8, 1 / 8))), 4)
    2.0794
    """
    return -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)


def normalised_entropy(weights: jax.Array, visible: jax.Array | float) -> jax.Array:
    """Entropy over that of uniform attention to the positions a row may see, ``H / ln n``.

    Args:
        weights: ``[..., S]``, rows summing to 1.
        visible: Number n of positions that a row may see, ``[...]``; a row that sees one position
            has no spread to lose and counts as 0.

    Returns:
        ``[...]`` in [0, 1].

    >>> float(normalised_entropy(jnp.array([0.5, 0.5, 0.0, 0.0]), 4))
    0.5
    """
    visible = jnp.asarray(visible, jnp.float32)
    return jnp.where(visible > 1, entropy(weights) / jnp.log(jnp.maximum(visible, 2)), 0.0)


def effective_support(weights: jax.Array) -> jax.Array:
    """Number of positions that uniform attention of the same entropy would cover, ``exp H``.

    Args:
        weights: ``[..., S]``, rows summing to 1.

    Returns:
        ``[...]`` in [1, S].

    >>> round(float(effective_support(jnp.array([0.5, 0.5, 0.0]))), 4)
    2.0
    """
    return jnp.exp(entropy(weights))


def top1_mass(weights: jax.Array) -> jax.Array:
    """Largest weight of each row, in [1/S, 1].

    Args:
        weights: ``[..., S]``, rows summing to 1.

    Returns:
        ``[...]``.

    >>> float(top1_mass(jnp.array([0.25, 0.75])))
    0.75
    """
    return jnp.max(weights, axis=-1)


def gini(weights: jax.Array) -> jax.Array:
    """Gini coefficient of each row: 0 for uniform attention, ``1 − 1/S`` for one position.

    ``G = Σ_i (2i − S − 1) α_(i) / S`` with the weights sorted upwards, i = 1..S.

    Args:
        weights: ``[..., S]``, rows summing to 1.

    Returns:
        ``[...]`` in [0, 1 − 1/S].

    >>> float(gini(jnp.array([0.0, 0.0, 0.0, 1.0]))), float(gini(jnp.full(4, 0.25)))
    (0.75, 0.0)
    """
    size = weights.shape[-1]
    rank = 2 * jnp.arange(1, size + 1) - size - 1
    return jnp.sum(rank * jnp.sort(weights, axis=-1), axis=-1) / size


def induction_scores(
    weights: jax.Array, is_query: jax.Array, query_position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two halves of an induction head on recall sequences, averaged over the batch.

    * ``prev_token``: attention from the relevant value's position to its key, one before it;
    * ``select``: attention from the query to the relevant values' positions.

    Args:
        weights: ``[b, N, T, T]`` of one layer, rows summing to 1.
        is_query: ``[b, slots]`` bool, slots that hold the query's pair; at least one each.
        query_position: ``[]`` int, where the query stands.

    Returns:
        (prev_token, select), each ``[N]`` in [0, 1]. An ideal pair of heads has 1 and 1, in two
        different layers.

    >>> w = jnp.eye(3)[None, None]  # every token attends to itself
    >>> [float(x[0]) for x in induction_scores(w, jnp.array([[True]]), 2)]
    [0.0, 0.0]

    Reference: Fig. 17 and appendix C.3.
    """
    slots = is_query.shape[-1]
    rows = jnp.take(weights, query_position, axis=2)[..., 1 : 2 * slots : 2]  # [b, N, slots]
    select = attention_on(rows, is_query[:, None, :])  # [b, N]
    diagonal = jnp.diagonal(weights, offset=-1, axis1=2, axis2=3)  # [b, N, T-1]
    to_key = diagonal[..., 0 : 2 * slots : 2]  # [b, N, slots]: value position 2j+1 -> key 2j
    share = is_query / jnp.sum(is_query, axis=-1, keepdims=True)  # [b, slots]
    prev_token = jnp.sum(to_key * share[:, None, :], axis=-1)  # [b, N]
    return prev_token.mean(0), select.mean(0)


@dataclass(frozen=True)
class Plateau:
    """When a curve first crossed its threshold.

    Attributes:
        length: Step of the crossing, or the last observed step if there was none.
        censored: True if the curve never crossed: the true length is above ``length``.
    """

    length: float
    censored: bool


def plateau_length(
    steps: Sequence[float], values: Sequence[float], threshold: float, *, rising: bool = False
) -> Plateau:
    """First crossing of a threshold, interpolated between evaluations.

    Args:
        steps: Increasing steps of the evaluations, ``[n]``, n ≥ 1.
        values: Finite values, ``[n]``; a run that diverged must be cut before it is given here.
        threshold: Value that ends the plateau.
        rising: Wait for ``value ≥ threshold`` (accuracy) instead of ``value < threshold`` (loss).

    Returns:
        A :class:`Plateau`.

    Raises:
        ValueError: If the lists differ in length, are empty, or hold a number that is not finite,
            or the steps do not increase.

    >>> plateau_length([0, 100, 200], [0.5, 0.3, 0.1], 0.2)
    Plateau(length=150.0, censored=False)
    >>> plateau_length([0, 100], [0.0, 0.1], 0.5, rising=True)
    Plateau(length=100.0, censored=True)

    Reference: appendix D.1.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if steps.ndim != 1 or steps.shape != values.shape or steps.size == 0:
        raise ValueError(
            f"steps and values must be lists of one length ≥ 1; got shapes {steps.shape} "
            f"and {values.shape}"
        )
    if not (np.all(np.isfinite(values)) and np.all(np.isfinite(steps))):
        raise ValueError("values and steps must be finite; cut a diverged run before its first NaN")
    if np.any(np.diff(steps) <= 0):
        raise ValueError("steps must increase")
    crossed = values >= threshold if rising else values < threshold
    if not crossed.any():
        return Plateau(float(steps[-1]), True)
    first = int(crossed.argmax())
    if first == 0:
        return Plateau(float(steps[0]), False)
    before, after = values[first - 1], values[first]
    share = (threshold - before) / (after - before)
    return Plateau(float(steps[first - 1] + share * (steps[first] - steps[first - 1])), False)


def transition_width(
    steps: Sequence[float],
    values: Sequence[float],
    low: float,
    high: float,
    *,
    rising: bool = False,
) -> float:
    """Steps between leaving the plateau and being through, over the step half-way between.

    Args:
        steps: Increasing steps, ``[n]``.
        values: Finite values, ``[n]``.
        low: Value nearer to the plateau's, such as 0.45 for a loss or 0.1 for an accuracy.
        high: Value on the other side, such as 0.05 or 0.9.
        rising: Whether the curve rises (accuracy) or falls (loss).

    Returns:
        ``(t_high − t_low) / t_middle``; ``inf`` if the curve does not get through.

    Raises:
        ValueError: As :func:`plateau_length`.

    >>> transition_width([0, 90, 110, 200], [0.5, 0.5, 0.0, 0.0], 0.45, 0.05)
    0.16
    """
    ends = [
        plateau_length(steps, values, level, rising=rising)
        for level in (low, (low + high) / 2, high)
    ]
    if any(end.censored for end in ends):
        return float("inf")
    return (ends[2].length - ends[0].length) / ends[1].length


def co_emergence(
    steps: Sequence[float], curves: Mapping[str, Sequence[float]], threshold: float = 0.5
) -> dict[str, Plateau]:
    """Step at which each of several rising curves crosses the same threshold.

    Args:
        steps: Increasing steps, ``[n]``.
        curves: Rising curves ``[n]`` by name, such as accuracy and attention scores by layer.
        threshold: The common threshold.

    Returns:
        A :class:`Plateau` for each curve, in order of their crossings, censored ones last.

    Raises:
        ValueError: As :func:`plateau_length`.

    >>> list(co_emergence([0, 1, 2], {"late": [0, 0, 1], "early": [0, 1, 1]}))
    ['early', 'late']
    """
    found = {
        name: plateau_length(steps, values, threshold, rising=True)
        for name, values in curves.items()
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].censored, item[1].length)))


def sparge_skipped(
    query: jax.Array,
    key: jax.Array,
    *,
    block_q: int,
    block_kv: int,
    cdf: float = 0.95,
    similarity: float = -1.0,
) -> jax.Array:
    """Share of causal tiles that SpargeAttn's mean-similarity prediction leaves out, by head.

    Each block of queries and of (mean-free) keys is replaced by its mean; the softmax over the
    means predicts the mass of a tile; the largest are kept until they hold ``cdf``. Blocks that are
    not self-similar are always computed. A plain reference: whole blocks, equal head counts.

    Args:
        query: ``[B, T, N, H]``, T a multiple of ``block_q``.
        key: ``[B, T, N, H]``, T a multiple of ``block_kv``.
        block_q: Rows in a tile.
        block_kv: Keys in a tile.
        cdf: Predicted mass to keep, in (0, 1].
        similarity: Mean cosine within a block above which its mean stands for it; −1 trusts all.

    Returns:
        ``[N]`` in [0, 1).

    Raises:
        ValueError: If the shapes do not fit or ``cdf`` is out of its range.

    >>> x = jnp.ones((1, 8, 2, 4))  # equal tokens: uniform attention, nothing to skip
    >>> sparge_skipped(x, x, block_q=2, block_kv=2, cdf=1.0).tolist()
    [0.0, 0.0]

    Reference: SpargeAttn, arXiv 2502.18137, section 3.2 and 3.3.
    """
    if query.shape != key.shape or query.ndim != 4:
        raise ValueError(f"query {query.shape} and key {key.shape} must both be [B, T, N, H]")
    if query.shape[1] % block_q or query.shape[1] % block_kv:
        raise ValueError(
            f"{query.shape[1]} tokens must be a multiple of block_q ({block_q}) and block_kv "
            f"({block_kv})"
        )
    if not 0.0 < cdf <= 1.0:
        raise ValueError(f"cdf must lie in (0, 1]; got {cdf}")

    def pooled(x, block):
        B, T, N, H = x.shape
        x = x.reshape(B, T // block, block, N, H)
        unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
        cosine = jnp.sum(unit.mean(2) ** 2, axis=-1)  # mean cosine of all pairs, [B, blocks, N]
        return x.mean(2), cosine > similarity

    q, q_similar = pooled(query, block_q)
    k, k_similar = pooled(key - key.mean(1, keepdims=True), block_kv)
    score = jnp.einsum("binh,bjnh->bnij", q, k) * query.shape[-1] ** -0.5
    first_key = jnp.arange(score.shape[-1]) * block_kv
    last_row = (jnp.arange(score.shape[-2]) + 1) * block_q - 1
    visible = first_key <= last_row[:, None]  # [i, j]
    fixed = ~k_similar.swapaxes(1, 2)[:, :, None, :] | ~q_similar.swapaxes(1, 2)[..., None]
    trusted = visible & k_similar.swapaxes(1, 2)[:, :, None, :]
    top = jnp.max(score, axis=-1, keepdims=True, initial=-1e30, where=trusted)
    mass = jnp.where(trusted, jnp.exp(score - top), 0.0)
    mass = mass / jnp.maximum(mass.sum(-1, keepdims=True), 1e-30)
    order = jnp.argsort(-mass, axis=-1)
    ranked = jnp.take_along_axis(mass, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked  # mass of the tiles ranked above
    kept_ranked = before < cdf
    kept = jnp.take_along_axis(kept_ranked, jnp.argsort(order, axis=-1), axis=-1)
    kept = (kept | fixed) & visible
    return (visible & ~kept).sum((0, 2, 3)) / (score.shape[0] * visible.sum())
