"""Storage formats, rings, tiles, forks: what a cache promises beyond the dense layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.kv_cache import (
    STORES,
    DenseCache,
    DenseLayer,
    RingLayer,
    TiledLayer,
    check_invariants,
    store_name,
)
from jaxeff.models import Decoder, ModelConfig

HEADS, SIZE = 2, 32


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


_pack = jax.jit(TiledLayer.pack, static_argnames=("tile", "num_tiles", "max_tiles"))
_gather = jax.jit(
    lambda layer, indices, capacity: layer.gather(indices, capacity=capacity),
    static_argnames="capacity",
)
_read = jax.jit(lambda layer: layer.read(jnp.float32))
_mask = jax.jit(lambda layer, places, window: layer.mask(places, window), static_argnames="window")


@functools.cache
def _filled(dtype, tokens=12, capacity=12, **options):
    k, v = _normal(0, 2, tokens, HEADS, SIZE), _normal(1, 2, tokens, HEADS, SIZE)

    @jax.jit
    def fill(k, v):
        layer = DenseLayer.init(2, capacity, HEADS, SIZE, dtype=dtype, **options)
        return layer.update(k, v, positions=jnp.broadcast_to(jnp.arange(tokens), (2, tokens)))

    return fill(k + 3.0, v), k + 3.0, v


@pytest.mark.parametrize(
    ("store", "bytes_per_value", "error"),
    [
        ("bfloat16", 2, 0.004),
        ("int8", 1 + 4 / 32, 0.006),
        ("int8_smooth", 1 + 4 / 32, 0.007),
        ("fp8_e4m3", 1 + 4 / 32, 0.03),
        ("int4", 0.5 + 8 / 32, 0.1),
        ("nvfp4", 0.5 + 1 / 16, 0.12),
    ],
)
def test_storage_has_its_bytes_and_its_error(store, bytes_per_value, error):
    layer, k, v = _filled(store)
    assert layer.store == store == store_name(store)
    payload = sum(x.nbytes for x in jax.tree.leaves((layer.k, layer.v)))
    assert payload == 2 * 2 * HEADS * 12 * SIZE * bytes_per_value
    got = [np.asarray(x) for x in _read(layer)]
    for mine, its in zip(got, (k, v), strict=True):
        its = np.asarray(its)
        assert np.abs(mine - its).mean() < error * np.abs(its).mean()
    kept = jnp.broadcast_to(jnp.array([1, 4, 11]), (2, HEADS, 3))
    small = _gather(layer, kept, None)
    for mine, its in zip(_read(small), got, strict=True):
        np.testing.assert_array_equal(mine, its[:, [1, 4, 11]])  # never encoded again
    empty = DenseLayer.init(1, 3, HEADS, SIZE, dtype=store).read(jnp.float32)
    assert not np.asarray(empty).any()


def test_smoothed_keys_lose_less_where_channels_are_biased():
    plain, k, _ = _filled("int8")
    smooth, _, _ = _filled("int8_smooth")
    errors = [np.abs(np.asarray(_read(x)[0]) - np.asarray(k)).mean() for x in (plain, smooth)]
    assert errors[1] < 0.7 * errors[0]
    later = smooth.resize(13).update(
        k[:, :1], k[:, :1], positions=jnp.full((2, 1), 12), valid=jnp.array([[True], [False]])
    )
    np.testing.assert_array_equal(later.offset, smooth.offset)


@pytest.mark.parametrize("store", ["float32", "int8_smooth", "nvfp4"])
def test_tiles_hold_what_a_dense_layer_holds(store):
    dense, _, _ = _filled(store)
    rng = np.random.default_rng(2)
    kept = [[sorted(rng.permutation(12)[:n]) for n in row] for row in ((9, 1), (0, 6))]
    indices = np.full((2, HEADS, 10), -1)
    for row in range(2):
        for head in range(HEADS):
            indices[row, head, : len(kept[row][head])] = kept[row][head]
    want = _gather(dense, indices, 16)
    got = _pack(dense, indices, tile=4, num_tiles=8, max_tiles=4)
    assert not got.overflow.any() and got.used.tolist() == [4, 2]
    step = jax.jit(lambda layer, k, p, ok: layer.update(k, -k, positions=p, valid=ok))
    for number in range(3):  # more tokens: 1, 2, 1 of them real in the second row
        count = 2 if number == 1 else 1
        k = _normal(10 + number, 2, count, HEADS, SIZE)
        places = 12 + number * 2 + jnp.broadcast_to(jnp.arange(count), (2, count))
        real = jnp.array([[True] * count, [number != 2] * count])
        want, got = step(want, k, places, real), step(got, k, places, real)
        np.testing.assert_array_equal(got.length, want.length)
        np.testing.assert_array_equal(got.positions, want.positions)
        for mine, its in zip(_read(got), _read(want), strict=True):
            live = np.moveaxis(np.asarray(want.live), 2, 1)[..., None]
            np.testing.assert_array_equal(np.where(live, mine, 0), np.where(live, its, 0))
        query = jnp.full((2, 1), 13)
        np.testing.assert_array_equal(_mask(got, query, 6), _mask(want, query, 6))
    length = np.asarray(got.length)
    again = _gather(got, np.where(np.arange(2) < length[..., None], np.arange(2), -1), None)
    assert (again.length == np.minimum(length, 2)).all() and (np.asarray(again.used) <= 2).all()


def test_tiles_cost_what_heads_keep():
    dense, _, _ = _filled("bfloat16", tokens=256, capacity=256)
    lengths = jnp.array([[150, 4], [100, 54]])
    slot = jnp.arange(256)
    indices = jnp.where(slot < lengths[..., None], slot, -1)
    tiled = _pack(dense, indices, tile=8, num_tiles=20, max_tiles=19 + 13)
    assert not tiled.overflow.any()
    # 154 of 512 slots are kept in the first row: 0.30; tiles, table and counters add little.
    assert tiled.allocated_bytes() / dense.allocated_bytes() < 0.325
    padded = _gather(dense, indices[..., :152], None).allocated_bytes()
    assert tiled.allocated_bytes() < 0.55 * padded


def test_a_full_pool_sets_overflow_and_loses_nothing_old():
    dense, _, _ = _filled("float32")
    indices = jnp.broadcast_to(jnp.arange(4), (2, HEADS, 4))
    layer = _pack(dense, indices, tile=2, num_tiles=5, max_tiles=3)
    assert layer.free().tolist() == [0, 0]
    before = layer.read()[0][:, :4]
    k = _normal(3, 2, 1, HEADS, SIZE)
    layer = layer.update(k, k, positions=jnp.full((2, 1), 12))
    assert layer.overflow.all() and layer.length.tolist() == [[5, 4]] * 2
    np.testing.assert_array_equal(layer.read()[0][:, :4], before)
    assert layer.extend(2).free().min() >= 2


@functools.partial(jax.jit, static_argnames="window")
def _ring_step(ring, places, window):
    """Feed tokens whose key is their place, value its negative; return ring, values, what shows."""
    k = jnp.broadcast_to(places[..., None, None].astype(jnp.float32), (1, places.size, 1, 4))
    view = ring.update(k, -k, positions=places)
    after = view.settle() if places.size > 1 else view
    return after, view.read(), view.mask(places, window)


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6), window=st.integers(1, 6))
def test_a_ring_shows_every_query_its_window(pieces, window):
    ring = RingLayer.init_window(1, window, 1, 4, dtype=jnp.float32)
    seen = 0
    for count in pieces:
        places = np.arange(seen, seen + count)[None]
        ring, read, mask = _ring_step(ring, places, window)
        keys, values = map(np.asarray, read)
        mask = np.asarray(mask)[0, 0]
        for row, place in enumerate(range(seen, seen + count)):
            shown = sorted(keys[0, mask[row], 0, 0])
            assert shown == list(range(max(0, place - window + 1), place + 1))
        np.testing.assert_array_equal(values, -keys)
        seen += count
    assert ring.length[0, 0] == min(seen, window) and not ring.overflow.any()


@functools.cache
def _gemma():
    config = ModelConfig.gemma3(
        vocab_size=32, num_layers=2, embed_dim=16, num_heads=2, head_dim=8, window=5, pattern=2
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def test_windowed_layers_get_rings_and_equal_full_caches():
    model = _gemma()
    tokens = np.random.default_rng(4).integers(32, size=(2, 21)).astype(np.int32)
    lengths = np.array([12, 7])
    valid = jnp.arange(12) < lengths[:, None]
    caches = {
        "ring": DenseCache.init_for(model, 2, 24, dtype=jnp.float32),
        "full": DenseCache.init_for(model, 2, 24, dtype=jnp.float32, windows=()),
    }
    kinds = [type(layer).__name__ for layer in caches["ring"].layers]
    assert kinds == ["RingLayer", "DenseLayer"]
    assert caches["ring"].layers[0].capacity == 5
    step = jax.jit(lambda t, c, ok: model(t, valid=ok, cache=c))
    outs = {}
    for name, cache in caches.items():
        parts = []
        for cut in (slice(0, 6), slice(6, 12)):  # a prefill in two chunks
            out, cache = step(tokens[:, cut], cache, valid[:, cut])
            parts.append(np.where(valid[:, cut, None], out, 0))
        for place in range(12, 21):
            out, cache = step(tokens[:, place : place + 1], cache, jnp.ones((2, 1), bool))
            parts.append(out)
        outs[name] = np.concatenate(parts, axis=1)
        check_invariants(cache)
        caches[name] = cache
    np.testing.assert_allclose(outs["ring"], outs["full"], rtol=1e-4, atol=1e-5)
    assert caches["ring"].allocated_bytes() < 0.65 * caches["full"].allocated_bytes()
    wider = dataclasses.replace(caches["ring"].layers[0], window=9).extend(2)
    assert wider.capacity == 7
    held = np.asarray(wider.positions)
    assert ((held == -1) | (held % 7 == np.arange(7))).all() and (held >= 0).sum() == 2 * 2 * 5


def test_forks_survive_donation_and_restore():
    cache = DenseCache.init(1, 1, 8, 1, SIZE, dtype="int8")
    k = _normal(5, 1, 3, 1, SIZE)

    def append(cache):
        places = cache.seen[:, None] + jnp.arange(3)
        layers = [layer.update(k, k, positions=places) for layer in cache.layers]
        return cache.advance(layers, jnp.ones((1, 3), bool))

    donating = jax.jit(append, donate_argnums=0)
    cache = donating(cache)
    fork = cache.fork()
    after = donating(cache)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))
    again = donating(after.restore(fork))
    assert fork.seen.tolist() == [3]
    jax.tree.map(np.testing.assert_array_equal, again, after)
    assert donating._cache_size() == 1


def test_bad_forks_and_missing_room_are_named():
    cache = DenseCache.init(1, 1, 8, 1, 16)
    cases = {
        r"fork\.layers\[0\]\.k is bfloat16 of shape": DenseCache.init(1, 1, 9, 1, 16),
        r"layers \['DenseLayer\(int8\)'\] where this cache has \['DenseLayer\(bf": DenseCache.init(
            1, 1, 8, 1, 16, dtype="int8"
        ),
        "fork has cache version 0; this cache has version 1": dataclasses.replace(cache, version=0),
        "fork is a int; expected a KVCache": 3,
    }
    for message, fork in cases.items():
        with pytest.raises(ValueError, match=message):
            cache.restore(fork)
    cache.require_room(8)
    with pytest.raises(ValueError, match=r"layer 0 has room for 8 more tokens \(capacity 8\); 9"):
        cache.require_room(9)
    assert cache.extend(1).require_room(9) is None
    old = dataclasses.replace(cache, version=0)
    with pytest.raises(ValueError, match="the cache has version 0; this code reads version 1"):
        old.advance(old.layers, jnp.ones((1, 1), bool))
    with pytest.raises(ValueError, match="tokens=-1; expected 0 or more"):
        cache.extend(-1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: DenseLayer.init(1, 4, 1, 24, dtype="nvfp4"),
            ValueError,
            "head_dim=24 must be a multiple of 16 to be stored as nvfp4",
        ),
        (
            lambda: RingLayer.init_window(1, 4, 1, 8).gather(jnp.zeros((1, 1, 1), int)),
            NotImplementedError,
            "a ring of window=4 tokens keeps exactly its window",
        ),
        (
            lambda: TiledLayer.pack(
                _filled("float32")[0],
                jnp.zeros((2, 2, 9), int),
                tile=4,
                num_tiles=9,
                max_tiles=2,
            ),
            ValueError,
            "indices lists 9 slots per head; max_tiles=2 of tile=4 hold 8",
        ),
        (
            lambda: DenseCache.init(2, 1, 8, 1, 8, windows=(4,)),
            ValueError,
            "windows lists 1 layers; num_layers=2",
        ),
    ],
)
def test_bad_layouts_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_store_is_listed():
    assert set(STORES) == {"int8", "int8_smooth", "fp8_e4m3", "int4", "nvfp4"}
    assert store_name("fp8") == "fp8_e4m3"
