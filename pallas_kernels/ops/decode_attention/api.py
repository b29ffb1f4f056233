# SPDX-License-Identifier: Apache-2.0
"""Public entry: attention over a cache, merging of partial results, appending to a store."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._device import current_device
from pallas_kernels._dispatch import Explanation, choose, register_explainer, resolve
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.attention.partition import partitioned
from pallas_kernels.ops.decode_attention import reference, xla
from pallas_kernels.ops.decode_attention.spec import (
    IMPLEMENTATIONS,
    DecodeSpec,
    has_nvfp4_scales,
    has_plain_scales,
    unmeasured_reason,
    unsupported_reason,
)
from pallas_kernels.ops.quantize.api import quantize


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _mosaic(query, key, value, length, positions, query_positions, table, offset, sinks, spec):
    """The kernel on each device's own batch entries and heads; its gradient is that of "xla"."""
    from pallas_kernels.ops.decode_attention import mosaic_sm90  # needs Mosaic: not at import time

    call = partitioned(mosaic_sm90.attention, _dimensions)
    return call(
        query, key, value, length, positions, query_positions, table, offset, sinks, spec
    )  # fmt: skip


def _mosaic_forward(*args):
    *arrays, _ = args
    return _mosaic(*args), arrays


def _mosaic_backward(spec, arrays, cotangents):
    query, key, value, length, positions, *rest = arrays
    positions = _slot_numbers(spec) if positions is None else positions
    run = functools.partial(xla.attention, spec=spec)
    pull = jax.vjp(run, query, key, value, length, positions, *rest)[1]
    grads = list(pull(cotangents))
    grads[4] = None if arrays[4] is None else grads[4]
    return tuple(grads)


_mosaic.defvjp(_mosaic_forward, _mosaic_backward)


def _dimensions(tree) -> list[tuple[str, ...]]:
    """Names of the axes of every leaf, for `partitioned`: heads of a pool share its tiles."""
    *_, table, _, _ = tree
    home = "k" if table is None else "."
    names = (
        ("b", "t", "n", "h"), ("b", home, "s", "h"), ("b", home, "s", "h"), ("b", "k"),
        ("b", home, "."), ("b", "."), ("b", "k", "."), ("b", "k", ".", "h"), ("n",),
    )  # fmt: skip
    found = []
    for part, dims in zip(tree, names, strict=True):
        if isinstance(part, QTensor):  # codes may be packed, scales are one per slot
            dims = (*dims[:2], ".", ".")
        found += [dims] * len(jax.tree.leaves(part))
    return found


def _slot_numbers(spec: DecodeSpec) -> jax.Array:
    shape = (spec.batch, spec.num_kv_heads, spec.capacity)
    return jnp.broadcast_to(jnp.arange(spec.capacity), shape)


_RUN = {"mosaic": _mosaic, "xla": xla.attention, "reference": reference.attention}


