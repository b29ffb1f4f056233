import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.kv_cache import DenseCache
from jaxeff.nn import Attention, GatedMLP, RMSNorm, TransformerBlock
from jaxeff.nn.attention import default_attention_fn
from pallas_kernels import dot_product_attention

plain = jax.nn.dot_product_attention


def make(*args, seed=0, attention_fn=plain, **options):
    return Attention(*args, attention_fn=attention_fn, rngs=nnx.Rngs(seed), **options)


def inputs(batch=2, length=7, dim=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, length, dim))


def by_hand(layer, x):
    """The formula with explicit loops over heads, in numpy."""
    batch, length, _ = x.shape
    q, k, v = (
        np.asarray(a, np.float64) for a in layer.qkv(x, jnp.tile(jnp.arange(length), (batch, 1)))
    )
    group = layer.num_heads // layer.num_kv_heads
    out = np.zeros_like(q)
    for b in range(batch):
        for n in range(layer.num_heads):
            for t in range(length):
                first = 0 if layer.window is None else max(0, t - layer.window + 1)
                keys = k[b, first : t + 1, n // group]
                scores = keys @ q[b, t, n] * layer.scale
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, first : t + 1, n // group]
    kernel = np.asarray(layer.out_proj.kernel[...], np.float64)
    bias = 0 if layer.out_proj.bias is None else np.asarray(layer.out_proj.bias[...])
    return out.reshape(batch, length, -1) @ kernel + bias


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 8, "qk_norm": True},
        {"window": 3, "qkv_bias": True, "out_bias": True},
        {"rope": None, "scale": 0.1},
    ],
)
def test_equals_the_formula(options):
    layer = make(16, 4, **options)
    np.testing.assert_allclose(layer(inputs()), by_hand(layer, inputs()), atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_cached_steps_equal_the_whole(window):
    layer, x = make(16, 4, 2, window=window), inputs()
    cache = DenseCache.init(1, 2, 8, 2, 4, dtype=jnp.float32).layers[0]
    steps = []
    for t in range(7):
        positions = jnp.full((2, 1), t)
        out, cache = layer(x[:, t : t + 1], positions=positions, cache=cache)
        steps.append(out)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), layer(x), atol=1e-5)


def test_the_attention_function_gets_only_what_it_needs():
    seen = []

    def spy(query, key, value, **arguments):
        seen.append(arguments)
        return plain(query, key, value, **arguments)

    layer, x = make(16, 4, window=3, attention_fn=spy), inputs(length=5)
    layer(x)
    layer(x[:, :3])
    layer(x, valid=jnp.ones((2, 5), bool))
    assert seen[0] == {"scale": 0.5, "is_causal": True, "local_window_size": (2, 0)}
    assert seen[1] == {"scale": 0.5, "is_causal": True}
    assert seen[2]["mask"].shape == (2, 1, 1, 5)


def test_a_call_can_replace_the_function():
    zero = lambda query, key, value, **_: jnp.zeros_like(query)  # noqa: E731
    assert not make(16, 4)(inputs(), attention_fn=zero).any()


def test_padding_changes_nothing_for_real_tokens():
    layer, x = make(16, 4), inputs(length=5)
    padded = jnp.concatenate((x, jnp.full((2, 2, 16), 1e3)), axis=1)
    valid = jnp.arange(7)[None] < jnp.array([[5], [5]])
    np.testing.assert_allclose(layer(padded, valid=valid)[:, :5], layer(x), atol=1e-6)


def test_quant_is_the_kernels_own_function_with_that_quant():
    layer = Attention(16, 4, quant="sage2", rngs=nnx.Rngs(0))
    assert layer.attention_fn is default_attention_fn("sage2")
    assert layer.attention_fn.func is dot_product_attention
    assert layer.attention_fn.keywords == {"quant": "sage2"}
    assert Attention(16, 4, rngs=nnx.Rngs(0)).attention_fn is dot_product_attention
    # FP8 values have three bits of mantissa: single outputs are off by up to 6 %.
    exact = make(16, 4)(inputs())
    error = jnp.abs(layer(inputs()) - exact)
    assert 0 < float(jnp.sum(error) / jnp.sum(jnp.abs(exact))) < 0.05


