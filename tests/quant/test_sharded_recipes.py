"""Recipes under fsdp and tensor sharding, real 8-bit tiles, and peers from jax itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.nn import GatedMLP
from jaxeff.quant import RECIPES, apply_recipe, dot_general
from pallas_kernels import quantize

PLAIN = (((1,), (0,)), ((), ()))


def _operands(t=128, k=128, n=128):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (t, k))
    w = jax.random.normal(keys[1], (k, n)) * 0.1
    return x, w, jax.random.normal(keys[2], (t, n)) * 1e-3


@functools.partial(jax.jit, static_argnums=0)
def _run(recipe, x, w, d, key):
    key = key if recipe.needs_key else None
    z, pullback = jax.vjp(lambda x, w: dot_general(recipe, key)(x, w, PLAIN), x, w)
    return z, *pullback(d)


@pytest.mark.multidevice
@pytest.mark.parametrize("name", ["nvidia_nvfp4", "quartet", "quartet2"])
def test_sharded_equals_single_device(name):
    """Tokens over fsdp, weights over fsdp and tensor: the same numbers, random bits included."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    layouts = ("fsdp", None), ("fsdp", "tensor"), ("fsdp", "tensor")
    operands, key = _operands(), jax.random.key(2)
    split = [
        jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
        for value, axes in zip(operands, layouts, strict=True)
    ]
    got, expected = (_run(RECIPES[name], *values, key) for values in (split, operands))
    assert len(got[0].sharding.device_set) == 8
    for one, other in zip(got, expected, strict=True):
        scale = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * scale)


def test_native_fp8_block_multiplies_tiles():
    emulated = RECIPES["fp8_block"]
    native = dataclasses.replace(emulated, execution="native")
    operands, key = _operands(t=256, k=256), jax.random.key(0)
    for one, other in zip(
        _run(native, *operands, key), _run(emulated, *operands, key), strict=True
    ):
        scale = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * scale)
    text = _run.lower(native, *operands, key).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3 and all("f8E4M3FN" in line for line in products)


@pytest.mark.parametrize("name", ["mxfp8", "fp8_block"])
def test_forward_equals_jax_scaled_matmul(name):
    x, w, _ = _operands(t=64, k=256, n=128)
    recipe = RECIPES[name]
    if name == "fp8_block":  # the peer has scales along the contraction only
        recipe = dataclasses.replace(recipe, fwd_w=recipe.fwd_x)
    z = dot_general(recipe)(x, w, PLAIN)
    quant = recipe.fwd_x
    coded = [
        quantize(v, quant.format, axis=1, tile=quant.block, scale_rule=quant.scale_rule)
        for v in (x, w.T)
    ]
    codes = [value.qvalue[None] for value in coded]
    scales = [value.scale.astype(jnp.float32)[None] for value in coded]
    peer = jax.nn.scaled_matmul(*codes, *scales)[0]
    np.testing.assert_allclose(z, peer, rtol=1e-5, atol=1e-5 * np.abs(np.asarray(peer)).max())


def test_smooth_swiglu_is_the_same_function():
    from flax import nnx

    plain, smooth = (GatedMLP(32, 64, smooth=s, use_bias=True, rngs=nnx.Rngs(0)) for s in (0, 1))
    x = jax.random.normal(jax.random.key(0), (2, 16, 32))
    loss = lambda model, x: jnp.square(model(x)).mean()  # noqa: E731
    np.testing.assert_allclose(smooth(x), plain(x), rtol=1e-5, atol=1e-6)
    got, expected = (nnx.grad(loss)(model, x) for model in (smooth, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, expected)
    np.testing.assert_array_equal(smooth(jnp.zeros((1, 32))), plain(jnp.zeros((1, 32))))
    # One channel a thousand times the others, read by a small weight: it no longer hides them.
    for model in (smooth, plain):
        model.up_proj.kernel[...] = model.up_proj.kernel[...].at[:, 0].multiply(1000.0)
        model.down_proj.kernel[...] = model.down_proj.kernel[...].at[0].multiply(1e-3)
    exact, errors = plain(x), []
    for model in (smooth, plain):
        apply_recipe(model, "fp4_rtn", rules=[("gate|up", None)])
        errors.append(float(jnp.linalg.norm(model(x) - exact) / jnp.linalg.norm(exact)))
    assert errors[0] < 0.8 * errors[1], errors
