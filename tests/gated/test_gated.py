"""SwiGLU between FP8 products: formulas, the kernels' registers on a CPU, lowering, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.ops.gated import gated_backward, gated_forward, reference
from tests.attention import warpgroup

KEYS = jax.random.split(jax.random.key(0), 3)


def inputs(rows=8, columns=48, more=16):
    gate, up, d = (jax.random.normal(key, (rows, columns + more)) for key in KEYS)
    return (
        (2 * gate).astype(jnp.bfloat16),
        up.astype(jnp.bfloat16),
        d[:, :columns].astype("bfloat16"),
    )


UNITS = jnp.float32([0.5, 1.5, 0.02])


def test_forward_and_gradient_are_those_of_swiglu():
    gate, up, d = inputs()
    true = lambda g, u: jax.nn.silu(g) * u  # noqa: E731
    g, u = (x[:, :48].astype(jnp.float32) * unit for x, unit in ((gate, 0.5), (up, 1.5)))
    codes, gate8, up8, top = reference.gated_forward(gate, up, UNITS, 48)
    want = true(g, u)
    # Half a step of e4m3 is 1/16 of a value, of e5m2 1/8: the bounds are those of the formats.
    np.testing.assert_allclose(codes.astype(jnp.float32) * 0.02, want, rtol=0.0626, atol=1e-4)
    assert float(top) == pytest.approx(float(jnp.abs(want).max()), rel=1e-6)
    exact = (gate8.astype(jnp.float32), up8.astype(jnp.float32))
    np.testing.assert_allclose(exact[0], g, rtol=0.0626, atol=1e-3)
    units = jnp.float32([3.0, 1e-3, 2e-3])
    *codes, dg, du, tops = reference.gated_backward(d.astype(jnp.float32), gate8, up8, units)
    _, pull = jax.vjp(true, *exact)
    for want, got, code, unit, top in zip(
        pull(3 * d.astype(jnp.float32)), (dg, du), codes, units[1:], tops, strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(code.astype(jnp.float32) * unit, want, rtol=0.126, atol=1e-6)
        assert float(top) == pytest.approx(float(jnp.abs(want).max()), rel=1e-6)


@pytest.mark.parametrize("columns", [48, 2048])
def test_registers_of_the_kernels_give_the_references_numbers(columns):
    gate, up, d = inputs(columns=columns)
    units = jnp.float32([3.0, 1e-3, 2e-3])
    want = reference.gated_forward(gate, up, UNITS, columns)
    want_back = reference.gated_backward(d, *want[1:3], units)
    with warpgroup.installed(), abstract_gpu():
        got = gated_forward(gate, up, UNITS, columns, implementation="mosaic")
        got_back = gated_backward(d, *want[1:3], units, implementation="mosaic")
        got, got_back = jax.block_until_ready((got, got_back))
    for a, b in zip((*got, *got_back), (*want, *want_back), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        # The kernel's exponential and reciprocal are approximate: now and then the next code.
        near = np.abs(a - b) <= 1e-5 * np.abs(b)
        assert near.mean() > 0.995
        np.testing.assert_allclose(a, b, rtol=0.26, atol=1e-6)


@pytest.mark.parametrize("columns", [64, 8192])
def test_kernels_lower_for_a_gpu(columns):
    shape = jax.ShapeDtypeStruct
    wide = shape((16, columns + 64), jnp.bfloat16)
    d, code = shape((16, columns), jnp.bfloat16), shape((16, columns), jnp.float8_e4m3fn)
    units = shape((3,), jnp.float32)
    with abstract_gpu():
        for call, *args in (
            (lambda *a: gated_forward(*a, columns, implementation="mosaic"), wide, wide, units),
            (lambda *a: gated_backward(*a, implementation="mosaic"), d, code, code, units),
        ):
            text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu" in text


def test_messages():
    gate, up, d = inputs()
    with pytest.raises(ValueError, match=r"with n = 65, got \(8, 64\) and \(8, 64\)"):
        gated_forward(gate, up, UNITS, 65)
    with pytest.raises(ValueError, match="must be one shape"):
        gated_backward(d, gate, up, UNITS)
    with pytest.raises(ValueError, match="implementation must be"):
        gated_forward(gate, up, UNITS, 48, implementation="triton")
    with pytest.raises(
        NotImplementedError, match="need an NVIDIA GPU .sm90.; this device is a cpu"
    ):
        gated_forward(gate, up, UNITS, 48, implementation="mosaic")
    with abstract_gpu(), pytest.raises(NotImplementedError, match="take bfloat16; got float32"):
        gated_forward(
            *(x.astype("float32") for x in (gate, up)), UNITS, 48, implementation="mosaic"
        )


@pytest.mark.gpu
def test_on_a_gpu():
    gate, up, d = inputs(rows=512, columns=8192, more=64)
    units = jnp.float32([3.0, 1e-3, 2e-3])
    want = jax.jit(reference.gated_forward, static_argnums=3)(gate, up, UNITS, 8192)
    got = gated_forward(gate, up, UNITS, 8192, implementation="mosaic")
    want_back = jax.jit(reference.gated_backward)(d, *want[1:3], units)
    got_back = gated_backward(d, *want[1:3], units, implementation="mosaic")
    for a, b in zip((*got, *got_back), (*want, *want_back), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        assert (np.abs(a - b) <= 1e-5 * np.abs(b)).mean() > 0.99
        np.testing.assert_allclose(a, b, rtol=0.26, atol=1e-6)
