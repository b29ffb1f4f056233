# SPDX-License-Identifier: Apache-2.0
"""The oracle: dequantise to float32, then multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import QTensor


def matmul(lhs: jax.Array | QTensor, rhs: jax.Array | QTensor, out_dtype) -> jax.Array:
    """Computes ``dequantize(lhs) @ dequantize(rhs)`` in float32.

    Args:
      lhs: [..., m, k], array or QTensor.
      rhs: [k, n], array or QTensor.
      out_dtype: dtype of the result.

    Returns:
      [..., m, n].
    """
    a, b = (x.dequantize() if isinstance(x, QTensor) else x.astype(jnp.float32) for x in (lhs, rhs))
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST).astype(out_dtype)
