# SPDX-License-Identifier: Apache-2.0
"""The public matrix products."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _device, _dispatch
from pallas_kernels.formats import QTensor, get_format
from pallas_kernels.ops.matmul import reference, xla
from pallas_kernels.ops.matmul import spec as spec_lib
from pallas_kernels.ops.matmul.spec import MatmulSpec, OperandSpec


def matmul(
    lhs: jax.Array | QTensor,
    rhs: jax.Array | QTensor,
    *,
    preferred_element_type=None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies matrices of which either may be quantised.

    ``out[..., i, j] = sum_k value(lhs)[..., i, k] * value(rhs)[k, j]``, where ``value`` is the
    dequantised array. Where both are integers or both fp8 with one scale along k, the "xla"
    implementation multiplies the codes (sum in int32 or float32) and applies the scales to the
    result. Two fp8 operands with equal tiles along k, multiples of 128 (1×128 and 128×128 blocks),
    are multiplied tile by tile, and the sums are scaled and added in float32. Otherwise it
    dequantises for this product only, so that no copy of the weights in 16 bits outlives it, in a
    loop either. On an sm90 GPU "mosaic" reads packed 4-bit weights and widens them in registers,
    for INT8 and FP8 activations with one scale a row too, whose codes are bfloat16 numbers; weights
    of "mxfp4_int8" and "int4_int8" and many INT8 rows are multiplied at the rate of INT8, which
    takes their scales for the multiples of the largest that these formats promise.
    `explain` says which way a call takes, and its scheme: "w4a16" for a 4-bit `rhs` and a plain
    `lhs`, "w4a8", "w8a8" and so on. Differentiable in plain operands and in scales.

    Args:
      lhs: [..., m, k] floating array, or QTensor of that shape (activations).
      rhs: [k, n] floating array, or QTensor of that shape (weights).
      preferred_element_type: dtype of the result; None takes that of the plain operand, or
        float32 when both are quantised.
      implementation: None (best available), "mosaic", "xla" or "reference".

    Returns:
      [..., m, n].

    Raises:
      ValueError: shapes do not fit, or a plain operand is not floating point.
      NotImplementedError: the named implementation does not serve this call.

    >>> from pallas_kernels.ops.quantize.api import quantize
    >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])
    >>> matmul(quantize(x, "int8", axis=-1), quantize(w, "int8", axis=0)).round(1)
    Array([[11.]], dtype=float32)
    """
    lhs, rhs, spec = _prepare(lhs, rhs, preferred_element_type)
    name = _dispatch.resolve("matmul", implementation, _reasons(spec, implementation))
    return _run(lhs, rhs, spec=spec, name=name)


@functools.partial(jax.jit, static_argnames=("spec", "name"))
def _run(lhs, rhs, *, spec, name):
    if name == "reference":
        return reference.matmul(lhs, rhs, spec.out_dtype)
    if name == "mosaic":
        from pallas_kernels.ops.matmul import mosaic_sm90  # needs Mosaic: not at import time

        return mosaic_sm90.matmul(lhs, rhs, spec)
    return xla.matmul(lhs, rhs, spec)


def explain(
    lhs, rhs, *, preferred_element_type=None, implementation: str | None = None
) -> _dispatch.Explanation:
    """Says which implementation `matmul` would use, and whether it multiplies the codes.

    Args:
      lhs: as for `matmul`; shapes will do for arrays.
      rhs: as there.
      preferred_element_type: as there.
      implementation: as there.

    Returns:
      The choice, the rejected candidates with their reasons, and notes.

    Raises:
      ValueError: the call itself is wrong.
    """
    spec = _prepare(lhs, rhs, preferred_element_type)[2]
    choice = _dispatch.choose("matmul", implementation, _reasons(spec, implementation))
    notes = () if choice.implementation is None else spec_lib.notes(spec, choice.implementation)
    return _dispatch.Explanation("matmul", choice.implementation, choice.rejected, notes)


_dispatch.register_explainer("matmul", explain)


def _reasons(spec: MatmulSpec, implementation: str | None) -> dict[str, str | None]:
    device = _device.current_device()
    names = spec_lib.IMPLEMENTATIONS
    reasons = {name: spec_lib.unsupported_reason(spec, device, name) for name in names}
    if implementation is None:
        is_whole = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
        reasons["mosaic"] = (
            reasons["mosaic"]
            or spec_lib.unmeasured_reason(spec)
            or (spec_lib.SEVERAL_DEVICES if is_whole else None)
        )
    return reasons


