# SPDX-License-Identifier: Apache-2.0
"""Running Mosaic GPU kernels on a CPU, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


@contextlib.contextmanager
def abstract_gpu(device: jax.sharding.AbstractDevice = H200) -> Iterator[None]:
    """Traces and lowers as if the given GPU were present.

    Args:
      device: the GPU to pretend; an H200 by default.

    Yields:
      None.

    >>> from pallas_kernels._device import current_device
    >>> with abstract_gpu():
    ...     current_device().sm
    'sm90'
    """
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@contextlib.contextmanager
def gpu_interpret_mode(**params) -> Iterator[None]:
    """Runs every Mosaic GPU kernel traced inside on the CPU, under Pallas' GPU interpreter.

    The state of the interpreter is reset when a kernel raises; otherwise the next kernel would
    wait for threads that no longer exist.

    Args:
      **params: fields of ``plgpu.InterpretGPUParams``, for example ``detect_races=True``.

    Yields:
      None.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
            yield
    except BaseException:
        reset_interpreter()
        raise


def reset_interpreter() -> None:
    """Clears the interpreter's threads and memory after a kernel has raised.

    The function has no public name in jax 0.11 and 0.12; this is the only place that calls it.
    """
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()
