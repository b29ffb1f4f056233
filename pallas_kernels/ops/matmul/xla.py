# SPDX-License-Identifier: Apache-2.0
"""Products for any backend: the codes themselves where the scales allow it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import QTensor
from pallas_kernels.ops.matmul.spec import MatmulSpec


def matmul(lhs: jax.Array | QTensor, rhs: jax.Array | QTensor, spec: MatmulSpec) -> jax.Array:
    """Multiplies codes in int8 or fp8 when one scale covers k, else dequantised values.

    Args:
      lhs: [..., m, k], array or QTensor.
      rhs: [k, n], array or QTensor.
      spec: static facts.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
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
    for x in (lhs, rhs):
        out = out * x.scale.astype(jnp.float32)
        out = out if x.tensor_scale is None else out * x.tensor_scale
    return out.astype(spec.out_dtype)


def _dot(a, b, total):
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=total)


def _wide_dtype(lhs, rhs):
    """Dtype of the plain operand when there is one, so that a weight follows its activations."""
    plain = [x.dtype for x in (lhs, rhs) if not isinstance(x, QTensor)]
    return jnp.result_type(*plain) if plain else jnp.float32
