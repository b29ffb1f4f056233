"""Sampling: Jacobi, guidance, caches and the options that are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.models.starflow import (
    CacheSpec,
    cache_bytes,
    denoise,
    rope_angles,
    rope_positions,
    rotate,
    sample,
    score_guidance,
    starflow_xl,
    starflow_xxl,
)
from jaxeff.models.starflow.sampling import _inverse

from .flow_cases import CASES, condition, data, make


@pytest.mark.parametrize(
    ("name", "chunk", "method"),
    [
        ("tarflow", 3, "jacobi"),
        ("starflow", 99, "jacobi"),
        ("starflow", 5, "slide"),
        pytest.param("tarflow", 3, "slide", marks=pytest.mark.slow),
        pytest.param("starflow_class", 3, "jacobi", marks=pytest.mark.slow),
    ],
)
def test_sweeps_without_tolerance_are_sequential(name, chunk, method):
    flow, z, cond = make(name), data(name), condition(name, 3)
    exact = flow.inverse(z, cond)
    jacobi, trace = flow.inverse(
        z, cond, method=method, chunk=chunk, threshold=0.0, return_trace=True
    )
    assert float(jnp.abs(jacobi - exact).max()) <= 1e-5
    steps = flow.config.num_tokens - (0 if flow.config.sos else 1)
    assert all(int(s.sum()) == steps for s in trace.sweeps if s.size)  # none: identity


def test_jacobi_tolerance_bounds_the_work():
    flow, z = make("starflow"), data("starflow")
    exact = flow.inverse(z)
    loose, trace = flow.inverse(
        z, method="jacobi", chunk=(16, 16, 8), threshold=1e-4, return_trace=True
    )
    assert [s.shape[0] for s in trace.sweeps] == [2, 0, 1]
    assert sum(int(s.sum()) for s in trace.sweeps) < 32
    error = float(jnp.square(loose - exact).mean() / jnp.square(exact).mean())
    assert error < 1e-2
    guided = flow.inverse(
        z, method="jacobi", chunk=16, threshold=0.0, attn_temp=1.2, attn_temp_on="both"
    )
    assert (
        float(jnp.abs(guided - flow.inverse(z, attn_temp=1.2, attn_temp_on="both")).max()) <= 1e-5
    )


def test_a_sliding_window_takes_fewer_sweeps_for_the_same_tolerance():
    flow, z = make("starflow"), data("starflow")
    exact = flow.inverse(z)
    run = functools.partial(flow.inverse, z, chunk=4, threshold=1e-4, return_trace=True)
    chunked, chunks = run(method="jacobi")
    slid, slides = run(method="slide")
    assert sum(int(s.sum()) for s in slides.sweeps) < sum(int(s.sum()) for s in chunks.sweeps)
    square = jnp.square(exact).mean()
    assert float(jnp.square(slid - exact).mean() / square) < 1e-2
    # The window of a cache counts back from each token, wherever the sweeps start.
    windowed = flow.inverse(z, cache="window:5")
    slid = flow.inverse(z, cache="window:5", method="slide", chunk=4, threshold=0.0)
    np.testing.assert_allclose(slid, windowed, atol=1e-5)
    with pytest.raises(ValueError, match='max_sweeps is for method="jacobi", got 8'):
        flow.inverse(z, method="slide", max_sweeps=8)


def test_guidance_numeric_case():
    mu, sigma = score_guidance(1.0, 0.8, -0.5, 1.0, 2.0)
    np.testing.assert_allclose([mu, sigma], [3.64 / 1.72, 0.8 / 1.72**0.5], rtol=1e-6)
    np.testing.assert_allclose([mu, sigma], [2.11628, 0.60999], atol=5e-6)
    mu, sigma = score_guidance(1.0, 1.2, -0.5, 1.0, 2.0)
    np.testing.assert_allclose([mu, sigma], [4.0, 1.2], rtol=1e-6)


def test_guidance_properties():
    keys = jax.random.split(jax.random.key(0), 4)
    mu_c, mu_u = (jax.random.normal(k, (50,)) for k in keys[:2])
    sigma_c, sigma_u = (jnp.exp(jax.random.normal(k, (50,))) for k in keys[2:])
    for weight in (0.0, 0.5, 3.6, 10.0):
        mu, sigma = score_guidance(mu_c, sigma_c, mu_u, sigma_u, weight)
        assert bool((sigma <= sigma_c * (1 + 1e-6)).all())
        same, unchanged = score_guidance(mu_c, sigma_c, mu_u, sigma_c, weight)
        np.testing.assert_allclose(same, mu_c + weight * (mu_c - mu_u), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(unchanged, sigma_c, rtol=1e-6)
        if weight == 0:
            np.testing.assert_array_equal(mu, mu_c)
            np.testing.assert_array_equal(sigma, sigma_c)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tarflow_class", {"guidance_kind": "linear", "annealed": True, "attn_temp": 1.4}),
        pytest.param("tarflow_class", {"guidance_kind": "linear"}, marks=pytest.mark.slow),
        pytest.param("starflow_class", {}, marks=pytest.mark.slow),
        pytest.param("starflow_text", {"null_cond": jnp.zeros((3, 5))}, marks=pytest.mark.slow),
    ],
)
def test_guided_sampling_cached_uncached_and_jacobi(name, options):
    flow, z, cond = make(name), data(name), condition(name, 3)
    plain = flow.inverse(z, cond)
    tiny = flow.inverse(z, cond, guidance=1e-12, **options)
    np.testing.assert_allclose(tiny, plain, atol=1e-5)
    guided = flow.inverse(z, cond, guidance=2.0, **options)
    assert float(jnp.abs(guided - plain).max()) > 1e-3
    uncached = flow.inverse(z, cond, guidance=2.0, method="recompute", **options)
    np.testing.assert_allclose(guided, uncached, atol=1e-5, rtol=1e-5)
    jacobi = flow.inverse(z, cond, guidance=2.0, method="jacobi", chunk=2, threshold=0.0, **options)
    np.testing.assert_allclose(guided, jacobi, atol=1e-5, rtol=1e-5)


def test_deep_only_guidance_leaves_shallow_blocks_alone():
    flow, z, cond = make("tarflow_class"), data("tarflow_class"), condition("tarflow_class", 3)
    every = flow.inverse(z, cond, guidance=2.0)
    deep, trace = flow.inverse(z, cond, guidance=2.0, guide="deep", return_trace=True)
    assert float(jnp.abs(every - deep).max()) > 1e-4
    assert len(trace.states) == 3


def test_the_whole_inverse_compiles_once():
    flow, z = make("tarflow"), data("tarflow")
    flow.inverse(z)
    before = _inverse._cache_size()
    flow.inverse(z + 1)
    assert _inverse._cache_size() == before


@pytest.mark.parametrize(
    ("cache", "bound"),
    [
        ("int8", 0.05),
        ("window:2/int4", 3.0),
        pytest.param("bfloat16", 0.05, marks=pytest.mark.slow),
        pytest.param("fp8", 0.15, marks=pytest.mark.slow),
        pytest.param("int4", 0.5, marks=pytest.mark.slow),
    ],
)
def test_compressed_caches_drift_but_little(cache, bound):
    flow = make("starflow")
    x = data("starflow")
    z = flow(x)[0]
    drift = float(jnp.sqrt(jnp.square(flow.inverse(z, cache=cache) - x).mean()))
    assert 1e-6 < drift < bound


def test_window_of_all_tokens_is_exact():
    flow, z, cond = make("starflow_class"), data("starflow_class"), condition("starflow_class", 3)
    exact = flow.inverse(z, cond)
    np.testing.assert_allclose(flow.inverse(z, cond, cache="window:4"), exact, atol=1e-6)
    windowed = flow.inverse(z, cond, cache="window:2")
    chunked = flow.inverse(z, cond, cache="window:2", method="jacobi", chunk=2, threshold=0.0)
    np.testing.assert_allclose(windowed, chunked, atol=1e-5)
    assert float(jnp.abs(windowed - exact).max()) > 1e-6


def test_evicting_cache():
    flow, z = make("starflow"), data("starflow")
    exact = flow.inverse(z)
    roomy = flow.inverse(z, cache=CacheSpec(budget=12, buffer=4, observation=2))
    np.testing.assert_allclose(roomy, exact, atol=1e-6)
    small = flow.inverse(z, cache=CacheSpec(budget=6, buffer=2, observation=2))
    error = float(jnp.abs(small - exact).max())
    assert 1e-6 < error < 10
    with pytest.raises(NotImplementedError, match="eviction works token by token"):
        flow.inverse(
            z, cache=CacheSpec(budget=6, buffer=2, observation=2), method="jacobi", chunk=4
        )


def test_library_caches_serve():
    from jaxeff.kv_cache import DenseCache

    flow, z, cond = make("starflow_class"), data("starflow_class"), condition("starflow_class", 3)
    dense = functools.partial(DenseCache.init, dtype=jnp.float32)
    np.testing.assert_allclose(
        flow.inverse(z, cond, guidance=1.5, cache=dense),
        flow.inverse(z, cond, guidance=1.5),
        atol=1e-5,
    )
    with pytest.raises(NotImplementedError, match="Jacobi sweeps rewrite the tokens"):
        flow.inverse(z, cond, cache=dense, method="jacobi")


def test_cache_bytes_of_the_published_models():
    """§4's table: the cache of one sample in bf16, and int8 at most .55 of it."""
    for config, prefix, expected in ((starflow_xl(), 1, 151e6), (starflow_xxl(), 128, 340e6)):
        bf16 = cache_bytes(config, "bfloat16")
        assert bf16["deep"] == pytest.approx(expected, rel=0.01)
        assert prefix == config.prefix_len
        assert cache_bytes(config, "int8")["deep"] <= 0.55 * bf16["deep"]
        assert cache_bytes(config, "bfloat16", guided=True)["deep"] == pytest.approx(
            2 * bf16["deep"], rel=1e-3
        )
        assert cache_bytes(config, "int4")["deep"] <= 0.30 * bf16["deep"]


