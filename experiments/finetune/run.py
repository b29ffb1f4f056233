"""Compare finetuning methods: ``python -m experiments.finetune.run STUDY --preset cpu|gpu``.

Studies: ``quality`` (all methods, seeds, ranks and learning rates), ``toy`` (what rounding does to
small updates), ``weights`` (perplexity beside bytes of packed weights), ``all``. Runs are appended
to ``OUTPUT/runs.jsonl``; a killed command, started again, goes on where it was.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from experiments.finetune import toy
from experiments.finetune.data import corpora
from jaxeff import checkpoint, train
from jaxeff.data import Corpus, batches
from jaxeff.finetune import FALQON, FP8LoRA, LoRA, QLoRA, adapt, init_state, train_step
from jaxeff.models import Decoder, ModelConfig
from jaxeff.optim.falqon import saturated_fraction
from jaxeff.quant import WEIGHTS, quantize_weights, weight_bytes
from jaxeff.report import machine

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a preset costs."""

    corpus_bytes: int
    layers: int
    width: int
    heads: int
    seq_len: int
    batch: int
    pretrain_steps: int
    pretrain_rate: float
    steps: int
    eval_tokens: int
    rank: int
    ranks: tuple[int, ...]
    seeds: int
    rates: tuple[float, ...]
    dtype: Any


PRESETS = {
    "cpu": Sizes(
        corpus_bytes=8_000_000,
        layers=2,
        width=128,
        heads=4,
        seq_len=64,
        batch=8,
        pretrain_steps=400,
        pretrain_rate=3e-3,
        steps=150,
        eval_tokens=32_768,
        rank=16,
        ranks=(8, 64, 128),
        seeds=3,
        rates=(2e-4, 2e-3, 6e-3, 2e-2, 6e-2),
        dtype=jnp.float32,
    ),
    "gpu": Sizes(
        corpus_bytes=16_000_000,
        layers=4,
        width=512,
        heads=8,
        seq_len=512,
        batch=16,
        pretrain_steps=2000,
        pretrain_rate=2e-3,
        steps=150,
        eval_tokens=400_000,
        rank=16,
        ranks=(8, 64, 128),
        seeds=3,
        rates=(2e-4, 2e-3, 2e-2, 6e-2),
        dtype=jnp.bfloat16,
    ),
}


def methods(rank: int) -> dict[str, Any]:
    """All compared methods; ``"full"`` trains every parameter."""
    return {
        "full": "full",
        "lora": LoRA(rank),
        "lora_fa": LoRA(rank, train_a=False),
        "qlora": QLoRA(rank),
        "fp8lora": FP8LoRA(rank),
        "falqon_paper": dataclasses.replace(FALQON.paper(rank), alpha=None),
        "falqon_code": FALQON.code(rank),
        "falqon_sr": dataclasses.replace(FALQON.code(rank), requant="sr"),
        "falqon_anchored": FALQON.anchored(rank),
        "falqon_anchored_all": dataclasses.replace(FALQON.anchored(rank), k="all"),
        "falqon_anchored_delayed": dataclasses.replace(FALQON.anchored(rank), scaling="delayed"),
    }


def base_model(sizes: Sizes, seed: int = 0) -> Decoder:
    """A fresh decoder over bytes."""
    config = ModelConfig.llama(
        vocab_size=256,
        num_layers=sizes.layers,
        embed_dim=sizes.width,
        num_heads=sizes.heads,
        mlp_dim=math.ceil(sizes.width * 8 / 3 / 128) * 128,
    )
    return Decoder(
        config,
        rngs=nnx.Rngs(seed),
        dtype=sizes.dtype,
        attention_fn=jax.nn.dot_product_attention,
    )


def pretrained(sizes: Sizes, code: Corpus, folder: Path) -> Decoder:
    """The base model: trained now, or read from an earlier run of the same size and corpus."""
    model, where = base_model(sizes), folder / f"base_{code.fingerprint}_{sizes.pretrain_steps}"
    if not where.exists():
        config = train.TrainConfig(sizes.pretrain_steps, sizes.pretrain_rate)
        stream = batches(code.train, sizes.batch, sizes.seq_len, seed=0)
        train.fit(model, stream, config, description="pretrain")
        checkpoint.save(where, nnx.state(model))
        return model
    nnx.update(model, checkpoint.restore(where, nnx.state(model)))
    return model


def windows(array: np.ndarray, sizes: Sizes) -> Iterator[np.ndarray]:
    """Held-out text in order, every byte once."""
    length = sizes.seq_len + 1
    count = min(len(array), sizes.eval_tokens) // (length * 16) * 16
    rows = array[: count * length].reshape(-1, 16, length)
    yield from rows.astype(np.int32)


