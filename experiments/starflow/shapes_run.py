"""Flows on procedural shapes: training, likelihood, sequential and Jacobi sampling, caches."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.starflow.cache_study import drift_table, formats_for
from experiments.starflow.data import SHAPE_CLASSES, shape_batches, shapes
from experiments.starflow.metrics import frechet_distance
from jaxeff.images import image_grid, save_png
from jaxeff.models.starflow import TARFlow, TARFlowConfig, bits_per_dim, denoise, with_dtype
from jaxeff.models.starflow.training import FlowTraining, fit_flow, save_flow

SIGMA = 0.05
PER_CLASS = {"tiny": 1, "cpu": 8}
DENOISED = 16  # images denoised together
STEPS = {"tiny": 4, "cpu": 400, "gpu": 100_000}


def config_for(size: int, preset: str) -> TARFlowConfig:
    """A class-conditional STARFlow: shallow blocks of two layers under one deep block."""
    sizes = {
        "tiny": {"width": 64, "head_dim": 32, "layers_per_block": (1, 2)},
        "cpu": {"width": 96, "head_dim": 32, "layers_per_block": (2, 2, 4)},
        "gpu": {"width": 640, "head_dim": 64, "layers_per_block": (2, 2, 2, 8)},
    }
    classes = len(SHAPE_CLASSES)
    return TARFlowConfig(
        3,
        size,
        4,
        scale="softplus",
        sos=True,
        rope=True,
        soft_clip=4.0,
        final_norm=True,
        cond="prefix_deep",
        num_classes=classes,
        prefix_len=1,
        prefix_dim=classes + 1,
        order="L2R",
        patch_order="p_p_c",
        **sizes[preset],
    )


def training_for(preset: str, seed: int, budget: float | None) -> tuple[FlowTraining, int]:
    """Training settings and batch size of a preset."""
    rate = {"tiny": 1e-3, "cpu": 1e-3, "gpu": 4e-4}[preset]
    training = FlowTraining(
        steps=STEPS[preset],
        learning_rate=rate,
        warmup_steps=100 if preset != "gpu" else 200,
        clip_norm=1.0,
        sigma=SIGMA,
        drop=0.1,
        latent_norm=1e-4,
        ema_decay=0.999 if preset == "gpu" else 0.98,
        time_budget=budget,
        steps_per_call=20 if preset == "gpu" else 2,
        seed=seed,
    )
    return training, {"tiny": 8, "cpu": 32, "gpu": 64}[preset]


def pooled(x, side: int = 8) -> np.ndarray:
    """Images averaged to ``side × side``, the features of the Fréchet distance here."""
    x = np.clip(np.asarray(x), -1, 1)
    block = x.shape[1] // side
    return x.reshape(len(x), side, block, side, block, -1).mean((2, 4))


def timed(call, repeats: int):
    """Result, median and spread of the wall time of a call that is compiled already."""
    result = jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    facts = {
        "seconds": float(np.median(times)),
        "fastest": min(times),
        "slowest": max(times),
        "repeats": repeats,
    }
    return result, facts


class Stages:
    """What a run does, in order of importance: compiled beside the training, skipped when late.

    Compiling is most of a short run on a GPU, and training leaves the host idle. `prepare` runs a
    call once on another thread with untrained weights; `ready` waits for it before the call is
    timed with the trained ones.
    """

    def __init__(self, deadline: float, workers: int):
        self.started, self.deadline = time.perf_counter(), deadline
        self.pool = ThreadPoolExecutor(workers)
        self.pending: dict[str, Future] = {}
        self.seconds: dict[str, float] = {}
        # Tracing holds Python's lock: the training program goes first.
        self.begin = threading.Event()

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() > self.deadline

    def prepare(self, name: str, call: Callable) -> None:
        """Compile and run ``call`` on another thread."""

        def compiled():
            self.begin.wait(20)
            started = time.perf_counter()
            jax.block_until_ready(call())
            self.log(f"compiled {name}", time.perf_counter() - started)

        self.pending[name] = self.pool.submit(compiled)

    def ready(self, name: str) -> bool:
        """Wait until a prepared call has been compiled; False when the time is over before."""
        try:
            self.pending[name].result(max(0.0, min(1e6, self.deadline - time.perf_counter())))
        except TimeoutError:
            return False
        return not self.late

    def settle(self) -> None:
        """Wait until nothing compiles, so that the host is free; at most half the time left."""
        left = min(2e6, self.deadline - time.perf_counter())
        wait(self.pending.values(), max(0.0, 0.5 * left))

    def log(self, name: str, seconds: float) -> None:
        """Keep the seconds of a stage and say them."""
        self.seconds[name] = seconds
        total = time.perf_counter() - self.started
        sys.stdout.write(f"{total:7.1f} s  {name} {seconds:.1f} s\n")
        sys.stdout.flush()

    @contextlib.contextmanager
    def stage(self, name: str):
        """Time what is done inside."""
        started = time.perf_counter()
        yield
        self.log(name, time.perf_counter() - started)

    def close(self) -> None:
        """Drop what has not started to compile."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def sampling_options(preset: str, tokens: int) -> list[dict]:
    """What is measured, the most important first; the sequential row of a group comes first."""
    if preset == "gpu":
        groups = [
            ("bfloat16", 64, [("slide", c, t) for c in (32, 64) for t in (1e-3, 1e-4)]),
            ("bfloat16", 16, [("slide", c, t) for c in (64, 128) for t in (1e-3, 1e-4)]),
            ("bfloat16", 4, [("slide", c, t) for c in (64, 128) for t in (1e-3, 1e-4)]),
            ("float32", 64, [("slide", 32, 1e-4)]),
            ("bfloat16", 64, [("jacobi", 16, 1e-3), ("jacobi", 16, 1e-4), ("jacobi", 64, 1e-3)]),
        ]
    else:
        size = {"tiny": 4, "cpu": 16}[preset]
        sweeps = [(method, size, 1e-3) for method in ("slide", "jacobi")]
        sweeps += [] if preset == "tiny" else [("slide", size, 1e-5), ("jacobi", tokens, 1e-3)]
        groups = [("float32", PER_CLASS[preset] * len(SHAPE_CLASSES), sweeps)]
    rows = []
    for dtype, batch, sweeps in groups:
        options: list[dict] = [{"method": m, "chunk": c, "threshold": t} for m, c, t in sweeps]
        rows += [{"dtype": dtype, "batch": batch, **o} for o in [{"method": "scan"}, *options]]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def sampling_call(models: dict, row: dict, seed: int):
    """A call that samples as a row says, from noise that is the same for all rows."""
    flow = models[row["dtype"]]
    side = flow.config.img_size
    labels = class_labels(row["batch"])
    z = jax.random.normal(jax.random.key(seed + 50), (row["batch"], side, side, 3))
    options = {k: row[k] for k in ("method", "chunk", "threshold") if k in row}
    options["return_trace"] = row["method"] != "scan"
    return lambda: flow.inverse(z, labels, cache=row["dtype"], **options)


