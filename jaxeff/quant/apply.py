"""Put a recipe into a flax NNX model, by rules over module paths."""

import math
import re
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxeff.quant.delayed import AmaxHistory, init_history
from jaxeff.quant.dot import quantized_dot_general
from jaxeff.quant.einsum import quantized_einsum
from jaxeff.quant.module_paths import check_rules, get_module, linear_layers, match_rules
from jaxeff.quant.recipe import RECIPES, Recipe, kept_blocks, resolve_recipe
from pallas_kernels.formats.counter_random import counter_key

# Embeddings and the output head stay in high precision in every published FP4 recipe.
EXEMPT = r"(^|\.)(embed\w*|embedder|lm_head|unembed|output_head)(\.|$)"

# Measured on an H200 (speed_sweep.json of the experiment; a layer forward and backward, delayed and
# current scaling): 1024 by 1024 has .98 and .85 times bfloat16's speed with 16,384 tokens, .78 and
# .71 with 4,096; 2048 by 2048 1.40 and 1.27, 1.12 and 1.01, with 2,048 tokens .99 and .89.
FP8_BREAK_EVEN = 2048
FP8_BREAK_EVEN_TOKENS = 4096

Rule = tuple[str, "str | Recipe | None"]


class SRKey(nnx.Variable):
    """Random state of one layer: uint32 ``[..., 3]``, two key words and the training step.

    The key words never change; the step is set by :func:`fold_step`. A layer draws from
    ``fold_in(key, step)``, so a resumed run rounds as an uninterrupted one.
    """


class QAFPhase(nnx.Variable):
    """Whether the second phase of a recipe holds in a layer: bool scalar, see ``set_phase``."""


class QuantizedDot(nnx.Module):
    """A ``dot_general`` for ``nnx.Linear`` that follows a recipe and holds its own state.

    The state is what the recipe needs: a key (``SRKey``), an amax history (``AmaxHistory``) for
    delayed scaling, a phase (``QAFPhase``).

    Args:
      recipe: name out of ``RECIPES`` or a Recipe.
      seed: seed of the stochastic rounding; used only if the recipe draws.
      path: name of the layer, which tells its random numbers from those of others.
      stack: leading axes of the state, for layers that ``nnx.vmap`` made and ``nnx.scan`` runs;
        each has random numbers of its own.

    Example:
      >>> linear = nnx.Linear(32, 8, dot_general=lax.dot_general, rngs=nnx.Rngs(0))
      >>> linear.dot_general = nnx.data(QuantizedDot("fp4_all_the_way"))
      >>> linear(jnp.ones((4, 32))).shape
      (4, 8)
    """

    def __init__(
        self,
        recipe: str | Recipe,
        *,
        seed: int = 0,
        path: str = "",
        stack: tuple[int, ...] = (),
    ):
        self.recipe = resolve_recipe(recipe)
        self.key = self.history = self.phase = nnx.data(None)
        if self.recipe.needs_key:
            # The path and not the position names the layer: exempting one layer leaves the
            # random numbers of the others alone.
            sequence = np.random.SeedSequence([seed, zlib.crc32(path.encode())])
            words = sequence.generate_state(2 * math.prod(stack)).reshape(*stack, 2)
            step = np.zeros((*stack, 1), np.uint32)
            self.key = SRKey(jnp.asarray(np.concatenate([words, step], -1), jnp.uint32))
        if self.recipe.delayed is not None:
            history = init_history(self.recipe)
            self.history = AmaxHistory(jnp.zeros((*stack, *history.shape), history.dtype))
        if self.recipe.qaf is not None:
            self.phase = QAFPhase(jnp.zeros(stack, bool))

    def _state(self) -> dict[str, Any]:
        key = None
        if self.key is not None:
            state = self.key[...]
            key = jax.random.fold_in(counter_key(state[:2]), state[2])
        history = None if self.history is None else self.history[...]
        phase = None if self.phase is None else self.phase[...]
        return {"key": key, "amax_history": history, "phase": phase}

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """The product of ``jax.lax.dot_general``, quantised; see ``quantized_dot_general``."""
        return quantized_dot_general(
            lhs,
            rhs,
            dimension_numbers,
            self.recipe,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            **self._state(),
        )


