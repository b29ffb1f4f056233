# SPDX-License-Identifier: Apache-2.0
"""Attention on Hopper: what the kernel serves, and what surrounds it.

The kernel itself is in ``mosaic_sm90_kernel``, its arithmetic in ``mosaic_sm90_tile``, its sizes
and schedule in ``mosaic_sm90_plan``.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels._device import current_device, xla_is_deterministic
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import mosaic_sm90_backward as backward
from pallas_kernels.ops.attention import mosaic_sm90_backward_int8 as backward_int8
from pallas_kernels.ops.attention import quant as numerics
from pallas_kernels.ops.attention import sparse, xla
from pallas_kernels.ops.attention.mosaic_sm90_kernel import launch
from pallas_kernels.ops.attention.mosaic_sm90_plan import (
    SMEM_LIMIT,
    Config,
    Plan,
    bounds,
    dynamic_tiles,
    heuristic,
    listed_tiles,
    listed_work,
    work_table,
)
from pallas_kernels.ops.attention.mosaic_sm90_tile import ROWS, Variant
from pallas_kernels.ops.attention.partition import partitioned, partitioned_gradient
from pallas_kernels.ops.attention.reference import clean
from pallas_kernels.ops.attention.spec import ANY_ORDER, AttentionSpec
from pallas_kernels.ops.quantize.mosaic_sm90 import HEAD_DIMS, AttentionOperands, quantize_qkv


def attention_forward(
    operands: AttentionOperands,
    *,
    q_len: int,
    kv_len: int,
    scale: float,
    mask: Mask | BlockMask | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    out_dtype=jnp.bfloat16,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention on operands as the kernel reads them.

    Args:
        operands: from `quantize_qkv`, or 16-bit arrays without scales. Q may stay 16-bit beside an
            8-bit K: the kernel then quantises it.
        q_len: T.
        kv_len: S.
        scale: positive factor on the logits.
        mask: bounds, lengths and at most one pair of segment ids; or a `BlockMask` with such a
            token rule, of which only listed tiles are visited.
        soft_cap: bound of the logits, or None.
        sinks: float32 [N], or None.
        out_dtype: bfloat16 or float16.
        config: tiles and schedule; None is `heuristic`.

    Returns:
        Output [B, T, N, H], and the natural log-sum-exp, float32 [B, N, T], with what smoothing
        took away where the operands have it. Rows with nothing to attend are 0 and -inf.

    Raises:
        ValueError: the scales of K do not cover whole tiles.
        NotImplementedError: shared memory does not suffice, or the tiles of the `BlockMask` are not
            whole tiles of the kernel.
    """
    blocks = mask if isinstance(mask, BlockMask) else None
    mask = _token_rule(mask)
    formats = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.float8_e4m3fn): "e4m3"}
    qk, pv = (formats.get(x.dtype, "half") for x in (operands.k, operands.v))
    variant = Variant(qk, pv, str(jnp.dtype(out_dtype)), soft_cap)
    config = config or _config(variant, operands.q.shape[-1], mask, blocks)
    config = dataclasses.replace(config, fuse_q=operands.q.dtype != operands.k.dtype)
    plan = _plan(operands, config, variant, mask, q_len, kv_len, blocks)
    arrays = {"q": _whole(operands.q), "k": _whole(operands.k)}
    arrays["v"] = _whole(operands.v) if pv == "half" else operands.v
    if blocks is None:
        arrays["order"] = jnp.asarray(work_table(plan))
    else:
        arrays["order"] = listed_work(blocks, plan)
        arrays |= {"list": blocks.kv_indices, "ranges": listed_tiles(blocks, plan)}
        if plan.paired and blocks.kv_indices.shape[2] % 2:  # a second warpgroup without queries
            pad = ((0, 0), (0, 0), (0, 1), (0, 0))
            arrays |= {name: jnp.pad(arrays[name], pad) for name in ("list", "ranges")}
    names = ("q_scale", "k_scale", "v_scale", "row_const", *(("k_mean",) * plan.raw_q))
    for name in names:
        if getattr(operands, name) is not None:
            arrays[name] = getattr(operands, name)
    if sinks is not None:
        arrays["sinks"] = sinks.astype(jnp.float32)
    if plan.dynamic:
        arrays["bounds"] = bounds(mask, plan)
    if plan.dynamic and blocks is None:
        arrays["tiles"] = dynamic_tiles(mask, plan)
    if plan.segmented:
        pads = (plan.q_tiles * config.block_q, pl.cdiv(kv_len, config.block_kv) * config.block_kv)
        for name, ids, size in zip(("q_ids", "kv_ids"), mask.segments[0], pads, strict=True):
            arrays[name] = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, size - ids.shape[1])))
    return launch(plan, arrays, scale, out_dtype)


