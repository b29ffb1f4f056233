"""The baseline that evicts nothing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxeff.compress.base import Compressor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullKV(Compressor):
    """Keeps every entry; with ``storage="int8"`` a quantised full cache.

    Args:
        storage: how the cache is stored; ``None``: as the caller asks.

    Examples:
        >>> FullKV(storage="int8").prefill_capacity(prompt=8, room=2)
        10

    References:
        R-KV (arXiv 2505.24133), section 4 (the FullKV baseline).
    """

    name: ClassVar[str] = "full"
