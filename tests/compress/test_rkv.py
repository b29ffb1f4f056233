"""R-KV against the original code's golden data and small cases done by hand."""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.compress import RKV, rkv, select
from jaxeff.compress.rkv import group_logits, importance
from jaxeff.kv_cache import DenseCache, check_invariants
from pallas_kernels import last_similar_keys

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "rkv"
SINGLE = sorted(path.stem for path in GOLDEN.glob("h*.npz"))


def _compiled(function):
    """The function as one program; all arguments that are no arrays are static."""
    arrays = {"queries", "keys", "live", "length", "query_valid"}
    static = set(inspect.signature(function).parameters) - arrays
    return jax.jit(function, static_argnames=sorted(static))


scores, redundancy = _compiled(rkv.scores), _compiled(rkv.redundancy)


def _load(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return data, json.loads(str(data["meta_json"]))


def _inputs(data):
    queries = jnp.asarray(data["q"]).swapaxes(1, 2)  # [B, A, N, H]
    return queries, jnp.asarray(data["k"]).swapaxes(1, 2)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("name", SINGLE)
def test_scores_and_kept_sets_equal_the_original(name, pooling):
    data, meta = _load(name)
    queries, keys = _inputs(data)
    window, budget = meta["window_size"], meta["budget"]
    cut = meta["n"] - window
    options = {
        "mix_lambda": meta["mix_lambda"],
        "kernel_size": meta["kernel_size"],
        "pooling": pooling,
    }
    got = scores(queries, keys, **options)
    pool = jnp.max if pooling == "max" else jnp.mean
    np.testing.assert_allclose(
        pool(group_logits(queries, keys), axis=2), data[f"{pooling}_logits"], 1e-5, 1e-5
    )
    plain = importance(
        queries,
        keys,
        candidates=jnp.broadcast_to(jnp.arange(meta["n"]) < cut, got.joint.shape),
        kernel_size=1,
        pooling=pooling,
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(
        plain[..., :cut], data[f"{pooling}_importance_unpooled"], **tolerance
    )
    np.testing.assert_allclose(
        got.importance[..., :cut], data[f"{pooling}_importance"], **tolerance
    )
    np.testing.assert_allclose(got.redundancy[0], data["redundancy"], **tolerance)
    np.testing.assert_allclose(got.joint[0, :, :cut], data[f"{pooling}_final_score"], **tolerance)
    assert np.isposinf(got.joint[..., cut:]).all()
    for order in ("time", "score"):
        kept = np.asarray(select(got.joint, budget, slot_order=order)[0])
        np.testing.assert_array_equal(np.sort(kept), np.sort(data[f"{pooling}_kept"]))
        np.testing.assert_array_equal(kept[:, -window:], data[f"{pooling}_kept"][:, -window:])


@pytest.mark.parametrize("name", SINGLE)
def test_exempted_columns_and_other_thresholds(name):
    data, meta = _load(name)
    _, keys = _inputs(data)
    live = jnp.ones((1, meta["Hkv"], meta["n"]), bool)
    last, _ = last_similar_keys(keys.swapaxes(1, 2), live, threshold=0.5, block_size=50)
    np.testing.assert_array_equal(np.maximum(last[0, ..., 0], 0), data["jstar"])
    for block in (7, 64, 1000):
        got = redundancy(keys, live=live, threshold=0.8, block_size=block)[0]
        np.testing.assert_allclose(got, data["redundancy_thr08"], 1e-4, 1e-6)


@pytest.mark.parametrize("order", ["time", "score"])
def test_three_rounds_keep_the_original_tokens(order):
    data, meta = _load("rounds_h4g3_d32")
    budget, fresh = meta["budget"], meta["append"]
    method = RKV(budget=budget, buffer=fresh, slot_order=order)
    keys = jnp.asarray(data["k_all"]).swapaxes(1, 2)
    cache = DenseCache.init(
        1, 1, budget + fresh, 4, meta["d"], dtype=jnp.float32, query_window=8, num_heads=12
    )
    protected, after_step = jax.jit(lambda x: method.protected(x, 0)), jax.jit(method.after_step)
    begin = 0
    for number in (1, 2, 3):
        end = meta["n_first"] + (number - 1) * fresh
        positions = jnp.arange(begin, end)[None]
        queries = jnp.zeros((1, end - begin, 12, meta["d"]))
        observed = jnp.asarray(data["q_rounds"][number - 1]).swapaxes(1, 2)
        queries = queries.at[:, -8:].set(observed)
        piece = keys[:, begin:end]
        layer = cache.layers[0].update(piece, piece, positions=positions, queries=queries)
        cache = cache.advance([layer], jnp.ones((1, end - begin), bool))
        joint = np.asarray(protected(layer))[0]
        cut = budget + fresh - 8
        expected = data[f"{order}_final_score_round{number}"]
        if order == "time":
            np.testing.assert_allclose(joint[:, :cut], expected, 1e-4, 1e-6)
        cache = after_step(cache)
        kept = np.asarray(cache.layers[0].positions)[0, :, :budget]
        want = data[f"{order}_rkv_kept_round{number}"]
        np.testing.assert_array_equal(np.sort(kept), np.sort(want))
        check_invariants(cache, time_order=order == "time")
        begin = end


def _dense_redundancy(keys, live, zero_col0=True, owner=False):
    """The n x n formula, row by row, for one head."""
    count = int(live.sum())
    unit = keys[:count] / (np.linalg.norm(keys[:count], axis=-1, keepdims=True) + 1e-8)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 0)
    sums = cosine.sum(0)
    for row in range(count):
        similar = np.flatnonzero(cosine[row] > 0.5)
        if similar.size or zero_col0:
            last = similar.max() if similar.size else 0
            sums[row if owner else last] -= cosine[row, last]
    weights = np.exp(sums / count)
    return weights / weights.sum()


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("zero_col0", [True, False])
def test_redundancy_equals_the_full_matrix_with_dead_slots(mode, zero_col0):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 8))
    keys = centres[rng.integers(5, size=(2, 24, 3))] + 0.3 * rng.normal(size=(2, 24, 3, 8))
    length = np.array([[24, 3, 17], [0, 1, 20]])
    live = np.arange(24) < length[..., None]
    got = redundancy(
        jnp.asarray(keys, jnp.float32),
        live=jnp.asarray(live),
        mode=mode,
        zero_col0_when_empty=zero_col0,
        block_size=10,
    )
    assert np.isfinite(got).all()
    for row in range(2):
        for head in range(3):
            size = length[row, head]
            np.testing.assert_array_equal(got[row, head, size:], 0)
            if size:
                want = _dense_redundancy(
                    keys[row, :, head], live[row, head], zero_col0, mode == "paper"
                )
                np.testing.assert_allclose(got[row, head, :size], want, 2e-5)


