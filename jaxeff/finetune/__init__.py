"""Parameter-efficient finetuning by path rule: LoRA, QLoRA, FP8 LoRA and FALQON.

``adapt`` puts a method into a model, ``fit`` trains it, ``merge`` makes a plain model of it again;
``save_merged``, ``save_fp8`` and ``save_adapters`` write what other libraries read.
"""

from jaxeff.finetune.adapt import adapt, adapted_layers, merge
from jaxeff.finetune.export import load_fp8, save_fp8, save_merged
from jaxeff.finetune.melded import meld_weight, melded_dot
from jaxeff.finetune.methods import FALQON, FP8LoRA, LoRA, QLoRA
from jaxeff.finetune.peft import load_adapters, save_adapters
from jaxeff.finetune.training import finetune_config, fit, init_state, train_step
from jaxeff.quant.module_paths import DECODER_LAYERS

__all__ = [
    "DECODER_LAYERS",
    "FALQON",
    "FP8LoRA",
    "LoRA",
    "QLoRA",
    "adapt",
    "adapted_layers",
    "finetune_config",
    "fit",
    "init_state",
    "load_adapters",
    "load_fp8",
    "meld_weight",
    "melded_dot",
    "merge",
    "save_adapters",
    "save_fp8",
    "save_merged",
    "train_step",
]
