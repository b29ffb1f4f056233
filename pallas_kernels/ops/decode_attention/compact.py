# SPDX-License-Identifier: Apache-2.0
"""Changing a cache: which slots have the largest scores, moving slots, and appending tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._device import current_device
from pallas_kernels._dispatch import resolve
from pallas_kernels.ops.decode_attention.api import append_tokens
from pallas_kernels.ops.decode_attention.by_head import by_head
from pallas_kernels.ops.decode_attention.spec import device_reason

_UNMEASURED = "was not measured yet; implementation='mosaic' runs it"


def largest_slots(
    scores: jax.Array,
    budget: int,
    count: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the slots with the largest scores of every head, in the order of slots.

    Of equal scores the first slots are taken; -inf is never taken.

    Args:
      scores: float32 [B, K, C].
      budget: columns of the result, at most C.
      count: int32 [B, K], how many of the ``budget`` best a head really keeps; None: all.
      implementation: None, "xla" or "mosaic" (Hopper; counts instead of sorting).

    Returns:
      int32 [B, K, budget]; -1 after a head's last slot.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the implementation does not serve the call.

    >>> largest_slots(jnp.array([[[0.1, 0.9, 0.5, -jnp.inf]]]), 2).tolist()
    [[[1, 2]]]

    References: R-KV (arXiv 2505.24133), Algorithm 1.
    """
    if scores.ndim != 3 or not 0 <= budget <= scores.shape[2]:
        raise ValueError(f"scores has shape {scores.shape}; expected [B, K, C] with C >= {budget}")
    if count is not None and count.shape != scores.shape[:2]:
        raise ValueError(f"count has shape {count.shape}; expected {scores.shape[:2]}")
    reasons = {"mosaic": _choice_reason(scores, budget, implementation), "xla": None}
    if resolve("largest_slots", implementation, reasons) == "mosaic":
        from pallas_kernels.ops.decode_attention import mosaic_sm90_compact

        if count is None:
            count = jnp.full(scores.shape[:2], budget, jnp.int32)
        run = lambda *x: (mosaic_sm90_compact.largest(*x, budget),)  # noqa: E731
        return by_head(run, ["bk", "bk"], ["bk"])(scores, count)[0]
    slots = scores.shape[2]
    values, indices = jax.lax.top_k(scores, budget)
    real = values > -jnp.inf
    if count is not None:
        real = real & (jnp.arange(budget) < count[..., None])
    kept = jnp.sort(jnp.where(real, indices, slots), axis=-1)
    return jnp.where(kept < slots, kept, -1).astype(jnp.int32)


def move_slots(
    store: Any, source: jax.Array, *, fill: Any = 0, implementation: str | None = None
) -> Any:
    """Returns arrays of slots in a new order; payload and scales are copied, never recomputed.

    Args:
      store: pytree of arrays [B, K, C, ...].
      source: int32 [B, K, M], the old slot of every new one, -1 for an empty one.
      fill: what an empty slot holds: 0, or -1 in int32 arrays; one number, or a pytree of them.
      implementation: None, "xla" or "mosaic" (Hopper; all arrays in one launch).

    Returns:
      The pytree with arrays [B, K, M, ...].

    Raises:
      NotImplementedError: the implementation does not serve the call.

    >>> move_slots(jnp.array([[[5, 6, 7]]]), jnp.array([[[2, 0, -1]]])).tolist()
    [[[7, 5, 0]]]

    References: R-KV (arXiv 2505.24133), section 3.1 (the retained slots).
    """
    arrays, tree = jax.tree.flatten(store)
    fills = [fill] * len(arrays) if isinstance(fill, int) else jax.tree.leaves(fill)
    reasons = {"mosaic": _move_reason(arrays, source, implementation), "xla": None}
    if resolve("move_slots", implementation, reasons) == "mosaic":
        from pallas_kernels.ops.decode_attention import mosaic_sm90_compact

        run = lambda *x: tuple(mosaic_sm90_compact.move(x[:-1], x[-1], fills))  # noqa: E731
        moved = by_head(run, ["bk"] * (len(arrays) + 1), ["bk"] * len(arrays))(*arrays, source)
    else:
        moved = [_moved(x, source, value) for x, value in zip(arrays, fills, strict=True)]
    return jax.tree.unflatten(tree, moved)


