"""Shared test set-up: several virtual CPU devices, cheap compilation, GPU tests only on a GPU."""

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

import jax  # noqa: E402
import pytest  # noqa: E402


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
