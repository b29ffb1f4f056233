# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that is split between devices, and the merging of partial results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ops.attention import api, xla
from pallas_kernels.ops.attention.spec import AttentionConfig, AttentionQuant, get_quant


def merge(
    outputs: Sequence[jax.Array] | jax.Array, lses: Sequence[jax.Array] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint sets of keys into attention over all of them.

    With the log-sum-exp ``l_i`` of part i: ``l = log sum_i exp(l_i)`` and
    ``O = sum_i exp(l_i - l) O_i``. A part with ``l_i = -inf`` (nothing attended) adds nothing,
    whatever its output holds; where all parts are empty the result is zeros and -inf. Works in
    float32, in memory of the size of the parts; differentiable in both arguments.

    Args:
      outputs: P arrays [..., H] of one shape, or one array [P, ..., H]; floating point.
      lses: P arrays [...], or one array [P, ...]; natural logarithm, float32.

    Returns:
      Output [..., H] in the dtype of `outputs`, and log-sum-exp float32 [...].

    Raises:
      ValueError: numbers of parts or shapes do not fit.

    >>> out, lse = merge([jnp.ones((1, 2)), jnp.zeros((1, 2))], [jnp.zeros(1), jnp.zeros(1)])
    >>> out.tolist(), round(float(lse[0]), 4)
    ([[0.5, 0.5]], 0.6931)

    References:
      Dao et al., "Flash-Decoding", 2023; Liu et al., Ring Attention, arXiv 2310.01889, section 3.
    """
    if len(outputs) != len(lses) or len(outputs) == 0:
        raise ValueError(
            f"merge needs as many lses as outputs, at least 1; got {len(outputs)} outputs and "
            f"{len(lses)} lses"
        )
    for i, (part, lse) in enumerate(zip(outputs, lses, strict=True)):
        if part.shape[:-1] != lse.shape or part.shape != outputs[0].shape:
            raise ValueError(
                f"part {i} has output shape {part.shape} and log-sum-exp shape {lse.shape}; "
                f"expected {outputs[0].shape} and {outputs[0].shape[:-1]}"
            )
    dtype = outputs[0].dtype
    parts = jnp.stack([x.astype(jnp.float32) for x in outputs])  # [P, ..., H]
    logs = jnp.stack([x.astype(jnp.float32) for x in lses])  # [P, ...]
    top = lax.stop_gradient(logs.max(0))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(logs - top)
    total = weight.sum(0)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    parts = jnp.where(jnp.isneginf(logs)[..., None], 0.0, parts)
    out = (parts * (weight / total)[..., None]).sum(0)
    return out.astype(dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call of `ring_attention`."""

    axis_name: str
    size: int
    scale: float | None
    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    causal_offset: int
    logits_soft_cap: float | None
    quant: str | AttentionQuant | None
    implementation: str | None
    config: AttentionConfig | None


def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: str,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    causal_offset: int = 0,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    quant: str | AttentionQuant | None = None,
    implementation: str | None = None,
    config: AttentionConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention whose sequence is split over a mesh axis; for `jax.shard_map`.

    The same as `dot_product_attention` on the whole sequence: device i of the axis holds the
    queries ``i T ... (i + 1) T - 1`` and the keys ``i S ... (i + 1) S - 1``. Keys and values go
    round the devices, and the partial results are joined by `merge`. The causal order, windows
    and lengths refer to positions in the whole sequence.

    Memory per device: two chunks of keys and values, four in the backward pass, which sends them
    round a second time instead of keeping them. Differentiable in query, key, value and sinks; as
    in `dot_product_attention` the gradient of a quantised variant is that of unquantised
    attention. Under a causal mask the devices do unequal work, as the sequence is split into
    contiguous chunks: the last device computes everything and sets the time.

    A quantised variant takes means and scales from each chunk on its own, so the result differs
    from that of the whole sequence by the variant's rounding error.

    Args:
      query: [B, T, N, H], this device's queries.
      key: [B, S, K, H], this device's keys; equally many on every device.
      value: like `key`.
      axis_name: mesh axis over which the sequence is split.
      scale: factor on the logits; None means ``1 / sqrt(H)``.
      is_causal: allow only ``s <= t + causal_offset``, positions in the whole sequence.
      query_seq_lengths: int32 [B], valid queries of the whole sequence.
      key_value_seq_lengths: int32 [B], valid keys of the whole sequence.
      local_window_size: as in `dot_product_attention`.
      segment_ids: int32 [B, T] when T = S, or a pair ([B, T], [B, S]), of this device's tokens.
      causal_offset: int, position of query 0 among the keys, in tokens.
      logits_soft_cap: as in `dot_product_attention`.
      sinks: float [N], as in `dot_product_attention`; counted once.
      quant: as in `dot_product_attention`.
      implementation: as in `dot_product_attention`, for each chunk.
      config: as in `dot_product_attention`.
      return_residual: also return the log-sum-exp over the whole sequence.

    Returns:
      Output [B, T, N, H] of this device's queries; with `return_residual` a pair with the natural
      log-sum-exp, float32 [B, T, N].

    Raises:
      ValueError: the axis is not in scope, or an argument is wrong as in `dot_product_attention`.
      NotImplementedError: key or value is a QTensor, or the implementation refuses the call.

    >>> mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> whole = jax.P(None, "seq")
    >>> attend = functools.partial(ring_attention, axis_name="seq", is_causal=True)
    >>> x = jnp.ones((1, 8, 2, 4))
    >>> jax.shard_map(attend, mesh=mesh, in_specs=(whole,) * 3, out_specs=whole)(x, x, x).shape
    (1, 8, 2, 4)

    References:
      Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, arXiv 2310.01889.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, jax.Array):
            raise NotImplementedError(
                f"ring_attention takes arrays; {name} is a {type(x).__name__}. Dequantise it first"
            )
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes [B, T, N, H]; got shape {x.shape}")
    if not isinstance(causal_offset, int):
        raise ValueError(f"causal_offset must be an int; got {type(causal_offset).__name__}")
    variant = get_quant(quant)
    if variant is not None and variant.backward == "int8":
        # Rows of dS sum to zero over the whole sequence only, and each chunk has its own mean key.
        raise NotImplementedError(
            f"ring_attention has no INT8 backward for quant={variant.name!r}; use quant='sage2'"
        )
    call = _Call(
        axis_name, _axis_size(axis_name), scale, is_causal, _hashable(local_window_size),
        causal_offset, logits_soft_cap, quant, implementation, config,
    )  # fmt: skip
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    fixed = {"q_ids": pair[0], "q_lengths": query_seq_lengths, "kv_lengths": key_value_seq_lengths}
    arrays = xla.same_axes((query, key, value, pair[1], fixed))
    out, lse = _ring(*arrays, call)
    if sinks is not None:
        sinks = jnp.asarray(sinks, jnp.float32)
        if sinks.shape != query.shape[2:3]:
            raise ValueError(f"sinks must have shape {query.shape[2:3]}; got {sinks.shape}")
        # A sink is a part with a weight and no value.
        sinks = jnp.broadcast_to(sinks, lse.shape)
        out, lse = merge([out, jnp.zeros_like(out)], [lse, sinks])
    return (out, lse) if return_residual else out


