"""Flows on procedural shapes: training, likelihood, sequential and Jacobi sampling, caches."""

import dataclasses
import json
import math
import time
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
    """Result, median and spread of the wall time of a compiled call, compile time apart."""
    started = time.perf_counter()
    result = jax.block_until_ready(call())
    first = time.perf_counter() - started
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
        "first_call_seconds": first,
    }
    return result, facts


def sampling_study(
    flow: TARFlow, labels, preset: str, seed: int, deadline: float = math.inf
) -> list[dict]:
    """Sequential against Jacobi sampling from the same noise: time, difference, likelihood."""
    repeats = {"tiny": 1, "cpu": 3, "gpu": 5}[preset]
    side, tokens = flow.config.img_size, flow.config.num_tokens
    chunks = {"tiny": (4,), "cpu": (tokens, 16), "gpu": (tokens, 64)}[preset]
    options = [{"method": "scan"}]
    options += [
        {"method": "jacobi", "chunk": c, "threshold": t} for c in chunks for t in (1e-3, 1e-5)
    ]
    z = jax.random.normal(jax.random.key(seed + 50), (len(labels), side, side, 3))
    real = pooled(shape_batches(512, side)(jax.random.key(99))[0])
    reference, rows = None, []
    for dtype in ("float32", "bfloat16") if preset == "gpu" else ("float32",):
        model, base = with_dtype(flow, dtype), None
        for option in options:
            row = {"batch": len(labels), "dtype": dtype, **option}
            rows.append(row)
            if time.perf_counter() > deadline:
                row["skipped"] = "time"
                continue
            traced = option["method"] == "jacobi"

            def call(model=model, option=option, traced=traced, cache=dtype):
                return model.inverse(z, labels, cache=cache, return_trace=traced, **option)

            out, facts = timed(call, repeats)
            x, trace = out if traced else (out, None)
            reference = x if reference is None else reference
            base = facts["seconds"] if base is None else base
            row |= facts | {
                "speed_up": base / facts["seconds"],
                "sweeps": [[int(v) for v in s] for s in trace.sweeps] if traced else None,
                "rms_to_float32_sequential": float(jnp.sqrt(jnp.square(x - reference).mean())),
                "model_nll_bits_per_dim": float(flow.nll(x, labels).mean() / math.log(2)),
                "frechet_pooled": frechet_distance(pooled(x), real),
            }
    return rows


def save_grid(path: Path, images, columns: int = 10) -> None:
    """Write images in [−1, 1] as one PNG."""
    save_png(path, image_grid(np.asarray(images), columns))


def run_shapes(size: int, preset: str, budget: float | None, seed: int, output: Path) -> dict:
    """Train on noisy shapes, then briefly on dequantised ones for the discrete likelihood.

    With a budget, measurements stop being started when twice the budget has passed.
    """
    deadline = math.inf if budget is None else time.perf_counter() + 2 * budget
    config = config_for(size, preset)
    training, batch = training_for(preset, seed, None if budget is None else 0.65 * budget)
    flow = TARFlow(config, rngs=nnx.Rngs(seed))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param)))
    if preset == "gpu":
        flow = with_dtype(flow, "bfloat16")
    results = {"parameters": parameters, "config": config.to_dict(), "batch": batch}

    def keep(**facts):
        # Written after every stage: a run that is cut off still leaves what it measured.
        results.update(facts)
        text = json.dumps(results, indent=1, default=float)
        (output / f"shapes{size}_partial.json").write_text(text)

    make = shape_batches(batch, size)
    trained = fit_flow(
        flow, make, training, log_path=output / f"shapes{size}_log.jsonl", description="shapes"
    )
    model = with_dtype(trained.averaged, "float32")
    keep(noisy=_training_facts(trained), loss_curve=[float(v) for v in _thin(trained.losses)])
    # The discrete likelihood needs a model of the dequantised data: continue without the noise.
    rest = dataclasses.replace(
        training,
        sigma=0.0,
        steps=max(2, training.steps // 2),
        learning_rate=training.learning_rate / 2,
        time_budget=None if budget is None else 0.35 * budget,
        seed=seed + 1,
    )
    fine = fit_flow(trained.flow, make, rest, description="dequantised shapes")
    bits = _bits(with_dtype(fine.averaged, "float32"), size, seed)
    keep(dequantised=_training_facts(fine) | bits)
    # Few programs, one batch size: compiling them is most of a short run on a GPU.
    per_class = {"tiny": 1, "cpu": 8, "gpu": 10}[preset]
    labels = jnp.repeat(jnp.arange(len(SHAPE_CLASSES)), per_class)
    x = model.sample(jax.random.key(seed + 7), labels)
    save_grid(output / f"shapes{size}_samples.png", denoise(model, x, SIGMA, labels), per_class)
    keep(round_trip_max=_round_trip(model, size, labels))
    keep(sampling=sampling_study(model, labels, preset, seed, deadline))
    keep(cache=_cache_rows(model, preset, size, labels, deadline))
    if time.perf_counter() < deadline:
        x = model.sample(jax.random.key(seed + 7), labels, guidance=1.0, denoise_sigma=SIGMA)
        save_grid(output / f"shapes{size}_guided.png", x, per_class)
    save_flow(output / f"shapes{size}", model, {"sigma": SIGMA, "data": "shapes"})
    return results


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
    x, labels = shape_batches(count, size)(jax.random.key(seed))
    return x + SIGMA * jax.random.normal(jax.random.key(seed + 1), x.shape), labels


def _round_trip(flow: TARFlow, size: int, like) -> float:
    x, labels = _noisy(len(like), size, 77)
    back = flow.inverse(flow(x, labels)[0], labels)
    return float(jnp.abs(back - x).max())


def _cache_rows(flow: TARFlow, preset: str, size: int, like, deadline: float) -> list[dict]:
    x, labels = _noisy(len(like), size, 55)
    formats = formats_for(flow.config.num_tokens)
    if preset != "cpu":
        keep = ("float32", "bfloat16", "int8", "fp8", "int4", "window 1/2", "rkv 0.5")
        formats = {name: formats[name] for name in keep[: 3 if preset == "tiny" else None]}
    return drift_table(flow, x, labels, formats, places=("both",), deadline=deadline)


def _bits(flow: TARFlow, size: int, seed: int) -> dict:
    images, labels = shapes(jax.random.key(seed + 12345), 128, size)
    key = jax.random.key(seed + 5)
    conditional = bits_per_dim(flow, images, 256, key, labels)
    null = bits_per_dim(flow, images, 256, key, jnp.full_like(labels, -1))
    return {
        "bits_per_dim_conditional": float(conditional.mean()),
        "bits_per_dim_unconditional": float(null.mean()),
        "bits_per_dim_standard_error": float(conditional.std() / math.sqrt(len(images))),
        "uniform_code_bits_per_dim": 8.0,
    }
