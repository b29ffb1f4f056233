"""Methods that decide which cache entries to keep: one file per method, found by name."""

from jaxeff.compress import kvzip, rkv
from jaxeff.compress.base import Compressor, ContextPass, select
from jaxeff.compress.full import FullKV
from jaxeff.compress.kvzip import KVzip
from jaxeff.compress.registry import COMPRESSORS, parse
from jaxeff.compress.rkv import RKV, RKVScores

__all__ = [
    "COMPRESSORS",
    "RKV",
    "Compressor",
    "ContextPass",
    "FullKV",
    "KVzip",
    "RKVScores",
    "kvzip",
    "parse",
    "rkv",
    "select",
]
