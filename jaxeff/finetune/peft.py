"""Adapters in the file layout of the PEFT library, without it: two files in one folder."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.finetune.adapt import adapt, adapted_layers
from jaxeff.finetune.layers import LoRALinear, base_tag
from jaxeff.finetune.methods import LoRA
from jaxeff.models import Decoder
from jaxeff.models.hf import import_safetensors, tensor_names

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapters(
    model: Decoder, path: str | Path, *, base: str = "", dtype: Any = jnp.float32
) -> None:
    """Writes the adapters of a LoRA, QLoRA or FP8LoRA model as PEFT does.

    ``adapter_config.json`` names rank, alpha and modules, with ``rank_pattern`` and
    ``alpha_pattern`` where layers differ; ``adapter_model.safetensors`` holds
    ``base_model.model.<module>.lora_A.weight`` ``[r, in]`` and ``...lora_B.weight`` ``[out, r]``.
    The file's metadata holds a tag of the base weights, which ``load_adapters`` compares.

    Args:
      model: an adapted decoder.
      path: the folder; made if needed.
      base: written as ``base_model_name_or_path``: name or folder of the base model.
      dtype: dtype of the stored tensors.

    Raises:
      ValueError: the model has no LoRA layer.
      NotImplementedError: it has FALQON layers, whose adapter is in the weights already.
      ImportError: the package ``safetensors`` (extra ``hf``) is not installed.

    References: PEFT (huggingface), checkpoint format of LoRA.
    """
    save_file = import_safetensors().numpy.save_file
    layers = _lora_layers(model)
    modules = _modules(model)
    tensors, tags = {}, {}
    for name, layer in layers.items():
        a, b = layer.lora_a.get_value(), layer.lora_b.get_value()
        prefix = _PREFIX + modules[name]
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a.T.astype(dtype))
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b.T.astype(dtype))
        tags[modules[name]] = int(layer.base_tag.get_value())
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = _config({modules[name]: layer.method for name, layer in layers.items()}, base)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt", "base_tags": json.dumps(tags)})


def load_adapters(
    model: Decoder,
    path: str | Path,
    *,
    method: type[LoRA] = LoRA,
    backbone: str | None = "default",
    check_base: bool = True,
) -> dict[str, str]:
    """Adapts a plain decoder with adapters out of a PEFT folder; the model is changed in place.

    Args:
      model: the base model, not adapted.
      path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
      method: ``LoRA``, ``QLoRA`` or ``FP8LoRA``: how the base is stored and multiplied.
      backbone: replaces the method's own storage of the base.
      check_base: whether the tag of the base weights, if the file has one (``save_adapters``
        writes it, PEFT does not), must be that of ``model``.

    Returns:
      As ``adapt``.

    Raises:
      ValueError: a file is missing or corrupt, a tensor is missing, unexpected or of another shape,
        the adapters belong to another base model, or ``model`` is adapted or packed already.
      NotImplementedError: the adapter is no plain LoRA (DoRA, biases, another PEFT type).
      ImportError: the package ``safetensors`` (extra ``hf``) is not installed.
    """
    if not (isinstance(method, type) and issubclass(method, LoRA)):
        raise ValueError(f"method must be LoRA, QLoRA or FP8LoRA, got {method!r}")
    if adapted := list(adapted_layers(model)):
        raise ValueError(f"model is adapted already, at {adapted[0]!r}: call merge first")
    path = Path(path)
    config = _read_config(path / CONFIG)
    tensors, metadata = _read_weights(path / WEIGHTS)
    names = {theirs: ours for ours, theirs in _modules(model).items()}
    pairs = _pairs(path / WEIGHTS, tensors, names)
    kernels = {
        f"{_dotted(key[:-1])}": value.get_value()
        for key, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if key[-1] == "kernel"
    }
    _check_complete(path / WEIGHTS, config, pairs, names)
    if packed := [names[module] for module in pairs if names[module] not in kernels]:
        raise ValueError(
            f"layer {packed[0]!r} of model has no kernel to adapt, as its weight is packed: load "
            "the adapters before quantize_weights"
        )
    options = {} if backbone == "default" else {"backbone": backbone}
    rules = []
    for module, (a, b) in pairs.items():
        rank = _pattern(config["rank_pattern"], module, config["r"])
        alpha = _pattern(config["alpha_pattern"], module, config["lora_alpha"])
        kernel = kernels[names[module]]
        wanted = ((rank, kernel.shape[0]), (kernel.shape[1], rank))
        if (a.shape, b.shape) != wanted:
            raise ValueError(
                f"{path / WEIGHTS}: adapter of {module} has shapes {a.shape} and {b.shape}; rank "
                f"{rank} on this base model needs {wanted[0]} and {wanted[1]}"
            )
        if config.get("use_rslora"):
            alpha = alpha * rank**0.5  # alpha / sqrt(r) instead of alpha / r
        rules.append((f"^{re.escape(names[module])}$", method(rank, alpha, **options)))
    if check_base and "base_tags" in metadata:
        _check_tags(path, json.loads(metadata["base_tags"]), kernels, names)
    plan = adapt(model, rules)
    layers = adapted_layers(model)
    for module, (a, b) in pairs.items():
        layer = layers[names[module]][1]
        layer.lora_a.set_value(jnp.asarray(a.T, jnp.float32))
        layer.lora_b.set_value(jnp.asarray(b.T, jnp.float32))
    return plan


def _lora_layers(model: nnx.Module) -> dict[str, LoRALinear]:
    layers = {name: layer for name, (_, layer) in adapted_layers(model).items()}
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no adapted layer: call adapt first")
    melded = [name for name, layer in layers.items() if not isinstance(layer, LoRALinear)]
    if melded:
        raise NotImplementedError(
            f"layer {melded[0]!r} is a FALQON layer: its adapter is in the weights and cannot be "
            "separated; use save_merged or save_fp8"
        )
    return layers


def _modules(model: Decoder) -> dict[str, str]:
    """Our path of a linear layer to the name of its module in ``transformers``."""
    return {
        ours.removesuffix(".kernel"): theirs.removesuffix(".weight")
        for theirs, ours in tensor_names(model.config).items()
        if ours.endswith(".kernel")
    }


def _config(methods: dict[str, LoRA], base: str) -> dict[str, Any]:
    ranks = {module: method.rank for module, method in methods.items()}
    alphas = {module: method.factor * method.rank for module, method in methods.items()}
    rank, alpha = _most(ranks), _most(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Full names: a suffix such as "q_proj" would also match layers that have no adapter.
        "target_modules": sorted(methods),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_dora": False,
        "use_rslora": False,
    }


def _most(values: dict[str, Any]) -> Any:
    found = list(values.values())
    return max(sorted(set(found)), key=found.count)


def _pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT reads the keys as expressions for the end of a module's name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; expected a folder that PEFT or save_adapters wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        patterns = ("rank_pattern", "alpha_pattern")
        wanted = config | {name: config.get(name) or {} for name in patterns}
        wanted["r"], wanted["lora_alpha"] = int(config["r"]), config["lora_alpha"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not an adapter configuration: {error!r}") from error
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(f"{file}: peft_type is {config.get('peft_type')!r}; served: LORA")
    for field, served in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(field, served) not in (served, None):
            raise NotImplementedError(
                f"{file}: {field} is {config[field]!r}; served is {served!r} only"
            )
    return wanted


def _read_weights(file: Path) -> tuple[dict[str, jax.Array], dict[str, str]]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; expected a folder that PEFT or save_adapters wrote")
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(file, framework="flax") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is corrupt: {error}") from error


def _pairs(file: Path, tensors: dict[str, Any], names: dict[str, str]) -> dict[str, tuple]:
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(
                f"{file}: unexpected tensor {name}; expected {_PREFIX}<module>.lora_A.weight"
            )
        if match[1] not in names:
            raise ValueError(
                f"{file}: adapter for {match[1]}, a module that this base model does not have"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"{file}: {module} has only lora_{next(iter(pair))}, not both")
    if not found:
        raise ValueError(f"{file} holds no tensors")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


def _check_complete(file: Path, config: dict, pairs: dict, names: dict[str, str]) -> None:
    """Every module that the configuration lists must have its tensors."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None:
        return  # a regular expression, or a choice of layers: the tensors say which
    excluded = config.get("exclude_modules") or []
    for module in names:
        is_target = any(module == t or module.endswith(f".{t}") for t in targets)
        if is_target and not excluded and module not in pairs:
            raise ValueError(
                f"{file}: the tensors of {module} are missing; target_modules of {CONFIG} lists it"
            )


def _check_tags(path: Path, tags: dict[str, int], kernels: dict, names: dict[str, str]) -> None:
    for module, tag in tags.items():
        if module in names and int(base_tag(kernels[names[module]])) != tag:
            raise ValueError(
                f"{path}: these adapters were trained on another base model: the weights of "
                f"{module} differ. check_base=False loads them all the same"
            )


def _dotted(key: tuple) -> str:
    return ".".join(map(str, key))
