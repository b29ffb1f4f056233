"""One causal decoder that covers Llama 3, Qwen 2.5, Qwen 3 and Gemma 3 by configuration."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.models.config import ModelConfig
from jaxeff.nn import Attention, GatedMLP, RMSNorm, TransformerBlock
from jaxeff.typing import Array, AttentionFn, AttentionFns, DTypeLike

__all__ = ["Decoder"]


class Decoder(nnx.Module):
    """A language model: embedding, transformer blocks, final norm, logits.

    ``logits = norm(block_L(… block_1(embed(tokens)))) W_head``, where ``W_head`` is the embedding
    transposed if the configuration ties them. Parameters lie at ``embed.embedding``,
    ``layers[i].attention.{q,k,v,out}_proj.kernel``, ``layers[i].mlp.{gate,up,down}_proj.kernel``,
    the norms' ``scale`` and ``lm_head.kernel``; all kernels are ``[in, out]``.

    Fresh kernels are drawn with variance ``1 / in``; those that write to the residual stream
    (``out_proj``, ``down_proj``) with ``1 / (2 L in)``, so that its variance does not grow with
    the depth ``L``; the embedding and ``lm_head`` with ``1 / D`` and ``1 / D²`` (near-uniform
    first predictions).

    Args:
        config: the model's configuration.
        rngs: source of the initial parameters.
        dtype: dtype of the computation; norms, softmax statistics and logits are float32 anyway.
        param_dtype: dtype of the stored parameters.
        attention_fn: callable with ``jax.nn.dot_product_attention``'s signature, or one per layer;
            by default ``pallas_kernels.dot_product_attention``.

    Raises:
        ValueError: as many attention functions as layers are expected, and another number came.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> config = ModelConfig.llama(vocab_size=256, num_layers=2, embed_dim=32, num_heads=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0), attention_fn=jax.nn.dot_product_attention)
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 256)

    References: Llama Team, "The Llama 3 Herd of Models", 2024, section 3.2; Qwen Team, "Qwen2.5
    Technical Report", 2024, section 2, and "Qwen3 Technical Report", 2025, section 2; Gemma Team,
    "Gemma 3 Technical Report", 2025, section 2.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        attention_fn: AttentionFns | None = None,
    ):
        self.config = config
        self.dtype = dtype
        depth, dim = config.num_layers, config.embed_dim
        self.embed = _Embedding(
            config.vocab_size,
            dim,
            embedding_init=nnx.initializers.normal(dim**-0.5),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        attention_fns = _per_layer(attention_fn, depth)
        self.layers = nnx.List(
            [
                _block(config, layer, fn, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for layer, fn in enumerate(attention_fns)
            ]
        )
        self.final_norm = RMSNorm(
            dim,
            eps=config.norm_eps,
            scale_plus_one=config.norm_scale_plus_one,
            param_dtype=param_dtype,
        )
        head = functools.partial(
            nnx.Linear,
            use_bias=False,
            kernel_init=nnx.initializers.normal(1 / dim),
            dtype=dtype,
            param_dtype=param_dtype,
            preferred_element_type=jnp.float32,
            rngs=rngs,
        )
        self.lm_head = None if config.tie_embeddings else head(dim, config.vocab_size)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        valid: Array | None = None,
        cache: Any = None,
        attention_fn: AttentionFns | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Return the logits of the next token at each position.

        Args:
            tokens: ``[B, T]`` integer, ids from 0 to ``V - 1``; any where ``valid`` is False.
                Concrete ids are checked; inside ``jit``, where values are unknown, an id of ``V``
                or more gives NaN logits in its row.
            positions: ``[B, T]`` integer, logical positions in tokens. By default each valid token
                follows the one before it, starting at ``cache.seen`` or 0.
            valid: ``[B, T]`` bool, False for padding on either side: nothing attends to it, it
                takes no position, and its own logits are finite without meaning.
            cache: a ``jaxeff.kv_cache.KVCache`` with one layer per layer of the model. Without it,
                the causal order is that of the axis ``T``.
            attention_fn: replaces the model's own for this call; one callable or one per layer.
            return_hidden: also return the hidden state after each layer.

        Returns:
            float32 logits ``[B, T, V]``; with a cache ``(logits, new cache)``. With
            ``return_hidden`` one more entry at the end: a tuple of ``num_layers`` arrays
            ``[B, T, D]``, before the final norm.

        Raises:
            ValueError: an argument has another shape, dtype or range than above.
        """
        _check_tokens(tokens)
        _check_like_tokens("positions", positions, jnp.integer, tokens.shape)
        _check_like_tokens("valid", valid, jnp.bool_, tokens.shape)
        if valid is not None:
            tokens = jnp.where(valid, tokens, 0)  # an id outside would give NaN, and 0 · NaN too
        _check_range(tokens, self.config.vocab_size)
        layer_caches = self._layer_caches(cache)
        attention_fns = _per_layer(attention_fn, self.config.num_layers)
        if positions is None:
            positions = _positions(tokens.shape, valid, cache)

        x = self.embed(tokens)  # [B, T, D]
        if self.config.embed_scale is not None:
            # Rounded to the compute dtype first, as Gemma was trained.
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        hidden, new_layers = [], []
        for block, layer_cache, fn in zip(self.layers, layer_caches, attention_fns, strict=True):
            x = block(x, positions=positions, valid=valid, cache=layer_cache, attention_fn=fn)
            if layer_cache is not None:
                x, layer_cache = x
            hidden.append(x)
            new_layers.append(layer_cache)

        results = [self.logits(x)]
        if cache is not None:
            real = jnp.ones(tokens.shape, bool) if valid is None else valid
            results.append(cache.advance(tuple(new_layers), real))
        if return_hidden:
            results.append(tuple(hidden))
        return results[0] if len(results) == 1 else tuple(results)

    def logits(self, hidden: Array) -> Array:
        """Map the last hidden state ``[B, T, D]`` to float32 logits ``[B, T, V]``."""
        x = self.final_norm(hidden)
        head = self.lm_head
        is_plain = type(head) is nnx.Linear and head.dot_general is jax.lax.dot_general
        if head is None:
            logits = _to_logits(x, self.embed.embedding[...].T.astype(x.dtype))  # [V, D] transposed
        elif is_plain and head.bias is None:
            logits = _to_logits(x, head.kernel[...].astype(x.dtype))
        else:
            logits = head(x)
        logits = logits.astype(jnp.float32)
        cap = self.config.final_logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _layer_caches(self, cache: Any) -> tuple[Any, ...]:
        if cache is None:
            return (None,) * self.config.num_layers
        if len(cache.layers) != self.config.num_layers:
            raise ValueError(
                f"cache has {len(cache.layers)} layers; the model has {self.config.num_layers}"
            )
        return tuple(cache.layers)


@jax.custom_vjp
def _to_logits(x: Array, kernel: Array) -> Array:
    """``x kernel`` in float32, whose gradient is multiplied in the dtype of ``x``.

    Autodiff would multiply the float32 gradient of the logits by 16-bit operands, for which a GPU
    takes 32-bit products: two of the three largest products of a small model, at half the rate.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _to_logits_forward(x, kernel):
    return _to_logits(x, kernel), (x, kernel)


def _to_logits_backward(residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    grad_x = jnp.einsum("btv,dv->btd", gradient, kernel)
    return grad_x, jnp.einsum("btd,btv->dv", x, gradient)


_to_logits.defvjp(_to_logits_forward, _to_logits_backward)


_FEW_IDS = 1024  # up to which the gradient of an embedding is a product


class _Embedding(nnx.Embed):
    """An embedding whose gradient is summed in float32, and fast where many tokens share an id.

    Autodiff would scatter it in the dtype of the computation: in bfloat16 a row that thousands of
    tokens add to soon stops growing, and on a GPU the additions to one row wait for each other.
    """

    def __call__(self, tokens: Array) -> Array:
        return _look_up(self.dtype, self.embedding[...], tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype: DTypeLike, table: Array, tokens: Array) -> Array:
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _look_up_forward(dtype, table, tokens):
    like = jnp.zeros((table.shape[0], 0), table.dtype)
    return _look_up(dtype, table, tokens), (tokens, like)


def _look_up_backward(dtype, residuals, gradient):
    tokens, like = residuals
    count, kind = like.shape[0], like.dtype
    tokens, gradient = tokens.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
    if count <= _FEW_IDS:
        chosen = jax.nn.one_hot(tokens, count, dtype=gradient.dtype)
        total = jnp.einsum(
            "tv,td->vd", chosen, gradient, precision="highest", preferred_element_type=jnp.float32
        )
    else:
        total = jnp.zeros((count, gradient.shape[-1]), jnp.float32)
        total = total.at[tokens].add(gradient.astype(jnp.float32), mode="drop")
    return total.astype(kind), np.zeros(residuals[0].shape, jax.dtypes.float0)


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _block(
    config: ModelConfig,
    layer: int,
    attention_fn: AttentionFn | None,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> TransformerBlock:
    init = nnx.initializers.lecun_normal()
    # variance_scaling's first argument multiplies the variance 1 / in.
    residual_init = nnx.initializers.variance_scaling(
        1 / (2 * config.num_layers), "fan_in", "truncated_normal"
    )
    attention = Attention(
        config.embed_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        norm_scale_plus_one=config.norm_scale_plus_one,
        rope=config.layer_rope(layer),
        window=config.layer_windows[layer],
        scale=config.query_scale,
        attention_fn=attention_fn,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=init,
        out_kernel_init=residual_init,
        rngs=rngs,
    )
    mlp = GatedMLP(
        config.embed_dim,
        config.mlp_dim,
        activation=config.activation,
        use_bias=config.mlp_bias,
        smooth=config.smooth_mlp,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=init,
        down_kernel_init=residual_init,
        rngs=rngs,
    )
    return TransformerBlock(
        attention,
        mlp,
        config.embed_dim,
        post_norms=config.post_norms,
        norm_eps=config.norm_eps,
        norm_scale_plus_one=config.norm_scale_plus_one,
        param_dtype=param_dtype,
    )


def _per_layer(
    attention_fn: AttentionFns | None, num_layers: int
) -> tuple[AttentionFn | None, ...]:
    if attention_fn is None or callable(attention_fn):
        return (attention_fn,) * num_layers
    fns = tuple(attention_fn)
    if len(fns) != num_layers:
        raise ValueError(
            f"attention_fn has {len(fns)} entries; expected one per layer ({num_layers})"
        )
    return fns


def _positions(shape: tuple[int, int], valid: Array | None, cache: Any) -> Array:
    """Continue after ``cache.seen``; padding takes the position of the token before it."""
    if valid is None:
        steps = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    else:
        steps = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    return steps if cache is None else cache.seen[:, None] + steps  # [B, T]


def _check_tokens(tokens: Any) -> None:
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape is None or len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        came = type(tokens).__name__ if shape is None else f"{dtype} of shape {shape}"
        raise ValueError(f"tokens are {came}; expected an integer array [B, T]")
    if 0 in shape:
        raise ValueError(f"tokens have shape {shape}; expected at least one row and one token")


def _check_range(tokens: Any, vocab_size: int) -> None:
    if not isinstance(tokens, jax.core.Tracer):
        low, high = (int(bound) for bound in (np.min(tokens), np.max(tokens)))
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"tokens range from {low} to {high}; expected ids from 0 to {vocab_size - 1}"
            )


def _check_like_tokens(name: str, array: Any, kind: Any, shape: tuple[int, int]) -> None:
    if array is None:
        return
    came_shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if came_shape != shape or not jnp.issubdtype(dtype, kind):
        came = type(array).__name__ if came_shape is None else f"{dtype} of shape {came_shape}"
        expected = "bool" if kind is jnp.bool_ else "integer"
        raise ValueError(f"{name} is {came}; expected {expected} of the tokens' shape {shape}")
