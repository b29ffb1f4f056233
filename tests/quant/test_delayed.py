"""Delayed scaling: TransformerEngine's rules, explicit state, its way through a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff import train
from jaxeff.quant import (
    RECIPES,
    AmaxHistory,
    DelayedScaling,
    advance_history,
    apply_recipe,
    dot_general,
    init_history,
)
from pallas_kernels.formats import number_type, round_to

PLAIN = (((1,), (0,)), ((), ()))
RECIPE = dataclasses.replace(RECIPES["fp8_delayed"], delayed=DelayedScaling(4, margin=1))


def _operands(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (16, 32)) * (1 + seed),
        jax.random.normal(keys[1], (32, 48)) * 0.1,
        jax.random.normal(keys[2], (16, 48)) * 1e-3,
    )


def _outputs(recipe):
    @jax.jit
    def run(x, w, d, history):
        product = lambda x, w, h: dot_general(recipe, amax_history=h)(x, w, PLAIN)  # noqa: E731
        z, pullback = jax.vjp(product, x, w, history)
        return z, *pullback(d)

    return run


@pytest.mark.parametrize("execution", ["emulate", "native"])
def test_scales_come_from_earlier_steps(execution):
    """Three steps by hand: scale = max / amax / 2 out of the history, 1 at first, saturating."""
    run = _outputs(dataclasses.replace(RECIPE, execution=execution))
    history, seen_by_hand = init_history(RECIPE), []
    kinds = [number_type(name) for name in ("e4m3", "e4m3", "e5m2")]
    for step in range(3):
        values = _operands(step)
        rounded = []
        for tensor, (value, kind) in enumerate(zip(values, kinds, strict=True)):
            before = [amax[tensor] for amax in seen_by_hand]
            scale = np.float32(kind.max) / max(before) / 2 if before else np.float32(1)
            rounded.append(np.asarray(round_to(value * scale, kind)) / scale)
        x, w, d = rounded
        got = run(*values, history)
        for one, other in zip(got[:3], (x @ w, d @ w.T, x.T @ d), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * np.abs(other).max())
        amax = [float(jnp.abs(value).max()) for value in values]
        np.testing.assert_allclose(got[3][:, 0], amax, rtol=1e-6)
        assert not got[3][:, 1:].any()
        seen_by_hand.append(amax)
        history = advance_history(history, got[3])
    np.testing.assert_allclose(history[:, :3], np.array(seen_by_hand[::-1]).T, rtol=1e-6)


def test_most_recent_and_bad_steps():
    recent = dataclasses.replace(RECIPE, delayed=DelayedScaling(4, algorithm="most_recent"))
    x, w, d = _operands(0)
    history = jnp.float32([[1, 100, 0, 0]] * 3)
    z = _outputs(recent)(x, w, d, history)[0]
    scale = np.float32(448)
    expected = np.asarray(round_to(x * scale, number_type("e4m3"))) / scale
    weight = np.asarray(round_to(w * scale, number_type("e4m3"))) / scale
    np.testing.assert_allclose(z, expected @ weight, rtol=1e-5, atol=1e-5)
    history = advance_history(history, jnp.full_like(history, jnp.inf))
    assert history[:, 0].tolist() == [0, 0, 0] and history[:, 1].tolist() == [1, 1, 1]


def test_refused():
    with pytest.raises(ValueError, match="needs amax_history=init_history"):
        dot_general("fp8_delayed")
    with pytest.raises(ValueError, match="has no delayed scaling, but amax_history was given"):
        dot_general("fp8_current", amax_history=jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"amax_history must be \[3, 4\], got \[3, 5\]"):
        dot_general(RECIPE, amax_history=jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match="has no delayed scaling, so no history"):
        init_history(RECIPES["fp8_current"])
    with pytest.raises(ValueError, match="delayed scaling needs fp8_e4m3 or fp8_e5m2"):
        dataclasses.replace(RECIPES["fp4_rtn"], delayed=DelayedScaling())
    with pytest.raises(ValueError, match="history_length must be at least 1"):
        DelayedScaling(0)


class Tiny(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs)])
        self.lm_head = nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.lm_head(x + self.layers[0](x))


@pytest.mark.multidevice
def test_training_advances_the_history_also_when_sharded():
    config = train.TrainConfig(steps=3, learning_rate=1e-2, warmup_steps=0)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    histories = []
    for sharding in (None, data):
        model = Tiny()
        apply_recipe(model, RECIPE)
        result = train.fit(model, [tokens] * 3, config, sharding=sharding, progress=False)
        assert result.losses[-1] < result.losses[0]
        (history,) = jax.tree.leaves(nnx.state(model, AmaxHistory))
        histories.append(np.asarray(history))
    assert (histories[0][:, :3] > 0).all() and not histories[0][:, 3:].any()
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-5)
    before = np.asarray(histories[0])
    model(tokens)
    np.testing.assert_array_equal(jax.tree.leaves(nnx.state(model, AmaxHistory))[0], histories[1])
    assert before.shape == (3, 4)
