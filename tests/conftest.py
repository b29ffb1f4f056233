"""Shared test set-up: several virtual CPU devices, cheap compilation, GPU tests only on a GPU."""

import gc
import itertools
import os
from pathlib import Path

# Both before jax starts. Eight virtual devices let sharding tests run on any machine. The tests
# compile thousands of tiny programs and run each once: optimising their machine code costs 40 %
# of the suite's time. Not on a GPU machine, where kernels are timed; the README program and the
# demo (`make wheel-test`, `make demo`) run fully optimised everywhere.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if not Path("/dev/nvidia0").exists():
    _FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
# Python looks for dead cycles after every 700 new objects, and what jax traces and caches is many
# objects that live on. With `gc.freeze` below, looking less often saves about 4 % of the time.
gc.set_threshold(20_000, 20, 20)

# Compiling is two thirds of the suite's time. A folder kept from run to run spares it; a worker has
# its own, since jax writes without a lock. Filling it takes a tenth longer, so there is no default.
if _CACHE := os.environ.get("JAXEFF_TEST_CACHE"):
    _WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(_CACHE).absolute() / _WORKER)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

# Every compiled program holds several memory mappings, Linux allows a process 65,530 of them, and
# XLA dies with a segmentation fault when it gets no more. The suite needs over 100,000.
_MAX_MAPPINGS = 40_000
_MAPPINGS = Path("/proc/self/maps")
_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _free_compiled_programs():
    """Drops jax's caches before the process runs out of memory mappings; looks every tenth test."""
    yield
    if next(_finished) % 10 or not _MAPPINGS.exists():
        return
    if _MAPPINGS.read_bytes().count(b"\n") > _MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def optimised_environment() -> dict[str, str]:
    """The environment without the flags above, for subprocesses that compute more than compile."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if flag not in _FLAGS]
    return {**os.environ, "XLA_FLAGS": " ".join(flags)}


def pytest_collection_finish():
    """Modules and collected tests last until the end: the garbage collector may skip them."""
    gc.collect()
    gc.freeze()


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_collection_modifyitems(config, items):
    """Skip tests marked ``gpu`` on machines without one."""
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
