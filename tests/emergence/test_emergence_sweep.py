"""Sweeps: resuming gives the numbers of an unbroken run; padding and vmap change nothing."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.emergence import sweep
from experiments.emergence.models import LinearObjective, RecallObjective, ToyObjective


def toy_group(**changes):
    settings = {
        "name": "toy",
        "objective": ToyObjective(T=8, d=4),
        "runs": sweep.grid(B=[1, 3], p=[0.0], learning_rate=[1.0], seed=[0, 1]),
        "max_steps": 60,
        "eval_every": 5,
        "optimizer": "sgd",
        "runs_on": True,
    }
    return sweep.Group(**(settings | changes))


@pytest.fixture(scope="module")
def programs():
    return sweep.compile_group(toy_group())


def comparable(records):
    return [{k: v for k, v in r.items() if k not in ("versions", "device")} for r in records]


def test_records_carry_what_is_needed_to_repeat_them(tmp_path, programs):
    records = sweep.train_group(toy_group(), tmp_path, programs=programs)
    stored = sweep.read_records(tmp_path)
    assert len(stored) == 4 and {r["numbers"]["seed"] for r in records} == {0, 1}
    for record in stored.values():
        assert record["versions"]["jax"] == jax.__version__ and record["device"]
        assert record["steps"] == 60 and record["status"] in ("finished", "max_steps")
        assert record["objective"] == {"T": 8, "d": 4, "batch_size": 32}
        assert len(record["curve"]["step"]) == len(record["curve"]["loss"]) == 13
    assert "/" not in json.dumps(list(stored.values())).replace("</", "")
    assert not list((tmp_path / "state").glob("*")) if (tmp_path / "state").exists() else True
    losses = [r["curve"]["loss"][-1] for r in records]
    assert len(set(losses)) == 4 and max(losses) < 0.45


class Killed(Exception):
    """Stands in for a kill at the worst moment."""


def test_killed_and_restarted_loses_nothing(tmp_path, programs):
    whole = sweep.train_group(toy_group(), tmp_path / "whole", programs=programs)

    def kill(step, value):
        if step == 35:
            raise Killed

    with pytest.raises(Killed):
        sweep.train_group(
            toy_group(), tmp_path / "cut", programs=programs, save_every=0, on_chunk=kill
        )
    seen = []
    again = sweep.train_group(
        toy_group(), tmp_path / "cut", programs=programs, on_chunk=lambda step, _: seen.append(step)
    )
    assert seen[0] == 40  # step 35 had been saved
    assert comparable(again) == comparable(whole)


def test_time_budget_is_recorded_and_continued(tmp_path, programs, monkeypatch):
    group = toy_group()
    monkeypatch.setattr(sweep, "compile_group", lambda group: programs)
    cut = sweep.train_group(group, tmp_path, programs=programs, deadline=time.monotonic() - 1)
    assert {r["status"] for r in cut} == {"time"} and all(r["censored"] for r in cut)
    records = sweep.train_all([group], tmp_path, quiet=True)
    assert len(records) == 4 and all(r["steps"] == 60 for r in records.values())
    lines = (tmp_path / "runs.jsonl").read_text().count("\n")
    sweep.train_all([group], tmp_path, quiet=True)  # nothing left to do
    assert (tmp_path / "runs.jsonl").read_text().count("\n") == lines == 8


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"id": "a", "n": 1}\n{"id": "b", "n"')
    assert list(sweep.read_records(tmp_path)) == ["a"]
    sweep._append(tmp_path, [{"id": "c"}])
    path.write_text(path.read_text().replace('{"id": "b", "n"', "{broken"))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        sweep.read_records(tmp_path)


def test_checkpoint_of_another_group_is_refused(tmp_path, programs):
    with pytest.raises(Killed):
        sweep.train_group(
            toy_group(), tmp_path, programs=programs, save_every=0, on_chunk=raise_killed
        )
    other = toy_group(objective=ToyObjective(T=8, d=5))
    with pytest.raises(ValueError, match="does not belong to this group"):
        sweep.train_group(other, tmp_path, programs=programs)


def raise_killed(step, value):
    raise Killed


def test_stops_once_all_runs_are_through(tmp_path):
    group = toy_group(runs_on=False, max_steps=500, patience=1)
    records = sweep.train_group(group, tmp_path)
    assert all(not r["censored"] and r["status"] == "finished" for r in records)
    assert records[0]["steps"] < 500
    # In-context repetition shortens the plateau.
    mean = {B: np.mean([r["plateau"] for r in records if r["numbers"]["B"] == B]) for B in (1, 3)}
    assert mean[3] < mean[1]


@pytest.mark.parametrize(
    "small, large, numbers",
    [
        (
            LinearObjective(T=4, d=3, num_layers=1, num_heads=2, embed_dim=8, eval_batch=8),
            LinearObjective(T=6, d=5, num_layers=1, num_heads=2, embed_dim=8, eval_batch=8),
            {"T": 4, "d": 3, "B": 2, "p": 0.25},
        ),
        (
            RecallObjective(2, 5, num_layers=1, num_heads=2, embed_dim=8, eval_batch=8),
            RecallObjective(3, 7, num_layers=1, num_heads=2, embed_dim=8, eval_batch=8),
            {"num_pairs": 2, "vocab_size": 5, "B": 1, "p": 0.25},
        ),
    ],
    ids=["linear", "recall"],
)
def test_padding_does_not_change_the_model(small, large, numbers):
    """Weights of the padded model, cut to size, give the same output on the same sequence."""
    from experiments.emergence.models import apply

    numbers = jax.tree.map(jnp.asarray, numbers)
    parameters, extra = large.init(jax.random.key(0), numbers)
    inputs, batch = (
        large._batch(extra, jax.random.key(1), numbers, 8, 0.0)
        if isinstance(large, LinearObjective)
        else large._batch(jax.random.key(1), numbers, 8)
    )
    read = 3 if isinstance(large, LinearObjective) else 4
    wide = apply(large.config, parameters, inputs, read)
    inside = slice(0, small.d if isinstance(small, LinearObjective) else small.vocab_size)

    def cut(path, leaf):
        name = jax.tree_util.keystr(path)
        if "embed" in name and "kernel" in name:
            if isinstance(small, LinearObjective):  # the indicator is the last input
                return jnp.concatenate([leaf[inside], leaf[-1:]])
            return leaf[inside]
        if "readout" in name:
            return leaf[..., inside]
        return leaf

    narrow = jax.tree_util.tree_map_with_path(cut, parameters)
    if isinstance(small, LinearObjective):
        short = jnp.concatenate([inputs[:, :4, inside], inputs[:, :4, -1:]], axis=-1)
    else:
        short = inputs[:, :5, inside]
    got = apply(small.config, narrow, short, read)
    np.testing.assert_allclose(got, wide[:, inside], atol=1e-5)
    used = jnp.abs(parameters["embed"]["kernel"][...])
    fan_in = float(numbers.get("d", numbers.get("vocab_size"))) + ("d" in numbers)
    assert float(used.max()) <= fan_in**-0.5 + 1e-6  # the bound of the size in use


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"runs": ()}, "has no runs"),
        ({"runs": ({"B": 1, "seed": 0},)}, "seed and learning_rate among them"),
        ({"runs": ({"learning_rate": 1.0, "seed": 0},) * 2}, "holds the same run twice"),
        ({"optimizer": "lion"}, "optimizer must be 'adam' or 'sgd'; got 'lion'"),
        ({"max_steps": 62}, r"max_steps \(62\) must be a multiple of eval_every \(5\)"),
    ],
)
def test_bad_groups(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_group(**changes)


def test_every_command_has_groups_that_trace():
    """The groups of both presets are well formed, down to the shapes of a training chunk."""
    from experiments.emergence import run

    for preset in ("cpu", "gpu"):
        groups = [group for make in run.TRAINED.values() for group in make(preset)]
        assert len({group.name for group in groups}) == len(groups)
    group = run.recall_groups("cpu")[0]
    numbers = sweep._numbers(group)
    state = jax.eval_shape(sweep.make_init(group), numbers)
    _, losses = jax.eval_shape(sweep.make_chunk(group), state, numbers, jnp.int32(0))
    assert losses.shape == (len(group.runs),)
