"""How one operand of a product is rounded: block formats, and published methods beyond them.

Everything here is computed in float32 and returned in the dtype of the operand. A fused kernel has
to reproduce these functions; they use nothing but the values, the key and static options.
"""

import jax
import jax.numpy as jnp

from jaxeff.quant.recipe import OperandQuant
from pallas_kernels.formats import FloatType, get_format, number_type, round_to
from pallas_kernels.formats.block_format import scale_from_amax, tensor_encode_scale
from pallas_kernels.formats.number_types import (
    FLOAT32_MAX,
    float_exponent,
    power_of_two,
    true_divide,
)
from pallas_kernels.ops.quantize.api import fake_quantize

# Clip of a normal distribution that rounds to E2M1 with the least square error, in deviations.
QUEST_CLIP = 2.92247856
# MS-EDEN: 17/16 keeps E4M3 scales from clipping, 0.93 is the best clip for the square error.
MS_EDEN_RANGE = 17 / 16 * 0.93
# Scales end at 256 where a later factor (1.5, or the correction) must still fit into 448.
SCALE_CEILING = 256.0
_CEILED = FloatType("e4m3", 4, 3, SCALE_CEILING, jnp.dtype(jnp.float8_e4m3fn))


def quantizer_options(axis: int, quant: OperandQuant, key: jax.Array | None) -> dict:
    """Keyword arguments of ``pallas_kernels.quantize`` for an operand of a product.

    Args:
      axis: contraction axis of the matrix, 0 or 1.
      quant: an OperandQuant with ``method="block"``.
      key: PRNG key if it rounds stochastically.

    Returns:
      A dict.

    Example:
      >>> quantizer_options(1, OperandQuant("nvfp4"), None)["tile"]
      16
    """
    along = {
        "contraction": (axis, quant.block),
        "square": ((0, 1), (quant.block, quant.block)),
        "tensor": (None, None),
    }[quant.granularity]
    return {
        "axis": along[0],
        "tile": along[1],
        "rounding": quant.rounding,
        "key": key,
        "scale_rule": quant.scale_rule,
        "overrange": quant.overrange,
        "two_level": quant.two_level,
    }


