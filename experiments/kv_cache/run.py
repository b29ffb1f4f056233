"""KV-cache compression, measured: ``python -m experiments.kv_cache.run e1|e2|e3|e4|e5|all``.

E1 and E3 train a small model each (E2 asks E1's, E4 asks E3's) and then evaluate cell by cell.
Every cell is a line of ``OUTPUT/cells.jsonl`` as soon as it is known, and every training has a
checkpoint, so the same command goes on where it was stopped. Reports are
``OUTPUT/<experiment>.json``, plots ``OUTPUT/<experiment>.png``.
"""

import functools
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console

from experiments.kv_cache import evaluate
from experiments.kv_cache.tasks import Recall, Trace
from experiments.kv_cache.training import make_model, train
from jaxeff.nn.rope import RopeConfig

GATE = 0.95  # a full cache must answer this share before compression numbers mean anything
SHORT_ROPE = RopeConfig(theta=1000.0)  # contexts here have a few hundred tokens

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "recall": Recall(slots=8, pairs=3),
        "trace": Trace(starts=3, steps=5, checks=2),
        "sizes": {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2},
        "training": {"steps": 3000, "batch": 32, "learning_rate": 3e-3},
        "rows": 192,
        "ratios": (0.3, 0.1, 0.5),  # in order of importance
        "fractions": (0.34, 0.16, 0.5),
        "recall_methods": (
            "kvzip_pair",
            "kvzip_pair_int8",
            "snap_oracle",
            "snap_agnostic",
            "snap_reuse",
            "h2o_max",
            "random",
        ),
        "trace_methods": ("rkv", "snapkv", "streaming_llm", "random"),
        "depths": (0.0, 0.5, 1.0),
        "lambdas": (),
        "buffer": 16,
    },
    "gpu": {
        "recall": Recall(slots=100, pairs=40, symbols=80),
        "trace": Trace(starts=8, steps=32, base=16, constants=8, names=64, checks=3),
        "sizes": {"num_layers": 6, "embed_dim": 256, "num_heads": 8, "num_kv_heads": 4},
        "training": {"steps": 8000, "batch": 64, "learning_rate": 1e-3},
        "rows": 512,
        "ratios": (0.9, 0.7, 0.5, 0.3, 0.2, 0.1),
        "fractions": (1.0, 0.5, 0.34, 0.25, 0.16, 0.1, 0.05),
        "recall_methods": tuple(evaluate.RECALL_METHODS),
        "trace_methods": tuple(evaluate.TRACE_METHODS),
        "depths": tuple(i / 10 for i in range(11)),
        "lambdas": (0.0, 0.01, 0.3, 1.0),
        "buffer": 64,
    },
}


@dataclass(frozen=True)
class Options:
    """Which experiments, how large, for how long."""

    experiment: Annotated[Literal["e1", "e2", "e3", "e4", "e5", "all"], tyro.conf.Positional]
    """e1 many-query recall, e2 needle and copy, e3 redundant traces, e4 longer ones, e5 bytes (on a
    GPU latency too)."""

    preset: Literal["cpu", "gpu"] = "cpu"
    """Sizes of tasks, models and grids."""

    seeds: int = 1
    """Models per task, seeds 0, 1, …"""

    time_budget: float | None = None
    """Seconds for everything; half of it for training. What is cut off is listed as skipped."""

    output: Path = Path("runs/kv_cache")
    """Folder of the checkpoints, cells, reports and plots."""


class Session:
    """Time, folder and cells of one command."""

    def __init__(self, options: Options, words: list[str]):
        self.options, self.preset = options, PRESETS[options.preset]
        self.command = "python -m experiments.kv_cache.run " + " ".join(
            Path(word).name if "/" in word else word for word in words
        )
        self.began, self.console = time.perf_counter(), Console(stderr=True)
        self.output = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.skipped: list[str] = []

    def left(self, share: float = 1.0) -> float:
        """Seconds until ``share`` of the budget is used up."""
        budget = self.options.time_budget
        spent = time.perf_counter() - self.began
        return float("inf") if budget is None else share * budget - spent

    def cells(self) -> dict[str, dict[str, Any]]:
        """Cells known so far, by name; a line cut off by a kill is dropped."""
        path, known = self.output / "cells.jsonl", {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            known[record["cell"]] = record
        return known

    def cell(self, name: str, run: Any, **facts: Any) -> None:
        """Run a cell unless it is known or the time is over."""
        if name in self.cells():
            return
        if self.left() <= 0:
            self.skipped.append(name)
            return
        record = {"cell": name, **facts, **run()}
        with (self.output / "cells.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.console.print(f"{name}: {record['accuracy']:.3f}, bytes {record['bytes_over_full']}")

    def model(self, kind: str, seed: int) -> tuple[Any, dict[str, Any]]:
        """Return a trained model and what its training reported."""
        task, folder = self.preset[kind], self.output / f"{kind}_seed{seed}"
        folder.mkdir(exist_ok=True)
        sizes = {**self.preset["sizes"], "rope": SHORT_ROPE}
        model = make_model(task.vocab_size, sizes, seed)
        limit = self.left(0.5)
        report = lambda step, loss, hit: self.console.print(  # noqa: E731
            f"{kind} seed {seed}: step {step}, loss {loss:.3f}, accuracy {hit:.3f}"
        )
        facts = train(
            task,
            model,
            seed=seed + 1,
            folder=folder,
            seconds=None if limit == float("inf") else max(limit, 1.0),
            report=report,
            **self.preset["training"],
        )
        return model, facts

    def write(self, name: str, trained: dict[str, Any], **more: Any) -> None:
        """Write the report of an experiment from its cells."""
        cells = [c for n, c in self.cells().items() if n.startswith(f"{name}/")]
        full = [c["accuracy"] for c in cells if c["method"] == "full"]
        report = {
            "command": self.command,
            "preset": self.options.preset,
            "seeds": list(range(self.options.seeds)),
            "environment": environment(),
            "full_cache_accuracy": min(full) if full else None,
            "gate": GATE,
            "gate_passed": bool(full) and min(full) >= GATE,
            "training": trained,
            **more,
            "cells": cells,
            "skipped": [n for n in self.skipped if n.startswith(f"{name}/")],
        }
        path = self.output / f"{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        try:
            from experiments.kv_cache import plot

            plot.draw(name, report, path.with_suffix(".png"))
        except ImportError as error:
            self.console.print(f"no plot: {error}")


def environment() -> dict[str, Any]:
    """Versions and device, without names of machines or paths."""
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "numpy")}
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **versions,
        "device": device.device_kind,
        "platform": device.platform,
    }


