# SPDX-License-Identifier: Apache-2.0
"""Sizes of kernels: a heuristic that always works, a stored table per device, and a search.

`choose` takes the entry of ``pallas_kernels/tuned/<device>/<op>.json`` for a call and otherwise the
kernel's own heuristic. `tune` measures candidates, each in a process of its own with a time limit,
so that one that runs out of memory, hangs or crashes costs only itself; `store` writes the best
into the table, which is reviewed like code.

This file is also the program of these processes. It imports nothing but the standard library at
the top, so that a process starts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("pallas_kernels")
FOLDER = Path(__file__).resolve().parent / "tuned"

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Args:
      config: the candidate.
      seconds: its time, or None if it did not finish.
      reason: why it did not: "time limit of 60 s", "out of memory: ...", the exception, or the
        signal that ended the process; None if it did.
    """

    config: Config
    seconds: float | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Result of a search.

    Args:
      trials: one per candidate that was tried, in the order of the candidates.
      skipped: number of candidates that the total time did not reach.
    """

    trials: tuple[Trial, ...]
    skipped: int = 0

    @property
    def best(self) -> Trial:
        """The fastest candidate that finished; the earlier one of equals.

        Raises:
          RuntimeError: none finished; the message has the reason of each.
        """
        done = [trial for trial in self.trials if trial.seconds is not None]
        if not done:
            reasons = "; ".join(f"{trial.config}: {trial.reason}" for trial in self.trials)
            raise RuntimeError(f"no candidate finished, {self.skipped} not tried: {reasons}")
        return min(done, key=lambda trial: trial.seconds)


# -- the table -------------------------------------------------------------------------------------


def device_key(kind: str | None = None) -> str:
    """Name of a device as a folder.

    Args:
      kind: the device's own name; None takes that of the present device.

    Returns:
      Lower-case words joined by underscores.

    >>> device_key("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    if kind is None:
        from pallas_kernels._device import current_device

        kind = current_device().kind
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def bucket(length: int) -> int:
    """The power of two at or above a length: sequences in one bucket share an entry.

    Args:
      length: tokens, at least 1.

    Returns:
      A power of two.

    Raises:
      ValueError: a length below 1.

    >>> bucket(1000), bucket(1024), bucket(1)
    (1024, 1024, 1)
    """
    if length < 1:
        raise ValueError(f"length must be at least 1; got {length}")
    return 1 << (length - 1).bit_length()


def load(op: str, device: str | None = None, *, folder: Path | None = None) -> list[dict]:
    """The stored entries of an operation.

    Args:
      op: name of the operation, "attention".
      device: a device's own name; None is the present device.
      folder: where the tables lie; None is the folder in this package.

    Returns:
      Entries ``{"key": {...}, "config": {...}, "seconds": float}``; none if there is no table.

    Raises:
      ValueError: the file is not such a table.
    """
    path = _path(op, device, folder)
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())["entries"]
        if not all(isinstance(e["key"], dict) and isinstance(e["config"], dict) for e in entries):
            raise TypeError("an entry's key or config is no object")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path.name} of {path.parent.name} is not a tuning table: {error}"
        ) from error
    return entries


def choose(
    op: str,
    key: Config,
    heuristic: Config,
    *,
    device: str | None = None,
    folder: Path | None = None,
) -> dict:
    """The sizes for a call: stored ones for exactly this key, else the heuristic's.

    Args:
      op: name of the operation.
      key: what the sizes depend on; numbers, strings, booleans and None. Put lengths through
        `bucket`.
      heuristic: sizes that work untuned.
      device: as in `load`.
      folder: as in `load`.

    Returns:
      `heuristic` with the stored sizes in place of its own.

    Raises:
      ValueError: a stored entry has a size that the heuristic does not know (it was written for
        another version of the kernel).

    >>> choose("attention", {"head_dim": 64}, {"block_kv": 128}, device="no such device")
    {'block_kv': 128}
    """
    for entry in load(op, device, folder=folder):
        if entry["key"] == dict(key):
            unknown = sorted(set(entry["config"]) - set(heuristic))
            if unknown:
                raise ValueError(
                    f"the stored {op} entry for {dict(key)} has {', '.join(unknown)}; this kernel "
                    f"knows {', '.join(sorted(heuristic))}. Tune again"
                )
            return {**heuristic, **entry["config"]}
    return dict(heuristic)


