"""Measure what a quantised attention does to a model, layer by layer, and choose by it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels

Variant = str | pallas_kernels.AttentionQuant | None
Rules = Sequence[tuple[str, Variant]]


def attention_errors(model: nnx.Module, tokens: jax.Array, quant: object) -> jax.Array:
    r"""Relative L1 error of quantised attention in each layer, on the model's own activations.

    For layer ``l`` with exact output ``o`` and quantised output ``q`` of the same query, key and
    value: :math:`e_l = \sum |q - o| / \sum |o|`. The exact output is what flows on, so the
    errors of the layers are independent of each other.

    Args:
      model: a module ``model(tokens, attention_fn=...)`` such as ``jaxeff.models.Decoder``.
      tokens: int32 ``[B, T]``.
      quant: name or ``AttentionQuant`` of the variant, as in
        :func:`pallas_kernels.dot_product_attention`.

    Returns:
      float32 ``[num_layers]``, without unit (0.04 is four per cent).

    References:
      SageAttention2 (arXiv 2411.10958), appendix A.7: the metric.
    """
    return _attention_errors(model, tokens, quant)


@nnx.jit(static_argnames="quant")
def _attention_errors(model, tokens, quant):
    errors = []

    def measured(query, key, value, **arguments):
        exact = pallas_kernels.dot_product_attention(query, key, value, **arguments)
        approximate = pallas_kernels.dot_product_attention(
            query, key, value, quant=quant, **arguments
        )
        errors.append(_relative_l1(approximate, exact))
        return exact

    model(tokens, attention_fn=measured)
    return jnp.stack(errors)


def _relative_l1(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """Sum of the differences over the sum of the magnitudes, float32 []; 0 where both are 0."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    size = jnp.maximum(jnp.abs(expected).sum(), jnp.finfo(jnp.float32).tiny)
    return jnp.abs(actual - expected).sum() / size


@dataclasses.dataclass(frozen=True)
class AttentionPolicy:
    """Which attention each layer of a model uses, and the measurement behind it.

    ``str(policy)`` is a table with one row per layer.

    Args:
      choices: variant by path of the layer; None is full precision.
      errors: relative L1 error by path and name of the variant, without unit.
      bound: largest error that was accepted.

    Example:
      >>> print(AttentionPolicy({"layers.0": "sage2"}, {"layers.0": {"sage2": 0.0321}}, 0.05))
      layer     sage2  choice (error <= 0.05)
      layers.0  .0321  sage2
    """

    choices: Mapping[str, Variant]
    errors: Mapping[str, Mapping[str, float]]
    bound: float

    @property
    def rules(self) -> list[tuple[str, Variant]]:
        """The choices as rules for :func:`set_attention`, each matching exactly one path."""
        return [(f"^{re.escape(path)}$", variant) for path, variant in self.choices.items()]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.errors.values() for name in row))
        table = [["layer", *names, f"choice (error <= {self.bound:g})"]]
        for path, row in self.errors.items():
            shown = [f"{row[name]:.4f}".removeprefix("0") if name in row else "" for name in names]
            table.append([path, *shown, str(_name(self.choices[path]))])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
        return "\n".join(lines)


