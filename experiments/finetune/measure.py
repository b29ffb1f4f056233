"""What programs that measure share: measurements in order, within a time, each written at once."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxeff.report import machine


def results_of(sizes: Any, command: str, kinds: Iterable[str]) -> dict[str, Any]:
    """Results without measurements: sizes, machine, flags and command.

    Args:
      sizes: dataclass of the preset.
      command: what was called.
      kinds: of measurements; each gets a dictionary.
    """
    return {
        **{kind: {} for kind in kinds},
        "skipped": [],
        "sizes": dataclasses.asdict(sizes),
        "machine": machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": command,
    }


def measure_each(
    results: dict[str, Any],
    work: Iterable[tuple[str, str, Callable[[], dict[str, Any]]]],
    deadline: float,
    path: Path,
    compare: Callable[[], None],
) -> dict[str, Any]:
    """Measures in order, and prints and writes after each; what comes too late is listed.

    Args:
      results: from `results_of`; filled.
      work: kind, name and measurement, a function that returns a row.
      deadline: of ``time.monotonic``, after which no measurement starts.
      path: of the JSON file.
      compare: puts rows beside each other, after each measurement.

    Returns:
      ``results``.
    """
    console = Console()
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, name, measure in work:
        if time.monotonic() > deadline:
            results["skipped"].append(f"{kind}/{name}")
        else:
            row = results[kind][name] = measure()
            compare()
            line = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float))
            console.print(f"{kind}/{name}: {line}", highlight=False, soft_wrap=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(str(path))
    return results
