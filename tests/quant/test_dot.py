"""The quantised product against explicit fake-quantised graphs, and its random numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quant import (
    POINTS,
    RECIPES,
    Recipe,
    dot_general,
    init_history,
    quantized_dot_general,
)
from pallas_kernels import fake_quantize, quantize
from pallas_kernels.formats import rht
from pallas_kernels.formats.counter_random import counter_key

PLAIN = (((1,), (0,)), ((), ()))
T, K, N = 48, 32, 64


def _operands(t=T, k=K, n=N, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (t, k), dtype)
    w = jax.random.normal(keys[1], (k, n), dtype) * 0.1
    d = jax.random.normal(keys[2], (t, n), dtype) * 1e-3
    return x, w, d


def _outputs(product, x, w, d):
    z, pullback = jax.vjp(lambda x, w: product(x, w, PLAIN), x, w)
    return z, *pullback(d)


@functools.partial(jax.jit, static_argnums=0)
def _run(recipe, x, w, d, key=None):
    return _outputs(dot_general(recipe, key), x, w, d)


@functools.partial(jax.jit, static_argnums=0)
def _explicit(recipe, x, w, d, key=None):
    """The six points written out, transposing operands so that blocks lie along the last axis."""

    def q(point, value):
        quant = getattr(recipe, point)
        if quant.format is None:
            return value
        tile = quant.tile
        axis = {"contraction": -1, "square": (-2, -1), "tensor": None}[quant.granularity]
        return fake_quantize(
            value,
            quant.format,
            axis=axis,
            tile=(tile, tile) if quant.granularity == "square" else tile,
            scale_rule=quant.scale_rule,
            two_level=quant.two_level,
        )

    rotate = (lambda v: rht(v, -1)) if recipe.wgrad_transform else (lambda v: v)
    z = q("fwd_x", x) @ q("fwd_w", w.T).T
    grad_x = q("bwd_d", d) @ q("bwd_w", w).T
    grad_w = q("upd_x", rotate(x.T)) @ q("upd_d", rotate(d.T)).T
    return z, grad_x, grad_w


def _assert_close(got, expected, tolerance=1e-6):
    for one, other in zip(got, expected, strict=True):
        scale = np.abs(np.asarray(other, np.float64)).max()
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale)


# Rotated in both passes, or with state: in test_methods.py and test_delayed.py.
_APART = ("bf16", "fp8_delayed", "quartet", "quartet2", "tetrajet2")


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in _APART])
def test_equals_explicit_graph(name):
    # Stochastic points are tested apart: their noise depends on the layout.
    recipe = RECIPES[name].replace_points(rounding="nearest")
    x, w, d = _operands(t=128, k=128, n=128) if name == "fp8_block" else _operands()
    _assert_close(_run(recipe, x, w, d), _explicit(recipe, x, w, d))


def test_identity_is_bitwise_plain():
    x, w, d = _operands()
    for recipe in ("bf16", Recipe("own")):
        got = _run(recipe, x, w, d)
        plain = jax.jit(lambda x, w, d: _outputs(jax.lax.dot_general, x, w, d))(x, w, d)
        for one, other in zip(got, plain, strict=True):
            np.testing.assert_array_equal(one, other)


def test_one_point_at_a_time():
    """Each point changes exactly the product it belongs to."""
    x, w, d = _operands()
    plain = _run("bf16", x, w, d)
    for index, point in enumerate(POINTS):
        recipe = Recipe(point, **{point: RECIPES["fp4_rtn"].fwd_x})
        changed = [
            float(jnp.abs(one - other).max()) > 1e-6 * float(jnp.abs(other).max())
            for one, other in zip(_run(recipe, x, w, d), plain, strict=True)
        ]
        assert changed == [index // 2 == product for product in range(3)], point


@pytest.mark.parametrize("name", ["fp4_rtn", "nvidia_nvfp4", "fp8_block"])
def test_padding(name):
    """Lengths that no block divides: as if zeros had been appended by hand."""
    recipe = RECIPES[name].replace_points(rounding="nearest")
    x, w, d = _operands(t=37, k=21, n=43)
    padded = [jnp.pad(value, [(0, -size % 128) for size in value.shape]) for value in (x, w, d)]
    z, grad_x, grad_w = _run(recipe, *padded)
    _assert_close(_run(recipe, x, w, d), (z[:37, :43], grad_x[:37, :21], grad_w[:21, :43]))


@pytest.mark.parametrize("name", ["fp4_all_the_way", "nvidia_nvfp4"])
def test_stochastic_gradients_are_unbiased(name):
    recipe = RECIPES[name].with_sr_overrange()
    x, w, d = _operands(t=32, k=16, n=32)
    keys = jax.random.split(jax.random.key(7), 2000)
    draws = jax.jit(jax.vmap(lambda key: _run(recipe, x, w, d, key)[1:]))(keys)
    exact_w = fake_quantize(w, "nvfp4", axis=1)
    if name == "nvidia_nvfp4":
        exact_w = fake_quantize(w, "nvfp4", axis=(0, 1), tile=(16, 16))
    exact_x = x.T if recipe.upd_x.rounding == "stochastic" else None
    if exact_x is None:
        rotated = fake_quantize(rht(x.T, -1), "nvfp4", axis=-1)
        exact = d @ exact_w.T, rotated @ rht(d.T, -1).T
    else:
        exact = d @ exact_w.T, exact_x @ d
    for draw, expected in zip(draws, exact, strict=True):
        error = np.abs(np.asarray(draw.mean(0) - expected))
        # Elements that lie on the grid do not vary; float32 sums do, by 1e-6 of the largest.
        bound = 5 * np.asarray(draw.std(0)) / np.sqrt(len(keys)) + 1e-5 * np.abs(expected).max()
        assert (error < bound).all(), (error / bound).max()


def test_points_draw_independently():
    """The two draws of d: rounding errors of the backward products are uncorrelated."""
    recipe = RECIPES["fp4_all_the_way"]
    square = jax.random.normal(jax.random.key(1), (256, 256)) * 1e-3
    eye = jnp.eye(256)
    only = dataclasses.replace(
        recipe,
        bwd_w=Recipe("x").fwd_x,
        upd_x=Recipe("x").fwd_x,
        # One scale for everything, so that both draws round on the same grid.
        bwd_d=dataclasses.replace(recipe.bwd_d, format="fp8_e5m2", granularity="tensor"),
        upd_d=dataclasses.replace(recipe.upd_d, format="fp8_e5m2", granularity="tensor"),
    )
    _, first, second = _run(only, eye, eye, square, jax.random.key(3))
    errors = np.stack([np.ravel(first - square), np.ravel(second - square)])
    assert abs(np.corrcoef(errors)[0, 1]) < 4 / 256
    assert (errors.std(1) > 0).all()


def test_same_key_same_bits_other_key_other_bits():
    x, w, d = _operands()
    runs = [_run("fp4_all_the_way", x, w, d, jax.random.key(seed)) for seed in (0, 0, 1)]
    for product in (1, 2):
        np.testing.assert_array_equal(runs[0][product], runs[1][product])
        assert (np.asarray(runs[0][product]) != np.asarray(runs[2][product])).any()
    data = jax.random.key_data(jax.random.key(0))
    np.testing.assert_array_equal(_run("fp4_all_the_way", x, w, d, data)[1], runs[0][1])


@pytest.mark.multidevice
@pytest.mark.parametrize("axis", ["tokens", "outputs"])
def test_random_bits_do_not_depend_on_the_sharding(axis):
    """Eight devices, tokens or outputs split: the same codes, sums in another order at most."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("x",))
    layouts = {"tokens": [("x",), (), ("x",)], "outputs": [(), (None, "x"), (None, "x")]}[axis]
    operands = _operands(t=128, k=32, n=128)
    split = [
        jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*layout)))
        for value, layout in zip(operands, layouts, strict=True)
    ]
    key = jax.random.key(2)
    got, expected = _run("fp4_all_the_way", *split, key), _run("fp4_all_the_way", *operands, key)
    assert len(got[0].sharding.device_set) == 8
    _assert_close(got, expected)


