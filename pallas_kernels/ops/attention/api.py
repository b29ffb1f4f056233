# SPDX-License-Identifier: Apache-2.0
"""The public attention function: checks, dispatch and nothing else."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _device, _dispatch
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import reference, sparse, xla
from pallas_kernels.ops.attention import spec as spec_lib
from pallas_kernels.ops.attention.spec import AttentionConfig, AttentionQuant, AttentionSpec

_DTYPES = ("float32", "bfloat16", "float16")


def dot_product_attention(
    query: jax.Array,
    key: Any,
    value: Any,
    bias: jax.Array | None = None,
    mask: jax.Array | Mask | BlockMask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    causal_offset: int | jax.Array = 0,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    quant: str | AttentionQuant | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
    config: AttentionConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention with the meaning of `jax.nn.dot_product_attention`.

    For each head ``O = softmax(cap(scale * Q K^T) + bias) V`` over the pairs that every rule
    allows, with ``cap(x) = c * tanh(x / c)`` when `logits_soft_cap` is ``c``. Beyond `jax.nn`
    there are segment ids, `causal_offset`, a soft cap, sinks, `Mask` and `BlockMask`, quantised
    variants and QTensor keys and values. It differs from `jax.nn` in three points: a query that may
    attend to nothing gives zeros (not an average), the log-sum-exp is float32 and differentiable,
    and NaN in keys, values or queries that take part in nothing does not spread (quantised
    variants: that some rule by itself lets take part in nothing).

    Memory: "reference" holds all logits; "xla" holds at most one chunk of them, also in the
    gradient. Every implementation is differentiable in query, key, value, bias and sinks;
    quantised variants use the gradient of unquantised attention, "sage_bwd" its own INT8 gradient.
    With a `BlockMask` (and no bias) "xla" works on the listed tiles only, in both directions.
    `jit`, `vmap` and `jax.eval_shape` work.

    A quantised variant shares statistics (mean key, scales) between tokens of a sequence, so a
    later token can change an earlier output by a rounding error even under a causal mask.

    Args:
      query: [B, T, N, H] or [T, N, H]; float32, bfloat16 or float16.
      key: [B, S, K, H] or [S, K, H], same dtype, N a multiple of K; or a QTensor of that shape,
        which is used as it is, without smoothing or quantising again.
      value: like `key`.
      bias: float, three or four dimensions, broadcastable to [B, N, T, S]; added to the logits.
      mask: bool, three or four dimensions, broadcastable to [B, N, T, S], True = attend; or a
        `Mask` or a `BlockMask`.
      scale: factor on the logits, a number; None means ``1 / sqrt(H)``.
      is_causal: allow only ``s <= t + causal_offset``.
      query_seq_lengths: int32 [B], valid queries; later rows give zeros.
      key_value_seq_lengths: int32 [B], valid keys.
      local_window_size: (left, right) tokens, or one int for both; query t sees the keys
        ``t + causal_offset - left`` to ``t + causal_offset + right``.
      segment_ids: int32 [B, T] when T = S, or a pair ([B, T], [B, S]); only equal ids attend.
      causal_offset: position of query 0 among the keys, in tokens; int, or int32 [] or [B].
        0 aligns the top-left corners as `jax.nn` does, ``S - T`` the bottom-right corners.
      logits_soft_cap: positive number or None; applied before the bias.
      sinks: float [N]; a logit per head that joins the softmax without a value. It is part of
        the log-sum-exp.
      quant: None, a name ("sage1", "sage2", "sage2pp", "sage2_int4", "sage3", "fp8", "sage_bwd")
        or an `AttentionQuant`.
      deterministic: demand that repeated runs of one program give the same bits, in the gradient
        too. The kernels of "mosaic" always do; "xla" and "reference" do on a CPU, and on a GPU
        under ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``. Otherwise the call is refused, or its
        gradient where only that would be XLA's.
      implementation: None (best available), "mosaic", "xla" or "reference".
      config: sizes for the chosen implementation.
      return_residual: also return the log-sum-exp.

    Returns:
      Output of the shape and dtype of `query`; with `return_residual` a pair with the natural
      log-sum-exp of the logits, float32 [B, T, N] or [T, N], -inf where nothing is attended.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message has the numbers.
      NotImplementedError: the named implementation does not serve this call.

    >>> q = jnp.ones((1, 3, 4, 8))
    >>> kv = jnp.ones((1, 5, 2, 8))
    >>> out = dot_product_attention(q, kv, kv, is_causal=True, causal_offset=2)
    >>> out.shape, bool(jnp.allclose(out, 1.0))
    ((1, 3, 4, 8), True)

    References:
      Dao, FlashAttention-2, arXiv 2307.08691; Zhang et al., SageAttention, arXiv 2410.02367,
      SageAttention2, arXiv 2411.10958, SageAttention3, arXiv 2505.11594.
    """
    batched = jnp.ndim(query) == 4
    call, spec, block_kv = _prepare(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        causal_offset=causal_offset,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        quant=quant,
        config=config,
        deterministic=deterministic,
    )
    name = _dispatch.resolve("attention", implementation, _reasons(spec))
    out, lse = _run(*call, spec=spec, name=name, block_kv=block_kv)
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


