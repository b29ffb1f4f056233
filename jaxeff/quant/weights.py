"""Weights packed once, for inference: a model whose linear layers hold codes and scales only."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.quant.module_paths import (
    DECODER_LAYERS,
    check_replaceable,
    check_rules,
    get_module,
    linear_layers,
    match_rules,
    set_module,
)
from pallas_kernels.formats import QTensor, get_format
from pallas_kernels.ops.matmul import matmul
from pallas_kernels.ops.quantize.api import quantize

ACTIVATIONS = ("int8", "fp8_e4m3")


class PackedWeight(nnx.Variable):
    """A ``QTensor`` ``[in, out]``, four-bit codes packed along the inputs; never trained."""


@dataclasses.dataclass(frozen=True)
class WeightQuant:
    """How the weights of a layer are stored, and whether its activations are quantised too.

    Args:
      format: ``"nvfp4"``, ``"mxfp4"``, ``"int4"``, ``"int8"``, ``"fp8_e4m3"``, or another name of
        ``pallas_kernels.get_format``. ``"mxfp4_int8"`` and ``"int4_int8"`` are INT8 numbers times
        one scale of an output: with INT8 activations an sm90 GPU multiplies them as such.
      group: inputs that share a scale; ``"default"``: 16 for nvfp4, 32 for the MX formats, 128 for
        the int4 ones, all inputs of an output for the 8-bit ones. None: all inputs.
      activations: ``None`` (16 bits), ``"int8"`` or ``"fp8_e4m3"``, one current scale per token.
      asymmetric: whether integer groups have a zero point.

    Raises:
      ValueError: a format is unknown, or ``group`` is not positive.

    >>> WeightQuant("int4", activations="int8").scheme, WeightQuant("nvfp4").scheme
    ('w4a8', 'w4a16')

    References: GPTQ (arXiv:2210.17323), section 5 (groups of 128); Pretraining LLMs with NVFP4
    (arXiv:2509.25149), appendix B; QServe (arXiv:2405.04532), section 4.1 (4-bit codes that are
    INT8 numbers).
    """

    format: str
    group: int | str | None = "default"
    activations: str | None = None
    asymmetric: bool = False

    def __post_init__(self):
        get_format(self.format)  # raises ValueError with the known names
        is_count = isinstance(self.group, int) and self.group is not True and self.group >= 1
        if not (self.group in ("default", None) or is_count):
            raise ValueError(f"group must be 'default', None or a positive int, got {self.group!r}")
        if self.activations not in (None, *ACTIVATIONS):
            raise ValueError(
                f"activations must be None or one of {ACTIVATIONS}, got {self.activations!r}"
            )

    @property
    def scheme(self) -> str:
        """Bits of weights and activations."""
        dtype = get_format(self.format).element_type.dtype
        bits = 4 if dtype in (jnp.int4, jnp.float4_e2m1fn) else 8
        return f"w{bits}a{16 if self.activations is None else 8}"

    def encode(self, kernel: jax.Array) -> QTensor:
        """Quantises and packs a kernel ``[in, out]``.

        >>> WeightQuant("nvfp4").encode(jnp.ones((32, 4))).nbytes
        76
        """
        tile = self.group
        if tile == "default" and self.format in ("int4", "int4_int8"):
            tile = 128
        if isinstance(tile, int):
            tile = min(tile, kernel.shape[0])
        codes = quantize(kernel, self.format, axis=0, tile=tile, asymmetric=self.asymmetric)
        return codes.pack(0)


#: Weight storage by name; activations in 16 bits unless it ends in ``_a8``.
WEIGHTS = {
    "nvfp4": WeightQuant("nvfp4"),
    "mxfp4": WeightQuant("mxfp4"),
    "int4": WeightQuant("int4"),
    "int8": WeightQuant("int8"),
    "fp8": WeightQuant("fp8_e4m3"),
    "int4_a8": WeightQuant("int4_int8", activations="int8"),
    "nvfp4_a8": WeightQuant("nvfp4", activations="fp8_e4m3"),
    "mxfp4_a8": WeightQuant("mxfp4_int8", activations="int8"),
    "int8_a8": WeightQuant("int8", activations="int8"),
    "fp8_a8": WeightQuant("fp8_e4m3", activations="fp8_e4m3"),
}


class PackedLinear(nnx.Module):
    """A linear layer for inference that holds its weight in packed form.

    ``y = x W + b`` with ``W`` dequantised within the product (``pallas_kernels.matmul``), or codes
    times codes where the activations are quantised and the scales allow it.

    Args:
      linear: the layer to take over; ``nnx.Linear``.
      quant: storage.

    >>> layer = PackedLinear(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), WEIGHTS["nvfp4"])
    >>> layer.weight.get_value().nbytes, layer(jnp.ones((2, 32))).shape
    (148, (2, 8))
    """

    def __init__(self, linear: nnx.Linear, quant: WeightQuant):
        self.quant = quant
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.param_dtype = linear.dtype, linear.param_dtype
        self.preferred_element_type = linear.preferred_element_type
        self.weight = PackedWeight(quant.encode(linear.kernel.get_value()))
        self.bias = linear.bias

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map ``[..., in]`` to ``[..., out]``."""
        if out_sharding is not None:
            raise NotImplementedError(
                "out_sharding is not served by packed layers; use "
                "jax.lax.with_sharding_constraint on the result"
            )
        dtype = jnp.result_type(inputs, self.param_dtype) if self.dtype is None else self.dtype
        x = inputs.reshape(-1, inputs.shape[-1]).astype(dtype)
        if self.quant.activations is not None:
            x = quantize(x, self.quant.activations, axis=-1, tile=None)
        out_dtype = self.preferred_element_type or dtype
        y = matmul(x, self.weight.get_value(), preferred_element_type=out_dtype)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        return y.reshape(*inputs.shape[:-1], self.out_features)

    def merged(self) -> jax.Array:
        """The kernel ``[in, out]`` that the codes stand for, in float32."""
        return self.weight.get_value().dequantize()


