"""The low-precision experiments: closed forms of the quadratic, tables, and a run that goes on."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from experiments.low_precision import arms, quadratic, report, run, speed, training
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


def test_speed_refuses_a_cpu(tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("for machines without a GPU")
    with pytest.raises(SystemExit, match="speed needs a GPU"):
        run.main(["speed", "--section", "step", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="only must be out of"):
        run.main(["speed", "--only", "steps", "--output", str(tmp_path)])
