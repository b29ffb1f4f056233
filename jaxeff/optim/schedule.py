"""Learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(
    peak: float, steps: int, *, warmup_steps: int = 0, final_fraction: float = 0.1
) -> Callable:
    r"""Linear warm-up to ``peak``, then half a cosine down to ``final_fraction · peak``.

    .. math::
      \eta_t = \eta \tfrac{t + 1}{w}, \; t < w; \qquad
      \eta_t = \eta (f + (1 - f) \tfrac{1 + \cos(\pi (t - w) / (s - w))}{2}), \; t \ge w

    The first step already moves: it has rate ``peak / warmup_steps`` and not zero.

    Args:
      peak: largest learning rate, > 0.
      steps: total number of steps ``s``, warm-up included; later steps keep the final rate.
      warmup_steps: ``w``, in [0, steps).
      final_fraction: ``f``, in [0, 1].

    Returns:
      A function from the step (int) to the learning rate, as optax takes it.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> schedule = warmup_cosine(1e-3, 100, warmup_steps=10)
      >>> [f"{float(schedule(step)):.0e}" for step in (0, 9, 10, 100)]
      ['1e-04', '1e-03', '1e-03', '1e-04']
    """
    if not peak > 0:
        raise ValueError(f"peak must be positive, got {peak}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps must lie in [0, steps={steps}), got {warmup_steps}")
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction must lie in [0, 1], got {final_fraction}")
    decay = optax.cosine_decay_schedule(peak, steps - warmup_steps, alpha=final_fraction)
    if warmup_steps == 0:
        return decay

    def warmup(step):
        return peak * (step + 1) / warmup_steps

    return optax.join_schedules([warmup, decay], [warmup_steps])


def qaf_schedule(
    base: Callable,
    start: int | jax.Array,
    *,
    steps: int,
    peak: float,
    warmup_steps: int = 40,
    final_fraction: float = 0.0,
) -> Callable:
    r"""A base schedule up to ``start``, then a fresh warm-up and cosine for finetuning.

    .. math::
      \eta_t = base(t), \; t < a \text{ or } a < 0; \qquad
      \eta_t = warmup\_cosine(t - a), \; t \ge a

    ``start`` may be traced, such as ``crossed_at`` of ``monitor_gradient_noise`` (negative: not
    yet): build the schedule inside the step and nothing is compiled again when the phase begins.

    Args:
      base: function from the step to the learning rate.
      start: first step ``a`` of the second phase; negative for never.
      steps: length of the second phase; later steps keep its final rate.
      peak: its largest learning rate.
      warmup_steps: of the second phase.
      final_fraction: last learning rate of the second phase relative to its peak.

    Returns:
      A function from the step to the learning rate, as optax takes it.

    Raises:
      ValueError: ``base`` is not a function, and as ``warmup_cosine``.

    Example:
      >>> rate = qaf_schedule(lambda step: 1.0, 100, steps=50, peak=0.5, warmup_steps=5)
      >>> [round(float(rate(step)), 3) for step in (99, 100, 104, 150)]
      [1.0, 0.1, 0.5, 0.0]

    References:
      "FP4 All the Way", arXiv:2505.19115, section 5 (40 steps of warm-up, cosine).
    """
    if not callable(base):
        raise ValueError(f"base must be a function of the step, got {base!r}")
    fresh = warmup_cosine(peak, steps, warmup_steps=warmup_steps, final_fraction=final_fraction)

    def rate(step):
        begun = (start >= 0) & (step >= start)
        return jnp.where(begun, fresh(jnp.maximum(step - start, 0)), base(step))

    return rate
