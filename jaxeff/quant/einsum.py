"""``einsum`` of two operands, quantised as a matrix product."""

from typing import Any

import jax

from jaxeff.quant.dot import quantized_dot_general
from jaxeff.quant.recipe import Recipe


def quantized_einsum(
    subscripts: str, lhs: jax.Array, rhs: jax.Array, recipe: str | Recipe, **options: Any
) -> jax.Array:
    """``jnp.einsum`` of an activation and a weight with low-precision operands, both passes.

    Letters in both operands but not in the result are contracted, letters in all three are batch
    dimensions (one product, and one per-tensor scale, each), and letters of one operand alone that
    the result lacks are summed first, in full precision. Blocks run along the contracted letters,
    flattened in the order in which the right operand has them.

    Args:
      subscripts: two operands and a result, such as ``"btd,dnh->btnh"``; an ellipsis may stand in
        the left operand and the result.
      lhs: activation, floating.
      rhs: weight, floating.
      recipe: name out of ``RECIPES`` or a Recipe.
      **options: keyword arguments of ``quantized_dot_general``.

    Returns:
      The product in the layout of the result's letters.

    Raises:
      ValueError: if the subscripts are not of this form or do not fit the operands, and as
        ``quantized_dot_general``.
      NotImplementedError: if an operand repeats a letter (a diagonal).

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((1, 4, 32)), jnp.ones((32, 2, 16))
      >>> quantized_einsum("btd,dnh->btnh", x, w, "fp4_rtn").shape
      (1, 4, 2, 16)
    """
    left, right, result = _parse(subscripts, lhs.ndim, rhs.ndim)
    lhs, left = _sum_alone(lhs, left, right + result)
    rhs, right = _sum_alone(rhs, right, left + result)
    batch = [letter for letter in result if letter in left and letter in right]
    contract = [letter for letter in right if letter in left and letter not in result]
    numbers = tuple(
        tuple(tuple(map(operand.index, letters)) for operand in (left, right))
        for letters in (contract, batch)
    )
    product = quantized_dot_general(lhs, rhs, numbers, recipe, **options)
    done = [*contract, *batch]
    order = [*batch, *(x for x in left if x not in done), *(x for x in right if x not in done)]
    return product.transpose([order.index(letter) for letter in result])


def _parse(subscripts: str, left_ndim: int, right_ndim: int) -> tuple[str, str, str]:
    text = subscripts.replace(" ", "")
    operands, arrow, result = text.partition("->")
    left, comma, right = operands.partition(",")
    if not arrow or not comma or "," in right or "..." in right:
        raise ValueError(
            f"subscripts must read 'left,right->result' with an ellipsis in left and result at "
            f"most, got {subscripts!r}"
        )
    if ("..." in left) != ("..." in result):
        raise ValueError(f"the ellipsis must stand in left and result, got {subscripts!r}")
    used = set(text)
    free = [chr(code) for code in range(0x391, 0x3A9) if chr(code) not in used]
    dots = "".join(free[: max(left_ndim - len(left.replace("...", "")), 0)])
    left, result = left.replace("...", dots), result.replace("...", dots)
    for name, letters, ndim in (("lhs", left, left_ndim), ("rhs", right, right_ndim)):
        if len(letters) != ndim:
            raise ValueError(f"{name} has {ndim} dimensions, {subscripts!r} names {len(letters)}")
        if len(set(letters)) < len(letters):
            raise NotImplementedError(
                f"{name} repeats a letter in {subscripts!r}: take the diagonal first"
            )
    if len(set(result)) < len(result) or not set(result) <= set(left + right):
        raise ValueError(f"the result of {subscripts!r} must hold letters of the operands, once")
    return left, right, result


def _sum_alone(operand: jax.Array, letters: str, elsewhere: str) -> tuple[jax.Array, str]:
    alone = tuple(axis for axis, letter in enumerate(letters) if letter not in elsewhere)
    kept = "".join(letter for letter in letters if letter in elsewhere)
    return (operand.sum(alone), kept) if alone else (operand, letters)
