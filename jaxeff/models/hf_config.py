"""Translate ``config.json`` of a Hugging Face checkpoint to a ``ModelConfig`` and back.

Every field is either used, or checked to have the one value that is served, or known to have no
effect on the forward pass; any other is logged by name. Both generations of RoPE fields are read:
``rope_theta``, ``rope_scaling``, ``rope_local_base_freq`` and ``rope_parameters``; and both of
attention kinds: ``sliding_window_pattern``, ``max_window_layers`` and ``layer_types``.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxeff.models.config import ModelConfig
from jaxeff.nn.rope import RopeConfig

__all__ = ["from_hf_config", "read_hf_config", "to_hf_config"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Family:
    """What a model type fixes without a field in ``config.json``, and its fields' defaults."""

    architecture: str
    head_dim: int | None = None  # None: hidden_size // num_attention_heads
    tie_embeddings: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"
    theta: float = 10_000.0
    biases: tuple[str, ...] = ()  # ModelConfig's flags that attention_bias sets
    fixed: tuple[tuple[str, bool], ...] = ()  # ModelConfig's flags that are always so
    fields: frozenset[str] = frozenset()  # read for this model type only


_FAMILIES = {
    "llama": _Family(
        "LlamaForCausalLM",
        biases=("qkv_bias", "out_bias"),
        fields=frozenset({"attention_bias", "mlp_bias"}),
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        fixed=(("qkv_bias", True),),
        fields=frozenset({"use_sliding_window", "sliding_window", "max_window_layers"}),
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        head_dim=128,
        biases=("qkv_bias", "out_bias"),
        fixed=(("qk_norm", True),),
        fields=frozenset(
            {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers"}
        ),
    ),
    "gemma3_text": _Family(
        "Gemma3ForCausalLM",
        head_dim=256,
        tie_embeddings=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        theta=1_000_000.0,
        biases=("qkv_bias", "out_bias"),
        fixed=(("qk_norm", True), ("norm_scale_plus_one", True), ("post_norms", True)),
        fields=frozenset(
            {
                "attention_bias",
                "final_logit_softcapping",
                "query_pre_attn_scalar",
                "rope_local_base_freq",
                "sliding_window",
                "sliding_window_pattern",
                "_sliding_window_pattern",
            }
        ),
    ),
}

_COMMON_FIELDS = frozenset(
    {
        "architectures",
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)

# Fields with one served value (or none given): anything else changes the computation.
_ONLY = {
    "add_cross_attention": False,
    "attention_chunk_size": None,
    "attn_logit_softcapping": None,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_bidirectional_attention": False,
}

# Fields that do not change the forward pass: bookkeeping, initialisation, tokens of the tokenizer,
# training-time dropout, and settings of the writer's own runtime.
_NO_EFFECT = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "cache_implementation",
        "dtype",
        "eos_token_id",
        "hidden_dropout",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_OTHER_LAYER_TYPES = ("chunked_attention", "linear_attention", "mamba", "conv", "attention")

# The keys of each RoPE rule; original_max_position_embeddings may stand beside any rule, since
# the writer adds it, and only llama3 uses it.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def read_hf_config(path: str | Path) -> ModelConfig:
    """Read a ``config.json`` file and translate it with :func:`from_hf_config`.

    Args:
        path: the file.

    Returns:
        The model's configuration.

    Raises:
        ValueError: the file is missing, is not JSON, or holds wrong values; names file and field.
        NotImplementedError: the file asks for something that is not served.

    >>> read_hf_config("/nowhere/config.json")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere/config.json does not exist; expected a model's config.json
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a model's config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # both JSON and UTF-8 errors
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return from_hf_config(raw)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path}: {error}") from error


def from_hf_config(raw: dict[str, Any]) -> ModelConfig:
    """Translate the content of a ``config.json`` to a ``ModelConfig``.

    Served model types are ``llama``, ``qwen2``, ``qwen3`` and ``gemma3_text``. Fields left out
    take the default of ``transformers`` for that model type; the sizes must be given. Dropout
    fields are not used: the decoder has none.

    Args:
        raw: the parsed JSON object.

    Returns:
        The model's configuration.

    Raises:
        ValueError: a field is missing, has the wrong type, an unknown value, or contradicts
            another one.
        NotImplementedError: a known value that is not served, such as ``rope_type: yarn``.

    >>> from_hf_config({"model_type": "mamba"})
    Traceback (most recent call last):
    ...
    NotImplementedError: model_type 'mamba' is not served; served are llama, qwen2, qwen3, ...
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected a JSON object, came {type(raw).__name__}")
    family = _family(raw)
    _check_served(raw, family)
    num_layers, num_heads = _size(raw, "num_hidden_layers"), _size(raw, "num_attention_heads")
    embed_dim = _size(raw, "hidden_size")
    windows = _layer_windows(raw, num_layers)
    rope, local_rope = _ropes(raw, family)
    bias = "attention_bias" in family.fields and _flag(raw, "attention_bias", False)
    fields: dict[str, Any] = dict.fromkeys(family.biases, bias) | dict(family.fixed)
    if raw["model_type"] == "gemma3_text":
        fields |= {
            "embed_scale": math.sqrt(embed_dim),
            "query_scale": _number(raw, "query_pre_attn_scalar", 256) ** -0.5,
            "final_logit_soft_cap": _number(raw, "final_logit_softcapping", None),
        }
    return ModelConfig(
        vocab_size=_size(raw, "vocab_size"),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=_size(raw, "num_key_value_heads", num_heads),
        head_dim=_head_dim(raw, family, embed_dim, num_heads),
        mlp_dim=_size(raw, "intermediate_size"),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        local_rope=local_rope,
        layer_windows=windows,
        mlp_bias="mlp_bias" in family.fields and _flag(raw, "mlp_bias", False),
        tie_embeddings=_flag(raw, "tie_word_embeddings", family.tie_embeddings),
        activation=_activation(raw, family),
        max_position_embeddings=_size(raw, "max_position_embeddings", 0) or None,
        **fields,
    )


def to_hf_config(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Translate a ``ModelConfig`` to the content of a ``config.json`` (``rope_parameters`` form).

    The result is read back and compared, so that no setting is lost.

    Args:
        config: the model's configuration.
        dtype: name of the stored parameters' dtype, such as ``"bfloat16"``.

    Returns:
        A JSON-ready dictionary.

    Raises:
        NotImplementedError: no served model type computes what ``config`` says.

    >>> config = ModelConfig.qwen3(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2)
    >>> to_hf_config(config)["model_type"]
    'qwen3'
    """
    rejected = []
    for model_type, family in _FAMILIES.items():
        raw = _write_fields(config, model_type, family) | {"dtype": dtype}
        try:
            back = from_hf_config(raw)
        except (ValueError, NotImplementedError) as error:
            rejected.append(f"{model_type}: {error}")
            continue
        if back == config:
            return raw
        lost = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(back, field.name)
        ]
        rejected.append(f"{model_type}: cannot hold {', '.join(lost)}")
    raise NotImplementedError(
        f"no Hugging Face model type holds this configuration ({'; '.join(rejected)})"
    )


def _family(raw: dict[str, Any]) -> _Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"model_type is {model_type!r}; expected one of {', '.join(_FAMILIES)}")
    if model_type not in _FAMILIES:
        hint = " (gemma3 is the one with images)" if model_type == "gemma3" else ""
        raise NotImplementedError(
            f"model_type {model_type!r} is not served{hint}; served are {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[model_type]


def _check_served(raw: dict[str, Any], family: _Family) -> None:
    architectures = raw.get("architectures")
    if architectures and family.architecture not in architectures:
        raise NotImplementedError(
            f"architectures is {architectures}; served for model_type {raw['model_type']!r} is "
            f"{family.architecture}"
        )
    for name, served in _ONLY.items():
        value = raw.get(name)
        if value is not None and value != served:
            if name == "quantization_config" and isinstance(value, dict):
                value = value.get("quant_method", value)
            raise NotImplementedError(f"{name} {value!r} is not served; served is {served!r}")
    known = _COMMON_FIELDS | family.fields | _NO_EFFECT | _ONLY.keys()
    unknown = sorted(name for name in raw.keys() - known if raw[name])
    if unknown:
        _log.warning(
            "config.json has fields that are not read for model_type %r: %s",
            raw["model_type"],
            ", ".join(unknown),
        )


def _size(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"{name} is missing; expected an integer, at least 1")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer, at least 1")
    return value


def _number(raw: dict[str, Any], name: str, default: float | None) -> Any:
    value = raw.get(name)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}; expected a finite number above 0")
    return value


def _flag(raw: dict[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false")
    return value


def _head_dim(raw: dict[str, Any], family: _Family, embed_dim: int, num_heads: int) -> int:
    if raw.get("head_dim") is not None or family.head_dim is not None:
        return _size(raw, "head_dim", family.head_dim)
    if embed_dim % num_heads:
        raise ValueError(
            f"head_dim is missing and hidden_size {embed_dim} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    return embed_dim // num_heads


def _activation(raw: dict[str, Any], family: _Family) -> str:
    name = raw.get(family.activation_field)
    name = family.activation if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(
            f"{family.activation_field} is {name!r}; served are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _layer_windows(raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer in tokens, ``None`` for full attention."""
    model_type = raw["model_type"]
    window = _size(raw, "sliding_window", 0) or None
    if model_type == "llama":
        window = None
    elif model_type == "gemma3_text":
        window = window or 4096
    elif not _flag(raw, "use_sliding_window", False):
        window = None
    types = raw.get("layer_types")
    if types is None:
        types = _default_layer_types(raw, num_layers, window)
    if not isinstance(types, list) or len(types) != num_layers:
        came = len(types) if isinstance(types, list) else repr(types)
        raise ValueError(
            f"layer_types has {came} entries; expected num_hidden_layers ({num_layers})"
        )
    for layer, name in enumerate(types):
        if name in _OTHER_LAYER_TYPES:
            raise NotImplementedError(
                f"layer_types[{layer}] {name!r} is not served; served are {', '.join(_LAYER_TYPES)}"
            )
        if name not in _LAYER_TYPES:
            raise ValueError(
                f"layer_types[{layer}] is {name!r}; expected one of {', '.join(_LAYER_TYPES)}"
            )
        if name == "sliding_attention" and window is None:
            raise ValueError(
                f"layer_types[{layer}] is 'sliding_attention', but sliding_window is not set "
                f"or not switched on for model_type {model_type!r}"
            )
    return tuple(window if name == "sliding_attention" else None for name in types)


def _default_layer_types(raw: dict[str, Any], num_layers: int, window: int | None) -> list[str]:
    full, sliding = _LAYER_TYPES
    if raw["model_type"] == "gemma3_text":
        name = "sliding_window_pattern"
        pattern = _size(raw, name if name in raw else f"_{name}", 6)
        return [full if (layer + 1) % pattern == 0 else sliding for layer in range(num_layers)]
    if window is None:
        return [full] * num_layers
    first = raw.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"max_window_layers is {first!r}; expected an integer, at least 0")
    return [sliding if layer >= first else full for layer in range(num_layers)]


def _ropes(raw: dict[str, Any], family: _Family) -> tuple[RopeConfig, RopeConfig | None]:
    """Return the RoPE of full layers, and that of windowed layers where it differs in kind."""
    name, given = _rope_field(raw)
    if given and set(given) <= set(_LAYER_TYPES):  # one entry per attention kind
        ropes = {}
        for kind, entry in given.items():
            if not isinstance(entry, dict):
                raise ValueError(f"{name}.{kind} is {entry!r}; expected an object")
            ropes[kind] = _rope(f"{name}.{kind}", entry, family.theta)
        if "full_attention" not in ropes:
            raise ValueError(f"{name} has no entry 'full_attention'")
        return ropes["full_attention"], ropes.get("sliding_attention")
    theta = _number(raw, "rope_theta", None)
    inner = given.get("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        raise ValueError(f"rope_theta is {theta}, but {name}.rope_theta is {inner}")
    rope = _rope(name, given, family.theta if theta is None else theta)
    if raw["model_type"] != "gemma3_text":
        return rope, None
    return rope, RopeConfig(theta=_number(raw, "rope_local_base_freq", 10_000.0))


def _rope_field(raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    fields = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
    for name, value in fields.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}; expected an object")
    if len(fields) == 2 and fields["rope_parameters"] != fields["rope_scaling"]:
        raise ValueError("rope_parameters and rope_scaling are both given and differ")
    return next(iter(fields.items()), ("rope_parameters", {}))


def _rope(where: str, entry: dict[str, Any], theta: float) -> RopeConfig:
    rope_type = entry.get("rope_type", entry.get("type", "default"))
    if not isinstance(rope_type, str):
        raise ValueError(f"{where}.rope_type is {rope_type!r}; expected a string")
    try:
        RopeConfig(rope_type=rope_type)  # names what is served
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{where}: {error}") from error
    if _number(entry, "partial_rotary_factor", 1.0) != 1:
        raise NotImplementedError(
            f"{where}.partial_rotary_factor {entry['partial_rotary_factor']!r} is not served; "
            "served is 1.0"
        )
    needed = _ROPE_KEYS[rope_type]
    if missing := [key for key in needed if entry.get(key) is None]:
        raise ValueError(
            f"{where} has no {', '.join(missing)}; rope_type {rope_type!r} needs "
            f"{', '.join(needed)}"
        )
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *needed}
    known |= {"original_max_position_embeddings"}
    if unknown := sorted(key for key in entry.keys() - known if entry[key] is not None):
        raise ValueError(
            f"{where} has the fields {', '.join(unknown)}, which rope_type {rope_type!r} does not "
            "use"
        )
    numbers = {key: entry[key] for key in needed}
    try:
        return RopeConfig(theta=_number(entry, "rope_theta", theta), rope_type=rope_type, **numbers)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _write_fields(config: ModelConfig, model_type: str, family: _Family) -> dict[str, Any]:
    """Return what ``config.json`` says, as far as this model type has a field for it."""
    windows = {window for window in config.layer_windows if window is not None}
    kinds = [_LAYER_TYPES[window is not None] for window in config.layer_windows]
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        family.activation_field: names[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _write_rope(config.rope),
    }
    if config.max_position_embeddings is not None:
        raw["max_position_embeddings"] = config.max_position_embeddings
    if "attention_bias" in family.fields:
        raw["attention_bias"] = config.qkv_bias
    if "mlp_bias" in family.fields:
        raw["mlp_bias"] = config.mlp_bias
    if model_type != "llama" and len(windows) <= 1:
        raw |= {"layer_types": kinds, "sliding_window": next(iter(windows), None)}
    if "use_sliding_window" in family.fields:
        raw["use_sliding_window"] = bool(windows)
    if model_type == "gemma3_text":
        raw["query_pre_attn_scalar"] = _query_scalar(config)
        raw["final_logit_softcapping"] = config.final_logit_soft_cap
        raw["rope_parameters"] = {
            "full_attention": raw["rope_parameters"],
            "sliding_attention": _write_rope(config.local_rope or config.rope),
        }
    return raw


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    numbers = {key: getattr(rope, key) for key in _ROPE_KEYS[rope.rope_type]}
    return {"rope_type": rope.rope_type, "rope_theta": rope.theta, **numbers}


def _query_scalar(config: ModelConfig) -> float:
    """Return ``s`` with ``s ** -0.5`` equal to the softmax scale, as an integer where it is one."""
    if config.query_scale is None:
        return config.head_dim
    scalar = config.query_scale**-2
    return round(scalar) if round(scalar) ** -0.5 == config.query_scale else scalar
