"""Device facts, the interpreter helper, timing and work formulas."""

import gzip
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import benchmarking, testing
from pallas_kernels._device import current_device, describe
from pallas_kernels._interpret import abstract_gpu, gpu_interpret_mode, reset_interpreter


def test_device_with_and_without_gpu():
    assert current_device().platform in ("cpu", "gpu")
    with abstract_gpu():
        device = current_device()
    assert (device.sm, device.num_sms, device.smem_bytes) == ("sm90", 132, 232_448)
    reported = describe("gpu", "NVIDIA X", compute_capability=(9, 0), num_sms=7, smem_bytes=1000)
    assert (reported.sm, reported.num_sms, reported.smem_bytes) == ("sm90", 7, 1000)
    assert describe("gpu", "NVIDIA H100 PCIe").num_sms == 114
    assert describe("cpu", "cpu").sm == "cpu"


def test_interpreter_context_resets_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), gpu_interpret_mode(detect_races=True):
        raise RuntimeError("inside")
    with gpu_interpret_mode():
        pass
    reset_interpreter()


def test_benchmark_on_this_machine():
    timing = benchmarking.benchmark(lambda x: x @ x, jnp.ones((16, 16)), repeats=5)
    assert len(timing.seconds) == 5 and timing.median > 0 and timing.spread >= 0
    assert timing.compile_seconds > 0
    with pytest.raises(ValueError, match="repeats must be >= 1"):
        benchmarking.benchmark(jnp.sin, 1.0, repeats=0)


def test_kernel_seconds_reads_only_device_streams(tmp_path):
    name = lambda kind, pid, tid, text: {  # noqa: E731
        "ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text},
    }  # fmt: skip
    events = [
        name("process_name", 1, 0, "/device:GPU:0"),
        name("process_name", 2, 0, "/host:CPU"),
        name("thread_name", 1, 7, "Stream #7(compute)"),
        name("thread_name", 1, 8, "XLA Ops"),
        *(
            {"ph": "X", "pid": p, "tid": t, "dur": 10, "name": "k"}
            for p, t in ((1, 7), (1, 8), (2, 7))
        ),
        {"ph": "X", "pid": 1, "tid": 7, "dur": 5, "name": "k"},
    ]
    path = tmp_path / "host.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert benchmarking.kernel_seconds(tmp_path) == pytest.approx(15e-6)
    with pytest.raises(ValueError, match="no GPU kernel"):
        benchmarking.kernel_seconds(tmp_path / "nothing")


def test_contract_helpers():
    testing.assert_agrees(jnp.sin, jnp.sin, jnp.ones(3))
    testing.assert_repeatable(jnp.sin, jnp.ones(3))
    testing.assert_compiles_once(jnp.sin, (jnp.ones(3),), (jnp.zeros(3),))
    with pytest.raises(AssertionError, match="traced 2 times for 2 calls"):
        testing.assert_compiles_once(jnp.sin, (jnp.ones(3),), (jnp.zeros(4),))
    with pytest.raises(ValueError, match="kind must be one of normal"):
        testing.attention_inputs("odd")
    with pytest.raises(ValueError, match="dtype must be one of"):
        testing.tolerance("float64")
    assert testing.relative_l1(jnp.ones(2), jnp.zeros(2)) == float("inf")
