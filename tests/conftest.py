"""Shared test set-up: several virtual CPU devices, and GPU tests only where a GPU is."""

import os

# Before jax starts: eight virtual devices let sharding tests run on any machine.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest


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
