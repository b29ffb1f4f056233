"""Parameters in bfloat16 without a float32 copy: updates that are rounded stochastically.

Rounding to nearest drops every update below about 2⁻⁹ of its parameter, so small learning rates
stop training. Stochastic rounding keeps such updates in expectation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.formats import stochastic_round


class StochasticRoundUpdatesState(NamedTuple):
    """State of ``stochastic_round_updates``: key data uint32 ``[2]`` and the number of updates."""

    key_data: jax.Array
    count: jax.Array


def stochastic_round_updates(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Turns an update ``u`` into one that lands on a stochastically rounded parameter.

    .. math::
      u' = SR(\mathrm{f32}(p) + u) - \mathrm{f32}(p)

    so that ``optax.apply_updates(p, u')`` gives exactly ``SR(p + u)`` in the dtype of ``p``. It
    must be the last transformation of a chain. Float32 parameters pass through. ``E[u'] = u``.
    ``u'`` is float32, so ``optax.apply_if_finite``, whose two branches must have one dtype, goes
    before it and not around it; an update of zeros leaves the parameters as they are.

    Args:
      seed: seed of the noise; step and leaf are folded in.

    Returns:
      An optax transformation; ``update`` needs ``params``.

    Example:
      >>> transform = optax.chain(optax.sgd(1e-4), stochastic_round_updates())
      >>> params = jnp.ones(4000, jnp.bfloat16)
      >>> updates, _ = transform.update(jnp.ones(4000), transform.init(params), params)
      >>> moved = optax.apply_updates(params, updates)
      >>> moved.dtype.name, bool(abs(moved.astype("float32").mean() - (1 - 1e-4)) < 5e-5)
      ('bfloat16', True)

    References:
      Zamirai et al., "Revisiting BFloat16 Training", arXiv:2010.06192, section 3.
    """

    def init(params):
        del params
        return StochasticRoundUpdatesState(
            jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
            jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("stochastic_round_updates needs params: call update(u, state, params)")
        key = jax.random.wrap_key_data(state.key_data, impl="threefry2x32")
        rounded = sr_apply_updates(params, updates, jax.random.fold_in(key, state.count))
        new_updates = jax.tree.map(_difference, rounded, params, updates)
        return new_updates, StochasticRoundUpdatesState(state.key_data, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def sr_apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """Adds updates to parameters: ``SR(f32(p) + f32(u))`` in the dtype of ``p``.

    Args:
      params: pytree of floating arrays; bfloat16 and float16 leaves are rounded stochastically,
        float32 leaves are added as they are.
      updates: pytree of the same structure, any floating dtype.
      key: typed PRNG key; leaf ``i`` draws from ``fold_in(key, i)``.

    Returns:
      New parameters, dtypes as in ``params``.

    Raises:
      ValueError: if the two structures differ.

    Example:
      >>> p = sr_apply_updates(jnp.ones(2), jnp.ones(2), jax.random.key(0))
      >>> p.tolist()
      [2.0, 2.0]
    """
    leaves, structure = jax.tree.flatten(params)
    update_leaves, update_structure = jax.tree.flatten(updates)
    if structure != update_structure:
        raise ValueError(f"updates have structure {update_structure}, params {structure}")
    new = []
    for index, (leaf, step) in enumerate(zip(leaves, update_leaves, strict=True)):
        total = leaf.astype(jnp.float32) + step.astype(jnp.float32)
        if leaf.dtype.itemsize < 4:
            total = stochastic_round(total, leaf.dtype, jax.random.fold_in(key, index))
        new.append(total.astype(leaf.dtype))
    return jax.tree.unflatten(structure, new)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs a transformation in float32: its state, its gradients and its updates.

    optax keeps Adam's moments in the dtype of the parameters; in bfloat16 the second moment with
    b2 = 0.95 or more no longer changes once it is large, since its increments round away.

    Args:
      inner: any optax transformation.

    Returns:
      The transformation on float32 copies; copies of parameters live for the update only.

    Example:
      >>> transform = in_float32(optax.scale_by_adam())
      >>> transform.init(jnp.ones(2, jnp.bfloat16)).nu.dtype
      dtype('float32')
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return inner.init(_as_float32(params))

    def update(updates, state, params=None, **extra_args):
        params = None if params is None else _as_float32(params)
        return inner.update(_as_float32(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _difference(rounded: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
    if param.dtype.itemsize >= 4:
        return update
    return rounded.astype(jnp.float32) - param.astype(jnp.float32)
