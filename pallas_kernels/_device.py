# SPDX-License-Identifier: Apache-2.0
"""What the device can do: compute capability, shared memory and number of multiprocessors."""

from __future__ import annotations

import dataclasses
import os

import jax

# Device kind (a part of its name) -> compute capability, bytes of shared memory that one block
# may use, streaming multiprocessors. NVIDIA's CUDA programming guide, technical specifications.
_KNOWN_GPUS = {
    "H200": ((9, 0), 232_448, 132),
    "H100 PCIe": ((9, 0), 232_448, 114),
    "H100": ((9, 0), 232_448, 132),
    "H20": ((9, 0), 232_448, 78),
    "B200": ((10, 0), 232_448, 148),
    "A100": ((8, 0), 166_912, 108),
    "L40": ((8, 9), 101_376, 142),
    "RTX 4090": ((8, 9), 101_376, 128),
    "RTX 5090": ((12, 0), 101_376, 170),
}
_SMEM_BY_CAPABILITY = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}


@dataclasses.dataclass(frozen=True)
class Device:
    """Facts about one device that decide which kernels may run on it.

    Args:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      kind: the device's own name, for example ``"NVIDIA H200"``.
      compute_capability: (major, minor) of a GPU, None elsewhere or when unknown.
      smem_bytes: shared memory that one block may use, bytes; 0 where there is none.
      num_sms: streaming multiprocessors of a GPU; 0 where there are none.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None
    smem_bytes: int = 0
    num_sms: int = 0

    @property
    def sm(self) -> str:
        """Architecture in NVIDIA's spelling, ``"sm90"``, or the platform where there is none.

        >>> Device("gpu", "NVIDIA H200", (9, 0)).sm
        'sm90'
        """
        if self.compute_capability is None:
            return self.platform
        return "sm{}{}".format(*self.compute_capability)


def current_device() -> Device:
    """The device that a computation traced now would run on.

    An abstract device set with ``jax.sharding.use_abstract_mesh`` comes first, so that kernels
    can be lowered for a GPU on a machine without one; then ``jax.default_device``; then the
    first real device.

    Returns:
      A `Device`; its GPU fields are empty on other platforms.

    >>> current_device().platform in ("cpu", "gpu", "tpu")
    True
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    # A mesh of real devices has an abstract device too: on a CPU it says nothing we need.
    if abstract is not None and abstract.platform in ("gpu", "cuda"):
        return describe(abstract.platform, abstract.device_kind, num_sms=abstract.num_cores)
    real = jax.config.jax_default_device
    if real is None or isinstance(real, str):
        real = jax.devices(real)[0] if real else jax.devices()[0]
    capability = getattr(real, "compute_capability", None)
    return describe(
        real.platform,
        real.device_kind,
        compute_capability=_parse_capability(capability),
        num_sms=getattr(real, "core_count", None),
        smem_bytes=getattr(real, "shared_memory_per_block_optin", None),
    )


def describe(
    platform: str,
    kind: str,
    *,
    compute_capability: tuple[int, int] | None = None,
    num_sms: int | None = None,
    smem_bytes: int | None = None,
) -> Device:
    """Fills in what is known about a device from its name.

    Args:
      platform: ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"tpu"``.
      kind: the device's name; matched against the GPUs this library knows.
      compute_capability: (major, minor), if the device reports it.
      num_sms: streaming multiprocessors, if the device reports them.
      smem_bytes: shared memory per block, bytes, if the device reports it.

    Returns:
      A `Device`. Reported values win over the table.

    >>> describe("gpu", "NVIDIA H200").compute_capability
    (9, 0)
    """
    if platform not in ("gpu", "cuda"):
        return Device(platform, kind)
    known = next((facts for name, facts in _KNOWN_GPUS.items() if name in kind), None)
    capability, table_smem, table_sms = known or (None, 0, 0)
    capability = compute_capability or capability
    smem = smem_bytes or table_smem or _SMEM_BY_CAPABILITY.get(capability, 101_376)
    return Device("gpu", kind, capability, smem, num_sms or table_sms)


def xla_is_deterministic() -> bool:
    """Whether XLA was told to keep to one order of additions on a GPU.

    >>> xla_is_deterministic()
    False
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    values = [flag.partition("=")[2] for flag in flags if "xla_gpu_deterministic_ops" in flag]
    return bool(values) and values[-1].lower() in ("", "true", "1")


def _parse_capability(text) -> tuple[int, int] | None:
    if text is None:
        return None
    major, _, minor = str(text).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else None
