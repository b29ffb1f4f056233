"""Checkpoints that the transformers library wrote, with its own outputs (tests/data/hf)."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxeff.kv_cache import DenseCache
from jaxeff.models import Decoder, ModelConfig
from jaxeff.models.hf import from_pretrained, save_pretrained, tensor_names, to_hf_config

DATA = Path(__file__).parent.parent / "data" / "hf"
FAMILIES = ("llama3", "qwen2", "qwen3", "gemma3")


@functools.cache
def load(name):
    model = from_pretrained(DATA / name)
    return model, np.load(DATA / name / "expected.npz")


@functools.cache
def forward(name, **options):
    graphdef, state = nnx.split(load(name)[0])
    return jax.jit(lambda tokens, **kw: nnx.merge(graphdef, state)(tokens, **kw, **options))


def ids(name, array="input_ids"):
    return jnp.asarray(load(name)[1][array], jnp.int32)


def init_cache(name):
    return DenseCache.init_for(load(name)[0], 2, 48, dtype=jnp.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_first_layer_equal_the_stored_ones(name):
    model, expected = load(name)
    logits, hidden = forward(name, return_hidden=True)(ids(name))
    assert logits.dtype == jnp.float32
    assert len(hidden) == model.config.num_layers
    # Asked for: 2e-4; measured on CPU: at most 2e-5.
    np.testing.assert_allclose(hidden[0], expected["hidden_1"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_cached_decode(name):
    _, expected = load(name)
    wanted, cache, run = expected["greedy_tokens"][0], init_cache(name), forward(name)
    tokens = jnp.tile(ids(name, "greedy_prompt"), (2, 1))
    rows, got = [], []
    for _ in wanted:
        logits, cache = run(tokens, cache=cache)
        rows.append(logits)
        tokens = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
        got.append(int(tokens[0, 0]))
    assert got == wanted.tolist()
    assert cache.seen.tolist() == [35, 35]
    whole = np.zeros((2, 48), np.int32)  # tokens after the 35th change nothing before them
    whole[:, :35] = np.concatenate((expected["greedy_prompt"][0], wanted[:-1]))
    full, _ = forward(name, return_hidden=True)(jnp.asarray(whole))
    np.testing.assert_allclose(jnp.concatenate(rows, 1), full[:, :35], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token_equals_the_whole_forward(name):
    tokens, cache, rows = ids(name), init_cache(name), []
    for t in range(tokens.shape[1]):
        logits, cache = forward(name)(tokens[:, t : t + 1], cache=cache)
        rows.append(logits)
    wanted = load(name)[1]["logits"]
    np.testing.assert_allclose(jnp.concatenate(rows, 1), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batch_equals_single_rows(name, side):
    _, expected = load(name)
    tokens, lengths = np.asarray(ids(name)).copy(), (48, 31)
    valid = np.arange(48) < np.array(lengths)[:, None]
    tokens = np.where(valid, tokens, 7)
    if side == "left":
        tokens, valid = (np.stack([x[0], np.roll(x[1], 17)]) for x in (tokens, valid))
    logits = np.asarray(forward(name)(jnp.asarray(tokens), valid=jnp.asarray(valid)))
    assert np.isfinite(logits).all()
    for row, length in enumerate(lengths):
        wanted = expected["logits"][row, :length]
        np.testing.assert_allclose(logits[row][valid[row]], wanted, rtol=0, atol=2e-4)


def test_padded_prefill_then_decode():
    """Rows of unequal length go on from their own last token."""
    expected, tokens, cache = load("gemma3")[1], ids("gemma3"), init_cache("gemma3")
    run, lengths = forward("gemma3"), np.array([40, 23])
    valid = jnp.arange(40)[None] < lengths[:, None]
    _, cache = run(tokens[:, :40], valid=valid, cache=cache)
    assert cache.seen.tolist() == [40, 23]
    for step in range(4):
        at = lengths + step
        logits, cache = run(tokens[jnp.arange(2), at][:, None], cache=cache)
        wanted = expected["logits"][np.arange(2), at]
        np.testing.assert_allclose(logits[:, 0], wanted, rtol=0, atol=2e-4)


def test_any_attention_function_can_be_used():
    _, expected = load("qwen3")
    model = from_pretrained(DATA / "qwen3", attention_fn=jax.nn.dot_product_attention)
    assert model.layers[0].attention.attention_fn is jax.nn.dot_product_attention
    logits = nnx.jit(lambda m, t: m(t))(model, ids("qwen3"))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-4)


def test_bfloat16_loading_and_compute():
    _, expected = load("llama3")
    model = from_pretrained(DATA / "llama3", dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    logits = nnx.jit(lambda m, t: m(t))(model, ids("llama3"))
    assert logits.dtype == jnp.float32
    # Three layers with 8 bits of mantissa on logits of spread 3; measured mean 0.02.
    assert float(jnp.mean(jnp.abs(logits - expected["logits"]))) < 0.05


def edit(tmp_path, name="llama3", *, config=None, tensors=None):
    """Copy a checkpoint with changed config fields (None removes one) and tensors."""
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    raw = json.loads((folder / "config.json").read_text())
    for field, value in (config or {}).items():
        raw[field] = value
        if value is None:
            del raw[field]
    (folder / "config.json").write_text(json.dumps(raw))
    if tensors is not None:
        loaded = load_file(folder / "model.safetensors")
        tensors(loaded)
        save_file(loaded, folder / "model.safetensors")
    return folder


def test_stored_bfloat16_and_float16_tensors(tmp_path):
    import ml_dtypes

    def narrow(tensors):
        for name in tensors:
            dtype = np.float16 if "mlp" in name else ml_dtypes.bfloat16
            tensors[name] = tensors[name].astype(dtype)

    model = from_pretrained(edit(tmp_path, tensors=narrow))
    exact, _ = load("llama3")
    kernel = model.layers[1].attention.q_proj.kernel[...]
    wanted = exact.layers[1].attention.q_proj.kernel[...].astype(jnp.bfloat16)
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, wanted.astype(jnp.float32))


OLD_FIELDS = {
    "llama3": {
        "rope_parameters": None,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"rope_parameters": None, "layer_types": None, "rope_theta": 1000000.0},
    "qwen3": {
        "rope_parameters": None,
        "layer_types": None,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "default"},
    },
    "gemma3": {
        "rope_parameters": None,
        "layer_types": None,
        "_sliding_window_pattern": None,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_old_config_fields_give_the_same_model(name, tmp_path):
    model = from_pretrained(edit(tmp_path, name, config=OLD_FIELDS[name]))
    assert model.config == load(name)[0].config


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 70_000])
def test_save_and_load_round_trip(name, max_shard_bytes, tmp_path):
    model, _ = load(name)
    save_pretrained(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    files = sorted(file.name for file in (tmp_path / "saved").glob("model*"))
    assert (files == ["model.safetensors"]) == (max_shard_bytes == 10**9)
    again = from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(model), nnx.state(again))
    assert all(jax.tree.leaves(same))


def test_saved_tensors_are_those_of_the_source(tmp_path):
    """Byte for byte what transformers wrote, so that it can read ours."""
    save_pretrained(load("qwen2")[0], tmp_path)
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path, DATA / "qwen2"))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_saving_fewer_shards_again_leaves_no_stale_file_in_use(tmp_path):
    model, _ = load("qwen2")
    save_pretrained(model, tmp_path, max_shard_bytes=70_000)
    save_pretrained(model, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert from_pretrained(tmp_path).config == model.config


def test_saving_bfloat16(tmp_path):
    model = from_pretrained(DATA / "qwen2", dtype=jnp.bfloat16)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = from_pretrained(tmp_path, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(again.embed.embedding[...], model.embed.embedding[...])


def test_saving_what_no_model_type_holds():
    config = ModelConfig.llama(
        vocab_size=8, num_layers=2, embed_dim=8, num_heads=2, layer_windows=(4, None), qk_norm=True
    )
    assert to_hf_config(config)["model_type"] == "qwen3"
    odd = ModelConfig.llama(
        vocab_size=8, num_layers=2, embed_dim=8, num_heads=2, layer_windows=(4, 2), post_norms=True
    )
    with pytest.raises(NotImplementedError, match="llama: cannot hold layer_windows, post_norms"):
        to_hf_config(odd)
    with pytest.raises(ValueError, match="max_shard_bytes is 0; expected at least 1"):
        save_pretrained(None, "unused", max_shard_bytes=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_name_map_covers_exactly_the_parameters(name):
    model, _ = load(name)
    params = {".".join(map(str, key)) for key, _ in nnx.to_flat_state(nnx.state(model))}
    names = tensor_names(model.config)
    assert set(names.values()) == params
    assert set(names) == set(load_file(DATA / name / "model.safetensors"))


def pop(name):
    return lambda tensors: tensors.pop(name)


def put(name, array):
    return lambda tensors: tensors.__setitem__(name, array)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (pop(Q), ValueError, rf"model.safetensors: missing tensor {Q} \(30 are needed\)"),
        (
            put("model.layers.3.input_layernorm.weight", np.ones(64, np.float32)),
            ValueError,
            r"model.safetensors: unexpected tensor model.layers.3.input_layernorm.weight",
        ),
        (
            put(Q, np.zeros((64, 32), np.float32)),
            ValueError,
            rf"model.safetensors: tensor {Q} has shape \(64, 32\); config.json asks for \(64, 64\)",
        ),
        (
            put(Q, np.zeros((64, 64), np.int8)),
            NotImplementedError,
            f"model.safetensors: tensor {Q} is stored as I8; served are F32, F16, BF16",
        ),
        (lambda tensors: tensors.clear(), ValueError, r"and 27 more \(30 are needed\)"),
    ],
)
def test_wrong_tensors(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        from_pretrained(edit(tmp_path, tensors=change))


def test_constants_of_older_writers_are_accepted(tmp_path):
    extra = put("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32))
    from_pretrained(edit(tmp_path, tensors=extra))


def test_tied_embeddings_may_be_stored_twice_but_not_differ(tmp_path):
    def twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def different(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    from_pretrained(edit(tmp_path / "a", "qwen2", tensors=twice))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        from_pretrained(edit(tmp_path / "b", "qwen2", tensors=different))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1000], r"is corrupt: tensor \S+ ends at byte \d+, and the file at"),
        (lambda data: data[:100], r"is corrupt: its header should take \d+ bytes, and 92 follow"),
        (lambda data: data[:5], "is corrupt: it has 5 bytes; the header alone starts with 8"),
        (lambda data: b"", "is corrupt: it has 0 bytes"),
        (lambda data: data[:8] + b"x" * (len(data) - 8), "is corrupt: its header is not a JSON"),
        (lambda data: data + b"12", r"is corrupt: 2 bytes follow the last tensor"),
        (lambda data: b"\xff" * len(data), "is corrupt: its header should take 18446744073709"),
    ],
)
def test_corrupt_and_truncated_files(damage, message, tmp_path):
    folder = edit(tmp_path)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(data))
    with pytest.raises(ValueError, match=f"model.safetensors {message}"):
        from_pretrained(folder)


def shard(tmp_path):
    save_pretrained(load("qwen2")[0], tmp_path, max_shard_bytes=70_000)
    return tmp_path, tmp_path / "model.safetensors.index.json"


def test_shards_that_do_not_fit_their_index(tmp_path):
    folder, index = shard(tmp_path)
    good = json.loads(index.read_text())
    first = folder / good["weight_map"]["model.embed_tokens.weight"]

    embed, second = (
        "model.embed_tokens.weight",
        good["weight_map"]["model.layers.1.mlp.up_proj.weight"],
    )
    assert second != first.name
    for tensor, file, message in (
        ("extra", "x.safetensors", "x.safetensors is missing; .*index.json puts extra there"),
        ("extra", first.name, f"{first.name} has no tensor extra; .*index.json puts it there"),
        ("extra", "../x", "index.json puts tensor extra in '../x'; expected a file name"),
        (embed, second, f"holds tensor {embed}; .*index.json puts it in {second}"),
    ):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {tensor: file}}))
        with pytest.raises(ValueError, match=message):
            from_pretrained(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not JSON"):
        from_pretrained(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"index.json has no 'weight_map' object"):
        from_pretrained(folder)
    index.write_text(json.dumps(good))
    data = first.read_bytes()
    first.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=rf"{first.name} is corrupt: tensor \S+ ends at byte"):
        from_pretrained(folder)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; expected one with config.json"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json does not exist; expected a model's config"):
        from_pretrained(tmp_path)
    shutil.copy(DATA / "qwen2" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor \S+index.json$"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"index.json; pytorch_model.bin would need torch"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is int8; expected a floating dtype"):
        from_pretrained(DATA / "qwen2", dtype=jnp.int8)


def test_without_safetensors_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"need the package safetensors: pip install 'jaxeff\[hf"):
        from_pretrained(DATA / "qwen2")


def test_a_fresh_model_can_be_saved(tmp_path):
    config = ModelConfig.gemma3(
        vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, window=4, pattern=2
    )
    save_pretrained(Decoder(config, rngs=nnx.Rngs(0)), tmp_path)
    assert from_pretrained(tmp_path).config == config
