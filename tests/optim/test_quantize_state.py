"""8-bit optimiser states: codes, bytes, composition, checkpoints, sharding, and Adam's path."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import checkpoint
from jaxeff.optim import quantize_state, state_bytes
from jaxeff.optim.quantize_state import CODECS, QuantizedState, _encode, dynamic_map

PARAMS = {"w": jnp.ones((64, 128)), "v": jnp.full((32, 192), 0.5), "b": jnp.zeros(8)}


def _gradients(step, params=PARAMS):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(params))
    return {
        name: jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, params.items(), strict=True)
    }


def _is_coded(leaf):
    return isinstance(leaf, QuantizedState)


@pytest.mark.parametrize("codec", ["dynamic8", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("squares", [False, True])
def test_coding_is_unbiased_and_close(codec, squares):
    x = jax.random.normal(jax.random.key(1), (4, 512)) * jnp.logspace(-4, 1, 4)[:, None]
    x = jnp.square(x) if squares else x
    keys = jax.random.split(jax.random.key(2), 400)
    draws = jax.jit(jax.vmap(lambda key: _encode(x, codec, squares, 256, key).dequantize()))(keys)
    error = np.abs(np.asarray(draws.mean(0) - x))
    # What lies below the smallest code of a block is raised to it on purpose; leave that out. The
    # last term: neighbours are at most 32/448 of the block's largest value apart, and a chance of
    # a few in 400 may not have come up at all.
    block = np.abs(np.asarray(x)).reshape(4, 2, 256).max(-1).repeat(256, -1).reshape(4, 512)
    large = np.abs(x) > 1e-3 * block if squares else np.ones_like(block, bool)
    spread = np.asarray(draws.std(0)) / np.sqrt(len(keys))
    assert (error < 5 * spread + 1e-5 * block + 12 / 400 / 14 * block)[large].all()
    bias = np.where(large, np.asarray(draws.mean(0) - x), 0) / block
    assert abs(bias.sum()) < 5 * np.sqrt(np.square(spread / block).sum()) + 1e-4
    nearest = _encode(x, codec, squares, 256, None).dequantize()
    relative = float(jnp.linalg.norm(nearest - x) / jnp.linalg.norm(x))
    assert relative < {"dynamic8": 0.02, "int8": 0.02, "fp8_e4m3": 0.08}[codec], relative
    if squares:
        assert (np.asarray(draws)[:, np.asarray(x) > 0] > 0).all(), "it is divided by"
    assert jnp.isnan(_encode(x.at[0, 3].set(jnp.nan), codec, squares, 256, None).dequantize()[0, 0])


def test_dynamic_map():
    for signed in (True, False):
        values = dynamic_map(signed)
        assert len(np.unique(values)) == 256 and 0 in values and values[-1] == 1
        in_top = ((values > 0.1) & (values < 1)).sum()
        assert in_top == (64 if signed else 128)
        exact = _encode(jnp.asarray(values), "dynamic8", not signed, 256, jax.random.key(0))
        np.testing.assert_array_equal(exact.dequantize(), values)
        low = _encode(jnp.asarray(values - (values == 1)), "dynamic8", not signed, 256, None)
        np.testing.assert_allclose(low.dequantize()[0], values[0], rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_and_shapes(codec):
    large = {"a": jnp.ones((256, 704)), "b": jnp.ones((4, 8, 16, 32)), "c": jnp.ones((64, 1024))}
    plain = jax.eval_shape(optax.adam(1e-3).init, large)
    coded = jax.eval_shape(quantize_state(optax.adam(1e-3), codec).init, large)
    assert state_bytes(coded.inner) <= 0.27 * state_bytes(plain)
    codes = coded.inner[0].mu["a"].codes
    assert codes.shape == (256, 704) and codes.dtype.itemsize == 1
    kept = jax.eval_shape(quantize_state(optax.adam(1e-3), codec, min_size=10**6).init, large)
    assert not any(map(_is_coded, jax.tree.leaves(kept, is_leaf=_is_coded)))


def _run(transform, steps=3, params=PARAMS):
    state = jax.jit(transform.init)(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(steps):
        params, state = step(params, state, _gradients(index, params))
    return params, state


def test_composes(tmp_path):
    """chain, masked, MultiSteps, inject_hyperparams together; orbax brings back the same bits."""
    inner = quantize_state(optax.adamw(1e-2), "dynamic8")
    only_w = optax.masked(inner, {"w": True, "v": False, "b": False})

    def make(learning_rate):
        return optax.chain(optax.clip_by_global_norm(1.0), only_w, optax.scale(learning_rate))

    transform = optax.MultiSteps(
        optax.inject_hyperparams(make)(learning_rate=1.0), every_k_schedule=2
    )
    params, state = _run(transform, steps=4)
    plain = optax.MultiSteps(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.masked(optax.adamw(1e-2), {"w": True, "v": False, "b": False}),
        ),
        every_k_schedule=2,
    )
    expected, _ = _run(plain, steps=4)
    for name in PARAMS:
        moved = np.abs(np.asarray(expected[name] - PARAMS[name])).max()
        close = np.abs(np.asarray(params[name] - expected[name])) < 0.3 * moved
        assert close.mean() > 0.95 and moved > 0
    checkpoint.save(tmp_path / "c", state)
    like = jax.tree.map(jnp.zeros_like, state)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(tmp_path / "c", like), state)


@pytest.mark.multidevice
def test_sharded_equals_single_device():
    """fsdp and tensor sharding: codes keep the leaf's sharding, and the same numbers are drawn."""
    params = {"w": jax.random.normal(jax.random.key(1), (64, 512))}
    transform = quantize_state(optax.adam(1e-2))
    expected, state = _run(transform, params=params)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    split = {"w": jax.device_put(params["w"], sharding)}
    got, split_state = _run(transform, params=split)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5, atol=1e-6)
    codes = split_state.inner[0].mu["w"].codes
    assert codes.sharding.is_equivalent_to(sharding, 2)
    squares = [np.asarray(one.inner[0].nu["w"].codes) for one in (state, split_state)]
    assert (squares[0] == squares[1]).mean() > 0.999


