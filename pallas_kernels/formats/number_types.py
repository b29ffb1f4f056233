"""Number types: what one stored code can mean, and rounding onto that grid.

A type is a set of values; rounding picks one of them. Everything is computed in float32, where
every value of every type here is exact, so a rounded value can be stored without a second rounding.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

# XLA's CPU backend flushes float32 subnormals to zero, so no scale may be smaller than this.
FLOAT32_MIN_NORMAL = 2.0**-126
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)

_NATIVE_DTYPES = {
    "e2m1": jnp.float4_e2m1fn,
    "e2m3": jnp.float6_e2m3fn,
    "e3m2": jnp.float6_e3m2fn,
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
    "e8m0": jnp.float8_e8m0fnu,
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
}
# (exponent bits, mantissa bits, largest finite value) of the types fixed by OCP and IEEE.
_NAMED = {
    "e4m3": (4, 3, 448.0),
    "e5m2": (5, 2, 57344.0),
    "e8m0": (8, 0, 2.0**127),
    "float16": (5, 10, 65504.0),
    "bfloat16": (8, 7, float(jnp.finfo(jnp.bfloat16).max)),
    "float32": (8, 23, FLOAT32_MAX),
}


@dataclasses.dataclass(frozen=True)
class FloatType:
    """A sign-magnitude float with ``exponent_bits`` and ``mantissa_bits``, subnormals included.

    Values are m·2^(e - mantissa_bits) with bias 2^(exponent_bits - 1) - 1. ``e8m0`` has no zero, no
    sign and no subnormals; here its smallest value is 2^-126, not 2^-127, because the latter is a
    float32 subnormal.

    Args:
        name: ``"e2m1"``, ``"e4m3"``, ... or ``"float16"``, ``"bfloat16"``, ``"float32"``.
        exponent_bits: 1 to 8.
        mantissa_bits: 0 to 23.
        max: largest finite value.
        dtype: storage dtype; ``float32`` for types that jax does not have (values still lie on the
            grid).

    >>> number_type("e2m1").max, number_type("e4m3").smallest
    (6.0, 0.001953125)

    References: OCP Microscaling Formats v1.0, section 5.3; OCP 8-bit floating point v1.0.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    dtype: jnp.dtype

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return max(2 - 2 ** (self.exponent_bits - 1), -126)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value: 2 for e2m1, 8 for e4m3, 15 for e5m2."""
        return math.frexp(self.max)[1] - 1

    @property
    def lowest(self) -> float:
        """Most negative value; e8m0 has no sign and no zero, so its smallest value."""
        return -self.max if self.mantissa_bits else self.smallest

    @property
    def smallest(self) -> float:
        """Smallest positive value that float32 arithmetic keeps."""
        return max(2.0 ** (self.min_exponent - self.mantissa_bits), FLOAT32_MIN_NORMAL)

    @property
    def covers_float32(self) -> bool:
        """Whether the type has the exponent range of float32."""
        return self.exponent_bits == 8

    def step(self, magnitude: jax.Array) -> jax.Array:
        """Distance between neighbours around ``magnitude`` (float32), constant for subnormals."""
        exponent = jnp.clip(float_exponent(magnitude), self.min_exponent, self.max_exponent)
        return power_of_two(exponent - self.mantissa_bits)


@dataclasses.dataclass(frozen=True)
class IntType:
    """Two's complement integers of ``bits`` bits, used symmetrically: ±(2^(bits-1) - 1).

    Args:
        name: ``"int4"`` or ``"int8"``.
        bits: width of one code.
        dtype: storage dtype.

    >>> number_type("int4").max, number_type("int4").lowest
    (7.0, -8.0)
    """

    name: str
    bits: int
    dtype: jnp.dtype

    @property
    def max(self) -> float:
        """Largest value."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def lowest(self) -> float:
        """Most negative value; only asymmetric quantisation uses it."""
        return -self.max - 1

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value: 2 for int4, 6 for int8."""
        return self.bits - 2

    @property
    def mantissa_bits(self) -> int:
        """Bits below the leading one of the largest value."""
        return self.bits - 2

    def step(self, magnitude: jax.Array) -> jax.Array:
        """Distance between neighbours: 1 everywhere."""
        return jnp.ones_like(magnitude)


NumberType = FloatType | IntType


def number_type(name: str) -> NumberType:
    """Looks a type up by name; any ``eXmY`` with X in 1..7 and Y in 1..7 is accepted.

    ``e4m3`` and ``e5m2`` are the OCP types (largest values 448 and 57344). A type that neither OCP
    nor IEEE defines spends every code on a finite number: largest value (2 - 2^-Y)·2^(2^X - 1 -
    bias).

    Args:
        name: ``"int4"``, ``"int8"``, ``"e2m1"``, ``"e3m4"``, ``"e8m0"``, ``"bfloat16"``, ...

    Returns:
        The type.

    Raises:
        ValueError: the name is none of these.

    >>> number_type("e1m6").max
    3.96875
    """
    if name in ("int4", "int8"):
        return IntType(name, int(name[3:]), jnp.dtype(name))
    if name in _NAMED:
        exponent_bits, mantissa_bits, largest = _NAMED[name]
    else:
        match = re.fullmatch(r"e([1-7])m([1-7])", name)
        if match is None:
            raise ValueError(
                f"unknown number type {name!r}: expected int4, int8, float16, bfloat16, float32, "
                "e8m0 or eXmY with X and Y in 1..7"
            )
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        largest = _finite_max(exponent_bits, mantissa_bits)
    dtype = jnp.dtype(_NATIVE_DTYPES.get(name, jnp.float32))
    return FloatType(name, exponent_bits, mantissa_bits, largest, dtype)


def number_type_of(dtype: jax.typing.DTypeLike) -> NumberType:
    """The type that an array of ``dtype`` holds.

    Args:
        dtype: int4, int8, float4_e2m1fn, float6_*, float8_e4m3fn, float8_e5m2, float16 or bfloat16.

    Returns:
        The type.

    Raises:
        ValueError: no type is stored in ``dtype``.

    >>> number_type_of(jnp.float8_e5m2).name
    'e5m2'
    """
    dtype = jnp.dtype(dtype)
    names = {jnp.dtype(native): name for name, native in _NATIVE_DTYPES.items()}
    names |= {jnp.dtype(jnp.int4): "int4", jnp.dtype(jnp.int8): "int8"}
    if dtype not in names:
        expected = ", ".join(sorted(str(d) for d in names))
        raise ValueError(f"dtype {dtype} has no number type: expected one of {expected}")
    return number_type(names[dtype])


def _finite_max(exponent_bits: int, mantissa_bits: int) -> float:
    bias = 2 ** (exponent_bits - 1) - 1
    return (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)


def largest_magnitude(
    x: jax.Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
    """max |x| as float32, NaN if a value is; 0 of no values.

    The maximum of the bits, in whose order NaN is above infinity: XLA for CPU drops NaN from
    reductions of floats that it vectorises (openxla/xla issue 21461).

    Args:
        x: floating array.
        axis: as for ``jnp.max``.
        keepdims: as there.

    Returns:
        float32 array.

    >>> largest_magnitude(jnp.float32([[1.0, -3.0], [jnp.nan, 2.0]]), axis=1).tolist()
    [3.0, nan]
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    top = jnp.max(bits, axis=axis, keepdims=keepdims, initial=0)
    return jax.lax.bitcast_convert_type(top, jnp.float32)


