"""Low-precision training: recipes, quantised matrix products, and how a model gets them."""

from jaxeff.quant.apply import (
    EXEMPT,
    QAFPhase,
    QuantizedDot,
    QuantizedEinsum,
    SRKey,
    apply_recipe,
    fold_step,
    set_phase,
)
from jaxeff.quant.calibrate import (
    AttentionPolicy,
    attention_errors,
    calibrate_attention,
    set_attention,
)
from jaxeff.quant.delayed import AmaxHistory, advance_history, init_history
from jaxeff.quant.dot import dot_general, quantized_dot_general
from jaxeff.quant.einsum import quantized_einsum
from jaxeff.quant.forward import fp8_dot_general, use_fp8
from jaxeff.quant.operand import round_operand
from jaxeff.quant.recipe import (
    POINTS,
    RECIPES,
    RHT,
    DelayedScaling,
    OperandQuant,
    Recipe,
    resolve_recipe,
)
from jaxeff.quant.weights import WEIGHTS, PackedLinear, WeightQuant, quantize_weights, weight_bytes

__all__ = [
    "EXEMPT",
    "POINTS",
    "RECIPES",
    "RHT",
    "WEIGHTS",
    "AmaxHistory",
    "AttentionPolicy",
    "DelayedScaling",
    "OperandQuant",
    "PackedLinear",
    "QAFPhase",
    "QuantizedDot",
    "QuantizedEinsum",
    "Recipe",
    "SRKey",
    "WeightQuant",
    "advance_history",
    "apply_recipe",
    "attention_errors",
    "calibrate_attention",
    "dot_general",
    "fold_step",
    "fp8_dot_general",
    "init_history",
    "quantize_weights",
    "quantized_dot_general",
    "quantized_einsum",
    "resolve_recipe",
    "round_operand",
    "set_attention",
    "set_phase",
    "use_fp8",
    "weight_bytes",
]
