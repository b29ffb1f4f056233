"""Methods that decide which cache entries to keep: one file per method, found by name."""

from jaxeff.compress import (
    expected_attention,
    h2o,
    keydiff,
    knorm,
    kvzip,
    random_eviction,
    rkv,
    snapkv,
    streaming_llm,
    tova,
)
from jaxeff.compress.base import Compressor, ContextPass, select
from jaxeff.compress.expected_attention import ExpectedAttention
from jaxeff.compress.full import FullKV
from jaxeff.compress.h2o import H2O
from jaxeff.compress.keydiff import KeyDiff
from jaxeff.compress.knorm import Knorm
from jaxeff.compress.kvzip import KVzip
from jaxeff.compress.random_eviction import Random
from jaxeff.compress.registry import COMPRESSORS, parse
from jaxeff.compress.rkv import RKV, RKVScores
from jaxeff.compress.scorer import Scorer
from jaxeff.compress.snapkv import SnapKV
from jaxeff.compress.streaming_llm import StreamingLLM
from jaxeff.compress.tova import TOVA
from jaxeff.compress.wrappers import AdaKV, Compose, PerLayer, Quantized

random = random_eviction  # so that `compress.<method>.scores` has every method's name

__all__ = [
    "COMPRESSORS",
    "H2O",
    "RKV",
    "TOVA",
    "AdaKV",
    "Compose",
    "Compressor",
    "ContextPass",
    "ExpectedAttention",
    "FullKV",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "PerLayer",
    "Quantized",
    "RKVScores",
    "Random",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "expected_attention",
    "h2o",
    "keydiff",
    "knorm",
    "kvzip",
    "parse",
    "random",
    "random_eviction",
    "rkv",
    "select",
    "snapkv",
    "streaming_llm",
    "tova",
]
