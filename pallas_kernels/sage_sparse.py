# SPDX-License-Identifier: Apache-2.0
"""SpargeAttn by its own names: sparse SageAttention with the arguments of the published package.

Part of `pallas_kernels.sage`. They differ from the original on purpose where it is unsafe:

- `is_causal` also masks inside diagonal tiles (the original lets tokens there see the future);
- a query without tiles gives zeros (the original leaves its output unwritten);
- `attn_mask` and `output_dtype` are honoured, `dropout_p` above 0 is refused (all are ignored
  there), and unknown keywords are errors;
- grouped heads, any N, M and D and float32 are served, `smooth_k=False` works;
- the returned sparsity counts products with K and with V, over those of dense attention under the
  same mask (the original counts products with K only).

Tiles are 64 x 128, those of the Hopper kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels._arguments import LAYOUTS, check_choice, strict
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention.sparge import BLOCK_KV, BLOCK_Q, sparge_attention


@strict
def spas_sage2_attn_meansim_topk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: float | jax.Array = -0.1,
    cdfthreshd: float | jax.Array | None = None,
    topk: float | jax.Array | None = 0.5,
    pvthreshd: float | jax.Array | None = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype=None,
    return_sparsity: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sparse SageAttention2 on the share `topk` of the tiles in each row.

    See `pallas_kernels.ops.attention.sparge.predict` for the choice of tiles.

    Args:
      q: [B, H, N, D] for "HND", [B, N, H, D] for "NHD"; float32, bfloat16 or float16.
      k: [B, Hk, M, D] or [B, M, Hk, D], same dtype; H a multiple of Hk.
      v: like `k`.
      attn_mask: bool (True = attend), broadcastable to [B, H, N, M], or None.
      dropout_p: 0; anything else is refused.
      is_causal: query t sees the keys ``s <= t``.
      scale: factor on the logits; None means ``1 / sqrt(D)``.
      smooth_k: subtract the mean key before predicting and quantising.
      simthreshd1: blocks less self-similar than this are always computed; number or [H].
      cdfthreshd: choose by share of the softmax instead; then pass ``topk=None``.
      topk: share of all key tiles kept in each row, number or [H].
      pvthreshd: second stage, in powers of two, number or [H]; 50 never skips anything that counts.
      attention_sink: always keep the first tile of keys.
      tensor_layout: "HND" or "NHD".
      output_dtype: dtype of the output; None means that of `q`.
      return_sparsity: also return the share of the work that was left out.

    Returns:
      Output of the shape of `q`; with `return_sparsity` a pair with a float32 scalar.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.
      NotImplementedError: `dropout_p` is not 0, or `attn_mask` is additive.

    >>> x = jnp.ones((1, 2, 256, 16))
    >>> spas_sage2_attn_meansim_topk(x, x, x, is_causal=True).shape
    (1, 2, 256, 16)

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.
    """
    if topk is None and cdfthreshd is None:
        raise ValueError("exactly one of topk and cdfthreshd must be given; both are None")
    return _attend(
        q, k, v, attn_mask, dropout_p, tensor_layout, output_dtype, return_sparsity,
        is_causal=is_causal, scale=scale, smooth_k=smooth_k, simthreshd1=simthreshd1,
        cdfthreshd=cdfthreshd, topk=topk, pvthreshd=pvthreshd, attention_sink=attention_sink,
    )  # fmt: skip


