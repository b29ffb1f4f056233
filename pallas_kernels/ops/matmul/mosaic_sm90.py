# SPDX-License-Identifier: Apache-2.0
"""Products of stored weights on Hopper: which kernel, its derivative and its batching."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.formats import QTensor
from pallas_kernels.ops.matmul import mosaic_sm90_fp8 as blocks
from pallas_kernels.ops.matmul import mosaic_sm90_rows as rows
from pallas_kernels.ops.matmul import mosaic_sm90_tokens as tokens
from pallas_kernels.ops.matmul import xla
from pallas_kernels.ops.matmul.spec import MatmulSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(lhs: jax.Array | QTensor, rhs: QTensor, spec: MatmulSpec) -> jax.Array:
    """Multiplies activations with packed 4-bit or 8-bit weights, or FP8 blocks.

    The derivative is that of `xla.matmul`.

    Args:
      lhs: bfloat16, or INT8 or FP8 QTensor [..., m, k].
      rhs: packed 4-bit, INT8 or FP8 QTensor [k, n].
      spec: static facts.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
    return _forward(lhs, rhs, spec)


def _kernel(spec):
    """The module that serves a product, or None."""
    if spec.block_scaled:
        return blocks
    if spec.few:
        return rows
    return tokens if spec.widened or spec.direct else None


def _forward(lhs, rhs, spec):
    @custom_vmap
    def call(lhs, rhs):
        return _kernel(spec).matmul(lhs, rhs, spec)

    @call.def_vmap
    def _(axis_size, batched, lhs, rhs):
        if any(jax.tree.leaves(batched[1])):  # other weights for each entry
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
            out = jax.vmap(functools.partial(xla.matmul, spec=spec), in_axes=tuple(axes))(lhs, rhs)
            return out, True
        lhs = jax.tree.map(
            lambda x, has: x if has else jnp.broadcast_to(x, (axis_size, *x.shape)), lhs, batched[0]
        )
        whole = spec.with_rows(axis_size * spec.m)
        if _kernel(whole) is None:  # 8-bit weights and more rows than their kernel takes
            return xla.matmul(lhs, rhs, whole), True
        return _forward(lhs, rhs, whole), True

    return call(lhs, rhs)


def _save(lhs, rhs, spec):
    return matmul(lhs, rhs, spec), (lhs, rhs)


def _backward(spec, saved, d):
    return jax.vjp(functools.partial(xla.matmul, spec=spec), *saved)[1](d)


matmul.defvjp(_save, _backward)
