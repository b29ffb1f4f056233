"""QuEST, 4/3, 4/6 and MS-EDEN, and the recipes made of them, against graphs written out here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quant import (
    POINTS,
    RECIPES,
    RHT,
    OperandQuant,
    Recipe,
    dot_general,
    quantized_einsum,
    round_operand,
)
from pallas_kernels import fake_quantize
from pallas_kernels.formats import hadamard_matrix, number_type, round_to
from pallas_kernels.formats.counter_random import counter_key

PLAIN = (((1,), (0,)), ((), ()))
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _nearest_e2m1(units):
    """By hand: the nearest of the listed magnitudes, ties to the even code."""
    a = np.minimum(np.abs(units), 6)
    distance = np.abs(a[..., None] - GRID) + 1e-12 * (np.arange(8) % 2)
    return np.copysign(GRID[distance.argmin(-1)], units)


def test_quest_scale_and_mask():
    x = np.asarray(jax.random.normal(jax.random.key(0), (6, 64))) * 0.37
    x[0, 5] = 9.0
    got, mask = round_operand(jnp.asarray(x), 1, OperandQuant("mxfp4", method="quest"))
    b = x.reshape(6, 2, 32)
    std = np.sqrt((b**2).mean(-1, keepdims=True) - b.mean(-1, keepdims=True) ** 2)
    scale = 2.0 ** np.floor(np.log2(2.92247856 / 6 * std + 1e-8))
    np.testing.assert_array_equal(got, (_nearest_e2m1(b / scale) * scale).reshape(x.shape))
    np.testing.assert_array_equal(mask, (np.abs(b / scale) <= 6).reshape(x.shape))
    assert not mask[0, 5] and mask.mean() > 0.95
    bad, _ = round_operand(
        jnp.asarray(x).at[1, 0].set(jnp.nan), 1, OperandQuant("mxfp4", method="quest")
    )
    assert jnp.isnan(bad[1, :32]).all() and jnp.isfinite(bad[1, 32:]).all()


def test_floor_4_3_is_unbiased_and_never_clips():
    x = jax.random.normal(jax.random.key(1), (4, 64))
    quant = OperandQuant("mxfp4", "stochastic", method="floor_4_3")
    keys = jax.random.split(counter_key(jnp.uint32([0, 1])), 2000)
    draws = jax.jit(jax.vmap(lambda key: round_operand(x, 1, quant, key)[0]))(keys)
    b = np.asarray(x).reshape(4, 2, 32)
    scale = 4 / 3 * 2.0 ** (np.floor(np.log2(np.abs(b).max(-1, keepdims=True))) - 2)
    assert (np.abs(b) / scale < 6.000001).all()
    units = np.asarray(draws[0]).reshape(b.shape) / scale
    np.testing.assert_allclose(
        np.abs(units), GRID[np.abs(np.abs(units)[..., None] - GRID).argmin(-1)], rtol=1e-6
    )
    error = np.abs(np.asarray(draws.mean(0)) - x)
    assert (error < 5 * np.asarray(draws.std(0)) / np.sqrt(2000) + 1e-6).all()
    zeros = round_operand(jnp.zeros((2, 32)), 1, quant, keys[0])[0]
    np.testing.assert_array_equal(zeros, 0)


def test_four_six_takes_the_better_scale():
    x = jax.random.normal(jax.random.key(2), (8, 128))
    got, _ = round_operand(x, 1, OperandQuant("nvfp4", method="four_six"))
    plain = fake_quantize(x, "nvfp4")
    errors = [np.square(np.asarray(v - x)).reshape(8, 8, 16).sum(-1) for v in (got, plain)]
    assert errors[0].sum() < 0.95 * errors[1].sum()
    # A block that 4 serves exactly and 6 does not: 3/4 of the maximum is on the grid of 4 only.
    block = jnp.tile(jnp.float32([4, 3, 2, 1]), 4)[None]
    exact, _ = round_operand(block, 1, OperandQuant("nvfp4", method="four_six"))
    np.testing.assert_allclose(exact, block, rtol=1e-6)
    assert float(jnp.abs(fake_quantize(block, "nvfp4") - block).max()) > 0.1


def test_ms_eden_keeps_the_length_and_beats_stochastic_rounding():
    size, quant = 32, OperandQuant("nvfp4", "stochastic", method="ms_eden")
    x = jax.random.normal(jax.random.key(3), (4, 64))

    @jax.jit
    @jax.vmap
    def draw(key):
        signs = jnp.tile(jax.random.rademacher(key, (size,), jnp.float32), 2)
        h = jnp.asarray(hadamard_matrix(size))
        rotated = ((x * signs).reshape(4, 2, size) @ h).reshape(x.shape)
        rounded, _ = round_operand(rotated, 1, quant, jax.random.fold_in(key, 1), size)
        back = (rounded.reshape(4, 2, size) @ h.T).reshape(x.shape) * signs
        plain = fake_quantize(x, "nvfp4", rounding="stochastic", key=key, overrange=17 / 16)
        return back, plain

    keys = jax.random.split(counter_key(jnp.uint32([0, 1])), 3000)
    eden, plain = (np.asarray(value) for value in draw(keys))
    single = [np.square(v - np.asarray(x)).mean() for v in (eden, plain)]
    assert single[0] < single[1] / 2, single
    groups = np.asarray(x).reshape(8, size)
    along = np.einsum("sgi,gi->sg", eden.reshape(-1, 8, size), groups)
    relative = along / np.square(groups).sum(-1) - 1
    bound = 5 * relative.std(0) / np.sqrt(len(keys))
    assert (np.abs(relative.mean(0)) < bound).all(), "E<q, x> = |x|² exactly, per group"
    # A random Hadamard is not a uniform rotation: the mean misses x by under 1 % of it.
    assert np.linalg.norm(eden.mean(0) - x) < 0.01 * np.linalg.norm(x)


def _operands(t=40, k=48, n=64):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (t, k))
    w = jax.random.normal(keys[1], (k, n)) * 0.1
    return x, w, jax.random.normal(keys[2], (t, n)) * 1e-3


@functools.partial(jax.jit, static_argnums=0)
def _run(recipe, x, w, d, key=None):
    z, pullback = jax.vjp(lambda x, w: dot_general(recipe, key)(x, w, PLAIN), x, w)
    return z, *pullback(d)


def _assert_close(got, expected, tolerance=1e-6):
    for one, other in zip(got, expected, strict=True):
        scale = np.abs(np.asarray(other, np.float64)).max()
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale)


def _pad(value, axis, size=32):
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, -value.shape[axis] % size)
    return jnp.pad(value, widths)


@pytest.mark.parametrize("name", ["quartet", "quartet2", "tetrajet2"])
def test_rotated_recipes_equal_explicit_graph(name):
    """Every operand rotated, rounded and multiplied by hand, with the keys of the recipe."""
    recipe, key = RECIPES[name], jax.random.key(5)
    x, w, d = _operands()
    h = jnp.asarray(hadamard_matrix(32))
    own = counter_key(jax.random.key_data(key))

    def rotated(value, axis, signs):
        value = _pad(value, axis) if axis == 1 else _pad(value, axis).T
        value = value * jnp.tile(signs, value.shape[1] // 32)
        value = (value.reshape(value.shape[0], -1, 32) @ h).reshape(value.shape)
        return value  # contraction last

    def rounded(point, value):
        quant = getattr(recipe, point)
        drawn = (
            jax.random.fold_in(own, POINTS.index(point)) if quant.rounding != "nearest" else None
        )
        if quant.method == "block" and drawn is not None:
            # The noise follows the layout in which the recipe holds the operand.
            axis = 1 if point.startswith("bwd") else 0
            value = value if axis else value.T
            value = round_operand(value, axis, quant, drawn, 32)[0]
            return value if axis else value.T
        return round_operand(value, 1, quant, drawn, 32)[0]

    @jax.jit
    def explicit(x, w, d):
        signs = [
            jax.random.rademacher(jax.random.fold_in(own, 6 + i), (32,), jnp.float32)
            for i in range(2)
        ]
        ones = jnp.ones(32)
        if name == "quartet":
            hx, hw = rotated(x, 1, ones), rotated(w, 0, ones)  # [t, k'], [n, k']
            (qx, mx), (qw, mw) = (round_operand(v, 1, recipe.fwd_x) for v in (hx, hw))
            qw = qw.T
        else:
            qx, qw = rounded("fwd_x", x), rounded("fwd_w", w.T).T
        z = qx @ qw
        bx, bw = (qx, qw) if name == "quartet" else (x, w)
        grad_x = (
            rounded("bwd_d", rotated(d, 1, signs[0])) @ rounded("bwd_w", rotated(bw, 1, signs[0])).T
        )
        grad_w = (
            rounded("upd_x", rotated(bx, 0, signs[1])) @ rounded("upd_d", rotated(d, 0, signs[1])).T
        )
        if name == "quartet":
            grad_x, grad_w = jnp.where(mx, grad_x, 0), jnp.where(mw.T, grad_w, 0)
            grad_x = (grad_x.reshape(x.shape[0], -1, 32) @ h.T).reshape(x.shape[0], -1)[:, :48]
            grad_w = (grad_w.T.reshape(64, -1, 32) @ h.T).reshape(64, -1)[:, :48].T
        return z, grad_x, grad_w

    got = _run(recipe, x, w, d, key)
    exact = x @ w, d @ w.T, x.T @ d
    for one, other in zip(got, exact, strict=True):
        assert float(jnp.linalg.norm(one - other)) < 0.5 * float(jnp.linalg.norm(other))
    # A rotation in another order of sums may move a value across a rounding boundary.
    for one, other in zip(got, explicit(x, w, d), strict=True):
        scale = np.abs(np.asarray(other)).max()
        close = np.abs(np.asarray(one - other)) < 2e-6 * scale
        assert close.mean() > 0.9, close.mean()


def test_rotation_signs_are_drawn_anew_and_cancel():
    plain = OperandQuant()
    recipe = Recipe(
        "rotate", backward_transform=RHT(32, "random"), wgrad_transform=RHT(32, "random")
    )
    recipe = dataclasses.replace(recipe, fwd_x=OperandQuant("fp8_e4m3"))  # not the identity
    assert recipe.needs_key and recipe.stochastic_points == () and recipe.bwd_d == plain
    x, w, d = _operands()
    for seed in (0, 1):
        _, grad_x, grad_w = _run(recipe, x, w, d, jax.random.key(seed))
        _assert_close((grad_x, grad_w), (d @ w.T, x.T @ d), 5e-6)
    runs = [_run("quartet2", x, w, d, jax.random.key(seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert (np.asarray(runs[0][2]) != np.asarray(runs[1][2])).any()
    with pytest.raises(ValueError, match="draws the signs of its rotations: pass key="):
        dot_general(recipe)


def test_einsum():
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    w = jax.random.normal(jax.random.key(1), (32, 3, 16))
    flat = dot_general("fp4_rtn")(x.reshape(10, 32), w.reshape(32, 48), PLAIN)
    got = quantized_einsum("...d,dnh->...nh", x, w, "fp4_rtn")
    np.testing.assert_array_equal(got, flat.reshape(2, 5, 3, 16))
    got = quantized_einsum("btd,dnh->nbth", x, w, "fp4_rtn")
    np.testing.assert_array_equal(got, flat.reshape(2, 5, 3, 16).transpose(2, 0, 1, 3))
    a, b = x[:, :, :16], jax.random.normal(jax.random.key(2), (4, 2, 16, 6))
    got = quantized_einsum("gti,bgio->gto", a, b, "bf16")
    np.testing.assert_allclose(got, jnp.einsum("gti,bgio->gto", a, b), rtol=1e-5, atol=1e-5)
    for text, kind, message in (
        ("btd,dnh", ValueError, "must read 'left,right->result'"),
        ("bd,dnh->bnh", ValueError, "lhs has 3 dimensions"),
        ("bbd,dnh->bnh", NotImplementedError, "lhs repeats a letter"),
        ("btd,dnh->btnz", ValueError, "must hold letters of the operands"),
    ):
        with pytest.raises(kind, match=message):
            quantized_einsum(text, x, w, "fp4_rtn")


def test_refused():
    eden = OperandQuant("nvfp4", "stochastic", method="ms_eden")
    quest = OperandQuant("mxfp4", method="quest")
    for make, message in (
        (lambda: OperandQuant("nvfp4", method="best"), "method must be one of"),
        (lambda: OperandQuant("nvfp4", method="quest"), "needs e2m1 codes with e8m0 scales"),
        (lambda: OperandQuant("nvfp4", method="ms_eden"), "needs rounding='stochastic'"),
        (lambda: OperandQuant("nvfp4", method="four_six", overrange=1.5), "fixes the scale itself"),
        (lambda: Recipe("x", bwd_d=eden), "needs a random rotation of whole blocks of 16"),
        (lambda: Recipe("x", bwd_d=quest, residuals="quantized"), "'quest' serves the forward"),
        (lambda: Recipe("x", fwd_x=quest), "'quest' serves the forward points, with residuals"),
        (lambda: Recipe("x", forward_transform=RHT(16)), "needs residuals='quantized'"),
        (lambda: RECIPES["fp4_rtn"].after_switch(), "has no second phase: give a mode"),
        (lambda: RECIPES["fp4_rtn"].with_qaf("never"), "qaf must be one of"),
        (lambda: dot_general("fp4_rtn", phase=True), "has no second phase: use recipe.with_qaf"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_phase_equals_the_recipe_after_the_switch(mode):
    x, w, d = _operands()
    recipe, key = RECIPES["fp4_all_the_way"].with_qaf(mode), jax.random.key(1)

    @jax.jit
    def run(phase):
        product = dot_general(recipe, key, phase=phase)
        z, pullback = jax.vjp(lambda x, w: product(x, w, PLAIN), x, w)
        return z, *pullback(d)

    _assert_close(run(False), _run("fp4_all_the_way", x, w, d, key))
    after = recipe.after_switch()
    _assert_close(run(True), _run(after, x, w, d, key if after.needs_key else None))
    assert run._cache_size() == 1
    assert recipe.after_switch("both").is_identity


def test_number_types_used_here():
    np.testing.assert_array_equal(
        round_to(jnp.float32([2.5, -5.0]), number_type("e2m1")),
        _nearest_e2m1(np.array([2.5, -5.0])),
    )
