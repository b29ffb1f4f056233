"""Caches of keys and values: immutable pytrees with static capacity."""

from jaxeff.kv_cache.base import (
    CACHE_VERSION,
    KVCache,
    LayerCache,
    Observer,
    check_invariants,
    tree_bytes,
)
from jaxeff.kv_cache.dense import DenseCache, DenseLayer
from jaxeff.kv_cache.ring import RingLayer
from jaxeff.kv_cache.storage import STORES, store_name
from jaxeff.kv_cache.tiled import TiledLayer

__all__ = [
    "CACHE_VERSION",
    "STORES",
    "DenseCache",
    "DenseLayer",
    "KVCache",
    "LayerCache",
    "Observer",
    "RingLayer",
    "TiledLayer",
    "check_invariants",
    "store_name",
    "tree_bytes",
]
