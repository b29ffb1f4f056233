"""Data of the flow experiments: scikit-learn's digits and procedural shapes, made on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHAPE_CLASSES = ("disc", "square", "triangle", "cross", "ring")
DIGIT_LEVELS = 17


class Digits(NamedTuple):
    """Integer images ``[B, 8, 8, 1]`` in 0..16 and labels, 1437 to train and 360 to test."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Digits:
    """The 8×8 digits that scikit-learn bundles, split by ``RandomState(0)``."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'jaxeff[bench]'") from error
    digits = load()
    order = np.random.RandomState(0).permutation(len(digits.target))
    images = digits.images.astype(np.int32)[order][..., None]
    labels = digits.target.astype(np.int32)[order]
    return Digits(images[:1437], labels[:1437], images[1437:], labels[1437:])


def digits_batches(data: Digits, batch: int, *, dequantize: bool = False):
    """A function of a key giving ``(x, labels)``: ``i/8 − 1``, or uniformly dequantised."""
    images, labels = jnp.asarray(data.train), jnp.asarray(data.train_labels)

    def make(key):
        rows, noise = jax.random.split(key)
        index = jax.random.randint(rows, (batch,), 0, images.shape[0])
        x = images[index].astype(jnp.float32)
        if dequantize:
            x = 2 * (x + jax.random.uniform(noise, x.shape)) / DIGIT_LEVELS - 1
        else:
            x = x / 8 - 1
        return x, labels[index]

    return make


def shapes(key: jax.Array, batch: int, size: int = 32) -> tuple[jax.Array, jax.Array]:
    """Random coloured shapes on a coloured ground, anti-aliased by 2× supersampling.

    Args:
      key: PRNG key; every key gives new images, so a model cannot overfit.
      batch: number of images.
      size: side in pixels.

    Returns:
      int32 images ``[B, size, size, 3]`` in 0..255 and int32 labels ``[B]``, see SHAPE_CLASSES.
    """
    keys = jax.random.split(key, 6)
    label = jax.random.randint(keys[0], (batch,), 0, len(SHAPE_CLASSES))
    center = jax.random.uniform(keys[1], (batch, 2, 1, 1), minval=-0.35, maxval=0.35)
    radius = jax.random.uniform(keys[2], (batch, 1, 1), minval=0.35, maxval=0.6)
    angle = jax.random.uniform(keys[3], (batch, 1, 1), maxval=2 * jnp.pi)
    front = jax.random.uniform(keys[4], (batch, 1, 1, 3), minval=0.45)
    ground = jax.random.uniform(keys[5], (batch, 1, 1, 3), maxval=0.35)
    line = (jnp.arange(2 * size) + 0.5) / size - 1
    rows, columns = jnp.meshgrid(line, line, indexing="ij")
    y, x = rows - center[:, 0], columns - center[:, 1]  # [B, 2·size, 2·size]
    u = (x * jnp.cos(angle) + y * jnp.sin(angle)) / radius
    v = (y * jnp.cos(angle) - x * jnp.sin(angle)) / radius
    far = jnp.maximum(jnp.abs(u), jnp.abs(v))
    near = jnp.minimum(jnp.abs(u), jnp.abs(v))
    distance = jnp.hypot(u, v)
    slope = 3**0.5 / 2
    inside = jnp.stack(
        [
            distance < 0.9,
            far < 0.75,
            (v < 0.5) & (slope * u - 0.5 * v < 0.5) & (-slope * u - 0.5 * v < 0.5),
            (far < 0.9) & (near < 0.28),
            (distance < 0.95) & (distance > 0.55),
        ],
        1,
    )
    mask = jnp.take_along_axis(inside, label[:, None, None, None], 1)[:, 0].astype(jnp.float32)
    mask = mask.reshape(batch, size, 2, size, 2).mean((2, 4))[..., None]
    image = ground + mask * (front - ground)
    return jnp.clip(jnp.floor(image * 256), 0, 255).astype(jnp.int32), label


def shape_batches(batch: int, size: int):
    """A function of a key giving uniformly dequantised shapes in [−1, 1) and labels."""

    def make(key):
        image_key, noise_key = jax.random.split(key)
        images, label = shapes(image_key, batch, size)
        return (images + jax.random.uniform(noise_key, images.shape)) / 128 - 1, label

    return make
