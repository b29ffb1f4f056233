"""Gradient descent with gradient noise on a quadratic: the √3 threshold in closed form."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def loss_factor(eta_lambda: float, k: float) -> float:
    """Expected factor on the loss per step with noise of ``k`` times the critical deviation.

    ``(1 - η λ)² + (η λ)² k² / 3`` for ``L = λ |θ|² / 2`` and noise ``s = k |g| / sqrt(3 d)``.

    Args:
        eta_lambda: learning rate times curvature.
        k: noise relative to the threshold.

    Returns:
        The factor; above 1 the loss grows.

    >>> round(loss_factor(1.0, 2.0), 3)
    1.333
    """
    return (1 - eta_lambda) ** 2 + eta_lambda**2 * k**2 / 3


def optimal_rate(k: float) -> float:
    """Learning rate times curvature with the largest descent: ``1 / (1 + k² / 3)``.

    >>> optimal_rate(0.0), round(loss_factor(optimal_rate(1.0), 1.0), 3)
    (1.0, 0.25)
    """
    return 1 / (1 + k**2 / 3)


def noise_floor(d: int, eta: float, deviation: float, curvature: float = 1.0) -> float:
    """Loss at which descent with noise of a fixed deviation settles: ``d η s² / (2 (2 - η λ))``.

    >>> round(noise_floor(1000, 0.1, 1.0), 1)
    26.3
    """
    return d * eta * deviation**2 / (2 * (2 - eta * curvature))


@functools.partial(jax.jit, static_argnames=("d", "steps", "relative"))
def simulate(
    key: jax.Array, eta: float, noise: float, *, d: int, steps: int, relative: bool
) -> jax.Array:
    """Losses of gradient descent on ``|θ|² / 2`` from a normal start.

    Args:
        key: PRNG key.
        eta: learning rate.
        noise: multiple of the critical deviation (``relative``), or the deviation itself.
        d: dimensions.
        steps: steps.
        relative: see ``noise``.

    Returns:
        float32 ``[steps + 1]``.
    """
    start, draws = jax.random.split(key)
    theta = jax.random.normal(start, (d,))

    def step(theta, key):
        deviation = noise
        if relative:
            deviation = noise * jnp.linalg.norm(theta) / math.sqrt(3 * d)
        gradient = theta + deviation * jax.random.normal(key, (d,))
        return theta - eta * gradient, 0.5 * jnp.sum(theta**2)

    theta, losses = jax.lax.scan(step, theta, jax.random.split(draws, steps))
    return jnp.append(losses, 0.5 * jnp.sum(theta**2))


def rounding_bias(mu: float, eta: float, steps: int, curvature: float = 1.0) -> float:
    """Loss at which one coordinate settles when its gradient has a bias, by running it.

    >>> round(rounding_bias(0.1, 0.1, 500), 6), 0.1**2 / 2
    (0.005, 0.005000000000000001)
    """
    theta = 1.0
    for _ in range(steps):
        theta -= eta * (curvature * theta + mu)
    return 0.5 * curvature * theta**2


def study(seeds: int = 3, d: int = 1000) -> dict[str, Any]:
    """Simulated against closed forms for noise of 0.5, 1 and 2 times the threshold.

    Args:
        seeds: runs of each setting.
        d: dimensions.

    Returns:
        Rows of setting, k, predicted and simulated factor, and the noise floor.
    """
    keys = jax.random.split(jax.random.key(0), seeds)
    rows = []
    for setting in ("optimal", "1/lambda", "0.1/lambda"):
        for k in (0.5, 1.0, 2.0):
            eta = {"optimal": optimal_rate(k), "1/lambda": 1.0, "0.1/lambda": 0.1}[setting]
            losses = [simulate(key, eta, k, d=d, steps=12, relative=True) for key in keys]
            factors = [float((loss[-1] / loss[0]) ** (1 / 12)) for loss in losses]
            rows.append(
                {
                    "rate": setting,
                    "k": k,
                    "predicted": loss_factor(eta, k),
                    "simulated": sum(factors) / seeds,
                    "curve": [float(x) for x in losses[0]],
                }
            )
    deviation = math.sqrt(1 / 3)  # k = 1 at |g|² = d
    floors = [
        float(simulate(key, 0.1, deviation, d=d, steps=600, relative=False)[-300:].mean())
        for key in keys
    ]
    floor = {"predicted": noise_floor(d, 0.1, deviation), "simulated": floors}
    bias = {"predicted": 0.1**2 / 2, "simulated": rounding_bias(0.1, 0.1, 500)}
    return {"rows": rows, "noise_floor": floor, "rounding_bias": bias}
