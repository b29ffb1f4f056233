"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.typing import Array, DTypeLike

__all__ = ["RMSNorm"]


class RMSNorm(nnx.Module):
    """Divide by the root mean square over the last axis, then scale each dimension.

    ``y = x / sqrt(mean(x²) + eps) · w``, with ``w = scale``, or ``w = 1 + scale`` in Gemma's form.
    All of it is computed in float32 and rounded once, to the dtype of ``x``.

    Args:
        dim: size of the last axis, at least 1.
        eps: added to the mean square, > 0, so that a row of zeros stays zero.
        scale_plus_one: use ``1 + scale`` with ``scale`` starting at 0 (Gemma), else ``scale``
            starting at 1.
        param_dtype: dtype in which ``scale`` is stored.
        rngs: accepted so that all layers are built alike; nothing random is drawn.

    Raises:
        ValueError: ``dim`` or ``eps`` is not positive, or the input's last axis is not ``dim``.

    >>> import jax.numpy as jnp
    >>> [round(y, 4) for y in RMSNorm(2)(jnp.array([3.0, 4.0])).tolist()]
    [0.8485, 1.1314]

    References: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, section 3.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        scale_plus_one: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if dim < 1:
            raise ValueError(f"dim is {dim}; expected at least 1")
        if not eps > 0:
            raise ValueError(f"eps is {eps}; expected a number above 0")
        del rngs
        self.eps = eps
        self.scale_plus_one = scale_plus_one
        init = jnp.zeros if scale_plus_one else jnp.ones
        self.scale = nnx.Param(init((dim,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise ``x [..., dim]``; the result has its shape and dtype."""
        weight = self.scale[...].astype(jnp.float32)
        if x.shape[-1] != weight.shape[0]:
            raise ValueError(f"x has last axis {x.shape[-1]}; expected {weight.shape[0]}")
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide * (1 + weight if self.scale_plus_one else weight)).astype(x.dtype)
