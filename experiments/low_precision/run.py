"""Low-precision experiments: ``python -m experiments.low_precision.run EXPERIMENT``.

``quadratic`` and ``errors`` need no training, ``rounding``, ``formats`` and ``qaf`` train the byte
model, ``speed`` needs a GPU. Each writes ``OUTPUT/EXPERIMENT.json`` and a picture. The same command
again goes on where a time budget or an interrupt stopped it.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from experiments.low_precision import arms, quadratic, report, side_by_side, speed
from experiments.low_precision.training import PRESETS, OutOfTime, Runs, environment
from jaxeff.quant.recipe import QAF_MODES
from jaxeff.report import command_line

RESULTS = Path(__file__).parent / "results"
TRAINED = ("rounding", "formats", "qaf")


@dataclass(frozen=True)
class Command:
    """One experiment."""

    experiment: Annotated[
        Literal["quadratic", "errors", "rounding", "formats", "qaf", "speed"], tyro.conf.Positional
    ]
    """What to run."""

    preset: Literal["cpu", "gpu", "minutes"] = "cpu"
    """Sizes: minutes on a laptop, hours or minutes with 31 M parameters on one GPU. With "minutes"
    all arms are trained side by side for as long as the time budget says."""

    seeds: int = 3
    """Seeds of each arm."""

    time_budget: float | None = None
    """Seconds; what is not done by then is left for the next call, which goes on from there."""

    first_seed: int = 0
    """Number of the first seed."""

    arms: str = ""
    """Names of arms, joined by commas, instead of all; bf16 is always there. Either of rounding and
    formats takes the arms of both; qaf with preset "minutes" those of rounding to train beside."""

    setting: Literal["normal", "forced"] = "normal"
    """Of qaf with preset "minutes": NVFP4, or a format that makes the noise large."""

    collect: tuple[Path, ...] = ()
    """Folders of calls with preset "minutes" and one seed each: puts them together, no training."""

    output: Path | None = None
    """Folder, by default ``results/PRESET`` beside this file (``results/gpu`` for speed)."""

    only: str = ""
    """Sections of speed, joined by commas, instead of all."""

    section: str = ""
    """Used by speed itself: the section to run in this process."""

    plots: bool = True
    """Whether to draw (needs ``jaxeff[bench]``)."""


Results = dict[str, Any]


def run_quadratic(command: Command, folder: Path) -> Results:
    """E3a: gradient noise on a quadratic against the closed forms of the threshold."""
    results = quadratic.study(command.seeds)
    worst = max(abs(row["simulated"] / row["predicted"] - 1) for row in results["rows"])
    results["claims"] = [
        _claim("every step factor within 10 % of the closed form", worst, worst < 0.1)
    ]
    if command.plots:
        report.draw_quadratic(results["rows"], folder / "quadratic.png")
    return results


def run_errors(command: Command, folder: Path) -> Results:
    """E2, first part: square error of every scale type and block size, without training."""
    from pallas_kernels import fake_quantize

    normal = jax.random.normal(jax.random.key(0), (512, 1024))
    # Gradients spread over decades: rows with log-normal size, e^±3 at one deviation.
    wide = normal * jnp.exp(3 * jax.random.normal(jax.random.key(1), (512, 1)))
    rows, claims = [], []
    for data, x in (("normal", normal), ("wide", wide)):
        power = jnp.square(x).mean(1, keepdims=True)  # each row counts the same
        errors = {}
        for arm in arms.format_arms("gpu"):
            row = {"data": data, "format": arm.name}
            for rounding, options in (
                ("nearest", {}),
                ("stochastic", {"rounding": "stochastic", "key": jax.random.key(2)}),
            ):
                rounded = fake_quantize(x, arm.recipe.fwd_x.format, **options)
                row[rounding] = float((jnp.square(rounded - x) / power).mean())
            rows.append(row)
            errors[arm.name] = row["nearest"]
        scales = {name: error for name, error in errors.items() if name.startswith("b16")}
        best, worst = min(scales, key=scales.get), max(scales, key=scales.get)
        good = best in ("b16_e4m3", "b16_e3m4")
        claims.append(_claim(f"{data} data: E4M3 or E3M4 has the least error at 16", best, good))
        bad = worst == "b16_e1m6"
        claims.append(_claim(f"{data} data: E1M6 has the largest error at 16", worst, bad))
    return {"rows": rows, "claims": claims}


def run_recipes(command: Command, folder: Path) -> Results:
    """E1 and E2: where rounding is stochastic; scale type and block size under split rounding."""
    families = {"rounding": arms.rounding_arms, "formats": arms.format_arms}
    # Arms that are named may come from both, to train side by side.
    chosen = list(families) if command.arms else [command.experiment]
    group = [arm for family in chosen for arm in families[family](command.preset)]
    records = _train(command, folder, {"": [arms.BASELINE, *group]})[""]
    table = report.gaps(records)
    usual = "b16_e4m3" if "b16_e4m3" in records else "split"  # one recipe under two names
    pairs = [("rtn", "split"), ("sr", "split"), ("b16_e1m6", usual), ("b128_e4m3", usual)]
    pairs += [(f"rtn_but_{p}", "rtn") for p in ("fwd_x", "fwd_w")]
    claims = [
        _claim(f"{a} worse than {b} by two standard errors", *_verdict(report.worse(records, a, b)))
        for a, b in pairs
        if a in records and b in records
    ]
    if "split" in table:
        split = table["split"]["relative_gap"]
        claims.append(_claim("split rounding within 1.5 % of bf16", split, split <= 0.015))
    if command.plots:
        title = {"rounding": "E1: rounding and recipes", "formats": "E2: scale types and blocks"}
        path = folder / f"{command.experiment}.png"
        report.draw_gaps(table, path, title[command.experiment])
    late = {"late_gaps": report.late_gaps(records)} if command.preset == "minutes" else {}
    return {"table": table, **late, "claims": claims}


def run_qaf(command: Command, folder: Path) -> Results:
    """E3b: the noise ratio, and what each way of finetuning recovers."""
    if command.preset == "minutes":
        trained = {command.setting: _branch(command, folder)}
    else:
        trained = _train(command, folder, arms.qaf_arms(command.preset))
    settings, claims = {}, []
    for setting, records in trained.items():
        # A run that was cut off has no losses on held-out text.
        whole = all(run["validation"] is not None for runs in records.values() for run in runs)
        table = report.gaps(records) if whole else {}
        closed = {
            mode: 1 - table[mode]["gap"] / table["stay"]["gap"] for mode in QAF_MODES if whole
        }
        noise = {
            name: [
                [
                    first["step"],
                    sum(run["noise"][i][name] for run in records["stay"]) / len(records["stay"]),
                ]
                for i, first in enumerate(records["stay"][0]["noise"])
            ]
            for name in ("two_key", "reference")
        }
        crossed = {
            name: next((step for step, ratio in points if ratio < math.sqrt(3)), None)
            for name, points in noise.items()
        }
        settings[setting] = {
            "table": table,
            "gap_closed": closed,
            "noise": noise,
            "tokens_per_measurement": records["stay"][0]["noise"][0]["tokens"],
            "crosses_sqrt3_at_step": crossed,
            "lowest_layer_at_the_end": _lowest(records["stay"][0]["noise"][-1]["layers"]),
        }
        for mode, share in closed.items():
            claims.append(_claim(f"{setting}: {mode} closes at least half", share, share >= 0.5))
        if command.preset == "minutes":
            settings[setting] |= _late_results(setting, records, table, claims)
    if command.plots:
        report.draw_noise(settings, folder / "qaf_noise.png")
        for setting, result in settings.items():
            if not result["table"]:
                continue
            title = f"E3: ways to go on, {setting} noise"
            report.draw_gaps(result["table"], folder / f"qaf_{setting}.png", title)
    return {"settings": settings, "claims": claims}


def _late_results(setting: str, records: Results, table: Results, claims: list) -> Results:
    """What training losses say, batch by batch, over the last half of the second phase."""
    late = report.late_gaps(records, share=0.5)  # of the shortest curves, which are the modes'
    to_split = report.late_gaps(records, baseline="stay", share=0.5)
    closed = {mode: 1 - late[mode]["gap"] / late["stay"]["gap"] for mode in QAF_MODES}
    for mode, share in closed.items():
        text = f"{setting}: {mode} closes at least half of the gap of training losses"
        claims.append(_claim(text, share, share >= 0.5))
    if table:
        split = table["stay"]["relative_gap"]
        claims.append(_claim(f"{setting}: split within 1.5 % of bf16", split, split <= 0.015))
    for arm in sorted(set(records) - {"bf16", "stay", *QAF_MODES}):
        gap = to_split[arm]
        text = f"{setting}: {arm} worse than split, training losses, two standard errors"
        claims.append(_claim(text, gap, gap["gap"] > 2 * gap["standard_error"]))
    return {
        "steps": {name: runs[0]["steps"] for name, runs in records.items()},
        "late_gaps": late,
        "late_gap_closed": closed,
        "late_gaps_to_split": to_split,
    }


def run_speed(command: Command, folder: Path) -> Results:
    """E4: times on a GPU, section by section; this process stays away from it."""
    sections = command.only.split(",") if command.only else speed.SECTIONS
    if not set(sections) <= set(speed.SECTIONS):
        raise SystemExit(f"only must be out of {speed.SECTIONS}, got {command.only}")
    budget = 600.0 if command.time_budget is None else command.time_budget
    deadline = time.monotonic() + budget
    for section in sections:
        left = deadline - time.monotonic()
        if left < 10:
            break
        _run_section(section, folder, left)
    found = [(name, folder / f"speed_{name}.json") for name in speed.SECTIONS]
    rows = {name: json.loads(path.read_text())["rows"] for name, path in found if path.exists()}
    results: Results = {"rows": "in speed_<section>.json", "claims": _speed_claims(rows)}
    points = speed.speed_ups([*rows.get("linear", []), *rows.get("sweep", [])])
    results["break_even"] = {name: speed.break_even(values) for name, values in points.items()}
    if command.plots and points:
        report.draw_speed(points, folder / "speed.png")
    return results


def _run_section(section: str, folder: Path, seconds: float) -> None:
    """One section in a process that is ended in time: a kernel that hangs costs one section."""
    program = [sys.executable, "-u", "-m", "experiments.low_precision.run", "speed"]
    program += ["--section", section, "--time-budget", str(seconds), "--output", str(folder)]
    # Sections that are cut off must leave some time for those after them.
    limit = min(seconds, 100.0) if section in speed.ISOLATED else seconds + 30
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    try:
        status = subprocess.run(program, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        status = f"nothing after {limit:.0f} s"
    if status:
        _say(f"{section} failed: {status}")


def _measure_section(command: Command, folder: Path) -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit("speed needs a GPU: on a CPU 8-bit products are emulated")
    deadline = time.monotonic() + (command.time_budget or 600.0)
    path = folder / f"speed_{command.section}.json"
    _say(f"{command.section} on {jax.devices()[0].device_kind}")
    speed.run_section(command.section, speed.Report(path, deadline, _say))


def _speed_claims(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The issue's figures, as far as they were measured."""
    claims = []
    for shape, wanted in zip(speed.FIRST, (1.45, 1.3), strict=True):
        ratios = {
            row["recipe"]: row["speed_up"]
            for row in rows.get("linear", [])
            if (row["tokens"], row["inputs"], row["outputs"]) == shape
            and row["recipe"].startswith("fp8")
        }
        if ratios:
            text = f"linear layer, {shape}: best FP8 at least {wanted} times bf16"
            claims.append(_claim(text, ratios, max(ratios.values()) >= wanted))
    steps = {row["recipe"]: row["speed_up"] for row in rows.get("step", [])}
    for name, wanted in (
        ("fp8_delayed", 1.25),
        ("fp8_current", 1.25),
        ("fp4_all_the_way", 1 / 2.2),
    ):
        if name in steps:
            text = f"transformer step, {name} at least {wanted:.3f} times the speed of bf16"
            claims.append(_claim(text, steps[name], steps[name] >= wanted))
    rates = {r["what"]: r["terabytes_per_second"] for r in rows.get("quantize", []) if "what" in r}
    for name, rate in rates.items():
        if name.startswith("kernel rows") and "copy" in rates:
            share = rate / rates["copy"]
            claims.append(_claim(f"{name}: 75 % of a copy's bandwidth", share, share >= 0.75))
    return claims


