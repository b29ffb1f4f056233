# SPDX-License-Identifier: Apache-2.0
"""SpargeAttn: predict from block means which tiles matter, then attend to those alone.

Differences from the published code, all on purpose: tokens inside diagonal tiles never see the
future; grouped heads, any T and S and any token rule are served; the last, ragged tile is judged
by its real tokens (upstream always computes it); V uses the whole FP8 range; a query that may see
nothing gives zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.masks import EMPTY, BlockMask, Mask
from pallas_kernels.masks.block_mask import top_tiles
from pallas_kernels.ops.attention import api, sparse
from pallas_kernels.ops.attention.spec import QUANTS, AttentionQuant

# Tiles of the Hopper kernels.
BLOCK_Q, BLOCK_KV = 64, 128


def sparge_quant(block_q: int = BLOCK_Q, block_kv: int = BLOCK_KV) -> AttentionQuant:
    """The variant of SpargeAttn: "sage2" with one scale of Q or K per tile.

    Args:
      block_q: queries per tile, tokens.
      block_kv: keys per tile, tokens.

    Returns:
      An `AttentionQuant`.

    >>> sparge_quant().granularity
    'per_block'
    """
    return dataclasses.replace(
        QUANTS["sage2"], name="sage2_per_block", granularity="per_block", block_q=block_q,
        block_kv=block_kv, warp_q=1,
    )  # fmt: skip


def block_means(
    x: jax.Array, block: int, live: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and self-similarity of every block of tokens.

    The similarity is the mean cosine between the tokens of a block, the token itself included:
    ``sum_ij cos(x_i, x_j) / rows^2``, which is the squared length of the mean unit vector.

    Args:
      x: float32 [B, L, heads, H].
      block: tokens per block.
      live: bool [B or 1, L, heads or 1], tokens that count, or None for all.

    Returns:
      Means float32 [B, ceil(L / block), heads, H] and similarities float32 [B, ., heads] in
      [0, 1]. A block without tokens has zeros.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])[None, :, None]
    >>> [y.ravel().tolist() for y in block_means(x, 2)]
    [[0.5, 0.5], [0.5]]

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.2.
    """
    if live is not None:
        x = jnp.where(live[..., None], x, 0.0)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / jnp.where(norm > 0, norm, 1.0)
    rows = jnp.maximum(_rows(x, block, live), 1.0)
    similarity = ((_sums(unit, block) / rows) ** 2).sum(-1)
    return _sums(x, block) / rows, similarity


