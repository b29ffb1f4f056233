# SPDX-License-Identifier: Apache-2.0
"""Inputs, error measures and tolerances that tests, tuner and benchmarks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Largest absolute error of a kernel against the float32 reference on unit-scale inputs. It is the
# rounding of the output plus, for 16-bit types, the rounding of the probabilities.
_ATOL = {"float32": 1e-6, "tf32": 1e-3, "float16": 5e-4, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the reference: ``|a - b| <= atol + rtol * |b|``.

    Args:
      atol: absolute, in units of the output.
      rtol: relative, a fraction.
    """

    atol: float
    rtol: float


def tolerance(dtype: str, *, gradient: bool = False) -> Tolerance:
    """The starting tolerance for a kernel of one input dtype.

    Quantised inputs are compared with the reference on the same quantised inputs, so the output
    dtype decides, not the format of the inputs.

    Args:
      dtype: "float32", "tf32", "float16", "bfloat16", or an integer dtype (exact).
      gradient: True doubles the bounds.

    Returns:
      A `Tolerance`; `rtol` is a tenth of `atol`.

    Raises:
      ValueError: there is no tolerance for this dtype.

    >>> tolerance("bfloat16", gradient=True).atol
    0.02
    """
    name = str(dtype)
    if name.startswith(("int", "uint", "bool")):
        return Tolerance(0.0, 0.0)
    if name not in _ATOL:
        raise ValueError(f"dtype must be one of {', '.join(_ATOL)} or an integer; got {name}")
    atol = _ATOL[name] * (2 if gradient else 1)
    return Tolerance(atol, atol / 10)


# -- error measures ----------------------------------------------------------------------------


def cosine(actual: jax.Array, expected: jax.Array) -> float:
    """Cosine similarity ``sum(o r) / sqrt(sum o^2 sum r^2)`` over all elements.

    Args:
      actual: any shape and float dtype.
      expected: same shape.

    Returns:
      A float in [-1, 1]; 1 if both are all zero.

    >>> cosine(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
    1.0
    """
    o, r = _pair(actual, expected)
    norm = np.sqrt((o * o).sum() * (r * r).sum())
    if norm == 0:
        return 1.0 if np.array_equal(o, r) else 0.0
    return float((o * r).sum() / norm)


def relative_l1(actual: jax.Array, expected: jax.Array) -> float:
    """Relative L1 error ``sum|o - r| / sum|r|`` over all elements.

    Args:
      actual: any shape and float dtype.
      expected: same shape, not all zero unless `actual` is too.

    Returns:
      A float >= 0; inf when only `expected` is all zero.

    >>> relative_l1(jnp.array([1.5]), jnp.array([1.0]))
    0.5
    """
    o, r = _pair(actual, expected)
    difference, size = np.abs(o - r).sum(), np.abs(r).sum()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / size)


def rmse(actual: jax.Array, expected: jax.Array) -> float:
    """Root mean square error ``sqrt(mean((o - r)^2))`` over all elements.

    Args:
      actual: any shape and float dtype.
      expected: same shape.

    Returns:
      A float >= 0, in units of the arrays.

    >>> rmse(jnp.array([3.0, 0.0]), jnp.array([0.0, 0.0])) == 4.5**0.5
    True
    """
    o, r = _pair(actual, expected)
    return float(np.sqrt(((o - r) ** 2).mean()))


def errors(actual: jax.Array, expected: jax.Array) -> dict[str, float]:
    """Cosine, relative L1 and RMSE together.

    Args:
      actual: any shape and float dtype.
      expected: same shape.

    Returns:
      ``{"cosine", "relative_l1", "rmse"}``.

    References:
      SageAttention (arXiv 2410.02367), section 4.3.
    """
    measures = {"cosine": cosine, "relative_l1": relative_l1, "rmse": rmse}
    return {name: measure(actual, expected) for name, measure in measures.items()}


def _pair(actual, expected):
    o, r = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (actual, expected))
    if o.shape != r.shape:
        raise ValueError(f"actual has shape {o.shape}, expected has {r.shape}")
    return o, r


# -- inputs ------------------------------------------------------------------------------------

INPUT_KINDS = ("normal", "outlier", "k_bias", "v_plus_1", "uniform_exp")