EXPERIMENTS: dict[str, Callable[[Command, Path], Results]] = {
    "quadratic": run_quadratic,
    "errors": run_errors,
    "rounding": run_recipes,
    "formats": run_recipes,
    "qaf": run_qaf,
    "speed": run_speed,
}


def _say(text: str) -> None:
    CONSOLE.print(text, highlight=False, soft_wrap=True)


def _session(command: Command, folder: Path) -> side_by_side.Session:
    budget = 300.0 if command.time_budget is None else command.time_budget
    path = folder / f"{command.experiment}_runs.json"
    return side_by_side.Session(PRESETS[command.preset], budget, path, _say)


def _collected(command: Command, folder: Path) -> dict[str, list]:
    """Records of several calls, by arm; written as those of one call are."""
    name = f"{command.experiment}_runs.json"
    parts = [json.loads((part / name).read_text()) for part in command.collect]
    same = ("environment", "sizes")
    if any(part[key] != parts[0][key] for part in parts for key in same):
        raise SystemExit("collect: the folders hold runs of other sizes or on other machines")
    records = {
        arm: [run for part in parts for run in part["records"].get(arm, [])]
        for arm in parts[0]["records"]
    }
    texts = [{"seconds": part["seconds"], **part["text"]} for part in parts]
    content = {key: parts[0][key] for key in same} | {"calls": texts, "records": records}
    (folder / name).write_text(json.dumps(content) + "\n")
    return records


