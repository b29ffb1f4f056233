"""Which learning rate and RoPE base let a model learn E3's lookups, and what R-KV does then.

``python -m experiments.kv_cache.pilot --seconds 200`` trains models of several learning rates on
the drill alone, takes the rate that got furthest, trains two seeds on the whole task, and compares
methods at two budgets. Results are lines of ``OUTPUT/pilot.jsonl``.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.kv_cache import evaluate
from experiments.kv_cache.run import PRESETS, environment
from experiments.kv_cache.training import Stage, train
from jaxeff.nn.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """What to try, and for how long."""

    output: Path = Path("runs/kv_pilot")
    """Folder of the results."""
    theta: float = 5e5
    """Base of RoPE; the models of R-KV's paper have 5e5 and 1e6."""
    overwrite: bool = True
    """Lines write the variables that have start values, instead of fresh ones."""
    rates: tuple[float, ...] = (3e-4, 5e-4, 7e-4, 1e-3)
    """Learning rates tried on the drill."""
    drill_seconds: float = 20.0
    """Seconds for that."""
    seconds: float = 90.0
    """Seconds of the training on the whole task."""
    rows: int = 256
    """Programs per cell."""


def main(options: Options) -> None:
    """Sweep, train, compare; every result is written as soon as it is known."""
    options.output.mkdir(parents=True, exist_ok=True)
    preset = PRESETS["gpu"]["trace"]
    task = dataclasses.replace(preset["task"], overwrite=options.overwrite)
    stages = preset["stages"]
    sizes = {
        **preset["sizes"],
        "embed_scale": preset["sizes"]["embed_dim"] ** 0.5,
        "rope": RopeConfig(theta=options.theta),
    }
    began = time.perf_counter()

    def note(**facts: Any) -> None:
        facts = {
            "theta": options.theta,
            "overwrite": options.overwrite,
            **facts,
            "at": round(time.perf_counter() - began, 1),
        }
        with (options.output / "pilot.jsonl").open("a") as stream:
            stream.write(json.dumps(facts) + "\n")
        print(json.dumps(facts), flush=True)

    note(environment=environment())
    drill = dataclasses.replace(stages[0], share=1.0, batch=128, target=0.98)
    drill = dataclasses.replace(drill, options={**drill.options, "drills": 128})
    common = {"steps": 20_000, "workers": 4, "dtype": jnp.bfloat16}

    def fit(name: str, stages: list[Stage], rates, seconds: float, skip: int):
        folder = options.output / f"{name}_{options.theta:g}"
        folder.mkdir(exist_ok=True)
        lines = []

        def report(text: str) -> None:
            lines.append(text)
            if len(lines) % skip == 0:
                print(name, text, flush=True)

        return train(
            task, sizes, stages, seeds=range(len(rates)), learning_rates=rates, folder=folder,
            seconds=seconds, report=report, **common,
        )  # fmt: skip

    _, facts = fit("drill", [drill], options.rates, options.drill_seconds, 4)
    reached = {rate: [] for rate in options.rates}
    for _, _, accuracy, _ in facts["history"]:
        for rate, value in zip(options.rates, accuracy, strict=True):
            reached[rate].append(value)
    # Earliest is best: the sum over time counts how long a rate has known it.
    score = {rate: float(np.sum(values)) for rate, values in reached.items()}
    best = max(score, key=score.get)
    note(drill={rate: values[:: max(len(values) // 12, 1)] for rate, values in reached.items()},
         best=best)  # fmt: skip
    models, facts = fit("trace", stages, [best, best], options.seconds, 10)
    note(rate=best, steps=facts["steps"], last=facts["history"][-1],
         stopped_by=facts["stopped_by"])  # fmt: skip
    cells = [("full", 1.0, "")]
    cells += [(m, f, "") for f in (0.34, 0.16) for m in ("rkv", "snapkv", "random", "h2o")]
    cells += [("streaming_llm", 0.34, ""), ("keydiff", 0.34, ""), ("rkv", 0.34, "threshold=0.8")]
    for method, fraction, more in cells:
        for seed, model in enumerate(models):
            cell = evaluate.trace_cell(
                task, model, method, fraction, rows=options.rows, seed=2000 + seed,
                checks=task.checks, buffer=PRESETS["gpu"]["buffer"], options=more,
            )  # fmt: skip
            found = {name: cell[name] for name in ("accuracy", "right_trace_tokens")}
            note(method=method, fraction=fraction, options=more, seed=seed, **found)


if __name__ == "__main__":
    main(tyro.cli(Options))