def test_remat_repeats_the_rounding():
    x, w, d = _operands()
    recipe = RECIPES["fp4_sr"]
    product = dot_general(recipe, jax.random.key(0))
    plain = jax.grad(lambda x: (jnp.tanh(product(x, w, PLAIN)) * d).sum())(x)
    remat = jax.grad(
        lambda x: (jax.checkpoint(lambda x: jnp.tanh(product(x, w, PLAIN)))(x) * d).sum()
    )(x)
    np.testing.assert_allclose(plain, remat, rtol=1e-6, atol=1e-9)


def test_quantized_residuals():
    """Gradients of the function that was evaluated: only the forward operands are rounded."""
    nearest = RECIPES["fp4_rtn"]
    recipe = Recipe("qaf", nearest.fwd_x, nearest.fwd_w, residuals="quantized")
    x, w, d = _operands()
    qx, qw = fake_quantize(x, "nvfp4", axis=1), fake_quantize(w, "nvfp4", axis=0)
    _assert_close(_run(recipe, x, w, d), (qx @ qw, d @ qw.T, qx.T @ d))
    _assert_close(
        _run(dataclasses.replace(recipe, residuals="master"), x, w, d)[1:], (d @ w.T, x.T @ d)
    )


def test_native_fp8_equals_emulation():
    recipe = RECIPES["fp8_current"]
    native = dataclasses.replace(recipe, execution="native")
    x, w, d = _operands()
    _assert_close(_run(native, x, w, d), _run(recipe, x, w, d), 2e-6)
    text = jax.jit(lambda x, w: dot_general(native)(x, w, PLAIN)).lower(x, w).as_text()
    product = next(line for line in text.splitlines() if "stablehlo.dot_general" in line)
    assert "f8E4M3FN" in product and "xf32>" in product