def optimizer() -> optax.GradientTransformation:
    """AdamW with clipping, its learning rate in the state: one program serves every rate."""

    def make(learning_rate):
        adamw = optax.adamw(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0)
        return optax.chain(optax.clip_by_global_norm(3.0), adamw)

    return optax.inject_hyperparams(make)(learning_rate=1e-3)


class Arm:
    """One method at one rank: compiled once for all seeds and learning rates."""

    def __init__(self, method: Any, sizes: Sizes, base: Decoder):
        self.method, self.sizes = method, sizes
        self.graph, self.base = nnx.split(base)
        self.transform = optimizer()
        self.compiled = self.untrained = self.start = None

    def run(self, docs: Corpus, rate: float, seed: int) -> dict[str, Any]:
        """Trains from the base model; returns losses, times and bytes."""
        model = self._prepared(seed)
        if self.untrained is None:  # the same for every seed: B starts at zero
            self.untrained = train.evaluate(model, windows(docs.validation, self.sizes))
        step, state, frozen = self._split(model, seed)
        state = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(rate))
        # The step donates its state: the model keeps its own arrays, and no two leaves are one.
        state = jax.tree.map(jnp.copy, state)
        stream = batches(docs.train, self.sizes.batch, self.sizes.seq_len, seed=1000 + seed)
        arguments = (state, *frozen, jnp.asarray(stream[0]))
        if self.compiled is None:
            self.compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        facts = {"untrained_loss": self.untrained, **_bytes(model, state, self.compiled)}
        losses, seconds = [], []
        for index in range(self.sizes.steps):
            tokens = jnp.asarray(stream[index])
            began = time.perf_counter()
            state, metrics = self.compiled(state, *frozen, tokens)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
        self._join(model, state)
        facts |= {
            "loss": train.evaluate(model, windows(docs.validation, self.sizes)),
            "train_loss": losses,
            "step_ms": 1e3 * float(np.median(seconds[1:])),
        }
        if isinstance(self.method, FALQON):
            facts["saturated"] = max(float(saturated_fraction(m)) for m in state.melded.values())
        return facts

    def _prepared(self, seed):
        """A copy of the base model, adapted; the start by singular values is made once."""
        if self.start is None:
            model = nnx.merge(self.graph, jax.tree.map(jnp.copy, self.base))
            if self.method == "full":
                return model
            adapt(model, self.method, seed=seed)
            if not isinstance(self.method, FALQON):
                return model
            self.start = nnx.split(model)
        graph, state = self.start
        return nnx.merge(graph, jax.tree.map(jnp.copy, state))

    def _split(self, model, seed):
        if self.method == "full":
            graph, state = train.init_state(model, self.transform)
            return functools.partial(train.train_step, graph, self.transform), state, ()
        static, state, frozen = init_state(model, self.transform, seed=seed)
        return functools.partial(train_step, static), state, (frozen,)

    def _join(self, model, state):
        from jaxeff.finetune.training import write_back

        if self.method == "full":
            nnx.update(model, state.params, state.rest)
        else:
            write_back(model, state)


def _bytes(model, state, compiled) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    return {
        "weight_bytes": weight_bytes(model),
        "optimizer_bytes": sum(
            leaf.nbytes
            for name in ("opt_state", "falqon_state")
            for leaf in jax.tree.leaves(getattr(state, name, None))
        ),
        "step_temporary_bytes": int(getattr(analysis, "temp_size_in_bytes", 0)),
    }


def first_runs(sizes: Sizes) -> list[tuple[str, int, float, int]]:
    """Runs (method, rank, learning rate, seed) with seed 0: all methods, rates, then ranks."""
    names = list(methods(sizes.rank))
    runs = [(name, sizes.rank, 1e-3 if name == "full" else 2e-3, 0) for name in names]
    swept = [name for name in names if name.startswith(("falqon", "lora"))]
    runs += [(name, sizes.rank, rate, 0) for name in swept for rate in sizes.rates]
    # FALQON wants more than LoRA: A is frozen and small.
    ranked = {
        "lora": (2e-3, 6e-3),
        "falqon_code": (2e-2, 6e-2),
        "falqon_anchored": (6e-3, 2e-2, 6e-2),
        "falqon_anchored_all": (6e-3, 2e-2, 6e-2),
    }
    runs += [
        (name, rank, rate, 0)
        for rank in sizes.ranks
        for name, rates in ranked.items()
        for rate in rates
    ]
    return list(dict.fromkeys(runs))


def seed_runs(
    records: list[dict[str, Any]], sizes: Sizes, name: str, rank: int
) -> list[tuple[str, int, float, int]]:
    """The other seeds of an arm, at the method's best learning rate with seed 0."""
    rate = best_rate(records, name, rank)
    return [] if rate is None else [(name, rank, rate, seed) for seed in range(1, sizes.seeds)]


