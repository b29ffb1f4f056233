"""Tables, verdicts and pictures from finished runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]


def gaps(records: Mapping[str, Records], baseline: str = "bf16") -> dict[str, dict[str, Any]]:
    """Mean validation loss of each arm, and its gap to the baseline paired by seed.

    Args:
        records: runs of each arm.
        baseline: name of the arm to compare with.

    Returns:
        For each arm: ``loss``, ``gap`` (nats per byte), ``standard_error`` of the gap (None for a
        single seed), ``relative_gap`` (of the baseline's loss), ``seeds``, ``seconds_per_step``
        (None if a run has none).

    >>> runs = {"bf16": [{"seed": 0, "validation": 2.0, "seconds_per_step": 1.0}],
    ...         "rtn": [{"seed": 0, "validation": 2.1, "seconds_per_step": 2.0}]}
    >>> round(gaps(runs)["rtn"]["relative_gap"], 3)
    0.05
    """
    base = {run["seed"]: run["validation"] for run in records[baseline]}
    table = {}
    for name, runs in records.items():
        paired = [run["validation"] - base[run["seed"]] for run in runs if run["seed"] in base]
        loss = float(np.mean([run["validation"] for run in runs]))
        error = float(np.std(paired, ddof=1) / math.sqrt(len(paired))) if len(paired) > 1 else None
        table[name] = {
            "loss": loss,
            "gap": float(np.mean(paired)),
            "standard_error": error,
            "relative_gap": float(np.mean(paired) / np.mean(list(base.values()))),
            "seeds": [run["seed"] for run in runs],
            "seconds_per_step": _mean([run["seconds_per_step"] for run in runs]),
        }
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def late_gaps(
    records: Mapping[str, Records], baseline: str = "bf16", share: float = 0.2
) -> dict[str, dict[str, float]]:
    """Gap of training losses on the same batches, over the last part of runs made side by side.

    Far less noisy than a gap of held-out losses, and blind to how an arm generalises.

    Args:
        records: runs of each arm, with curves that end together.
        baseline: name of the arm to compare with.
        share: part of the points of the shortest curve.

    Returns:
        ``gap`` (nats per byte) and its ``standard_error`` over the points, for each arm.

    >>> runs = {"bf16": [{"curve": [[0, 2.0, 1.0], [8, 1.0, 1.0]]}],
    ...         "rtn": [{"curve": [[0, 2.5, 1.0], [8, 1.5, 1.0]]}]}
    >>> late_gaps(runs, share=1.0)["rtn"]
    {'gap': 0.5, 'standard_error': 0.0}
    """
    shortest = min(len(run["curve"]) for runs in records.values() for run in runs)
    count, result = max(round(share * shortest), 2), {}
    for name, runs in records.items():
        differences = []
        for run, plain in zip(runs, records[baseline], strict=True):
            losses = {point[0]: point[1] for point in plain["curve"]}
            differences += [loss - losses[step] for step, loss, _ in run["curve"][-count:]]
        error = float(np.std(differences, ddof=1) / math.sqrt(len(differences)))
        result[name] = {"gap": float(np.mean(differences)), "standard_error": error}
    return result


def worse(records: Mapping[str, Records], arm: str, other: str) -> dict[str, Any]:
    """Whether one arm is worse than another by more than two standard errors of the difference.

    Args:
        records: runs of each arm.
        arm: the one that should be worse.
        other: the other one.

    Returns:
        ``difference``, ``standard_error``, ``passed``.
    """
    by_seed = {run["seed"]: run["validation"] for run in records[other]}
    paired = [run["validation"] - by_seed[run["seed"]] for run in records[arm]]
    difference = float(np.mean(paired))
    error = float(np.std(paired, ddof=1) / math.sqrt(len(paired))) if len(paired) > 1 else None
    passed = error is not None and difference > 2 * error
    return {"difference": difference, "standard_error": error, "passed": passed}


def draw_gaps(table: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Bars of the gap to bf16 with two standard errors."""
    figure, axis = _axes()
    names = [name for name in table if name != "bf16"]
    values = [table[name]["gap"] for name in names]
    errors = [2 * (table[name]["standard_error"] or 0.0) for name in names]
    axis.barh(names, values, xerr=errors, color="tab:blue", ecolor="black", capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("validation loss above bf16 (nats per byte); bars: two standard errors")
    axis.set_title(title)
    _write(figure, path)


def draw_noise(settings: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Ratio of gradient to noise over the steps, with the threshold."""
    figure, axis = _axes()
    for color, (name, result) in zip(("tab:blue", "tab:orange"), settings.items(), strict=False):
        for style, estimator in (("-", "reference"), (":", "two_key")):
            points = result["noise"][estimator]
            axis.plot(*zip(*points, strict=True), style, color=color, label=f"{name}, {estimator}")
    axis.axhline(math.sqrt(3), color="black", linewidth=0.8, label="√3")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("|gradient| / quantisation noise")
    axis.legend()
    _write(figure, path)


def draw_quadratic(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Simulated loss (lines) and prediction (dashes) for three learning rates."""
    import matplotlib.pyplot as plt

    rates = list(dict.fromkeys(row["rate"] for row in rows))
    figure, axes = plt.subplots(1, len(rates), figsize=(11, 3.5), layout="constrained")
    for axis, rate in zip(axes, rates, strict=True):
        for row, color in zip(
            (row for row in rows if row["rate"] == rate), ("C0", "C1", "C2"), strict=True
        ):
            curve = np.array(row["curve"])
            axis.semilogy(curve / curve[0], color=color, label=f"k = {row['k']}")
            axis.semilogy(row["predicted"] ** np.arange(len(curve)), "--", color=color)
        axis.set_title(f"learning rate {rate}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("loss / first loss")
    axes[0].legend()
    _write(figure, path)


def draw_speed(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Speed-up over bf16 against the size of the product, by recipe."""
    figure, axis = _axes()
    for name, values in points.items():
        axis.semilogx(*zip(*values, strict=True), "o", label=name)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("operations of the forward product")
    axis.set_ylabel("time of bf16 / time")
    axis.legend()
    _write(figure, path)


def _axes():
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4.5), layout="constrained")


def _write(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
