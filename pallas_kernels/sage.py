# SPDX-License-Identifier: Apache-2.0
"""SageAttention by its own names: the functions of the CUDA package, served by this library.

Each function maps onto one `AttentionQuant` and calls `dot_product_attention`. They differ from
the original on purpose where it is unsafe:

- an unknown keyword is an error, not ignored (``attn_mask=`` to `sageattn` used to be dropped);
- any head_dim, GQA, float32 inputs and T != S are served by every function;
- rows that attend to nothing give zeros and -inf, all-zero channels give zeros;
- bfloat16 values stay bfloat16 where the original casts V to float16 and overflows;
- the log-sum-exp is formed in float32 (the original multiplies q by the mean key in the dtype of
  the inputs) and is always [B, H, N], float32, natural logarithm;
- the result does not depend on the GPU it runs on.

Where the original restricts `smooth_v` to one accumulator mode and ignores it otherwise, it is
honoured here. Rounding is to nearest even everywhere. `pallas_kernels.explain` says when a variant
is emulated on the present device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._arguments import LAYOUTS, check_choice, strict
from pallas_kernels.ops.attention.api import dot_product_attention
from pallas_kernels.ops.attention.spec import QUANTS, AttentionQuant, get_quant
from pallas_kernels.sage_sparse import (
    block_sparse_sage2_attn,
    block_sparse_sage2_attn_cuda,
    spas_sage2_attn_meansim_cdf,
    spas_sage2_attn_meansim_cuda,
    spas_sage2_attn_meansim_topk,
    spas_sage2_attn_meansim_topk_cuda,
)

__all__ = [
    "block_sparse_sage2_attn",
    "block_sparse_sage2_attn_cuda",
    "sageattn",
    "sageattn3_blackwell",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
    "spas_sage2_attn_meansim_cdf",
    "spas_sage2_attn_meansim_cuda",
    "spas_sage2_attn_meansim_topk",
    "spas_sage2_attn_meansim_topk_cuda",
]

_GRANULARITIES = ("per_warp", "per_thread")


def _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, quant, **more):
    """`dot_product_attention` on HND or NHD arrays."""
    check_choice("tensor_layout", tensor_layout, LAYOUTS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != 4:
            form = "[B, H, N, D]" if tensor_layout == "HND" else "[B, N, H, D]"
            raise ValueError(
                f"{name} must have four axes {form} for tensor_layout={tensor_layout!r}; "
                f"got shape {jnp.shape(x)}"
            )
    turn = (lambda x: jnp.swapaxes(x, 1, 2)) if tensor_layout == "HND" else (lambda x: x)
    out, lse = dot_product_attention(
        turn(q), turn(k), turn(v), scale=sm_scale, is_causal=is_causal, quant=quant,
        return_residual=True, **more,
    )  # fmt: skip
    return (turn(out), lse.swapaxes(1, 2)) if return_lse else turn(out)


@strict
def sageattn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    smooth_k: bool = True,
    quant: str | AttentionQuant = "sage2",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with 8-bit Q, K, P and V: the drop-in function of SageAttention.

    ``O = quant(P) quant(V)`` with ``P = softmax(sm_scale * quant(Q) quant(K - mean K)^T)``.
    The original picks a kernel by GPU; this one always computes "sage2", the recipe of its Hopper
    kernel, unless `quant` says otherwise. Memory and gradient as `dot_product_attention`.

    Args:
      q: [B, H, N, D] for "HND", [B, N, H, D] for "NHD"; float32, bfloat16 or float16.
      k: [B, Hk, M, D] or [B, M, Hk, D], same dtype; H a multiple of Hk.
      v: like `k`.
      tensor_layout: "HND" or "NHD".
      is_causal: query t sees the keys ``s <= t`` (top-left corners aligned), also for N != M.
      sm_scale: factor on the logits; None means ``1 / sqrt(D)``.
      return_lse: also return the log-sum-exp.
      smooth_k: subtract the mean key of each sequence before quantising.
      quant: name in `pallas_kernels.QUANTS` or an `AttentionQuant`.
      implementation: as in `dot_product_attention`.

    Returns:
      Output of the shape and dtype of `q`; with `return_lse` a pair with the natural log-sum-exp of
      ``sm_scale * q k^T``, float32 [B, H, N] in both layouts, -inf where nothing is attended.

    Raises:
      TypeError: an unknown keyword; the message names the nearest one.
      ValueError: a wrong shape, dtype or value.
      NotImplementedError: the named implementation does not serve this call.

    >>> x = jnp.ones((1, 2, 8, 16))
    >>> out, lse = sageattn(x, x, x, is_causal=True, return_lse=True)
    >>> out.shape, lse.shape, round(float(lse[0, 0, 0]), 3)
    ((1, 2, 8, 16), (1, 2, 8), 4.0)

    References:
      Zhang et al., SageAttention2, arXiv 2411.10958, sections 3.1 to 3.4.
    """
    quant = get_quant(quant)
    if quant is None:
        raise ValueError(
            "quant must be a variant; for full precision use pallas_kernels.dot_product_attention"
        )
    if not smooth_k:
        quant = dataclasses.replace(quant, smooth_k=False)
    return _attend(
        q, k, v, tensor_layout, is_causal, sm_scale, return_lse, quant,
        implementation=implementation,
    )  # fmt: skip


