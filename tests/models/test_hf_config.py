import json
import logging
import math
from pathlib import Path

import pytest

from jaxeff.models.hf_config import from_hf_config, read_hf_config, to_hf_config
from jaxeff.nn import RopeConfig

DATA = Path(__file__).parent.parent / "data" / "hf"


def config(name="llama3", **changes):
    raw = json.loads((DATA / name / "config.json").read_text())
    return raw | changes


def test_the_four_families():
    llama, qwen2, qwen3, gemma = (
        from_hf_config(config(name)) for name in ("llama3", "qwen2", "qwen3", "gemma3")
    )
    assert llama.rope == RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 64)
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim) == (4, 2, 16)
    assert qwen2.qkv_bias
    assert not qwen2.out_bias
    assert qwen2.tie_embeddings
    assert qwen3.qk_norm
    assert qwen3.head_dim == 32
    assert gemma.layer_windows == (16,) * 5 + (None,)
    assert (gemma.layer_rope(0).theta, gemma.layer_rope(5).theta) == (10000.0, 1000000.0)
    assert gemma.embed_scale == 8.0
    assert gemma.query_scale is None  # query_pre_attn_scalar is head_dim
    scaled = from_hf_config(config("gemma3", query_pre_attn_scalar=64))
    assert scaled.query_scale == 0.125
    assert gemma.activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma3"])
def test_no_served_config_is_warned_about(name, caplog):
    with caplog.at_level(logging.WARNING):
        from_hf_config(config(name))
    assert not caplog.records


def test_unknown_fields_are_named_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        from_hf_config(config(residual_multiplier=0.2, future_switch=False))
    assert "residual_multiplier" in caplog.text
    assert "future_switch" not in caplog.text  # off is the same as absent


def test_defaults_of_the_model_types():
    sizes = {
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    llama = from_hf_config({"model_type": "llama", **sizes})
    assert (llama.head_dim, llama.num_kv_heads, llama.tie_embeddings) == (16, 4, False)
    assert llama.rope == RopeConfig()
    gemma = from_hf_config({"model_type": "gemma3_text", **sizes})
    assert (gemma.head_dim, gemma.tie_embeddings, gemma.layer_windows) == (256, True, (4096, 4096))
    assert gemma.query_scale is None
    assert gemma.rope.theta == 1e6
    assert gemma.embed_scale == math.sqrt(64)


def test_sliding_window_fields_of_qwen():
    raw = config("qwen2", sliding_window=8, max_window_layers=1)
    del raw["layer_types"]
    assert from_hf_config(raw).layer_windows == (None, None)  # use_sliding_window is false
    assert from_hf_config(raw | {"use_sliding_window": True}).layer_windows == (None, 8)
    typed = config("qwen3", sliding_window=8, use_sliding_window=True)
    typed["layer_types"] = ["sliding_attention", "full_attention"]
    assert from_hf_config(typed).layer_windows == (8, None)


def test_linear_scaling_of_gemma_is_for_full_layers_only():
    raw = config("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    del raw["rope_parameters"]
    gemma = from_hf_config(raw)
    assert gemma.rope == RopeConfig(theta=1e6, rope_type="linear", factor=8.0)
    assert gemma.local_rope == RopeConfig(theta=1e4)


def test_attention_and_mlp_bias():
    llama = from_hf_config(config(attention_bias=True, mlp_bias=True))
    assert llama.qkv_bias
    assert llama.out_bias
    assert llama.mlp_bias


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3", {}),
        ("llama3", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": None}),
        ("qwen3", {"hidden_act": "gelu"}),
        ("gemma3", {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 168}),
    ],
)
def test_written_config_reads_back(name, changes):
    parsed = from_hf_config(config(name, **changes))
    written = json.loads(json.dumps(to_hf_config(parsed)))
    assert written["model_type"] == config(name)["model_type"]
    assert from_hf_config(written) == parsed


LLAMA3_ROPE = config()["rope_parameters"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not served; served are llama, qwen2"),
        ({"model_type": "gemma3"}, "'gemma3' is not served .the one with images|gemma3 is the one"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "served .* is LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config 'awq' is not"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "'dynamic' is not served"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not served; served is 1.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor 0.5 is not served",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not served"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not served"),
        (
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            r"layer_types\[1\] 'chunked_attention' is not served; served are full_attention",
        ),
    ],
)
def test_known_values_that_are_not_served(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        from_hf_config(config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type is None; expected one of llama, qwen2, qwen3, gemma3"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; served are silu, swish, gelu"),
        ({"hidden_size": None}, "hidden_size is missing; expected an integer, at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer, at least 1"),
        ({"vocab_size": "256"}, "vocab_size is '256'; expected an integer"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; expected a finite number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"num_key_value_heads": 3}, r"num_kv_heads is 3; num_heads \(4\) must be a multiple"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple of num_att"),
        ({"head_dim": 15}, "head_dim is 15; RoPE needs an even number"),
        ({"layer_types": ["full_attention"]}, r"layer_types has 1 entries; .* \(3\)"),
        ({"layer_types": ["full_attention"] * 2 + ["x"]}, r"layer_types\[2\] is 'x'; expected"),
        ({"layer_types": ["sliding_attention"] * 3}, "but sliding_window is not set or not swit"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters: rope_type 'spiral' is u"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type is 3; expected a str"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters has no low_freq_factor, high_freq_factor, original_max_position_emb",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
            "rope_parameters has the fields mrope_section, which rope_type 'default' does not use",
        ),
        (
            {"rope_parameters": LLAMA3_ROPE | {"factor": 0}},
            "rope_parameters: rope factor is 0; expected a finite number, at least 1",
        ),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0, but rope_parameters.rope_theta is 500000.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling are both given and differ",
        ),
        (
            {"rope_parameters": {"sliding_attention": {}}},
            "rope_parameters has no entry 'full_attention'",
        ),
        (
            {"rope_parameters": {"full_attention": 3}},
            "rope_parameters.full_attention is 3; expected an object",
        ),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(config(**changes))


def test_wrong_files(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        read_hf_config(file)
    for text, message in (("{", "is not JSON"), ("[]", "expected a JSON object, came list")):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"config.json:? {message}"):
            read_hf_config(file)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_hf_config(file)
    file.write_text(json.dumps(config(model_type="mamba")))
    with pytest.raises(NotImplementedError, match=r"config.json: model_type 'mamba'"):
        read_hf_config(file)
