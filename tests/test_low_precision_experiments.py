"""The low-precision experiments: closed forms of the quadratic, tables, and a run that goes on."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.low_precision import (
    arms,
    quadratic,
    report,
    run,
    side_by_side,
    speed,
    training,
)
from jaxeff.quant import OperandQuant, apply_recipe


def test_quadratic_follows_the_closed_forms():
    """Section 2.5: .077, .25, .571 at the best rate; .083, .33, 1.33 at 1 / λ; floor and bias."""
    result = quadratic.study(seeds=2)
    expected = [0.077, 0.25, 0.571, 0.083, 0.333, 1.333]
    for row, value in zip(result["rows"], expected, strict=False):
        assert abs(row["predicted"] - value) < 1e-3
    for row in result["rows"]:
        assert abs(row["simulated"] / row["predicted"] - 1) < 0.1, row
    floor = result["noise_floor"]
    assert abs(floor["predicted"] - 8.77) < 0.01
    assert all(abs(value / floor["predicted"] - 1) < 0.1 for value in floor["simulated"])
    assert abs(result["rounding_bias"]["simulated"] - 0.005) < 1e-6


def test_arms_are_what_their_names_say():
    rounding = {arm.name: arm.recipe for arm in arms.rounding_arms("gpu")}
    assert len(rounding) == 8 + 12
    assert rounding["rtn_but_bwd_d"].stochastic_points == ("bwd_d",)
    assert "upd_x" not in rounding["sr_but_upd_x"].stochastic_points
    formats = {arm.name: arm.recipe for arm in arms.format_arms("gpu")}
    assert len(formats) == 15 and formats["b16_e4m3"].fwd_x.format == "nvfp4"
    assert all(arm.recipe.bwd_w != OperandQuant() for arm in arms.format_arms("gpu"))
    assert set(arms.qaf_arms("gpu")) == {"normal", "forced"}
    branches = {arm.name: arm.recipe for arm in arms.branch_arms("forced")}
    assert branches["both"].is_identity and branches["stay"].stochastic_points
    assert branches["backward"].fwd_x == branches["stay"].fwd_x


def test_tables():
    runs = {
        name: [
            {"seed": s, "validation": 2 + gap + 0.1 * s + 1e-3 * s * gap, "seconds_per_step": 1.0}
            for s in range(3)
        ]
        for name, gap in (("bf16", 0.0), ("split", 0.02), ("rtn", 0.05))
    }
    table = report.gaps(runs)
    assert abs(table["rtn"]["gap"] - 0.05) < 1e-3 and table["rtn"]["standard_error"] < 1e-3
    assert report.worse(runs, "rtn", "split")["passed"]
    assert not report.worse(runs, "split", "rtn")["passed"]
    rows = [
        {"tokens": size, "inputs": 1, "outputs": 1, "recipe": "fp8", "speed_up": ratio}
        for size, ratio in ((1, 0.5), (2, 1.2), (4, 0.9), (8, 1.5))
    ]
    points = speed.speed_ups(rows)["fp8"]
    assert speed.break_even(points) == {"flops": 16, "slower_at_flops": [2, 8]}


class Tiny(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(256, 32, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs)])
        self.lm_head = nnx.Linear(32, 256, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.lm_head(x + self.layers[0](x))


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    tiny = dataclasses.replace(
        training.PRESETS["cpu"], embed_dim=32, num_layers=1, num_heads=2, mlp_dim=32, seq_len=16,
        batch=2, steps=8, warmup_steps=1, max_bytes=300_000, validation_bytes=512,
    )  # fmt: skip

    def build(arm, seed, preset):
        model = Tiny(seed)
        apply_recipe(model, arm.recipe, seed=seed)
        return model

    monkeypatch.setattr(training, "build", build)
    arm = arms.qaf_arms("cpu")["forced"][2]
    assert arm.name == "backward" and arm.phase
    whole = training.Runs(tmp_path / "a", tiny).get("qaf", arm, 0)
    assert len(whole["curve"]) == 8 and whole["bytes_seen"] == 8 * 16
    parts = training.Runs(tmp_path / "b", tiny)
    left = iter([True] * 4 + [False])

    def check_time():
        if not next(left, True):
            raise training.OutOfTime

    monkeypatch.setattr(parts, "check_time", check_time)
    with pytest.raises(training.OutOfTime):
        parts.get("qaf", arm, 0)
    again = training.Runs(tmp_path / "b", tiny).get("qaf", arm, 0)
    assert [again[name] for name in ("curve", "validation")] == [
        whole[name] for name in ("curve", "validation")
    ]
    known = json.loads((tmp_path / "b" / "runs.jsonl").read_text())
    assert known["arm"] == "backward"
    with pytest.raises(ValueError, match="holds runs of other sizes"):
        training.Runs(tmp_path / "b", dataclasses.replace(tiny, steps=9)).get("qaf", arm, 0)


def test_side_by_side_steps_all_arms_until_the_time_is_over(tmp_path, monkeypatch):
    """Same batches and rates for all, also when compiling took all the time; gaps pair by step."""
    clock = itertools.count()  # a hundredth of a second passes whenever somebody asks
    time = types.SimpleNamespace(monotonic=lambda: next(clock) / 100)
    monkeypatch.setattr(side_by_side, "time", time)
    monkeypatch.setattr(side_by_side, "LEAST", 1.0)
    preset = dataclasses.replace(
        training.PRESETS["cpu"], seq_len=16, batch=2, max_bytes=300_000, validation_bytes=512
    )
    said, seen = [], []

    def program(shift):
        def step(state, tokens, rate):
            seen.append((shift, int(tokens.sum()), float(rate)))
            return state, jnp.float32(1 + shift)

        return step

    session = side_by_side.Session(preset, 0.0, tmp_path / "runs.json", said.append)
    runs = [
        side_by_side.Run(arm, 0, program(shift), ())
        for shift, arm in enumerate([arms.BASELINE, training.Arm("rtn", arms.SPLIT)])
    ]
    count = session.advance(runs, session.deadline, peak=1.0, warmup_steps=3, first_step=5) - 5
    assert count > 16 and len(seen) == 2 * count and runs[0].curve[0][0] == 5
    for (_, tokens, rate), (_, other_tokens, other_rate) in zip(seen[::2], seen[1::2], strict=True):
        assert tokens == other_tokens and rate == other_rate <= 1
    assert seen[0][2] < 0.4 and seen[-1][2] < 0.3  # warms up, and ends low
    session.evaluate(runs)
    records = session.save(runs)
    assert [records[name][0]["validation"] for name in ("bf16", "rtn")] == [1.0, 2.0]
    assert report.late_gaps(records)["rtn"] == {"gap": 1.0, "standard_error": 0.0}
    assert json.loads((tmp_path / "runs.json").read_text())["records"].keys() == records.keys()


def test_calls_with_a_seed_each_are_put_together(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        records = {
            arm: [
                {
                    "seed": seed,
                    "validation": 1.0 + gap,
                    "curve": [[8 * i, 1.0 + gap, 0.1] for i in range(10 + seed)],
                    "seconds_per_step": 0.01,
                }
            ]
            for arm, gap in (("bf16", 0.0), ("rtn", 0.04), ("sr", 0.06), ("split", 0.01))
        }
        content = {"environment": {"device": "some GPU"}, "sizes": {}, "seconds": 1.0, "text": {}}
        path = folder / "rounding_runs.json"
        path.write_text(json.dumps(content | {"records": records}))
    where = ["--collect", *map(str, folders), "--output", str(tmp_path), "--no-plots"]
    run.main(["rounding", "--preset", "minutes", "--seeds", "2", *where])
    result = json.loads((tmp_path / "rounding.json").read_text())
    assert result["environment"] == {"device": "some GPU"}
    assert result["table"]["rtn"]["seeds"] == [0, 1]
    assert abs(result["late_gaps"]["sr"]["gap"] - 0.06) < 1e-9
    assert all(claim["passed"] for claim in result["claims"])


def test_the_measured_step_trains_with_every_recipe(tmp_path, monkeypatch):
    """Rows for all recipes, whose losses fall, and agree at the start."""
    monkeypatch.setattr(speed, "kernel_times", lambda folder: {"nvjet_hsh": 2e-3, "fusion": 1e-3})
    sizes = speed.Sizes(
        layers=1, dim=32, heads=2, kv_heads=1, mlp=32, vocab=64, batch=2, seq_len=16,
        attention="xla",
    )  # fmt: skip
    path = tmp_path / "speed_step.json"
    speed.measure_steps(speed.Report(path, 1e9, lambda text: None), sizes, blocks=1, length=4)
    rows = json.loads(path.read_text())["rows"]
    losses = {row["recipe"]: row["losses"] for row in rows}
    assert set(losses) == {"bf16", "fp8_delayed", "fp8_current", "fp4_all_the_way"}
    for first, last in losses.values():
        # Measured: at most .068 of 4.565.
        assert last < first and abs(first - losses["bf16"][0]) < 0.1
    assert rows[0]["parts"]["products"] == 2.0 and rows[0]["parts"]["rest"] == 1.0


def test_speed_refuses_a_cpu(tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("for machines without a GPU")
    with pytest.raises(SystemExit, match="speed needs a GPU"):
        run.main(["speed", "--section", "step", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="only must be out of"):
        run.main(["speed", "--only", "steps", "--output", str(tmp_path)])
