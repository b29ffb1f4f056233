"""KV-cache compression, measured: ``python -m experiments.kv_cache.run e1|e2|e3|e4|e5|all``.

E1 and E3 train a small model each (E2 asks E1's, E4 asks E3's) and then evaluate cell by cell.
Every cell is a line of ``OUTPUT/cells.jsonl`` as soon as it is known, and every training leaves
its weights, so the same command goes on where it was stopped. Reports are
``OUTPUT/<experiment>.json``, plots ``OUTPUT/<experiment>.png``.
"""

import functools
import heapq
import importlib.metadata
import itertools
import json
import math
import platform
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from experiments.kv_cache import evaluate
from experiments.kv_cache.tasks import Recall, Trace
from experiments.kv_cache.training import Stage, train
from jaxeff.nn.rope import RopeConfig
from jaxeff.report import command_line

GATE = 0.95  # a full cache must answer this share before compression numbers mean anything
MARGIN = 20.0  # seconds before the end of the budget after which no cell begins

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "recall": {
            "task": Recall(slots=8, pairs=3),
            "sizes": {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2},
            "stages": [Stage(1.0, 32)],
            "steps": 3000,
            "learning_rates": (3e-3,),
            "share": 0.3,
        },
        "trace": {
            "task": Trace(starts=3, steps=5, checks=2),
            "sizes": {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "num_kv_heads": 2},
            "stages": [
                Stage(0.3, 64, {"most": 0, "drills": 64}, 0.95),
                Stage(0.3, 32, {"most": 0, "drills": 8}, 0.99),
                Stage(0.4, 32),
            ],
            "steps": 3000,
            "learning_rates": (2e-3,),
            "share": 0.6,
        },
        "dtype": "float32",
        "theta": 10_000.0,
        "workers": 0,
        "threads": 1,
        "rows": {"recall": 192, "trace": 192},
        "questions": 3,
        "ratios": (0.3, 0.1, 0.5),  # in order of importance, as everywhere below
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
        "longer": 8,  # lines of E4
        "lambdas": (),
        "buffer": 16,
    },
    "gpu": {
        "recall": {
            "task": Recall(slots=86, pairs=40, symbols=80),
            "sizes": {
                "num_layers": 3,
                "embed_dim": 128,
                "num_heads": 4,
                "num_kv_heads": 2,
            },
            "stages": [
                Stage(0.5, 256, {"slots": 8}, 0.97),
                Stage(0.2, 64, {"slots": 24, "groups": 2}, 0.98),
                Stage(0.3, 16, {"groups": 2}, 0.998),
            ],
            "steps": 20_000,
            "learning_rates": (1e-3,),  # at 2e-3 and 3e-3 a seed learned too late
            "share": 0.3,
        },
        "trace": {
            "task": Trace(
                starts=8, steps=12, base=16, constants=8, names=32, checks=8, overwrite=True
            ),
            # As in the paper's models: at 1e4 a rotation turns copies of a key away from it.
            "theta": 500_000.0,
            "sizes": {
                "num_layers": 4,
                "embed_dim": 192,
                "num_heads": 6,
                "num_kv_heads": 3,
            },
            "stages": [
                Stage(0.25, 256, {"most": 0, "steps": 6, "drills": 256}, 0.95),
                Stage(0.1, 256, {"most": 0, "steps": 6, "drills": 64}, 0.98),
                Stage(0.15, 64, {"most": 0, "drills": 16}, 0.99),
                Stage(0.5, 18, {}, 0.9998),
            ],
            "steps": 20_000,
            "learning_rates": (5e-4,),  # of the drill 3e-4 to 1e-3 leave the plateau, more does not
            "share": 0.5,
        },
        "dtype": "bfloat16",
        "theta": 10_000.0,
        "workers": 4,
        "threads": 8,
        "rows": {"recall": 256, "trace": 512},
        "questions": 8,
        "ratios": (0.3, 0.1, 0.2, 0.5, 0.7, 0.9),
        "fractions": (0.34, 0.16, 0.1, 0.25, 0.5, 0.05, 1.0),
        "recall_methods": (
            "kvzip_pair",
            "snap_agnostic",
            "snap_reuse",
            "snap_oracle",
            "kvzip_pair_int8",
            "kvzip_pair_fp8",
            "streaming_llm",
            "random",
            "h2o_max",
            "kvzip_uniform",
            "expected_attention",
            "keydiff",
            "knorm",
            "tova",
            "kvzip_head",
            "kvzip_plus",
        ),
        "trace_methods": (
            "rkv",
            "snapkv",
            "streaming_llm",
            "random",
            "h2o",
            "tova",
            "keydiff",
            "expected_attention",
        ),
        "depths": tuple(i / 10 for i in range(11)),
        "longer": 13,  # at 19 lines 2 % of the full cache's trace is right
        "lambdas": (0.0, 0.01, 0.3, 1.0),
        "buffer": 64,
    },
}

