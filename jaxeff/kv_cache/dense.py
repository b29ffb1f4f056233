"""A cache with one static capacity per layer, in any storage format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.kv_cache.base import KVCache, Observer, tree_bytes
from jaxeff.kv_cache.storage import check_head_dim, decode, encode, float_dtype, store_name
from pallas_kernels import append_to_cache, decode_attention, move_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """Keys and values of one layer in ``C`` slots per row and KV head.

    Slots ``0 … length-1`` are live. Every head has its own ``length`` and ``positions``, so heads
    may keep different tokens. A token that finds no free slot is dropped and ``overflow`` is set:
    nothing already stored is ever overwritten.

    Args:
        k: stored keys after RoPE ``[B, K, C, H]``; a float array, or a QTensor with one scale per
            token and head.
        v: stored values, as ``k``.
        positions: int32 ``[B, K, C]``, logical position of each slot, -1 where empty.
        length: int32 ``[B, K]``, live slots, in tokens.
        frozen: int32 ``[B, K]``, leading slots that no compaction may evict.
        overflow: bool ``[B]``, rows that lost a token.
        queries: the last ``A`` queries after RoPE ``[B, N, A, H]``, a ring written at
            ``position % A``; ``None`` if no method needs it.
        query_positions: int32 ``[B, A]``, position of each ring entry, -1 where empty.
        offset: f32 ``[B, K, 1, H]``, what was subtracted from the keys before they were quantised
            (their mean over the first update); ``None``: nothing.
        slot_state: what an observer remembers of each slot, arrays ``[B, K, C, ...]``.
        row_state: what an observer remembers of each row, arrays ``[B, ...]``.
        observer: a static :class:`~jaxeff.kv_cache.base.Observer`, or ``None``.

    Examples:
        >>> layer = DenseLayer.init(1, 2, 1, 4, dtype=jnp.float32)
        >>> k = jnp.ones((1, 3, 1, 4))
        >>> layer = layer.update(k, k, positions=jnp.arange(3)[None])
        >>> layer.length.tolist(), layer.overflow.tolist()
        ([[2]], [True])

    References:
        R-KV (arXiv 2505.24133), section 3.1 (retained and staging slots, query window).
    """

    k: Any
    v: Any
    positions: jax.Array
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
    def init(
        cls,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: Any = jnp.bfloat16,
        query_window: int = 0,
        num_heads: int | None = None,
        observer: Observer | None = None,
    ) -> DenseLayer:
        """Return an empty layer; the arguments are those of :meth:`DenseCache.init`."""
        _check_sizes(batch, capacity, num_kv_heads, head_dim, query_window, num_heads)
        store = store_name(dtype)
        check_head_dim(store, head_dim)
        if observer is not None and num_heads is None:
            raise ValueError("num_heads is None; a cache with an observer needs it (query heads)")
        heads = (batch, num_kv_heads)
        empty = encode(jnp.zeros((*heads, capacity, head_dim), float_dtype(store)), store)
        ring = positions = None
        if query_window:
            shape = (batch, num_heads, query_window, head_dim)
            ring = jnp.zeros(shape, float_dtype(store))
            positions = jnp.full((batch, query_window), -1, jnp.int32)
        offset = None
        if store.endswith("_smooth"):
            offset = jnp.zeros((*heads, 1, head_dim), jnp.float32)
        slot_state = row_state = None
        if observer is not None:
            slot_state, row_state = observer.init(
                batch, capacity, num_heads, num_kv_heads, head_dim
            )
        return cls(
            # Zero scales as well, so that empty slots decode to zeros. Two separate copies: a
            # donated cache must not hold one buffer twice.
            k=jax.tree.map(jnp.zeros_like, empty),
            v=jax.tree.map(jnp.zeros_like, empty),
            positions=jnp.full((*heads, capacity), -1, jnp.int32),
            length=jnp.zeros(heads, jnp.int32),
            frozen=jnp.zeros(heads, jnp.int32),
            overflow=jnp.zeros(batch, bool),
            queries=ring,
            query_positions=positions,
            offset=offset,
            slot_state=slot_state,
            row_state=row_state,
            observer=observer,
        )

    @property
    def capacity(self) -> int:
        """Slots per row and head, in tokens."""
        return self.positions.shape[2]

    @property
    def store(self) -> str:
        """Name of the storage: a float dtype or a quantised format."""
        if isinstance(self.k, jax.Array):
            return self.k.dtype.name
        return self.k.qtype if self.offset is None else f"{self.k.qtype}_smooth"

    @property
    def live(self) -> jax.Array:
        """Which slots hold a token, bool ``[B, K, C]``."""
        return jnp.arange(self.capacity) < self.length[..., None]

    def slot_states(self) -> Any:
        """Return what the observer remembers of each slot, arrays ``[B, K, C, ...]``."""
        return self.slot_state

    def free(self) -> jax.Array:
        """Return how many more tokens every row can take, int32 ``[B]``."""
        return self.capacity - jnp.max(self.length, axis=1)

    def update(
        self,
        k: jax.Array,
        v: jax.Array,
        *,
        positions: jax.Array,
        valid: jax.Array | None = None,
        queries: jax.Array | None = None,
    ) -> DenseLayer:
        """Return the layer with ``T`` tokens appended to every head.

        Args:
            k: keys after RoPE ``[B, T, K, H]``, float.
            v: values ``[B, T, K, H]``, float.
            positions: int32 ``[B, T]``, logical positions, increasing along each row.
            valid: bool ``[B, T]``; tokens marked False are not stored. ``None``: all are real.
            queries: queries after RoPE ``[B, T, N, H]``; needed if the layer has a query ring.

        Returns:
            The new layer. Tokens beyond the capacity are dropped and ``overflow`` is set.

        Raises:
            ValueError: if a shape does not fit the cache, or the ring is there but no queries.
        """
        batch, kv_heads, capacity = self.positions.shape
        check_tokens(k, v, (batch, kv_heads, self.k.shape[-1]), positions, valid)
        if valid is None:
            valid = jnp.ones(positions.shape, bool)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, T, H]
        offset = first_mean(self.offset, k, valid, self.length)
        rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1  # [B, T]
        slots = self.length[..., None] + rank[:, None]  # [B, K, T]
        lost = valid[:, None] & (slots >= capacity)
        # Slot `capacity` is out of range, and the scatter drops it.
        slots = jnp.where(valid[:, None], slots, capacity)
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None]  # [B, 1]
        ring, ring_positions = remember_queries(self, positions, valid, queries)
        stored_k, stored_v, stored_positions = append_to_cache(
            self.k, self.v, self.positions, k, v, positions, slots, key_offset=offset
        )
        layer = dataclasses.replace(
            self,
            k=stored_k,
            v=stored_v,
            positions=stored_positions,
            length=jnp.minimum(self.length + count, capacity),
            overflow=self.overflow | jnp.any(lost, axis=(1, 2)),
            queries=ring,
            query_positions=ring_positions,
            offset=offset,
        )
        if self.observer is None:
            return layer
        if queries is None:
            raise ValueError("queries is None; the observer of this cache needs them")
        slot_state, row_state = self.observer.observe(
            layer, self.slot_state, self.row_state, queries, positions, valid
        )
        return dataclasses.replace(layer, slot_state=slot_state, row_state=row_state)

    def read(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Return keys and values ``[B, C, K, H]`` as attention sees them.

        Args:
            dtype: float dtype of the result; ``None``: the stored one (f32 if quantised).

        Returns:
            Two arrays. Slots beyond ``length`` are meant to be hidden with :meth:`mask`.
        """
        keys, values = decode_keys(self.k, self.offset, dtype), decode(self.v, dtype)
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)

    def mask(self, positions: jax.Array, window: int | None = None) -> jax.Array:
        """Return which slots each query may see.

        A slot is visible if it is live, its position is at most the query's, and, with a window,
        ``query position - slot position < window``.

        Args:
            positions: int32 ``[B, T]``, logical positions of the queries.
            window: tokens in a sliding window, the query's own included; ``None``: no window.

        Returns:
            bool ``[B, K, T, C]``.
        """
        slots = self.positions[:, :, None, :]  # [B, K, 1, C]
        query = positions[:, None, :, None]  # [B, 1, T, 1]
        visible = (slots >= 0) & (slots <= query)
        return visible if window is None else visible & (query - slots < window)

    def attend(
        self,
        queries: jax.Array,
        *,
        positions: jax.Array,
        window: int | None = None,
        scale: float | None = None,
    ) -> jax.Array:
        """Return the attention of a few queries, reading the entries as they are stored.

        The same as attention over :meth:`read` with :meth:`mask`, without a decoded copy.

        Args:
            queries: float ``[B, T, N, H]`` after RoPE.
            positions: int32 ``[B, T]``, their logical positions.
            window: tokens in a sliding window, the query's own included; ``None``: no window.
            scale: softmax scale; ``None``: ``H ** -0.5``.

        Returns:
            ``[B, T, N, H]`` in the dtype of the queries.
        """
        out, _ = decode_attention(
            queries,
            self.k,
            self.v,
            self.length if self.evictable else None,  # a ring may hold its tokens anywhere
            positions=self.positions,
            query_positions=positions,
            key_offset=self.offset,
            local_window_size=window,
            scale=scale,
        )
        return out

    def gather(self, indices: jax.Array, *, capacity: int | None = None) -> DenseLayer:
        """Return the layer that keeps the given slots, in the given order.

        Payload, scales and positions are copied, never recomputed: quantised entries stay
        bit-identical.

        Args:
            indices: int32 ``[B, K, M]``, slots to keep per row and head; entries that are -1 stand
                for nothing and must come last.
            capacity: slots of the new layer, in tokens, at least ``M``; ``None``: ``M``.

        Returns:
            A layer of the new capacity with ``length = (indices >= 0).sum(-1)``.

        Raises:
            ValueError: if the capacity cannot hold the indices, or their shape does not fit.
        """
        amount = indices.shape[-1]
        capacity = amount if capacity is None else capacity
        if indices.shape[:2] != self.positions.shape[:2]:
            raise ValueError(
                f"indices has shape {indices.shape}; expected {self.positions.shape[:2]} + [M]"
            )
        if capacity < amount:
            raise ValueError(f"capacity={capacity} cannot hold {amount} indices per head")
        padding = ((0, 0), (0, 0), (0, capacity - amount))
        indices = jnp.pad(indices, padding, constant_values=-1)
        length = jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32)
        moved = {"k": self.k, "v": self.v, "positions": self.positions}
        moved["slot_state"] = self.slot_state
        fill = jax.tree.map(lambda _: 0, moved) | {"positions": -1}
        moved = move_slots(moved, indices, fill=fill)
        return dataclasses.replace(
            self, **moved, length=length, frozen=jnp.minimum(self.frozen, length)
        )

    def resize(self, capacity: int) -> DenseLayer:
        """Return the same entries in ``capacity`` slots; slots beyond it are dropped."""
        slots = jnp.arange(min(capacity, self.capacity))
        indices = jnp.where(slots < self.length[..., None], slots, -1)
        return self.gather(indices, capacity=capacity)

    def extend(self, tokens: int) -> DenseLayer:
        """Return the layer with room for ``tokens`` more entries per head."""
        return self.resize(self.capacity + tokens)

    def allocated_bytes(self) -> int:
        """Return the bytes of all arrays of this layer."""
        return tree_bytes(self)


