"""Quantisation in plain jax operations: fused by XLA, serves every backend and every format."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats.block_format import (
    scale_from_amax,
    stepped_scales,
    tensor_encode_scale,
)
from pallas_kernels.formats.number_types import (
    FLOAT32_MAX,
    FloatType,
    IntType,
    largest_magnitude,
    true_divide,
)
from pallas_kernels.formats.qtensor import QTensor, split_tiles
from pallas_kernels.formats.rounding import round_to
from pallas_kernels.ops.quantize.spec import QuantizeSpec


@functools.partial(jax.jit, static_argnames="spec")
def quantize(x: jax.Array, key: jax.Array | None, spec: QuantizeSpec) -> QTensor:
    """See ``pallas_kernels.quantize``; arguments have been checked.

    Memory: a few float32 copies of ``x`` if XLA does not fuse them.

    Args:
        x: floating array.
        key: ``jax.random`` key if ``spec.rounding`` is ``"stochastic"``.
        spec: static facts.

    Returns:
        QTensor.

    >>> from pallas_kernels.ops.quantize.spec import make_spec
    >>> quantize(jnp.float32([1.0, -2.0]), None, make_spec((2,), "int8")).qvalue.tolist()
    [64, -127]
    """
    codes, scale, rest = _encode(x, key, spec)
    codes = jnp.where(jnp.isfinite(scale), codes, 0.0)  # only the scale can say NaN in every format
    return QTensor(
        qvalue=_join_tiles(codes).astype(spec.format.element_type.dtype),
        scale=_drop_tile_dims(scale).astype(spec.format.scale_type.dtype),
        qtype=spec.format.name,
        padding=spec.trailing_padding,
        **{name: _drop_tile_dims(value) for name, value in rest.items()},
    )


@functools.partial(jax.jit, static_argnames="spec")
def fake_quantize(x: jax.Array, key: jax.Array | None, spec: QuantizeSpec) -> jax.Array:
    """``quantize(x, key, spec).dequantize(x.dtype)`` bit for bit, without the storage types.

    The casts to and from 8- and 4-bit types, which change nothing because all values are on their
    grids, cost more than the rest on backends that emulate them.

    Args:
        x: floating array.
        key: ``jax.random`` key if ``spec.rounding`` is ``"stochastic"``.
        spec: static facts.

    Returns:
        Array of the shape and dtype of ``x``.

    >>> from pallas_kernels.ops.quantize.spec import make_spec
    >>> fake_quantize(jnp.float32([0.9, 6.0]), None, make_spec((2,), "mxfp4")).tolist()
    [1.0, 6.0]
    """
    codes, scale, rest = _encode(x, key, spec)
    if isinstance(spec.format.element_type, IntType):
        codes = jnp.where(codes == 0, 0.0, codes)  # integers have no -0
    if "zero_point" in rest:
        codes = codes - rest["zero_point"]
    value = codes * scale  # NaN where the scale is
    if "tensor_scale" in rest:
        value = value * rest["tensor_scale"]
    value = _join_tiles(value)
    if any(spec.padding):
        value = value[tuple(slice(0, length) for length in x.shape)]
    return value.astype(x.dtype)


@functools.partial(jax.jit, static_argnames="element")
def quantize_fp8_both(
    x: jax.Array, element: FloatType, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ``pallas_kernels.quantize_fp8_both``; arguments have been checked.

    Args:
        x: [rows, columns].
        element: e4m3 or e5m2.
        scale: float32 scalar.

    Returns:
        Codes [rows, columns] and [columns, rows], and max|x|.
    """
    wide = x.astype(jnp.float32)
    codes = round_to(true_divide(wide, scale), element).astype(element.dtype)
    return codes, codes.T, largest_magnitude(wide)


