"""Train a small decoder on a task until it solves it, with weights on the tokens that count."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxeff import checkpoint
from jaxeff.models import Decoder, ModelConfig


def make_model(vocab_size: int, sizes: dict[str, Any], seed: int) -> Decoder:
    """Return a fresh decoder."""
    config = ModelConfig.llama(vocab_size=vocab_size, **sizes)
    return Decoder(config, rngs=nnx.Rngs(seed))


def _step(graphdef, optimizer, carry, item):
    """One optimiser step on ``(tokens, weights)``."""
    state, opt_state = carry
    tokens, weights = item

    def loss_of(state):
        logits = nnx.merge(graphdef, state)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        hit = jnp.argmax(logits, axis=-1) == tokens[:, 1:]
        weight = weights[:, 1:]
        total = jnp.sum(weight)
        return jnp.sum(losses * weight) / total, jnp.sum(hit * weight) / total

    (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(state)
    updates, opt_state = optimizer.update(grads, opt_state, state)
    return (optax.apply_updates(state, updates), opt_state), (loss, accuracy)


def train(
    task: Any,
    model: Decoder,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    folder: Path,
    seconds: float | None = None,
    target: float = 0.999,
    every: int = 50,
    report: Any = None,
) -> dict[str, Any]:
    """Train a model in place; a run that was stopped goes on from its last checkpoint.

    Args:
        task: has ``batch(rng, size) -> (tokens, weights)``.
        model: the decoder.
        steps: at most so many optimiser steps.
        batch: texts per step.
        learning_rate: peak of Adam's, after a warm-up of 100 steps, falling to a tenth.
        seed: seed of the data.
        folder: keeps the checkpoint.
        seconds: stop after this time; ``None``: no limit.
        target: stop when the accuracy of weighted tokens over ``every`` steps reaches this.
        every: steps per compiled call.
        report: called as ``report(step, loss, accuracy)``.

    Returns:
        What was done: steps, seconds, final loss and accuracy, why it stopped.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, steps // 4), steps, learning_rate / 10
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    graphdef, state = nnx.split(model)
    carry = (state, optimizer.init(state))
    done, spent, history = 0, 0.0, []
    path = folder / "checkpoint"
    if path.exists():
        carry = checkpoint.restore(path, carry)
        facts = checkpoint.load_metadata(path)
        done, spent, history = facts["step"], facts["seconds"], facts["history"]

    @jax.jit
    def many(carry, items):
        carry, (loss, accuracy) = jax.lax.scan(
            lambda c, item: _step(graphdef, optimizer, c, item), carry, items
        )
        return carry, jnp.mean(loss), jnp.mean(accuracy)

    why, began, saved = "steps", time.perf_counter(), time.perf_counter()
    reached = bool(history) and history[-1][2] >= target
    if history and seconds is not None and spent >= seconds:
        steps, why = done, "time budget"  # trained for long enough before: only evaluate
    while done < steps and not reached:
        rng = np.random.default_rng([seed, done])
        drawn = [task.batch(rng, batch) for _ in range(every)]
        tokens, weights = (np.stack(x) for x in zip(*drawn, strict=True))
        items = (jnp.asarray(tokens, jnp.int32), jnp.asarray(weights, jnp.float32))
        carry, loss, accuracy = many(carry, items)
        done += every
        history.append([done, round(float(loss), 4), round(float(accuracy), 4)])
        if report is not None:
            report(*history[-1])
        now = time.perf_counter()
        reached = history[-1][2] >= target
        out_of_time = seconds is not None and spent + now - began > seconds
        last = reached or out_of_time or done >= steps
        if last or now - saved > 60:
            facts = {"step": done, "seconds": spent + now - began, "history": history}
            checkpoint.save(path, carry, facts, overwrite=True)
            saved = time.perf_counter()
        if out_of_time:
            why = "time budget"
            break
    nnx.update(model, carry[0])
    facts = json.loads(json.dumps(checkpoint.load_metadata(path)))
    return {
        "steps": done,
        "seconds": round(facts["seconds"], 1),
        "stopped_by": "target" if reached else why,
        "final_loss": history[-1][1],
        "final_accuracy": history[-1][2],
        "history": history[:: max(len(history) // 40, 1)],
    }
