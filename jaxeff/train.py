"""A plain training loop for next-token prediction: one compiled step, a log, exact resume."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxeff import checkpoint
from jaxeff.optim import (
    in_float32,
    qaf_schedule,
    quantize_state,
    stochastic_round_updates,
    warmup_cosine,
)
from jaxeff.quant import AmaxHistory, advance_history, fold_step, set_phase

NATS_PER_BIT = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train; hashable.

    Args:
      steps: optimiser steps.
      learning_rate: peak, after warm-up.
      warmup_steps: linear warm-up; None takes 5 % of the steps, at most 200.
      final_fraction: last learning rate relative to the peak.
      b1, b2: AdamW's decay rates of the moments.
      weight_decay: per unit of learning rate, on parameters with at least two dimensions.
      clip_norm: largest global gradient norm, or None.
      stochastic_rounding: whether bfloat16 parameters are updated by stochastic rounding, with
        moments in float32 and no float32 copy.
      optimizer_state: None for float32 moments, or a codec of ``jaxeff.optim.quantize_state``
        (``"dynamic8"``, ``"fp8_e4m3"``, ``"int8"``).
      qaf_start: step at which recipes made by ``Recipe.with_qaf`` enter their second phase, with
        the learning rate of ``jaxeff.optim.qaf_schedule``; None for never.
      qaf_peak: peak learning rate of that phase; None takes ``learning_rate``.
      seed: seed of the roundings of parameters and moments.
      log_every: steps between lines of the log and of the progress bar.
      checkpoint_every: steps between checkpoints; None writes one at the end only.
      keep_checkpoints: how many checkpoints stay on disk.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> TrainConfig(steps=1000, learning_rate=2e-3).resolved_warmup
      50
    """

    steps: int
    learning_rate: float
    warmup_steps: int | None = None
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    stochastic_rounding: bool = False
    optimizer_state: str | None = None
    qaf_start: int | None = None
    qaf_peak: float | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self):
        for name in ("steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        self.schedule()  # raises ValueError for the rest

    @property
    def resolved_warmup(self) -> int:
        """Warm-up steps that are really used."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(self.steps // 20, 200)

    def schedule(self) -> Callable:
        """Learning rate by step."""
        base = warmup_cosine(
            self.learning_rate,
            self.steps,
            warmup_steps=self.resolved_warmup,
            final_fraction=self.final_fraction,
        )
        if self.qaf_start is None:
            return base
        if not 0 <= self.qaf_start < self.steps:
            raise ValueError(f"qaf_start must lie in [0, {self.steps}), got {self.qaf_start}")
        steps = self.steps - self.qaf_start
        return qaf_schedule(
            base,
            self.qaf_start,
            steps=steps,
            peak=self.learning_rate if self.qaf_peak is None else self.qaf_peak,
            warmup_steps=min(40, steps // 2),
            final_fraction=self.final_fraction,
        )

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """AdamW with clipping and schedule, as optax transformation."""
        adamw = optax.adamw(
            self.schedule(),
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
        )
        if self.optimizer_state is not None:
            adamw = quantize_state(adamw, self.optimizer_state, seed=self.seed)
        parts = [adamw]
        if self.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
        if not self.stochastic_rounding:
            return optax.chain(*parts)
        return optax.chain(in_float32(optax.chain(*parts)), stochastic_round_updates(self.seed))


class TrainState(NamedTuple):
    """Everything that changes during training; a pytree.

    Fields: ``params`` (nnx State of nnx.Param), ``rest`` (all other model state, such as rounding
    keys), ``opt_state`` (optax), ``step`` (int32 scalar, steps done).
    """

    params: Any
    rest: Any
    opt_state: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run measured.

    Args:
      losses: float32 ``[steps run]``, nats per token, before each step's update.
      grad_norms: float32 ``[steps run]``, before clipping.
      start_step: steps that were already done when a run was resumed.
      seconds: wall time of all steps except the first.
      compile_seconds: wall time of the first step, which compiles.
      tokens_per_second: over the steps after the first.
    """

    losses: np.ndarray
    grad_norms: np.ndarray
    start_step: int
    seconds: float
    compile_seconds: float
    tokens_per_second: float


def next_token_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Mean cross entropy ``-log softmax(logits)[target]`` in float32.

    Args:
      logits: floating ``[B, T, V]``.
      targets: integers ``[B, T]`` in ``[0, V)``.

    Returns:
      float32 scalar, nats per token.

    Example:
      >>> float(next_token_loss(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int))).__round__(4)
      1.3863
    """
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation
) -> tuple[Any, TrainState]:
    """Splits a model into its static graph and a fresh TrainState.

    Args:
      model: any NNX module with ``model(tokens [B, T]) -> logits [B, T, V]``.
      optimizer: an optax transformation.

    Returns:
      The graph definition and the state at step 0.

    Raises:
      ValueError: if the model has no parameters.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"model {type(model).__name__} has no parameters")
    return graph, TrainState(params, rest, optimizer.init(params), jnp.zeros((), jnp.int32))


