"""Attention that leaves tiles out: static patterns, one file each, and SpargeAttn and SLA."""

from jaxeff.sparse.bigbird import bigbird
from jaxeff.sparse.block_diagonal import block_diagonal
from jaxeff.sparse.hilbert import hilbert_order, inverse_order
from jaxeff.sparse.picture import plot_block_mask
from jaxeff.sparse.sla import SparseLinearAttention, sparse_linear_attention
from jaxeff.sparse.sliding_window import sliding_window
from jaxeff.sparse.sparge import SpargeAttention, SpargeThresholds
from jaxeff.sparse.strided import strided
from jaxeff.sparse.tuner import TuneResult, tune_sparge
from jaxeff.sparse.vertical_slash import estimate_lines, vertical_slash

# One row per static pattern; what is listed here is tested and documented.
PATTERNS = {
    pattern.__name__: pattern
    for pattern in (sliding_window, strided, block_diagonal, bigbird, vertical_slash)
}

__all__ = [
    "PATTERNS",
    "SpargeAttention",
    "SpargeThresholds",
    "SparseLinearAttention",
    "TuneResult",
    "bigbird",
    "block_diagonal",
    "estimate_lines",
    "hilbert_order",
    "inverse_order",
    "plot_block_mask",
    "sliding_window",
    "sparse_linear_attention",
    "strided",
    "tune_sparge",
    "vertical_slash",
]
