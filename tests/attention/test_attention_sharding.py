"""Attention sharded over batch and heads runs without any collective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.ops.attention import AttentionConfig
from pallas_kernels.ops.attention import dot_product_attention as attention

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
OPTIONS = {"single": {}, "chunked": dict(config=AttentionConfig(32)), "sage2": dict(quant="sage2")}


@pytest.mark.multidevice
@pytest.mark.parametrize("option", OPTIONS)
def test_no_collectives(option):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=auto, devices=jax.devices()[:4])
    spec = PartitionSpec("b", None, "h", None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 4, 16)), jnp.float32)
    q, k, v = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, x[:, :, :2], x[:, :, 2:]))

    def loss(q, k, v):
        out = attention(q, k, v, is_causal=True, **OPTIONS[option])
        return (out**2).sum(), out

    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    text = step.lower(q, k, v).compile().as_text()
    assert not [name for name in COLLECTIVES if f"{name}(" in text]
    grads, out = step(q, k, v)
    assert out.sharding.spec == spec
    alone = attention(x, x[:, :, :2], x[:, :, 2:], is_causal=True, **OPTIONS[option])
    np.testing.assert_allclose(out, alone, atol=1e-5)
    assert all(jnp.isfinite(g).all() for g in grads)