def _branch(command: Command, folder: Path) -> dict[str, list]:
    """The modes of finetuning side by side, one seed."""
    if command.collect:
        return _collected(command, folder)
    named = {arm.name: arm for arm in arms.rounding_arms("minutes")}
    wanted = command.arms.split(",") if command.arms else []
    if not set(wanted) <= set(named):
        raise SystemExit(f"arms must be out of {sorted(named)}, got {command.arms}")
    branches = arms.branch_arms(command.setting)
    beside = [replace(named[name], batch=branches[0].batch) for name in wanted]
    session = _session(command, folder)
    return side_by_side.branch(session, branches, command.first_seed, beside)


def _train(command: Command, folder: Path, groups: dict[str, list]) -> dict[str, dict[str, list]]:
    """Runs of every arm and seed, seed by seed, so that a cut-off study compares what it has."""
    if command.collect:
        return {"": _collected(command, folder)}
    seeds = range(command.first_seed, command.first_seed + command.seeds)
    if command.arms:
        known = {arm.name for chosen in groups.values() for arm in chosen}
        names = {arms.BASELINE.name, *command.arms.split(",")}
        if not names <= known:
            raise SystemExit(f"arms must be out of {sorted(known)}, got {command.arms}")
        groups = {
            group: [arm for arm in chosen if arm.name in names] for group, chosen in groups.items()
        }
    if command.preset == "minutes":
        session, (group,) = _session(command, folder), groups.values()
        return {"": side_by_side.compare(session, group, seeds)}
    runs = Runs(folder, PRESETS[command.preset], command.time_budget)
    trained = {name: {arm.name: [] for arm in group} for name, group in groups.items()}
    # Every experiment needs the same baseline: it is trained once.
    for seed in seeds:
        for name, group in groups.items():
            for arm in group:
                label = command.experiment + (f"_{name}" if name else "")
                label = "baseline" if arm == arms.BASELINE else label
                record = runs.get(label, arm, seed)
                trained[name][arm.name].append(record)
                CONSOLE.print(f"{label} {arm.name} seed {seed}: {record['validation']:.4f}")
    for trunk in (folder / "state").glob("trunk_*"):
        shutil.rmtree(trunk)
    return trained


