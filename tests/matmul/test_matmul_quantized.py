"""Products of quantised matrices against dequantise-then-multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._dispatch import explain
from pallas_kernels.ops.matmul import matmul, scaled_matmul
from pallas_kernels.ops.quantize.api import quantize


def operands(m=6, k=32, n=5, lead=()):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return make(*lead, m, k), make(k, n)


@pytest.mark.parametrize("qtype", ["int8", "fp8_e4m3", "int4"])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_codes_are_multiplied_directly(qtype, lead):
    x, w = operands(lead=lead)
    xq, wq = quantize(x, qtype, axis=-1, tile=None), quantize(w, qtype, axis=0, tile=None)
    want = jnp.matmul(xq.dequantize(), wq.dequantize(), precision="highest")
    np.testing.assert_allclose(matmul(xq, wq, implementation="xla"), want, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(matmul(xq, wq, implementation="reference"), want, rtol=1e-6)
    assert "multiplied directly" in explain("matmul", xq, wq).notes[0]
    text = jax.jit(matmul).lower(xq, wq).as_text()
    assert ("xi32>" if "int" in qtype else "f8E4M3FN") in text


@pytest.mark.parametrize("qtype", ["int8", "mxfp8", "nvfp4", "int4"])
def test_weight_only_and_tiled_scales(qtype):
    x, w = operands()
    wq = quantize(w, qtype, axis=0, tile=16 if qtype in ("int8", "int4") else "default")
    want = jnp.matmul(x, wq.dequantize(), precision="highest")
    np.testing.assert_allclose(matmul(x, wq), want, rtol=1e-5, atol=1e-5)
    assert "dequantised" in explain("matmul", x, wq).notes[0]
    assert matmul(x.astype(jnp.bfloat16), wq).dtype == jnp.bfloat16
    packed = wq.pack(0)
    np.testing.assert_allclose(matmul(x, packed), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "weight", "activation", "direct"),
    [
        ("w4a16", "nvfp4", None, False),
        ("w4a8", "int4", "int8", True),
        ("w4a8", "mxfp4", "fp8_e4m3", False),
        ("w8a8", "int8", "int8", True),
        ("w8a16", "fp8_e4m3", None, False),
    ],
)
def test_schemes_of_packed_weights(scheme, weight, activation, direct):
    x, w = operands()
    wq = quantize(w, weight, axis=0).pack(0)
    xq = x if activation is None else quantize(x, activation, axis=-1, tile=None)
    choice = explain("matmul", xq, wq)
    assert choice.notes[0].startswith(f"{scheme}: ") and ("directly" in choice.notes[0]) == direct
    value = x if activation is None else xq.dequantize()
    want = jnp.matmul(value, wq.dequantize(), precision="highest")
    for implementation in ("xla", "reference"):
        got = matmul(xq, wq, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_plain_operand():
    x, w = operands()
    wq = quantize(w, "int8", axis=0)
    grad = jax.grad(lambda x: matmul(x, wq).sum())(x)
    np.testing.assert_allclose(grad, jnp.ones((6, 5)) @ wq.dequantize().T, rtol=1e-5, atol=1e-5)


def test_plain_operands_vmap_and_eval_shape():
    x, w = operands(lead=(3,))
    np.testing.assert_allclose(matmul(x, w), x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda a: matmul(a, w))(x), x @ w, rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(matmul, x, w).shape == (3, 6, 5)


def test_scaled_matmul_tiles():
    rng = np.random.default_rng(1)
    a = jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float8_e4m3fn)
    b = jnp.asarray(rng.normal(size=(2, 4, 32)), jnp.float8_e4m3fn)
    sa = jnp.asarray(2.0 ** rng.integers(-2, 3, (2, 3, 2)), jnp.float8_e8m0fnu)
    sb = jnp.asarray(rng.random((2, 4, 1)), jnp.float32)

    def full(x, scales):
        return np.asarray(x, np.float64) * np.repeat(scales, x.shape[-1] // scales.shape[-1], -1)

    want = np.einsum("bmk,bnk->bmn", full(a, np.float64(sa)), full(b, np.float64(sb)))
    np.testing.assert_allclose(scaled_matmul(a, b, sa, sb), want, rtol=1e-5, atol=1e-5)


def test_messages():
    x, w = operands()
    with pytest.raises(ValueError, match="lhs has k = 32, rhs has k = 5"):
        matmul(x, w.T)
    with pytest.raises(ValueError, match=r"rhs must be \[k, n\]; got shape \(2, 32, 5\)"):
        matmul(x, jnp.stack([w, w]))
    with pytest.raises(
        ValueError, match="rhs must be floating point or a QTensor; got dtype int32"
    ):
        matmul(x, w.astype(jnp.int32))
    with pytest.raises(NotImplementedError, match=r"mosaic.*take the call: xla, reference"):
        matmul(x, w, implementation="mosaic")
    with pytest.raises(ValueError, match="lhs_scales must be"):
        scaled_matmul(
            jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), jnp.ones((1, 2, 3)), jnp.ones((1, 2, 1))
        )


@pytest.mark.parametrize("weight", ["1x128", "128x128"])
def test_block_scaled_fp8(weight):
    """1×128 activations with 1×128 or 128×128 weights: codes are multiplied, sums are promoted."""
    x, w = operands(m=3, k=384, n=256, lead=(2,))
    x = x * jnp.logspace(-3, 3, 384)
    xq = quantize(x, "fp8_e4m3", axis=-1, tile=128)
    tiles = {"1x128": {"axis": 0, "tile": 128}, "128x128": {"axis": (0, 1), "tile": (128, 128)}}
    wq = quantize(w, "fp8_e4m3", **tiles[weight])
    want = np.asarray(matmul(xq, wq, implementation="reference"))
    got = matmul(xq, wq, implementation="xla")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    assert "128 of k at a time" in explain("matmul", xq, wq).notes[0]
    text = jax.jit(matmul).lower(xq, wq).as_text()
    product = next(line for line in text.splitlines() if "stablehlo.dot_general" in line)
    assert "f8E4M3FN" in product and "xf32>" in product
    scales = jnp.repeat(wq.scale, 256 // wq.scale.shape[1], 1).T[None]
    lhs, lhs_scales = xq.qvalue.reshape(1, 6, 384), xq.scale.reshape(1, 6, 3)
    peer = jax.nn.scaled_matmul(lhs, wq.qvalue.T[None], lhs_scales, scales)
    scale = np.abs(want).max()
    np.testing.assert_allclose(peer.reshape(2, 3, 256), got, rtol=1e-5, atol=1e-5 * scale)


def test_one_scale_along_k_and_several_along_n():
    x, w = operands(k=16, n=32)
    xq, wq = quantize(x, "fp8_e4m3", axis=-1), quantize(w, "fp8_e4m3", axis=(0, 1), tile=(16, 16))
    want = matmul(xq, wq, implementation="reference")
    np.testing.assert_allclose(matmul(xq, wq, implementation="xla"), want, rtol=2e-5, atol=1e-5)