def _encode(x: jax.Array, key: jax.Array | None, spec: QuantizeSpec):
    """Codes ``[n0, tile0, n1, tile1, ...]`` and scales ``[n0, 1, n1, 1, ...]``, all float32."""
    padded = x.astype(jnp.float32)
    if any(spec.padding):
        padded = jnp.pad(padded, [(0, pad) for pad in spec.padding])
    counts = tuple(n // size for n, size in zip(padded.shape, spec.tile, strict=True))
    tiles = split_tiles(padded, counts)
    noise = None
    if spec.rounding == "stochastic":
        noise = split_tiles(jax.random.uniform(key, padded.shape, jnp.float32), counts)
    encode = _encode_asymmetric if spec.asymmetric else _encode_symmetric
    return encode(tiles, noise, spec)


def _encode_symmetric(tiles: jax.Array, noise: jax.Array | None, spec: QuantizeSpec):
    """Codes in float32, decode scale, and the tensor scale if there are two levels."""
    element, scale_type = spec.format.element_type, spec.format.scale_type
    amax = _per_tile(largest_magnitude, tiles)
    if spec.overrange != 1.0:
        # An amax near the float32 maximum must not become infinite here; a NaN passes through.
        amax = jnp.where(jnp.isinf(amax), amax, jnp.minimum(amax * spec.overrange, FLOAT32_MAX))
    if not spec.two_level:
        scale = scale_from_amax(amax, element, scale_type, spec.scale_rule, spec.scale_min)
        scale = _stepped(scale, amax, spec)
        return round_to(true_divide(tiles, scale), element, noise=noise), scale, {}

    finite = jnp.where(jnp.isfinite(amax), amax, 0.0)  # one bad tile must not spoil the others
    encode = tensor_encode_scale(jnp.max(finite, initial=0.0, keepdims=True), element, scale_type)
    tensor_scale = 1 / encode
    scale = scale_from_amax(amax, element, scale_type, spec.scale_rule, spec.scale_min, encode)
    # Without the barrier XLA repeats the making of the scale in every kernel that reads it.
    scale, tensor_scale = jax.lax.optimization_barrier((scale, tensor_scale))
    # NVFP4 is defined with the reciprocal, here and in TransformerEngine; it is clipped to be
    # finite.
    reciprocal = jnp.minimum(1 / (scale * tensor_scale), FLOAT32_MAX)
    return round_to(tiles * reciprocal, element, noise=noise), scale, {"tensor_scale": tensor_scale}


def _stepped(scale: jax.Array, amax: jax.Array, spec: QuantizeSpec) -> jax.Array:
    """Scales in the steps of the format, among tiles along the quantised axes."""
    steps = spec.format.scale_steps
    axes = tuple(2 * axis for axis, size in enumerate(spec.tile) if size > 1)
    return scale if steps is None else stepped_scales(scale, amax, steps, axes)


def _encode_asymmetric(tiles: jax.Array, noise: jax.Array | None, spec: QuantizeSpec):
    """Codes, scale and zero point such that min and max of a tile are codes exactly."""
    element, scale_type = spec.format.element_type, spec.format.scale_type
    low, high = _per_tile(jnp.min, tiles), _per_tile(jnp.max, tiles)
    spread = true_divide(high, 2.0) - true_divide(low, 2.0)  # halves cannot overflow
    scale = true_divide(spread, (element.max - element.lowest) / 2)
    # A constant tile has no spread: let its value be one unit, so that it is exact.
    scale = jnp.where(spread == 0, jnp.where(low == 0, 1.0, jnp.abs(low)), scale)
    scale = jnp.clip(round_to(scale, scale_type), spec.scale_min, scale_type.max)
    zero_point = element.lowest - true_divide(low, scale)
    # (x - low) / scale, not x / scale + zero_point, which would cancel when the tile is far from 0.
    units = true_divide(tiles - low, scale) + element.lowest
    codes = round_to(units, element, noise=noise, symmetric=False)
    finite = jnp.isfinite(_per_tile(largest_magnitude, tiles))
    return (
        codes,
        jnp.where(finite, scale, jnp.nan),
        {"zero_point": jnp.where(finite, zero_point, 0.0)},
    )


def _per_tile(reduce, tiles: jax.Array) -> jax.Array:
    """Reduces the odd axes; a tile without values (zero-length axis) gives 0."""
    tile_axes = tuple(range(1, tiles.ndim, 2))
    if tiles.size == 0:
        return jnp.zeros([n if i % 2 == 0 else 1 for i, n in enumerate(tiles.shape)], tiles.dtype)
    return reduce(tiles, axis=tile_axes, keepdims=True)


def _join_tiles(tiles: jax.Array) -> jax.Array:
    """[n0, tile0, n1, tile1, ...] -> [n0 * tile0, n1 * tile1, ...]."""
    shape = tiles.shape
    return tiles.reshape([n * size for n, size in zip(shape[::2], shape[1::2], strict=True)])


def _drop_tile_dims(value: jax.Array) -> jax.Array:
    """[n0, 1, n1, 1, ...] -> [n0, n1, ...]."""
    return value.reshape(value.shape[::2])
