"""FALQON's layer as pure functions: its start and its product."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff.optim.falqon import Melded
from pallas_kernels.formats import get_format, number_type, round_to
from pallas_kernels.formats.number_types import FLOAT32_MIN_NORMAL, true_divide
from pallas_kernels.ops.quantize.api import quantize

INITS = ("svd", "random")
_E4M3 = number_type("e4m3")


def meld_weight(
    weight: jax.Array,
    rank: int,
    *,
    init: str = "svd",
    anchored: bool = False,
    key: jax.Array | None = None,
) -> Melded:
    r"""Quantises a weight to FP8 and makes the adapter's ``A`` from the error.

    .. math::
      \tilde W = Q(W), \quad E = W - \tilde W = U S V^T, \quad A = \sqrt{S_r} V_r^T

    so that the rows of ``A`` span the inputs on which quantisation hurt most; ``B`` starts at
    zero. Then ``[W; A]`` is quantised once more, with one scale for both.

    Args:
      weight: floating ``[n, k]``, outputs first.
      rank: ``r``, in [1, min(n, k)].
      init: ``"svd"``, or ``"random"``: normal with mean and deviation of ``W``, clipped to the
        range of ``W`` (the released 13B script).
      anchored: whether the codes of the weight are kept as anchor: one more byte per value.
      key: PRNG key for ``"random"``.

    Returns:
      ``Melded`` with codes ``[n + r, k]``.

    Raises:
      ValueError: shape, rank or init is wrong, or the key is missing.

    Example:
      >>> weight = jax.random.normal(jax.random.key(0), (16, 8))
      >>> melded = meld_weight(weight, 2)
      >>> melded.codes.shape, bool(abs(melded.weight() - weight).max() < 0.1)
      ((18, 8), True)

    References:
      FALQON (arXiv:2510.24061), melded initialisation; in the released code the left factor
      :math:`U` is thrown away, as here.
    """
    if weight.ndim != 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight must be floating [n, k], got {weight.dtype} {weight.shape}")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must lie in [1, {min(weight.shape)}] for a weight {weight.shape}, got {rank}"
        )
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    if init == "random" and key is None:
        raise ValueError("init='random' needs a key, such as jax.random.key(0)")
    return _meld(weight, key, rank=rank, init=init, anchored=anchored)


@functools.partial(jax.jit, static_argnames=("rank", "init", "anchored"))
def _meld(weight, key, *, rank, init, anchored):
    weight = weight.astype(jnp.float32)
    a = _svd_rows(weight, rank) if init == "svd" else _random_rows(weight, rank, key)
    stack = jnp.concatenate([weight, a])
    amax = jnp.max(jnp.abs(stack))
    scale = jnp.where(amax == 0, 1.0, jnp.maximum(amax / _E4M3.max, FLOAT32_MIN_NORMAL))
    codes = round_to(true_divide(stack, scale), _E4M3).astype(_E4M3.dtype)
    anchor = codes[: weight.shape[0]] if anchored else None
    return Melded(codes, scale, anchor, rank)


def _svd_rows(weight: jax.Array, rank: int) -> jax.Array:
    error = weight - quantize(weight, "fp8_e4m3", axis=None).dequantize()
    _, s, vt = jnp.linalg.svd(error, full_matrices=False)
    return jnp.sqrt(s[:rank, None]) * vt[:rank]  # [r, k]


def _random_rows(weight: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    rows = jax.random.normal(key, (rank, weight.shape[1]))
    rows = rows * jnp.std(weight) + jnp.mean(weight)
    return jnp.clip(rows, jnp.min(weight), jnp.max(weight))


def melded_dot(
    x: jax.Array, probe: jax.Array | None, melded: Melded, scales: jax.Array | None = None
) -> jax.Array:
    r"""Product with a melded weight in FP8, and the gradient of an adapter that is not there.

    .. math::
      [y, O_A] = Q(x) [\tilde W; \tilde A]^T, \qquad
      \bar x = Q(\bar y) \tilde W, \qquad \bar B = Q(\bar y)^T Q(O_A)

    since with :math:`y = x (W + B A)^T` the derivative is :math:`\partial L / \partial B =
    \bar y^T (x A^T)`. ``x`` and ``O_A`` are quantised to E4M3 and :math:`\bar y` to E5M2, each with
    one scale; in bfloat16 :math:`\bar B` is the product of the two as they are, which is
    more exact than the paper's and faster. Kept for the backward pass: the codes and ``O_A``
    ``[t, r]``, not ``x``.

    Args:
      x: floating ``[t, k]``.
      probe: the virtual ``B``: zeros ``[n, r]``, whose value is never read and whose gradient is
        :math:`\bar B`; None where no gradient is wanted.
      melded: the weight; it has no gradient.
      scales: float32 ``[2]``, what a code of 1 means in ``x`` and in :math:`\bar y` (delayed
        scaling), or None for the scales that the two have now. Its "gradient" is
        :math:`\max|x|` and :math:`\max|\bar y|`, of which the next scales are made.

    Returns:
      ``[t, n]`` in the dtype of ``x``.

    Example:
      >>> melded = meld_weight(jnp.eye(4), 1)
      >>> x, zeros = jnp.ones((2, 4)), jnp.zeros((4, 1))
      >>> melded_dot(x, zeros, melded).round(2).tolist()
      [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
      >>> jax.grad(lambda b: melded_dot(x, b, melded).sum())(zeros).shape
      (4, 1)

    References:
      FALQON (arXiv:2510.24061), forward and backward of a melded layer; LoRA-FA
      (arXiv:2308.03303) for the frozen ``A``; TransformerEngine for delayed scaling.
    """
    if x.shape[0] == 0:  # no largest magnitude, and nothing to add to a gradient
        return jnp.zeros((0, melded.shape[0]), x.dtype)
    return _melded_dot(x, probe, melded, scales)


@jax.custom_vjp
def _melded_dot(x, probe, melded, scales):
    return _forward(x, probe, melded, scales)[0]


def _forward(x, probe, melded, scales):
    n = melded.shape[0]
    codes, scale, amax = quantized8(x, "fp8_e4m3", None if scales is None else scales[0])
    out = dot8(codes, melded.codes, (1, 1), x.dtype)  # [t, n + r]
    scale = scale * melded.scale
    if probe is None:
        return (out[:, :n] * scale).astype(x.dtype), (None, amax, melded, scales)
    o_a = lax.optimization_barrier((out[:, n:] * scale).astype(x.dtype))
    # Plus a zero, so that what follows waits for O_A: sliced in the backward pass, as XLA would
    # have it, O_A would hold the whole output in memory until then.
    scale = scale + 0 * o_a[0, 0].astype(scale.dtype)
    if scales is not None:
        scale = scale + 0 * amax
    return (out[:, :n] * scale).astype(x.dtype), (o_a, amax, melded, scales)


def _backward(residuals, d):
    o_a, amax_x, melded, scales = residuals
    n = melded.shape[0]
    codes, scale, amax = quantized8(d, "fp8_e5m2", None if scales is None else scales[1])
    seen = None
    if scales is not None:
        scale, seen = after(scale, amax), jnp.stack([amax_x, amax])
    db = None if o_a is None else _adapter_gradient(d, codes, scale, o_a)
    if db is not None:  # before the gradient moves on, so that d is not kept for it
        scale = after(scale, db[0, 0])
    dx = dot8(codes, melded.codes[:n], (1, 0), d.dtype) * (scale * melded.scale)
    return dx.astype(d.dtype), db, None, seen


def _adapter_gradient(d, codes, scale, o_a):
    if d.dtype == jnp.bfloat16:
        # Few columns: 8-bit products would save nothing, and both operands would be transposed,
        # which took a seventh of a training step on an H100.
        return dot(d, o_a, (0, 0), jnp.float32)
    oq = quantize(o_a, "fp8_e4m3", axis=None)
    return dot8(codes, oq.qvalue, (0, 0)) * (scale * oq.scale)  # [n, r]


_melded_dot.defvjp(_forward, _backward)


def adapter_output(out, n, scale, dtype):
    """``O_A``, the columns of a product from ``n`` on, and the scale again.

    Sliced in the backward pass, as XLA would have it, ``O_A`` would hold the whole product in
    memory until then; so the scale, and what is made with it, waits for it here.
    """
    o_a = lax.optimization_barrier((out[:, n:] * scale).astype(dtype))
    return o_a, after(scale, o_a[0, 0])


def after(value, other):
    """``value``, but not before ``other`` is computed: XLA keeps no other order than this."""
    return value + 0 * other.astype(value.dtype)


def quantized8(value, qtype, scale):
    """Codes, what a code of 1 means, and the largest magnitude.

    ``quantize`` with one scale, but times a reciprocal and through a clip and a cast: rounding in
    arithmetic, as for any format, bound these passes to 2.5 times what memory takes on an H200.
    """
    kind = get_format(qtype).element_type
    amax = jnp.max(jnp.abs(value)).astype(jnp.float32)
    if scale is None:
        # A scale below the normal range is flushed to 0, and its reciprocal is infinite.
        scale = jnp.where(amax > 0, jnp.maximum(amax / kind.max, FLOAT32_MIN_NORMAL), 1.0)
        # Once the largest magnitude is known the value is read, not computed again from others,
        # which would have to be kept for the backward pass.
        value = lax.optimization_barrier(value)
    wide = value.astype(jnp.float32)
    codes = jnp.clip(wide * (1 / scale), -kind.max, kind.max).astype(kind.dtype)
    return codes, scale, amax


# Before anything was seen. FP8 is floating: E4M3 holds .002 to 448 under a scale of 1, and E5M2
# gradients from 3e-10 to 1 under the second one.
_START = (448.0, 1.0)


def scales_of(history: jax.Array) -> jax.Array:
    """What a code of 1 means in ``x`` and in the gradient, from the magnitudes of earlier steps.

    Args:
      history: float32 ``[..., 2, length]``, zeros where nothing was seen yet.

    Returns:
      float32 ``[..., 2]``, for ``melded_dot``.

    >>> scales_of(jnp.float32([[448, 896], [0, 0]])).tolist()[0]
    2.0
    """
    amax = jnp.max(history, -1)
    amax = jnp.where(amax > 0, amax, jnp.float32(_START))
    tops = jnp.float32([get_format(q).element_type.max for q in ("fp8_e4m3", "fp8_e5m2")])
    return jnp.maximum(amax / tops, FLOAT32_MIN_NORMAL)


def dot8(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Sums of products of codes; written in 16 bits where the result will be, half the bytes."""
    # Sums of up to 448 · 57344 · k would leave float16; bfloat16 has the range of float32.
    return dot(a, b, axes, jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype) -> jax.Array:
    """The product over one axis of each."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)
