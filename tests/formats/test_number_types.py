"""Rounding onto every grid: the published vectors, ml_dtypes on all values, unbiased SR."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats import number_type, number_type_of, round_to, stochastic_round
from pallas_kernels.formats.number_types import float_exponent, power_of_two, true_divide

E2M1_NEAREST = {
    0.25: 0,
    0.2500001: 0.5,
    0.75: 1,
    1.25: 1,
    1.2500001: 1.5,
    1.3: 1.5,
    1.75: 2,
    2.5: 2,
    2.5000002: 3,
    3.5: 4,
    5: 4,
    5.000001: 6,
    7: 6,
    -0.2: -0.0,
    -2.5: -2,
    -5.5: -6,
}
E4M3_NEAREST = {
    463.9: 448,
    464: 448,
    2.0**-10: 0,
    1.01 * 2.0**-10: 2.0**-9,
    0.0175: 0.017578125,
    1.0625: 1,
    1.1875: 1.25,
    17: 16,
    19: 20,
    31: 32,
    33: 32,
}
E5M2_NEAREST = {61439: 57344, 1.125: 1, 1.375: 1.5, 2.0**-17: 0}
E8M0_NEAREST = {1.4: 1, 1.5: 2, 3: 4, 6: 8, 0.75: 1}
STORED = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("e2m1", E2M1_NEAREST),
        ("e4m3", E4M3_NEAREST),
        ("e5m2", E5M2_NEAREST),
        ("e8m0", E8M0_NEAREST),
    ],
)
def test_nearest_vectors(name, vectors):
    x, expected = jnp.float32(list(vectors)), np.float32(list(vectors.values()))
    got = np.asarray(round_to(x, number_type(name)))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize(
    ("x", "threshold", "low", "high"), [(1.3, 0.4, 1.0, 1.5), (5, 0.5, 4, 6), (3.25, 0.75, 3, 4)]
)
def test_stochastic_vectors_of_e2m1(x, threshold, low, high):
    noise = jnp.float32([0, threshold - 1e-3, threshold + 1e-3, 1 - 2.0**-23])
    got = round_to(jnp.full(4, x, jnp.float32), number_type("e2m1"), noise=noise)
    assert got.tolist() == [low, low, high, high]


def test_what_a_bare_cast_does_and_we_do_not():
    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    assert np.isnan(np.float32(465).astype(e4m3))
    assert np.isinf(np.float32(61440).astype(e5m2))
    assert np.float32(np.nan).astype(ml_dtypes.float4_e2m1fn) == 0
    assert np.float32(2.0**-130).astype(ml_dtypes.float8_e8m0fnu) == 2.0**-127
    assert round_to(jnp.float32(465), number_type("e4m3")) == 448
    assert round_to(jnp.float32(-jnp.inf), number_type("e5m2")) == -57344
    assert jnp.isnan(round_to(jnp.float32(jnp.nan), number_type("e2m1")))
    # 2^-127 is a float32 subnormal, which XLA flushes to zero.
    assert round_to(jnp.float32(2.0**-125 / 8), number_type("e8m0")) == 2.0**-126


@pytest.mark.parametrize("name", STORED)
def test_nearest_equals_ml_dtypes_on_every_bfloat16_value(name):
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.isfinite(x) & ((np.abs(x) >= 2.0**-126) | (x == 0))]
    kind = number_type(name)
    expected = np.clip(x, -kind.max, kind.max).astype(kind.dtype).astype(np.float32)
    got = np.asarray(round_to(x, kind))
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))
    stored = np.asarray(jnp.asarray(got).astype(kind.dtype)).astype(np.float32)
    np.testing.assert_array_equal(stored.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("name", STORED[:5])
def test_nearest_equals_ml_dtypes_on_ties_and_their_neighbours(name):
    kind = number_type(name)
    codes = np.arange(2 ** (1 + kind.exponent_bits + kind.mantissa_bits), dtype=np.uint8)
    values = codes.view(kind.dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate(
        [values, ties, *(np.nextafter(ties, s * np.inf) for s in np.float32([1, -1]))]
    )
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)].astype(np.float32)
    np.testing.assert_array_equal(round_to(x, kind), x.astype(kind.dtype).astype(np.float32))


@pytest.mark.parametrize("name", [*STORED, "int4", "int8"])
def test_stochastic_round_is_unbiased_and_keeps_grid_points(name):
    kind = number_type(name)
    values = jnp.float32([0.3, -0.7, 1.3, -2.6, 5.1, 2.0, 0.0])
    draws = stochastic_round(jnp.tile(values, (10_000, 1)), kind.dtype, jax.random.key(7))
    assert draws.dtype == kind.dtype
    draws = np.asarray(draws).astype(np.float64)
    tolerance = 4 * draws.std(0) / 100 + 1e-7
    assert (np.abs(draws.mean(0) - np.asarray(values)) <= tolerance).all()
    assert (draws[:, -2:] == [2, 0]).all()


def test_stochastic_round_at_the_ends():
    x = jnp.float32([3e38, -jnp.inf, jnp.nan])
    got = stochastic_round(jnp.tile(x, (64, 1)), jnp.bfloat16, jax.random.key(0))
    assert jnp.isfinite(got[:, :2]).all() and jnp.isnan(got[:, 2]).all()
    integers = stochastic_round(jnp.float32([300, -300, jnp.nan]), jnp.int8, jax.random.key(0))
    assert integers.tolist() == [127, -127, 0]


def test_stochastic_round_errors():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="dtype uint16 has no number type"):
        stochastic_round(jnp.ones(2), jnp.uint16, key)
    with pytest.raises(ValueError, match="cannot be rounded to stochastically"):
        stochastic_round(jnp.ones(2), jnp.float32, key)
    with pytest.raises(ValueError, match="x must be floating"):
        stochastic_round(jnp.ones(2, jnp.int32), jnp.int8, key)


@pytest.mark.parametrize(
    ("name", "largest", "smallest"),
    [
        ("e1m6", 3.96875, 2.0**-5),
        ("e2m5", 7.875, 2.0**-5),
        ("e3m4", 31.0, 2.0**-6),
        ("e4m3", 448.0, 2.0**-9),
        ("e5m2", 57344.0, 2.0**-16),
        ("e6m1", 1.5 * 2.0**32, 2.0**-31),
        ("e8m0", 2.0**127, 2.0**-126),
    ],
)
def test_scale_types_of_the_study(name, largest, smallest):
    kind = number_type(name)
    assert (kind.max, kind.smallest) == (largest, smallest)
    assert round_to(jnp.float32(smallest), kind) == smallest
    assert round_to(jnp.float32(largest), kind) == largest


@pytest.mark.parametrize("name", ["e0m3", "e8m3", "float64", "fp8", ""])
def test_unknown_types_are_named(name):
    with pytest.raises(ValueError, match=f"unknown number type '{name}'"):
        number_type(name)


def test_number_type_of_dtype():
    assert number_type_of(jnp.float8_e8m0fnu).name == "e8m0"
    assert number_type_of("int4") == number_type("int4")


def test_exponents_are_exact():
    exponents = jnp.arange(-126, 128)
    powers = power_of_two(exponents)
    np.testing.assert_array_equal(powers, np.float32(2.0) ** np.arange(-126, 128))
    np.testing.assert_array_equal(float_exponent(powers), exponents)
    np.testing.assert_array_equal(float_exponent(-powers * 1.9999999), exponents)


def test_true_divide_is_ieee_division_under_jit():
    x = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    scale = np.abs(x[:, :1]) + np.float32(0.1)
    np.testing.assert_array_equal(jax.jit(true_divide)(x, scale), x / scale)
    np.testing.assert_array_equal(jax.jit(lambda x: true_divide(x, 6.0))(x), x / np.float32(6))
