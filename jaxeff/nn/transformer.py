"""The gated MLP and the pre-norm transformer block."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.nn.attention import Attention
from jaxeff.nn.norm import RMSNorm
from jaxeff.typing import Array, AttentionFn, DTypeLike

__all__ = ["ACTIVATIONS", "GatedMLP", "TransformerBlock"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """Two parallel projections, one through an activation, multiplied and projected back.

    ``y = (act(x W_gate) * (x W_up)) W_down``: SwiGLU with ``"silu"``, GeGLU with ``"gelu"`` or
    ``"gelu_tanh"`` (the tanh approximation that Gemma uses).

    ``smooth=True`` (Smooth-SwiGLU) multiplies each hidden channel ``j`` by
    ``s_j = 1 / max_t |h_tj|`` and divides its row of ``W_down`` by it: the same function, but one
    channel with outliers no longer sets the scale for the others when a low-precision recipe
    quantises ``h``. ``s`` is treated as a constant in the backward pass; the maximum runs over all
    tokens of the call.

    Args:
        embed_dim: model dimension ``D``.
        mlp_dim: hidden dimension ``F``.
        activation: a key of ``ACTIVATIONS``.
        use_bias: add a bias to the three projections.
        smooth: scale the hidden channels to a maximum of 1, see above; not where the down
            projection is packed or adapted, as its weight is fixed.
        dtype: dtype of the computation.
        param_dtype: dtype of the stored parameters.
        kernel_init: initialiser of the gate and up kernels.
        down_kernel_init: initialiser of the down kernel; by default ``kernel_init``.
        rngs: source of the initial parameters.

    Raises:
        ValueError: a size is below 1 or the activation is unknown.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> GatedMLP(4, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 4))).shape
    (2, 4)

    References: Shazeer, "GLU Variants Improve Transformer", 2020, section 2; Fishman et al.,
    "Scaling FP8 training to trillion-token LLMs", 2024 (arXiv:2409.12517), section 4
    (Smooth-SwiGLU).
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str = "silu",
        use_bias: bool = False,
        smooth: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (pure)
        down_kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        for name, size in (("embed_dim", embed_dim), ("mlp_dim", mlp_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
            )
        self.activation = activation
        self.smooth = smooth
        linear = functools.partial(
            nnx.Linear, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_proj = linear(embed_dim, mlp_dim, kernel_init=kernel_init)
        self.up_proj = linear(embed_dim, mlp_dim, kernel_init=kernel_init)
        down_kernel_init = kernel_init if down_kernel_init is None else down_kernel_init
        self.down_proj = linear(mlp_dim, embed_dim, kernel_init=down_kernel_init)

    def __call__(self, x: Array) -> Array:
        """Map ``x [..., D]`` to ``[..., D]``."""
        # A layer that was put in the place of the gate may know all three of them.
        whole = getattr(self.gate_proj, "gated_mlp", None)
        if whole is not None and not self.smooth:
            out = whole(x, self.up_proj, self.down_proj, self.activation)
            if out is not None:
                return out
        hidden = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        # A packed or adapted layer has no kernel to scale: the same function without it.
        is_smooth = self.smooth and hasattr(self.down_proj, "kernel")
        return self._smooth_down(hidden) if is_smooth else self.down_proj(hidden)

    def _smooth_down(self, hidden: Array) -> Array:
        """``Q(h s) (diag(1 / s) W_down)`` with the product, dtype and bias of ``down_proj``."""
        down = self.down_proj
        amax = jnp.abs(jax.lax.stop_gradient(hidden)).max(tuple(range(hidden.ndim - 1)))
        amax = jnp.where(amax > 0, amax, 1)  # [F]
        bias = None if down.bias is None else down.bias[...]
        hidden, kernel, bias = down.promote_dtype(
            (hidden / amax, down.kernel[...] * amax[:, None], bias), dtype=down.dtype
        )
        numbers = (((hidden.ndim - 1,), (0,)), ((), ()))
        out = down.dot_general(hidden, kernel, numbers, precision=down.precision)
        return out if bias is None else out + bias


class TransformerBlock(nnx.Module):
    """Attention and MLP, each on the normalised input and added to the residual stream.

    ``x = x + post(attention(norm(x)))``, then ``x = x + post(mlp(norm(x)))``; ``post`` is an
    RMSNorm in Gemma and nothing elsewhere.

    Args:
        attention: the attention module.
        mlp: the MLP module.
        embed_dim: model dimension ``D``.
        post_norms: normalise each branch again before it is added (Gemma).
        norm_eps: ``eps`` of the norms.
        norm_scale_plus_one: Gemma's ``1 + scale`` in the norms.
        param_dtype: dtype of the stored norm scales.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> attention = Attention(8, 2, attention_fn=jax.nn.dot_product_attention, rngs=rngs)
    >>> block = TransformerBlock(attention, GatedMLP(8, 16, rngs=rngs), 8)
    >>> block(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)

    References: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020,
    section 4 (pre-norm); Gemma Team, "Gemma 3 Technical Report", 2025, section 2 (pre- and
    post-norm).
    """

    def __init__(
        self,
        attention: Attention,
        mlp: nnx.Module,
        embed_dim: int,
        *,
        post_norms: bool = False,
        norm_eps: float = 1e-6,
        norm_scale_plus_one: bool = False,
        param_dtype: DTypeLike = jnp.float32,
    ):
        norm = functools.partial(
            RMSNorm,
            embed_dim,
            eps=norm_eps,
            scale_plus_one=norm_scale_plus_one,
            param_dtype=param_dtype,
        )
        self.attention_norm = norm()
        self.attention = attention
        self.post_attention_norm = norm() if post_norms else None
        self.mlp_norm = norm()
        self.mlp = mlp
        self.post_mlp_norm = norm() if post_norms else None

    def __call__(
        self,
        x: Array,
        *,
        positions: Array | None = None,
        valid: Array | None = None,
        cache: Any = None,
        attention_fn: AttentionFn | None = None,
    ) -> Any:
        """Map ``x [B, T, D]`` to ``[B, T, D]``; with a cache, to a pair with the updated cache.

        The other arguments are those of :class:`Attention`.
        """
        branch = self.attention(
            self.attention_norm(x),
            positions=positions,
            valid=valid,
            cache=cache,
            attention_fn=attention_fn,
        )
        if cache is not None:
            branch, cache = branch
        x = x + (branch if self.post_attention_norm is None else self.post_attention_norm(branch))
        branch = self.mlp(self.mlp_norm(x))
        x = x + (branch if self.post_mlp_norm is None else self.post_mlp_norm(branch))
        return x if cache is None else (x, cache)
