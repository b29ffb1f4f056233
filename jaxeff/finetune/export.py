"""Write a finetuned model for others: merged in bfloat16, or in FP8 with scales."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.finetune.adapt import adapted_layers, merge
from jaxeff.finetune.layers import FalqonLinear
from jaxeff.models import Decoder
from jaxeff.models.hf import (
    from_hf_config,
    import_safetensors,
    save_pretrained,
    tensor_names,
    to_hf_config,
)
from jaxeff.quant.module_paths import (
    DECODER_LAYERS,
    get_module,
    linear_layers,
    match_rules,
    set_module,
)
from jaxeff.quant.weights import PackedLinear, PackedWeight, WeightQuant
from jaxeff.typing import DTypeLike
from pallas_kernels.formats import QTensor
from pallas_kernels.ops.quantize.api import quantize

_FILE = "model.safetensors"


def save_merged(model: Decoder, path: str | Path, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes an adapted decoder as a plain checkpoint that ``transformers`` reads.

    The adapters are added to the weights in float32, and all parameters are rounded to ``dtype``.

    Args:
      model: an adapted decoder; not changed.
      path: folder, as for ``jaxeff.models.hf.save_pretrained``.
      dtype: floating dtype of the tensors.

    Raises:
      ValueError: the model has no adapted layer.
      NotImplementedError: no served model type holds the model's configuration.
      ImportError: the package ``safetensors`` (extra ``hf``) is not installed.
    """
    plain = merge(model)
    params = nnx.state(plain, nnx.Param)
    nnx.update(plain, jax.tree.map(lambda p: p.astype(dtype), params))
    save_pretrained(plain, path)


