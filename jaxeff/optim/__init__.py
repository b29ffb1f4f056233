"""Optimisation pieces that optax does not have: stochastic rounding of parameters, schedules."""

from jaxeff.optim.falqon import FalqonState, Melded, falqon, meld, write_rows
from jaxeff.optim.schedule import warmup_cosine
from jaxeff.optim.stochastic_rounding import (
    StochasticRoundUpdatesState,
    in_float32,
    sr_apply_updates,
    stochastic_round_updates,
)

__all__ = [
    "FalqonState",
    "Melded",
    "StochasticRoundUpdatesState",
    "falqon",
    "in_float32",
    "meld",
    "sr_apply_updates",
    "stochastic_round_updates",
    "warmup_cosine",
    "write_rows",
]