@pytest.mark.parametrize("name", ["fp8_current", "fp8_delayed"])
def test_native_fp8_in_bfloat16(name):
    """Codes multiplied as they are, the form that cuBLASLt gets; magnitudes come with the codes."""
    recipe = dataclasses.replace(RECIPES[name], execution="native")
    x, w, d = _operands(dtype=jnp.bfloat16)
    history = None if recipe.delayed is None else init_history(recipe).at[:, 0].set(4.0)

    def run(recipe):
        def outputs(x, w, d, history):
            product = lambda x, w, h: dot_general(recipe, amax_history=h)(x, w, PLAIN)  # noqa: E731
            z, pullback = jax.vjp(product, x, w, history)
            return z, *pullback(d)

        return jax.jit(outputs)

    got = run(recipe)(x, w, d, history)
    want = run(dataclasses.replace(recipe, execution="emulate"))(x, w, d, history)
    for one, other in zip(got[:3], want[:3], strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        # The product is rounded to 16 bits before it is scaled: measured 0.0035.
        assert np.linalg.norm(one - other) < 0.005 * np.linalg.norm(other)
    if history is not None:
        np.testing.assert_array_equal(got[3], want[3])
    text = run(recipe).lower(x, w, d, history).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3 and all("f8E" in line and "xbf16>" in line for line in products)


def test_dimension_numbers():
    """Batches, several contracted axes, and contraction of any axis."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 16, 2))
    w = jax.random.normal(jax.random.key(1), (2, 7, 3, 16))
    numbers = (((3, 2), (0, 3)), ((0,), (2,)))
    got = quantized_dot_general(x, w, numbers, "fp4_rtn")
    # Contraction in the order of the numbers: the axis of 2 outside, blocks of 16 inside.
    expected = [
        fake_quantize(x[b].transpose(0, 2, 1).reshape(5, 32), "nvfp4", axis=1)
        @ fake_quantize(w[:, :, b].transpose(0, 2, 1).reshape(32, 7), "nvfp4", axis=0)
        for b in range(3)
    ]
    assert got.shape == (3, 5, 7)
    _assert_close([got], [jnp.stack(expected)])
    noisy = quantized_dot_general(x, w, numbers, "fp4_sr", key=jax.random.key(0))
    assert noisy.shape == got.shape and bool((noisy != got).any())


def test_dtypes():
    x, w, d = _operands(dtype=jnp.bfloat16)
    z, grad_x, grad_w = _run("fp4_all_the_way", x, w, d, jax.random.key(0))
    assert {z.dtype, grad_x.dtype, grad_w.dtype} == {jnp.dtype(jnp.bfloat16)}
    z = quantized_dot_general(x, w, PLAIN, "fp4_rtn", preferred_element_type=jnp.float32)
    assert z.dtype == jnp.float32


def test_messages():
    x, w, _ = _operands()
    with pytest.raises(ValueError, match="rounds bwd_d, upd_d, upd_x stochastically: pass key="):
        quantized_dot_general(x, w, PLAIN, "fp4_all_the_way")
    with pytest.raises(ValueError, match=r"key must be one typed PRNG key .* got uint32 \[3\]"):
        quantized_dot_general(x, w, PLAIN, "fp4_sr", key=jnp.zeros(3, jnp.uint32))
    with pytest.raises(ValueError, match="lhs must be floating, got int32"):
        quantized_dot_general(x.astype(int), w, PLAIN, "fp4_rtn")
    with pytest.raises(ValueError, match=r"lhs \[48, 32\] and rhs \[32, 64\] do not fit"):
        quantized_dot_general(x, w, (((0,), (0,)), ((), ())), "fp4_rtn")
    with pytest.raises(NotImplementedError, match="out_sharding is not served with recipe"):
        quantized_dot_general(x, w, PLAIN, "fp4_rtn", out_sharding=object())


def test_nan_is_not_hidden():
    x, w, d = _operands()
    z, grad_x, grad_w = _run("fp4_rtn", x.at[0, 0].set(jnp.nan), w, d)
    assert jnp.isnan(z[0]).all() and jnp.isfinite(z[1:]).all() and jnp.isfinite(grad_x).all()
    assert jnp.isnan(grad_w[0]).all()


def test_counter_noise():
    """Mean, variance and neighbour correlation of the noise within five standard errors."""

    @jax.jit
    def z_scores(key_data):
        u = jax.random.uniform(counter_key(key_data), (256, 256)) - 0.5
        scores = [u.sum() / 256, (u[1:] * u[:-1]).sum() * 12**0.5 / 255.5]
        scores += [(u[:, 1:] * u[:, :-1]).sum() * 12**0.5 / 255.5]
        return jnp.stack(scores) * 12**0.5

    data = jax.random.key_data(jax.random.split(counter_key(jnp.uint32([0, 1])), 100))
    scores = np.stack([z_scores(one) for one in data])
    assert np.abs(scores).max() < 5
    assert (np.abs(scores.mean(0)) < 0.5).all() and (np.abs(scores.std(0) - 1) < 0.3).all()
    with pytest.raises(NotImplementedError, match="serves 8, 16, 32 bits, got 64"):
        counter_key(data[0])._impl.random_bits(data[0], 64, (2,))


@pytest.mark.parametrize("qtype", ["nvfp4", "mxfp4", "int8", "int4", "fp8_e5m2"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_fake_quantize_equals_quantize_then_dequantize(qtype, asymmetric):
    """The short cut without storage types gives the same bits, -0, NaN and padding included."""
    if asymmetric and not qtype.startswith("int"):
        pytest.skip("only integers have a zero point")
    x = jax.random.normal(jax.random.key(0), (5, 37)).at[0, 3].set(jnp.nan).at[1, :].set(-1e-9)
    x = x.at[2, 5].set(jnp.inf)
    options = {"tile": 16, "asymmetric": asymmetric}
    for more in ({}, {"rounding": "stochastic", "key": jax.random.key(1)}):
        got = fake_quantize(x, qtype, **options, **more)
        expected = quantize(x, qtype, **options, **more).dequantize()
        bits = [np.asarray(value).view(np.uint32) for value in (got, expected)]
        same = (bits[0] == bits[1]) | (np.isnan(got) & np.isnan(expected))
        assert same.all()


@pytest.mark.parametrize(
    ("name", "execution", "sizes"),
    [
        ("quartet", "emulate", (0, 32, 8)),
        ("tetrajet2", "emulate", (4, 32, 0)),
        ("fp8_rowwise", "native", (4, 0, 8)),
    ],
)
def test_empty_operands(name, execution, sizes):
    recipe = dataclasses.replace(RECIPES[name], execution=execution)
    operands = _operands(*sizes)
    outputs = _run(recipe, *operands, jax.random.key(0) if recipe.needs_key else None)
    x, w, d = operands
    for got, like in zip(outputs, (d, x, w), strict=True):
        assert got.shape == like.shape and not got.any()


def test_axes_that_do_not_fit():
    x, w = jnp.ones((4, 32)), jnp.ones((32, 8))
    for numbers in (
        (((-1,), (0,)), ((), ())),
        (((1,), (2,)), ((), ())),
        (((1, 1), (0,)), ((), ())),
    ):
        with pytest.raises(ValueError, match="dimension_numbers must name axes 0 to 1"):
            quantized_dot_general(x, w, numbers, "fp4_rtn")


def test_random_signs_do_not_depend_on_64_bits():
    operands, key = _operands(32, 32, 32), jax.random.key(0)
    expected = _run(RECIPES["tetrajet2"], *operands, key)
    with jax.enable_x64(True):
        got = _run(RECIPES["tetrajet2"], *operands, key)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