def _operand(name: str, x, k_axis: int) -> OperandSpec:
    if isinstance(x, QTensor):
        plain = x.zero_point is None and not any(x.padding)
        packed = None
        if x.packed_axis is not None:
            packed = str(get_format(x.qtype).element_type.dtype)
        return OperandSpec(
            str(x.qvalue.dtype),
            True,
            x.scale.shape[k_axis],
            plain,
            packed,
            packed_axis=x.packed_axis,
            scale_dtype=str(x.scale.dtype),
            n_tiles=x.scale.shape[-1 if k_axis == 0 else -2],
            stored_k=x.stored_shape[k_axis],
            zero_point=x.zero_point is not None,
            scale_steps=get_format(x.qtype).scale_steps,
            stored_n=x.stored_shape[-1 if k_axis == 0 else -2],
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point or a QTensor; got dtype {x.dtype}")
    return OperandSpec(str(x.dtype))


def _prepare(lhs, rhs, preferred_element_type):
    lhs, rhs = (
        x if isinstance(x, QTensor) or hasattr(x, "dtype") else jnp.asarray(x) for x in (lhs, rhs)
    )
    if len(rhs.shape) != 2:
        raise ValueError(f"rhs must be [k, n]; got shape {rhs.shape}")
    if len(lhs.shape) < 2:
        raise ValueError(f"lhs must be [..., m, k]; got shape {lhs.shape}")
    if lhs.shape[-1] != rhs.shape[0]:
        raise ValueError(f"lhs has k = {lhs.shape[-1]}, rhs has k = {rhs.shape[0]}")
    left, right = _operand("lhs", lhs, -1), _operand("rhs", rhs, 0)
    plain = [x.dtype for x in (left, right) if not x.quantized]
    out = preferred_element_type or (jnp.result_type(*plain) if plain else jnp.float32)
    m, (k, n) = math.prod(lhs.shape[:-1]), rhs.shape
    return lhs, rhs, MatmulSpec(m, n, k, left, right, str(jnp.dtype(out)))


def scaled_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scales: jax.Array,
    rhs_scales: jax.Array,
    preferred_element_type=jnp.float32,
) -> jax.Array:
    """Block-scaled product with the meaning of `jax.nn.scaled_matmul`, on any backend.

    ``out[b, m, n] = sum_k lhs[b, m, k] s_l[b, m, k / block] rhs[b, n, k] s_r[b, n, k / block]``;
    the block is inferred. Each operand is dequantised to float32 before the product.

    Args:
      lhs: [B, M, K], any float or integer dtype, for example float8_e4m3fn or float4_e2m1fn.
      rhs: [B, N, K].
      lhs_scales: [B, M, K / block], K a multiple of its last axis.
      rhs_scales: [B, N, K / block].
      preferred_element_type: dtype of the result.

    Returns:
      [B, M, N].

    Raises:
      ValueError: shapes do not fit; the message has both.

    >>> a, s = jnp.array([[[1.0, 2.0, 3.0]]]), jnp.full((1, 1, 1), 0.5)
    >>> scaled_matmul(a, a + 3, s, s)
    Array([[[8.]]], dtype=float32)
    """
    for name, x, scales in (("lhs", lhs, lhs_scales), ("rhs", rhs, rhs_scales)):
        if x.ndim != 3 or scales.ndim != 3:
            raise ValueError(
                f"{name} and its scales must have 3 dimensions; got {x.shape} and {scales.shape}"
            )
        if x.shape[:2] != scales.shape[:2] or not scales.shape[2] or x.shape[2] % scales.shape[2]:
            raise ValueError(
                f"{name}_scales must be [{x.shape[0]}, {x.shape[1]}, a divisor of {x.shape[2]}]; "
                f"got {scales.shape}"
            )
    if lhs.shape[0] != rhs.shape[0] or lhs.shape[2] != rhs.shape[2]:
        raise ValueError(f"lhs {lhs.shape} and rhs {rhs.shape} must agree in B and K")
    a, b = _unscaled(lhs, lhs_scales), _unscaled(rhs, rhs_scales)
    out = jnp.einsum("bmk,bnk->bmn", a, b, precision=lax.Precision.HIGHEST)
    return out.astype(preferred_element_type)


def _unscaled(x, scales):
    tiles = x.astype(jnp.float32).reshape(*scales.shape, -1)
    return (tiles * scales.astype(jnp.float32)[..., None]).reshape(x.shape)
