"""Train several arms side by side on one device until a time budget is spent.

All runs take a step before any takes the next one, on the same batches and with the same learning
rate, so that whatever stops them compares equals. The clock decides how many steps there are: the
cosine of the learning rate runs over the time, and each point of a curve records the rate that was
used. Programs are compiled in threads, and the final loss is measured with the training step at a
rate of zero, which needs no further program.
"""

import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.low_precision.training import (
    Arm,
    Preset,
    build,
    clipped_adamw,
    corpus,
    environment,
    noise_ratios,
    validation_batches,
)
from jaxeff import train
from jaxeff.data import batches
from jaxeff.quant import fold_step

EVALUATION_SHARE = 0.03  # of the budget, kept for the final losses
LEAST = 5.0  # seconds of a phase
TIMED_EVERY = 50  # steps between those whose arms are timed one by one
NOISE_POINTS = 16  # measurements of the gradient's noise in a run
Say = Callable[[str], None]


@dataclass
class Run:
    """One arm with one seed, and where it stands."""

    arm: Arm
    seed: int
    program: Any  # (state, tokens, rate) -> (state, loss), compiled
    state: train.TrainState
    curve: list[list[float]] = field(default_factory=list)  # step, loss, rate
    noise: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: float | None = None

    def step(self, tokens: jax.Array, rate: float) -> jax.Array:
        """One step; the loss before it."""
        self.state, loss = self.program(self.state, tokens, jnp.float32(rate))
        return loss

    def record(self, preset: Preset) -> dict[str, Any]:
        """What the tables and pictures read; as ``training.Runs`` writes it."""
        steps = int(self.curve[-1][0]) + 1 if self.curve else 0
        last = [loss for _, loss, _ in self.curve[-max(len(self.curve) // 10, 1) :]]
        seconds = statistics.median(self.seconds) if self.seconds else None
        return {
            "arm": self.arm.name,
            "seed": self.seed,
            "validation": self.validation,
            "last_tenth": statistics.fmean(last) if last else None,
            "curve": self.curve,
            "noise": self.noise,
            "seconds_per_step": seconds,
            "steps": steps,
            "bytes_seen": steps * (self.arm.batch or preset.batch) * preset.seq_len,
        }


class Session:
    """The clock, the programs and the output of one study.

    Args:
        preset: Sizes; ``steps`` is not used.
        time_budget: Seconds for everything, compilation included.
        path: JSON file with the curves, rewritten as the runs go on.
        say: Prints a line.
    """

    def __init__(self, preset: Preset, time_budget: float, path: Path, say: Say):
        self.preset, self.path, self.say = _with_attention(preset, say), path, say
        self.deadline = time.monotonic() + time_budget * (1 - EVALUATION_SHARE)
        self._began = time.monotonic()
        self._pool = ThreadPoolExecutor(16)
        self._text = self._pool.submit(corpus, preset.max_bytes, preset.with_packages)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def start(self, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Run]:
        """Builds and compiles; one program serves all seeds of an arm."""
        states, programs = {}, {}
        for arm in arms:
            for seed in seeds:
                graph, state = train.init_state(build(arm, seed, self.preset), clipped_adamw(1.0))
                states[arm, seed] = jax.tree.map(jnp.copy, state)  # a step deletes its input
            programs[arm] = self.compile(_step, graph, state, self.tokens_type(arm), jnp.float32(0))
            self.say(f"{self.elapsed:.0f} s: {arm.name} traced")
        programs = {arm: program.result() for arm, program in programs.items()}
        text = self._text.result()
        self.say(f"{len(text.train) / 1e6:.0f} MB of text, fingerprint {text.fingerprint}")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self.say(f"{self.elapsed:.0f} s: all compiled; {parameters / 1e6:.1f} M parameters")
        return [Run(arm, seed, programs[arm], states[arm, seed]) for seed in seeds for arm in arms]

    def compile(self, function: Any, *args) -> Future:
        """The compiled program, from a thread."""
        return self._pool.submit(function.lower(*args).compile)

    def tokens_type(self, arm: Arm) -> jax.ShapeDtypeStruct:
        """What a batch looks like."""
        return jax.ShapeDtypeStruct(
            (arm.batch or self.preset.batch, self.preset.seq_len + 1), jnp.int32
        )

    def advance(
        self,
        runs: Sequence[Run],
        until: float,
        *,
        peak: float,
        warmup_steps: int,
        final: float = 0.0,
        first_step: int = 0,
        measure: Callable[[int, jax.Array], None] | None = None,
    ) -> int:
        """Steps all runs until a time, the rate following half a cosine over it.

        Args:
            runs: what to step; arms with different batch sizes cannot be mixed.
            until: ``time.monotonic()`` at the end.
            peak: Largest learning rate.
            warmup_steps: Steps to it.
            final: Last rate relative to the peak.
            first_step: Number of the first step, which names its batch.
            measure: Called with step and tokens at ``NOISE_POINTS`` times.

        Returns:
            The number of the step after the last one.
        """
        began, said, measured = time.monotonic(), 0.0, 0
        until = max(until, began + LEAST)  # compiling may have taken all the time there was
        for count in itertools.count():
            progress = (time.monotonic() - began) / (until - began)
            if progress >= 1 and count > 0:
                return first_step + count
            step = first_step + count
            cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            rate = peak * min(1.0, (count + 1) / warmup_steps) * (final + (1 - final) * cosine)
            tokens = {run.seed: self._tokens(run.arm, run.seed, step) for run in runs}
            if measure is not None and progress >= measured / NOISE_POINTS:
                measured += 1
                measure(step, tokens[runs[-1].seed])
            timed = count % TIMED_EVERY == TIMED_EVERY // 2
            if timed:  # what is queued must not count
                jax.block_until_ready([run.state for run in runs])
            losses = [self._step(run, tokens[run.seed], rate, timed) for run in runs]
            if count % 8 == 0:  # also keeps the clock honest: steps are queued, not awaited
                for run, loss in zip(runs, losses, strict=True):
                    run.curve.append([step, float(loss), rate])
            if time.monotonic() - said > 10:
                said = time.monotonic()
                shown = "  ".join(f"{run.arm.name} {run.curve[-1][1]:.4f}" for run in runs)
                self.say(f"{self.elapsed:.0f} s, step {step}, rate {rate:.1e}: {shown}")
                self.save(runs)

    def evaluate(self, runs: Sequence[Run]) -> None:
        """Mean loss over the held-out bytes, each run as it was trained."""
        windows = [
            jnp.asarray(batch) for batch in validation_batches(self.preset, runs[0].arm.batch)
        ]
        for run in runs:
            losses = [run.step(tokens, 0.0) for tokens in windows]
            run.validation = float(jnp.stack(losses).mean())
            self.say(f"{self.elapsed:.0f} s: {run.arm.name} seed {run.seed}: {run.validation:.4f}")

    def save(self, runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
        """Writes the records; returns them by arm name."""
        records = {}
        for run in runs:
            records.setdefault(run.arm.name, []).append(run.record(self.preset))
        text = self._text.result()
        content = {
            "environment": environment(),
            "sizes": asdict(self.preset),
            "text": {"train_bytes": len(text.train), "fingerprint": text.fingerprint},
            "seconds": self.elapsed,
            "records": records,
        }
        self.path.write_text(json.dumps(content) + "\n")
        return records

    def _step(self, run: Run, tokens: jax.Array, rate: float, timed: bool) -> jax.Array:
        if not timed:
            return run.step(tokens, rate)
        began = time.monotonic()
        loss = jax.block_until_ready(run.step(tokens, rate))
        run.seconds.append(time.monotonic() - began)
        return loss

    def _tokens(self, arm: Arm, seed: int, step: int) -> jax.Array:
        size, length = arm.batch or self.preset.batch, self.preset.seq_len
        return jnp.asarray(batches(self._text.result().train, size, length, seed)[step])


def _with_attention(preset: Preset, say: Say) -> Preset:
    """The preset, with XLA's attention where cuDNN's does not run."""
    if preset.attention != "cudnn":
        return preset
    x = jnp.ones((1, preset.seq_len, 1, preset.embed_dim // preset.num_heads), preset.dtype)

    def loss(x):
        return jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn").sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(loss))(x))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        say(f"attention by XLA, as cuDNN's failed: {str(error)[:200]}")
        return replace(preset, attention="xla")
    return preset


def compare(session: Session, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, list]:
    """Trains all arms from the start; returns records by arm name."""
    runs = session.start(arms, seeds)
    preset = session.preset
    session.advance(
        runs, session.deadline, peak=preset.learning_rate, warmup_steps=preset.warmup_steps
    )
    session.evaluate(runs)
    return session.save(runs)


def branch(
    session: Session,
    arms: Sequence[Arm],
    seed: int,
    beside: Sequence[Arm] = (),
    share: float = 0.4,
) -> dict[str, list[dict[str, Any]]]:
    """Trains bf16 and FP4, then goes on in every mode from the same FP4 state.

    Args:
        session: Clock and sizes.
        arms: bf16, the FP4 arm, then the modes, ``backward`` first; each has the recipe of its own
            phase alone.
        seed: Of weights, data and rounding.
        beside: Further arms that are trained through both phases, with the same batches and rates.
        share: Part of the training time for the second phase, where more runs take turns.

    Returns:
        Records by arm name; those of the second arm hold the noise of the first phase.
    """
    preset = session.preset
    meter = NoiseMeter(session, arms[1], arms[2], seed)
    runs = session.start([*arms, *beside], [seed])
    plain, trunk = runs[:2]
    measure = functools.partial(meter, trunk)
    first_phase = session.deadline - share * (session.deadline - time.monotonic())
    options = {"peak": preset.learning_rate, "warmup_steps": preset.warmup_steps, "final": 0.1}
    first = [plain, *runs[len(arms) :], trunk]  # noise is measured on the batch of the last one
    step = session.advance(first, first_phase, measure=measure, **options)
    for run in runs[2 : len(arms)]:
        copied = jax.tree.map(jnp.copy, trunk.state)
        run.state = copied._replace(rest=run.state.rest)  # other recipes hold other keys
    session.say(f"{session.elapsed:.0f} s: branching at step {step}")
    # A quarter of the first peak is our choice; the papers reset the rate and warm up 40 steps.
    session.advance(
        runs, session.deadline, peak=preset.learning_rate / 4, warmup_steps=40, first_step=step
    )
    session.evaluate(runs)
    return session.save(runs)


class NoiseMeter:
    """Measures gradient against quantisation noise on the state of a run.

    Args:
        session: Compiles the two programs.
        arm: Whose noise.
        exact: The same forward pass with a plain backward pass.
        seed: Of the run.
    """

    def __init__(self, session: Session, arm: Arm, exact: Arm, seed: int):
        self._programs, self._rests = [], []
        for each in (arm, exact):
            graph, state = train.init_state(build(each, seed, session.preset), optax.identity())
            tokens = session.tokens_type(arm)
            self._programs.append(
                session.compile(_gradient, graph, state.params, state.rest, tokens)
            )
            self._rests.append(state.rest)

    def __call__(self, run: Run, step: int, tokens: jax.Array) -> None:
        """Adds a measurement to the run."""
        noisy, exact = (program.result() for program in self._programs)
        params, rest = run.state.params, self._rests[0]
        # The second draw has a key that no step uses.
        first, second = (
            noisy(params, fold_step(rest, number), tokens) for number in (step, step + (1 << 30))
        )
        reference = exact(params, self._rests[1], tokens)
        run.noise.append({"step": step} | noise_ratios(first, second, reference, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(graph, params, rest, tokens):
    def loss(params):
        return train.next_token_loss(nnx.merge(graph, params, rest)(tokens[:, :-1]), tokens[:, 1:])

    return jax.grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(graph, state, tokens, rate):
    state, metrics = train.train_step(graph, clipped_adamw(rate), state, tokens)
    return state, metrics["loss"]
