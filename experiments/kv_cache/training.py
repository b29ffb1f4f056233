"""Train small decoders on a task, all seeds in one program, until the target or the time is up.

Every call of the compiled function runs many steps, and texts are drawn ahead by other processes:
neither dispatch nor numpy holds the device up. Lengths may grow in stages.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxeff.models import Decoder, ModelConfig

WARMUP = 100  # steps
DECAY = 0.4  # the last share of a training, over which the learning rate falls to a twentieth


@dataclass(frozen=True)
class Stage:
    """A part of a training in which all texts have one length.

    Args:
        share: of the steps and of the seconds; those of all stages sum to 1.
        batch: texts per step and seed.
        options: further arguments of ``task.batch``.
        target: the stage ends when every seed gets this share of the counted tokens right, and of
            the hardest ones.
    """

    share: float
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    target: float = 0.9995


def make_model(vocab_size: int, sizes: dict[str, Any], seed: int, dtype: Any = jnp.float32):
    """Return a fresh decoder."""
    config = ModelConfig.llama(vocab_size=vocab_size, **sizes)
    return Decoder(config, rngs=nnx.Rngs(seed), dtype=dtype)


def draw(
    task: Any, options: dict[str, Any], batch: int, seeds: Sequence[int], done: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return int16 tokens and f16 weights ``[steps, seeds, batch, T]`` of the steps from ``done``.

    Args:
        task: has ``batch(rng, size, **options) -> (tokens, weights)``.
        options: further arguments of ``task.batch``.
        batch: texts per step and seed.
        seeds: one per model; each sees its own texts.
        done: steps before these.
        steps: how many.
    """
    made = [
        task.batch(np.random.default_rng([seed, done + step]), batch, **options)
        for step in range(steps)
        for seed in seeds
    ]
    tokens, weights = (np.stack(x) for x in zip(*made, strict=True))
    shape = (steps, len(seeds), *tokens.shape[1:])
    return tokens.astype(np.int16).reshape(shape), weights.astype(np.float16).reshape(shape)