def test_follows_adam_over_2000_steps():
    """Noisy regression of one layer: final loss within 0.5 % of float32 Adam's."""
    x = jax.random.normal(jax.random.key(0), (512, 64))
    target = jnp.tanh(x @ jax.random.normal(jax.random.key(1), (64, 64)) / 8)
    noise = 0.3 * jax.random.normal(jax.random.key(2), target.shape)
    start = jax.random.normal(jax.random.key(3), (64, 64)) / 8

    def loss_of(params, rows):
        return jnp.square(jnp.tanh(x[rows] @ params) - (target + noise)[rows]).mean()

    def train(transform):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (32,), 0, 512)
            updates, state = transform.update(jax.grad(loss_of)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(5), 2000)
        (params, _), _ = jax.lax.scan(step, (start, transform.init(start)), keys)
        return loss_of(params, jnp.arange(512))

    rate = optax.cosine_decay_schedule(3e-3, 2000)
    plain = float(jax.jit(lambda: train(optax.adam(rate)))())
    for codec in ("dynamic8", "fp8_e4m3"):
        coded = float(jax.jit(lambda: train(quantize_state(optax.adam(rate), codec)))())  # noqa: B023
        assert abs(coded / plain - 1) < 0.005, (codec, coded, plain)


def test_refused():
    for options, message in (
        ({"codec": "fp4"}, "codec must be one of"),
        ({"block": 32}, "block must be at least 64, got 32"),
        ({"min_size": 0}, "min_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_state(optax.adam(1e-3), **options)


class Projections(NamedTuple):
    q: jax.Array
    v: jax.Array


def test_squares_are_told_from_parameters_and_other_fields():
    """A parameter may be called v; SM3's nu and Adan's v are signed, Adan's n is not."""
    params = Projections(jnp.ones((64, 64)), jnp.ones((64, 64)))

    def codecs(state):
        return jax.tree.map(lambda leaf: getattr(leaf, "codec", None), state, is_leaf=_is_coded)

    adam = codecs(quantize_state(optax.scale_by_adam(), "int8").init(params).inner)
    assert set(adam.mu) == {"int8"} and set(adam.nu) == {"dynamic8_unsigned"}
    adan = codecs(quantize_state(optax.adan(1.0)).init(params.q).inner)[0]
    sm3 = codecs(quantize_state(optax.sm3(1.0)).init(params.q).inner)[0]
    assert (adan.m, adan.v, adan.n) == ("dynamic8", "dynamic8", "dynamic8_unsigned")
    assert sm3.nu == "dynamic8"
