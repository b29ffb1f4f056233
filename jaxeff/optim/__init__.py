"""Optimisation pieces that optax does not have: stochastic rounding of parameters, schedules."""

from jaxeff.optim.schedule import warmup_cosine
from jaxeff.optim.stochastic_rounding import (
    StochasticRoundUpdatesState,
    in_float32,
    sr_apply_updates,
    stochastic_round_updates,
)

__all__ = [
    "StochasticRoundUpdatesState",
    "in_float32",
    "sr_apply_updates",
    "stochastic_round_updates",
    "warmup_cosine",
]
