"""Latents for a flow: a small convolutional autoencoder, and scaling of externally made latents.

STARFlow models noisy latents of an autoencoder and decodes them without a denoising step, by a
decoder that was fine-tuned on noisy latents. The autoencoder here trains on two CPU cores; latents
of any other one enter through `LatentScaler`.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.typing import Array

__all__ = ["VAE", "LatentScaler", "VAEConfig", "decoder_loss", "decoder_params", "vae_loss"]


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder.

    Attributes:
      in_channels: channels of the image.
      latent_channels: channels of the latent.
      width: channels of the first convolution; doubles with every halving of the resolution.
      downsamples: halvings ``n``; the latent has side ``img_size / 2^n``.

    Raises:
      ValueError: for a size below 1.

    >>> VAEConfig(3, 4, 16, 2).factor
    4
    """

    in_channels: int = 3
    latent_channels: int = 4
    width: int = 32
    downsamples: int = 2

    def __post_init__(self):
        for name in ("in_channels", "latent_channels", "width", "downsamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along a side."""
        return 2**self.downsamples


class _Residual(nnx.Module):
    """Two normalised 3×3 convolutions added to their input."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        groups = min(8, channels)
        self.norms = nnx.List(nnx.GroupNorm(channels, groups, rngs=rngs) for _ in range(2))
        self.convs = nnx.List(nnx.Conv(channels, channels, (3, 3), rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(jax.nn.silu(norm(h)))
        return x + h


class VAE(nnx.Module):
    """A convolutional variational autoencoder with a decoder for noisy latents.

    ``mean, log_variance = vae.encode(x)``; ``vae.decode(latent)`` gives an image.

    Args:
      config: sizes.
      rngs: streams of the initial weights.

    Example:
      >>> vae = VAE(VAEConfig(3, 4, 8, 2), rngs=nnx.Rngs(0))
      >>> mean, log_variance = vae.encode(jnp.zeros((1, 16, 16, 3)))
      >>> mean.shape, vae.decode(mean).shape
      ((1, 4, 4, 4), (1, 16, 16, 3))

    References: Kingma and Welling (arXiv 1312.6114); STARFlow (arXiv 2506.06276) App. B.3.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.width * 2**i for i in range(config.downsamples + 1)]
        self.stem = nnx.Conv(config.in_channels, widths[0], (3, 3), rngs=rngs)
        self.down = nnx.List(
            nnx.Conv(a, b, (4, 4), strides=2, rngs=rngs) for a, b in itertools.pairwise(widths)
        )
        self.encode_body = _Residual(widths[-1], rngs)
        self.to_latent = nnx.Conv(widths[-1], 2 * config.latent_channels, (1, 1), rngs=rngs)
        self.from_latent = nnx.Conv(config.latent_channels, widths[-1], (3, 3), rngs=rngs)
        self.decode_body = _Residual(widths[-1], rngs)
        # Resize then convolve: transposed convolutions leave a checkerboard.
        self.up = nnx.List(
            nnx.Conv(b, a, (3, 3), rngs=rngs) for a, b in reversed(list(itertools.pairwise(widths)))
        )
        self.head = nnx.Conv(widths[0], config.in_channels, (3, 3), rngs=rngs)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Mean and log variance ``[B, H/f, W/f, Z]`` of the latent of images ``[B, H, W, C]``."""
        factor = self.config.factor
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"x must be [B, H, W, C] with H and W divisible by {factor}, got shape {x.shape}"
            )
        h = self.stem(x)
        for conv in self.down:
            h = jax.nn.silu(conv(h))
        mean, log_variance = jnp.split(self.to_latent(self.encode_body(h)), 2, -1)
        return mean, jnp.clip(log_variance, -12.0, 4.0)

    def decode(self, latent: Array) -> Array:
        """Images ``[B, H, W, C]`` of latents ``[B, H/f, W/f, Z]``."""
        if latent.ndim != 4 or latent.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"latent must be [B, h, w, {self.config.latent_channels}], got {latent.shape}"
            )
        h = self.decode_body(self.from_latent(latent))
        for conv in self.up:
            batch, height, width, channels = h.shape
            h = jax.image.resize(h, (batch, 2 * height, 2 * width, channels), "nearest")
            h = jax.nn.silu(conv(h))
        return self.head(h)


def vae_loss(vae: VAE, x: Array, key: Array, kl_weight: float = 1e-3) -> tuple[Array, dict]:
    """``mean‖x − decode(u)‖² + β·KL(q(u|x) ‖ N(0, I))`` per value, ``u`` drawn from q.

    Args:
      vae: the model.
      x: images in [−1, 1].
      key: PRNG key of the draw.
      kl_weight: β per latent value.

    Returns:
      the loss and ``{"mse", "kl"}``.

    >>> vae = VAE(VAEConfig(1, 2, 8, 1), rngs=nnx.Rngs(0))
    >>> vae_loss(vae, jnp.zeros((1, 8, 8, 1)), jax.random.key(0))[0].shape
    ()
    """
    mean, log_variance = vae.encode(x)
    latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    mse = jnp.mean(jnp.square(vae.decode(latent) - x))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return mse + kl_weight * kl, {"mse": mse, "kl": kl}


def decoder_loss(vae: VAE, x: Array, scaler: "LatentScaler", sigma: float, key: Array) -> Array:
    """Squared error of decoding noisy latents; the encoder gets no gradient.

    ``mean‖x − decode(s·(E(x)/s + σN))‖²`` with the scaler's ``s``: the noise is that of the latents
    the flow was trained on, so that its samples decode without a denoising step. The published
    decoder adds perceptual and adversarial terms, which need networks that are not here.

    Args:
      vae: the model.
      x: images in [−1, 1].
      scaler: scaling of the latents.
      sigma: noise of the flow's training, in scaled units; 0.3 in STARFlow.
      key: PRNG key of the noise.

    Returns:
      scalar loss.

    References: STARFlow (arXiv 2506.06276) App. B.3.
    """
    latent = scaler.encode(jax.lax.stop_gradient(vae.encode(x)[0]))
    noisy = latent + sigma * jax.random.normal(key, latent.shape)
    return jnp.mean(jnp.square(vae.decode(scaler.decode(noisy)) - x))


def decoder_params(path: tuple, _value) -> bool:
    """An nnx filter of the decoder's weights, for fine-tuning them alone.

    >>> vae = VAE(VAEConfig(1, 2, 8, 1), rngs=nnx.Rngs(0))
    >>> sorted(nnx.state(vae, nnx.All(nnx.Param, decoder_params)))
    ['decode_body', 'from_latent', 'head', 'up']
    """
    return path[0] in ("from_latent", "decode_body", "up", "head")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentScaler:
    """Shift and scale latents to zero mean and unit variance per channel.

    The adapter for latents made elsewhere: fit it on a sample of them, train a flow on
    ``encode(latent)``, and give ``decode(sample)`` to the outside decoder.

    Attributes:
      mean: float32 ``[Z]``.
      std: float32 ``[Z]``, above 0.

    >>> scaler = LatentScaler.fit(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1))
    >>> scaler.encode(jnp.full((1, 1, 1, 1), 3.0)).item()
    1.0
    """

    mean: Array
    std: Array

    @classmethod
    def fit(cls, latents: Array) -> "LatentScaler":
        """Statistics per channel of latents ``[B, h, w, Z]``; a constant channel keeps std 1."""
        if latents.ndim != 4:
            raise ValueError(f"latents must be [B, h, w, Z], got shape {latents.shape}")
        wide = jnp.asarray(latents, jnp.float32)
        std = wide.std((0, 1, 2))
        return cls(wide.mean((0, 1, 2)), jnp.where(std > 0, std, 1.0))

    def encode(self, latents: Array) -> Array:
        """Scaled latents."""
        return (latents - self.mean) / self.std

    def decode(self, scaled: Array) -> Array:
        """Latents of the outside autoencoder."""
        return scaled * self.std + self.mean
