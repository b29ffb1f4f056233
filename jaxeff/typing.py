"""Shape letters and array aliases used in every annotation and docstring of jaxeff.

========  =====================================================================
letter    meaning
========  =====================================================================
``B``     batch
``T``     query tokens
``S``     key and value tokens (cache slots where there is a cache)
``N``     query heads
``K``     key-value heads; query head ``n`` reads key-value head ``n // G``
``G``     query heads per key-value head, ``N // K``
``H``     dimensions of one head
``D``     model (embedding) dimensions
``F``     hidden dimensions of the MLP
``V``     vocabulary
``C``     cache capacity in tokens
========  =====================================================================
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.typing import ArrayLike, DTypeLike

__all__ = ["Array", "ArrayLike", "AttentionFn", "AttentionFns", "DTypeLike"]

Array = jax.Array


class AttentionFn(Protocol):
    """A callable with the signature of ``jax.nn.dot_product_attention``.

    ``out[b, t, n] = Σ_s softmax_s(scale · q[b, t, n]·k[b, s, n // G] | mask) v[b, s, n // G]``

    jaxeff passes ``mask``, ``scale``, ``is_causal`` and ``local_window_size`` by keyword and only
    where they are needed, so that a callable without the others can be used too.
    """

    def __call__(self, query: Array, key: Array, value: Array, /, **kwargs: Any) -> Array:
        """Attend ``query [B, T, N, H]`` to ``key, value [B, S, K, H]``; return ``[B, T, N, H]``."""
        ...


AttentionFns = AttentionFn | Sequence[AttentionFn]