def best_rate(records: list[dict[str, Any]], name: str, rank: int) -> float | None:
    """Learning rate of the lowest held-out loss with seed 0; None if nothing was run."""
    runs = [r for r in records if (r["method"], r["rank"], r["seed"]) == (name, rank, 0)]
    return min(runs, key=lambda r: r["loss"])["learning_rate"] if runs else None


def quality(command: "Command", deadline: float) -> dict[str, Any]:
    """Trains what is not in ``runs*.jsonl`` yet, then sums up."""
    sizes = PRESETS[command.preset]
    code, docs = corpora(sizes.corpus_bytes)
    base = pretrained(sizes, code, command.work)
    if command.workers > 1:
        skipped = _in_parts(command, deadline)
    else:
        skipped = _train_missing(command, sizes, docs, base, deadline)
    records = _records(command.folder)
    full = train.evaluate(base, windows(docs.validation, sizes))
    return {
        "corpora": {
            "pretrain": {"bytes": len(code.train), "fingerprint": code.fingerprint},
            "finetune": {"bytes": len(docs.train), "fingerprint": docs.fingerprint},
            "validation_bytes": len(docs.validation),
        },
        "sizes": dataclasses.asdict(sizes) | {"dtype": jnp.dtype(sizes.dtype).name},
        "workers": command.workers,
        "untrained_loss": full,
        "methods": summary(records, sizes),
        "sweep": sweep(records, sizes),
        "skipped": skipped,
    }


def _train_missing(command, sizes, docs, base, deadline) -> list[str]:
    """Trains this part's arms, one after the other; returns what there was no time for."""
    part, of = (int(x) for x in command.part.split("/")) if command.part else (0, 1)
    plan: dict[tuple[str, int], list] = {}
    wanted = command.only.split(",") if command.only else list(methods(sizes.rank))
    for run in first_runs(sizes):
        if run[0] in wanted:
            plan.setdefault(run[:2], []).append(run)
    log = command.folder / (f"runs_{part}.jsonl" if command.part else "runs.jsonl")
    done = {record["key"]: record for record in _records(command.folder)}
    skipped = []
    for (name, rank), runs in list(plan.items())[part::of]:
        arm = Arm(methods(rank)[name], sizes, base)

        def train_all(runs, arm=arm, name=name, rank=rank):
            for run in runs:
                if _key(run) in done:
                    continue
                if time.monotonic() > deadline:
                    skipped.append(_key(run))
                    continue
                facts = arm.run(docs, *run[2:])
                settings = {"method": name, "rank": rank, "learning_rate": run[2], "seed": run[3]}
                done[_key(run)] = {"key": _key(run), **settings, **facts}
                with log.open("a") as out:
                    out.write(json.dumps(done[_key(run)]) + "\n")

        train_all(runs)
        train_all(seed_runs(list(done.values()), sizes, name, rank))
    return skipped


def _in_parts(command: "Command", deadline: float) -> list[str]:
    """The arms in several processes, which share the device: one alone waits for the host."""
    left = max(1.0, deadline - time.monotonic())
    arguments = ["quality", "--preset", command.preset, "--time-budget", str(left)]
    arguments += ["--output", str(command.output), "--work", str(command.work)]
    arguments += ["--only", command.only] * bool(command.only)
    program = [sys.executable, "-m", "experiments.finetune.run", *arguments]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    parts = [
        subprocess.Popen([*program, "--part", f"{i}/{command.workers}"], env=environment)
        for i in range(command.workers)
    ]
    failed = [i for i, part in enumerate(parts) if part.wait()]
    if failed:
        raise RuntimeError(f"parts {failed} of the runs failed; see their messages")
    done = {record["key"] for record in _records(command.folder)}
    return [_key(run) for run in first_runs(PRESETS[command.preset]) if _key(run) not in done]


