"""Exactness: inverse, log-determinant, causality, initial state, both conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.models.starflow import (
    TARFlow,
    TARFlowConfig,
    bits_per_dim,
    flow_loss,
    patchify,
    starflow_xl,
    starflow_xxl,
    unpatchify,
)

from .flow_cases import CASES, condition, data, make


@pytest.mark.parametrize("name", sorted(CASES))
def test_round_trip_and_cached_is_uncached(name):
    flow, x, cond = make(name), data(name), condition(name, 3)
    z, logdet, inter = flow(x, cond)
    assert z.shape == x.shape and logdet.shape == (3,) and len(inter) == flow.config.num_blocks
    assert float(jnp.abs(z - x).max()) > 0.05
    back = flow.inverse(z, cond)
    assert float(jnp.abs(back - x).max()) <= 1e-5
    if name in ("tarflow_class", "starflow_text"):
        uncached = flow.inverse(z, cond, method="recompute")
        assert float(jnp.abs(back - uncached).max()) <= 1e-5


@pytest.mark.parametrize("name", ["tarflow", "starflow_class"])
def test_logdet_is_the_jacobians(name):
    flow, x, cond = make(name), data(name, 1), condition(name, 1)

    def flat(values):
        return flow(values.reshape(x.shape), cond)[0].ravel()

    jacobian = np.asarray(jax.jit(jax.jacfwd(flat))(x.ravel()), np.float64)
    _, expected = np.linalg.slogdet(jacobian)
    got = float(flow(x, cond)[1][0]) * x.size
    assert abs(got - expected) <= 1e-4


@pytest.mark.parametrize(
    "name", ["tarflow", pytest.param("starflow_class", marks=pytest.mark.slow)]
)
def test_causal_in_the_blocks_own_direction(name):
    flow, cond = make(name), condition(name, 1)
    tokens, grid = flow.to_tokens(data(name, 1))
    prepared = flow.condition(cond, 1)
    for index, backwards in enumerate(flow.config.reversed_blocks):

        def push(x, index=index):
            return flow._push(index, x, prepared, grid)[0]

        before = push(tokens)
        for j in range(tokens.shape[1]):
            moved = np.asarray(push(tokens.at[:, j].add(1.0)) != before).any((0, 2))
            allowed = np.arange(tokens.shape[1])
            allowed = allowed <= j if backwards else allowed >= j
            assert not moved[~allowed].any()
            assert moved[j]
    assert len(set(flow.config.reversed_blocks)) == 2


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_zero_output_is_the_identity(name):
    flow = TARFlow(CASES[name], rngs=nnx.Rngs(0))
    for block in flow.blocks:
        if block is not None:
            block.proj_out.bias[...] = jnp.zeros_like(block.proj_out.bias[...])
    x = data(name, 2)
    z, logdet, _ = flow(x)
    np.testing.assert_allclose(z, x, atol=1e-6)
    np.testing.assert_allclose(logdet, 0, atol=1e-6)
    np.testing.assert_allclose(flow.nll(x), 0.5 * jnp.square(x).mean((1, 2, 3)), rtol=1e-5)


def test_soft_clip_and_extreme_scales():
    block = make("starflow").blocks[0]
    raw = jnp.array([[[1e4, -1e4, 0.0, 0.0]]])
    mu, log_sigma = block.token_map(raw)
    np.testing.assert_allclose(np.exp(log_sigma[0, 0]), [4.552, 0.0310], rtol=1e-3)
    mu, log_sigma = block.token_map(raw[..., ::-1])
    np.testing.assert_allclose(mu[0, 0], [-4.0, 4.0])
    unclipped = TARFlow(
        TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8, scale="softplus"), rngs=nnx.Rngs(0)
    )
    log_sigma = unclipped.blocks[0].token_map(jnp.full((1, 1, 8), -200.0)).log_sigma
    np.testing.assert_allclose(log_sigma, -199.4587, rtol=1e-5)
    slope = jax.grad(lambda r: unclipped.blocks[0].token_map(r).log_sigma.sum())
    assert bool(jnp.isfinite(slope(jnp.full((1, 1, 8), -200.0))).all())


def test_likelihood_of_an_identity_flow():
    flow = TARFlow(TARFlowConfig(1, 4, 2, 16, (1,), head_dim=8), rngs=nnx.Rngs(0))
    flow.blocks[0].proj_out.bias[...] = jnp.zeros(8)
    x = data("tarflow", 2)
    expected = jax.scipy.stats.norm.logpdf(x).sum((1, 2, 3))
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=1e-5)
    levels = jnp.zeros((2, 4, 4, 1), jnp.int32)
    bits = bits_per_dim(flow, levels, 17, jax.random.key(0))
    u = 2 * jax.random.uniform(jax.random.key(0), levels.shape) / 17 - 1
    density = -jax.scipy.stats.norm.logpdf(u).mean((1, 2, 3)) / np.log(2) + np.log2(17 / 2)
    np.testing.assert_allclose(bits, density, rtol=1e-5)


def test_prior_variance_moves_and_scales_samples():
    flow = nnx.clone(make("tarflow_vp"))
    z = data("tarflow_vp", 4)
    flow.update_prior(z)
    tokens, _ = flow.to_tokens(z)
    np.testing.assert_allclose(
        flow.prior_var[...], 0.9 + 0.1 * jnp.square(tokens).mean(0), rtol=1e-6
    )
    scaled = flow.from_tokens(tokens * jnp.sqrt(flow.prior_var[...]), flow.config.grid)
    np.testing.assert_allclose(
        flow.inverse(z), make("tarflow_vp").inverse(scaled), atol=1e-5, rtol=1e-5
    )
    assert float(jnp.abs(flow(z)[1]).max()) == 0


def test_null_label_is_the_mean_and_the_last_one_hot():
    flow = make("tarflow_class")
    x = data("tarflow_class", 2)
    none, null = flow(x)[0], flow(x, jnp.array([-1, -1]))[0]
    np.testing.assert_allclose(none, null, atol=1e-6)
    assert float(jnp.abs(null - flow(x, jnp.array([0, 1]))[0]).max()) > 1e-3
    star = make("starflow_class")
    prefix = jax.nn.one_hot(jnp.array([3, 1]), 4)[:, None]
    np.testing.assert_allclose(star(x, jnp.array([-1, 1]))[0], star(x, prefix)[0], atol=1e-6)


def test_loss_adds_noise_drops_labels_and_penalises_latents():
    flow, x, key = make("tarflow_class"), data("tarflow_class", 2), jax.random.key(3)
    label = jnp.array([0, 1])
    plain, metrics = flow_loss(flow, x, label)
    np.testing.assert_allclose(plain, flow.nll(x, label).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["z"] - metrics["logdet"], plain, rtol=1e-6)
    dropped, _ = flow_loss(flow, x, label, drop=1.0, key=key)
    np.testing.assert_allclose(dropped, flow.nll(x).mean(), rtol=1e-6)
    noisy, _ = flow_loss(flow, x, label, sigma=0.5, key=key)
    assert abs(float(noisy - plain)) > 1e-3
    penalised, _ = flow_loss(flow, x, label, latent_norm=1e-2)
    penalty = sum(jnp.square(u).mean() for u in flow(x, label)[2])
    np.testing.assert_allclose(penalised - plain, 1e-2 * penalty, rtol=1e-4)
    with pytest.raises(ValueError, match="key is needed for sigma 0.1"):
        flow_loss(flow, x, label, sigma=0.1)
    with pytest.raises(ValueError, match="null_cond is needed"):
        flow_loss(
            make("starflow_text"), data("starflow_text"), condition("starflow_text", 3),
            drop=0.1, key=key,
        )  # fmt: skip


def test_other_resolution_with_rotary_positions():
    flow = make("starflow")
    x = jax.random.normal(jax.random.key(0), (1, 2, 6, 2))
    back = flow.inverse(flow(x)[0])
    assert float(jnp.abs(back - x).max()) <= 1e-5
    with pytest.raises(ValueError, match=r"must have \(2, 2\) tokens, because positions are"):
        make("tarflow")(jnp.zeros((1, 4, 8, 1)))


@pytest.mark.parametrize("order", ["c_p_p", "p_p_c"])
def test_patches(order):
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2, order)
    np.testing.assert_array_equal(unpatchify(tokens, (2, 3), 2, order), x)
    first = x[0, :2, :2]
    expected = first.transpose(2, 0, 1) if order == "c_p_p" else first
    np.testing.assert_array_equal(tokens[0, 0], expected.ravel())


def test_sizes_of_the_published_models():
    """§2: 1.4 and 3.8 billion parameters, counted from shapes."""

    def count(config):
        flow = nnx.eval_shape(lambda: TARFlow(config, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param)))

    assert count(starflow_xl()) == pytest.approx(1.41e9, rel=0.02)
    assert count(starflow_xxl()) == pytest.approx(3.85e9, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, "width must be a multiple of head_dim"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide the number of query heads \(2\), got 3"),
        ({"cond": "class_add"}, "num_classes must be at least 1"),
        ({"cond": "prefix_deep"}, "prefix_len and prefix_dim must be at least 1"),
        ({"prefix_len": 2}, "prefix_len and prefix_dim must be 0"),
        ({"scale": "tanh"}, r"scale must be one of \('exp', 'softplus'\), got 'tanh'"),
        ({"layers_per_block": (1, 0)}, "a last block of at least one layer"),
        ({"patch_size": 3}, r"multiple of patch_size \(3\), got 4"),
        ({"rope": True, "head_dim": 2, "width": 16}, "must be even"),
    ],
)
def test_config_errors(changes, message):
    fields = {"in_channels": 1, "img_size": 4, "patch_size": 2, "width": 16, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        TARFlowConfig(**fields | {"layers_per_block": (1,)} | changes)


def test_input_errors():
    flow = make("tarflow_class")
    x = data("tarflow_class", 2)
    for bad, cond, message in (
        (x[:, :3, :, 0][..., :3], None, r"x must be \[B, H, W, 1\] or \[B, N, 4\], got shape"),
        (x, jnp.array([0, 3]), r"lie in \[-1, 2\] \(-1 = null\), got 0 to 3"),
        (x, jnp.array([0]), r"int labels \[2\]"),
        (x, jnp.zeros((2, 1, 4)), r"cond must be int labels \[2\], got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            flow(bad, cond)
    with pytest.raises(ValueError, match='cond must be None for a flow with cond="none"'):
        make("tarflow")(x, jnp.array([0, 1]))
