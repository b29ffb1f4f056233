"""Use our attention inside flax's own multi-head attention."""

import functools
from typing import Any

import jax.numpy as jnp

from jaxeff.nn.attention import default_attention_fn
from jaxeff.typing import Array, AttentionFn, DTypeLike

__all__ = ["flax_attention_fn"]


@functools.cache
def flax_attention_fn(quant: Any = None) -> AttentionFn:
    """Return an ``attention_fn`` for ``flax.nnx.MultiHeadAttention`` and its Linen sibling.

    The same as ``pallas_kernels.dot_product_attention`` with this ``quant``, behind the signature
    of ``flax.nnx.dot_product_attention``: any number of batch axes, a mask of any dtype, inputs
    promoted to ``dtype``. What ours cannot do is refused instead of left out: dropout, sowing
    the attention weights, and a ``precision`` other than the default. A query that may attend to
    nothing gives zeros (flax: an average of all values).

    Args:
        quant: ``None``, or what ``pallas_kernels.dot_product_attention`` takes as ``quant``, such
            as ``"sage2"``; hashable. The same ``quant`` gives the same object.

    Returns:
        A callable ``(query [..., T, N, H], key, value [..., S, K, H], bias, mask, ...) ->
        [..., T, N, H]``.

    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...     2, 16, attention_fn=flax_attention_fn("sage2"), decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((1, 3, 16)), is_causal=True).shape
    (1, 3, 16)

    References: SageAttention2 (arXiv 2411.10958) for the quantised variants.
    """
    attend = default_attention_fn(quant)

    def attention(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        """Attend; refuse what would otherwise be dropped without a word."""
        if dropout_rate > 0.0 and not deterministic:
            raise NotImplementedError(
                f"dropout_rate is {dropout_rate}: jaxeff's attention has no dropout. "
                "Set dropout_rate=0 or pass deterministic=True"
            )
        if module is not None:
            raise NotImplementedError(
                "sow_weights=True: the attention weights are never materialised, so they cannot be "
                "sown. Leave sow_weights out"
            )
        if precision is not None:
            raise NotImplementedError(
                f"precision is {precision!r}: the attention function has its own. Leave it out, "
                "or use jax.default_matmul_precision"
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        lead = query.shape[:-3]

        def one_batch_axis(x: Array | None) -> Array | None:
            # Any number of batch axes in front of the last three becomes one.
            if x is None or x.ndim <= 3 or len(lead) < 2:
                return x
            if x.shape[:-3] != lead:
                x = jnp.broadcast_to(x, (*lead, *x.shape[-3:]))
            return x.reshape(-1, *x.shape[-3:])

        masks = (None if x is None else jnp.asarray(x) for x in (bias, mask))
        bias, mask = (x if x is None or x.ndim >= 3 else x[None] for x in masks)
        out = attend(
            *(one_batch_axis(x) for x in (query, key, value, bias)),
            mask=None if mask is None else one_batch_axis(mask).astype(bool),
            is_causal=is_causal,
        )
        return out.reshape(query.shape)

    return attention