@strict
def sageattn_qk_int8_pv_fp16_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: jax.Array | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """SageAttention 1 as shipped: INT8 Q and K per block of 128 and 64 tokens, 16-bit P and V.

    The variant "sage1". Deviations: V keeps bfloat16 if it has it; the accumulator is float32
    (a float16 one gains nothing on Hopper); a float mask is added to the natural logits, where
    the original adds it in base 2; masks may be combined with `is_causal`.

    Args:
      q: as in `sageattn`.
      k: as in `sageattn`.
      v: as in `sageattn`.
      tensor_layout: "HND" or "NHD".
      quantization_backend: "triton" or "cuda"; they differ in rounding upstream, not here.
      is_causal: as in `sageattn`.
      attn_mask: bool (True = attend) or float (added), broadcastable to [B, H, N, M], or None.
      sm_scale: as in `sageattn`.
      smooth_k: as in `sageattn`.
      return_lse: as in `sageattn`.

    Returns:
      As `sageattn`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.

    >>> x = jnp.ones((1, 2, 8, 16))
    >>> sageattn_qk_int8_pv_fp16_triton(x, x, x).shape
    (1, 2, 8, 16)

    References:
      Zhang et al., SageAttention, arXiv 2410.02367, table 6 (variant B).
    """
    check_choice("quantization_backend", quantization_backend, ("triton", "cuda"))
    quant = dataclasses.replace(QUANTS["sage1"], smooth_k=smooth_k)
    return _attend(
        q, k, v, tensor_layout, is_causal, sm_scale, return_lse, quant, **_mask(attn_mask)
    )


def _mask(attn_mask) -> dict:
    """A torch-style mask as bias or mask, with leading axes added."""
    if attn_mask is None:
        return {}
    x = jnp.asarray(attn_mask)
    if x.ndim < 2 or x.ndim > 4:
        raise ValueError(f"attn_mask must have 2 to 4 axes [.., N, M]; got shape {x.shape}")
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    return {"mask": x} if x.dtype == jnp.bool_ else {"bias": x}


