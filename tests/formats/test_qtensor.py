"""QTensor: its rules, its life as a pytree, packing and checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats import QTensor
from pallas_kernels.ops.quantize.api import quantize

X = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
GOOD = quantize(X, "int4", tile=16, asymmetric=True)
TWO_LEVEL = quantize(X, "nvfp4")


@pytest.mark.parametrize(
    ("message", "qt"),
    [
        (
            r"scale must have the rank of the value, 2; got shape \(4,\) for \(4, 64\)",
            dataclasses.replace(GOOD, scale=jnp.ones(4)),
        ),
        (
            "scale has 5 tiles along axis 1, which does not divide the stored length 64",
            dataclasses.replace(GOOD, scale=jnp.ones((4, 5))),
        ),
        (
            "scale must be floating, got int32",
            dataclasses.replace(GOOD, scale=jnp.ones((4, 4), jnp.int32)),
        ),
        ("qvalue of qtype 'int8' must be int8, got int4", dataclasses.replace(GOOD, qtype="int8")),
        (
            "qvalue of packed qtype 'int4' must be uint8, got int4",
            dataclasses.replace(GOOD, packed_axis=-1),
        ),
        ("unknown format 'int5'", dataclasses.replace(GOOD, qtype="int5")),
        (
            r"packed_axis must be negative and at least -2 \(the rank\), got 1",
            dataclasses.replace(GOOD.pack(), packed_axis=1),
        ),
        (
            "packed_axis is set, but qtype 'int8' has no 4-bit codes",
            dataclasses.replace(GOOD.pack(), qtype="int8"),
        ),
        (
            r"zero_point must have the shape of scale \(4, 4\), got \(4, 1\)",
            dataclasses.replace(GOOD, zero_point=jnp.ones((4, 1))),
        ),
        (
            "zero_point is for integer formats, got qtype 'nvfp4'",
            dataclasses.replace(TWO_LEVEL, zero_point=jnp.ones((4, 4))),
        ),
        (
            r"tensor_scale must have rank 2 and dims of 1 .* got shape \(\)",
            dataclasses.replace(TWO_LEVEL, tensor_scale=jnp.float32(1)),
        ),
        (
            "tensor_scale must be float32, got bfloat16",
            dataclasses.replace(TWO_LEVEL, tensor_scale=jnp.ones((1, 1), jnp.bfloat16)),
        ),
        (
            r"padding \(65,\) does not fit stored shape \(4, 64\)",
            dataclasses.replace(GOOD, padding=(65,)),
        ),
    ],
)
def test_each_broken_rule_has_its_message(message, qt):
    with pytest.raises(ValueError, match=message):
        qt.validate()


def test_values_of_scales_are_checked_on_request():
    assert GOOD.validate(check_values=True) is GOOD
    dirty = quantize(np.where(X > 2, np.nan, X), "nvfp4")
    dirty.validate()
    with pytest.raises(ValueError, match=r"scale holds \d+ NaN of 16"):
        dirty.validate(check_values=True)
    with pytest.raises(ValueError, match="scale must be positive, but 16 of 16 are not"):
        dataclasses.replace(GOOD, scale=-GOOD.scale).validate(check_values=True)
    zero = dataclasses.replace(TWO_LEVEL, tensor_scale=jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match="tensor_scale must be positive, but 1 of 1 are not"):
        zero.validate(check_values=True)
    with pytest.raises(ValueError, match="needs concrete arrays"):
        jax.jit(lambda qt: qt.validate(check_values=True))(GOOD)


def test_formula():
    codes, scale = np.asarray(GOOD.qvalue, np.float32), np.asarray(GOOD.scale)
    shifted = codes - np.repeat(GOOD.zero_point, 16, 1)
    np.testing.assert_array_equal(GOOD.dequantize(), shifted * np.repeat(scale, 16, 1))
    assert GOOD.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype must be floating, got int8"):
        GOOD.dequantize(jnp.int8)


def test_first_fields_are_those_of_qwix():
    names = [field.name for field in dataclasses.fields(QTensor)]
    assert names[:4] == ["qvalue", "scale", "zero_point", "qtype"]


def test_sizes():
    assert (GOOD.shape, GOOD.ndim, GOOD.size) == ((4, 64), 2, 256)
    assert GOOD.nbytes == 256 + 4 * 16 + 4 * 16
    assert GOOD.pack().nbytes == GOOD.nbytes - 128
    assert TWO_LEVEL.pack().nbytes == 128 + 16 + 4


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("qt", [GOOD, TWO_LEVEL])
def test_packing_keeps_the_value(qt, axis):
    packed = qt.pack(axis).validate(check_values=True)
    assert packed.shape == qt.shape and packed.qvalue.dtype == jnp.uint8
    assert packed.qvalue.shape[axis] == qt.qvalue.shape[axis] // 2
    np.testing.assert_array_equal(packed.dequantize(), qt.dequantize())
    assert packed.pack(axis) is packed and qt.unpack() is qt
    assert jax.tree.structure(packed.unpack()) == jax.tree.structure(qt)


def test_packing_errors_and_eight_bits():
    int8 = quantize(X, "int8")
    assert int8.pack() is int8
    with pytest.raises(ValueError, match="already packed along axis -1: unpack before axis -2"):
        GOOD.pack().pack(axis=0)
    with pytest.raises(ValueError, match="axis 2 is out of range for 2 dimensions"):
        GOOD.pack(axis=2)
    with pytest.raises(ValueError, match="axis 0 has odd length 3"):
        quantize(X[:3], "int4").pack(axis=0)


def test_pytree():
    leaves, structure = jax.tree.flatten(TWO_LEVEL)
    assert len(leaves) == 3
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert (rebuilt.qtype, rebuilt.packed_axis) == ("nvfp4", None)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(GOOD)]
    assert paths == [".qvalue", ".scale", ".zero_point"]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), GOOD.pack(), GOOD.pack())
    np.testing.assert_array_equal(stacked.validate().dequantize()[1], GOOD.dequantize())


def test_vmap_over_a_padded_packed_tensor():
    stack = jax.vmap(lambda x: quantize(x, "nvfp4").pack())(X.reshape(2, 2, 64)[..., :40])
    assert stack.validate().shape == (2, 2, 40)
    inside = jax.vmap(lambda qt: qt.dequantize())(stack)
    np.testing.assert_array_equal(inside, stack.dequantize())


def test_scan_carries_it():
    def body(qt, _):
        return quantize(qt.dequantize(), "int8"), qt.scale.sum()

    final, _ = jax.lax.scan(body, quantize(X, "int8"), length=3)
    np.testing.assert_array_equal(final.qvalue, quantize(X, "int8").qvalue)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "fp8_e5m2"])
def test_orbax_round_trip(name, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tree = {"plain": quantize(X, name), "packed": quantize(X, name).pack()}
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tree)
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, tree)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
