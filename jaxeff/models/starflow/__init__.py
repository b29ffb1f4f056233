"""TARFlow and STARFlow: autoregressive transformer flows with exact likelihood and inverse."""

from jaxeff.models.starflow.block import FlowBlock, TokenMap, rope_angles, rope_positions, rotate
from jaxeff.models.starflow.cache import CacheSpec, cache_bytes
from jaxeff.models.starflow.config import (
    PRESETS,
    TARFlowConfig,
    starflow_tiny,
    starflow_xl,
    starflow_xxl,
    tarflow_in64,
    tarflow_mnist,
)
from jaxeff.models.starflow.flow import (
    FlowTrace,
    TARFlow,
    bits_per_dim,
    denoise,
    ema_update,
    flow_loss,
    patchify,
    unpatchify,
    with_dtype,
)
from jaxeff.models.starflow.guidance import linear_guidance, score_guidance
from jaxeff.models.starflow.sampling import InverseTrace, inverse, sample
from jaxeff.models.starflow.upstream import config_from_upstream, from_upstream, load_safetensors

__all__ = [
    "PRESETS",
    "CacheSpec",
    "FlowBlock",
    "FlowTrace",
    "InverseTrace",
    "TARFlow",
    "TARFlowConfig",
    "TokenMap",
    "bits_per_dim",
    "cache_bytes",
    "config_from_upstream",
    "denoise",
    "ema_update",
    "flow_loss",
    "from_upstream",
    "inverse",
    "linear_guidance",
    "load_safetensors",
    "patchify",
    "rope_angles",
    "rope_positions",
    "rotate",
    "sample",
    "score_guidance",
    "starflow_tiny",
    "starflow_xl",
    "starflow_xxl",
    "tarflow_in64",
    "tarflow_mnist",
    "unpatchify",
    "with_dtype",
]
