"""Packed weights: bytes, products and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.generate import generate
from jaxeff.models import Decoder, ModelConfig
from jaxeff.nn import GatedMLP
from jaxeff.quant import WEIGHTS, PackedLinear, WeightQuant, quantize_weights, weight_bytes
from jaxeff.quant.weights import PackedWeight
from pallas_kernels import matmul

X = jax.random.normal(jax.random.key(0), (6, 64))


def linear(inputs=64, outputs=24):
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["nvfp4", "int4", "fp8", "int4_a8", "mxfp4_a8", "int8_a8"])
def test_layer_equals_dequantise_then_multiply_on_the_same_codes(name):
    plain = linear()
    layer = PackedLinear(plain, WEIGHTS[name])
    weight = layer.weight.get_value().validate(check_values=True)
    scheme = WEIGHTS[name].scheme
    assert weight.qvalue.shape == ((32, 24) if scheme.startswith("w4") else (64, 24))
    y = layer(X)
    if WEIGHTS[name].activations is None:
        np.testing.assert_allclose(y, X @ weight.dequantize(), rtol=1e-5, atol=1e-5)
    # Format error, relative; measured: 4 bits .09-.12, int8 .006, fp8 .03-.04.
    error = float(jnp.linalg.norm(y - plain(X)) / jnp.linalg.norm(plain(X)))
    assert error < (0.16 if scheme.startswith("w4") else 0.05), error


@pytest.mark.parametrize(
    ("name", "bits"), [("nvfp4", 4.51), ("mxfp4", 4.26), ("int4", 4.26), ("int8", 8.13)]
)
def test_bits_a_weight(name, bits):
    weight = WEIGHTS[name].encode(jnp.ones((256, 64)))
    assert 8 * weight.nbytes / 256 / 64 <= bits


def test_every_remainder_zero_and_outlier_groups():
    rng = np.random.default_rng(0)
    for inputs, outputs in ((2, 1), (130, 5)):
        kernel = rng.normal(size=(inputs, outputs)).astype(np.float32)
        kernel[: inputs // 2] = 0
        kernel[-1] = 1e4
        for quant in (WEIGHTS["nvfp4"], WeightQuant("int4", 16, asymmetric=True)):
            weight = quant.encode(jnp.asarray(kernel))
            assert weight.shape == kernel.shape
            x = rng.normal(size=(3, inputs)).astype(np.float32)
            want = x @ np.asarray(weight.dequantize())
            np.testing.assert_allclose(matmul(x, weight), want, rtol=1e-4, atol=1e-2)
            assert np.isfinite(want).all()


def test_a_loop_does_not_hold_dequantised_weights():
    """Eight products in a loop need one dequantised weight at a time, not eight."""
    weights = [WEIGHTS["nvfp4"].encode(jnp.ones((128, 128))) for _ in range(8)]

    def decode(x):
        def body(_, x):
            for weight in weights:
                x = jnp.tanh(matmul(x, weight))
            return x

        return jax.lax.fori_loop(0, 5, body, x)

    compiled = jax.jit(decode).lower(jnp.ones((64, 128))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 128 * 128 * 4


def decoder():
    config = ModelConfig.qwen2(vocab_size=64, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64)
    return Decoder(config, rngs=nnx.Rngs(0), attention_fn=jax.nn.dot_product_attention)


def test_a_decoder_generates_with_packed_weights_and_a_compressed_cache():
    model = decoder()
    full = weight_bytes(model.layers)
    plan = quantize_weights(model, "int4_a8")
    assert plan.pop("lm_head") == "plain" and set(plan.values()) == {"w4a8 int4_int8"}
    assert weight_bytes(model.layers) < 0.25 * full  # 4.5 bits, biases and norms, of 32
    assert not [v for v in jax.tree.leaves(nnx.state(model.layers, nnx.Param)) if v.ndim == 2]
    prompt = jnp.arange(16, dtype=jnp.int32)[None]
    result = generate(model, prompt, max_new_tokens=3, compression="snapkv:12", cache_dtype="int8")
    # The prompt is read before anything is evicted: the first token is that of the plain pass.
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, prompt)
    assert int(result.tokens[0, 0]) == int(jnp.argmax(logits[0, -1]))
    assert len(jax.tree.leaves(nnx.state(model, PackedWeight))) == 2 * 7


def test_rules_and_messages():
    model = decoder()
    plan = quantize_weights(model, [("attention", "int8"), ("mlp", WeightQuant("mxfp4", 16))])
    assert plan["layers.0.mlp.up_proj"] == "w4a16 mxfp4"
    assert plan["layers.0.attention.q_proj"] == "w8a16 int8"
    with pytest.raises(ValueError, match="rule 'attention' matches no linear layer"):
        quantize_weights(model, [("attention", "int8")])
    with pytest.raises(ValueError, match="storage must be a WeightQuant or one of"):
        quantize_weights(decoder(), "int3")
    with pytest.raises(ValueError, match="matched by 2 rules"):
        quantize_weights(decoder(), [("mlp", "int8"), ("up", "int4")])
    odd = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError,
        match="layer 'layers.0' cannot be stored as int4: axis 0 has odd length 3",
    ):
        quantize_weights(odd, [("layers", WeightQuant("int4", None))])
    assert isinstance(odd.layers[0], nnx.Linear)
    with pytest.raises(ValueError, match="activations must be None or one of"):
        WeightQuant("int4", activations="int2")
    with pytest.raises(ValueError, match="group must be 'default', None or a positive int"):
        WeightQuant("int4", group=0)
    with pytest.raises(ValueError, match="unknown format"):
        WeightQuant("q4")


class Shared(nnx.Module):
    """One layer at two places, another in a dictionary."""

    def __init__(self):
        self.first = linear(32, 32)
        self.second = self.first
        self.more = nnx.data({"third": linear(32, 32)})

    def __call__(self, x):
        return self.more["third"](self.second(self.first(x)))


def test_a_shared_layer_is_packed_at_all_its_places():
    model, x = Shared(), jnp.ones((2, 32))
    expected = model(x)
    assert set(quantize_weights(model, [(".", "int8")])) == {"first", "more.third"}
    assert model.first is model.second and isinstance(model.more["third"], PackedLinear)
    np.testing.assert_allclose(model(x), expected, rtol=0.1, atol=0.05)
    assert weight_bytes(model) == 2 * (32 * 32 + 4 * 32 + 4 * 32)  # codes, scales and biases


def test_layers_that_cannot_be_replaced():
    class Capped(nnx.Linear):
        def __call__(self, x):
            return jnp.tanh(super().__call__(x))

    capped = nnx.Sequential(Capped(32, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match=r"'layers.0' is a Capped with a __call__ of its"):
        quantize_weights(capped, [("layers", "int8")])
    make = nnx.vmap(lambda rngs: linear(), in_axes=0, out_axes=0, axis_size=2)
    stacked = nnx.Sequential(make(None))
    with pytest.raises(NotImplementedError, match=r"kernel \[2, 64, 24\], a stack of layers"):
        quantize_weights(stacked, [("layers", "int8")])
    model = Shared()
    model.more = nnx.data((linear(),))
    with pytest.raises(NotImplementedError, match="lies in a tuple"):
        quantize_weights(model, [(".", "int8")])
    assert isinstance(model.first, nnx.Linear)  # refused before anything was changed


def test_no_rows():
    layer = PackedLinear(linear(), WEIGHTS["int8_a8"])
    assert layer(jnp.zeros((2, 0, 64))).shape == (2, 0, 24)


def test_packed_layers_where_a_kernel_is_asked_for():
    """KVzip+ weighs with the output projection; Smooth-SwiGLU scales rows of the last one."""
    model = decoder()
    quantize_weights(model, [("out_proj", "int8")])
    projection = model.layers[0].attention.out_proj
    kernel = decoder().layers[0].attention.out_proj.kernel[...]
    np.testing.assert_allclose(projection.merged(), kernel, atol=2e-3)
    prompt, compression = jnp.arange(8, dtype=jnp.int32)[None], "kvzip(ratio=0.5, kvzip_plus=True)"
    result = generate(model, prompt, max_new_tokens=2, compression=compression)
    assert result.tokens.shape == (1, 2)
    smooth, plain = (GatedMLP(32, 64, smooth=s, rngs=nnx.Rngs(0)) for s in (True, False))
    for mlp in (smooth, plain):
        quantize_weights(mlp, [("down", "int8")])
    x = jax.random.normal(jax.random.key(0), (2, 32))
    np.testing.assert_array_equal(smooth(x), plain(x))
