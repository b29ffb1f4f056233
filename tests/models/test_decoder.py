import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.kv_cache import DenseCache
from jaxeff.models import Decoder, ModelConfig
from jaxeff.models import decoder as decoder_module
from jaxeff.nn import RopeConfig

SMALL = {"vocab_size": 32, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2}


@nnx.jit
def run(model, ids, **options):
    return model(ids, **options)


def make(config=None, **options):
    config = ModelConfig.llama(**SMALL) if config is None else config
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def tokens(batch=2, length=6, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 32, jnp.int32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_future_tokens_change_nothing(family):
    model = make(getattr(ModelConfig, family)(**SMALL))
    ids = (tokens(), tokens().at[:, 4:].set(3))
    first, second = (run(model, t) for t in ids)
    np.testing.assert_allclose(first[:, :4], second[:, :4], atol=1e-6)
    assert not np.allclose(first[:, 4:], second[:, 4:])


def test_a_window_forgets():
    config = ModelConfig.llama(**SMALL | {"num_layers": 1}, layer_windows=(2,))
    model = make(config)
    changed = tokens().at[:, 0].add(1) % 32
    np.testing.assert_allclose(run(model, tokens())[:, 2:], run(model, changed)[:, 2:], atol=1e-6)
    assert not np.allclose(run(model, tokens())[:, 1], run(model, changed)[:, 1])


def test_abstract_init_has_the_same_shapes_and_allocates_nothing():
    config = ModelConfig.llama(
        vocab_size=128256, num_layers=2, embed_dim=4096, num_heads=32, num_kv_heads=8
    )
    model = nnx.eval_shape(lambda: make(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    kernels = [
        param.get_value().shape
        for key, param in nnx.to_flat_state(nnx.state(model))
        if key[-1] == "kernel"
    ]
    assert (4096, 1024) in kernels
    assert all(len(shape) == 2 for shape in kernels)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    assert nnx.eval_shape(lambda m, t: m(t), model, ids).shape == (1, 8, 128256)


def test_gradients_reach_every_parameter():
    model = make(ModelConfig.gemma3(**SMALL))

    def loss(model):
        logits = model(tokens())
        return -jnp.mean(jax.nn.log_softmax(logits[:, :-1])[..., 1])

    grads = nnx.jit(nnx.grad(loss))(model)
    for key, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad.get_value()).all(), key
        assert np.any(grad.get_value() != 0), key


def test_jit_compiles_once_per_shape():
    graphdef, state = nnx.split(make())
    step = jax.jit(lambda state, ids, cache: nnx.merge(graphdef, state)(ids, cache=cache))
    cache = DenseCache.init_for(ModelConfig.llama(**SMALL), 2, 8, dtype=jnp.float32)
    for t in range(4):
        _, cache = step(state, tokens()[:, t : t + 1], cache)
    assert step._cache_size() == 1


def test_attention_function_per_call_and_per_layer():
    calls = []

    def named(name):
        def fn(query, key, value, **arguments):
            calls.append(name)
            return jax.nn.dot_product_attention(query, key, value, **arguments)

        return fn

    want = run(make(), tokens())
    model = make(attention_fn=named("init"))
    np.testing.assert_allclose(model(tokens()), want, atol=1e-5)
    model(tokens(), attention_fn=named("call"))
    model(tokens(), attention_fn=[named("first"), named("second")])
    make(attention_fn=(named("a"), named("b")))(tokens())
    assert calls == ["init", "init", "call", "call", "first", "second", "a", "b"]


def test_results_that_are_asked_for():
    model = make()
    cache = DenseCache.init_for(model, 2, 6, dtype=jnp.float32)
    logits, new, hidden = nnx.jit(lambda m, t, c: m(t, cache=c, return_hidden=True))(
        model, tokens(), cache
    )
    assert logits.shape == (2, 6, 32)
    assert new.seen.tolist() == [6, 6]
    assert [h.shape for h in hidden] == [(2, 6, 16)] * 2
    np.testing.assert_allclose(model.logits(hidden[-1]), logits, atol=1e-5)
    np.testing.assert_allclose(run(model, tokens()), logits, atol=1e-5)


def test_padding_takes_no_position():
    model = make()
    ids = tokens(1)
    padded = jnp.concatenate((jnp.full((1, 2), 99), ids), axis=1)  # no id of the vocabulary
    valid = jnp.array([[False] * 2 + [True] * 6])
    want, explicit = run(model, ids), jnp.maximum(jnp.arange(-2, 6)[None], 0)
    got = run(model, padded, valid=valid)[:, 2:]
    np.testing.assert_allclose(got, want, atol=1e-5)
    got = run(model, padded, valid=valid, positions=explicit)[:, 2:]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_soft_cap_bounds_the_logits():
    config = dataclasses.replace(ModelConfig.llama(**SMALL), final_logit_soft_cap=0.01)
    plain, capped = run(make(), tokens()), run(make(config), tokens())
    np.testing.assert_allclose(capped, 0.01 * jnp.tanh(plain / 0.01), atol=1e-6)


def test_first_predictions_are_near_uniform():
    logits = run(make(ModelConfig.llama(**SMALL | {"embed_dim": 64})), tokens())
    loss = -jnp.mean(jax.nn.log_softmax(logits))
    assert float(loss) == pytest.approx(np.log(32), abs=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(jnp.ones((2, 3))), r"tokens are float32 of shape \(2, 3\); expected an int"),
        (lambda m: m(jnp.arange(3)), r"tokens are int32 of shape \(3,\); expected an integer"),
        (lambda m: m([[1, 2]]), r"tokens are list; expected an integer array \[B, T\]"),
        (lambda m: m(jnp.zeros((1, 0), int)), "at least one row and one token"),
        (lambda m: m(jnp.array([[1, 32]])), "tokens range from 1 to 32; expected ids from 0 to 31"),
        (lambda m: m(np.array([[-1, 3]])), "tokens range from -1 to 3"),
        (lambda m: m(tokens(), valid=jnp.ones((2, 6))), "valid is float32 .*; expected bool of"),
        (lambda m: m(tokens(), valid=True), r"valid is bool; expected bool of the tokens' shape"),
        (
            lambda m: m(tokens(), positions=jnp.arange(6)),
            r"positions is int32 of shape \(6,\); expected integer of the tokens' shape \(2, 6\)",
        ),
        (lambda m: m(tokens(), attention_fn=[1, 2, 3]), "attention_fn has 3 entries; .* layer .2"),
        (
            lambda m: m(tokens(), cache=DenseCache.init(3, 2, 8, 2, 4)),
            "cache has 3 layers; the model has 2",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(attention_fn=jax.nn.dot_product_attention))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; expected an integer, at least 1"),
        ({"num_layers": 2.0}, "num_layers is 2.0; expected an integer"),
        ({"embed_dim": 18}, "embed_dim 18 is not a multiple of num_heads 4; give head_dim"),
        ({"head_dim": 5}, "head_dim is 5; RoPE needs an even number"),
        ({"num_kv_heads": 3}, r"num_kv_heads is 3; num_heads \(4\) must be a multiple of it"),
        ({"layer_windows": (1,)}, r"layer_windows has 1 entries; expected one per layer \(2\)"),
        ({"layer_windows": (1, 0)}, r"layer_windows\[1\] is 0; expected an integer, at least 1"),
        ({"activation": "mish"}, "activation is 'mish'; expected one of silu, gelu, gelu_tanh"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; expected a finite number above 0"),
        ({"query_scale": float("nan")}, "query_scale is nan; expected a finite number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; expected an integer"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.llama(**SMALL | fields)


def test_config_round_trip_through_plain_data():
    import json

    config = ModelConfig.gemma3(**SMALL, rope=RopeConfig(1e6, "linear", 8.0))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))
    with pytest.raises(ValueError, match=r"model config lacks the fields embed_dim, head_dim$"):
        ModelConfig.from_dict({k: v for k, v in SMALL.items() if k != "embed_dim"} | {"mlp_dim": 8})


@pytest.mark.parametrize("count", [64, 2048])
def test_gradient_of_the_embedding_is_summed_in_float32(count):
    """Ten thousand tokens of one id in bfloat16, where a sum of ones would stop at 256."""
    embed = decoder_module._Embedding(count, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens = jnp.full((2, 5000), 3)
    graph, params = nnx.split(embed)
    loss = lambda params: nnx.merge(graph, params)(tokens).astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.grad(loss)(params).embedding[...]
    assert gradient.dtype == jnp.float32
    assert gradient[3].tolist() == [10_000.0] * 4 and float(gradient.sum()) == 40_000.0
