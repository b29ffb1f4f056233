"""Methods made of methods: budgets per head or per layer, another storage, one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.compress.base import Compressor, ContextPass
from jaxeff.compress.full import FullKV
from jaxeff.compress.scorer import Budgeted, evictable_layers, with_evictable
from jaxeff.kv_cache import KVCache, TiledLayer, store_name


def _parsed(value: Any) -> Compressor:
    from jaxeff.compress.registry import parse  # the registry lists this file's classes

    return parse(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetWrapper(Budgeted):
    """Shares a wrapped method's scores and settings, and overrides how many entries stay where.

    Args:
        method: a method that holds a budget, or its spelling, such as ``"snapkv:256"``.
        storage: how the cache is stored; ``None``: as the method says.

    Raises:
        ValueError: if the method has no budget and scores.
        NotImplementedError: if the method is a wrapper whose budgets this one would replace.

    Examples:
        >>> BudgetWrapper(method="knorm:32").budget
        32

    References:
        Ada-KV (arXiv 2407.11550), section 4 (any scores may be plugged in).
    """

    method: Any

    name: ClassVar[str] = "wrapper"
    positional: ClassVar[tuple[str, ...]] = ("method",)

    def __post_init__(self):
        method = _parsed(self.method)
        if not isinstance(method, Budgeted):
            raise ValueError(
                f"method={method.name!r} has no budget per head; {self.name} needs one that has, "
                "such as 'snapkv:256'"
            )
        if isinstance(method, BudgetWrapper) and not self._takes(method):
            raise NotImplementedError(
                f"method={method.name!r} inside {self.name} is not served, its budgets would be "
                "lost; 'adakv(per_layer(snapkv:256))' has both"
            )
        object.__setattr__(self, "method", method)
        if self.storage is None:
            object.__setattr__(self, "storage", method.storage)

    def _takes(self, wrapper: BudgetWrapper) -> bool:
        """Return whether what a wrapper decides lives on inside this one."""
        del wrapper
        return False

    budget = property(lambda self: self.method.budget, doc="Entries per head, in tokens.")
    buffer = property(lambda self: self.method.buffer, doc="Tokens between compactions.")
    window = property(lambda self: self.method.window, doc="Last entries that always stay.")
    num_sinks = property(lambda self: self.method.num_sinks, doc="First tokens never evicted.")
    slot_order = property(lambda self: self.method.slot_order, doc="Order of kept slots.")
    scope = property(lambda self: self.method.scope, doc="Who shares a decision.")
    compress_prefill = property(lambda self: self.method.compress_prefill, doc="Cut prompts.")
    spare_frozen = property(lambda self: self.method.spare_frozen, doc="Budget on top of frozen.")
    query_window = property(lambda self: self.method.query_window, doc="Queries remembered.")
    observer = property(lambda self: self.method.observer, doc="What runs along.")

    def score(self, layer: Any, index: int) -> jax.Array:
        """Return the wrapped method's scores."""
        return self.method.score(layer, index)

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        """Return the wrapped method's budgets."""
        return self.method.budgets(num_layers)

    def bind(self, **facts: Any) -> Compressor:
        """Return the wrapper with its method bound."""
        return dataclasses.replace(self, method=self.method.bind(**facts))

    def fit(self, *, prompt: int, room: int) -> Compressor:
        """Return the wrapper with its method fitted, or a full cache if nothing can be evicted."""
        method = self.method.fit(prompt=prompt, room=room)
        if not isinstance(method, Budgeted):
            return dataclasses.replace(method, storage=self.storage)
        return dataclasses.replace(self, method=method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(BudgetWrapper):
    """Shares a layer's budget among its heads: the best ``K * budget`` entries of all heads stay.

    Every head keeps at least ``floor * budget`` of its own best. Heads become ragged, so the layer
    is stored in tiles of a pool: ``K * (budget + buffer)`` slots and at most a tile per head more.

    Args:
        method: a method that holds a budget, or its spelling.
        floor: share of the budget that no head falls below, in [0, 1].
        tile: slots of a tile.
        storage: how the cache is stored; ``None``: as the method says.

    Raises:
        ValueError: if the method has no budget, shares decisions, or the floor is out of range.

    Examples:
        >>> AdaKV(method="snapkv:64").floor
        0.2

    References:
        Ada-KV (arXiv 2407.11550), section 4 and Algorithm 1.
    """

    floor: float = 0.2
    tile: int = 16

    name: ClassVar[str] = "adakv"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}; expected a share of the budget in [0, 1]")
        if self.tile < 1:
            raise ValueError(f"tile={self.tile}; expected 1 or more tokens")
        if self.scope != "head":
            raise ValueError(f"scope={self.scope!r}; adakv ranks heads itself, expected 'head'")

    def _takes(self, wrapper: BudgetWrapper) -> bool:
        return isinstance(wrapper, PerLayer)  # heads share what a layer gets

    def over(self, layer: Any, budget: int, slack: int) -> jax.Array:
        """Return whether all heads of a row together are above their budget, bool ``[B, K]``."""
        total = jnp.sum(layer.length - self.allowance(layer, budget) - slack, axis=1, keepdims=True)
        return jnp.broadcast_to(total >= 0, layer.length.shape)

    def largest_count(self, layer: Any, budget: int) -> int:
        """Return the most that one head can keep while the others keep their floor."""
        heads = layer.length.shape[1]
        if self.spare_frozen:
            return layer.capacity
        return min(heads * budget - (heads - 1) * self._floor(budget), layer.capacity)

    def counts(self, scores: jax.Array, layer: Any, budget: int) -> jax.Array:
        """Return how many of the best entries of all heads fall to each head, int32 ``[B, K]``."""
        batch, heads, slots = scores.shape
        rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
        raised = jnp.where((rank < self._floor(budget)) & (scores > -jnp.inf), jnp.inf, scores)
        flat = raised.reshape(batch, heads * slots)
        place = jnp.argsort(jnp.argsort(-flat, axis=-1, stable=True), axis=-1)
        total = jnp.sum(self.allowance(layer, budget), axis=1, keepdims=True)  # [B, 1]
        chosen = (place < total) & (flat > -jnp.inf)
        return jnp.sum(chosen.reshape(batch, heads, slots), axis=-1, dtype=jnp.int32)

    def _floor(self, budget: int) -> int:
        return max(int(budget * self.floor), self.window + self.num_sinks)

    def rebuild(self, layer: Any, indices: jax.Array, budget: int, capacity: int) -> Any:
        """Return the kept slots in a pool of tiles."""
        heads = layer.length.shape[1]
        amount = indices.shape[-1]
        # Heads of equal length (nothing cut yet) must fit as well as the most uneven ones.
        most = max(self.largest_count(layer, budget), min(capacity, layer.capacity))
        slots = heads * max(capacity, budget + self.buffer)
        width = most + self.buffer
        indices = indices[..., : min(amount, width)]
        return TiledLayer.pack(
            layer,
            indices,
            tile=self.tile,
            num_tiles=slots // self.tile + heads,
            max_tiles=-(-width // self.tile),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayer(BudgetWrapper):
    """Gives early layers more than late ones: budgets fall linearly, with the same mean.

    The last layer gets ``budget / beta``, the first ``2 * budget - budget / beta``.

    Args:
        method: a method that holds a budget, or its spelling.
        beta: how steep the pyramid is, 1 (flat) or more.
        most: slots that no layer needs more of; ``fit`` sets it. ``None``: unknown.
        storage: how the cache is stored; ``None``: as the method says.

    Raises:
        ValueError: if the method has no budget, or shares decisions between layers.

    Examples:
        >>> PerLayer(method="snapkv:64", beta=4).budgets(3)
        (112, 64, 16)

    References:
        PyramidKV (arXiv 2406.02069), section 3.3.
    """

    beta: float = 20.0
    most: int | None = None

    name: ClassVar[str] = "per_layer"

    def __post_init__(self):
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta={self.beta}; expected 1 (all layers alike) or more")
        if self.scope == "global":
            raise ValueError("scope='global'; per_layer gives layers different budgets")

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        """Return budgets that fall linearly, none below the entries that always stay."""
        least = self.budget / self.beta
        steps = (
            np.linspace(2 * self.budget - least, least, num_layers)
            if num_layers != 1  # none where every layer has a window
            else [self.budget]
        )
        floor = self.window + self.num_sinks
        return tuple(max(round(float(step)), floor) for step in steps)

    def fit(self, *, prompt: int, room: int) -> Compressor:
        """Return an equal compressor; only a text shorter than every budget is left alone."""
        if prompt + room < self.budgets(2)[1]:
            return FullKV(storage=self.storage)
        return dataclasses.replace(self, most=prompt + room + 1)

    def slots(self, budget: int) -> int:
        """Return the slots of a layer; early layers never get more than the whole text needs."""
        slots = super().slots(budget)
        return slots if self.most is None else min(slots, self.most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized(Compressor):
    """The wrapped method with its cache in another storage format.

    Args:
        method: a method or its spelling; ``None``: a full cache.
        storage: the format, see ``DenseCache.init``.

    Raises:
        ValueError: if the format is not known.

    Examples:
        >>> Quantized(method="kvzip:0.3", storage="nvfp4").fit(prompt=8, room=2).storage
        'nvfp4'

    References:
        KVzip (arXiv 2505.23416), section 4.2 (eviction on a quantised cache).
    """

    method: Any = None
    storage: str | None = "int8"

    name: ClassVar[str] = "quantized"
    positional: ClassVar[tuple[str, ...]] = ("method", "storage")

    def __post_init__(self):
        if self.storage is None:
            raise ValueError("storage is None; quantized needs a format such as 'int8'")
        object.__setattr__(self, "storage", store_name(self.storage))
        object.__setattr__(self, "method", _parsed(self.method))

    @property
    def inner(self) -> Compressor:
        """The method itself, told the storage."""
        return dataclasses.replace(self.method, storage=self.storage)

    query_window = property(lambda self: self.method.query_window, doc="Queries remembered.")
    observer = property(lambda self: self.method.observer, doc="What runs along.")
    evicts_context = property(lambda self: self.method.evicts_context, doc="See the method.")
    pass_format = property(lambda self: self.method.pass_format, doc="See the method.")

    def bind(self, **facts: Any) -> Compressor:
        """Return the bound method with this storage."""
        return self.inner.bind(**facts)

    def fit(self, *, prompt: int, room: int) -> Compressor:
        """Return the fitted method with this storage."""
        return self.inner.fit(prompt=prompt, room=room)

    def prefill_capacity(self, *, prompt: int, room: int) -> int:
        """Return the method's answer, as do all hooks below."""
        return self.inner.prefill_capacity(prompt=prompt, room=room)

    def after_prefill(self, cache: KVCache) -> KVCache:
        """See the method."""
        return self.inner.after_prefill(cache)

    def context_passes(self, tokens, lengths, *, vocab_size: int) -> list[ContextPass]:
        """See the method."""
        return self.inner.context_passes(tokens, lengths, vocab_size=vocab_size)

    def most_passes(self, cache: KVCache) -> int:
        """See the method."""
        return self.inner.most_passes(cache)

    def observe(self, cache: KVCache, start: jax.Array) -> KVCache:
        """See the method."""
        return self.inner.observe(cache, start)

    def collect(self, cache: KVCache) -> tuple[jax.Array, ...]:
        """See the method."""
        return self.inner.collect(cache)

    def evict_context(self, cache: KVCache, scores: tuple[jax.Array, ...], *, room: int) -> KVCache:
        """See the method."""
        return self.inner.evict_context(cache, scores, room=room)

    def after_step(self, cache: KVCache) -> KVCache:
        """See the method."""
        return self.inner.after_step(cache)

    def due(self, cache: KVCache) -> jax.Array | None:
        """See the method."""
        return self.inner.due(cache)

    def before_turn(self, cache: KVCache, *, tokens: int, room: int) -> KVCache:
        """See the method."""
        return self.inner.before_turn(cache, tokens=tokens, room=room)

    def after_turn(self, cache: KVCache, *, tokens: int) -> KVCache:
        """See the method."""
        return self.inner.after_turn(cache, tokens=tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compose(Compressor):
    """One method cuts the context, another holds what is generated at a budget.

    What the first keeps of the context is frozen: the second never evicts it, and its budget counts
    the entries after it. So a head holds ``kept context + budget + buffer`` entries at most.

    Args:
        context: a method that evicts a context once, or its spelling (``"kvzip:0.3"``).
        generation: a method that holds a budget, or its spelling (``"rkv:256"``).
        storage: how the cache is stored; ``None``: as either method says.

    Raises:
        ValueError: if the two ask for different storage, or the generation method has no budget.
        NotImplementedError: if the context method is not one that evicts a context once, or the
            generation method is ``AdaKV`` or shares decisions between heads.

    Examples:
        >>> from jaxeff.compress import parse
        >>> parse("kvzip:0.3 + rkv:64").generation.budget
        64

    References:
        KVzip (arXiv 2505.23416), section 3; R-KV (arXiv 2505.24133), section 3.
    """

    context: Any
    generation: Any

    name: ClassVar[str] = "compose"
    positional: ClassVar[tuple[str, ...]] = ("context", "generation")

    def __post_init__(self):
        context, generation = _parsed(self.context), _parsed(self.generation)
        if isinstance(context, Quantized):
            context = context.inner
        if isinstance(generation, Quantized):
            generation = generation.inner
        if not context.evicts_context:
            raise NotImplementedError(
                f"context={context.name!r} is not served; a method that evicts a context once is, "
                "such as 'kvzip:0.3'"
            )
        if not isinstance(generation, Budgeted | FullKV):
            raise ValueError(
                f"generation={generation.name!r} does not hold a budget while decoding; expected "
                "such a method, for example 'rkv:256', or 'full'"
            )
        if isinstance(generation, AdaKV):
            raise NotImplementedError(
                "generation='adakv' is not served after a cut context, whose heads are ragged "
                "already; the method inside adakv is"
            )
        if getattr(generation, "scope", "head") != "head":
            raise NotImplementedError(
                f"generation.scope={generation.scope!r} is not served after a cut context, whose "
                "heads are ragged; scope='head' is"
            )
        stores = {x for x in (self.storage, context.storage, generation.storage) if x is not None}
        if len(stores) > 1:
            raise ValueError(f"storage is {sorted(stores)}; one cache has one storage")
        object.__setattr__(self, "storage", next(iter(stores), None))
        object.__setattr__(self, "context", context)
        object.__setattr__(self, "generation", _sparing(generation))

    query_window = property(lambda self: self.generation.query_window, doc="Queries remembered.")
    observer = property(lambda self: self.generation.observer, doc="What runs along.")
    pass_format = property(lambda self: self.context.pass_format, doc="Of the context method.")

    @property
    def evicts_context(self) -> bool:
        """Always."""
        return True

    def bind(self, **facts: Any) -> Compressor:
        """Return the pair with both methods bound."""
        return dataclasses.replace(
            self, context=self.context.bind(**facts), generation=self.generation.bind(**facts)
        )

    def fit(self, *, prompt: int, room: int) -> Compressor:
        """Return the pair with both methods fitted, the second to what will be generated."""
        return dataclasses.replace(
            self,
            context=self.context.fit(prompt=prompt, room=room),
            generation=self.generation.fit(prompt=0, room=room),
        )

    def prefill_capacity(self, *, prompt: int, room: int) -> int:
        """Return the slots of the prefill's cache."""
        return self.context.prefill_capacity(prompt=prompt, room=room)

    def after_prefill(self, cache: KVCache) -> KVCache:
        """Return what the context method makes of the cache."""
        return self.context.after_prefill(cache)

    def context_passes(self, tokens, lengths, *, vocab_size: int) -> list[ContextPass]:
        """Return the passes of the context method."""
        return self.context.context_passes(tokens, lengths, vocab_size=vocab_size)

    def most_passes(self, cache: KVCache) -> int:
        """Return the answer of the context method."""
        return self.context.most_passes(cache)

    def observe(self, cache: KVCache, start: jax.Array) -> KVCache:
        """Return the view of the context method."""
        return self.context.observe(cache, start)

    def collect(self, cache: KVCache) -> tuple[jax.Array, ...]:
        """Return the scores of the context method."""
        return self.context.collect(cache)

    def evict_context(self, cache: KVCache, scores: tuple[jax.Array, ...], *, room: int) -> KVCache:
        """Return the cut and frozen context, with room for one budget and buffer."""
        if isinstance(self.generation, Budgeted):
            layers = len(evictable_layers(cache))
            room = max(self.generation.budgets(layers), default=0) + self.generation.buffer
        cache = self.context.evict_context(cache, scores, room=room)
        layers = [
            dataclasses.replace(layer, frozen=jnp.copy(layer.length))
            for layer in evictable_layers(cache)
        ]
        return with_evictable(cache, layers)

    def after_step(self, cache: KVCache) -> KVCache:
        """Return the cache with what was generated held at its budget."""
        return self.generation.after_step(cache)

    def due(self, cache: KVCache) -> jax.Array | None:
        """Return the answer of the method that generates."""
        return self.generation.due(cache)

    def before_turn(self, cache: KVCache, *, tokens: int, room: int) -> KVCache:
        """Return the cache with room for a question."""
        return self.generation.before_turn(cache, tokens=tokens, room=room)

    def after_turn(self, cache: KVCache, *, tokens: int) -> KVCache:
        """Return the cache after a question."""
        return self.generation.after_turn(cache, tokens=tokens)


def _sparing(method: Compressor) -> Compressor:
    """Return the method with its budget counted on top of frozen entries."""
    if isinstance(method, BudgetWrapper):
        return dataclasses.replace(method, method=_sparing(method.method))
    if isinstance(method, Budgeted):
        return dataclasses.replace(method, spare_frozen=True)
    return method
