"""Accuracy against what is kept, one line per method; matplotlib comes with the extra ``bench``."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

AXES = {
    "e1": ("ratio", "share of the context kept"),
    "e2": ("depth", "depth of the needle"),
    "e3": ("fraction", "budget / length of the trace"),
    "e4": ("fraction", "budget / length of the trace"),
}


def draw(name: str, report: dict[str, Any], path: Path) -> None:
    """Draw the report of an experiment.

    Args:
        name: ``"e1"`` to ``"e4"``.
        report: what ``run.py`` wrote.
        path: where the picture goes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'jaxeff[bench]'") from error
    key, label = AXES[name]
    lines: dict[str, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    most = max((c.get("checks", 0) for c in report["cells"]), default=0)
    passing = report.get("passing_seeds")
    for cell in report["cells"]:
        if passing and cell["seed"] not in passing:
            continue
        if key in cell and cell.get("checks", 0) == most and not cell.get("options"):
            lines[cell["method"]][cell[key]].append(cell)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    for method, points in lines.items():
        x = sorted(points)
        mean = [np.mean([c["accuracy"] for c in points[p]]) for p in x]
        low = [min(c["interval"][0] for c in points[p]) for p in x]
        high = [max(c["interval"][1] for c in points[p]) for p in x]
        if method == "full" and len(x) == 1:
            axis.axhline(mean[0], color="black", linestyle=":", label="full cache")
            continue
        error = np.clip([np.subtract(mean, low), np.subtract(high, mean)], 0, None)
        axis.errorbar(x, mean, error, marker="o", markersize=3, capsize=2, label=method)
    axis.set(
        xlabel=label, ylabel="accuracy", ylim=(-0.02, 1.02), title=f"{name} ({report['preset']})"
    )
    if lines:
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)