def train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens: jax.Array,
    *,
    qaf_start: int | jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step; pure, to be compiled with the first two arguments static.

    Stochastic rounding draws from the layer's key folded with ``state.step``. Amax histories of
    delayed scaling advance by one.

    Args:
      graph: static part of the model, from ``init_state``.
      optimizer: the optax transformation.
      state: the TrainState, from ``init_state`` or the step before.
      tokens: integers ``[B, T + 1]``: inputs and, shifted by one, targets.
      qaf_start: step from which the second phase of the recipes holds, may be traced; None leaves
        the phase as it is.

    Returns:
      The next TrainState, and ``{"loss": nats per token, "grad_norm": before clipping}``.
    """

    rest = fold_step(state.rest, state.step)
    if qaf_start is not None:
        rest = set_phase(rest, state.step >= qaf_start)
    history, rest = nnx.split_state(rest, AmaxHistory, ...)

    def loss_of(params, history):
        # Copies: nnx.scan refuses variables that were made outside of this trace.
        model = nnx.merge(graph, params, history, rest, copy=True)
        loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        return loss, nnx.split(model, nnx.Param, AmaxHistory, ...)[3]

    (loss, rest), (grads, seen) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
        state.params, history
    )
    rest = nnx.merge_state(advance_history(history, seen), rest)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": _global_norm(grads)}
    return TrainState(params, rest, opt_state, state.step + 1), metrics


def _global_norm(tree: Any) -> jax.Array:
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def fit(
    model: nnx.Module,
    batches: Iterable[np.ndarray],
    config: TrainConfig,
    *,
    log_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    on_step: Callable[[int, float], None] | None = None,
    description: str = "train",
    console: Any = None,
    progress: bool = True,
) -> TrainResult:
    """Trains a model in place.

    The step is compiled once, with its state donated. A resumed run continues with the same losses
    as an uninterrupted one: parameters, moments, rounding keys and step are restored, and batches
    are skipped.

    Args:
      model: any NNX module with ``model(tokens [B, T]) -> logits [B, T, V]``; a recipe, if wanted,
        is applied before.
      batches: iterable of integers ``[B, T + 1]``, such as ``jaxeff.data.batches(...)``. The same
        iterable must be given when resuming; one with ``skip(n)`` is not read up to step ``n``.
      config: lengths and rates.
      log_path: JSON-lines file, appended to on resume: step, loss (nats per token), bits per byte
        (equal to bits per token; the models here read bytes), gradient norm, learning rate,
        tokens per second, seconds.
      checkpoint_dir: directory for checkpoints ``step_00000100``; None writes none.
      resume: whether to continue from the last checkpoint in ``checkpoint_dir``, if there is one.
      sharding: of every batch, for example ``NamedSharding(mesh, P("data"))``; the state is
        replicated over its mesh, unless it already lies on that mesh.
      on_step: called as ``on_step(step, loss)`` for every step, possibly late: losses are fetched
        every ``log_every`` steps.
      description: text in front of the progress bar.
      console: a rich Console for the progress bar, or None for a new one.
      progress: whether a progress bar is drawn.

    Returns:
      A TrainResult.

    Raises:
      ValueError: if ``resume`` comes without ``checkpoint_dir``, a checkpoint does not fit, or the
        batches end early or have another rank or dtype.
      FloatingPointError: if the loss is no longer finite; the model keeps its last state.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs checkpoint_dir")
    graph, state = init_state(model, config.optimizer())
    if sharding is not None:
        state = _replicated(state, sharding)
    state = _start(state, _last_checkpoint(checkpoint_dir) if resume else None)
    start = int(state.step)
    run = _Run(config, start, log_path, resume, on_step)
    bar = _progress_bar(config, start, description, console, progress)
    try:
        with bar as show, run:
            for tokens in _take(batches, start, config.steps):
                tokens = _on_device(tokens, sharding)
                state, metrics = _compiled_step(graph, config, state, tokens)
                run.record(metrics, tokens, show)
                done = start + run.count
                if checkpoint_dir is not None and _is_due(done, config):
                    run.flush(show)
                    _write_checkpoint(checkpoint_dir, done, state, config)
            run.flush(show)
    finally:
        # Also after an error or an interrupt the model holds what was trained so far.
        nnx.update(model, state.params, state.rest)
    return run.result()


