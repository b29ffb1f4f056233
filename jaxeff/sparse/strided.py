"""Strided attention: the near past and every stride-th tile before it."""

from __future__ import annotations

import jax.numpy as jnp

from jaxeff.sparse.base import check_at_least, lengths
from pallas_kernels import BlockMask, Mask


def strided(
    q_len: int,
    kv_len: int | None = None,
    *,
    local: int = 4,
    stride: int = 8,
    is_causal: bool = True,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Keep tile ``(i, j)`` when ``|d| < local`` or ``d`` is a multiple of ``stride``.

    ``d`` is the distance in key tiles between the query tile's last token and tile ``j``. The paper
    strides over single tokens, which leaves no tile to skip; here the unit is the tile.

    Args:
        q_len: number of queries ``T``, tokens.
        kv_len: number of keys ``S``, tokens; by default ``T``.
        local: near tiles that are kept, the query's own included.
        stride: distance between the far tiles that are kept, in tiles.
        is_causal: only ``s <= t``, token by token.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.

    Returns:
        The pattern, shared by all batch entries and heads.

    Raises:
        ValueError: a size is below 1.

    >>> print(strided(12, local=1, stride=3, block_q=2, block_kv=2).show())
    BlockMask 12 x 12 tokens in 6 x 6 tiles of 2 x 2; 75.0 % skipped
    ▒·····
    ·▒····
    ··▒···
    █··▒··
    ·█··▒·
    ··█··▒

    References: Child et al., Sparse Transformers, arXiv 1904.10509, section 4.2.
    """
    check_at_least(1, local=local, stride=stride, block_q=block_q, block_kv=block_kv)
    q_len, kv_len = lengths(q_len, kv_len)
    i, j = jnp.arange(-(-q_len // block_q))[:, None], jnp.arange(-(-kv_len // block_kv))
    distance = ((i + 1) * block_q - 1) // block_kv - j
    kept = (abs(distance) < local) | (distance % stride == 0)
    mask = Mask.causal() if is_causal else None
    return BlockMask.from_blocks(kept, q_len, kv_len, block_q=block_q, block_kv=block_kv, mask=mask)
