"""FP8 products of a forward pass: their error, what they refuse, and which layers get them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.models import Decoder, ModelConfig
from jaxeff.quant import apply_recipe, fp8_dot_general, use_fp8

LINEAR = (((2,), (0,)), ((), ()))


def test_every_row_and_column_has_its_own_scale():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 64), (64, 32)))
    exact = np.asarray(x) @ np.asarray(w)
    got = fp8_dot_general(x, w, LINEAR)
    assert got.shape == exact.shape and got.dtype == jnp.float32
    error = np.abs(got - exact).mean() / np.abs(exact).mean()
    assert error == pytest.approx(0.038, abs=0.006)  # of e4m3: three bits of mantissa
    rows, columns = jnp.float32([1e-20, 1e20]).reshape(2, 1, 1), 2.0 ** jnp.arange(32)
    scaled = fp8_dot_general(x * rows, w * columns, LINEAR)
    np.testing.assert_allclose(scaled, got * rows * columns, rtol=1e-3)
    zeros = fp8_dot_general(jnp.zeros((1, 2, 64)), w, LINEAR, preferred_element_type=jnp.bfloat16)
    assert zeros.dtype == jnp.bfloat16 and not zeros.any()


def test_other_products_are_refused():
    x = jnp.ones((4, 4))
    with pytest.raises(NotImplementedError, match="those of linear layers"):
        fp8_dot_general(x, x, (((0,), (0,)), ((), ())))
    with pytest.raises(NotImplementedError, match="those of linear layers"):
        fp8_dot_general(x[None], x[None], (((2,), (1,)), ((0,), (0,))))


def test_head_and_layers_with_a_product_of_their_own_keep_it():
    config = ModelConfig.llama(vocab_size=32, num_layers=2, embed_dim=32, num_heads=2)
    model = Decoder(config, rngs=nnx.Rngs(0))
    apply_recipe(model, "bf16", rules=[(r"layers\.0\.", "mxfp8")])
    changed = use_fp8(model)
    assert len(changed) == 7 and all(name.startswith("layers.1.") for name in changed)
    assert use_fp8(model) == []
    logits = jax.jit(lambda tokens: model(tokens))(jnp.arange(8)[None])
    assert bool(jnp.isfinite(logits).all())


def test_float16_and_tiny_values_stay_finite():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 4, 64), (64, 8)))
    exact = np.asarray(x) @ np.asarray(w)
    got = fp8_dot_general(x.astype(jnp.float16), w.astype(jnp.float16), LINEAR)
    assert got.dtype == jnp.float16
    assert np.linalg.norm(got - exact) < 0.06 * np.linalg.norm(exact)
    for size in (1e-36, 1e-38):  # a scale of their own would be subnormal
        assert np.isfinite(fp8_dot_general(x * size, w, LINEAR)).all()
