"""Metrics on cases small enough to do by hand."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.emergence import metrics, models


@pytest.mark.parametrize("name", ["fit", "metrics", "models", "sweep", "tasks", "theory"])
def test_docstring_examples(name):
    module = importlib.import_module(f"experiments.emergence.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_extremes():
    one, even = jnp.eye(5)[2], jnp.full(5, 0.2)
    assert float(metrics.entropy(one)) == 0 and float(metrics.effective_support(one)) == 1
    assert float(metrics.gini(one)) == pytest.approx(0.8)
    assert float(metrics.gini(even)) == pytest.approx(0, abs=1e-6)
    assert float(metrics.normalised_entropy(even, 5)) == pytest.approx(1)
    assert float(metrics.normalised_entropy(one, 1)) == 0
    assert float(metrics.effective_support(even)) == pytest.approx(5)


def test_induction_scores_of_ideal_heads():
    """k1 v1 k2 v2 q with the query's pair in slot 2: positions 2 (key) and 3 (value)."""
    copy = jnp.zeros((1, 1, 5, 5)).at[0, 0, 3, 2].set(1.0)
    select = jnp.zeros((1, 1, 5, 5)).at[0, 0, 4, 3].set(1.0)
    slot = jnp.array([[False, True]])
    assert [float(x[0]) for x in metrics.induction_scores(copy, slot, 4)] == [1, 0]
    assert [float(x[0]) for x in metrics.induction_scores(select, slot, 4)] == [0, 1]


def test_induction_scores_ignore_padding():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 3, 9, 9)))
    short = metrics.induction_scores(
        weights[:, :, :5, :5], jnp.array([[True, False], [False, True]]), 4
    )
    padding = jnp.array([[True, False, False, False], [False, True, False, False]])
    np.testing.assert_allclose(metrics.induction_scores(weights, padding, 4), short, rtol=1e-6)


def test_plateau_edges():
    assert metrics.plateau_length([0, 10], [0.05, 0.01], 0.1).length == 0
    found = metrics.plateau_length([0, 10, 20, 30], [0.5, 0.05, 0.4, 0.0], 0.1)
    assert 0 < found.length < 10  # the first crossing counts
    assert metrics.transition_width([0, 10], [0.5, 0.3], 0.45, 0.05) == float("inf")
    for steps, values, message in (
        ([0, 1], [0.1], "one length"),
        ([], [], "one length"),
        ([0, 0], [0.1, 0.2], "must increase"),
        ([0, 1], [0.1, np.nan], "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.plateau_length(steps, values, 0.1)


def test_toy_population_loss_is_the_mean_of_batches():
    from experiments.emergence import tasks

    key = jax.random.key(2)
    target = tasks.target_matrix(key, 4)
    parameters = models.ToyParameters(
        jax.random.normal(key, (6,)), jax.random.normal(jax.random.key(3), (4, 4))
    )
    for B, p in ((1, 0.0), (3, 0.4)):
        batch = tasks.linear_batch(
            jax.random.key(4), target, batch_size=60000, seq_len=6, B=B, p=p, random_positions=False
        )
        error = models.toy_forward(parameters, batch.inputs) - batch.targets
        expected = models.toy_population_loss(parameters, target, B=B, p=p)
        assert 0.5 * float((error**2).sum(-1).mean()) == pytest.approx(float(expected), rel=0.02)


def test_sparge_reference_keeps_the_block_that_matters():
    """Block j of keys matches block j of queries: only the diagonal is needed."""
    x = 20.0 * jnp.repeat(jnp.eye(4), 2, axis=0)[None, :, None, :]  # [1, 8, 1, 4]
    skipped = metrics.sparge_skipped(x, x, block_q=2, block_kv=2, cdf=0.9)
    assert float(skipped[0]) == pytest.approx(1 - 4 / 10)  # 4 of 10 causal tiles are kept
    strict = metrics.sparge_skipped(x, x, block_q=2, block_kv=2, cdf=0.9, similarity=1.5)
    assert float(strict[0]) == 0  # no block trusted: all computed
    with pytest.raises(ValueError, match="multiple of block_q"):
        metrics.sparge_skipped(x, x, block_q=3, block_kv=2)


def test_probed_attention_is_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    attend = models.probed_attention(lambda w: w.sum(-1), found := [])
    np.testing.assert_allclose(
        attend(q, k, v, is_causal=True, scale=0.3),
        jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        atol=1e-5,
    )
    np.testing.assert_allclose(found[0], 1.0, atol=1e-6)
