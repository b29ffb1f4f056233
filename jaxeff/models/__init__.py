"""Decoder models and their configurations."""

from jaxeff.models.config import ModelConfig
from jaxeff.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig"]
