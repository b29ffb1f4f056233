"""The engine of every method that holds heads at a budget: score, protect, choose, compact."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxeff.compress.base import Compressor, select
from jaxeff.compress.full import FullKV
from jaxeff.kv_cache import KVCache, TiledLayer


class Budgeted(Compressor):
    """Keeps ``budget`` entries per head and compacts when ``buffer`` more have come.

    The engine needs the attributes that :class:`Scorer` has as fields, and :meth:`score`. Wrappers
    take both from the method they wrap, and change :meth:`budgets` or :meth:`counts`.

    Examples:
        >>> from jaxeff.compress import Knorm
        >>> isinstance(Knorm(budget=8), Budgeted)
        True

    References:
        R-KV (arXiv 2505.24133), section 3.1.
    """

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return the scores of a layer's slots, f32 ``[B, K, C]``, higher = keep.

        Args:
            layer: a layer of the cache.
            index: its number among the layers that are compressed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score(layer, index)")

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        """Return the budget of each layer that is compressed, in tokens."""
        return (self.budget,) * num_layers

    def counts(self, scores: jax.Array, layer: Any, budget: int) -> jax.Array:
        """Return how many entries each head keeps, int32 ``[B, K]``."""
        del scores
        return self.allowance(layer, budget)

    def largest_count(self, layer: Any, budget: int) -> int:
        """Return a static bound of :meth:`counts`."""
        return layer.capacity if self.spare_frozen else min(budget, layer.capacity)

    def allowance(self, layer: Any, budget: int) -> jax.Array:
        """Return each head's budget, int32 ``[B, K]``, plus its frozen entries if spared."""
        spared = layer.frozen if self.spare_frozen else jnp.zeros_like(layer.frozen)
        return spared + budget

    def over(self, layer: Any, budget: int, slack: int) -> jax.Array:
        """Return which heads hold ``slack`` or more entries above their budget, bool ``[B, K]``."""
        return layer.length >= self.allowance(layer, budget) + slack

    def slots(self, budget: int) -> int:
        """Return the slots of a layer that decoding needs at this budget, in tokens."""
        return budget + self.buffer

    def rebuild(self, layer: Any, indices: jax.Array, budget: int, capacity: int) -> Any:
        """Return the layer that decoding starts from, with the slots that live on."""
        del budget
        return layer.gather(indices[..., :capacity], capacity=capacity)

    def fit(self, *, prompt: int, room: int) -> Compressor:
        """Return an equal compressor that allocates no more than ``prompt + room`` slots."""
        total = prompt + room
        if total < self.budget:
            return FullKV(storage=self.storage)
        # One slot more than can fill up: the trigger is never reached, as it should not be.
        return dataclasses.replace(self, buffer=min(self.buffer, total - self.budget + 1))

    def prefill_capacity(self, *, prompt: int, room: int) -> int:
        """Return the slots of the prefill's cache; it is cut down before decoding."""
        del room
        return prompt

    def after_prefill(self, cache: KVCache) -> KVCache:
        """Return a cache of ``budget + buffer`` slots, long prompts cut to ``budget``."""
        layers = evictable_layers(cache)
        frozen = [jnp.maximum(x.frozen, jnp.minimum(x.length, self.num_sinks)) for x in layers]
        layers = [dataclasses.replace(x, frozen=f) for x, f in zip(layers, frozen, strict=True)]
        cache = with_evictable(cache, layers)
        budgets = self.budgets(len(layers))
        cuts = [
            self.compress_prefill and layer.capacity >= budget
            for layer, budget in zip(layers, budgets, strict=True)
        ]
        rows, capacities = [], []
        for layer, budget, cut in zip(layers, budgets, cuts, strict=True):
            rows.append(self.over(layer, budget, 0) & cut)
            capacity = self.slots(budget)
            capacities.append(capacity if cut else max(capacity, layer.capacity + 1))
        rows = rows if any(cuts) else None
        return self._compact(cache, rows, capacities, first=True)

    def after_step(self, cache: KVCache) -> KVCache:
        """Return the cache with every full row compacted to ``budget`` entries."""
        layers = evictable_layers(cache)
        for layer, budget in zip(layers, self.budgets(len(layers)), strict=True):
            if layer.capacity < self.slots(budget):
                raise ValueError(
                    f"the cache has capacity={layer.capacity}; budget={budget} plus "
                    f"buffer={self.buffer} need {budget + self.buffer} slots"
                )
        if not layers:
            return cache
        # A branch, not a mask: between compactions nothing of the quadratic work is done. Rows
        # that are not full pass through a compaction unchanged.
        full = self._full(cache)
        return jax.lax.cond(self.due(cache), lambda c: self.compact(c, full), lambda c: c, cache)

    def due(self, cache: KVCache) -> jax.Array | None:
        """Return whether any head is full."""
        full = self._full(cache)
        return jnp.any(jnp.stack(full)) if full else jnp.array(False)

    def _full(self, cache: KVCache) -> list[jax.Array]:
        """Return which heads wait for a compaction, bool ``[B, K]`` per layer."""
        layers = evictable_layers(cache)
        ready = (cache.seen >= self.query_window)[:, None]
        return [
            ready & self.over(layer, budget, self.buffer)
            for layer, budget in zip(layers, self.budgets(len(layers)), strict=True)
        ]

    def before_turn(self, cache: KVCache, *, tokens: int, room: int) -> KVCache:
        """Return the cache with room for the question; what follows it is held at the budget."""
        del room
        layers = [layer.extend(tokens) for layer in evictable_layers(cache)]
        return with_evictable(cache, layers)

    def after_turn(self, cache: KVCache, *, tokens: int) -> KVCache:
        """Return the cache after a question, compacted and as large as before it."""
        layers = evictable_layers(cache)
        budgets = self.budgets(len(layers))
        rows = [self.over(x, b, self.buffer) for x, b in zip(layers, budgets, strict=True)]
        return self._compact(cache, rows, [-tokens] * len(layers))

    def protected(self, layer: Any, index: int) -> jax.Array:
        """Return :meth:`score` with ``+inf`` on sinks and window, ``-inf`` on dead slots."""
        if self.query_window and layer.queries is None:
            raise ValueError(
                f"the cache keeps no queries; make it with query_window={self.query_window}"
            )
        layer = self._with_own_queries(layer)
        slot = jnp.arange(layer.capacity)
        recent = slot >= layer.length[..., None] - self.window
        kept = recent | (slot < layer.frozen[..., None])
        if self.num_sinks:  # a prompt shorter than that has no more of them frozen
            kept = kept | (layer.positions < self.num_sinks)
        return jnp.where(layer.live, jnp.where(kept, jnp.inf, self.score(layer, index)), -jnp.inf)

    def _with_own_queries(self, layer: Any) -> Any:
        """Return a layer whose query ring shows the queries that this method scores with."""
        if not self.query_window or layer.queries.shape[2] == self.query_window:
            return layer
        if layer.queries.shape[2] < self.query_window:
            raise ValueError(
                f"the cache keeps {layer.queries.shape[2]} queries; make it with "
                f"query_window={self.query_window}"
            )
        positions = layer.query_positions
        newest = jnp.max(positions, axis=1, keepdims=True) - self.query_window
        positions = jnp.where(positions > newest, positions, -1)
        return dataclasses.replace(layer, query_positions=positions)

    def compact(self, cache: KVCache, rows=None, *, capacity: int | None = None) -> KVCache:
        """Return the cache with the marked heads cut to ``budget`` entries.

        Args:
            cache: a cache with what the scores need.
            rows: bool ``[B, K]`` per compressed layer, heads to cut; ``None``: those above the
                budget.
            capacity: slots of the new layers, in tokens; ``None``: as before.

        Returns:
            The new cache. Heads that are not marked keep all their entries; where these do not
            fit a smaller capacity, the last are dropped and ``overflow`` is set.

        Raises:
            ValueError: if the budget exceeds the old or the new capacity, ``rows`` has not one
                array per layer, or the cache lacks what scores need.
        """
        layers = evictable_layers(cache)
        budgets = self.budgets(len(layers))
        for layer, budget in zip(layers, budgets, strict=True):
            if budget > layer.capacity:
                raise ValueError(
                    f"budget={budget} is larger than the capacity={layer.capacity} of the cache"
                )
            if capacity is not None and budget > capacity:
                raise ValueError(f"capacity={capacity} cannot hold budget={budget} entries")
        if rows is not None and len(rows) != len(layers):
            raise ValueError(f"rows has {len(rows)} arrays; {len(layers)} layers are compressed")
        if rows is None:
            rows = [self.over(x, b, 1) for x, b in zip(layers, budgets, strict=True)]
        return self._compact(cache, rows, [capacity] * len(layers))

    def _compact(self, cache, rows, capacities, *, first=False):
        """Cut the marked rows; a capacity may be a number, a negative change, or ``None``."""
        layers = evictable_layers(cache)
        budgets = self.budgets(len(layers))
        scores = None
        if rows is not None:
            found = [self.protected(layer, number) for number, layer in enumerate(layers)]
            scores = self._share(found)
        new = []
        for number, (layer, budget) in enumerate(zip(layers, budgets, strict=True)):
            capacity, less = capacities[number], 0
            if capacity is None:
                capacity = layer.capacity
            elif capacity < 0:
                capacity, less = layer.capacity + capacity, -capacity
            width = max(layer.capacity, capacity)
            slot = jnp.arange(width)
            indices = jnp.where(slot < layer.length[..., None], slot, -1)
            if scores is not None:
                limit = self.largest_count(layer, budget)
                kept = select(
                    scores[number],
                    limit,
                    slot_order=self.slot_order,
                    frozen=layer.frozen,
                    count=self.counts(scores[number], layer, budget),
                )
                pad = ((0, 0), (0, 0), (0, width - limit))
                kept = jnp.pad(kept, pad, constant_values=-1)
                indices = jnp.where(rows[number][..., None], kept, indices)
            if first:
                new.append(self.rebuild(layer, indices, budget, capacity))
                continue
            if capacity < width:
                lost = jnp.any(indices[..., capacity:] >= 0, axis=(1, 2))
                layer = dataclasses.replace(layer, overflow=layer.overflow | lost)
            indices = indices[..., :capacity]
            if less and isinstance(layer, TiledLayer):
                new.append(_shrink(layer, indices, less))
            else:
                new.append(layer.gather(indices, capacity=capacity))
        return with_evictable(cache, new)

    def _share(self, scores: list[jax.Array]) -> list[jax.Array]:
        """Average scores over the heads (and sum over the layers) that decide together."""
        if self.scope == "head":
            return scores
        shared = [jnp.mean(x, axis=1, keepdims=True) for x in scores]
        if self.scope == "global":
            shared = [sum(shared)] * len(scores)
        return [jnp.broadcast_to(s, x.shape) for s, x in zip(shared, scores, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer(Budgeted):
    """A method that is one score: override :meth:`score`, add a row to the registry, done.

    Fresh tokens fill the buffer. When a row reaches ``budget + buffer`` entries, all but the last
    ``window`` and the sinks compete; the best stay, so that ``budget`` entries are left. A prompt
    of ``budget`` tokens or more is cut once, after its prefill.

    Args:
        budget: entries kept per head, in tokens, window and sinks included.
        buffer: fresh tokens between two compactions, 1 or more.
        window: last entries that always stay, 1 or more.
        num_sinks: first tokens that are never evicted.
        slot_order: ``"time"``: survivors keep their order. ``"score"``: descending score.
        scope: who shares a decision: ``"head"`` (none), ``"layer"`` (mean over the heads),
            ``"global"`` (that, summed over the layers). Shared scopes need heads of equal length.
        compress_prefill: cut a long prompt after its prefill.
        spare_frozen: count the budget on top of frozen entries (what ``Compose`` does).
        storage: how the cache is stored; ``None``: as the caller asks.

    Raises:
        ValueError: if a setting is out of range.

    Examples:
        >>> class Oldest(Scorer):
        ...     def score(self, layer, index):
        ...         return -layer.positions.astype(jnp.float32)
        >>> Oldest(budget=16).fit(prompt=4, room=4).name
        'full'

    References:
        R-KV (arXiv 2505.24133), section 3.1 (budget and buffer).
    """

    budget: int
    buffer: int = 128
    window: int = 1
    num_sinks: int = 0
    slot_order: str = "time"
    scope: str = "head"
    compress_prefill: bool = True
    spare_frozen: bool = False

    name: ClassVar[str] = "scorer"
    primary: ClassVar[str] = "budget"

    def __post_init__(self):
        for field in ("budget", "buffer", "window"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r}; expected a whole number of tokens, 1 or more")
        if self.budget < self.window:
            raise ValueError(
                f"budget={self.budget} must be at least window={self.window} "
                "(tokens that always stay)"
            )
        if not 0 <= self.num_sinks <= self.budget - self.window:
            raise ValueError(
                f"num_sinks={self.num_sinks} must be in [0, {self.budget - self.window}] "
                f"(budget - window)"
            )
        if self.slot_order not in ("time", "score"):
            raise ValueError(f"slot_order={self.slot_order!r}; expected 'time' or 'score'")
        if self.scope not in ("head", "layer", "global"):
            raise ValueError(f"scope={self.scope!r}; expected 'head', 'layer' or 'global'")


def evictable_layers(cache: KVCache) -> list[Any]:
    """Return the layers that a compressor may cut: all but the rings of windowed layers.

    Raises:
        ValueError: if the cache is of another version than this code reads.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> cache = DenseCache.init(2, 1, 8, 1, 4, windows=(4, None))
        >>> [type(layer).__name__ for layer in evictable_layers(cache)]
        ['DenseLayer']

    References:
        KVzip (arXiv 2505.23416), section 4.1 (models with sliding windows).
    """
    cache.check_version()
    return [layer for layer in cache.layers if getattr(layer, "evictable", True)]


def with_evictable(cache: KVCache, layers: list[Any]) -> KVCache:
    """Return the cache with its evictable layers replaced, in order, and the rings as they are.

    Examples:
        >>> from jaxeff.kv_cache import DenseCache
        >>> cache = DenseCache.init(2, 1, 8, 1, 4, windows=(4, None))
        >>> new = with_evictable(cache, [layer.resize(3) for layer in evictable_layers(cache)])
        >>> [layer.capacity for layer in new.layers]
        [4, 3]

    References:
        KVzip (arXiv 2505.23416), section 4.1.
    """
    fresh = iter(layers)
    every = [next(fresh) if getattr(x, "evictable", True) else x for x in cache.layers]
    return dataclasses.replace(cache, layers=tuple(every))


def _shrink(layer: TiledLayer, indices: jax.Array, tokens: int) -> TiledLayer:
    """Undo ``layer.extend(tokens)`` while packing the given slots."""
    less = -(-tokens // layer.tile)
    heads, tiles = layer.table.shape[1:]
    limit = (tiles - less) * layer.tile
    return TiledLayer.pack(
        layer,
        indices[..., :limit],
        tile=layer.tile,
        num_tiles=layer.num_tiles - heads * less,
        max_tiles=tiles - less,
    )
