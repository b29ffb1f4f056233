"""The scripts that need a GPU or other libraries, as far as they run without."""

import json

import pytest

from experiments.finetune import inference, peers, run, speed


def test_peers_says_what_passed_failed_and_was_left_out(monkeypatch, tmp_path):
    def missing(family, folder):
        peers.need("a_library_that_nobody_has")

    def broken(family, folder):
        raise ValueError(f"{folder}/config.json cannot be read")

    checks = {"same": lambda *_: (1e-6, 1e-5), "missing": missing}
    monkeypatch.setattr(peers, "CHECKS", checks)
    assert peers.Command(tmp_path).run()
    checks |= {"off": lambda *_: (float("nan"), 1.0), "broken": broken}
    assert not peers.Command(tmp_path).run()
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["PASS", "SKIP", "FAIL", "FAIL"] * 2
    assert rows[1]["why"] == "a_library_that_nobody_has is not installed"
    assert rows[3]["why"] == "ValueError: FOLDER/config.json cannot be read"


def test_speed_measures_what_is_asked_for(tmp_path, monkeypatch):
    steps = {"lora": 4.0, "qlora": 5.0}
    measure = lambda method, sizes: {  # noqa: E731
        "step_ms": steps[type(method).__name__.lower()],
        "peak_bytes": sizes.model["num_layers"],
    }
    monkeypatch.setattr(speed, "training_step", measure)
    result = speed.Command("cpu", output=tmp_path, only="lora,qlora", layers=3).run()
    written = json.loads((tmp_path / "cpu" / "speed.json").read_text())
    assert written["steps"] == result["steps"]
    assert result["steps"]["qlora"]["speedup_over_lora"] == 0.8
    assert result["sizes"]["model"]["num_layers"] == 3 and not result["products"]
    with pytest.raises(ValueError, match=r"only has \['lor'\], which are no measurements"):
        speed.Command("cpu", output=tmp_path, only="lor").run()


def test_inference_compares_storages_and_lists_what_came_too_late(tmp_path):
    result = inference.Command("cpu", output=tmp_path, only="bf16,int4_a8").run()
    packed = result["storages"]["int4_a8"]
    assert packed["block_weight_bytes"] < 0.3 * result["storages"]["bf16"]["block_weight_bytes"]
    assert packed["token_over_bf16"] > 0 and packed["token_of_2_rows_ms"] > 0
    late = inference.Command("cpu", 0.0, tmp_path, "nvfp4").run()
    written = json.loads((tmp_path / "cpu" / "inference.json").read_text())
    assert written["skipped"] == late["skipped"] == ["storages/nvfp4"]
    with pytest.raises(ValueError, match=r"only has \['fp5'\]; expected some of \['bf16', "):
        inference.Command("cpu", output=tmp_path, only="fp5").run()


def test_quality_sums_up_seeds_by_rank_at_each_ones_best_rate(tmp_path, monkeypatch):
    """Arms are trained by the part they belong to; runs that are in any log are not repeated."""
    sizes = run.PRESETS["cpu"]
    asked = []

    class Arm:
        def __init__(self, method, sizes, base):
            self.rank = method.rank

        def run(self, docs, rate, seed):
            asked.append((self.rank, rate, seed))
            facts = dict.fromkeys(("untrained_loss", "step_ms", *run._BYTES), 1)
            return {"loss": 1 + abs(rate - 2e-2) + 0.1 * seed, **facts}

    monkeypatch.setattr(run, "Arm", Arm)
    for part in ("0/2", "1/2", "0/2"):
        command = run.Command("quality", output=tmp_path, only="falqon_anchored", part=part)
        command.folder.mkdir(exist_ok=True)
        assert run._train_missing(command, sizes, None, None, float("inf")) == []
    assert len(asked) == len(set(asked)) == 5 + 2 + 3 * (3 + 2)
    by_rank = run.sweep(run._records(command.folder), sizes)["rank"]["falqon_anchored"]
    assert list(by_rank) == ["8", "16", "64", "128"]
    for row in by_rank.values():
        assert row["learning_rate"] == 2e-2 and row["loss"] == pytest.approx(1.1)
    late = run.Command("quality", output=tmp_path, only="lora", part="0/1")
    assert len(run._train_missing(late, sizes, None, None, 0.0)) == 5 + 3 * 2
