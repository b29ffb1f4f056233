"""The demo's report: one table on the terminal, one self-contained HTML page, one JSON file."""

import html
import io
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from jaxeff import __version__


def require_matplotlib() -> None:
    """Check that plots can be drawn, before anything long starts.

    Raises:
      ModuleNotFoundError: naming the extra that brings matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report's plots need matplotlib: pip install 'jaxeff[bench]'"
        ) from error


def machine() -> dict[str, Any]:
    """What a reader needs to judge a measured number: device, cores and versions."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cpu_cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        # Our own version comes from the source: a checkout need not be installed.
        "versions": {"jaxeff": __version__, **{name: metadata.version(name) for name in packages}},
    }


def command_line(module: str, words: list[str]) -> str:
    """Return a command as a report quotes it: of a path its last part, no folder of this machine.

    >>> command_line("experiments.starflow.run", ["digits", "--output", "runs/a"])
    'python -m experiments.starflow.run digits --output a'
    """
    return " ".join(["python -m", module, *(Path(w).name if "/" in w else w for w in words)])


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``."""
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.html").write_text(page(results))


HEADERS = ("variant", "bits/byte", "vs full", "bytes", "tok/s", "notes")
SECTIONS = ("training", "attention", "KV cache")


def rows(results: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """The table's cells, one list of rows per section; the first row of each is its baseline."""
    return [_training_rows(results), _attention_rows(results), _cache_rows(results)]


def _training_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    training = results["training"]
    base = next(iter(training["runs"].values()))["validation_loss"]
    cells = [
        _row(name, run["validation_loss"], base, notes=f"{run['seconds']:.0f} s")
        for name, run in training["runs"].items()
    ]
    gzip_bits = training["gzip_bits_per_byte"]
    return [*cells, ("gzip -9", f"{gzip_bits:.3f}", "", "", "", "the same text")]


def _attention_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    variants = results["attention"]
    base = next(iter(variants.values()))["validation_loss"]
    cells = []
    for name, variant in variants.items():
        errors = variant["relative_l1_per_layer"]
        notes = f"L1 {min(errors):.3f}–{max(errors):.3f}" if any(errors) else ""
        cells.append(_row(name, variant["validation_loss"], base, notes=notes))
    return cells


def _cache_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    variants = results["cache"]
    base = next(iter(variants.values()))["loss"]
    return [
        _row(
            name,
            cache["loss"],
            base,
            size=f"{cache['allocated_bytes']:,}",
            speed=f"{cache['tokens_per_second']:.0f}",
            notes=f"{cache['agreement']:.1%} agree",
        )
        for name, cache in variants.items()
    ]


def _row(name, loss, base, *, size="", speed="", notes="") -> tuple[str, ...]:
    bits = loss / float(np.log(2.0))
    return name, f"{bits:.3f}", f"{loss / base - 1.0:+.2%}", size, speed, notes


def table(results: dict[str, Any]) -> Table:
    """The results as one ``rich`` table that fits 80 columns, one section per question."""
    device = results["machine"]["device"]
    drawn = Table(
        title=f"jaxeff demo: {results['preset']} preset on {device}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for header in HEADERS:
        left = header in ("variant", "notes")
        drawn.add_column(header, justify="left" if left else "right", no_wrap=True)
    for title, section in zip(SECTIONS, rows(results), strict=True):
        drawn.add_row(Text(title, style="bold"))
        for cells in section:
            drawn.add_row(*cells)
        drawn.add_section()
    return drawn


# --- the page ----------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
tbody + tbody { border-top: 2px solid #888; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12px; }
"""


def page(results: dict[str, Any]) -> str:
    """The report as one HTML page with its plots inside (no file or network beside it)."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in HEADERS)
    bodies = "".join(
        f"<tbody><tr><th colspan={len(HEADERS)}>{html.escape(title)}</th></tr>"
        + "".join(_html_row(cells) for cells in section)
        + "</tbody>"
        for title, section in zip(SECTIONS, rows(results), strict=True)
    )
    facts = html.escape(json.dumps({**results["machine"], "seed": results["seed"]}, indent=1))
    gap = results["training"]["gap"]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>jaxeff demo</title><style>{STYLE}</style>
<h1>jaxeff demo</h1>
<p>A byte-level decoder with {results["training"]["parameters"]:,} parameters, trained twice from
one seed on the source of Python's standard library. FP4 training ends {gap:+.2%} from full
precision in validation loss.</p>
<table><thead><tr>{head}</tr></thead>{bodies}</table>
<h2>Training loss</h2>{_training_plot(results)}
<h2>Attention error per layer</h2>{_attention_plot(results)}
<h2>What a cache costs and saves</h2>{_cache_plot(results)}
<h2>Machine</h2><pre>{facts}</pre>
</html>
"""


def _html_row(cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _figure():
    # The object interface, not pyplot: no global state and no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    return figure, figure.subplots()


def _svg(figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _smooth(values: list[float], width: int) -> np.ndarray:
    """Running mean: single training losses are too noisy to compare by eye."""
    width = max(1, min(width, len(values)))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def _training_plot(results: dict[str, Any]) -> str:
    figure, axes = _figure()
    for name, run in results["training"]["runs"].items():
        width = max(1, len(run["train_loss"]) // 25)
        smooth = _smooth(run["train_loss"], width)
        axes.plot(np.arange(len(smooth)) + width, smooth, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats per byte)")
    axes.legend()
    return _svg(figure)


def _attention_plot(results: dict[str, Any]) -> str:
    figure, axes = _figure()
    for name, variant in results["attention"].items():
        errors = variant["relative_l1_per_layer"]
        if any(errors):
            axes.plot(range(len(errors)), errors, marker="o", label=name)
    axes.set(xlabel="layer", ylabel="relative L1 error", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return _svg(figure)


def _cache_plot(results: dict[str, Any]) -> str:
    figure, axes = _figure()
    for name, cache in results["cache"].items():
        axes.scatter(cache["allocated_bytes"] / 1024, cache["loss"])
        axes.annotate(
            name,
            (cache["allocated_bytes"] / 1024, cache["loss"]),
            xytext=(5, 5),
            textcoords="offset points",
        )
    axes.set(
        xlabel="cache allocated (KiB)", ylabel="loss on the continuation (nats)", xlim=(0, None)
    )
    axes.margins(x=0.2, y=0.2)
    return _svg(figure)
