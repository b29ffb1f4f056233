"""Cases of a benchmark in a process of their own, which is ended when it hangs.

The program runs itself again with ``--worker``: a line of JSON goes in, and one comes out.
"""

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console

from experiments.benchmarks import attention
from experiments.benchmarks.attention import first_line
from pallas_kernels import benchmarking

Case = dict[str, Any]
LOCK = "MEASURING_LOCK"  # names a file that who measures holds


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits until no other process is in here, if the variable named by `LOCK` names a file.

    Programs that share a device then compile side by side and are timed one at a time.
    """
    path = os.environ.get(LOCK)
    with open(path, "w") if path else contextlib.nullcontext() as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def measure_alone() -> None:
    """Makes all that this process times wait for its turn, torch's programs too."""

    def wrapped(function):
        def run(*args):
            with alone():
                return function(*args)

        return run

    benchmarking._device_seconds = wrapped(benchmarking._device_seconds)
    attention.time_torch = wrapped(attention.time_torch)


def timed(function: Callable, *args: Any, **options: Any) -> benchmarking.Timing:
    """`pallas_kernels.benchmarking.benchmark`, compiled before the device is taken."""
    compiled = function
    if not isinstance(function, jax.stages.Compiled):
        compiled = jax.jit(function).lower(*args).compile()
    with alone():
        return benchmarking.benchmark(compiled, *args, **options)


def work(run: Callable[[Case], dict[str, Any]]) -> None:
    """The other side of `results`: a line of JSON for every line of JSON."""
    answer = os.dup(1)
    os.dup2(2, 1)  # What libraries print must not come between the answers.
    for line in sys.stdin:
        case = json.loads(line)
        try:
            result = {"result": run(case)}
        except Exception as error:  # any failure of a case is its result
            result = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        os.write(answer, (json.dumps(result) + "\n").encode())


def results(
    cases: list[Case], options: Any, deadline: float, program: str = "gpu_session"
) -> Iterator[tuple[Case, dict]]:
    """Runs cases in one process, and the rest in a new one after a case that hung or crashed.

    ``options`` has output, limit and dry_run; ``program`` is the benchmark whose ``--worker`` runs.
    """
    waiting = list(cases)
    while waiting and time.monotonic() < deadline:
        with _process(options, program, waiting[0].get("tool")) as (process, lines):
            alive = True
            while alive and waiting and time.monotonic() < deadline:
                case, start = waiting.pop(0), time.monotonic()
                answer = _ask(process, lines, case, options.limit, deadline)
                tool = case.get("tool") and not options.dry_run
                if tool and "result" in answer:
                    answer |= _verdict(process, options.limit)
                alive = not (answer.pop("lost", False) or tool)
                yield case, {**answer, "seconds": time.monotonic() - start}


def _ask(process, lines, case: Case, limit: float, deadline: float) -> dict[str, Any]:
    """One answer; "lost" says that the process is of no more use."""
    limit *= 1 if case["stage"] in ("correct", "accurate") else 4
    left = max(5.0, deadline + 20 - time.monotonic())
    why, limit = ("hung", limit) if limit <= left else ("the time was up", left)
    try:
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        line = lines.get(timeout=limit)
    except queue.Empty:
        return {"failed": f"nothing for {limit:.0f} s: {why}", "lost": True}
    except BrokenPipeError:
        line = None
    if line is None:
        return {"failed": f"the process ended with {process.wait()}", "lost": True}
    return json.loads(line)


def _verdict(process, limit: float) -> dict[str, Any]:
    """What compute-sanitizer says when the process ends by itself."""
    process.stdin.close()
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": "the tool did not end"}
    return {"failed": f"the tool found errors (status {code}): see its log"} if code else {}


@contextlib.contextmanager
def _process(options: Any, program: str, tool: str | None):
    """A worker and the queue of its answers (None when it ends); killed with its children."""
    command = [sys.executable, "-m", f"experiments.benchmarks.{program}", "--worker"]
    command += ["--dry-run"] * options.dry_run
    if tool and not options.dry_run:
        # Its own report would else come between the answers on standard output.
        report = options.output / f"{tool}.log"
        command = [
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
            "--log-file", str(report), *command,
        ]  # fmt: skip
    log = (options.output / "worker.log").open("a")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield process, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def report(
    program: str,
    options: Any,
    cases: list[Case],
    line: Callable[[dict[str, Any]], str],
    compare: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> None:
    """Runs the cases in order, prints and writes after each; status 1 where one failed.

    Args:
        program: name of the benchmark, and of its JSON.
        options: with output, time_budget, limit, only and dry_run.
        cases: all of them; those run whose JSON contains a text of ``options.only`` (``a|b``).
        line: what is said of a row: case, result or failed, seconds.
        compare: sets the rows so far in relation to each other, in place.
    """
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.time_budget
    wanted = options.only.split("|")
    chosen = [case for case in cases if any(text in json.dumps(case) for text in wanted)]
    command = f"python -m experiments.benchmarks.{program} --time-budget {options.time_budget:g}"
    command += f" --only '{options.only}'" * bool(options.only)
    found: dict[str, Any] = {"command": command, "rows": []}
    for case, answer in results(chosen, options, deadline, program):
        found |= answer.get("result", {}).pop("machine", {})
        found["rows"].append({"case": case, **answer, "seconds": round(answer["seconds"], 1)})
        compare(found["rows"])
        (options.output / f"{program}.json").write_text(json.dumps(found, indent=1) + "\n")
        console.print(line(found["rows"][-1]), highlight=False, soft_wrap=True)
    failures = sum("failed" in row for row in found["rows"])
    left = len(chosen) - len(found["rows"])
    console.print(f"{len(found['rows'])} cases, {failures} failed, {left} not started")
    if failures:
        sys.exit(1)
