"""Linear layers with a frozen, possibly quantised weight and something small that is trained."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxeff.finetune.melded import meld_weight, melded_dot
from jaxeff.finetune.melded_mlp import melded_mlp
from jaxeff.finetune.methods import FALQON, FP8LoRA, LoRA
from jaxeff.optim.falqon import Melded
from jaxeff.quant import quantized_dot_general
from pallas_kernels.formats import NF4Tensor, QTensor, quantize_nf4
from pallas_kernels.ops.quantize.api import quantize

_PLAIN = (((1,), (0,)), ((), ()))


class Frozen(nnx.Variable):
    """An array, NF4Tensor or QTensor of the base model that training never changes."""


class MeldedWeight(nnx.Variable):
    """A ``Melded`` weight: changed by FALQON's step, but not by a gradient."""


class LoRALinear(nnx.Module):
    """A linear layer with a frozen weight and a trained ``A`` and ``B``.

    Args:
      linear: the layer to take over; ``nnx.Linear``.
      method: settings.
      key: PRNG key of ``A``.

    Raises:
      ValueError: the rank is above a side of the weight.

    >>> layer = LoRALinear(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), LoRA(2), jax.random.key(0))
    >>> layer.base.get_value().dtype, layer(jnp.ones((3, 8))).shape
    (dtype(bfloat16), (3, 4))
    """

    def __init__(self, linear: nnx.Linear, method: LoRA, key: jax.Array):
        _take_over(self, linear, method)
        kernel = linear.kernel.get_value()
        self.base = Frozen(_backbone(kernel, method.backbone))
        self.factor = method.factor
        self.fp8 = isinstance(method, FP8LoRA)
        bound = self.in_features**-0.5
        a = jax.random.uniform(key, (self.in_features, method.rank), minval=-bound, maxval=bound)
        self.lora_a = nnx.Param(a) if method.train_a else Frozen(a)
        self.lora_b = nnx.Param(jnp.zeros((method.rank, self.out_features)))

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map ``[..., in]`` to ``[..., out]``."""
        x, restore = _flatten(self, inputs, out_sharding)
        a, b = (p.get_value().astype(x.dtype) for p in (self.lora_a, self.lora_b))
        y = frozen_dot(x, self.base.get_value())
        if self.fp8:
            low = quantized_dot_general(x, a, _PLAIN, "fp8_current")
            change = quantized_dot_general(low, b, _PLAIN, "fp8_current")
        else:
            change = (x @ a) @ b
        return restore(y + self.factor * change)

    def merged(self) -> jax.Array:
        """The kernel ``[in, out]`` with the adapter added, in float32."""
        change = jnp.matmul(
            self.lora_a.get_value(), self.lora_b.get_value(), precision=lax.Precision.HIGHEST
        )
        return dense(self.base.get_value()) + self.factor * change


class FalqonLinear(nnx.Module):
    """A linear layer whose FP8 weight holds its adapter; trained by ``jaxeff.finetune.fit``.

    Args:
      linear: the layer to take over; ``nnx.Linear``.
      method: settings.
      key: PRNG key of ``A`` if its start is random.

    Raises:
      ValueError: the rank is above a side of the weight.

    >>> layer = FalqonLinear(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), FALQON(2), jax.random.key(0))
    >>> layer.weight.get_value().codes.dtype, layer(jnp.ones((3, 8))).shape
    (dtype(float8_e4m3fn), (3, 4))
    """

    def __init__(self, linear: nnx.Linear, method: FALQON, key: jax.Array):
        _take_over(self, linear, method)
        melded = meld_weight(
            linear.kernel.get_value().T,
            method.rank,
            init=method.init,
            anchored=method.requant == "anchored",
            key=key if method.init == "random" else None,
        )
        self.weight = MeldedWeight(melded)
        # Set by the training step for one trace, stored nowhere: the virtual B, and a function of
        # the inputs that gives the scales of delayed scaling.
        self.probe = nnx.data(None)
        self.scales = None

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map ``[..., in]`` to ``[..., out]``."""
        x, restore = _flatten(self, inputs, out_sharding)
        scales = None if self.scales is None else self.scales(inputs)
        return restore(melded_dot(x, self.probe, self.weight.get_value(), scales))

    def gated_mlp(
        self, inputs: jax.Array, up: nnx.Module, down: nnx.Module, activation: str
    ) -> jax.Array | None:
        """The whole gated MLP of which this is the gate, if it can be had in one piece.

        While training with delayed scaling, when all three layers are melded and SwiGLU is what
        lies between them; None otherwise.
        """
        layers = (self, up, down)
        fits = activation == "silu" and all(
            isinstance(layer, FalqonLinear)
            and layer.probe is not None
            and layer.scales is not None
            and layer.bias is None
            for layer in layers
        )
        if not fits:
            return None
        x, restore = _flatten(self, inputs, None)
        scales = (self.scales(inputs), up.scales(inputs), down.scales(object()))
        probes = tuple(layer.probe for layer in layers)
        weights = tuple(layer.weight.get_value() for layer in layers)
        return restore(melded_mlp(x, probes, weights, scales, self.method.implementation))

    def merged(self) -> jax.Array:
        """The kernel ``[in, out]``, in float32; the adapter is in it already."""
        return self.weight.get_value().weight().T