def attention_inputs(
    kind: str,
    *,
    batch: int = 1,
    q_len: int = 1024,
    kv_len: int | None = None,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int = 128,
    dtype=jnp.bfloat16,
    seed: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of a named distribution.

    No single distribution shows every weakness: "normal" shows the rounding of P and V, "outlier"
    separates scale granularities, "k_bias" shows smoothing of K, and "v_plus_1" shows accumulators
    that lose low bits.

    Args:
      kind: "normal": N(0, 1). "outlier": N(0, 1) + N(0, 100) with probability .001. "k_bias":
        normal, with N(0, 64) per channel added to K. "v_plus_1": normal, 1.0 added to V.
        "uniform_exp": u * exp(3.2 (u' - .5)), u and u' uniform in [0, 1].
      batch: B.
      q_len: T, tokens.
      kv_len: S, tokens; None means T.
      num_heads: N.
      num_kv_heads: K; None means N.
      head_dim: H.
      dtype: dtype of the arrays.
      seed: seed of NumPy's generator.

    Returns:
      (query [B, T, N, H], key [B, S, K, H], value [B, S, K, H]).

    Raises:
      ValueError: `kind` is unknown.

    References:
      "outlier": FlashAttention-3 (arXiv 2407.08608), table 3. "uniform_exp": the gate of
      TensorRT-LLM's SageAttention tests.

    >>> [x.shape for x in attention_inputs("normal", q_len=4, head_dim=8)]
    [(1, 4, 1, 8), (1, 4, 1, 8), (1, 4, 1, 8)]
    """
    if kind not in INPUT_KINDS:
        raise ValueError(f"kind must be one of {', '.join(INPUT_KINDS)}; got {kind!r}")
    rng = np.random.default_rng(seed)
    kv_shape = (batch, kv_len or q_len, num_kv_heads or num_heads, head_dim)
    shapes = ((batch, q_len, num_heads, head_dim), kv_shape, kv_shape)
    if kind == "uniform_exp":
        arrays = [rng.random(s) * np.exp(3.2 * (rng.random(s) - 0.5)) for s in shapes]
    else:
        arrays = [rng.normal(size=s) for s in shapes]
    if kind == "outlier":
        arrays = [x + 10 * rng.normal(size=x.shape) * (rng.random(x.shape) < 1e-3) for x in arrays]
    if kind == "k_bias":
        arrays[1] = arrays[1] + 8 * rng.normal(size=(1, 1, *kv_shape[2:]))
    if kind == "v_plus_1":
        arrays[2] = arrays[2] + 1
    return tuple(jnp.asarray(x, dtype) for x in arrays)


# -- contracts ---------------------------------------------------------------------------------


def assert_agrees(
    run: Callable[..., jax.Array], reference: Callable[..., jax.Array], *args, dtype=None
) -> None:
    """Checks a kernel against its reference within the tolerance of the output's dtype.

    Args:
      run: function under test.
      reference: oracle, called with the same arguments.
      *args: arguments for both.
      dtype: name for `tolerance`; None takes the dtype of the output.

    Raises:
      AssertionError: some element is out of tolerance.
    """
    actual, expected = run(*args), reference(*args)
    bound = tolerance(str(dtype or actual.dtype))
    as_float = lambda x: np.asarray(jnp.asarray(x, jnp.float32))  # noqa: E731
    np.testing.assert_allclose(
        as_float(actual), as_float(expected), atol=bound.atol, rtol=bound.rtol
    )


def assert_repeatable(run: Callable, *args) -> None:
    """Checks that two runs of a function on the same arguments are equal bit for bit.

    Args:
      run: function under test.
      *args: its arguments.

    Raises:
      AssertionError: the runs differ.
    """
    first, second = run(*args), run(*args)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_compiles_once(run: Callable, *calls: tuple) -> None:
    """Checks that a function is compiled once for several calls with equal shapes.

    Args:
      run: function under test, not yet jitted.
      *calls: argument tuples.

    Raises:
      AssertionError: it was traced more than once.
    """
    traces = []

    def counted(*args):
        traces.append(1)
        return run(*args)

    compiled = jax.jit(counted)
    for args in calls:
        jax.block_until_ready(compiled(*args))
    if len(traces) != 1:
        raise AssertionError(f"traced {len(traces)} times for {len(calls)} calls")
