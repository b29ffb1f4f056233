"""Statistics of the generators: what repeats how often, and that padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.emergence import tasks


def test_linear_tokens_have_the_stated_moments():
    d = 8
    target = tasks.target_matrix(jax.random.key(1), d)
    batch = tasks.linear_batch(jax.random.key(0), target, batch_size=4000, seq_len=6, B=2, p=0.3)
    chosen = np.asarray(batch.inputs)[np.asarray(batch.relevant)].reshape(4000, 2, d)
    np.testing.assert_array_equal(chosen[:, 0], chosen[:, 1])
    np.testing.assert_allclose(batch.targets, chosen[:, 0] @ np.asarray(target).T, atol=1e-6)
    moment = chosen[:, 0].T @ chosen[:, 0] / 4000
    expected = np.full(d, 0.7 / d)
    expected[0] += 0.3
    np.testing.assert_allclose(np.diag(moment), expected, rtol=0.1)
    repeated = np.all(chosen[:, 0] == np.eye(d)[0], axis=1).mean()
    assert repeated == pytest.approx(0.3, abs=0.03)
    rest = np.asarray(batch.inputs)[~np.asarray(batch.relevant)]
    assert rest.var() == pytest.approx(1 / d, rel=0.03)


def test_linear_positions():
    target = jnp.eye(2)
    moving = tasks.linear_batch(jax.random.key(0), target, batch_size=3000, seq_len=5, B=2)
    np.testing.assert_allclose(moving.relevant.mean(0), 0.4, atol=0.04)
    fixed = tasks.linear_batch(
        jax.random.key(0), target, batch_size=4, seq_len=5, B=2, random_positions=False
    )
    np.testing.assert_array_equal(fixed.relevant, [[False] * 3 + [True] * 2] * 4)
    np.testing.assert_array_equal(moving.relevant.sum(1), 2)


def test_linear_padding_stays_empty():
    target = tasks.target_matrix(jax.random.key(0), 3, max_dim=5)
    assert not target[3:].any() and not target[:, 3:].any()
    batch = tasks.linear_batch(
        jax.random.key(1), target, batch_size=500, seq_len=9, B=2, dim=3, length=4
    )
    assert not batch.inputs[:, :, 3:].any() and not batch.targets[:, 3:].any()
    assert not batch.relevant[:, 4:].any()
    np.testing.assert_array_equal(batch.relevant.sum(1), 2)
    other = np.asarray(batch.inputs)[:, :, :3][~np.asarray(batch.relevant)]
    assert other.var() == pytest.approx(1 / 3, rel=0.1)


def recall(n=4000, **arguments):
    settings = {"num_pairs": 6, "vocab_size": 16} | arguments
    return settings, tasks.recall_batch(jax.random.key(3), batch_size=n, **settings)


def split(batch, num_pairs):
    pairs = np.asarray(batch.tokens)[:, : 2 * num_pairs].reshape(-1, num_pairs, 2)
    query = np.asarray(batch.tokens)[:, 2 * num_pairs]
    return pairs[:, :, 0], pairs[:, :, 1], query


@pytest.mark.parametrize(
    "B, num_pairs, vocab_size",
    [(1, 6, 16), (2, 6, 16), (4, 6, 16), (1, 5, 5), (4, 5, 5), (1, 1, 4)],
)
def test_recall_sequences_are_well_formed(B, num_pairs, vocab_size):
    _, batch = recall(500, num_pairs=num_pairs, vocab_size=vocab_size, B=B)
    keys, values, query = split(batch, num_pairs)
    is_query = np.asarray(batch.is_query)
    np.testing.assert_array_equal(keys == query[:, None], is_query)
    assert is_query.any(axis=1).all()  # the query is never missing
    np.testing.assert_array_equal(
        values[is_query], np.repeat(np.asarray(batch.targets), is_query.sum(1))
    )
    for row_keys, row_values, mine in zip(keys, values, is_query, strict=True):
        assert len(set(row_keys[~mine])) == (~mine).sum()  # drawn without replacement
        mapping = dict(zip(row_keys, row_values, strict=True))
        assert len(set(mapping.values())) == len(mapping)  # a permutation is injective
    assert keys.min() >= 0 and max(keys.max(), values.max()) < vocab_size


@pytest.mark.parametrize("B", [1.0, 2.0, 3.5])
def test_recall_query_count(B):
    _, batch = recall(B=B)
    count = np.asarray(batch.is_query).sum(1)
    assert count.mean() == pytest.approx(B, abs=0.06)
    # One certain slot and five independent ones.
    rate = (B - 1) / 5
    assert (count == 1).mean() == pytest.approx((1 - rate) ** 5, abs=0.03)
    np.testing.assert_allclose(np.asarray(batch.is_query).mean(0), B / 6, atol=0.04)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_recall_query_distribution(p):
    _, batch = recall(p=p)
    _, _, query = split(batch, 6)
    share = np.bincount(query, minlength=16) / query.size
    np.testing.assert_allclose(share, tasks.query_probabilities(16, p), atol=0.03)
    assert float(tasks.query_probabilities(16, p).sum()) == pytest.approx(1.0)


def test_recall_mapping_is_uniform_and_fresh():
    _, batch = recall(p=1.0)  # two query tokens only: their values must still be uniform
    share = np.bincount(np.asarray(batch.targets), minlength=16) / 4000
    np.testing.assert_allclose(share, 1 / 16, atol=0.02)
    _, _, query = split(batch, 6)
    assert (np.asarray(batch.targets) == query).mean() == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.parametrize("B", [1, 2])
def test_literal_rule_misses_the_query(B):
    _, batch = recall(B=B, literal_bernoulli=True)
    count = np.asarray(batch.is_query).sum(1)
    assert count.mean() == pytest.approx(B, abs=0.06)
    assert (count == 0).mean() == pytest.approx((1 - B / 6) ** 6, abs=0.03)


def test_recall_padding():
    """Traced sizes under static maxima give the same kind of sequence, then zeros."""

    @jax.jit
    def draw(num_pairs, vocab_size):
        return tasks.recall_batch(
            jax.random.key(0),
            batch_size=300,
            num_pairs=num_pairs,
            vocab_size=vocab_size,
            B=2.0,
            max_pairs=8,
            max_vocab=32,
        )

    batch = draw(3, 7)
    assert batch.tokens.shape == (300, 17) and int(batch.query_position) == 6
    assert not batch.tokens[:, 7:].any() and not batch.is_query[:, 3:].any()
    keys, values, query = split(batch, 3)
    np.testing.assert_array_equal(keys == query[:, None], np.asarray(batch.is_query)[:, :3])
    assert max(keys.max(), values.max()) < 7 and batch.is_query.any(axis=1).all()
    assert np.asarray(batch.is_query).sum(1).mean() == pytest.approx(2, abs=0.2)


def test_generators_are_pure():
    _, first = recall(20, B=2)
    _, second = recall(20, B=2)
    np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_pairs": 17}, r"num_pairs must lie in \[1, 16\]; got 17"),
        ({"num_pairs": 16, "literal_bernoulli": True}, r"num_pairs must lie in \[1, 15\]; got 16"),
        ({"B": 0.5}, r"B must lie in \[1.0, 6\]; got 0.5"),
        ({"B": 7}, r"B must lie in \[1.0, 6\]; got 7"),
        ({"p": -0.1}, r"p must lie in \[0.0, 1.0\]; got -0.1"),
        ({"vocab_size": 1}, r"vocab_size must lie in \[2, inf\]; got 1"),
    ],
)
def test_bad_recall_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        recall(2, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"B": 9}, r"B must lie in \[1, 8\]; got 9"),
        ({"p": 2}, r"p must lie in \[0.0, 1.0\]; got 2"),
        ({"dim": 5}, r"dim must lie in \[1, 4\]; got 5"),
        ({"length": 9}, r"length must lie in \[1, 8\]; got 9"),
    ],
)
def test_bad_linear_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks.linear_batch(jax.random.key(0), jnp.eye(4), batch_size=2, seq_len=8, **arguments)
