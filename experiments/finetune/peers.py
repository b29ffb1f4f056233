"""Do ``transformers``, ``peft`` and ``safetensors`` read what we export, to the same logits?

``JAX_PLATFORMS=cpu python -m experiments.finetune.peers`` builds tiny random models, exports them,
and reads them back with the libraries on a CPU. A line begins with PASS, FAIL or, where a library
is not installed, SKIP; ``peers.json`` has the differences and versions.

* merged: LoRA merged to bfloat16 safetensors, ``AutoModelForCausalLM`` in float32 against ours on
  the same rounded weights, and in bfloat16 against our bfloat16.
* adapters: ``PeftModel`` on the same base; and an adapter that PEFT saved, read by ours.
* fp8: the file's dtypes and scales as ``safetensors`` shows them to torch, and where
  ``compressed-tensors`` is installed the model that ``transformers`` makes of it.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from jaxeff.finetune import LoRA, adapt, load_adapters, load_fp8, save_adapters, save_fp8
from jaxeff.finetune import save_merged as export_merged
from jaxeff.finetune.adapt import adapted_layers
from jaxeff.models import Decoder, ModelConfig
from jaxeff.models.hf import from_pretrained, save_pretrained
from jaxeff.report import machine

RESULTS = Path(__file__).parent / "results"
SIZES = {"vocab_size": 128, "num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2,
         "mlp_dim": 96}  # fmt: skip
FAMILIES: dict[str, Callable[..., ModelConfig]] = {
    "llama": ModelConfig.llama,
    "qwen2": ModelConfig.qwen2,
}
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], size=(2, 24))
# Largest difference of two logits over the largest logit: float32 sums in another order, and
# bfloat16 activations (2^-8 each) through two blocks.
BOUNDS = {"float32": 2e-5, "bfloat16": 3e-2}


class Missing(Exception):
    """A library that a check needs is not installed."""


def base_model(family: str) -> Decoder:
    """A random float32 model; its attention is jax's own."""
    config = FAMILIES[family](**SIZES)
    return Decoder(config, rngs=nnx.Rngs(0), attention_fn=jax.nn.dot_product_attention)


def adapted(family: str) -> Decoder:
    """The same with LoRA on a float32 backbone, and a ``B`` that is not zero."""
    model = base_model(family)
    adapt(model, LoRA(4, alpha=8, backbone=None))
    for index, (_, layer) in enumerate(adapted_layers(model).values()):
        key = jax.random.fold_in(jax.random.key(1), index)
        layer.lora_b.set_value(0.1 * jax.random.normal(key, layer.lora_b.get_value().shape))
    return model


def ours(model: Decoder) -> np.ndarray:
    """Our logits."""
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(TOKENS)))


def theirs(model: Any) -> np.ndarray:
    """Logits of a torch model."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.float().numpy()


def read_by_transformers(folder: Path, dtype: str = "float32"):
    """What ``AutoModelForCausalLM`` makes of a folder, on the CPU."""
    torch, transformers = need("torch"), need("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )


def need(name: str):
    """A module, or `Missing`."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"{error.name} is not installed") from error


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(a - b).max() / np.abs(a).max())


# --- checks: each returns its difference and its bound -------------------------------------------


def check_merged(family: str, folder: Path, dtype: str) -> tuple[float, float]:
    """Merged weights in bfloat16, computed in ``dtype`` by both."""
    export_merged(adapted(family), folder)
    mine = from_pretrained(folder, dtype=jnp.dtype(dtype))
    return difference(ours(mine), theirs(read_by_transformers(folder, dtype))), BOUNDS[dtype]


def check_adapters(family: str, folder: Path) -> tuple[float, float]:
    """Our adapters on PEFT's side."""
    peft, model = need("peft"), adapted(family)
    save_pretrained(base_model(family), folder / "base")
    save_adapters(model, folder / "adapters", base=str(folder / "base"))
    base = read_by_transformers(folder / "base")
    other = peft.PeftModel.from_pretrained(base, folder / "adapters")
    return difference(ours(model), theirs(other)), BOUNDS["float32"]


