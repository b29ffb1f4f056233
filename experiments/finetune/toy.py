"""What rounding does to small updates, without a model: the tables of the specification.

``survival`` writes one update into an FP8 weight and measures how much of it is left.
``regression`` learns a rank-4 change of a weight by FALQON's steps and by exact ones.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxeff.finetune import meld_weight
from jaxeff.optim import falqon, meld, write_rows
from jaxeff.optim.falqon import Melded

RATES = (2e-5, 2e-4, 2e-3, 2e-2)


def survival(size: int = 512, rank: int = 16, rates: Sequence[float] = RATES, seed: int = 0):
    """How much of ``ΔB A`` with ``ΔB = lr · sign`` survives rounding to the nearest code.

    Args:
      size: side of the weight, normal with deviation .02.
      rank: of the adapter.
      rates: learning rates.
      seed: seed of weight and signs.

    Returns:
      Facts of the start, and per rate: size of the update, changed codes, surviving share
      ``<ΔW', ΔW> / |ΔW|²``.
    """
    keys = jax.random.split(jax.random.key(seed), 2)
    weight = 0.02 * jax.random.normal(keys[0], (size, size))
    melded = meld_weight(weight, rank)
    error = weight - melded.weight()
    signs = jnp.where(jax.random.bernoulli(keys[1], 0.5, (size, rank)), 1.0, -1.0)
    rows, before, a = jnp.arange(size), melded.weight(), melded.adapter_a()
    table = []
    for rate in rates:
        wanted = rate * signs @ a
        after = write_rows(melded, rows, rate * signs)
        actual = after.weight() - before
        table.append(
            {
                "learning_rate": rate,
                "relative_update": float(jnp.linalg.norm(wanted) / jnp.linalg.norm(weight)),
                "codes_changed": float(jnp.mean(actual != 0)),
                "surviving": float(jnp.sum(actual * wanted) / jnp.sum(wanted**2)),
            }
        )
    return {
        "size": size,
        "rank": rank,
        # A row of A is a right vector times the root of its singular value.
        "energy_in_svd": float(jnp.sum(jnp.sum(a**2, 1) ** 2) / jnp.sum(error**2)),
        "a_rms": float(jnp.sqrt(jnp.mean(a**2))),
        "table": table,
    }


ARMS = {
    "exact": None,
    "rtn_all": ("rtn", "all"),
    "sr_all": ("sr", "all"),
    "anchored_all": ("anchored", "all"),
    "rtn_k": ("rtn", "rank"),
    "sr_k": ("sr", "rank"),
    "anchored_k": ("anchored", "rank"),
}


def regression(
    arm: str,
    rate: float,
    *,
    size: int = 128,
    rank: int = 16,
    change_rank: int = 4,
    change: float = 0.22,
    steps: int = 600,
    seed: int = 0,
) -> float:
    """Learns ``W*`` from ``W``, a rank-4 change apart, by Adam on ``B`` with ``A`` frozen.

    The loss is ``|W - W*|²``, the population loss of noise-free linear regression on white inputs.

    Args:
      arm: a key of ``ARMS``; ``"exact"`` trains ``B`` in float32 beside the unquantised weight.
      rate: Adam's learning rate.
      size: side of the weight.
      rank: of the adapter, and rows per step where the arm says so.
      change_rank: rank of the change.
      change: its norm relative to that of the weight.
      steps: updates.
      seed: seed of everything.

    Returns:
      Squared error of the weight at the end, relative to ``|W - W*|²`` at the start.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    weight = 0.02 * jax.random.normal(keys[0], (size, size))
    u, v = (jax.random.normal(key, (size, change_rank)) for key in keys[1:3])
    step = u @ v.T
    target = weight + change * step * jnp.linalg.norm(weight) / jnp.linalg.norm(step)
    start = jnp.sum((weight - target) ** 2)
    adam, melded = optax.adam(rate), meld_weight(weight, rank, anchored=True)
    if ARMS[arm] is None:
        final = _exact(weight, target, melded.adapter_a(), adam, steps)
    else:
        requant, k = ARMS[arm]
        final = _melded(melded, target, adam, requant, k, steps, keys[3])
    return float(jnp.sum((final - target) ** 2) / start)


def _exact(weight, target, a, adam, steps):
    def step(carry, _):
        b, state = carry
        updates, state = adam.update((weight + b @ a - target) @ a.T, state)
        return (b + updates, state), None

    b = jnp.zeros((weight.shape[0], a.shape[0]))
    (b, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((b, adam.init(b)))
    return weight + b @ a


def _melded(melded: Melded, target, adam, requant: str, k: Any, steps: int, key):
    transform = falqon(adam, k=k, requant=requant)
    a = melded.adapter_a()

    def step(carry, index):
        weights, state = carry
        gradient = {"w": (weights["w"].weight() - target) @ a.T}
        _, state = transform.update(gradient, state)
        draw = jax.random.fold_in(key, index) if requant == "sr" else None
        return (meld(weights, state, requant=requant, key=draw), state), None

    state = transform.init({"w": jnp.zeros((target.shape[0], a.shape[0]))})
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    return run(({"w": melded}, state))[0][0]["w"].weight()


def tables(size: int = 128, steps: int = 600, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Both tables at full size, the second as mean over seeds."""
    return {
        "survival": survival(),
        "regression": {
            arm: {
                f"{rate:.0e}": float(
                    np.mean([regression(arm, rate, size=size, steps=steps, seed=s) for s in seeds])
                )
                for rate in RATES
            }
            for arm in ARMS
        },
        "regression_seeds": list(seeds),
    }
