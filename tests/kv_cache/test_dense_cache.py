"""Dense caches: updates against a list model, gathers, storage, bytes and messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.kv_cache import DenseCache, DenseLayer, check_invariants, tree_bytes
from jaxeff.kv_cache.flight import read_in_order, was_read
from pallas_kernels import dot_product_attention

KV_HEADS, HEAD_DIM, CAPACITY = 2, 4, 8


def _tokens(rng, batch, steps):
    return jnp.asarray(rng.normal(size=(batch, steps, KV_HEADS, HEAD_DIM)), jnp.float32)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=3), max_size=5),
    data=st.data(),
)
def test_updates_and_evictions_follow_a_list(pieces, data):
    """Rows are Python lists; a piece appends its valid tokens, then some slots are evicted."""
    rng = np.random.default_rng(0)
    cache = DenseCache.init(1, 2, CAPACITY, KV_HEADS, HEAD_DIM, dtype=jnp.float32)
    lists = [[[] for _ in range(KV_HEADS)] for _ in range(2)]
    lost, seen = [False, False], [0, 0]
    for piece in pieces:
        if not piece:
            continue
        valid = np.asarray(piece).T  # [B, T]
        k = _tokens(rng, 2, valid.shape[1])
        positions = cache.seen[:, None] + np.cumsum(valid, axis=1) - 1
        layer = cache.layers[0].update(k, -k, positions=positions, valid=jnp.asarray(valid))
        cache = cache.advance([layer], jnp.asarray(valid))
        for row in range(2):
            for step in np.flatnonzero(valid[row]):
                for head in range(KV_HEADS):
                    if len(lists[row][head]) < CAPACITY:
                        entry = (int(positions[row, step]), np.asarray(k[row, step, head]))
                        lists[row][head].append(entry)
                    else:
                        lost[row] = True
                seen[row] += 1
        indices = np.full((2, KV_HEADS, CAPACITY), -1, np.int32)
        for row in range(2):
            for head in range(KV_HEADS):
                size = len(lists[row][head])
                keep = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
                chosen = [i for i, yes in enumerate(keep) if yes]
                indices[row, head, : len(chosen)] = chosen
                lists[row][head] = [lists[row][head][i] for i in chosen]
        cache = dataclasses.replace(cache, layers=(layer.gather(jnp.asarray(indices)),))
        check_invariants(cache)
    layer = cache.layers[0]
    keys, values = layer.read(jnp.float32)
    assert cache.overflow.tolist() == lost and cache.seen.tolist() == seen
    for row in range(2):
        for head in range(KV_HEADS):
            rows = lists[row][head]
            assert layer.length[row, head] == len(rows)
            assert layer.positions[row, head, : len(rows)].tolist() == [p for p, _ in rows]
            for slot, (_, key) in enumerate(rows):
                np.testing.assert_array_equal(keys[row, slot, head], key)
                np.testing.assert_array_equal(values[row, slot, head], -key)


def test_mask_is_causal_windowed_and_hides_dead_slots():
    layer = DenseLayer.init(2, 6, 1, HEAD_DIM, dtype=jnp.float32)
    k = jnp.ones((2, 4, 1, HEAD_DIM))
    valid = jnp.arange(4) < jnp.array([[4], [2]])
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
    layer = layer.update(k, k, positions=positions, valid=valid)
    mask = np.asarray(layer.mask(positions))[:, 0]  # [B, T, S]
    np.testing.assert_array_equal(mask[0, :, :4], np.tril(np.ones((4, 4), bool)))
    assert not mask[0, :, 4:].any() and not mask[1, :, 2:].any()
    window = np.asarray(layer.mask(positions, 2))[0, 0]
    np.testing.assert_array_equal(window[3], [False, False, True, True, False, False])


def test_ring_holds_the_last_valid_queries():
    layer = DenseLayer.init(2, 16, 1, HEAD_DIM, dtype=jnp.float32, query_window=3, num_heads=2)
    rng = np.random.default_rng(1)
    queries = jnp.asarray(rng.normal(size=(2, 7, 2, HEAD_DIM)), jnp.float32)
    k = jnp.zeros((2, 7, 1, HEAD_DIM))
    lengths = np.array([7, 2])
    valid = jnp.arange(7) < lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    layer = layer.update(k, k, positions=positions, valid=valid, queries=queries)
    assert sorted(layer.query_positions[0].tolist()) == [4, 5, 6]
    assert sorted(layer.query_positions[1].tolist()) == [-1, 0, 1]
    for row, length in enumerate(lengths):
        for position in range(max(0, length - 3), length):
            stored = layer.queries[row, :, position % 3]
            np.testing.assert_array_equal(stored, queries[row, position])


def test_gather_gives_memory_back_and_keeps_payload_bits():
    rng = np.random.default_rng(2)
    for dtype in (jnp.float32, jnp.bfloat16, "int8"):
        cache = DenseCache.init(1, 1, 64, KV_HEADS, 32, dtype=dtype)
        k = jnp.asarray(rng.normal(size=(1, 64, KV_HEADS, 32)), jnp.float32)
        layer = cache.layers[0].update(k, 2 * k, positions=jnp.arange(64)[None])
        indices = jnp.broadcast_to(jnp.arange(0, 64, 4), (1, KV_HEADS, 16))
        small = layer.gather(indices)
        for before, after in zip(jax.tree.leaves(layer.k), jax.tree.leaves(small.k), strict=True):
            np.testing.assert_array_equal(before[:, :, ::4], after)
        assert small.allocated_bytes() < 0.27 * layer.allocated_bytes()
        assert small.positions[0, 0].tolist() == list(range(0, 64, 4))


def test_int8_eviction_commutes_with_quantisation():
    rng = np.random.default_rng(3)
    k = jnp.asarray(rng.normal(size=(1, 12, KV_HEADS, 32)), jnp.float32)
    keep = jnp.array([1, 4, 7, 11])
    positions = jnp.arange(12)[None]
    empty = DenseLayer.init(1, 12, KV_HEADS, 32, dtype="int8")
    evicted = empty.update(k, k, positions=positions).gather(
        jnp.broadcast_to(keep, (1, KV_HEADS, 4))
    )
    small = DenseLayer.init(1, 4, KV_HEADS, 32, dtype="int8")
    direct = small.update(k[:, keep], k[:, keep], positions=positions[:, keep])
    jax.tree.map(np.testing.assert_array_equal, evicted, direct)
    keys, _ = direct.read(jnp.float32)
    step = np.abs(np.asarray(k[:, keep])).max(-1, keepdims=True) / 127
    assert (np.abs(keys - k[:, keep]) <= 0.51 * step).all()


def test_allocated_bytes_are_those_of_the_arrays():
    cache = DenseCache.init(3, 2, 10, KV_HEADS, 16, dtype=jnp.bfloat16)
    slots = 3 * 2 * 10 * KV_HEADS
    counters = 3 * (2 * 2 * KV_HEADS * 4 + 2) + 2 * 4
    assert cache.allocated_bytes() == slots * (2 * 16 * 2 + 4) + counters
    int8 = DenseCache.init(3, 2, 10, KV_HEADS, 16, dtype="int8")
    assert int8.allocated_bytes() == slots * (2 * (16 + 4) + 4) + counters
    assert tree_bytes(cache) == cache.allocated_bytes()


def test_update_compiles_once_and_equals_eager():
    layer = DenseLayer.init(1, 8, KV_HEADS, HEAD_DIM, dtype=jnp.float32)
    k = _tokens(np.random.default_rng(4), 1, 1)
    step = jax.jit(lambda layer, position: layer.update(k, k, positions=position))
    eager = layer
    for index in range(4):
        layer = step(layer, jnp.full((1, 1), index))
        eager = eager.update(k, k, positions=jnp.full((1, 1), index))
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, layer, eager)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenseCache.init(0, 1, 4, 1, 8), "num_layers=0; expected at least 1"),
        (lambda: DenseCache.init(2, 1, [4], 1, 8), "capacity lists 1 layers; num_layers=2"),
        (lambda: DenseCache.init(1, 1, 4, 1, 15, dtype="int4"), "head_dim=15 must be even"),
        (lambda: DenseCache.init(1, 1, 4, 1, 8, windows=(0,)), r"windows=\[0\]; expected 1 or"),
        (
            lambda: DenseLayer.init(2, 4, 1, 8).update(
                *[jnp.ones((2, 2, 1, 8))] * 2,
                positions=jnp.ones((2, 2), int),
                valid=jnp.ones((2, 3), bool),
            ),
            r"valid has shape \(2, 3\) and dtype bool; expected \[B, T\] with B=2",
        ),
        (
            lambda: DenseLayer.init(1, 4, 1, 8).update(
                *[jnp.ones((1, 2, 1, 8))] * 2, positions=jnp.ones((1, 2))
            ),
            r"positions has shape \(1, 2\) and dtype float32; expected \[B, T\]",
        ),
        (lambda: DenseCache.init(1, 1, 0, 1, 8), "capacity=0; expected at least 1"),
        (lambda: DenseCache.init(1, 1, 4, 1, 8, dtype="int3"), "'int3' is not a cache storage"),
        (lambda: DenseCache.init(1, 1, 4, 1, 8, query_window=2), "query_window=2 needs num_heads"),
        (
            lambda: DenseCache.init(1, 1, 4, 2, 8, query_window=2, num_heads=3),
            "num_heads=3 must be a multiple of num_kv_heads=2",
        ),
        (
            lambda: DenseLayer.init(1, 4, 1, 8).update(
                jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 8)), positions=jnp.ones((1, 2), int)
            ),
            r"k has shape \(1, 2, 2, 8\); the cache expects \(1, 2, 1, 8\)",
        ),
        (
            lambda: DenseLayer.init(1, 4, 1, 8, query_window=1, num_heads=1).update(
                jnp.ones((1, 1, 1, 8)), jnp.ones((1, 1, 1, 8)), positions=jnp.ones((1, 1), int)
            ),
            "queries is None; this cache keeps a query window",
        ),
        (
            lambda: DenseLayer.init(1, 4, 1, 8).gather(jnp.zeros((1, 1, 3), int), capacity=2),
            "capacity=2 cannot hold 3 indices per head",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("window", [None, 4])
def test_reading_in_order_is_attention_with_a_mask(window):
    """Two parts, the second on top of the first; one row ends early, and its padding is ignored."""
    rng = np.random.default_rng(5)
    cache = DenseCache.init(1, 2, 12, 2, 8, dtype=jnp.float32)
    plain, view = cache, read_in_order(cache)
    lengths = np.array([10, 7])
    for start, stop in ((0, 6), (6, 10)):
        q, k, v = (
            jnp.asarray(rng.normal(size=(2, stop - start, heads, 8)), jnp.float32)
            for heads in (4, 2, 2)
        )
        at = jnp.tile(jnp.arange(start, stop), (2, 1))
        valid = at < lengths[:, None]
        layers = [x.layers[0].update(k, v, positions=at, valid=valid) for x in (plain, view)]
        keys, values = layers[0].read()
        mask = jnp.repeat(layers[0].mask(at, window), 2, axis=1)
        want = dot_product_attention(q, keys, values, mask=mask)
        got = layers[1].attend(q, positions=at, window=window)
        real = np.asarray(valid)
        np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-6)
        plain, view = (x.advance([y], valid) for x, y in zip((plain, view), layers, strict=True))
    jax.tree.map(np.testing.assert_array_equal, plain, was_read(view))
