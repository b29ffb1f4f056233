"""NNX modules: attention, norms, rotary embedding, the transformer block."""

from jaxeff.nn.attention import Attention, default_attention_fn
from jaxeff.nn.flax_attention import flax_attention_fn
from jaxeff.nn.norm import RMSNorm
from jaxeff.nn.rope import ROPE_TYPES, RopeConfig, apply_rope, rope_frequencies
from jaxeff.nn.transformer import ACTIVATIONS, GatedMLP, TransformerBlock

__all__ = [
    "ACTIVATIONS",
    "ROPE_TYPES",
    "Attention",
    "GatedMLP",
    "RMSNorm",
    "RopeConfig",
    "TransformerBlock",
    "apply_rope",
    "default_attention_fn",
    "flax_attention_fn",
    "rope_frequencies",
]
