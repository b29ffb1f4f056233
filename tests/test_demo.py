"""The main job, in small: every part runs, and the files it promises are there."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxeff import cli, demo, report
from jaxeff.models import ModelConfig


@pytest.fixture(scope="module")
def small_preset():
    model = ModelConfig.llama(
        vocab_size=256,
        num_layers=2,
        embed_dim=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_dim=64,
    )
    return replace(
        demo.PRESETS["cpu"],
        model=model,
        steps=3,
        batch_size=2,
        seq_len=64,
        evaluation_batches=1,
        prompts=2,
        prompt_tokens=48,
        continuation_tokens=16,
        rkv_budgets=(24, 16),
        rkv_buffer=8,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_preset):
    patch = pytest.MonkeyPatch()
    patch.setitem(demo.PRESETS, "cpu", small_preset)
    output = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    results = demo.run_demo(output=output, seed=1, console=Console(file=printed, width=160))
    patch.undo()
    (folder,) = output.iterdir()
    return folder, results, printed.getvalue()


def test_report_json_holds_device_versions_seed_and_all_numbers(finished):
    folder, results, _ = finished
    stored = json.loads((folder / "report.json").read_text())
    assert stored["seed"] == 1
    assert {"jax", "flax", "jaxeff"} <= set(stored["machine"]["versions"])
    assert stored["machine"]["device"] == "cpu"
    assert set(stored["training"]["runs"]) == {"full precision", "FP4 split rounding"}
    assert set(stored["attention"]) == set(demo.ATTENTION_VARIANTS)
    assert set(stored["cache"]) == {
        "full",
        "R-KV 24",
        "R-KV 16",
        "KVzip 30 %",
        "KVzip 30 % + INT8",
    }
    assert np.isfinite([cache["loss"] for cache in stored["cache"].values()]).all()
    assert stored["training"]["gzip_bits_per_byte"] > 0


def test_compressed_caches_allocate_less(finished):
    _, results, _ = finished
    size = {name: cache["allocated_bytes"] for name, cache in results["cache"].items()}
    assert size["R-KV 16"] < size["R-KV 24"] < size["full"]
    assert size["KVzip 30 % + INT8"] < size["KVzip 30 %"] < size["full"]


def test_every_layer_has_an_attention_error(finished):
    _, results, _ = finished
    for name, variant in results["attention"].items():
        errors = np.array(variant["relative_l1_per_layer"])
        assert errors.shape == (2,)
        assert (errors > 0).all() == (name != "full precision")


def test_page_is_self_contained(finished):
    folder, _, _ = finished

    class Links(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag, attributes):
            self.found += [value for name, value in attributes if name == "src"]
            assert tag not in ("script", "link")

    page = (folder / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert not parser.found
    assert page.count("<svg") == 3


def test_table_names_every_variant(finished):
    _, results, printed = finished
    for name in (*demo.ATTENTION_VARIANTS, *results["cache"], "gzip -9"):
        assert name in printed


def test_training_logs_are_json_lines(finished):
    folder, _, _ = finished
    for name in ("full", "fp4"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert [lines[0]["step"], lines[-1]["step"]] == [0, 2]
        assert all(np.isfinite(line["loss"]) for line in lines)


def test_generate_continues_from_the_checkpoint(finished, capsys):
    folder, _, _ = finished
    arguments = ["generate", "--checkpoint", str(folder / "checkpoint"), "--prompt", "def main("]
    for cache in ("full", "rkv:16"):
        cli.main([*arguments, "--cache", cache, "--max-new-tokens", "8"])
        printed = capsys.readouterr()
        assert printed.out.startswith("def main(")
        assert "tokens/s" in printed.err


def test_eval_kv_compares_with_the_first_compression(finished, tmp_path, capsys):
    folder, _, _ = finished
    sizes = ["--prompts", "2", "--prompt-tokens", "32", "--continuation-tokens", "8"]
    out = tmp_path / "kv.json"
    where = ["--checkpoint", str(folder / "checkpoint"), "--output", str(out)]
    cli.main(["eval-kv", *where, *sizes, "--compressions", "full", "streaming_llm:16"])
    results = json.loads(out.read_text())
    assert list(results) == ["full", "streaming_llm:16"]
    assert results["full"]["agreement"] == 1.0
    assert "streaming_llm:16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--checkpoint", "nowhere", "--prompt", ""], "prompt is empty"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "x"], "nowhere"),
        (["demo", "--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"one of \['cpu', 'h200'\], got 'tpu'"):
        demo.run_demo(preset="tpu")


def test_two_runs_of_one_second_keep_apart(tmp_path: Path):
    folders = {demo._new_folder(tmp_path) for _ in range(3)}
    assert len(folders) == 3


def test_machine_has_no_paths():
    assert "/" not in json.dumps(report.machine()).replace("Linux/", "")
