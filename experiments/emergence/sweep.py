"""Train many runs at once in one compiled program, and never lose what was computed.

A :class:`Group` is one objective (static sizes) with many runs: seeds, and whatever else may be a
traced number (T, d, B, p, number of pairs, vocabulary, learning rate). They are mapped by ``vmap``
through one ``lax.scan`` of training steps. Batches depend only on (seed, step), so that a sweep
that was killed goes on from its last checkpoint to the very numbers it would have had.

Files in the output folder: ``runs.jsonl`` (one line for each finished run, or for an
unfinished one when time ran out; the last line of an id counts) and ``state/<group>.npz`` while a
group is trained.
"""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.emergence import metrics
from experiments.emergence.models import Objective

MAX_CURVE_POINTS = 60
_DONE = ("finished", "max_steps", "diverged")


@dataclass(frozen=True)
class Group:
    """Runs that share one compiled program.

    Attributes:
        name: Name of the group, unique in a sweep; part of every run's id.
        objective: Task, model and static sizes.
        runs: The numbers of each run: what the objective needs, ``seed`` and ``learning_rate``.
        max_steps: Steps after which a run counts as censored.
        eval_every: Steps between evaluations; a plateau is interpolated between them.
        optimizer: ``"adam"`` or ``"sgd"``.
        stop: Value of the watched curve at which a run has nothing more to show; the group stops
            once all its runs are there. By default the objective's threshold.
        patience: Evaluations to go on after ``stop``.
        runs_on: Train for exactly ``max_steps``, whatever happens.
        tags: What the figures select by, such as ``{"figure": "fig3"}``.
    """

    name: str
    objective: Objective
    runs: tuple[Mapping[str, float], ...]
    max_steps: int
    eval_every: int = 50
    optimizer: str = "adam"
    stop: float | None = None
    patience: int = 2
    runs_on: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.runs:
            raise ValueError(f"group {self.name!r} has no runs; expected at least one")
        names = set(self.runs[0])
        if not {"seed", "learning_rate"} <= names or any(set(run) != names for run in self.runs):
            raise ValueError(
                f"every run of group {self.name!r} must give the same numbers, seed and "
                f"learning_rate among them; got {sorted(names)} in the first"
            )
        if len({run_id(self, run) for run in self.runs}) < len(self.runs):
            raise ValueError(f"group {self.name!r} holds the same run twice")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be 'adam' or 'sgd'; got {self.optimizer!r}")
        if self.max_steps < self.eval_every or self.max_steps % self.eval_every:
            raise ValueError(
                f"max_steps ({self.max_steps}) must be a multiple of eval_every ({self.eval_every})"
            )


def grid(**axes: Sequence[float]) -> tuple[dict[str, float], ...]:
    """All combinations of the axes as runs.

    >>> grid(T=[8, 16], seed=[0])
    ({'T': 8, 'seed': 0}, {'T': 16, 'seed': 0})
    """
    runs: list[dict[str, float]] = [{}]
    for name, values in axes.items():
        runs = [run | {name: value} for run in runs for value in values]
    return tuple(runs)


def run_id(group: Group, run: Mapping[str, float]) -> str:
    """Name of a run inside a sweep: its group and its numbers."""
    return group.name + ":" + ",".join(f"{key}={value:g}" for key, value in sorted(run.items()))


def environment() -> dict[str, Any]:
    """Versions and device, without paths or host names."""
    import flax
    import scipy

    return {
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
    }


def _transform(group: Group) -> optax.GradientTransformation:
    return optax.scale_by_adam() if group.optimizer == "adam" else optax.identity()


def _numbers(group: Group) -> dict[str, jax.Array]:
    """Numbers of all runs as arrays ``[R]``; whole-number axes stay integers."""
    return {
        name: jnp.asarray(
            [run[name] for run in group.runs],
            jnp.int32 if all(float(run[name]).is_integer() for run in group.runs) else jnp.float32,
        )
        for name in group.runs[0]
    }


def _key(numbers: Mapping[str, jax.Array], stream: int) -> jax.Array:
    """Independent streams (0 parameters, 1 training, 2 evaluation) of one seed."""
    return jax.random.fold_in(jax.random.key(numbers["seed"]), stream)


def make_init(group: Group) -> Callable:
    """Return the function of the runs' numbers ``[R]`` that gives the stacked initial state."""

    def init(numbers):
        parameters, extra = group.objective.init(_key(numbers, 0), numbers)
        return {"parameters": parameters, "opt": _transform(group).init(parameters), "extra": extra}

    return jax.vmap(init)


