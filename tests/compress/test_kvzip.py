"""KVzip against the original code's golden data, its repeat pass, and its messages."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.compress import KVzip
from jaxeff.compress.kvzip import (
    REPEAT_FIRST,
    REPEAT_LATER,
    _max_by_sums,
    _max_over_rows,
    keep_mask,
    reconstruction_scores,
)
from jaxeff.generate import _observe, prepare, side_by_side
from jaxeff.kv_cache import DenseCache, check_invariants
from jaxeff.models import Decoder, ModelConfig
from jaxeff.nn import Attention
from pallas_kernels._interpret import abstract_gpu

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "kvzip"
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
RATIOS = (0.1, 0.3, 0.5, 0.9, 1.0)


def _load(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return data, json.loads(str(data["meta_json"]))


_reconstruction = jax.jit(
    reconstruction_scores, static_argnames=("num_sinks", "chunk", "query_block")
)


def _score_layer(data, meta, layer, block=128):
    """Scores of one layer over all chunks, ``[B, K, n_s + n_c]``."""
    keys = jnp.asarray(data["cache_k"][layer]).swapaxes(1, 2)
    best, start = None, meta["n_s"]
    for number, size in enumerate(meta["chunks"]):
        got = _reconstruction(
            jnp.asarray(data[f"q_chunk{number}"][layer]).swapaxes(1, 2),
            keys,
            jnp.asarray(data[f"k_in_chunk{number}"][layer]).swapaxes(1, 2),
            num_sinks=meta["n_s"],
            start=start,
            chunk=size,
            query_block=block,
        )
        best = got if best is None else jnp.maximum(best, got)
        start += size
    return best


@pytest.mark.parametrize("name", FILES)
def test_scores_equal_the_original(name):
    data, meta = _load(name)
    for layer in range(meta["L"]):
        for block in (128, 17):
            got = np.asarray(_score_layer(data, meta, layer, block))
            assert np.isneginf(got[..., : meta["n_s"]]).all()
            got = got[..., meta["n_s"] :]
            np.testing.assert_allclose(got, data["score"][layer], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                got.max(-1)[0], data["head_score"][layer], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", FILES)
def test_selection_equals_the_original(name):
    data, _ = _load(name)
    score = jnp.asarray(data["score"])
    for ratio in RATIOS:
        upstream = keep_mask(score, ratio, upstream_threshold=True)
        np.testing.assert_array_equal(upstream, data[f"pair_valid_r{ratio}"])
        exact = keep_mask(score, ratio)
        assert int(exact.sum()) == int(score.size * ratio)
        # Without ties the original loses exactly the threshold element.
        assert int((exact & ~upstream).sum()) == (ratio < 1) and not (upstream & ~exact).any()
        for level in ("uniform", "pair-uniform"):
            got = keep_mask(score, ratio, level=level)
            np.testing.assert_array_equal(got, data[f"uniform_valid_r{ratio}"])
    tied = jnp.asarray(data["tied_score"])
    for ratio in (0.3, 0.5):
        got = keep_mask(tied, ratio, upstream_threshold=True)
        np.testing.assert_array_equal(got, data[f"tied_pair_valid_r{ratio}"])
        assert int(keep_mask(tied, ratio).sum()) == int(tied.size * ratio)


@pytest.mark.parametrize("name", FILES)
def test_head_level_equals_the_original(name):
    data, _ = _load(name)
    score = jnp.asarray(data["head_level_score"])[..., None]  # [L, B, K, 1]
    score = jnp.broadcast_to(score, data["score"].shape)
    both = np.maximum(data["head_score"], data["head_score_second_file"])
    np.testing.assert_array_equal(both, data["head_level_score"][:, 0])
    for ratio in (0.3, 0.5, 0.6):
        got = np.asarray(keep_mask(score, ratio, level="head", upstream_threshold=True))
        expected = np.broadcast_to(data[f"head_valid_r{ratio}"][..., None], got.shape)
        np.testing.assert_array_equal(got, expected)
        exact = np.asarray(keep_mask(score, ratio, level="head"))
        assert (exact.all(-1) == exact.any(-1)).all()
        assert exact.all(-1).sum() == int(both.size * ratio)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_eviction_keeps_the_original_rows(name, level, ratio):
    data, meta = _load(name)
    sinks, slots = meta["n_s"], data["cache_k"].shape[3]
    cache = DenseCache.init(meta["L"], 1, slots, meta["Hkv"], meta["d"], dtype=jnp.float32)
    layers = []
    for number, layer in enumerate(cache.layers):
        k = jnp.asarray(data["cache_k"][number]).swapaxes(1, 2)
        layers.append(layer.update(k, k, positions=jnp.arange(slots)[None]))
    cache = cache.advance(layers, jnp.ones((1, slots), bool))
    scores = jnp.pad(
        jnp.asarray(data["score"]), ((0, 0),) * 3 + ((sinks, 0),), constant_values=-jnp.inf
    )
    method = KVzip(ratio=ratio, level=level, num_sinks=sinks, upstream_threshold=True, bucket=1)
    small = method.evict_context(cache, tuple(scores), room=3)
    check_invariants(small)
    key = f"{level.replace('-', '_')}_r{ratio}"
    lengths = np.asarray(small.lengths())[:, 0]
    np.testing.assert_array_equal(lengths, data[f"evict_{key}_len_k"])
    flat = [
        head * slots + small.layers[layer].positions[0, head, : lengths[layer, head]]
        for layer in range(meta["L"])
        for head in range(meta["Hkv"])
    ]
    np.testing.assert_array_equal(np.concatenate(flat), data[f"evict_{key}_flat_index"])
    assert [layer.capacity for layer in small.layers] == (lengths.max(1) + 3).tolist()
    assert all((layer.frozen == sinks).all() for layer in small.layers)
    for before, after in zip(cache.layers, small.layers, strict=True):
        got = after.k[0, 0, : after.length[0, 0]]
        np.testing.assert_array_equal(got, before.k[0, 0][after.positions[0, 0, : got.shape[0]]])


def _plain(queries, keys, input_keys, columns, length, scored):
    """Maximum softmax weight per slot for one row and one KV head, in float64."""
    rows, best = queries.shape[0], np.full(keys.shape[0], -np.inf)
    own = np.arange(rows)
    shown = [j for j in columns if j < length]
    for head in range(queries.shape[1]):
        for row in range(rows):
            every = np.concatenate([keys[shown], input_keys[own <= row]])
            logits = every @ queries[row, head] / np.sqrt(keys.shape[-1])
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            for place, slot in enumerate(shown):
                if slot in scored:
                    best[slot] = max(best[slot], weights[place])
    return best


@pytest.mark.parametrize("norm", ["chunk", "full"])
def test_scores_with_short_rows_follow_the_formula(norm):
    rng = np.random.default_rng(0)
    queries, inputs = rng.normal(size=(2, 9, 4, 8)), rng.normal(size=(2, 9, 2, 8))
    keys = rng.normal(size=(2, 12, 2, 8))
    length, valid = [12, 7], np.arange(9) < np.array([[9], [5]])
    got = reconstruction_scores(
        *(jnp.asarray(x, jnp.float32) for x in (queries, keys, inputs)),
        num_sinks=2,
        start=5,
        chunk=4,
        length=jnp.asarray(length),
        input_valid=jnp.asarray(valid),
        norm=norm,
        query_block=4,
    )
    columns = range(12) if norm == "full" else [0, 1, 5, 6, 7, 8]
    for row, (size, real) in enumerate(zip(length, (9, 5), strict=True)):
        for head in range(2):
            want = _plain(
                queries[row, :real, 2 * head : 2 * head + 2],
                keys[row, :, head],
                inputs[row, :real, head],
                columns,
                size,
                range(5, 9),
            )
            np.testing.assert_allclose(got[row, head], want, rtol=1e-5, atol=1e-6)


def test_one_chunk_and_full_softmax_agree_and_no_norm_gives_logits():
    rng = np.random.default_rng(1)
    shapes = ((1, 6, 2, 8), (1, 5, 1, 8), (1, 6, 1, 8))
    queries, keys, inputs = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    chunk = reconstruction_scores(queries, keys, inputs)
    np.testing.assert_allclose(
        chunk, reconstruction_scores(queries, keys, inputs, norm="full"), 1e-6
    )
    logits = jnp.einsum("banh,bskh->bkans", queries, keys) / 8**0.5
    np.testing.assert_allclose(
        reconstruction_scores(queries, keys, inputs, norm="none"), logits.max((2, 3)), 1e-5
    )


def test_kvzip_plus_weighs_with_what_an_entry_adds_to_the_residual_stream():
    """Against the attention of the layer itself: weight · ‖W_O v‖ / ‖h‖, largest over the rows."""
    layer = Attention(16, 4, 2, head_dim=8, rngs=nnx.Rngs(0))
    x, size = 2 * jax.random.normal(jax.random.key(0), (1, 15, 16)), 9
    positions = jnp.arange(15)[None]
    cache = DenseCache.init(1, 1, size, 2, 8, dtype=jnp.float32, num_heads=4)
    method = KVzip(ratio=0.5, kvzip_plus=True)

    @jax.jit
    def run(x):
        _, filled = layer(x[:, :size], positions=positions[:, :size], cache=cache.layers[0])
        view = method.observe(dataclasses.replace(cache, layers=(filled,)), jnp.int32(0)).layers[0]
        _, seen = layer(x[:, size:], positions=positions[:, size:], cache=view)
        return seen.scores, layer.qkv(x, positions)

    scores, (q, k, v) = run(x)
    logits = np.einsum("tkgh,skh->kgts", q[0].reshape(15, 2, 2, 8), k[0]) / 8**0.5
    logits = np.where(np.tril(np.ones((15, 15), bool)), logits, -np.inf)
    weights = np.asarray(jax.nn.softmax(logits, axis=-1))[:, :, size:, :size]  # [K, G, A, S]
    kernel = np.asarray(layer.out_proj.kernel[...]).reshape(2, 2, 8, 16)
    added = np.linalg.norm(np.einsum("skh,kghd->kgsd", v[0, :size], kernel), axis=-1)
    norms = np.linalg.norm(x[0, size:], axis=-1)
    want = (weights * added[:, :, None] / norms[:, None]).max((1, 2))
    np.testing.assert_allclose(scores[0], want, rtol=1e-4)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_tiles_allocate_what_a_ratio_keeps(storage):
    """Ratio .3 of real arrays: at most .35 of the full bf16 cache, .18 as INT8."""
    full = DenseCache.init(1, 1, 1024, 8, 64)
    cache = DenseCache.init(1, 1, 1024, 8, 64, dtype=storage)
    k = jax.random.normal(jax.random.key(0), (1, 1024, 8, 64))
    layer = jax.jit(lambda x: x.update(k, k, positions=jnp.arange(1024)[None]))(cache.layers[0])
    cache = cache.advance([layer], jnp.ones((1, 1024), bool))
    scores = jnp.exp(jax.random.normal(jax.random.key(1), (1, 8, 1024)))
    scores = scores * jnp.linspace(0.5, 2.0, 8)[:, None]  # uneven heads
    method = KVzip(ratio=0.3, layout="tiled", storage=storage)
    small = method.evict_context(cache, (scores,), room=0)
    lengths = np.asarray(small.lengths())
    assert lengths.sum() == int(0.3 * 8 * 1024) and lengths.max() > 3 * lengths.min()
    held = sum(x.nbytes for x in jax.tree.leaves(small))
    assert held == small.allocated_bytes()
    assert held / full.allocated_bytes() <= {"bfloat16": 0.35, "int8": 0.18}[storage]


def test_dead_slots_never_compete_and_ties_go_to_the_lower_slot():
    scores = jnp.array([[[[0.5, 0.5, 0.5, -jnp.inf]]], [[[0.5, 0.1, -jnp.inf, -jnp.inf]]]])
    kept = keep_mask(scores, 0.4)  # 2 of 5
    assert kept[:, 0, 0].tolist() == [[True, True, False, False], [False] * 4]
    assert keep_mask(scores, 1.0).tolist() == (scores > -jnp.inf).tolist()


def test_the_authors_threshold_rounds_as_their_code():
    scores = jnp.arange(100.0).reshape(1, 1, 1, 100)
    assert int(100 * 0.29) == 28  # 28.999…
    assert int(keep_mask(scores, 0.29, upstream_threshold=True).sum()) == 28 - 1
    assert int(keep_mask(scores, 0.29).sum()) == 29


def test_passes_repeat_every_context_token_once():
    rng = np.random.default_rng(2)
    tokens = rng.integers(256, size=(2, 50)).astype(np.int32)
    lengths = np.array([50, 23])
    method = KVzip(ratio=0.5, chunk=20, num_sinks=4, header=(7, 8))
    passes = method.context_passes(tokens, lengths, vocab_size=256)
    assert [item.start for item in passes] == [4, 24, 44]
    assert len({item.tokens.shape for item in passes}) == 1
    first, later = list(REPEAT_FIRST.encode()), list(REPEAT_LATER.encode())
    row = [int(x) for x in tokens[0]]
    got = passes[0].tokens[0][passes[0].valid[0]].tolist()
    assert got == [*first, 7, 8, *row[4:24]]
    got = passes[1].tokens[0][passes[1].valid[0]].tolist()
    assert got == [*later, *row[16:24], 7, 8, *row[24:44]]
    got = passes[2].tokens[0][passes[2].valid[0]].tolist()
    assert got == [*later, *row[36:44], 7, 8, *row[44:50]]
    assert not passes[1].valid[1].any() and not passes[2].valid[1].any()
    silent = method.context_passes(tokens, lengths, vocab_size=1000)[0]
    assert silent.tokens[0][silent.valid[0]].tolist() == [7, 8, *row[4:24]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KVzip(ratio=0), r"ratio=0 must be in \(0, 1\]"),
        (lambda: KVzip(ratio=1.5), r"ratio=1.5 must be in \(0, 1\]"),
        (lambda: KVzip(ratio=float("nan")), r"ratio=nan must be in"),
        (lambda: KVzip(ratio=0.3, level="layer"), "level='layer'; expected 'pair'"),
        (lambda: KVzip(ratio=0.3, norm="softmax"), "norm='softmax'; expected 'chunk'"),
        (
            lambda: KVzip(ratio=0.3, norm="none", kvzip_plus=True),
            "norm='none' gives logits; kvzip_plus needs 'chunk' or 'full'",
        ),
        (
            lambda: reconstruction_scores(
                *(jnp.ones((1, n, 2, 4)) for n in (3, 5, 3)), row_norms=jnp.ones((1, 5))
            ),
            r"row_norms has shape \(1, 5\); expected \(1, 3\)",
        ),
        (lambda: KVzip(ratio=0.3, chunk=0), "chunk=0; expected 1 or more tokens"),
        (lambda: KVzip(ratio=0.3, chunk=2.5), "chunk=2.5; expected 1 or more tokens"),
        (
            lambda: KVzip(ratio=0.3, repeat_prompt=[300]).context_passes(
                np.zeros((1, 4), int), np.array([4]), vocab_size=256
            ),
            "repeat_prompt has token ids from 300 to 300; the vocabulary has 256",
        ),
        (
            lambda: reconstruction_scores(
                jnp.ones((1, 2, 3, 4)), jnp.ones((1, 5, 2, 4)), jnp.ones((1, 2, 2, 4))
            ),
            r"keys has 2 heads; query heads \(3\)",
        ),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scoring_memory_is_one_query_block():
    shapes = [(1, 512, 2, 8), (1, 640, 1, 8), (1, 512, 1, 8)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(lambda *a: reconstruction_scores(*a, query_block=64)).lower(*args).as_text()
    assert "512x1152" not in text and "64x1152" in text


def test_weights_from_sums_are_those_of_a_softmax():
    """What the kernels compute: heads of unequal length, rows that end early, hidden slots."""
    b, s, a, n, k, h = 2, 20, 6, 4, 2, 8
    rng = np.random.default_rng(7)
    q, keys, own = (
        jnp.asarray(rng.normal(size=x), jnp.float32)
        for x in ((b, a, n, h), (b, s, k, h), (b, a, k, h))
    )
    live = np.arange(s) < np.array([[20, 11], [3, 0]])[..., None]
    live[:, :, 1] = False
    valid = np.arange(a) < np.array([[6], [4]])
    norms = jnp.asarray(rng.uniform(0.5, 2, size=(b, a)), jnp.float32)
    got = _max_by_sums(q, keys, own, live, valid, norms, 0.4, "xla")
    want = _max_over_rows(q, keys, own, live, valid, None, norms, True, 0.4, 128)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_kernels_take_scores_on_a_gpu():
    """Scoring a chunk of a bf16 cache is two kernels: a log-sum-exp, and the largest weights."""
    shapes = [(1, 256, 4, 64), (1, 512, 2, 64), (1, 256, 2, 64)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with abstract_gpu():
        traced = jax.jit(lambda *x: reconstruction_scores(*x, start=128, chunk=256)).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


def test_a_pass_leaves_the_cache_alone_and_equals_attention():
    """The recorded scores are the attention that the model itself pays, layer by layer."""
    config = ModelConfig.llama(
        vocab_size=256, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8
    )
    model, lengths = Decoder(config, rngs=nnx.Rngs(0)), np.array([40, 23, 31])
    prompt = np.random.default_rng(4).integers(256, size=(3, 40)).astype(np.int32)
    cache = DenseCache.init_for(model, 3, 40, dtype=jnp.float32)
    valid = jnp.arange(40) < lengths[:, None]
    run = jax.jit(lambda tokens, valid, cache: model(tokens, valid=valid, cache=cache))
    _, cache = run(prompt, valid, cache)
    method = KVzip(ratio=0.5, norm="full")
    (item,) = method.context_passes(prompt, lengths, vocab_size=256)

    @jax.jit
    def observe(tokens, valid, cache):
        view = method.observe(cache, jnp.int32(0))
        logits, seen = model(tokens, valid=valid, cache=view)
        for before, after in zip(cache.layers, seen.layers, strict=True):
            assert after.inner is before
        return logits, method.collect(seen)

    logits, scores = observe(item.tokens, item.valid, cache)
    # The same input through a cache that does store it: equal logits.
    roomy = dataclasses.replace(
        cache, layers=tuple(layer.resize(40 + item.tokens.shape[1]) for layer in cache.layers)
    )
    stored, _ = run(item.tokens, item.valid, roomy)
    real = item.valid
    np.testing.assert_allclose(logits[real], stored[real], rtol=1e-4, atol=1e-5)
    for score in scores:
        live = np.arange(40) < lengths[:, None, None]
        assert (np.isfinite(score) == live).all()
        assert (np.asarray(score)[np.broadcast_to(live, score.shape)] > 0).all()


def _read(model, prompt, lengths):
    """The cache of a batch of texts."""
    rows, tokens = prompt.shape
    cache = DenseCache.init_for(model, rows, tokens, dtype=jnp.float32)
    valid = jnp.arange(tokens) < np.asarray(lengths)[:, None]
    run = jax.jit(lambda tokens, valid, cache: model(tokens, valid=valid, cache=cache)[1])
    return run(prompt, valid, cache)


@pytest.mark.parametrize(("norm", "sinks"), [("chunk", 0), ("chunk", 3), ("full", 2)])
def test_passes_side_by_side_score_as_one_by_one(norm, sinks):
    config = ModelConfig.llama(
        vocab_size=256, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8
    )
    model, lengths = Decoder(config, rngs=nnx.Rngs(0)), np.array([40, 12, 31])
    prompt = np.random.default_rng(4).integers(256, size=(3, 40)).astype(np.int32)
    cache = _read(model, prompt, lengths)
    method = KVzip(ratio=0.5, norm=norm, num_sinks=sinks, chunk=9, side_by_side=True)
    passes = method.context_passes(prompt, lengths, vocab_size=256)
    graphdef, state = nnx.split(model)

    def scores(passes):
        found = [
            _observe(graphdef, method, state, cache, *map(jnp.asarray, item)) for item in passes
        ]
        return [functools.reduce(jnp.maximum, x) for x in zip(*found, strict=True)]

    width = passes[0].tokens.shape[1]
    joined = side_by_side(passes, method.most_passes(cache), 3 * width)
    assert len(passes) == 5 and [x.start.shape for x in joined] == [(3,), (3,)]
    for mine, its in zip(scores(joined), scores(passes), strict=True):
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(its))
        live = np.isfinite(its)
        np.testing.assert_allclose(np.asarray(mine)[live], np.asarray(its)[live], rtol=1e-4)


def test_passes_in_fp8_are_close_and_leave_the_rest_alone():
    config = ModelConfig.llama(
        vocab_size=256, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(5).integers(256, size=(1, 48)).astype(np.int32)
    made = [
        prepare(model, prompt, compression=KVzip(ratio=0.5, pass_format=form))
        for form in (None, "fp8")
    ]
    kept = [np.asarray(x.cache.layers[0].positions) for x in made]
    shared = [np.isin(a, b).mean() for a, b in zip(*(x[0] for x in kept), strict=True)]
    assert min(shared) > 0.8
    with pytest.raises(ValueError, match="expected None or 'fp8'"):
        KVzip(ratio=0.5, pass_format="int3")
    with pytest.raises(ValueError, match="needs side_by_side=True"):
        KVzip(ratio=0.5, side_by_side=False, pass_quant="sage2")