def _sums(x: jax.Array, block: int) -> jax.Array:
    """Sums over blocks of tokens; [B, L, ...] -> [B, ceil(L / block), ...]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(2)


def _rows(x: jax.Array, block: int, live: jax.Array | None) -> jax.Array:
    """Tokens that count in each block, float32 [B or 1, ceil(L / block), heads or 1, 1]."""
    live = jnp.ones((1, x.shape[1], 1), bool) if live is None else live
    return _sums(live[..., None].astype(jnp.float32), block)


def predict(
    query: jax.Array,
    key: jax.Array,
    mask: Mask | None = None,
    *,
    simthreshd1: float | jax.Array | None = -0.1,
    cdfthreshd: float | jax.Array | None = None,
    topk: float | jax.Array | None = None,
    scale: float | None = None,
    smooth_k: bool = True,
    attention_sink: bool = False,
    block_q: int = BLOCK_Q,
    block_kv: int = BLOCK_KV,
) -> BlockMask:
    """Predicts which tiles of attention carry its mass.

    Tile (i, j) scores ``scale * mean(Q_i) . mean(K_j)``. In each row the highest scores are kept,
    by count (`topk`) or by their share of the softmax (`cdfthreshd`). Blocks whose tokens differ
    too much among themselves are not judged by their mean: all tiles of such a query or key block
    are kept. No gradient; works under `jit` without a host round trip.

    The choice looks at whole blocks and at the mean key, so it may depend on later tokens, though
    the values that a query reads never do.

    Args:
      query: float [B, T, N, H].
      key: float [B, S, K, H], N a multiple of K.
      mask: token rule; tiles in which it allows nothing are never kept.
      simthreshd1: a block is judged by its mean when its self-similarity is above this; number or
        [N], in [-1, 1]. With a negative number, and with None, every block is, since similarities
        are not negative: then Q and K are read only once.
      cdfthreshd: share of the softmax over tiles to keep, number or [N], in [0, 1]; or None.
      topk: share of all key tiles to keep, number or [N], in [0, 1]; or None.
      scale: factor on the scores; None means ``1 / sqrt(H)``.
      smooth_k: subtract the mean key first, which makes blocks of keys differ more.
      attention_sink: always keep the first tile of keys.
      block_q: queries per tile, tokens.
      block_kv: keys per tile, tokens.

    Returns:
      A `BlockMask` [B, N, ceil(T / block_q), ceil(S / block_kv)] with `mask` as its token rule.

    Raises:
      ValueError: not exactly one of `cdfthreshd` and `topk`, or wrong shapes.

    >>> q = jnp.repeat(jnp.eye(2), 4, axis=0)[None, :, None] * 9  # 4 equal tokens, 4 others
    >>> predict(q, q, topk=0.5, block_q=4, block_kv=4).to_blocks()[0, 0]
    Array([[ True, False],
           [False,  True]], dtype=bool)

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.2 and algorithm 1.
    """
    query, key = (jax.lax.stop_gradient(jnp.asarray(x).astype(jnp.float32)) for x in (query, key))
    (_, t, n, h), (_, s, heads, _) = query.shape, key.shape
    rule = Mask() if mask is None else mask
    live_q, live_k = rule.live_queries(t, s), rule.live_keys(t, s)  # [B, N, L] or None
    turn = lambda x: None if x is None else x.swapaxes(1, 2)  # noqa: E731
    if live_k is not None and live_k.shape[1] != 1:
        live_k = live_k.reshape(live_k.shape[0], heads, n // heads, s).any(2)
    live_q, live_k = turn(live_q), turn(live_k)
    repeat = lambda x: jnp.repeat(x, n // heads, axis=2)  # noqa: E731
    wanted = _threshold(simthreshd1)
    clean = lambda x, live: x if live is None else jnp.where(live[..., None], x, 0.0)  # noqa: E731
    query, key = clean(query, live_q), clean(key, live_k)
    q_rows, k_rows = _rows(query, block_q, live_q), _rows(key, block_kv, live_k)
    k_sums, mean = _sums(key, block_kv), 0.0
    if smooth_k:
        mean = k_sums.sum(1, keepdims=True) / jnp.maximum(k_rows.sum(1, keepdims=True), 1.0)
    scale = 1.0 / math.sqrt(h) if scale is None else scale
    if wanted is None:
        q_mean = _sums(query, block_q) / jnp.maximum(q_rows, 1.0)
        k_mean = jnp.where(k_rows > 0, k_sums / jnp.maximum(k_rows, 1.0) - mean, 0.0)
        judged_q = judged_k = None
    else:
        q_mean, q_alike = block_means(query, block_q, live_q)
        k_mean, k_alike = block_means(key - mean, block_kv, live_k)
        limit = _per_head("simthreshd1", wanted, n)[:, None]
        judged_q = q_alike.swapaxes(1, 2) > limit  # [B, N, nq]
        judged_k = (repeat(k_alike).swapaxes(1, 2) > limit)[:, :, None]  # [B, N, 1, nk]
    scores = jnp.einsum("bqnh,bknh->bnqk", q_mean, repeat(k_mean)) * scale
    possible = rule.tile_status(t, s, block_q, block_kv) != EMPTY
    share = {name: None if x is None else _per_head(name, x, n)
             for name, x in (("topk", topk), ("cdfthreshd", cdfthreshd))}  # fmt: skip
    if judged_k is not None:
        possible &= judged_k
    scores = jnp.where(possible, scores, -jnp.inf)
    kept = top_tiles(scores, topk=share["topk"], cdf=share["cdfthreshd"])
    if judged_k is not None:
        kept = kept | ~judged_k | ~judged_q[..., None]
    if attention_sink:
        kept = kept.at[..., 0].set(True)
    return BlockMask.from_blocks(kept, t, s, block_q=block_q, block_kv=block_kv, mask=mask)


def _threshold(simthreshd1):
    """`simthreshd1`, or None where it is known to be below every similarity."""
    known = isinstance(simthreshd1, numbers.Real)
    return None if known and -1 <= simthreshd1 < 0 else simthreshd1


def _per_head(name: str, x, num_heads: int) -> jax.Array:
    """A threshold as float32 [N]."""
    low, high = {"simthreshd1": (-1, 1), "pvthreshd": (0, math.inf)}.get(name, (0, 1))
    if isinstance(x, numbers.Real) and not low <= x <= high:
        raise ValueError(f"{name} must be in [{low}, {high}]; got {x}")
    x = jnp.asarray(x, jnp.float32)
    if x.shape not in ((), (num_heads,)):
        raise ValueError(
            f"{name} must be a number or have shape ({num_heads},), one per head; got {x.shape}"
        )
    return jnp.broadcast_to(x, (num_heads,))


def sparge_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    simthreshd1: float | jax.Array = -0.1,
    cdfthreshd: float | jax.Array | None = None,
    topk: float | jax.Array | None = None,
    pvthreshd: float | jax.Array | None = None,
    attention_sink: bool = False,
    blocks: BlockMask | None = None,
    smooth_k: bool = True,
    block_q: int = BLOCK_Q,
    block_kv: int = BLOCK_KV,
    quant: str | AttentionQuant | None = "sage2_per_block",
    implementation: str | None = None,
    return_sparsity: bool = False,
    **rules,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over the tiles that `predict` keeps, or over given ones.

    Differentiable like `dot_product_attention`; the choice of tiles has no gradient.

    Args:
      query: [B, T, N, H]; float32, bfloat16 or float16.
      key: [B, S, K, H], same dtype, N a multiple of K.
      value: like `key`.
      simthreshd1: as in `predict`.
      cdfthreshd: as in `predict`.
      topk: as in `predict`; with neither of the two and no `blocks` it is 0.5.
      pvthreshd: skip the product with V of a tile whose logits all lie more than this, in powers of
        two, below the running maximum; number or [N], or None for never. The published default, 50,
        never skips anything that counts; about 20 starts to.
      attention_sink: always keep the first tile of keys.
      blocks: tiles to visit instead of a prediction.
      smooth_k: subtract the mean key before predicting and quantising.
      block_q: queries per tile of the prediction, tokens.
      block_kv: keys per tile, tokens.
      quant: "sage2_per_block" (see `sparge_quant`), None for full precision, or another variant.
      implementation: "mosaic" (sm90, without `pvthreshd`), "xla", "reference" or None.
      return_sparsity: also return the share of the work that was left out.
      **rules: `mask`, `scale`, `is_causal`, `segment_ids` and the other rules of
        `dot_product_attention`, but no bias.

    Returns:
      Output of the shape and dtype of `query`; with `return_sparsity` a pair with float32 [B, N]:
      products (with K and with V) left out, over those of dense attention under the same rules.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
      NotImplementedError: the named implementation does not serve this call, or a bias is given.

    >>> x = jnp.ones((1, 256, 2, 16))
    >>> out, sparsity = sparge_attention(x, x, x, topk=0.5, is_causal=True, return_sparsity=True)
    >>> out.shape, sparsity.shape
    ((1, 256, 2, 16), (1, 2))

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, sections 3.2 to 3.4.
    """
    if rules.get("bias") is not None:
        raise NotImplementedError("sparge_attention serves no bias; use dot_product_attention")
    if jnp.ndim(query) != 4:
        raise ValueError(f"query must be [B, T, N, H]; got shape {jnp.shape(query)}")
    if quant == "sage2_per_block":
        sizes = (block_q, block_kv) if blocks is None else (blocks.block_q, blocks.block_kv)
        quant = sparge_quant(*sizes)
    call, spec, _ = api._prepare(query, key, value, quant=quant, **rules)
    if not smooth_k and spec.quant is not None:
        spec = dataclasses.replace(spec, quant=dataclasses.replace(spec.quant, smooth_k=False))
    query, key, value, _, sinks, rule = call
    if isinstance(rule, BlockMask):
        rule = rule.as_mask()
    if blocks is not None:
        if (blocks.q_len, blocks.kv_len) != (spec.q_len, spec.kv_len):
            raise ValueError(
                f"blocks was made for T={blocks.q_len}, S={blocks.kv_len}; query and key have "
                f"T={spec.q_len}, S={spec.kv_len}"
            )
        if cdfthreshd is not None or topk is not None:
            raise ValueError("topk and cdfthreshd choose tiles; give them or blocks, not both")
    elif cdfthreshd is None and topk is None:
        topk = 0.5
    elif cdfthreshd is not None and topk is not None:
        raise ValueError(
            f"exactly one of topk and cdfthreshd must be given; got topk={topk}, "
            f"cdfthreshd={cdfthreshd}"
        )
    tiles = (block_q, block_kv) if blocks is None else (blocks.block_q, blocks.block_kv)
    spec = dataclasses.replace(spec, tiles=tiles, mask_kinds=(*spec.mask_kinds, "tiles"))
    reasons = api._reasons(spec)
    if pvthreshd is not None:
        pvthreshd = _per_head("pvthreshd", pvthreshd, spec.num_heads)
        for name in ("mosaic", "reference"):
            reasons[name] = reasons[name] or f"pvthreshd is not served by {name}; use 'xla'"
    name = _dispatch.resolve("attention", implementation, reasons)
    thresholds = {"simthreshd1": _threshold(simthreshd1), "cdfthreshd": cdfthreshd, "topk": topk}
    thresholds = {n: None if x is None else _per_head(n, x, spec.num_heads)
                  for n, x in thresholds.items()}  # fmt: skip
    out, sparsity = _run(
        query, key, value, sinks, rule, blocks, thresholds, pvthreshd, spec=spec, name=name,
        smooth_k=smooth_k, attention_sink=attention_sink,
    )  # fmt: skip
    return (out, sparsity) if return_sparsity else out


