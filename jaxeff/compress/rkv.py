"""R-KV: decode-time eviction by attention importance and key redundancy."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.compress.base import check_queries, masked_softmax
from jaxeff.compress.scorer import Scorer
from pallas_kernels import last_similar_keys

_HIGHEST = jax.lax.Precision.HIGHEST


class RKVScores(NamedTuple):
    """The parts of an R-KV score, each f32 ``[B, K, S]``.

    Args:
        importance: pooled attention mass; 0 outside the candidates.
        redundancy: softmax of the mean cosine over the live slots; 0 on dead slots.
        joint: ``mix_lambda * importance - (1 - mix_lambda) * redundancy``; ``+inf`` on the
            observation window, ``-inf`` on dead slots.

    Examples:
        >>> RKVScores(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))._fields
        ('importance', 'redundancy', 'joint')

    References:
        R-KV (arXiv 2505.24133), equations 2 to 8.
    """

    importance: jax.Array
    redundancy: jax.Array
    joint: jax.Array


def importance(
    queries: jax.Array,
    keys: jax.Array,
    *,
    candidates: jax.Array,
    query_valid: jax.Array | None = None,
    kernel_size: int = 7,
    pooling: str = "max",
    pool_order: str = "mean_first",
    scale: float | None = None,
) -> jax.Array:
    """Score slots by the attention that the last queries pay them.

    ``I = maxpool(mean_rows(softmax_candidates(pool_g(Q Kᵀ * scale))))``: logits are pooled over
    the query heads of a group, the softmax runs over the candidates only, rows are averaged, and
    neighbouring slots share their maximum.

    Args:
        queries: float ``[B, A, N, H]``, the last queries after RoPE.
        keys: float ``[B, S, K, H]`` after RoPE.
        candidates: bool ``[B, K, S]``, slots that compete.
        query_valid: bool ``[B, A]``, real queries; ``None``: all.
        kernel_size: odd width of the max pooling, in slots.
        pooling: ``"max"`` or ``"mean"`` over a group, on the logits.
        pool_order: ``"mean_first"``: rows are averaged, then neighbours pooled. ``"pool_first"``:
            neighbours are pooled in every row, then rows averaged (equation 4).
        scale: multiplies the logits; ``None``: ``H ** -0.5``.

    Returns:
        f32 ``[B, K, S]``, 0 where not a candidate.

    Raises:
        ValueError: if head counts do not divide, or a switch has an unknown value.

    Examples:
        >>> q, k = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 4, 1, 4))
        >>> importance(q, k, candidates=jnp.arange(4)[None, None] < 2).tolist()
        [[[0.5, 0.5, 0.0, 0.0]]]

    References:
        R-KV (arXiv 2505.24133), section 3.2 and appendix A.2. Rows are averaged before pooling,
        as in Algorithm 1 and the authors' code; equation 4 pools first.
    """
    check_queries(queries, keys)
    _check_importance(kernel_size, pooling, pool_order)
    batch, rows = queries.shape[:2]
    if query_valid is None:
        query_valid = jnp.ones((batch, rows), bool)
    logits = group_logits(queries, keys, scale)  # [B, K, G, A, S]
    logits = jnp.max(logits, axis=2) if pooling == "max" else jnp.mean(logits, axis=2)
    weights = masked_softmax(logits, candidates[:, :, None])  # [B, K, A, S]
    real = query_valid[:, None, :, None]
    count = jnp.maximum(jnp.sum(real, axis=2), 1)

    def pooled(x):
        among = candidates.reshape(*candidates.shape[:2], *(1,) * (x.ndim - 3), -1)
        shape, ones = (*(1,) * (x.ndim - 1), kernel_size), (1,) * x.ndim
        x = jnp.where(among, x, -jnp.inf)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, ones, "SAME")
        return jnp.where(among, x, 0.0)

    if pool_order == "pool_first":
        weights = pooled(weights)
    mean = jnp.sum(jnp.where(real, weights, 0.0), axis=2) / count  # [B, K, S]
    return mean if pool_order == "pool_first" else pooled(mean)


def _check_importance(kernel_size: int, pooling: str, pool_order: str) -> None:
    if pooling not in ("max", "mean"):
        raise ValueError(f"pooling={pooling!r}; expected 'max' or 'mean'")
    if pool_order not in ("mean_first", "pool_first"):
        raise ValueError(f"pool_order={pool_order!r}; expected 'mean_first' or 'pool_first'")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}; expected an odd number of slots, 1 or more")


def _check_redundancy(threshold: float, beta: int, mode: str) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}; expected a cosine in [0, 1)")
    if beta < 1:
        raise ValueError(f"beta={beta}; expected 1 or more exempted entries per row")
    if mode not in ("code", "paper"):
        raise ValueError(f"mode={mode!r}; expected 'code' or 'paper'")


def _check_mix(mix_lambda: float) -> None:
    if not 0 <= mix_lambda <= 1:
        raise ValueError(f"mix_lambda={mix_lambda}; expected a weight in [0, 1]")


def group_logits(queries: jax.Array, keys: jax.Array, scale: float | None = None) -> jax.Array:
    """Return ``Q Kᵀ * scale`` in f32, query heads grouped by KV head: ``[B, K, G, A, S]``.

    Args:
        queries: float ``[B, A, N, H]``.
        keys: float ``[B, S, K, H]``; ``K`` divides ``N``.
        scale: multiplies the logits; ``None``: ``H ** -0.5``.

    Returns:
        f32 ``[B, K, G, A, S]``.

    Examples:
        >>> group_logits(jnp.ones((1, 3, 4, 16)), jnp.ones((1, 5, 2, 16))).shape
        (1, 2, 2, 3, 5)

    References:
        R-KV (arXiv 2505.24133), equations 2 and 3.
    """
    batch, rows, num_heads, head_dim = queries.shape
    groups = num_heads // keys.shape[2]
    grouped = queries.reshape(batch, rows, -1, groups, head_dim)
    if queries.dtype != keys.dtype or queries.dtype == jnp.float32:
        grouped, keys = grouped.astype(jnp.float32), keys.astype(jnp.float32)
    logits = jnp.einsum(  # products of 16-bit numbers are exact in f32
        "bakgh,bskh->bkgas", grouped, keys, precision=_HIGHEST, preferred_element_type=jnp.float32
    )
    return logits * (head_dim**-0.5 if scale is None else scale)


def redundancy(
    keys: jax.Array,
    *,
    live: jax.Array,
    threshold: float = 0.5,
    beta: int = 1,
    zero_col0_when_empty: bool = True,
    mode: str = "code",
    block_size: int = 128,
) -> jax.Array:
    """Score slots by how much their keys repeat others.

    With ``k̂ = k / (‖k‖ + 1e-8)`` and ``S = k̂ k̂ᵀ`` without its diagonal, every row ``i`` exempts
    its ``beta`` last entries ``j`` with ``S[i, j] > threshold`` (if there is none: column 0), and
    ``R = softmax(column means of S)``. The column sums have the closed form
    ``k̂_j · Σ_i k̂_i - ‖k̂_j‖²``; only the exempted entries need pairs, and these are visited in
    blocks of rows: memory ``O(block_size * S)``, never ``S * S``.

    Args:
        keys: float ``[B, S, K, H]`` after RoPE.
        live: bool ``[B, K, S]``, slots that hold a token.
        threshold: cosine above which two keys count as similar, in [0, 1).
        beta: exempted entries per row, 1 or more.
        zero_col0_when_empty: rows without a similar key exempt slot 0, as the authors' code does;
            this protects the first slot a little.
        mode: ``"code"``: the exemption lowers the score of the *later* copy ``j`` (the authors'
            code; new copies are kept). ``"paper"``: it lowers the score of the row's owner ``i``
            (equation 6 and Algorithm 1 as printed).
        block_size: rows per block.

    Returns:
        f32 ``[B, K, S]``; sums to 1 over the live slots, 0 on dead ones.

    Raises:
        ValueError: if a switch is out of range.

    Examples:
        >>> keys = jnp.ones((1, 3, 1, 2))  # three copies: the newest is the least redundant
        >>> [round(x, 3) for x in redundancy(keys, live=jnp.ones((1, 1, 3), bool))[0, 0].tolist()]
        [0.448, 0.321, 0.23]

    References:
        R-KV (arXiv 2505.24133), section 3.3; direction and column mean follow the authors' code.
    """
    _check_redundancy(threshold, beta, mode)
    stored = jnp.swapaxes(keys, 1, 2)  # [B, K, S, H]
    unit = stored.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(unit * unit, axis=-1, keepdims=True))
    unit = jnp.where(live[..., None], unit / (norm + 1e-8), 0.0)
    total = jnp.sum(unit, axis=2, keepdims=True)
    sums = jnp.sum(unit * (total - unit), axis=-1)  # [B, K, S], without the diagonal
    exempt, values = last_similar_keys(
        stored, live, threshold=threshold, beta=beta, block_size=block_size
    )
    if zero_col0_when_empty:  # only a row with no similar key at all falls back to column 0
        # Products and sums, not a matrix product: XLA reads the keys as they are stored.
        first = jnp.sum(unit * unit[:, :, :1], axis=-1)
        here = (exempt[..., 0] < 0) & (jnp.arange(first.shape[-1]) > 0)
        values = values.at[..., 0].set(jnp.where(here, first, values[..., 0]))
    if mode == "paper":
        sums = sums - jnp.sum(values, axis=-1)
    else:
        sums = sums - _by_column(jnp.maximum(exempt, 0), values, block_size)
    count = jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1)
    return masked_softmax(sums / count, live)


def _by_column(exempt: jax.Array, values: jax.Array, block_size: int) -> jax.Array:
    """Return the sum of the values that name each slot, ``[B, K, S]``.

    Slots are compared with all names, some at a time: a scatter waits where many rows name one
    slot (on a GPU it took nine tenths of a compaction), and adds in any order.
    """
    slots = exempt.shape[2]
    block = min(block_size, slots)
    names, values = (x.reshape(*x.shape[:2], 1, -1) for x in (exempt, values))  # [B, K, 1, S * β]

    def one_block(number):
        own = number * block + jnp.arange(block)[:, None]
        return jnp.sum(jnp.where(names == own, values, 0.0), axis=-1)  # [B, K, block]

    found = jax.lax.map(one_block, jnp.arange(-(-slots // block)))
    return jnp.moveaxis(found, 0, 2).reshape(*exempt.shape[:2], -1)[..., :slots]


def scores(
    queries: jax.Array,
    keys: jax.Array,
    *,
    length: jax.Array | None = None,
    query_valid: jax.Array | None = None,
    window: int | None = None,
    mix_lambda: float = 0.1,
    threshold: float = 0.5,
    kernel_size: int = 7,
    pooling: str = "max",
    pool_order: str = "mean_first",
    zero_col0_when_empty: bool = True,
    beta: int = 1,
    mode: str = "code",
    scale: float | None = None,
    block_size: int = 128,
) -> RKVScores:
    """Score cache slots as R-KV does; a pure function, all in f32.

    ``joint = mix_lambda * importance - (1 - mix_lambda) * redundancy`` over the live slots before
    the observation window; see :func:`importance` and :func:`redundancy`.

    Args:
        queries: float ``[B, A, N, H]``, the last queries after RoPE, in any order.
        keys: float ``[B, S, K, H]`` after RoPE; slots ``0 … length-1`` are live.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        query_valid: bool ``[B, A]``, real queries; ``None``: all.
        window: last live slots that are always kept, in tokens; ``None``: ``A``.
        mix_lambda: weight of the importance, in [0, 1].
        threshold, beta, zero_col0_when_empty, mode, block_size: see :func:`redundancy`.
        kernel_size, pooling, pool_order, scale: see :func:`importance`.

    Returns:
        :class:`RKVScores`, each ``[B, K, S]``.

    Raises:
        ValueError: if a switch is out of range or head counts do not divide.

    Examples:
        >>> q, k = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 6, 1, 4))
        >>> scores(q, k).joint[0, 0, -2:].tolist()
        [inf, inf]

    References:
        R-KV (arXiv 2505.24133), section 3, equation 8.
    """
    _check_mix(mix_lambda)
    check_queries(queries, keys)
    batch, slots, heads, _ = keys.shape
    window = queries.shape[1] if window is None else window
    length = jnp.asarray(slots if length is None else length, jnp.int32)
    length = length[:, None] if length.ndim == 1 else length
    length = jnp.broadcast_to(length, (batch, heads))[..., None]
    slot = jnp.arange(slots)
    live = slot < length  # [B, K, S]
    candidates = slot < length - window
    seen = importance(
        queries,
        keys,
        candidates=candidates,
        query_valid=query_valid,
        kernel_size=kernel_size,
        pooling=pooling,
        pool_order=pool_order,
        scale=scale,
    )
    repeated = redundancy(
        keys,
        live=live,
        threshold=threshold,
        beta=beta,
        zero_col0_when_empty=zero_col0_when_empty,
        mode=mode,
        block_size=block_size,
    )
    joint = mix_lambda * seen - (1 - mix_lambda) * repeated
    joint = jnp.where(candidates, joint, jnp.where(live, jnp.inf, -jnp.inf))
    return RKVScores(seen, repeated, joint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(Scorer):
    """Keeps what the last queries attend to, minus what repeats later keys.

    Fresh tokens fill the buffer. When a row reaches ``budget + buffer`` entries, all but the last
    ``window`` compete with :func:`scores`; the best ``budget - window`` stay, with the window. So
    a head never holds more than ``budget + buffer`` entries, however long the generation.

    Args:
        budget: entries kept per head, in tokens, window included; at least ``window``.
        buffer: fresh tokens between two compactions, 1 or more.
        window: last tokens whose queries score and that always stay, 1 or more.
        mix_lambda, threshold, kernel_size, pooling, pool_order, zero_col0_when_empty, beta, mode,
            scale: see :func:`scores`.
        num_sinks: first tokens that are never evicted; 0 as in the authors' code.
        slot_order: ``"time"``: survivors keep their order. ``"score"``: descending score, as in
            the authors' code; from the second compaction on the two differ.
        scope, compress_prefill, spare_frozen, storage: see :class:`~jaxeff.compress.Scorer`.

    Raises:
        ValueError: if a setting is out of range.

    Examples:
        >>> RKV(budget=64, buffer=32).prefill_capacity(prompt=500, room=100)
        500
        >>> RKV(budget=4)
        Traceback (most recent call last):
            ...
        ValueError: budget=4 must be at least window=8 (tokens that always stay)

    References:
        R-KV (arXiv 2505.24133), section 3 and table 4. Compaction follows the length alone, so
        that memory is bounded exactly; the authors' code also waits for a multiple of the buffer.
    """

    window: int = 8
    mix_lambda: float = 0.1
    threshold: float = 0.5
    kernel_size: int = 7
    pooling: str = "max"
    pool_order: str = "mean_first"
    zero_col0_when_empty: bool = True
    beta: int = 1
    mode: str = "code"
    scale: float | None = None

    name: ClassVar[str] = "rkv"

    def __post_init__(self):
        super().__post_init__()
        _check_mix(self.mix_lambda)
        _check_importance(self.kernel_size, self.pooling, self.pool_order)
        _check_redundancy(self.threshold, self.beta, self.mode)

    @property
    def query_window(self) -> int:
        """Queries that the cache must remember per layer."""
        return self.window

    def score(self, layer, index: int) -> jax.Array:
        """Return the joint scores of a layer's slots, f32 ``[B, K, C]``."""
        del index
        keys, _ = layer.read()
        return scores(
            jnp.swapaxes(layer.queries, 1, 2),
            keys,
            length=layer.length,
            query_valid=layer.query_positions >= 0,
            window=self.window,
            mix_lambda=self.mix_lambda,
            threshold=self.threshold,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            pool_order=self.pool_order,
            zero_col0_when_empty=self.zero_col0_when_empty,
            beta=self.beta,
            mode=self.mode,
            scale=self.scale,
        ).joint
