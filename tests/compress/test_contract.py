"""One contract for every method and every storage: the table below is all that a method adds.

The oracle: a compressed cache gives the logits of a cache that stores everything and hides, for
each layer, row, head, what was evicted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.compress import COMPRESSORS, parse
from jaxeff.compress.scorer import Budgeted, evictable_layers
from jaxeff.generate import _prepare, generate
from jaxeff.kv_cache import STORES, DenseCache, TiledLayer, check_invariants
from jaxeff.models import Decoder, ModelConfig

LENGTHS = np.array([40, 23, 31])
STEPS = 37  # three compactions, and one step after the last
STORAGES = ("float32", *STORES)
# A budget of 20, a buffer of 12: sized for the texts below.
METHODS = {
    "full": "full",
    "rkv": "rkv(budget=20, buffer=12, window=4, num_sinks=2)",
    "snapkv": "snapkv(budget=20, buffer=12, window=4, num_sinks=2, variant='original')",
    "streaming_llm": "streaming_llm(budget=20, buffer=12, num_sinks=2)",
    "h2o": "h2o(budget=20, buffer=12, num_sinks=2)",
    "tova": "tova(budget=20, buffer=12, num_sinks=2)",
    "keydiff": "keydiff(budget=20, buffer=12, num_sinks=2)",
    "knorm": "knorm(budget=20, buffer=12, num_sinks=2)",
    "expected_attention": "expected_attention(budget=20, buffer=12, num_sinks=2, future=16)",
    "random": "random(budget=20, buffer=12, num_sinks=2)",
    "kvzip": "kvzip(ratio=0.5, num_sinks=2, bucket=4)",
    "adakv": "adakv(rkv(budget=20, buffer=12, window=4, num_sinks=2), tile=4)",
    "per_layer": "per_layer(h2o(budget=20, buffer=12, window=4, num_sinks=2), beta=1.3)",
    "quantized": "quantized(keydiff(budget=20, buffer=12, num_sinks=2), 'int8')",
    "compose": "kvzip(ratio=0.5, num_sinks=2, layout='tiled', bucket=4) "
    "+ rkv(budget=8, buffer=6, window=4)",
}


STORE_OF = {name: STORAGES[number % len(STORAGES)] for number, name in enumerate(METHODS)}
# Layers share nothing but the budgets of these methods, so their storages need both.
ACROSS_LAYERS = ("per_layer",)


def _cases():
    """All pairs, storage by storage, so that the oracle of a storage is compiled once.

    Those beyond one storage per method and one method per storage are slow, and run on one layer:
    a layer's codes do not depend on how many layers there are.
    """
    for store in STORAGES:
        for name in METHODS:
            fast = store == STORE_OF[name] or name == "rkv"
            layers = 2 if fast or name in ACROSS_LAYERS else 1
            marks = () if fast else pytest.mark.slow
            yield pytest.param(name, store, layers, marks=marks, id=f"{name}-{store}")


def test_every_registered_method_has_a_row():
    assert set(METHODS) == set(COMPRESSORS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedLayer:
    """A cache that stores everything and hides the entries outside ``visible [B, K, C]``.

    ``newest [B, K, H]`` are key and value of this step as the compressed layer stored them. They
    replace ours: the two differ by float noise, which rounding would now and then turn into a whole
    step, and the oracle is to see the same stored values.
    """

    inner: object
    visible: jax.Array
    newest: tuple

    def update(self, *args, **options):
        inner = self.inner.update(*args, **options)
        batch, heads = inner.length.shape
        rows, heads = np.ix_(range(batch), range(heads))

        def copy(own, other):
            return own.at[rows, heads, inner.length - 1].set(other)

        k, v = (jax.tree.map(copy, *x) for x in zip((inner.k, inner.v), self.newest, strict=True))
        return dataclasses.replace(self, inner=dataclasses.replace(inner, k=k, v=v))

    def read(self, dtype=None):
        return self.inner.read(dtype)

    def mask(self, positions, window=None):
        return self.inner.mask(positions, window) & self.visible[:, :, None]


def _newest(layer):
    """The stored codes of the last token of every head."""
    last = (layer.length - 1)[..., None]

    def take(x):
        x = layer._by_head(x) if isinstance(layer, TiledLayer) else x
        return jnp.take_along_axis(x, last.reshape(*last.shape, *(1,) * (x.ndim - 3)), 2)[:, :, 0]

    return jax.tree.map(take, (layer.k, layer.v))


@functools.cache
def _model(layers=2):
    config = ModelConfig.llama(
        vocab_size=64, num_layers=layers, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Sharper attention than at initialisation, so that what is evicted matters.
    for layer in model.layers:
        layer.attention.q_proj.kernel[...] = 6 * layer.attention.q_proj.kernel[...]
    return model


@functools.cache
def _texts():
    # Few different tokens, so that keys repeat and redundancy has something to find.
    tokens = np.random.default_rng(0).integers(12, size=(3, 40 + STEPS)).astype(np.int32)
    return np.where(np.arange(40) < LENGTHS[:, None], tokens[:, :40], 0), tokens[:, 40:]


@jax.jit
def _step(cache, token):
    """One step with the compressed cache; also what each layer stored of it."""
    logits, cache = _model(len(cache.layers))(token[:, None], cache=cache)
    return logits, cache, tuple(map(_newest, cache.layers))


@jax.jit
def _masked_step(full, visible, newest, token):
    """One step with the oracle, compiled apart: it is the same for all methods of a storage."""
    layers = tuple(map(MaskedLayer, full.layers, visible, newest))
    model = _model(len(layers))
    logits, hidden = model(token[:, None], cache=dataclasses.replace(full, layers=layers))
    layers = tuple(layer.inner for layer in hidden.layers)
    return logits, dataclasses.replace(hidden, layers=layers)


@functools.cache
def _full(store, layers):
    """The uncompressed cache after the prompts, in room for everything."""
    prompt, _ = _texts()
    valid = jnp.arange(40) < LENGTHS[:, None]
    model = _model(layers)
    cache = DenseCache.init_for(model, 3, 40 + STEPS, dtype=store)
    return jax.jit(lambda t, c: model(t, valid=valid, cache=c)[1])(jnp.asarray(prompt), cache)


def _visible(layer, capacity):
    """Which positions a layer still holds, bool ``[B, K, capacity]``."""
    positions = np.asarray(layer.positions)
    here = np.zeros((*positions.shape[:2], capacity + 1), bool)
    np.put_along_axis(here, np.where(positions >= 0, positions, capacity), True, axis=-1)
    return here[..., :capacity]


@functools.cache
def _compressed(text, store, rows=(0, 1, 2), layers=2):
    """A compressor and the cache that decoding starts from."""
    prompt, _ = _texts()
    rows = list(rows)
    made = _prepare(_model(layers), prompt[rows], LENGTHS[rows], STEPS, text, store)
    return made.compressor, made.cache


@pytest.mark.parametrize(("name", "store", "layers"), list(_cases()))
def test_equals_the_masked_full_cache(name, store, layers):
    # The wrapper that names a storage is tried with each; float32 is none of those it may name.
    text = METHODS[name].replace("'int8'", f"'{store}'") if store in STORES else METHODS[name]
    compressor, cache = _compressed(text, store, layers=layers)
    store = compressor.storage or store
    full, steps = _full(store, layers), _texts()[1]
    after = jax.jit(compressor.after_step)
    rounds = np.zeros(3, int)
    slot = np.arange(40 + STEPS)
    evicted = 0
    for step in range(STEPS):
        token = jnp.asarray(steps[:, step])
        seen = np.asarray(cache.seen)[:, None, None]
        visible = [_visible(layer, slot.size) for layer in cache.layers]
        evicted = max(evicted, sum(int((~v & (slot < seen)).sum()) for v in visible))
        visible = tuple(v | (slot >= seen) for v in visible)
        got, cache, newest = _step(cache, token)
        expected, full = _masked_step(full, visible, newest, token)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=3e-5)
        before = np.asarray(cache.lengths())
        cache = after(cache)
        rounds += (np.asarray(cache.lengths()) < before).any(axis=(0, 2))
        if step % 12 == 0:
            check_invariants(cache)
    assert after._cache_size() == 1 and not np.asarray(cache.overflow).any()
    if name != "full":
        assert evicted > 60
    if isinstance(compressor, Budgeted):
        assert (rounds >= 3).all()
        for layer in evictable_layers(cache):
            # Sinks and the window are there after every round.
            held = np.asarray(layer.positions)
            last = np.asarray(cache.seen) - 1
            assert (held == 0).any(-1).all() and (held == 1).any(-1).all()
            assert (held == last[:, None, None]).any(-1).all()


DECODERS = [name for name in METHODS if name not in ("full", "quantized")]


@pytest.mark.parametrize("name", DECODERS)
def test_a_row_keeps_what_it_keeps_in_other_company(name):
    """The shapes are those of the oracle's test, and so are the programs."""
    _, batch = _compressed(METHODS[name], STORE_OF[name])
    _, other = _compressed(METHODS[name], STORE_OF[name], (0, 1, 0))
    for a, b in zip(batch.layers, other.layers, strict=True):
        np.testing.assert_array_equal(_visible(a, 40)[:2], _visible(b, 40)[:2])