def round_operand(
    value: jax.Array,
    axis: int,
    quant: OperandQuant,
    key: jax.Array | None = None,
    group: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    r"""Rounds a matrix to a format, with blocks along the contraction axis.

    With ``b`` the values of one block, ``E`` rounding to E2M1 and ``s`` the scale:

    - ``block``: the options of the OperandQuant, see ``pallas_kernels.fake_quantize``.
    - ``quest``: :math:`s = 2^{\lfloor \log_2(2.92 / 6 \cdot std(b) + 10^{-8}) \rfloor}`, nearest;
      values beyond ``6 s`` saturate and are marked.
    - ``floor_4_3``: :math:`s = \tfrac43 2^{\lfloor \log_2 \max|b| \rfloor - 2}`, so that
      ``|b| / s < 6`` always.
    - ``four_six``: NVFP4 with ``max|b|`` mapped to 6 or to 4, whichever has the smaller square
      error.
    - ``ms_eden``: NVFP4 to nearest, ``q``; then the scales of each rotated group ``g`` are
      multiplied by :math:`|g|^2 / \langle g, q \rangle` and rounded stochastically to E4M3, which
      makes the mean over rotations and draws unbiased.

    Args:
      value: floating ``[rows, columns]``; rotated already where the recipe says so.
      axis: contraction axis, 0 or 1.
      quant: format and method; without a format the value comes back as it is.
      key: PRNG key for stochastic rounding.
      group: values per rotation, for ``ms_eden``.

    Returns:
      The rounded matrix, and a mask that is False where a value was clipped (``quest``) or None.

    Example:
      >>> rounded, mask = round_operand(jnp.float32([[1, 2, 30, 4]]), 1,
      ...                               OperandQuant("mxfp4", tile=4, method="quest"))
      >>> rounded.tolist(), mask.tolist()
      ([[0.0, 2.0, 24.0, 4.0]], [[True, True, False, True]])

    References:
      QuEST (arXiv:2502.05003), section 3; Quartet (arXiv:2505.14669), section 4; the code of
      IST-DASLab/Quartet (``quest``, ``floor_4_3``) and IST-DASLab/Quartet-II (``four_six``,
      ``ms_eden``).
    """
    if quant.format is None:
        return value, None
    if quant.method == "block":
        return fake_quantize(value, quant.format, **quantizer_options(axis, quant, key)), None
    blocks = _blocks(jax.lax.stop_gradient(value), axis, quant.block)  # [rows, blocks, block]
    noise = None
    if quant.rounding == "stochastic":
        per_value = quant.method != "ms_eden"
        shape = blocks.shape if per_value else (*blocks.shape[:2], 1)
        noise = jax.random.uniform(key, shape, jnp.float32)
    mask = None
    if quant.method == "quest":
        rounded, mask = _quest(blocks)
        mask = _unblock(mask, axis, value.shape)
    elif quant.method == "floor_4_3":
        rounded = _floor_4_3(blocks, noise, get_format(quant.format).scale_type)
    elif quant.method == "four_six":
        rounded = _four_six(blocks)
    else:
        rounded = _ms_eden(blocks, noise, group // quant.block)
    return _unblock(rounded, axis, value.shape).astype(value.dtype), mask


_E2M1 = number_type("e2m1")
_E4M3 = number_type("e4m3")


def _quest(blocks):
    mean = blocks.mean(-1, keepdims=True)
    variance = jnp.square(blocks).mean(-1, keepdims=True) - jnp.square(mean)
    deviation = jnp.sqrt(jnp.maximum(variance, 0.0))
    exponent = float_exponent(QUEST_CLIP / _E2M1.max * deviation + 1e-8)
    scale = power_of_two(jnp.clip(exponent, -126, 127))
    scale = jnp.where(jnp.isfinite(deviation), scale, jnp.nan)
    units = blocks / scale  # exact, as the scale is a power of two
    return round_to(units, _E2M1) * scale, jnp.abs(units) <= _E2M1.max


def _floor_4_3(blocks, noise, scale_type):
    amax = jnp.abs(blocks).max(-1, keepdims=True)
    scale = scale_from_amax(amax, _E2M1, scale_type, "floor", scale_type.smallest) * (4 / 3)
    return round_to(true_divide(blocks, scale), _E2M1, noise=noise) * scale


def _four_six(blocks):
    amax = jnp.abs(blocks).max(-1, keepdims=True)
    encode = _encode_scale(amax)
    candidates, errors = [], []
    for factor in (1.0, 1.5):
        scale = scale_from_amax(amax * factor, _E2M1, _E4M3, "nearest", _E4M3.smallest, encode)
        rounded = _round_scaled(blocks, scale, 1 / encode) * (scale * (1 / encode))
        candidates.append(rounded)
        errors.append(jnp.square(rounded - blocks).sum(-1, keepdims=True))
    return jnp.where(errors[1] < errors[0], candidates[1], candidates[0])


def _ms_eden(blocks, noise, blocks_per_group):
    amax = jnp.abs(blocks).max(-1, keepdims=True) * MS_EDEN_RANGE
    encode = _encode_scale(amax)
    scale = scale_from_amax(amax, _E2M1, _E4M3, "nearest", _E4M3.smallest, encode)
    codes = _round_scaled(blocks, scale, 1 / encode)
    rows, count, size = blocks.shape
    groups = (rows, count // blocks_per_group, blocks_per_group * size)
    original = blocks.reshape(groups)
    rounded = (codes * (scale * (1 / encode))).reshape(groups)
    along = (original * rounded).sum(-1, keepdims=True)
    correction = jnp.square(original).sum(-1, keepdims=True) / jnp.where(along == 0, 1.0, along)
    correction = jnp.where(along == 0, 1.0, correction)
    correction = jnp.repeat(correction, blocks_per_group, axis=1)  # [rows, blocks, 1]
    return codes * (round_to(scale * correction, _E4M3, noise=noise) * (1 / encode))


def _encode_scale(amax):
    """First-level scale of NVFP4 whose largest block scale is ``SCALE_CEILING``."""
    finite = jnp.where(jnp.isfinite(amax), amax, 0.0)
    return tensor_encode_scale(jnp.max(finite, initial=0.0, keepdims=True), _E2M1, _CEILED)


def _round_scaled(blocks, scale, tensor_scale):
    return round_to(blocks * jnp.minimum(1 / (scale * tensor_scale), FLOAT32_MAX), _E2M1)


def _blocks(value, axis, size):
    """``[rows, columns]`` as float32 ``[others, blocks, size]`` along an axis, zeros at the end."""
    value = (value if axis == 1 else value.T).astype(jnp.float32)
    value = jnp.pad(value, ((0, 0), (0, -value.shape[1] % size)))
    return value.reshape(value.shape[0], value.shape[1] // size, size)


def _unblock(blocks, axis, shape):
    value = blocks.reshape(blocks.shape[0], blocks.shape[1] * blocks.shape[2])[:, : shape[axis]]
    return value if axis == 1 else value.T