def decode_attention(
    query: jax.Array,
    key: jax.Array | QTensor,
    value: jax.Array | QTensor,
    length: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    table: jax.Array | None = None,
    key_offset: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    local_window_size: int | None = None,
    num_sinks: int = 0,
    split: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends one or a few new tokens to a cache that already holds them.

    ``out = softmax(cap(scale Q (K + offset)^T) | visible) V`` and its log-sum-exp, where a slot is
    visible if it is live (below ``length``), not after the query, and inside the window. The cache
    is read in its stored width: no dequantised copy of more than one split exists. Partial results
    of the splits, and of several caches with :func:`merge_attention`, join by their log-sum-exp.
    "xla" and "reference" are differentiable by jax; the gradient of "mosaic" is that of "xla".
    With inputs sharded over batch or heads each device computes its own; tiles of a pool stay
    whole over heads.

    Args:
      query: [B, T, N, H], floating.
      key: [B, K, C, H], heads before slots, as caches store it: an array, or a QTensor whose
        scales belong to single slots. With `table` a pool [B, P, t, H] of tiles.
      value: as `key`.
      length: int32 [B, K] or [B], live slots; None: all C.
      positions: int32 [B, K, C] (pool: [B, P, t]), logical position of each slot, -1 for none;
        None: ``0 … C-1``. Heads may hold different tokens.
      query_positions: int32 [B, T], -1 for no query; None: the last T of the positions
        ``0 … length-1`` (then all heads of a row must have one length).
      table: int32 [B, K, M], the tiles of each head in order, -1 for none; None: no tiles.
      key_offset: float [B, K, 1, H], added to every key (keys stored without their mean).
      sinks: float [N], a logit per head that takes part in the softmax and has no value.
      scale: factor on the logits; None: ``H ** -0.5``.
      logits_soft_cap: ``cap * tanh(x / cap)`` of the scaled logits.
      local_window_size: tokens that a query sees, itself included; None: all before it.
      num_sinks: first positions that the window does not hide.
      split: cached tokens per split (a multiple of the tile); None chooses.
      implementation: None, "xla", "reference" or "mosaic".

    Returns:
      Output [B, T, N, H] in the dtype of `query`, and log-sum-exp float32 [B, T, N]; zeros and -inf
      for a query that sees nothing.

    Raises:
      ValueError: shapes do not fit or a number is out of range.
      NotImplementedError: the implementation does not serve the call, or a QTensor's scale spans
        several slots.

    >>> q, kv = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4))
    >>> out, lse = decode_attention(q, kv, kv, jnp.array([2]))
    >>> out[0, 0, 0].tolist(), round(float(lse[0, 0, 0]) - 2.0, 4)  # log 2 and a logit of 2
    ([1.0, 1.0, 1.0, 1.0], 0.6931)

    References: Flash-Decoding (Dao et al., 2023); FlashInfer (arXiv 2501.01005), section 3 (merge
    of attention states); PagedAttention (arXiv 2309.06180), section 4.
    """
    spec = _spec(
        query, key, value, table, scale, logits_soft_cap, local_window_size, num_sinks, split
    )
    name = resolve("decode_attention", implementation, _reasons(spec, implementation))
    batch, heads = spec.batch, spec.num_kv_heads
    length = _length(length, spec)
    if query_positions is None:
        if positions is not None:
            raise ValueError("query_positions is None; with positions they are needed, [B, T]")
        query_positions = jnp.max(length, axis=1)[:, None] - spec.q_len + jnp.arange(spec.q_len)
    if positions is None and table is not None:
        raise ValueError("positions is None; a paged cache needs them, [B, P, t]")
    if positions is None and name != "mosaic":  # the kernel counts slots instead of reading them
        positions = _slot_numbers(spec)
    if positions is not None:
        stored = (batch, heads, spec.capacity) if table is None else (*key.shape[:3],)
        _expect("positions", positions, stored)
    _expect("query_positions", query_positions, (batch, spec.q_len))
    if key_offset is not None:
        _expect("key_offset", key_offset, (batch, heads, 1, spec.head_dim))
    if sinks is not None:
        _expect("sinks", sinks, (spec.num_heads,))
    return _RUN[name](
        query, key, value, length, positions, query_positions, table, key_offset, sinks, spec
    )


def merge_attention(
    outs: tuple[jax.Array, ...], lses: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint caches, such as a compressed context and a dense tail.

    ``out = Σ_i exp(lse_i - lse) out_i`` with ``lse = log Σ_i exp(lse_i)``.

    Args:
      outs: arrays [B, T, N, H], one per cache, from :func:`decode_attention`.
      lses: float32 [B, T, N] each.

    Returns:
      Output in the dtype of the first, and log-sum-exp.

    Raises:
      ValueError: no part, or unequal numbers of them.

    >>> x = jnp.ones((1, 1, 1, 2))
    >>> merge_attention((x, 3 * x), (jnp.zeros((1, 1, 1)),) * 2)[0].tolist()
    [[[[2.0, 2.0]]]]

    References: FlashInfer (arXiv 2501.01005), section 2.2.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs has {len(outs)} parts and lses {len(lses)}; expected as many, 1 or more"
        )
    out, lse = xla.merge(jnp.stack([x.astype(jnp.float32) for x in outs]), jnp.stack(lses))
    return out.astype(outs[0].dtype), lse


def append_tokens(store: jax.Array | QTensor, new: jax.Array, slots: jax.Array):
    """Quantises new tokens as a store does and writes them, in one fused pass over the tokens.

    Nothing already stored is read or rescaled: every token and head has its own scales.

    Args:
      store: [B, K, C, H], an array or a QTensor (packed or not) with scales per slot.
      new: floating [B, K, T, H].
      slots: int32 [B, K, T], where to write; C or more writes nothing.

    Returns:
      The store with the tokens written, in the same format.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: a QTensor's scale spans several slots.

    >>> empty = quantize(jnp.zeros((1, 1, 2, 4)), "int8", axis=-1)
    >>> got = append_tokens(empty, jnp.full((1, 1, 1, 4), 2.0), jnp.array([[[1]]]))
    >>> got.dequantize()[0, 0].tolist()
    [[0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]

    References: KIVI (arXiv 2402.02750), section 3 (quantised as tokens arrive).
    """
    batch, heads, _, head_dim = store.shape
    _expect("new", new, (batch, heads, slots.shape[-1], head_dim))
    _expect("slots", slots, (batch, heads, slots.shape[-1]))
    codes = new
    if isinstance(store, QTensor):
        _check_store("store", store)
        options = {"asymmetric": store.zero_point is not None}
        if store.scale.dtype == jnp.float8_e4m3fn:
            options = {"two_level": False}  # a scale of the whole store would change with a token
        tile = head_dim // store.scale.shape[-1]
        codes = quantize(new.astype(jnp.float32), store.qtype, axis=-1, tile=tile, **options)
        codes = codes if store.packed_axis is None else codes.pack(store.packed_axis)
    rows = jnp.arange(batch)[:, None, None]
    columns = jnp.arange(heads)[None, :, None]

    def write(old, fresh):
        return old.at[rows, columns, slots].set(fresh.astype(old.dtype), mode="drop")

    return jax.tree.map(write, store, codes)


def explain(*args, **kwargs) -> Explanation:
    """Says which implementation a call of `decode_attention` would use, from shapes alone.

    Args:
      *args: arguments of `decode_attention`; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: its keyword arguments.

    Returns:
      An `Explanation`.
    """
    implementation = kwargs.pop("implementation", None)
    names = ("scale", "logits_soft_cap", "local_window_size", "num_sinks", "split")
    numbers = {"num_sinks": 0} | {name: kwargs[name] for name in names if name in kwargs}
    arrays = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    spec = _spec(
        *(arrays[name] for name in ("query", "key", "value")),
        kwargs.get("table"),
        *(numbers.get(name) for name in names),
    )
    return choose("decode_attention", implementation, _reasons(spec, implementation))


register_explainer("decode_attention", explain)


def _reasons(spec: DecodeSpec, implementation: str | None) -> dict[str, str | None]:
    device = current_device()
    reasons = {name: unsupported_reason(spec, device, name) for name in IMPLEMENTATIONS}
    if implementation is None:
        reasons["mosaic"] = reasons["mosaic"] or unmeasured_reason(spec)
    return reasons


def _spec(query, key, value, table, scale, soft_cap, window, num_sinks, split) -> DecodeSpec:
    """Checks shapes and numbers; returns the static facts."""
    if len(query.shape) != 4 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"query has shape {query.shape} and dtype {query.dtype}; expected floating [B, T, N, H]"
        )
    batch, steps, num_heads, head_dim = query.shape
    for name, store in (("key", key), ("value", value)):
        if len(store.shape) != 4 or store.shape[0] != batch or store.shape[3] != head_dim:
            layout = "[B, K, C, H]" if table is None else "[B, P, t, H]"
            raise ValueError(
                f"{name} has shape {store.shape}; expected {layout} with B = {batch} and "
                f"H = {head_dim}"
            )
        if isinstance(store, QTensor):
            _check_store(name, store)
        elif not jnp.issubdtype(store.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating or a QTensor; got dtype {store.dtype}")
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}; expected that of key, {key.shape}")
    if table is not None and (len(table.shape) != 3 or table.shape[0] != batch):
        raise ValueError(f"table has shape {table.shape}; expected [B, K, M] with B = {batch}")
    tile = 0 if table is None else key.shape[2]
    num_kv_heads = key.shape[1] if table is None else table.shape[1]
    capacity = key.shape[2] if table is None else table.shape[2] * tile
    if num_heads % num_kv_heads:
        raise ValueError(
            f"key has {num_kv_heads} heads; query heads ({num_heads}) must be a multiple of it"
        )
    if window is not None and window < 1:
        raise ValueError(f"local_window_size={window}; expected 1 or more tokens, or None")
    if num_sinks < 0:
        raise ValueError(f"num_sinks={num_sinks}; expected 0 or more positions")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"logits_soft_cap={soft_cap}; expected a positive number or None")
    if split is not None and (split < 1 or (tile and split % tile)):
        raise ValueError(f"split={split}; expected 1 or more tokens, a multiple of the tile {tile}")
    return DecodeSpec(
        batch=batch,
        q_len=steps,
        capacity=capacity,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=str(query.dtype),
        store=key.qtype if isinstance(key, QTensor) else str(key.dtype),
        scale=float(head_dim**-0.5 if scale is None else scale),
        split=split,
        tile=tile,
        soft_cap=soft_cap,
        window=window,
        num_sinks=num_sinks,
        plain=_is_plain(key, value),
    )


def _is_plain(key, value) -> bool:
    """Whether both are stored alike and as the field `plain` of `DecodeSpec` says."""
    if not (isinstance(key, QTensor) and isinstance(value, QTensor)):
        return not isinstance(key, QTensor) and key.dtype == value.dtype
    kinds = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), store) for store in (key, value)]
    return kinds[0] == kinds[1] and (has_plain_scales(key) or has_nvfp4_scales(key))


def _length(length, spec: DecodeSpec) -> jax.Array:
    shape = (spec.batch, spec.num_kv_heads)
    if length is None:
        return jnp.full(shape, spec.capacity, jnp.int32)
    length = jnp.asarray(length)
    if length.shape not in (shape, shape[:1]):
        raise ValueError(f"length has shape {length.shape}; expected {shape} or {shape[:1]}")
    return jnp.broadcast_to(length[:, None] if length.ndim == 1 else length, shape)


def _check_store(name: str, store: QTensor) -> None:
    if store.tensor_scale is not None or store.scale.shape[:3] != store.qvalue.shape[:3]:
        raise NotImplementedError(
            f"{name} has scales of shape {store.scale.shape} for codes {store.qvalue.shape}"
            f"{' and a scale of the tensor' if store.tensor_scale is not None else ''}; served are "
            "scales along the head of every slot, as quantize(x, qtype, axis=-1) makes them"
        )


def _expect(name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(shape)}")
