"""Parameter-efficient finetuning by path rule: LoRA, QLoRA, FP8 LoRA and FALQON.

``adapt`` puts a method into a model, ``fit`` trains it, ``merge`` makes a plain model of it again;
``save_merged``, ``save_fp8`` and ``save_adapters`` write what other libraries read.
"""

from jaxeff.finetune.adapt import DECODER_LAYERS, adapt, adapted_layers, merge
from jaxeff.finetune.melded import meld_weight, melded_dot
from jaxeff.finetune.methods import FALQON, FP8LoRA, LoRA, QLoRA
from jaxeff.finetune.training import finetune_config, fit, init_state, train_step

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
    "meld_weight",
    "melded_dot",
    "merge",
    "train_step",
]
