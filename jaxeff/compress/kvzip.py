"""KVzip: evict what the model does not need to repeat its own context."""

from __future__ import annotations

import dataclasses
import numbers
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.compress.base import Compressor, ContextPass, check_queries
from jaxeff.compress.rkv import group_logits
from jaxeff.compress.scorer import evictable_layers, with_evictable
from jaxeff.kv_cache import DenseLayer, KVCache, TiledLayer
from jaxeff.kv_cache.base import LayerCache
from jaxeff.kv_cache.flight import attend_passes, attend_with_input, fold_heads
from pallas_kernels import dot_product_attention, explain, max_attention_weights

REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_LATER = "\n\nRepeat the part of the previous context exactly, starting with "
HINT_TOKENS = 8  # a later chunk's prompt ends with this many last tokens of the chunk before it
_BYTE_VOCABULARY = range(256, 320)  # bytes, perhaps with some special tokens


def reconstruction_scores(
    queries: jax.Array,
    keys: jax.Array,
    input_keys: jax.Array,
    *,
    num_sinks: int = 0,
    start: jax.Array | int | None = None,
    chunk: int | None = None,
    length: jax.Array | None = None,
    input_valid: jax.Array | None = None,
    norm: str = "chunk",
    value_norms: jax.Array | None = None,
    row_norms: jax.Array | None = None,
    scale: float | None = None,
    query_block: int = 128,
    implementation: str | None = None,
) -> jax.Array:
    """Score cache slots by the largest attention they get while the context is repeated.

    ``score_j = max over query rows and heads of a group of softmax(Q Kᵀ * scale)_j``, f32. The
    repeat input attends to itself causally. Query rows are visited in blocks, so memory is
    ``O(query_block * columns)``.

    Args:
        queries: float ``[B, A, N, H]``, queries of the repeat input, after RoPE.
        keys: float ``[B, S, K, H]``, cached keys, after RoPE.
        input_keys: float ``[B, A, K, H]``, keys of the repeat input, after RoPE.
        num_sinks: leading slots that always take part in the softmax (the system prompt).
        start: first slot of the chunk; ``None``: ``num_sinks``.
        chunk: slots in the chunk (static); ``None``: all from ``num_sinks``.
        length: int32 ``[B]`` or ``[B, K]``, live slots; ``None``: all ``S``.
        input_valid: bool ``[B, A]``, real rows of the repeat input; ``None``: all.
        norm: what a softmax runs over: ``"chunk"``: sinks, chunk and input (the authors' code);
            ``"full"``: every live slot and the input (equation 2 of the paper); ``"none"``: no
            softmax, scaled logits.
        value_norms: f32 ``[B, N, S]``, 0 or more, for KVzip+: ``‖W_O v_j‖`` for each query head's
            part of the output projection. Weights are multiplied by it before the maximum;
            ``None``: not. Needs a softmax.
        row_norms: f32 ``[B, A]``, above 0, for KVzip+: ``‖h_i‖`` of the input's hidden states.
            Weights are divided by it; ``None``: not.
        scale: multiplies the logits; ``None``: ``H ** -0.5``.
        query_block: query rows per block, where weights are made in blocks.
        implementation: of ``pallas_kernels.max_attention_weights``; ``None``: the best available.

    Returns:
        f32 ``[B, K, S]``; ``-inf`` on slots outside the chunk and on dead ones. Rows without a
        valid query score 0 (``-inf`` with ``norm="none"``).

    Raises:
        ValueError: if head counts do not divide or a switch is unknown.

    Examples:
        >>> q, k = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 3, 1, 4))
        >>> reconstruction_scores(q, k, jnp.ones((1, 2, 1, 4)), num_sinks=1).tolist()
        [[[-inf, 0.25, 0.25]]]

    References:
        KVzip (arXiv 2505.23416), equation 2, section 3.4 and Algorithm 1; KVzip+: KVzap (arXiv
        2601.07891).
    """
    if norm not in ("chunk", "full", "none"):
        raise ValueError(f"norm={norm!r}; expected 'chunk', 'full' or 'none'")
    if norm == "none" and not (value_norms is None and row_norms is None):
        raise ValueError("norm='none' gives logits; value_norms and row_norms need a softmax")
    check_queries(queries, keys)
    batch, slots, heads, head_dim = keys.shape
    own = (batch, queries.shape[1], heads, head_dim)
    if input_keys.shape != own:
        raise ValueError(f"input_keys has shape {input_keys.shape}; expected {own}")
    if not 0 <= num_sinks <= slots:
        raise ValueError(f"num_sinks={num_sinks} must be in [0, {slots}], the cached slots")
    start = num_sinks if start is None else start
    chunk = slots - num_sinks if chunk is None else chunk
    rows, groups = queries.shape[1], queries.shape[2] // heads
    for name, value, shape in (
        ("value_norms", value_norms, (batch, heads * groups, slots)),
        ("row_norms", row_norms, (batch, rows)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; expected {shape}")
    if input_valid is None:
        input_valid = jnp.ones((batch, rows), bool)
    length = jnp.asarray(slots if length is None else length, jnp.int32)
    length = length[:, None] if length.ndim == 1 else length
    length = jnp.broadcast_to(length, (batch, heads))[..., None]  # [B, K, 1]

    if norm == "full":
        column = jnp.arange(slots)
        live = column < length
    else:
        column = jnp.concatenate([jnp.arange(num_sinks), start + jnp.arange(chunk)])
        # A chunk never scores a sink, even where the two would overlap.
        fresh = (jnp.arange(column.size) < num_sinks) | (column >= num_sinks)
        live = fresh & (column < length)
    seen, sizes = keys, value_norms
    if norm != "full":
        seen = jnp.take(keys, column, axis=1, mode="clip")
        sizes = None if sizes is None else jnp.take(sizes, column, axis=2, mode="clip")
    if sizes is not None:
        sizes = sizes.reshape(batch, heads, groups, 1, -1)
    folded = jax.ShapeDtypeStruct((batch, heads, *seen.shape[1::2]), seen.dtype)
    if (
        norm != "none"
        and sizes is None
        and explain(
            "max_attention_weights", queries, folded, implementation=implementation
        ).implementation
        == "mosaic"
    ):
        best = _max_by_sums(
            queries, seen, input_keys, live, input_valid, row_norms, scale, implementation
        )
    else:
        best = _max_over_rows(
            queries,
            seen,
            input_keys,
            live,
            input_valid,
            sizes,
            jnp.ones((batch, rows)) if row_norms is None else row_norms,
            norm != "none",
            scale,
            query_block,
        )
    inside = live & (column >= start) & (column < start + chunk) & (column >= num_sinks)
    if norm == "full":
        return jnp.where(inside, best, -jnp.inf)
    target = jnp.where(inside, column, slots)  # out of range: dropped
    b, k = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    return jnp.full((batch, heads, slots), -jnp.inf).at[b, k, target].set(best, mode="drop")


def _max_by_sums(queries, keys, input_keys, live, input_valid, row_norms, scale, implementation):
    """Return what :func:`_max_over_rows` does, from each row's log-sum-exp, by two kernels."""
    _, lse = attend_with_input(
        *(queries, keys, keys, input_keys, input_keys),
        live=live,
        input_valid=input_valid,
        scale=scale,
    )
    if row_norms is not None:
        lse = lse + jnp.log(jnp.maximum(row_norms, 1e-30))[..., None]
    best = max_attention_weights(
        queries,
        jnp.swapaxes(keys, 1, 2),
        lse,
        query_valid=input_valid,
        scale=scale,
        implementation=implementation,
    )
    return jnp.where(live, best, 0.0)


def _max_over_rows(
    queries,
    keys,
    input_keys,
    live,
    input_valid,
    sizes,
    row_norms,
    normalise,
    scale,
    query_block,
):
    """Return the maximum over query rows of each cached column's weight, ``[B, K, S]``."""
    batch, rows, num_heads, head_dim = queries.shape
    slots = keys.shape[1]
    block = min(query_block, rows)
    blocks = -(-rows // block)
    pad = blocks * block - rows
    parts = jnp.pad(queries, ((0, 0), (0, pad), (0, 0), (0, 0)))
    parts = jnp.moveaxis(parts.reshape(batch, blocks, block, num_heads, head_dim), 1, 0)

    def by_block(x):
        x = jnp.pad(x, ((0, 0), (0, pad)))
        return jnp.moveaxis(x.reshape(batch, blocks, block), 1, 0)

    real, norms = by_block(input_valid), by_block(jnp.where(input_valid, row_norms, 1.0))
    every = jnp.concatenate([keys, input_keys.astype(keys.dtype)], axis=1)  # [B, S + A, K, H]

    def one_block(best, item):
        number, part, valid, norm = item
        logits = group_logits(part, every, scale)  # [B, K, G, block, S + A]
        query = number * block + jnp.arange(block)[:, None]
        causal = (query >= jnp.arange(rows)) & input_valid[:, None]  # [B, block, A]
        cached = jnp.broadcast_to(live[:, :, None, None], (*logits.shape[:4], slots))
        own = jnp.broadcast_to(causal[:, None, None], (*logits.shape[:4], rows))
        mask = jnp.concatenate([cached, own], axis=-1) & valid[:, None, None, :, None]
        if normalise:
            logits = jax.nn.softmax(jnp.where(mask, logits, _LOWEST), axis=-1)
        logits, mask = logits[..., :slots], mask[..., :slots]
        if normalise:
            logits = logits / jnp.maximum(norm, 1e-30)[:, None, None, :, None]
        if sizes is not None:
            logits = logits * sizes
        logits = jnp.where(mask, logits, 0.0 if normalise else -jnp.inf)
        return jnp.maximum(best, jnp.max(logits, axis=(2, 3))), None

    first = jnp.full((batch, keys.shape[2], slots), 0.0 if normalise else -jnp.inf)
    return jax.lax.scan(one_block, first, (jnp.arange(blocks), parts, real, norms))[0]


def _scores_side_by_side(
    queries: jax.Array,
    keys: jax.Array,
    lse: jax.Array,
    own_lse: jax.Array,
    *,
    starts: jax.Array,
    length: jax.Array,
    input_valid: jax.Array,
    chunk: int,
    num_sinks: int,
    norm: str,
    scale: float | None,
) -> jax.Array:
    """Return :func:`reconstruction_scores` of several passes at once, from what attention found.

    Args:
        queries: ``[B, P * A, N, H]``.
        keys: ``[B, K, S, H]``, cached.
        lse, own_lse: f32 ``[B, P * A, N]``, over cache and input, and over the input alone.
        starts: int32 ``[P]``, first slots of the chunks, none of them a sink.
        length: int32 ``[B, K]``.
        input_valid: bool ``[B, P * A]``.
        chunk, num_sinks, norm, scale: as there; ``norm`` is ``"chunk"`` or ``"full"``.

    Returns:
        f32 ``[B, K, S]``, ``-inf`` outside all chunks.
    """
    batch, heads, slots, head_dim = keys.shape
    passes = starts.shape[0]
    columns = starts[:, None] + jnp.arange(chunk)  # [P, m]

    def take(columns):  # [B * K * P, columns, 1, H]
        found = jnp.take(keys, columns, axis=2, mode="clip")
        return found.reshape(-1, columns.shape[1], 1, head_dim)

    apart = lambda x: x.reshape(-1, x.shape[1] // passes, *x.shape[2:])  # noqa: E731
    by_head = apart(fold_heads(queries, heads))  # [B * K * P, A, G, H]
    if norm == "chunk":
        sinks = jnp.broadcast_to(jnp.arange(num_sinks), (passes, num_sinks))
        seen = take(jnp.concatenate([sinks, columns], axis=1))
        counts = jnp.minimum(length, num_sinks)[..., None]
        counts = counts + jnp.clip(length[..., None] - starts, 0, chunk)  # [B, K, P]
        _, part = dot_product_attention(
            by_head,
            seen,
            seen,  # nobody wants the output
            key_value_seq_lengths=counts.reshape(-1),
            scale=scale,
            return_residual=True,
        )
        lse = jnp.logaddexp(part, apart(fold_heads(own_lse, heads)))
    else:
        lse = apart(fold_heads(lse, heads))
    real = jnp.broadcast_to(input_valid[:, None], (batch, heads, input_valid.shape[1]))
    best = max_attention_weights(
        by_head,
        jnp.swapaxes(take(columns), 1, 2),
        lse,
        query_valid=real.reshape(lse.shape[:2]),
        scale=scale,
    )
    best = best.reshape(batch, heads, -1)  # [B, K, P * m]
    column = columns.reshape(-1)
    target = jnp.where(column < length[..., None], column, slots)  # out of range: dropped
    b, k = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    return jnp.full((batch, heads, slots), -jnp.inf).at[b, k, target].max(best, mode="drop")


_LOWEST = -1e30  # hides a logit; finite, so that a row with nothing to see has no NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordingLayer:
    """A layer view for the repeat pass: shows cache and input, stores scores, keeps no input.

    Args:
        inner: the cache that is scored; never changed.
        start: int32 scalar, first slot of the chunk; or ``[P]`` for ``P`` passes side by side.
        scores: f32 ``[B, K, S]`` after ``update``, else ``None``.
        k, v: the input's keys and values ``[B, A, K, H]`` after ``update``, else ``None``.
        positions: int32 ``[B, A]``, positions of the input, -1 where padding.
        row_norms: f32 ``[B, A]``, norms of the layer's input, for KVzip+.
        output_gram: f32 ``[N, H, H]``, ``W_O W_Oᵀ`` of each query head, for KVzip+.
        output: ``[B, P * A, N, H]``, the attention of passes side by side, after ``update``.
        quant: variant of their attention over the cache; static.
        options: static arguments of :func:`reconstruction_scores`, as sorted pairs.

    Examples:
        >>> from jaxeff.kv_cache import DenseLayer
        >>> layer = RecordingLayer(DenseLayer.init(1, 4, 1, 8), jnp.int32(0), (("chunk", 4),))
        >>> layer.scores is None
        True

    References:
        KVzip (arXiv 2505.23416), section 3.3 (the input's pairs are dropped again).
    """

    inner: LayerCache
    start: jax.Array
    options: tuple[tuple[str, Any], ...] = dataclasses.field(metadata={"static": True})
    scores: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None
    positions: jax.Array | None = None
    row_norms: jax.Array | None = None
    output_gram: jax.Array | None = None
    output: jax.Array | None = None
    plus: bool = dataclasses.field(default=False, metadata={"static": True})
    quant: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def length(self) -> jax.Array:
        """Live slots of the scored cache, int32 ``[B, K]``."""
        return self.inner.length

    def note(self, hidden: jax.Array, out_kernel: jax.Array) -> RecordingLayer:
        """Return the view knowing what KVzip+ weighs with; attention calls it before ``update``.

        Args:
            hidden: ``[B, A, D]``, the attention layer's input.
            out_kernel: ``[N * H, D]``, its output projection.
        """
        if not self.plus:
            return self
        head_dim = self.inner.k.shape[-1]
        kernel = out_kernel.astype(jnp.float32).reshape(-1, head_dim, out_kernel.shape[-1])
        gram = jnp.einsum("nhd,nid->nhi", kernel, kernel, precision=jax.lax.Precision.HIGHEST)
        norms = jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)
        return dataclasses.replace(self, row_norms=norms, output_gram=gram)

    def update(self, k, v, *, positions, valid=None, queries=None) -> RecordingLayer:
        """Return the view with this input's keys and values in flight and the scores taken."""
        if queries is None:
            raise ValueError("queries is None; scoring by reconstruction needs them")
        if valid is None:
            valid = jnp.ones(positions.shape, bool)
        if self.start.ndim:
            return self._update_passes(k, v, jnp.where(valid, positions, -1), queries)
        # As attention sees them; in the cache's precision, which the kernels take.
        keys, values = self.inner.read(jnp.float32 if self.plus else queries.dtype)
        if self.plus and self.output_gram is None:
            raise ValueError("kvzip_plus needs the output projection; attention calls note() first")
        scores = reconstruction_scores(
            queries,
            keys,
            k,
            start=self.start,
            length=self.inner.length,
            input_valid=valid,
            value_norms=_projected_norms(values, self.output_gram) if self.plus else None,
            row_norms=self.row_norms,
            **dict(self.options),
        )
        positions = jnp.where(valid, positions, -1)
        return dataclasses.replace(self, scores=scores, k=k, v=v, positions=positions)

    def _update_passes(self, k, v, positions, queries) -> RecordingLayer:
        """Do the same for passes side by side, whose attention is part of the scoring."""
        options = dict(self.options)
        keys, values = (jnp.swapaxes(x, 1, 2) for x in self.inner.read(queries.dtype))
        output, lse, own_lse = attend_passes(
            *(queries, keys, values, k, v),
            length=self.inner.length,
            passes=self.start.shape[0],
            scale=options["scale"],
            quant=self.quant,
        )
        scores = _scores_side_by_side(
            *(queries, keys, lse, own_lse),
            starts=self.start,
            length=self.inner.length,
            input_valid=positions >= 0,
            **options,
        )
        return dataclasses.replace(
            self, scores=scores, k=k, v=v, positions=positions, output=output
        )

    @property
    def attends_many(self) -> bool:
        """Whether :meth:`attend` takes any number of queries: where it needs no mask array."""
        return isinstance(self.inner, DenseLayer)

    def attend(self, queries, *, positions, window=None, scale=None) -> jax.Array:
        """Return the attention of the input over the cache and itself, ``[B, A, N, H]``."""
        if self.output is not None and window is None:
            return self.output
        if window is not None or not self.attends_many:
            mask = jnp.repeat(self.mask(positions, window), queries.shape[2] // self.k.shape[2], 1)
            return dot_product_attention(queries, *self.read(queries.dtype), mask=mask, scale=scale)
        keys, values = self.inner.read(queries.dtype)
        out, _ = attend_with_input(
            *(queries, keys, values, self.k, self.v),
            live=self.inner.live,
            input_valid=self.positions >= 0,
            scale=scale,
        )
        return out

    def read(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of the cache, then those of the input, ``[B, S + A, K, H]``."""
        keys, values = self.inner.read(dtype)
        return (
            jnp.concatenate([keys, self.k.astype(keys.dtype)], axis=1),
            jnp.concatenate([values, self.v.astype(values.dtype)], axis=1),
        )

    def mask(self, positions: jax.Array, window: int | None = None) -> jax.Array:
        """Return which slots and input tokens each query may see, bool ``[B, K, T, S + A]``."""
        cached = self.inner.mask(positions, window)
        own = self.positions[:, None, :]  # [B, 1, A]
        query = positions[:, :, None]
        visible = (own >= 0) & (own <= query)
        if window is not None:
            visible = visible & (query - own < window)
        if self.start.ndim:
            number = jnp.arange(own.shape[-1]) // (own.shape[-1] // self.start.shape[0])
            visible = visible & (number == number[:, None])
        shape = (*cached.shape[:3], own.shape[-1])
        return jnp.concatenate([cached, jnp.broadcast_to(visible[:, None], shape)], axis=-1)


def _projected_norms(values: jax.Array, gram: jax.Array) -> jax.Array:
    """Return ``‖W_O v_j‖`` of every query head, f32 ``[B, N, S]``."""
    batch, slots, heads, head_dim = values.shape
    gram = gram.reshape(heads, -1, head_dim, head_dim)
    turned = jnp.einsum("bskh,kghi->bkgsi", values, gram, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.einsum("bkgsi,bski->bkgs", turned, values, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.maximum(squares, 0.0)).reshape(batch, -1, slots)


def keep_mask(
    scores: jax.Array,
    ratio: float,
    *,
    level: str = "pair",
    upstream_threshold: bool = False,
) -> jax.Array:
    """Mark the context entries that a ratio keeps.

    Args:
        scores: f32 ``[L, B, K, S]``, higher = keep; ``-inf`` on slots that do not compete.
        ratio: share of the competing entries to keep, in (0, 1].
        level: ``"pair"``: one ranking over all layers, heads and slots of a row. ``"uniform"``
            (also ``"pair-uniform"``): every layer and head keeps its share. ``"head"``: the share
            of heads with the largest maximum keeps all its entries, the others none.
        upstream_threshold: keep ``score > threshold`` with the threshold of the authors' code,
            which below ratio 1 loses one entry and all ties, instead of exactly the share. No
            effect on ``"uniform"``, which is exact there too.

    Returns:
        bool ``[L, B, K, S]``; ties go to the lower layer, head and slot.

    Raises:
        ValueError: if the ratio or the level is out of range.

    Examples:
        >>> scores = jnp.array([[[[0.1, 0.4, 0.3, 0.2]]]])
        >>> keep_mask(scores, 0.5).tolist()
        [[[[False, True, True, False]]]]

    References:
        KVzip (arXiv 2505.23416), section 3.3 and Algorithm 1.
    """
    _check_selection(ratio, level)
    layers, batch, heads, _ = scores.shape
    eligible = scores > -jnp.inf
    if ratio == 1:
        return eligible
    if level in ("uniform", "pair-uniform"):
        return _largest(scores, _count(jnp.sum(eligible, -1), ratio)) & eligible
    by_row = jnp.moveaxis(scores, 1, 0)  # [B, L, K, S]
    if level == "head":
        by_row = jnp.broadcast_to(jnp.max(by_row, axis=-1, keepdims=True), by_row.shape)
        by_row = jnp.where(jnp.moveaxis(eligible, 1, 0), by_row, -jnp.inf)
    flat = by_row.reshape(batch, -1)
    if upstream_threshold:
        # int(N * ratio), as the authors' code rounds it.
        count = _count(jnp.sum(flat > -jnp.inf, -1), ratio, slack=0.0)
        ordered = -jnp.sort(-flat, axis=-1)
        threshold = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0)[:, None], axis=-1)
        kept = (flat > threshold).reshape(by_row.shape)
    elif level == "head":
        best = jnp.max(by_row, axis=-1).reshape(batch, -1)  # [B, L * K]
        kept = _largest(best, _count(jnp.sum(best > -jnp.inf, -1), ratio))
        kept = jnp.broadcast_to(kept.reshape(batch, layers, heads, 1), by_row.shape)
    else:
        kept = _largest(flat, _count(jnp.sum(flat > -jnp.inf, -1), ratio)).reshape(by_row.shape)
    return jnp.moveaxis(kept, 0, 1) & eligible


def _check_selection(ratio: float, level: str) -> None:
    if not isinstance(ratio, numbers.Real) or not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must be in (0, 1]: the share of the context that is kept")
    if level not in ("pair", "uniform", "pair-uniform", "head"):
        raise ValueError(f"level={level!r}; expected 'pair', 'uniform' ('pair-uniform') or 'head'")


def _count(total: jax.Array, ratio: float, slack: float = 1e-6) -> jax.Array:
    """Return ``floor(total * ratio)`` per entry, on the host, where a float has 53 bits."""
    # 0.29 * 100 is 28.999…: a millionth of an entry brings the intended whole number back.
    return jnp.asarray(np.floor(np.asarray(total, np.float64) * ratio + slack), jnp.int32)


def _largest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """Mark the ``count [...]`` largest of the last axis, the earlier one first on ties."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return rank < count[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Compressor):
    """Cuts the context once, after the prefill, to what reconstructing it needs.

    The model is run once more over the full cache, told to repeat the context chunk by chunk;
    :func:`reconstruction_scores` says how much each cached pair was used, and :func:`keep_mask`
    chooses. Heads end up with different lengths; ``layout`` says what that allocates. The kept
    cache serves any question. Layers with a sliding window keep their ring.

    Args:
        ratio: share of the context entries to keep, in (0, 1].
        level: ``"pair"``, ``"uniform"`` or ``"head"``; see :func:`keep_mask`.
        chunk: context tokens repeated per pass.
        norm: ``"chunk"``, ``"full"`` or ``"none"``; see :func:`reconstruction_scores`.
        num_sinks: leading tokens (a system prompt) that are never evicted and not counted.
        num_recent: last tokens of the prompt that are never evicted and not counted; 0 as in the
            paper.
        repeat_prompt: token ids that ask for the first chunk; ``None``: for a model over bytes
            (vocabulary of 256 to 319) the authors' English text, else no words at all (section
            4.3 finds no difference).
        repeat_prompt_later: the same for later chunks; the last 8 tokens of the chunk before
            follow it.
        header: token ids between the prompt and the chunk (end of turn, start of answer).
        upstream_threshold: see :func:`keep_mask`.
        kvzip_plus: weigh attention with ``‖W_O v_j‖ / ‖h_i‖``, what an entry adds to the residual
            stream relative to its input. Needs a softmax.
        scale: softmax scale; ``None``: ``H ** -0.5``.
        bucket: capacities are multiples of this many tokens, before the room is added; with
            ``layout="tiled"`` the slots of a tile.
        pass_format: ``"fp8"``: the linear layers of the passes compute in FP8 (see
            ``jaxeff.quant.fp8_dot_general``), so that the scores, and nothing else, have its
            rounding; ``None``: as the model computes. 1.18 times the prefill's time.
        side_by_side: run as many passes in one forward as the prefill had tokens, with one call of
            attention over the cache for all of them. Not for models with sliding windows,
            ``kvzip_plus`` or ``norm="none"``, whose passes stay apart. The scores are the same, in
            1.41 instead of 1.60 times the prefill's time (docs/kv_cache.md).
        pass_quant: variant of the attention over the cache of passes side by side, such as
            ``"sage2"``; the softmax that scores stays in full precision.
        layout: ``"dense"``: every head of a layer gets the capacity of the longest. ``"tiled"``:
            heads own tiles of a pool, so that allocated bytes follow what each head keeps.
        storage: how the cache is stored; ``None``: as the caller asks. With ``"int8"`` prefill,
            scores and decoding all see the stored values.

    Raises:
        ValueError: if a setting is out of range.

    Examples:
        >>> KVzip(ratio=0.3, storage="int8").level
        'pair'
        >>> KVzip(ratio=0.0)
        Traceback (most recent call last):
            ...
        ValueError: ratio=0.0 must be in (0, 1]: the share of the context that is kept

    References:
        KVzip (arXiv 2505.23416), section 3 and Algorithm 1; prompt wording: Table 2. KVzip+: KVzap
        (arXiv 2601.07891).
    """

    ratio: float
    level: str = "pair"
    chunk: int = 2000
    norm: str = "chunk"
    num_sinks: int = 0
    num_recent: int = 0
    repeat_prompt: tuple[int, ...] | None = None
    repeat_prompt_later: tuple[int, ...] | None = None
    header: tuple[int, ...] = ()
    upstream_threshold: bool = False
    kvzip_plus: bool = False
    scale: float | None = None
    bucket: int = 16
    layout: str = "dense"
    side_by_side: bool = True
    pass_format: str | None = None
    pass_quant: str | None = None

    name: ClassVar[str] = "kvzip"
    primary: ClassVar[str] = "ratio"

    def __post_init__(self):
        _check_selection(self.ratio, self.level)
        if self.norm not in ("chunk", "full", "none"):
            raise ValueError(f"norm={self.norm!r}; expected 'chunk', 'full' or 'none'")
        if self.kvzip_plus and self.norm == "none":
            raise ValueError("norm='none' gives logits; kvzip_plus needs 'chunk' or 'full'")
        if self.pass_quant is not None and not self.side_by_side:
            raise ValueError(f"pass_quant={self.pass_quant!r} needs side_by_side=True")
        if self.pass_format not in (None, "fp8"):
            raise ValueError(f"pass_format={self.pass_format!r}; expected None or 'fp8'")
        if self.layout not in ("dense", "tiled"):
            raise ValueError(f"layout={self.layout!r}; expected 'dense' or 'tiled'")
        for field, least in (("chunk", 1), ("bucket", 1), ("num_sinks", 0), ("num_recent", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field}={value!r}; expected {least} or more tokens")
        # Lists become tuples: the compressor is a static, hashable argument.
        for field in ("repeat_prompt", "repeat_prompt_later", "header"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, tuple(int(token) for token in value))

    @property
    def evicts_context(self) -> bool:
        """Always: the prefill's cache has no room to decode."""
        return True

    def prefill_capacity(self, *, prompt: int, room: int) -> int:
        """Return the slots of the prefill's cache; eviction makes a smaller one."""
        del room
        return prompt

    def context_passes(
        self, tokens: np.ndarray, lengths: np.ndarray, *, vocab_size: int
    ) -> list[ContextPass]:
        """Return one pass per chunk: prompt, header, and the chunk itself to be repeated.

        Args:
            tokens: int ``[B, T]``, the prompts.
            lengths: int ``[B]``, their lengths, in tokens.
            vocab_size: tokens of the model's vocabulary.

        Returns:
            Passes of one shape, padded on the right; a row that ends before a chunk is empty.

        Raises:
            ValueError: if a prompt token is not in the vocabulary.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        if self.ratio == 1:
            return []
        first, later = self._prompts(vocab_size)
        longest = int(lengths.max())
        chunk = min(self.chunk, max(longest - self.num_sinks, 1))
        starts = range(self.num_sinks, max(longest, self.num_sinks + 1), chunk)
        lead = max(len(first), len(later) + HINT_TOKENS if len(starts) > 1 else 0)
        width = lead + len(self.header) + chunk
        passes = []
        for start in starts:
            filled = np.zeros((tokens.shape[0], width), np.int32)
            valid = np.zeros(filled.shape, bool)
            for row, length in enumerate(lengths):
                part = tokens[row, start : min(start + chunk, length)]
                if not part.size:
                    continue
                hint = tokens[row, max(self.num_sinks, start - HINT_TOKENS) : start]
                lead_in = first if start == starts[0] else np.concatenate([later, hint])
                text = np.concatenate([lead_in, self.header, part]).astype(np.int32)
                filled[row, : text.size], valid[row, : text.size] = text, True
            passes.append(ContextPass(filled, valid, start))
        return passes

    def _prompts(self, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids before the first chunk and before later ones."""
        spoken = vocab_size in _BYTE_VOCABULARY
        prompts = []
        for field, text in (("repeat_prompt", REPEAT_FIRST), ("repeat_prompt_later", REPEAT_LATER)):
            ids = getattr(self, field)
            if ids is None:
                ids = tuple(text.encode()) if spoken else ()
            for name, group in ((field, ids), ("header", self.header)):
                if group and not 0 <= min(group) <= max(group) < vocab_size:
                    raise ValueError(
                        f"{name} has token ids from {min(group)} to {max(group)}; "
                        f"the vocabulary has {vocab_size} tokens"
                    )
            prompts.append(np.asarray(ids, np.int32))
        return prompts[0], prompts[1]

    def most_passes(self, cache: KVCache) -> int:
        """Return how many passes one forward may take side by side over this cache."""
        alone = not self.side_by_side or self.kvzip_plus or self.norm == "none"
        dense = all(type(layer) is DenseLayer for layer in cache.layers)
        return 1 if alone or not dense else 2**30

    def observe(self, cache: KVCache, start: jax.Array, *, chunk: int | None = None) -> KVCache:
        """Return a view of the cache that scores the chunk at ``start`` as the model runs.

        Args:
            cache: the cache of the whole context, slot ``i`` holding position ``i``.
            start: int32 scalar, first slot of the chunk; or ``[P]`` for inputs side by side.
            chunk: slots in the chunk; ``None``: ``self.chunk``, at most the context.

        Returns:
            A cache of :class:`RecordingLayer`.
        """
        inner = evictable_layers(cache)
        if not inner:
            return cache
        capacity = inner[0].capacity
        chunk = min(self.chunk, max(capacity - self.num_sinks, 1)) if chunk is None else chunk
        options = {
            "chunk": chunk,
            "norm": self.norm,
            "num_sinks": min(self.num_sinks, capacity),
            "scale": self.scale,
        }
        pairs = tuple(sorted(options.items()))
        # A ring answers for itself; the caller keeps the cache from before the pass.
        views = [
            RecordingLayer(
                layer, jnp.asarray(start), pairs, plus=self.kvzip_plus, quant=self.pass_quant
            )
            for layer in inner
        ]
        return with_evictable(cache, views)

    def collect(self, cache: KVCache) -> tuple[jax.Array, ...]:
        """Return the scores that a view recorded, one ``[B, K, S]`` per layer."""
        return tuple(layer.scores for layer in cache.layers if isinstance(layer, RecordingLayer))

    def evict_context(self, cache: KVCache, scores: tuple[jax.Array, ...], *, room: int) -> KVCache:
        """Return the cache of the kept entries, in as few slots as they and ``room`` need.

        Args:
            cache: the cache of the whole context, slot ``i`` holding position ``i``.
            scores: f32 ``[B, K, S]`` per layer, the maximum over all passes; ``-inf`` on dead
                slots. An empty tuple keeps everything.
            room: tokens that will be appended, in tokens.

        Returns:
            The new cache; its layers may differ in capacity.
        """
        old = evictable_layers(cache)
        if not old:
            return cache
        live = jnp.stack([layer.live for layer in old])  # [L, B, K, S]
        slot = jnp.arange(live.shape[-1])
        frozen = [jnp.minimum(layer.length, self.num_sinks) for layer in old]
        frozen = jnp.maximum(jnp.stack(frozen), jnp.stack([x.frozen for x in old]))
        recent = jnp.stack([layer.length for layer in old])[..., None] - self.num_recent
        forced = live & ((slot < frozen[..., None]) | (slot >= recent))
        keep = live
        if scores:
            stacked = jnp.where(live & ~forced, jnp.stack(scores), -jnp.inf)
            keep = forced | keep_mask(
                stacked, self.ratio, level=self.level, upstream_threshold=self.upstream_threshold
            )
        lengths = np.asarray(jnp.sum(keep, axis=-1))  # [L, B, K]
        layers = []
        for number, layer in enumerate(old):
            longest = int(lengths[number].max())
            size = min(-(-longest // self.bucket) * self.bucket, layer.capacity)
            layer = dataclasses.replace(layer, frozen=frozen[number])
            if self.layout == "tiled":
                tiles = -(-(lengths[number] + room) // self.bucket)  # [B, K]
                sizes = (max(int(tiles.sum(axis=1).max()), 1), max(int(tiles.max()), 1))
                layer = _tile(layer, keep[number], longest, self.bucket, *sizes)
            else:
                layer = _cut(layer, keep[number], size, max(size + room, 1))
            layers.append(layer)
        return with_evictable(cache, layers)


# One program per layer and size: op by op, the first eviction would compile dozens.
@partial(jax.jit, static_argnums=(2, 3))
def _cut(layer: LayerCache, keep: jax.Array, size: int, capacity: int) -> LayerCache:
    """Return ``capacity`` slots with the slots of ``keep [B, K, S]``, ``size`` at most."""
    return layer.gather(_kept_slots(keep, size), capacity=capacity)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _tile(layer: LayerCache, keep: jax.Array, size: int, tile: int, num_tiles: int, max_tiles: int):
    """Return a tiled layer with the slots of ``keep [B, K, S]``, ``size`` or fewer per head."""
    indices = _kept_slots(keep, size)
    return TiledLayer.pack(layer, indices, tile=tile, num_tiles=num_tiles, max_tiles=max_tiles)


def _kept_slots(keep: jax.Array, size: int) -> jax.Array:
    """Return the marked slots in order, ``[B, K, size]``, then -1."""
    slots = keep.shape[-1]
    order = jnp.sort(jnp.where(keep, jnp.arange(slots), slots), axis=-1)[..., :size]
    return jnp.where(order < slots, order, -1)