@strict
def spas_sage2_attn_meansim_cdf(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: float | jax.Array = 0.6,
    cdfthreshd: float | jax.Array = 0.98,
    pvthreshd: float | jax.Array | None = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype=None,
    return_sparsity: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sparse SageAttention2 on the tiles that carry `cdfthreshd` of the predicted mass.

    Args:
      q: as in `spas_sage2_attn_meansim_topk`.
      k: as there.
      v: as there.
      attn_mask: as there.
      dropout_p: as there.
      is_causal: as there.
      scale: as there.
      smooth_k: as there.
      simthreshd1: as there.
      cdfthreshd: share of the softmax over tiles that is kept, number or [H].
      pvthreshd: as there.
      attention_sink: as there.
      tensor_layout: as there.
      output_dtype: as there.
      return_sparsity: as there.

    Returns:
      As `spas_sage2_attn_meansim_topk`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.
      NotImplementedError: `dropout_p` is not 0, or `attn_mask` is additive.

    >>> x = jnp.ones((1, 2, 256, 16))
    >>> out, sparsity = spas_sage2_attn_meansim_cdf(x, x, x, return_sparsity=True)
    >>> sparsity.shape
    ()

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.
    """
    return _attend(
        q, k, v, attn_mask, dropout_p, tensor_layout, output_dtype, return_sparsity,
        is_causal=is_causal, scale=scale, smooth_k=smooth_k, simthreshd1=simthreshd1,
        cdfthreshd=cdfthreshd, pvthreshd=pvthreshd, attention_sink=attention_sink,
    )  # fmt: skip


@strict
def block_sparse_sage2_attn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_id: jax.Array | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    smooth_k: bool = True,
    pvthreshd: float | jax.Array | None = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype=None,
    return_sparsity: bool = False,
    *,
    is_causal: bool = False,
    block_q: int = BLOCK_Q,
    block_kv: int = BLOCK_KV,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sparse SageAttention2 on given tiles.

    Args:
      q: as in `spas_sage2_attn_meansim_topk`.
      k: as there.
      v: as there.
      mask_id: bool or 0/1, [B or 1, H or 1, ceil(N / block_q), ceil(M / block_kv)], 1 = compute;
        None computes every tile.
      dropout_p: as there.
      scale: as there.
      smooth_k: as there.
      pvthreshd: as there.
      attention_sink: as there.
      tensor_layout: as there.
      output_dtype: as there.
      return_sparsity: as there.
      is_causal: query t sees the keys ``s <= t`` of its tiles; not in the original.
      block_q: queries per tile; not in the original.
      block_kv: keys per tile; not in the original.

    Returns:
      As `spas_sage2_attn_meansim_topk`.

    Raises:
      TypeError: an unknown keyword.
      ValueError: a wrong shape, dtype or value.
      NotImplementedError: `dropout_p` is not 0.

    >>> x = jnp.ones((1, 2, 128, 16))
    >>> bool((block_sparse_sage2_attn(x, x, x, jnp.zeros((1, 1, 2, 1))) == 0).all())
    True

    References:
      Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.
    """
    axis = 2 if tensor_layout == "HND" else 1
    _check_axes(q, k, v, tensor_layout)
    lengths = q.shape[axis], k.shape[axis]
    if mask_id is None:
        mask_id = jnp.ones((-(-lengths[0] // block_q), -(-lengths[1] // block_kv)), bool)
    blocks = BlockMask.from_blocks(mask_id, *lengths, block_q=block_q, block_kv=block_kv)
    return _attend(
        q, k, v, None, dropout_p, tensor_layout, output_dtype, return_sparsity,
        is_causal=is_causal, scale=scale, smooth_k=smooth_k, pvthreshd=pvthreshd,
        attention_sink=attention_sink, blocks=blocks,
    )  # fmt: skip


# The names under which the published package has them.
spas_sage2_attn_meansim_topk_cuda = spas_sage2_attn_meansim_topk
spas_sage2_attn_meansim_cuda = spas_sage2_attn_meansim_cdf
block_sparse_sage2_attn_cuda = block_sparse_sage2_attn


def _check_axes(q, k, v, tensor_layout):
    check_choice("tensor_layout", tensor_layout, LAYOUTS)
    form = "[B, H, N, D]" if tensor_layout == "HND" else "[B, N, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != 4:
            raise ValueError(f"{name} must have four axes {form}; got shape {jnp.shape(x)}")


def _attend(
    q, k, v, attn_mask, dropout_p, tensor_layout, output_dtype, return_sparsity, **arguments
):
    """`sparge_attention` on HND or NHD arrays."""
    _check_axes(q, k, v, tensor_layout)
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p must be 0, attention has no dropout; got {dropout_p}")
    if attn_mask is not None:
        if jnp.result_type(attn_mask) != jnp.bool_:
            raise NotImplementedError(
                "attn_mask must be boolean (True = attend): sparse attention serves no additive "
                f"mask; got {jnp.result_type(attn_mask)}. dot_product_attention takes bias="
            )
        arguments["mask"] = Mask.from_array(attn_mask)
    turn = (lambda x: jnp.swapaxes(x, 1, 2)) if tensor_layout == "HND" else (lambda x: x)
    out, sparsity = sparge_attention(turn(q), turn(k), turn(v), return_sparsity=True, **arguments)
    out = turn(out).astype(q.dtype if output_dtype is None else output_dtype)
    return (out, sparsity.mean()) if return_sparsity else out
