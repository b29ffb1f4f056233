"""NF4: table, packing, double quantisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.formats import NF4_VALUES, quantize_nf4

X = jax.random.normal(jax.random.key(0), (8, 128))


def test_table_values_come_back_exactly():
    """Every value of the table is its own nearest one, with scale 1 and with scale 3."""
    table = jnp.asarray(NF4_VALUES)
    for factor in (1.0, 3.0):
        tensor = quantize_nf4(factor * table[None], double=False)
        np.testing.assert_allclose(tensor.dequantize()[0], factor * table, rtol=1e-7)
    assert NF4_VALUES[7] == 0.0 and sorted(NF4_VALUES) == list(NF4_VALUES)


def test_nearest_and_error():
    values = np.asarray(NF4_VALUES, np.float32)
    units = np.asarray(X).reshape(8, 2, 64)
    amax = np.abs(units).max(-1, keepdims=True)
    nearest = values[np.abs(units[..., None] / amax[..., None] - values).argmin(-1)]
    single = quantize_nf4(X, double=False)
    np.testing.assert_allclose(single.dequantize(), (nearest * amax).reshape(8, 128), rtol=1e-6)
    # Frozen error of the format on normal data, relative: single and double quantisation.
    for tensor, error in ((single, 0.00846), (quantize_nf4(X), 0.00851)):
        relative = float(jnp.sum((tensor.dequantize() - X) ** 2) / jnp.sum(X**2))
        assert abs(relative - error) < 1e-4, relative


def test_sizes_padding_and_zeros():
    big = quantize_nf4(jnp.ones((256, 64)))
    assert 8 * big.nbytes / 2**14 < 4.13  # 4.127 bits a value, and the mean of the scales
    tensor = quantize_nf4(jnp.zeros((3, 70)).at[0, 69].set(-5.0))
    assert tensor.shape == (3, 70) and tensor.codes.shape == (3, 2, 32)
    assert float(tensor.dequantize()[0, 69]) == pytest.approx(-5.0, rel=0.05)
    assert not tensor.dequantize().at[0, 69].set(0.0).any()


def test_pytree_jit_vmap_and_sharding():
    whole = quantize_nf4(X, double=False)
    mapped = jax.vmap(lambda row: quantize_nf4(row, double=False))(X)
    np.testing.assert_array_equal(mapped.dequantize(), whole.dequantize())
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    placed = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d")))
    sharded = jax.jit(lambda x: quantize_nf4(x).dequantize(jnp.bfloat16))(placed)
    np.testing.assert_array_equal(sharded, quantize_nf4(X).dequantize(jnp.bfloat16))


def test_messages():
    with pytest.raises(ValueError, match=r"x must be a floating array \[..., n\], got int32 \[3\]"):
        quantize_nf4(jnp.arange(3))


def test_empty_arrays():
    for shape in ((0, 64), (3, 0), (2, 0, 65)):
        assert quantize_nf4(jnp.zeros(shape)).dequantize().shape == shape
