"""Static facts of one quantisation, and who can serve it."""

import dataclasses
import math

from pallas_kernels._device import Device
from pallas_kernels.formats.block_format import (
    BlockFormat,
    check_scale_rule,
    check_two_level,
    get_format,
)
from pallas_kernels.formats.number_types import FLOAT32_MIN_NORMAL, IntType

IMPLEMENTATIONS = ("xla", "reference")
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True)
class QuantizeSpec:
    """Everything about a quantisation that is known before the data. Hashable, so static under jit.

    Args:
        format: element, scale type and default tile.
        tile: values per scale along every axis of the value; 1 where each index has its own scale.
        padding: zeros to append along every axis, so that ``tile`` divides it.
        rounding: ``"nearest"`` or ``"stochastic"``.
        scale_rule: see ``scale_from_amax``.
        overrange: factor on amax, at least 1.
        two_level: whether a scale per tensor is stored as well.
        scale_min: lower clamp of the scale.
        asymmetric: whether a zero point is stored.

    >>> make_spec((4, 40), "nvfp4", axis=-1).tile
    (1, 16)
    """

    format: BlockFormat
    tile: tuple[int, ...]
    padding: tuple[int, ...]
    rounding: str = "nearest"
    scale_rule: str = "nearest"
    overrange: float = 1.0
    two_level: bool = False
    scale_min: float = FLOAT32_MIN_NORMAL
    asymmetric: bool = False

    @property
    def trailing_padding(self) -> tuple[int, ...]:
        """``padding`` without its leading zeros: the form that ``QTensor`` stores."""
        first = next((i for i, pad in enumerate(self.padding) if pad), len(self.padding))
        return self.padding[first:]


def make_spec(
    shape: tuple[int, ...],
    qtype: str | BlockFormat,
    *,
    axis: int | tuple[int, ...] | None = -1,
    tile: int | tuple[int, ...] | str | None = "default",
    rounding: str = "nearest",
    scale_rule: str | None = None,
    overrange: float = 1.0,
    two_level: bool | None = None,
    scale_min: float | None = None,
    asymmetric: bool = False,
) -> QuantizeSpec:
    """Checks the static arguments of ``quantize`` and resolves their defaults.

    Args:
        shape: shape of the value.
        qtype: name of a format, or a ``BlockFormat``.
        axis: as ``quantize``; so are the other arguments.
        tile: values per scale.
        rounding: one of ``ROUNDINGS``.
        scale_rule: one of ``SCALE_RULES``, or ``None`` for the format's.
        overrange: factor on amax.
        two_level: ``None`` for the format's.
        scale_min: ``None`` for the smallest value of the scale type.
        asymmetric: whether to store a zero point.

    Returns:
        The spec.

    Raises:
        ValueError: an argument is out of range or contradicts another one.

    >>> make_spec((3, 5), "int8", axis=None).tile
    (3, 5)
    """
    block_format = get_format(qtype)
    tiles = _resolve_tiles(shape, block_format, axis, tile)
    spec = QuantizeSpec(
        format=block_format,
        tile=tiles,
        padding=tuple(-length % size for length, size in zip(shape, tiles, strict=True)),
        rounding=rounding,
        scale_rule=block_format.scale_rule if scale_rule is None else scale_rule,
        overrange=float(overrange),
        two_level=block_format.two_level if two_level is None else two_level,
        scale_min=block_format.scale_type.smallest if scale_min is None else float(scale_min),
        asymmetric=asymmetric,
    )
    _check(spec)
    return spec


def unsupported_reason(implementation: str, spec: QuantizeSpec) -> str | None:
    """Why an implementation cannot serve ``spec``; ``None`` if it can.

    Args:
        implementation: ``"xla"``, ``"reference"`` or ``"mosaic"``.
        spec: the quantisation.

    Returns:
        One sentence, or ``None``.

    Raises:
        ValueError: unknown implementation.

    >>> unsupported_reason("xla", make_spec((16,), "nvfp4")) is None
    True
    """
    if implementation in IMPLEMENTATIONS:
        return None
    if implementation == "mosaic":
        return f"quantize to {spec.format.name} has no Mosaic kernel yet; use implementation='xla'"
    raise ValueError(
        f"implementation must be None, 'mosaic' or one of {IMPLEMENTATIONS}, got {implementation!r}"
    )


_MATRIX_DTYPES = ("bfloat16", "float16", "float32")


def matrix_reason(
    spec: QuantizeSpec, shape: tuple[int, ...], dtype: str, key_is_counter: bool, device: Device
) -> str | None:
    """Why the Mosaic kernel cannot round a matrix in place; ``None`` if it can.

    Args:
        spec: the quantisation.
        shape: of the value.
        dtype: of the value.
        key_is_counter: whether the key, if there is one, is of ``formats.counter_random``.
        device: where it would run.

    Returns:
        One sentence, or ``None``.

    >>> from pallas_kernels._device import describe
    >>> spec = make_spec((32, 64), "nvfp4")
    >>> matrix_reason(spec, (32, 64), "bfloat16", True, describe("gpu", "NVIDIA H200")) is None
    True
    >>> matrix_reason(spec, (32, 64), "bfloat16", True, describe("cpu", "cpu"))
    'the Mosaic GPU kernel needs an NVIDIA GPU (sm90); this device is a cpu'
    """
    kind, block = spec.format, spec.format.block
    two_level = (kind.scale, spec.scale_rule, spec.two_level) == ("e4m3", "nearest", True)
    power = kind.scale == "e8m0" and spec.scale_rule in ("floor", "ceil")
    power = power and kind.scale_steps is None
    if (reason := _device_reason(device)) is not None:
        return reason
    if isinstance(kind.element_type, IntType) or block not in (16, 32) or not (two_level or power):
        return (
            "the Mosaic GPU kernel rounds to floats in blocks of 16 or 32, with E4M3 scales of two "
            f"levels or E8M0 scales; got {kind.name} with scale_rule={spec.scale_rule!r}"
        )
    if len(shape) != 2 or spec.tile not in ((1, block), (block, 1)):
        return f"the Mosaic GPU kernel takes matrices with blocks of 1 x {block} or {block} x 1"
    if any(size == 0 or size % block for size in shape):
        return f"the Mosaic GPU kernel takes multiples of {block}; got shape {list(shape)}"
    if dtype not in _MATRIX_DTYPES:
        return f"the Mosaic GPU kernel takes {', '.join(_MATRIX_DTYPES)}; got {dtype}"
    if spec.rounding == "stochastic" and not key_is_counter:
        return "the Mosaic GPU kernel draws from keys made by counter_key only"
    return None