def quantize_weights(
    model: nnx.Module,
    rules: str | WeightQuant | Sequence[tuple[str, str | WeightQuant]],
) -> dict[str, str]:
    """Packs the weights of linear layers, once; the model is changed in place, for inference.

    The model then generates with any cache and any attention, since only its projections differ.
    Nothing is calibrated: every group is rounded to nearest. No copy in another format stays.

    Args:
      model: any NNX module with ``nnx.Linear`` layers.
      rules: pairs (regular expression over layer paths, storage), or one storage for the linear
        layers of a decoder's blocks. A storage is a name out of ``WEIGHTS`` or a ``WeightQuant``.

    Returns:
      Scheme and format by path, ``"plain"`` for layers without a rule.

    Raises:
      ValueError: a name is unknown, a rule is no pair or matches no layer, two rules match one
        layer, a layer has a recipe, or an odd number of inputs cannot be packed.
      NotImplementedError: a layer cannot be replaced, as it has a ``__call__`` of its own, is a
        stack of layers, or lies in a tuple.

    >>> model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)))
    >>> quantize_weights(model, [("layers", "nvfp4")])
    {'layers.0': 'w4a16 nvfp4'}

    References: LLM.int8() (arXiv:2208.07339), section 3 (rows times columns); GPTQ
    (arXiv:2210.17323), section 5.
    """
    if isinstance(rules, str | WeightQuant):
        rules = [(DECODER_LAYERS, rules)]
    check_rules(rules)
    layers = linear_layers(model)
    chosen = match_rules(layers, [(pattern, _storage(choice)) for pattern, choice in rules])
    for name, quant in chosen.items():  # all of them first: a refused model is still whole
        check_replaceable(model, layers[name])
        _check_layer(name, get_module(model, layers[name]), quant)
    for name, quant in chosen.items():
        set_module(model, layers[name], PackedLinear(get_module(model, layers[name]), quant))
    return {
        name: f"{chosen[name].scheme} {chosen[name].format}" if name in chosen else "plain"
        for name in layers
    }


def weight_bytes(model: nnx.Module) -> int:
    """Bytes of all arrays of a model: parameters, codes and scales.

    >>> weight_bytes(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
    24
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


def _check_layer(name: str, layer: nnx.Linear, quant: WeightQuant) -> None:
    try:
        jax.eval_shape(quant.encode, layer.kernel.get_value())
    except ValueError as error:
        raise ValueError(f"layer {name!r} cannot be stored as {quant.format}: {error}") from error


def _storage(choice: str | WeightQuant) -> WeightQuant:
    if isinstance(choice, WeightQuant):
        return choice
    if choice not in WEIGHTS:
        raise ValueError(f"storage must be a WeightQuant or one of {list(WEIGHTS)}, got {choice!r}")
    return WEIGHTS[choice]