def test_rows_with_padding_score_like_short_caches():
    rng = np.random.default_rng(1)
    queries = jnp.asarray(rng.normal(size=(2, 4, 4, 8)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 20, 2, 8)), jnp.float32)
    both = scores(queries, keys, length=jnp.array([20, 13]))
    alone = scores(queries[1:], keys[1:, :13])
    for padded, short in zip(both, alone, strict=True):
        np.testing.assert_allclose(padded[1:, :, :13], short, 1e-5, 1e-7)
    assert np.isneginf(both.joint[1, :, 13:]).all()


def test_pooling_every_row_first_is_equation_4():
    rng = np.random.default_rng(5)
    queries = jnp.asarray(rng.normal(size=(1, 3, 2, 8)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(1, 14, 1, 8)), jnp.float32)
    got = scores(queries, keys, kernel_size=5, pool_order="pool_first").importance[0, 0]
    logits = np.einsum("anh,sh->nas", queries[0], keys[0, :11, 0]).max(0) / 8**0.5
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    padded = np.pad(weights, ((0, 0), (2, 2)))
    want = np.stack([padded[:, i : i + 11] for i in range(5)]).max(0).mean(0)
    np.testing.assert_allclose(got[:11], want, rtol=1e-5)
    assert not got[11:].any()


def test_no_candidates_and_empty_rows_give_no_nan():
    got = scores(jnp.ones((1, 4, 2, 8)), jnp.zeros((1, 6, 1, 8)), length=jnp.array([0]))
    assert np.isneginf(got.joint).all()
    assert np.isfinite(got.importance).all() and np.isfinite(got.redundancy).all()
    assert select(got.joint, 3).tolist() == [[[-1, -1, -1]]]


