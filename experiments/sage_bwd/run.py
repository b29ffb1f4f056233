"""Training with an INT8 attention backward: gradient error, and the loss a small model ends at.

``python -m experiments.sage_bwd.run`` writes ``results/cpu.json`` and a plot: the cosine table of
SageBwd over the spread of Q and K, and a language model trained with ``sage_bwd`` and with bfloat16
attention from the same seeds.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track

from jaxeff import train
from jaxeff.data import batches, stdlib_corpus
from jaxeff.models import Decoder, ModelConfig
from pallas_kernels import QUANTS, dot_product_attention, testing

FOLDER = Path(__file__).parent / "results"
SIGMAS = (1, 3, 5, 8, 10)
# The paper's scales of Q and K, one per tile, and two finer choices of `AttentionQuant`.
GRANULARITIES = ("per_block", "per_thread", "per_token")
# arXiv 2603.02170, table 1: cosine of O, dQ, dK, dV.
PUBLISHED = {
    1: (0.9999, 0.9998, 0.9998, 0.9999),
    3: (0.9992, 0.9971, 0.9970, 0.9992),
    5: (0.9982, 0.9798, 0.9799, 0.9982),
    8: (0.9953, 0.8900, 0.8886, 0.9953),
    10: (0.9933, 0.7823, 0.7820, 0.9933),
}


@dataclass(frozen=True)
class Options:
    """Measure gradients and train; writes one JSON and one SVG."""

    part: Literal["all", "table", "train"] = "all"
    """What to run; the other part of an existing JSON is kept."""
    output: Path = FOLDER / "cpu.json"
    """File to write."""
    tokens: int = 2048
    """Sequence length of the gradient table."""
    head_dim: int = 128
    """Head dimension of the gradient table."""
    steps: int = 1500
    """Optimiser steps of each training run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    layers: int = 2
    """Decoder layers."""
    embed_dim: int = 64
    """Model dimension; heads have 32 dimensions."""
    seq_len: int = 256
    """Tokens (bytes) of a training row."""
    batch_size: int = 4
    """Rows of a batch."""
    time_budget: float = 3600.0
    """Seconds after which no further training run starts; those left out are listed."""


def gradient_table(tokens: int, head_dim: int, console: Console) -> list[dict[str, Any]]:
    """Cosine of O, dQ, dK, dV against float32, Q and K of standard deviation sigma."""
    rows = []
    for sigma in track(SIGMAS, description="gradients", console=console):
        rng = np.random.default_rng(sigma)
        shape = (1, tokens, 1, head_dim)
        arrays = [jnp.asarray(rng.normal(size=shape) * s, jnp.bfloat16) for s in (sigma, sigma, 1)]
        d_out = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

        def run(quant, dtype, arrays=arrays, d_out=d_out):
            attend = lambda *x: dot_product_attention(*x, quant=quant, implementation="xla")  # noqa: E731
            out, pull = jax.vjp(attend, *(x.astype(dtype) for x in arrays))
            return (out, *pull(d_out.astype(dtype)))

        got = {
            name: run(replace(QUANTS["sage_bwd"], granularity=name), jnp.bfloat16)
            for name in GRANULARITIES
        }
        with jax.default_matmul_precision("highest"):
            exact = run(None, jnp.float32)
        names = ("O", "dQ", "dK", "dV")

        def each(measure, name, got=got, exact=exact, names=names):
            pairs = zip(names, got[name], exact, strict=True)
            return {n: measure(a, b) for n, a, b in pairs}

        row = {"sigma": sigma, "published": dict(zip(names, PUBLISHED[sigma], strict=True))}
        row |= {
            "cosine": each(testing.cosine, "per_block"),
            "relative_l1": each(testing.relative_l1, "per_block"),
            "finer": {name: each(testing.cosine, name) for name in GRANULARITIES[1:]},
        }
        rows.append(row)
    return rows


def attention_of(quant: str | None):
    """Attention on bfloat16 queries, keys and values, whatever the model computes in."""

    def attend(query, key, value, **arguments):
        low = (x.astype(jnp.bfloat16) for x in (query, key, value))
        return dot_product_attention(*low, quant=quant, **arguments).astype(query.dtype)

    return attend