def _losses(graphdef, attention, state, tokens, weights):
    """Weighted loss; accuracy of all counted tokens and of those that weigh most."""
    logits = nnx.merge(graphdef, state)(tokens, attention_fn=attention)[:, :-1]
    target, weight = tokens[:, 1:], weights[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    hit = jnp.argmax(logits, axis=-1) == target
    hard = (weight == jnp.max(weight)).astype(jnp.float32)
    total = jnp.sum(weight)
    facts = (jnp.sum(hit * weight) / total, jnp.sum(hit * hard) / jnp.sum(hard))
    return jnp.sum(losses * weight) / total, facts


def _many(graphdef, attention, optimizer, carry, tokens, weights, rates):
    """Run ``tokens.shape[0]`` steps of every seed; return the means of loss and accuracies."""

    def one(state, opt_state, tokens, weights, rate):
        loss = partial(_losses, graphdef, attention)
        (loss, facts), grads = jax.value_and_grad(loss, has_aux=True)(state, tokens, weights)
        updates, opt_state = optimizer.update(grads, opt_state, state)
        state = jax.tree.map(lambda p, u: p - rate * u, state, updates)
        return (state, opt_state), (loss, *facts)

    def step(carry, item):
        tokens, weights = item
        tokens, weights = tokens.astype(jnp.int32), weights.astype(jnp.float32)
        return jax.vmap(one)(*carry, tokens, weights, rates)

    carry, facts = jax.lax.scan(step, carry, (tokens, weights))
    return carry, jnp.stack([jnp.mean(x, axis=0) for x in facts])  # [3, seeds]


def _attention(query, key, value, **rules):
    """Plain attention, whose logits are computed again in the backward pass."""
    call = partial(jax.nn.dot_product_attention, implementation="xla", **rules)
    return jax.checkpoint(call)(query, key, value)


def _compile(graphdef, optimizer, carry, items, rates):
    """Compile :func:`_many` for texts of one length."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (carry, *items, rates))
    many = partial(_many, graphdef, _attention, optimizer)
    return jax.jit(many, donate_argnums=(0,)).lower(*shapes).compile()


def train(
    task: Any,
    sizes: dict[str, Any],
    stages: Sequence[Stage],
    *,
    seeds: Sequence[int],
    steps: int,
    learning_rates: Sequence[float],
    folder: Path,
    seconds: float = float("inf"),
    every: int = 50,
    workers: int = 0,
    dtype: Any = jnp.float32,
    report: Callable[[str], Any] | None = None,
    wait: Callable[[], Any] = lambda: None,
) -> tuple[list[Decoder], dict[str, Any]]:
    """Train one model per seed, all at once, and return them in float32.

    The learning rate rises over ``WARMUP`` steps and falls over the last ``DECAY`` of the training,
    which is measured in steps or in seconds, whichever is further. The weights are written to
    ``folder`` in half precision, rounding included in what is returned; another call goes on from
    them, with fresh moments, until ``steps``.

    Args:
        task: has ``vocab_size`` and ``batch(rng, size, **options) -> (tokens, weights)``.
        sizes: of the model.
        stages: in order, see :class:`Stage`.
        seeds: one model each.
        steps: at most so many optimiser steps.
        learning_rates: peak of Adam's, one per seed.
        folder: keeps weights and history.
        seconds: stop after this time, compilation excluded.
        every: steps per compiled call.
        workers: processes that draw texts; 0: this one does.
        dtype: of the computation.
        report: called with a line of text after each compiled call.
        wait: called before the first step; until it returns, only compiling goes on.

    Returns:
        The models, and what was done.
    """
    models = [make_model(task.vocab_size, sizes, seed, dtype) for seed in seeds]
    graphdef, _ = nnx.split(models[0])
    state = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(m) for m in models))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))
    facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "stopped_by": "steps", "history": []}
    path = folder / "weights.npz"
    if path.exists():
        state, facts = _load(path, state), json.loads((folder / "training.json").read_text())
    began_at = facts["steps"]
    if began_at < steps and seconds > 1:
        carry = (state, jax.vmap(optimizer.init)(state))
        rates = jnp.asarray(learning_rates, jnp.float32)
        items = [
            [
                jax.ShapeDtypeStruct((every, *x.shape[1:]), x.dtype)
                for x in draw(task, stage.options, stage.batch, seeds, 0, 1)
            ]
            for stage in stages
        ]
        with ThreadPoolExecutor(len(stages)) as threads, _processes(workers) as pool:
            programs = {}  # by length of the texts
            for item in items:
                if item[0].shape not in programs:
                    call = (_compile, graphdef, optimizer, carry, item, rates)
                    programs[item[0].shape] = threads.submit(*call)
            compiled = [programs[item[0].shape] for item in items]
            wait()
            carry = _run_stages(
                task, stages, compiled, pool, carry, rates, facts, seeds, steps - began_at,
                seconds, every, report,
            )  # fmt: skip
        _save(path, carry[0], facts)
        state = _load(path, carry[0])
    trained = [make_model(task.vocab_size, sizes, seed) for seed in seeds]
    for number, model in enumerate(trained):
        nnx.update(model, jax.tree.map(lambda x, i=number: x[i], state))
    return trained, facts


def _run_stages(
    task, stages, compiled, pool, carry, rates, facts, seeds, steps, seconds, every, report
):
    """Run the stages one after the other; ``facts`` is brought up to date."""
    done, spent, limit, spoken = 0, 0.0, 0.0, facts["seconds"]
    first = facts["steps"]
    for number, stage in enumerate(stages):
        many = compiled[number].result()
        limit = min(limit + stage.share, 1.0) if number < len(stages) - 1 else 1.0
        ask = lambda at, s=stage: pool.submit(  # noqa: E731
            draw, task, s.options, s.batch, seeds, first + at, every
        )
        ahead = [ask(done + i * every) for i in range(3)]
        facts["stopped_by"] = "steps"
        while done < steps * limit:
            tokens, weights = ahead.pop(0).result()
            begin = time.perf_counter()
            progress = max(done / steps, spent / seconds)
            factor = min((done + 1) / WARMUP, 1.0, max((1 - progress) / DECAY, 0.05))
            carry, found = many(carry, tokens, weights, rates * factor)
            ahead.append(ask(done + 3 * every))  # while the device works
            loss, accuracy, hard = np.asarray(found)
            spent += time.perf_counter() - begin
            done += every
            facts["history"].append(
                [first + done, *(np.round(x, 4).tolist() for x in (loss, accuracy, hard))]
            )
            if report is not None:
                report(
                    f"step {first + done} stage {number} {spent:.0f} s: loss "
                    f"{np.round(loss, 3)}, accuracy {np.round(accuracy, 4)}, hardest tokens "
                    f"{np.round(hard, 4)}"
                )
            if min(accuracy.min(), hard.min()) >= stage.target:
                facts["stopped_by"] = "target"
                break
            if spent >= seconds * limit:
                facts["stopped_by"] = "time"
                break
    facts |= {"steps": first + done, "seconds": round(spoken + spent, 1)}
    facts |= {"learning_rates": np.asarray(rates).round(6).tolist()}
    return carry


def _processes(workers: int) -> Any:
    """Return processes that draw texts, or a thread if there are none."""
    if workers:
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    return ThreadPoolExecutor(1)


def _save(path: Path, state: Any, facts: dict[str, Any]) -> None:
    """Write stacked weights in half precision, and the facts beside them."""
    leaves = jax.tree.leaves(state)
    np.savez(path, **{str(i): np.asarray(x, np.float16) for i, x in enumerate(leaves)})
    path.with_name("training.json").write_text(json.dumps(facts) + "\n")


def _load(path: Path, like: Any) -> Any:
    """Return what :func:`_save` wrote, in the structure and dtypes of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as stored:
        fresh = [jnp.asarray(stored[str(i)], x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, fresh)
