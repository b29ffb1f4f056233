"""BigBird: a window, global tiles and random tiles."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxeff.sparse.base import check_at_least, lengths
from pallas_kernels import BlockMask, Mask


def bigbird(
    q_len: int,
    kv_len: int | None = None,
    *,
    window: int = 3,
    global_tiles: int = 2,
    random_tiles: int = 3,
    num_heads: int = 1,
    seed: int = 0,
    is_causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Keep near tiles, the first tiles in both directions, and some tiles at random in each row.

    Tile ``(i, j)`` is kept when ``|d| <= window // 2`` with ``d`` the distance in key tiles, when
    ``i`` or ``j`` is below ``global_tiles``, or when it is one of ``random_tiles`` drawn for row
    ``i`` among the other tiles that it may see.

    Args:
        q_len: number of queries ``T``, tokens.
        kv_len: number of keys ``S``, tokens; by default ``T``.
        window: near tiles, odd.
        global_tiles: leading tiles that see, and are seen by, everything.
        random_tiles: tiles drawn for each row, without replacement.
        num_heads: heads that draw on their own; 1 shares one draw.
        seed: seed of the draw.
        is_causal: only ``s <= t``, token by token; the paper's encoder is not causal.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.

    Returns:
        The pattern ``[1, num_heads, nq, nk]``.

    Raises:
        ValueError: a size is out of range.

    >>> mask = bigbird(64, window=1, global_tiles=1, random_tiles=1, block_q=8, block_kv=8)
    >>> mask.kv_num_blocks[0, 0]
    Array([8, 3, 3, 3, 3, 3, 3, 3], dtype=int32)

    References: Zaheer et al., BigBird, arXiv 2007.14062, section 2.
    """
    check_at_least(1, window=window, num_heads=num_heads, block_q=block_q, block_kv=block_kv)
    check_at_least(0, global_tiles=global_tiles, random_tiles=random_tiles)
    q_len, kv_len = lengths(q_len, kv_len)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    i, j = np.arange(nq)[:, None], np.arange(nk)
    own = (i * block_q) // block_kv
    kept = (abs(own - j) <= window // 2) | (j < global_tiles) | (i < global_tiles)
    # The largest of independent draws are a sample without replacement.
    draw = np.random.default_rng(seed).random((num_heads, nq, nk))
    draw[:, kept | (is_causal & (j > ((i + 1) * block_q - 1) // block_kv))] = -1.0
    rank = np.argsort(np.argsort(-draw, axis=-1), axis=-1)
    kept = kept | ((rank < random_tiles) & (draw >= 0))
    mask = Mask.causal() if is_causal else None
    return BlockMask.from_blocks(
        jnp.asarray(kept), q_len, kv_len, block_q=block_q, block_kv=block_kv, mask=mask
    )
