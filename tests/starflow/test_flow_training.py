"""Training, checkpoints, the sample command, the autoencoder and the experiments' measures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments.starflow.data import shape_batches, shapes
from experiments.starflow.metrics import frechet_distance, knn_agreement, out_of_range
from jaxeff import cli
from jaxeff.images import image_grid, save_png
from jaxeff.models.starflow import TARFlow, with_dtype
from jaxeff.models.starflow.training import (
    FlowTraining,
    _run_steps,
    fit_flow,
    load_flow,
    save_flow,
)
from jaxeff.models.starflow.vae import VAE, LatentScaler, VAEConfig, decoder_loss, decoder_params

from .flow_cases import CASES, data, make


def _batches(key):
    label_key, noise_key = jax.random.split(key)
    label = jax.random.randint(label_key, (16,), 0, 3)
    noise = jax.random.normal(noise_key, (16, 4, 4, 1))
    return 0.2 * noise + (label[:, None, None, None] - 1.0), label


def test_training_lowers_the_loss_and_survives_a_checkpoint(tmp_path):
    flow = TARFlow(CASES["tarflow_class"], rngs=nnx.Rngs(0))
    before = np.asarray(flow.blocks[0].proj_out.bias[...])
    training = FlowTraining(
        steps=60, learning_rate=5e-3, warmup_steps=5, drop=0.1, sigma=0.05, ema_decay=0.9,
        clip_norm=1.0, steps_per_call=20,
    )  # fmt: skip
    trained = fit_flow(flow, _batches, training, log_path=tmp_path / "log.jsonl")
    assert trained.losses.shape == (60,)
    assert trained.losses[-10:].mean() < trained.losses[:10].mean() - 0.3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    np.testing.assert_array_equal(flow.blocks[0].proj_out.bias[...], before)
    x, label = _batches(jax.random.key(9))

    # Going on without noise and from another seed runs the compiled program.
    programs = _run_steps._cache_size()
    changed = dataclasses.replace(training, steps=20, sigma=0.0, seed=1, learning_rate=1e-4)
    cleaner = fit_flow(trained.flow, _batches, changed)
    assert _run_steps._cache_size() == programs
    assert cleaner.losses.mean() < trained.losses[-20:].mean()

    save_flow(tmp_path / "flow", trained.averaged, {"sigma": 0.05})
    loaded, facts = load_flow(tmp_path / "flow")
    assert facts == {"sigma": 0.05}
    np.testing.assert_array_equal(loaded(x, label)[0], trained.averaged(x, label)[0])
    out = tmp_path / "out" / "grid.png"
    options = ["--checkpoint", str(tmp_path / "flow"), "--grid", str(out), "--per-class", "2"]
    cli.main(["sample", *options, "--classes", "0", "2"])
    assert np.asarray(Image.open(out)).shape == (2 * 5 + 1, 2 * 5 + 1)


def test_a_diverging_run_stops():
    flow = TARFlow(CASES["tarflow"], rngs=nnx.Rngs(0))
    bad = lambda key: (jnp.full((2, 4, 4, 1), jnp.nan), None)  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"within steps 0\.\.2"):
        fit_flow(flow, bad, FlowTraining(steps=2, steps_per_call=2))


def test_the_rate_warms_up_and_ends_low():
    training = FlowTraining(steps=100, learning_rate=1e-3, warmup_steps=10, final_rate=1e-6)
    assert training.rate(0, 0.0) == pytest.approx(1e-4)
    assert training.rate(50, 0.5) == pytest.approx(5.005e-4)
    assert training.rate(99, 1.0) == pytest.approx(1e-6)
    with pytest.raises(ValueError, match="time_budget must be positive seconds, got 0"):
        FlowTraining(steps=1, time_budget=0)


def test_bfloat16_transformer_keeps_a_float32_flow():
    flow = with_dtype(make("starflow"), "bfloat16")
    z, logdet, _ = flow(data("starflow"))
    assert z.dtype == logdet.dtype == jnp.float32
    exact = make("starflow")(data("starflow"))[0]
    assert 0 < float(jnp.abs(z - exact).max()) < 0.2
    assert make("starflow").blocks[0].dtype == jnp.float32


def test_png_and_grid(tmp_path):
    grid = image_grid(np.linspace(-1, 1, 3 * 4).reshape(3, 2, 2, 1), columns=2, border=1)
    assert grid.shape == (7, 7, 1)
    assert grid[1, 1, 0] == 0 and grid[5, 2, 0] == 255
    path = tmp_path / "a.png"
    save_png(path, grid)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), grid[..., 0])
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[H, W, 1 or 3\], got float64"):
        save_png(path, np.zeros((2, 2, 3)))


def test_autoencoder_and_scaler():
    vae = VAE(VAEConfig(3, 4, 8, 1), rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    latent, _ = vae.encode(x)
    scaler = LatentScaler.fit(latent)
    np.testing.assert_allclose(scaler.encode(latent).std((0, 1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(scaler.decode(scaler.encode(latent)), latent, atol=1e-5)
    graphdef, tuned, rest = nnx.split(vae, nnx.All(nnx.Param, decoder_params), ...)

    def loss(tuned, rest):
        return decoder_loss(nnx.merge(graphdef, tuned, rest), x, scaler, 0.3, jax.random.key(1))

    by_decoder, by_rest = jax.jit(jax.grad(loss, (0, 1)))(tuned, rest)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(by_decoder))
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(by_rest))
    with pytest.raises(ValueError, match="H and W divisible by 2"):
        vae.encode(jnp.zeros((1, 5, 8, 3)))


def test_shapes_are_reproducible_and_in_range():
    draw = jax.jit(lambda key: shapes(key, 6, 16))
    images, labels = draw(jax.random.key(0))
    again, _ = draw(jax.random.key(0))
    np.testing.assert_array_equal(images, again)
    assert images.shape == (6, 16, 16, 3) and images.dtype == jnp.int32
    assert int(images.min()) >= 0 and int(images.max()) <= 255
    assert set(np.asarray(labels)) <= set(range(5))
    x, _ = jax.jit(shape_batches(6, 16))(jax.random.key(1))
    assert float(x.min()) >= -1 and float(x.max()) < 1


def test_measures():
    generator = np.random.default_rng(0)
    x = generator.normal(0, 0.1, (400, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 0.5) == pytest.approx(0.75, rel=1e-2)
    assert out_of_range(np.array([[0.0], [3.5], [np.nan], [-2.0]])) == 0.5
    train, labels = np.array([[0.0], [0.1], [0.8], [0.9]]), np.array([0, 0, 1, 1])
    samples = [[0.05], [0.7], [np.nan]]
    assert knn_agreement(samples, [0, 0, 1], train, labels, neighbours=2) == pytest.approx(2 / 3)
