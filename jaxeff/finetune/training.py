"""Train the adapters of a model: gradients for them alone, frozen weights neither copied nor kept.

The loop of ``jaxeff.train`` trains every ``nnx.Param`` and copies the model first; here the frozen
weights are read in place, and FALQON's weights are rewritten after every step.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxeff import checkpoint
from jaxeff.finetune import head
from jaxeff.finetune.adapt import adapted_layers
from jaxeff.finetune.layers import FalqonLinear, MeldedWeight
from jaxeff.finetune.melded import scales_of
from jaxeff.finetune.methods import FALQON
from jaxeff.optim.falqon import FalqonState, Melded, falqon, write_rows_of_all
from jaxeff.quant import fold_step
from jaxeff.train import TrainConfig, TrainResult


class FinetuneState(NamedTuple):
    """Everything that changes during finetuning; a pytree. The frozen weights are not in it.

    Fields: ``params`` (nnx State of nnx.Param: the adapters), ``melded`` (FALQON's weights by
    layer), ``opt_state`` (of the adapters), ``falqon_state`` (FalqonState over ``[layers, n, r]``
    by shape of the weight, or None without FALQON layers), ``step`` (int32 scalar, steps done),
    ``history`` (float32 ``[layers, 2, 16]``, magnitudes for delayed scaling, or None), ``noted``
    (nnx State of what the forward pass changes: counts of dropout, statistics of BatchNorm).
    """

    params: Any
    melded: dict[str, Melded]
    opt_state: Any
    falqon_state: FalqonState | None
    step: jax.Array
    history: jax.Array | None = None
    noted: Any = None


#: Variables that a forward pass changes.
_NOTED = nnx.Any(nnx.RngState, nnx.BatchStat)


class Static(NamedTuple):
    """What a step needs that never changes and is no array; hashable.

    Fields: ``graph`` (of the model), ``optimizer`` (of the adapters), ``falqon`` (of the virtual
    ``B``), ``requant`` (name), ``seed`` (of stochastic rounding).
    """

    graph: Any
    optimizer: optax.GradientTransformation
    falqon: optax.GradientTransformation | None
    requant: str
    seed: int


def finetune_config(steps: int, learning_rate: float, **fields: Any) -> TrainConfig:
    """The published settings of FALQON and QLoRA: constant rate, no decay, b2 .999, clip at 3.

    Args:
      steps: optimiser steps.
      learning_rate: constant.
      **fields: other fields of ``TrainConfig``, which replace these.

    Returns:
      A ``TrainConfig``.

    >>> finetune_config(100, 2e-3).schedule()(99)
    Array(0.002, dtype=float32, weak_type=True)

    References: FALQON (arXiv:2510.24061), released training script.
    """
    settings = {
        "warmup_steps": 0,
        "final_fraction": 1.0,
        "b2": 0.999,
        "weight_decay": 0.0,
        "clip_norm": 3.0,
    }
    return TrainConfig(steps=steps, learning_rate=learning_rate, **(settings | fields))


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> tuple[Static, FinetuneState, Any]:
    """Splits an adapted model into static facts, a fresh state and the frozen weights.

    Args:
      model: a model after ``adapt``.
      optimizer: for the adapters and, inside ``jaxeff.optim.falqon``, for FALQON's virtual ``B``.
      seed: seed of stochastic rounding.

    Returns:
      ``(static, state, frozen)`` for ``train_step``.

    Raises:
      ValueError: nothing is adapted, or FALQON layers differ in more than rank and start.
    """
    if not adapted_layers(model):
        raise ValueError(f"model {type(model).__name__} has no adapted layer: call adapt first")
    graph, params, melded, noted, frozen = nnx.split(model, nnx.Param, MeldedWeight, _NOTED, ...)
    weights = _melded_dict(melded)
    transform, falqon_state, history, method = None, None, None, _common_method(model)
    if method is not None:
        transform = falqon(
            optimizer,
            k=method.k,
            requant=method.requant,
            leftover=method.leftover,
            gain=method.factor,
        )
        falqon_state = transform.init(_stacked(_probes(weights), weights))
        if method.scaling == "delayed":
            history = jnp.zeros((len(weights), 2, _HISTORY), jnp.float32)
    requant = "rtn" if method is None else method.requant
    state = FinetuneState(
        params,
        weights,
        optimizer.init(params),
        falqon_state,
        jnp.zeros((), jnp.int32),
        history,
        noted,
    )
    return Static(graph, optimizer, transform, requant, seed), state, frozen


def train_step(
    static: Static, state: FinetuneState, frozen: Any, tokens: jax.Array
) -> tuple[FinetuneState, dict[str, jax.Array]]:
    """One step of all adapters; pure, to be compiled with the first argument static.

    Donate ``state``, not ``frozen``: the frozen weights are read and never returned.

    Args:
      static: from ``init_state``.
      state: from ``init_state`` or the step before.
      frozen: from ``init_state``.
      tokens: integers ``[B, T + 1]``: inputs and, shifted by one, targets.

    Returns:
      The next state, and ``{"loss": nats per token, "grad_norm": of all adapters, before
      clipping}``.
    """

    def loss_of(trained):
        params, probes, scales = trained
        rest = state.noted, fold_step(frozen, state.step)
        model = _merge(static.graph, params, state.melded, *rest)
        layers, leaders = adapted_layers(model), []
        for index, (name, probe) in enumerate(probes.items()):
            layers[name][1].probe = probe
            if scales is not None:
                layers[name][1].scales = functools.partial(_scales, scales[index], leaders)
        loss = head.loss_of(model, tokens)
        return loss, nnx.state(model, _NOTED) if jax.tree.leaves(state.noted) else state.noted

    scales = None if state.history is None else list(scales_of(state.history))
    trained = (state.params, _probes(state.melded), scales)
    (loss, noted), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    grads, probe_grads, seen = gradients
    probe_grads = _stacked(probe_grads, state.melded)
    metrics = {"loss": loss, "grad_norm": _norm((grads, probe_grads))}
    updates, opt_state = static.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    melded, falqon_state, history = state.melded, state.falqon_state, state.history
    if static.falqon is not None:
        _, falqon_state = static.falqon.update(probe_grads, falqon_state)
        key = jax.random.fold_in(jax.random.key(static.seed), state.step)
        melded = _melded_groups(melded, falqon_state, static.requant, key)
    if history is not None:
        newest = jnp.stack(seen)
        newest = jnp.where(jnp.isfinite(newest), newest, 0.0)[..., None]
        history = jnp.concatenate([newest, history[..., :-1]], -1)
    step = state.step + 1
    return FinetuneState(params, melded, opt_state, falqon_state, step, history, noted), metrics


_HISTORY = 16  # steps whose largest magnitude makes a scale


def _scales(own, leaders, inputs):
    """A layer's scales; layers with the same inputs share the first one's, and so its codes."""
    for other, scale in leaders:
        if other is inputs:
            return jnp.stack([jax.lax.stop_gradient(scale), own[1]])
    leaders.append((inputs, own[0]))
    return own


def _groups(weights: dict[str, Melded]) -> dict[str, list[str]]:
    """Names of the weights of one shape, which are updated together: one kernel for all."""
    groups: dict[str, list[str]] = {}
    for name, melded in weights.items():
        key = "x".join(map(str, (*melded.shape, melded.rank)))
        groups.setdefault(key, []).append(name)
    return groups


def _stacked(arrays: dict[str, jax.Array], weights: dict[str, Melded]) -> dict[str, jax.Array]:
    return {
        key: jnp.stack([arrays[name] for name in names]) for key, names in _groups(weights).items()
    }


def _melded_groups(weights, state, requant, key):
    """All weights after a step, in the order they had."""
    new = {}
    for index, (group, names) in enumerate(_groups(weights).items()):
        own = jax.random.fold_in(key, index) if requant == "sr" else None
        old = [weights[name] for name in names]
        rows, delta = state.rows[group], state.delta[group]
        written = write_rows_of_all(old, rows, delta, requant=requant, key=own)
        new.update(zip(names, written, strict=True))
    return {name: new[name] for name in weights}


def fit(
    model: nnx.Module,
    batches: Iterable[np.ndarray],
    config: TrainConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    log_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Finetunes an adapted model in place.

    The step is compiled once. Frozen weights are read where they are; the codes of FALQON layers
    are donated, so another model that shares them (from ``nnx.split`` and ``nnx.merge``) is
    invalid afterwards. A resumed run continues as an uninterrupted one.

    Args:
      model: a model after ``adapt``, with ``model(tokens [B, T]) -> logits [B, T, V]``.
      batches: iterable of integers ``[B, T + 1]``, such as ``jaxeff.data.batches(...)``; one with
        ``skip(n)`` is not read up to step ``n`` when resuming.
      config: lengths and rates, see ``finetune_config``.
      optimizer: replaces ``config.optimizer()``.
      log_path: JSON-lines file: step, loss (nats per token), gradient norm, seconds.
      checkpoint_dir: directory for checkpoints of the adapters and FALQON's weights.
      resume: whether to continue from the last checkpoint there, if there is one.
      on_step: called as ``on_step(step, loss)`` every ``config.log_every`` steps.

    Returns:
      A ``TrainResult``.

    Raises:
      ValueError: the model is not adapted, or the batches end early.
      FloatingPointError: the loss is no longer finite; the model keeps its last state.
    """
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs checkpoint_dir")
    optimizer = config.optimizer() if optimizer is None else optimizer
    static, state, frozen = init_state(model, optimizer, seed=config.seed)
    # Adapters are small; donating those that the model holds would delete them.
    params, noted = jax.tree.map(jnp.copy, (state.params, state.noted))
    state = state._replace(params=params, noted=noted)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if resume and (last := _last_checkpoint(folder)) is not None:
        state = checkpoint.restore(last, state)
    start = int(state.step)
    step = jax.jit(functools.partial(train_step, static), donate_argnums=0)
    stream = iter(batches.skip(start) if hasattr(batches, "skip") else batches)
    losses, norms, tokens_seen = [], [], 0
    began = first_done = ended = time.perf_counter()
    try:
        for index in range(start, config.steps):
            tokens = next(stream, None)
            if tokens is None:
                raise ValueError(f"batches ended after {index}; config.steps={config.steps}")
            state, metrics = step(state, frozen, jnp.asarray(tokens))
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
            done = index + 1
            if index == start:
                jax.block_until_ready(metrics)
                first_done = time.perf_counter()
            else:
                tokens_seen += tokens.shape[0] * (tokens.shape[1] - 1)
            if done % config.log_every == 0 or done == config.steps:
                loss = float(metrics["loss"])
                ended = time.perf_counter()
                _report(log_path, index, loss, float(metrics["grad_norm"]), ended - began, on_step)
            every = config.checkpoint_every
            if folder and (done == config.steps or (every and done % every == 0)):
                checkpoint.save(folder / f"step_{done:08d}", state, {"step": done}, overwrite=True)
    finally:
        write_back(model, state)
    seconds = max(ended - first_done, 0.0)
    return TrainResult(
        np.asarray(jax.device_get(losses), np.float32),
        np.asarray(jax.device_get(norms), np.float32),
        start,
        seconds,
        first_done - began,
        tokens_seen / seconds if seconds and tokens_seen else 0.0,
    )