def _whole(x):
    """Tokens rounded up to 8, the height of the tiles in which they are copied.

    Quantised operands are whole already; 16-bit arrays of other lengths cost a copy.
    """
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x


def _token_rule(mask: Mask | BlockMask | None) -> Mask:
    """The rule for single pairs; what a block mask lists comes apart from it."""
    rule = mask.mask if isinstance(mask, BlockMask) else mask
    return Mask() if rule is None else rule


def _config(variant: Variant, head_dim: int, rule: Mask, blocks, block_kv=None) -> Config:
    """The heuristic's sizes, with whole tiles of a block mask if there is one."""
    config = heuristic(variant, head_dim, bool(rule.segments), block_kv)
    if blocks is None:
        return config
    own, tile_kv = blocks.block_q < config.block_q, blocks.block_kv
    # Two small tiles make up one of the size that is fastest; lists of one warpgroup stay single.
    if not own:
        tile_kv = max(tile_kv, min(2 * tile_kv, config.block_kv))
    config = heuristic(variant, head_dim, bool(rule.segments), tile_kv)
    # A warpgroup with few tiles of its own would wait for the other's token at each tile.
    return dataclasses.replace(config, schedule="none") if own else config


def _plan(operands, config, variant, mask: Mask, q_len, kv_len, blocks=None) -> Plan:
    """Static facts of a launch."""
    tile_kv = config.block_kv
    if blocks is not None:
        tile_kv, halves = blocks.block_kv, (blocks.block_q, config.num_compute) == (ROWS, 2)
        joined = config.block_kv // tile_kv
        if (
            (blocks.block_q % config.block_q and not halves)
            or joined not in ((1,) if halves else (1, 2))
            or config.block_kv % tile_kv
        ):
            raise NotImplementedError(
                f"a tile of {blocks.block_q} x {tile_kv} must be one of the kernel's, "
                f"{config.block_q} x {config.block_kv}, several below each other, half of its keys "
                "or one warpgroup's rows"
            )
    batch, _, num_heads, head_dim = operands.q.shape
    keys, num_kv_heads = operands.k.shape[1:3]
    scale_block = tile_kv
    if operands.k_scale is not None:
        scale_block = keys // operands.k_scale.shape[2]
        if tile_kv % scale_block or keys % tile_kv:
            raise ValueError(
                f"the scales of K must cover whole tiles of block_kv={tile_kv} keys; got "
                f"{operands.k_scale.shape[2]} blocks of {scale_block} keys"
            )
    limits = (mask.min_diff, mask.max_diff)
    static = [x if isinstance(x, int | np.integer) else None for x in limits]
    bounded = tuple(x is not None for x in limits)
    # Everything known now becomes constants of the kernel; else all of it comes as arrays.
    dynamic = mask.q_lengths is not None or mask.kv_lengths is not None or bool(mask.segments)
    dynamic |= any(x is not None and y is None for x, y in zip(limits, static, strict=True))
    return Plan(
        config, variant, batch, q_len, kv_len, num_heads, num_kv_heads, head_dim, scale_block,
        *static, bounded, dynamic, bool(mask.segments),
        0 if blocks is None else blocks.block_q,
        config.block_kv // tile_kv,
    )  # fmt: skip


# -- the implementation that the dispatcher calls --------------------------------------------------

