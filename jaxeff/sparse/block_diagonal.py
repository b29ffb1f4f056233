"""Block-diagonal attention: chunks of the sequence that do not see each other."""

from __future__ import annotations

import jax.numpy as jnp

from jaxeff.sparse.base import check_at_least, lengths
from pallas_kernels import BlockMask, Mask


def block_diagonal(
    q_len: int,
    kv_len: int | None = None,
    *,
    size: int = 512,
    is_causal: bool = True,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Keep ``t // size == s // size``.

    Args:
        q_len: number of queries ``T``, tokens.
        kv_len: number of keys ``S``, tokens; by default ``T``.
        size: length of a chunk, tokens; need not be a multiple of the tile.
        is_causal: also ``s <= t``.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.

    Returns:
        The pattern, shared by all batch entries and heads.

    Raises:
        ValueError: a size is below 1.

    >>> print(block_diagonal(8, size=4, block_q=2, block_kv=2).show())
    BlockMask 8 x 8 tokens in 4 x 4 tiles of 2 x 2; 62.5 % skipped
    ▒···
    █▒··
    ··▒·
    ··█▒

    References: Qiu et al., Blockwise Self-Attention, arXiv 1911.02972, section 3.
    """
    check_at_least(1, size=size)
    q_len, kv_len = lengths(q_len, kv_len)
    chunk = lambda length: jnp.arange(length, dtype=jnp.int32)[None] // size  # noqa: E731
    rule = Mask.segment_ids(chunk(q_len), chunk(kv_len))
    rule = rule & Mask.causal() if is_causal else rule
    return BlockMask.from_mask(rule, q_len, kv_len, block_q=block_q, block_kv=block_kv)