def append_to_cache(
    key: Any,
    value: Any,
    positions: jax.Array | None,
    new_key: jax.Array,
    new_value: jax.Array,
    new_positions: jax.Array | None,
    slots: jax.Array,
    *,
    key_offset: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[Any, Any, jax.Array | None]:
    """Appends tokens to both stores of a cache: smoothed, quantised, written at their slots.

    The same as :func:`append_tokens` for key (less its offset) and value, and a write of the
    positions. "mosaic" does all of it in one launch, in place where the caches are donated.

    Args:
      key: [B, K, C, H], an array or a QTensor with scales per slot.
      value: as key.
      positions: int32 [B, K, C], or None.
      new_key: floating [B, K, T, H].
      new_value: as new_key.
      new_positions: int32 [B, T], or None.
      slots: int32 [B, K, T], where to write; C or more writes nothing.
      key_offset: float32 [B, K, 1, H], taken from new keys first; None: nothing.
      implementation: None, "xla" or "mosaic" (Hopper).

    Returns:
      Key, value and positions with the tokens written.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the implementation does not serve the call.

    >>> empty, one = jnp.zeros((1, 1, 2, 4)), jnp.ones((1, 1, 1, 4))
    >>> found = append_to_cache(empty, empty, None, one, 2 * one, None, jnp.array([[[1]]]))
    >>> found[0][0, 0, :, 0].tolist(), found[1][0, 0, :, 0].tolist()
    ([0.0, 1.0], [0.0, 2.0])

    References: KIVI (arXiv 2402.02750), section 3 (quantised as tokens arrive).
    """
    reasons = {
        "mosaic": _append_reason(key, value, new_key, new_value, implementation),
        "xla": None,
    }
    if resolve("append_to_cache", implementation, reasons) == "mosaic":
        from pallas_kernels.ops.decode_attention import mosaic_sm90_append

        old, rest = (key, value, positions), (new_key, new_value, new_positions, slots, key_offset)
        leaves, tree = jax.tree.flatten((*old, *rest))
        axes = jax.tree.leaves(("bk",) * 5 + ("b", "bk", "bk"))
        axes = [
            axis
            for part, axis in zip((*old, *rest), axes, strict=True)
            for _ in jax.tree.leaves(part)
        ]
        count = len(jax.tree.leaves(old))

        def run(*x):
            return tuple(jax.tree.leaves(mosaic_sm90_append.append(*jax.tree.unflatten(tree, x))))

        changed = by_head(run, axes, ["bk"] * count)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(old), changed)
    less = new_key if key_offset is None else new_key.astype(jnp.float32) - key_offset
    key, value = append_tokens(key, less, slots), append_tokens(value, new_value, slots)
    if positions is not None:
        rows, heads = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[:, None]
        fresh = jnp.broadcast_to(new_positions[:, None], slots.shape).astype(positions.dtype)
        positions = positions.at[rows, heads, slots].set(fresh, mode="drop")
    return key, value, positions


def _moved(x: jax.Array, source: jax.Array, fill: int) -> jax.Array:
    # An index past the end reads the fill value.
    places = jnp.where(source >= 0, source, x.shape[2])
    places = places.reshape(places.shape + (1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, places, axis=2, mode="fill", fill_value=fill)


def _choice_reason(scores, budget: int, implementation: str | None) -> str | None:
    reason = device_reason(current_device())
    if reason is not None:
        return reason
    from pallas_kernels.ops.decode_attention import mosaic_sm90_compact  # needs Mosaic

    if not budget:
        return "the sm90 selection takes a budget of one slot or more"
    return mosaic_sm90_compact.unsupported_reason(scores) or _unmeasured(implementation)


def _move_reason(arrays, source, implementation: str | None) -> str | None:
    reason = device_reason(current_device())
    if reason is not None:
        return reason
    from pallas_kernels.ops.decode_attention import mosaic_sm90_compact  # needs Mosaic

    if not arrays or not source.size:
        return "the sm90 copy takes one array or more and one slot or more"
    return mosaic_sm90_compact.unsupported_move_reason(arrays) or _unmeasured(implementation)


def _append_reason(key, value, new_key, new_value, implementation: str | None) -> str | None:
    reason = device_reason(current_device())
    if reason is not None:
        return reason
    from pallas_kernels.ops.decode_attention import mosaic_sm90_append  # needs Mosaic

    if jax.tree.structure(key) != jax.tree.structure(value) or new_key.dtype != new_value.dtype:
        return "the sm90 append kernel takes key and value stored alike and tokens of one dtype"
    return mosaic_sm90_append.unsupported_reason(key, new_key) or _unmeasured(implementation)


def _unmeasured(implementation: str | None) -> str | None:
    return _UNMEASURED if implementation is None and not MEASURED else None


MEASURED = True  # whether `implementation=None` takes these kernels