def _models(session: Session, kind: str) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    for seed in range(session.options.seeds):
        yield seed, *session.model(kind, seed)


def run_recall(session: Session, names: tuple[str, ...]) -> None:
    """E1: accuracy over ratio for every method; E2: one needle, and copying."""
    preset, task, trained = session.preset, session.preset["recall"], {}
    for seed, model, facts in _models(session, "recall"):
        trained[f"seed{seed}"] = facts
        grid = {"rows": preset["rows"], "seed": 1000 + seed}
        everything = [("full", 1.0)]
        everything += [(m, r) for r in preset["ratios"] for m in preset["recall_methods"]]
        if "e1" in names:
            for method, ratio in everything:
                session.cell(
                    f"e1/{method}/{ratio}/seed{seed}",
                    functools.partial(evaluate.recall_cell, task, model, method, ratio, **grid),
                    method=method,
                    ratio=ratio,
                    seed=seed,
                )
        if "e2" in names:
            for method, ratio in (("full", 1.0), ("kvzip_pair", 0.3), ("snap_agnostic", 0.3)):
                for depth in preset["depths"]:
                    session.cell(
                        f"e2/needle/{method}/{ratio}/{depth}/seed{seed}",
                        functools.partial(
                            evaluate.needle_cell, task, model, method, ratio, depth, **grid
                        ),
                        method=method,
                        ratio=ratio,
                        depth=depth,
                        seed=seed,
                        kind="needle",
                    )
            for method, ratio in (("full", 1.0), *(("kvzip_pair", r) for r in preset["ratios"])):
                session.cell(
                    f"e2/copy/{method}/{ratio}/seed{seed}",
                    functools.partial(evaluate.copy_cell, task, model, method, ratio, **grid),
                    method=method,
                    ratio=ratio,
                    seed=seed,
                    kind="copy",
                )
    for name in names:
        session.write(name, trained, task=evaluate.as_dict(task))


def run_trace(session: Session, names: tuple[str, ...]) -> None:
    """E3: accuracy over budget; E4: the same on programs 1.6 times as long as in training."""
    preset, task, trained = session.preset, session.preset["trace"], {}
    longer = min(round(1.6 * task.steps), task.names - task.starts)
    for seed, model, facts in _models(session, "trace"):
        trained[f"seed{seed}"] = facts
        for name in names:
            steps = task.steps if name == "e3" else longer
            cells = [("full", 1.0, task.checks, "")]
            cells += [
                (m, f, task.checks, "")
                for f in preset["fractions"]
                for m in preset["trace_methods"]
            ]
            cells += [
                ("rkv", 0.16, task.checks, evaluate.lambda_options(x)) for x in preset["lambdas"]
            ]
            if name == "e3":  # without redundancy R-KV has nothing to find
                cells += [(m, 0.34, 0, "") for m in ("rkv", "snapkv")] + [("full", 1.0, 0, "")]
            for method, fraction, checks, options in cells:
                session.cell(
                    f"{name}/{method}/{fraction}/checks{checks}/{options}/seed{seed}",
                    functools.partial(
                        evaluate.trace_cell,
                        task,
                        model,
                        method,
                        fraction,
                        rows=preset["rows"],
                        seed=2000 + seed,
                        checks=checks,
                        buffer=preset["buffer"],
                        steps=steps,
                        options=options,
                    ),
                    method=method,
                    fraction=fraction,
                    checks=checks,
                    options=options,
                    seed=seed,
                )
    for name in names:
        more = {"task": evaluate.as_dict(task), "redundancy": task.redundancy(task.checks)}
        session.write(name, trained, **more, steps=task.steps if name == "e3" else longer)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    words = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=words, prog="python -m experiments.kv_cache.run")
    session = Session(options, words)
    chosen = {"all": ("e1", "e2", "e3", "e4", "e5")}.get(options.experiment, (options.experiment,))
    if recall := tuple(n for n in ("e1", "e2") if n in chosen):
        run_recall(session, recall)
    if traces := tuple(n for n in ("e3", "e4") if n in chosen):
        run_trace(session, traces)
    if "e5" in chosen:
        from experiments.kv_cache import efficiency

        report = {"command": session.command, "environment": environment()}
        report |= efficiency.run(session.left)
        (session.output / "e5.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