def summary(records: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """Mean, standard error and costs of every method at its best rate and the standard rank."""
    table = {}
    for name in methods(sizes.rank):
        rate, rank = best_rate(records, name, sizes.rank), sizes.rank
        runs = [
            r for r in records if (r["method"], r["rank"], r["learning_rate"]) == (name, rank, rate)
        ]
        if not runs:
            continue
        losses = [r["loss"] for r in runs]
        table[name] = {
            "learning_rate": rate,
            "seeds": sorted(r["seed"] for r in runs),
            "loss": float(np.mean(losses)),
            "standard_error": _error(losses),
            "untrained_loss": runs[0]["untrained_loss"],
            "step_ms": float(np.median([r["step_ms"] for r in runs])),
            **{k: runs[0][k] for k in _BYTES},
        }
    return table


def sweep(records: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """Loss by method and learning rate with seed 0; by rank, at the best rate, of all seeds."""
    by_rate: dict[str, dict[str, float]] = {}
    by_rank: dict[str, dict[str, Any]] = {}
    for r in sorted(records, key=lambda r: r["learning_rate"]):
        if r["rank"] == sizes.rank and r["seed"] == 0:
            by_rate.setdefault(r["method"], {})[f"{r['learning_rate']:.0e}"] = r["loss"]
    for name, rank in sorted({(r["method"], r["rank"]) for r in records}):
        rate = best_rate(records, name, rank)
        runs = [
            r for r in records if (r["method"], r["rank"], r["learning_rate"]) == (name, rank, rate)
        ]
        if not runs or len({r["rank"] for r in records if r["method"] == name}) < 2:
            continue
        losses = [r["loss"] for r in runs]
        by_rank.setdefault(name, {})[str(rank)] = {
            "learning_rate": rate,
            "loss": float(np.mean(losses)),
            "standard_error": _error(losses),
            "step_ms": float(np.median([r["step_ms"] for r in runs])),
            **{k: runs[0][k] for k in _BYTES},
        }
    return {"learning_rate": by_rate, "rank": by_rank}


_BYTES = ("weight_bytes", "optimizer_bytes", "step_temporary_bytes")


def _error(losses: list[float]) -> float | None:
    """Standard error of the mean; None for one run."""
    return float(np.std(losses, ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None


def weights(command: "Command", deadline: float) -> dict[str, Any]:
    """Loss and perplexity on held-out code beside bytes, for every storage of the weights."""
    del deadline
    sizes = PRESETS[command.preset]
    code, _ = corpora(sizes.corpus_bytes)
    base = pretrained(sizes, code, command.work)
    graph, state = nnx.split(base)
    table = {}
    for name in (None, *WEIGHTS):
        model = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        if name is not None:
            quantize_weights(model, name)
        loss = train.evaluate(model, windows(code.validation, sizes))
        table[name or "full"] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "block_weight_bytes": weight_bytes(model.layers),
            "bytes": weight_bytes(model),
        }
    return {
        "sizes": dataclasses.asdict(sizes) | {"dtype": jnp.dtype(sizes.dtype).name},
        "storages": table,
    }


def toy_tables(command: "Command", deadline: float) -> dict[str, Any]:
    """The specification's two tables."""
    del deadline
    return toy.tables(seeds=range(1 if command.preset == "cpu" else 3))


STUDIES = {"toy": toy_tables, "quality": quality, "weights": weights}


@dataclasses.dataclass(frozen=True)
class Command:
    """Run a study and write its JSON and picture."""

    study: tyro.conf.Positional[Literal["toy", "quality", "weights", "all"]] = "all"
    """What to run."""

    preset: Literal["cpu", "gpu"] = "cpu"
    """Sizes."""

    time_budget: float = 600.0
    """Seconds after which no further training starts; the next call goes on."""

    output: Path = RESULTS
    """Folder of the results; ``PRESET`` is appended."""

    work: Path = Path("runs/finetune")
    """Folder of the pretrained base model."""

    only: str = ""
    """Methods of ``quality`` to run, with commas; by default all."""

    workers: int = 1
    """Processes that share the runs of ``quality``."""

    part: str = ""
    """Used by the program itself: ``i/n``, the arms of one of them; nothing is summed up."""

    @property
    def folder(self) -> Path:
        """Where this preset's files go."""
        return self.output / self.preset

    def run(self) -> None:
        """Run the chosen studies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self.time_budget
        if self.part:
            sizes = PRESETS[self.preset]
            code, docs = corpora(sizes.corpus_bytes)
            base = pretrained(sizes, code, self.work)
            _train_missing(self, sizes, docs, base, deadline)
            return
        for name in STUDIES if self.study == "all" else (self.study,):
            began = time.process_time()
            results = STUDIES[name](self, deadline)
            results |= {
                "machine": machine(),
                "seed": 0,
                "cpu_seconds_of_this_call": round(time.process_time() - began, 1),
                "command": f"python -m experiments.finetune.run {name} --preset {self.preset}"
                + f" --only {self.only}" * bool(self.only),
            }
            (self.folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
            from experiments.finetune import plot

            plot.draw(name, results, self.folder / f"{name}.png")
            sys.stdout.write(f"{self.folder / name}.json\n")


def _key(run: tuple[str, int, float, int]) -> str:
    name, rank, rate, seed = run
    return f"{name}/r{rank}/lr{rate:.0e}/s{seed}"


def _records(folder: Path) -> list[dict[str, Any]]:
    """All runs so far, whoever trained them."""
    logs = sorted(folder.glob("runs*.jsonl"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


if __name__ == "__main__":
    tyro.cli(Command).run()
