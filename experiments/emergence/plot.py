"""Pictures of the analyses that ``run.py`` writes; matplotlib comes with the extra ``bench``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.emergence import theory


def _pyplot() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'jaxeff[bench]'") from error
    return Figure


def _panels(number: int, height: float = 3.2) -> tuple[Any, list]:
    figure = _pyplot()(figsize=(4.2 * number, height), layout="constrained")
    axes = figure.subplots(1, number, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def plateau_lines(
    axis: Any, points: Iterable[Mapping], x: str, by: str, law: Mapping | None = None
) -> None:
    """Plateaus against one number, one line for each value of another, on log axes.

    Args:
        axis: Matplotlib axis.
        points: Cells with ``x``, ``by``, ``mean`` and maybe ``min``, ``max``, ``num_censored``.
        x: Name of the number on the axis.
        by: Name of the number that separates the lines.
        law: ``constant`` and ``exponents`` of a fit in numbers the points have, drawn dashed.
    """
    points = list(points)
    values = sorted({point[by] for point in points})
    for shade, value in enumerate(values):
        line = sorted((p for p in points if p[by] == value), key=lambda p: p[x])
        color = f"C{shade}"
        # A cut-off cell is a lower bound: a triangle, outside the line.
        whole = [p for p in line if not p.get("num_censored")]
        mean = np.array([p["mean"] for p in whole])
        spread = np.array([[p.get("min", p["mean"]), p.get("max", p["mean"])] for p in whole]).T
        error = np.abs(spread - mean) if whole else None
        axis.errorbar(
            [p[x] for p in whole], mean, error, color=color, capsize=2, label=f"{by} = {value:g}"
        )
        for p in line:
            style = {"marker": "^", "markerfacecolor": "white"} if p.get("num_censored") else {}
            axis.plot(p[x], p["mean"], **({"marker": "o"} | style), color=color)
        if law and "constant" in law:
            fitted = [
                law["constant"] * np.prod([p[n] ** e for n, e in law["exponents"].items()])
                for p in line
            ]
            axis.plot([p[x] for p in line], fitted, "--", color=color, linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel="plateau (steps)")
    axis.legend(frameon=False, fontsize=8)


def trajectory_panels(T: int = 512, d: int = 64) -> Any:
    """The toy flow over time: loss, weight on the target, attention (Fig. 1 left).

    Args:
        T: Sequence length in tokens.
        d: Dimension of a token.

    Returns:
        A matplotlib figure.
    """
    times = np.linspace(0.0, 1.3 * theory.plateau_time(T, d), 800)
    state = theory.trajectory(T, d, times)
    figure, axes = _panels(3)
    for axis, values, name in zip(
        axes,
        (state.loss, state.weight, state.attention),
        ("loss", "weight on the target", "attention on the relevant token"),
        strict=True,
    ):
        axis.plot(times, values)
        axis.axvline(theory.plateau_blowup(T, d), color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel="steps × learning rate", title=name)
    return figure


def theory_panels(result: Mapping[str, Any]) -> Any:
    """Power laws of the flows: T and d, B in both flows, cross-sample repetition."""
    figure, axes = _panels(3)
    points, fits = result["points"], result["fits"]
    plateau_lines(axes[0], points["fig1c"], "T", "d", fits["fig1c"])
    axes[0].set_title("one relevant token")
    for flow, style in (("reduced", "-o"), ("full", "--s")):
        line = [p for p in points[f"fig2_left_{flow}"] if p["d"] == 64]
        slope = fits[f"fig2_left_{flow}"]["exponents"]["B"]
        axes[1].plot(
            [p["B"] for p in line], [p["mean"] for p in line], style, label=f"{flow}: B^{slope:.2f}"
        )
    axes[1].set(xscale="log", yscale="log", xlabel="B", title="T = 4096, d = 64")
    axes[1].legend(frameon=False)
    for d in sorted({p["d"] for p in points["fig2_right"]}):
        line = sorted((p for p in points["fig2_right"] if p["d"] == d), key=lambda p: p["X"])
        axes[2].plot([p["X"] for p in line], [p["mean"] for p in line], "o", label=f"d = {d}")
    law = fits["fig2_right"]
    ends = np.array([min(p["X"] for p in points["fig2_right"]), 4096 * 16.0])
    axes[2].plot(ends, law["constant"] * ends ** law["exponents"]["X"], "k--", linewidth=0.8)
    axes[2].set(
        xscale="log", yscale="log", xlabel="√d T / √(p²d + (1−p)²)", title="repeated samples"
    )
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def curves(axis: Any, records: Iterable[Mapping], name: str, label: str) -> None:
    """One curve of each record, coloured by one of its numbers."""
    records = list(records)
    values = sorted({record["numbers"][label] for record in records})
    for record in records:
        value = record["numbers"][label]
        line = np.asarray(record["curve"][name], np.float64)
        line = line.mean(1) if line.ndim == 2 else line
        axis.plot(
            record["curve"]["step"],
            line,
            color=f"C{values.index(value)}",
            label=f"{label} = {value:g}" if record["numbers"]["seed"] == 0 else None,
        )
    axis.set(xlabel="step", ylabel=name)
    axis.legend(frameon=False, fontsize=8)


def linear_panels(result: Mapping[str, Any], records: list[Mapping]) -> Any:
    """Transformer on the linear task: curves, plateaus against T and d, repetition."""
    figure, axes = _panels(4)
    points = result["points"]["in_context"]
    d = min(point["d"] for point in points)
    plain = [r for r in records if r["numbers"]["p"] == 0 and r["numbers"]["B"] == 1]
    curves(axes[0], [r for r in plain if r["numbers"]["d"] == d], "loss", "T")
    axes[0].set(ylim=(0, 0.6), title=f"d = {d}, test loss")
    law = result["fits"]["d_T_B"]
    plateau_lines(axes[1], [p for p in points if p["B"] == 1], "T", "d", law)
    plateau_lines(axes[2], [p for p in points if p["d"] == d], "B", "T", law)
    axes[1].set_title("B = 1")
    axes[2].set_title(f"d = {d}")
    for size in sorted({(p["T"], p["d"]) for p in result["points"]["cross_sample"]}):
        line = [p for p in result["points"]["cross_sample"] if (p["T"], p["d"]) == size]
        mean = [p["mean"] for p in line]
        axes[3].plot([p["p"] for p in line], mean, "o-", label=f"T = {size[0]}, d = {size[1]}")
    axes[3].set(xlabel="p", ylabel="plateau (steps)", title="repeated samples")
    axes[3].set_ylim(bottom=0)
    axes[3].legend(frameon=False, fontsize=8)
    return figure


def toy_panels(result: Mapping[str, Any], records: list[Mapping]) -> Any:
    """Stochastic gradient descent of the toy model beside the two flows."""
    sizes = sorted({(p["T"], p["d"]) for p in result["points"]})
    figure, axes = _panels(len(sizes))
    for axis, (T, d) in zip(axes, sizes, strict=True):
        mine = [r for r in records if (r["objective"]["T"], r["objective"]["d"]) == (T, d)]
        curves(axis, mine, "loss", "B")
        for B in sorted({r["numbers"]["B"] for r in mine}):
            for flow, style in (("full", "--"), ("reduced", ":")):
                time = theory.plateau_time(T, d, B=B, flow=flow)
                axis.axvline(time, color="grey", linestyle=style, linewidth=1)
        axis.set(title=f"T = {T}, d = {d} (dashed: full flow, dotted: reduced)")
    return figure


def optimiser_panels(result: Mapping[str, Any], records: list[Mapping]) -> Any:
    """SGD and Adam on one layer with one head."""
    del records
    figure, axes = _panels(2)
    for axis, name in zip(axes, ("sgd", "adam"), strict=True):
        plateau_lines(axis, result["points"][name], "T", "d", result["fits"][name])
        axis.set_title(name)
    return figure


def recall_panels(result: Mapping[str, Any], records: list[Mapping]) -> Any:
    """Associative recall: accuracy, plateaus, and attention of one run."""
    figure, axes = _panels(3)
    plain = [r for r in records if r["numbers"]["p"] == 0]
    vocab = min(r["numbers"]["vocab_size"] for r in plain)
    line = [r for r in plain if r["numbers"]["vocab_size"] == vocab]
    curves(axes[0], line, "accuracy", "num_pairs")
    axes[0].set_title(f"test accuracy, {vocab} tokens")
    law = result["fits"]["vocab_pairs"]
    plateau_lines(axes[1], result["points"], "num_pairs", "vocab_size", law)
    shown = next((r for r in line if not r["censored"]), line[0])
    attention_lines(axes[2], shown)
    return figure


def attention_lines(axis: Any, record: Mapping[str, Any]) -> None:
    """Accuracy and the two halves of the induction head by layer, for one recall run.

    Args:
        axis: Matplotlib axis.
        record: One line of ``runs.jsonl``.
    """
    curve = record["curve"]
    axis.plot(curve["step"], curve["accuracy"], "k", label="accuracy")
    for layer in range(record["objective"]["num_layers"]):
        for kind, style in (("prev_token", "--"), ("select", "-")):
            best = np.max(curve[f"{kind}_{layer}"], axis=1)
            if best.max() > 0.5:
                axis.plot(
                    curve["step"],
                    best,
                    style,
                    color=f"C{layer}",
                    label=f"{kind}, layer {layer + 1}",
                )
    numbers = record["numbers"]
    axis.set(
        xlabel="step",
        ylabel="attention of the best head",
        title=f"{numbers['num_pairs']} pairs, {numbers['vocab_size']} tokens",
    )
    axis.legend(frameon=False, fontsize=8)


def repetition_panels(result: Mapping[str, Any], records: list[Mapping]) -> Any:
    """Accuracy on data without repetition, after training with it."""
    del result
    figure, axes = _panels(2)
    curves(axes[0], [r for r in records if r["numbers"]["p"] == 0], "accuracy", "B")
    curves(axes[1], [r for r in records if r["numbers"]["B"] == 1], "accuracy", "p")
    return figure


_PANELS = {
    "linear": linear_panels,
    "toy": toy_panels,
    "optimisers": optimiser_panels,
    "recall": recall_panels,
    "repetition": repetition_panels,
}


def draw(
    figure: str, result: Mapping[str, Any], records: Iterable[Mapping], output: Path
) -> Path | None:
    """Draw the picture of one figure into ``output/FIGURE.png``.

    Args:
        figure: ``"theory"`` or a trained figure.
        result: What :func:`run.analyse` returned.
        records: All records of the sweep.
        output: Folder.

    Returns:
        The file, or None if the preset has no runs for it.
    """
    if figure == "theory":
        picture = theory_panels(result)
        trajectory_panels().savefig(output / "theory_trajectory.png", dpi=110)
    else:
        mine = [r for r in records if r["tags"].get("figure") == figure]
        if not mine:
            return None
        picture = _PANELS[figure](result, mine)
    path = output / f"{figure}.png"
    picture.savefig(path, dpi=110, metadata={"Software": None})
    return path
