"""quantize: published vectors, the oracle, format errors, and what happens to odd values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats import FORMATS, BlockFormat, get_format, quantize_nf4
from pallas_kernels.ops.quantize.api import dequantize, fake_quantize, quantize

SINGLE = ("int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4")
STEPPED = ("mxfp4_int8", "int4_int8")  # tiles depend on the largest scale of their line
NAMES = SINGLE + STEPPED
V = np.float32(
    [0.11, -0.52, 1.37, -2.9, 0, 0.033, 3.6, -0.75, 1, -1, 2.2, 0.4, -0.2, 0.9, -3.1, 0.06]
)
KEY = jax.random.key(3)
NORMAL = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def _without_tie(values):
    """Element 7 of V is a tie up to rounding of the scale: both neighbours are right."""
    return np.delete(np.asarray(values), 7)


def _assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# --- vectors ----------------------------------------------------------------------------


def test_nvfp4_two_level_vector():
    qt = quantize(V, "nvfp4").validate(check_values=True)
    expected = [0, -0.6, 1.2, -2.4, 0, 0, 3.6, 0, 0.9, -0.9, 2.4, 0.3, -0.3, 0.9, -3.6, 0]
    np.testing.assert_allclose(_without_tie(qt.dequantize()), _without_tie(expected), rtol=1e-6)
    assert qt.scale.tolist() == [448] and qt.scale.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(qt.tensor_scale, [0.0013392856], rtol=1e-7)


def test_nvfp4_one_level_vector():
    qt = quantize(V, "nvfp4", two_level=False).validate(check_values=True)
    assert qt.scale.tolist() == [0.625] and qt.tensor_scale is None
    expected = [0, -0.625, 1.25, -2.5, 0, 0, 3.75, -0.625, 0.9375, -0.9375, 2.5, 0.3125, -0.3125]
    assert qt.dequantize().tolist() == [*expected, 0.9375, -2.5, 0]
    packed = qt.pack()
    assert bytes(packed.qvalue.tolist()).hex(" ") == "a0 e4 00 a7 b3 16 39 0e"
    assert packed.nbytes == 9
    codes = [0, 10, 4, 14, 0, 0, 7, 10, 3, 11, 6, 1, 9, 3, 14, 0]
    nibbles = [n for byte in packed.qvalue.tolist() for n in (byte & 15, byte >> 4)]
    assert nibbles == codes


def test_nvfp4_two_blocks_vector():
    qt = quantize(np.concatenate([V, np.float32(0.013) * V]), "nvfp4")
    assert qt.scale.tolist() == [448, 6]
    second = np.float32(
        [
            *[0, -0.008036, 0.016071, -0.032143, 0, 0, 0.048214, 0],
            *[0.012054, -0.012054, 0.032143, 0.004018, -0.004018, 0.012054, -0.048214, 0],
        ]
    )
    np.testing.assert_allclose(
        _without_tie(qt.dequantize()[16:]), _without_tie(second), atol=5.1e-7
    )


@pytest.mark.parametrize(
    ("amax", "floor", "ceil"),
    [(1.0, -2, -2), (3.6, -1, 0), (5.9, 0, 0), (7.9, 0, 1), (0.013, -9, -8)],
)
def test_mxfp4_exponents(amax, floor, ceil):
    x = np.full(32, amax, np.float32)
    assert quantize(x, "mxfp4").scale.tolist() == [2.0**floor]
    assert quantize(x, "mxfp4", scale_rule="ceil").scale.tolist() == [2.0**ceil]


@pytest.mark.parametrize(("name", "threshold"), [("mxfp4", 7.0), ("mxfp8", 448 * 31 / 30)])
def test_qwix_rule_steps_up_halfway_past_the_largest_mantissa(name, threshold):
    x = np.float32([threshold * 0.9999, threshold * 1.0001]).reshape(2, 1)
    scales = quantize(x, name, scale_rule="qwix").scale.astype(jnp.float32)
    assert scales.ravel().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "options", "rtn", "sr", "clipped"),
    [
        ("nvfp4", {}, 0.00904, 0.0188, 0.035),
        ("nvfp4", {"overrange": 17 / 16}, 0.0106, 0.0235, 0),
        ("e2m1_b8_e4m3_x2", {}, 0.0073, 0.0157, 0.068),
        ("e2m1_b32_e4m3_x2", {}, 0.0103, 0.0212, 0.018),
        ("e2m1_b64_e4m3_x2", {}, 0.0113, 0.0230, 0.009),
        ("e2m1_b128_e4m3_x2", {}, 0.0119, 0.0244, 0.005),
        ("mxfp4", {}, 0.0132, 0.0252, 0.023),
        ("mxfp4", {"scale_rule": "ceil"}, 0.0133, 0.0271, 0),
    ],
)
def test_error_table_of_normal_data(name, options, rtn, sr, clipped):
    x = jax.random.normal(jax.random.key(0), (2048, 256))
    nearest = quantize(x, name, **options)
    stochastic = fake_quantize(x, name, rounding="stochastic", key=KEY, **options)
    relative = lambda y: float(jnp.mean((y - x) ** 2) / jnp.mean(x**2))  # noqa: E731
    assert relative(nearest.dequantize()) == pytest.approx(rtn, rel=0.01)
    assert relative(stochastic) == pytest.approx(sr, rel=0.01)
    tensor_scale = 1.0 if nearest.tensor_scale is None else nearest.tensor_scale
    scale = nearest.scale.astype(jnp.float32) * tensor_scale
    beyond = jnp.abs(x) > 6.000001 * jnp.repeat(scale, 256 // scale.shape[-1], -1)
    assert float(beyond.mean()) == pytest.approx(clipped, abs=0.001)
    if clipped == 0:  # nothing saturates, so stochastic rounding is unbiased
        assert float(jnp.vdot(stochastic, x) / jnp.vdot(x, x)) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "options", "error", "bits"),
    [
        ("int8", {}, 0.007429, 8.125),
        ("int4", {}, 0.136780, 4.125),
        ("int4", {"tile": 128, "asymmetric": True}, 0.106731, 4.5),
        ("fp8_e4m3", {}, 0.022434, 8.125),
        ("fp8_e5m2", {}, 0.044243, 8.125),
        ("mxfp8", {}, 0.023884, 8.25),
        ("mxfp4", {}, 0.107754, 4.25),
        ("nvfp4", {}, 0.088360, 4.5 + 32 / NORMAL.size),
        ("nvfp4", {"two_level": False}, 0.088292, 4.5),
        ("nvfp4", {"axis": (-2, -1)}, 0.107940, 4 + 8 / 256 + 32 / NORMAL.size),
    ],
)
def test_format_error_is_frozen(name, options, error, bits):
    qt = quantize(NORMAL, name, **options).validate(check_values=True)
    measured = np.abs(np.asarray(qt.dequantize()) - NORMAL).mean() / np.abs(NORMAL).mean()
    assert measured == pytest.approx(error, rel=1e-4)
    assert qt.pack().nbytes * 8 / NORMAL.size == pytest.approx(bits)


# --- the oracle -------------------------------------------------------------------------


def _awkward():
    x = NORMAL[:20, :40] * np.exp(NORMAL[20:40, :40])
    x[3, 5], x[9, 22], x[10:12], x[12] = np.nan, np.inf, 0, np.float32(1e-30)
    return x


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {}),
        ("int4", {"axis": None}),
        ("int4", {"tile": 16, "asymmetric": True}),
        ("int8", {"axis": 0, "tile": 7, "asymmetric": True}),
        ("fp8_e4m3", {"axis": (0, 1), "tile": (8, 16)}),
        ("fp8_e5m2", {"scale_rule": "ceil"}),
        ("mxfp8", {"scale_rule": "qwix"}),
        ("mxfp4", {"axis": 0}),
        ("mxfp4_int8", {"axis": 0}),
        ("e2m1_b4_e8m0_ceil_s4", {}),
        ("int4_b5_float32_s15", {"axis": (0, 1)}),
        ("int4_int8", {"axis": 0}),
        ("nvfp4", {"overrange": 17 / 16}),
        ("nvfp4", {"two_level": False, "scale_min": 2.0**-6}),
        ("e3m2_b8_e3m4_x2", {}),
        ("e2m3_b8_e8m0_nearest", {}),
        ("e2m1_b8_bfloat16", {}),
    ],
)
def test_xla_equals_the_oracle(name, options, rounding):
    key = KEY if rounding == "stochastic" else None
    x = _awkward()
    left, right = (
        jax.jit(
            lambda x, i=i: quantize(
                x, name, rounding=rounding, key=key, implementation=i, **options
            )
        )(x)
        for i in ("xla", "reference")
    )
    _assert_same(left.validate(), right.validate())
    assert left.shape == x.shape


@pytest.mark.parametrize("scale", ["e1m6", "e2m5", "e3m4", "e4m3", "e5m2", "e6m1", "e8m0"])
def test_every_scale_type_of_the_study(scale):
    block_format = BlockFormat("e2m1", 16, scale, two_level=scale != "e8m0")
    assert get_format(block_format.name) == block_format
    error = fake_quantize(NORMAL, block_format) - NORMAL
    assert 0.008 < float((error**2).mean() / (NORMAL**2).mean()) < 0.015


# --- odd values -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name):
    qt = quantize(jnp.zeros((2, 64)), name).validate(check_values=True)
    assert (qt.dequantize() == 0).all()
    mixed = jnp.ones((1, 64)).at[:, :32].set(0)
    assert (fake_quantize(mixed, name)[:, :32] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SINGLE)
def test_a_bad_value_poisons_its_tile_and_no_other(name, bad):
    clean = NORMAL[:4, :64].copy()
    clean[1, 40], clean[0, 0] = 0, 9  # the largest value of the tensor is elsewhere
    dirty = clean.copy()
    dirty[1, 40] = bad
    expected = np.asarray(fake_quantize(clean, name, tile=32))
    got = np.array(fake_quantize(dirty, name, tile=32))
    assert np.isnan(got[1, 32:]).all()
    got[1, 32:] = expected[1, 32:]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", STEPPED)
def test_a_bad_value_leaves_the_steps_of_the_other_tiles(name, bad):
    dirty = NORMAL[:4, :64].copy()
    dirty[1, 40] = bad
    got = np.array(fake_quantize(dirty, name, tile=32))
    assert np.isnan(got[1, 32:]).all()
    expected = np.array(fake_quantize(dirty, name, tile=32))
    expected[1, :32] = fake_quantize(dirty[1:2, :32], name, tile=32)  # the only one of its line
    got[1, 32:] = expected[1, 32:] = 0
    np.testing.assert_array_equal(got, expected)


def test_steps_of_scales():
    """Whole steps from a part of the largest scale of a line up to it, never below amax."""
    x = NORMAL * np.exp2(-np.arange(256) // 32).astype(np.float32)
    for name, steps in (("mxfp4_int8", 8), ("int4_int8", 15)):
        qt = quantize(x, name, tile=32, scale_rule=None).validate(check_values=True)
        scale = np.asarray(qt.scale, np.float32)
        counts = scale / scale.max(1, keepdims=True) * steps
        np.testing.assert_allclose(counts, np.rint(counts), rtol=1e-6)
        assert np.rint(counts).min() == 1 and counts.max() == steps
    loose = quantize(x, "int4", tile=32)
    assert (np.asarray(qt.scale) >= np.asarray(loose.scale) * (1 - 1e-6)).all()
    wrong = dataclasses.replace(qt, scale=qt.scale.at[0, 3].multiply(1.3))
    with pytest.raises(ValueError, match="must be multiples of the largest"):
        wrong.validate(check_values=True)
    for scale, steps in (
        ("e4m3", 8),
        ("e8m0", 6),
        ("float32", 0),
        ("float32", True),
        ("e8m0", 8.0),
    ):
        with pytest.raises(ValueError, match="scale_steps"):
            BlockFormat("e2m1", 32, scale, scale_steps=steps)
    with pytest.raises(ValueError, match="has steps"):
        quantize(x, "int4_int8", asymmetric=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_bad_value_is_seen_in_large_arrays(axis):
    """XLA for CPU drops NaN from reductions that it vectorises."""
    x = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    x[3, 4] = np.nan
    for name in NAMES:
        assert np.isnan(quantize(x, name, axis=axis, tile=32).dequantize()[3, 4]), name
    assert np.isnan(quantize(x, "int4", axis=axis, asymmetric=True).dequantize()[3, 4])
    assert np.isnan(quantize_nf4(x).dequantize()[3, 4])


def test_poison_of_an_asymmetric_tile():
    x = NORMAL[:2, :32].copy()
    x[0, 3] = np.inf
    got = fake_quantize(x, "int4", asymmetric=True)
    assert jnp.isnan(got[0]).all() and jnp.isfinite(got[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_magnitudes_stay_finite(name):
    magnitudes = np.float32([3e38, 1e30, 1e-30, 1e-38, 1e-42])
    x = magnitudes[:, None] * np.linspace(-1, 1, 32, dtype=np.float32)
    y = jax.vmap(lambda row: fake_quantize(row, name))(x)  # each row is a tensor
    assert jnp.isfinite(y).all()
    rows = slice(0, 3)
    error = np.abs(np.asarray(y)[rows] / magnitudes[rows, None] - x[rows] / magnitudes[rows, None])
    # Half the widest step of e2m1 is 1/6 of amax; the floor rule of mxfp4 saturates 8 to 6.
    assert error.max() < (0.25 if "mxfp4" in name else 0.17)


def test_asymmetric_keeps_the_ends_and_an_offset():
    x = (100 + NORMAL[:8, :128]).astype(np.float32)
    y = np.asarray(fake_quantize(x, "int4", tile=128, asymmetric=True))
    np.testing.assert_allclose(y.max(1), x.max(1), rtol=1e-6)
    np.testing.assert_allclose(y.min(1), x.min(1), rtol=1e-6)
    assert np.abs(y - x).max() <= np.ptp(x, axis=1).max() / 15 / 2 + 1e-4
    constant = np.full((1, 8), -7.3e-20, np.float32)
    np.testing.assert_array_equal(fake_quantize(constant, "int8", asymmetric=True), constant)


def test_scale_min_is_what_a_small_block_stores():
    x = jnp.full(16, 1e-4)
    assert quantize(x, "nvfp4", two_level=False).scale.tolist() == [2.0**-9]
    clamped = quantize(x, "nvfp4", two_level=False, scale_min=2.0**-6)
    assert clamped.scale.tolist() == [2.0**-6]
    assert quantize(jnp.zeros(16), "nvfp4", scale_min=2.0**-6).scale.tolist() == [2.0**-6]


def test_tiles_that_do_not_divide_are_completed_with_zeros():
    x = NORMAL[:3, :40]
    qt = quantize(x, "mxfp4").validate()
    assert qt.shape == (3, 40) and qt.stored_shape == (3, 64) and qt.padding == (24,)
    assert qt.scale.shape == (3, 2)
    assert (qt.qvalue[:, 40:] == 0).all()
    whole = fake_quantize(np.pad(x, ((0, 0), (0, 24))), "mxfp4")
    np.testing.assert_array_equal(qt.dequantize(), whole[:, :40])


def test_square_tiles_share_one_scale_both_ways():
    qt = quantize(NORMAL[:32, :32], "nvfp4", axis=(-2, -1), tile=(16, 16))
    assert qt.scale.shape == (2, 2)
    transposed = quantize(NORMAL[:32, :32].T, "nvfp4", axis=(-2, -1), tile=(16, 16))
    np.testing.assert_array_equal(transposed.dequantize().T, qt.dequantize())


@pytest.mark.parametrize("name", [*NAMES, "int4 asymmetric"])
def test_stochastic_rounding_is_unbiased(name):
    options = {"asymmetric": True} if "asymmetric" in name else {}
    row = np.concatenate([[1.0], NORMAL[0, :31] / 4]).astype(np.float32)
    x = np.tile(row, (10_000, 1))
    y = fake_quantize(x, name.split()[0], rounding="stochastic", key=KEY, **options)
    y = np.asarray(y, np.float64)
    tolerance = 4 * y.std(0) / 100 + 2e-6
    assert (np.abs(y.mean(0) - row) <= tolerance).all()


# --- transformations --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_jit_vmap_and_eval_shape_agree_with_eager(name):
    x = NORMAL[:6].reshape(2, 3, 256)[:, :, :40]
    eager = quantize(x, name)
    _assert_same(jax.jit(lambda x: quantize(x, name))(x), eager)
    shapes = jax.eval_shape(lambda x: quantize(x, name), x)
    assert shapes.shape == x.shape and shapes.nbytes == eager.nbytes
    mapped = jax.vmap(lambda row: quantize(row, name))(x)
    mapped.validate(check_values=True)
    per_row = jnp.stack([fake_quantize(row, name) for row in x])
    np.testing.assert_array_equal(mapped.dequantize(), per_row)


def test_second_call_does_not_compile_again():
    traces = []

    @jax.jit
    def f(x, key):
        traces.append(1)
        return fake_quantize(x, "mxfp4", rounding="stochastic", key=key)

    first, second = (f(NORMAL[:2], jax.random.key(seed)) for seed in (0, 1))
    again = f(NORMAL[:2], jax.random.key(0))
    assert len(traces) == 1
    assert (first == again).all() and not (first == second).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_fake_quantize_is_straight_through(dtype):
    x = jnp.asarray(NORMAL[:2, :32], dtype)
    y, vjp = jax.vjp(lambda x: fake_quantize(x, "nvfp4"), x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, dequantize(quantize(x, "nvfp4"), dtype))
    cotangent = jnp.asarray(NORMAL[2:4, :32], dtype)
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)
    _, tangent = jax.jvp(lambda x: fake_quantize(x, "int4"), (x,), (cotangent,))
    np.testing.assert_array_equal(tangent, cotangent)


def test_quantize_itself_stops_gradients():
    gradient = jax.grad(lambda x: quantize(x, "int8").dequantize().sum())(jnp.ones(4))
    assert (gradient == 0).all()


@pytest.mark.multidevice
@pytest.mark.skipif("jax.device_count() < 8")
@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_sharded_round_trip(name, spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    x = jax.device_put(NORMAL, sharding)

    @jax.jit
    def round_trip(x, key):
        qt = quantize(x, name, rounding="stochastic", key=key)
        packed = qt.pack()
        return qt, packed.unpack().dequantize()

    qt, y = round_trip(x, KEY)
    expected = quantize(NORMAL, name, rounding="stochastic", key=KEY)
    _assert_same(qt, expected)
    np.testing.assert_array_equal(y, expected.dequantize())
    assert len(y.sharding.device_set) == 8


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "qtype", "options"),
    [
        ("unknown format 'fp3': expected one of fp8_e4m3, ", "fp3", {}),
        ("needs a key", "int8", {"rounding": "stochastic"}),
        ("key is used by rounding='stochastic' only", "int8", {"key": KEY}),
        (
            r"rounding must be one of \('nearest', 'stochastic'\), got 'up'",
            "int8",
            {"rounding": "up"},
        ),
        ("axis 2 is out of range for x with 2 dimensions", "int8", {"axis": 2}),
        (r"axis \(-1, 1\) names an axis twice", "int8", {"axis": (-1, 1)}),
        ("tile must be at least 1, got 0", "int8", {"tile": 0}),
        ("tile must be an int, a tuple, None or 'default'", "int8", {"tile": "auto"}),
        ("one entry for each of the 1 axes", "int8", {"tile": (2, 2)}),
        ("axis=None is one scale per tensor", "int8", {"axis": None, "tile": 16}),
        ("scale_rule must be one of", "mxfp4", {"scale_rule": "up"}),
        ("overrange must be at least 1 and finite, got 0.5", "nvfp4", {"overrange": 0.5}),
        (r"scale_min must be in \[0.001953125, 448.0\]", "nvfp4", {"scale_min": 0.0}),
        ("two_level=True needs a scale type narrower", "mxfp4", {"two_level": True}),
        ("asymmetric=True needs an integer format, got 'nvfp4'", "nvfp4", {"asymmetric": True}),
        ("must keep their defaults", "int8", {"asymmetric": True, "overrange": 2.0}),
        ("implementation must be None", "int8", {"implementation": "triton"}),
    ],
)
def test_wrong_arguments(message, qtype, options):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((2, 4)), qtype, **options)


def test_other_errors():
    with pytest.raises(ValueError, match="x must be floating, got dtype int32"):
        quantize(jnp.ones(4, jnp.int32), "int8")
    with pytest.raises(NotImplementedError, match="no Mosaic kernel yet; use implementation='xla'"):
        quantize(jnp.ones(4), "int8", implementation="mosaic")
    with pytest.raises(ValueError, match="qt must be a QTensor, got ndarray"):
        dequantize(np.ones(3))
    with pytest.raises(ValueError, match="element must be one of"):
        BlockFormat("e4m4")
    with pytest.raises(ValueError, match="scale must be a float type, got 'int8'"):
        BlockFormat("int8", scale="int8")
    with pytest.raises(ValueError, match="block must be at least 1 or None, got 0"):
        BlockFormat("int8", 0)


def test_names_of_formats():
    assert set(FORMATS) == set(NAMES)
    for name in (
        *NAMES,
        "e2m1_b32_e3m4_x2",
        "int8_b64_float16",
        "e4m3_baxis_bfloat16",
        "e4m3_b128_float32_ceil",
    ):
        assert get_format(name).name == name
    assert get_format("e2m1_b16_e4m3_x2").name == "nvfp4"


def test_empty_arrays():
    for shape in ((0, 32), (3, 0)):
        assert fake_quantize(jnp.zeros(shape), "nvfp4").shape == shape
        assert fake_quantize(jnp.zeros(shape), "int4", asymmetric=True).shape == shape
    assert quantize(jnp.float32(3), "int8", axis=None).dequantize() == 3
