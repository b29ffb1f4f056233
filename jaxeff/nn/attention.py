"""Grouped-query attention as an NNX module, open to any attention function and any cache."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxeff.nn.norm import RMSNorm
from jaxeff.nn.rope import RopeConfig, apply_rope
from jaxeff.typing import Array, AttentionFn, DTypeLike
from pallas_kernels import dot_product_attention

__all__ = ["Attention", "default_attention_fn"]

_FEW = 16  # tokens per call up to which a cache attends by itself


@functools.cache
def default_attention_fn(quant: Any = None) -> AttentionFn:
    """Return ``pallas_kernels.dot_product_attention``, with ``quant`` fixed if it is given.

    The same ``quant`` gives the same object, so that layers and models built alike share one
    compiled program.

    Args:
        quant: ``None``, or what ``pallas_kernels.dot_product_attention`` takes as ``quant``, such
            as ``"sage2"``; hashable.

    Returns:
        A callable with the signature of ``jax.nn.dot_product_attention``.

    >>> default_attention_fn("sage2") is default_attention_fn("sage2")
    True
    """
    if quant is None:
        return dot_product_attention
    return functools.partial(dot_product_attention, quant=quant)


class Attention(nnx.Module):
    """Causal self-attention with ``G = N // K`` query heads per key-value head.

    ``q = rope(norm(x W_q))``, ``k = rope(norm(x W_k))``, ``v = x W_v``, and
    ``out = concat_n(softmax(scale · q_n kᵀ_{n // G} + mask) v_{n // G}) W_o``.

    Projections are ``flax.nnx.Linear`` with two-dimensional kernels (``q_proj``, ``k_proj``,
    ``v_proj``, ``out_proj``), so that a recipe can set their ``dot_general`` and a sharding rule
    can split heads by the kernel's last (for ``out_proj`` first) axis. Memory is that of the
    attention function plus the projections; gradients flow wherever the function has them.

    Args:
        embed_dim: model dimension ``D``.
        num_heads: query heads ``N``.
        num_kv_heads: key-value heads ``K``, a divisor of ``N``; by default ``N``.
        head_dim: ``H``; by default ``D // N``, which must then divide.
        qkv_bias: add a bias to the query, key and value projections.
        out_bias: add a bias to the output projection.
        qk_norm: RMS-normalise each query and key head before RoPE.
        norm_eps: ``eps`` of these norms.
        norm_scale_plus_one: Gemma's ``1 + scale`` in these norms.
        rope: frequency rule, or ``None`` for no position encoding.
        window: number of tokens a query sees, itself included; ``None`` for all before it.
        scale: softmax scale; by default ``H ** -0.5``.
        attention_fn: callable with ``jax.nn.dot_product_attention``'s signature; by default
            ``pallas_kernels.dot_product_attention``.
        quant: shorthand for ``pallas_kernels.dot_product_attention`` with this ``quant``.
        dtype: dtype of the computation.
        param_dtype: dtype of the stored parameters.
        kernel_init: initialiser of the query, key and value kernels.
        out_kernel_init: initialiser of the output kernel; by default ``kernel_init``.
        rngs: source of the initial parameters.

    Raises:
        ValueError: head counts or sizes do not fit, or ``attention_fn`` and ``quant`` are both
            given.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = Attention(16, 4, 2, attention_fn=jax.nn.dot_product_attention, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 3, 16))).shape
    (1, 3, 16)

    References: Ainslie et al., "GQA", 2023, section 2; Henry et al., "Query-Key Normalization for
    Transformers", 2020, section 2 (here with RMSNorm).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_scale_plus_one: bool = False,
        rope: RopeConfig | None = RopeConfig(),  # noqa: B008 (frozen)
        window: int | None = None,
        scale: float | None = None,
        attention_fn: AttentionFn | None = None,
        quant: Any = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (pure)
        out_kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None:
            head_dim = _default_head_dim(embed_dim, num_heads)
        _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim, window)
        if attention_fn is not None and quant is not None:
            raise ValueError(
                f"attention_fn and quant ({quant!r}) are both given; expected one of them: quant "
                "is short for pallas_kernels.dot_product_attention with that quant"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope, self.window = rope, window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.attention_fn = default_attention_fn(quant) if attention_fn is None else attention_fn

        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = functools.partial(linear, embed_dim, use_bias=qkv_bias, kernel_init=kernel_init)
        self.q_proj = project(num_heads * head_dim)
        self.k_proj = project(num_kv_heads * head_dim)
        self.v_proj = project(num_kv_heads * head_dim)
        self.out_proj = linear(
            num_heads * head_dim,
            embed_dim,
            use_bias=out_bias,
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
        )
        norm = functools.partial(
            RMSNorm,
            head_dim,
            eps=norm_eps,
            scale_plus_one=norm_scale_plus_one,
            param_dtype=param_dtype,
        )
        self.q_norm = norm() if qk_norm else None
        self.k_norm = norm() if qk_norm else None

    def qkv(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Project ``x [B, T, D]``; return ``q [B, T, N, H]`` and ``k, v [B, T, K, H]`` after RoPE.

        ``positions [B, T]`` are logical positions in tokens.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).reshape(heads)  # [B, T, N, H]
        k = self.k_proj(x).reshape(heads)  # [B, T, K, H]
        v = self.v_proj(x).reshape(heads)  # [B, T, K, H]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = apply_rope(q, positions, self.rope), apply_rope(k, positions, self.rope)
        return q, k, v

    def __call__(
        self,
        x: Array,
        *,
        positions: Array | None = None,
        valid: Array | None = None,
        cache: Any = None,
        attention_fn: AttentionFn | None = None,
    ) -> Any:
        """Attend each token to itself and the tokens before it.

        Args:
            x: ``[B, T, D]``.
            positions: ``[B, T]`` integer, logical positions in tokens for RoPE; ``arange(T)`` by
                default. With a cache they are needed, since the cache knows what came before.
                Without a cache the causal order is that of the axis ``T``.
            valid: ``[B, T]`` bool, False for padding, which no token attends to. A row that sees
                nothing gives finite numbers without meaning.
            cache: the cache of this layer (see ``jaxeff.kv_cache``) or ``None``.
            attention_fn: replaces the module's own for this call.

        Returns:
            ``[B, T, D]``; with a cache the pair of this and the updated cache.

        Raises:
            ValueError: ``x`` has the wrong rank, or a cache comes without positions.
        """
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}; expected three axes [B, T, D]")
        if positions is None:
            if cache is not None:
                raise ValueError("positions is None; with a cache they are needed, shape [B, T]")
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        attend = self.attention_fn if attention_fn is None else attention_fn
        q, k, v = self.qkv(x, positions)
        if cache is None:
            out = attend(q, k, v, scale=self.scale, **self._mask_arguments(x.shape[1], valid))
        else:
            if hasattr(cache, "note"):  # a view that scores entries by what they add to the output
                cache = cache.note(x, _kernel(self.out_proj))
            cache = cache.update(k, v, positions=positions, valid=valid, queries=q)
            few = x.shape[1] <= _FEW or getattr(cache, "attends_many", False)
            if attend is dot_product_attention and few and hasattr(cache, "attend"):
                # The cache reads itself as it is stored, and knows what is seen without an array.
                out = cache.attend(q, positions=positions, window=self.window, scale=self.scale)
            else:
                k, v = cache.read(q.dtype)  # [B, S, K, H]
                mask = cache.mask(positions, self.window)  # [B, K, T, S]
                mask = jnp.repeat(mask, self.num_heads // self.num_kv_heads, axis=1)
                out = attend(q, k, v, mask=mask, scale=self.scale)  # mask: [B, N, T, S]
        out = self.out_proj(out.reshape(*x.shape[:2], -1))  # [B, T, D]
        return out if cache is None else (out, cache)

    def _mask_arguments(self, length: int, valid: Array | None) -> dict[str, Any]:
        # Only what is needed is passed: a kernel then knows statically that nothing else is masked.
        arguments: dict[str, Any] = {"is_causal": True}
        if self.window is not None and self.window < length:
            arguments["local_window_size"] = (self.window - 1, 0)
        if valid is not None:
            arguments["mask"] = valid[:, None, None, :]  # [B, 1, 1, S]
        return arguments


def _default_head_dim(embed_dim: int, num_heads: int) -> int:
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; give head_dim"
        )
    return embed_dim // num_heads


def _check_sizes(
    embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    sizes = {
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "window": 1 if window is None else window,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads is {num_kv_heads}; num_heads ({num_heads}) must be a multiple of it"
        )


def _kernel(layer: nnx.Module) -> Array:
    """Kernel ``[in, out]`` of a linear layer, or of what was put in its place."""
    return layer.kernel[...] if hasattr(layer, "kernel") else layer.merged()
