"""Importing the packages: cheap, complete, and without optional packages."""

import importlib
import json
import subprocess
import sys

import pytest

import jaxeff
import pallas_kernels

TIMED = """
import json, sys, time
import jax, jax.numpy, flax.nnx
start = time.perf_counter()
import jaxeff, pallas_kernels
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(sys.modules)]))
"""


def timed_import() -> tuple[float, list[str]]:
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


def test_import_adds_at_most_half_a_second():
    # One of three: a busy machine must not fail the test, a slow import must.
    assert any(timed_import()[0] <= 0.5 for _ in range(3))


def test_import_loads_no_optional_package():
    _, modules = timed_import()
    assert not {"matplotlib", "safetensors", "tokenizers", "torch", "tyro"} & set(modules)


@pytest.mark.parametrize("name", jaxeff.__all__)
def test_every_public_name_of_jaxeff_exists(name):
    assert getattr(jaxeff, name) is not None
    assert name in dir(jaxeff)


@pytest.mark.parametrize("name", pallas_kernels.__all__)
def test_every_public_name_of_pallas_kernels_exists(name):
    assert getattr(pallas_kernels, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        jaxeff.atention  # noqa: B018


def test_main_module_is_the_console_script():
    assert (
        importlib.import_module("jaxeff.__main__").main
        is importlib.import_module("jaxeff.cli").main
    )
