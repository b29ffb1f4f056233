"""The noise monitor against known noise, its switch, and the schedule that follows it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import checkpoint
from jaxeff.optim import is_due, monitor_gradient_noise, qaf_schedule, warmup_cosine

SIGNAL = {"a": jnp.full((50, 100), 2.0), "b": jnp.full(5000, 0.5)}


def _noisy(seed, deviation=4.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        name: leaf + deviation * jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, SIGNAL.items(), strict=True)
    }


def test_two_key_and_reference_ratios():
    """|g| / (s √d) with s = 4: both estimators, globally and for each leaf."""
    monitor = monitor_gradient_noise(every=1)
    state = monitor.init(SIGNAL)
    first, second = _noisy(0), _noisy(1)
    exact = math.sqrt((4 + 0.25) / 2) / 4
    updates, by_pair = monitor.update(first, state, noisy_pair=(first, second))
    assert updates is first
    _, by_reference = monitor.update(first, state, reference=SIGNAL)
    for measured in (by_pair, by_reference):
        assert abs(float(measured.ratio) / exact - 1) < 0.1
        assert abs(float(measured.per_leaf["a"]) / 0.5 - 1) < 0.1
        assert bool(measured.below) and int(measured.crossed_at) == 0
    _, population = monitor.update(
        first, state, noisy_pair=(first, second), signal_pair=(_noisy(2), SIGNAL)
    )
    assert abs(float(population.ratio) / exact - 1) < 0.1
    _, silent = monitor.update(first, state, noisy_pair=(first, first))
    assert float(silent.ratio) == 1e6 and not silent.below


def test_every_average_and_crossing(tmp_path):
    monitor = monitor_gradient_noise(ema=0.5, every=2)
    transform = optax.chain(monitor, optax.sgd(0.1))
    state = transform.init(SIGNAL)

    @jax.jit
    def step(state, deviation):
        noisy = jax.tree.map(lambda leaf: leaf + deviation, SIGNAL)
        return transform.update(noisy, state, reference=SIGNAL)[1]

    due = []
    for deviation in (0.5, 100.0, 0.5, 100.0, 100.0):
        due.append(bool(is_due(state[0], 2)))
        state = step(state, deviation)
    assert due == [True, False, True, False, True] and step._cache_size() == 1
    ratio = math.sqrt((4 + 0.25) / 2)
    assert int(state[0].num_measured) == 3 and int(state[0].count) == 5
    expected = 0.5 * ratio / 0.5 + 0.5 * ratio / 100
    assert abs(float(state[0].ratio_ema) / expected - 1) < 1e-4
    assert int(state[0].crossed_at) == 4 and bool(state[0].below)
    assert int(step(state, 0.5)[0].crossed_at) == 4, "the first crossing stays"
    checkpoint.save(tmp_path / "c", state)
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoint.restore(tmp_path / "c", jax.tree.map(jnp.zeros_like, state)),
        state,
    )


def test_without_arguments_nothing_is_measured():
    transform = optax.MultiSteps(
        optax.chain(optax.masked(monitor_gradient_noise(), {"a": True, "b": False})), 2
    )
    state = transform.init(SIGNAL)
    _, state = transform.update(SIGNAL, state)
    _, state = transform.update(SIGNAL, state)
    inner = state.inner_opt_state[0].inner_state
    assert int(inner.count) == 1 and int(inner.num_measured) == 0 and int(inner.crossed_at) == -1
    monitor = monitor_gradient_noise()
    with pytest.raises(ValueError, match="noisy_pair or reference, not both"):
        monitor.update(SIGNAL, monitor.init(SIGNAL), noisy_pair=(SIGNAL, SIGNAL), reference=SIGNAL)
    with pytest.raises(ValueError, match="signal_pair needs noisy_pair"):
        monitor.update(SIGNAL, monitor.init(SIGNAL), signal_pair=(SIGNAL, SIGNAL))
    for options, message in (
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"every": 0}, "every must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor_gradient_noise(**options)


def test_schedule_starts_again_where_the_monitor_says():
    base = warmup_cosine(1.0, 100)
    rate = jax.jit(
        lambda step, start: qaf_schedule(base, start, steps=20, peak=0.3, warmup_steps=4)(step)
    )
    assert float(rate(30, -1)) == float(base(30)) == float(rate(30, 31))
    got = [float(rate(step, 30)) for step in (30, 33, 50, 80)]
    np.testing.assert_allclose(got, [0.075, 0.3, 0, 0], atol=1e-7)
    assert rate._cache_size() == 1


def test_a_gradient_that_is_not_finite_is_left_out():
    monitor = monitor_gradient_noise(every=1)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), SIGNAL)
    _, state = monitor.update(broken, monitor.init(SIGNAL), reference=SIGNAL)
    assert not state.below and int(state.crossed_at) == -1 and int(state.num_measured) == 0
    _, state = monitor.update(SIGNAL, state, noisy_pair=(broken, broken))
    assert int(state.num_measured) == 0 and int(state.count) == 2


def test_inside_masked_and_partition():
    """The extra arguments are not masked by optax."""
    first, second = _noisy(0), _noisy(1)
    for outer in (
        optax.masked(monitor_gradient_noise(every=1), {"a": True, "b": False}),
        optax.partition(
            {"x": monitor_gradient_noise(every=1), "y": optax.identity()}, {"a": "x", "b": "y"}
        ),
    ):
        state = outer.init(SIGNAL)
        for extra in ({"noisy_pair": (first, second)}, {"reference": SIGNAL}):
            _, new = outer.update(first, state, **extra)
            ratios = [leaf for leaf in jax.tree.leaves(new) if leaf.dtype == jnp.float32]
            assert len(ratios) == 3  # all, average, and of "a"
            np.testing.assert_allclose(ratios, 0.5, rtol=0.1)


def test_schedule_needs_a_function():
    with pytest.raises(ValueError, match="base must be a function of the step, got 0.1"):
        qaf_schedule(0.1, 3, steps=50, peak=0.5)
