# SPDX-License-Identifier: Apache-2.0
"""Token rules: which (query, key) pairs take part in attention.

Every rule is kept in the form the kernels need. Causality and windows are bounds on the signed
distance ``s - t``, so that the intersection of any number of them is two numbers, and whether a
tile is empty or full follows from its corners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EMPTY, PARTIAL, FULL = 0, 1, 2


def _is_static(x) -> bool:
    return x is None or isinstance(x, int | np.integer)


def _tighter(a, b, pick):
    """The stricter of two optional bounds; stays a Python int where both are."""
    if a is None or b is None:
        return b if a is None else a
    if _is_static(a) and _is_static(b):
        return int(pick(a, b))
    return (jnp.maximum if pick is max else jnp.minimum)(a, b)


def _per_batch(x) -> jax.Array:
    """Scalar or [B] -> [B or 1, 1, 1, 1]."""
    return jnp.asarray(x).reshape(-1, 1, 1, 1)


def _check_ids(name, x, ndim):
    if x is not None and (
        jnp.ndim(x) != ndim or not jnp.issubdtype(jnp.result_type(x), jnp.integer)
    ):
        raise ValueError(
            f"{name} must be an integer array with {ndim} dimension(s); "
            f"got shape {jnp.shape(x)} and dtype {jnp.result_type(x)}"
        )


@dataclasses.dataclass(frozen=True)
class _Predicate:
    """A user's rule ``f(t, s)`` or ``f(b, n, t, s)``; equal functions make equal rules.

    Args:
      function: from int32 arrays that broadcast to bool, element by element.
      per_head: whether it takes batch entry and head before the positions.
      swapped: the roles of queries and keys are exchanged.
    """

    function: Callable[..., jax.Array]
    per_head: bool
    swapped: bool = False

    def __call__(self, b, n, t, s) -> jax.Array:
        t, s = (s, t) if self.swapped else (t, s)
        ok = self.function(*((b, n) if self.per_head else ()), t, s)
        if jnp.result_type(ok) != jnp.bool_:
            raise ValueError(f"predicate must return booleans; got {jnp.result_type(ok)}")
        return ok


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of rules saying which key ``s`` the query ``t`` may attend to.

    Pair ``(t, s)`` is allowed when all of these hold (a rule that is None always holds)::

        min_diff <= s - t <= max_diff
        t < q_lengths[b]   and   s < kv_lengths[b]
        q_ids[b, t] == kv_ids[b, s]          for every pair in `segments`
        array[b, n, t, s]                    for every array in `arrays`
        tiles[b, n, t // block_q, s // block_kv]   for every entry in `tiles`
        predicate(t, s)   or   predicate(b, n, t, s)   for every entry in `predicates`
        any of the masks   for every tuple of masks in `unions`

    Make one with `causal`, `window`, `lengths`, `segment_ids`, `from_array` or `from_predicate` and
    combine them with ``&`` and ``|``. Python integers and predicates stay static under `jit`;
    arrays are leaves of the pytree.

    Args:
      min_diff: lower bound of ``s - t`` in tokens; int, or int32 array of shape [] or [B].
      max_diff: upper bound of ``s - t`` in tokens; same forms.
      q_lengths: int32 [B], number of valid queries, or None.
      kv_lengths: int32 [B], number of valid keys, or None.
      segments: tuple of (q_ids [B, T], kv_ids [B, S]) int32 pairs.
      arrays: tuple of bool arrays, each broadcastable to [B, N, T, S].
      tiles: tuple of (map, block_q, block_kv), map bool broadcastable to [B, N, nq, nk].
      predicates: tuple of functions, see `from_predicate`; static.
      unions: tuple of tuples of masks.

    >>> mask = Mask.causal() & Mask.window(1, 0)
    >>> mask.dense(3, 3)[0, 0].astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]], dtype=int32)
    """

    min_diff: int | jax.Array | None = None
    max_diff: int | jax.Array | None = None
    q_lengths: jax.Array | None = None
    kv_lengths: jax.Array | None = None
    segments: tuple[tuple[jax.Array, jax.Array], ...] = ()
    arrays: tuple[jax.Array, ...] = ()
    tiles: tuple[tuple[jax.Array, int, int], ...] = ()
    predicates: tuple[_Predicate, ...] = ()
    unions: tuple[tuple[Mask, ...], ...] = ()

    # -- builders ----------------------------------------------------------------------------

    @classmethod
    def causal(cls, offset: int | jax.Array = 0) -> Mask:
        """Allows ``s <= t + offset``.

        Args:
          offset: position of query 0 among the keys, in tokens; int, or int32 [] or [B].
            0 aligns the top-left corners, ``S - T`` the bottom-right corners.

        Returns:
          A `Mask`.

        >>> Mask.causal(1).dense(2, 3)[0, 0].astype(int)
        Array([[1, 1, 0],
               [1, 1, 1]], dtype=int32)
        """
        return cls(max_diff=offset)

    @classmethod
    def window(cls, left: int | None, right: int | None, offset: int | jax.Array = 0) -> Mask:
        """Allows ``t + offset - left <= s <= t + offset + right``; None leaves a side open.

        Args:
          left: tokens visible before the query's own position, >= 0, or None.
          right: tokens visible after it, >= 0, or None.
          offset: position of query 0 among the keys, as in `causal`.

        Returns:
          A `Mask`.

        Raises:
          ValueError: a side is negative.

        >>> int(Mask.window(1, 1).dense(4, 4).sum())
        10
        """
        for name, side in (("left", left), ("right", right)):
            if side is not None and side < 0:
                raise ValueError(f"window: {name} must be >= 0 tokens; got {side}")
        return cls(
            min_diff=None if left is None else offset - left,
            max_diff=None if right is None else offset + right,
        )

    @classmethod
    def lengths(cls, q_lengths=None, kv_lengths=None) -> Mask:
        """Allows ``t < q_lengths[b]`` and ``s < kv_lengths[b]``.

        Args:
          q_lengths: int32 [B], valid queries of each batch entry, or None for all.
          kv_lengths: int32 [B], valid keys of each batch entry, or None for all.

        Returns:
          A `Mask`.

        Raises:
          ValueError: not a one-dimensional integer array.

        >>> Mask.lengths(kv_lengths=jnp.array([1, 2])).dense(1, 3)[:, 0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0]], dtype=int32)
        """
        _check_ids("q_lengths", q_lengths, 1)
        _check_ids("kv_lengths", kv_lengths, 1)
        return cls(q_lengths=q_lengths, kv_lengths=kv_lengths)

    @classmethod
    def segment_ids(cls, q_ids: jax.Array, kv_ids: jax.Array | None = None) -> Mask:
        """Allows pairs whose segment numbers are equal (packed sequences).

        Args:
          q_ids: int32 [B, T].
          kv_ids: int32 [B, S]; None means `q_ids` (self-attention).

        Returns:
          A `Mask`.

        Raises:
          ValueError: not a two-dimensional integer array.

        >>> Mask.segment_ids(jnp.array([[0, 1]])).dense(2, 2)[0, 0].astype(int)
        Array([[1, 0],
               [0, 1]], dtype=int32)
        """
        kv_ids = q_ids if kv_ids is None else kv_ids
        _check_ids("q_ids", q_ids, 2)
        _check_ids("kv_ids", kv_ids, 2)
        return cls(segments=((q_ids, kv_ids),))

    @classmethod
    def from_array(cls, mask: jax.Array) -> Mask:
        """Allows the pairs where a boolean array is True.

        Args:
          mask: bool, up to four dimensions, broadcastable to [B, N, T, S].

        Returns:
          A `Mask`.

        Raises:
          ValueError: not boolean, or more than four dimensions.

        >>> bool(Mask.from_array(jnp.ones((2, 2), bool)).dense(2, 2).all())
        True
        """
        if jnp.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"mask must be boolean (True = attend); got {jnp.result_type(mask)}. "
                "Pass an additive mask as bias."
            )
        if jnp.ndim(mask) > 4:
            raise ValueError(f"mask must have at most 4 dimensions; got {jnp.ndim(mask)}")
        return cls(arrays=(jnp.asarray(mask).reshape((1,) * (4 - jnp.ndim(mask)) + mask.shape),))

    @classmethod
    def from_predicate(
        cls, predicate: Callable[..., jax.Array], *, batch: int = 1, num_heads: int = 1
    ) -> Mask:
        """Allows the pairs for which a function of their positions is True.

        The function is evaluated where it is needed, never on a T×S array at once. It is static
        under `jit`: a new function object compiles anew, and arrays that it reads must be concrete
        (ids known only under `jit` go through `segment_ids`).

        Args:
          predicate: ``f(q_idx, kv_idx) -> bool`` on int32 arrays that broadcast, element by
            element; ``f(b, n, q_idx, kv_idx)`` when `batch` or `num_heads` is above 1.
          batch: B when the rule differs between batch entries, else 1.
          num_heads: N when the rule differs between heads, else 1.

        Returns:
          A `Mask`.

        Raises:
          ValueError: not callable, a size below 1, or (when evaluated) the result is not boolean.

        >>> Mask.from_predicate(lambda t, s: (t - s) % 2 == 0).dense(2, 4)[0, 0].astype(int)
        Array([[1, 0, 1, 0],
               [0, 1, 0, 1]], dtype=int32)
        """
        if not callable(predicate):
            raise ValueError(f"predicate must be a function; got {type(predicate).__name__}")
        for name, size in (("batch", batch), ("num_heads", num_heads)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        per_head = batch > 1 or num_heads > 1
        rule = cls(predicates=(_Predicate(predicate, per_head),))
        if not per_head:
            return rule
        # An array rule of one element per head says how many batch entries and heads there are.
        return rule & cls.from_array(jnp.ones((batch, num_heads, 1, 1), bool))

    def __or__(self, other: Mask) -> Mask:
        """The pairs that at least one of the masks allows."""
        if not isinstance(other, Mask):
            return NotImplemented
        if self.is_trivial or other.is_trivial:
            return Mask()
        return Mask(unions=((self, other),))

    def __and__(self, other: Mask) -> Mask:
        """The pairs that both masks allow."""
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            min_diff=_tighter(self.min_diff, other.min_diff, max),
            max_diff=_tighter(self.max_diff, other.max_diff, min),
            q_lengths=_tighter(self.q_lengths, other.q_lengths, min),
            kv_lengths=_tighter(self.kv_lengths, other.kv_lengths, min),
            segments=self.segments + other.segments,
            arrays=self.arrays + other.arrays,
            tiles=self.tiles + other.tiles,
            predicates=self.predicates + other.predicates,
            unions=self.unions + other.unions,
        )

    # -- evaluation --------------------------------------------------------------------------

    @property
    def is_trivial(self) -> bool:
        """True when no rule is set, so that every pair is allowed."""
        return (
            self.min_diff is None
            and self.max_diff is None
            and self.q_lengths is None
            and self.kv_lengths is None
            and not (self.segments or self.arrays or self.tiles)
            and not (self.predicates or self.unions)
        )

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        """The mask as one boolean array.

        Args:
          q_len: number of queries T.
          kv_len: number of keys S.

        Returns:
          bool [B or 1, N or 1, T, S], True where the pair is allowed. Memory is T·S bytes times
          the batch and head dimensions that a rule really has.
        """
        return self.block(None, None, q_len, kv_len)

    def block(self, t: jax.Array | None, s: jax.Array | None, q_len: int, kv_len: int) -> jax.Array:
        """The mask for some queries and keys.

        Args:
          t: int32 [t], query positions, each below `q_len`; None means all.
          s: int32 [s], key positions, positions at or beyond `kv_len` are not allowed; None
            means all.
          q_len: number of queries T.
          kv_len: number of keys S.

        Returns:
          bool [B or 1, N or 1, t, s].

        Raises:
          ValueError: an array or segment rule does not fit T or S.
        """
        self.check(q_len, kv_len)
        row = (jnp.arange(q_len) if t is None else t)[None, None, :, None]
        col = (jnp.arange(kv_len) if s is None else s)[None, None, None, :]
        ok = (col < kv_len) & jnp.ones_like(row, bool)
        if self.min_diff is not None:
            ok &= col - row >= _per_batch(self.min_diff)
        if self.max_diff is not None:
            ok &= col - row <= _per_batch(self.max_diff)
        if self.q_lengths is not None:
            ok &= row < _per_batch(self.q_lengths)
        if self.kv_lengths is not None:
            ok &= col < _per_batch(self.kv_lengths)
        for q_ids, kv_ids in self.segments:
            ok &= _gather(q_ids[:, None, :, None], t, None) == _gather(
                kv_ids[:, None, None, :], None, s
            )
        for array in self.arrays:
            ok &= _gather(array, t, s)
        for tile_map, block_q, block_kv in self.tiles:
            ok &= _gather(tile_map, row[0, 0, :, 0] // block_q, col[0, 0, 0] // block_kv)
        b, n = self._heads()
        for predicate in self.predicates:
            ok &= predicate(b, n, row, col)
        for masks in self.unions:
            ok &= _any([mask.block(t, s, q_len, kv_len) for mask in masks])
        return ok

    def at(
        self, b: jax.Array, n: jax.Array, t: jax.Array, s: jax.Array, q_len: int, kv_len: int
    ) -> jax.Array:
        """The mask for single pairs: what `block` gives at ``[b, n, t, s]``.

        Args:
          b: int32, batch entries; all four arrays broadcast against each other.
          n: int32, heads.
          t: int32, query positions; those at or beyond `q_len` give an arbitrary answer.
          s: int32, key positions; those at or beyond `kv_len` are not allowed.
          q_len: number of queries T.
          kv_len: number of keys S.

        Returns:
          bool of the broadcast shape, or of one that broadcasts to it.

        >>> Mask.causal().at(0, 0, jnp.array([0, 3]), jnp.array([1, 1]), 4, 4)
        Array([False,  True], dtype=bool)
        """
        b, n, t, s = (jnp.asarray(x) for x in (b, n, t, s))
        per_batch = lambda x: jnp.asarray(x) if jnp.ndim(x) == 0 else _pick(x, b)  # noqa: E731
        ok = s < kv_len
        if self.min_diff is not None:
            ok &= s - t >= per_batch(self.min_diff)
        if self.max_diff is not None:
            ok &= s - t <= per_batch(self.max_diff)
        if self.q_lengths is not None:
            ok &= t < per_batch(self.q_lengths)
        if self.kv_lengths is not None:
            ok &= s < per_batch(self.kv_lengths)
        for q_ids, kv_ids in self.segments:
            ok &= _pick(q_ids, b, t) == _pick(kv_ids, b, s)
        for array in self.arrays:
            ok &= _pick(array, b, n, t, s)
        for tile_map, block_q, block_kv in self.tiles:
            ok &= _pick(tile_map, b, n, t // block_q, s // block_kv)
        for predicate in self.predicates:
            ok &= predicate(b, n, t, s)
        for masks in self.unions:
            ok &= _any([mask.at(b, n, t, s, q_len, kv_len) for mask in masks])
        return ok

    @property
    def is_joint(self) -> bool:
        """Whether rules together may leave a token with nothing, though each alone does not."""
        rules = [self.segments, self.arrays, self.tiles, self.predicates, self.unions]
        bounds = [self.min_diff, self.max_diff, self.q_lengths, self.kv_lengths]
        number = sum(map(len, rules))
        bounded = any(bound is not None for bound in bounds)
        return number > 1 or bool(self.unions) or (number == 1 and bounded)

    def _heads(self) -> tuple[jax.Array, jax.Array]:
        """Indices of batch entries [B or 1, 1, 1, 1] and heads [1, N or 1, 1, 1] of predicates."""
        shapes = [(1, 1), *(array.shape[:2] for array in self.arrays)]
        if not any(predicate.per_head for predicate in self.predicates):
            shapes = shapes[:1]
        b, n = (max(sizes) for sizes in zip(*shapes, strict=True))
        return jnp.arange(b)[:, None, None, None], jnp.arange(n)[None, :, None, None]

    def check(self, q_len: int, kv_len: int) -> None:
        """Raises ValueError where a rule does not fit T queries and S keys."""
        for array in self.arrays:
            if array.shape[2] not in (1, q_len) or array.shape[3] not in (1, kv_len):
                raise ValueError(
                    f"mask must be broadcastable to [B, N, T={q_len}, S={kv_len}]; "
                    f"got shape {array.shape}"
                )
        for q_ids, kv_ids in self.segments:
            if q_ids.shape[1] != q_len or kv_ids.shape[1] != kv_len:
                raise ValueError(
                    f"segment_ids must have shapes [B, T={q_len}] and [B, S={kv_len}]; "
                    f"got {q_ids.shape} and {kv_ids.shape}"
                )
        for tile_map, block_q, block_kv in self.tiles:
            want = (-(-q_len // block_q), -(-kv_len // block_kv))
            if any(n not in (1, m) for n, m in zip(tile_map.shape[2:], want, strict=True)):
                raise ValueError(
                    f"the block mask has {tile_map.shape[2:]} tiles; {want} are needed for "
                    f"T={q_len}, S={kv_len} in blocks of {block_q} x {block_kv}"
                )
        for masks in self.unions:
            for mask in masks:
                mask.check(q_len, kv_len)

    def live_keys(self, q_len: int, kv_len: int) -> jax.Array | None:
        """Which keys at least one query may attend to (never calls a live key dead).

        Args:
          q_len: number of queries T.
          kv_len: number of keys S.

        Returns:
          bool [B or 1, N or 1, S], or None when all keys are live for certain.
        """
        if self._all_keys_live(q_len, kv_len):
            return None
        s = jnp.arange(kv_len)[None, None, :]  # [1, 1, S]
        live = jnp.ones((1, 1, kv_len), bool)
        # Queries run over 0 .. last, so s - t covers s - last .. s.
        last = q_len - 1 if self.q_lengths is None else self.q_lengths.reshape(-1, 1, 1) - 1
        if self.min_diff is not None:
            live &= s >= jnp.asarray(self.min_diff).reshape(-1, 1, 1)
        if self.max_diff is not None:
            live &= s - last <= jnp.asarray(self.max_diff).reshape(-1, 1, 1)
        if self.q_lengths is not None:
            live &= last >= 0
        if self.kv_lengths is not None:
            live &= s < self.kv_lengths.reshape(-1, 1, 1)
        for q_ids, kv_ids in self.segments:
            live &= (q_ids[:, :, None] == kv_ids[:, None, :]).any(1)[:, None]
        for array in self.arrays:
            live &= array.any(2)
        for tile_map, _, block_kv in self.tiles:
            live &= jnp.repeat(tile_map.any(2), block_kv, axis=-1)[..., :kv_len]
        if self.predicates:
            live &= self._any_query(q_len, kv_len)
        for masks in self.unions:
            each = [mask.live_keys(q_len, kv_len) for mask in masks]
            live &= True if any(x is None for x in each) else _any(each)
        return live

    def _any_query(self, q_len: int, kv_len: int, rows: int = 64) -> jax.Array:
        """Which keys some query sees, by looking at `rows` queries at a time; [B, N, S]."""

        def seen(start):
            t = jnp.minimum(start + jnp.arange(rows), q_len - 1)
            return self.block(t, None, q_len, kv_len).any(2)

        return lax.map(seen, jnp.arange(0, q_len, rows)).any(0)

    def live_queries(self, q_len: int, kv_len: int) -> jax.Array | None:
        """Which queries may attend to at least one key (never calls a live query dead).

        Args:
          q_len: number of queries T.
          kv_len: number of keys S.

        Returns:
          bool [B or 1, N or 1, T], or None when all queries are live for certain.
        """
        return self.transpose().live_keys(kv_len, q_len)

    def transpose(self) -> Mask:
        """The same rule with the roles of queries and keys exchanged.

        Returns:
          A `Mask` with ``mask.transpose().dense(S, T) == mask.dense(T, S)`` transposed.

        >>> Mask.causal().transpose().dense(2, 2)[0, 0].astype(int)
        Array([[1, 1],
               [0, 1]], dtype=int32)
        """
        return Mask(
            min_diff=None if self.max_diff is None else -self.max_diff,
            max_diff=None if self.min_diff is None else -self.min_diff,
            q_lengths=self.kv_lengths,
            kv_lengths=self.q_lengths,
            segments=tuple((kv_ids, q_ids) for q_ids, kv_ids in self.segments),
            arrays=tuple(array.swapaxes(2, 3) for array in self.arrays),
            tiles=tuple(
                (m.swapaxes(2, 3), block_kv, block_q) for m, block_q, block_kv in self.tiles
            ),
            predicates=tuple(
                dataclasses.replace(predicate, swapped=not predicate.swapped)
                for predicate in self.predicates
            ),
            unions=tuple(tuple(mask.transpose() for mask in masks) for masks in self.unions),
        )

    def _all_keys_live(self, q_len: int, kv_len: int) -> bool:
        """True when static facts alone show that every key has a query."""
        if self.q_lengths is not None or self.kv_lengths is not None:
            return False
        if self.segments or self.arrays or self.tiles or self.predicates or self.unions:
            return False
        if not (_is_static(self.min_diff) and _is_static(self.max_diff)):
            return False
        low = self.min_diff is None or self.min_diff <= 0
        high = self.max_diff is None or kv_len - q_len <= self.max_diff
        return low and high

    def tile_status(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> jax.Array:
        """Says for each tile whether it is empty, partly allowed or full.

        The answer is conservative: a tile called `EMPTY` has no allowed pair and a tile called
        `FULL` has no forbidden one; `PARTIAL` needs the token rule. Tokens beyond T or S do not
        count. No T×S array is made unless the mask already holds one; predicates are evaluated for
        `block_q` queries at a time.

        Args:
          q_len: number of queries T.
          kv_len: number of keys S.
          block_q: queries per tile.
          block_kv: keys per tile.

        Returns:
          int8 [B or 1, N or 1, ceil(T / block_q), ceil(S / block_kv)]: 0 EMPTY, 1 PARTIAL, 2 FULL.

        >>> Mask.causal().tile_status(4, 4, 2, 2)[0, 0]
        Array([[1, 0],
               [2, 1]], dtype=int8)
        """
        self.check(q_len, kv_len)
        t0 = jnp.arange(0, q_len, block_q)[None, None, :, None]
        s0 = jnp.arange(0, kv_len, block_kv)[None, None, None, :]
        t1 = jnp.minimum(t0 + block_q, q_len) - 1
        s1 = jnp.minimum(s0 + block_kv, kv_len) - 1
        some, every = jnp.full(jnp.broadcast_shapes(t0.shape, s0.shape), True), True
        if self.min_diff is not None:
            bound = _per_batch(self.min_diff)
            some, every = some & (s1 - t0 >= bound), every & (s0 - t1 >= bound)
        if self.max_diff is not None:
            bound = _per_batch(self.max_diff)
            some, every = some & (s0 - t1 <= bound), every & (s1 - t0 <= bound)
        if self.q_lengths is not None:
            bound = _per_batch(self.q_lengths)
            some, every = some & (t0 < bound), every & (t1 < bound)
        if self.kv_lengths is not None:
            bound = _per_batch(self.kv_lengths)
            some, every = some & (s0 < bound), every & (s1 < bound)
        for q_ids, kv_ids in self.segments:
            (ql, qh), (kl, kh) = _ranges(q_ids, block_q), _ranges(kv_ids, block_kv)
            ql, qh = ql[:, None, :, None], qh[:, None, :, None]
            kl, kh = kl[:, None, None, :], kh[:, None, None, :]
            some &= (ql <= kh) & (kl <= qh)
            every &= (ql == qh) & (kl == kh) & (ql == kl)
        tokens = [jnp.broadcast_to(a, (*a.shape[:2], q_len, kv_len)) for a in self.arrays]
        for tile_map, bq, bk in self.tiles:
            if (bq, bk) == (block_q, block_kv):
                some, every = some & tile_map, every & tile_map
            else:
                t, s = jnp.arange(q_len), jnp.arange(kv_len)
                tokens.append(_gather(tile_map, t // bq, s // bk))
        for array in tokens:
            any_, all_ = _tile_any_all(array, block_q, block_kv)
            some, every = some & any_, every & all_
        if self.predicates:
            any_, all_ = self._predicate_any_all(q_len, kv_len, block_q, block_kv)
            some, every = some & any_, every & all_
        for masks in self.unions:
            each = [mask.tile_status(q_len, kv_len, block_q, block_kv) for mask in masks]
            some &= _any([status != EMPTY for status in each])
            every &= _any([status == FULL for status in each])
        return jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY).astype(jnp.int8)

    def _predicate_any_all(self, q_len, kv_len, block_q, block_kv):
        """Any and all of the predicates over tiles, one row of tiles at a time; [B, N, nq, nk]."""
        b, n = self._heads()
        s = jnp.arange(kv_len)[None, None, None, :]

        def row(start):
            t = jnp.minimum(start + jnp.arange(block_q), q_len - 1)[None, None, :, None]
            ok = jnp.ones((1, 1, block_q, kv_len), bool)
            for predicate in self.predicates:
                ok &= predicate(b, n, t, s)
            return _tile_any_all(ok, block_q, block_kv)  # [B, N, 1, nk]

        some, every = lax.map(row, jnp.arange(0, q_len, block_q))
        return jnp.moveaxis(some[..., 0, :], 0, 2), jnp.moveaxis(every[..., 0, :], 0, 2)

    # -- pytree ------------------------------------------------------------------------------

    def tree_flatten_with_keys(self):
        """Arrays are leaves; Python integers (bounds, block sizes) are static."""
        dynamic, static = {}, {}
        for name in ("min_diff", "max_diff", "q_lengths", "kv_lengths"):
            x = getattr(self, name)
            if _is_static(x):
                static[name] = x
            else:
                dynamic[name] = x
        for i, (q_ids, kv_ids) in enumerate(self.segments):
            dynamic[f"segments[{i}].q"], dynamic[f"segments[{i}].kv"] = q_ids, kv_ids
        dynamic |= {f"arrays[{i}]": array for i, array in enumerate(self.arrays)}
        dynamic |= {f"tiles[{i}]": tile_map for i, (tile_map, _, _) in enumerate(self.tiles)}
        for i, masks in enumerate(self.unions):
            dynamic |= {f"unions[{i}][{j}]": mask for j, mask in enumerate(masks)}
        sizes = tuple((block_q, block_kv) for _, block_q, block_kv in self.tiles)
        counts = len(self.segments), tuple(len(masks) for masks in self.unions)
        keys = [(jax.tree_util.GetAttrKey(name), x) for name, x in dynamic.items()]
        return keys, (tuple(dynamic), tuple(static.items()), counts, sizes, self.predicates)

    @classmethod
    def tree_unflatten(cls, aux, leaves):
        """Inverse of `tree_flatten_with_keys`."""
        names, static, (num_segments, union_sizes), sizes, predicates = aux
        x = dict(zip(names, leaves, strict=True)) | dict(static)
        return cls(
            *(x[name] for name in ("min_diff", "max_diff", "q_lengths", "kv_lengths")),
            tuple((x[f"segments[{i}].q"], x[f"segments[{i}].kv"]) for i in range(num_segments)),
            tuple(x[name] for name in names if name.startswith("arrays")),
            tuple((x[f"tiles[{i}]"], *size) for i, size in enumerate(sizes)),
            predicates,
            tuple(
                tuple(x[f"unions[{i}][{j}]"] for j in range(size))
                for i, size in enumerate(union_sizes)
            ),
        )


def _any(arrays: list[jax.Array]) -> jax.Array:
    """Element by element: True where one of them is."""
    found = arrays[0]
    for array in arrays[1:]:
        found = found | array
    return found


def _pick(array: jax.Array, *index: jax.Array) -> jax.Array:
    """Elements of an array; an axis of size 1 broadcasts, an index beyond the end is clipped."""
    index = (0 if size == 1 else i for size, i in zip(array.shape, index, strict=True))
    return jnp.asarray(array).at[tuple(index)].get(mode="clip")


def _gather(array: jax.Array, t: jax.Array | None, s: jax.Array | None) -> jax.Array:
    """Rows `t` and columns `s` of [.., T or 1, S or 1] (None: all); size 1 stays."""
    if array.shape[2] != 1 and t is not None:
        array = jnp.take(array, t, axis=2, mode="clip")
    if array.shape[3] != 1 and s is not None:
        array = jnp.take(array, s, axis=3, mode="clip")
    return array


def _ranges(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest id of every block; [B, L] -> two of [B, ceil(L / block)]."""
    pad = -ids.shape[1] % block
    ids = jnp.pad(ids, ((0, 0), (0, pad)), mode="edge").reshape(ids.shape[0], -1, block)
    return ids.min(-1), ids.max(-1)


def _tile_any_all(array: jax.Array, block_q: int, block_kv: int) -> tuple[jax.Array, jax.Array]:
    """Any and all over tiles; [B, N, T, S] -> two of [B, N, nq, nk]."""
    pad = ((0, 0), (0, 0), (0, -array.shape[2] % block_q), (0, -array.shape[3] % block_kv))
    array = jnp.pad(array, pad, mode="edge")
    b, n, t, s = array.shape
    array = array.reshape(b, n, t // block_q, block_q, s // block_kv, block_kv)
    return array.any((3, 5)), array.all((3, 5))