_MASKS = ("min_diff", "max_diff", "query lengths", "key lengths", "segments", "tiles")
_REFUSED = {
    "array": "mask arrays; use Mask rules (causal, window, lengths, segment ids)",
    "several segments": "more than one pair of segment_ids",
}


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why this kernel cannot serve a call on sm90, or None when it can.

    Args:
        spec: the call.

    Returns:
        One sentence, or None.
    """
    if spec.dtype not in ("bfloat16", "float16"):
        return f"the sm90 kernel takes bfloat16 or float16; got {spec.dtype}"
    if spec.head_dim > max(HEAD_DIMS):
        return f"the sm90 kernel takes head_dim up to {max(HEAD_DIMS)}; got {spec.head_dim}"
    if spec.scale <= 0:
        return f"the sm90 kernel scales after the maximum: scale must be positive; got {spec.scale}"
    if spec.has_bias:
        return "the sm90 kernel does not take a bias"
    for kind in spec.mask_kinds:
        if kind not in _MASKS:
            return f"the sm90 kernel does not take {_REFUSED.get(kind, f'{kind} masks')}"
    if spec.quantized_key or spec.quantized_value:
        return "the sm90 kernel quantises K and V itself; QTensor keys or values need 'xla'"
    reason = None if spec.quant is None else _quant_reason(spec.quant, spec.dtype)
    return reason or _tiles_reason(spec)


def _tiles_reason(spec: AttentionSpec) -> str | None:
    """The same for the tiles of a block mask."""
    kinds = spec.mask_kinds
    if kinds.count("tiles") > (spec.tiles is not None):
        return "the sm90 kernel takes a map of tiles only as one BlockMask, not inside a Mask"
    if spec.tiles is None:
        return None
    block_q, block_kv = spec.tiles
    if (block_q != 64 and block_q % 128) or block_kv not in (64, 128, 256):
        return (
            "the sm90 kernel takes a BlockMask with block_q 64 or a multiple of 128 and block_kv "
            f"64, 128 or 256; got {block_q} x {block_kv}"
        )
    variant, head_dim = variant_of(spec), _padded(spec.head_dim)
    if heuristic(variant, head_dim, block_kv=block_kv).smem_bytes(head_dim, variant) > SMEM_LIMIT:
        return (
            f"two tiles of {block_kv} keys at head_dim {head_dim} exceed the shared memory of "
            f"sm90; make the BlockMask with block_kv={block_kv // 2}"
        )
    return None


def _padded(head_dim: int) -> int:
    """The head size of the kernel that serves ``head_dim``."""
    return next(size for size in HEAD_DIMS if size >= head_dim)


def _quant_reason(quant, dtype: str) -> str | None:
    """The same for a low-precision variant."""
    if quant.qk not in ("int8", "fp8_e4m3"):
        return f"the sm90 kernel has no {quant.qk} product of Q and K (Hopper has none)"
    # What has an INT8 gradient may ask for INT8 P and V: they stay in 16 bits, which is finer.
    halves = (
        "half",
        {"bfloat16": "bf16"}.get(dtype, "fp16"),
        *["int8"] * (quant.backward == "int8"),
    )
    if quant.pv != "fp8_e4m3" and quant.pv not in halves:
        return f"the sm90 kernel has no {quant.pv} product of P and V for {dtype} values"
    if quant.pv == "fp8_e4m3" and quant.v_max != 448.0:
        return f"the sm90 kernel quantises V to 448; {quant.name} has v_max={quant.v_max}"
    if quant.accumulator != "float32" or not quant.two_level:
        return (
            "the sm90 kernel needs accumulator='float32' and two_level=True: tiles add in float32"
        )
    if quant.granularity == "per_token":
        return (
            "the sm90 kernel has eight scales per tile of keys; granularity='per_token' needs 'xla'"
        )
    if quant.smooth_q or quant.smooth_v:
        return "the sm90 kernel smooths K only; smooth_q and smooth_v must be False"
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    mask: Mask | BlockMask,
    spec: AttentionSpec,
    config: Config | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the same as `xla.attention`, or as `sparse.attention` with a `BlockMask`.

    Scales are at least as fine as the variant asks: Q has one per row, K eight per tile of keys (by
    key index modulo 8), V one per channel. The gradient is that of unquantised attention. Under
    `jit` every device computes its own batch entries and heads.

    Args:
        query: bfloat16 or float16 [B, T, N, H], H up to 256; sizes between those of `HEAD_DIMS`
            are padded with zeros.
        key: [B, S, K, H].
        value: [B, S, K, H].
        bias: None.
        sinks: [N] or None.
        mask: bounds, lengths and at most one pair of segment ids; or a `BlockMask` with such a
            token rule. Quantising takes the mean of K and the scales of V over keys in no tile too,
            which must therefore be finite.
        spec: static facts.
        config: tiles and schedule, or only the keys per tile; None is `heuristic`.

    Returns:
        Output [B, T, N, H] in the dtype of ``query``, and log-sum-exp float32 [B, T, N].

    Raises:
        NotImplementedError: `unsupported_reason` has one.
    """
    reason = unsupported_reason(spec)
    if reason is not None:
        raise NotImplementedError(reason)
    return _attention(query, key, value, bias, sinks, mask, spec, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(query, key, value, bias, sinks, mask, spec, config):
    return _attention_fwd(query, key, value, bias, sinks, mask, spec, config)[0]


def _attention_fwd(query, key, value, bias, sinks, mask, spec, config):
    out, lse = _forward_of(config)(query, key, value, bias, sinks, mask, spec)
    return (out, lse), (query, key, value, bias, sinks, mask, out, lse)


def _attention_bwd(spec, config, saved, cotangents):
    query, key, value, _, sinks, mask, out, lse = saved
    if _has_gradient_kernel(spec, mask):
        return _kernel_gradient(spec, config, saved, cotangents)
    if spec.deterministic and not xla_is_deterministic():
        raise NotImplementedError(f"the gradient of this call is XLA's: {ANY_ORDER}")
    if _is_int8(spec) and isinstance(mask, Mask):
        mask = sparse.whole(mask, spec)
    if isinstance(mask, BlockMask):
        saved = (query, key, value, sinks, mask, out, lse)
        *grads, d_sinks, _, _ = sparse._backward(spec, saved, cotangents)
        return *grads, None, d_sinks, None
    return xla._flash_bwd(spec, xla._heuristic_block_kv(spec), saved, cotangents)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _has_gradient_kernel(spec: AttentionSpec, mask: Mask | BlockMask) -> bool:
    """Whether the kernels' own backward serves a call; else it is XLA's."""
    static = not jax.tree.leaves(_token_rule(mask))
    return static and spec.soft_cap is None and spec.head_dim <= max(backward.HEAD_DIMS)


def _is_int8(spec: AttentionSpec) -> bool:
    """Whether the gradient is SageBwd's."""
    return spec.quant is not None and spec.quant.backward == "int8"


def _kernel_gradient(spec: AttentionSpec, config, saved, cotangents):
    """The gradient from the saved log-sum-exp: unquantised, or that of SageBwd."""
    query, key, value, _, sinks, mask, out, lse = saved
    rule, blocks = _token_rule(mask), mask if isinstance(mask, BlockMask) else None
    rows = xla.row_terms(out, lse, sinks, cotangents)
    query, key, value = clean(query, key, value, rule, spec)
    centred = numerics.centred_keys(query, key, rule, spec)
    lse = lse if centred.const is None else lse - centred.const
    head_dim = next(size for size in backward.HEAD_DIMS if size >= spec.head_dim)
    pad = ((0, 0), (0, 0), (0, 0), (0, head_dim - spec.head_dim))
    arrays = (query, centred.key, value, cotangents[0])
    arrays = [jnp.pad(x, pad) if pad[3][1] else x for x in arrays]
    options = {"scale": spec.scale, "min_diff": rule.min_diff, "max_diff": rule.max_diff}
    run, sums = backward.gradient, (lse, rows.delta)
    if _is_int8(spec):
        options["smooth_k"] = spec.quant.smooth_k
        forward_config = _config_of(spec, mask, config) if blocks is None else None
        options["scale_block"] = _scale_block(blocks, forward_config)
        options["v_codes"] = variant_of(spec).pv == "e4m3"
        run, sums = backward_int8.gradient, (lse, rows.delta, rows.sums)
    sums = [x.swapaxes(1, 2) for x in sums]
    grads = partitioned_gradient(functools.partial(run, **options), spec, blocks)(*arrays, *sums)
    d_query, d_key, d_value = (x[..., : spec.head_dim] for x in grads)
    if centred.mean is not None:
        d_query = d_query.astype(jnp.float32) + centred.part(rows.sums, spec)
        d_query = d_query.astype(query.dtype)
    return d_query, d_key, d_value, None, rows.d_sinks, None


@functools.lru_cache(maxsize=64)
def _forward_of(config: Config | int | None):
    """The forward with one configuration, split over devices; cached, since callers compare it."""
    return partitioned(functools.partial(forward, config=config))


def forward(query, key, value, bias, sinks, mask, spec: AttentionSpec, config=None):
    """Quantises if asked, and runs the kernel on this device's arrays.

    Args and returns as `attention`, without a gradient.
    """
    del bias
    head_dim = _padded(spec.head_dim)
    rules, quant = _token_rule(mask), spec.quant
    blocks = mask if isinstance(mask, BlockMask) else None
    config = _config_of(spec, mask, config)
    lengths = {"q_lengths": rules.q_lengths, "kv_lengths": rules.kv_lengths}
    if quant is not None:  # The quantisers leave out what lies beyond the lengths themselves.
        rules = dataclasses.replace(rules, q_lengths=None, kv_lengths=None)
    arrays = clean(query, key, value, rules, spec)
    pad = ((0, 0), (0, 0), (0, 0), (0, head_dim - spec.head_dim))
    q, k, v = (jnp.pad(x, pad) if pad[3][1] else x for x in arrays)
    operands = AttentionOperands(q, k, v)
    if quant is not None:
        operands = quantize_qkv(
            q, k, v, scale_block=_scale_block(blocks, config), smooth_k=quant.smooth_k,
            qk="int8" if quant.qk == "int8" else "e4m3", pv=variant_of(spec).pv,
            leave_q=config.fuse_q, **lengths,
        )  # fmt: skip
    out, lse = attention_forward(
        operands, q_len=spec.q_len, kv_len=spec.kv_len, scale=spec.scale, mask=mask,
        soft_cap=spec.soft_cap, sinks=sinks, out_dtype=query.dtype, config=config,
    )  # fmt: skip
    return out[..., : spec.head_dim], lse.swapaxes(1, 2)


def _config_of(spec: AttentionSpec, mask: Mask | BlockMask, config: Config | int | None) -> Config:
    """The configuration of the forward: as given, or the heuristic's for this device."""
    if isinstance(config, Config):
        return config
    blocks = mask if isinstance(mask, BlockMask) else None
    config = _config(variant_of(spec), _padded(spec.head_dim), _token_rule(mask), blocks, config)
    return dataclasses.replace(config, num_sms=current_device().num_sms or config.num_sms)


def _scale_block(blocks: BlockMask | None, config: Config | None) -> int:
    """Keys that share a set of scales in the forward; without a block mask ``config`` says."""
    return config.block_kv if blocks is None else blocks.block_kv


def variant_of(spec: AttentionSpec) -> Variant:
    """Formats of the kernel that serves a call.

    Args:
        spec: the call.

    Returns:
        A `Variant`.

    >>> variant_of(AttentionSpec(1, 8, 8, 2, 2, 64, "bfloat16", 0.125)).qk
    'half'
    """
    quant = spec.quant
    if quant is None:
        return Variant("half", "half", spec.dtype, spec.soft_cap)
    pv = "e4m3" if quant.pv == "fp8_e4m3" else "half"
    return Variant("int8" if quant.qk == "int8" else "e4m3", pv, spec.dtype, spec.soft_cap)
