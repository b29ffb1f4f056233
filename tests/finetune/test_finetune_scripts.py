"""The scripts that need a GPU or other libraries, as far as they run without."""

import json

import pytest

from experiments.finetune import peers, speed


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
