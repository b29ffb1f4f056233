# SPDX-License-Identifier: Apache-2.0
"""Lists of tiles to visit: block-sparse attention skips every tile that is not listed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.masks.mask import EMPTY, FULL, Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """For each row of query tiles, the key tiles to visit, in ascending order.

    Query tile ``i`` visits key tiles ``kv_indices[b, n, i, :kv_num_blocks[b, n, i]]``. Inside a
    visited tile the pair (t, s) is allowed when `mask` allows it; tiles marked in `kv_full` need
    no token rule. A tile that is not listed contributes nothing, and a query whose row lists no
    tile gets zeros. Batch and head dimensions may be 1.

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
        want = (-(-q_len // block_q), -(-kv_len // block_kv))
        if jnp.ndim(blocks) not in (2, 3, 4) or tuple(blocks.shape[-2:]) != want:
            raise ValueError(
                f"blocks must be [.., {want[0]}, {want[1]}] for T={q_len}, S={kv_len} in blocks "
                f"of {block_q} x {block_kv}; got shape {jnp.shape(blocks)}"
            )
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


def _check_sizes(q_len, kv_len, block_q, block_kv):
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 token; got {size}")