def make_evaluate(group: Group) -> Callable:
    """Return the function (state, numbers) -> curves ``[R]`` on the fixed evaluation data."""

    def evaluate(state, numbers):
        return group.objective.evaluate(
            state["parameters"], state["extra"], _key(numbers, 2), numbers
        )

    return jax.vmap(evaluate)


def make_chunk(group: Group) -> Callable:
    """Return the function (state, numbers, first step) -> (state, mean loss ``[R]``) of a chunk."""
    transform = _transform(group)

    def step(carry, index):
        state, numbers = carry
        key = jax.random.fold_in(_key(numbers, 1), index)
        loss, gradient = jax.value_and_grad(group.objective.loss)(
            state["parameters"], state["extra"], key, numbers
        )
        update, opt = transform.update(gradient, state["opt"])
        rate = jnp.asarray(numbers["learning_rate"], jnp.float32)
        parameters = jax.tree.map(lambda w, u: w - rate * u, state["parameters"], update)
        return {"parameters": parameters, "opt": opt, "extra": state["extra"]}, loss

    def chunk(state, numbers, first):
        def body(state, index):
            return jax.vmap(step, in_axes=((0, 0), None))((state, numbers), index)

        state, losses = jax.lax.scan(body, state, first + jnp.arange(group.eval_every))
        return state, losses.mean(0)

    return chunk


@dataclass
class _Programs:
    init: Any
    evaluate: Any
    chunk: Any


def compile_group(group: Group) -> _Programs:
    """Compile the three programs of a group; XLA works outside the interpreter lock."""
    numbers = _numbers(group)
    init = jax.jit(make_init(group))
    shapes = jax.eval_shape(init, numbers)
    chunk = jax.jit(make_chunk(group), donate_argnums=0)
    return _Programs(
        init.lower(numbers).compile(),
        jax.jit(make_evaluate(group)).lower(shapes, numbers).compile(),
        chunk.lower(shapes, numbers, jnp.int32(0)).compile(),
    )


def read_records(output: str | Path) -> dict[str, dict[str, Any]]:
    """Read ``runs.jsonl`` by run id; a line that was cut off by a kill is skipped.

    Args:
        output: Folder of the sweep; an absent file gives an empty result.

    Returns:
        The last record of each id.

    Raises:
        ValueError: If a line that is not the last one is not JSON.
    """
    path = Path(output) / "runs.jsonl"
    records: dict[str, dict[str, Any]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path.name}, line {number} is not JSON: {error}") from error
        records[record["id"]] = record
    return records


def _append(output: Path, records: Sequence[dict[str, Any]]) -> None:
    path = output / "runs.jsonl"
    text = path.read_text() if path.exists() else ""
    with path.open("a") as stream:
        if text and not text.endswith("\n"):
            stream.write("\n")  # a kill cut the last line: start a new one after it
        for record in records:
            stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _save_state(path: Path, state: Any, curves: list, steps: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    arrays |= {f"curve_{name}": np.stack([c[name] for c in curves]) for name in curves[0]}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, steps=np.asarray(steps), **arrays)
    partial.replace(path)  # a kill leaves the old checkpoint or the new one, never half a file


def _load_state(path: Path, like: Any) -> tuple[Any, list, list[int]]:
    with np.load(path) as stored:
        leaves, structure = jax.tree.flatten(like)
        found = [stored[f"leaf_{i}"] for i in range(len(leaves))]
        for i, (leaf, value) in enumerate(zip(leaves, found, strict=True)):
            if leaf.shape != value.shape:
                raise ValueError(
                    f"{path.name} does not belong to this group: leaf {i} has shape {value.shape}; "
                    f"expected {leaf.shape}. Remove it or choose another output folder"
                )
        names = [name for name in stored.files if name.startswith("curve_")]
        steps = stored["steps"].tolist()
        curves = [
            {n.removeprefix("curve_"): stored[n][i] for n in names} for i in range(len(steps))
        ]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in found]), curves, steps


