"""Vertical-slash attention: some keys that everyone sees, and some distances."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxeff.sparse.base import check_at_least, lengths
from jaxeff.typing import Array, ArrayLike
from pallas_kernels import BlockMask, Mask


def vertical_slash(
    q_len: int,
    kv_len: int | None = None,
    *,
    verticals: ArrayLike = (0,),
    slashes: ArrayLike = (0,),
    is_causal: bool = True,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Keep the tiles that hold a pair with ``s`` in ``verticals`` or ``t - s`` in ``slashes``.

    A kept tile is attended to as a whole (under causality), a superset of the lines themselves.

    Args:
        q_len: number of queries ``T``, tokens.
        kv_len: number of keys ``S``, tokens; by default ``T``.
        verticals: int ``[V]`` or ``[N, V]``, keys; entries outside ``[0, S)`` count for nothing.
        slashes: int ``[L]`` or ``[N, L]``, distances ``t - s``; entries outside ``(-S, T)`` count
            for nothing.
        is_causal: only ``s <= t``, token by token.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.

    Returns:
        The pattern ``[1, N or 1, nq, nk]``; works on traced arrays.

    Raises:
        ValueError: the arrays are not integers of one or two axes.

    >>> lines = {"verticals": (0,), "slashes": (0, 5)}
    >>> print(vertical_slash(12, **lines, block_q=2, block_kv=2).show())
    BlockMask 12 x 12 tokens in 6 x 6 tiles of 2 x 2; 55.6 % skipped
    ▒·····
    █▒····
    █·▒···
    ██·▒··
    ███·▒·
    █·██·▒

    References: Jiang et al., MInference, arXiv 2407.02490, section 3.
    """
    check_at_least(1, block_q=block_q, block_kv=block_kv)
    q_len, kv_len = lengths(q_len, kv_len)
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    verticals = _lines("verticals", verticals)
    slashes = _lines("slashes", slashes)
    column = _marks(verticals, kv_len)  # [N, S]
    column = jnp.pad(column, ((0, 0), (0, -kv_len % block_kv))).reshape(-1, nk, block_kv).any(-1)
    # Distances seen so far, so that one difference tells whether a tile's range holds any.
    present = _marks(slashes + kv_len, q_len + kv_len)  # entry d + S
    seen = jnp.pad(jnp.cumsum(present, -1), ((0, 0), (1, 0)))
    i, j = jnp.arange(nq)[:, None], jnp.arange(nk)
    low = i * block_q - jnp.minimum((j + 1) * block_kv, kv_len) + 1 + kv_len
    high = jnp.minimum((i + 1) * block_q, q_len) - 1 - j * block_kv + kv_len
    diagonal = seen[:, high + 1] > seen[:, low]  # [N, nq, nk]
    return BlockMask.from_blocks(
        column[:, None] | diagonal, q_len, kv_len, block_q=block_q, block_kv=block_kv,
        mask=Mask.causal() if is_causal else None,
    )  # fmt: skip


def estimate_lines(
    query: Array, key: Array, *, verticals: int = 64, slashes: int = 64, last: int = 64
) -> tuple[Array, Array]:
    """Find the lines that carry most of the causal attention of the last queries.

    Args:
        query: float ``[B, T, N, H]``; the batch is averaged over.
        key: float ``[B, S, K, H]``; the last query sits on the last key.
        verticals: keys to return per head, at most ``S``.
        slashes: distances to return per head, at most ``S``.
        last: queries that are looked at, tokens.

    Returns:
        int32 ``[N, verticals]`` and ``[N, slashes]``, for :func:`vertical_slash` with ``T == S``.

    Raises:
        ValueError: a number is out of range.

    >>> x = jnp.ones((1, 8, 2, 4))
    >>> [y.shape for y in estimate_lines(x, x, verticals=2, slashes=3, last=4)]
    [(2, 2), (2, 3)]

    References: Jiang et al., MInference, arXiv 2407.02490, algorithm 2.
    """
    S, last = key.shape[1], min(last, query.shape[1])
    check_at_least(1, verticals=verticals, slashes=slashes, last=last)
    if max(verticals, slashes) > S:
        raise ValueError(f"verticals {verticals} and slashes {slashes} must be at most S = {S}")
    q, k = query[:, -last:].astype(jnp.float32), key.astype(jnp.float32)
    k = jnp.repeat(k, query.shape[2] // key.shape[2], axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * query.shape[-1] ** -0.5
    distance = S - last + jnp.arange(last)[:, None] - jnp.arange(S)  # [last, S]
    weight = jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf), axis=-1).mean(0)
    along = jnp.zeros((weight.shape[0], S)).at[:, jnp.maximum(distance, 0)].add(weight)
    best = lambda x, number: jax.lax.top_k(x, number)[1].astype(jnp.int32)  # noqa: E731
    return best(weight.sum(1), verticals), best(along, slashes)


def _lines(name: str, x: ArrayLike) -> Array:
    """Line positions as ``[N, number]``."""
    x = jnp.asarray(x)
    if x.ndim not in (1, 2) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [V] or [N, V]; got {x.dtype} {x.shape}")
    return x.reshape(-1, x.shape[-1])


def _marks(x: Array, length: int) -> Array:
    """bool ``[N, length]``, True at the positions listed in ``[N, number]``."""
    x = jnp.where((x >= 0) & (x < length), x, length)
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros((x.shape[0], length), bool).at[rows, x].set(True, mode="drop")