ALONE = ("rkv",)  # the others, as slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALONE else pytest.mark.slow) for n in DECODERS]
)
def test_eight_rows_equal_eight_single_runs(name):
    """Prompts of unequal length, decoded through a compaction; the tokens and what is kept."""
    rng = np.random.default_rng(2)
    lengths = np.array([40, 23, 31, 40, 7, 36, 24, 30])
    prompts = np.where(np.arange(40) < lengths[:, None], rng.integers(12, size=(8, 40)), 0)
    options = {"max_new_tokens": 14, "compression": METHODS[name], "cache_dtype": STORE_OF[name]}
    batch = generate(_model(), prompts, lengths=lengths, **options)
    for row in (0, 1, 4, 6) if name in ALONE else range(8):
        alone = generate(_model(), prompts[[row]], lengths=lengths[[row]], **options)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])
        for a, b in zip(batch.cache.layers, alone.cache.layers, strict=True):
            np.testing.assert_array_equal(_visible(a, 60)[row], _visible(b, 60)[0])


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("kvzip", "per_layer")])
def test_a_budget_above_the_length_is_the_full_cache(name):
    text = METHODS[name].replace("budget=20", "budget=200").replace("ratio=0.5", "ratio=1")
    text = text.replace("budget=8", "budget=200")
    layers = 2 if name == "compose" else 1  # KVzip's entries compete across layers
    compressor, cache = _compressed(text, "float32", layers=layers)
    for layer in cache.layers:
        np.testing.assert_array_equal(layer.length, np.broadcast_to(LENGTHS[:, None], (3, 2)))
    if name != "compose":
        bound = 40 + STEPS + 1
        assert cache.layers[0].capacity <= bound


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_bad_settings_are_named(name):
    cls = COMPRESSORS[name]
    names = {field.name for field in dataclasses.fields(cls)}
    if cls.primary == "budget":
        with pytest.raises(ValueError, match="budget=0; expected a whole number of tokens"):
            cls(budget=0)
        with pytest.raises(ValueError, match="budget=2 must be at least window=4"):
            cls(budget=2, window=4)
        with pytest.raises(ValueError, match=r"num_sinks=9 must be in \[0, 4\]"):
            cls(budget=8, window=4, num_sinks=9)
        with pytest.raises(ValueError, match="scope='batch'; expected"):
            cls(budget=8, window=4, num_sinks=0, scope="batch")
    with pytest.raises(ValueError, match=f"{name} has no 'colour'"):
        parse(f"{name}(colour=1)")
    assert "storage" in names and cls.__doc__.count("References:") == 1
