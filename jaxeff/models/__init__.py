"""Decoder models, their configurations, and Hugging Face checkpoints (``jaxeff.models.hf``)."""

from jaxeff.models import hf
from jaxeff.models.config import ModelConfig
from jaxeff.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig", "hf"]