def train_run(options: Options, quant: str | None, seed: int, console: Console) -> dict[str, Any]:
    """Train one model; losses, and the loss on held-out text."""
    corpus = stdlib_corpus()
    heads = options.embed_dim // 32
    config = ModelConfig.llama(
        vocab_size=256,
        num_layers=options.layers,
        embed_dim=options.embed_dim,
        num_heads=heads,
        num_kv_heads=max(1, heads // 2),
        head_dim=32,
        mlp_dim=3 * options.embed_dim,
    )
    model = Decoder(config, rngs=nnx.Rngs(seed), attention_fn=attention_of(quant))
    result = train.fit(
        model,
        batches(corpus.train, options.batch_size, options.seq_len, seed=seed),
        train.TrainConfig(steps=options.steps, learning_rate=3e-3),
        description=f"{quant or 'bfloat16'} seed {seed}",
        console=console,
    )
    # The same 16 batches of held-out text for every run.
    held_out = iter(batches(corpus.validation, 8, options.seq_len, seed=99))
    validation = train.evaluate(model, [next(held_out) for _ in range(16)])
    tail = max(1, options.steps // 10)
    return {
        "attention": quant or "bfloat16",
        "seed": seed,
        "train_loss": [round(float(loss), 5) for loss in result.losses],
        "final_train_loss": float(result.losses[-tail:].mean()),
        "validation_loss": float(validation),
        "seconds": result.seconds,
    }


def training(options: Options, console: Console) -> dict[str, Any]:
    """All runs, and the ratio of the losses at the end."""
    started, runs, left_out = time.monotonic(), [], []
    for seed in options.seeds:
        for quant in (None, "sage_bwd"):
            if time.monotonic() - started > options.time_budget:
                left_out.append([quant or "bfloat16", seed])
                continue
            runs.append(train_run(options, quant, seed, console))
    return {"runs": runs, "left_out": left_out, "gap": gaps(runs)}


def gaps(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative difference of the losses, per seed and of the means, ``sage_bwd / bfloat16 - 1``."""
    found = {}
    for key in ("final_train_loss", "validation_loss"):
        by = {(run["attention"], run["seed"]): run[key] for run in runs}
        seeds = [seed for name, seed in by if name == "sage_bwd" and ("bfloat16", seed) in by]
        if seeds:
            low, high = ([by[name, seed] for seed in seeds] for name in ("sage_bwd", "bfloat16"))
            found[key] = {
                "per_seed": [a / b - 1 for a, b in zip(low, high, strict=True)],
                "of_means": sum(low) / sum(high) - 1,
            }
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Training curves, and the cosine of the gradients beside the published one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {"bfloat16": "tab:blue", "sage_bwd": "tab:orange"}
    for run in results.get("training", {}).get("runs", ()):
        loss = np.convolve(run["train_loss"], np.ones(20) / 20, mode="valid")
        label = run["attention"] if run["seed"] == 0 else None
        left.plot(loss, color=colours[run["attention"]], label=label, linewidth=1)
    left.set(xlabel="step", ylabel="loss, nats per byte (mean of 20)", title="three seeds each")
    left.legend()
    table = results.get("gradients", ())
    for name, marker in (("O", "o"), ("dQ", "s"), ("dK", "^"), ("dV", "v")):
        sigmas = [row["sigma"] for row in table]
        line = right.plot(sigmas, [row["cosine"][name] for row in table], marker=marker, label=name)
        published = [row["published"][name] for row in table]
        right.plot(sigmas, published, "--", color=line[0].get_color(), linewidth=1)
    right.set(xlabel="standard deviation of Q and K", ylabel="cosine with float32")
    right.set_title("gradients; dashed: arXiv 2603.02170, table 1")
    right.legend()
    figure.savefig(path)


def main(options: Options) -> None:
    """Run the parts asked for and write."""
    console = Console()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    results["device"], results["jax"] = jax.devices()[0].device_kind, jax.__version__
    results["command"] = "python -m experiments.sage_bwd.run"
    results["options"] = {**asdict(options), "output": options.output.name}
    if options.part in ("all", "table"):
        results["gradients"] = gradient_table(options.tokens, options.head_dim, console)
    if options.part in ("all", "train"):
        results["training"] = training(options, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.output.with_suffix(".svg"))
    console.print(results.get("training", {}).get("gap", {}))


if __name__ == "__main__":
    main(tyro.cli(Options))
