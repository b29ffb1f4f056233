"""Pictures of samples: many images on one canvas, written as a PNG."""

from pathlib import Path

import numpy as np

__all__ = ["image_grid", "save_png"]


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


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write pixels as a PNG file.

    Args:
      path: file to write; its folder is made.
      pixels: uint8 ``[H, W, 1]`` (grey) or ``[H, W, 3]`` (RGB).

    Raises:
      ValueError: for another dtype or shape.
      ModuleNotFoundError: naming the extra that brings Pillow.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        raise ValueError(f"pixels must be uint8 [H, W, 1 or 3], got {pixels.dtype} {pixels.shape}")
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing pictures needs Pillow: pip install 'jaxeff[bench]'"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, format="PNG")