def test_gradients_reach_every_parameter():
    layer = make(16, 4, 2, qk_norm=True, qkv_bias=True)
    grads = nnx.grad(lambda m: jnp.sum(m(inputs()) ** 2))(layer)
    # A bias on keys shifts all scores of a query alike, up to RoPE and norm: it may be small.
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_jit_and_bfloat16():
    layer = make(16, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    out = nnx.jit(lambda m, x: m(x))(layer, inputs().astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(16, 4, 3), r"num_kv_heads is 3; num_heads \(4\) must be a multiple of it"),
        (lambda: make(15, 4), "embed_dim 15 is not a multiple of num_heads 4; give head_dim"),
        (lambda: make(16, 4, window=0), "window is 0; expected at least 1"),
        (lambda: make(16, 4, quant="sage2"), r"attention_fn and quant \('sage2'\) are both given"),
        (lambda: make(16, 4)(jnp.ones((3, 16))), r"x has shape \(3, 16\); expected three axes"),
        (lambda: make(16, 4)(inputs(), cache=object()), "positions is None; with a cache"),
    ],
)
def test_bad_attention_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rms_norm_formula_and_dtype():
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    for plus_one in (False, True):
        norm = RMSNorm(8, scale_plus_one=plus_one)
        norm.scale[...] = jnp.arange(8.0)
        weight = np.arange(8) + plus_one
        np.testing.assert_allclose(norm(jnp.asarray(x)), want * weight, rtol=1e-5)
    # Squares of these overflow float16; the norm does not.
    big = RMSNorm(4)(jnp.full((1, 4), 1e4, jnp.float16))
    assert big.dtype == jnp.float16
    np.testing.assert_allclose(big, 1.0, rtol=1e-3)
    assert not RMSNorm(4)(jnp.zeros((1, 4))).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RMSNorm(0), "dim is 0; expected at least 1"),
        (lambda: RMSNorm(4, eps=0.0), "eps is 0.0; expected a number above 0"),
        (lambda: RMSNorm(4)(jnp.ones((1, 5))), "x has last axis 5; expected 4"),
        (lambda: GatedMLP(4, 0, rngs=nnx.Rngs(0)), "mlp_dim is 0; expected at least 1"),
        (
            lambda: GatedMLP(4, 8, activation="tanh", rngs=nnx.Rngs(0)),
            "activation is 'tanh'; expected one of silu, gelu, gelu_tanh, relu",
        ),
    ],
)
def test_bad_norm_and_mlp_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_mlp_formula(activation):
    mlp = GatedMLP(4, 6, activation=activation, rngs=nnx.Rngs(0))
    x = inputs(dim=4)
    act = {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "relu": jax.nn.relu,
    }[activation]
    gate, up, down = (p.kernel[...] for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    np.testing.assert_allclose(mlp(x), (act(x @ gate) * (x @ up)) @ down, atol=1e-6)


def test_block_adds_normalised_branches():
    rngs = nnx.Rngs(0)
    attention, mlp = make(16, 4), GatedMLP(16, 32, rngs=rngs)
    x, norm = inputs(), RMSNorm(16)
    middle = x + attention(norm(x))
    block = TransformerBlock(attention, mlp, 16)
    np.testing.assert_allclose(block(x), middle + mlp(norm(middle)), atol=1e-5)
    middle = x + norm(attention(norm(x)))
    block = TransformerBlock(attention, mlp, 16, post_norms=True)
    np.testing.assert_allclose(block(x), middle + norm(mlp(norm(middle))), atol=1e-5)


def test_linear_takes_another_dot_general():
    layer, calls = make(16, 4), []

    def counting(*args, **kwargs):
        calls.append(args[1].shape)
        return jax.lax.dot_general(*args, **kwargs)

    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(layer, name).dot_general = counting
    layer(inputs())
    assert calls == [(16, 16)] * 4