def store(
    op: str, key: Config, trial: Trial, *, device: str | None = None, folder: Path | None = None
) -> Path:
    """Writes the result of a search into the table, in place of an entry with the same key.

    Args:
      op: name of the operation.
      key: as in `choose`.
      trial: a candidate that finished, `Tuning.best`.
      device: as in `load`.
      folder: as in `load`.

    Returns:
      The file. Entries are sorted, so that a change reads well.

    Raises:
      ValueError: the trial did not finish.
    """
    if trial.seconds is None:
        raise ValueError(f"only a finished trial can be stored; this one ended by: {trial.reason}")
    kept = [entry for entry in load(op, device, folder=folder) if entry["key"] != dict(key)]
    new = {"key": dict(key), "config": dict(trial.config), "seconds": trial.seconds}
    entries = sorted([*kept, new], key=lambda entry: json.dumps(entry["key"], sort_keys=True))
    path = _path(op, device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(entry, sort_keys=True) for entry in entries)
    # Written beside and moved: a reader never sees half a table.
    part = path.with_suffix(".part")
    part.write_text(f'{{"entries": [\n  {lines}\n]}}\n')
    part.replace(path)
    return path


def _path(op: str, device: str | None, folder: Path | None) -> Path:
    return (FOLDER if folder is None else Path(folder)) / device_key(device) / f"{op}.json"


# -- the search ------------------------------------------------------------------------------------


def tune(
    measure: str,
    candidates: Iterable[Config],
    arguments: Config | None = None,
    *,
    limit_seconds: float = 60.0,
    total_seconds: float | None = None,
    path: Sequence[str | Path] = (),
) -> Tuning:
    """Measures candidates one after another, each in a fresh process.

    Args:
      measure: "module:function" of a function ``(config, **arguments) -> seconds`` that compiles,
        checks and times one candidate; it may raise. What it prints is dropped.
      candidates: sizes to try, best guess first; JSON values.
      arguments: JSON values for `measure`, such as shapes.
      limit_seconds: longest life of one process, seconds, with its imports and its compilation.
      total_seconds: after this time no further candidate is started; None is no limit.
      path: folders where the module is looked for before the usual ones.

    Returns:
      A `Tuning`; failures are in it with their reasons and never raise here.

    Raises:
      ValueError: `measure` is not "module:function", or a limit is not positive.
    """
    if not re.fullmatch(r"[\w.]+:\w+", measure):
        raise ValueError(f"measure must be 'module:function'; got {measure!r}")
    if limit_seconds <= 0 or (total_seconds is not None and total_seconds <= 0):
        raise ValueError(f"limits must be positive; got {limit_seconds} and {total_seconds}")
    candidates = list(candidates)
    start, trials = time.monotonic(), []
    for config in candidates:
        if total_seconds is not None and time.monotonic() - start > total_seconds:
            break
        request = {
            "measure": measure,
            "config": dict(config),
            "arguments": dict(arguments or {}),
            "path": [str(folder) for folder in path],
        }
        trials.append(_try(request, limit_seconds))
        logger.info("tuning: %s", trials[-1])
    return Tuning(tuple(trials), len(candidates) - len(trials))


def _try(request: dict, limit_seconds: float) -> Trial:
    """One candidate in one process, which is ended with all its children at the limit."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # The parent may hold the GPU too: the child must not reserve most of its memory at once.
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        roots = [str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(request).encode(), timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            return Trial(request["config"], None, f"time limit of {limit_seconds:g} s")
        finally:
            _end(process)
        if answer.exists():
            return Trial(request["config"], **json.loads(answer.read_text()))
    code = process.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return Trial(request["config"], None, f"the process ended without an answer: {how}")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group may be gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _serve(answer: Path) -> None:
    """The other side: reads a request, measures, writes the answer."""
    request = json.loads(sys.stdin.read())
    sys.path[:0] = request["path"]
    try:
        module, _, name = request["measure"].partition(":")
        function = getattr(importlib.import_module(module), name)
        seconds = float(function(request["config"], **request["arguments"]))
        if not 0 < seconds < float("inf"):
            raise ValueError(f"measured {seconds} seconds")
        result = {"seconds": seconds, "reason": None}
    except Exception as error:
        # Any failure of a candidate is an answer; the trace helps whoever runs this by hand.
        traceback.print_exc()
        result = {"seconds": None, "reason": _reason(error)}
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(answer)


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first or "out of memory" in first:
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