class DenseCache:
    """Makers of caches whose layers are :class:`DenseLayer`.

    Examples:
        >>> cache = DenseCache.init(2, 1, 128, 2, 32)
        >>> small = DenseCache.init(2, 1, 128, 2, 32, dtype="int8")
        >>> small.allocated_bytes() < 0.62 * cache.allocated_bytes()
        True

    References:
        R-KV (arXiv 2505.24133), appendix C.1.
    """

    @staticmethod
    def init(
        num_layers: int,
        batch: int,
        capacity: int | Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: Any = jnp.bfloat16,
        query_window: int = 0,
        num_heads: int | None = None,
        observer: Observer | None = None,
        windows: Sequence[int | None] = (),
    ) -> KVCache:
        """Return an empty cache.

        Bytes: ``L * B * K * C * (2 * H * itemsize + 4)`` plus, as INT8, 8 bytes of scales per
        slot, plus ``L * B * N * A * H * itemsize`` for the query window.

        Args:
            num_layers: layers ``L``.
            batch: rows ``B``.
            capacity: slots per head, in tokens; one number, or one per layer.
            num_kv_heads: KV heads ``K``.
            head_dim: ``H``.
            dtype: ``float32``, ``bfloat16``, ``float16``, or a quantised format, applied to every
                token and head after RoPE: ``"int8"``, ``"int8_smooth"`` (keys minus their mean over
                the first update), ``"fp8_e4m3"`` (one f32 scale each), ``"int4"`` (packed,
                asymmetric, at most 128 values a scale), ``"nvfp4"`` (packed, an e4m3 scale per 16).
            query_window: queries ``A`` remembered per layer (R-KV scores with them); 0: none.
            num_heads: query heads ``N``; needed for a query window or an observer.
            observer: what looks at the queries of every call (see
                :class:`~jaxeff.kv_cache.base.Observer`); ``None``: nothing.
            windows: per layer the tokens that a query sees, itself included, or ``None`` for all.
                A layer with a window gets a :class:`~jaxeff.kv_cache.ring.RingLayer` of no more
                slots than the window; neither query window nor observer apply to it.

        Returns:
            A cache with ``seen = 0`` everywhere.

        Raises:
            ValueError: if a size is not positive, head counts do not divide, or the dtype is not
                a storage format.
        """
        from jaxeff.kv_cache.ring import RingLayer  # a subclass of DenseLayer, so not earlier

        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}; expected at least 1")
        one = isinstance(capacity, int | np.integer)
        capacities = [int(capacity)] * num_layers if one else list(capacity)
        if len(capacities) != num_layers:
            raise ValueError(f"capacity lists {len(capacities)} layers; num_layers={num_layers}")
        windows = list(windows) or [None] * num_layers
        if len(windows) != num_layers:
            raise ValueError(f"windows lists {len(windows)} layers; num_layers={num_layers}")
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"windows={windows}; expected 1 or more tokens, or None, per layer")
        layers = tuple(
            DenseLayer.init(
                batch,
                slots,
                num_kv_heads,
                head_dim,
                dtype=dtype,
                query_window=query_window,
                num_heads=num_heads,
                observer=observer,
            )
            if window is None
            else RingLayer.init_window(
                batch, window, num_kv_heads, head_dim, limit=slots, dtype=dtype
            )
            for slots, window in zip(capacities, windows, strict=True)
        )
        return KVCache(layers=layers, seen=jnp.zeros(batch, jnp.int32))

    @staticmethod
    def init_for(model: Any, batch: int, capacity: int | Sequence[int], **options: Any) -> KVCache:
        """Return an empty cache with the sizes and the sliding windows of a model.

        Args:
            model: a model with ``.config``, or a config with ``num_layers, num_kv_heads, head_dim,
                num_heads``.
            batch: rows.
            capacity: slots per head, in tokens; one number, or one per layer.
            **options: further arguments of :meth:`init`; ``windows=()`` gives windowed layers
                full caches.

        Returns:
            The empty cache.
        """
        config = getattr(model, "config", model)
        options = {"windows": getattr(config, "layer_windows", ()), **options}
        return DenseCache.init(
            config.num_layers,
            batch,
            capacity,
            config.num_kv_heads,
            config.head_dim,
            num_heads=config.num_heads,
            **options,
        )


