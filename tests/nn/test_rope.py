import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.nn import RopeConfig, apply_rope, rope_frequencies


def test_default_frequencies_are_a_geometric_series():
    got = rope_frequencies(8, RopeConfig(theta=10_000.0))
    np.testing.assert_allclose(got, [1.0, 0.1, 0.01, 0.001], rtol=1e-7)


def test_linear_divides_every_frequency():
    config = RopeConfig(theta=10_000.0, rope_type="linear", factor=4.0)
    np.testing.assert_allclose(rope_frequencies(8, config), [0.25, 0.025, 0.0025, 0.00025])


def test_llama3_keeps_short_wavelengths_and_blends_the_middle():
    config = RopeConfig(
        theta=10_000.0,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=1024,
    )
    # Wavelengths are 6.28, 62.8, 628.3 and 6283 tokens; the bounds are 256 and 1024. By hand:
    # s = (1024 / 628.31853 - 1) / 3 = 0.2099155, 0.01 s + 0.00125 (1 - s) = 0.00308676.
    np.testing.assert_allclose(
        rope_frequencies(8, config), [1.0, 0.1, 0.0030867609, 0.000125], rtol=1e-6
    )


def test_llama3_at_the_published_settings():
    config = RopeConfig(
        theta=500_000.0, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192
    )
    got = rope_frequencies(128, config)
    plain = rope_frequencies(128, RopeConfig(theta=500_000.0))
    wavelengths = 2 * math.pi / plain
    np.testing.assert_array_equal(got[wavelengths < 2048], plain[wavelengths < 2048])
    np.testing.assert_allclose(got[wavelengths > 8192], plain[wavelengths > 8192] / 8, rtol=1e-6)
    assert (np.diff(got) < 0).all()


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        rotated = [
            apply_rope(x, jnp.array([[p]]), RopeConfig(theta=100.0)) for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(3, 1) == pytest.approx(score(43, 41), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_rotation_is_computed_in_float32_and_keeps_the_dtype():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    position = jnp.array([[4097]])  # not a bfloat16 number
    got = apply_rope(x, position, RopeConfig(theta=100.0))
    want = apply_rope(x.astype(jnp.float32), position, RopeConfig(theta=100.0))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic", "longrope"])
def test_known_rules_that_are_not_served(rope_type):
    with pytest.raises(NotImplementedError, match=f"'{rope_type}'.*default, linear, llama3"):
        RopeConfig(rope_type=rope_type)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "spiral"}, "rope_type 'spiral' is unknown; expected one of default"),
        ({"theta": 1.0}, "theta is 1.0; expected a finite number above 1"),
        ({"theta": "big"}, "theta is 'big'; expected a number"),
        ({"factor": 0.5}, "factor is 0.5; expected a finite number, at least 1"),
        ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0 and high_freq_factor 4.0"),
        ({"original_max_position_embeddings": 0}, "is 0; expected a number of tokens"),
    ],
)
def test_bad_rope_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


def test_bad_rope_shapes():
    with pytest.raises(ValueError, match="head_dim is 5; RoPE needs an even number"):
        rope_frequencies(5, RopeConfig())
    with pytest.raises(ValueError, match=r"positions have shape \(3,\)"):
        apply_rope(jnp.ones((1, 3, 1, 4)), jnp.arange(3), RopeConfig())
