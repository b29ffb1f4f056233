"""Matrix products whose six operand uses are quantised by a recipe, with their own derivative."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.quant.noise import counter_key
from jaxeff.quant.recipe import POINTS, OperandQuant, Recipe, resolve_recipe
from pallas_kernels.formats import get_format, rht
from pallas_kernels.ops.quantize.api import fake_quantize, quantize


def quantized_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    recipe: str | Recipe,
    *,
    key: jax.Array | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    r"""Matrix product with low-precision operands forward and backward; needs no NNX.

    With :math:`Q_p` the quantiser of point ``p``, for ``x = lhs``, ``w = rhs``, gradient ``d``:

    .. math::
      z = Q_{fwd\_x}(x) Q_{fwd\_w}(w), \quad
      \bar x = Q_{bwd\_d}(d) Q_{bwd\_w}(w)^T, \quad
      \bar w = Q_{upd\_x}(x)^T Q_{upd\_d}(d)

    Contraction axes that a block does not divide are filled with zeros. Each point draws its own
    random numbers: point ``i`` uses ``fold_in(key, i)``, so a recomputed forward pass
    (``jax.checkpoint``) rounds identically, and the numbers do not depend on the sharding.
    Memory: ``x`` and ``w`` are kept for the backward pass, as in the plain product.

    Args:
      lhs: activation, floating, any shape.
      rhs: weight, floating.
      dimension_numbers: as in ``jax.lax.dot_general``. Batch dimensions are mapped over, so a
        per-tensor scale becomes one scale per batch entry.
      recipe: name out of ``RECIPES`` or a Recipe.
      key: PRNG key, typed or uint32 ``[2]``; needed if the recipe rounds stochastically.
      precision: as in ``jax.lax.dot_general``.
      preferred_element_type: dtype of the result.
      out_sharding: as in ``jax.lax.dot_general``; served for the identity recipe only.

    Returns:
      The product, batch dimensions first, then those of ``lhs``, then those of ``rhs``.

    Raises:
      ValueError: if the recipe needs a key and none came, or an operand is not floating.
      NotImplementedError: for ``out_sharding`` with a quantising recipe.

    Example:
      >>> x, w = jnp.ones((4, 32)), jnp.full((32, 8), 0.3)
      >>> z = quantized_dot_general(x, w, (((1,), (0,)), ((), ())), "fp4_rtn")
      >>> z.shape, bool(abs(z[0, 0] - 9.6) < 0.7)
      ((4, 8), True)

    References:
      arXiv:2505.19115 (FP4 All the Way), section 3 and its table of the six points.
    """
    recipe = resolve_recipe(recipe)
    if recipe.is_identity:
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        return lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **options,
        )
    if out_sharding is not None:
        raise NotImplementedError(
            f"out_sharding is not served with recipe {recipe.name!r}; use "
            "jax.lax.with_sharding_constraint on the result"
        )
    _check_floating(lhs=lhs, rhs=rhs)
    result_type = np.dtype(preferred_element_type or jnp.result_type(lhs, rhs))
    how = (precision, result_type)
    x, w, out_shape = _canonical(lhs, rhs, dimension_numbers)
    key_data = _key_data(recipe, key)
    if x.ndim == 2:
        z = _product(recipe, how, x, w, key_data)
    else:
        z = jax.vmap(functools.partial(_product, recipe, how))(
            x, w, _split_key(key_data, x.shape[0])
        )
    return z.reshape(out_shape)


def dot_general(recipe: str | Recipe, key: jax.Array | None = None) -> Callable[..., jax.Array]:
    """Returns a function with the signature of ``jax.lax.dot_general`` that follows a recipe.

    Args:
      recipe: name out of ``RECIPES`` or a Recipe.
      key: PRNG key, typed or uint32 ``[2]``; needed if the recipe rounds stochastically.

    Returns:
      ``f(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None)``, usable as
      ``dot_general=`` of ``flax.nnx.Linear`` or ``flax.linen.Dense``.

    Raises:
      ValueError: if the recipe is unknown, or needs a key and none came.

    Example:
      >>> product = dot_general("mxfp8")
      >>> product(jnp.eye(32), jnp.eye(32), (((1,), (0,)), ((), ()))).trace()
      Array(32., dtype=float32)
    """
    recipe = resolve_recipe(recipe)
    _key_data(recipe, key)

    def product(
        lhs,
        rhs,
        dimension_numbers,
        precision=None,
        preferred_element_type=None,
        *,
        out_sharding=None,
    ):
        return quantized_dot_general(
            lhs,
            rhs,
            dimension_numbers,
            recipe,
            key=key,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    return product


# --- the product and its derivative -------------------------------------------------------------
# Everything below is two-dimensional: x [t, k], w [k, n], d [t, n].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(recipe: Recipe, how: tuple, x, w, key_data):
    return _forward(recipe, how, x, w, key_data)[0]


def _forward(recipe, how, x, w, key_data):
    precision, result_type = how
    quants = recipe.fwd_x, recipe.fwd_w
    keys = _point_key(recipe, "fwd_x", key_data), _point_key(recipe, "fwd_w", key_data)
    if recipe.execution == "native":
        z = _contract_native((x, w), (1, 0), quants, keys, precision, result_type)
        return z, (x, w, key_data)
    qx = _rounded(x, 1, quants[0], keys[0])  # [t, k], blocks along k
    qw = _rounded(w, 0, quants[1], keys[1])  # [k, n], blocks along k
    z = _contract(qx, 1, qw, 0, precision, result_type)  # [t, n]
    kept = (qx, qw) if recipe.residuals == "quantized" else (x, w)
    return z, (*kept, key_data)


def _backward(recipe, how, residuals, d):
    precision, _ = how
    x, w, key_data = residuals
    key = functools.partial(_point_key, recipe, key_data=key_data)
    if recipe.execution == "native":
        contract = functools.partial(_contract_native, precision=precision)
        quants = recipe.bwd_d, recipe.bwd_w
        keys = key("bwd_d"), key("bwd_w")
        grad_x = contract((d, w), (1, 1), quants, keys, result_type=x.dtype)  # [t, k]
        quants, keys = (recipe.upd_x, recipe.upd_d), (key("upd_x"), key("upd_d"))
        rotated = _rotate(recipe, x), _rotate(recipe, d)
        grad_w = contract(rotated, (0, 0), quants, keys, result_type=w.dtype)  # [k, n]
        return grad_x, grad_w, _no_gradient(key_data)
    # Rounding happens in the dtype of the gradient that arrives, the product in that of x.
    qd = _rounded(d, 1, recipe.bwd_d, key("bwd_d"))  # [t, n], blocks along n
    qw = _rounded(w, 1, recipe.bwd_w, key("bwd_w"))  # [k, n], blocks along n
    grad_x = _contract(qd, 1, qw, 1, precision, x.dtype)  # [t, k]
    qd = _rounded(_rotate(recipe, d), 0, recipe.upd_d, key("upd_d"))  # [t, n], blocks along t
    qx = _rounded(_rotate(recipe, x), 0, recipe.upd_x, key("upd_x"))  # [t, k], blocks along t
    grad_w = _contract(qx, 0, qd, 0, precision, w.dtype)  # [k, n]
    return grad_x, grad_w, _no_gradient(key_data)


_product.defvjp(_forward, _backward)


def _contract(a, a_axis, b, b_axis, precision, result_type):
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=result_type,
    )


def _contract_native(operands, axes, quants, keys, precision, result_type):
    """Product of real 8-bit operands; each scale is constant along the contraction."""
    quantized = [
        quantize(operand, quant.format, **_quantizer_options(axis, quant, key))
        for operand, axis, quant, key in zip(operands, axes, quants, keys, strict=True)
    ]
    a, b = quantized
    product = _contract(a.qvalue, axes[0], b.qvalue, axes[1], precision, jnp.float32)
    scale_a = a.scale if axes[0] == 1 else a.scale.T  # [rows or 1, 1]
    scale_b = b.scale if axes[1] == 0 else b.scale.T  # [1, columns or 1]
    return (product * (scale_a * scale_b)).astype(result_type)


def _rotate(recipe: Recipe, value):
    """Rotates groups of tokens by a Hadamard matrix; missing tokens are zeros."""
    if recipe.wgrad_transform is None:
        return value
    size, signs = recipe.wgrad_transform.size, recipe.wgrad_transform.signs
    missing = -value.shape[0] % size
    return rht(jnp.pad(value, ((0, missing), (0, 0))), axis=0, size=size, signs=signs)


def _rounded(value, axis: int, quant: OperandQuant, key):
    """Rounds a matrix to a format, with blocks along ``axis``; keeps shape and dtype."""
    if quant.format is None:
        return value
    return fake_quantize(value, quant.format, **_quantizer_options(axis, quant, key))


def _quantizer_options(axis: int, quant: OperandQuant, key) -> dict:
    tile = get_format(quant.format).block if quant.tile == "default" else quant.tile
    along = {
        "contraction": (axis, tile),
        "square": ((0, 1), (tile, tile)),
        "tensor": (None, None),
    }[quant.granularity]
    return {
        "axis": along[0],
        "tile": along[1],
        "rounding": quant.rounding,
        "key": key,
        "scale_rule": quant.scale_rule,
        "overrange": quant.overrange,
        "two_level": quant.two_level,
    }


# --- keys ---------------------------------------------------------------------------------------


def _key_data(recipe: Recipe, key) -> jax.Array | None:
    """The two words of a key, or None if the recipe draws nothing."""
    if not recipe.stochastic_points:
        return None
    if key is None:
        raise ValueError(
            f"recipe {recipe.name!r} rounds {', '.join(recipe.stochastic_points)} "
            "stochastically: pass key=jax.random.key(seed), folded with the step"
        )
    key = jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if key.shape != (2,) or key.dtype != jnp.uint32:
        raise ValueError(
            "key must be one typed PRNG key or its data, uint32 [2]; got "
            f"{key.dtype} {list(key.shape)}"
        )
    return key


def _point_key(recipe: Recipe, point: str, key_data):
    if key_data is None or point not in recipe.stochastic_points:
        return None
    return jax.random.fold_in(counter_key(key_data), POINTS.index(point))


def _split_key(key_data, count: int):
    if key_data is None:
        return None
    return jax.random.key_data(jax.random.split(counter_key(key_data), count))


def _no_gradient(key_data):
    """The cotangent of integer data, which has no derivative."""
    return None if key_data is None else np.zeros(key_data.shape, jax.dtypes.float0)


# --- shapes -------------------------------------------------------------------------------------


def _check_floating(**operands) -> None:
    for name, operand in operands.items():
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {operand.dtype}")


def _canonical(lhs, rhs, dimension_numbers):
    """Brings operands to ``[t, k]`` and ``[k, n]``, or ``[b, t, k]`` and ``[b, k, n]``."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = _others(lhs.ndim, (*lhs_contract, *lhs_batch))
    rhs_free = _others(rhs.ndim, (*rhs_contract, *rhs_batch))
    sizes = [
        tuple(operand.shape[axis] for axis in axes)
        for operand, axes in (
            (lhs, lhs_batch),
            (lhs, lhs_free),
            (lhs, lhs_contract),
            (rhs, rhs_free),
            (rhs, rhs_contract),
            (rhs, rhs_batch),
        )
    ]
    batch, rows, contract, columns, rhs_contract_size, rhs_batch_size = sizes
    if contract != rhs_contract_size or batch != rhs_batch_size:
        raise ValueError(
            f"lhs {list(lhs.shape)} and rhs {list(rhs.shape)} do not fit dimension_numbers "
            f"{dimension_numbers}: contraction {contract} and {rhs_contract_size}, "
            f"batch {batch} and {rhs_batch_size}"
        )
    t, k, n = math.prod(rows), math.prod(contract), math.prod(columns)
    lead = (math.prod(batch),) if batch else ()
    x = lhs.transpose((*lhs_batch, *lhs_free, *lhs_contract)).reshape((*lead, t, k))
    w = rhs.transpose((*rhs_batch, *rhs_contract, *rhs_free)).reshape((*lead, k, n))
    return x, w, (*batch, *rows, *columns)


def _others(rank: int, taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in taken)
