"""Products of linear layers in FP8 for a forward pass that nobody differentiates.

A row of activations and a column of weights have a scale each. Scales multiply the result, where
the compiler joins them with whatever comes next, so that a product is one cuBLASLt call.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxeff.quant.apply import EXEMPT
from jaxeff.quant.module_paths import get_module, linear_layers
from pallas_kernels.formats.number_types import FLOAT32_MIN_NORMAL

_LARGEST = 448.0  # of e4m3


def fp8_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Return ``(x̂ ŵ) s_x s_w`` with ``x̂ = e4m3(x / s_x)`` and ``ŵ = e4m3(w / s_w)``.

    ``s = max |·| / 448`` per row of ``x`` and per column of ``w``. The product is rounded to the
    dtype of the result before it is scaled, but for float16, whose range it would leave. No
    gradient is meant to flow through it.

    Args:
        lhs: activations ``[..., k]``, floating.
        rhs: weights ``[k, n]``, floating.
        dimension_numbers: of a linear layer: the last axis of ``lhs`` against the first of ``rhs``.
        precision: not used.
        preferred_element_type: dtype of the result; ``None``: that of the operands.
        out_sharding: must be ``None``.

    Returns:
        ``[..., n]``.

    Raises:
        NotImplementedError: for other dimension numbers, or an ``out_sharding``.

    Examples:
        >>> x, w = jnp.full((2, 4), 3.0), jnp.full((4, 8), 0.5)
        >>> [round(float(z), 4) for z in fp8_dot_general(x, w, (((1,), (0,)), ((), ())))[0, :2]]
        [6.0, 6.0]

    References:
        FP8 formats: arXiv 2209.05433.
    """
    del precision
    (contracted, (first, *more)), batch = dimension_numbers[0], dimension_numbers[1]
    if tuple(contracted) != (lhs.ndim - 1,) or first != 0 or more or any(batch) or rhs.ndim != 2:
        raise NotImplementedError(
            f"FP8 products of a forward pass are those of linear layers, [..., k] times [k, n]; "
            f"got {dimension_numbers}"
        )
    if out_sharding is not None:
        raise NotImplementedError("out_sharding is not served by FP8 products of a forward pass")
    dtype = preferred_element_type or jnp.result_type(lhs, rhs)
    x, x_scale = _codes(lhs)
    w, w_scale = _codes(rhs.T)  # both operands of an 8-bit product lie along k
    summed = jnp.float32 if dtype == jnp.float16 else dtype  # 448 · 448 is above float16
    product = lax.dot_general(x, w, (((lhs.ndim - 1,), (1,)), ((), ())),
                              preferred_element_type=summed)  # fmt: skip
    return (product.astype(jnp.float32) * x_scale * w_scale[:, 0]).astype(dtype)


def _codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return e4m3 codes and f32 scales ``[..., 1]`` of the rows."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # A scale below the normal range is flushed to 0, and x / 0 is no code.
    scale = jnp.where(top > 0, jnp.maximum(top / _LARGEST, FLOAT32_MIN_NORMAL), 1.0)
    return (x / scale).astype(jnp.float8_e4m3fn), scale


def use_fp8(model: nnx.Module) -> list[str]:
    """Give the linear layers of a model :func:`fp8_dot_general`; the model is changed in place.

    Layers that have a product of their own keep it, as do embeddings and output heads.

    Args:
        model: any flax NNX module.

    Returns:
        Paths of the layers that were changed.

    Examples:
        >>> layer = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
        >>> use_fp8(layer)
        ['layers.0']

    References:
        FP8 formats: arXiv 2209.05433.
    """
    changed = []
    for name, path in linear_layers(model, (nnx.Linear,)).items():
        layer = get_module(model, path)
        if layer.dot_general is lax.dot_general and not re.search(EXEMPT, name):
            layer.dot_general = fp8_dot_general
            changed.append(name)
    return changed
