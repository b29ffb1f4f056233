"""Putting recipes into NNX models: which layers get them, and where their randomness comes from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxeff.quant import (
    RECIPES,
    QuantizedDot,
    SRKey,
    apply_recipe,
    dot_general,
    fold_step,
    quantized_einsum,
    set_phase,
)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, num_layers=3, width=16, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(8, width, rngs=rngs)
        self.layers = nnx.List([Block(width, rngs) for _ in range(num_layers)])
        self.lm_head = nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = jnp.arange(32).reshape(2, 16) % 8
BLOCK_PATHS = [f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")]


def _loss(model):
    return model(TOKENS).astype(jnp.float32).var()


def test_default_rules():
    model = Model()
    plan = apply_recipe(model, "fp4_all_the_way")
    assert plan == dict.fromkeys(BLOCK_PATHS, "fp4_all_the_way") | {"lm_head": "bf16"}
    assert model.lm_head.dot_general is lax.dot_general
    assert isinstance(model.layers[0].up.dot_general, QuantizedDot)


def test_rules_and_exemptions():
    model = Model()
    rules = [(r"lm_head", "mxfp8"), (r"layers\.1\.", None), (r"layers\.2\.up", RECIPES["fp4_sr"])]
    plan = apply_recipe(model, "fp4_rtn", rules=rules)
    assert plan["lm_head"] == "mxfp8", "a rule stands above the built-in exemption"
    assert plan["layers.1.up"] == plan["layers.1.down"] == "bf16"
    assert plan["layers.2.up"] == "fp4_sr" and plan["layers.2.down"] == "fp4_rtn"


def test_keep_last():
    plan = apply_recipe(Model(), "nvidia_nvfp4")
    plain = {name for name, recipe in plan.items() if recipe == "bf16"}
    assert plain == {"layers.2.up", "layers.2.down", "lm_head"}
    plan = apply_recipe(Model(), "nvidia_nvfp4", keep_last=0.5)
    assert plan["layers.0.up"] == "nvidia_nvfp4" and plan["layers.1.up"] == "bf16"
    plan = apply_recipe(Model(), "nvidia_nvfp4", keep_last=0.0)
    assert plan["layers.2.down"] == "nvidia_nvfp4"


def test_bad_rules():
    with pytest.raises(
        ValueError, match=r"rule 'attention' matches no linear layer; the paths are"
    ):
        apply_recipe(Model(), "fp4_rtn", rules=[("attention", None)])
    with pytest.raises(ValueError, match=r"layer 'layers.0.up' is matched by 2 rules"):
        apply_recipe(Model(), "fp4_rtn", rules=[(r"\.up", None), (r"layers\.0", "mxfp8")])
    with pytest.raises(ValueError, match="recipe must be one of"):
        apply_recipe(Model(), "fp5")
    with pytest.raises(ValueError, match="recipe must be one of"):
        apply_recipe(Model(), "fp4_rtn", rules=[("up", "fp5")])
    with pytest.raises(ValueError, match=r"keep_last must lie in \[0, 1\), got 2"):
        apply_recipe(Model(), "fp4_rtn", keep_last=2)
    with pytest.raises(ValueError, match=r"Embed has no nnx\.Linear layer"):
        apply_recipe(Model().embed, "fp4_rtn")
    with pytest.raises(ValueError, match="needs numbered blocks in the module paths"):
        apply_recipe(Block(16, nnx.Rngs(0)), "nvidia_nvfp4")
    model = Model()
    model.layers[1].up.dot_general = dot_general("mxfp8")
    with pytest.raises(ValueError, match=r"layer 'layers.1.up' already has its own dot_general"):
        apply_recipe(model, "fp4_rtn")
    assert model.layers[0].up.dot_general is lax.dot_general, "a refused call changes nothing"


def test_einsum_layer():
    class WithEinsum(nnx.Module):
        def __init__(self):
            self.mix = nnx.Einsum("ta,anh->tnh", (16, 2, 8), rngs=nnx.Rngs(0))
            self.out = nnx.Linear(16, 4, rngs=nnx.Rngs(1))

    model = WithEinsum()
    assert apply_recipe(model, "fp4_rtn") == {"mix": "fp4_rtn", "out": "fp4_rtn"}
    x, kernel = jax.random.normal(jax.random.key(0), (4, 16)), model.mix.kernel[...]
    expected = quantized_einsum("ta,anh->tnh", x, kernel, "fp4_rtn")
    np.testing.assert_array_equal(model.mix(x), expected)
    assert (model.mix(x) != jnp.einsum("ta,anh->tnh", x, kernel)).any()
    assert apply_recipe(model, "fp4_sr", rules=[("mix", None)])["out"] == "fp4_sr"
    np.testing.assert_array_equal(model.mix(x), jnp.einsum("ta,anh->tnh", x, kernel))


def test_small_native_products_are_warned_of():
    native = dataclasses.replace(RECIPES["fp8_current"], execution="native")
    with pytest.warns(UserWarning, match=r"6 layers with real FP8 products .* below 2048"):
        apply_recipe(Model(), native)


def test_phase_is_a_switch_without_recompilation():
    model, forward_only, plain = Model(num_layers=1), Model(num_layers=1), Model(num_layers=1)
    recipe = RECIPES["fp4_all_the_way"].with_qaf("backward")
    apply_recipe(model, recipe)
    apply_recipe(forward_only, recipe.after_switch())
    apply_recipe(plain, "fp4_all_the_way")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(rest, step):
        rest = set_phase(rest, step >= 3)
        return jax.grad(lambda params: _loss(nnx.merge(graph, params, rest)))(params)

    for step, other in ((2, plain), (3, forward_only)):
        expected = nnx.jit(nnx.grad(_loss))(other)
        got = gradient(rest, step)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), got, expected
        )
    assert gradient._cache_size() == 1


def test_identity_is_bitwise_and_undoes():
    model, plain = Model(), Model()
    apply_recipe(model, "fp4_all_the_way")
    assert float(_loss(model)) != float(_loss(plain))
    apply_recipe(model, "bf16")
    np.testing.assert_array_equal(model(TOKENS), plain(TOKENS))
    grads = [nnx.grad(_loss)(one) for one in (model, plain)]
    jax.tree.map(np.testing.assert_array_equal, *grads)
    assert not jax.tree.leaves(nnx.state(model, SRKey))


def test_parameters_are_untouched():
    model, plain = Model(), Model()
    apply_recipe(model, "fp4_all_the_way")
    params = [nnx.state(one, nnx.Param) for one in (model, plain)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_keys_and_steps():
    model = Model()
    apply_recipe(model, "fp4_all_the_way", seed=5)
    keys = {tuple(np.asarray(leaf)) for leaf in jax.tree.leaves(nnx.state(model, SRKey))}
    assert len(keys) == 6, "every layer has its own key"
    again, partly = Model(), Model()
    apply_recipe(again, "fp4_all_the_way", seed=5)
    apply_recipe(partly, "fp4_all_the_way", seed=5, rules=[(r"layers\.0\.up", None)])
    state, same = nnx.state(model, SRKey), nnx.state(again, SRKey)
    jax.tree.map(np.testing.assert_array_equal, state, same)
    np.testing.assert_array_equal(
        partly.layers[2].up.dot_general.key[...], model.layers[2].up.dot_general.key[...]
    )

    grad = nnx.jit(lambda model: nnx.grad(_loss)(model).layers[0].up.kernel[...])
    first = grad(model)
    np.testing.assert_array_equal(first, grad(again))
    assert (first != grad(fold_step(model, 1))).any()
    np.testing.assert_array_equal(first, grad(fold_step(model, 0)))


def test_fold_step_on_state_is_pure():
    model = Model()
    apply_recipe(model, "fp4_sr")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    folded = jax.jit(fold_step)(rest, jnp.int32(9))
    steps = {int(leaf[2]) for leaf in jax.tree.leaves(folded)}
    assert steps == {9} and {int(leaf[2]) for leaf in jax.tree.leaves(rest)} == {0}
    merged = nnx.merge(graph, params, folded)
    np.testing.assert_array_equal(merged(TOKENS), fold_step(model, 9)(TOKENS))
    assert fold_step({"a": jnp.ones(2)}, 3)["a"].sum() == 2


def test_projections_of_flax_attention():
    """``nnx.LinearGeneral`` has no product until it is called."""
    attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 16))
    plain = attention(x)
    plan = apply_recipe(attention, "fp4_rtn")
    assert set(plan) == {"query", "key", "value", "out"} and not np.allclose(attention(x), plain)
    apply_recipe(attention, "bf16")
    np.testing.assert_array_equal(attention(x), plain)
    attention.out.dot_general_cls = lambda: lax.dot_general
    with pytest.raises(ValueError, match="'out' already has its own dot_general_cls"):
        apply_recipe(attention, "fp4_rtn")


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def _stacked(rngs):
    return Block(16, rngs)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def _scanned(block, x):
    return block(x)


@pytest.mark.parametrize("name", ["fp4_sr", "fp8_delayed"])
def test_stacked_layers_have_a_state_each(name):
    blocks = _stacked(nnx.Rngs(0))
    apply_recipe(blocks, name)
    fold_step(blocks, 7)
    state = blocks.up.dot_general
    if name == "fp4_sr":
        key = np.asarray(state.key[...])
        assert key.shape == (3, 3) and len(set(key[:, 0])) == 3 and (key[:, 2] == 7).all()
    else:
        assert state.history.shape == (3, 3, 1024)
    x = expected = jax.random.normal(jax.random.key(1), (4, 16))
    graph, arrays = nnx.split(blocks)
    for index in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], arrays))
        expected = block(expected)
    np.testing.assert_allclose(_scanned(blocks, x), expected, rtol=1e-6, atol=1e-6)


def test_rules_that_are_no_rules():
    for rules in ("mlp", {"mlp": None}, [("mlp",)], [("(", None)]):
        with pytest.raises(ValueError, match="rules must be pairs|is no regular expression"):
            apply_recipe(Model(), "fp4_rtn", rules=rules)
