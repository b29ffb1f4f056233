# SPDX-License-Identifier: Apache-2.0
"""Products for any backend: the codes themselves where the scales allow it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import QTensor
from pallas_kernels.ops.matmul.spec import MatmulSpec


def matmul(lhs: jax.Array | QTensor, rhs: jax.Array | QTensor, spec: MatmulSpec) -> jax.Array:
    """Multiplies codes where the scales allow it (see ``spec``), else dequantised values.

    Args:
      lhs: [..., m, k], array or QTensor.
      rhs: [k, n], array or QTensor.
      spec: static facts.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
    if spec.block_scaled:
        return _block_scaled(lhs, rhs, spec.lhs.k_tiles).astype(spec.out_dtype)
    if spec.direct is None:
        wide = _wide_dtype(lhs, rhs)
        if spec.rhs.quantized:
            # Ties the codes to lhs, so that no pass may dequantise the weights of a decode loop
            # once before it and keep the copies. (XLA for CPU does not, with or without it.)
            lhs, rhs = lax.optimization_barrier((lhs, rhs))
        a, b = (x.dequantize(wide) if isinstance(x, QTensor) else x for x in (lhs, rhs))
        return _dot(a, b, jnp.float32).astype(spec.out_dtype)
    a, b, total = lhs.unpack().qvalue, rhs.unpack().qvalue, jnp.float32
    if spec.direct == "int8":
        a, b, total = a.astype(jnp.int8), b.astype(jnp.int8), jnp.int32
    out = _dot(a, b, total).astype(jnp.float32)
    # Scales have one entry along k, so they multiply rows and columns of the finished sum.
    scale_a = spread(lhs.scale, lhs.qvalue.shape[:-1])  # [..., m, 1]
    scale_b = spread(rhs.scale.T, rhs.qvalue.shape[1:]).T  # [1, n]
    out = out * scale_a * scale_b
    for x in (lhs, rhs):
        out = out if x.tensor_scale is None else out * x.tensor_scale
    return out.astype(spec.out_dtype)


def _block_scaled(lhs: QTensor, rhs: QTensor, tiles: int) -> jax.Array:
    """Sum over tiles of k of (codes · codes) · scale · scale, one tile in memory at a time."""
    a, b = lhs.qvalue, rhs.qvalue  # [..., m, k], [k, n]
    a = jnp.moveaxis(a.reshape(*a.shape[:-1], tiles, -1), -2, 0)  # [tiles, ..., m, size]
    b = b.reshape(tiles, -1, b.shape[1])  # [tiles, size, n]
    scale_a = jnp.moveaxis(spread(lhs.scale, lhs.qvalue.shape[:-1]), -1, 0)[..., None]
    scale_b = spread(rhs.scale.T, rhs.qvalue.shape[1:]).T[:, None]  # [tiles, 1, n]

    def add(total, tile):
        a, b, scale_a, scale_b = tile
        for _ in range(a.ndim - 2):
            scale_b = scale_b[None]
        return total + _dot(a, b, jnp.float32) * (scale_a * scale_b), None

    start = jnp.zeros((*lhs.qvalue.shape[:-1], rhs.qvalue.shape[1]), jnp.float32)
    return lax.scan(add, start, (a, b, scale_a, scale_b))[0]


def spread(scale: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
    """One scale per row from one per tile of rows; the last axis counts tiles of k."""
    scale = scale.astype(jnp.float32)
    for axis, length in enumerate(lengths):
        scale = jnp.repeat(scale, length // max(scale.shape[axis], 1), axis)  # 0 of an empty axis
    return scale


def row_scales(lhs: QTensor) -> jax.Array:
    """One float32 factor per row, from codes whose scales have one entry along k."""
    scale = spread(lhs.scale, lhs.qvalue.shape[:-1])
    if lhs.tensor_scale is not None:
        scale = scale * lhs.tensor_scale
    return scale.reshape(-1)


def _dot(a, b, total):
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=total)


def _wide_dtype(lhs, rhs):
    """Dtype of the plain operand when there is one, so that a weight follows its activations."""
    plain = [x.dtype for x in (lhs, rhs) if not isinstance(x, QTensor)]
    return jnp.result_type(*plain) if plain else jnp.float32
