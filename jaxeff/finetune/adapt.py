"""Put a finetuning method into a model by rules over layer paths, and take it out again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxeff.finetune.layers import AdaptedLinear, FalqonLinear, Frozen, LoRALinear
from jaxeff.finetune.methods import FALQON, Method
from jaxeff.quant.module_paths import (
    DECODER_LAYERS,
    check_replaceable,
    dotted,
    get_module,
    linear_layers,
    match_rules,
    replace_objects,
    set_module,
)


def adapt(
    model: nnx.Module,
    rules: Method | Sequence[tuple[str, Method]],
    *,
    seed: int = 0,
) -> dict[str, str]:
    """Makes a model ready for parameter-efficient finetuning; the model is changed in place.

    A linear layer takes the method of the one rule whose expression is found in its path
    (``layers.0.mlp.up_proj``). Everything else is frozen: afterwards ``nnx.Param`` are the adapters
    and nothing else, so ``jaxeff.finetune.fit``, or any loop over ``nnx.Param``, trains just those.
    Weights are quantised layer by layer, and no copy in another format stays.

    Args:
      model: any NNX module with ``nnx.Linear`` layers.
      rules: pairs (regular expression, method), or one method for the linear layers of a decoder's
        blocks (``DECODER_LAYERS``).
      seed: seed of the adapters; each layer draws by its place in the model.

    Returns:
      Name of the method by path, ``"frozen"`` for other linear layers.

    Raises:
      ValueError: a rule is no pair or matches no layer, two rules match one layer, a rank is above
        the side of a weight (the layer is named), a layer has a recipe, the model is adapted
        already, or no matched layer's sides are multiples of a method's ``multiple_of``.
      NotImplementedError: a layer cannot be replaced, as it has a ``__call__`` of its own, is a
        stack of layers, or lies in a tuple.

    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs))
    >>> from jaxeff.finetune.methods import LoRA
    >>> adapt(model, [(r"layers\\.0", LoRA(rank=2))])
    {'layers.0': 'LoRA', 'layers.1': 'frozen'}

    References: Hu et al., LoRA (arXiv:2106.09685), section 4.2.
    """
    if adapted := list(adapted_layers(model)):
        raise ValueError(
            f"model is adapted already, at {adapted[0]!r} and {len(adapted) - 1} more: call merge "
            "first"
        )
    layers = linear_layers(model)
    if isinstance(rules, Method):
        rules = [(DECODER_LAYERS, rules)]
    chosen = match_rules(layers, rules)
    for name, method in chosen.items():
        if not isinstance(method, Method):
            raise ValueError(f"method of layer {name!r} must be a LoRA or FALQON, got {method!r}")
    matched = chosen
    chosen = {
        name: method for name, method in matched.items() if _takes(model, layers[name], method)
    }
    if not chosen:
        divisor = max(getattr(method, "multiple_of", 1) for method in matched.values())
        raise ValueError(
            f"no layer would be adapted: of {len(matched)} that match, none has sides that are "
            f"multiples of {divisor} (multiple_of)"
        )
    _check_ranks(model, layers, chosen)
    for index, name in enumerate(layers):
        if name not in chosen:
            continue
        method = chosen[name]
        kind = FalqonLinear if isinstance(method, FALQON) else LoRALinear
        key = jax.random.fold_in(jax.random.key(seed), index)
        set_module(model, layers[name], kind(get_module(model, layers[name]), method, key))
    _freeze(model)
    return {name: type(chosen[name]).__name__ if name in chosen else "frozen" for name in layers}


def merge(model: nnx.Module, *, dtype: Any = None) -> nnx.Module:
    """A plain model with the adapters added to its weights.

    Args:
      model: an adapted model; it is not changed, and shares with the result what is not merged.
      dtype: dtype of the merged kernels; None takes that of the layer's parameters before.

    Returns:
      A model of ``nnx.Linear`` and ``nnx.Param``, as before ``adapt``.

    Raises:
      ValueError: the model has no adapted layer.

    >>> from jaxeff.finetune.methods import LoRA
    >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    >>> _ = adapt(model, [("layers", LoRA(rank=2))])
    >>> type(merge(model).layers[0]).__name__
    'Linear'
    """
    merged = nnx.merge(*nnx.split(model))
    layers = adapted_layers(merged)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no adapted layer: nothing to merge")
    for path, layer in layers.values():
        set_module(merged, path, _plain(layer, dtype))
    _change_kind(merged, nnx.Param, lambda variable: isinstance(variable, Frozen))
    return merged


def adapted_layers(model: nnx.Module) -> dict[str, tuple[tuple, AdaptedLinear]]:
    """Path and layer of every adapted layer, by dotted name.

    >>> adapted_layers(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    {}
    """
    return {
        dotted(path): (path, module)
        for path, module in nnx.iter_graph(model)
        if isinstance(module, AdaptedLinear)
    }


def _takes(model, path, method) -> bool:
    """Whether a layer's sides fit the method's ``multiple_of``; a layer that does not is frozen."""
    layer, divisor = get_module(model, path), getattr(method, "multiple_of", 1)
    return not (layer.in_features % divisor or layer.out_features % divisor)


def _check_ranks(model, layers, chosen) -> None:
    """Before anything is changed, so that a refused model is still whole."""
    for name, method in chosen.items():
        check_replaceable(model, layers[name])
        layer = get_module(model, layers[name])
        if method.rank > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"rank is {method.rank}; layer {name!r} with weight "
                f"{(layer.in_features, layer.out_features)} allows at most "
                f"{min(layer.in_features, layer.out_features)}"
            )
        rows = getattr(method, "k", None)
        if isinstance(rows, int) and rows > layer.out_features:
            raise ValueError(f"k is {rows}; layer {name!r} has only {layer.out_features} outputs")


def _freeze(model: nnx.Module) -> None:
    adapters = {id(v) for _, layer in adapted_layers(model).values() for v in _params(layer)}
    _change_kind(
        model,
        Frozen,
        lambda variable: isinstance(variable, nnx.Param) and id(variable) not in adapters,
    )


def _change_kind(model: nnx.Module, kind: type, which: Callable) -> None:
    """Makes variables of a kind out of others; sharing and metadata (names of axes) stay."""
    found = [variable for _, variable in nnx.iter_graph(model) if which(variable)]
    new = {
        id(variable): kind.from_metadata(variable.get_value(), variable.get_metadata())
        for variable in found
    }
    replace_objects(model, new)


def _params(layer: AdaptedLinear) -> list[nnx.Param]:
    if isinstance(layer, FalqonLinear):
        return []
    return [v for v in (layer.lora_a, layer.lora_b) if isinstance(v, nnx.Param)]


def _plain(layer: AdaptedLinear, dtype: Any) -> nnx.Linear:
    dtype = layer.param_dtype if dtype is None else dtype
    linear = nnx.eval_shape(
        lambda: nnx.Linear(
            layer.in_features,
            layer.out_features,
            use_bias=layer.bias is not None,
            dtype=layer.dtype,
            param_dtype=dtype,
            preferred_element_type=layer.preferred_element_type,
            precision=layer.precision,
            rngs=nnx.Rngs(0),
        )
    )
    linear.kernel = nnx.Param(layer.merged().astype(dtype))
    if layer.bias is not None:
        linear.bias = nnx.Param(layer.bias.get_value())
    return linear