AdaptedLinear = LoRALinear | FalqonLinear


def frozen_dot(x: jax.Array, weight: jax.Array | NF4Tensor | QTensor) -> jax.Array:
    """Product with a weight that gets no gradient, without a lasting copy of it in 16 bits.

    Args:
      x: floating ``[t, k]``.
      weight: ``[k, n]`` array; or, outputs first, an NF4Tensor ``[n, k]`` (dequantised here and
        again in the backward pass) or an E4M3 QTensor ``[n, k]`` with one scale (multiplied in
        FP8, the gradient of ``y`` in E5M2).

    Returns:
      ``[t, n]`` in the dtype of ``x``.

    >>> x = jnp.eye(2)
    >>> frozen_dot(x, jnp.float32([[1, 2], [3, 4]])).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    >>> frozen_dot(x, quantize_nf4(jnp.float32([[1, -1], [2, 0]]), double=False)).tolist()
    [[1.0, 2.0], [-1.0, 0.0]]
    """
    if isinstance(weight, NF4Tensor):
        return _nf4_dot(x, weight)
    if isinstance(weight, QTensor):
        # The melded product with an adapter of rank zero.
        return melded_dot(x, None, Melded(weight.qvalue, weight.scale[0, 0], None, 0))
    return x @ weight.astype(x.dtype)


@jax.custom_vjp
def _nf4_dot(x, weight):
    return _nf4_product(x, weight, transposed=True)


def _nf4_product(x, weight, *, transposed):
    # The barrier ties the codes to x, so that no pass may dequantise once for both passes and keep
    # the copy that NF4 is there to avoid. (XLA for CPU does not, with or without it.)
    x, weight = lax.optimization_barrier((x, weight))
    full = weight.dequantize(x.dtype)  # [n, k]
    return x @ (full.T if transposed else full)


_nf4_dot.defvjp(
    lambda x, weight: (_nf4_dot(x, weight), weight),
    lambda weight, d: (_nf4_product(d, weight, transposed=False), None),
)


def dense(weight: jax.Array | NF4Tensor | QTensor) -> jax.Array:
    """A frozen weight as a float32 kernel ``[in, out]``.

    >>> dense(quantize_nf4(jnp.float32([[1, -1, 0]]), double=False)).tolist()
    [[1.0], [-1.0], [0.0]]
    """
    if isinstance(weight, NF4Tensor | QTensor):
        return weight.dequantize().T
    return weight.astype(jnp.float32)


def _backbone(kernel: jax.Array, store: str | None) -> jax.Array | NF4Tensor | QTensor:
    if store in ("nf4", "nf4_single"):
        return quantize_nf4(kernel.T, double=store == "nf4")
    if store == "fp8":
        return quantize(kernel.T, "fp8_e4m3", axis=None)
    return kernel if store is None else kernel.astype(store)


def _take_over(layer: AdaptedLinear, linear: nnx.Linear, method: Any) -> None:
    """What every adapted layer keeps of the linear layer it replaces."""
    sides = (linear.in_features, linear.out_features)
    if method.rank > min(sides):
        raise ValueError(f"rank is {method.rank}; the weight {sides} allows at most {min(sides)}")
    layer.in_features, layer.out_features = sides
    layer.method = method
    layer.dtype, layer.param_dtype = linear.dtype, linear.param_dtype
    layer.preferred_element_type = linear.preferred_element_type
    layer.precision = linear.precision  # of the layer that merging gives back
    layer.bias = None if linear.bias is None else Frozen(linear.bias.get_value())
    layer.base_tag = Frozen(base_tag(linear.kernel.get_value()))


@jax.jit
def base_tag(kernel: jax.Array) -> jax.Array:
    """A number that tells base weights apart: two sums over the kernel in bfloat16.

    Weights that were stored in bfloat16 have the same tag however they are loaded.

    Args:
      kernel: floating ``[in, out]``.

    Returns:
      uint32 scalar.

    >>> int(base_tag(jnp.ones((2, 2)))) != int(base_tag(jnp.ones((2, 2)).at[0, 0].set(2.0)))
    True
    """
    bits = lax.bitcast_convert_type(kernel.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    rows = jnp.arange(1, kernel.shape[0] + 1, dtype=jnp.uint32)[:, None]
    columns = jnp.arange(1, kernel.shape[1] + 1, dtype=jnp.uint32)
    return jnp.sum(bits * (rows * jnp.uint32(2654435761) ^ columns * jnp.uint32(40503)))


def _flatten(layer: AdaptedLinear, inputs: jax.Array, out_sharding: Any):
    """Inputs as a matrix in the compute dtype, and the way back: bias, shape, output dtype."""
    if out_sharding is not None:
        raise NotImplementedError(
            "out_sharding is not served by adapted layers; use jax.lax.with_sharding_constraint "
            "on the result"
        )
    dtype = jnp.result_type(inputs, layer.param_dtype) if layer.dtype is None else layer.dtype
    x = inputs.reshape(-1, inputs.shape[-1]).astype(dtype)

    def restore(y):
        if layer.preferred_element_type is not None:
            y = y.astype(layer.preferred_element_type)
        if layer.bias is not None:
            y = y + layer.bias.get_value().astype(y.dtype)
        return y.reshape(*inputs.shape[:-1], y.shape[-1])

    return x, restore
