"""The rivals of R-KV and KVzip: golden data of two, hand-made cases of the others."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import compress
from jaxeff.compress import (
    TOVA,
    AdaKV,
    PerLayer,
    SnapKV,
    StreamingLLM,
    expected_attention,
    h2o,
    keydiff,
    knorm,
    kvzip,
    random_eviction,
    rkv,
    select,
    snapkv,
    streaming_llm,
    tova,
)
from jaxeff.kv_cache import DenseCache, TiledLayer, check_invariants

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "rkv"
SINGLE = sorted(path.stem for path in GOLDEN.glob("h*.npz"))
RNG = np.random.default_rng(0)


def _load(name):
    data = np.load(GOLDEN / f"{name}.npz")
    queries, keys = (jnp.asarray(data[x]).swapaxes(1, 2) for x in "qk")
    return data, json.loads(str(data["meta_json"])), queries, keys


def _normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", SINGLE)
def test_snapkv_equals_the_original(name):
    data, meta, queries, keys = _load(name)
    cut = meta["n"] - meta["window_size"]
    got = np.asarray(snapkv.scores(queries, keys, kernel_size=meta["kernel_size"]))
    np.testing.assert_allclose(got[..., :cut], data["snapkv_score"], rtol=1e-4, atol=1e-6)
    kept = np.asarray(select(jnp.asarray(got), meta["budget"]))[0]
    assert np.isposinf(got[..., cut:]).all() and (kept[:, -8:] >= meta["n"] - 8).all()
    for head, gap in enumerate(data["snapkv_cut_gap"]):
        score, line = data["snapkv_score"][0, head], data["snapkv_cut_value"][head]
        chosen = np.zeros(cut, bool)
        chosen[kept[head][kept[head] < cut]] = True
        if gap > 1e-7:
            assert set(kept[head]) == set(data["snapkv_kept"][head])
        # Max pooling makes plateaus, and which tied slot wins is nobody's promise.
        assert chosen[score > line + 1e-7].all() and not chosen[score < line - 1e-7].any()


@pytest.mark.parametrize("name", SINGLE)
def test_streaming_equals_the_original(name):
    data, meta, _, keys = _load(name)
    kept = select(streaming_llm.scores(keys, num_sinks=4), meta["budget"])[0]
    np.testing.assert_array_equal(kept, np.sort(data["streaming_kept_first4"]))


def test_snapkv_first_round_keeps_the_original_tokens():
    data = np.load(GOLDEN / "rounds_h4g3_d32.npz")
    meta, keys = json.loads(str(data["meta_json"])), jnp.asarray(data["k_all"]).swapaxes(1, 2)
    method = SnapKV(budget=meta["budget"], buffer=meta["append"])
    first = meta["n_first"]
    cache = DenseCache.init(
        1, 1, first, 4, meta["d"], dtype=jnp.float32, query_window=8, num_heads=12
    )
    queries = jnp.zeros((1, first, 12, meta["d"]))
    queries = queries.at[:, -8:].set(jnp.asarray(data["q_rounds"][0]).swapaxes(1, 2))
    piece = keys[:, :first]
    layer = cache.layers[0].update(piece, piece, positions=jnp.arange(first)[None], queries=queries)
    cache = method.after_step(cache.advance([layer], jnp.ones((1, first), bool)))
    kept = np.asarray(cache.layers[0].positions)[0, :, : meta["budget"]]
    want = data["time_snapkv_kept_round1"]
    score = np.asarray(method.score(layer, 0))[0]
    for head in range(4):
        # Where the sets differ, they differ in tied slots only.
        mine, its = (sorted(score[head][list(x)]) for x in (kept[head], want[head]))
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-7)
        assert len(set(kept[head]) & set(want[head])) >= 0.9 * meta["budget"]


def _attention(queries, keys, offset=0):
    """Causal weights ``[B, K, G, T, S]``; query ``i`` sees slots up to ``i + offset``."""
    batch, rows, heads, size = queries.shape
    q = queries.reshape(batch, rows, keys.shape[2], -1, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, keys) / size**0.5
    seen = jnp.arange(keys.shape[1]) <= jnp.arange(rows)[:, None] + offset
    return jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)


def test_snapkv_variants_follow_their_formulas():
    queries, keys = _normal(2, 4, 4, 8), _normal(2, 20, 2, 8)
    weights = _attention(queries, keys, 16)[..., :16]

    def average(x):
        padded = jnp.pad(x, ((0, 0),) * 3 + ((2, 2),))
        return sum(padded[..., i : i + 16] for i in range(5)) / 5

    summed = average(weights.sum(3))
    want = {"original": summed.mean(2), "kvpress": summed.mean(2) / 4}
    for variant, value in want.items():
        got = snapkv.scores(queries, keys, variant=variant)
        np.testing.assert_allclose(got[..., :16], value, rtol=1e-5)
    got = snapkv.scores(queries, keys, variant="original", group="max")
    np.testing.assert_allclose(got[..., :16], summed.max(2), rtol=1e-5)
    rows = jnp.pad(weights.mean(3), ((0, 0),) * 3 + ((3, 3),), constant_values=-1)
    pooled = jnp.stack([rows[..., i : i + 16] for i in range(7)]).max(0).mean(2)
    got = snapkv.scores(queries, keys, variant="kvzip")
    np.testing.assert_allclose(got[..., :16], pooled, rtol=1e-5)


def test_h2o_sums_attention_and_the_cache_carries_it():
    queries, keys = _normal(2, 12, 4, 8), _normal(2, 12, 2, 8)
    weights = _attention(queries, keys)
    np.testing.assert_allclose(
        jax.jit(h2o.scores)(queries, keys), weights.mean(2).sum(2), rtol=1e-5, atol=1e-6
    )
    able = 12 - jnp.arange(12)
    for statistic, want in (("mean", weights.mean(2).sum(2) / able), ("max", weights.max((2, 3)))):
        got = jax.jit(partial(h2o.scores, statistic=statistic))(queries, keys)
        np.testing.assert_allclose(got, want, 1e-5, 1e-6)
    options = {"dtype": jnp.float32, "num_heads": 4, "observer": h2o.AttentionMass()}
    layer = DenseCache.init(1, 2, 12, 2, 8, **options).layers[0]
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    update = jax.jit(lambda x, k, p, q: x.update(k, k, positions=p, queries=q))
    for cut in (slice(0, 7), slice(7, 11), slice(11, 12)):
        layer = update(layer, keys[:, cut], positions[:, cut], queries[:, cut])
    np.testing.assert_allclose(layer.slot_state, weights.mean(2).sum(2), rtol=1e-5, atol=1e-6)
    small = layer.gather(jnp.broadcast_to(jnp.array([1, 5, 9]), (2, 2, 3)))
    np.testing.assert_array_equal(small.slot_state, layer.slot_state[..., [1, 5, 9]])


def test_tova_keydiff_knorm_follow_their_formulas():
    queries, keys = _normal(2, 1, 4, 8), _normal(2, 9, 2, 8)
    want = _attention(queries, keys, 8)[:, :, :, 0].mean((1, 2))
    got = tova.scores(queries, keys)
    want = jnp.broadcast_to(want[:, None], got.shape)
    np.testing.assert_allclose(got[..., :-1], want[..., :-1], rtol=1e-5)
    assert np.isposinf(got[..., -1]).all()  # the last token always stays
    np.testing.assert_allclose(tova.scores(queries, keys, window=0), want, rtol=1e-5)
    unit = np.asarray(keys / jnp.linalg.norm(keys, axis=-1, keepdims=True))
    mean = unit[:, :6].mean(1, keepdims=True)
    cosine = (unit * mean).sum(-1) / np.linalg.norm(mean, axis=-1)
    got = keydiff.scores(keys, length=jnp.array([6, 6]))
    np.testing.assert_allclose(got[..., :6], -cosine[:, :6].swapaxes(1, 2), rtol=1e-4, atol=1e-6)
    assert np.isneginf(got[..., 6:]).all()
    norms = jnp.linalg.norm(keys, axis=-1).swapaxes(1, 2)
    np.testing.assert_allclose(knorm.scores(keys), -norms, rtol=1e-6)


def test_random_is_uniform_and_follows_the_token():
    keys = jnp.zeros((1, 2000, 2, 4))
    assert compress.random.scores is random_eviction.scores  # by the method's name too
    score = np.asarray(random_eviction.scores(keys, seed=3))
    assert abs(score.mean() - 0.5) < 0.02 and abs((score < 0.25).mean() - 0.25) < 0.03
    assert abs(np.corrcoef(score[0])[0, 1]) < 0.1
    moved = random_eviction.scores(keys[:, :2], positions=jnp.array([[[7, 900]] * 2]), seed=3)
    np.testing.assert_array_equal(moved, score[..., [7, 900]])
    assert (score != np.asarray(random_eviction.scores(keys, seed=4))).mean() > 0.99


def test_expected_attention_is_the_mean_over_future_queries():
    """With many Gaussian queries, the expected weight is that of sampled future queries."""
    rng = np.random.default_rng(1)
    frequencies = (0.7, 0.05)
    queries, keys, values = (
        jnp.asarray(0.5 * rng.normal(size=s), jnp.float32)
        for s in ((1, 400, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4))
    )
    positions = jnp.arange(400)[None]
    rotated = expected_attention.rotate(queries, positions, frequencies)
    watch = expected_attention.QueryStatistics(frequencies, skip=4)
    _, state = watch.init(1, 8, 2, 1, 4)
    for cut in (slice(0, 150), slice(150, 400)):
        valid = jnp.ones((1, cut.stop - cut.start), bool)
        _, state = watch.observe(None, None, state, rotated[:, cut], positions[:, cut], valid)
    plain = np.asarray(queries)[0, 4:]
    mean = np.asarray(state["sum"])[0] / 396
    np.testing.assert_allclose(mean, plain.mean(0), rtol=1e-3, atol=1e-5)
    outer = np.einsum("tnh,tni->nhi", plain, plain) / 396
    np.testing.assert_allclose(np.asarray(state["outer"])[0] / 396, outer, rtol=1e-3, atol=1e-4)

    covariance = jnp.asarray(outer - np.einsum("nh,ni->nhi", mean, mean))[None]
    pair = expected_attention.turned(
        jnp.asarray(mean)[None], covariance, jnp.array([400]), frequencies, future=2
    )
    turns = [
        np.asarray(
            expected_attention.rotate(jnp.eye(4)[None, :, None], jnp.full((1, 4), p), frequencies)
        )[0, :, 0].T
        for p in (400, 401)
    ]
    turn = sum(turns) / 2
    np.testing.assert_allclose(pair[0][0], mean @ turn.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(pair[1][0], turn @ np.asarray(covariance)[0] @ turn.T, 1e-3, 1e-5)
    got = expected_attention.scores(*pair, keys, values, scale=0.5)
    k, v = (np.asarray(x)[0, :, 0] for x in (keys, values))
    weight = 0
    for head in range(2):
        m, c = np.asarray(pair[0])[0, head], np.asarray(pair[1])[0, head]
        z = np.exp(0.5 * k @ m + 0.125 * np.einsum("si,ij,sj->s", k, c, k))
        weight = weight + z / z.sum() / 2
    np.testing.assert_allclose(got[0, 0], weight * np.linalg.norm(v, axis=-1), rtol=1e-4)


def _cache(lengths=(24, 24), heads=2):
    """Two layers of random keys; head 0 has small keys, head 1 large ones."""
    cache = DenseCache.init(2, 2, 24, heads, 8, dtype=jnp.float32)
    valid = jnp.arange(24) < jnp.asarray(lengths)[:, None]
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
    size = jnp.arange(1, heads + 1)[:, None]
    layers = [
        layer.update(k, k, positions=positions, valid=valid)
        for layer, k in ((x, size * _normal(2, 24, heads, 8)) for x in cache.layers)
    ]
    return cache.advance(layers, valid)


def test_adakv_ranks_the_heads_of_a_layer_together():
    method = AdaKV(method="knorm(budget=8, buffer=4)", floor=0.25, tile=4)
    small = jax.jit(method.after_prefill)(_cache())
    check_invariants(small)
    for layer in small.layers:
        assert isinstance(layer, TiledLayer) and layer.num_tiles == 2 * 12 // 4 + 2
        assert (layer.length.sum(1) == 16).all() and (layer.length >= 2).all()
        assert (layer.length[:, 0] > layer.length[:, 1]).all()
        assert not layer.overflow.any()
    assert small.allocated_bytes() < 0.75 * _cache().allocated_bytes()


def test_pyramid_budgets_fall_with_the_same_mean():
    method = PerLayer(method="streaming_llm(budget=10, buffer=4)", beta=5)
    assert method.budgets(3) == (18, 10, 5)  # the last: 2, but sinks and window take 5
    assert method.budgets(1) == (10,) and method.budgets(0) == ()
    rings = DenseCache.init(2, 1, 6, 2, 8, windows=(4, 4))
    assert method.after_step(method.after_prefill(rings)).layers[0].capacity == 4
    small = method.after_prefill(_cache())
    assert [int(layer.length.max()) for layer in small.layers] == [18, 5]
    assert [layer.capacity for layer in small.layers] == [22, 9]
    short = method.fit(prompt=6, room=10)  # 16 tokens in all, less than the first layer's budget
    cache = DenseCache.init(2, 1, 6, 2, 8)
    assert [x.capacity for x in short.after_prefill(cache).layers] == [17, 9]


def test_streaming_keeps_sinks_and_the_newest():
    small = StreamingLLM(budget=8, buffer=4).after_prefill(_cache((24, 6)))
    held = small.layers[0].positions
    assert held[0, 0, :8].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert held[1, 1].tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 6]


@pytest.mark.parametrize("order", ["time", "score"])
def test_sinks_stay_though_the_prompt_was_shorter(order):
    method = StreamingLLM(budget=8, buffer=4, num_sinks=3, slot_order=order)
    cache = method.after_prefill(DenseCache.init(1, 1, 1, 1, 8, dtype=jnp.float32))
    one, real = jnp.ones((1, 1, 1, 8)), jnp.ones((1, 1), bool)
    for place in range(24):  # through four rounds
        layer = cache.layers[0].update(one, one, positions=cache.seen[:, None])
        cache = method.after_step(cache.advance([layer], real))
        held = cache.layers[0].positions[0, 0].tolist()
        assert {p for p in (0, 1, 2, place) if p <= place} <= set(held)


def test_a_longer_query_ring_shows_a_method_its_own_queries():
    method = TOVA(budget=4, buffer=2)
    keys, queries = _normal(1, 8, 2, 8), _normal(1, 8, 4, 8)
    places = jnp.arange(8)[None]
    found = []
    for window in (1, 4):
        layer = DenseCache.init(
            1, 1, 8, 2, 8, dtype=jnp.float32, query_window=window, num_heads=4
        ).layers[0]
        layer = layer.update(keys, keys, positions=places, queries=queries)
        found.append(method.protected(layer, 0))
    np.testing.assert_array_equal(*found)
    with pytest.raises(ValueError, match="the cache keeps 1 queries; make it with query_window=8"):
        SnapKV(budget=16).compact(DenseCache.init(1, 1, 32, 2, 8, query_window=1, num_heads=4))


def test_a_smaller_cache_loses_nothing_in_silence():
    method = StreamingLLM(budget=8, buffer=4)
    with pytest.raises(ValueError, match="capacity=6 cannot hold budget=8"):
        method.compact(_cache(), capacity=6)
    with pytest.raises(ValueError, match="rows has 1 arrays; 2 layers are compressed"):
        method.compact(_cache(), [jnp.ones((2, 2), bool)])
    kept = method.compact(_cache((24, 6)), capacity=8)
    assert kept.overflow.tolist() == [False, False]
    rows = [jnp.array([[False, False], [True, True]])] * 2
    assert method.compact(_cache(), rows, capacity=8).overflow.tolist() == [True, False]
    old = dataclasses.replace(_cache(), version=0)
    for change in (method.compact, method.after_step, method.after_prefill):
        with pytest.raises(ValueError, match="the cache has version 0; this code reads version 1"):
            change(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k: (q[0], k), r"queries has shape \(2, 4, 8\); expected \[B, A, N, H\]"),
        (lambda q, k: (q[..., :4], k), r"queries has shape .* with B=2 and H=8, as keys has"),
        (lambda q, k: (q[:1], k), r"queries has shape .* with B=2 and H=8, as keys has"),
        (lambda q, k: (q[:, :, :3], k), r"keys has 2 heads; query heads \(3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message):
    queries, keys = change(_normal(2, 2, 4, 8), _normal(2, 6, 2, 8))
    for method in (rkv, snapkv, h2o, tova):
        with pytest.raises(ValueError, match=message):
            method.scores(queries, keys)
    with pytest.raises(ValueError, match=message):
        kvzip.reconstruction_scores(queries, keys, keys[:, :2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SnapKV(budget=16, variant="new"), "variant='new'; expected one of original"),
        (
            lambda: snapkv.scores(_normal(1, 2, 3, 4), _normal(1, 6, 2, 4)),
            r"keys has 2 heads; query heads \(3\)",
        ),
        (
            lambda: snapkv.scores(_normal(1, 2, 2, 4), _normal(1, 6, 2, 4), pooling="sum"),
            "pooling='sum'; expected 'avg' or 'max'",
        ),
        (
            lambda: snapkv.scores(_normal(1, 2, 2, 4), _normal(1, 6, 2, 4), kernel_size=4),
            "kernel_size=4; expected an odd number",
        ),
        (lambda: h2o.H2O(budget=8, statistic="min"), "statistic='min'; expected 'sum'"),
        (
            lambda: expected_attention.ExpectedAttention(budget=8).observer,
            "frequencies is None; give the model's RoPE frequencies",
        ),
        (
            lambda: h2o.H2O(budget=8, buffer=2).compact(_cache()),
            "the cache carries no attention mass; make it with observer",
        ),
        (lambda: AdaKV(method="snapkv(budget=16, scope='layer')"), "scope='layer'; adakv ranks"),
        (lambda: PerLayer(method="rkv:16", beta=0.5), "beta=0.5; expected 1"),
        (lambda: SnapKV(budget=16, kernel_size=4), "kernel_size=4; expected an odd number"),
    ],
)
def test_bad_settings_of_baselines_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
