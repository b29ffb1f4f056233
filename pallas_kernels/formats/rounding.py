"""Rounding onto the grid of a number type: nearest-even and stochastic."""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.number_types import FloatType, IntType, NumberType, number_type_of


def round_to(
    x: jax.Array, kind: NumberType, *, noise: jax.Array | None = None, symmetric: bool = True
) -> jax.Array:
    """Rounds to the values of ``kind`` and saturates, without leaving float32.

    With a = |x| / step, where step is the spacing of the binade of x:

        nearest:     sign(x) · round_half_even(a) · step
        stochastic:  sign(x) · (floor(a) + [noise >= 1 - frac(a)]) · step,   noise ~ U[0, 1)

    The stochastic form equals floor(a + noise) but never moves a value that is already on the grid,
    which the sum does in float32 when noise is close to 1.

    Args:
        x: floating array of any shape. ±inf saturates; NaN stays NaN.
        kind: target type, see ``number_type``.
        noise: float32 in [0, 1), shape of ``x``; ``None`` rounds to nearest even.
        symmetric: whether integers saturate at ±max; ``False`` also uses the code -max - 1.

    Returns:
        float32 array of the shape of ``x``; E[result] = x for |x| <= max if ``noise`` is uniform.

    >>> from pallas_kernels.formats.number_types import number_type
    >>> round_to(jnp.float32([1.3, 2.5, -5.5, 9.0]), number_type("e2m1")).tolist()
    [1.5, 2.0, -6.0, 6.0]
    >>> noise = jnp.float32([0.3, 0.5])
    >>> round_to(jnp.float32([1.3, 1.3]), number_type("e2m1"), noise=noise).tolist()
    [1.0, 1.5]

    References: IEEE 754 roundTiesToEven; FP4 All the Way (arXiv:2505.19115), section 3.
    """
    x = jnp.asarray(x, jnp.float32)
    lowest = -kind.max if symmetric and isinstance(kind, IntType) else kind.lowest
    clipped = jnp.clip(x, lowest, kind.max)
    if isinstance(kind, FloatType) and kind.covers_float32 and kind.mantissa_bits > 0:
        return _round_wide(clipped, kind, noise)
    magnitude = jnp.abs(clipped)
    units, step = _in_steps(magnitude, kind)
    rounded = jnp.round(units) if noise is None else _round_stochastic(units, noise)
    return jnp.copysign(rounded * step, clipped)


def _in_steps(magnitude: jax.Array, kind: NumberType) -> tuple[jax.Array, jax.Array]:
    """Magnitude in units of the spacing around it, exact because that is a power of two."""
    if isinstance(kind, IntType):
        return magnitude, jnp.float32(1)
    step = kind.step(magnitude)
    if kind.covers_float32:  # the reciprocal of its largest step would be subnormal
        return magnitude / step, step
    # A division would end the fusion here: XLA does not repeat one in several kernels.
    bits = jax.lax.bitcast_convert_type(step, jnp.int32)
    inverse = jax.lax.bitcast_convert_type((254 << 23) - bits, jnp.float32)
    return magnitude * inverse, step


def _round_stochastic(units: jax.Array, noise: jax.Array) -> jax.Array:
    lower = jnp.floor(units)
    return lower + (units - lower >= 1 - noise)  # both differences are exact


def _round_wide(x: jax.Array, kind: FloatType, noise: jax.Array | None) -> jax.Array:
    """bfloat16 and float32, whose smallest step is below the normal range of float32."""
    if noise is None:
        return x.astype(kind.dtype).astype(jnp.float32)
    dropped_bits = 23 - kind.mantissa_bits
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (noise * 2**dropped_bits).astype(jnp.uint32)
    bits = (bits >> dropped_bits) << dropped_bits
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # The noise could carry a value beyond the largest one into inf, and a NaN into anything.
    return jnp.where(jnp.isnan(x), x, jnp.clip(rounded, -kind.max, kind.max))


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Casts to ``dtype`` with unbiased rounding: P(up) = (x - lower) / (upper - lower).

    Saturates at the largest finite value. NaN stays NaN where ``dtype`` has one; the 4- and 6-bit
    floats and the integers have none, so use ``quantize`` for data that may hold NaN: it marks the
    tile in the scale.

    Args:
        x: floating array of any shape; computed in float32.
        dtype: bfloat16, float16, float8_e4m3fn, float8_e5m2, float6_*, float4_e2m1fn, int8 or int4.
        key: ``jax.random`` key; the noise has 23 bits (16 are used for bfloat16).

    Returns:
        Array of ``dtype``, shape of ``x``.

    Raises:
        ValueError: ``dtype`` is not listed above, or ``x`` is not floating.

    >>> draws = stochastic_round(jnp.full(1000, 1.25), jnp.int8, jax.random.key(0))
    >>> sorted(set(draws.tolist())), bool(abs(draws.mean(dtype=jnp.float32) - 1.25) < 0.06)
    ([1, 2], True)

    References: Gupta et al. 2015 (arXiv:1502.02551), section 3.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating to be rounded, got dtype {x.dtype}")
    kind = number_type_of(dtype)
    if kind.name in ("float32", "e8m0"):
        raise ValueError(
            f"dtype {kind.dtype} cannot be rounded to stochastically: use bfloat16 or below"
        )
    noise = jax.random.uniform(key, x.shape, jnp.float32)
    rounded = round_to(x, kind, noise=noise)
    if isinstance(kind, IntType):
        rounded = jnp.where(jnp.isnan(rounded), 0, rounded)
    return rounded.astype(kind.dtype)
