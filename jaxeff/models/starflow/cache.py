"""Caches of one block's keys and values while it is inverted: dense, quantised, window, R-KV.

A layer cache has jaxeff's protocol (``update``, ``read``, ``mask``; see ``jaxeff.kv_cache``), so
``jaxeff.kv_cache`` caches serve as well. The caches here differ in two ways that a flow allows:
every row of the batch is at the same token, so that one position vector serves all rows and heads,
and quantised keys are stored before rotation, where a channel keeps its range from token to token.
All are pytrees: rewinding after a Jacobi sweep is writing the same slots again.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.compress import rkv
from jaxeff.models.starflow.config import TARFlowConfig
from jaxeff.typing import Array, DTypeLike
from pallas_kernels import quantize

__all__ = ["CacheSpec", "EvictingLayer", "TokenLayer", "cache_bytes"]

_FLOATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# One scale for every token and head: known when the token arrives, unlike a scale per channel.
_QUANTIZED = {"int8": "int8", "int4": "int4", "fp8": "fp8_e4m3"}
_STORAGE = (*_FLOATS, *_QUANTIZED)
_ALIGNMENT = 8  # slots


@dataclass(frozen=True)
class CacheSpec:
    """What a block keeps of the tokens that it has already produced.

    Attributes:
      storage: ``float32``, ``bfloat16``, ``float16``, ``int8``, ``int4`` or ``fp8`` (E4M3); the
        last three with one float32 scale per token and head.
      window: image tokens kept including the current one; None keeps all. The prefix stays.
      budget: image tokens kept per head by R-KV eviction; None evicts nothing.
      buffer: tokens written between two evictions.
      observation: last queries whose attention scores importance.
      mix: weight of importance against non-redundancy.

    Raises:
      ValueError: for an unknown storage, a size below 1, or window and budget together.

    Example:
      >>> CacheSpec.parse("int8").storage, CacheSpec.parse("rkv:32").budget
      ('int8', 32)
      >>> CacheSpec.parse("window:8/int8")
      CacheSpec(storage='int8', window=8, budget=None, buffer=16, observation=8, mix=0.1)
    """

    storage: str = "float32"
    window: int | None = None
    budget: int | None = None
    buffer: int = 16
    observation: int = 8
    mix: float = 0.1

    def __post_init__(self):
        if self.storage not in _STORAGE:
            raise ValueError(f"storage must be one of {_STORAGE}, got {self.storage!r}")
        for name in ("window", "budget", "buffer", "observation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 token, got {value}")
        if self.window is not None and self.budget is not None:
            raise ValueError(f"give window ({self.window}) or budget ({self.budget}), not both")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must lie in [0, 1], got {self.mix}")
        if self.budget is not None:
            if self.budget <= self.observation:
                raise ValueError(
                    f"budget must exceed the {self.observation} observed tokens, which always "
                    f"stay, got {self.budget}"
                )
            if self.storage not in _FLOATS:
                raise NotImplementedError(
                    f"R-KV eviction with {self.storage} storage is not served; use bfloat16, or "
                    "a window with quantised storage"
                )

    @classmethod
    def parse(cls, text: str) -> "CacheSpec":
        """Read ``"int8"``, ``"window:64"``, ``"window:64/int8"`` or ``"rkv:64/bfloat16"``."""
        kind, _, storage = text.partition("/")
        if kind in _STORAGE and not storage:
            return cls(storage=kind)
        name, _, size = kind.partition(":")
        keyword = {"window": "window", "rkv": "budget"}.get(name)
        if keyword is None or not size.isdecimal():
            raise ValueError(
                f"cache must be one of {_STORAGE}, 'window:SIZE' or 'rkv:BUDGET' with an optional "
                f"'/STORAGE', got {text!r}"
            )
        return cls(storage=storage or "float32", **{keyword: int(size)})

    def layer(
        self,
        batch: int,
        prefix: int,
        tokens: int,
        chunk: int,
        num_heads: int,
        kv_heads: int,
        dim: int,
    ) -> "TokenLayer | EvictingLayer":
        """An empty layer cache for ``prefix + tokens`` tokens written ``chunk`` at a time."""
        if self.budget is not None and self.budget + self.buffer < tokens:
            if chunk > 1:
                raise NotImplementedError(
                    "eviction works token by token: a Jacobi sweep would rewind evicted tokens. "
                    'Use method="scan", or a window'
                )
            return EvictingLayer.empty(self, batch, prefix, num_heads, kv_heads, dim)
        ring = tokens if self.window is None else min(tokens, self.window + chunk - 1)
        # Matrix products of 16-bit numbers are several times slower where a row is not 16 bytes.
        capacity = -(-(prefix + ring) // _ALIGNMENT) * _ALIGNMENT
        shape = (batch, kv_heads, capacity, dim)
        if self.storage in _FLOATS:
            empty = jnp.zeros(shape, _FLOATS[self.storage])
        else:
            empty = _encode(jnp.zeros(shape), self.storage)
        positions = jnp.full(capacity, -1, jnp.int32)
        return TokenLayer(empty, empty, positions, self.storage, prefix, self.window, ring)


def _encode(x: Array, storage: str):
    if storage in _FLOATS:
        return x.astype(_FLOATS[storage])
    tensor = quantize(x, _QUANTIZED[storage], axis=-1, tile=None)
    # Two 4-bit values share a byte, else the smaller format would occupy as much as int8.
    return tensor.pack() if storage == "int4" else tensor


def _decode(stored, storage: str, dtype: DTypeLike) -> Array:
    if storage in _FLOATS:
        return stored.astype(dtype)
    return stored.dequantize(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLayer:
    """Keys and values ``[B, K, C, H]`` of one layer, the same tokens in every row.

    Floats keep rotated keys; quantised keys are kept before rotation and rotated when read.

    Slot of token ``p``: ``p`` in the prefix, else ``S + (p − S) mod ring``; without a window the
    ring holds the whole image and a slot is a position. Slots beyond the ring stay empty: their
    number is a multiple of eight.
    """

    k: Any
    v: Any
    positions: Array  # [C] int32, -1 = empty
    storage: str = field(metadata={"static": True})
    prefix: int = field(metadata={"static": True})
    window: int | None = field(metadata={"static": True})
    ring: int = field(metadata={"static": True})

    @property
    def keys_before_rotation(self) -> bool:
        """Whether what `read` returns is still to be rotated by `slot_angles`."""
        return self.storage not in _FLOATS

    def update(self, k, v, *, positions, valid=None, queries=None) -> "TokenLayer":
        """Write ``k, v [B, T, K, H]`` of the tokens ``positions [B, T]`` (consecutive)."""
        del valid, queries  # every token of a flow is valid, and nothing is scored here
        where = positions[0].astype(jnp.int32)  # [T]
        slots = jnp.where(
            where < self.prefix, where, self.prefix + (where - self.prefix) % self.ring
        )
        count = where.shape[0]
        scattered = count > 1 and self.window is not None  # the ring may wrap inside a chunk

        def put(buffer, new):
            if scattered:
                return buffer.at[:, :, slots].set(new)
            start = (0, 0, slots[0], 0)
            return jax.lax.dynamic_update_slice(buffer, new, start)

        def write(buffer, new):
            new = _encode(jnp.swapaxes(new, 1, 2), self.storage)  # [B, K, T, H]
            return jax.tree.map(put, buffer, new)

        return dataclasses.replace(
            self,
            k=write(self.k, k),
            v=write(self.v, v),
            positions=self.positions.at[slots].set(where),
        )

    def read(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Keys, rotated or not as `keys_before_rotation` says, and values ``[B, C, K, H]``."""
        unpacked = (_decode(part, self.storage, dtype) for part in (self.k, self.v))
        k, v = (jnp.swapaxes(part, 1, 2) for part in unpacked)
        return k, v

    def slot_angles(self, table) -> Array:
        """Rotary angles ``[C, H/2]`` of the tokens in the slots."""
        table = jnp.asarray(table)
        if self.window is None:  # slot = position: no gather needed
            return jnp.pad(table, ((0, self.positions.shape[0] - table.shape[0]), (0, 0)))
        return table[jnp.maximum(self.positions, 0)]

    def mask(self, positions: Array, window: int | None = None) -> Array:
        """True ``[1, 1, T, C]`` where a query may look: written, not later, inside the window."""
        del window  # this layer's own window is exact already
        query, key = positions[0][:, None], self.positions[None]
        seen = (key >= 0) & (key <= query)
        if self.window is not None:
            seen &= (key < self.prefix) | (key > query - self.window)
        return seen[None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvictingLayer:
    """Rotated keys and values of which R-KV keeps ``budget`` image tokens per head.

    Tokens are appended; when ``budget + buffer`` slots are full, the prefix, the last
    ``observation`` tokens and the best scored others stay.

    References: R-KV (arXiv 2505.24133) §3; scores from ``jaxeff.compress.rkv``.
    """

    k: Array
    v: Array
    positions: Array  # [B, K, C] int32, -1 = empty
    length: Array  # [] int32
    queries: Array  # [B, A, N, H], the last A queries, newest last
    spec: CacheSpec = field(metadata={"static": True})
    prefix: int = field(metadata={"static": True})

    keys_before_rotation = False

    @classmethod
    def empty(cls, spec, batch, prefix, num_heads, kv_heads, dim) -> "EvictingLayer":
        """A layer with no tokens."""
        capacity = prefix + spec.budget + spec.buffer
        zeros = jnp.zeros((batch, kv_heads, capacity, dim), _FLOATS[spec.storage])
        return cls(
            zeros,
            zeros,
            jnp.full((batch, kv_heads, capacity), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((batch, spec.observation, num_heads, dim), jnp.float32),
            spec,
            prefix,
        )

    def update(self, k, v, *, positions, valid=None, queries=None) -> "EvictingLayer":
        """Append ``k, v [B, T, K, H]``, then evict if the buffer is full."""
        del valid
        kept = self.spec.observation
        queries = jnp.concatenate([self.queries, queries.astype(jnp.float32)], 1)[:, -kept:]

        def put(buffer, new):
            start = (0, 0, self.length, 0)[: buffer.ndim]
            return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), start)

        where = jnp.broadcast_to(positions[:, None], (*self.positions.shape[:2], k.shape[1]))
        layer = dataclasses.replace(
            self,
            k=put(self.k, jnp.swapaxes(k, 1, 2)),
            v=put(self.v, jnp.swapaxes(v, 1, 2)),
            positions=put(self.positions, where),
            length=self.length + k.shape[1],
            queries=queries,
        )
        full = layer.length >= self.positions.shape[-1]
        return jax.lax.cond(full, EvictingLayer._evict, lambda same: same, layer)

    def _evict(self) -> "EvictingLayer":
        spec, capacity = self.spec, self.positions.shape[-1]
        keys = jnp.swapaxes(self.k, 1, 2).astype(jnp.float32)
        score = rkv.scores(self.queries, keys, mix_lambda=spec.mix).joint  # [B, K, C]
        slots = jnp.arange(capacity)
        pinned = (slots < self.prefix) | (slots >= capacity - spec.observation)
        score = jnp.where(pinned, jnp.inf, score)
        _, best = jax.lax.top_k(score, self.prefix + spec.budget)
        best = jnp.sort(best, -1)  # oldest first, so that the prefix stays in front

        def keep(buffer):
            index = best if buffer.ndim == 3 else best[..., None]
            taken = jnp.take_along_axis(buffer, index, 2)
            return buffer.at[:, :, : taken.shape[2]].set(taken)

        positions = keep(self.positions)
        positions = jnp.where(slots < self.prefix + spec.budget, positions, -1)
        length = jnp.full_like(self.length, self.prefix + spec.budget)
        return dataclasses.replace(
            self, k=keep(self.k), v=keep(self.v), positions=positions, length=length
        )

    def read(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Rotated keys and values ``[B, C, K, H]``."""
        return jnp.swapaxes(self.k, 1, 2).astype(dtype), jnp.swapaxes(self.v, 1, 2).astype(dtype)

    def mask(self, positions: Array, window: int | None = None) -> Array:
        """True ``[B, K, T, C]`` where a query may look: kept and not later."""
        del window
        key = self.positions[:, :, None]
        return (key >= 0) & (key <= positions[:, None, :, None])


def cache_bytes(
    config: TARFlowConfig,
    cache: CacheSpec | str = "float32",
    *,
    batch: int = 1,
    grid: tuple[int, int] | None = None,
    guided: bool = False,
    chunk: int = 1,
) -> dict[str, int]:
    """Bytes of the largest caches that sampling holds, from shapes only.

    Args:
      config: the flow.
      cache: what is kept of a token.
      batch: images sampled together.
      grid: tokens per column and row; by default the training grid.
      guided: the guided blocks hold a second, unconditional half.
      chunk: tokens written at a time (1 for sequential sampling).

    Returns:
      ``{"deep": bytes, "shallow": bytes of the largest shallow block}``; a block's cache is freed
      before the next block starts.

    >>> from jaxeff.models.starflow.config import starflow_tiny
    >>> config = starflow_tiny()
    >>> cache_bytes(config, "bfloat16")["deep"], cache_bytes(config, "int8")["deep"]
    (74880, 42624)
    """
    spec = CacheSpec.parse(cache) if isinstance(cache, str) else cache
    tokens = int(np.prod(grid or config.grid))
    sizes = {"deep": 0, "shallow": 0}
    for index, layers in enumerate(config.layers_per_block):
        deep = index == config.num_blocks - 1
        prefix = config.prefix_len if config.block_has_prefix(index) else 0
        doubled = guided and (deep or config.cond in ("class_add", "prefix_all", "none"))
        heads, kv_heads = config.block_heads(deep)
        written = tokens - (0 if config.sos else 1)

        def make(rows=batch * (1 + doubled), prefix=prefix, heads=(heads, kv_heads), n=written):
            return spec.layer(rows, prefix, n, chunk, *heads, config.head_dim)

        leaves = jax.tree.leaves(jax.eval_shape(make))
        one = sum(_leaf_bytes(leaf) for leaf in leaves)
        kind = "deep" if deep else "shallow"
        sizes[kind] = max(sizes[kind], layers * one)
    return sizes


def _leaf_bytes(leaf) -> int:
    return leaf.size * np.dtype(leaf.dtype).itemsize