def remember_queries(
    layer: Any, positions: jax.Array, valid: jax.Array, queries: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return a layer's query ring with the last ``A`` valid queries at ``position % A``."""
    if layer.queries is None:
        return None, None
    if queries is None:
        raise ValueError("queries is None; this cache keeps a query window and needs them")
    batch, num_heads, window, head_dim = layer.queries.shape
    expected = (batch, positions.shape[1], num_heads, head_dim)
    if queries.shape != expected:
        raise ValueError(
            f"queries has shape {queries.shape}; the cache expects {expected} ([B, T, N, H])"
        )
    after = jnp.sum(valid, axis=1, keepdims=True) - jnp.cumsum(valid, axis=1)  # [B, T]
    slots = jnp.where(valid & (after < window), positions % window, window)  # [B, T]
    rows = jnp.arange(batch)[:, None]
    per_head = jnp.broadcast_to(slots[:, None], (batch, num_heads, slots.shape[1]))
    ring = scatter(layer.queries, per_head, jnp.swapaxes(queries, 1, 2))
    ring_positions = layer.query_positions.at[rows, slots].set(
        positions.astype(jnp.int32), mode="drop"
    )
    return ring, ring_positions


def check_tokens(
    k: jax.Array,
    v: jax.Array,
    sizes: tuple[int, int, int],
    positions: jax.Array,
    valid: jax.Array | None,
) -> None:
    """Say which array of an update does not fit a cache of ``sizes`` ``(B, K, H)``."""
    batch, heads, head_dim = sizes
    for name, x, kind in (("positions", positions, jnp.integer), ("valid", valid, jnp.bool_)):
        if x is None:
            continue
        shape, tokens = jnp.shape(x), jnp.shape(positions)[-1:]
        if shape not in ((batch, *tokens), (1, *tokens)) or not jnp.issubdtype(x.dtype, kind):
            raise ValueError(
                f"{name} has shape {shape} and dtype {x.dtype}; expected [B, T] with B={batch} and "
                f"T of k, {'whole numbers' if name == 'positions' else 'bool'}"
            )
    expected = (batch, positions.shape[1], heads, head_dim)
    for name, value in (("k", k), ("v", v)):
        if value.shape != expected:
            raise ValueError(
                f"{name} has shape {value.shape}; the cache expects {expected} ([B, T, K, H])"
            )


def first_mean(
    offset: jax.Array | None, k: jax.Array, valid: jax.Array, length: jax.Array
) -> jax.Array | None:
    """Return the offset of smoothed keys: the mean of the first tokens, then never changed.

    The same vector is taken from every key of a head, so a softmax over them does not see it.
    """
    if offset is None:
        return None
    real = valid[:, None, :, None]
    count = jnp.maximum(jnp.sum(real, axis=2, keepdims=True), 1)
    mean = jnp.sum(jnp.where(real, k.astype(jnp.float32), 0.0), axis=2, keepdims=True) / count
    empty = jnp.max(length, axis=1) == 0  # [B]
    return jnp.where(empty[:, None, None, None], mean, offset)


def decode_keys(k: Any, offset: jax.Array | None, dtype: Any) -> jax.Array:
    """Return stored keys with their offset added back."""
    if offset is None:
        return decode(k, dtype)
    return (decode(k, jnp.float32) + offset).astype(jnp.float32 if dtype is None else dtype)


def scatter(store: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Write ``new [B, K, T, ...]`` at ``slots [B, K, T]`` of ``store [B, K, C, ...]``."""
    rows = jnp.arange(slots.shape[0])[:, None, None]
    heads = jnp.arange(slots.shape[1])[None, :, None]
    return store.at[rows, heads, slots].set(new.astype(store.dtype), mode="drop")


def _check_sizes(batch, capacity, num_kv_heads, head_dim, query_window, num_heads):
    sizes = {
        "batch": batch,
        "capacity": capacity,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    if query_window < 0:
        raise ValueError(f"query_window={query_window}; expected 0 or more queries")
    if query_window and num_heads is None:
        raise ValueError(f"query_window={query_window} needs num_heads (query heads)")
    if num_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
