"""Find linear layers of a model by rules over their paths, and put other modules in their place."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

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
      ValueError: there is no rule, one matches nothing, or two match one name.

    >>> match_rules(["a.q", "a.k", "b"], [("q$", 1), ("k$", 2)])
    {'a.q': 1, 'a.k': 2}
    """
    names = list(names)
    if not rules:
        raise ValueError("rules is empty: expected pairs (regular expression, choice)")
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


def get_module(model: nnx.Module, path: Path) -> Any:
    """The object at a path; attribute names and list positions.

    >>> get_module(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), ("layers", 0)).out_features
    3
    """
    for part in path:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model


def set_module(model: nnx.Module, path: Path, new: Any) -> None:
    """Puts an object at a path; what was there is dropped.

    Args:
      model: any NNX module; changed in place.
      path: attribute names and list positions, at least one.
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
    parent = get_module(model, path[:-1])
    if isinstance(path[-1], int):
        parent[path[-1]] = new
    else:
        setattr(parent, path[-1], new)


def dotted(path: Path) -> str:
    """A path as text: ``("layers", 0)`` is ``"layers.0"``."""
    return ".".join(map(str, path))


def _natural(path: Path) -> list:
    return [(part, "") if isinstance(part, int) else (-1, part) for part in path]
