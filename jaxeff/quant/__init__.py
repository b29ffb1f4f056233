"""Low-precision training: recipes, quantised matrix products, and how a model gets them."""

from jaxeff.quant.apply import EXEMPT, QuantizedDot, SRKey, apply_recipe, fold_step
from jaxeff.quant.calibrate import (
    AttentionPolicy,
    attention_errors,
    calibrate_attention,
    set_attention,
)
from jaxeff.quant.dot import dot_general, quantized_dot_general
from jaxeff.quant.recipe import POINTS, RECIPES, RHT, OperandQuant, Recipe, resolve_recipe
from jaxeff.quant.weights import WEIGHTS, PackedLinear, WeightQuant, quantize_weights, weight_bytes

__all__ = [
    "EXEMPT",
    "POINTS",
    "RECIPES",
    "RHT",
    "WEIGHTS",
    "AttentionPolicy",
    "OperandQuant",
    "PackedLinear",
    "QuantizedDot",
    "Recipe",
    "SRKey",
    "WeightQuant",
    "apply_recipe",
    "attention_errors",
    "calibrate_attention",
    "dot_general",
    "fold_step",
    "quantize_weights",
    "quantized_dot_general",
    "resolve_recipe",
    "set_attention",
    "weight_bytes",
]
