"""What a GPU changes for caches: kernels in the place of XLA's operations, on small models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.compress import KVzip
from jaxeff.generate import _EXECUTABLES, _observe, score_continuation, side_by_side
from jaxeff.kv_cache import DenseCache
from jaxeff.models import Decoder, ModelConfig
from pallas_kernels.ops.decode_attention import compact

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.llama(
        vocab_size=256, num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=64
    )
    return Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


@pytest.mark.parametrize(("norm", "quant"), [("chunk", None), ("full", None), ("chunk", "sage2")])
def test_passes_side_by_side_score_as_one_by_one(model, norm, quant):
    lengths = np.array([512, 330])
    prompt = np.random.default_rng(4).integers(256, size=(2, 512)).astype(np.int32)
    cache = DenseCache.init_for(model, 2, 512, dtype=jnp.bfloat16)
    valid = jnp.arange(512) < lengths[:, None]
    run = jax.jit(lambda tokens, valid, cache: model(tokens, valid=valid, cache=cache)[1])
    cache = run(prompt, valid, cache)
    graphdef, state = nnx.split(model)

    def scores(method, passes):
        found = [
            _observe(graphdef, method, state, cache, *map(jnp.asarray, item)) for item in passes
        ]
        return [functools.reduce(jnp.maximum, x) for x in zip(*found, strict=True)]

    method = KVzip(ratio=0.5, norm=norm, num_sinks=4, chunk=127)
    passes = method.context_passes(prompt, lengths, vocab_size=1000)
    quick = dataclasses.replace(method, side_by_side=True, pass_quant=quant)
    joined = side_by_side(passes, quick.most_passes(cache), 512)
    assert len(passes) == 4 and len(joined) == 1
    for mine, its in zip(scores(quick, joined), scores(method, passes), strict=True):
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(its))
        live = np.isfinite(its)
        mine, its = np.asarray(mine)[live], np.asarray(its)[live]
        # Holds on an H200: bfloat16 layers of other batches, and 8-bit attention in the last case.
        np.testing.assert_allclose(mine, its, rtol=0.1 if quant else 0.05)


@pytest.mark.parametrize("store", ["bfloat16", "int8", "int8_smooth"])
def test_a_cache_kept_by_kernels_is_that_of_xla(model, store, monkeypatch):
    """Appending, choosing, moving; the method looks at positions only: its choice is exact."""
    rng = np.random.default_rng(5)
    prompt, told = (rng.integers(256, size=(3, size)).astype(np.int32) for size in (40, 90))

    def run(kernels):
        monkeypatch.setattr(compact, "MEASURED", kernels)
        jax.clear_caches()
        _EXECUTABLES.clear()
        method = "streaming_llm(budget=48, buffer=16, num_sinks=4)"
        options = {"lengths": [40, 31, 17], "compression": method, "cache_dtype": store}
        return score_continuation(model, prompt, told, **options)

    mine, its = run(True), run(False)
    _EXECUTABLES.clear()
    for a, b in zip(mine.cache.layers, its.cache.layers, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        for x, y in zip(a.read(jnp.float32), b.read(jnp.float32), strict=True):
            np.testing.assert_allclose(x, y, atol=0.1)  # XLA may round less in between
    # Holds on an H200; in between XLA may keep more than 16 bits, as above.
    np.testing.assert_allclose(mine.logprobs, its.logprobs, atol=0.1)
