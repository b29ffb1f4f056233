"""Training a flow: compiled runs of steps on device-made batches, by step count or by time."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxeff import checkpoint
from jaxeff.models.starflow.config import TARFlowConfig
from jaxeff.models.starflow.flow import TARFlow, flow_loss
from jaxeff.typing import Array

__all__ = ["FlowTraining", "TrainedFlow", "fit_flow", "load_flow", "save_flow"]


@dataclasses.dataclass(frozen=True)
class FlowTraining:
    """How a flow is trained. The defaults are TARFlow's optimiser.

    Attributes:
      steps: most optimiser steps.
      learning_rate: peak learning rate.
      warmup_steps: steps of linear warm-up.
      final_rate: learning rate at the end of the cosine.
      weight_decay: decoupled, on all weights.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      clip_norm: largest global gradient norm; None does not clip.
      sigma: noise added to the data at every step, in data units.
      drop: probability of the null condition.
      latent_norm: weight of STARFlow's penalty on block inputs.
      ema_decay: decay of the averaged weights; 0 keeps none.
      time_budget: seconds after which training ends, compilation included; the learning rate then
        follows the time used. None goes by steps alone.
      steps_per_call: steps compiled into one program; the log has one line per call.
      seed: seed of batches, noise and label dropout.

    Raises:
      ValueError: for a number out of range.

    >>> FlowTraining(steps=100).rate(1, 0.5) > 5e-7
    True
    """

    steps: int
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    final_rate: float = 1e-6
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float | None = None
    sigma: float = 0.0
    drop: float = 0.0
    latent_norm: float = 0.0
    ema_decay: float = 0.0
    time_budget: float | None = None
    steps_per_call: int = 10
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup_steps < 0 or self.learning_rate <= 0 or self.final_rate < 0:
            raise ValueError(
                "warmup_steps and final_rate must not be negative and learning_rate positive, got "
                f"{self.warmup_steps}, {self.final_rate} and {self.learning_rate}"
            )
        if self.time_budget is not None and self.time_budget <= 0:
            raise ValueError(f"time_budget must be positive seconds, got {self.time_budget}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of a step: linear warm-up, then a cosine over ``progress`` in [0, 1]."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return warm * (self.final_rate + (self.learning_rate - self.final_rate) * cosine)


class TrainedFlow(NamedTuple):
    """Result of `fit_flow`.

    Attributes:
      flow: the last weights.
      averaged: the averaged weights as a flow, or the same flow without averaging.
      losses: float ``[steps]``, NLL per dimension in nats without the constant.
      seconds: wall time, compilation included.
      step_seconds: median wall time of a step after compilation.
    """

    flow: TARFlow
    averaged: TARFlow
    losses: np.ndarray
    seconds: float
    step_seconds: float


def fit_flow(
    flow: TARFlow,
    batch_fn: Callable[[Array], tuple[Array, Any]],
    training: FlowTraining,
    *,
    log_path: str | Path | None = None,
    description: str = "",
    on_call: Callable[[int, TARFlow], None] | None = None,
) -> TrainedFlow:
    """Train a flow on batches that ``batch_fn`` makes on the device.

    AdamW on `flow_loss`; several steps are one compiled scan, so that a small model is not held up
    by dispatch. A non-finite loss stops the run.

    Args:
      flow: the model; its weights are the start and are not changed.
      batch_fn: pure function of a PRNG key giving ``(x, cond)``; traced once.
      training: how to train.
      log_path: JSON lines with step, loss, rate and seconds.
      description: text of the progress bar; empty shows none.
      on_call: called with the step and the current flow after each compiled call.

    Returns:
      `TrainedFlow`.

    Raises:
      FloatingPointError: when the loss is not finite, with the step.

    >>> config = TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8)
    >>> make = lambda key: (jax.random.normal(key, (8, 4, 4, 1)), None)
    >>> start = TARFlow(config, rngs=nnx.Rngs(0))
    >>> fit_flow(start, make, FlowTraining(steps=2, steps_per_call=1)).losses.shape
    (2,)

    References: TARFlow (arXiv 2412.06329) App. A; STARFlow (arXiv 2506.06276) App. B.2.
    """
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)  # donated below; the caller's weights must survive
    optimizer = _optimizer(training.clip_norm, training.b1, training.b2, training.weight_decay)
    average = jax.tree.map(jnp.copy, params) if training.ema_decay else None
    carry = (params, optimizer.init(params), average)
    fixed = (training.drop, training.latent_norm, training.ema_decay)
    run = partial(_run_steps, graphdef, optimizer, batch_fn, fixed)
    numbers = (jnp.float32(training.sigma), jax.random.key(training.seed))
    started, step, losses, times = time.perf_counter(), 0, [], []
    with _progress(description, training.steps) as bar, _log(log_path) as log:
        while step < training.steps:
            count = min(training.steps_per_call, training.steps - step)
            spent = (time.perf_counter() - started) / (training.time_budget or math.inf)
            if spent >= 1:
                break
            used = max(spent, step / training.steps)
            rates = [training.rate(step + i, used + i / training.steps) for i in range(count)]
            before = time.perf_counter()
            carry, values = run(rest, carry, jnp.asarray(rates, jnp.float32), step, numbers)
            values = np.asarray(values)
            times.append((time.perf_counter() - before) / count)
            step += count
            losses.append(values)
            if not np.isfinite(values).all():
                raise FloatingPointError(f"loss is not finite within steps {step - count}..{step}")
            log({"step": step, "loss": float(values.mean()), "rate": rates[-1],
                 "seconds": time.perf_counter() - started})  # fmt: skip
            bar(step, float(values.mean()))
            if on_call is not None:
                on_call(step, nnx.merge(graphdef, carry[0], rest))
    seconds = time.perf_counter() - started
    trained = nnx.merge(graphdef, carry[0], rest)
    averaged = nnx.merge(graphdef, carry[2], rest) if training.ema_decay else trained
    return TrainedFlow(
        trained, averaged, np.concatenate(losses), seconds, float(np.median(times[1:] or times))
    )


@cache
def _optimizer(clip_norm: float | None, b1: float, b2: float, weight_decay: float):
    """AdamW without its learning rate; the same object for the same numbers, so that jit hits."""
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    adam = optax.scale_by_adam(b1=b1, b2=b2)
    return optax.chain(*clip, adam, optax.add_decayed_weights(weight_decay))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _run_steps(graphdef, optimizer, batch_fn, fixed, rest, carry, rates, first, numbers):
    # Noise and seed are arguments: continuing a run without noise compiles nothing.
    drop, latent_norm, ema_decay = fixed
    sigma, seed_key = numbers

    def loss_fn(params, x, cond, key):
        flow = nnx.merge(graphdef, params, rest)
        x = x + sigma * jax.random.normal(jax.random.fold_in(key, 0), x.shape)
        loss, metrics = flow_loss(flow, x, cond, key=key, drop=drop, latent_norm=latent_norm)
        return loss, metrics["nll"]

    def one(carry, item):
        params, state, average = carry
        rate, index = item
        key = jax.random.fold_in(seed_key, first + index)
        data_key, noise_key = jax.random.split(key)
        x, cond = batch_fn(data_key)
        (_, nll), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, x, cond, noise_key)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
        if average is not None:
            # A young average follows faster, so that the start does not linger in it.
            count = (first + index).astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return (params, state, average), nll

    return jax.lax.scan(one, carry, (rates, jnp.arange(rates.shape[0])))


class _progress:
    """A rich progress bar with the live loss, or nothing without a description."""

    def __init__(self, description: str, steps: int):
        self.bar, self.steps, self.description = None, steps, description
        if description:
            from rich.console import Console
            from rich.progress import Progress

            console = Console()
            # In a file or a notebook a bar leaves lines of noise.
            self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.description, total=self.steps)
        return self.update

    def update(self, step: int, loss: float) -> None:
        if self.bar is not None:
            text = f"{self.description} loss {loss:.3f}"
            self.bar.update(self.task, completed=step, description=text)

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()


class _log:
    """JSON lines, or nothing without a path."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __enter__(self):
        if self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a")
        return self.write

    def write(self, line: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def __exit__(self, *_):
        if self.file is not None:
            self.file.close()


def save_flow(path: str | Path, flow: TARFlow, metadata: dict | None = None) -> None:
    """Write weights and configuration of a flow.

    Args:
      path: folder to write.
      flow: the model.
      metadata: plain values kept beside the configuration, for example ``{"sigma": 0.1}``.
    """
    facts = {"kind": "starflow", "config": flow.config.to_dict(), "metadata": metadata or {}}
    checkpoint.save(path, nnx.to_pure_dict(nnx.state(flow)), facts)


def load_flow(path: str | Path, **kwargs) -> tuple[TARFlow, dict]:
    """Read a folder written by `save_flow`.

    Args:
      path: the folder.
      kwargs: of `TARFlow` (dtype, attention_fn, …).

    Returns:
      the flow and its metadata.

    Raises:
      ValueError: when the folder holds another kind of model.
    """
    facts = checkpoint.load_metadata(path)
    if facts.get("kind") != "starflow":
        raise ValueError(
            f"{path} holds {facts.get('kind', 'another model')!r}, expected 'starflow'"
        )
    flow = TARFlow(TARFlowConfig(**facts["config"]), rngs=nnx.Rngs(0), **kwargs)
    state = nnx.state(flow)
    pure = checkpoint.restore(path, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(flow, state)
    return flow, facts["metadata"]
