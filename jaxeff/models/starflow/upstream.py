"""Loading weights of apple/ml-tarflow and apple/ml-starflow by their original names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.models.starflow.config import TARFlowConfig
from jaxeff.models.starflow.flow import TARFlow

__all__ = ["config_from_upstream", "from_upstream", "load_safetensors"]

# Where a constructor argument of apple/ml-starflow goes: our field and how its value is read.
_STARFLOW_FIELDS = {
    "in_channels": ("in_channels", int),
    "img_size": ("img_size", int),
    "patch_size": ("patch_size", int),
    "channels": ("width", int),
    "top_block_channels": ("deep_width", lambda v: int(v) if v else None),
    "head_dim": ("head_dim", int),
    "num_heads": ("num_heads", lambda v: int(v) if v else None),
    "num_kv_heads": ("num_kv_heads", lambda v: int(v) if v else None),
    "rope": ("rope", bool),
    "pt_seq_len": ("rope_length", lambda v: int(v) if v else None),
    "sos": ("sos", bool),
    "use_softplus": ("scale", lambda v: "softplus" if v else "exp"),
    "use_swiglu": ("mlp", lambda v: "geglu" if v else "gelu"),
    "use_bias": ("use_bias", bool),
    "use_qk_norm": ("qk_norm", bool),
    "use_post_norm": ("post_norm", bool),
    "use_final_norm": ("final_norm", bool),
    "hf_style_rope": ("rope_pairs", lambda v: "half" if v else "interleaved"),
    "norm_type": ("norm", {"layer_norm": "layer", "rms_norm": "rms"}.__getitem__),
    "soft_clip": ("soft_clip", float),
    "seq_order": ("order", str),
}
_TARFLOW_FIELDS = {
    "in_channels": ("in_channels", int),
    "img_size": ("img_size", int),
    "patch_size": ("patch_size", int),
    "channels": ("width", int),
    "num_classes": ("num_classes", int),
    "nvp": ("volume_preserving", lambda v: not v),
}
_STRUCTURE = {"num_blocks", "layers_per_block", "txt_size", "txt_dim", "cond_top_only"}
# Change memory or speed upstream, never a number.
_HARMLESS = {"use_checkpoint", "use_checkpoint_mlp"}
# Change numbers in ways that are not served: argument -> why.
_UNSERVED = {
    "use_pretrained_lm": "a pretrained language model as deep block (1-D rotary positions)",
    "use_mm_attn": "multi-modal attention",
    "learnable_self_denoiser": "the video denoiser",
    "conditional_denoiser": "the video denoiser",
    "temporal_causal": "video",
    "shallow_block_local": "video",
    "denoiser_window": "video",
    "local_attn_window": "video",
}

# Original name inside ``blocks.i`` -> path inside ``flow.blocks[i]``, and whether to transpose
# (torch keeps a linear weight as [out, in]).
_BLOCK_NAMES = {
    "proj_in.weight": ("proj_in.kernel", True),
    "proj_in.bias": ("proj_in.bias", False),
    "proj_out.weight": ("proj_out.kernel", True),
    "proj_out.bias": ("proj_out.bias", False),
    "proj_txt.weight": ("proj_prefix.kernel", True),
    "proj_txt.bias": ("proj_prefix.bias", False),
    "pos_embed": ("pos_embed", False),
    "class_embed": ("class_embed", False),
    "sos_embed": ("sos", False),
    "final_norm.weight": ("final_norm.scale", False),
}
# The same inside ``attn_blocks.j`` -> ``layers[j]``.
_LAYER_NAMES = {
    "attention.norm.weight": ("attention.norm.scale", False),
    "attention.norm.bias": ("attention.norm.bias", False),
    "attention.qkv.weight": ("attention.qkv.kernel", True),
    "attention.qkv.bias": ("attention.qkv.bias", False),
    "attention.proj.weight": ("attention.proj.kernel", True),
    "attention.proj.bias": ("attention.proj.bias", False),
    "attention.query_norm.weight": ("attention.query_norm.scale", False),
    "attention.key_norm.weight": ("attention.key_norm.scale", False),
    "attention.post_norm.weight": ("attention.post_norm.scale", False),
    "mlp.norm.weight": ("mlp.norm.scale", False),
    "mlp.norm.bias": ("mlp.norm.bias", False),
    "mlp.main.0.weight": ("mlp.up.kernel", True),
    "mlp.main.0.bias": ("mlp.up.bias", False),
    "mlp.main.2.weight": ("mlp.down.kernel", True),
    "mlp.main.2.bias": ("mlp.down.bias", False),
    "mlp.gate_proj.weight": ("mlp.gate.kernel", True),
    "mlp.gate_proj.bias": ("mlp.gate.bias", False),
    "mlp.up_proj.weight": ("mlp.up.kernel", True),
    "mlp.up_proj.bias": ("mlp.up.bias", False),
    "mlp.down_proj.weight": ("mlp.down.kernel", True),
    "mlp.down_proj.bias": ("mlp.down.bias", False),
    "mlp.post_norm.weight": ("mlp.post_norm.scale", False),
}


def config_from_upstream(config: Mapping[str, Any]) -> TARFlowConfig:
    """Translate constructor arguments of the original ``Model`` classes.

    A mapping with ``layers_per_block`` as a list or with any STARFlow argument is read as
    apple/ml-starflow's, else as apple/ml-tarflow's. A mapping with a ``model`` entry (a report
    file) is read from there.

    Args:
      config: the original constructor arguments; missing ones take the original defaults.

    Returns:
      our configuration.

    Raises:
      ValueError: for an argument that neither model has.
      NotImplementedError: for video and for a pretrained language model as deep block.

    >>> config_from_upstream({"in_channels": 1, "img_size": 8, "patch_size": 2, "channels": 64,
    ...                       "num_blocks": 2, "layers_per_block": 1}).layers_per_block
    (1, 1)
    """
    config = dict(config.get("model", config))
    layers = config.get("layers_per_block")
    starflow_only = set(_STARFLOW_FIELDS) - set(_TARFLOW_FIELDS) | {"txt_size", "txt_dim"}
    is_starflow = isinstance(layers, list | tuple) or bool(starflow_only & set(config))
    fields = _STARFLOW_FIELDS if is_starflow else _TARFLOW_FIELDS
    unknown = set(config) - set(fields) - _STRUCTURE - _HARMLESS - set(_UNSERVED)
    if unknown:
        raise ValueError(f"config has unknown arguments {sorted(unknown)}")
    for name, reason in _UNSERVED.items():
        if config.get(name):
            raise NotImplementedError(
                f"config asks for {name}={config[name]!r} ({reason}); image models with rotary or "
                "learned positions are served"
            )
    values = {ours: read(config[name]) for name, (ours, read) in fields.items() if name in config}
    layers = [layers] if isinstance(layers, int) else list(layers)
    blocks = config["num_blocks"]
    values["layers_per_block"] = tuple(layers * blocks if len(layers) == 1 else layers)
    if len(values["layers_per_block"]) != blocks:
        raise ValueError(f"layers_per_block must hold {blocks} numbers, got {layers}")
    if is_starflow:
        values["patch_order"] = "p_p_c"
        if config.get("txt_dim"):
            values["cond"] = "prefix_deep" if config.get("cond_top_only") else "prefix_all"
            values["prefix_len"], values["prefix_dim"] = config["txt_size"], config["txt_dim"]
    elif config.get("num_classes"):
        values["cond"] = "class_add"
    return TARFlowConfig(**values)


def from_upstream(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | TARFlowConfig, **kwargs
) -> TARFlow:
    """Build a flow with the original weights.

    Args:
      state_dict: original names → arrays in torch layout (linear weights ``[out, in]``, rows of
        ``qkv`` ordered queries, keys, values). Mask and rotary buffers may be there.
      config: the original constructor arguments, or our configuration.
      kwargs: of `TARFlow` (dtype, attention_fn, …).

    Returns:
      a flow that gives the original z, log-determinant and samples.

    Raises:
      ValueError: for a missing, superfluous or wrongly shaped tensor, with its name.

    References: ``transformer_flow.py`` of apple/ml-tarflow and apple/ml-starflow.
    """
    if not isinstance(config, TARFlowConfig):
        config = config_from_upstream(config)
    flow = TARFlow(config, rngs=nnx.Rngs(0), **kwargs)
    graphdef, state = nnx.split(flow)
    ours = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    missing = set(ours) - {"prior_var"}
    for name, value in state_dict.items():
        path, transpose = _path(name)
        if path is None:
            continue
        if path == "prior_var" and config.rope:
            continue  # STARFlow keeps the buffer of ones and never reads it
        if path not in ours:
            raise ValueError(f"state_dict has {name!r}, which this configuration does not use")
        value = np.asarray(value)
        value = value.T if transpose else value
        shape = ours[path].shape
        if path.endswith(("class_embed", ".sos")):
            value = value.reshape(-1, value.shape[-1]) if len(shape) == 2 else value.reshape(-1)
        if value.shape != shape:
            raise ValueError(f"state_dict[{name!r}] must give shape {shape}, got {value.shape}")
        ours[path][...] = jnp.asarray(value, ours[path].dtype)
        missing.discard(path)
    if missing:
        raise ValueError(f"state_dict lacks the weights of {sorted(missing)}")
    return nnx.merge(graphdef, state)


def _path(name: str) -> tuple[str | None, bool]:
    """Our path of an original name, or None for a buffer that carries nothing."""
    if name == "var":
        return "prior_var", False
    if name.startswith("feat_rope") or name.endswith("attn_mask"):
        return None, False
    parts = name.split(".")
    if parts[0] == "blocks" and len(parts) > 2:
        rest = ".".join(parts[2:])
        if rest in _BLOCK_NAMES:
            path, transpose = _BLOCK_NAMES[rest]
            return f"blocks.{parts[1]}.{path}", transpose
        rest = ".".join(parts[4:])
        if parts[2] == "attn_blocks" and rest in _LAYER_NAMES:
            path, transpose = _LAYER_NAMES[rest]
            return f"blocks.{parts[1]}.layers.{parts[3]}.{path}", transpose
    raise ValueError(f"state_dict has the unknown name {name!r}")


def load_safetensors(path: str | Path, config: Mapping[str, Any] | TARFlowConfig, **kwargs):
    """Build a flow from a safetensors file with the original names; see `from_upstream`.

    Args:
      path: a ``.safetensors`` file.
      config: the original constructor arguments.
      kwargs: of `TARFlow`.

    Raises:
      ImportError: when safetensors is not installed (extra ``hf``).
    """
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError("reading .safetensors files needs the extra jaxeff[hf]") from error
    return from_upstream(load_file(path), config, **kwargs)
