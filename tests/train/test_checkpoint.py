"""Saving and restoring trees: values, shapes, unusual dtypes, and damaged files."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import checkpoint


@pytest.fixture(autouse=True)
def quiet_orbax():
    """Damaged files make orbax log tracebacks from its own threads."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def _tree():
    return {
        "w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "nested": (jnp.float32(2.5), [jnp.arange(4, dtype=jnp.uint32)]),
        "key": jax.random.key(3),
        "step": 7,
    }


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "c", _tree(), {"name": "x", "pair": (1, 2)})
    restored = checkpoint.restore(tmp_path / "c", _tree())
    assert restored["step"] == 7 and isinstance(restored["step"], int)
    assert (
        jax.random.key_data(restored.pop("key")) == jax.random.key_data(jax.random.key(3))
    ).all()
    expected = _tree()
    del expected["key"]
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert checkpoint.load_metadata(tmp_path / "c") == {"name": "x", "pair": [1, 2]}


@pytest.mark.parametrize(
    "dtype",
    ["int4", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float8_e4m3fn", "float8_e8m0fnu", "bool"],
)
def test_low_precision_dtypes(tmp_path, dtype):
    value = jnp.asarray([[1, 2, 1, 1]]).astype(dtype)
    checkpoint.save(tmp_path / "c", {"q": value})
    restored = checkpoint.restore(tmp_path / "c", {"q": jax.ShapeDtypeStruct(value.shape, dtype)})
    assert restored["q"].dtype == value.dtype
    np.testing.assert_array_equal(np.asarray(restored["q"]), np.asarray(value))


@pytest.mark.parametrize("qtype", ["nvfp4", "int8"])
def test_qtensor(tmp_path, qtype):
    from pallas_kernels import quantize

    value = quantize(jax.random.normal(jax.random.key(0), (4, 32)), qtype)
    checkpoint.save(tmp_path / "c", {"q": value})
    restored = checkpoint.restore(tmp_path / "c", {"q": jax.tree.map(jnp.zeros_like, value)})
    np.testing.assert_array_equal(restored["q"].dequantize(), value.dequantize())
    assert restored["q"].qtype == value.qtype


def test_sharded(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    value = jax.device_put(jnp.arange(8.0), sharding)
    checkpoint.save(tmp_path / "c", {"v": value})
    restored = checkpoint.restore(
        tmp_path / "c", {"v": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    )["v"]
    assert restored.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(restored, np.arange(8.0))


def test_other_shape_names_the_leaf(tmp_path):
    checkpoint.save(tmp_path / "c", _tree())
    other = _tree() | {"w": jnp.zeros((3, 2), jnp.bfloat16)}
    with pytest.raises(
        ValueError, match=r"\['w'\] is bfloat16 \[2, 3\] .* expected bfloat16 \[3, 2\]"
    ):
        checkpoint.restore(tmp_path / "c", other)
    other = _tree() | {"w": jnp.zeros((2, 3), jnp.float32)}
    with pytest.raises(ValueError, match=r"\['w'\] is bfloat16 .* expected float32"):
        checkpoint.restore(tmp_path / "c", other)
    with pytest.raises(ValueError, match=r"\['more'\] is not in the checkpoint"):
        checkpoint.restore(tmp_path / "c", _tree() | {"more": jnp.zeros(1)})
    del other["w"]
    with pytest.raises(ValueError, match=r"\['w'\] is only in the checkpoint"):
        checkpoint.restore(tmp_path / "c", other)


def _data_files(path):
    files = [file for file in (path / "arrays").rglob("*") if file.is_file()]
    return [file for file in files if file.parent.name == "d" and file.stat().st_size > 0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "facts"])
def test_damaged_files(tmp_path, damage):
    value = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    checkpoint.save(tmp_path / "c", value)
    files = _data_files(tmp_path / "c")
    assert files
    if damage == "facts":
        files = [file for file in (tmp_path / "c" / "facts").rglob("*") if file.is_file()]
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 0xFF
        file.unlink()
        if damage != "delete":
            file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"truncated or corrupt|is corrupt|cannot be read"):
        checkpoint.restore(tmp_path / "c", value)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint directory"):
        checkpoint.restore(tmp_path / "none", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be read|was not written"):
        checkpoint.restore(tmp_path / "empty", {})
    with pytest.raises(ValueError, match=r"leaf \['a'\] must be an array or a number, got str"):
        checkpoint.save(tmp_path / "c", {"a": "text"})
    with pytest.raises(ValueError, match="metadata must be JSON"):
        checkpoint.save(tmp_path / "c", {}, {"a": {1, 2}})
    checkpoint.save(tmp_path / "c", {"a": jnp.zeros(1)})
    with pytest.raises(ValueError, match="exists; pass overwrite=True"):
        checkpoint.save(tmp_path / "c", {"a": jnp.zeros(1)})
    checkpoint.save(tmp_path / "c", {"a": jnp.ones(1)}, overwrite=True)
    assert checkpoint.restore(tmp_path / "c", {"a": jnp.zeros(1)})["a"] == 1


def test_model_round_trip(tmp_path):
    from flax import nnx

    from jaxeff.models import Decoder, ModelConfig
    from jaxeff.quant import apply_recipe

    config = ModelConfig.llama(vocab_size=16, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)
    model = Decoder(config, rngs=nnx.Rngs(1), param_dtype=jnp.bfloat16)
    tokens = jnp.arange(6).reshape(1, 6)
    expected = model(tokens)
    apply_recipe(model, "fp4_all_the_way")
    checkpoint.save_model(tmp_path / "c", model, metadata={"seed": 1})
    loaded, metadata = checkpoint.load_model(tmp_path / "c")
    assert metadata == {"seed": 1} and loaded.config == config
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(loaded, nnx.Param))} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_array_equal(loaded(tokens), expected)
    checkpoint.save(tmp_path / "other", {"a": jnp.zeros(1)})
    with pytest.raises(ValueError, match="holds no model configuration"):
        checkpoint.load_model(tmp_path / "other")
    with pytest.raises(ValueError, match="dict has no config"):
        checkpoint.save_model(tmp_path / "d", {})


def test_cache_round_trip(tmp_path):
    from jaxeff.kv_cache import DenseCache

    for dtype in ("int8", jnp.bfloat16):
        cache = DenseCache.init(2, 1, 8, 2, 4, dtype=dtype)
        checkpoint.save(tmp_path / "c", cache, overwrite=True)
        restored = checkpoint.restore(tmp_path / "c", jax.tree.map(jnp.ones_like, cache))
        jax.tree.map(np.testing.assert_array_equal, restored, cache)
        assert restored.allocated_bytes() == cache.allocated_bytes()


def test_an_adapted_model_is_no_plain_one(tmp_path):
    """Its nnx.Param are the adapters alone: the file would hold no weights."""
    from flax import nnx

    from jaxeff.finetune import LoRA, adapt
    from jaxeff.models import Decoder, ModelConfig

    config = ModelConfig.llama(vocab_size=16, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)
    model = Decoder(config, rngs=nnx.Rngs(0))
    adapt(model, LoRA(2))
    with pytest.raises(ValueError, match="model has other parameters than its configuration"):
        checkpoint.save_model(tmp_path / "c", model)
