# SPDX-License-Identifier: Apache-2.0
"""Static facts of a decode-attention call, and who can serve it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels._device import Device
from pallas_kernels.formats.packing import FOUR_BIT_DTYPES
from pallas_kernels.formats.qtensor import QTensor

IMPLEMENTATIONS = ("mosaic", "xla", "reference")
_SPLIT = 1024  # cached tokens per split by default
_MEASURED_ROWS = 8  # query rows of a key/value head that one pass over the cache serves


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Everything about a call that is known before it runs.

    Args:
      batch: B.
      q_len: T, new tokens.
      capacity: C, cached slots that a head can address.
      num_heads: N.
      num_kv_heads: K, divides N.
      head_dim: H.
      dtype: name of the dtype of query and output.
      store: how keys and values are stored: a float dtype, or a format's name.
      scale: factor on the logits.
      split: cached tokens per split, or None to choose; partial results are merged by their
        log-sum-exp.
      tile: slots per tile of a paged cache; 0 where slots lie in order.
      soft_cap: bound of the logits, ``cap * tanh(x / cap)``, or None.
      window: tokens that a query sees, itself included, or None.
      num_sinks: first positions that a window does not hide.
      plain: key and value are stored alike, with no scales, one of float32 per slot or (nvfp4) one
        of e4m3 per 16 channels, and 4-bit codes packed along the head.
    """

    batch: int
    q_len: int
    capacity: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    store: str
    scale: float
    split: int | None = None
    tile: int = 0
    soft_cap: float | None = None
    window: int | None = None
    num_sinks: int = 0
    plain: bool = True

    @property
    def groups(self) -> int:
        """G, query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def split_size(self) -> int:
        """Cached tokens per split."""
        return self.split or default_split(self.capacity, self.tile)


def default_split(capacity: int, tile: int) -> int:
    """Cached tokens per split when the caller does not say: 1024, in whole tiles.

    Args:
      capacity: C.
      tile: slots per tile, or 0.

    Returns:
      A number of tokens, at least 1 and a multiple of `tile`.

    >>> default_split(5000, 0), default_split(10, 0), default_split(96, 48), default_split(5000, 48)
    (1024, 10, 96, 1008)
    """
    split = min(_SPLIT, max(capacity, 1))
    return split if not tile else max(split // tile, 1) * tile


def has_plain_scales(store: QTensor) -> bool:
    """Whether a store has one float32 scale per slot, and its 4-bit codes packed along the head.

    Args:
      store: [B, K, C, H].

    Returns:
      True or False.

    >>> has_plain_scales(QTensor(jnp.zeros((1, 1, 2, 4), jnp.int8), jnp.ones((1, 1, 2, 2))))
    False
    """
    return (
        store.qtype != "nvfp4"
        and store.scale.shape[3] == 1
        and store.scale.dtype == jnp.float32
        and not any(store.padding)
        and (store.packed_axis == -1 or store.qvalue.dtype not in FOUR_BIT_DTYPES)
    )


def has_nvfp4_scales(store: QTensor) -> bool:
    """Whether a store is packed nvfp4 with one e4m3 scale per 16 channels.

    Args:
      store: [B, K, C, H].

    Returns:
      True or False.

    >>> has_nvfp4_scales(QTensor(jnp.zeros((1, 1, 2, 4), jnp.int8), jnp.ones((1, 1, 2, 1))))
    False
    """
    return (
        store.qtype == "nvfp4"
        and store.scale.shape[3] * 16 == store.shape[3]
        and store.scale.dtype == jnp.float8_e4m3fn
        and not any(store.padding)
        and store.packed_axis == -1
    )


def unsupported_reason(spec: DecodeSpec, device: Device, implementation: str) -> str | None:
    """Why an implementation cannot serve a call, or None when it can.

    Args:
      spec: the call.
      device: the device it would run on.
      implementation: "mosaic", "xla" or "reference".

    Returns:
      One sentence, or None.

    >>> spec = DecodeSpec(1, 1, 64, 2, 1, 16, "float32", "int8", 0.25, 64)
    >>> unsupported_reason(spec, Device("cpu", "cpu"), "xla") is None
    True
    """
    if implementation != "mosaic":
        return None
    reason = device_reason(device)
    if reason is not None:
        return reason
    # Needs Mosaic: not at import time.
    from pallas_kernels.ops.decode_attention import mosaic_sm90_plan

    return mosaic_sm90_plan.unsupported_reason(spec)


def device_reason(device: Device) -> str | None:
    """Why the Hopper kernels do not run on a device, or None.

    Args:
      device: the device.

    Returns:
      One sentence, or None.

    >>> device_reason(Device("gpu", "NVIDIA H200", (9, 0))) is None
    True
    """
    if device.platform != "gpu":
        return (
            f"the Mosaic GPU kernel needs an NVIDIA GPU (sm90); this device is a {device.platform}"
        )
    if device.compute_capability is not None and device.compute_capability[0] != 9:
        return f"the Mosaic GPU kernel is written for sm90; {device.kind} is {device.sm}"
    return None


def unmeasured_reason(spec: DecodeSpec) -> str | None:
    """Why ``implementation=None`` passes over a kernel that could serve a call, or None.

    Args:
      spec: the call.

    Returns:
      One sentence, or None.

    >>> unmeasured_reason(DecodeSpec(1, 1, 64, 8, 2, 128, "bfloat16", "int8", 0.1)) is None
    True
    """
    rows = spec.groups * spec.q_len
    if rows <= _MEASURED_ROWS:
        return None
    return (
        f"{rows} query rows share a key head; the sm90 kernel reads the cache once for every "
        f"{_MEASURED_ROWS} and was measured with no more; implementation='mosaic' runs it"
    )