class QuantizedEinsum(QuantizedDot):
    """An ``einsum_op`` for ``nnx.Einsum``: a ``QuantizedDot`` with the arguments of ``einsum``.

    Example:
      >>> layer = nnx.Einsum("btd,dnh->btnh", (32, 2, 16), rngs=nnx.Rngs(0))
      >>> layer.einsum_op = nnx.data(QuantizedEinsum("mxfp8"))
      >>> layer(jnp.ones((1, 4, 32))).shape
      (1, 4, 2, 16)
    """

    def __call__(
        self,
        subscripts: str,
        lhs: jax.Array,
        rhs: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """The product of ``jnp.einsum``, quantised; see ``quantized_einsum``."""
        return quantized_einsum(
            subscripts,
            lhs,
            rhs,
            self.recipe,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            **self._state(),
        )


def apply_recipe(
    model: nnx.Module,
    recipe: str | Recipe,
    *,
    rules: Sequence[Rule] = (),
    keep_last: float | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Sets the product of every linear layer of a model; the model is changed in place.

    A layer takes the recipe of the rule whose expression is found in its path (path parts are
    joined by dots, ``layers.0.mlp.up``). Without a rule it stays plain if it is an embedding or
    output head (``EXEMPT``) or belongs to the last ``keep_last`` of the numbered blocks, and takes
    ``recipe`` otherwise. Parameters are not touched. ``apply_recipe(model, "bf16")`` undoes it.
    Warns where real 8-bit products (``execution="native"``) are too small to pay. Layers stacked by
    ``nnx.vmap`` (kernels with leading axes) get a state for each of them, for ``nnx.scan`` over
    their first axis.

    Args:
      model: any flax NNX module; ``nnx.Linear``, ``nnx.LinearGeneral`` and ``nnx.Einsum`` layers
        are served.
      recipe: name out of ``RECIPES`` or a Recipe.
      rules: pairs (regular expression, recipe or name or None for plain).
      keep_last: fraction of the last blocks kept plain, rounded up to blocks; None takes the
        recipe's own (0.15 for ``nvidia_nvfp4``).
      seed: seed of the stochastic rounding; each layer gets its own stream from its path.

    Returns:
      Name of the recipe of every layer by path, ``"bf16"`` for plain ones.

    Raises:
      ValueError: if a rule is no pair or matches no layer, two rules match one layer, the model has
        no linear layer or no numbered blocks to keep, or a layer has a product of someone else.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)),
      ...                        nnx.Linear(32, 4, rngs=nnx.Rngs(1)))
      >>> apply_recipe(model, "fp4_all_the_way", rules=[(r"layers\\.1", "mxfp8")])
      {'layers.0': 'fp4_all_the_way', 'layers.1': 'mxfp8'}

    References:
      arXiv:2505.19115, section 3; arXiv:2509.25149, section 4.1 (layers kept in BF16).
    """
    default = resolve_recipe(recipe)
    check_rules(rules)
    rules = [(pattern, resolve_recipe(chosen)) for pattern, chosen in rules]
    paths = linear_layers(model, (nnx.Linear, nnx.LinearGeneral, nnx.Einsum))
    layers = {name: get_module(model, path) for name, path in paths.items()}
    matched = match_rules(layers, rules) if rules else {}
    fraction = default.keep_last if keep_last is None else keep_last
    kept = _kept_blocks(list(layers), fraction)

    plan = {}
    for path in layers:
        if path in matched:
            plan[path] = matched[path]
        elif re.search(EXEMPT, path) or _block(path) in kept:
            plan[path] = RECIPES["bf16"]
        else:
            plan[path] = default
    for path in plan:
        _check_layer(path, layers[path])
    _warn_of_small_products(layers, plan)
    for path, chosen in plan.items():
        _set_product(layers[path], chosen, seed, path)
    return {path: chosen.name for path, chosen in plan.items()}


def fold_step(tree: Any, step: int | jax.Array) -> Any:
    """Sets the training step that stochastic rounding draws from, in every layer.

    The step is set, not added: folding the same step twice gives the same random numbers. With
    gradient accumulation fold ``step * accumulation + microbatch``.

    Args:
      tree: an NNX module (changed in place) or any pytree with ``SRKey`` variables, such as the
        state that ``nnx.split`` returns (left alone).
      step: int32 scalar ≥ 0; may be traced.

    Returns:
      The same module, or a new tree.

    Example:
      >>> model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
      >>> _ = apply_recipe(model, "fp4_sr")
      >>> fold_step(model, 7).dot_general.key[...][2]
      Array(7, dtype=uint32)
    """
    if isinstance(tree, nnx.Module):
        nnx.update(tree, fold_step(nnx.state(tree, SRKey), step))
        return tree

    def set_step(leaf):
        return leaf[...].at[..., 2].set(jnp.asarray(step, jnp.uint32))

    return _replace(tree, SRKey, set_step)


def set_phase(tree: Any, phase: bool | jax.Array) -> Any:
    """Sets the phase of every layer whose recipe has two (``Recipe.with_qaf``).

    Args:
      tree: an NNX module (changed in place) or any pytree with ``QAFPhase`` variables.
      phase: bool scalar, True for the second phase; may be traced, as in ``step >= start`` or a
        monitor's ``below``: nothing is compiled again.

    Returns:
      The same module, or a new tree.

    Example:
      >>> model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
      >>> _ = apply_recipe(model, RECIPES["fp4_rtn"].with_qaf("both"))
      >>> x = jnp.ones((1, 32))
      >>> bool((set_phase(model, True)(x) == x @ model.kernel).all())
      True
    """
    if isinstance(tree, nnx.Module):
        nnx.update(tree, set_phase(nnx.state(tree, QAFPhase), phase))
        return tree
    return _replace(tree, QAFPhase, lambda leaf: jnp.broadcast_to(phase, leaf[...].shape))


def _replace(tree: Any, kind: type, new_value: Any) -> Any:
    def replaced(leaf):
        return leaf.replace(new_value(leaf)) if isinstance(leaf, kind) else leaf

    return jax.tree.map(replaced, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _block(path: str) -> int | None:
    """Number of the block a layer belongs to: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _kept_blocks(paths: list[str], keep_last: float) -> set[int]:
    if not 0.0 <= keep_last < 1.0:
        raise ValueError(f"keep_last must lie in [0, 1), got {keep_last}")
    if keep_last == 0.0:
        return set()
    blocks = sorted({_block(path) for path in paths} - {None})
    if not blocks:
        raise ValueError(
            f"keep_last={keep_last} needs numbered blocks in the module paths, got {paths}; "
            "pass keep_last=0 and exempt layers by rules"
        )
    return set(blocks[len(blocks) - kept_blocks(len(blocks), keep_last) :])


