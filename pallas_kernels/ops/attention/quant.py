# SPDX-License-Identifier: Apache-2.0
"""The numerics of the SageAttention family: smoothing and quantising Q, K, V and P.

Everything here works on float32 arrays that hold exactly the values the low-precision formats can
hold, so that any implementation can be compared with any other on the same quantised inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats.number_types import largest_magnitude
from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention.reference import clean, live_keys, to_heads
from pallas_kernels.ops.attention.spec import AttentionQuant, AttentionSpec

E4M3_MAX, E2M1_MAX, F16_MAX = 448.0, 6.0, 65504.0
INT_MAX = {"int8": 127.0, "int4": 7.0}
# A row of P spans [0, 1]; times 448 * 6 it fills an E4M3 scale and an E2M1 value (Sage3, 3.1).
TWO_LEVEL_P = E4M3_MAX * E2M1_MAX


class Operands(NamedTuple):
    """Smoothed and quantised inputs of attention, and what is needed to undo the smoothing.

    The logits are ``scale * (q_scale q) (k_scale k)^T``, plus ``scale * q_mean k_smooth^T`` where
    Q was smoothed. The output is ``v_scale * P v + v_mean``.

    Args:
      q: float32 [B, T, N, H], values on the grid of the format.
      q_scale: float32 [B, T, N] or [1, 1, 1].
      k: float32 [B, S, K, H].
      k_scale: float32 [B, S, K] or [1, 1, 1].
      v: float32 [B, S, K, H].
      v_scale: float32 [B, 1, K, H], or broadcastable to it.
      v_mean: float32 [B, 1, K, H] or None.
      q_mean: float32 [B, nq, N, H], mean of each tile of queries, or None.
      k_smooth: float32 [B, S, K, H], keys less their mean, or None; only with `q_mean`.
      row_const: float32 [B, T, N], ``q · mean(K)``, what smoothing took from each row of Q K^T, or
        None.
      k_mean: float32 [B, 1, K, H], the mean key that smoothing took away, or None.
    """

    q: jax.Array
    q_scale: jax.Array
    k: jax.Array
    k_scale: jax.Array
    v: jax.Array
    v_scale: jax.Array
    v_mean: jax.Array | None
    q_mean: jax.Array | None
    k_smooth: jax.Array | None
    row_const: jax.Array | None
    k_mean: jax.Array | None


def operands(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, spec: AttentionSpec
) -> Operands:
    """Smooths and quantises the inputs of attention as ``spec.quant`` says.

    Statistics cover only tokens that take part: padded keys and values do not move a mean or a
    scale. A key or value that came as a QTensor is left as it is.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, H].
      mask: which pairs take part.
      spec: static facts, with a variant in ``spec.quant``.

    Returns:
      `Operands`.

    References:
      SageAttention 4.2 (smooth K), SageAttention2 3.1 (smooth Q, per thread), 3.2 and 3.4 (V).
    """
    quant, f32 = spec.quant, jnp.float32
    q, k, v = (x.astype(f32) for x in clean(query, key, value, mask, spec))
    live = live_keys(mask, spec)
    one = jnp.ones((1, 1, 1), f32)

    row_const = k_mean = None
    if quant.smooth_k and not spec.quantized_key:
        k_mean = _mean(k, live)  # [B, 1, K, H]
        row_const = jnp.einsum(
            "btnh,bnh->btn", q, to_heads(k_mean, spec.groups)[:, 0], precision=lax.Precision.HIGHEST
        )
        k = _only(live, k - k_mean)
    q_mean = k_smooth = None
    if quant.smooth_q:
        k_smooth, (q, q_mean) = k, _smooth_tiles(q, quant.block_q)
    q, q_scale = quantize_rows(q, quant, is_query=True)
    k, k_scale = (k, one) if spec.quantized_key else quantize_rows(k, quant, is_query=False)

    v_mean, v_scale = None, one[..., None]
    if not spec.quantized_value:
        if quant.smooth_v:
            v_mean = _mean(v, live)
            v = _only(live, v - v_mean)
        v, v_scale = quantize_value(v, quant, spec.dtype)
    return Operands(q, q_scale, k, k_scale, v, v_scale, v_mean, q_mean, k_smooth, row_const, k_mean)


class CentredKeys(NamedTuple):
    """Keys of a float gradient without their mean.

    Attributes:
      key: [B, S, K, H], in the dtype of the keys.
      const: float32 [B, T, N], what the logits of each row lack by it, or None.
      mean: float32 [B, 1, K, H], or None where nothing was taken away.
    """

    key: jax.Array
    const: jax.Array | None = None
    mean: jax.Array | None = None

    def part(self, rows: jax.Array, spec: AttentionSpec) -> jax.Array:
        """The mean key's part of dQ, float32 [B, T, N, H], from sums of the rows of dS [B, T, N].

        It is zero but where the log-sum-exp has a cotangent or a sink takes a share.
        """
        return rows[..., None] * to_heads(self.mean, spec.groups) * spec.scale


def centred_keys(query: jax.Array, key: jax.Array, mask: Mask, spec: AttentionSpec) -> CentredKeys:
    """Takes the mean key away for a float gradient, where the forward's quantiser did so.

    ``dQ = scale dS K`` does not depend on the mean key, since the rows of dS sum to zero, but with
    P from quantised logits they do so in part only, and a large mean would multiply what is left:
    on keys with a bias the relative L1 error of dQ falls from .19 to .03.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      mask: which pairs take part.
      spec: static facts; with a soft cap, an INT8 backward (which smooths by itself), or without
        smoothing, the keys stay as they are.

    Returns:
      `CentredKeys`.
    """
    quant = spec.quant
    smooth = quant is not None and quant.smooth_k and quant.backward == "float"
    if not smooth or spec.soft_cap is not None or spec.quantized_key:
        return CentredKeys(key)
    live, f32 = live_keys(mask, spec), jnp.float32
    mean = _mean(key.astype(f32), live)
    const = jnp.einsum(
        "btnh,bnh->btn",
        query.astype(f32),
        to_heads(mean, spec.groups)[:, 0],
        precision=lax.Precision.HIGHEST,
    )
    centred = _only(live, key.astype(f32) - mean).astype(key.dtype)
    return CentredKeys(centred, const * spec.scale, mean)


def _only(live, x):
    return x if live is None else jnp.where(live[..., None], x, 0)


def _mean(x: jax.Array, live: jax.Array | None) -> jax.Array:
    """Mean over the live tokens; [B, S, K, H] -> [B, 1, K, H]. Dead rows of x are zero."""
    if live is None:
        return x.mean(1, keepdims=True)
    count = jnp.maximum(live.sum(1, keepdims=True), 1)
    return x.sum(1, keepdims=True) / count[..., None]


def _smooth_tiles(q: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Subtracts the mean of every `block` queries; the last tile may be shorter."""
    b, t, n, h = q.shape
    padded = jnp.pad(q, ((0, 0), (0, -t % block), (0, 0), (0, 0)))
    tiles = padded.reshape(b, -1, block, n, h)
    rows = jnp.minimum(t - jnp.arange(tiles.shape[1]) * block, block)
    mean = tiles.sum(2) / rows[:, None, None]  # [B, nq, N, H]
    return q - jnp.repeat(mean, block, axis=1)[:, :t], mean