def _axis_size(axis_name: str) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name {axis_name!r} is not a mesh axis in scope; call ring_attention inside "
            "jax.shard_map over a mesh with that axis"
        ) from None


def _hashable(window):
    return tuple(window) if isinstance(window, list) else window


def _arguments(call: _Call, source, q_len: int, kv_len: int, kv_ids, fixed) -> dict:
    """Rules of `dot_product_attention` for this device's queries and the keys of `source`."""
    here = lax.axis_index(call.axis_name)
    arguments = {
        "scale": call.scale,
        "is_causal": call.is_causal,
        "local_window_size": call.local_window_size,
        "logits_soft_cap": call.logits_soft_cap,
        "quant": call.quant,
        "config": call.config,
    }
    if call.is_causal or call.local_window_size is not None:
        arguments["causal_offset"] = here * q_len - source * kv_len + call.causal_offset
    if kv_ids is not None:
        arguments["segment_ids"] = (fixed["q_ids"], kv_ids)
    for name, lengths, start, size in (
        ("query_seq_lengths", fixed["q_lengths"], here * q_len, q_len),
        ("key_value_seq_lengths", fixed["kv_lengths"], source * kv_len, kv_len),
    ):
        if lengths is not None:
            arguments[name] = jnp.clip(lengths - start, 0, size)
    return arguments


def _source(call: _Call, step) -> jax.Array:
    """Device whose keys are here after `step` rotations."""
    return (lax.axis_index(call.axis_name) - step) % call.size


def _rotate(call: _Call, tree):
    """Hands everything to the next device of the ring."""
    pairs = [(i, (i + 1) % call.size) for i in range(call.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, call.axis_name, pairs), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(query, key, value, kv_ids, fixed, call: _Call):
    return _ring_fwd(query, key, value, kv_ids, fixed, call)[0]


def _ring_fwd(query, key, value, kv_ids, fixed, call: _Call):
    def attend(step, key, value, kv_ids):
        rules = _arguments(call, _source(call, step), query.shape[1], key.shape[1], kv_ids, fixed)
        return api.dot_product_attention(
            query, key, value, implementation=call.implementation, return_residual=True, **rules
        )

    def body(carry, step):
        (out, lse), keys = carry
        keys = _rotate(call, keys)
        part, part_lse = attend(step, *keys)
        return (merge([out, part.astype(jnp.float32)], [lse, part_lse]), keys), None

    keys = (key, value, kv_ids)
    out, lse = attend(0, *keys)
    start = xla.same_axes(((out.astype(jnp.float32), lse), keys))
    ((out, lse), _), _ = lax.scan(body, start, jnp.arange(1, call.size))
    out = out.astype(query.dtype)
    return (out, lse), (query, key, value, kv_ids, fixed, out, lse)


def _ring_bwd(call: _Call, saved, cotangents):
    """Sends keys, values and their gradients round once more.

    A chunk's probabilities follow from the log-sum-exp of the whole row, so the flash backward of
    a chunk needs nothing from the other devices.
    """
    query, key, value, kv_ids, fixed, out, lse = saved

    def body(carry, step):
        dq, (k, v, ids), (dk, dv) = carry
        rules = _arguments(call, _source(call, step), query.shape[1], key.shape[1], ids, fixed)
        (*_, mask), spec, block_kv = api._prepare(query, k, v, **rules)
        block_kv = block_kv or xla._heuristic_block_kv(spec)
        residuals = xla.same_axes((query, k, v, None, None, mask, out, lse))
        dq_part, dk_part, dv_part, *_ = xla._flash_bwd(spec, block_kv, residuals, cotangents)
        add = lambda x, y: x + y.astype(jnp.float32)  # noqa: E731
        moving = _rotate(call, ((k, v, ids), (add(dk, dk_part), add(dv, dv_part))))
        return (add(dq, dq_part), *moving), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    start = (zeros(query), (key, value, kv_ids), (zeros(key), zeros(value)))
    start = xla.same_axes(start, (query, cotangents))
    (dq, _, (dk, dv)), _ = lax.scan(body, start, jnp.arange(call.size))
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


_ring.defvjp(_ring_fwd, _ring_bwd)