def test_rope_table():
    positions = rope_positions((8, 8), 8, 5)
    np.testing.assert_array_equal(positions[5:, 0], np.arange(64) // 8)
    np.testing.assert_array_equal(positions[5:, 1], np.arange(64) % 8)
    np.testing.assert_allclose(positions[:5, 2], np.arange(5) * 8 / 5)
    np.testing.assert_allclose(rope_positions((16, 16), 8)[1], [0, 0.5])
    angles = rope_angles(positions, 64)
    assert angles.shape == (69, 32)
    np.testing.assert_allclose(angles[5 + 8 + 2, :2], [1, 10000 ** (-1 / 12)], rtol=1e-6)
    np.testing.assert_allclose(angles[1, 24:26], [1.6, 1.6 * 10000 ** (-1 / 8)], rtol=1e-6)
    assert rope_angles(rope_positions((4, 4), 4), 64).shape == (16, 32)


@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_scores_depend_on_offsets_only(pairs):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 9, 1, 16))
    base = rope_positions((3, 3), 3)
    scores = []
    for offset in (0.0, 7.0):
        angles = jnp.asarray(rope_angles(base + offset, 16))
        rotated = [rotate(part, angles, pairs) for part in (q, k)]
        scores.append(jnp.einsum("btnh,bsnh->bts", *rotated))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_sample_shapes_progress_and_denoising():
    seen = []
    flow = make("tarflow")
    x = sample(flow, jax.random.key(0), batch=2, progress=lambda block, slot: seen.append(block))
    jax.effects_barrier()
    assert x.shape == (2, 4, 4, 1)
    assert sorted(seen) == [0] * 3 + [1] * 3
    clean = sample(flow, jax.random.key(0), batch=2, denoise_sigma=0.3)
    np.testing.assert_allclose(clean, denoise(flow, x, 0.3), atol=1e-5)
    wide = sample(make("starflow"), jax.random.key(0), batch=1, grid=(2, 6))
    assert wide.shape == (1, 2, 6, 2)


