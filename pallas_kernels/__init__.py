"""Low-precision formats, masks and kernels for JAX on GPUs, with a reference on any backend.

Everything here works on arrays and imports only jax and numpy. ``implementation=`` chooses between
``"mosaic"`` (GPU kernels), ``"xla"`` (any backend, linear memory) and ``"reference"`` (the float32
oracle); ``None`` takes the first that serves the call, and :func:`explain` says which and why.
"""

from pallas_kernels import sage
from pallas_kernels._dispatch import explain
from pallas_kernels.formats import (
    FORMATS,
    BlockFormat,
    QTensor,
    get_format,
    inverse_rht,
    rht,
    stochastic_round,
)
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention.api import dot_product_attention
from pallas_kernels.ops.attention.ring import ring_attention
from pallas_kernels.ops.attention.spec import QUANTS, AttentionConfig, AttentionQuant
from pallas_kernels.ops.decode_attention import (
    append_to_cache,
    append_tokens,
    decode_attention,
    largest_slots,
    last_similar_keys,
    max_attention_weights,
    merge_attention,
    move_slots,
    window_attention_weights,
)
from pallas_kernels.ops.gated import gated_backward, gated_forward
from pallas_kernels.ops.matmul import matmul, scaled_matmul
from pallas_kernels.ops.quantize.api import (
    dequantize,
    fake_quantize,
    fake_quantize_both,
    quantize,
    quantize_fp8_both,
)

__all__ = [
    "FORMATS",
    "QUANTS",
    "AttentionConfig",
    "AttentionQuant",
    "BlockFormat",
    "BlockMask",
    "Mask",
    "QTensor",
    "append_to_cache",
    "append_tokens",
    "decode_attention",
    "dequantize",
    "dot_product_attention",
    "explain",
    "fake_quantize",
    "fake_quantize_both",
    "gated_backward",
    "gated_forward",
    "get_format",
    "inverse_rht",
    "largest_slots",
    "last_similar_keys",
    "matmul",
    "max_attention_weights",
    "merge_attention",
    "move_slots",
    "quantize",
    "quantize_fp8_both",
    "rht",
    "ring_attention",
    "sage",
    "scaled_matmul",
    "stochastic_round",
    "window_attention_weights",
]
