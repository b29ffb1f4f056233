"""Low-precision training: recipes, quantised matrix products, and how a model gets them."""

from jaxeff.quant.apply import EXEMPT, QuantizedDot, SRKey, apply_recipe, fold_step
from jaxeff.quant.dot import dot_general, quantized_dot_general
from jaxeff.quant.recipe import POINTS, RECIPES, RHT, OperandQuant, Recipe, resolve_recipe

__all__ = [
    "EXEMPT",
    "POINTS",
    "RECIPES",
    "RHT",
    "OperandQuant",
    "QuantizedDot",
    "Recipe",
    "SRKey",
    "apply_recipe",
    "dot_general",
    "fold_step",
    "quantized_dot_general",
    "resolve_recipe",
]
