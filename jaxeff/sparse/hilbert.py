"""Token orders along a Hilbert curve, so that neighbours in space are neighbours in a tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hilbert_order(shape: Sequence[int]) -> np.ndarray:
    """Return the order in which a Hilbert curve visits the points of a 2-D or 3-D grid.

    The curve of the smallest power-of-two cube around the grid is followed, and points outside the
    grid are left out. In a full square or cube, successive points are neighbours.

    Args:
        shape: ``(height, width)`` or ``(frames, height, width)``, tokens; row-major like the tokens
            of an image or video.

    Returns:
        int32 ``[prod(shape)]``: ``order[i]`` is the row-major number of the i-th point on the
        curve. ``x[:, order]`` permutes tokens, ``y[:, inverse_order(order)]`` puts them back.

    Raises:
        ValueError: not two or three axes, or one below 1.

    >>> hilbert_order((2, 2)).tolist()
    [0, 1, 3, 2]

    References: Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.7; Skilling, "Programming the
    Hilbert curve", 2004.
    """
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"shape is {shape}; expected two or three sizes of at least 1")
    bits = max(1, (max(shape) - 1).bit_length())
    x = np.indices(shape).reshape(len(shape), -1)
    return np.argsort(_distance(x, bits), kind="stable").astype(np.int32)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """Return the permutation that undoes ``order``.

    >>> inverse_order(np.array([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    return np.argsort(order).astype(np.int32)


def _distance(x: np.ndarray, bits: int) -> np.ndarray:
    """Return the position on the curve of points ``[axes, points]`` in a cube of side 2^bits."""
    x, axes = x.copy(), len(x)
    bit = 1 << (bits - 1)
    while bit > 1:  # undo the rotations and reflections of each level
        low = bit - 1
        for axis in range(axes):
            turned = (x[axis] & bit) > 0
            swap = np.where(turned, 0, (x[0] ^ x[axis]) & low)
            x[0] ^= np.where(turned, low, swap)
            x[axis] ^= swap
        bit >>= 1
    for axis in range(1, axes):  # Gray code
        x[axis] ^= x[axis - 1]
    flip = np.zeros_like(x[0])
    bit = 1 << (bits - 1)
    while bit > 1:
        flip ^= np.where(x[-1] & bit, bit - 1, 0)
        bit >>= 1
    x ^= flip
    distance = np.zeros(x.shape[1], np.int64)
    for level in reversed(range(bits)):
        for axis in range(axes):
            distance = (distance << 1) | ((x[axis] >> level) & 1)
    return distance
