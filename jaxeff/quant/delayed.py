"""Delayed scaling: FP8 scales that follow from the largest magnitudes of earlier steps.

The state of a layer is a float32 array ``[3, history_length]``, newest first, for the tensors
``x``, ``w`` and ``d``. It is an explicit argument of the product. What a step saw comes back as the
*cotangent* of that argument, since the gradient ``d`` exists in the backward pass only: column 0
holds the three magnitudes, the rest is zero. Under ``jit`` with sharded operands they are the
magnitudes of the whole tensors. A forward pass alone changes nothing.

A layer that is used ``c`` times in one step records the sum over its uses, at most ``c`` times the
maximum: that never overflows and costs ``log2(c)`` bits of range.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.quant.recipe import DelayedScaling, Recipe
from pallas_kernels.formats import get_format, round_to

TENSORS = ("x", "w", "d")


class AmaxHistory(nnx.Variable):
    """Largest magnitudes of the tensors ``x, w, d`` of a layer: float32 ``[3, history_length]``."""


def init_history(recipe: Recipe) -> jax.Array:
    """History of a layer that has seen nothing.

    Args:
      recipe: a Recipe with ``delayed``.

    Returns:
      float32 zeros ``[3, history_length]``.

    Raises:
      ValueError: if the recipe has no delayed scaling.

    Example:
      >>> from jaxeff.quant.recipe import RECIPES
      >>> init_history(RECIPES["fp8_delayed"]).shape
      (3, 1024)
    """
    if recipe.delayed is None:
        raise ValueError(f"recipe {recipe.name!r} has no delayed scaling, so no history")
    return jnp.zeros((len(TENSORS), recipe.delayed.history_length), jnp.float32)


def advance_history(history: Any, seen: Any) -> Any:
    """Pushes what one step saw to the front of every history; once per forward and backward pass.

    A magnitude that is not finite is left out (recorded as 0), so one bad step does not spoil the
    scales of the next ``history_length``; TransformerEngine keeps the former scale instead.

    Args:
      history: pytree of float32 ``[3, history_length]``.
      seen: gradient with respect to ``history``, of the same structure.

    Returns:
      New histories.

    Example:
      >>> seen = jnp.float32([[5, 0], [jnp.nan, 0], [7, 0]])
      >>> advance_history(jnp.float32([[1, 2], [3, 4], [0, 0]]), seen).tolist()
      [[5.0, 1.0], [0.0, 3.0], [7.0, 0.0]]
    """

    def push(old, new):
        newest = jnp.where(jnp.isfinite(new[..., :1]), new[..., :1], 0.0).astype(old.dtype)
        # No concatenation: XLA makes one slow kernel of those of all layers.
        moved = jax.lax.pad(
            old, jnp.zeros((), old.dtype), [(0, 0, 0)] * (old.ndim - 1) + [(1, -1, 0)]
        )
        return jnp.where(
            jax.lax.broadcasted_iota(jnp.int32, old.shape, old.ndim - 1) == 0, newest, moved
        )

    return jax.tree.map(push, history, seen)


def delayed_scale(history: jax.Array, tensor: str, qtype: str, how: DelayedScaling) -> jax.Array:
    """Encode scale of one tensor: ``max(format) / (2^margin · amax)``, 1 for an empty history.

    Args:
      history: float32 ``[3, history_length]``.
      tensor: ``"x"``, ``"w"`` or ``"d"``.
      qtype: ``"fp8_e4m3"`` or ``"fp8_e5m2"``.
      how: margin and algorithm.

    Returns:
      float32 scalar.

    Example:
      >>> history = jnp.float32([[7, 14], [0, 0], [0, 0]])
      >>> float(delayed_scale(history, "x", "fp8_e4m3", DelayedScaling(2)))
      32.0
    """
    return delayed_scales(history, (qtype,) * len(TENSORS), how)[TENSORS.index(tensor)]


def delayed_scales(history: jax.Array, qtypes: tuple[str, ...], how: DelayedScaling) -> jax.Array:
    """The encode scales of all three tensors; one small kernel where three would cost more.

    Args:
      history: float32 ``[3, history_length]``.
      qtypes: formats of ``x``, ``w`` and ``d``.
      how: margin and algorithm.

    Returns:
      float32 ``[3]``.

    Example:
      >>> history = jnp.float32([[7, 14], [0, 0], [1, 0]])
      >>> formats = ("fp8_e4m3", "fp8_e4m3", "fp8_e5m2")
      >>> delayed_scales(history, formats, DelayedScaling(2)).tolist()
      [32.0, 1.0, 57344.0]
    """
    amax = history[:, 0] if how.algorithm == "most_recent" else history.max(-1)
    tops = [get_format(qtype).element_type.max * 2.0**-how.margin for qtype in qtypes]
    scale = jnp.float32(tops) / jnp.where(amax > 0, amax, 1.0)
    return jnp.where((amax > 0) & jnp.isfinite(scale), scale, 1.0)


def round_delayed(value: jax.Array, scale: jax.Array, qtype: str) -> tuple[jax.Array, jax.Array]:
    """Codes in float32 under a given encode scale, and the decode scale; too large values saturate.

    Args:
      value: floating array.
      scale: float32 scalar.
      qtype: ``"fp8_e4m3"`` or ``"fp8_e5m2"``.

    Returns:
      Codes, shape of ``value``, and a scalar.

    Example:
      >>> codes, decode = round_delayed(jnp.float32([1.1, 9e9]), jnp.float32(2), "fp8_e4m3")
      >>> codes.tolist(), float(decode)
      ([2.25, 448.0], 0.5)
    """
    codes = round_to(value.astype(jnp.float32) * scale, get_format(qtype).element_type)
    return codes, 1 / scale


@jax.custom_vjp
def record_amax(z: jax.Array, x: jax.Array, w: jax.Array, history: jax.Array) -> jax.Array:
    """Returns ``z``; the cotangent of ``history`` gets ``max|x|, max|w|, max|d|`` in column 0.

    Args:
      z: the product.
      x: left operand.
      w: right operand.
      history: float32 ``[3, history_length]``.

    Returns:
      ``z``.

    Example:
      >>> seen = jax.grad(lambda h: record_amax(jnp.ones(2), jnp.ones(2), 2 * jnp.ones(2), h).sum())
      >>> seen(jnp.zeros((3, 4)))[:, 0].tolist()
      [1.0, 2.0, 1.0]
    """
    return z


def _record_forward(z, x, w, history):
    return z, (_amax(x), _amax(w), history)


def _record_backward(residuals, d):
    amax_x, amax_w, history = residuals
    seen = jnp.stack([amax_x, amax_w, _amax(d)])
    return d, None, None, jnp.zeros_like(history).at[:, 0].set(seen)


record_amax.defvjp(_record_forward, _record_backward)


def _amax(value):
    return jnp.max(jnp.abs(value), initial=0.0).astype(jnp.float32)
