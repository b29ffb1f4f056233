"""Measure what a quantised attention does to a model, layer by layer."""

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels


def attention_errors(model: nnx.Module, tokens: jax.Array, quant: object) -> jax.Array:
    r"""Relative L1 error of quantised attention in each layer, on the model's own activations.

    For layer ``l`` with exact output ``o`` and quantised output ``q`` of the same query, key and
    value: :math:`e_l = \sum |q - o| / \sum |o|`. The exact output is what flows on, so the
    errors of the layers are independent of each other.

    Args:
      model: a module ``model(tokens, attention_fn=...)`` such as ``jaxeff.models.Decoder``.
      tokens: int32 ``[B, T]``.
      quant: name or ``AttentionQuant`` of the variant, as in
        :func:`pallas_kernels.dot_product_attention`.

    Returns:
      float32 ``[num_layers]``, without unit (0.04 is four per cent).

    References:
      SageAttention2 (arXiv 2411.10958), appendix A.7: the metric.
    """
    return _attention_errors(model, tokens, quant)


@nnx.jit(static_argnames="quant")
def _attention_errors(model, tokens, quant):
    errors = []

    def measured(query, key, value, **arguments):
        exact = pallas_kernels.dot_product_attention(query, key, value, **arguments)
        approximate = pallas_kernels.dot_product_attention(
            query, key, value, quant=quant, **arguments
        )
        exact_f32 = exact.astype(jnp.float32)
        difference = jnp.abs(approximate.astype(jnp.float32) - exact_f32).sum()
        errors.append(
            difference / jnp.maximum(jnp.abs(exact_f32).sum(), jnp.finfo(jnp.float32).tiny)
        )
        return exact

    model(tokens, attention_fn=measured)
    return jnp.stack(errors)