# -- Q and K -----------------------------------------------------------------------------------


def token_groups(quant: AttentionQuant, is_query: bool, length: int):
    """How the tokens of Q or K fall into groups with one scale.

    Args:
      quant: the variant.
      is_query: True for Q, False for K.
      length: number of tokens.

    Returns:
      (period, split, axes): every `period` tokens are viewed as an array of shape `split`, and one
      scale covers the axes `axes` of it.

    >>> token_groups(AttentionQuant(), True, 256)   # rows t, t + 8 of each 16 share a scale
    (16, (2, 8), (0,))
    >>> token_groups(AttentionQuant(), False, 256)  # columns with equal (s mod 8) // 2
    (128, (16, 4, 2), (0, 2))

    References:
      SageAttention2 (arXiv 2411.10958), equation 8.
    """
    block = quant.block_q if is_query else quant.block_kv
    match quant.granularity:
        case "per_tensor":
            return length, (length,), (0,)
        case "per_token":
            return 1, (1,), (0,)
        case "per_warp" if is_query:
            return quant.warp_q, (quant.warp_q,), (0,)
        case "per_thread" if is_query:
            return quant.warp_q, (quant.warp_q // 8, 8), (0,)
        case "per_thread":
            return block, (block // 8, 4, 2), (0, 2)
    return block, (block,), (0,)


def group_amax(x: jax.Array, quant: AttentionQuant, *, is_query: bool) -> jax.Array:
    """Largest magnitude in each token's group, all of head_dim together.

    Args:
      x: float32 [B, L, heads, H].
      quant: the variant.
      is_query: True for Q, False for K.

    Returns:
      float32 [B, L, heads].
    """
    b, length, heads, _ = x.shape
    period, split, axes = token_groups(quant, is_query, length)
    amax = jnp.pad(jnp.abs(x).max(-1), ((0, 0), (0, -length % period), (0, 0)))
    tiles = amax.reshape(b, -1, *split, heads)
    group = tiles.max(tuple(axis + 2 for axis in axes), keepdims=True)
    return jnp.broadcast_to(group, tiles.shape).reshape(amax.shape)[:, :length]


def quantize_rows(x: jax.Array, quant: AttentionQuant, *, is_query: bool):
    """Quantises Q or K with one scale per group of tokens.

    Args:
      x: float32 [B, L, heads, H], smoothed.
      quant: the variant.
      is_query: True for Q, False for K.

    Returns:
      Values float32 [B, L, heads, H] on the format's grid, and scales float32 [B, L, heads].
      "nvfp4" returns dequantised values and scale 1. A group of zeros has scale 1.
    """
    if quant.qk == "nvfp4":
        return nvfp4(x, axis=-1), jnp.ones((1, 1, 1), jnp.float32)
    amax = group_amax(x, quant, is_query=is_query)
    top = E4M3_MAX if quant.qk == "fp8_e4m3" else INT_MAX[quant.qk]
    scale = jnp.where(amax > 0, amax / top, 1.0)
    y = x / scale[..., None]
    return (e4m3(y) if quant.qk == "fp8_e4m3" else jnp.clip(jnp.round(y), -top, top)), scale


# -- V and P -----------------------------------------------------------------------------------


def quantize_value(v: jax.Array, quant: AttentionQuant, dtype) -> tuple[jax.Array, jax.Array]:
    """Quantises V.

    Args:
      v: float32 [B, S, K, H], dead rows zero.
      quant: the variant.
      dtype: dtype of the call; decides what "half" means.

    Returns:
      Values float32 [B, S, K, H] on the format's grid, and scales float32 broadcastable to
      [B, 1, K, H]. A channel of zeros has scale 1. float16 saturates at 65504. "nvfp4" and scales
      per block, which cannot wait until the end, return dequantised values and scale 1.
    """
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    if quant.pv == "nvfp4":
        return nvfp4(v, axis=1), one
    if quant.pv not in ("fp8_e4m3", "int8"):
        return _half(v, quant, dtype), one
    if quant.v_granularity == "per_block":
        return _int8_blocks(v, quant.block_kv), one
    axes = (1, 3) if quant.v_granularity == "per_tensor" else (1,)
    amax = jnp.abs(v).max(axes, keepdims=True)
    top = quant.v_max if quant.pv == "fp8_e4m3" else INT_MAX["int8"]
    scale = jnp.where(amax > 0, amax / top, 1.0)
    y = v / scale
    return (e4m3(y) if quant.pv == "fp8_e4m3" else jnp.clip(jnp.round(y), -top, top)), scale


def _int8_blocks(v: jax.Array, block: int) -> jax.Array:
    """INT8 with one scale per `block` tokens and head, dequantised; [B, S, K, H]."""
    b, s, k, h = v.shape
    tiles = jnp.pad(v, ((0, 0), (0, -s % block), (0, 0), (0, 0))).reshape(b, -1, block, k, h)
    return int8_tiles(tiles, axes=(2, 4)).reshape(b, -1, k, h)[:, :s]


def int8_tiles(x: jax.Array, axes: tuple[int, ...] = (-2, -1)) -> jax.Array:
    """SageBwd's psi: symmetric INT8 with one scale, amax / 127, per tile; dequantised.

    Args:
      x: float32.
      axes: axes of a tile.

    Returns:
      float32, same shape; a tile of zeros stays zero.

    >>> int8_tiles(jnp.array([[127.0, 0.4]])).tolist()
    [[127.0, 0.0]]

    References:
      SageAttention3 (arXiv 2505.11594), algorithm 2.
    """
    scale = jnp.abs(x).max(axes, keepdims=True) / INT_MAX["int8"]
    # Probabilities and their gradients can be so small that the scale underflows.
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)
    return jnp.round(x / scale) * scale


def _half(x: jax.Array, quant: AttentionQuant, dtype) -> jax.Array:
    """Rounds to the 16-bit format that `pv` names."""
    is_f16 = quant.pv == "fp16" or (quant.pv == "half" and jnp.dtype(dtype) == jnp.float16)
    if not is_f16:
        return x.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.clip(x, -F16_MAX, F16_MAX).astype(jnp.float16).astype(jnp.float32)


def quantize_p(p: jax.Array, quant: AttentionQuant, dtype) -> jax.Array:
    """Quantises a tile of probabilities relative to the running maximum.

    Args:
      p: float32 [..., C], in [0, 1].
      quant: the variant.
      dtype: dtype of the call; decides what "half" means.

    Returns:
      float32 [..., C]: the values that multiply V, with the format's constant factor divided out.
    """
    match quant.pv:
        case "fp8_e4m3":
            return e4m3(E4M3_MAX * p) / E4M3_MAX
        case "int8" if quant.p_granularity == "per_row":
            return int8_tiles(p, axes=(-1,))
        case "int8":
            return jnp.round(127.0 * p) / 127.0
        case "nvfp4":
            tiles = (TWO_LEVEL_P * p).reshape(*p.shape[:-1], -1, 16)
            group = tiles.max(-1, keepdims=True) / E2M1_MAX
            # As published, the values are divided by the group's scale before it is rounded.
            low = e2m1(tiles / jnp.where(group > 0, group, 1.0))
            return (low * e4m3(group)).reshape(p.shape) / TWO_LEVEL_P
    return _half(p, quant, dtype)


def multiply_pv(p: jax.Array, v: jax.Array, quant: AttentionQuant, equation: str) -> jax.Array:
    """Multiplies quantised probabilities with quantised values for one tile of keys.

    Args:
      p: float32 [..., C], from `quantize_p`.
      v: float32 [..., C, H] in the layout of `equation`.
      quant: the variant; a "float16" accumulator is rounded after every 32 keys and emptied into
        float32 after every 64.
      equation: einsum of p and v, whose last axis of p and last but one of v are the keys.

    Returns:
      float32, as the equation says.

    References:
      SageAttention2++ (arXiv 2505.21136), section 3.
    """

    def product(p, v):
        return jnp.einsum(equation, p, v, preferred_element_type=jnp.float32)

    if quant.accumulator == "float32":
        return product(p, v)
    total = 0.0
    for start in range(0, p.shape[-1], 64):
        part = 0.0
        for i in (start, start + 32):
            # The factor 448 of P is really inside the accumulator and decides its rounding.
            exact = product(E4M3_MAX * p[..., i : i + 32], v[..., i : i + 32, :])
            part = (part + exact).astype(jnp.float16).astype(jnp.float32)
        total = total + part / E4M3_MAX
    return total


# -- formats -----------------------------------------------------------------------------------


def e4m3(x: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest FP8 E4M3 value, saturating at 448.

    >>> e4m3(jnp.array([1.06, 1000.0])).tolist()
    [1.0, 448.0]
    """
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32)


def e2m1(x: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest FP4 E2M1 value, saturating at 6; NaN, which it lacks, stays.

    >>> e2m1(jnp.array([0.3, 2.4, 9.0]))
    Array([0.5, 2. , 6. ], dtype=float32)
    """
    low = jnp.clip(x, -E2M1_MAX, E2M1_MAX).astype(jnp.float4_e2m1fn).astype(jnp.float32)
    return jnp.where(jnp.isnan(x), jnp.nan, low)


def nvfp4(x: jax.Array, axis: int) -> jax.Array:
    """Rounds to NVFP4 without a tensor scale: E2M1 values, an E4M3 scale per 16 along `axis`.

    Args:
      x: float32; the axis is padded with zeros to a multiple of 16 inside.
      axis: axis along which 16 values share a scale.

    Returns:
      float32, the dequantised values, same shape.

    >>> nvfp4(jnp.array([6.0, 2.4]), 0)
    Array([6., 2.], dtype=float32)
    """
    y = jnp.moveaxis(x, axis, -1)
    length = y.shape[-1]
    pad = [(0, 0)] * (y.ndim - 1) + [(0, -length % 16)]
    tiles = jnp.pad(y, pad).reshape(*y.shape[:-1], -1, 16)
    scale = e4m3(largest_magnitude(tiles, -1, keepdims=True) / E2M1_MAX)
    low = e2m1(tiles / jnp.where(scale > 0, scale, 1.0)) * scale
    low = low.reshape(*y.shape[:-1], -1)[..., :length]
    return jnp.moveaxis(low, -1, axis)


def padded_length(length: int, block: int) -> int:
    """Number of tokens rounded up to whole tiles.

    >>> padded_length(130, 64)
    192
    """
    return math.ceil(length / block) * block