def _claim(text: str, value: Any, passed: bool) -> dict[str, Any]:
    return {"claim": text, "value": value, "passed": bool(passed)}


def _verdict(result: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    return {k: v for k, v in result.items() if k != "passed"}, result["passed"]


def _lowest(layers: dict[str, float], count: int = 3) -> dict[str, float]:
    return dict(sorted(layers.items(), key=lambda item: item[1])[:count])


CONSOLE = Console()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run one experiment and write its JSON."""
    words = sys.argv[1:] if arguments is None else arguments
    command = tyro.cli(Command, args=words, prog="python -m experiments.low_precision.run")
    default = "gpu" if command.experiment == "speed" else command.preset
    folder = command.output or RESULTS / default
    folder.mkdir(parents=True, exist_ok=True)
    if command.section:
        return _measure_section(command, folder)
    try:
        results = EXPERIMENTS[command.experiment](command, folder)
    except OutOfTime:
        CONSOLE.print("the time budget is spent; the same command goes on from here")
        sys.exit(3)
    settings = asdict(command) | {"output": None, "collect": len(command.collect)}
    # The parent of timed processes has no device of its own, and must not take memory of it.
    here = {} if command.experiment == "speed" else environment()
    if command.collect:
        here = json.loads((folder / f"{command.experiment}_runs.json").read_text())["environment"]
    content = {
        "experiment": command.experiment,
        "command": command_line("experiments.low_precision.run", words),
        "settings": settings,
        "sizes": asdict(PRESETS[command.preset]) if command.experiment in TRAINED else None,
        "environment": here,
        **results,
    }
    (folder / f"{command.experiment}.json").write_text(json.dumps(content, indent=1) + "\n")
    for claim in results["claims"]:
        _say(f"{'yes' if claim['passed'] else 'NO '} {claim['claim']}: {claim['value']}")
    return None


if __name__ == "__main__":
    main()
