"""Two 4-bit codes in one byte: ``byte = code[2i] | code[2i + 1] << 4``."""

import jax
import jax.numpy as jnp

FOUR_BIT_DTYPES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4), jnp.dtype(jnp.float4_e2m1fn))


def pack_codes(x: jax.Array, axis: int = -1) -> jax.Array:
    """Packs 4-bit values two to a byte along ``axis``, the even index in the low nibble.

    jax keeps one 4-bit value in a whole byte of host memory, so packing halves what is stored.

    Args:
        x: int4, uint4 or float4_e2m1fn array; the length of ``axis`` must be even.
        axis: axis to shorten.

    Returns:
        uint8 array; ``axis`` has half the length.

    Raises:
        ValueError: dtype is not 4-bit, ``axis`` is out of range, or its length is odd.

    >>> pack_codes(jnp.array([0, -0.5, 1, -2], jnp.float4_e2m1fn)).tolist()  # codes 0 9 2 12
    [144, 194]

    References: TransformerEngine's NVFP4 reference quantiser (nibble order).
    """
    if x.dtype not in FOUR_BIT_DTYPES:
        raise ValueError(f"x must be int4, uint4 or float4_e2m1fn to be packed, got {x.dtype}")
    axis = _check_axis(axis, x.ndim)
    if x.shape[axis] % 2:
        raise ValueError(f"axis {axis} has odd length {x.shape[axis]}: packing needs an even one")
    codes = jax.lax.bitcast_convert_type(x, jnp.uint4).astype(jnp.uint8)
    pairs = codes.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    low, high = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def unpack_codes(packed: jax.Array, dtype: jax.typing.DTypeLike, axis: int = -1) -> jax.Array:
    """Undoes ``pack_codes``.

    Args:
        packed: uint8 array.
        dtype: int4, uint4 or float4_e2m1fn.
        axis: the packed axis.

    Returns:
        Array of ``dtype``; ``axis`` has twice the length.

    Raises:
        ValueError: ``packed`` is not uint8, ``dtype`` is not 4-bit, or ``axis`` is out of range.

    >>> unpack_codes(jnp.uint8([144, 194]), jnp.int4).tolist()
    [0, -7, 2, -4]
    """
    if packed.dtype != jnp.uint8:
        raise ValueError(f"packed must be uint8, got {packed.dtype}")
    if jnp.dtype(dtype) not in FOUR_BIT_DTYPES:
        raise ValueError(f"dtype must be int4, uint4 or float4_e2m1fn, got {jnp.dtype(dtype)}")
    axis = _check_axis(axis, packed.ndim)
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis + 1)
    shape = (*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
    codes = pairs.reshape(shape).astype(jnp.uint4)
    return jax.lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def _check_axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} is out of range for an array of {ndim} dimensions")
    return axis % ndim
