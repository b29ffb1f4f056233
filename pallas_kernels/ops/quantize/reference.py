"""The oracle: every value of a type is listed, and the nearest one is looked up."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.number_types import IntType, NumberType, true_divide
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.quantize.spec import QuantizeSpec


def quantize(x: jax.Array, key: jax.Array | None, spec: QuantizeSpec) -> QTensor:
    """Same function as ``xla.quantize``, written for reading: tables, no bit tricks, no fusion.

    Args:
        x: floating array without zero-length axes, magnitudes in 2^-100 .. 2^100 or 0, inf, NaN.
        key: ``jax.random`` key if ``spec.rounding`` is ``"stochastic"``.
        spec: static facts.

    Returns:
        QTensor, bit for bit what ``xla.quantize`` returns.

    >>> from pallas_kernels.ops.quantize.spec import make_spec
    >>> quantize(jnp.float32([1.3, 6.0]), None, make_spec((2,), "mxfp4")).dequantize().tolist()
    [1.5, 6.0]
    """
    x = jax.lax.pad(x.astype(jnp.float32), 0.0, [(0, pad, 0) for pad in spec.padding])
    noise = jax.random.uniform(key, x.shape, jnp.float32) if spec.rounding != "nearest" else None
    scaling = _asymmetric if spec.asymmetric else _symmetric
    units, scale, rest = scaling(x, spec)
    units = jnp.where(jnp.isnan(_spread(scale, spec)), 0.0, units)
    codes = lookup(units, spec.format.element_type, noise, symmetric=not spec.asymmetric)
    return QTensor(
        qvalue=codes.astype(spec.format.element_type.dtype),
        scale=scale.astype(spec.format.scale_type.dtype),
        qtype=spec.format.name,
        padding=spec.trailing_padding,
        **rest,
    )


def magnitudes_of(kind: NumberType, symmetric: bool = True) -> np.ndarray:
    """All magnitudes of a type in ascending order, which is the order of their codes.

    Args:
        kind: an integer, or a float of at most 8 bits.
        symmetric: whether an integer type leaves its most negative code out.

    Returns:
        float32 array.

    >>> from pallas_kernels.formats.number_types import number_type
    >>> magnitudes_of(number_type("e2m1")).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if isinstance(kind, IntType):
        return np.arange((kind.max if symmetric else -kind.lowest) + 1, dtype=np.float32)
    if kind.name == "e8m0":
        return np.float32(2.0 ** np.arange(-126, 128))
    bias = 2 ** (kind.exponent_bits - 1) - 1
    values = [
        ((e > 0) + m / 2**kind.mantissa_bits) * 2.0 ** (max(e, 1) - bias)
        for e in range(2**kind.exponent_bits)
        for m in range(2**kind.mantissa_bits)
    ]
    return np.float32([value for value in values if value <= kind.max])


def lookup(
    x: jax.Array, kind: NumberType, noise: jax.Array | None = None, symmetric: bool = True
) -> jax.Array:
    """The value of ``kind`` nearest to x, ties to the even code; or the neighbour ``noise`` picks.

    Args:
        x: float32 array; values outside the range take the nearest end.
        kind: an integer, or a float of at most 8 bits.
        noise: float32 in [0, 1): the neighbour farther from zero, whose probability is
            p = (|x| - low) / (high - low), is taken when noise >= 1 - p. ``None`` takes the
            nearest.
        symmetric: see ``magnitudes_of``.

    Returns:
        float32 array of the shape of ``x``.

    >>> from pallas_kernels.formats.number_types import number_type
    >>> lookup(jnp.float32([0.25, -2.6]), number_type("e2m1")).tolist()
    [0.0, -3.0]
    """
    table = jnp.asarray(magnitudes_of(kind, symmetric))
    a = jnp.clip(jnp.abs(x), table[0], table[-1])
    below = jnp.clip(jnp.searchsorted(table, a, side="right") - 1, 0, len(table) - 2)
    low, high = table[below], table[below + 1]
    if noise is not None:
        take_high = noise >= 1 - (a - low) / (high - low)
    else:
        tie_goes_up = (below % 2 == 1) | (kind.name == "e8m0")  # e8m0 has no even neighbour
        take_high = (a - low > high - a) | ((a - low == high - a) & tie_goes_up)
    return jnp.clip(jnp.copysign(jnp.where(take_high, high, low), x), max=kind.max)