# A minute on a GPU: what rounding the scores changes.
PRESETS["short"] = PRESETS["gpu"] | {
    "recall": PRESETS["gpu"]["recall"]
    | {
        "task": Recall(slots=24, pairs=11, symbols=80),
        "stages": [Stage(0.4, 256, {"slots": 8}, 0.97), Stage(0.6, 64, {"groups": 2}, 0.998)],
        "share": 0.35,
    },
    "ratios": (0.3, 0.1),
    "recall_methods": ("kvzip_pair", "kvzip_pair_fp8", "kvzip_pair_int8", "snap_agnostic"),
}


@dataclass(frozen=True)
class Options:
    """Which experiments, how large, for how long."""

    experiment: Annotated[Literal["e1", "e2", "e3", "e4", "e5", "all"], tyro.conf.Positional]
    """e1 many-query recall, e2 needle and copy, e3 redundant traces, e4 longer ones, e5 bytes (on a
    GPU latency too)."""

    preset: Literal["cpu", "short", "gpu"] = "cpu"
    """Sizes of tasks, models and grids."""

    seeds: int = 1
    """Models per task, seeds 0, 1, …"""

    rows: int | None = None
    """Problems of a cell, instead of the preset's."""

    time_budget: float | None = None
    """Seconds for everything. What is cut off is listed as skipped."""

    output: Path = Path("runs/kv_cache")
    """Folder of the weights, cells, reports and plots."""


