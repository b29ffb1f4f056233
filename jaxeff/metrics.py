"""Measures of what a model does while it trains: how sparse its attention has become.

All numbers come from block statistics: one block of query rows is scored at a time, so memory is
``O(block_q · S)`` for each head and never ``T × S``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.typing import Array

__all__ = ["AttentionSparsity", "attention_sparsity", "attention_statistics"]


class AttentionSparsity(NamedTuple):
    """Sparsity of attention, averaged over the query rows that see at least one key.

    From :func:`attention_statistics` every field is ``[N]`` float32 (one number a head); from
    :func:`attention_sparsity` it is ``[num_layers, N]``.

    Attributes:
        entropy: ``H(α) / ln n`` with n the keys a row may see: 1 uniform, 0 on one key. Rows with
            one visible key count as 0.
        effective_support: ``exp H(α)``, in keys.
        top1_mass: largest weight of a row.
        tile_gini: Gini coefficient of the mass of the tiles a block of rows may see: 0 if all
            tiles get the same, towards 1 if one gets everything.
        skippable_tiles: share of the visible tiles that can be left out while every block of rows
            keeps ``kept_mass`` of its attention.
    """

    entropy: Array
    effective_support: Array
    top1_mass: Array
    tile_gini: Array
    skippable_tiles: Array


def attention_statistics(
    query: Array,
    key: Array,
    *,
    mask: Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    block_q: int = 64,
    block_kv: int = 64,
    kept_mass: float = 0.95,
) -> AttentionSparsity:
    """Measure how sparse ``α = softmax(scale · q kᵀ + mask)`` is, block of rows by block of rows.

    Arguments shared with ``jax.nn.dot_product_attention`` mean the same. Memory is
    ``B · N · block_q · S`` float32 for the block in work; time that of one attention without its
    values. Gradients are stopped.

    Args:
        query: ``[B, T, N, H]``.
        key: ``[B, S, K, H]``, N a multiple of K.
        mask: bool, broadcastable to ``[B, N, T, S]``, True where a row may look. A mask that is
            itself T×S is read block by block, not copied.
        scale: softmax scale; by default ``H ** -0.5``.
        is_causal: row t sees keys 0..t.
        local_window_size: ``w`` or ``(left, right)``: row t sees keys t−left..t+right.
        block_q: rows in a tile, tokens.
        block_kv: keys in a tile, tokens.
        kept_mass: share of a row block's attention that must survive, in (0, 1].

    Returns:
        :class:`AttentionSparsity` with fields ``[N]``. Rows that see no key are left out; a head
        of which no row sees any key gets 0 everywhere.

    Raises:
        ValueError: a shape does not fit or a number is out of its range.

    >>> x = jnp.zeros((1, 8, 1, 4))  # equal scores: uniform attention
    >>> found = attention_statistics(x, x, block_q=4, block_kv=4, kept_mass=1.0)
    >>> float(found.entropy[0].round(4)), float(found.effective_support[0].round(4))
    (1.0, 8.0)
    >>> float(found.tile_gini[0]), float(found.skippable_tiles[0])
    (0.0, 0.0)

    Reference: entropy and support as in Zucchet et al., arXiv 2505.17863, appendix D.1; the rule
    for tiles is the top-cdf rule of SpargeAttn, arXiv 2502.18137, section 3.2, on exact attention.
    """
    _check(query, key, mask, block_q, block_kv, kept_mass)
    query, key = jax.lax.stop_gradient((query, key))
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    blocks_q = -(-T // block_q)
    padding = blocks_q * block_q - T
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    query = query.reshape(B, blocks_q, block_q, K, N // K, H).swapaxes(0, 1).astype(jnp.float32)
    key = key.astype(jnp.float32)

    def one_block(carry, block):
        index, q = block  # q: [B, block_q, K, G, H]
        rows = index * block_q + jnp.arange(block_q)
        logits = scale * jnp.einsum("btkgh,bskh->bkgts", q, key)
        logits = logits.reshape(B, N, block_q, S)
        visible = _visible(rows, T, S, is_causal, local_window_size)  # [block_q, S]
        visible = jnp.broadcast_to(visible, logits.shape)
        if mask is not None:
            visible = visible & _mask_rows(mask, rows, T)
        sums = _block_sums(logits, visible, block_kv, kept_mass)
        return jax.tree.map(jnp.add, carry, sums), None

    zeros = jnp.zeros((7, N), jnp.float32)
    totals, _ = jax.lax.scan(one_block, zeros, (jnp.arange(blocks_q), query))
    rows, entropy, support, top1, blocks, gini, skippable = totals
    per_row, per_block = jnp.maximum(rows, 1.0), jnp.maximum(blocks, 1.0)
    return AttentionSparsity(
        entropy / per_row,
        support / per_row,
        top1 / per_row,
        gini / per_block,
        skippable / per_block,
    )


def attention_sparsity(
    model: Any,
    tokens: Array,
    *,
    valid: Array | None = None,
    block_q: int = 64,
    block_kv: int = 64,
    kept_mass: float = 0.95,
) -> AttentionSparsity:
    """Measure the attention sparsity of every layer and head of a model on some tokens.

    Any model will do that calls ``attention_fn`` once a layer and takes it as a keyword, as
    :class:`jaxeff.models.Decoder` does. Works under ``jit``; the forward pass itself uses
    ``jax.nn.dot_product_attention``. To follow a training run, call it on one fixed batch on the
    models of its checkpoints: ``jaxeff.train.fit`` does not log it by itself.

    Args:
        model: callable ``model(tokens, attention_fn=..., [valid=...])``.
        tokens: ``[B, T]`` integer, or whatever the model takes.
        valid: ``[B, T]`` bool, False for padding; passed on if given. Rows of padding that see
            earlier tokens are counted.
        block_q: rows in a tile, tokens.
        block_kv: keys in a tile, tokens.
        kept_mass: share of a row block's attention that must survive, in (0, 1].

    Returns:
        :class:`AttentionSparsity` with fields ``[num_layers, N]``.

    Raises:
        ValueError: the model never called ``attention_fn``, or a number is out of its range.

    >>> def model(x, attention_fn):
    ...     return attention_fn(x, x, x, is_causal=True)
    >>> attention_sparsity(model, jnp.ones((1, 16, 2, 4))).entropy.shape
    (1, 2)
    """
    found: list[AttentionSparsity] = []
    measure = functools.partial(
        attention_statistics, block_q=block_q, block_kv=block_kv, kept_mass=kept_mass
    )
    options = {} if valid is None else {"valid": valid}
    model(tokens, attention_fn=_measured(measure, found), **options)
    if not found:
        raise ValueError(
            "the model did not call attention_fn; expected one call for each layer, as "
            "jaxeff.models.Decoder makes"
        )
    return AttentionSparsity(*(jnp.stack(field) for field in zip(*found, strict=True)))


def _measured(measure: Callable[..., AttentionSparsity], found: list) -> Callable[..., Array]:
    """``jax.nn.dot_product_attention`` that appends its statistics to ``found`` on each call."""

    def attend(query, key, value, **options):
        known = {"mask", "scale", "is_causal", "local_window_size"}
        if options.keys() - known:
            raise NotImplementedError(
                f"sparsity is measured for {sorted(known)}; got {sorted(options.keys() - known)}"
            )
        found.append(measure(query, key, **options))
        return jax.nn.dot_product_attention(query, key, value, **options)

    return attend


def _visible(rows: Array, T: int, S: int, is_causal: bool, window: Any) -> Array:
    """Which keys ``[block_q, S]`` the rows may see by their positions alone."""
    position = jnp.arange(S)
    visible = jnp.broadcast_to((rows < T)[:, None], (rows.shape[0], S))
    if is_causal:
        visible = visible & (position <= rows[:, None])
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        offset = position - rows[:, None]
        visible = visible & (offset >= -left) & (offset <= right)
    return visible


def _mask_rows(mask: Array, rows: Array, T: int) -> Array:
    """The rows of a mask ``[..., T or 1, S or 1]`` that belong to one block."""
    if mask.shape[-2] == 1:
        return mask
    return jnp.take(mask, jnp.minimum(rows, T - 1), axis=-2)


def _block_sums(logits: Array, visible: Array, block_kv: int, kept_mass: float) -> Array:
    """Sums over the rows and row blocks of one block, ``[7, N]``."""
    S = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf, where=visible)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight = jnp.where(visible, jnp.exp(logits - top), 0.0)
    total = weight.sum(-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)  # [B, N, block_q, S]
    count = visible.sum(-1)  # [B, N, block_q]
    live = count > 0
    entropy = -jax.scipy.special.xlogy(weight, weight).sum(-1)
    spread = jnp.where(count > 1, entropy / jnp.log(jnp.maximum(count, 2)), 0.0)

    padding = -S % block_kv
    widths = ((0, 0), (0, 0), (0, 0), (0, padding))
    tiles = (*weight.shape[:3], -1, block_kv)
    mass = jnp.pad(weight, widths).reshape(tiles).sum((2, 4))  # [B, N, tiles]
    seen = jnp.pad(visible, widths).reshape(tiles).any((2, 4))  # [B, N, tiles]
    some = seen.any(-1)
    share = mass / jnp.where(some, mass.sum(-1), 1.0)[..., None]
    number = jnp.maximum(seen.sum(-1), 1)
    order = jnp.sort(jnp.where(seen, share, -1.0), axis=-1)  # tiles out of sight first
    rank = jnp.cumsum(order >= 0, axis=-1)  # 1.. among the visible ones
    weights = jnp.where(order >= 0, 2 * rank - number[..., None] - 1, 0)
    gini = (weights * jnp.maximum(order, 0.0)).sum(-1) / number
    # Drop the smallest tiles as long as what is dropped stays within 1 − kept_mass.
    dropped = jnp.cumsum(jnp.maximum(order, 0.0), axis=-1)
    skippable = ((order >= 0) & (dropped <= 1.0 - kept_mass)).sum(-1) / number

    def over_rows(x):
        return jnp.where(live, x, 0.0).sum((0, 2))

    def over_blocks(x):
        return jnp.where(some, x, 0.0).sum(0)

    return jnp.stack(
        [
            over_rows(jnp.ones_like(entropy)),
            over_rows(spread),
            over_rows(jnp.exp(entropy)),
            over_rows(weight.max(-1)),
            over_blocks(jnp.ones_like(gini)),
            over_blocks(gini),
            over_blocks(skippable),
        ]
    )


def _check(query, key, mask, block_q, block_kv, kept_mass) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            f"query has shape {query.shape}, key {key.shape}; expected [B, T, N, H] and "
            "[B, S, K, H]"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must agree in batch and head dimension"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key has {key.shape[2]} heads; query heads ({query.shape[2]}) must be a multiple of it"
        )
    if mask is not None and (mask.ndim != 4 or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask is {mask.dtype} of shape {mask.shape}; expected bool, broadcastable to "
            "[B, N, T, S]"
        )
    for name, value in (("block_q", block_q), ("block_kv", block_kv)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not 0.0 < kept_mass <= 1.0:
        raise ValueError(f"kept_mass is {kept_mass}; expected a number in (0, 1]")
