"""Random Hadamard transform: spreads an outlier over its tile before quantisation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

#: Sign vector that TransformerEngine uses for its 16-wide transform.
TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard_matrix(size: int, signs: Sequence[int] | None = None) -> np.ndarray:
    """H = diag(signs) · Hadamard(size) / sqrt(size), an orthogonal matrix.

    Args:
        size: a power of two. For powers of four H·Hᵀ is the identity exactly, not up to rounding.
        signs: ``size`` values of ±1; ``None`` means all +1.

    Returns:
        float32 array ``[size, size]``.

    Raises:
        ValueError: ``size`` is not a power of two, or ``signs`` has another length or other values.

    >>> hadamard_matrix(4, (1, -1, 1, 1))[1].tolist()
    [-0.5, 0.5, -0.5, 0.5]
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size must be a power of two, got {size}")
    signs = np.ones(size) if signs is None else np.asarray(signs)
    if signs.shape != (size,):
        raise ValueError(f"signs must have length {size} (size), got shape {signs.shape}")
    if not np.all(np.abs(signs) == 1):
        raise ValueError("signs must be +1 or -1 everywhere")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (signs[:, None] * matrix / np.sqrt(size)).astype(np.float32)


def rht(
    x: jax.Array, axis: int = -1, size: int = 16, signs: Sequence[int] | None = TE_SIGNS
) -> jax.Array:
    """Multiplies every run of ``size`` values along ``axis`` by ``hadamard_matrix(size, signs)``.

    Both operands of a GEMM may be rotated along the contraction axis: (xH)(wH)ᵀ = xwᵀ. Rotate an
    axis that is not sharded, since the split into runs is a reshape.

    Args:
        x: floating array; the length of ``axis`` must be a multiple of ``size``.
        axis: axis to rotate.
        size: values per run, a power of two.
        signs: ``size`` values of ±1; the default serves ``size=16`` only.

    Returns:
        Array of the shape and dtype of ``x``, computed in float32.

    Raises:
        ValueError: the axis is out of range or not a multiple of ``size``, or ``signs`` does not
            fit.

    >>> x = jnp.zeros(16).at[0].set(4.0)
    >>> rht(x).tolist() == [1.0] * 16
    True

    References: Pretraining LLMs with NVFP4 (arXiv:2509.25149), section 4.2.
    """
    return _rotate(x, axis, size, hadamard_matrix(size, signs))


def inverse_rht(
    x: jax.Array, axis: int = -1, size: int = 16, signs: Sequence[int] | None = TE_SIGNS
) -> jax.Array:
    """Undoes ``rht``: multiplies every run by Hᵀ.

    Args:
        x: floating array; the length of ``axis`` must be a multiple of ``size``.
        axis: the rotated axis.
        size: values per run.
        signs: the signs given to ``rht``.

    Returns:
        Array of the shape and dtype of ``x``.

    Raises:
        ValueError: as ``rht``.

    >>> x = jnp.arange(32.0)
    >>> bool(jnp.allclose(inverse_rht(rht(x)), x, atol=1e-5))
    True
    """
    return _rotate(x, axis, size, hadamard_matrix(size, signs).T)


def _rotate(x: jax.Array, axis: int, size: int, matrix: np.ndarray) -> jax.Array:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of {x.ndim} dimensions")
    if x.shape[axis] % size:
        raise ValueError(f"axis {axis} has length {x.shape[axis]}, not a multiple of size {size}")
    moved = jnp.moveaxis(x, axis, -1)
    runs = moved.reshape(*moved.shape[:-1], moved.shape[-1] // size, size).astype(jnp.float32)
    rotated = jnp.matmul(runs, matrix, precision="highest")  # no tf32: rotation must be exact
    return jnp.moveaxis(rotated.reshape(moved.shape), -1, axis).astype(x.dtype)