def float_exponent(x: jax.Array) -> jax.Array:
    """floor(log2|x|) of a float32 array, read from its bits; -127 for 0 and subnormals.

    Args:
        x: float32 array.

    Returns:
        int32 array of the same shape; 128 for inf and NaN.

    >>> float_exponent(jnp.float32([1.0, 5.9, 0.013])).tolist()
    [0, 2, -7]
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> 23) & 0xFF) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32, exact; ``exponent`` is int32 in -126..127.

    Args:
        exponent: int32 array.

    Returns:
        float32 array of the same shape.

    >>> power_of_two(jnp.int32([-126, 3])).tolist()
    [1.1754943508222875e-38, 8.0]
    """
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def true_divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, correctly rounded.

    XLA turns division by a broadcast value into multiplication by its reciprocal, which is off by
    one ulp for about a quarter of all quotients and so moves exact ties. Making the divisor depend
    on x, only where x is NaN, keeps the division and still fuses.

    Args:
        x: float32 array.
        y: float32 array that broadcasts to ``x``, or a number.

    Returns:
        float32 array of the shape of ``x``.

    >>> import numpy as np
    >>> tenths = np.arange(100, dtype=np.float32) / 10
    >>> np.array_equal(true_divide(tenths, 6.0), tenths / np.float32(6))
    True
    """
    x = jnp.asarray(x)
    return x / jnp.where(jnp.isnan(x), 1.0, y)