def _summarise(
    group: Group, index: int, steps: list[int], curves: list, state: str
) -> dict[str, Any]:
    """Record of one run: its numbers, curves and plateau."""
    run = group.runs[index]
    series = {name: np.array([c[name][index] for c in curves], np.float64) for name in curves[0]}
    # The training loss of step 0 is not known; a diverged run is cut at its first bad value.
    watched, threshold, rising = group.objective.watched
    good = np.isfinite(series[watched])
    stop = len(good) if good.all() else int(good.argmin())
    status = state if stop == len(good) else "diverged"
    series = {name: values[:stop] for name, values in series.items()}
    steps = steps[:stop]
    plateau = metrics.plateau_length(steps, series[watched], threshold, rising=rising)
    record = {
        "id": run_id(group, run),
        "group": group.name,
        "task": type(group.objective).__name__.removesuffix("Objective").lower(),
        "tags": dict(group.tags),
        "numbers": dict(run),
        "objective": asdict(group.objective),
        "optimizer": group.optimizer,
        "eval_every": group.eval_every,
        "status": status,
        "steps": steps[-1],
        "plateau": round(plateau.length, 2),
        "censored": plateau.censored,
        "final": {name: _short(values[-1]) for name, values in series.items()},
        "crossings": _crossings(steps, series),
        "curve": _thin(steps, series, plateau.length),
    }
    if watched == "accuracy":
        early = metrics.plateau_length(steps, series[watched], 0.05, rising=True)
        record["plateau_5_percent"] = {"length": early.length, "censored": early.censored}
        width = metrics.transition_width(steps, series[watched], 0.1, 0.9, rising=True)
    else:
        width = metrics.transition_width(steps, series[watched], 0.45, 0.05)
    record["transition_width"] = None if np.isinf(width) else round(width, 4)
    return record