def check_peft_adapters(family: str, folder: Path) -> tuple[float, float]:
    """PEFT's adapters on our side."""
    torch, peft = need("torch"), need("peft")
    save_pretrained(base_model(family), folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    other = peft.get_peft_model(read_by_transformers(folder / "base"), config)
    for index, (name, value) in enumerate(other.named_parameters()):
        if "lora_B" in name:
            torch.manual_seed(index)
            value.data.normal_(std=0.1)
    other.save_pretrained(folder / "adapters")
    model = base_model(family)
    load_adapters(model, folder / "adapters", backbone=None)
    return difference(ours(model), theirs(other)), BOUNDS["float32"]


def check_fp8_file(family: str, folder: Path) -> tuple[float, float]:
    """Codes and scales as torch sees them, against the weights that we read."""
    torch, files = need("torch"), need("safetensors.torch")
    save_fp8(adapted(family), folder)
    tensors = files.load_file(folder / "model.safetensors")
    codes = {n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    if codes != {n.removesuffix("_scale") for n in tensors if n.endswith("_scale")} or not codes:
        raise RuntimeError(f"codes and scales do not belong together: {sorted(tensors)}")
    model, worst = load_fp8(folder), 0.0
    for index, block in enumerate(model.layers):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        value = (tensors[name].float() * tensors[f"{name}_scale"]).numpy().T
        mine = np.asarray(block.mlp.down_proj.weight.get_value().dequantize())
        worst = max(worst, difference(mine, value))
    return worst, 1e-6


def check_fp8_model(family: str, folder: Path) -> tuple[float, float]:
    """The model that transformers makes of our FP8 folder, computed in bfloat16 by both."""
    need("compressed_tensors")
    save_fp8(adapted(family), folder)
    mine = ours(load_fp8(folder, dtype=jnp.bfloat16))
    return difference(mine, theirs(read_by_transformers(folder, "bfloat16"))), BOUNDS["bfloat16"]


CHECKS: dict[str, Callable[[str, Path], tuple[float, float]]] = {
    "merged, float32": lambda family, folder: check_merged(family, folder, "float32"),
    "merged, bfloat16": lambda family, folder: check_merged(family, folder, "bfloat16"),
    "adapters to PEFT": check_adapters,
    "adapters from PEFT": check_peft_adapters,
    "fp8 file": check_fp8_file,
    "fp8 model": check_fp8_model,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """Check every export, print a line for each, and write ``OUTPUT/peers.json``."""

    output: Path = RESULTS
    """Folder of the result."""

    def run(self) -> bool:
        """Whether nothing failed."""
        console, rows = Console(), []
        for family in FAMILIES:
            for name, check in CHECKS.items():
                row: dict[str, Any] = {"family": family, "check": name}
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        found, bound = check(family, Path(folder))
                        verdict = "PASS" if found <= bound else "FAIL"
                        row |= {"difference": found, "bound": bound}
                    except Missing as error:
                        verdict, row["why"] = "SKIP", str(error)
                    except Exception as error:  # any failure is the check's result
                        why = f"{type(error).__name__}: {error}"
                        verdict, row["why"] = "FAIL", why.replace(folder, "FOLDER")[:300]
                rows.append({**row, "verdict": verdict})
                said = row.get("why") or f"difference {row['difference']:.2g} <= {row['bound']:.2g}"
                console.print(f"{verdict} {family} {name}: {said}", highlight=False, soft_wrap=True)
        versions = {}
        for package in ("transformers", "peft", "torch", "safetensors", "compressed-tensors"):
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        report = {
            "command": "JAX_PLATFORMS=cpu python -m experiments.finetune.peers",
            "machine": machine(),
            "versions": versions,
            "rows": rows,
        }
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
        return all(row["verdict"] != "FAIL" for row in rows)


if __name__ == "__main__":
    if not tyro.cli(Command).run():
        raise SystemExit(1)