@functools.partial(jax.jit, static_argnames=("spec", "name", "block_kv"))
def _run(query, key, value, bias, sinks, rules, *, spec, name, block_kv):
    """One compiled call, so that use outside `jit` does not pay for every small operation."""
    int8_backward = spec.quant is not None and spec.quant.backward == "int8"
    if name == "xla" and bias is None and (isinstance(rules, BlockMask) or int8_backward):
        rules = sparse.whole(rules, spec) if isinstance(rules, Mask) else rules
        return sparse.attention(query, key, value, sinks, rules, spec)[:2]
    if name == "mosaic":
        from pallas_kernels.ops.attention import mosaic_sm90  # needs Mosaic: not at import time

        return mosaic_sm90.attention(query, key, value, bias, sinks, rules, spec, block_kv)
    rules = rules.as_mask() if isinstance(rules, BlockMask) else rules
    if name == "reference":
        return reference.attention(query, key, value, bias, sinks, rules, spec)
    return xla.attention(query, key, value, bias, sinks, rules, spec, block_kv)


def explain(*args, implementation: str | None = None, **kwargs) -> _dispatch.Explanation:
    """Says which implementation `dot_product_attention` would use, without running it.

    Args:
      *args: as for `dot_product_attention`; `jax.ShapeDtypeStruct` will do for arrays.
      implementation: as there.
      **kwargs: as there.

    Returns:
      The choice, the rejected candidates with their reasons, and notes.

    Raises:
      ValueError: the call itself is wrong.

    >>> x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.bfloat16)
    >>> explain(x, x, x, quant="sage2", implementation="xla").notes[1]
    'the gradient is the unquantised flash backward, from the saved log-sum-exp'
    """
    kwargs.pop("return_residual", None)
    spec = spec_of(*args, **kwargs)
    choice = _dispatch.choose("attention", implementation, _reasons(spec))
    notes = () if choice.implementation is None else spec_lib.notes(spec, choice.implementation)
    return _dispatch.Explanation("attention", choice.implementation, choice.rejected, notes)


_dispatch.register_explainer("attention", explain)


def spec_of(*args, **kwargs) -> AttentionSpec:
    """The static facts of a call, from shapes alone.

    Args:
      *args: as for `dot_product_attention`; `jax.ShapeDtypeStruct` will do for arrays.
      **kwargs: as there, without `implementation` and `return_residual`.

    Returns:
      An `AttentionSpec`.

    Raises:
      ValueError: the call itself is wrong.
    """
    found = []

    def trace(arrays, static):
        names, leaves = static
        merged = jax.tree.unflatten(
            names, [a if s is _ARRAY else s for a, s in zip(arrays, leaves, strict=True)]
        )
        found.append(_prepare(*merged[0], **merged[1])[1])

    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
    arrays = [x if yes else None for x, yes in zip(leaves, is_array, strict=True)]
    static = [_ARRAY if yes else x for x, yes in zip(leaves, is_array, strict=True)]
    jax.eval_shape(lambda a: trace(a, (tree, static)), arrays)
    return found[0]


_ARRAY = object()


def _reasons(spec: AttentionSpec) -> dict[str, str | None]:
    device = _device.current_device()
    return {
        name: spec_lib.unsupported_reason(spec, device, name) for name in spec_lib.IMPLEMENTATIONS
    }


# -- validation --------------------------------------------------------------------------------