@strict
def sageattn_qk_int8_pv_fp16_cuda(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """SageAttention 2 for sm80: INT8 Q and K per warp or thread (tiles 128 x 64), 16-bit P and V.

    Deviations: V keeps bfloat16 if it has it; float16 accumulators are not emulated.

    Args:
      q: as in `sageattn`.
      k: as in `sageattn`.
      v: as in `sageattn`.
      tensor_layout: "HND" or "NHD".
      is_causal: as in `sageattn`.
      qk_quant_gran: "per_thread" or "per_warp".
      sm_scale: as in `sageattn`.
      pv_accum_dtype: "fp32"; "fp16" and "fp16+fp32" are refused.
      smooth_k: as in `sageattn`.
      smooth_v: subtract the mean value before rounding and add it to the output.
      return_lse: as in `sageattn`.

    Returns:
      As `sageattn`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.
      NotImplementedError: a float16 accumulator is asked for.

    >>> x = jnp.ones((1, 2, 8, 16))
    >>> sageattn_qk_int8_pv_fp16_cuda(x, x, x, qk_quant_gran="per_warp").shape
    (1, 2, 8, 16)

    References:
      Zhang et al., SageAttention2, arXiv 2411.10958, section 3.
    """
    check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp16", "fp16+fp32"))
    if pv_accum_dtype != "fp32":
        raise NotImplementedError(
            f"pv_accum_dtype={pv_accum_dtype!r}: a float16 accumulator of 16-bit values is not "
            "served, and on Hopper it would not be faster; use pv_accum_dtype='fp32'"
        )
    quant = _tiles_128_64("sage2_fp16pv", qk_quant_gran, smooth_k, smooth_v, pv="half")
    return _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, quant)


def _tiles_128_64(name, granularity, smooth_k, smooth_v, **fields) -> AttentionQuant:
    """A variant with the tiles of the sm80 and sm89 kernels."""
    check_choice("qk_quant_gran", granularity, _GRANULARITIES)
    return AttentionQuant(
        name, granularity=granularity, block_q=128, block_kv=64, warp_q=32,
        smooth_k=smooth_k, smooth_v=smooth_v, **fields,
    )  # fmt: skip


@strict
def sageattn_qk_int8_pv_fp8_cuda(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """SageAttention 2 and 2++ for sm89: INT8 Q and K, FP8 P and V (tiles 128 x 64).

    "fp32+fp16" is SageAttention 2++ ("sage2pp" with `qk_quant_gran`): V within 2.25, float16
    accumulation of 64 keys. "fp32+fp32" empties the accumulator into float32 after every tile of
    64 keys; "fp32" lets the tensor core's own accumulator run on, which the emulation, exact in
    float32, does not imitate.

    Args:
      q: as in `sageattn`.
      k: as in `sageattn`.
      v: as in `sageattn`.
      tensor_layout: "HND" or "NHD".
      is_causal: as in `sageattn`.
      qk_quant_gran: "per_thread" or "per_warp".
      sm_scale: as in `sageattn`.
      pv_accum_dtype: "fp32", "fp32+fp32" or "fp32+fp16".
      smooth_k: as in `sageattn`.
      smooth_v: subtract the mean value before quantising and add it to the output.
      return_lse: as in `sageattn`.

    Returns:
      As `sageattn`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.

    >>> x = jnp.ones((1, 2, 8, 16))
    >>> sageattn_qk_int8_pv_fp8_cuda(x, x, x, pv_accum_dtype="fp32+fp32").shape
    (1, 2, 8, 16)

    References:
      Zhang et al., SageAttention2++, arXiv 2505.21136, section 3.
    """
    check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp32+fp32", "fp32+fp16"))
    fields = {
        "fp32": {"two_level": False},
        "fp32+fp32": {},
        "fp32+fp16": {"v_max": 2.25, "accumulator": "float16"},
    }[pv_accum_dtype]
    name = "sage2pp" if pv_accum_dtype == "fp32+fp16" else "sage2_sm89"
    quant = _tiles_128_64(name, qk_quant_gran, smooth_k, smooth_v, **fields)
    return _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, quant)


