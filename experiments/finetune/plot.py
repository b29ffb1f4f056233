"""Pictures of the finetuning studies."""

from pathlib import Path
from typing import Any


def draw(study: str, results: dict[str, Any], path: Path) -> None:
    """Draws the picture of a study."""
    # The object interface, not pyplot: no global state and no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    {"toy": _toy, "quality": _quality, "weights": _weights}[study](figure, results)
    figure.savefig(path, dpi=110)


def _toy(figure, results):
    left, right = figure.subplots(1, 2)
    table = results["survival"]["table"]
    rates = [row["learning_rate"] for row in table]
    left.loglog(rates, [row["surviving"] for row in table], marker="o", label="surviving share")
    left.loglog(rates, [row["codes_changed"] for row in table], marker="o", label="changed codes")
    left.set(xlabel="learning rate", title="one update, rounded to nearest")
    left.legend()
    for arm, losses in results["regression"].items():
        right.semilogx([float(rate) for rate in losses], losses.values(), marker="o", label=arm)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="learning rate", title="squared error, relative to the start", ylim=(0.8, 1.3))
    right.legend(fontsize=8)


def _quality(figure, results):
    left, right = figure.subplots(1, 2)
    table = results["methods"]
    names = sorted(table, key=lambda name: table[name]["loss"])
    losses = [table[name]["loss"] for name in names]
    left.barh(names, losses, xerr=[table[name]["standard_error"] or 0 for name in names])
    before = results["untrained_loss"]
    margin = 0.3 * (before - min(losses))
    left.axvline(before, color="grey", linewidth=0.8)
    left.set(
        xlabel="held-out loss (nats per byte); line: before",
        xlim=(min(losses) - margin, before + margin),
    )
    for name, by_rate in results["sweep"]["learning_rate"].items():
        if len(by_rate) > 1:
            right.semilogx([float(r) for r in by_rate], by_rate.values(), marker="o", label=name)
    right.axhline(before, color="grey", linewidth=0.8)
    # A run that diverges leaves the picture, where it would press all others into one line.
    right.set(
        xlabel="learning rate",
        ylabel="held-out loss, seed 0",
        ylim=(min(losses) - margin, before + 2 * margin),
    )
    right.legend(fontsize=8)


def _weights(figure, results):
    axes = figure.subplots()
    for name, row in results["storages"].items():
        axes.scatter(row["block_weight_bytes"], row["perplexity"])
        axes.annotate(
            name,
            (row["block_weight_bytes"], row["perplexity"]),
            xytext=(4, 4),
            textcoords="offset points",
        )
    axes.set(xlabel="bytes of the blocks", ylabel="perplexity per byte, held-out code")