def _crossings(steps: list[int], series: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Steps at which rising attention curves cross one half, those that do."""
    names = [n for n in series if n.rsplit("_", 1)[0] in ("relevant", "prev_token", "select")]
    rising = {
        f"{name}{suffix}": values
        for name in [*names, *(["accuracy"] if "accuracy" in series else [])]
        for suffix, values in _by_head(series[name]).items()
    }
    found = metrics.co_emergence(steps, rising)
    return {name: round(end.length, 2) for name, end in found.items() if not end.censored}


def _by_head(values: np.ndarray) -> dict[str, np.ndarray]:
    """Split curves ``[n, N]`` by head; leave ``[n]`` alone."""
    if values.ndim == 1:
        return {"": values}
    heads = {f"_head{i}": values[:, i] for i in range(values.shape[1])}
    return {"_mean": values.mean(1)} | heads


def _short(value: Any) -> Any:
    return np.array([float(f"{x:.5g}") for x in np.ravel(value)]).reshape(np.shape(value)).tolist()


def _thin(steps: list[int], series: Mapping[str, np.ndarray], around: float) -> dict[str, Any]:
    """At most MAX_CURVE_POINTS points, half of them near the end of the plateau."""
    steps = np.asarray(steps)
    keep = np.arange(len(steps))
    if len(steps) > MAX_CURVE_POINTS:
        even = np.linspace(0, len(steps) - 1, MAX_CURVE_POINTS // 2).round().astype(int)
        near = np.argsort(np.abs(steps - around))[: MAX_CURVE_POINTS // 2]
        keep = np.unique(np.concatenate([even, near]))
    curves = {name: _short(values[keep]) for name, values in series.items()}
    return {"step": steps[keep].tolist()} | curves


def _over(group: Group, curves: list, watched: np.ndarray) -> bool:
    """Whether every run of the group has crossed (or diverged), ``patience`` evaluations ago."""
    if group.runs_on or len(curves) <= group.patience:
        return False
    _, threshold, rising = group.objective.watched
    stop = threshold if group.stop is None else group.stop
    before = watched[: len(curves) - group.patience]  # [n, R]
    crossed = before >= stop if rising else before < stop
    return bool((crossed.any(0) | ~np.isfinite(watched[-1])).all())


def train_group(
    group: Group,
    output: str | Path,
    *,
    programs: _Programs | None = None,
    deadline: float | None = None,
    save_every: float = 30.0,
    on_chunk: Callable[[int, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Train one group, from its checkpoint if there is one, and write its records.

    Args:
        group: The group.
        output: Folder of the sweep.
        programs: Result of :func:`compile_group`; compiled here by default.
        deadline: ``time.monotonic()`` at which to stop and write what there is.
        save_every: Seconds between checkpoints; 0 saves after every chunk, ``inf`` never.
        on_chunk: Called with the step and the median watched value after every chunk.

    Returns:
        One record for each run; ``status`` is ``finished``, ``max_steps``, ``diverged``, or
        ``time`` for a run that the deadline stopped (a later call goes on with it).

    Raises:
        ValueError: If the checkpoint belongs to another group.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "state" / f"{group.name}.npz"
    programs = compile_group(group) if programs is None else programs
    numbers = _numbers(group)
    if checkpoint.exists():
        like = jax.eval_shape(make_init(group), numbers)
        state, curves, steps = _load_state(checkpoint, like)
    else:
        state = programs.init(numbers)
        first = jax.device_get(programs.evaluate(state, numbers))
        name = group.objective.watched[0]
        # No step was taken yet: the training loss starts as NaN and is filled below.
        curves, steps = [first | {"train_loss": np.full_like(first[name], np.nan)}], [0]

    name = group.objective.watched[0]
    watched = [c[name] for c in curves]
    status, saved, started = "max_steps", time.monotonic(), steps[-1]
    while steps[-1] < group.max_steps:
        if _over(group, curves, np.stack(watched)):
            status = "finished"
            break
        if deadline is not None and time.monotonic() > deadline:
            status = "time"
            break
        state, loss = programs.chunk(state, numbers, jnp.int32(steps[-1]))
        found = programs.evaluate(state, numbers) | {"train_loss": loss}
        curves.append(jax.device_get(found))
        watched.append(curves[-1][name])
        steps.append(steps[-1] + group.eval_every)
        if len(curves) == 2:
            curves[0]["train_loss"] = curves[1]["train_loss"]
        if time.monotonic() - saved >= save_every:
            _save_state(checkpoint, state, curves, steps)
            saved = time.monotonic()
        if on_chunk is not None:
            on_chunk(steps[-1], float(np.median(watched[-1])))
    if status == "time" and np.isfinite(save_every) and steps[-1] > started:
        _save_state(checkpoint, state, curves, steps)
    records = [_summarise(group, i, steps, curves, status) for i in range(len(group.runs))]
    if status != "time":
        for record in records:
            if not record["censored"] and record["status"] == "max_steps":
                record["status"] = "finished"
    _append(output, [record | environment() for record in records])
    if status != "time":
        checkpoint.unlink(missing_ok=True)
    return records


def train_all(
    groups: Sequence[Group],
    output: str | Path,
    *,
    time_budget: float | None = None,
    save_every: float = 30.0,
    compile_workers: int = 1,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train the groups in order, skipping runs that ``runs.jsonl`` already holds.

    Args:
        groups: Groups, the most important first.
        output: Folder of the sweep; calling again with the same one resumes.
        time_budget: Seconds for all of it; when they are over, unfinished runs are recorded as
            censored with status ``time``. No limit by default.
        save_every: Seconds between checkpoints of the group in training.
        compile_workers: Groups compiled ahead in threads while others train.
        quiet: Show no progress bar.

    Returns:
        All records in the folder by run id.

    Raises:
        ValueError: If two groups have the same name.
    """
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"group names must differ; got {names}")
    started = time.monotonic()
    deadline = None if time_budget is None else started + time_budget
    known = read_records(output)
    todo = [group for group in groups if not _complete(group, known)]
    with _compiled(todo, compile_workers) as programs, _progress(todo, quiet) as report:
        for group in todo:
            if deadline is not None and time.monotonic() > deadline:
                break
            train_group(
                group,
                output,
                programs=programs[group.name].result(),
                deadline=deadline,
                save_every=save_every,
                on_chunk=report(group),
            )
    return read_records(output)


def _complete(group: Group, known: Mapping[str, Mapping[str, Any]]) -> bool:
    found = [known.get(run_id(group, run)) for run in group.runs]
    return all(record is not None and record["status"] in _DONE for record in found)


@contextlib.contextmanager
def _compiled(groups: Sequence[Group], workers: int) -> Iterator[dict[str, Future]]:
    pool = ThreadPoolExecutor(max_workers=max(workers, 1))
    try:
        yield {group.name: pool.submit(compile_group, group) for group in groups}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _progress(groups: Sequence[Group], quiet: bool) -> Iterator[Callable]:
    if quiet:
        yield lambda group: None
        return
    from rich.progress import BarColumn as Bar
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        Bar(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps {task.fields[value]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:

        def report(group):
            task = progress.add_task(group.name, total=group.max_steps, value="")
            what = group.objective.watched[0]

            def update(step, value):
                progress.update(task, completed=step, value=f"{what} {value:.3f}")

            return update

        yield report
