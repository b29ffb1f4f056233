"""Depth layouts on digits: deep–shallow against equal blocks, and the number of blocks (F5, F6)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.starflow import digits
from experiments.starflow.data import digits_batches, load_digits
from jaxeff.models.starflow import TARFlow
from jaxeff.models.starflow.training import FlowTraining, fit_flow

LAYOUTS = {
    "1 block": (8,),
    "2 blocks": (4, 4),
    "4 equal blocks": (2, 2, 2, 2),
    "deep-shallow": (1, 1, 1, 5),
}


def compare(steps: int, seed: int) -> list[dict]:
    """Train each layout of eight layers with the same budget and report NLL and block times."""
    data = load_digits()
    rows = []
    for name, layers in LAYOUTS.items():
        config = dataclasses.replace(digits.CONFIG, layers_per_block=layers)
        training = FlowTraining(
            steps=steps, learning_rate=2e-3, sigma=digits.SIGMA, drop=0.1, ema_decay=0.98, seed=seed
        )
        flow = TARFlow(config, rngs=nnx.Rngs(seed))
        trained = fit_flow(flow, digits_batches(data, 128), training, description=name)
        test = jnp.asarray(data.test) / 8 - 1
        bits = digits.noisy_bits(
            trained.averaged, test, jnp.asarray(data.test_labels), jax.random.key(1), draws=1
        )
        rows.append(
            {
                "layout": name,
                "layers_per_block": list(layers),
                "test_nll_conditional": float(bits.mean()),
                "step_seconds": trained.step_seconds,
            }
        )
    return rows
