# SPDX-License-Identifier: Apache-2.0
"""Low-precision training on a GPU: kernels bit for bit, and the products that XLA really makes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.quant import RECIPES, dot_general
from pallas_kernels import fake_quantize_both, quantize_fp8_both
from pallas_kernels.formats.counter_random import counter_key

pytestmark = pytest.mark.gpu
PLAIN = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("qtype", ["nvfp4", "mxfp4"])
def test_rounding_of_a_matrix_is_that_of_the_formats(qtype):
    x = jax.random.normal(jax.random.key(0), (96, 288), jnp.float32)
    keys = jax.random.split(counter_key(jnp.uint32([1, 2])))
    options = [{"rounding": "stochastic", "key": key} for key in keys]
    got, want = (
        fake_quantize_both(x, qtype, *options, implementation=name) for name in ("mosaic", "xla")
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("qtype", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_codes_are_those_of_the_formats(qtype):
    x = jax.random.normal(jax.random.key(0), (160, 144)).astype(jnp.bfloat16)
    got, want = (
        quantize_fp8_both(x, qtype, jnp.float32(0.01), implementation=name)
        for name in ("mosaic", "xla")
    )
    for one, other in zip(got, want, strict=True):  # XLA divides to two units in the last place
        assert (one.astype(jnp.float32) != other.astype(jnp.float32)).mean() < 1e-3


def test_xla_takes_the_fp8_product_and_its_scale():
    """Three cuBLASLt calls on 8-bit operands with scales of their own; nothing follows them."""
    recipe = dataclasses.replace(RECIPES["fp8_current"], execution="native")
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, d = (jax.random.normal(key, (256, 256)).astype(jnp.bfloat16) for key in keys)

    @jax.jit
    def step(x, w, d):
        z, pullback = jax.vjp(lambda x, w: dot_general(recipe)(x, w, PLAIN), x, w)
        return z, *pullback(d)

    # Left to itself XLA takes Triton for products as small as this.
    compiled = step.lower(x, w, d).compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    text = compiled.as_text()
    assert text.count("__cublas$lt$matmul$f8") == 3
    assert not re.search(r"= bf16\[256,256\]\S* (fusion|multiply)\(", text)
    emulated = jax.vjp(lambda x, w: dot_general(RECIPES["fp8_current"])(x, w, PLAIN), x, w)
    for got, want in zip(compiled(x, w, d), (emulated[0], *emulated[1](d)), strict=True):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        # Far below the 2e-3 that a scale rounded to bfloat16 may be off.
        assert abs((got * want).sum() / (want * want).sum() - 1) < 3e-4
