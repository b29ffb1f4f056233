"""The digits reference run (spec §7.1): likelihood, Bayes rule, round trip, guidance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.starflow.data import DIGIT_LEVELS, Digits, digits_batches, load_digits
from experiments.starflow.metrics import frechet_distance, knn_agreement, out_of_range
from jaxeff.models.starflow import TARFlow, TARFlowConfig, bits_per_dim
from jaxeff.models.starflow.training import FlowTraining, TrainedFlow, fit_flow

SIGMA = 0.1
CONFIG = TARFlowConfig(1, 8, 2, 64, (2, 2, 2, 2), head_dim=32, num_classes=10, cond="class_add")
WEIGHTS = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 15.0)


def train(steps: int = 900, seed: int = 0, *, dequantize: bool = False, log_path=None, **changes):
    """Train the reference model, on noisy digits or on uniformly dequantised ones."""
    data = load_digits()
    training = FlowTraining(
        steps=steps,
        learning_rate=2e-3,
        sigma=0.0 if dequantize else SIGMA,
        drop=0.1,
        b2=0.999,  # .95, TARFlow's, learns the classes worse in so few steps
        ema_decay=0.98,
        seed=seed,
        **changes,
    )
    flow = TARFlow(CONFIG, rngs=nnx.Rngs(seed))
    batches = digits_batches(data, 128, dequantize=dequantize)
    name = "dequantised digits" if dequantize else "digits"
    return data, fit_flow(flow, batches, training, log_path=log_path, description=name)


def noisy_bits(flow: TARFlow, x, labels, key, draws: int = 4) -> np.ndarray:
    """Bits per dimension ``[B]`` of ``x + σN``, plus log2(17/2), averaged over noise draws."""
    size = math.prod(x.shape[1:])
    rows = []
    for draw in jax.random.split(key, draws):
        noisy = x + SIGMA * jax.random.normal(draw, x.shape)
        nats = -flow.log_prob(noisy, labels) / size
        rows.append(nats / math.log(2) + math.log2(DIGIT_LEVELS / 2))
    return np.mean(rows, 0)


def bayes_accuracy(flow: TARFlow, x, labels) -> float:
    """Accuracy of ``argmax_y log p(x | y)`` with equal priors."""
    scores = [flow.log_prob(x, jnp.full(len(x), y)) for y in range(10)]
    return float((np.argmax(scores, 0) == np.asarray(labels)).mean())


def likelihood(flow: TARFlow, data: Digits, seed: int = 0) -> dict:
    """NLL with and without labels on train and test, and the Bayes rule on test images."""
    key, extra = jax.random.split(jax.random.key(1000 + seed))
    test, train_x = jnp.asarray(data.test) / 8 - 1, jnp.asarray(data.train[:360]) / 8 - 1
    labels = jnp.asarray(data.test_labels)
    noisy = test + SIGMA * jax.random.normal(extra, test.shape)
    return {
        "test_nll_conditional": float(noisy_bits(flow, test, labels, key).mean()),
        "test_nll_unconditional": float(
            noisy_bits(flow, test, jnp.full_like(labels, -1), key).mean()
        ),
        "train_nll_conditional": float(
            noisy_bits(flow, train_x, jnp.asarray(data.train_labels[:360]), key).mean()
        ),
        "bayes_accuracy_noisy": bayes_accuracy(flow, noisy, labels),
        "bayes_accuracy_clean": bayes_accuracy(flow, test, labels),
    }


def round_trip(flow: TARFlow, count: int = 64, seed: int = 0) -> dict:
    """Errors of forward-then-inverse on samples of the model, sequential and Jacobi."""
    labels = jnp.arange(count) % 10
    z = jax.random.normal(jax.random.key(2000 + seed), (count, 8, 8, 1))
    x = flow.inverse(z, labels)
    back = flow.inverse(flow(x, labels)[0], labels)
    jacobi = flow.inverse(z, labels, method="jacobi", chunk=8, threshold=0.0)
    error = np.abs(np.asarray(back - x))
    return {
        "max": float(error.max()),
        "mean": float(error.mean()),
        "jacobi_max": float(jnp.abs(jacobi - x).max()),
    }


def guidance(flow: TARFlow, data: Digits, *, count: int = 500, weights=WEIGHTS) -> list[dict]:
    """Raw samples of both rules over the guidance weight, from the same noise."""
    labels = jnp.arange(count) % 10
    z = jax.random.normal(jax.random.key(3000), (count, 8, 8, 1))
    train_x = data.train / 8 - 1
    rows = []
    for kind in ("linear", "score"):
        for where in ("all", "deep"):
            for weight in weights:
                x = np.asarray(
                    flow.inverse(z, labels, guidance=weight, guidance_kind=kind, guide=where)
                )
                rows.append(
                    {
                        "rule": kind,
                        "blocks": where,
                        "weight": weight,
                        "agreement": knn_agreement(x, labels, train_x, data.train_labels),
                        "frechet": frechet_distance(x, train_x),
                        "out_of_range": out_of_range(x),
                    }
                )
    return rows


def noise_study(flow: TARFlow, data: Digits, count: int = 500) -> dict:
    """Fréchet distance and agreement before and after the Tweedie step at the trained σ."""
    labels = jnp.arange(count) % 10
    train_x, key = data.train / 8 - 1, jax.random.key(4000)
    raw = flow.sample(key, labels)
    clean = flow.sample(key, labels, denoise_sigma=SIGMA)
    floor = frechet_distance(data.test / 8 - 1, train_x)
    return {"floor": floor} | {
        name: {
            "frechet": frechet_distance(x, train_x),
            "agreement": knn_agreement(x, labels, train_x, data.train_labels),
        }
        for name, x in (("raw", np.asarray(raw)), ("denoised", np.asarray(clean)))
    }


def discrete_bits(trained: TrainedFlow, data: Digits) -> dict:
    """Uniformly dequantised bits per dimension on train and test; uniform code: log2 17 = 4.087."""
    flow, key = trained.averaged, jax.random.key(5000)
    return {
        name: float(bits_per_dim(flow, x, DIGIT_LEVELS, key, jnp.asarray(y)).mean())
        for name, x, y in (
            ("test_conditional", data.test, data.test_labels),
            ("train_conditional", data.train, data.train_labels),
        )
    }
