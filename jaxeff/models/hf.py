"""Load and save Hugging Face checkpoints: ``config.json`` and safetensors, without torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.models.config import ModelConfig
from jaxeff.models.decoder import Decoder
from jaxeff.models.hf_config import from_hf_config, read_hf_config, to_hf_config
from jaxeff.typing import AttentionFns, DTypeLike

__all__ = [
    "from_hf_config",
    "from_pretrained",
    "read_hf_config",
    "save_pretrained",
    "tensor_names",
    "to_hf_config",
]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")

# Parameter of the decoder -> tensor of the checkpoint. A kernel is the transposed weight.
_MODEL_TENSORS = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
# The same within one layer, whose tensors start with "model.layers.<i>.".
_LAYER_TENSORS = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.q_proj.kernel": "self_attn.q_proj.weight",
    "attention.q_proj.bias": "self_attn.q_proj.bias",
    "attention.k_proj.kernel": "self_attn.k_proj.weight",
    "attention.k_proj.bias": "self_attn.k_proj.bias",
    "attention.v_proj.kernel": "self_attn.v_proj.weight",
    "attention.v_proj.bias": "self_attn.v_proj.bias",
    "attention.out_proj.kernel": "self_attn.o_proj.weight",
    "attention.out_proj.bias": "self_attn.o_proj.bias",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate_proj.kernel": "mlp.gate_proj.weight",
    "mlp.gate_proj.bias": "mlp.gate_proj.bias",
    "mlp.up_proj.kernel": "mlp.up_proj.weight",
    "mlp.up_proj.bias": "mlp.up_proj.bias",
    "mlp.down_proj.kernel": "mlp.down_proj.weight",
    "mlp.down_proj.bias": "mlp.down_proj.bias",
}
# With post-norms the same tensor name means another norm.
_POST_NORM_TENSORS = {
    "post_attention_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm.scale": "post_feedforward_layernorm.weight",
}
# Constants that older writers stored; the decoder computes them from the configuration.
_COMPUTED = (".rotary_emb.inv_freq",)


def from_pretrained(
    path: str | Path, *, dtype: DTypeLike = jnp.float32, attention_fn: AttentionFns | None = None
) -> Decoder:
    """Load a checkpoint folder as a :class:`Decoder`.

    The folder holds ``config.json`` and either ``model.safetensors`` or
    ``model.safetensors.index.json`` with its shards, as ``transformers`` and the Hugging Face hub
    write them. Tensors are read one by one, so that memory stays near that of the model.

    Args:
        path: the folder. Nothing is downloaded.
        dtype: floating dtype of both parameters and computation; stored float32, float16 and
            bfloat16 tensors are converted to it.
        attention_fn: as for :class:`Decoder`.

    Returns:
        The model: ``model(tokens [B, T]) -> logits [B, T, V]``.

    Raises:
        ValueError: a file is missing, corrupt or truncated; a tensor is missing, unexpected or of
            another shape; a configuration value is wrong. The message names file and tensor.
        NotImplementedError: the model type, a configuration value or a tensor's dtype is not
            served.
        ImportError: the package ``safetensors`` (extra ``hf``) is not installed.

    >>> from_pretrained("/nowhere")
    Traceback (most recent call last):
    ...
    ValueError: /nowhere is not a folder; expected one with config.json and *.safetensors ...
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; expected one with config.json and *.safetensors (a "
            "checkpoint of the hub is downloaded with its own tools first)"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}; expected a floating dtype")
    config = read_hf_config(path / "config.json")
    abstract = nnx.eval_shape(
        lambda: Decoder(
            config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, attention_fn=attention_fn
        )
    )
    graphdef, state = nnx.split(abstract)
    params = {_dotted(key): (key, param) for key, param in nnx.to_flat_state(state)}
    names = tensor_names(config)
    files = _tensor_files(path)
    _check_names(path, names, files, tied=config.tie_embeddings)
    loaded = {}
    for name, tensor in _read_tensors(files, names):
        key, param = params[names[name]]
        _check_shape(files[name], name, tensor.shape, _stored(param, key).shape)
        array = tensor.astype(dtype)
        loaded[key] = param.replace(array.T if key[-1] == "kernel" else array)
    if config.tie_embeddings:
        _check_tied(files)
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_pretrained(
    model: Decoder, path: str | Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a :class:`Decoder` as a checkpoint folder that :func:`from_pretrained` reads.

    Writes ``config.json`` (with ``rope_parameters``, so for ``transformers`` 5 or newer) and
    ``model.safetensors``, or shards and an index where the tensors take more than
    ``max_shard_bytes``. Only the decoder's own parameters are written; a recipe's state is not.

    Args:
        model: the model; its parameters keep their dtype.
        path: the folder; made if needed. Files of the same names are replaced.
        max_shard_bytes: tensor bytes per file, at least 1; one tensor is never split.

    Raises:
        ValueError: ``max_shard_bytes`` is below 1.
        NotImplementedError: no served model type holds the model's configuration, or the model is
            adapted or packed.
        ImportError: the package ``safetensors`` (extra ``hf``) is not installed.

    >>> import tempfile
    >>> from flax import nnx
    >>> config = ModelConfig.llama(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(Decoder(config, rngs=nnx.Rngs(0)), folder)
    ...     from_pretrained(folder).config == config
    True
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    save_file = import_safetensors().numpy.save_file
    tensors = _model_tensors(model)
    dtype = str(tensors["model.embed_tokens.weight"].dtype)
    raw = to_hf_config(model.config, dtype=dtype)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")

    shards = _split(tensors, max_shard_bytes)
    count = len(shards)
    files = [
        _SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        for i in range(1, count + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        # The writer copies raw memory, so a transposed view has to be laid out anew first.
        arrays = {name: np.ascontiguousarray(array) for name, array in shard.items()}
        save_file(arrays, path / file, metadata={"format": "pt"})
    # A single file is read in preference to an index: neither may be left from an earlier save.
    (path / (_INDEX if count == 1 else _SINGLE)).unlink(missing_ok=True)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
            "weight_map": {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        (path / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Return the tensors of a checkpoint with this configuration and the parameters they fill.

    Args:
        config: the model's configuration.

    Returns:
        Tensor name to the parameter's path in the decoder, with dots; a parameter named
        ``kernel`` is the transposed tensor.

    >>> config = ModelConfig.llama(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2)
    >>> tensor_names(config)["model.layers.0.self_attn.o_proj.weight"]
    'layers.0.attention.out_proj.kernel'
    """
    model = dict(_MODEL_TENSORS)
    if config.tie_embeddings:
        del model["lm_head.kernel"]
    switches = {
        "attention.q_proj.bias": config.qkv_bias,
        "attention.k_proj.bias": config.qkv_bias,
        "attention.v_proj.bias": config.qkv_bias,
        "attention.out_proj.bias": config.out_bias,
        "attention.q_norm.scale": config.qk_norm,
        "attention.k_norm.scale": config.qk_norm,
        "mlp.gate_proj.bias": config.mlp_bias,
        "mlp.up_proj.bias": config.mlp_bias,
        "mlp.down_proj.bias": config.mlp_bias,
    }
    layer = _LAYER_TENSORS | (_POST_NORM_TENSORS if config.post_norms else {})
    names = {theirs: ours for ours, theirs in model.items()}
    for i in range(config.num_layers):
        names |= {
            f"model.layers.{i}.{theirs}": f"layers.{i}.{ours}"
            for ours, theirs in layer.items()
            if switches.get(ours, True)
        }
    return names


def import_safetensors() -> Any:
    """The package ``safetensors``, or an ImportError that names the extra to install."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Hugging Face checkpoints need the package safetensors: pip install 'jaxeff[hf]'"
        ) from error
    return safetensors


def _dotted(key: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in key)


def _stored(param: Any, key: tuple[str | int, ...]) -> Any:
    """Return the parameter's array as the checkpoint lays it out."""
    array = param.get_value()
    if key[-1] != "kernel":
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape[::-1], array.dtype)
    return array.T


def _model_tensors(model: Decoder) -> dict[str, np.ndarray]:
    params = {
        _dotted(key): (key, param) for key, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    names = tensor_names(model.config)
    if extra := sorted(set(params) - set(names.values())):
        raise NotImplementedError(
            f"the model has parameters that no Hugging Face tensor holds: {_some(extra)}"
        )
    if missing := sorted(set(names.values()) - set(params)):
        raise NotImplementedError(
            f"the model has no plain parameters {_some(missing)}: packed weights and those of an "
            "adapted model are written by jaxeff.finetune (merge, save_fp8)"
        )
    tensors = {}
    for name, ours in names.items():
        key, param = params[ours]
        tensors[name] = np.asarray(_stored(param, key))
    return tensors


def _split(tensors: dict[str, np.ndarray], max_bytes: int) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def _tensor_files(path: Path) -> dict[str, Path]:
    """Return the file of each tensor in the folder, from the files' own headers."""
    if (path / _SINGLE).is_file():
        return dict.fromkeys(_header_names(path / _SINGLE), path / _SINGLE)
    index = path / _INDEX
    if not index.is_file():
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt"))
        hint = f"; {_some(others)} would need torch" if others else ""
        raise ValueError(f"{path} holds neither {_SINGLE} nor {_INDEX}{hint}")
    weight_map = _read_index(index)
    files: dict[str, Path] = {}
    for shard in sorted(set(weight_map.values())):
        file = path / shard
        if not file.is_file():
            lost = sorted(name for name, where in weight_map.items() if where == shard)
            raise ValueError(f"{file} is missing; {index.name} puts {_some(lost)} there")
        for name in _header_names(file):
            if weight_map.get(name) != shard:
                where = weight_map.get(name, "no file")
                raise ValueError(f"{file} holds tensor {name}; {index.name} puts it in {where}")
            files[name] = file
    for name, shard in weight_map.items():
        if name not in files:
            raise ValueError(f"{path / shard} has no tensor {name}; {index.name} puts it there")
    return files


def _read_index(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:  # both JSON and UTF-8 errors
        raise ValueError(f"{index} is not JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map' object from tensor names to files")
    for name, shard in weight_map.items():
        # A plain file name: an index from elsewhere must not reach outside its folder.
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ValueError(f"{index} puts tensor {name} in {shard!r}; expected a file name")
    return weight_map


def _header_names(file: Path) -> list[str]:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(file, framework="flax") as opened:
            return list(opened.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is corrupt: {_damage(file) or error}") from error


def _damage(file: Path) -> str | None:
    """Say in words what is wrong with a safetensors file, with the tensor where there is one.

    The format is an 8-byte little-endian header length, a JSON header, then the data.
    """
    size = file.stat().st_size
    if size < 8:
        return f"it has {size} bytes; the header alone starts with 8"
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > size - 8:
            return f"its header should take {length} bytes, and {size - 8} follow"
        try:
            header = json.loads(opened.read(length))
            ends = {
                name: 8 + length + entry["data_offsets"][1]
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is not a JSON object of tensors"
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            return f"tensor {name} ends at byte {end}, and the file at {size}"
    if ends and max(ends.values()) < size:
        return f"{size - max(ends.values())} bytes follow the last tensor {max(ends, key=ends.get)}"
    return None


def _read_tensors(files: dict[str, Path], names: dict[str, str]) -> Iterator[tuple[str, jax.Array]]:
    """Yield the named tensors file by file, each opened once."""
    safetensors = import_safetensors()
    for file in sorted({files[name] for name in names}):
        with safetensors.safe_open(file, framework="flax") as opened:
            for name in names:
                if files[name] != file:
                    continue
                stored = opened.get_slice(name).get_dtype()
                if stored not in _DTYPES:
                    raise NotImplementedError(
                        f"{file}: tensor {name} is stored as {stored}; served are "
                        f"{', '.join(_DTYPES)}"
                    )
                yield name, opened.get_tensor(name)


def _check_names(path: Path, names: dict[str, str], files: dict[str, Path], *, tied: bool) -> None:
    if missing := [name for name in names if name not in files]:
        where = path / (_SINGLE if (path / _SINGLE).is_file() else _INDEX)
        raise ValueError(f"{where}: missing tensor {_some(missing)} ({len(names)} are needed)")
    allowed = {"lm_head.weight"} if tied else set()
    for name, file in sorted(files.items()):
        if name not in names and name not in allowed and not name.endswith(_COMPUTED):
            raise ValueError(
                f"{file}: unexpected tensor {name}; the config.json beside it has no place for it"
            )


def _check_shape(file: Path, name: str, came: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(came) != tuple(expected):
        raise ValueError(
            f"{file}: tensor {name} has shape {tuple(came)}; config.json asks for {tuple(expected)}"
        )


def _check_tied(files: dict[str, Path]) -> None:
    """A tied checkpoint may repeat the embedding as ``lm_head.weight``, but not contradict it."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in files:
        return
    tensors = dict(_read_tensors(files, dict.fromkeys((head, embedding), "")))
    if tensors[head].shape != tensors[embedding].shape or bool(
        jnp.any(tensors[head] != tensors[embedding])
    ):
        raise ValueError(
            f"{files[head]}: tensor {head} differs from {embedding}, and config.json says that "
            "they are tied (tie_word_embeddings)"
        )


def _some(names: list[str], most: int = 3) -> str:
    """Join the first names and count the rest."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
