"""Learning-rate schedules."""

from collections.abc import Callable

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
