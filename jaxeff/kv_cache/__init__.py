"""Caches of keys and values: immutable pytrees with static capacity."""

from jaxeff.kv_cache.base import KVCache, LayerCache, check_invariants, tree_bytes
from jaxeff.kv_cache.dense import DenseCache, DenseLayer

__all__ = ["DenseCache", "DenseLayer", "KVCache", "LayerCache", "check_invariants", "tree_bytes"]