def _check_layer(path: str, layer: Any) -> None:
    name, plain, own = _product_of(layer)
    current = getattr(layer, name)
    # None is what nnx.LinearGeneral has, and so every projection of nnx.MultiHeadAttention.
    if current is not None and current is not plain and not isinstance(current, own):
        raise ValueError(f"layer {path!r} already has its own {name} {current!r}")
    if getattr(layer, "dot_general_cls", None) is not None:  # would be called instead of ours
        raise ValueError(
            f"layer {path!r} already has its own dot_general_cls {layer.dot_general_cls!r}"
        )


def _warn_of_small_products(layers: dict[str, Any], plan: dict[str, Recipe]) -> None:
    small = [
        path
        for path, chosen in plan.items()
        if chosen.execution == "native" and min(_sides(layers[path])) < FP8_BREAK_EVEN
    ]
    if small:
        warnings.warn(
            f"{len(small)} layers with real FP8 products have a dimension below {FP8_BREAK_EVEN}, "
            "where bf16 is faster (with fewer than "
            f"{FP8_BREAK_EVEN_TOKENS} tokens a step also at it): "
            f"{', '.join(small[:4])}{', …' * (len(small) > 4)}. Exempt them by rules",
            stacklevel=3,
        )


def _set_product(layer: Any, recipe: Recipe, seed: int, path: str) -> None:
    name, plain, own = _product_of(layer)
    if recipe.is_identity:
        setattr(layer, name, nnx.static(plain))
    else:
        setattr(layer, name, nnx.data(own(recipe, seed=seed, path=path, stack=_stack(layer))))


def _stack(layer: Any) -> tuple[int, ...]:
    """Axes that ``nnx.vmap`` put before those of a layer's kernel."""
    if isinstance(layer, nnx.Einsum):
        own = len(layer.kernel_shape)
    elif isinstance(layer, nnx.LinearGeneral):
        own = len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    else:
        own = 2
    return layer.kernel.shape[: layer.kernel.ndim - own]


def _sides(layer: Any) -> tuple[int, ...]:
    """Sizes of a layer's product, as far as its kernel tells."""
    if isinstance(layer, nnx.LinearGeneral):
        return math.prod(layer.in_features), math.prod(layer.out_features)
    return layer.kernel.shape[len(_stack(layer)) :]


def _product_of(layer: Any) -> tuple[str, Any, type]:
    """Attribute that holds the product of a layer, its plain value, and our class for it."""
    if isinstance(layer, nnx.Einsum):
        return "einsum_op", jnp.einsum, QuantizedEinsum
    return "dot_general", lax.dot_general, QuantizedDot
