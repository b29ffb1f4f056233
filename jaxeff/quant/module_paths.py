"""Find linear layers of a model by rules over their paths, and put other modules in their place."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import nnx

Path = tuple[str | int, ...]

#: All linear layers of the blocks of a decoder, but not its output head.
DECODER_LAYERS = r"^layers\.\d+\."


def linear_layers(
    model: nnx.Module, kinds: type | tuple[type, ...] = nnx.Linear
) -> dict[str, Path]:
    """Paths of all linear layers, in the model's order.

    Args:
      model: any NNX module.
      kinds: the classes that count as linear layers.

    Returns:
      The path by its dotted name, such as ``"layers.0.mlp.up_proj"``.

    Raises:
      ValueError: the model has none.

    >>> linear_layers(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    {'layers.0': ('layers', 0)}
    """
    found = [path for path, module in nnx.iter_graph(model) if isinstance(module, kinds)]
    if not found:
        raise ValueError(f"model {type(model).__name__} has no nnx.Linear layer")
    return {dotted(path): path for path in sorted(found, key=_natural)}


def match_rules(names: Iterable[str], rules: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """What each name gets from the one rule whose expression is found in it.

    Args:
      names: dotted paths.
      rules: pairs (regular expression, choice); ``re.search`` decides.

    Returns:
      The choice by name, in the order of ``names``; names without a rule are left out.

    Raises:
      ValueError: there is no rule, one is no such pair or matches nothing, or two match one name.

    >>> match_rules(["a.q", "a.k", "b"], [("q$", 1), ("k$", 2)])
    {'a.q': 1, 'a.k': 2}
    """
    names = list(names)
    if not rules:
        raise ValueError("rules is empty: expected pairs (regular expression, choice)")
    check_rules(rules)
    compiled = [(re.compile(pattern), choice) for pattern, choice in rules]
    found = {name: [i for i, (p, _) in enumerate(compiled) if p.search(name)] for name in names}
    for index, (pattern, _) in enumerate(compiled):
        if not any(index in which for which in found.values()):
            raise ValueError(
                f"rule {pattern.pattern!r} matches no linear layer; the paths are {names}"
            )
    for name, which in found.items():
        if len(which) > 1:
            patterns = [compiled[index][0].pattern for index in which]
            raise ValueError(f"layer {name!r} is matched by {len(which)} rules: {patterns}")
    return {name: compiled[which[0]][1] for name, which in found.items() if which}


def check_rules(rules: Any) -> None:
    """Raises unless rules are pairs of a regular expression and a choice.

    Args:
      rules: what a user gave.

    Raises:
      ValueError: they are not.

    >>> check_rules([("mlp", "int8")])
    """
    is_list = isinstance(rules, Sequence) and not isinstance(rules, str)
    if not is_list or not all(isinstance(rule, Sequence) and len(rule) == 2 for rule in rules):
        raise ValueError(f"rules must be pairs (regular expression, choice), got {rules!r}")
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"rule {pattern!r} is no regular expression: {error}") from error


def check_replaceable(model: nnx.Module, path: Path) -> None:
    """Raises unless the linear layer at a path can give its place to another module.

    Args:
      model: any NNX module.
      path: of an ``nnx.Linear``.

    Raises:
      ValueError: the layer is the model itself, or has a product of its own (a recipe).
      NotImplementedError: it has a ``__call__`` of its own, is a stack of layers, or lies in a
        tuple.

    >>> check_replaceable(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), ("layers", 0))
    """
    layer, name = get_module(model, path), dotted(path)
    if not path:
        raise ValueError("path is empty: the model itself is a linear layer; wrap it in a module")
    if layer.dot_general is not jax.lax.dot_general:
        raise ValueError(f"layer {name!r} has its own dot_general {layer.dot_general!r}")
    if type(layer).__call__ is not nnx.Linear.__call__:
        raise NotImplementedError(
            f"layer {name!r} is a {type(layer).__name__} with a __call__ of its own, which would "
            "be lost; plain nnx.Linear layers are served: exempt it by the rules"
        )
    if layer.kernel.ndim != 2:
        raise NotImplementedError(
            f"layer {name!r} has a kernel {list(layer.kernel.shape)}, a stack of layers; served "
            "are layers of their own"
        )
    if isinstance(get_module(model, path[:-1]), tuple):
        raise NotImplementedError(
            f"layer {name!r} lies in a tuple, which cannot change; use nnx.List"
        )


def get_module(model: nnx.Module, path: Path) -> Any:
    """The object at a path; attribute names, list positions and keys of dictionaries.

    >>> get_module(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), ("layers", 0)).out_features
    3
    """
    for part in path:
        by_item = isinstance(part, int) or isinstance(model, dict)
        model = model[part] if by_item else getattr(model, part)
    return model


def set_module(model: nnx.Module, path: Path, new: Any) -> None:
    """Puts an object in the place of the one at a path, wherever the model refers to that one.

    Args:
      model: any NNX module; changed in place.
      path: as for ``get_module``, at least one part.
      new: module or variable.

    Raises:
      ValueError: the path is empty: a model cannot replace itself.

    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> set_module(model, ("layers", 0), nnx.Linear(2, 5, rngs=nnx.Rngs(0)))
    >>> model.layers[0].out_features
    5
    """
    if not path:
        raise ValueError("path is empty: the model itself is a linear layer; wrap it in a module")
    replace_objects(model, {id(get_module(model, path)): new})


def replace_objects(model: nnx.Module, new: dict[int, Any]) -> None:
    """Puts objects in the place of others, wherever a model refers to them: sharing is kept.

    Args:
      model: any NNX module; changed in place.
      new: module or variable by the ``id`` of the one that goes.

    >>> shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    >>> model = nnx.Sequential(shared, shared)
    >>> replace_objects(model, {id(shared): nnx.Linear(2, 5, rngs=nnx.Rngs(0))})
    >>> [layer.out_features for layer in model.layers]
    [5, 5]
    """
    for _, container in list(nnx.iter_graph(model)):
        by_item = isinstance(container, list | nnx.List | dict | nnx.Dict)
        if isinstance(container, list | nnx.List):
            children = list(enumerate(container))
        elif by_item:
            children = list(container.items())
        else:
            children = list(vars(container).items()) if isinstance(container, nnx.Pytree) else []
        for key, child in children:
            if id(child) not in new:
                continue
            if by_item:
                container[key] = new[id(child)]
            else:
                setattr(container, key, new[id(child)])


def dotted(path: Path) -> str:
    """A path as text: ``("layers", 0)`` is ``"layers.0"``."""
    return ".".join(map(str, path))


def _natural(path: Path) -> list:
    return [(part, "") if isinstance(part, int) else (-1, part) for part in path]
