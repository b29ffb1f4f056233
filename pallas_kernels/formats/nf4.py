"""NF4: 4-bit codes into a table of normal quantiles, with scales that are quantised again.

The codes are indices, not numbers, so NF4 is no ``BlockFormat`` (whose rounding and products rely
on arithmetic of codes): it is storage for weights that are never changed, and has its own array.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.number_types import largest_magnitude, number_type, true_divide
from pallas_kernels.formats.packing import pack_codes, unpack_codes
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.rounding import round_to

BLOCK = 64
_SCALE_BLOCK = 256

# Quantiles of N(0, 1), scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "scale_mean"],
    meta_fields=["length"],
)
@dataclasses.dataclass(frozen=True)
class NF4Tensor:
    """An array in NF4, blocks of 64 along its last axis.

    value = NF4_VALUES[code] · scale, one scale for 64 values. With double quantisation
    scale = scale_mean + code₂ · scale₂, where code₂ is E4M3 and one float32 scale₂ serves 256
    scales: 4.127 bits a value instead of 4.5.

    Args:
        codes: uint8 ``[..., blocks, 32]``, two indices a byte, the even one in the low nibble.
        scale: float32 ``[..., blocks]``, or a QTensor that holds them flat, less their mean.
        scale_mean: float32 scalar, or ``None`` without double quantisation.
        length: values along the last axis; the last block is filled up with zeros.

    >>> tensor = quantize_nf4(jnp.float32([[2.0, -2.0, 0.0, 0.16]]))
    >>> tensor.shape, tensor.dequantize().round(2).tolist()
    ((1, 4), [[2.0, -2.0, 0.0, 0.1599999964237213]])

    References: Dettmers et al., QLoRA (arXiv:2305.14314), section 3 and appendix E.
    """

    codes: jax.Array
    scale: jax.Array | QTensor
    scale_mean: jax.Array | None = None
    length: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return (*self.codes.shape[:-2], self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The value as a plain array of ``dtype`` and shape ``self.shape``."""
        blocks = self.codes.shape[:-1]
        scale = self.scale
        if isinstance(scale, QTensor):
            scale = scale.dequantize() + self.scale_mean
        index = unpack_codes(self.codes, jnp.uint4).astype(jnp.int32)
        value = jnp.asarray(NF4_VALUES, jnp.float32)[index] * scale.reshape(*blocks, 1)
        return value.reshape(*blocks[:-1], blocks[-1] * BLOCK)[..., : self.length].astype(dtype)


def quantize_nf4(x: jax.Array, *, double: bool = True) -> NF4Tensor:
    """Quantises an array to NF4: the nearest of 16 quantiles, scaled by the block's maximum.

        code = argmin_i |x / amax - NF4_VALUES[i]|,   amax = max|x| over 64 values of the last axis

    A block of zeros gives zeros. Not differentiable.

    Args:
        x: floating array of at least one axis, finite.
        double: whether the scales are quantised again (E4M3, 256 to a float32 scale).

    Returns:
        ``NF4Tensor`` of the same shape.

    Raises:
        ValueError: ``x`` is not floating, or a scalar.

    >>> x = jnp.ones((256, 64))
    >>> quantize_nf4(x).nbytes, quantize_nf4(x, double=False).nbytes
    (8456, 9216)

    References: Dettmers et al., QLoRA (arXiv:2305.14314), section 3 (double quantisation: 8-bit
    floats of block 256 after the mean is taken off).
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0:
        raise ValueError(f"x must be a floating array [..., n], got {x.dtype} {list(x.shape)}")
    return _quantize(x, double)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(x: jax.Array, double: bool) -> NF4Tensor:
    length = x.shape[-1]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -length % BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)
    amax = largest_magnitude(blocks, -1)
    scale, mean = _double(amax) if double else (amax, None)
    # Codes follow the exact maximum, as in the paper's code; the second rounding is extra error.
    units = true_divide(blocks, jnp.where(amax == 0, 1.0, amax)[..., None])
    table = np.asarray(NF4_VALUES, np.float32)
    index = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), units)
    return NF4Tensor(pack_codes(index.astype(jnp.uint4)), scale, mean, length)


def _double(amax: jax.Array) -> tuple[QTensor, jax.Array]:
    element, mean = number_type("e4m3"), jnp.mean(amax)
    centred = (amax - mean).reshape(-1)
    groups = jnp.pad(centred, (0, -centred.size % _SCALE_BLOCK)).reshape(-1, _SCALE_BLOCK)
    largest = jnp.max(jnp.abs(groups), 1, keepdims=True)
    step = jnp.where(largest == 0, 1.0, true_divide(largest, element.max))
    codes = round_to(true_divide(groups, step), element).astype(element.dtype)
    quantized = QTensor(
        codes.reshape(-1),
        step.reshape(-1),
        qtype="e4m3_b256_float32",
        padding=(-centred.size % _SCALE_BLOCK,),
    )
    return quantized, mean
