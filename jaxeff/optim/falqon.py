"""FALQON: steps of a low-rank adapter that are written into FP8 weights, a few rows at a time.

The adapter ``B`` never enters the forward pass: its effect is already in the weights. An optax
transformation turns its gradient into rows and their change (``falqon``), and a pure function
writes them into the stored codes (``meld``). Between the two stand ``top_rows`` and ``write_rows``.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.formats import number_type, round_to, stochastic_round

REQUANT = ("rtn", "sr", "anchored")
LEFTOVER = ("drop", "keep")
Rows = int | Literal["rank", "all"]

_E4M3 = number_type("e4m3")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "anchor"],
    meta_fields=["rank"],
)
@dataclasses.dataclass(frozen=True)
class Melded:
    """A weight and its adapter's ``A`` in one stack of FP8 codes.

    ``[W; A] = scale · codes``: one scale for both, so that ``A`` costs no quantisation of its own.

    Args:
      codes: float8_e4m3fn ``[n + r, k]``: ``n`` rows of the weight (outputs), then ``r`` of ``A``.
      scale: float32 scalar; never changes.
      anchor: float8_e4m3fn ``[n, k]``, the weight's codes before the first step, or None.
      rank: ``r``.

    >>> melded = Melded(jnp.ones((5, 4), jnp.float8_e4m3fn), jnp.float32(2), None, 2)
    >>> melded.weight().shape, melded.adapter_a().shape, melded.nbytes
    ((3, 4), (2, 4), 24)
    """

    codes: jax.Array
    scale: jax.Array
    anchor: jax.Array | None
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)`` of the weight."""
        return self.codes.shape[0] - self.rank, self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def weight(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The weight ``[n, k]`` as a plain array."""
        codes = self.codes[: self.shape[0]]
        return (codes.astype(jnp.float32) * self.scale).astype(dtype)

    def adapter_a(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """``A`` ``[r, k]`` as a plain array."""
        codes = self.codes[self.shape[0] :]
        return (codes.astype(jnp.float32) * self.scale).astype(dtype)


class FalqonState(NamedTuple):
    """State of ``falqon``; each field but ``inner`` and ``count`` is a tree like the parameters.

    Fields: ``inner`` (of the inner transformation), ``buffer`` (float32 ``[n, r]``: what was not
    written yet, or the whole ``B`` if anchored; None where nothing is kept), ``written`` (``B`` as
    each row was last written; anchored only), ``rows`` (int32 ``[m]``), ``delta`` (float32
    ``[m, r]``: the change of these rows, or their ``B`` if anchored), ``count`` (steps).
    """

    inner: Any
    buffer: Any
    written: Any
    rows: Any
    delta: Any
    count: jax.Array


def falqon(
    inner: optax.GradientTransformation,
    *,
    k: Rows = 10,
    requant: str = "rtn",
    leftover: str = "drop",
    gain: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns gradients of a virtual ``B = 0`` into rows of the weight to rewrite.

    .. math::
      \Delta B = \mathrm{inner}(dB), \qquad
      \mathrm{rows} = \mathrm{top}_k \, \sum_j |\Delta B_{ij}|

    The updates are zeros, because ``B`` stays zero; what changes is read by ``meld`` out of the
    state. With ``requant="anchored"`` the state adds the steps up to ``B``, and the rows are those
    whose ``B`` moved most since they were last written. Put ``optax.MultiSteps`` inside, not
    outside: a step of zeros writes nothing. Clipping inside sees ``dB`` only.

    Args:
      inner: makes the step; as a rule AdamW. Its ``params`` are zeros (``B`` if anchored), so
        weight decay acts on what is not melded yet.
      k: rows written per step in each weight; ``"rank"`` takes ``r`` (the released code),
        ``"all"`` every row. At most ``n``.
      requant: as for ``write_rows``: it decides what is kept.
      leftover: what happens to rows that are not selected: ``"drop"`` (the released code) or
        ``"keep"`` (they are added to the next step). Anchored updates always keep them.
      gain: factor on ``A`` (LoRA's ``alpha / r``); 1 in the released code.

    Returns:
      An optax transformation over a tree of arrays ``[..., n, r]``: weights of one shape may be
      stacked, which saves a GPU many small kernels.

    Raises:
      ValueError: an argument is none of the above, or a weight has fewer than ``k`` rows.

    Example:
      >>> transform = falqon(optax.sgd(1.0), k=1)
      >>> gradient = {"w": jnp.float32([[1.0], [-3.0]])}
      >>> updates, state = transform.update(gradient, transform.init(gradient))
      >>> state.rows["w"].tolist(), state.delta["w"].tolist(), updates["w"].tolist()
      ([1], [[3.0]], [[0.0], [0.0]])

    References:
      FALQON (arXiv:2510.24061), row-wise proxy update; released code for ``k="rank"``.
    """
    check_rows(k)
    if requant not in REQUANT:
        raise ValueError(f"requant must be one of {REQUANT}, got {requant!r}")
    if leftover not in LEFTOVER:
        raise ValueError(f"leftover must be one of {LEFTOVER}, got {leftover!r}")
    if not gain > 0:
        raise ValueError(f"gain must be positive, got {gain}")
    inner = optax.with_extra_args_support(inner)
    anchored = requant == "anchored"
    keeps = anchored or leftover == "keep"

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        counts = jax.tree.map(lambda b: (*b.shape[:-2], _row_count(k, b.shape)), zeros)
        first = lambda b, shape: jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)  # noqa: E731
        rows = jax.tree.map(first, zeros, counts)
        delta = jax.tree.map(lambda b, shape: jnp.zeros((*shape, b.shape[-1])), zeros, counts)
        return FalqonState(
            inner.init(zeros),
            jax.tree.map(jnp.copy, zeros) if keeps else None,
            jax.tree.map(jnp.copy, zeros) if anchored else None,
            rows,
            delta,
            jnp.zeros((), jnp.int32),
        )

    def update(updates, state, params=None, **extra_args):
        del params
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), updates)
        gradients = jax.tree.map(lambda g: gain * g.astype(jnp.float32), updates)
        at = state.buffer if anchored else zeros
        steps, new_inner = inner.update(gradients, state.inner, at, **extra_args)
        total = jax.tree.map(jnp.add, state.buffer, steps) if keeps else steps
        moved = jax.tree.map(jnp.subtract, total, state.written) if anchored else total
        rows = jax.tree.map(lambda b: top_rows(b, _row_count(k, b.shape)), moved)
        delta = jax.tree.map(lambda b, i: gain * _taken(b, i), total, rows)
        buffer = written = None
        if anchored:
            buffer = total
            written = jax.tree.map(
                lambda w, b, i: _put(w, i, _taken(b, i)), state.written, total, rows
            )
        elif keeps:
            buffer = jax.tree.map(lambda b, i: _put(b, i, 0.0), total, rows)
        return zeros, FalqonState(new_inner, buffer, written, rows, delta, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def top_rows(b: jax.Array, count: int) -> jax.Array:
    r"""Rows of the largest ``sum_j |b_ij|``, the largest first.

    Args:
      b: floating ``[..., n, r]``.
      count: rows to return, in [1, n]; static.

    Returns:
      int32 ``[..., count]``.

    Raises:
      ValueError: ``count`` is out of range.

    Example:
      >>> top_rows(jnp.float32([[1, 1], [-4, 0], [0, 3]]), 2).tolist()
      [1, 2]
    """
    if not 1 <= count <= b.shape[-2]:
        raise ValueError(f"count must lie in [1, {b.shape[-2]}] (the rows of b), got {count}")
    return jax.lax.top_k(jnp.sum(jnp.abs(b), axis=-1), count)[1].astype(jnp.int32)


def write_rows(
    melded: Melded,
    rows: jax.Array,
    delta: jax.Array,
    *,
    requant: str = "rtn",
    key: jax.Array | None = None,
) -> Melded:
    r"""Adds ``delta · A`` to rows of the weight and rounds them to E4M3 again.

    .. math::
      \tilde W_i \leftarrow Q(\tilde W_i + \delta_i \tilde A) \; (\text{rtn, sr}), \qquad
      \tilde W_i \leftarrow Q(\tilde W^0_i + B_i \tilde A) \; (\text{anchored})

    in units of the codes, clipped to ±448; the scale stays. Rounding to nearest loses a change of
    less than half a code; stochastic rounding keeps it in expectation and adds noise; the anchored
    form rounds the *sum* of all steps once, so errors do not accumulate.

    Args:
      melded: the weight.
      rows: int32 ``[m]``, without repetition.
      delta: float32 ``[m, r]``: the step of these rows, or their whole ``B`` if anchored.
      requant: ``"rtn"`` (paper), ``"sr"`` or ``"anchored"``.
      key: PRNG key for ``"sr"``.

    Returns:
      The weight with new codes in ``rows``.

    Raises:
      ValueError: ``requant`` is unknown, its key or anchor is missing.

    Example:
      >>> codes = jnp.float8_e4m3fn([[8], [8], [1]])
      >>> melded = Melded(codes, jnp.float32(1), None, 1)
      >>> write_rows(melded, jnp.int32([1]), jnp.float32([[1.0]])).weight().tolist()
      [[8.0], [9.0]]
      >>> write_rows(melded, jnp.int32([1]), jnp.float32([[0.4]])).weight().tolist()
      [[8.0], [8.0]]

    References:
      FALQON (arXiv:2510.24061), row-wise proxy update. ``"sr"`` and ``"anchored"`` are ours.
    """
    return write_rows_of_all([melded], rows[None], delta[None], requant=requant, key=key)[0]


def write_rows_of_all(
    weights: Sequence[Melded],
    rows: jax.Array,
    delta: jax.Array,
    *,
    requant: str = "rtn",
    key: jax.Array | None = None,
) -> list[Melded]:
    """``write_rows`` for weights of one shape and rank, in a few kernels for all of them.

    Args:
      weights: the weights.
      rows: int32 ``[weights, m]``.
      delta: float32 ``[weights, m, r]``.
      requant: as for ``write_rows``.
      key: PRNG key for ``"sr"``.

    Returns:
      New weights.

    Raises:
      ValueError: as for ``write_rows``.

    >>> melded = Melded(jnp.float8_e4m3fn([[8], [8], [1]]), jnp.float32(1), None, 1)
    >>> new = write_rows_of_all([melded, melded], jnp.int32([[0], [1]]), jnp.ones((2, 1, 1)))
    >>> [m.weight().tolist() for m in new]
    [[[9.0], [8.0]], [[8.0], [9.0]]]
    """
    if requant not in REQUANT:
        raise ValueError(f"requant must be one of {REQUANT}, got {requant!r}")
    anchored = requant == "anchored"
    if anchored and any(melded.anchor is None for melded in weights):
        raise ValueError("requant='anchored' needs melded.anchor, the codes before the first step")
    if requant == "sr" and key is None:
        raise ValueError("requant='sr' needs a key, such as jax.random.key(0)")
    starts = [melded.anchor if anchored else melded.codes for melded in weights]
    old = jnp.stack([start[own] for start, own in zip(starts, rows, strict=True)])
    a = jnp.stack([melded.codes[melded.shape[0] :] for melded in weights]).astype(jnp.float32)
    change = jnp.matmul(delta.astype(jnp.float32), a, precision=jax.lax.Precision.HIGHEST)
    new = old.astype(jnp.float32) + change
    if requant == "sr":
        new = stochastic_round(new, _E4M3.dtype, key)
    else:
        new = round_to(new, _E4M3).astype(_E4M3.dtype)  # saturates: a bare cast would give NaN
    return [
        dataclasses.replace(melded, codes=melded.codes.at[own].set(codes))
        for melded, own, codes in zip(weights, rows, new, strict=True)
    ]


def meld(
    weights: Mapping[str, Melded],
    state: FalqonState,
    *,
    requant: str = "rtn",
    key: jax.Array | None = None,
) -> dict[str, Melded]:
    """Writes the rows that ``falqon`` chose into the weights; pure, so donate the old ones.

    Args:
      weights: the melded weights by name.
      state: after ``falqon(...).update``; its trees have the same names.
      requant: as given to ``falqon``.
      key: PRNG key for ``"sr"``; weight ``i`` draws from ``fold_in(key, i)``.

    Returns:
      New weights.

    Example:
      >>> transform = falqon(optax.sgd(1.0), k=1)
      >>> weights = {"w": Melded(jnp.float8_e4m3fn([[8], [8], [1]]), jnp.float32(1), None, 1)}
      >>> gradient = {"w": jnp.float32([[1.0], [-3.0]])}
      >>> _, state = transform.update(gradient, transform.init(gradient))
      >>> meld(weights, state)["w"].weight().tolist()
      [[8.0], [11.0]]
    """
    new = {}
    for index, (name, melded) in enumerate(weights.items()):
        leaf_key = None if key is None else jax.random.fold_in(key, index)
        new[name] = write_rows(
            melded, state.rows[name], state.delta[name], requant=requant, key=leaf_key
        )
    return new


def saturated_fraction(melded: Melded) -> jax.Array:
    """Fraction of the weight's codes at ±448: the scale is fixed, so weights that grow stop there.

    Args:
      melded: the weight.

    Returns:
      float32 scalar in [0, 1].

    Example:
      >>> codes = jnp.float8_e4m3fn([[448, 1], [2, -448], [1, 1]])
      >>> float(saturated_fraction(Melded(codes, jnp.float32(1), None, 1)))
      0.5
    """
    codes = melded.codes[: melded.shape[0]].astype(jnp.float32)
    return jnp.mean(jnp.abs(codes) >= _E4M3.max)


def _row_count(k: Rows, shape: tuple[int, ...]) -> int:
    n, r = shape[-2:]
    count = {"rank": r, "all": n}.get(k, k)
    if count > n:
        raise ValueError(f"k is {k!r}, {count} rows; a weight has only {n}")
    return count


def _taken(b: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows ``[..., m, r]`` of ``b``."""
    return jnp.take_along_axis(b, rows[..., None], axis=-2)


def _put(b: jax.Array, rows: jax.Array, values: jax.Array | float) -> jax.Array:
    """``b`` with other values in these rows."""
    places = jnp.broadcast_to(rows[..., None], (*rows.shape, b.shape[-1]))
    return jnp.put_along_axis(b, places, values, axis=-2, inplace=False)


def check_rows(k: Any) -> None:
    """Raises ValueError unless ``k`` is a number of rows, ``"rank"`` or ``"all"``.

    Args:
      k: as for ``falqon``.

    Raises:
      ValueError: it is none of these.

    >>> check_rows("rank")
    """
    is_count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    if not (is_count or k in ("rank", "all")):
        raise ValueError(f"k must be a positive int, 'rank' or 'all', got {k!r}")
