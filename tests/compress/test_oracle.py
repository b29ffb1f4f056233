"""The eviction oracle: a compressed cache equals a dense one that hides the evicted entries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.compress import RKV, KVzip
from jaxeff.generate import score_continuation
from jaxeff.kv_cache import DenseCache, check_invariants
from jaxeff.models import Decoder, ModelConfig

LENGTHS = np.array([40, 23, 31])
STEPS = 37  # three compactions, and one step after the last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedLayer:
    """A cache that stores everything and hides the entries outside ``visible [B, K, C]``.

    ``twin`` is the compressed layer after this step. Its newest entry replaces ours: the two
    differ by float noise, which INT8 rounding would now and then turn into a whole step, and the
    oracle is to see the same stored values.
    """

    inner: object
    visible: jax.Array
    twin: object

    def update(self, *args, **options):
        inner = self.inner.update(*args, **options)
        source, target = self.twin.length - 1, inner.length - 1
        rows, heads = np.ix_(range(source.shape[0]), range(source.shape[1]))

        def copy(own, other):
            return own.at[rows, heads, target].set(other[rows, heads, source])

        payload = {
            name: jax.tree.map(copy, getattr(inner, name), getattr(self.twin, name))
            for name in ("k", "v")
        }
        return dataclasses.replace(self, inner=dataclasses.replace(inner, **payload))

    def read(self, dtype=None):
        return self.inner.read(dtype)

    def mask(self, positions, window=None):
        return self.inner.mask(positions, window) & self.visible[:, :, None]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.llama(
        vocab_size=256, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Sharper attention than at initialisation, so that what is evicted matters.
    for layer in model.layers:
        layer.attention.q_proj.kernel[...] = 6 * layer.attention.q_proj.kernel[...]
    return model


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    # Few different tokens, so that keys repeat and redundancy has something to find.
    tokens = rng.integers(12, size=(3, LENGTHS.max() + STEPS)).astype(np.int32)
    prompt = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, :40], 0)
    return prompt, tokens[:, 40:]


def _prefill(model, prompt, capacity, dtype, query_window=0):
    valid = jnp.arange(prompt.shape[1]) < LENGTHS[:, None]
    cache = DenseCache.init_for(model, 3, capacity, dtype=dtype, query_window=query_window)
    run = jax.jit(lambda tokens, cache: model(tokens, valid=valid, cache=cache)[1])
    return run(jnp.asarray(prompt), cache)


def _visible(cache, capacity):
    """Which (layer, row, head, position) a compressed cache still holds, ``[L, B, K, C]``."""
    found = []
    for layer in cache.layers:
        positions = np.asarray(layer.positions)
        here = np.zeros((*positions.shape[:2], capacity + 1), bool)
        np.put_along_axis(here, np.where(positions >= 0, positions, capacity), True, axis=-1)
        found.append(here[..., :capacity])
    return np.stack(found)


def _compare(model, compressor, cache, continuation, dtype=jnp.float32):
    """Decode with the compressed cache and with the oracle; return how often it compacted."""
    prompt, steps = continuation
    capacity = prompt.shape[1] + steps.shape[1]
    full = _prefill(model, prompt, capacity, dtype)

    @jax.jit
    def one_step(cache, full, visible, token):
        logits, cache = model(token[:, None], cache=cache)
        layers = map(MaskedLayer, full.layers, visible, cache.layers)
        hidden = dataclasses.replace(full, layers=tuple(layers))
        expected, hidden = model(token[:, None], cache=hidden)
        layers = tuple(layer.inner for layer in hidden.layers)
        full = dataclasses.replace(hidden, layers=layers)
        return logits, expected, compressor.after_step(cache), full

    rounds, evicted = 0, 0
    slot = np.arange(capacity)
    for step in range(steps.shape[1]):
        visible = _visible(cache, capacity)
        seen = np.asarray(cache.seen)[None, :, None, None]
        evicted = max(evicted, int((~visible & (slot < seen)).sum()))
        visible = visible | (slot >= seen)  # the token of this step
        before = np.asarray(cache.lengths())
        got, expected, cache, full = one_step(cache, full, visible, jnp.asarray(steps[:, step]))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
        rounds += int((np.asarray(cache.lengths()) < before).any(axis=(0, 2)).sum())
        check_invariants(cache, time_order=getattr(compressor, "slot_order", "time") == "time")
    assert evicted > 100 and not np.asarray(cache.overflow).any()
    return rounds


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, jnp.float32),
        ({"slot_order": "score", "scope": "global"}, jnp.float32),
        ({"scope": "layer", "num_sinks": 2, "mode": "paper"}, "int8"),
    ],
)
def test_rkv_equals_the_masked_full_cache(model, texts, options, dtype):
    compressor = RKV(budget=20, buffer=12, window=4, **options)
    prompt, _ = texts
    cache = _prefill(model, prompt, prompt.shape[1], dtype, query_window=4)
    cache = compressor.after_prefill(cache)
    assert cache.lengths()[0, :, 0].tolist() == [20, 20, 20]
    assert all(layer.capacity == 32 for layer in cache.layers)
    rounds = _compare(model, compressor, cache, texts, dtype)
    assert rounds == 3 * (STEPS // 12)  # three rounds in each of three rows


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"ratio": 0.3}, jnp.float32),
        ({"ratio": 0.3, "level": "uniform", "chunk": 16, "num_sinks": 3}, jnp.float32),
        ({"ratio": 0.5, "level": "head", "norm": "full", "num_recent": 2}, jnp.float32),
        ({"ratio": 0.3, "chunk": 16}, "int8"),
    ],
)
def test_kvzip_equals_the_masked_full_cache(model, texts, options, dtype):
    compressor = KVzip(bucket=4, **options)
    prompt, continuation = texts
    scored = score_continuation(
        model,
        prompt,
        continuation[:, :1],
        lengths=LENGTHS,
        compression=compressor,
        cache_dtype=dtype,
    )
    cache = scored.cache
    assert cache.seen.tolist() == LENGTHS.tolist()
    context = LENGTHS - compressor.num_sinks - compressor.num_recent
    forced = compressor.num_sinks + compressor.num_recent
    kept = np.asarray(cache.lengths()).sum(axis=(0, 2)) - 4 * forced
    if compressor.level == "pair":
        np.testing.assert_array_equal(kept, np.floor(4 * context * compressor.ratio + 1e-6))
    room = tuple(layer.resize(layer.capacity + STEPS) for layer in cache.layers)
    _compare(model, compressor, dataclasses.replace(cache, layers=room), texts, dtype)


def test_kvzip_pass_leaves_the_cache_alone_and_equals_attention(model, texts):
    """The recorded scores are the attention that the model itself pays, layer by layer."""
    prompt, _ = texts
    cache = _prefill(model, prompt, prompt.shape[1], jnp.float32)
    method = KVzip(ratio=0.5, norm="full")
    (item,) = method.context_passes(prompt, LENGTHS, vocab_size=256)
    view = method.observe(cache, jnp.int32(0))
    logits, seen = model(jnp.asarray(item.tokens), valid=jnp.asarray(item.valid), cache=view)
    for before, after in zip(cache.layers, seen.layers, strict=True):
        assert after.inner is before
    # The same input through a cache that does store it: equal logits.
    roomy = dataclasses.replace(
        cache, layers=tuple(layer.resize(40 + item.tokens.shape[1]) for layer in cache.layers)
    )
    stored, _ = model(jnp.asarray(item.tokens), valid=jnp.asarray(item.valid), cache=roomy)
    real = item.valid
    np.testing.assert_allclose(logits[real], stored[real], rtol=1e-4, atol=1e-5)
    for score in method.collect(seen):
        live = np.arange(40) < LENGTHS[:, None, None]
        assert (np.isfinite(score) == live).all()
        assert (np.asarray(score)[np.broadcast_to(live, score.shape)] > 0).all()
