"""Pictures of block masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels import BlockMask


def plot_block_mask(mask: BlockMask, axes: Any = None, *, batch: int = 0, head: int = 0) -> Any:
    """Draw which tiles are skipped (white), wholly allowed (dark) or under the token rule (light).

    Args:
        mask: a block mask with concrete arrays.
        axes: matplotlib axes, or ``None`` for a figure of its own.
        batch: batch entry; any where the mask is shared.
        head: head; any where the mask is shared.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    >>> from pallas_kernels import Mask
    >>> mask = BlockMask.from_mask(Mask.causal(), 8, 8, block_q=2, block_kv=2)
    >>> plot_block_mask(mask).get_xlabel()
    'key tile (2 tokens)'
    """
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jaxeff[bench]'") from error
    status = np.asarray(mask.to_status())
    status = status[min(batch, status.shape[0] - 1), min(head, status.shape[1] - 1)]
    axes = Figure(figsize=(4, 4), layout="constrained").subplots() if axes is None else axes
    colours = ListedColormap(["white", "#9ecae1", "#08519c"])
    axes.imshow(status, cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.set(
        xlabel=f"key tile ({mask.block_kv} tokens)",
        ylabel=f"query tile ({mask.block_q} tokens)",
        title=f"{float(mask.sparsity()):.1%} of the tiles skipped",
    )
    return axes