def evaluate(model: nnx.Module, batches: Iterable[np.ndarray], attention_fn: Any = None) -> float:
    """Mean next-token loss over batches.

    Args:
      model: any NNX module with ``model(tokens [B, T]) -> logits [B, T, V]``.
      batches: finite iterable of integers ``[B, T + 1]``; each shape is compiled once.
      attention_fn: passed on as ``model(tokens, attention_fn=attention_fn)`` if not None; one
        callable, or one per layer.

    Returns:
      Nats per token, every token counted once.

    Raises:
      ValueError: if there are no batches, or one has another rank or dtype.
    """
    graph, state = nnx.split(model)
    attention_fn = tuple(attention_fn) if isinstance(attention_fn, list) else attention_fn
    total, count = 0.0, 0
    for tokens in batches:
        tokens = _on_device(tokens, None)
        loss = _evaluate_batch(graph, attention_fn, state, tokens)
        size = tokens.shape[0] * (tokens.shape[1] - 1)
        total, count = total + float(loss) * size, count + size
    if count == 0:
        raise ValueError("batches is empty: expected at least one batch [B, T + 1]")
    return total / count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_batch(graph, attention_fn, state, tokens):
    model = nnx.merge(graph, state)
    options = {} if attention_fn is None else {"attention_fn": attention_fn}
    return next_token_loss(model(tokens[:, :-1], **options), tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _compiled_step(graph, config, state, tokens):
    """Compiled once per model and configuration: further runs, of other seeds, share it."""
    return train_step(graph, config.optimizer(), state, tokens, qaf_start=config.qaf_start)


# --- batches and devices ------------------------------------------------------------------------


def _take(batches: Iterable, start: int, steps: int) -> Iterator:
    """Batches ``start`` to ``steps``; raises if there are fewer."""
    if hasattr(batches, "skip"):
        stream = iter(batches.skip(start))
    else:
        stream = itertools.islice(iter(batches), start, None)
    for index in range(start, steps):
        try:
            yield next(stream)
        except StopIteration:
            raise ValueError(
                f"batches ended after {index}; config.steps={steps} needs as many batches"
            ) from None


def _on_device(tokens, sharding) -> jax.Array:
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"batches must be integers [B, T + 1] with T ≥ 1, got {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    return jnp.asarray(tokens) if sharding is None else jax.device_put(tokens, sharding)


def _replicated(state, sharding):
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    def place(leaf):
        on_mesh = getattr(leaf.sharding, "mesh", None) == sharding.mesh
        return leaf if on_mesh else jax.device_put(leaf, replicated)

    return jax.tree.map(place, state)


# --- records ------------------------------------------------------------------------------------


class _Run:
    """Collects metrics; leaves them on the device until a line of the log is due."""

    def __init__(self, config, start, log_path, append, on_step):
        self._config, self._start, self._on_step = config, start, on_step
        self._schedule = config.schedule()
        self._log_path, self._append = log_path, append
        self._log = None
        self._pending, self._losses, self._norms = [], [], []
        self.count = 0
        self._tokens = 0
        self._began = time.perf_counter()
        self._first_done = None
        self._ended = self._began

    def __enter__(self):
        if self._log_path is not None:
            path = Path(self._log_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a" if self._append else "w")
        return self

    def __exit__(self, *_):
        if self._log is not None:
            self._log.close()

    def record(self, metrics, tokens, show):
        """Notes one step; the first one is waited for, because it compiles."""
        self._pending.append(metrics)
        self.count += 1
        if self._first_done is None:
            jax.block_until_ready(metrics)
            self._first_done = time.perf_counter()
        else:
            self._tokens += tokens.shape[0] * (tokens.shape[1] - 1)
        if self.count % self._config.log_every == 0 or self.count == 1:
            self.flush(show)

    def flush(self, show):
        """Fetches pending metrics, checks them, and writes one line."""
        if not self._pending:
            return
        fetched = jax.device_get(self._pending)
        first = self._start + len(self._losses)
        self._pending = []
        for offset, metrics in enumerate(fetched):
            loss = float(metrics["loss"])
            self._losses.append(loss)
            self._norms.append(float(metrics["grad_norm"]))
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {first + offset}")
            if self._on_step is not None:
                self._on_step(first + offset, loss)
        self._ended = time.perf_counter()
        self._write_line()
        show(self.count, self._losses[-1], self.tokens_per_second)

    def _write_line(self):
        if self._log is None:
            return
        step = self._start + len(self._losses) - 1
        line = {
            "step": step,
            "loss": self._losses[-1],
            "bits_per_byte": self._losses[-1] / NATS_PER_BIT,
            "grad_norm": self._norms[-1],
            "learning_rate": float(self._schedule(step)),
            "tokens_per_second": self.tokens_per_second,
            "seconds": self._ended - self._began,
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    @property
    def seconds(self) -> float:
        """Wall time after the first step."""
        return 0.0 if self._first_done is None else max(self._ended - self._first_done, 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Over the steps after the first; 0 before the second."""
        return self._tokens / self.seconds if self._tokens and self.seconds else 0.0

    def result(self) -> TrainResult:
        """The numbers of the run."""
        compiling = 0.0 if self._first_done is None else self._first_done - self._began
        return TrainResult(
            np.asarray(self._losses, np.float32),
            np.asarray(self._norms, np.float32),
            self._start,
            self.seconds,
            compiling,
            self.tokens_per_second,
        )


@contextlib.contextmanager
def _progress_bar(config, start, description, console, visible):
    from rich import progress as rich_progress

    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[numbers]}"),
        rich_progress.TimeElapsedColumn(),
        console=console,
        disable=not visible,
    )
    with bar:
        task = bar.add_task(description, total=config.steps, completed=start, numbers="compiling")

        def show(count, loss, speed):
            numbers = f"loss {loss:.3f}  {loss / NATS_PER_BIT:.3f} bits/byte  {speed:,.0f} tokens/s"
            bar.update(task, completed=start + count, numbers=numbers)

        yield show


# --- checkpoints --------------------------------------------------------------------------------


def _start(state: TrainState, path: Path | None) -> TrainState:
    if path is not None:
        return checkpoint.restore(path, state)
    # Donating the arrays that the model holds would delete them.
    return jax.tree.map(jnp.copy, state)


def _is_due(done: int, config: TrainConfig) -> bool:
    every = config.checkpoint_every
    return done == config.steps or (every is not None and done % every == 0)


def _checkpoints(directory) -> list[Path]:
    return sorted(path for path in Path(directory).glob("step_*") if path.name[5:].isdigit())


def _last_checkpoint(directory) -> Path | None:
    found = _checkpoints(directory)
    return found[-1] if found else None


def _write_checkpoint(directory, step: int, state: TrainState, config: TrainConfig) -> None:
    import shutil

    metadata = {"step": step, "config": dataclasses.asdict(config)}
    checkpoint.save(Path(directory) / f"step_{step:08d}", state, metadata, overwrite=True)
    for old in _checkpoints(directory)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
