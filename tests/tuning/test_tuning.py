"""The tuner survives candidates that raise, hang, crash and run out of memory; its table."""

import json
import time

import pytest

from pallas_kernels import _tuning
from pallas_kernels._tuning import Trial, Tuning, choose, load, store, tune

FAKE = """
import os, subprocess, sys, time

def run(config, base):
    what = config["what"]
    if what == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(config["pid_file"], "w").write(str(child.pid))
        time.sleep(600)
    if what == "raise":
        raise ValueError("block_kv must divide\\nand more lines")
    if what == "memory":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
    if what == "crash":
        os.abort()
    if what == "exit":
        os._exit(3)
    if what == "nan":
        return float("nan")
    print("noise")
    return base * config["factor"]
"""


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_search_survives_everything(tmp_path):
    (tmp_path / "fake_operation.py").write_text(FAKE)
    pid_file = tmp_path / "pid"
    names = ("raise", "memory", "crash", "exit", "nan")
    candidates = [{"what": name} for name in names]
    candidates += [{"what": "ok", "factor": 3}, {"what": "ok", "factor": 2}]
    tuning = tune(
        "fake_operation:run", candidates, {"base": 0.5}, limit_seconds=60, path=[tmp_path]
    )
    reasons = [trial.reason for trial in tuning.trials]
    assert reasons[:5] == [
        "ValueError: block_kv must divide",
        "out of memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes",
        "the process ended without an answer: SIGABRT",
        "the process ended without an answer: exit status 3",
        "ValueError: measured nan seconds",
    ]
    assert tuning.best == Trial({"what": "ok", "factor": 2}, 1.0) and tuning.skipped == 0

    hang = {"what": "hang", "pid_file": str(pid_file)}
    for limit in (2, 60):  # on a busy machine the process may not get far within 2 seconds
        arguments = dict(limit_seconds=limit, path=[tmp_path])
        tuning = tune("fake_operation:run", [hang], {"base": 1}, **arguments)
        assert tuning.trials == (Trial(hang, None, f"time limit of {limit} s"),)
        if pid_file.exists() and pid_file.read_text():
            break
    # The children of a hanging process are ended with it.
    for _ in range(50):
        if gone(int(pid_file.read_text())):
            break
        time.sleep(0.1)
    assert gone(int(pid_file.read_text()))
    with pytest.raises(RuntimeError, match=r"no candidate finished, 0 not tried: .*time limit"):
        _ = tuning.best


def test_total_time_and_missing_module(tmp_path):
    tuning = tune("no_such_module:run", [{}, {}, {}], total_seconds=1e-6)
    assert tuning.skipped >= 2
    tuning = tune("no_such_module:run", [{}])
    assert tuning.trials[0].reason == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_real_measurement_can_import_this_package(tmp_path):
    (tmp_path / "real_operation.py").write_text(
        "import pallas_kernels._tuning as t\ndef run(config):\n    return t.bucket(config['n'])\n"
    )
    tuning = tune("real_operation:run", [{"n": 3}], path=[tmp_path], limit_seconds=120)
    assert tuning.best.seconds == 4.0


@pytest.mark.parametrize("arguments", [("module",), ("a b:c",), ("m:f", [], None, -1.0)])
def test_bad_arguments(arguments):
    more = {"limit_seconds": arguments[3]} if len(arguments) > 3 else {}
    with pytest.raises(ValueError, match="must be"):
        tune(arguments[0], [], **more)


KEY = {"head_dim": 128, "quant": "sage2", "causal": True, "kv_len": 4096}
HEURISTIC = {"block_kv": 128, "num_stages": 2}


def test_heuristic_then_stored(tmp_path):
    where = dict(device="NVIDIA H200", folder=tmp_path)
    assert choose("attention", KEY, HEURISTIC, **where) == HEURISTIC
    path = store("attention", KEY, Trial({"block_kv": 256}, 1e-3), **where)
    assert path == tmp_path / "nvidia_h200" / "attention.json"
    store("attention", KEY | {"head_dim": 64}, Trial({"block_kv": 64}, 1e-3), **where)
    assert choose("attention", KEY, HEURISTIC, **where) == {"block_kv": 256, "num_stages": 2}
    # Neither another call nor another device is served from this entry.
    assert choose("attention", KEY | {"causal": False}, HEURISTIC, **where) == HEURISTIC
    elsewhere = dict(device="NVIDIA H100 PCIe", folder=tmp_path)
    assert choose("attention", KEY, HEURISTIC, **elsewhere) == HEURISTIC
    store("attention", KEY, Trial({"block_kv": 192}, 5e-4), **where)
    assert choose("attention", KEY, HEURISTIC, **where)["block_kv"] == 192
    entries = load("attention", **where)
    assert [entry["key"]["head_dim"] for entry in entries] == [128, 64]
    assert json.loads(path.read_text())["entries"] == entries


def test_stale_and_broken_tables(tmp_path):
    where = dict(device="d", folder=tmp_path)
    store("attention", KEY, Trial({"block_n": 1}, 1.0), **where)
    with pytest.raises(ValueError, match="has block_n; this kernel knows block_kv, num_stages"):
        choose("attention", KEY, HEURISTIC, **where)
    (tmp_path / "d" / "attention.json").write_text('{"entries": [{"key": 1, "config": {}}]}')
    with pytest.raises(ValueError, match=r"attention\.json of d is not a tuning table"):
        load("attention", **where)
    with pytest.raises(ValueError, match="only a finished trial"):
        store("attention", KEY, Trial({}, None, "time limit of 1 s"), **where)


def test_tables_in_the_package_are_well_formed():
    for path in _tuning.FOLDER.glob("*/*.json"):
        assert path.parent.name == _tuning.device_key(path.parent.name)
        assert load(path.stem, path.parent.name)


def test_best_of_equals_is_the_first():
    assert Tuning((Trial({"a": 1}, 1.0), Trial({"a": 2}, 1.0))).best.config == {"a": 1}
