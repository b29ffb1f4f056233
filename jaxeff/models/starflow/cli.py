"""The ``jaxeff sample`` command: draw images from a trained flow into one PNG."""

import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Sample", "image_grid", "write_png"]


def image_grid(images: np.ndarray, columns: int = 10, border: int = 1) -> np.ndarray:
    """Lay images out row by row.

    Args:
      images: ``[B, H, W, C]`` in [−1, 1], C 1 or 3; values outside are clipped.
      columns: images per row.
      border: black pixels around each image.

    Returns:
      uint8 ``[rows·(H + border) + border, columns·(W + border) + border, C]``.

    >>> image_grid(np.zeros((3, 2, 2, 1)), columns=2).shape
    (7, 7, 1)
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be [B, H, W, 1 or 3], got shape {images.shape}")
    if columns < 1 or border < 0:
        raise ValueError(f"columns must be at least 1 and border 0, got {columns} and {border}")
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    tall, wide = height + border, width + border
    canvas = np.zeros((rows * tall + border, columns * wide + border, channels), np.uint8)
    pixels = np.clip(np.round((np.asarray(images) + 1) * 127.5), 0, 255).astype(np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * tall + border, (index % columns) * wide + border
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write a PNG with the standard library alone.

    Args:
      path: file to write; its folder is made.
      pixels: uint8 ``[H, W, 1]`` (grey) or ``[H, W, 3]`` (RGB).

    Raises:
      ValueError: for another dtype or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        raise ValueError(f"pixels must be uint8 [H, W, 1 or 3], got {pixels.dtype} {pixels.shape}")
    height, width, channels = pixels.shape
    # Each row starts with its filter type; 0 = none.
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in chunks:
            check = struct.pack(">I", zlib.crc32(kind + body))
            file.write(struct.pack(">I", len(body)) + kind + body + check)


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained flow and write them as one PNG."""

    checkpoint: Path
    """Folder written by ``save_flow`` or by an experiment in ``experiments/starflow``."""

    grid: Path = Path("samples.png")
    """PNG to write."""

    classes: tuple[int, ...] = ()
    """Class labels, one row of images each; empty draws without a condition."""

    per_class: int = 8
    """Images per class, and per row."""

    guidance: float = 0.0
    """Guidance weight; 0 samples the conditional density."""

    method: str = "scan"
    """``scan`` is token by token, ``jacobi`` solves chunks in parallel."""

    cache: str = "float32"
    """Cache of keys and values, for example ``int8``, ``window:64``, ``rkv:64``."""

    seed: int = 0
    """Seed of the noise."""

    denoise: bool = True
    """Remove the training noise with one score step, where the model was trained with noise."""

    def run(self) -> None:
        """Load the flow, sample, write the grid."""
        import jax
        import jax.numpy as jnp

        from jaxeff.models.starflow.training import load_flow

        if self.per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {self.per_class}")
        flow, facts = load_flow(self.checkpoint)
        config = flow.config
        labels, batch = None, self.per_class
        if self.classes:
            if not config.num_classes:
                raise ValueError(
                    f"classes {self.classes} were asked of a flow trained without classes"
                )
            labels = jnp.repeat(jnp.asarray(self.classes, jnp.int32), self.per_class)
            batch = len(labels)
        if config.in_channels not in (1, 3):
            raise NotImplementedError(
                f"the flow makes {config.in_channels} channels; this command writes images of 1 "
                "or 3. Decode latents with jaxeff.models.starflow.vae"
            )
        sigma = float(facts.get("sigma", 0.0)) if self.denoise else 0.0
        x = flow.sample(
            jax.random.key(self.seed),
            labels,
            batch=batch,
            denoise_sigma=sigma,
            guidance=self.guidance,
            method=self.method,
            cache=self.cache,
        )
        write_png(self.grid, image_grid(np.asarray(x), self.per_class))
        sys.stdout.write(f"{batch} images of {config.img_size}² in {self.grid}\n")
