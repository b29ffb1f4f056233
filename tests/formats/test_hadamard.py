"""Random Hadamard transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats import TE_SIGNS, hadamard_matrix, inverse_rht, rht


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_orthogonal_exactly_for_powers_of_four(size):
    signs = TE_SIGNS if size == 16 else None
    matrix = hadamard_matrix(size, signs)
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(size, dtype=np.float32))


def test_signs_scale_the_rows():
    np.testing.assert_array_equal(hadamard_matrix(16, TE_SIGNS)[:, 0] * 4, TE_SIGNS)
    assert TE_SIGNS == (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def test_inverse_is_exact_on_integers_and_products_are_kept():
    x = jax.random.randint(jax.random.key(0), (3, 48), -99, 99).astype(jnp.float32)
    w = jax.random.randint(jax.random.key(1), (5, 48), -99, 99).astype(jnp.float32)
    np.testing.assert_array_equal(inverse_rht(rht(x)), x)
    np.testing.assert_array_equal(rht(x) @ rht(w).T, x @ w.T)


def test_any_axis_and_dtype():
    x = jax.random.normal(jax.random.key(0), (32, 3)).astype(jnp.bfloat16)
    got = jax.jit(lambda x: rht(x, axis=0))(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rht(x.T).T)
    plain = rht(jnp.ones((2, 8)), size=8, signs=None)
    np.testing.assert_allclose(plain[:, 0], np.sqrt(8), rtol=1e-6)


def test_spreads_an_outlier():
    x = jnp.zeros((1, 16)).at[0, 3].set(8.0)
    np.testing.assert_array_equal(jnp.abs(rht(x)), np.full((1, 16), 2.0))


def test_errors():
    with pytest.raises(ValueError, match="axis -1 has length 20, not a multiple of size 16"):
        rht(jnp.ones(20))
    with pytest.raises(ValueError, match="signs must have length 8"):
        rht(jnp.ones(16), size=8)
    with pytest.raises(ValueError, match="power of two, got 12"):
        rht(jnp.ones(24), size=12, signs=None)
    with pytest.raises(ValueError, match=r"\+1 or -1"):
        rht(jnp.ones(4), size=4, signs=(1, 0, 1, 1))
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        rht(jnp.ones(16), axis=2)