def calibrate_attention(
    model: nnx.Module,
    batch: Any,
    *,
    variants: Sequence[str | pallas_kernels.AttentionQuant] = ("sage2", "sage1"),
    bound: float = 0.05,
) -> AttentionPolicy:
    r"""Chooses an attention variant for every layer from its error on the layer's own inputs.

    Each layer's query, key and value come from the model running in full precision. For each
    variant :math:`e = \sum |q - o| / \sum |o|` with the exact output ``o``; the layer takes the
    first variant with ``e <= bound``, and full precision if there is none. The model is left as it
    was; put the result in with :func:`set_attention`.

    The default order is that of cost on Hopper GPUs. ``"sage2_int4"`` and ``"sage3"`` need 4-bit
    matrix units: list them first for hardware that has them, as elsewhere they are emulated.

    Args:
      model: any module with ``jaxeff.nn.Attention`` layers, called as ``model(batch)``, or as
        ``model(*batch)`` for a tuple and ``model(**batch)`` for a dict. Layers inside ``nnx.remat``
        or ``nnx.scan`` cannot be measured.
      batch: representative input; a few thousand tokens are enough.
      variants: names or ``AttentionQuant``, cheapest first, at least one.
      bound: largest accepted relative L1 error, positive, without unit (0.05 is five per cent).

    Returns:
      An :class:`AttentionPolicy`; printing it shows the table of errors.

    Raises:
      ValueError: no variants, an unknown one or the same twice, a bound that is not positive, no
        attention layer in the model, or a layer that the batch does not reach.

    Example:
      >>> from jaxeff.models import Decoder, ModelConfig
      >>> config = ModelConfig.llama(vocab_size=16, num_layers=1, embed_dim=16, num_heads=2)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> policy = calibrate_attention(model, jnp.arange(16)[None], variants=["sage2"])
      >>> policy.choices
      {'layers.0.attention': 'sage2'}

    References:
      SageAttention (arXiv 2410.02367), section 4.5: choosing a variant per layer;
      SageAttention2 (arXiv 2411.10958), appendix A.7: the metric.
    """
    quants = _variants(variants)
    if not bound > 0:
        raise ValueError(f"bound is {bound}; expected a positive number")
    layers = _attention_layers(model)
    measured: dict[str, list[dict[str, jax.Array]]] = {path: [] for path in layers}
    own = {path: layer.attention_fn for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.attention_fn = _measure(own[path], quants, measured[path].append)
        graph, state = nnx.split(model)

        def run(state, batch):
            _call(nnx.merge(graph, state), batch)
            return measured

        # What the calls recorded while tracing comes back as numbers.
        numbers = jax.device_get(jax.jit(run)(state, batch))
    finally:
        for path, layer in layers.items():
            layer.attention_fn = own[path]
    errors = {path: _worst(path, numbers[path], list(quants)) for path in layers}
    choices = {
        path: next((v for v in variants if row[_name(v)] <= bound), None)
        for path, row in errors.items()
    }
    return AttentionPolicy(choices, errors, bound)


def set_attention(
    model: nnx.Module, policy: AttentionPolicy | Rules | Variant
) -> dict[str, str | None]:
    r"""Sets the attention function of a model's layers; the model is changed in place.

    Args:
      model: any module with ``jaxeff.nn.Attention`` layers.
      policy: the result of :func:`calibrate_attention`; or rules, pairs (regular expression,
        variant), where a layer takes the variant of the rule whose expression is found in its
        path (``layers.0.attention``) and keeps its own without a rule; or one variant for every
        layer. A variant is a name, an ``AttentionQuant``, or None for full precision.

    Returns:
      Name of the variant by path, of the layers that were set.

    Raises:
      ValueError: a rule matches no layer, two rules match one layer, a variant is unknown, the
        model has no attention layer, or a layer has an attention function of someone else.

    Example:
      >>> from jaxeff.nn import Attention
      >>> layer = Attention(16, 2, rngs=nnx.Rngs(0))
      >>> model = nnx.Sequential(layer)
      >>> set_attention(model, [(r"layers\.0", "sage2")])
      {'layers.0': 'sage2'}
    """
    from jaxeff.nn import default_attention_fn

    layers = _attention_layers(model)
    if isinstance(policy, AttentionPolicy):
        rules = policy.rules
    elif policy is None or isinstance(policy, str | pallas_kernels.AttentionQuant):
        rules = [("", policy)]
    else:
        rules = list(policy)
    plan = {path: variant for path, variant in _plan(layers, rules).items()}
    for path, layer in layers.items():
        if path in plan and not _is_ours(layer.attention_fn):
            raise ValueError(
                f"layer {path!r} has an attention function of its own, {layer.attention_fn!r}; "
                "build it without attention_fn first"
            )
    for path, variant in plan.items():
        layers[path].attention_fn = default_attention_fn(variant)
    return {path: _name(variant) for path, variant in plan.items()}


def _plan(layers: Mapping[str, Any], rules: Rules) -> dict[str, Variant]:
    """Variant by path; every rule must match, and no layer twice."""
    plan: dict[str, Variant] = {}
    by: dict[str, str] = {}
    for pattern, variant in rules:
        pallas_kernels.ops.attention.spec.get_quant(variant)
        found = [path for path in layers if re.search(pattern, path)]
        if not found:
            raise ValueError(
                f"rule {pattern!r} matches no attention layer; the paths are {list(layers)}"
            )
        for path in found:
            if path in plan:
                raise ValueError(f"layer {path!r} is matched by two rules: {[by[path], pattern]}")
            plan[path], by[path] = variant, pattern
    return plan


def _variants(variants: Sequence[Any]) -> dict[str, pallas_kernels.AttentionQuant]:
    if isinstance(variants, str) or not variants:
        raise ValueError(f"variants must be a sequence of at least one variant; got {variants!r}")
    quants = [pallas_kernels.ops.attention.spec.get_quant(variant) for variant in variants]
    names = [_name(quant) for quant in quants]
    if None in names or len(set(names)) < len(names):
        raise ValueError(f"variants must be different and none of them None; got {names}")
    return dict(zip(names, quants, strict=True))


def _name(variant: Variant) -> str | None:
    return variant.name if isinstance(variant, pallas_kernels.AttentionQuant) else variant


def _attention_layers(model: nnx.Module) -> dict[str, Any]:
    from jaxeff.nn import Attention  # nn may use quant, so not the other way round on import

    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, Attention)
    }
    if not found:
        raise ValueError(f"model {type(model).__name__} has no jaxeff.nn.Attention layer")
    natural = lambda path: [(len(part), part) for part in path.split(".")]  # noqa: E731
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def _is_ours(attention_fn: Callable) -> bool:
    while isinstance(attention_fn, functools.partial):
        attention_fn = attention_fn.func
    known = (pallas_kernels.dot_product_attention, jax.nn.dot_product_attention)
    return attention_fn in known


def _measure(attention_fn: Callable, quants: Mapping[str, Any], record: Callable) -> Callable:
    """An attention function that records the error of each variant and returns the exact output.

    A layer that is quantised already is measured, and runs, in full precision.
    """
    exact_fn = pallas_kernels.dot_product_attention if _is_ours(attention_fn) else attention_fn

    def measured(query, key, value, **arguments):
        exact = exact_fn(query, key, value, **arguments)
        record(
            {
                name: _relative_l1(
                    pallas_kernels.dot_product_attention(
                        query, key, value, quant=quant, **arguments
                    ),
                    exact,
                )
                for name, quant in quants.items()
            }
        )
        return exact

    return measured


def _call(model: nnx.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _worst(path: str, calls: list[dict[str, Any]], names: list[str]) -> dict[str, float]:
    """Largest error over the calls of a layer that is used more than once."""
    if not calls:
        raise ValueError(f"layer {path!r} is not reached by this batch; nothing to measure")
    return {name: max(float(call[name]) for call in calls) for name in names}