def unmeasured_reason(dtype: str, two_level: bool = True) -> str | None:
    """Why ``implementation=None`` passes over a kernel that could serve a matrix, or ``None``.

    Args:
        dtype: of the matrix.
        two_level: whether the scales are those of NVFP4, in two levels; True for FP8 casts.

    Returns:
        One sentence, or ``None``.

    >>> unmeasured_reason("float16")
    "the kernel has not run on a GPU with float16 yet; implementation='mosaic' runs it"
    """
    what = None if two_level else "E8M0 scales"
    what = "float16" if dtype == "float16" else what
    if what is None:
        return None
    return f"the kernel has not run on a GPU with {what} yet; implementation='mosaic' runs it"


def cast_reason(shape: tuple[int, ...], dtype: str, device: Device) -> str | None:
    """Why the Mosaic kernel cannot cast a matrix to FP8; ``None`` if it can.

    Args:
        shape: of the matrix.
        dtype: of the matrix.
        device: where it would run.

    Returns:
        One sentence, or ``None``.

    >>> from pallas_kernels._device import describe
    >>> cast_reason((32, 40), "bfloat16", describe("gpu", "NVIDIA H200"))
    'the Mosaic GPU cast takes multiples of 16; got shape [32, 40]'
    """
    if (reason := _device_reason(device)) is not None:
        return reason
    if dtype not in ("bfloat16", "float16"):
        return f"the Mosaic GPU cast takes bfloat16 or float16; got {dtype}"
    if any(size == 0 or size % 16 for size in shape):
        return f"the Mosaic GPU cast takes multiples of 16; got shape {list(shape)}"
    return None


def _device_reason(device: Device) -> str | None:
    if device.platform != "gpu":
        return (
            f"the Mosaic GPU kernel needs an NVIDIA GPU (sm90); this device is a {device.platform}"
        )
    return None if device.sm == "sm90" else f"the Mosaic GPU kernel is for sm90, not {device.sm}"


def _resolve_tiles(shape, block_format, axis, tile) -> tuple[int, ...]:
    axes = _resolve_axes(len(shape), axis)
    if isinstance(tile, tuple) and len(tile) != len(axes):
        raise ValueError(f"tile {tile} must have one entry for each of the {len(axes)} axes")
    # One scale for the whole tensor: the block of the format does not apply.
    default = None if axis is None else block_format.block
    if isinstance(tile, str) and tile != "default":
        raise ValueError(f"tile must be an int, a tuple, None or 'default', got {tile!r}")
    if axis is None and tile not in ("default", None):
        raise ValueError(f"axis=None is one scale per tensor, so tile must be None, got {tile}")
    per_axis = tile if isinstance(tile, tuple) else (tile,) * len(axes)
    tiles = [1] * len(shape)
    for index, size in zip(axes, per_axis, strict=True):
        size = default if size == "default" else size
        size = max(shape[index], 1) if size is None else size
        if size < 1:
            raise ValueError(f"tile must be at least 1, got {size} for axis {index}")
        tiles[index] = size
    return tuple(tiles)


def _resolve_axes(ndim: int, axis) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    for index in axes:
        if not -ndim <= index < ndim:
            raise ValueError(f"axis {index} is out of range for x with {ndim} dimensions")
    axes = tuple(index % ndim for index in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {axis} names an axis twice")
    return axes


def _check(spec: QuantizeSpec) -> None:
    scale = spec.format.scale_type
    if spec.rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {spec.rounding!r}")
    check_scale_rule(spec.scale_rule)
    check_two_level(scale.name, spec.two_level)
    if not (1.0 <= spec.overrange < math.inf):
        raise ValueError(f"overrange must be at least 1 and finite, got {spec.overrange}")
    if not scale.smallest <= spec.scale_min <= scale.max:
        raise ValueError(
            f"scale_min must be in [{scale.smallest}, {scale.max}] for scale type {scale.name}, "
            f"got {spec.scale_min}"
        )
    if spec.asymmetric:
        _check_asymmetric(spec)


def _check_asymmetric(spec: QuantizeSpec) -> None:
    if not isinstance(spec.format.element_type, IntType):
        raise ValueError(f"asymmetric=True needs an integer format, got {spec.format.name!r}")
    if spec.format.scale_steps is not None:
        raise ValueError(
            f"asymmetric=True has scales of any size, and {spec.format.name!r} has steps"
        )
    if spec.two_level or spec.overrange != 1.0 or spec.scale_rule != "nearest":
        raise ValueError(
            "asymmetric=True fits the scale to [min, max], so two_level, overrange and scale_rule "
            f"must keep their defaults; got two_level={spec.two_level}, "
            f"overrange={spec.overrange}, scale_rule={spec.scale_rule!r}"
        )
