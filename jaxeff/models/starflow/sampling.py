"""Sampling: the exact inverse of a flow, token by token or by parallel sweeps, in one program."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.models.starflow.block import FlowBlock, TokenMap
from jaxeff.models.starflow.cache import CacheSpec
from jaxeff.models.starflow.flow import Condition, TARFlow, _precision
from jaxeff.models.starflow.guidance import GUIDANCE_KINDS, guide
from jaxeff.typing import Array

__all__ = ["InverseTrace", "inverse", "sample"]

METHODS = ("scan", "jacobi", "slide", "recompute")
SWEEPS = ("jacobi", "slide")  # methods that write the same tokens more than once


class InverseTrace(NamedTuple):
    """What the inverse passed through.

    Attributes:
      states: tokens ``[B, N, D]`` in image order: the noise, then the output of each block, deep
        block first.
      sweeps: sweeps of each chunk, one int32 array per block, deep block first; for ``"slide"`` all
        sweeps of the block, for the sequential methods the number of steps.
    """

    states: tuple[Array, ...]
    sweeps: tuple[Array, ...]


@dataclass(frozen=True)
class _Options:
    guided: bool
    guided_blocks: tuple[bool, ...]
    guidance_kind: str
    guide_what: str
    annealed: bool
    attn_temp: float
    cool_all: bool
    caches: tuple[Any, ...]  # per block
    method: str
    chunks: tuple[int, ...]  # per block
    max_sweeps: int
    progress: Callable | None


def inverse(
    flow: TARFlow,
    z: Array,
    cond=None,
    *,
    guidance: float | Array = 0.0,
    guidance_kind: str = "score",
    guide_what: str = "ab",
    guide: str = "auto",
    annealed: bool = False,
    attn_temp: float = 1.0,
    attn_temp_on: str = "unconditional",
    null_cond: Array | None = None,
    cache: str | CacheSpec | Callable = "float32",
    shallow_cache: str | CacheSpec | Callable | None = None,
    method: str = "scan",
    chunk: int | tuple[int, ...] = 16,
    threshold: float = 1e-3,
    max_sweeps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    return_trace: bool = False,
) -> Array | tuple[Array, InverseTrace]:
    """Map noise to data: ``x_i = μ_i(x_<i) + σ_i(x_<i)·z_i`` in every block, deep block first.

    The whole inverse is one compiled program. ``"scan"`` runs token by token through preallocated
    caches. ``"jacobi"`` starts from x = z and repeats the map on chunks of tokens in order
    (Gauss–Seidel between chunks, Jacobi inside) until the mean squared change over the mean square,
    over the whole batch, falls below ``threshold``; ``chunk`` sweeps are always exact, so more are
    never run. A chunk of all tokens is plain Jacobi. ``"slide"`` sweeps the same way over a window
    of ``chunk`` tokens that moves on after every sweep, to the first token whose input had changed
    by more than ``threshold``: no token waits for the last one of its chunk, and the next ones are
    warm when their turn comes. The cached keys and values of a token are those of the input of its
    last sweep. ``"recompute"`` keeps no cache: N full passes a block, the
    slow oracle of the other two.

    Args:
      flow: the model.
      z: noise ``[B, H, W, C]`` or ``[B, N, D]``, float.
      cond: condition, as in ``flow(x, cond)``.
      guidance: weight ``w ≥ 0``; 0 samples the conditional density. A Python number, so that an
        unguided program does not pay for the second half of the batch.
      guidance_kind: ``"score"`` (STARFlow) or ``"linear"`` (TARFlow, in log scale).
      guide_what: for ``"linear"``: ``"a"`` the scale, ``"b"`` the mean, or both.
      guide: which blocks are guided: ``"all"``, ``"deep"``, or ``"auto"``, which is ``"deep"`` for
        a prefix in the deep block only and else ``"all"``.
      annealed: for ``"linear"``: weight ``w·(i + 1)/(steps)`` at step i.
      attn_temp: attention temperature τ; logits are divided by it.
      attn_temp_on: ``"unconditional"`` cools that half of a guided batch (TARFlow),
        ``"both"`` all of it (STARFlow).
      null_cond: unconditional prefix ``[B, S, E]`` or ``[S, E]`` for guidance with text prefixes.
      cache: what the deep block keeps: text as in `CacheSpec.parse`, a `CacheSpec`, or a callable
        ``(num_layers, batch, capacity, num_kv_heads, head_dim) → jaxeff.kv_cache.KVCache``.
      shallow_cache: the same for the shallow blocks; by default ``cache``.
      method: ``"scan"``, ``"jacobi"``, ``"slide"`` or ``"recompute"``.
      chunk: tokens of a Jacobi chunk or of the sliding window, or one number per block, data side
        first.
      threshold: relative squared change that ends the sweeps of a chunk, or of a token for
        ``"slide"``; 0 runs all of them.
      max_sweeps: for ``"jacobi"``: most sweeps of a chunk, by default 32; fewer than ``chunk`` may
        stop before convergence.
      progress: called as ``progress(block, token)`` from the running program.
      return_trace: also return an `InverseTrace`.

    Returns:
      data in the form of ``z``, float32; with ``return_trace`` also the trace.

    Raises:
      ValueError: for an unknown choice, a negative weight, or an option that would do nothing.

    Example:
      >>> from jaxeff.models.starflow import TARFlow, TARFlowConfig
      >>> flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1, 1), head_dim=8), rngs=nnx.Rngs(0))
      >>> z = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
      >>> jacobi = inverse(flow, z, method="jacobi", chunk=2, threshold=0.0)
      >>> bool(jnp.abs(inverse(flow, z) - jacobi).max() < 1e-5)
      True

    References: STARFlow (arXiv 2506.06276) §3.4, App. B.4; GS-Jacobi (arXiv 2505.12849).
    """
    if isinstance(guidance, jax.core.Tracer):
        guided = True
    else:
        if float(guidance) < 0:
            raise ValueError(f"guidance must be at least 0, got {guidance}")
        guided = float(guidance) > 0
    options = _options(
        flow, guided, guidance_kind, guide_what, guide, annealed, attn_temp, attn_temp_on,
        cache, cache if shallow_cache is None else shallow_cache,
        method, chunk, threshold, max_sweeps, progress,
    )  # fmt: skip
    batch = z.shape[0]
    condition = flow.condition(cond, batch)
    null = _null(flow, condition, null_cond, batch) if guided else Condition()
    graphdef, state = nnx.split(flow)
    x, trace = _inverse(
        graphdef, state, z, condition, null, jnp.float32(guidance), jnp.float32(threshold),
        options, return_trace,
    )  # fmt: skip
    return (x, trace) if return_trace else x


def sample(
    flow: TARFlow,
    key: Array,
    cond=None,
    *,
    batch: int | None = None,
    grid: tuple[int, int] | None = None,
    temperature: float = 1.0,
    denoise_sigma: float = 0.0,
    **options,
) -> Array:
    """Draw images: ``z ~ N(0, τ²I)``, the inverse, and optionally one Tweedie step.

    Args:
      flow: the model.
      key: PRNG key of the noise.
      cond: condition; its rows are the batch.
      batch: images; needed where ``cond`` is None.
      grid: tokens per column and row; by default the training grid.
      temperature: τ, standard deviation of the noise.
      denoise_sigma: noise that the flow was trained with; above 0 removes it from the samples.
      options: of `inverse`.

    Returns:
      images ``[B, H, W, C]``, float32.

    >>> from jaxeff.models.starflow import TARFlow, TARFlowConfig
    >>> flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1, 1), head_dim=8), rngs=nnx.Rngs(0))
    >>> sample(flow, jax.random.key(0), batch=2).shape
    (2, 4, 4, 1)
    """
    if options.get("return_trace"):
        raise ValueError("return_trace is an option of inverse; sample returns images only")
    if batch is None:
        if cond is None:
            raise ValueError("batch is needed where cond is None")
        batch = jnp.shape(cond)[0]
    rows, columns = grid or flow.config.grid
    side = flow.config.patch_size
    shape = (batch, rows * side, columns * side, flow.config.in_channels)
    x = inverse(flow, temperature * jax.random.normal(key, shape), cond, **options)
    if denoise_sigma:
        from jaxeff.models.starflow.flow import denoise

        x = denoise(flow, x, denoise_sigma, cond)
    return x


def _options(
    flow, guided, kind, what, where, annealed, attn_temp, temp_on, cache, shallow_cache,
    method, chunk, threshold, max_sweeps, progress,
) -> _Options:  # fmt: skip
    config = flow.config
    for name, value, choices in (
        ("guidance_kind", kind, GUIDANCE_KINDS),
        ("guide_what", what, ("a", "b", "ab")),
        ("guide", where, ("auto", "all", "deep")),
        ("attn_temp_on", temp_on, ("unconditional", "both")),
        ("method", method, METHODS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if attn_temp <= 0:
        raise ValueError(f"attn_temp must be above 0, got {attn_temp}")
    if attn_temp != 1 and temp_on == "unconditional" and not guided:
        raise ValueError(
            f"attn_temp {attn_temp} on the unconditional half does nothing with guidance 0; "
            'set guidance, or attn_temp_on="both"'
        )
    if kind == "score" and (annealed or what != "ab"):
        raise ValueError('annealed and guide_what apply to guidance_kind="linear" only')
    if guided and config.cond == "none" and attn_temp == 1:
        raise ValueError(
            "guidance of a flow without conditions needs attn_temp other than 1: both halves of "
            "the batch would be the same"
        )
    if guided and config.cond == "prefix_deep" and where == "all":
        raise ValueError('guide must be "deep": the shallow blocks see no condition')
    if max_sweeps is not None and method != "jacobi":
        raise ValueError(f'max_sweeps is for method="jacobi", got {max_sweeps} with {method!r}')
    max_sweeps = 32 if max_sweeps is None else max_sweeps
    if max_sweeps < 1:
        raise ValueError(f"max_sweeps must be at least 1, got {max_sweeps}")
    if threshold < 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    chunks = (chunk,) * config.num_blocks if isinstance(chunk, int) else tuple(chunk)
    if len(chunks) != config.num_blocks or min(chunks) < 1:
        raise ValueError(
            f"chunk must be one positive number or {config.num_blocks} of them, got {chunk}"
        )
    only_deep = where == "deep" or (where == "auto" and config.cond == "prefix_deep")
    deep = (False,) * (config.num_blocks - 1) + (True,)
    specs = [CacheSpec.parse(c) if isinstance(c, str) else c for c in (cache, shallow_cache)]
    return _Options(
        guided=guided,
        guided_blocks=deep if only_deep else (True,) * config.num_blocks,
        guidance_kind=kind,
        guide_what=what,
        annealed=annealed,
        attn_temp=float(attn_temp),
        cool_all=temp_on == "both",
        caches=tuple(specs[0] if is_deep else specs[1] for is_deep in deep),
        method=method,
        chunks=chunks,
        max_sweeps=max_sweeps,
        progress=progress,
    )


def _null(flow: TARFlow, condition: Condition, null_cond, batch: int) -> Condition:
    if condition.prefix is None:
        if null_cond is not None:
            raise ValueError("null_cond is for flows with prefix conditions only")
        if condition.label is None:
            return Condition()
        return Condition(label=jnp.full(batch, -1))
    if null_cond is not None:
        prefix = jnp.broadcast_to(jnp.asarray(null_cond), condition.prefix.shape)
        return Condition(prefix=prefix)
    if not flow.config.num_classes:
        raise ValueError("null_cond is needed to guide a flow with text prefixes")
    return flow.condition(None, batch)


@partial(jax.jit, static_argnums=(0, 7, 8))
def _inverse(graphdef, state, z, condition, null, weight, threshold, options: _Options, keep: bool):
    flow: TARFlow = nnx.merge(graphdef, state)
    tokens, grid = flow.to_tokens(z)
    states, sweeps = [tokens], []
    if flow.prior_var is not None:
        tokens = tokens * jnp.sqrt(flow.prior_var[...])
    for index in reversed(range(flow.config.num_blocks)):
        if flow.blocks[index] is None:
            states.append(tokens)
            sweeps.append(jnp.zeros(0, jnp.int32))
            continue
        flipped = flow.config.reversed_blocks[index]
        tokens = tokens[:, ::-1] if flipped else tokens
        with _precision(flow.precision):
            numbers = (weight, threshold)
            solver = _BlockSolver(flow, index, condition, null, numbers, grid, options)
            tokens, count = solver.solve(tokens)
        tokens = tokens[:, ::-1] if flipped else tokens
        states.append(tokens)
        sweeps.append(count)
    x = flow.from_tokens(tokens, grid) if z.ndim == 4 else tokens
    return x, InverseTrace(tuple(states), tuple(sweeps)) if keep else None


class _BlockSolver:
    """Inverts one block in its own token order; lives inside one trace."""

    def __init__(self, flow, index, condition, null, numbers, grid, options: _Options):
        self.block: FlowBlock = flow.blocks[index]
        self.attention_fn, self.grid, self.options = flow.attention_fn, grid, options
        self.flipped = flow.config.reversed_blocks[index]
        self.guided = options.guided and options.guided_blocks[index]
        (self.weight, self.threshold), self.chunk = numbers, options.chunks[index]
        self.spec = options.caches[index]
        if self.guided:
            pairs = zip(condition, null, strict=True)
            condition = Condition(*(c if c is None else jnp.concatenate([c, u]) for c, u in pairs))
        self.condition = condition

    def solve(self, z: Array) -> tuple[Array, Array]:
        """Data ``[B, N, D]`` of noise in the block's order, and the sweeps of each chunk."""
        # Slot s reads sequence[s] and gives the map of sequence[s + 1]. With a learned first input
        # that is token s; with shifted outputs the sequence starts at token 0, which stays.
        batch, _, size = z.shape
        if self.block.config.sos:
            first = jnp.broadcast_to(self.block.sos[...].astype(z.dtype), (batch, 1, size))
            target = z
        else:
            first, target = z[:, :1], z[:, 1:]
        self.steps = target.shape[1]
        self.cooling = self._cooling(batch)
        if self.options.method == "recompute":
            return self._recompute(z), jnp.full(1, self.steps, jnp.int32)
        if not self.steps:
            return z, jnp.zeros(0, jnp.int32)
        self._prepare(batch, z.shape[1])
        if self.options.method == "scan":
            x = self._scan(first[:, 0], target)
            sweeps = jnp.full(1, self.steps, jnp.int32)
        elif self.options.method == "slide":
            x, sweeps = self._slide(first, target)
        else:
            x, sweeps = self._jacobi(first, target)
        return (x if self.block.config.sos else jnp.concatenate([first, x], 1)), sweeps

    def _cooling(self, batch: int):
        tau = self.options.attn_temp
        if tau == 1 or not (self.guided or self.options.cool_all):
            return None
        rows = jnp.full((batch,), 1 / tau)
        if self.guided:
            rows = jnp.concatenate([rows if self.options.cool_all else jnp.ones(batch), rows])
        return rows[:, None, None, None]

    def _prepare(self, batch: int, num_tokens: int) -> None:
        """Allocate the caches, run the prefix through the block, and fix the tables."""
        block, config = self.block, self.block.config
        rows = batch * (2 if self.guided else 1)
        prefix = block.prefix_len
        heads, kv_heads = config.block_heads(block.deep)
        count = len(block.layers)
        if isinstance(self.spec, CacheSpec):
            size = min(self.chunk, self.steps) if self.options.method in SWEEPS else 1
            layer = partial(
                self.spec.layer, rows, prefix, self.steps, size, heads, kv_heads, config.head_dim
            )
            layers = tuple(layer() for _ in range(count))
        else:
            if self.options.method in SWEEPS:
                raise NotImplementedError(
                    "Jacobi sweeps rewrite the tokens of a chunk, which jaxeff.kv_cache cannot; "
                    'use method="scan" or a CacheSpec'
                )
            cache = self.spec(count, rows, prefix + self.steps, kv_heads, config.head_dim)
            layers = cache.layers
        angles = block.angles(self.grid, prefix)
        self.angles = None if angles is None else jnp.asarray(angles)[: prefix + self.steps]
        self.positions = block.position_table(self.flipped)
        self.vector = block.class_vector(self.condition.label, rows)
        self.prefix = prefix
        if prefix:
            h = block.embed_prefix(self.condition.prefix)
            _, layers = self._run(h, 0, layers)
        self.layers = layers

    def _run(self, h: Array, start, layers):
        """The layers over tokens at ``start …`` of the block's sequence, prefix included."""
        count = h.shape[1]
        rotation = None
        if self.angles is not None:
            rotation = jax.lax.dynamic_slice_in_dim(self.angles, start, count)
        caches = (layers, start + jnp.arange(count), self.angles)
        return self.block.run(h, rotation, caches, self.attention_fn, self.cooling)

    def _maps(self, inputs: Array, slot, layers) -> tuple[TokenMap, Any]:
        """Maps given by the inputs ``[B, T, D]`` of slots ``slot …``, guided where asked."""
        count = inputs.shape[1]
        if self.guided:
            inputs = jnp.concatenate([inputs, inputs])
        positions = self.positions
        if positions is not None:
            positions = jax.lax.dynamic_slice_in_dim(positions, slot, count)
        h = self.block.embed(inputs, positions, self.vector)
        h, layers = self._run(h, self.prefix + slot, layers)
        return self._guide(self.block.read_out(h), slot + jnp.arange(count)), layers

    def _guide(self, maps: TokenMap, slots: Array) -> TokenMap:
        if not self.guided:
            return maps
        weight = self.weight
        if self.options.annealed:
            weight = weight * ((slots + 1) / self.steps)[:, None]
        return guide(maps, weight, self.options.guidance_kind, self.options.guide_what)

    def _report(self, slot) -> None:
        if self.options.progress is not None:
            jax.debug.callback(partial(self.options.progress, self.block.index), slot)

    def _scan(self, first: Array, target: Array) -> Array:
        def step(carry, item):
            token, layers = carry
            noise, slot = item
            maps, layers = self._maps(token[:, None], slot, layers)
            x = maps.mu[:, 0] + maps.sigma[:, 0] * noise
            self._report(slot)
            return (x, layers), x

        items = (jnp.swapaxes(target, 0, 1), jnp.arange(self.steps))
        _, x = jax.lax.scan(step, (first, self.layers), items)
        return jnp.swapaxes(x, 0, 1)

    def _jacobi(self, first: Array, target: Array) -> tuple[Array, Array]:
        size = min(self.chunk, self.steps)
        whole, rest = divmod(self.steps, size)
        carry = (jnp.concatenate([first, target], 1), self.layers)  # start from x = z
        starts = jnp.arange(whole) * size
        carry, sweeps = jax.lax.scan(
            lambda c, start: self._solve_chunk(c, start, target, size), carry, starts
        )
        if rest:
            carry, last = self._solve_chunk(carry, jnp.int32(whole * size), target, rest)
            sweeps = jnp.concatenate([sweeps, last[None]])
        return carry[0][:, 1:], sweeps

    def _solve_chunk(self, carry, start, target, size: int):
        noise = jax.lax.dynamic_slice_in_dim(target, start, size, 1)
        limit = min(self.options.max_sweeps, size)  # `size` sweeps are exact

        def sweep(state):
            sequence, layers, count, _ = state
            inputs = jax.lax.dynamic_slice_in_dim(sequence, start, size, 1)
            maps, layers = self._maps(inputs, start, layers)
            new = maps.mu + maps.sigma * noise
            old = jax.lax.dynamic_slice_in_dim(sequence, start + 1, size, 1)
            square = jnp.maximum(jnp.mean(jnp.square(new)), jnp.finfo(jnp.float32).tiny)
            change = jnp.mean(jnp.square(new - old)) / square
            sequence = jax.lax.dynamic_update_slice_in_dim(sequence, new, start + 1, 1)
            return sequence, layers, count + 1, change < self.threshold

        def unfinished(state):
            return ~state[3] & (state[2] < limit)

        state = (*carry, jnp.int32(0), jnp.bool_(False))
        sequence, layers, count, _ = jax.lax.while_loop(unfinished, sweep, state)
        self._report(start)
        return (sequence, layers), count

    def _slide(self, first: Array, target: Array) -> tuple[Array, Array]:
        """Jacobi sweeps of a window that starts at the first slot whose input was not final."""
        size, steps = min(self.chunk, self.steps), self.steps
        ahead = ((0, 0), (0, size), (0, 0))
        noise = jnp.pad(target, ahead)
        sequence = jnp.pad(jnp.concatenate([first, target], 1), ahead)

        def sweep(state):
            sequence, layers, start, count = state
            begin = jnp.minimum(start, steps - size)
            inputs = jax.lax.dynamic_slice_in_dim(sequence, begin, size, 1)
            maps, layers = self._maps(inputs, begin, layers)
            near, far = (
                jax.lax.dynamic_slice_in_dim(noise, begin + skip, size, 1) for skip in (0, size)
            )
            new = maps.mu + maps.sigma * near
            old = jax.lax.dynamic_slice_in_dim(sequence, begin + 1, size, 1)
            square = jnp.maximum(jnp.mean(jnp.square(new)), jnp.finfo(jnp.float32).tiny)
            change = jnp.mean(jnp.square(new - old), (0, 2)) / square  # [size]
            settled = (change < self.threshold) | (begin + jnp.arange(size) < start)
            # The first output that still moved had settled inputs only: it is final as well.
            final = begin + 1 + jnp.cumprod(settled.astype(jnp.int32)).sum()
            # Tokens behind the window start from the map of its last one: closer than x = z.
            guess = maps.mu[:, -1:] + maps.sigma[:, -1:] * far
            new = jnp.concatenate([new, guess], 1)
            sequence = jax.lax.dynamic_update_slice_in_dim(sequence, new, begin + 1, 1)
            self._report(start)
            return sequence, layers, jnp.minimum(final, steps), count + 1

        state = (sequence, self.layers, jnp.int32(0), jnp.int32(0))
        state = jax.lax.while_loop(lambda state: state[2] < steps, sweep, state)
        return state[0][:, 1 : steps + 1], state[3][None]

    def _recompute(self, z: Array) -> Array:
        def step(x, index):
            rows = jnp.concatenate([x, x]) if self.guided else x
            maps = self.block.maps(
                rows, *self.condition, self.grid, self.flipped, self.attention_fn, self.cooling
            )
            # Token i is given by slot i − shift, whose weight an annealed schedule asks for.
            maps = self._guide(maps, jnp.arange(z.shape[1]) - self.block.shift)
            new = maps.mu + maps.sigma * z
            return x.at[:, index].set(new[:, index]), None

        x, _ = jax.lax.scan(step, z, jnp.arange(z.shape[1]))
        return x
