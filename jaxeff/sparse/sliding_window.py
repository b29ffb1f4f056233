"""Sliding window with attention sinks: the near past and the first tokens."""

from __future__ import annotations

import jax.numpy as jnp

from jaxeff.sparse.base import check_at_least, lengths
from pallas_kernels import BlockMask, Mask


def sliding_window(
    q_len: int,
    kv_len: int | None = None,
    *,
    window: int = 1024,
    sinks: int = 4,
    is_causal: bool = True,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Keep ``|t - s| < window``, and the first ``sinks`` keys for every query.

    Args:
        q_len: number of queries ``T``, tokens.
        kv_len: number of keys ``S``, tokens; by default ``T``.
        window: tokens that a query sees, itself included (to each side if not causal).
        sinks: leading keys that every query sees, tokens; 0 for none.
        is_causal: also ``s <= t``.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.

    Returns:
        The pattern, shared by all batch entries and heads.

    Raises:
        ValueError: a size is out of range.

    >>> print(sliding_window(12, window=2, sinks=2, block_q=2, block_kv=2).show())
    BlockMask 12 x 12 tokens in 6 x 6 tiles of 2 x 2; 58.3 % skipped
    ▒·····
    █▒····
    █▒▒···
    █·▒▒··
    █··▒▒·
    █···▒▒

    References: Xiao et al., StreamingLLM, arXiv 2309.17453, section 3; Beltagy et al., Longformer,
    arXiv 2004.05150, section 3.1.
    """
    check_at_least(1, window=window)
    check_at_least(0, sinks=sinks)
    q_len, kv_len = lengths(q_len, kv_len)
    rule = Mask.window(window - 1, window - 1)
    if sinks:
        rule = rule | Mask.lengths(kv_lengths=jnp.array([sinks]))
    rule = rule & Mask.causal() if is_causal else rule
    return BlockMask.from_mask(rule, q_len, kv_len, block_q=block_q, block_kv=block_kv)
