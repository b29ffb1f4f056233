"""Files for other libraries: merged, FP8 with scales, PEFT adapters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxeff.finetune import (
    FALQON,
    LoRA,
    QLoRA,
    adapt,
    adapted_layers,
    load_adapters,
    load_fp8,
    save_adapters,
    save_fp8,
    save_merged,
)
from jaxeff.models import Decoder, ModelConfig
from jaxeff.models.hf import from_pretrained, save_pretrained
from jaxeff.quant import quantize_weights, weight_bytes

CONFIG = ModelConfig.qwen2(vocab_size=64, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64)
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


forward = nnx.jit(lambda model, tokens: model(tokens))


def decoder(seed=0, config=CONFIG):
    return Decoder(config, rngs=nnx.Rngs(seed), attention_fn=jax.nn.dot_product_attention)


def adapted(rules, seed=0):
    """A decoder with adapters that do something."""
    model = decoder(seed)
    adapt(model, rules)
    for index, (_, layer) in enumerate(adapted_layers(model).values()):
        if hasattr(layer, "lora_b"):
            shape = layer.lora_b.get_value().shape
            layer.lora_b.set_value(0.3 * jax.random.normal(jax.random.key(index), shape))
    return model


def test_merged_checkpoint_gives_the_same_logits(tmp_path):
    model = adapted(LoRA(4, alpha=8, backbone=None))
    want = forward(model, TOKENS)
    save_merged(model, tmp_path / "f32", dtype=jnp.float32)
    np.testing.assert_allclose(forward(from_pretrained(tmp_path / "f32"), TOKENS), want, atol=1e-5)
    save_merged(model, tmp_path / "bf16")
    error = jnp.abs(forward(from_pretrained(tmp_path / "bf16"), TOKENS) - want)
    assert float(error.max()) < 0.03 * float(jnp.abs(want).max())
    with safetensors.safe_open(tmp_path / "bf16" / "model.safetensors", framework="flax") as file:
        assert {file.get_slice(n).get_dtype() for n in file.keys()} == {"BF16"}  # noqa: SIM118


def test_fp8_checkpoint_holds_falqons_own_codes(tmp_path):
    model = adapted(FALQON(4))
    save_fp8(model, tmp_path)
    entries = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    name = "model.layers.0.mlp.up_proj.weight"
    melded = model.layers[0].mlp.up_proj.weight.get_value()
    assert (entries[name]["dtype"], entries[name]["shape"]) == ("F8_E4M3", [64, 32])
    assert bytes(entries[name]["data"]) == np.asarray(melded.codes[:64]).tobytes()
    assert np.frombuffer(entries[f"{name}_scale"]["data"], np.float32) == float(melded.scale)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized" and config["ignore"] == ["lm_head"]
    loaded = load_fp8(tmp_path, dtype=jnp.float32)
    # Equal up to FALQON's rounding of the activations and the bfloat16 of what is not in FP8.
    want = forward(model, TOKENS)
    assert float(jnp.abs(forward(loaded, TOKENS) - want).max()) < 0.1 * float(jnp.abs(want).max())
    assert weight_bytes(loaded.layers) < 0.35 * weight_bytes(decoder().layers)


def test_damaged_fp8_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_fp8(tmp_path)
    save_merged(adapted(LoRA(2)), tmp_path / "plain")
    with pytest.raises(ValueError, match="no quantization_config of format 'float-quantized'"):
        load_fp8(tmp_path / "plain")
    save_fp8(decoder(), tmp_path / "fp8")
    (tmp_path / "fp8" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_fp8(tmp_path / "fp8")


# --- PEFT ---


def test_adapter_files_have_pefts_names_and_come_back(tmp_path):
    rules = [("attention.q_proj", LoRA(4, alpha=8)), ("mlp", LoRA(2))]
    model = adapted(rules)
    save_adapters(model, tmp_path, base="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (2, 2.0)
    q_name = "model.layers.0.self_attn.q_proj"
    assert config["rank_pattern"] == {q_name: 4} and config["alpha_pattern"] == {q_name: 8.0}
    assert q_name in config["target_modules"] and len(config["target_modules"]) == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"{Q_PROJ}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{Q_PROJ}.lora_B.weight"].shape == (32, 4)
    loaded = decoder()
    plan = load_adapters(loaded, tmp_path)
    assert plan["layers.0.attention.q_proj"] == "LoRA"
    assert plan["layers.0.attention.k_proj"] == "frozen"
    np.testing.assert_array_equal(forward(loaded, TOKENS), forward(model, TOKENS))
    quantized = decoder()  # adapters of one backbone on another: the usual way to use QLoRA's
    assert load_adapters(quantized, tmp_path, method=QLoRA)["layers.0.mlp.up_proj"] == "QLoRA"


def test_adapters_as_peft_writes_them(tmp_path):
    """Short module names, no tags, no patterns, rank-stabilised scale."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 32), (32, 2)))
    save_file(
        {f"{Q_PROJ}.lora_A.weight": a, f"{Q_PROJ}.lora_B.weight": b},
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "use_rslora": True,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = decoder()
    load_adapters(model, tmp_path, backbone="float32")
    kernel = decoder().layers[0].attention.q_proj.kernel[...]
    expected = kernel + (b @ a).T * 4 / 2**0.5
    np.testing.assert_allclose(
        model.layers[0].attention.q_proj.merged(), expected, rtol=1e-5, atol=1e-5
    )


def test_adapters_of_another_base_are_refused(tmp_path):
    save_adapters(adapted(LoRA(2)), tmp_path)
    model = decoder(seed=1)
    with pytest.raises(ValueError, match="these adapters were trained on another base model: the"):
        load_adapters(model, tmp_path)
    assert not adapted_layers(model)
    load_adapters(model, tmp_path, check_base=False)
    wide = ModelConfig.qwen2(vocab_size=64, num_layers=1, embed_dim=48, num_heads=2, mlp_dim=64)
    with pytest.raises(
        ValueError, match=r"adapter of model.layers.0.mlp.down_proj has shapes \(2, 64\)"
    ):
        load_adapters(decoder(config=wide), tmp_path)


def test_damaged_and_unserved_adapters(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        load_adapters(decoder(), tmp_path)
    with pytest.raises(NotImplementedError, match="is a FALQON layer"):
        save_adapters(adapted(FALQON(2)), tmp_path)
    with pytest.raises(ValueError, match="has no adapted layer"):
        save_adapters(decoder(), tmp_path)
    save_adapters(adapted([("q_proj", LoRA(2))]), tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, tensors = config.read_text(), load_file(file)
    for change, error, message in (
        ({"use_dora": True}, NotImplementedError, "use_dora is True; served is False only"),
        ({"peft_type": "IA3"}, NotImplementedError, "peft_type is 'IA3'; served: LORA"),
        ({"r": None}, ValueError, "is not an adapter configuration"),
    ):
        config.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(error, match=message):
            load_adapters(decoder(), tmp_path)
    config.write_text(good)
    for change, message in (
        ({"extra.weight": np.zeros(2, np.float32)}, "unexpected tensor extra.weight"),
        (
            {f"{Q_PROJ.replace('0', '7')}.lora_A.weight": np.zeros((2, 2), np.float32)},
            "adapter for model.layers.7.self_attn.q_proj, a module that this base model does not",
        ),
    ):
        save_file(tensors | change, file)
        with pytest.raises(ValueError, match=message):
            load_adapters(decoder(), tmp_path)
    save_file({f"{Q_PROJ}.lora_A.weight": np.zeros((2, 32), np.float32)}, file)
    with pytest.raises(ValueError, match="has only lora_A, not both"):
        load_adapters(decoder(), tmp_path)
    file.write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="adapter_model.safetensors is corrupt"):
        load_adapters(decoder(), tmp_path)


def test_adapters_that_lack_a_module_or_meet_a_changed_model(tmp_path):
    save_adapters(adapted([("mlp", LoRA(2))]), tmp_path)
    with pytest.raises(ValueError, match="model is adapted already, at"):
        load_adapters(adapted(LoRA(2)), tmp_path)
    packed = decoder()
    quantize_weights(packed, "int8")
    with pytest.raises(ValueError, match="as its weight is packed: load the adapters before"):
        load_adapters(packed, tmp_path)
    with pytest.raises(ValueError, match="method must be LoRA, QLoRA or FP8LoRA, got"):
        load_adapters(decoder(), tmp_path, method=FALQON)
    for save in (save_fp8, save_pretrained):
        with pytest.raises(NotImplementedError, match="packed"):
            save(packed, tmp_path / "other")
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    changed = json.loads(config.read_text()) | {"rank_pattern": None}
    config.write_text(json.dumps(changed))
    load_adapters(decoder(), tmp_path)
    tensors = {name: value for name, value in load_file(file).items() if "up_proj" not in name}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="the tensors of model.layers.0.mlp.up_proj are missing"):
        load_adapters(decoder(), tmp_path)
