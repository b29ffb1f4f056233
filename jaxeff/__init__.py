"""Cheap attention, KV caches and training for JAX, without losing quality.

Submodules load when they are first used, so ``import jaxeff`` costs little beyond jax and flax:

* ``jaxeff.nn``, ``jaxeff.models``: NNX modules and one decoder for Llama 3, Qwen 2.5/3, Gemma 3.
* ``jaxeff.quant``, ``jaxeff.optim``, ``jaxeff.train``: low-precision recipes and a plain loop.
* ``jaxeff.sparse``: block-sparse patterns, SpargeAttn with its tuner, and SLA.
* ``jaxeff.finetune``: LoRA, QLoRA, FP8 LoRA and FALQON by path rule, and their export.
* ``jaxeff.kv_cache``, ``jaxeff.compress``, ``jaxeff.generate``: caches and their compression.
* ``jaxeff.checkpoint``, ``jaxeff.data``: orbax checkpoints and the demo corpus.

The kernels themselves are in :mod:`pallas_kernels`.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "checkpoint",
    "compress",
    "data",
    "finetune",
    "generate",
    "kv_cache",
    "models",
    "nn",
    "optim",
    "quant",
    "sparse",
    "train",
)

__all__ = [*_SUBMODULES, "__version__"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"jaxeff.{name}")
    raise AttributeError(f"module 'jaxeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