def class_labels(batch: int):
    """Labels in equal shares, class after class."""
    return jnp.arange(batch) * len(SHAPE_CLASSES) // batch


def sampling_study(
    models: dict, rows: list[dict], preset: str, seed: int, stages: Stages, keep: Callable
) -> None:
    """Sequential against parallel sampling from the same noise: time, difference, likelihood."""
    repeats = {"tiny": 1, "cpu": 3, "gpu": 10}[preset]
    exact = models["float32"]
    real = pooled(_drawing(512, exact.config.img_size)(jax.random.key(99))[0])
    base = {}
    for row in rows:
        # Rows that differ in the tolerance alone share a program.
        if not stages.ready(program_name(row)):
            row["skipped"] = "time"
            continue
        labels = class_labels(row["batch"])
        out, facts = timed(sampling_call(models, row, seed), repeats)
        x, trace = (out, None) if row["method"] == "scan" else out
        group = (row["dtype"], row["batch"])
        if trace is None:
            base[group] = (x, facts["seconds"])
        sequential, seconds = base.get(group, (None, math.nan))
        row |= facts | {
            "images_per_second": len(x) / facts["seconds"],
            "speed_up": seconds / facts["seconds"],
            "sweeps": trace and [int(s.sum()) for s in trace.sweeps],
            "model_nll_bits_per_dim": float(exact.nll(x, labels).mean() / math.log(2)),
            "frechet_pooled": frechet_distance(pooled(x), real),
        }
        if trace is not None and sequential is not None:
            row["rms_to_sequential"] = float(jnp.sqrt(jnp.square(x - sequential).mean()))
        stages.log(f"{program_name(row)} {row.get('threshold', '')}", facts["seconds"])
        keep(sampling=rows)


