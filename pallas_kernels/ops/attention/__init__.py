"""Dot-product attention: full precision and the SageAttention family."""

from pallas_kernels.ops.attention.api import dot_product_attention as dot_product_attention
from pallas_kernels.ops.attention.api import explain as explain
from pallas_kernels.ops.attention.spec import QUANTS as QUANTS
from pallas_kernels.ops.attention.spec import AttentionConfig as AttentionConfig
from pallas_kernels.ops.attention.spec import AttentionQuant as AttentionQuant