def test_denoising_a_gaussian_shrinks_it():
    """The score of N(0, 1) is −y: an identity flow moves y to (1 − σ²) y."""
    from flax import nnx

    from jaxeff.models.starflow import TARFlow

    flow = TARFlow(CASES["tarflow"], rngs=nnx.Rngs(0))
    for block in flow.blocks:
        block.proj_out.bias[...] = jnp.zeros(8)
    y = data("tarflow")
    np.testing.assert_allclose(denoise(flow, y, 0.5), 0.75 * y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -1.0}, "guidance must be at least 0, got -1.0"),
        ({"method": "newton"}, r"method must be one of .*, got 'newton'"),
        ({"guidance_kind": "cubic"}, "guidance_kind must be one of"),
        ({"annealed": True}, "annealed and guide_what apply to"),
        ({"attn_temp": 1.3}, "does nothing with guidance 0"),
        ({"guidance": 1.0}, "guidance of a flow without conditions needs attn_temp"),
        ({"chunk": (4, 4, 4)}, "chunk must be one positive number or 2 of them"),
        ({"cache": "int3"}, "cache must be one of"),
        ({"cache": "rkv:4"}, "budget must exceed the 8 observed tokens"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        make("tarflow").inverse(data("tarflow"), **options)


def test_refused_guidance_without_null():
    z, cond = data("starflow_text"), condition("starflow_text", 3)
    with pytest.raises(ValueError, match="null_cond is needed to guide"):
        make("starflow_text").inverse(z, cond, guidance=1.0)
    with pytest.raises(ValueError, match='guide must be "deep"'):
        make("starflow_class").inverse(
            data("starflow_class"), condition("starflow_class", 3), guidance=1.0, guide="all"
        )
