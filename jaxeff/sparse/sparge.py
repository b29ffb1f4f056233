"""SpargeAttn as a module: thresholds per head, and tokens in the order of a curve."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.sparse.hilbert import inverse_order
from jaxeff.typing import Array, ArrayLike
from pallas_kernels.ops.attention.sparge import BLOCK_KV, BLOCK_Q, sparge_attention

__all__ = ["SpargeAttention", "SpargeThresholds", "Threshold"]


class SpargeThresholds(NamedTuple):
    """What SpargeAttn decides with: a pytree of numbers or arrays ``[N]``, one per head.

    Args:
        simthreshd1: blocks less self-similar than this are always computed; in ``[-1, 1]``.
        cdfthreshd: share of the predicted softmax that is kept, in ``[0, 1]``, or ``None``.
        topk: share of all key tiles that is kept, in ``[0, 1]``, or ``None``.
        pvthreshd: second stage, in powers of two, or ``None`` for none.

    >>> SpargeThresholds(cdfthreshd=0.9).simthreshd1
    -0.1

    References: Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.
    """

    simthreshd1: ArrayLike = -0.1
    cdfthreshd: ArrayLike | None = None
    topk: ArrayLike | None = None
    pvthreshd: ArrayLike | None = None


class Threshold(nnx.Variable):
    """A threshold ``[]`` or ``[N]``: state of the model that no optimiser moves."""


class SpargeAttention(nnx.Module):
    """Attention over the tiles that SpargeAttn predicts, a drop-in ``attention_fn``.

    Takes the arguments of ``jax.nn.dot_product_attention``. The thresholds are NNX variables, so
    that they travel with checkpoints and can be set without compiling anew. Memory and gradient
    as in ``pallas_kernels.ops.attention.sparge.sparge_attention``.

    Args:
        thresholds: for example those that :func:`jaxeff.sparse.tune_sparge` found.
        order: int ``[T]``, the order in which tokens are cut into tiles, such as
            :func:`jaxeff.sparse.hilbert_order` of an image's or video's shape; the output is in the
            order of the input. ``None`` leaves them as they are.
        attention_sink: always keep the first tile of keys.
        quant: ``"sage2_per_block"``, ``None`` for full precision, or another variant.
        block_q: queries per tile, tokens.
        block_kv: keys per tile, tokens.
        implementation: as in ``pallas_kernels.dot_product_attention``.

    Raises:
        ValueError: not exactly one of ``cdfthreshd`` and ``topk`` is set, or ``order`` is not a
            permutation.

    >>> attend = SpargeAttention(SpargeThresholds(topk=0.5))
    >>> x = jnp.ones((1, 256, 2, 16))
    >>> attend(x, x, x, is_causal=True).shape
    (1, 256, 2, 16)

    References: Zhang et al., SpargeAttn, arXiv 2502.18137, sections 3.2 to 3.7.
    """

    def __init__(
        self,
        thresholds: SpargeThresholds,
        *,
        order: np.ndarray | None = None,
        attention_sink: bool = True,
        quant: Any = "sage2_per_block",
        block_q: int = BLOCK_Q,
        block_kv: int = BLOCK_KV,
        implementation: str | None = None,
    ):
        if (thresholds.cdfthreshd is None) == (thresholds.topk is None):
            raise ValueError(
                "exactly one of cdfthreshd and topk must be set; got "
                f"cdfthreshd={thresholds.cdfthreshd}, topk={thresholds.topk}"
            )
        for name, value in thresholds._asdict().items():
            value = None if value is None else Threshold(jnp.asarray(value, jnp.float32))
            setattr(self, name, value)
        self.order = None if order is None else _checked(order)
        self.attention_sink, self.quant = attention_sink, quant
        self.block_q, self.block_kv, self.implementation = block_q, block_kv, implementation

    @property
    def thresholds(self) -> SpargeThresholds:
        """The thresholds as arrays."""
        values = (getattr(self, name) for name in SpargeThresholds._fields)
        return SpargeThresholds(*(None if value is None else value[...] for value in values))

    def __call__(
        self, query: Array, key: Array, value: Array, *, return_sparsity: bool = False, **rules: Any
    ) -> Any:
        """Attend.

        Args:
            query: ``[B, T, N, H]``.
            key: ``[B, S, K, H]``.
            value: like ``key``.
            return_sparsity: also return the share of the products that was left out, f32
                ``[B, N]``.
            **rules: ``mask``, ``scale``, ``is_causal``, ``local_window_size`` and the other rules
                of ``pallas_kernels.dot_product_attention``; no bias.

        Returns:
            ``[B, T, N, H]``, or a pair.

        Raises:
            ValueError: shapes do not fit.
            NotImplementedError: a rule other than ``scale`` together with ``order``.
        """
        order = None if self.order is None else np.asarray(self.order)
        if order is not None:
            given = sorted(
                name for name, rule in rules.items() if rule is not None and rule is not False
            )
            if set(given) - {"scale"}:
                raise NotImplementedError(
                    f"order changes which tokens are neighbours, so {given} would mean something "
                    "else; leave order out"
                )
            if query.shape[1] != len(order) or key.shape[1] != len(order):
                raise ValueError(
                    f"order has {len(order)} tokens; query has {query.shape[1]}, key {key.shape[1]}"
                )
            query, key, value = (x[:, order] for x in (query, key, value))
        out, sparsity = sparge_attention(
            query,
            key,
            value,
            **self.thresholds._asdict(),
            attention_sink=self.attention_sink,
            quant=self.quant,
            block_q=self.block_q,
            block_kv=self.block_kv,
            implementation=self.implementation,
            return_sparsity=True,
            **rules,
        )
        out = out if order is None else out[:, inverse_order(order)]
        return (out, sparsity) if return_sparsity else out


def _checked(order: Any) -> tuple[int, ...]:
    order = np.asarray(order)
    if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"order must be a permutation of 0 … T-1; got shape {order.shape}")
    return tuple(order.tolist())  # static and hashable
