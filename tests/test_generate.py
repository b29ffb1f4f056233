"""Generation: one compilation per function, batches, stopping, sampling, bytes, messages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeff import generate as module
from jaxeff.compress import RKV, Compressor, FullKV
from jaxeff.generate import answer, generate, prepare, sample, score_continuation
from jaxeff.kv_cache import check_invariants
from jaxeff.models import Decoder, ModelConfig


class CountingDecoder(Decoder):
    """Counts how often its forward is traced."""

    traces = 0

    def __call__(self, *args, **options):
        CountingDecoder.traces += 1
        return super().__call__(*args, **options)


def _decoder(layers):
    config = ModelConfig.llama(
        vocab_size=256, num_layers=layers, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8
    )
    return CountingDecoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return _decoder(2)


@pytest.fixture(scope="module")
def one_layer():
    """For what is the same in every layer: half as much to compile."""
    return _decoder(1)


@pytest.fixture
def prompts():
    return np.random.default_rng(0).integers(256, size=(2, 12)).astype(np.int32)


def _executables():
    names = [key[0].__name__ for key in module._EXECUTABLES]
    return names.count("_prefill"), names.count("_decode")


def test_1000_steps_compile_prefill_and_decode_once(model, prompts):
    module._EXECUTABLES.clear()
    options = {"max_new_tokens": 1001, "compression": "rkv(budget=16, buffer=16)"}
    first = generate(model, prompts, **options)
    assert _executables() == (1, 1)
    CountingDecoder.traces = 0
    again = generate(model, prompts, **options)
    assert _executables() == (1, 1) and CountingDecoder.traces == 0
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.tokens.shape == (2, 1001) and first.cache.seen.tolist() == [1012, 1012]
    assert all(layer.capacity == 32 for layer in first.cache.layers)
    check_invariants(first.cache)
    short = generate(model, prompts, **{**options, "max_new_tokens": 60})
    assert short.cache.allocated_bytes() == first.cache.allocated_bytes()
    assert first.tokens_per_second > 0 and first.decode_seconds > 0


def test_full_cache_generation_equals_the_full_forward(model, prompts):
    lengths = np.array([12, 7])
    result = generate(model, prompts, lengths=lengths, max_new_tokens=9)
    assert result.cache.seen.tolist() == (lengths + 8).tolist()
    for row, length in enumerate(lengths):
        text = jnp.concatenate([prompts[row, :length], result.tokens[row]])[None]
        expected = jnp.argmax(model(text)[0, length - 1 : -1], axis=-1)
        np.testing.assert_array_equal(result.tokens[row], expected)


@pytest.mark.parametrize("compression", ["full", "rkv(budget=10, buffer=4)"])
def test_a_batch_equals_single_runs(model, prompts, compression):
    lengths = np.array([12, 9])
    options = {"max_new_tokens": 12, "compression": compression}
    batch = generate(model, prompts, lengths=lengths, **options)
    for row, length in enumerate(lengths):
        alone = generate(model, prompts[row : row + 1, :length], **options)
        np.testing.assert_array_equal(batch.tokens[row], alone.tokens[0])


def test_scores_of_a_continuation_equal_the_full_forward(model, prompts):
    continuation = np.random.default_rng(1).integers(256, size=(2, 6)).astype(np.int32)
    got = score_continuation(model, prompts, continuation)
    logits = model(jnp.concatenate([prompts, continuation], axis=1))[:, 11:-1]
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, continuation[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got.logprobs, chosen, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.loss, -chosen.mean(), rtol=1e-5)
    np.testing.assert_array_equal(got.tokens, jnp.argmax(logits, axis=-1))


def test_compressed_caches_allocate_less(one_layer):
    model = one_layer
    prompt = np.random.default_rng(2).integers(256, size=(1, 256)).astype(np.int32)
    continuation = prompt[:, :8]
    size = {}
    for name in ("full", "full(storage='int8')", "rkv(budget=32, buffer=16)", "kvzip:1.0"):
        scored = score_continuation(model, prompt, continuation, compression=name)
        size[name] = scored.cache.allocated_bytes()
        assert np.isfinite(scored.loss)
    zipped = {}
    for storage in ("float32", "int8"):
        text = f"kvzip(ratio=0.3, level='uniform', storage='{storage}')"
        scored = score_continuation(model, prompt, continuation, compression=text)
        zipped[storage] = scored.cache.allocated_bytes()
        assert scored.compress_seconds > 0
        assert scored.cache.kept_ratio()[0] < 0.35
    full = size["full"]
    assert size["kvzip:1.0"] == full
    assert size["full(storage='int8')"] < 0.45 * full  # heads of 8: 28 of 68 bytes a slot
    assert size["rkv(budget=32, buffer=16)"] < 0.25 * full
    assert zipped["float32"] < 0.36 * full and zipped["int8"] < 0.15 * full


def test_pair_level_gives_bytes_back_per_layer(model):
    prompt = np.random.default_rng(3).integers(256, size=(1, 192)).astype(np.int32)
    scored = score_continuation(model, prompt, prompt[:, :4], compression="kvzip:0.3")
    lengths = np.asarray(scored.cache.lengths())[:, 0] - 3
    assert lengths.sum() == int(0.3 * 4 * 192)
    for layer, longest in zip(scored.cache.layers, lengths.max(axis=1), strict=True):
        assert layer.capacity == -(-longest // 16) * 16 + 3


def test_scores_use_the_softmax_scale_of_the_model(prompts):
    config = ModelConfig.llama(
        vocab_size=256, num_layers=1, embed_dim=16, num_heads=2, head_dim=8, query_scale=0.02
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    prepared = module._prepare(model, prompts, np.array([12, 12]), 2, "rkv:8", None)
    assert prepared.compressor == RKV(budget=8, buffer=7, scale=0.02)


def test_prompts_shorter_than_the_budget_are_untouched(model, prompts):
    full = generate(model, prompts, max_new_tokens=5)
    same = generate(model, prompts, max_new_tokens=5, compression="rkv:256")
    np.testing.assert_array_equal(full.tokens, same.tokens)
    assert same.cache.allocated_bytes() == full.cache.allocated_bytes()


def test_uncompressed_prefill_is_cut_at_the_first_step(model, prompts):
    method = RKV(budget=8, buffer=2, window=4, compress_prefill=False)
    result = generate(model, prompts, max_new_tokens=2, compression=method)
    assert result.cache.lengths().tolist() == [[[8, 8]] * 2] * 2
    assert result.cache.layers[0].capacity == 13


def test_rows_stop_at_their_stop_token(model, prompts):
    free = np.asarray(generate(model, prompts, max_new_tokens=8).tokens)
    stop = int(free[0, 2])
    result = generate(model, prompts, max_new_tokens=8, stop_tokens=(stop,))
    for row in range(2):
        places = np.flatnonzero(free[row] == stop)
        count = int(places[0]) + 1 if places.size else 8
        assert result.lengths[row] == count
        assert result.tokens[row, :count].tolist() == free[row, :count].tolist()
        assert (result.tokens[row, count:] == stop).all()
        assert result.cache.seen[row] == 12 + count - 1


def test_sampling_follows_its_limits():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 400)
    draw = {
        "plain": {},
        "top_k": {"top_k": 2},
        "top_p": {"top_p": 0.6},
        "tiny": {"top_p": 1e-6},
    }
    seen = {
        name: np.asarray(jax.vmap(lambda k, o=o: sample(logits, k, temperature=1.0, **o))(keys))
        for name, o in draw.items()
    }
    assert set(seen["plain"].ravel()) == {0, 1, 2, 3}
    assert set(seen["top_k"].ravel()) == set(seen["top_p"].ravel()) == {0, 1}
    assert set(seen["tiny"].ravel()) == {0}
    assert abs((seen["plain"] == 0).mean() - 0.5) < 4 * (0.25 / 400) ** 0.5


def test_same_key_same_text(one_layer, prompts):
    model = one_layer
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    one = generate(model, prompts, key=jax.random.key(1), **options)
    two = generate(model, prompts, key=jax.random.key(1), **options)
    other = generate(model, prompts, key=jax.random.key(2), **options)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert (one.tokens != other.tokens).any()


def test_min_p_keeps_what_is_likely_enough():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 300)
    for min_p, kept in ((0.5, {0, 1}), (0.25, {0, 1, 2}), (1.0, {0})):
        draw = jax.vmap(lambda k, p=min_p: sample(logits, k, temperature=1.0, min_p=p))
        assert set(np.asarray(draw(keys)).ravel()) == kept


def test_every_row_has_its_own_budget_and_streaming_changes_nothing(model, prompts):
    options = {"lengths": [12, 9], "compression": "rkv(budget=10, buffer=4)"}
    free = generate(model, prompts, max_new_tokens=12, **options)
    result = generate(model, prompts, max_new_tokens=[12, 5], **options)
    assert result.lengths.tolist() == [12, 5] and result.cache.seen.tolist() == [23, 13]
    np.testing.assert_array_equal(result.tokens[0], free.tokens[0])
    np.testing.assert_array_equal(result.tokens[1, :5], free.tokens[1, :5])
    seen = []
    before = _executables()
    streamed = generate(
        model,
        prompts,
        max_new_tokens=12,
        on_tokens=lambda tokens, step: seen.append((step, tokens)),
        stream_every=5,
        **options,
    )
    assert _executables() == before  # the same loop, called in pieces
    assert [step for step, _ in seen] == [0, 1, 6, 11]
    np.testing.assert_array_equal(np.concatenate([t for _, t in seen], axis=1), free.tokens)
    np.testing.assert_array_equal(streamed.tokens, free.tokens)
    stopped = generate(
        model, prompts, max_new_tokens=12, on_tokens=lambda tokens, step: step >= 3, **options
    )
    assert stopped.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("compression", ["full", "h2o(budget=8, buffer=4)"])
def test_chunked_prefill_equals_one_forward(one_layer, prompts, compression):
    model = one_layer
    options = {"lengths": [12, 7], "max_new_tokens": 8, "compression": compression}
    whole = generate(model, prompts, **options)
    for chunk in (5, 12, 100):
        parts = generate(model, prompts, prefill_chunk=chunk, **options)
        np.testing.assert_array_equal(parts.tokens, whole.tokens)


def test_one_context_answers_many_questions(model, prompts):
    lengths, asked = np.array([12, 9]), np.array([3, 2])
    context = prepare(model, prompts, lengths=lengths)
    size = context.cache.allocated_bytes()
    for seed in (1, 2):
        question = np.random.default_rng(seed).integers(256, size=(2, 3)).astype(np.int32)
        got = answer(context, question, lengths=asked, max_new_tokens=5)
        joined = np.zeros((2, 15), np.int32)
        for row in range(2):
            text = [*prompts[row, : lengths[row]], *question[row, : asked[row]]]
            joined[row, : len(text)] = text
        want = generate(model, joined, lengths=lengths + asked, max_new_tokens=5)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert got.cache.seen.tolist() == (lengths + asked + 4).tolist()
    assert context.cache.allocated_bytes() == size
    assert context.cache.lengths()[0, :, 0].tolist() == [12, 9]


@pytest.mark.parametrize(
    "compression",
    [
        "kvzip(ratio=0.5, layout='tiled', bucket=4)",
        "rkv(budget=8, buffer=4, window=2)",
        "adakv(knorm(budget=8, buffer=4), tile=2)",
        "kvzip(ratio=0.5) + rkv(budget=6, buffer=4, window=2)",
    ],
)
def test_compressed_contexts_answer_and_stay_within_their_budget(one_layer, prompts, compression):
    context = prepare(one_layer, prompts, compression=compression)
    size = context.cache.allocated_bytes()
    first = answer(context, prompts[:, :3], max_new_tokens=30)
    again = answer(context, prompts[:, :3], max_new_tokens=30)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    check_invariants(first.cache)
    if "(ratio" not in compression.split("+")[-1]:  # a method that bounds what is generated
        assert first.cache.allocated_bytes() <= 1.2 * size
    follow = dataclasses.replace(context, cache=first.cache)
    assert answer(follow, first.tokens[:, -1:], max_new_tokens=2).cache.seen.tolist() == [46, 46]


@pytest.mark.multidevice
@pytest.mark.parametrize("compression", ["full", "rkv(budget=10, buffer=4, scope='layer')"])
def test_sharded_equals_unsharded(prompts, compression):
    config = ModelConfig.llama(
        vocab_size=256, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    many = np.tile(prompts, (2, 1))
    options = {"max_new_tokens": 10, "compression": compression}
    want = generate(model, many, **options)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = {"q_proj": P(None, "model"), "k_proj": P(None, "model"), "v_proj": P(None, "model")}
    split["out_proj"] = P("model", None)
    graphdef, state = nnx.split(model)

    def place(path, x):
        name = next((n for n in split if any(n in str(p) for p in path)), None)
        return jax.device_put(x, NamedSharding(mesh, split.get(name, P())))

    sharded = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(place, state))
    tokens = jax.device_put(many, NamedSharding(mesh, P("data")))
    got = generate(sharded, tokens, **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    for mine, its in zip(got.cache.layers, want.cache.layers, strict=True):
        np.testing.assert_array_equal(mine.positions, its.positions)
    layer = got.cache.layers[0]
    assert "model" in str(layer.k.sharding.spec) and "data" in str(layer.k.sharding.spec)


class _Short(FullKV):
    def prefill_capacity(self, *, prompt, room):
        return prompt


class _Tiny(Compressor):
    def prefill_capacity(self, *, prompt, room):
        return 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; expected a whole number, 1 or more"),
        ({"lengths": [13, 1]}, "lengths has values from 1 to 13; expected 1 to 12"),
        ({"lengths": [0, 1]}, "lengths has values from 0 to 1; expected 1 to 12"),
        ({"lengths": [1]}, r"lengths has shape \(1,\) and dtype int64; expected integers \[2\]"),
        ({"temperature": -1}, "temperature=-1; expected 0"),
        ({"temperature": 1e-40}, "temperature=1e-40; expected 0"),
        ({"temperature": 1}, "key is None; temperature=1 needs a jax.random.key"),
        ({"top_k": 3}, "top_k, top_p and min_p need temperature > 0"),
        ({"temperature": 1, "key": 0, "top_k": 257}, "top_k=257; expected 1 to 256"),
        ({"temperature": 1, "key": 0, "top_k": 2.5}, "top_k=2.5; expected 1 to 256"),
        ({"stop_tokens": 3}, "stop_tokens=3; expected a sequence of token ids"),
        ({"temperature": 1, "key": 0, "top_p": 0}, r"top_p=0; expected a probability in \(0, 1\]"),
        ({"temperature": 1, "key": 0, "min_p": 2}, "min_p=2; expected a share of the largest"),
        ({"max_new_tokens": [1, 2, 3]}, "expected a whole number, 1 or more, or 2 of them"),
        ({"prefill_chunk": 0}, "prefill_chunk=0; expected a whole number, 1 or more"),
        ({"on_tokens": 3}, "on_tokens is a int; expected a callable or None"),
        ({"on_tokens": print, "stream_every": 0}, "stream_every=0; expected a whole number"),
        ({"stop_tokens": [256]}, "stop_tokens has 256; the vocabulary has 256 tokens"),
        ({"compression": "snap"}, "compression='snap' names no method; known: adakv, compose"),
        ({"compression": "rkv:4"}, "budget=4 must be at least window=8"),
        ({"compression": "kvzip:2"}, r"ratio=2 must be in \(0, 1\]"),
        ({"cache_dtype": "int3"}, "int3"),
        ({"compression": _Tiny()}, "prefills a cache of 1 slots; the prompt has 12 tokens"),
        ({"compression": _Short()}, r"the cache overflowed in rows \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(model, prompts, options, message):
    options = {"max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **options)


def test_bad_tokens_are_named(model):
    with pytest.raises(ValueError, match=r"tokens has shape \(3,\) and dtype int64"):
        generate(model, np.arange(3), max_new_tokens=1)
    with pytest.raises(ValueError, match="tokens has rows of unequal length; pad them"):
        generate(model, [[1, 2], [3]], max_new_tokens=1)
    for wrong in ({"top_k": 9}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2}, {"temperature": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            sample(jnp.zeros((1, 4)), jax.random.key(0), **{"temperature": 1, **wrong})
    with pytest.raises(ValueError, match="tokens has ids from 1 to 999; the vocabulary has 256"):
        generate(model, [[1, 999]], max_new_tokens=1)
    with pytest.raises(ValueError, match="question has 2 rows; the context has 1"):
        answer(prepare(model, [[1]]), [[1], [2]], max_new_tokens=1)
    with pytest.raises(ValueError, match="continuation has 2 rows; prompt has 1"):
        score_continuation(model, [[1]], [[1], [2]])