def save_fp8(model: Decoder, path: str | Path, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes a decoder with its blocks' linear weights in E4M3, one scale for each weight.

    Beside every ``<module>.weight`` (F8_E4M3) lies ``<module>.weight_scale`` (float32 ``[1]``):
    value = weight · weight_scale. ``config.json`` describes this in the words of
    ``compressed-tensors`` (format ``float-quantized``, strategy ``tensor``). The codes of FALQON
    layers are written as they are; other layers are merged and quantised now.

    Args:
      model: a decoder, adapted or plain; not changed.
      path: the folder; made if needed.
      dtype: dtype of everything else.

    Raises:
      NotImplementedError: no served model type holds the model's configuration, or its weights are
        packed.
      ImportError: the package ``safetensors`` (extra ``hf``) is not installed.
    """
    save_file = import_safetensors().numpy.save_file
    melded = {
        name: layer.weight.get_value()
        for name, (_, layer) in adapted_layers(model).items()
        if isinstance(layer, FalqonLinear)
    }
    plain = merge(model) if adapted_layers(model) else model
    if any(isinstance(module, PackedLinear) for _, module in nnx.iter_graph(plain)):
        raise NotImplementedError(
            "the model's weights are packed: use save_fp8 before quantize_weights"
        )
    quantized = set(match_rules(linear_layers(plain), [(DECODER_LAYERS, True)]))
    params = {
        ".".join(map(str, key)): value.get_value()
        for key, value in nnx.to_flat_state(nnx.state(plain, nnx.Param))
    }
    tensors = {}
    for theirs, ours in tensor_names(model.config).items():
        layer, _, kind = ours.rpartition(".")
        value = params[ours].T if kind == "kernel" else params[ours]
        if kind != "kernel" or layer not in quantized:
            tensors[theirs] = np.ascontiguousarray(value.astype(dtype))
            continue
        if layer in melded:
            codes, scale = melded[layer].codes[: value.shape[0]], melded[layer].scale
        else:
            stored = quantize(value, "fp8_e4m3", axis=None)
            codes, scale = stored.qvalue, stored.scale
        tensors[theirs] = np.ascontiguousarray(codes)
        tensors[f"{theirs}_scale"] = np.asarray(scale, np.float32).reshape(1)
    raw = to_hf_config(model.config, dtype=jnp.dtype(dtype).name)
    raw["quantization_config"] = _quantization_config(
        sorted(
            theirs.removesuffix(".weight")
            for theirs, ours in tensor_names(model.config).items()
            if ours.endswith(".kernel") and ours.removesuffix(".kernel") not in quantized
        )
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, path / _FILE, metadata={"format": "pt"})


def load_fp8(
    path: str | Path, *, dtype: DTypeLike = jnp.bfloat16, activations: str | None = None
) -> Decoder:
    """Reads what ``save_fp8`` wrote; the weights stay in FP8.

    Args:
      path: the folder.
      dtype: dtype of the computation and of everything that is not in FP8.
      activations: None (16 bits) or ``"fp8_e4m3"``, see ``jaxeff.quant.WeightQuant``.

    Returns:
      A decoder whose quantised layers are ``jaxeff.quant.PackedLinear``.

    Raises:
      ValueError: a file or tensor is missing, corrupt or of another shape.
      ImportError: the package ``safetensors`` (extra ``hf``) is not installed.
    """
    path = Path(path)
    raw = _read_json(path / "config.json")
    if raw.pop("quantization_config", {}).get("format") != "float-quantized":
        raise ValueError(
            f"{path / 'config.json'} has no quantization_config of format 'float-quantized'; "
            "from_pretrained reads plain checkpoints"
        )
    config = from_hf_config(raw)
    tensors = _read_raw(path / _FILE)
    model = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )
    names = tensor_names(config)
    _check_tensors(path / _FILE, tensors, names)
    layers = {f"{name}.kernel": where for name, where in linear_layers(model).items()}
    plain = {}
    for theirs, ours in names.items():
        value = tensors[theirs].T if ours.endswith("kernel") else tensors[theirs]
        if f"{theirs}_scale" in tensors:
            linear = get_module(model, layers[ours])
            _check_shape(path / _FILE, theirs, value.shape, linear.kernel.get_value().shape)
            packed = _packed(linear, value, tensors[f"{theirs}_scale"], activations)
            set_module(model, layers[ours], packed)
        else:
            plain[ours] = value
    for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, key))
        expected = variable.get_value().shape
        _check_shape(path / _FILE, name, plain[name].shape, expected)
        get_module(model, key).set_value(jnp.asarray(plain[name]).astype(dtype))
    return model


def _packed(linear, codes, scale, activations) -> PackedLinear:
    quant = WeightQuant("fp8_e4m3", group=None, activations=activations)
    packed = nnx.eval_shape(lambda layer: PackedLinear(layer, quant), linear)
    weight = QTensor(
        jnp.asarray(codes), jnp.asarray(scale, jnp.float32).reshape(1, 1), qtype="fp8_e4m3"
    )
    packed.weight = PackedWeight(weight)
    return packed


def _quantization_config(ignore: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "tensor",
                    "symmetric": True,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is no JSON object")
    return raw


def _read_raw(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; the reader's own numpy and flax modes do not know FP8."""
    import ml_dtypes

    safetensors = import_safetensors()
    dtypes = {
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
    }
    try:
        entries = safetensors.deserialize(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for name, entry in entries:
        if entry["dtype"] not in dtypes:
            raise NotImplementedError(
                f"{file}: tensor {name} is stored as {entry['dtype']}; served are "
                f"{', '.join(dtypes)}"
            )
    return {
        name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }


def _check_tensors(file: Path, tensors: dict, names: dict[str, str]) -> None:
    if missing := sorted(set(names) - set(tensors)):
        raise ValueError(f"{file}: missing tensor {missing[0]} ({len(missing)} are missing)")
    for name, tensor in tensors.items():
        if name not in names and name.removesuffix("_scale") not in names:
            raise ValueError(f"{file}: unexpected tensor {name}")
        if (tensor.dtype.name == "float8_e4m3fn") != (f"{name}_scale" in tensors):
            raise ValueError(
                f"{file}: tensor {name} is {tensor.dtype}; FP8 needs {name}_scale beside it, and "
                "nothing else has one"
            )


def _check_shape(file: Path, name: str, came: tuple, expected: tuple) -> None:
    if tuple(came) != tuple(expected):
        raise ValueError(f"{file}: {name} has shape {came}; config.json asks for {expected}")