def _symmetric(x: jax.Array, spec: QuantizeSpec):
    element, scale_type = spec.format.element_type, spec.format.scale_type
    amax = _reduce(jnp.abs(x), spec, jax.lax.max) * spec.overrange
    if not spec.two_level:
        scale = _round_scale(amax, 1.0, spec)
        return true_divide(x, _spread(scale, spec)), scale, {}
    tensor_amax = jnp.max(jnp.where(jnp.isfinite(amax), amax, 0.0), keepdims=True)
    encode = jnp.where(tensor_amax == 0, 1.0, element.max * scale_type.max / tensor_amax)
    scale = _round_scale(amax, encode, spec)
    units = x * (1 / _spread(scale * (1 / encode), spec))
    return units, scale, {"tensor_scale": 1 / encode}


def _asymmetric(x: jax.Array, spec: QuantizeSpec):
    element = spec.format.element_type
    low, high = _reduce(x, spec, jax.lax.min), _reduce(x, spec, jax.lax.max)
    scale = true_divide(high / 2 - low / 2, (element.max - element.lowest) / 2)
    scale = jnp.where(high == low, jnp.where(low == 0, 1.0, jnp.abs(low)), scale)
    scale = jnp.where(jnp.isfinite(high - low), scale, jnp.nan)
    scale = scale.astype(spec.format.scale_type.dtype).astype(jnp.float32)
    zero_point = jnp.nan_to_num(element.lowest - true_divide(low, scale))
    units = true_divide(x - _spread(low, spec), _spread(scale, spec)) + element.lowest
    return units, scale, {"zero_point": zero_point}


def _round_scale(amax: jax.Array, encode: jax.Array | float, spec: QuantizeSpec) -> jax.Array:
    element, kind = spec.format.element_type, spec.format.scale_type
    wanted = true_divide(amax, element.max) * encode
    if spec.scale_rule == "nearest":
        is_wide = kind.name in ("float32", "bfloat16", "float16")
        cast = wanted.astype(kind.dtype).astype(jnp.float32) if is_wide else lookup(wanted, kind)
    elif spec.scale_rule == "ceil":
        mantissa, exponent = jnp.frexp(wanted)  # mantissa in [.5, 1)
        cast = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    else:
        top = 2 - 2.0**-element.mantissa_bits
        halfway = 2 - 2.0**-element.mantissa_bits / 2
        lowered = wanted * (2 * top / halfway)
        if spec.scale_rule == "floor":
            lowered = amax * encode * 2.0**-element.max_exponent
        cast = jnp.ldexp(jnp.float32(1), jnp.frexp(lowered)[1] - 1)
    scale = jnp.clip(cast, spec.scale_min, kind.max)
    scale = jnp.where((amax == 0) & kind.covers_float32, 1.0, scale)
    scale = jnp.where(jnp.isfinite(amax), scale, jnp.nan)
    return scale if spec.format.scale_steps is None else _stepped(scale, amax, spec)


def _stepped(scale: jax.Array, amax: jax.Array, spec: QuantizeSpec) -> jax.Array:
    """The lowest multiple of the largest scale of a line of tiles, over steps, from a scale up."""
    window = [n if size > 1 else 1 for n, size in zip(scale.shape, spec.tile, strict=True)]
    used = jnp.where((amax > 0) & (scale > 0), scale, 0.0)  # neither zeros nor NaN
    top = jax.lax.reduce_window(used, 0.0, jax.lax.max, window, window, "VALID")
    for axis, size in enumerate(window):
        top = jnp.repeat(top, size, axis)
    top = jnp.where(top == 0, 1.0, top)
    stepped = top
    for count in range(spec.format.scale_steps - 1, 0, -1):
        lower = count * true_divide(top, spec.format.scale_steps)
        fits = (scale <= lower * (1 + 2.0**-20)) & (amax > 0) & (lower >= count * 2.0**-126)
        stepped = jnp.where(fits, lower, stepped)
    return jnp.where(jnp.isnan(scale), jnp.nan, stepped)


def _reduce(x: jax.Array, spec: QuantizeSpec, combine) -> jax.Array:
    """Of each tile; NaN if a value is, which XLA for CPU may drop from a maximum."""
    start = math.inf if combine is jax.lax.min else -math.inf
    is_nan = jnp.isnan(x)
    known = jnp.where(is_nan, start, x)
    reduced = jax.lax.reduce_window(known, start, combine, spec.tile, spec.tile, "VALID")
    bad = jax.lax.reduce_window(is_nan * 1, 0, jax.lax.add, spec.tile, spec.tile, "VALID")
    return jnp.where(bad > 0, jnp.nan, reduced)


def _spread(scale: jax.Array, spec: QuantizeSpec) -> jax.Array:
    """Repeats the number of a tile for each of its values."""
    for axis, size in enumerate(spec.tile):
        scale = jnp.repeat(scale, size, axis)
    return scale