def _norm(tree: Any) -> jax.Array:
    squares = (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares))


def _report(log_path, index, loss, norm, seconds, on_step):
    if log_path is not None:
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        line = {"step": index, "loss": loss, "grad_norm": norm, "seconds": seconds}
        with Path(log_path).open("a") as log:
            log.write(json.dumps(line) + "\n")
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {index}")
    if on_step is not None:
        on_step(index, loss)


def _last_checkpoint(folder: Path) -> Path | None:
    found = sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit())
    return found[-1] if found else None


def _common_method(model: nnx.Module) -> FALQON | None:
    """The settings that one step shares between all FALQON layers; None without such layers."""
    methods = {
        name: layer.method
        for name, (_, layer) in adapted_layers(model).items()
        if isinstance(layer, FalqonLinear)
    }
    if not methods:
        return None
    first = next(iter(methods.values()))
    for name, method in methods.items():
        for field in ("k", "requant", "leftover", "factor", "scaling"):
            ours, theirs = getattr(method, field), getattr(first, field)
            if ours != theirs:
                raise ValueError(
                    f"FALQON layers must agree in {field}: {name!r} has {ours!r}, another "
                    f"{theirs!r}"
                )
    return first


def _probes(weights: dict[str, Melded]) -> dict[str, jax.Array]:
    return {name: jnp.zeros((m.shape[0], m.rank), jnp.float32) for name, m in weights.items()}


def _melded_dict(state: Any) -> dict[str, Melded]:
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path[:-1])): variable.get_value() for path, variable in flat}


def _merge(graph, params, melded, *rest) -> nnx.Module:
    # Only names go in: the graph knows where each variable is.
    flat = {
        (*(int(p) if p.isdigit() else p for p in name.split(".")), "weight"): MeldedWeight(value)
        for name, value in melded.items()
    }
    # Copies: dropout and nnx.scan refuse variables that were made outside of this trace.
    return nnx.merge(graph, params, nnx.from_flat_state(flat), *rest, copy=True)


def write_back(model: nnx.Module, state: FinetuneState) -> None:
    """Puts the trained parameters and the rewritten weights of a state into the model.

    Args:
      model: the model that the state was made from; changed in place.
      state: as ``train_step`` returns it.
    """
    nnx.update(model, state.params, state.noted)
    for name, (_, layer) in adapted_layers(model).items():
        if name in state.melded:
            layer.weight.set_value(state.melded[name])