def _prepare(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    segment_ids=None,
    causal_offset=0,
    logits_soft_cap=None,
    sinks=None,
    quant=None,
    config=None,
    deterministic=False,
):
    """Checks everything; returns the arrays in one fixed form, the spec, and the chunk size."""
    quant = spec_lib.get_quant(quant)
    q, k, v = _arrays(query, key, value, quant)
    b, t, n, h = q.shape
    s = k.shape[1]
    bias = _pairs("bias", bias, (b, n, t, s))
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias must be floating point; got {bias.dtype}. Is it a mask?")
    rules = _rules(
        mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
        segment_ids, causal_offset, (b, n, t, s),
    )  # fmt: skip
    if sinks is not None:
        sinks = jnp.asarray(sinks)
        if sinks.shape != (n,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
            raise ValueError(
                f"sinks must be a floating-point array of shape ({n},), one per query head; "
                f"got shape {sinks.shape} and dtype {sinks.dtype}"
            )
    if not isinstance(deterministic, bool):
        raise ValueError(f"deterministic must be True or False; got {deterministic!r}")
    if config is not None and not isinstance(config, AttentionConfig):
        raise ValueError(f"config must be an AttentionConfig or None; got {type(config).__name__}")
    spec = AttentionSpec(
        batch=b,
        q_len=t,
        kv_len=s,
        num_heads=n,
        num_kv_heads=k.shape[2],
        head_dim=h,
        dtype=str(q.dtype),
        scale=_number("scale", scale, 1.0 / math.sqrt(h)),
        soft_cap=_number("logits_soft_cap", logits_soft_cap, None, positive=True),
        quant=quant,
        quantized_key=_is_qtensor(key),
        quantized_value=_is_qtensor(value),
        has_bias=bias is not None,
        has_sinks=sinks is not None,
        mask_kinds=_kinds(rules),
        tiles=(rules.block_q, rules.block_kv) if isinstance(rules, BlockMask) else None,
        deterministic=deterministic,
    )
    return (q, k, v, bias, sinks, rules), spec, None if config is None else config.block_kv


def _is_qtensor(x) -> bool:
    return hasattr(x, "qvalue") and hasattr(x, "dequantize")


def _arrays(query, key, value, quant):
    """Query, key and value as [B, ., ., H] arrays of one dtype."""
    q = jnp.asarray(query)
    if str(q.dtype) not in _DTYPES:
        raise ValueError(f"query dtype must be one of {', '.join(_DTYPES)}; got {q.dtype}")
    if q.ndim not in (3, 4):
        raise ValueError(f"query must be [B, T, N, H] or [T, N, H]; got shape {q.shape}")
    out = {"query": q}
    for name, x in (("key", key), ("value", value)):
        if _is_qtensor(x):
            # A quantised variant takes the codes exactly; full precision rounds to its dtype.
            x = x.dequantize(q.dtype if quant is None else jnp.float32)
            if quant is not None and x.ndim == q.ndim:
                out[name] = x
                continue
        x = jnp.asarray(x)
        if x.ndim != q.ndim:
            form = "[B, S, K, H]" if q.ndim == 4 else "[S, K, H]"
            raise ValueError(f"{name} must be {form} like query {q.shape}; got shape {x.shape}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} dtype must equal query dtype {q.dtype}; got {x.dtype}")
        out[name] = x
    q, k, v = (x if x.ndim == 4 else x[None] for x in out.values())
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"key has batch size {k.shape[0]}; query has {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"key has head_dim {k.shape[3]}; query has {q.shape[3]}")
    if v.shape != k.shape:
        raise ValueError(f"value must have the shape of key, {k.shape}; got {v.shape}")
    if 0 in k.shape or 0 in q.shape:
        raise ValueError(f"no dimension may be 0; query is {q.shape}, key is {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"key has {k.shape[2]} heads; query heads ({q.shape[2]}) must be a multiple of it"
        )
    return q, k, v


def _pairs(name, x, full):
    """A bias or mask as [B or 1, N or 1, T or 1, S or 1]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions (NTS or BNTS); got shape {x.shape}")
    x = x if x.ndim == 4 else x[None]
    if any(have not in (1, want) for have, want in zip(x.shape, full, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to [B, N, T, S] = {list(full)}; got shape {x.shape}"
        )
    return x


def _number(name, x, default, positive=False):
    if x is None:
        return default
    if isinstance(x, jax.Array | jax.core.Tracer) or not isinstance(
        x, numbers.Real | np.floating | np.integer
    ):
        if hasattr(x, "shape") and not isinstance(x, np.ndarray):
            raise NotImplementedError(
                f"{name} must be a Python number, since kernels compile it in; got an array. "
                "Multiply the query by an array-valued scale instead"
            )
        raise ValueError(f"{name} must be a number; got {type(x).__name__}")
    if not math.isfinite(x) or (positive and x <= 0):
        raise ValueError(f"{name} must be finite{' and positive' * positive}; got {x}")
    return float(x)


def _rules(
    mask, is_causal, q_lengths, kv_lengths, local_window_size, segment_ids, causal_offset, full
) -> Mask | BlockMask:
    """All rules of a call as one `Mask`, or as one `BlockMask` where the user gave one."""
    b, _, t, s = full
    offset = _offset(causal_offset, b)
    rules = _user_mask(mask, full)
    if is_causal:
        rules &= Mask.causal(offset)
    if local_window_size is not None:
        rules &= Mask.window(*_window(local_window_size), offset)
    for name, x in (("query_seq_lengths", q_lengths), ("key_value_seq_lengths", kv_lengths)):
        if x is None:
            continue
        x = jnp.asarray(x)
        if x.shape != (b,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be an integer array of shape ({b},); "
                f"got shape {x.shape} and dtype {x.dtype}"
            )
        rules &= Mask.lengths(x, None) if name[0] == "q" else Mask.lengths(None, x)
    if segment_ids is not None:
        rules &= Mask.segment_ids(*_segments(segment_ids, b, t, s))
    return rules


def _user_mask(mask, full) -> Mask | BlockMask:
    b, n, t, s = full
    if mask is None:
        return Mask()
    if isinstance(mask, BlockMask):
        if (mask.q_len, mask.kv_len) != (t, s):
            raise ValueError(
                f"mask was made for T={mask.q_len}, S={mask.kv_len}; query and key have "
                f"T={t}, S={s}"
            )
        _check_heads((mask.kv_num_blocks,), b, n)
        if mask.mask is not None:
            _user_mask(mask.mask, full)
        return mask
    if isinstance(mask, Mask):
        mask.check(t, s)
        _check_heads((*mask.arrays, *(tile_map for tile_map, _, _ in mask.tiles)), b, n)
        for each in (each for masks in mask.unions for each in masks):
            _user_mask(each, full)
        return mask
    mask = _pairs("mask", mask, full)
    return Mask.from_array(mask)


def _check_heads(arrays, b, n):
    for x in arrays:
        if x.shape[0] not in (1, b) or x.shape[1] not in (1, n):
            raise ValueError(f"mask must have batch 1 or {b} and heads 1 or {n}; got {x.shape}")


def _offset(offset, b):
    if isinstance(offset, int | np.integer) and not isinstance(offset, bool):
        return int(offset)
    offset = jnp.asarray(offset)
    if offset.shape not in ((), (b,)) or not jnp.issubdtype(offset.dtype, jnp.integer):
        raise ValueError(
            f"causal_offset must be an integer, or an integer array of shape () or ({b},); "
            f"got shape {offset.shape} and dtype {offset.dtype}"
        )
    return offset


def _window(size) -> tuple[int, int]:
    if isinstance(size, int | np.integer):
        size = (size, size)
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(x, int | np.integer) and x >= 0 for x in size)
    ):
        raise ValueError(
            f"local_window_size must be an int or (left, right), each >= 0 tokens; got {size!r}"
        )
    return int(size[0]), int(size[1])


def _segments(ids, b, t, s):
    pair = ids if isinstance(ids, tuple | list) else (ids, ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids must be one array or a pair of arrays; got {len(pair)}")
    q_ids, kv_ids = (jnp.asarray(x) for x in pair)
    for name, x, length in (("query", q_ids, t), ("key", kv_ids, s)):
        if x.shape != (b, length) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids of the {name} must be an integer array of shape ({b}, {length}); "
                f"got shape {x.shape} and dtype {x.dtype}"
            )
    return q_ids, kv_ids


def _kinds(mask: Mask | BlockMask) -> tuple[str, ...]:
    if isinstance(mask, BlockMask):
        inside = () if mask.mask is None else _kinds(mask.mask)
        return (*inside, "tiles")
    present = {
        "min_diff": mask.min_diff is not None,
        "max_diff": mask.max_diff is not None,
        "query lengths": mask.q_lengths is not None,
        "key lengths": mask.kv_lengths is not None,
        "segments": bool(mask.segments),
        "array": bool(mask.arrays),
        "tiles": bool(mask.tiles),
        "predicate": bool(mask.predicates),
        "union": bool(mask.unions),
        "several segments": len(mask.segments) > 1,
    }
    return tuple(name for name, yes in present.items() if yes)