class Session:
    """Time, folder and cells of one command."""

    def __init__(self, options: Options, words: list[str]):
        self.options, self.preset = options, PRESETS[options.preset]
        if options.rows is not None:
            rows = dict.fromkeys(self.preset["rows"], options.rows)
            self.preset = self.preset | {"rows": rows}
        self.command = command_line("experiments.kv_cache.run", words)
        self.began, self.console = time.perf_counter(), Console(stderr=True, width=160)
        self.output = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.skipped: list[str] = []
        self.lock = threading.Lock()
        # Compiling is what costs time, and threads compile side by side.
        self.pool = ThreadPoolExecutor(self.preset["threads"])
        self.waiting: list[tuple[int, int, Any]] = []  # a heap of (rank, number, cells)
        self.jobs: list[Future] = []
        self.device = threading.Event()  # set when recall may train: one training at a time

    def say(self, text: str) -> None:
        """Print a line with the time."""
        self.console.print(f"[{time.perf_counter() - self.began:.0f} s] {text}", markup=False)

    def left(self) -> float:
        """Seconds until the budget is used up."""
        budget = self.options.time_budget
        return math.inf if budget is None else budget - (time.perf_counter() - self.began)

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
        if self.left() <= MARGIN:
            self.skipped.append(name)
            return
        begin = time.perf_counter()
        try:
            record = {"cell": name, **facts, **run()}
        except Exception as error:  # one method must not take the others with it
            self.skipped.append(name)
            self.say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            return
        record["seconds"] = round(time.perf_counter() - begin, 1)
        with self.lock, (self.output / "cells.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.say(
            f"{name}: {record['accuracy']:.4f}, bytes {record['bytes_over_full']}, "
            f"{record['seconds']} s"
        )

    def submit(self, rank: int, name: str, run: Any, models: dict[int, Any], **facts: Any) -> None:
        """Run a cell for every model as soon as a thread is free and no lower rank waits.

        Args:
            rank: the lower, the earlier, over all experiments.
            name: of the cells; the seed is added.
            run: called as ``run(model, seed)``; the seeds follow each other and share programs.
            models: by seed. Those whose full cache does not pass the gate are left out.
            **facts: go into the records.
        """
        with self.lock:
            heapq.heappush(self.waiting, (rank, len(self.jobs), (name, run, models, facts)))
            self.jobs.append(self.pool.submit(self._next))

    def _next(self) -> None:
        with self.lock:
            name, run, models, facts = heapq.heappop(self.waiting)[-1]
        self.every_seed(name, run, models, **facts)

    def every_seed(self, name: str, run: Any, models: dict[int, Any], **facts: Any) -> None:
        """Run a cell for every model; see :meth:`submit`."""
        for seed, model in models.items():
            self.cell(f"{name}/seed{seed}", functools.partial(run, model, seed), **facts, seed=seed)

    def passing(self, name: str, models: dict[int, Any]) -> dict[int, Any]:
        """Return the models whose cell ``name`` (a full cache) passes the gate."""
        known = self.cells()
        reached = {s: known.get(f"{name}/seed{s}", {}).get("accuracy", 0.0) for s in models}
        self.say(f"gate {GATE}: {reached}")
        return {seed: model for seed, model in models.items() if reached[seed] >= GATE}

    def models(self, kind: str, full: str) -> tuple[dict[int, Any], dict[str, Any]]:
        """Return the trained models by seed, and what their training reported.

        Args:
            kind: ``"recall"`` or ``"trace"``.
            full: the cell of the full cache. Where all seeds passed the gate before, nothing is
                trained; otherwise training goes on, and what older weights answered is dropped.
        """
        preset, folder = self.preset[kind], self.output / kind
        folder.mkdir(exist_ok=True)
        seeds, budget = range(self.options.seeds), self.options.time_budget
        rates, known = preset["learning_rates"], self.cells()
        passed = all(known.get(f"{full}/seed{s}", {}).get("accuracy", -1.0) >= GATE for s in seeds)
        if not passed:
            kept = {n: c for n, c in known.items() if c["task"] != kind}
            lines = "".join(json.dumps(cell) + "\n" for cell in kept.values())
            (self.output / "cells.jsonl").write_text(lines)
        models, facts = train(
            preset["task"],
            {
                **preset["sizes"],
                # Without it fresh embeddings are small beside what the layers add, and a model does
                # not find out for thousands of steps that a token occurred before.
                "embed_scale": preset["sizes"]["embed_dim"] ** 0.5,
                "rope": RopeConfig(theta=preset.get("theta", self.preset["theta"])),
            },
            preset["stages"],
            seeds=seeds,
            steps=preset["steps"],
            learning_rates=[rates[seed % len(rates)] for seed in seeds],
            folder=folder,
            seconds=0.0 if passed else preset["share"] * (math.inf if budget is None else budget),
            workers=self.preset["workers"],
            dtype=jnp.dtype(self.preset["dtype"]),
            report=lambda text: self.say(f"{kind} {text}"),
            wait=lambda: kind == "trace" or self.device.wait(),
        )
        few = max(len(facts["history"]) // 40, 1)
        return dict(enumerate(models)), facts | {"history": facts["history"][::few]}

    def write(self, name: str, trained: dict[str, Any], **more: Any) -> None:
        """Write the report of an experiment from its cells."""
        cells = [c for n, c in self.cells().items() if n.startswith(f"{name}/")]
        full = {
            c["seed"]: c["accuracy"]
            for c in cells
            if c["method"] == "full" and c.get("checks") != 0 and c.get("kind") != "needle"
        }
        passing = [seed for seed, reached in full.items() if reached >= GATE]
        report = {
            "command": self.command,
            "preset": self.options.preset,
            "seeds": list(range(self.options.seeds)),
            "environment": environment(),
            "full_cache_accuracy": full,
            "gate": GATE,
            "gate_passed": bool(full) and len(passing) == len(full),
            "passing_seeds": passing,
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


def run_recall(session: Session, names: tuple[str, ...]) -> Any:
    """E1: accuracy over ratio for every method; E2: one needle, and copying."""
    preset, task = session.preset, session.preset["recall"]["task"]
    models, trained = session.models("recall", "e1/full/1.0")
    rank = itertools.count(6)  # after the first of E3

    def evaluator(function, *arguments, **more):
        def run(model, seed):
            rows = preset["rows"]["recall"]
            return function(task, model, *arguments, rows=rows, seed=1000 + seed, **more)

        return run

    def submit(name, run, **facts):
        session.submit(next(rank), name, run, models, task="recall", **facts)

    def recall(method, ratio):
        return evaluator(evaluate.recall_cell, method, ratio, questions=preset["questions"])

    full = {"method": "full", "ratio": 1.0, "task": "recall"}
    session.every_seed("e1/full/1.0", recall("full", 1.0), models, **full)
    models = session.passing("e1/full/1.0", models)
    if "e1" in names:
        for ratio, method in itertools.product(preset["ratios"], preset["recall_methods"]):
            submit(f"e1/{method}/{ratio}", recall(method, ratio), method=method, ratio=ratio)
    if "e2" in names:
        for method, ratio in (("full", 1.0), ("kvzip_pair", 0.3), ("snap_agnostic", 0.3)):
            for depth in preset["depths"]:
                facts = {"method": method, "ratio": ratio, "depth": depth, "kind": "needle"}
                name = f"e2/needle/{method}/{ratio}/{depth}"
                submit(name, evaluator(evaluate.needle_cell, method, ratio, depth), **facts)
        for method, ratio in (("full", 1.0), *(("kvzip_pair", r) for r in preset["ratios"])):
            facts = {"method": method, "ratio": ratio, "kind": "copy"}
            submit(
                f"e2/copy/{method}/{ratio}", evaluator(evaluate.copy_cell, method, ratio), **facts
            )

    def write():
        for name in names:
            session.write(name, trained, task=evaluate.as_dict(task))

    return write


def run_trace(session: Session, names: tuple[str, ...]) -> Any:
    """E3: accuracy over budget; E4: the same on programs longer than in training."""
    preset, task = session.preset, session.preset["trace"]["task"]
    longer = preset["longer"]
    first = f"e3/full/1.0/checks{task.checks}/"
    try:
        models, trained = session.models("trace", first)
    finally:
        session.device.set()

    def cell(name, method, fraction, checks, options):
        def run(model, seed):
            return evaluate.trace_cell(
                task,
                model,
                method,
                fraction,
                rows=preset["rows"]["trace"],
                seed=2000 + seed,
                checks=checks,
                buffer=preset["buffer"],
                steps=task.steps if name == "e3" else longer,
                options=options,
            )

        facts = {"method": method, "fraction": fraction, "checks": checks, "options": options}
        title = f"{name}/{method}/{fraction}/checks{checks}/{options}"
        return (title, run, models), facts | {"task": "trace"}

    arguments, facts = cell("e3", "full", 1.0, task.checks, "")
    session.every_seed(*arguments, **facts)
    models = session.passing(first, models)
    for name in names:
        grid = itertools.product(preset["fractions"], preset["trace_methods"])
        cells = [(method, fraction, task.checks, "") for fraction, method in grid]
        asides = [("rkv", 0.16, task.checks, evaluate.lambda_options(x)) for x in preset["lambdas"]]
        if name == "e3":  # without redundancy R-KV has nothing to find
            asides += [("full", 1.0, 0, "")] + [(m, 0.34, 0, "") for m in ("rkv", "snapkv")]
        else:
            cells = [("full", 1.0, task.checks, ""), *cells]
        place = 2 * len(preset["trace_methods"])  # two budgets are worth most
        cells[place:place] = asides
        for rank, settings in enumerate(cells):
            arguments, facts = cell(name, *settings)
            session.submit(rank + (0 if name == "e3" else 25), *arguments, **facts)

    def write():
        for name in names:
            more = {"task": evaluate.as_dict(task), "redundancy": task.redundancy(task.checks)}
            session.write(name, trained, **more, steps=task.steps if name == "e3" else longer)

    return write


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    words = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=words, prog="python -m experiments.kv_cache.run")
    session = Session(options, words)
    chosen = {"all": ("e1", "e2", "e3", "e4", "e5")}.get(options.experiment, (options.experiment,))
    # Side by side: one compiles or evaluates while the other trains.
    runs = [
        (run, wanted)
        for run, names in ((run_recall, ("e1", "e2")), (run_trace, ("e3", "e4")))
        if (wanted := tuple(n for n in names if n in chosen))
    ]
    if len(runs) == 1 or session.preset["threads"] == 1:
        session.device.set()
    with ThreadPoolExecutor(min(session.preset["threads"], 2)) as both:
        writes = [job.result() for job in [both.submit(r, session, n) for r, n in runs]]
    wait(session.jobs)
    for write in writes:
        write()
    if "e5" in chosen:
        from experiments.kv_cache import efficiency

        report = {"command": session.command, "environment": environment()}
        report |= efficiency.run(session.left)
        (session.output / "e5.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
