"""Optimisation pieces that optax does not have: low-precision parameters and states, noise."""

from jaxeff.optim.falqon import FalqonState, Melded, falqon, meld, write_rows
from jaxeff.optim.gradient_noise import GradientNoiseState, is_due, monitor_gradient_noise
from jaxeff.optim.quantize_state import (
    QuantizedState,
    QuantizeStateState,
    quantize_state,
    state_bytes,
)
from jaxeff.optim.schedule import qaf_schedule, warmup_cosine
from jaxeff.optim.stochastic_rounding import (
    StochasticRoundUpdatesState,
    in_float32,
    sr_apply_updates,
    stochastic_round_updates,
)

__all__ = [
    "FalqonState",
    "GradientNoiseState",
    "Melded",
    "QuantizeStateState",
    "QuantizedState",
    "StochasticRoundUpdatesState",
    "falqon",
    "in_float32",
    "is_due",
    "meld",
    "monitor_gradient_noise",
    "qaf_schedule",
    "quantize_state",
    "sr_apply_updates",
    "state_bytes",
    "stochastic_round_updates",
    "warmup_cosine",
    "write_rows",
]