def test_beta_exempts_that_many_entries():
    rng = np.random.default_rng(2)
    keys = jnp.asarray(1 + 0.1 * rng.normal(size=(1, 9, 1, 4)), jnp.float32)
    live = jnp.ones((1, 1, 9), bool)
    everything = redundancy(keys, live=live, beta=8)
    np.testing.assert_allclose(everything, jnp.full((1, 1, 9), 1 / 9), 1e-5)


def test_sinks_and_shared_scopes():
    rng = np.random.default_rng(3)
    cache = DenseCache.init(2, 2, 24, 2, 8, dtype=jnp.float32, query_window=4, num_heads=4)
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
    layers = []
    for layer in cache.layers:
        k = jnp.asarray(rng.normal(size=(2, 24, 2, 8)), jnp.float32)
        queries = jnp.asarray(rng.normal(size=(2, 24, 4, 8)), jnp.float32)
        layers.append(layer.update(k, k, positions=positions, queries=queries))
    cache = cache.advance(layers, jnp.ones((2, 24), bool))
    kept = {}
    for scope in ("head", "layer", "global"):
        method = RKV(budget=12, buffer=4, window=4, num_sinks=2, scope=scope)
        small = jax.jit(method.after_prefill)(cache)
        check_invariants(small)
        assert small.layers[0].capacity == 16 and small.layers[0].frozen.tolist() == [[2, 2]] * 2
        kept[scope] = np.stack([layer.positions for layer in small.layers])[..., :12]
        assert (kept[scope][..., :2] == [0, 1]).all()
        assert (kept[scope][..., -4:] == [20, 21, 22, 23]).all()
    assert (kept["layer"][:, :, 0] == kept["layer"][:, :, 1]).all()
    assert (kept["global"] == kept["global"][:1, :, :1]).all()
    assert (kept["head"][:, :, 0] != kept["head"][:, :, 1]).any()


def test_scoring_builds_no_square_array():
    keys = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)
    live = jax.ShapeDtypeStruct((1, 1, 1024), jnp.bool_)
    text = jax.jit(lambda k, m: redundancy(k, live=m)).lower(keys, live).as_text()
    assert "1024x1024" not in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RKV(budget=4, window=8), "budget=4 must be at least window=8"),
        (lambda: RKV(budget=0), "budget=0; expected a whole number of tokens, 1 or more"),
        (lambda: RKV(budget=16, num_sinks=9), r"num_sinks=9 must be in \[0, 8\]"),
        (lambda: RKV(budget=16, scope="batch"), "scope='batch'; expected 'head', 'layer'"),
        (lambda: RKV(budget=16, mix_lambda=2), r"mix_lambda=2; expected a weight in \[0, 1\]"),
        (lambda: RKV(budget=16, kernel_size=2), "kernel_size=2; expected an odd number"),
        (lambda: RKV(budget=16, threshold=1), "threshold=1; expected a cosine"),
        (lambda: select(jnp.zeros((1, 1, 4)), 2.0), "budget=2.0; expected a whole number"),
        (lambda: RKV(budget=16, slot_order="best"), "slot_order='best'; expected 'time'"),
        (
            lambda: RKV(budget=64).compact(
                DenseCache.init(1, 1, 32, 1, 8, query_window=8, num_heads=1)
            ),
            "budget=64 is larger than the capacity=32",
        ),
        (
            lambda: RKV(budget=16).after_step(DenseCache.init(1, 1, 32, 1, 8)),
            "capacity=32; budget=16 plus buffer=128 need 144 slots",
        ),
        (
            lambda: RKV(budget=16, buffer=4).compact(DenseCache.init(1, 1, 32, 1, 8)),
            "the cache keeps no queries; make it with query_window=8",
        ),
        (lambda: select(jnp.zeros((1, 1, 4)), 5), r"budget=5 must be in \[0, 4\]"),
        (
            lambda: scores(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 6, 2, 4))),
            r"keys has 2 heads; query heads \(3\)",
        ),
        (
            lambda: scores(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 6, 2, 4)), mix_lambda=2),
            r"mix_lambda=2; expected a weight in \[0, 1\]",
        ),
        (
            lambda: scores(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 6, 2, 4)), pool_order="never"),
            "pool_order='never'; expected 'mean_first' or 'pool_first'",
        ),
        (
            lambda: redundancy(
                jnp.ones((1, 2, 1, 4)), live=jnp.ones((1, 1, 2), bool), threshold=1.5
            ),
            "threshold=1.5; expected a cosine",
        ),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
