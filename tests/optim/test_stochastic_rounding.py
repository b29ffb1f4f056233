"""bfloat16 parameters that move by less than their spacing, and the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff.optim import in_float32, sr_apply_updates, stochastic_round_updates, warmup_cosine


def test_small_updates_survive():
    """100 updates of 2⁻¹² at 1: rounding to nearest stays at 1, ours moves by 100 · 2⁻¹²."""
    params = {"w": jnp.ones((50, 40), jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    transform = optax.chain(optax.sgd(2.0**-12), stochastic_round_updates(seed=1))
    state = transform.init(params)

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    assert step._cache_size() == 1 and params["w"].dtype == jnp.bfloat16
    expected = 1 - 100 * 2.0**-12
    error = np.asarray(params["w"], np.float32) - expected
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
    np.testing.assert_allclose(params["b"], expected, rtol=1e-6)


def test_transform_equals_sr_apply_updates():
    params = {"w": jax.random.normal(jax.random.key(0), (64,), jnp.bfloat16)}
    updates = {"w": jax.random.normal(jax.random.key(1), (64,)) * 1e-2}
    transform = stochastic_round_updates(seed=4)
    moved, state = transform.update(updates, transform.init(params), params)
    key = jax.random.fold_in(jax.random.key(4, impl="threefry2x32"), 0)
    direct = sr_apply_updates(params, updates, key)
    np.testing.assert_array_equal(optax.apply_updates(params, moved)["w"], direct["w"])
    again, _ = transform.update(updates, state, params)
    assert (again["w"] != moved["w"]).any(), "the next step draws other numbers"


def test_float32_state():
    params = jnp.full(4, 100.0, jnp.bfloat16)
    transform = in_float32(optax.adamw(1e-2))
    state = transform.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}
    updates, _ = transform.update(jnp.ones_like(params), state, params)
    assert updates.dtype == jnp.float32


def test_needs_params():
    transform = stochastic_round_updates()
    with pytest.raises(ValueError, match="needs params"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="updates have structure"):
        sr_apply_updates({"a": jnp.ones(1)}, {"b": jnp.ones(1)}, jax.random.key(0))


def test_schedule():
    schedule = warmup_cosine(1.0, 110, warmup_steps=10, final_fraction=0.2)
    got = [float(schedule(step)) for step in (0, 4, 9, 10, 60, 110, 500)]
    np.testing.assert_allclose(got, [0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2], rtol=1e-6)
    assert float(warmup_cosine(2.0, 10)(0)) == 2.0
