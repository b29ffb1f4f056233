"""SLA: softmax attention over the best tiles plus linear attention over everything."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.typing import Array
from pallas_kernels import BlockMask, dot_product_attention
from pallas_kernels.ops.attention.sparge import block_means

__all__ = ["SparseLinearAttention", "sparse_linear_attention"]

FEATURES = {
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "elu": lambda x: jax.nn.elu(x) + 1.0,
    "relu": jax.nn.relu,
}


def sparse_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    weight: Array,
    *,
    topk: float = 0.2,
    feature: str = "softmax",
    scale: float | None = None,
    block_q: int = 64,
    block_kv: int = 64,
    quant: Any = None,
    implementation: str | None = None,
) -> Array:
    """Add a linear attention over all tokens to the softmax attention over the best tiles.

    ``out = softmax_kept(scale · q kᵀ) v + W f(q) (f(k)ᵀ v) / (f(q)·Σ f(k) + 1e-5)``; in each row of
    tiles the ``topk`` share with the largest ``mean(Q_i)·mean(K_j − mean K)`` is kept. Forward and
    backward work on the kept tiles only; the choice of tiles has no gradient. Not causal.

    Args:
        query: ``[B, T, N, H]``.
        key: ``[B, S, K, H]``, N a multiple of K.
        value: like ``key``.
        weight: f32 ``[H, H]``, shared by the heads; zeros leave the sparse part alone.
        topk: share of the key tiles kept in each row, in ``(0, 1]``.
        feature: ``"softmax"`` over H, ``"elu"`` (plus 1) or ``"relu"``.
        scale: softmax scale; by default ``H ** -0.5``.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.
        quant: variant of the sparse part.
        implementation: as in ``pallas_kernels.dot_product_attention``.

    Returns:
        ``[B, T, N, H]`` in the dtype of ``query``.

    Raises:
        ValueError: a shape does not fit, ``topk`` is out of range or ``feature`` unknown.

    >>> x = jnp.ones((1, 128, 2, 16))
    >>> sparse_linear_attention(x, x, x, jnp.zeros((16, 16))).shape
    (1, 128, 2, 16)

    References: Zhang et al., SLA, arXiv 2509.24006, section 3.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    if weight.shape != (H, H):
        raise ValueError(f"weight has shape {weight.shape}; expected {(H, H)}")
    if not 0 < topk <= 1:
        raise ValueError(f"topk is {topk}; expected a number in (0, 1]")
    if feature not in FEATURES:
        raise ValueError(f"feature is {feature!r}; expected one of {', '.join(FEATURES)}")
    if N % K:
        raise ValueError(f"key has {K} heads; query heads ({N}) must be a multiple of it")
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    blocks = _best_tiles(*jax.lax.stop_gradient((q, k)), topk, block_q, block_kv)
    near = dot_product_attention(
        query, key, value, mask=blocks, scale=scale, quant=quant, implementation=implementation
    )
    f = FEATURES[feature]
    fq, fk = f(q).reshape(B, T, K, N // K, H), f(k)
    state = jnp.einsum("bskh,bske->bkhe", fk, v)
    total = jnp.einsum("btkgh,bkh->btkg", fq, fk.sum(1)) + 1e-5
    far = jnp.einsum("btkgh,bkhe->btkge", fq, state) / total[..., None]
    far = far.reshape(B, T, N, H) @ weight.astype(jnp.float32)
    return (near.astype(jnp.float32) + far).astype(query.dtype)


def _best_tiles(q: Array, k: Array, topk: float, block_q: int, block_kv: int) -> BlockMask:
    q_mean, _ = block_means(q, block_q)
    k_mean, _ = block_means(k - k.mean(1, keepdims=True), block_kv)
    k_mean = jnp.repeat(k_mean, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", q_mean, k_mean)
    sizes = {"block_q": block_q, "block_kv": block_kv}
    return BlockMask.from_scores(scores, q.shape[1], k.shape[1], topk=topk, **sizes)


class SparseLinearAttention(nnx.Module):
    """SLA with its trainable projection, a drop-in ``attention_fn`` of layers that are not causal.

    Args:
        head_dim: ``H``.
        topk: share of the key tiles kept in each row, in ``(0, 1]``.
        feature: ``"softmax"``, ``"elu"`` or ``"relu"``.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.
        quant: variant of the sparse part, such as ``"sage_bwd"``.
        implementation: as in ``pallas_kernels.dot_product_attention``.

    >>> attend = SparseLinearAttention(16)
    >>> x = jnp.ones((1, 128, 2, 16))
    >>> attend(x, x, x).shape
    (1, 128, 2, 16)

    References: Zhang et al., SLA, arXiv 2509.24006, section 3.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        topk: float = 0.2,
        feature: str = "softmax",
        block_q: int = 64,
        block_kv: int = 64,
        quant: Any = None,
        implementation: str | None = None,
    ):
        self.weight = nnx.Param(jnp.zeros((head_dim, head_dim), jnp.float32))
        self.topk, self.feature, self.quant = topk, feature, quant
        self.block_q, self.block_kv, self.implementation = block_q, block_kv, implementation

    def __call__(
        self, query: Array, key: Array, value: Array, *, scale: float | None = None, **rules: Any
    ) -> Array:
        """Attend ``query [B, T, N, H]`` to ``key, value [B, S, K, H]``; return ``[B, T, N, H]``.

        Raises:
            NotImplementedError: a mask, a window or causality is asked for: the linear part sums
                over all tokens.
        """
        given = sorted(name for name, x in rules.items() if x is not None and x is not False)
        if given:
            raise NotImplementedError(
                f"SLA attends to all tokens, so {given} cannot be served; use "
                "jaxeff.sparse.SpargeAttention"
            )
        return sparse_linear_attention(
            query,
            key,
            value,
            self.weight[...],
            topk=self.topk,
            feature=self.feature,
            scale=scale,
            block_q=self.block_q,
            block_kv=self.block_kv,
            quant=self.quant,
            implementation=self.implementation,
        )
