"""A cache whose heads own tiles of a shared pool, so that ragged heads cost what they keep."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.kv_cache.base import Observer, tree_bytes
from jaxeff.kv_cache.dense import (
    DenseLayer,
    check_tokens,
    decode_keys,
    first_mean,
    remember_queries,
)
from jaxeff.kv_cache.storage import decode, encode
from pallas_kernels import decode_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledLayer:
    """Keys and values of one layer in tiles of ``t`` slots, handed out to heads as they grow.

    Slot ``s`` of a head lies in tile ``table[head, s // t]`` at place ``s % t``. A pool serves all
    heads of a row, so a head that keeps little costs little; at most ``t - 1`` slots per head are
    unused. Appending takes fresh tiles from the end of the pool; :meth:`gather` packs it anew.

    Args:
        k: stored keys ``[B, P, t, H]``, an array or a QTensor; ``v`` alike.
        v: stored values.
        tile_positions: int32 ``[B, P, t]``, logical position of each slot, -1 where empty.
        table: int32 ``[B, K, M]``, tiles of each head in order, -1 where none.
        used: int32 ``[B]``, tiles handed out.
        length: int32 ``[B, K]``, live slots.
        frozen: int32 ``[B, K]``, leading slots that no compaction may evict.
        overflow: bool ``[B]``, rows that lost a token.
        queries, query_positions, offset, row_state, observer: as in
            :class:`~jaxeff.kv_cache.dense.DenseLayer`.
        slot_state: arrays ``[B, P, t, ...]``.

    Examples:
        >>> dense = DenseLayer.init(1, 8, 2, 4, dtype=jnp.float32)
        >>> k = jnp.ones((1, 8, 2, 4))
        >>> dense = dense.update(k, k, positions=jnp.arange(8)[None])
        >>> kept = jnp.array([[[0, 1, 2, 3, 4], [7, -1, -1, -1, -1]]])
        >>> layer = TiledLayer.pack(dense, kept, tile=2, num_tiles=4, max_tiles=3)
        >>> layer.length.tolist(), layer.table.tolist()
        ([[5, 1]], [[[0, 1, 2], [3, -1, -1]]])

    References:
        PagedAttention (arXiv 2309.06180), section 4; Ada-KV (arXiv 2407.11550), section 4 (heads of
        different length). A pool belongs to one row and one layer: shard it over the batch.
    """

    k: Any
    v: Any
    tile_positions: jax.Array
    table: jax.Array
    used: jax.Array
    length: jax.Array
    frozen: jax.Array
    overflow: jax.Array
    queries: jax.Array | None = None
    query_positions: jax.Array | None = None
    offset: jax.Array | None = None
    slot_state: Any = None
    row_state: Any = None
    observer: Observer | None = dataclasses.field(default=None, metadata={"static": True})

    evictable: ClassVar[bool] = True

    @classmethod
    def pack(
        cls,
        layer: DenseLayer | TiledLayer,
        indices: jax.Array,
        *,
        tile: int,
        num_tiles: int,
        max_tiles: int,
    ) -> TiledLayer:
        """Return the given slots of a layer in a fresh pool; nothing is decoded.

        Args:
            layer: where to take them from.
            indices: int32 ``[B, K, M]``, slots to keep per row and head, -1 (at the end) for none.
            tile: slots per tile.
            num_tiles: tiles of a row's pool.
            max_tiles: tiles that one head may own.

        Returns:
            A tiled layer; ``overflow`` is set in rows whose entries do not fit.

        Raises:
            ValueError: if a head's indices could not fit into ``max_tiles``.
        """
        batch, _, amount = indices.shape
        if amount > max_tiles * tile:
            raise ValueError(
                f"indices lists {amount} slots per head; max_tiles={max_tiles} of tile={tile} hold "
                f"{max_tiles * tile}"
            )
        indices = jnp.pad(
            indices, ((0, 0), (0, 0), (0, max_tiles * tile - amount)), constant_values=-1
        )
        length = jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32)
        need = -(-length // tile)  # [B, K]
        first = jnp.cumsum(need, axis=1) - need
        table = first[..., None] + jnp.arange(max_tiles)
        table = jnp.where(
            (jnp.arange(max_tiles) < need[..., None]) & (table < num_tiles), table, -1
        )
        total = jnp.sum(need, axis=1)
        # Which (head, tile of the head) owns each tile of the pool.
        rows = jnp.arange(batch)[:, None]
        flat = jnp.where(table < 0, num_tiles, table).reshape(batch, -1)
        owner = jnp.full((batch, num_tiles), -1, jnp.int32)
        owner = owner.at[rows, flat].set(jnp.arange(flat.shape[1], dtype=jnp.int32), mode="drop")
        wanted = jnp.take_along_axis(
            indices.reshape(batch, -1, tile),
            jnp.maximum(owner, 0)[..., None],
            axis=1,
        )  # [B, P, t], slots of the head that owns the tile
        wanted = jnp.where(owner[..., None] >= 0, wanted, -1)
        source = _flat_source(layer, jnp.maximum(owner, 0) // max_tiles, wanted)

        def take(x, fill=0):
            flat_x = x.reshape(batch, -1, *x.shape[3:])
            where = source.reshape(batch, -1, *(1,) * (flat_x.ndim - 2))
            got = jnp.take_along_axis(flat_x, where, axis=1, mode="fill", fill_value=fill)
            return got.reshape(*source.shape, *x.shape[3:])

        stored = layer.tile_positions if isinstance(layer, TiledLayer) else layer.positions
        return cls(
            k=jax.tree.map(take, layer.k),
            v=jax.tree.map(take, layer.v),
            tile_positions=take(stored, -1),
            table=table,
            used=jnp.minimum(total, num_tiles),
            length=length,
            frozen=jnp.minimum(layer.frozen, length),
            overflow=layer.overflow | (total > num_tiles),
            queries=layer.queries,
            query_positions=layer.query_positions,
            offset=layer.offset,
            slot_state=jax.tree.map(take, layer.slot_state),
            row_state=layer.row_state,
            observer=layer.observer,
        )

    @property
    def tile(self) -> int:
        """Slots per tile."""
        return self.tile_positions.shape[2]

    @property
    def num_tiles(self) -> int:
        """Tiles of a row's pool."""
        return self.tile_positions.shape[1]

    @property
    def capacity(self) -> int:
        """Slots that one head can address; the pool holds fewer than that for all heads."""
        return self.table.shape[2] * self.tile

    @property
    def store(self) -> str:
        """Name of the storage."""
        return DenseLayer.store.fget(self)

    @property
    def live(self) -> jax.Array:
        """Which slots hold a token, bool ``[B, K, C]``."""
        return jnp.arange(self.capacity) < self.length[..., None]

    @property
    def positions(self) -> jax.Array:
        """Logical position of each slot, int32 ``[B, K, C]``, -1 where empty."""
        return self._by_head(self.tile_positions, -1)

    def _by_head(self, x: jax.Array, fill: int = 0) -> jax.Array:
        """Read a pool ``[B, P, t, ...]`` head by head, ``[B, K, C, ...]``."""
        batch, heads, tiles = self.table.shape
        index = jnp.where(self.table < 0, self.num_tiles, self.table)
        index = index.reshape(batch, -1, *(1,) * (x.ndim - 2))
        got = jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=fill)
        return got.reshape(batch, heads, tiles * self.tile, *x.shape[3:])

    def slot_states(self) -> Any:
        """Return what the observer remembers of each slot, arrays ``[B, K, C, ...]``."""
        return jax.tree.map(self._by_head, self.slot_state)

    def free(self) -> jax.Array:
        """Return how many more tokens every row can surely take, int32 ``[B]``."""
        heads, tiles = self.table.shape[1:]
        filled = -(-self.length // self.tile)  # [B, K]
        # Every head takes as many; the whole tiles left are shared out evenly.
        spare = jnp.min(filled * self.tile - self.length, axis=1)
        spare = spare + (self.num_tiles - self.used) // heads * self.tile
        return jnp.minimum(spare, tiles * self.tile - jnp.max(self.length, axis=1))

    def update(
        self,
        k: jax.Array,
        v: jax.Array,
        *,
        positions: jax.Array,
        valid: jax.Array | None = None,
        queries: jax.Array | None = None,
    ) -> TiledLayer:
        """Return the layer with ``T`` tokens appended to every head.

        Arguments and errors are those of ``DenseLayer.update``. A token that finds no tile is
        dropped and ``overflow`` is set.
        """
        batch, heads, tiles = self.table.shape
        tile, pool = self.tile, self.num_tiles
        check_tokens(k, v, (batch, heads, self.k.shape[-1]), positions, valid)
        if valid is None:
            valid = jnp.ones(positions.shape, bool)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, T, H]
        offset = first_mean(self.offset, k, valid, self.length)
        ring, ring_positions = remember_queries(self, positions, valid, queries)
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None]
        before = -(-self.length // tile)
        need = -(-(self.length + count) // tile) - before  # [B, K]
        fresh = self.used[:, None] + jnp.cumsum(need, axis=1) - need
        number = jnp.arange(tiles) - before[..., None]  # [B, K, M]
        given = fresh[..., None] + number
        taken = (number >= 0) & (number < need[..., None]) & (given < pool)
        table = jnp.where(taken, given, self.table)

        rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        slots = self.length[..., None] + rank[:, None]  # [B, K, T]
        where = jnp.take_along_axis(table, jnp.minimum(slots // tile, tiles - 1), axis=2)
        fits = valid[:, None] & (where >= 0) & (slots < tiles * tile)
        target = jnp.where(fits, where * tile + slots % tile, pool * tile)
        rows = jnp.arange(batch)[:, None, None]

        def write(x, new):
            flat = x.reshape(batch, pool * tile, *x.shape[3:])
            return flat.at[rows, target].set(new.astype(x.dtype), mode="drop").reshape(x.shape)

        store = self.store.removesuffix("_smooth")
        k = encode(k if offset is None else k - offset, store)
        per_head = jnp.broadcast_to(positions[:, None], slots.shape).astype(jnp.int32)
        layer = dataclasses.replace(
            self,
            k=jax.tree.map(write, self.k, k),
            v=jax.tree.map(write, self.v, encode(v, store)),
            tile_positions=write(self.tile_positions, per_head),
            table=table,
            used=jnp.minimum(self.used + jnp.sum(need, axis=1), pool),
            length=self.length + jnp.sum(fits, axis=2, dtype=jnp.int32),
            overflow=self.overflow | jnp.any(valid[:, None] & ~fits, axis=(1, 2)),
            queries=ring,
            query_positions=ring_positions,
            offset=offset,
        )
        if self.observer is None:
            return layer
        if queries is None:
            raise ValueError("queries is None; the observer of this cache needs them")
        state = layer.slot_states()
        state, row_state = self.observer.observe(
            layer, state, self.row_state, queries, positions, valid
        )
        state = jax.tree.map(layer._to_pool, self.slot_state, state)
        return dataclasses.replace(layer, slot_state=state, row_state=row_state)

    def _to_pool(self, pool: jax.Array, x: jax.Array) -> jax.Array:
        """Write ``[B, K, C, ...]`` back into a pool ``[B, P, t, ...]``."""
        batch = self.table.shape[0]
        index = jnp.where(self.table < 0, self.num_tiles, self.table).reshape(batch, -1)
        tiles = x.reshape(batch, -1, self.tile, *x.shape[3:])
        return pool.at[jnp.arange(batch)[:, None], index].set(tiles, mode="drop")

    def read(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Return keys and values head by head ``[B, C, K, H]``, zeros where no tile is."""
        keys = decode_keys(jax.tree.map(self._by_head, self.k), self.offset, dtype)
        values = decode(jax.tree.map(self._by_head, self.v), dtype)
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)

    def mask(self, positions: jax.Array, window: int | None = None) -> jax.Array:
        """Return which slots each query may see, bool ``[B, K, T, C]``."""
        return DenseLayer.mask(self, positions, window)

    def attend(
        self,
        queries: jax.Array,
        *,
        positions: jax.Array,
        window: int | None = None,
        scale: float | None = None,
    ) -> jax.Array:
        """Return the attention of a few queries; see ``DenseLayer.attend``."""
        out, _ = decode_attention(
            queries,
            self.k,
            self.v,
            self.length,
            positions=self.tile_positions,
            query_positions=positions,
            table=self.table,
            key_offset=self.offset,
            local_window_size=window,
            scale=scale,
        )
        return out

    def gather(self, indices: jax.Array, *, capacity: int | None = None) -> TiledLayer:
        """Return the layer that keeps the given slots, packed into a pool of the same size.

        Args:
            indices: int32 ``[B, K, M]``, slots to keep per row and head, -1 (at the end) for none.
            capacity: slots that a head can address afterwards; ``None``: as before.

        Returns:
            The new layer; ``overflow`` is set in rows whose entries do not fit.
        """
        capacity = self.capacity if capacity is None else capacity
        return TiledLayer.pack(
            self,
            indices,
            tile=self.tile,
            num_tiles=self.num_tiles,
            max_tiles=-(-capacity // self.tile),
        )

    def extend(self, tokens: int) -> TiledLayer:
        """Return the layer with room for ``tokens`` more entries per head."""
        more = -(-tokens // self.tile)
        heads = self.table.shape[1]

        def pad(x, axis, amount, fill=0):
            width = [(0, 0)] * x.ndim
            width[axis] = (0, amount)
            return jnp.pad(x, width, constant_values=fill)

        def grow(x):
            return pad(x, 1, more * heads)

        return dataclasses.replace(
            self,
            k=jax.tree.map(grow, self.k),
            v=jax.tree.map(grow, self.v),
            tile_positions=pad(self.tile_positions, 1, more * heads, -1),
            table=pad(self.table, 2, more, -1),
            slot_state=jax.tree.map(grow, self.slot_state),
        )

    def allocated_bytes(self) -> int:
        """Return the bytes of all arrays of this layer."""
        return tree_bytes(self)


def _flat_source(layer: Any, heads: jax.Array, slots: jax.Array) -> jax.Array:
    """Return where slots ``[B, P, t]`` of heads ``[B, P]`` lie in the flattened leaves of a layer.

    Slots of -1 give an index past the end.
    """
    if not isinstance(layer, TiledLayer):
        flat = heads[..., None] * layer.capacity + slots
        return jnp.where(slots >= 0, flat, layer.positions.shape[1] * layer.capacity)
    batch, _, tiles = layer.table.shape
    number = heads[..., None] * tiles + jnp.maximum(slots, 0) // layer.tile
    where = jnp.take_along_axis(
        layer.table.reshape(batch, -1), number.reshape(batch, -1), axis=1
    ).reshape(slots.shape)
    flat = where * layer.tile + slots % layer.tile
    return jnp.where((slots >= 0) & (where >= 0), flat, layer.num_tiles * layer.tile)
