# SPDX-License-Identifier: Apache-2.0
"""Lists of tiles to visit: block-sparse attention skips every tile that is not listed."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks.mask import EMPTY, FULL, PARTIAL, Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """For each row of query tiles, the key tiles to visit, in ascending order.

    Query tile ``i`` visits key tiles ``kv_indices[b, n, i, :kv_num_blocks[b, n, i]]``. Inside a
    visited tile the pair (t, s) is allowed when `mask` allows it; tiles marked in `kv_full` need
    no token rule. A tile that is not listed contributes nothing, and a query whose row lists no
    tile gets zeros. Batch and head dimensions may be 1. ``&`` with another `BlockMask` or a `Mask`
    and ``|`` with another `BlockMask` combine the allowed pairs; `print` shows the tiles.

    Args:
      kv_num_blocks: int32 [B, N, nq], number of tiles listed in each row.
      kv_indices: int32 [B, N, nq, W], listed tiles, ascending; entries past the count are 0.
      kv_full: bool [B, N, nq, W], True where the listed tile needs no token rule.
      mask: token rule inside the tiles, or None when listed tiles are wholly allowed.
      q_len: number of queries T, tokens.
      kv_len: number of keys S, tokens.
      block_q: queries per tile, tokens.
      block_kv: keys per tile, tokens.

    >>> blocks = BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2)
    >>> blocks.kv_num_blocks[0, 0]
    Array([1, 2], dtype=int32)
    """

    kv_num_blocks: jax.Array
    kv_indices: jax.Array
    kv_full: jax.Array
    mask: Mask | None
    q_len: int = dataclasses.field(metadata={"static": True})
    kv_len: int = dataclasses.field(metadata={"static": True})
    block_q: int = dataclasses.field(metadata={"static": True})
    block_kv: int = dataclasses.field(metadata={"static": True})

    @property
    def grid(self) -> tuple[int, int]:
        """Number of query tiles and key tiles, ``(ceil(T / block_q), ceil(S / block_kv))``."""
        return -(-self.q_len // self.block_q), -(-self.kv_len // self.block_kv)

    @classmethod
    def from_mask(
        cls, mask: Mask, q_len: int, kv_len: int, *, block_q: int = 128, block_kv: int = 128
    ) -> BlockMask:
        """Lists the tiles in which a token rule allows anything.

        Args:
          mask: token rule; kept and applied inside partly allowed tiles.
          q_len: number of queries T, tokens.
          kv_len: number of keys S, tokens.
          block_q: queries per tile, tokens.
          block_kv: keys per tile, tokens.

        Returns:
          A `BlockMask` that allows exactly the pairs that `mask` allows.

        Raises:
          ValueError: a length or block size is below 1, or a rule does not fit T and S.

        >>> int(BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2).to_dense().sum())
        10
        """
        _check_sizes(q_len, kv_len, block_q, block_kv)
        status = mask.tile_status(q_len, kv_len, block_q, block_kv)
        return cls._from_status(status, mask, q_len, kv_len, block_q, block_kv)

    @classmethod
    def from_dense(cls, mask: jax.Array, *, block_q: int = 128, block_kv: int = 128) -> BlockMask:
        """Lists the tiles in which a boolean array is True anywhere.

        Args:
          mask: bool [T, S], [N, T, S] or [B, N, T, S]; kept for the partly allowed tiles.
          block_q: queries per tile, tokens.
          block_kv: keys per tile, tokens.

        Returns:
          A `BlockMask` that allows exactly the True pairs.

        Raises:
          ValueError: not boolean, or fewer than two or more than four dimensions.

        >>> BlockMask.from_dense(jnp.eye(4, dtype=bool), block_q=2, block_kv=2).kv_indices[0, 0]
        Array([[0, 0],
               [1, 0]], dtype=int32)
        """
        if jnp.ndim(mask) < 2:
            raise ValueError(f"mask must be [.., T, S]; got shape {jnp.shape(mask)}")
        rule = Mask.from_array(mask)
        return cls.from_mask(rule, *mask.shape[-2:], block_q=block_q, block_kv=block_kv)

    @classmethod
    def from_predicate(
        cls,
        predicate: Callable[..., jax.Array],
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        num_heads: int = 1,
        block_q: int = 128,
        block_kv: int = 128,
    ) -> BlockMask:
        """Lists the tiles in which a function of the positions is True anywhere.

        The function is evaluated on `block_q` queries at a time, then again inside partly allowed
        tiles when attention visits them; no T×S array is made.

        Args:
          predicate: as in `Mask.from_predicate`.
          q_len: number of queries T, tokens.
          kv_len: number of keys S, tokens.
          batch: as in `Mask.from_predicate`.
          num_heads: as in `Mask.from_predicate`.
          block_q: queries per tile, tokens.
          block_kv: keys per tile, tokens.

        Returns:
          A `BlockMask` that allows exactly the pairs for which `predicate` is True.

        Raises:
          ValueError: as `Mask.from_predicate` and `from_mask`.

        >>> near = BlockMask.from_predicate(
        ...     lambda t, s: abs(t - s) < 2, 6, 6, block_q=2, block_kv=2
        ... )
        >>> near.kv_num_blocks[0, 0]
        Array([2, 3, 2], dtype=int32)
        """
        rule = Mask.from_predicate(predicate, batch=batch, num_heads=num_heads)
        return cls.from_mask(rule, q_len, kv_len, block_q=block_q, block_kv=block_kv)

    @classmethod
    def from_scores(
        cls,
        scores: jax.Array,
        q_len: int,
        kv_len: int,
        *,
        block_q: int,
        block_kv: int,
        topk: float | jax.Array | None = None,
        cdf: float | jax.Array | None = None,
        mask: Mask | None = None,
    ) -> BlockMask:
        """Lists in each row the tiles with the highest scores.

        Top-k keeps ``max(1, int(topk * nk))`` tiles. Top-cdf sorts ``softmax(scores)`` from the
        highest down and keeps those whose cumulative sum is at most `cdf`, at least one. Tiles that
        score -inf, or in which `mask` allows nothing, are never kept.

        Args:
          scores: float [nq, nk], [N, nq, nk] or [B, N, nq, nk].
          q_len: number of queries T, tokens.
          kv_len: number of keys S, tokens.
          block_q: queries per tile, tokens.
          block_kv: keys per tile, tokens.
          topk: share of all nk tiles, in [0, 1]; a number or an array [N].
          cdf: share of the probability, in [0, 1]; a number or an array [N].
          mask: token rule applied inside the listed tiles.

        Returns:
          A `BlockMask`.

        Raises:
          ValueError: not exactly one of `topk` and `cdf`, a number outside [0, 1], or wrong shapes.

        >>> scores = jnp.array([[0.0, 3.0, 1.0]])
        >>> BlockMask.from_scores(scores, 2, 6, block_q=2, block_kv=2, topk=0.7).to_blocks()[0, 0]
        Array([[False,  True,  True]], dtype=bool)

        References:
          Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.2.
        """
        scores = jnp.asarray(scores, jnp.float32)
        _check_sizes(q_len, kv_len, block_q, block_kv)
        _check_tiles("scores", scores, q_len, kv_len, block_q, block_kv)
        scores = scores.reshape((1,) * (4 - scores.ndim) + scores.shape)
        if mask is not None:
            empty = mask.tile_status(q_len, kv_len, block_q, block_kv) == EMPTY
            scores = jnp.where(empty, -jnp.inf, scores)
        kept = top_tiles(scores, topk=topk, cdf=cdf)
        return cls.from_blocks(kept, q_len, kv_len, block_q=block_q, block_kv=block_kv, mask=mask)

    @classmethod
    def from_bsr(
        cls,
        indptr: jax.Array,
        indices: jax.Array,
        q_len: int,
        kv_len: int,
        *,
        block_q: int,
        block_kv: int,
        mask: Mask | None = None,
    ) -> BlockMask:
        """Lists tiles given as block-sparse rows (BSR), the form of SciPy and FlashInfer.

        Row i holds the tiles ``indices[indptr[i] : indptr[i + 1]]``.

        Args:
          indptr: int [nq + 1], [N, nq + 1] or [B, N, nq + 1], rising from 0.
          indices: int [nnz], [N, nnz] or [B, N, nnz], from 0 to nk - 1; entries past ``indptr[-1]``
            are not read.
          q_len: number of queries T, tokens.
          kv_len: number of keys S, tokens.
          block_q: queries per tile, tokens.
          block_kv: keys per tile, tokens.
          mask: token rule applied inside the listed tiles.

        Returns:
          A `BlockMask`; tiles may come in any order.

        Raises:
          ValueError: the shapes do not fit, or (outside `jit`) a value is out of range.

        >>> blocks = BlockMask.from_bsr(
        ...     jnp.array([0, 1, 3]), jnp.array([0, 0, 1]), 4, 4, block_q=2, block_kv=2
        ... )
        >>> blocks.kv_num_blocks[0, 0]
        Array([1, 2], dtype=int32)
        """
        _check_sizes(q_len, kv_len, block_q, block_kv)
        indptr, indices = jnp.asarray(indptr), jnp.asarray(indices)
        nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
        if (
            indptr.ndim not in (1, 2, 3)
            or indptr.shape[-1] != nq + 1
            or indices.shape[:-1] != indptr.shape[:-1]
        ):
            raise ValueError(
                f"indptr must be [.., {nq + 1}] and indices [.., nnz] with the same leading axes; "
                f"got shapes {indptr.shape} and {indices.shape}"
            )
        _check_bsr(indptr, indices, nk)

        def fill(indptr, indices):
            entry = jnp.arange(indices.shape[0])
            row = jnp.searchsorted(indptr, entry, side="right") - 1
            row = jnp.where(entry < indptr[-1], row, nq)  # dropped
            return jnp.zeros((nq, nk), bool).at[row, indices].set(True, mode="drop")

        for _ in range(indptr.ndim - 1):
            fill = jax.vmap(fill)
        blocks = fill(indptr, indices)
        return cls.from_blocks(blocks, q_len, kv_len, block_q=block_q, block_kv=block_kv, mask=mask)

    @classmethod
    def from_blocks(
        cls,
        blocks: jax.Array,
        q_len: int,
        kv_len: int,
        *,
        block_q: int,
        block_kv: int,
        mask: Mask | None = None,
    ) -> BlockMask:
        """Lists the tiles marked 1 in a block mask, SpargeAttn's ``[B, N, nq, nk]`` form.

        Args:
          blocks: bool or 0/1 integers [nq, nk], [N, nq, nk] or [B, N, nq, nk].
          q_len: number of queries T, tokens.
          kv_len: number of keys S, tokens.
          block_q: queries per tile, tokens.
          block_kv: keys per tile, tokens.
          mask: token rule applied inside the listed tiles, e.g. ``Mask.causal()``.

        Returns:
          A `BlockMask`.

        Raises:
          ValueError: `blocks` does not have ``ceil(T / block_q) x ceil(S / block_kv)`` tiles.

        >>> blocks = BlockMask.from_blocks(jnp.array([[1, 0], [1, 1]]), 4, 4, block_q=2, block_kv=2)
        >>> int(blocks.to_dense().sum())
        12
        """
        _check_sizes(q_len, kv_len, block_q, block_kv)
        _check_tiles("blocks", blocks, q_len, kv_len, block_q, block_kv)
        kept = jnp.asarray(blocks).astype(bool)
        kept = kept.reshape((1,) * (4 - kept.ndim) + kept.shape)
        rule = Mask() if mask is None else mask
        status = jnp.where(kept, rule.tile_status(q_len, kv_len, block_q, block_kv), EMPTY)
        return cls._from_status(status, mask, q_len, kv_len, block_q, block_kv)

    @classmethod
    def _from_status(cls, status, mask, q_len, kv_len, block_q, block_kv):
        kept = status != EMPTY  # [B, N, nq, nk]
        # A stable sort by "not kept" puts the kept tiles first and leaves them ascending.
        order = jnp.argsort(~kept, axis=-1, stable=True).astype(jnp.int32)
        count = kept.sum(-1, dtype=jnp.int32)
        listed = jnp.arange(kept.shape[-1]) < count[..., None]
        full = jnp.take_along_axis(status == FULL, order, axis=-1)
        return cls(
            count,
            jnp.where(listed, order, 0),
            full & listed,
            mask,
            q_len,
            kv_len,
            block_q,
            block_kv,
        )

    def to_blocks(self) -> jax.Array:
        """The visited tiles as a 0/1 map.

        Returns:
          bool [B, N, nq, nk], True where the tile is visited.

        >>> BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2).to_blocks()[0, 0]
        Array([[ True, False],
               [ True,  True]], dtype=bool)
        """
        listed = jnp.arange(self.kv_indices.shape[-1]) < self.kv_num_blocks[..., None]
        index = jnp.where(listed, self.kv_indices, self.grid[1])[..., None]  # [B, N, nq, W, 1]
        return (index == jnp.arange(self.grid[1])).any(-2)

    def to_status(self) -> jax.Array:
        """What each tile is: not visited, visited under the token rule, or wholly allowed.

        Returns:
          int8 [B, N, nq, nk]: 0 EMPTY, 1 PARTIAL, 2 FULL, as in `Mask.tile_status`.

        >>> BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2).to_status()[0, 0]
        Array([[1, 0],
               [2, 1]], dtype=int8)
        """
        shape = (*self.kv_num_blocks.shape, self.grid[1])
        rows = jnp.arange(self.kv_num_blocks.size)[:, None]
        listed = jnp.arange(self.kv_indices.shape[-1]) < self.kv_num_blocks[..., None]
        index = jnp.where(listed, self.kv_indices, self.grid[1]).reshape(len(rows), -1)
        value = jnp.where(self.kv_full, FULL, PARTIAL).astype(jnp.int8).reshape(index.shape)
        status = jnp.full((len(rows), self.grid[1]), EMPTY, jnp.int8)
        return status.at[rows, index].set(value, mode="drop").reshape(shape)

    def to_bsr(self, size: int | None = None) -> tuple[jax.Array, jax.Array]:
        """The visited tiles as block-sparse rows (BSR).

        Args:
          size: entries of `indices` per batch entry and head, at least the number of visited
            tiles; None takes the largest number, which must be known (not under `jit`).

        Returns:
          indptr int32 [B, N, nq + 1] and indices int32 [B, N, size], zero past ``indptr[.., -1]``.

        Raises:
          ValueError: `size` is None under `jit`, or too small.

        >>> blocks = BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2)
        >>> [x[0, 0].tolist() for x in blocks.to_bsr()]
        [[0, 1, 3], [0, 0, 1]]
        """
        count = self.kv_num_blocks
        known = not isinstance(count, jax.core.Tracer)
        if size is None and not known:
            raise ValueError("to_bsr needs size under jit; nq * nk is always enough")
        needed = int(count.sum(-1).max()) if known else 0
        size = needed if size is None else size
        if size < needed:
            raise ValueError(f"size must be at least {needed}, the tiles listed; got {size}")
        ends = jnp.cumsum(count, -1)
        indptr = jnp.pad(ends, ((0, 0), (0, 0), (1, 0))).astype(jnp.int32)
        width = jnp.arange(self.kv_indices.shape[-1])
        place = jnp.where(width < count[..., None], indptr[..., :-1, None] + width, size)
        b, n = count.shape[:2]
        head = jnp.arange(b * n)[:, None]
        flat = jnp.zeros((b * n, size), jnp.int32)
        flat = flat.at[head, place.reshape(b * n, -1)].set(
            self.kv_indices.reshape(b * n, -1), mode="drop"
        )
        return indptr, flat.reshape(b, n, size)

    def transpose(self) -> BlockMask:
        """For each tile of keys the tiles of queries that visit it: what a backward pass needs.

        Returns:
          A `BlockMask` with the roles of queries and keys exchanged.

        >>> blocks = BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2)
        >>> blocks.transpose().kv_num_blocks[0, 0]
        Array([2, 1], dtype=int32)
        """
        return self._from_status(
            self.to_status().swapaxes(2, 3),
            None if self.mask is None else self.mask.transpose(),
            self.kv_len,
            self.q_len,
            self.block_kv,
            self.block_q,
        )

    def __and__(self, other: BlockMask | Mask) -> BlockMask:
        """The pairs that both allow; a tile is visited when both visit it."""
        if isinstance(other, Mask):
            if other.is_trivial:
                return self
            rule, status = other, other.tile_status(*self.sizes)
        elif isinstance(other, BlockMask):
            self._check_alike(other)
            rule, status = other.mask, other.to_status()
        else:
            return NotImplemented
        if self.mask is not None:
            rule = self.mask if rule is None else self.mask & rule
        return self._from_status(jnp.minimum(self.to_status(), status), rule, *self.sizes)

    def __or__(self, other: BlockMask) -> BlockMask:
        """The pairs that at least one allows; a tile is visited when one visits it."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_alike(other)
        rule = None
        if self.mask is not None or other.mask is not None:
            rule = self.as_mask() | other.as_mask()
        status = jnp.maximum(self.to_status(), other.to_status())
        return self._from_status(status, rule, *self.sizes)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``(q_len, kv_len, block_q, block_kv)``, tokens."""
        return self.q_len, self.kv_len, self.block_q, self.block_kv

    def _check_alike(self, other: BlockMask) -> None:
        if self.sizes != other.sizes:
            raise ValueError(
                "both block masks must have the same (q_len, kv_len, block_q, block_kv); got "
                f"{self.sizes} and {other.sizes}"
            )

    def __str__(self) -> str:
        """The tiles as text; the first batch entry and head, see `show`."""
        count = self.kv_num_blocks
        if isinstance(count, jax.core.Tracer) or not isinstance(count, jax.Array | np.ndarray):
            return repr(self)
        return self.show()

    def show(self, batch: int = 0, head: int = 0, *, width: int = 64) -> str:
        """Draws the tiles of one head as text.

        ``█`` is wholly allowed, ``▒`` follows the token rule, ``·`` is skipped. Where the mask has
        more than `width` tiles to a side, one letter stands for several of them: ``▒`` if they
        differ.

        Args:
          batch: batch entry; any when the mask is shared.
          head: head; any when the mask is shared.
          width: largest number of letters to a side.

        Returns:
          A heading and one line per row of tiles.

        Raises:
          ValueError: `width` is below 1, or there is no such batch entry or head.

        >>> print(BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2).show())
        BlockMask 4 x 4 tokens in 2 x 2 tiles of 2 x 2; 25.0 % skipped
        ▒·
        █▒
        """
        if width < 1:
            raise ValueError(f"width must be at least 1; got {width}")
        status = np.asarray(self.to_status())
        skipped = 100.0 * (status == EMPTY).mean()
        for name, index, count in zip(("batch", "head"), (batch, head), status.shape, strict=False):
            if index < 0 or 1 < count <= index:
                raise ValueError(f"{name} must be 0 to {count - 1}; got {index}")
        status = status[min(batch, status.shape[0] - 1), min(head, status.shape[1] - 1)]
        step = -(-max(status.shape) // width)
        if step > 1:
            pad = [(0, -size % step) for size in status.shape]
            tiles = np.pad(status, pad, mode="edge")
            tiles = tiles.reshape(tiles.shape[0] // step, step, -1, step)
            low, high = tiles.min((1, 3)), tiles.max((1, 3))
            status = np.where(low == high, low, PARTIAL)
        (nq, nk), letters = self.grid, np.array(["·", "▒", "█"])
        head_line = (
            f"BlockMask {self.q_len} x {self.kv_len} tokens in {nq} x {nk} tiles of "
            f"{self.block_q} x {self.block_kv}; {skipped:.1f} % skipped"
        )
        return "\n".join([head_line, *("".join(row) for row in letters[status])])

    def as_mask(self) -> Mask:
        """The same rule as a `Mask`: visited tiles and the token rule inside them.

        Returns:
          A `Mask` whose `dense` equals `to_dense`.
        """
        tiles = Mask(tiles=((self.to_blocks(), self.block_q, self.block_kv),))
        return tiles if self.mask is None else tiles & self.mask

    def to_dense(self) -> jax.Array:
        """The mask as one boolean array, for tests and pictures.

        Returns:
          bool [B, N, T, S], True where the pair is allowed.
        """
        return self.as_mask().dense(self.q_len, self.kv_len)

    def sparsity(self) -> jax.Array:
        """The share of tiles that is skipped.

        Returns:
          float32 [], in [0, 1].

        >>> blocks = BlockMask.from_mask(Mask.causal(), 4, 4, block_q=2, block_kv=2)
        >>> float(blocks.sparsity())
        0.25
        """
        return 1.0 - self.kv_num_blocks.mean() / self.grid[1]


def top_tiles(
    scores: jax.Array,
    *,
    topk: float | jax.Array | None = None,
    cdf: float | jax.Array | None = None,
) -> jax.Array:
    """Marks in each row the tiles with the highest scores, as `BlockMask.from_scores` does.

    Args:
      scores: float32 [B, N, nq, nk], -inf for tiles that cannot be kept.
      topk: share of the nk tiles, a number or [N]; or None.
      cdf: share of the probability, a number or [N]; or None.

    Returns:
      bool [B, N, nq, nk]. Equal scores: the lower index wins.

    Raises:
      ValueError: not exactly one of `topk` and `cdf` is given, it has a wrong shape, or it is a
        number outside [0, 1].

    >>> top_tiles(jnp.zeros((1, 1, 1, 4)), cdf=0.5)[0, 0]
    Array([[ True,  True, False, False]], dtype=bool)
    """
    if (topk is None) == (cdf is None):
        raise ValueError(f"exactly one of topk and cdf must be given; got topk={topk}, cdf={cdf}")
    name, share = ("topk", topk) if cdf is None else ("cdf", cdf)
    if isinstance(share, numbers.Real) and not 0 <= share <= 1:
        raise ValueError(f"{name} must be a share in [0, 1]; got {share}")
    share = jnp.asarray(share, jnp.float32)
    if share.shape not in ((), (scores.shape[1],)):
        raise ValueError(
            f"{name} must be a number or have shape ({scores.shape[1]},), one per head; "
            f"got shape {share.shape}"
        )
    share = share.reshape(-1, 1, 1)  # [N or 1, 1, 1]
    order = jnp.argsort(-scores, axis=-1, stable=True)
    if cdf is None:
        count = jnp.floor(share * scores.shape[-1] + 1e-3).astype(jnp.int32)
    else:
        top = scores.max(-1, keepdims=True)
        weight = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
        total = jnp.maximum(weight.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        mass = jnp.cumsum(jnp.take_along_axis(weight / total, order, axis=-1), axis=-1)
        # A sum of 1 may come out as .9999999 or 1.0000001: a share of 1 keeps everything.
        count = ((mass <= share) | (share >= 1.0)).sum(-1, keepdims=True)
    rank = jnp.argsort(order, axis=-1)  # place of each tile in its row
    return (rank < jnp.maximum(count, 1)) & (scores > -jnp.inf)


def _check_tiles(name, x, q_len, kv_len, block_q, block_kv):
    want = (-(-q_len // block_q), -(-kv_len // block_kv))
    if jnp.ndim(x) not in (2, 3, 4) or tuple(x.shape[-2:]) != want:
        raise ValueError(
            f"{name} must be [.., {want[0]}, {want[1]}] for T={q_len}, S={kv_len} in blocks "
            f"of {block_q} x {block_kv}; got shape {jnp.shape(x)}"
        )


def _check_bsr(indptr: jax.Array, indices: jax.Array, nk: int) -> None:
    """Checks the values of block-sparse rows, where they are known."""
    for name, x in (("indptr", indptr), ("indices", indices)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers; got {x.dtype}")
    if isinstance(indptr, jax.core.Tracer) or isinstance(indices, jax.core.Tracer):
        return
    starts, tiles = np.asarray(indptr), np.asarray(indices)
    size = tiles.shape[-1]
    if starts[..., 0].any() or (np.diff(starts) < 0).any() or (starts[..., -1] > size).any():
        raise ValueError(
            f"indptr must start at 0, never fall and end at most at {size}, the number of indices; "
            f"got {starts.tolist()}"
        )
    read = np.arange(size) < starts[..., -1:]
    if (read & ((tiles < 0) | (tiles >= nk))).any():
        raise ValueError(
            f"indices must be from 0 to {nk - 1}, the tiles of keys; "
            f"got {tiles[read].min()} to {tiles[read].max()}"
        )


def _check_sizes(q_len, kv_len, block_q, block_kv):
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 token; got {size}")
