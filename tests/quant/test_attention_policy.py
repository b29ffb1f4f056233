"""Choosing an attention variant per layer, and setting it by path rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from jaxeff.models import Decoder, ModelConfig
from jaxeff.nn import Attention, default_attention_fn
from jaxeff.quant import (
    AttentionPolicy,
    attention_errors,
    calibrate_attention,
    set_attention,
)

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 48)))
PATHS = ["layers.0.attention", "layers.1.attention", "layers.2.attention"]


def decoder():
    config = ModelConfig.llama(vocab_size=32, num_layers=3, embed_dim=32, num_heads=2)
    return Decoder(config, rngs=nnx.Rngs(0))


class Encoder(nnx.Module):
    """A model that is no decoder, with layers that differ in how well they quantise."""

    def __init__(self):
        self.blocks = nnx.List([Attention(32, 2, rngs=nnx.Rngs(i)) for i in range(2)])
        self.spare = nnx.data(None)

    def __call__(self, x, gain=1.0):
        x = x + self.blocks[0](x)
        # Large queries and keys: almost one-hot weights, which FP8 holds better than broad ones.
        return self.blocks[1](gain * x)


def test_errors_are_those_of_each_layer():
    model = decoder()
    policy = calibrate_attention(model, TOKENS, variants=("sage2_int4", "sage2"), bound=0.05)
    assert list(policy.errors) == PATHS
    for name in ("sage2_int4", "sage2"):
        got = [policy.errors[path][name] for path in PATHS]
        np.testing.assert_allclose(got, attention_errors(model, TOKENS, name), rtol=1e-4)
    for path in PATHS:
        row = policy.errors[path]
        cheapest = next((name for name in row if row[name] <= 0.05), None)
        assert policy.choices[path] == cheapest
    # The model is left as it was.
    assert all(layer.attention.attention_fn is default_attention_fn() for layer in model.layers)


def test_bound_decides_and_full_precision_is_the_last_resort():
    model = decoder()
    loose = calibrate_attention(model, TOKENS, variants=("sage3", "sage2"), bound=10.0)
    tight = calibrate_attention(model, TOKENS, variants=("sage3", "sage2"), bound=1e-6)
    assert set(loose.choices.values()) == {"sage3"}
    assert set(tight.choices.values()) == {None}
    assert set_attention(model, tight) == dict.fromkeys(PATHS)


def test_layers_may_differ():
    model, x = Encoder(), jax.random.normal(jax.random.key(0), (2, 40, 32))
    policy = calibrate_attention(model, {"x": x, "gain": 30.0}, variants=["sage2"], bound=0.0235)
    assert policy.choices == {"blocks.0": None, "blocks.1": "sage2"}
    assert set_attention(model, policy) == {"blocks.0": None, "blocks.1": "sage2"}
    assert model.blocks[1].attention_fn is default_attention_fn("sage2")
    again = calibrate_attention(model, (x, 30.0), variants=["sage2"], bound=0.0235)
    # A quantised layer is measured in full precision, so calibrating twice changes nothing.
    np.testing.assert_allclose(
        again.errors["blocks.1"]["sage2"], policy.errors["blocks.1"]["sage2"]
    )


def test_a_policy_changes_the_output_and_none_restores_it():
    model = decoder()
    exact = model(TOKENS)
    set_attention(model, "sage2")
    assert 0 < float(jnp.abs(model(TOKENS) - exact).max()) < 0.5
    set_attention(model, None)
    np.testing.assert_array_equal(model(TOKENS), exact)


def test_rules():
    model = decoder()
    quant = pallas_kernels.AttentionQuant("mine", granularity="per_token")
    assert set_attention(model, [(r"\.0\.", None), (r"\.[12]\.", quant)]) == {
        PATHS[0]: None,
        PATHS[1]: "mine",
        PATHS[2]: "mine",
    }
    assert set_attention(model, [(r"\.2\.", "sage1")]) == {PATHS[2]: "sage1"}
    assert model.layers[1].attention.attention_fn is default_attention_fn(quant)


def test_table():
    policy = AttentionPolicy(
        {"a": None, "bb": "sage2"}, {"a": {"sage2": 0.2}, "bb": {"sage2": 0.012, "x": 1.5}}, 0.1
    )
    assert str(policy).splitlines() == [
        "layer  sage2  x       choice (error <= 0.1)",
        "a      .2000          None",
        "bb     .0120  1.5000  sage2",
    ]


class TwoLayers(nnx.Module):
    def __init__(self, **arguments):
        self.used = Attention(16, 2, rngs=nnx.Rngs(0), **arguments)
        self.idle = Attention(16, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.used(x)


REFUSED = {
    "no match": ([("layers.9", "sage2")], r"rule 'layers.9' matches no attention layer.*layers.0"),
    "twice": ([("layers", "sage2"), ("0", None)], "'layers.0.attention' is matched by two rules"),
    "unknown": ("sage9", "got 'sage9'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rules_refused(name):
    policy, message = REFUSED[name]
    model = decoder()
    with pytest.raises(ValueError, match=message):
        set_attention(model, policy)
    assert all(layer.attention.attention_fn is default_attention_fn() for layer in model.layers)


def test_calibration_refused():
    x = jnp.ones((1, 4, 16))
    for variants in ((), "sage2", ("sage2", "sage2"), ("sage2", None)):
        with pytest.raises(ValueError, match="variants must be"):
            calibrate_attention(decoder(), TOKENS, variants=variants)
    with pytest.raises(ValueError, match="bound is 0"):
        calibrate_attention(decoder(), TOKENS, bound=0)
    with pytest.raises(ValueError, match=r"Linear has no jaxeff\.nn\.Attention layer"):
        calibrate_attention(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match="'idle' is not reached"):
        calibrate_attention(TwoLayers(), x)
    with pytest.raises(ValueError, match="'used' has an attention function of its own"):
        set_attention(TwoLayers(attention_fn=lambda *x, **_: x[0]), "sage2")