def program_name(row: dict) -> str:
    """Rows with the same name are one compiled program."""
    return f"{row['dtype']} {row['method']} {row.get('chunk', '')} batch {row['batch']}"


def save_grid(path: Path, images, columns: int = 10) -> None:
    """Write images in [−1, 1] as one PNG."""
    save_png(path, image_grid(np.asarray(images), columns))


def run_shapes(size: int, preset: str, budget: float | None, seed: int, output: Path) -> dict:
    """Train on noisy shapes, measure, then train briefly on dequantised ones for the bits.

    The budget bounds the whole run: .3 of it is the first training, .1 the second. What has not
    started when it is over is named as skipped.
    """
    deadline = math.inf if budget is None else time.perf_counter() + budget
    with contextlib.closing(Stages(deadline, _workers())) as stages:
        return _run_stages(size, preset, budget, seed, output, stages)


def _run_stages(size, preset, budget, seed, output: Path, stages: Stages) -> dict:
    config = config_for(size, preset)
    share = lambda part: None if budget is None else part * budget  # noqa: E731
    training, batch = training_for(preset, seed, share(0.3))
    flow = TARFlow(config, rngs=nnx.Rngs(seed))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param)))
    if preset == "gpu":
        flow = with_dtype(flow, "bfloat16")
    results = {"parameters": parameters, "config": config.to_dict(), "batch": batch}
    results["xla_flags"] = os.environ.get("XLA_FLAGS", "")

    def keep(**facts):
        # Written after every stage: a run that is cut off still leaves what it measured.
        results.update(facts, stage_seconds=stages.seconds)
        text = json.dumps(results, indent=1, default=float)
        (output / f"shapes{size}_partial.json").write_text(text)

    rows = sampling_options(preset, config.num_tokens)
    labels = class_labels(rows[0]["batch"])
    prepare_calls(stages, _models(flow), rows, labels, preset, seed)
    make = shape_batches(batch, size)
    with stages.stage("training on noisy shapes"):
        trained = fit_flow(
            flow,
            make,
            training,
            log_path=output / f"shapes{size}_log.jsonl",
            description="shapes",
            on_call=lambda *_: stages.begin.set(),
        )
    models = _models(trained.averaged)
    model = models["float32"]
    keep(noisy=_training_facts(trained), loss_curve=[float(v) for v in _thin(trained.losses)])
    with stages.stage("waiting for compilations"):
        stages.settle()
    sampling_study(models, rows, preset, seed, stages, keep)
    with stages.stage("caches"):
        keep(cache=_cache_rows(model, preset, size, labels, stages))
    skipped = []
    per_class = min(10, len(labels) // len(SHAPE_CLASSES))
    for name, options in {"samples": {}, "guided": {"guidance": 1.0}}.items():
        if not (stages.ready(name) and stages.ready("denoise")):
            skipped.append(name)
            continue
        with stages.stage(name):
            x = _denoised(model, model.sample(jax.random.key(seed + 7), labels, **options), labels)
            save_grid(output / f"shapes{size}_{name}.png", _first_of_each(x, labels, per_class))
    # The discrete likelihood needs a model of the dequantised data: continue without the noise.
    rest = dataclasses.replace(
        training,
        sigma=0.0,
        steps=max(2, training.steps // 2),
        learning_rate=training.learning_rate / 2,
        time_budget=share(0.1),
        seed=seed + 1,
    )
    if stages.late:
        skipped.append("dequantised")
    else:
        with stages.stage("training on dequantised shapes"):
            fine = fit_flow(trained.flow, make, rest, description="dequantised shapes")
        bits = _bits(with_dtype(fine.averaged, "float32"), size, seed, labels)
        keep(dequantised=_training_facts(fine) | bits)
    if stages.late:
        skipped.append("round_trip_max")
    else:
        keep(round_trip_max=_round_trip(model, size, labels))
    keep(skipped=skipped)
    save_flow(output / f"shapes{size}", model, {"sigma": SIGMA, "data": "shapes"})
    return results


def _workers() -> int:
    # A compilation keeps more than one core busy; two are left to the training loop.
    return max(1, min(8, (os.cpu_count() or 1) // 2 - 1))


@cache
def _drawing(count: int, size: int):
    return jax.jit(shape_batches(count, size))


def _models(flow: TARFlow) -> dict[str, TARFlow]:
    return {dtype: with_dtype(flow, dtype) for dtype in ("float32", "bfloat16")}


def prepare_calls(
    stages: Stages, models: dict, rows: list[dict], labels, preset: str, seed: int
) -> None:
    """Start compiling everything that is measured, in the order in which it is needed."""
    model, side = models["float32"], models["float32"].config.img_size
    noise = jnp.zeros((len(labels), side, side, 3))
    waiting = {program_name(row): sampling_call(models, row, seed) for row in rows}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        some = class_labels(batch)
        stages.prepare(
            f"likelihood batch {batch}",
            lambda batch=batch, some=some: model.nll(noise[:1].repeat(batch, 0), some),
        )
    for count in (512, len(labels)):
        draw = lambda count=count: _drawing(count, side)(jax.random.key(0))  # noqa: E731
        stages.prepare(f"drawing {count}", draw)
    for name, call in waiting.items():
        stages.prepare(name, call)
    for name, spec in _cache_formats(model, preset).items():
        stages.prepare(f"cache {name}", lambda spec=spec: model.inverse(noise, labels, cache=spec))
    stages.prepare("samples", lambda: model.inverse(noise, labels))
    stages.prepare("denoise", lambda: _denoised(model, noise[:DENOISED], labels[:DENOISED]))
    stages.prepare("guided", lambda: model.inverse(noise, labels, guidance=1.0))


def _denoised(flow: TARFlow, y, labels):
    """Images without their noise, a few at a time: the backward pass is the peak of the memory."""
    parts = [
        denoise(flow, y[i : i + DENOISED], SIGMA, labels[i : i + DENOISED])
        for i in range(0, len(y), DENOISED)
    ]
    return jnp.concatenate(parts)


def _first_of_each(x, labels, count: int):
    labels = np.asarray(labels)
    rows = [np.flatnonzero(labels == label)[:count] for label in range(len(SHAPE_CLASSES))]
    return np.asarray(x)[np.concatenate(rows)]


def _training_facts(trained) -> dict:
    return {
        "steps": len(trained.losses),
        "seconds": trained.seconds,
        "step_seconds": trained.step_seconds,
        "final_loss": float(trained.losses[-20:].mean()),
    }


def _thin(values, points: int = 60):
    return values[:: max(1, len(values) // points)]


def _noisy(count: int, size: int, seed: int):
    x, labels = _drawing(count, size)(jax.random.key(seed))
    return x + SIGMA * jax.random.normal(jax.random.key(seed + 1), x.shape), labels


def _round_trip(flow: TARFlow, size: int, like) -> float:
    x, labels = _noisy(len(like), size, 77)
    back = flow.inverse(flow(x, labels)[0], labels)
    return float(jnp.abs(back - x).max())


def _cache_formats(flow: TARFlow, preset: str) -> dict:
    formats = formats_for(flow.config.num_tokens)
    if preset == "cpu":
        return formats
    keep = ("float32", "bfloat16", "int8", "fp8", "int4", "window 1/2", "rkv 0.5")
    return {name: formats[name] for name in keep[: 3 if preset == "tiny" else None]}


def _cache_rows(flow: TARFlow, preset: str, size: int, labels, stages: Stages) -> list[dict]:
    x, _ = _noisy(len(labels), size, 55)
    formats = _cache_formats(flow, preset)
    ready = lambda name: stages.ready(f"cache {name}")  # noqa: E731
    return drift_table(flow, x, labels, formats, places=("both",), ready=ready)


def _bits(flow: TARFlow, size: int, seed: int, like) -> dict:
    conditional, null = [], []
    draw = jax.jit(partial(shapes, batch=len(like), size=size))
    for index in range(2):  # batches of the size that is compiled already
        images, labels = draw(jax.random.key(seed + 12345 + index))
        key = jax.random.key(seed + 5 + index)
        conditional.append(bits_per_dim(flow, images, 256, key, labels))
        null.append(bits_per_dim(flow, images, 256, key, jnp.full_like(labels, -1)))
    values = np.concatenate(conditional)
    return {
        "bits_per_dim_conditional": float(values.mean()),
        "bits_per_dim_unconditional": float(np.concatenate(null).mean()),
        "bits_per_dim_standard_error": float(values.std() / math.sqrt(len(values))),
        "bits_per_dim_images": len(values),
        "uniform_code_bits_per_dim": 8.0,
    }