@functools.partial(jax.jit, static_argnames=("spec", "name", "smooth_k", "attention_sink"))
def _run(
    query, key, value, sinks, rule, blocks, thresholds, pvthreshd, *, spec, name, smooth_k,
    attention_sink,
):  # fmt: skip
    block_q, block_kv = spec.tiles
    if blocks is None:
        blocks = predict(
            query, key, rule, **thresholds, scale=spec.scale, smooth_k=smooth_k,
            attention_sink=attention_sink, block_q=block_q, block_kv=block_kv,
        )  # fmt: skip
    else:
        if attention_sink:
            kept = blocks.to_blocks().at[..., 0].set(True)
            blocks = BlockMask.from_blocks(
                kept, *blocks.sizes[:2], block_q=block_q, block_kv=block_kv, mask=blocks.mask
            )
        rule = rule if blocks.mask is None else rule & blocks.mask
        blocks = blocks & rule
    if name == "xla":
        out, _, skipped = sparse.attention(query, key, value, sinks, blocks, spec, pvthreshd)
    else:
        out, _ = api._run(
            query, key, value, None, sinks, blocks, spec=spec, name=name, block_kv=None
        )
        skipped = None
    heads = lambda x: jnp.broadcast_to(x, (spec.batch, spec.num_heads))  # noqa: E731
    dense = rule.tile_status(spec.q_len, spec.kv_len, block_q, block_kv) != EMPTY
    dense = jnp.maximum(heads(dense.sum((2, 3))), 1)
    listed = heads(blocks.kv_num_blocks.sum(-1))
    done = 2 * listed if skipped is None else 2 * listed - skipped
    return out, 1.0 - done / (2 * dense)
