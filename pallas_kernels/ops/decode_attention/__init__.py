"""Attention of a few new tokens over a stored, maybe quantised, ragged or paged cache."""

from pallas_kernels.ops.decode_attention.api import append_tokens as append_tokens
from pallas_kernels.ops.decode_attention.api import decode_attention as decode_attention
from pallas_kernels.ops.decode_attention.api import merge_attention as merge_attention
from pallas_kernels.ops.decode_attention.compact import append_to_cache as append_to_cache
from pallas_kernels.ops.decode_attention.compact import largest_slots as largest_slots
from pallas_kernels.ops.decode_attention.compact import move_slots as move_slots
from pallas_kernels.ops.decode_attention.scores import (
    last_similar_keys as last_similar_keys,
)
from pallas_kernels.ops.decode_attention.scores import (
    max_attention_weights as max_attention_weights,
)
from pallas_kernels.ops.decode_attention.scores import (
    window_attention_weights as window_attention_weights,
)
