"""Matrix products whose six operand uses are quantised by a recipe, with their own derivative."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.quant.delayed import (
    TENSORS,
    delayed_scale,
    delayed_scales,
    record_amax,
    round_delayed,
)
from jaxeff.quant.operand import quantizer_options, round_operand
from jaxeff.quant.recipe import NATIVE_TILE, POINTS, Recipe, resolve_recipe
from pallas_kernels.formats import QTensor, get_format, inverse_rht, rht
from pallas_kernels.formats.block_format import scale_from_amax
from pallas_kernels.formats.counter_random import counter_key
from pallas_kernels.ops.matmul.api import matmul
from pallas_kernels.ops.quantize.api import fake_quantize_both, quantize, quantize_fp8_both


def quantized_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    recipe: str | Recipe,
    *,
    key: jax.Array | None = None,
    amax_history: jax.Array | None = None,
    phase: jax.Array | bool | None = None,
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
    Rotations of the recipe are applied in front of ``Q``; those of the forward product are undone
    on the gradients. Memory: ``x`` and ``w`` are kept for the backward pass, as in the plain
    product, and one byte per element more where ``method="quest"`` marks what it clipped.

    Args:
      lhs: activation, floating, any shape.
      rhs: weight, floating.
      dimension_numbers: as in ``jax.lax.dot_general``. Batch dimensions are mapped over, so a
        per-tensor scale becomes one scale per batch entry.
      recipe: name out of ``RECIPES`` or a Recipe.
      key: PRNG key, typed or uint32 ``[2]``; needed if the recipe draws (``needs_key``).
      amax_history: float32 ``[3, history_length]`` from ``init_history``, for delayed scaling; its
        gradient is what ``advance_history`` needs.
      phase: bool scalar, may be traced: whether the second phase of the recipe (``qaf``) holds.
        None is False.
      precision: as in ``jax.lax.dot_general``; executions with real 8-bit tiles do not take it.
      preferred_element_type: dtype of the result.
      out_sharding: as in ``jax.lax.dot_general``; served for the identity recipe only.

    Returns:
      The product, batch dimensions first, then those of ``lhs``, then those of ``rhs``.

    Raises:
      ValueError: if the recipe needs a key or a history and none came, a phase or a history came
        that the recipe has no use for, an operand is not floating, or the axes do not fit.
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
    x, w, out_shape = _canonical(lhs, rhs, dimension_numbers)
    if recipe.forward_transform is not None:  # here, so that gradients are cut back to size
        x, w = (
            _pad(value, axis, recipe.forward_transform.size) for value, axis in ((x, -1), (w, -2))
        )
    # The codes' magnitudes come with them; others are taken, and summed over a batch, apart.
    records = amax_history is not None and x.ndim == 2 and _is_coded(recipe, result_type)
    how = (precision, result_type, records)
    given = _Given(_key_data(recipe, key), *_checked(recipe, amax_history, phase))
    if x.ndim == 2:
        z = _product(recipe, how, x, w, given)
    else:
        axes = _Given(None if given.key_data is None else 0, None, None)
        given = given._replace(key_data=_split_key(given.key_data, x.shape[0]))
        z = jax.vmap(functools.partial(_product, recipe, how), in_axes=(0, 0, axes))(x, w, given)
    if amax_history is not None and not records:
        z = record_amax(z, x, w, amax_history)
    return z.reshape(out_shape)


def dot_general(
    recipe: str | Recipe,
    key: jax.Array | None = None,
    *,
    amax_history: jax.Array | None = None,
    phase: jax.Array | bool | None = None,
) -> Callable[..., jax.Array]:
    """Returns a function with the signature of ``jax.lax.dot_general`` that follows a recipe.

    Args:
      recipe: name out of ``RECIPES`` or a Recipe.
      key: PRNG key, typed or uint32 ``[2]``; needed if the recipe draws.
      amax_history: as in ``quantized_dot_general``.
      phase: as there.

    Returns:
      ``f(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None)``, usable as
      ``dot_general=`` of ``flax.nnx.Linear`` or ``flax.linen.Dense``.

    Raises:
      ValueError: if the recipe is unknown, or needs a key or a history and none came.

    Example:
      >>> product = dot_general("mxfp8")
      >>> product(jnp.eye(32), jnp.eye(32), (((1,), (0,)), ((), ()))).trace()
      Array(32., dtype=float32)
    """
    recipe = resolve_recipe(recipe)
    _key_data(recipe, key)
    _checked(recipe, amax_history, phase)

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
            amax_history=amax_history,
            phase=phase,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    return product


# --- the product and its derivative -------------------------------------------------------------
# Everything below is two-dimensional: x [t, k], w [k, n], d [t, n].


_CONTRACTED = dict(zip(POINTS, (1, 0, 1, 1, 0, 0), strict=True))


class _Given(NamedTuple):
    """What comes with the operands and has no gradient: key words, amax history, phase."""

    key_data: jax.Array | None
    history: jax.Array | None
    phase: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(recipe: Recipe, how: tuple, x, w, given: _Given):
    return _forward(recipe, how, x, w, given)[0]


def _forward(recipe, how, x, w, given):
    precision, result_type, _ = how
    if _is_coded(recipe, result_type):
        x8, w8 = (_coded(recipe, p, v, given) for p, v in (("fwd_x", x), ("fwd_w", w)))
        z = _product_of_codes(x8.codes, x8, w8.turned, w8, precision, result_type)
        kept = x8._replace(codes=None), w8._replace(turned=None)
        return z, (*kept, (None, None), given)
    if recipe.execution == "native":
        z = _contract_native(recipe, ("fwd_x", "fwd_w"), (x, w), given, precision, result_type)
        return z, (x, w, (None, None), given)
    qx, mask_x = _operand(recipe, "fwd_x", x, given)  # [t, k], blocks along k
    qw, mask_w = _operand(recipe, "fwd_w", w, given)  # [k, n], blocks along k
    z = _contract(qx, 1, qw, 0, precision, result_type)  # [t, n]
    kept = (qx, qw) if recipe.residuals == "quantized" else (x, w)
    return z, (*kept, (mask_x, mask_w), given)


def _backward(recipe, how, residuals, d):
    precision, _, records = how
    x, w, (mask_x, mask_w), given = residuals
    if isinstance(x, _Coded):
        d8 = _coded(recipe, "bwd_d", d, given)
        grad_x = _product_of_codes(d8.codes, d8, w.codes, w, precision, x.like.dtype)  # [t, k]
        grad_w = _product_of_codes(x.turned, x, d8.turned, d8, precision, w.like.dtype)  # [k, n]
        nothing = _no_gradient(given)
        if records:
            seen = jnp.stack([x.amax, w.amax, d8.amax])
            nothing = nothing._replace(history=jnp.zeros_like(given.history).at[:, 0].set(seen))
        return grad_x, grad_w, nothing
    if recipe.execution == "native":
        contract = functools.partial(_contract_native, recipe, given=given, precision=precision)
        grad_x = contract(("bwd_d", "bwd_w"), (d, w), result_type=x.dtype)  # [t, k]
        grad_w = contract(("upd_x", "upd_d"), (x, d), result_type=w.dtype)  # [k, n]
        return grad_x, grad_w, _no_gradient(given)
    operand = functools.partial(_operand, recipe, given=given)
    # Rounding happens in the dtype of the gradient that arrives, the product in that of x.
    if _rounds_at_once(recipe, "bwd_d", "upd_d", given):
        qd_n, qd_t = _both(recipe, "bwd_d", "upd_d", d, given)
    else:
        qd_n, qd_t = operand("bwd_d", d)[0], operand("upd_d", d)[0]
    qw, qx = operand("bwd_w", w)[0], operand("upd_x", x)[0]
    grad_x = _contract(qd_n, 1, qw, 1, precision, x.dtype)  # [t, k], blocks along n
    grad_w = _contract(qx, 0, qd_t, 0, precision, w.dtype)  # [k, n], blocks along t
    grad_x = _unrotate(recipe, 1, grad_x, mask_x)
    grad_w = _unrotate(recipe, 0, grad_w, mask_w)
    return grad_x, grad_w, _no_gradient(given)


_product.defvjp(_forward, _backward)


def _contract(a, a_axis, b, b_axis, precision, result_type):
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=result_type,
    )


class _Coded(NamedTuple):
    """A tensor in 8 bits under one scale, as it lies and transposed; what is not kept is None."""

    codes: jax.Array | None
    turned: jax.Array | None
    scale: jax.Array
    amax: jax.Array
    like: jax.Array  # of no size; its dtype is that of the tensor


def _is_coded(recipe: Recipe, result_type) -> bool:
    """Whether each tensor is coded once, for both of its products."""
    pairs = (("fwd_x", "upd_x"), ("fwd_w", "bwd_w"), ("bwd_d", "upd_d"))
    return (
        recipe.execution == "native"
        and result_type == jnp.bfloat16
        and all(getattr(recipe, a) == getattr(recipe, b) for a, b in pairs)
        and all(getattr(recipe, a).granularity == "tensor" for a, _ in pairs)
        and not (recipe.needs_key or recipe.has_transforms)
    )


def _coded(recipe: Recipe, point: str, value, given: _Given) -> _Coded:
    quant = getattr(recipe, point)
    kind = get_format(quant.format)
    if recipe.delayed is not None:
        kinds = tuple(getattr(recipe, p).format for p in ("fwd_x", "fwd_w", "bwd_d"))
        scales = 1 / delayed_scales(given.history, kinds, recipe.delayed)
        scale = scales[TENSORS.index(point[-1])]
    else:
        amax = jnp.max(jnp.abs(value), initial=0.0).astype(jnp.float32) * quant.overrange
        rule = quant.scale_rule or kind.scale_rule
        smallest = kind.scale_type.smallest
        scale = scale_from_amax(amax, kind.element_type, kind.scale_type, rule, smallest)
    codes, turned, amax = quantize_fp8_both(value, quant.format, scale)
    return _Coded(codes, turned, scale, amax, jnp.zeros(0, value.dtype))


def _product_of_codes(a, of_a: _Coded, b, of_b: _Coded, precision, result_type):
    """``a bᵀ`` of codes ``[rows, contracted]``, with the scales of their tensors.

    Codes as they are make XLA call cuBLASLt (as of jax 0.11.2 it does not where their scales stand
    before the product). A factor right behind the product, in its dtype, goes into that call, in
    float32, as XLA leaves out the rounding of the factor. Elsewhere it is avoided here.
    """
    product = _contract(a, 1, b, 1, precision, result_type)
    scale = of_a.scale * of_b.scale
    return lax.platform_dependent(
        product,
        scale,
        cuda=lambda product, scale: product * scale.astype(product.dtype),
        default=lambda product, scale: (product.astype(jnp.float32) * scale).astype(product.dtype),
    )


def _contract_native(recipe, points, operands, given, precision, result_type):
    """Product of real 8-bit operands; tiled scales multiply partial sums, others the result."""
    axes = [_CONTRACTED[point] for point in points]
    if not all(operand.size for operand in operands):  # no values, so no scales
        (a, b), (a_axis, b_axis) = operands, axes
        return _contract(a, a_axis, b, b_axis, precision, result_type)
    quantized = [
        _codes(recipe, point, operand, given)
        for point, operand in zip(points, operands, strict=True)
    ]
    if NATIVE_TILE in (getattr(recipe, point).tile for point in points):
        a, b = (
            value if axis == wanted else _transposed(value)
            for value, axis, wanted in zip(quantized, axes, (1, 0), strict=True)
        )
        return matmul(a, b, preferred_element_type=result_type)
    a, b = quantized
    product = _contract(a.qvalue, axes[0], b.qvalue, axes[1], precision, jnp.float32)
    scale_a = a.scale if axes[0] == 1 else a.scale.T  # [rows or 1, 1]
    scale_b = b.scale if axes[1] == 0 else b.scale.T  # [1, columns or 1]
    return (product * (scale_a * scale_b)).astype(result_type)


def _codes(recipe, point, value, given) -> QTensor:
    quant = getattr(recipe, point)
    value = _rotate(recipe, point, value, given)
    if recipe.delayed is not None:
        codes, scale = _delayed(recipe, point, value, given)
        dtype = get_format(quant.format).element_type.dtype
        return QTensor(codes.astype(dtype), scale.reshape(1, 1), qtype=quant.format)
    key = _point_key(recipe, point, given.key_data)
    return quantize(value, quant.format, **quantizer_options(_CONTRACTED[point], quant, key))


def _transposed(qt: QTensor) -> QTensor:
    padding = (0,) * (2 - len(qt.padding)) + qt.padding
    return QTensor(qt.qvalue.T, qt.scale.T, qtype=qt.qtype, padding=padding[::-1])


def _operand(recipe: Recipe, point: str, value, given: _Given):
    """An operand as it enters its product, and where the gradient passes (None is everywhere)."""
    quant, axis = getattr(recipe, point), _CONTRACTED[point]
    if recipe.delayed is not None:
        codes, scale = _delayed(recipe, point, value, given)
        return (codes * scale).astype(value.dtype), None
    rotation = recipe.transform_of(point)

    def quantized():
        rotated = _rotate(recipe, point, value, given)
        key = _point_key(recipe, point, given.key_data)
        return round_operand(rotated, axis, quant, key, rotation and rotation.size)

    forward = point.startswith("fwd")
    if given.phase is None or recipe.qaf == ("backward" if forward else "forward"):
        return quantized()
    shapes = jax.eval_shape(quantized)

    def plain():
        if forward:  # the residuals of both phases are rotated
            exact = _rotate(recipe, point, value, given)
        else:
            exact = _after_switch(recipe, point, value, given)
            sizes = zip(exact.shape, shapes[0].shape, strict=True)
            exact = jnp.pad(exact, [(0, wanted - size) for size, wanted in sizes])
        return exact, None if shapes[1] is None else jnp.ones(shapes[1].shape, bool)

    return lax.cond(given.phase, plain, quantized)


def _rounds_at_once(recipe: Recipe, last: str, first: str, given: _Given) -> bool:
    """Whether one function can round a tensor for two products, blocks along its two axes."""
    one, other = getattr(recipe, last), getattr(recipe, first)
    plain = all(
        q.format and (q.method, q.granularity) == ("block", "contraction") for q in (one, other)
    )
    turned = recipe.transform_of(first)
    return (
        plain
        and (one.format, one.block, one.two_level) == (other.format, other.block, other.two_level)
        and recipe.transform_of(last) is None
        and (turned is None or (not turned.is_random and turned.size == 16))
        and given.phase is None
        and recipe.delayed is None
    )


def _both(recipe: Recipe, last: str, first: str, value, given: _Given):
    """A tensor as it enters two products, with blocks along its last and along its first axis."""
    options = []
    for point in (last, first):
        key = _point_key(recipe, point, given.key_data)
        options.append(quantizer_options(_CONTRACTED[point], getattr(recipe, point), key))
        del options[-1]["axis"]
    turned, rows = recipe.transform_of(first), value.shape[0]
    if turned is not None:
        value = _pad(value, 0, turned.size)
    signs = None if turned is None else turned.signs or (1,) * turned.size
    kind = getattr(recipe, last).format
    by_last, by_first = fake_quantize_both(value, kind, *options, signs=signs)
    return by_last[:rows], by_first


def _after_switch(recipe, point, value, given):
    """Operand of a backward product in high precision: what the forward product really used."""
    tensor = point[-1]
    master = recipe.residuals == "master" and recipe.qaf_residuals == "quantized"
    if recipe.qaf != "backward" or tensor == "d" or not master:
        return value
    forward = f"fwd_{tensor}"
    key = _point_key(recipe, forward, given.key_data)
    return round_operand(value, _CONTRACTED[forward], getattr(recipe, forward), key)[0]


def _delayed(recipe, point, value, given):
    quant = getattr(recipe, point)
    scale = delayed_scale(given.history, point[-1], quant.format, recipe.delayed)
    return round_delayed(value, scale, quant.format)


# --- rotations ----------------------------------------------------------------------------------


def _rotate(recipe: Recipe, point: str, value, given: _Given):
    """Rotates groups along the contraction by a Hadamard matrix; missing values are zeros."""
    rotation, axis = recipe.transform_of(point), _CONTRACTED[point]
    if rotation is None:
        return value
    value = _pad(value, axis, rotation.size)
    if not rotation.is_random:
        return rht(value, axis=axis, size=rotation.size, signs=rotation.signs)
    # Both operands of a product share the signs, so that they cancel.
    stream = len(POINTS) + ("bwd", "upd").index(point[:3])
    key = jax.random.fold_in(counter_key(given.key_data), stream)
    # What jax.random.rademacher draws, in float32 under jax_enable_x64 too.
    heads = jax.random.bernoulli(key, jnp.float32(0.5), (rotation.size,))
    signs = 2 * heads.astype(value.dtype) - 1
    signs = jnp.tile(signs, value.shape[axis] // rotation.size)
    return rht(value * jnp.expand_dims(signs, 1 - axis), axis, rotation.size, None)


def _pad(value, axis: int, size: int):
    """Completes an axis with zeros to a multiple of ``size``."""
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, -value.shape[axis] % size)
    return jnp.pad(value, widths)


def _unrotate(recipe: Recipe, axis: int, gradient, mask):
    """Gradient at an operand from that at its rotated form, zero where it was clipped."""
    if mask is not None:
        gradient = jnp.where(mask, gradient, 0)
    rotation = recipe.forward_transform
    if rotation is None:
        return gradient
    return inverse_rht(gradient, axis, rotation.size, rotation.signs)


# --- keys ---------------------------------------------------------------------------------------


def _key_data(recipe: Recipe, key) -> jax.Array | None:
    """The two words of a key, or None if the recipe draws nothing."""
    if not recipe.needs_key:
        return None
    if key is None:
        points = ", ".join(recipe.stochastic_points)
        what = f"rounds {points} stochastically" if points else "draws the signs of its rotations"
        raise ValueError(
            f"recipe {recipe.name!r} {what}: pass key=jax.random.key(seed), folded with the step"
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


def _no_gradient(given: _Given) -> _Given:
    """Cotangents of data without a derivative; what delayed scaling saw comes another way."""

    def zero(leaf):
        if leaf is None or jnp.issubdtype(leaf.dtype, jnp.floating):
            return None
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return _Given(*map(zero, given))


def _checked(recipe: Recipe, history, phase):
    """History and phase as arrays, checked against what the recipe has a use for."""
    if (history is None) != (recipe.delayed is None):
        raise ValueError(
            f"recipe {recipe.name!r} needs amax_history=init_history(recipe)"
            if history is None
            else f"recipe {recipe.name!r} has no delayed scaling, but amax_history was given"
        )
    if history is not None:
        expected = (len(TENSORS), recipe.delayed.history_length)
        if history.shape != expected:
            raise ValueError(f"amax_history must be {list(expected)}, got {list(history.shape)}")
    if phase is not None and recipe.qaf is None:
        raise ValueError(f"recipe {recipe.name!r} has no second phase: use recipe.with_qaf(mode)")
    return history, None if phase is None else jnp.asarray(phase, bool)


# --- shapes -------------------------------------------------------------------------------------


def _check_floating(**operands) -> None:
    for name, operand in operands.items():
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {operand.dtype}")


def _canonical(lhs, rhs, dimension_numbers):
    """Brings operands to ``[t, k]`` and ``[k, n]``, or ``[b, t, k]`` and ``[b, k, n]``."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    for name, operand, axes in (
        ("lhs", lhs, (*lhs_contract, *lhs_batch)),
        ("rhs", rhs, (*rhs_contract, *rhs_batch)),
    ):
        if sorted(axes) != sorted(set(axes) & set(range(operand.ndim))):
            raise ValueError(
                f"dimension_numbers must name axes 0 to {operand.ndim - 1} of {name} "
                f"{list(operand.shape)} at most once, got {dimension_numbers}"
            )
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