@strict
def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """SageAttention 2 for Hopper: INT8 Q and K, FP8 P and V, tiles of 64 x 128, two accumulators.

    The variant "sage2", or the same with one scale per 16 queries and 128 keys ("per_warp").

    Args:
      q: as in `sageattn`.
      k: as in `sageattn`.
      v: as in `sageattn`.
      tensor_layout: "HND" or "NHD".
      is_causal: as in `sageattn`.
      qk_quant_gran: "per_thread" or "per_warp".
      sm_scale: as in `sageattn`.
      pv_accum_dtype: "fp32+fp32"; "fp32" is refused as it is upstream.
      smooth_k: as in `sageattn`.
      return_lse: as in `sageattn`.

    Returns:
      As `sageattn`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.
      NotImplementedError: `pv_accum_dtype` is "fp32".

    >>> x = jnp.ones((1, 2, 8, 16))
    >>> sageattn_qk_int8_pv_fp8_cuda_sm90(x, x, x).shape
    (1, 2, 8, 16)

    References:
      Zhang et al., SageAttention2, arXiv 2411.10958, sections 3.2 to 3.4.
    """
    check_choice("qk_quant_gran", qk_quant_gran, _GRANULARITIES)
    check_choice("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp32+fp32"))
    if pv_accum_dtype == "fp32":
        raise NotImplementedError(
            "pv_accum_dtype='fp32': the Hopper recipe always accumulates in two levels; use "
            "'fp32+fp32', or sageattn_qk_int8_pv_fp8_cuda for the single-level variant"
        )
    quant = dataclasses.replace(QUANTS["sage2"], granularity=qk_quant_gran, smooth_k=smooth_k)
    return _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, quant)


