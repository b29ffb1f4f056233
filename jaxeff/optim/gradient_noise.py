"""How large a gradient is beside its quantisation noise: the ratio whose fall below √3 ends FP4."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# A gradient without any noise would give infinity, which a moving average never forgets.
_LARGEST_RATIO = 1e6


class GradientNoiseState(NamedTuple):
    """State of ``monitor_gradient_noise``.

    Fields: ``ratio`` and ``ratio_ema`` (float32 scalars, 0 before the first measurement),
    ``per_leaf`` (ratio of each parameter, structure of the parameters), ``below`` (bool: the moving
    average is under the threshold), ``crossed_at`` (int32: update at which it first was, -1 for
    never), ``num_measured`` and ``count`` (int32).
    """

    ratio: jax.Array
    ratio_ema: jax.Array
    per_leaf: Any
    below: jax.Array
    crossed_at: jax.Array
    num_measured: jax.Array
    count: jax.Array


def monitor_gradient_noise(
    threshold: float = math.sqrt(3.0), *, ema: float = 0.9, every: int = 50
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves updates alone and records the ratio of gradient to quantisation noise.

    Two estimators, chosen by the extra argument of ``update``:

    - ``noisy_pair=(g1, g2)``: same parameters and batch, two keys of stochastic rounding.
      :math:`\rho = \sqrt{S / N}`, :math:`N = |g_1 - g_2|^2 / 2`,
      :math:`S = \max(\langle g_1, g_2 \rangle, 0)`. With ``signal_pair=(ga, gb)`` from two
      *batches*, ``S`` is that pair's: the population gradient's instead of the mini-batch's.
    - ``reference=g``: the gradient in high precision of the same quantised forward pass;
      :math:`\rho = |g| / |g_q - g|` with ``g_q`` the updates that arrive. It sees the bias of
      rounding to nearest too. Goes first in a chain, before anything changes the gradient.

    Measured is at every ``every``-th update (``is_due``); the arguments are ignored at the others
    and their gradients need not be computed. Without them, or where a gradient is not finite,
    nothing but ``count`` changes. Under ``optax.masked`` and ``optax.partition`` the arguments stay
    gradients of all parameters.

    Args:
      threshold: ratio below which the noise takes over; at :math:`\sqrt3` a step of optimal length
        loses a quarter of its descent, at half of that 57 %: a knee, not a wall.
      ema: decay of the moving average per measurement; the first one starts it.
      every: updates between measurements.

    Returns:
      An optax transformation.

    Raises:
      ValueError: if an argument is out of range, or ``update`` gets both or half of an estimator.

    Example:
      >>> monitor = monitor_gradient_noise(every=1)
      >>> g = jnp.array([3.0, 4.0])
      >>> _, state = monitor.update(g, monitor.init(g), reference=jnp.array([3.0, 3.0]))
      >>> round(float(state.ratio), 3), bool(state.below)
      (4.243, False)

    References:
      "FP4 All the Way", arXiv:2505.19115, section 5 (threshold and switch).
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    if not 0.0 <= ema < 1.0:
        raise ValueError(f"ema must lie in [0, 1), got {ema}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")

    def init(params):
        zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        leaves = jax.tree.map(lambda _: zero, params)
        return GradientNoiseState(zero, zero, leaves, jnp.zeros((), bool), count - 1, count, count)

    def update(
        updates,
        state,
        params=None,
        *,
        noisy_pair=None,
        reference=None,
        signal_pair=None,
        **extra_args,
    ):
        del params, extra_args
        if noisy_pair is not None and reference is not None:
            raise ValueError("give noisy_pair or reference, not both")
        if signal_pair is not None and noisy_pair is None:
            raise ValueError("signal_pair needs noisy_pair, which measures the noise")
        if noisy_pair is None and reference is None:
            return updates, state._replace(count=state.count + 1)
        if noisy_pair is not None:
            signal_pair = noisy_pair if signal_pair is None else signal_pair
            pairs = (tuple(_like(updates, g) for g in pair) for pair in (noisy_pair, signal_pair))
            powers = _two_key_powers(*pairs)
        else:
            powers = _reference_powers(updates, _like(updates, reference))
        measured = _measured(state, powers)
        # One overflow must not end a phase of training, nor stay in the average.
        due = is_due(state, every) & jnp.isfinite(sum(jax.tree.leaves(powers)))
        new = jax.tree.map(lambda old, one: jnp.where(due, one, old), state, measured)
        return updates, new._replace(count=state.count + 1)

    def _measured(state, powers):
        signal, noise = (sum(jax.tree.leaves(power)) for power in powers)
        ratio = _ratio(signal, noise)
        average = jnp.where(
            state.num_measured == 0, ratio, ema * state.ratio_ema + (1 - ema) * ratio
        )
        below = average < threshold
        first = below & (state.crossed_at < 0)
        return GradientNoiseState(
            ratio,
            average,
            jax.tree.map(_ratio, *powers),
            below,
            jnp.where(first, state.count, state.crossed_at),
            state.num_measured + 1,
            state.count,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def is_due(state: GradientNoiseState, every: int) -> jax.Array:
    """Whether the coming update measures; guards the extra backward pass with ``lax.cond``.

    Args:
      state: of the monitor.
      every: as given to it.

    Returns:
      bool scalar.

    Example:
      >>> bool(is_due(monitor_gradient_noise().init(jnp.ones(2)), 50))
      True
    """
    return state.count % every == 0


def _ratio(signal, noise):
    ratio = jnp.sqrt(jnp.maximum(signal, 0.0) / jnp.where(noise > 0, noise, 1.0))
    return jnp.where(noise > 0, jnp.minimum(ratio, _LARGEST_RATIO), _LARGEST_RATIO)


def _like(updates, gradient):
    """A gradient without the leaves that ``optax.masked`` took out of the updates."""

    def is_masked(leaf):
        return isinstance(leaf, optax.MaskedNode)

    def kept(update, leaf):
        return update if is_masked(update) else leaf

    return jax.tree.map(kept, updates, gradient, is_leaf=is_masked)


def _inner(a, b):
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


def _two_key_powers(noisy_pair, signal_pair):
    """Power of signal and noise of every leaf; the difference has twice the noise of one draw."""
    noise = jax.tree.map(lambda a, b: _inner(a - b, a - b) / 2, *noisy_pair)
    return jax.tree.map(_inner, *signal_pair), noise


def _reference_powers(quantised, reference):
    noise = jax.tree.map(lambda q, g: _inner(q - g, q - g), quantised, reference)
    return jax.tree.map(lambda g: _inner(g, g), reference), noise
