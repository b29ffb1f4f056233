"""SpargeAttn on inputs with structure: sparsity within an error bound, and what it saves.

``python -m experiments.sparse.run`` tunes thresholds per head on some inputs, measures on others
and writes ``results/cpu.json`` and a plot. ``--preset gpu`` takes long sequences.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.isolated import measure_alone
from experiments.sparse import inputs
from jaxeff.sparse import hilbert_order, tune_sparge
from pallas_kernels import dot_product_attention
from pallas_kernels.benchmarking import benchmark
from pallas_kernels.masks import BlockMask
from pallas_kernels.ops.attention.sparge import predict, sparge_attention

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Preset:
    """Sizes of the inputs and of the search; a ``pv_tolerance`` of None: no second stage."""

    video: tuple[int, int, int]
    text: int
    num_heads: int
    head_dim: int
    block_q: int
    block_kv: int
    sims: tuple[float, ...]
    cdf_tolerance: float
    pv_tolerance: float | None
    repeats: int


PRESETS = {
    "cpu": Preset((8, 16, 16), 2048, 4, 64, 64, 64, (-1.0, 0.0, 0.3, 0.6, 0.8), 0.01, 1.0, 5),
    # Tiles and stages that the sm90 kernel has; its tiles of 128 x 128 are faster than 64 x 128.
    "gpu": Preset(
        (22, 30, 32), 32768, 8, 128, 128, 128, (-1.0, 0.0, 0.3, 0.6, 0.8), 0.01, None, 20
    ),
}


@dataclass(frozen=True)
class Options:
    """Tune, measure and write one JSON and one SVG."""

    preset: Literal["cpu", "gpu"] = "cpu"
    """Sizes."""
    output: Path | None = None
    """File to write; by default ``results/<preset>.json``."""
    l1: float = 0.07
    """Bound on the relative L1 error against float32 attention, first stage."""
    pv_l1: float = 0.08
    """Bound with the second stage."""
    samples: int = 6
    """Inputs to tune on, with the seeds 0, 1, ..."""
    held_out: int = 3
    """Inputs to measure on, with the seeds that follow."""
    margin: float = 0.0
    """Share by which both bounds are tightened while tuning."""
    only: str = ""
    """Inputs whose name contains this; the others keep what the existing file has."""
    retime: bool = False
    """Only measure the times again, with the thresholds of the existing file."""
    tune_only: bool = False
    """Measure no times: inputs may be tuned side by side (``--only``), and then ``--retime``."""
    time_budget: float = 3000.0
    """Seconds after which no further case starts; those left out are listed."""


def cases(preset: Preset) -> dict[str, dict[str, Any]]:
    """Inputs by name: a generator of one sample by seed, and the rules of the attention."""
    heads = {"num_heads": preset.num_heads, "head_dim": preset.head_dim}
    size = int(np.prod(preset.video))
    orders = {
        "video, row-major": np.arange(size),
        "video, Hilbert": hilbert_order(preset.video),
        "video, random order": np.random.default_rng(0).permutation(size),
    }

    def video(order):
        def sample(seed):
            return tuple(x[:, order] for x in inputs.video(preset.video, seed=seed, **heads))

        return sample

    table = {name: {"sample": video(order), "rules": {}} for name, order in orders.items()}
    table["text, causal"] = {
        "sample": lambda seed: inputs.text(preset.text, seed=seed, **heads),
        "rules": {"is_causal": True},
    }
    shape = (3, 1, size, preset.num_heads, preset.head_dim)
    table["white noise"] = {
        "sample": lambda seed: tuple(
            np.random.default_rng((5, seed)).normal(size=shape).astype(np.float32)
        ),
        "rules": {},
    }
    return table


def measure(case: dict, preset: Preset, options: Options, console: Console) -> dict[str, Any]:
    """Tune on some samples, then error and sparsity on others."""
    sizes = {"block_q": preset.block_q, "block_kv": preset.block_kv}
    with ThreadPoolExecutor() as pool:
        drawn = pool.map(case["sample"], range(options.samples + options.held_out))
        samples = [tuple(jnp.asarray(x, jnp.bfloat16) for x in each) for each in drawn]
    second = preset.pv_tolerance is not None
    kept = 1.0 - options.margin
    started = time.perf_counter()
    found = tune_sparge(
        samples[: options.samples], l1=kept * options.l1,
        pv_l1=kept * options.pv_l1 if second else None, sims=preset.sims,
        cdf_tolerance=preset.cdf_tolerance, pv_tolerance=preset.pv_tolerance or 0.0,
        console=console, **sizes, **case["rules"],
    )  # fmt: skip
    seconds = time.perf_counter() - started
    thresholds = {k: v for k, v in found.thresholds._asdict().items() if v is not None}

    def sparse(q, k, v, **changed):
        return sparge_attention(
            q, k, v, **thresholds | changed, attention_sink=True, return_sparsity=True,
            **sizes, **case["rules"],
        )  # fmt: skip

    errors, over_all, sparsities, of_qk = [], [], [], []
    for query, key, value in samples[options.samples :]:
        out, sparsity = sparse(query, key, value)
        sparsities.append(np.asarray(sparsity[0]))
        of_qk.append(np.asarray(sparse(query, key, value, pvthreshd=None)[1][0]))
        exact = dot_product_attention(
            *(x.astype(jnp.float32) for x in (query, key, value)), **case["rules"]
        )
        out, exact = (np.asarray(x, np.float64) for x in (out.astype(jnp.float32), exact))
        errors.append(np.abs(out - exact).sum((0, 1, 3)) / np.abs(exact).sum((0, 1, 3)))
        over_all.append(float(np.abs(out - exact).sum() / np.abs(exact).sum()))
    return {
        "thresholds": {name: np.asarray(x).tolist() for name, x in thresholds.items()},
        "dense_heads": found.dense.tolist(),
        "calibration_error": found.error.tolist(),
        "calibration_sparsity": found.sparsity.tolist(),
        "error": np.mean(errors, 0).tolist(),
        "worst_error": np.max(errors, 0).tolist(),
        "error_all_heads": over_all,
        "sparsity": np.mean(sparsities, 0).tolist(),
        "sparsity_of_qk": np.mean(of_qk, 0).tolist(),
        "mean_sparsity": float(np.mean(sparsities)),
        "tuning_seconds": seconds,
    }


def times(
    case: dict, preset: Preset, thresholds: dict[str, list[float]], seed: int
) -> dict[str, Any]:
    """Seconds of dense attention, sparse attention and its prediction, on one sample.

    Dense is the same implementation over all tiles, and on a GPU the dense kernel of "sage2". On a
    CPU the processor's seconds over all threads, which other programs do not change much.
    """
    sizes = {"block_q": preset.block_q, "block_kv": preset.block_kv}
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in case["sample"](seed))
    length = query.shape[1]
    grid = -(-length // preset.block_q), -(-length // preset.block_kv)
    whole = BlockMask.from_blocks(jnp.ones(grid), length, length, **sizes)
    chosen = {k: jnp.asarray(v) for k, v in thresholds.items() if k != "pvthreshd"}
    if max(thresholds["simthreshd1"]) < 0:  # known to refuse no block, which saves a pass
        chosen["simthreshd1"] = -1.0
    dense = partial(sparge_attention, blocks=whole, **case["rules"])
    if jax.default_backend() != "cpu":
        dense = partial(dot_product_attention, quant="sage2", **case["rules"])
    runs = {
        "dense": dense,
        "sparse": lambda q, k, v: sparge_attention(
            q, k, v, **chosen, attention_sink=True, **sizes, **case["rules"]
        ),
        "prediction": lambda q, k, v: predict(q, k, **chosen, **sizes).kv_num_blocks,
    }
    seconds = {name: _seconds(run, (query, key, value), preset) for name, run in runs.items()}
    return {"seconds": seconds, "saved_time": 1.0 - seconds["sparse"] / seconds["dense"]}


def _seconds(run, arguments, preset: Preset) -> float:
    if jax.default_backend() != "cpu":
        return benchmark(run, *arguments, repeats=preset.repeats).median
    compiled, found = jax.jit(run), []
    jax.block_until_ready(compiled(*arguments))
    for _ in range(preset.repeats):
        started = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        found.append(time.process_time() - started)
    return float(np.median(found))


def plot(results: dict[str, Any], path: Path) -> None:
    """Sparsity of every head, and the time that is left, by input."""
    from matplotlib.figure import Figure

    names = list(results["cases"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(names):
        row = results["cases"][name]
        left.scatter([i] * len(row["sparsity"]), row["sparsity"], s=18, color="tab:blue")
        left.plot([i - 0.3, i + 0.3], [row["mean_sparsity"]] * 2, color="tab:orange")
    left.set(ylabel="share of the products left out", ylim=(-0.05, 1), title="per head, and mean")
    time_left = [1 - results["cases"][name]["saved_time"] for name in names]
    kept = [1 - np.mean(results["cases"][name]["sparsity_of_qk"]) for name in names]
    place = np.arange(len(names))
    right.bar(place - 0.2, kept, 0.4, label="tiles kept")
    right.bar(place + 0.2, time_left, 0.4, label="time, prediction included")
    right.set(ylabel="relative to dense, same implementation", title=results["device"])
    right.legend()
    for axes in (left, right):
        axes.set_xticks(place, names, rotation=20, ha="right", fontsize="small")
    figure.savefig(path)


def main(options: Options) -> None:
    """Run all cases and write."""
    console, preset = Console(), PRESETS[options.preset]
    output = options.output or FOLDER / f"{options.preset}.json"
    started, found = time.monotonic(), {}
    known = json.loads(output.read_text())["cases"] if output.exists() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    measure_alone()
    for name, case in cases(preset).items():
        if time.monotonic() - started > options.time_budget:
            break
        if options.only not in name or (options.retime and name not in known):
            found |= {name: known[name]} if name in known else {}
            continue
        console.print(name)
        row = known[name] if options.retime else measure(case, preset, options, console)
        if options.retime or not options.tune_only:
            row |= times(case, preset, row["thresholds"], options.samples)
        found[name] = row
        left_out = [x for x in cases(preset) if x not in known | found]
        results = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "command": f"python -m experiments.sparse.run --preset {options.preset}",
            "preset": asdict(preset),
            "bounds": {"l1": options.l1, "pv_l1": options.pv_l1, "margin": options.margin},
            "samples": {"tuned": options.samples, "held_out": options.held_out},
            "cases": known | found,
            "left_out": left_out,
        }
        output.write_text(json.dumps(results, indent=1) + "\n")
        console.print(row.get("seconds", ""), row.get("saved_time", ""), row["mean_sparsity"])
    if options.tune_only or any("saved_time" not in row for row in found.values()):
        return
    plot(results, output.with_suffix(".svg"))
    table = Table("input", "sparsity", "error (held out)", "time saved")
    for name, row in found.items():
        cells = f"{row['mean_sparsity']:.3f}", f"{max(row['error_all_heads']):.4f}"
        table.add_row(name, *cells, f"{row['saved_time']:.1%}")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
