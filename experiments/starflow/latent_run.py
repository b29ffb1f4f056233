"""The latent pipeline on shapes: autoencoder, flow on noisy latents, decoder for noisy latents."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.starflow.data import SHAPE_CLASSES, shape_batches
from experiments.starflow.shapes_run import save_grid
from jaxeff.models.starflow import TARFlow, TARFlowConfig
from jaxeff.models.starflow.training import FlowTraining, fit_flow
from jaxeff.models.starflow.vae import (
    VAE,
    LatentScaler,
    VAEConfig,
    decoder_loss,
    decoder_params,
    vae_loss,
)

SIGMA = 0.3
SIZES = {
    "tiny": {"size": 16, "batch": 8, "vae_steps": 3, "flow_steps": 2, "width": 8, "flow": 32},
    "cpu": {"size": 32, "batch": 32, "vae_steps": 600, "flow_steps": 600, "width": 16, "flow": 96},
}


def minimise(model, loss_fn, steps: int, rate: float, seed: int, wrt=nnx.Param):
    """Adam on the parameters that ``wrt`` selects; returns the model and the losses."""
    graphdef, params, rest = nnx.split(model, wrt, ...)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @partial(jax.jit, donate_argnums=0)
    def step(carry, index):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(seed), index)
        value, gradients = jax.value_and_grad(lambda p: loss_fn(nnx.merge(graphdef, p, rest), key))(
            params
        )
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    params = jax.tree.map(jnp.copy, params)
    carry, losses = (params, optimizer.init(params)), []
    for index in range(steps):
        carry, value = step(carry, index)
        losses.append(float(value))
    return nnx.merge(graphdef, carry[0], rest), np.asarray(losses)


def run_latent(preset: str, seed: int, output: Path) -> dict:
    """Train the three stages and report reconstruction with and without noise on the latents."""
    sizes = SIZES[preset]
    make = shape_batches(sizes["batch"], sizes["size"])
    vae = VAE(VAEConfig(3, 4, sizes["width"], 2), rngs=nnx.Rngs(seed))

    def first(model, key):
        return vae_loss(model, make(key)[0], jax.random.fold_in(key, 1))[0]

    vae, vae_losses = minimise(vae, first, sizes["vae_steps"], 2e-3, seed)
    sample_x, _ = make(jax.random.key(seed + 1))
    scaler = LatentScaler.fit(vae.encode(sample_x)[0])

    def latents(key):
        x, label = make(key)
        return scaler.encode(vae.encode(x)[0]), label

    classes = len(SHAPE_CLASSES)
    config = TARFlowConfig(
        4,
        sizes["size"] // vae.config.factor,
        1,
        sizes["flow"],
        (1, 1, 3),
        head_dim=32,
        scale="softplus",
        sos=True,
        rope=True,
        soft_clip=4.0,
        final_norm=True,
        cond="prefix_deep",
        num_classes=classes,
        prefix_len=1,
        prefix_dim=classes + 1,
        order="L2R",
        patch_order="p_p_c",
    )
    training = FlowTraining(
        steps=sizes["flow_steps"],
        learning_rate=1e-3,
        sigma=SIGMA,
        drop=0.1,
        latent_norm=1e-4,
        ema_decay=0.98,
        clip_norm=1.0,
        steps_per_call=2,
        seed=seed,
    )
    flow = TARFlow(config, rngs=nnx.Rngs(seed))
    trained = fit_flow(flow, latents, training, description="latents")

    def second(model, key):
        return decoder_loss(model, make(key)[0], scaler, SIGMA, jax.random.fold_in(key, 2))

    steps = max(2, sizes["vae_steps"] // 2)
    tuned, _ = minimise(vae, second, steps, 1e-3, seed + 2, nnx.All(nnx.Param, decoder_params))
    x, _ = make(jax.random.key(seed + 3))
    key = jax.random.key(seed + 4)
    clean = vae.decode(vae.encode(x)[0])
    labels = jnp.repeat(jnp.arange(classes), 8)
    latent = trained.averaged.sample(jax.random.key(seed + 5), labels, guidance=1.0)
    save_grid(output / "latent_samples.png", tuned.decode(scaler.decode(latent)), 8)
    return {
        "final_vae_loss": float(vae_losses[-20:].mean()),
        "reconstruction_mse_clean": float(jnp.square(clean - x).mean()),
        "reconstruction_mse_noisy_latents_before": float(decoder_loss(vae, x, scaler, SIGMA, key)),
        "reconstruction_mse_noisy_latents_after": float(decoder_loss(tuned, x, scaler, SIGMA, key)),
        "flow_loss": float(trained.losses[-20:].mean()),
        "unit_gaussian_loss": 0.5 * (1 + SIGMA**2),
    }
