"""Rounding of a matrix by the Hopper kernel: scales of the tensor, keys and batches."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats.block_format import tensor_encode_scale
from pallas_kernels.formats.number_types import FLOAT32_MAX
from pallas_kernels.ops.quantize import mosaic_sm90_matrix as kernel
from pallas_kernels.ops.quantize.spec import QuantizeSpec

#: What is done along one axis: the spec, the key or None, and the signs of a transform or None.
Request = tuple[QuantizeSpec, jax.Array | None, tuple[int, ...] | None]


def fake_quantize(x: jax.Array, last: Request | None, first: Request | None) -> list[jax.Array]:
    """Rounds a matrix with blocks along its last axis, its first axis or both.

    Two passes over ``x``: one for the scale of the tensor, where the format has one (two where a
    transform stands before it), one for the kernel.

    Args:
        x: [rows, columns] that ``spec.matrix_reason`` has nothing against.
        last: blocks along the last axis, or None.
        first: blocks along the first axis, or None; of the same format.

    Returns:
        The results that were asked for, of the shape and dtype of ``x``.
    """
    spec = (last or first)[0]
    plan = kernel.Plan(*x.shape, str(x.dtype), spec.format, spec.scale_min)
    factors = jnp.stack([_factors(x, plan, request) for request in (last, first)])
    words = jnp.stack([_words(request) for request in (last, first)])
    sides = {name: r and _side(r) for name, r in (("last", last), ("first", first))}
    return _round(x, factors, words, plan=plan, **sides)


# Compiled functions of their own: a program that rounds many tensors of a shape has each once.
@functools.partial(jax.jit, static_argnames=("plan", "last", "first"))
def _round(x, factors, words, *, plan, last, first):
    return _one_by_one(
        lambda *args: kernel.round_matrix(*args, plan, last, first), x, factors, words
    )


@functools.partial(jax.jit, static_argnames="element")
def cast_fp8(x: jax.Array, scale: jax.Array, element: str) -> tuple[jax.Array, ...]:
    """Codes of a matrix and of its transpose; see ``pallas_kernels.quantize_fp8_both``.

    Args:
        x: [rows, columns] that ``spec.cast_reason`` has nothing against.
        scale: float32 scalar.
        element: "e4m3" or "e5m2".

    Returns:
        Codes [rows, columns] and [columns, rows], and max|x|, a float32 scalar.
    """
    cast = lambda x, scale: kernel.cast_matrix(x, scale, element)  # noqa: E731
    codes, turned, tops = _one_by_one(cast, x, scale)
    return codes, turned, tops.max()


def _one_by_one(function, *args):
    """A kernel that under ``vmap`` runs for one entry after the other."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _batched(size, batched, *args):
        args = [
            value if is_batched else jnp.broadcast_to(value, (size, *value.shape))
            for value, is_batched in zip(args, batched, strict=True)
        ]
        outs = jax.lax.map(lambda each: run(*each), tuple(args))
        return outs, jax.tree.map(lambda _: True, outs)

    return run(*args)


def _side(request: Request) -> kernel.Side:
    spec, _, signs = request
    return kernel.Side(spec.rounding == "stochastic", signs, spec.scale_rule, spec.overrange)


def _words(request: Request | None) -> jax.Array:
    if request is None or request[1] is None:
        return jnp.zeros(2, jnp.uint32)
    return jax.random.key_data(request[1])


def _factors(x: jax.Array, plan: kernel.Plan, request: Request | None) -> jax.Array:
    """Encode and decode scale of the tensor, by its largest finite magnitude."""
    if request is None or not plan.format.two_level:
        return jnp.ones(2, jnp.float32)
    spec, _, signs = request
    if signs is None:
        size = jnp.abs(x)
        top = jnp.max(jnp.where(jnp.isfinite(size), size, 0)).astype(jnp.float32)
    else:  # the transform is rounded to the dtype of x before it is quantised
        top = kernel.rotated_amax(x, plan, signs).astype(x.dtype).astype(jnp.float32)
        top = jnp.where(jnp.isfinite(top), top, 0)
    top = jnp.minimum(top * spec.overrange, FLOAT32_MAX)
    kind = plan.format
    encode = tensor_encode_scale(top, kind.element_type, kind.scale_type)
    return jnp.stack([encode, 1 / encode])