@strict
def sageattn3_blackwell(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attn_mask: jax.Array | None = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
) -> jax.Array:
    """SageAttention 3: NVFP4 for Q, K, V and P, with smoothing of Q and two-level scaling of P.

    The variant "sage3", always HND with ``scale = 1 / sqrt(D)``. Deviations: `attn_mask` is
    honoured (the original ignores it); under `is_causal` the bottom-right corners of the real
    sequences are aligned, ``s <= t + M - N`` (the original aligns those of the sequences padded to
    128, and lets queries see padding); grouped heads are served; K is not changed in place.

    Args:
      q: [B, H, N, D]; float32, bfloat16 or float16.
      k: [B, Hk, M, D], same dtype; H a multiple of Hk.
      v: like `k`.
      attn_mask: bool (True = attend) or float (added), broadcastable to [B, H, N, M], or None.
      is_causal: query t sees the keys ``s <= t + M - N``.
      per_block_mean: smooth Q by the mean of each 128 queries; False: by that of the sequence.

    Returns:
      Output of the shape and dtype of `q`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.

    >>> x = jnp.ones((1, 2, 8, 16))
    >>> sageattn3_blackwell(x, x, x).shape
    (1, 2, 8, 16)

    References:
      Zhang et al., SageAttention3, arXiv 2505.11594, algorithm 1.
    """
    quant, more = QUANTS["sage3"], _mask(attn_mask)
    if not per_block_mean and jnp.ndim(q) == 4:
        whole = -(-q.shape[2] // quant.block_q) * quant.block_q
        quant = dataclasses.replace(quant, block_q=whole)
    if is_causal and jnp.ndim(q) == jnp.ndim(k) == 4:
        more["causal_offset"] = k.shape[2] - q.shape[2]
    return _attend(q, k, v, "HND", is_causal, None, False, quant, **more)


@strict
def sageattn_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    *,
    quant: str | AttentionQuant = "sage1",
    implementation: str | None = None,
) -> jax.Array:
    """Attention over sequences of different lengths that lie one after another.

    Sequence b holds the tokens ``cu_seqlens[b] ... cu_seqlens[b + 1] - 1`` and attends only to its
    own keys; `is_causal` aligns the top-left corners of each sequence. Deviation: the mean key is
    that of each sequence; the original takes one mean over the whole batch, which smooths less.

    The tokens are copied into rows of one sequence each, so that, as in the original, no tile and
    no scale spans two sequences, and only the products within a sequence are computed. Memory
    grows with ``sequences * max_seqlen``.

    Args:
      q: [total_q, H, D]; float32, bfloat16 or float16.
      k: [total_k, Hk, D], same dtype; H a multiple of Hk.
      v: like `k`.
      cu_seqlens_q: int [sequences + 1], first token of each sequence and the end, from 0 up.
      cu_seqlens_k: like `cu_seqlens_q`, for the keys.
      max_seqlen_q: int, tokens, at least the longest sequence of queries. Static.
      max_seqlen_k: int, tokens, at least the longest sequence of keys. Static.
      is_causal: query t of a sequence sees its keys ``s <= t``.
      sm_scale: factor on the logits; None means ``1 / sqrt(D)``.
      smooth_k: subtract the mean key of each sequence before quantising.
      quant: name or `AttentionQuant`; the original is "sage1".
      implementation: as in `dot_product_attention`.

    Returns:
      Output of the shape and dtype of `q`. Tokens outside every sequence give zeros.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value; `cu_seqlens` that fall, end beyond the tokens or
        are longer than `max_seqlen`. Under `jit` their values are not known: there the tokens of a
        sequence longer than its `max_seqlen` give NaN.

    >>> x = jnp.ones((5, 2, 16))
    >>> ends = jnp.array([0, 2, 5])
    >>> sageattn_varlen(x, x, x, ends, ends, 3, 3).shape
    (5, 2, 16)

    References:
      Zhang et al., SageAttention, arXiv 2410.02367, section 4.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != 3:
            raise ValueError(f"{name} must be [total, H, D]; got shape {jnp.shape(x)}")
    if jnp.shape(k)[:1] != jnp.shape(v)[:1]:
        raise ValueError(f"v has {v.shape[0]} tokens; k has {k.shape[0]}")
    starts_q = _starts("q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    starts_k = _starts("k", cu_seqlens_k, max_seqlen_k, k.shape[0])
    if starts_q.shape != starts_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {starts_q.shape[0]} entries and cu_seqlens_k {starts_k.shape[0]}; "
            "both need one more than there are sequences"
        )
    quant = get_quant(quant)
    if quant is not None and not smooth_k:
        quant = dataclasses.replace(quant, smooth_k=False)
    lengths_q, lengths_k = jnp.diff(starts_q), jnp.diff(starts_k)  # [sequences]
    rows = dot_product_attention(
        _rows(q, starts_q, max_seqlen_q), _rows(k, starts_k, max_seqlen_k),
        _rows(v, starts_k, max_seqlen_k), scale=sm_scale, is_causal=is_causal,
        query_seq_lengths=lengths_q, key_value_seq_lengths=lengths_k,
        quant=quant, implementation=implementation,
    )  # fmt: skip
    token = jnp.arange(q.shape[0])
    row = jnp.searchsorted(starts_q, token, side="right") - 1
    row = jnp.minimum(row, lengths_q.shape[0] - 1)
    out = rows[row, jnp.minimum(token - starts_q[row], max_seqlen_q - 1)]  # [total_q, H, D]
    too_long = (lengths_q > max_seqlen_q) | (lengths_k > max_seqlen_k)
    out = jnp.where(too_long[row][:, None, None], jnp.nan, out)
    return jnp.where((token < starts_q[-1])[:, None, None], out, 0).astype(q.dtype)


def _starts(side: str, cu_seqlens, longest, total: int) -> jax.Array:
    """Checks what can be checked of the boundaries of the sequences."""
    name = f"cu_seqlens_{side}"
    if isinstance(longest, bool) or not isinstance(longest, int | np.integer) or longest < 1:
        raise ValueError(f"max_seqlen_{side} must be a positive int; got {longest!r}")
    x = jnp.asarray(cu_seqlens)
    if x.ndim != 1 or x.shape[0] < 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be an integer array of at least 2 entries; "
            f"got shape {x.shape} and dtype {x.dtype}"
        )
    if not isinstance(x, jax.core.Tracer):
        ends = np.asarray(x)
        if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] > total:
            raise ValueError(
                f"{name} must start at 0, never fall and end at most at {total}, the number of "
                f"tokens; got {ends.tolist()}"
            )
        if np.diff(ends).max() > longest:
            raise ValueError(
                f"{name} has a sequence of {np.diff(ends).max()} tokens; max_seqlen_{side} is "
                f"{longest}"
            )
    return x.astype(jnp.int32)


def _rows(x: jax.Array, starts: jax.Array, longest: int) -> jax.Array:
    """[total, H, D] -> [sequences, longest, H, D]; what lies behind a sequence's end is masked."""
    index = starts[:-1, None] + jnp.arange(longest)  # [sequences, longest]
    return jnp.take(x, index, axis=0, mode="clip")
