"""SageBwd: the INT8 backward against its oracle, against float32, and in a training run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QUANTS, AttentionQuant, BlockMask, Mask, explain, ring_attention, testing
from pallas_kernels import dot_product_attention as attention
from pallas_kernels.ops.attention import quant as numerics

# arXiv 2603.02170, table 1: standard deviation of Q and K -> cosine of O, dQ, dK, dV.
TABLE = {
    1: (0.9999, 0.9998, 0.9998, 0.9999),
    3: (0.9992, 0.9971, 0.9970, 0.9992),
    5: (0.9982, 0.9798, 0.9799, 0.9982),
    8: (0.9953, 0.8900, 0.8886, 0.9953),
    10: (0.9933, 0.7823, 0.7820, 0.9933),
}


def qkvg(t, s, n=1, k=1, h=8, sigma=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(int(sigma) + t)
    shapes = ((1, t, n, h), (1, s, k, h), (1, s, k, h), (1, t, n, h))
    sizes = (sigma, sigma, 1, 1)
    return tuple(
        jnp.asarray(rng.normal(size=x) * y, dtype) for x, y in zip(shapes, sizes, strict=True)
    )


@functools.partial(jax.jit, static_argnames=("quant", "implementation"))
def outputs(q, k, v, g, quant, implementation="xla"):
    """O, dQ, dK, dV."""
    out, pull = jax.vjp(
        lambda *x: attention(*x, quant=quant, implementation=implementation), q, k, v
    )
    return out, *pull(g)


@functools.cache
def cosines(sigma, quant="sage_bwd"):
    arrays = qkvg(1024, 1024, 4, 4, h=64, sigma=sigma, dtype=jnp.bfloat16)
    got = outputs(*arrays, quant)
    exact = outputs(*(x.astype(jnp.float32) for x in arrays), None, "reference")
    return [testing.cosine(a, b) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("sigma", TABLE)
def test_published_cosines(sigma):
    """Measured here: 4 heads, 1024 tokens, head_dim 64.

    sigma 1: .9998 .9988 .9989 .9991 (dQ, dK, dV up to .001 below the table, whose tile sizes,
    length and head_dim are not published); 3: .9992 .9971 .9972 .9992; 5: .9979 .9809 .9814 .9979;
    8: .9950 .8973 .9000 .9950; 10: .9931 .7603 .7688 .9931. From 5 on attention is nearly one-hot
    and the figures move with the draw: single heads were .9724 to .9814 at 5, .7625 to .8244 at 10.
    """
    slack = {1: 0.0015, 3: 0.001, 5: 0.002, 8: 0.005, 10: 0.03}[sigma]
    for got, want in zip(cosines(sigma), TABLE[sigma], strict=True):
        assert got > want - slack


def test_gradients_of_the_specified_inputs():
    assert min(cosines(1)) > 0.998 and min(cosines(3)) >= 0.997
    # What is missing at 3 is the exactness of the logits: SageAttention2's scales give .9977.
    finer = dataclasses.replace(QUANTS["sage_bwd"], granularity="per_thread")
    assert min(cosines(3, finer)) > 0.9975


@pytest.mark.parametrize("quant", [None, "sage_bwd"])
def test_two_runs_give_the_same_bits(quant):
    """What ``deterministic=True`` promises, over lists as well."""
    arrays = qkvg(41, 37, 4, 2)
    kept = jnp.asarray(np.random.default_rng(0).random((1, 4, 6, 5)) < 0.6)
    mask = BlockMask.from_blocks(kept, 41, 37, block_q=8, block_kv=8)
    attend = functools.partial(attention, quant=quant, mask=mask, deterministic=True)
    run = jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))
    for x, y in zip(run(*arrays), run(*arrays), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", ["causal_sinks", "blocks"])
def test_implementations_agree(case):
    """Same rounding points, other order: within the flips of a rounding."""
    quant = dataclasses.replace(QUANTS["sage_bwd"], block_q=16, block_kv=8, warp_q=16)
    q, k, v, g = qkvg(41, 37, 4, 2)
    k = k + 5.0  # a mean key, to be smoothed away
    rules = {}
    if case == "causal_sinks":  # the log-sum-exp's gradient brings the mean key back
        rules = dict(is_causal=True, causal_offset=-3, sinks=jnp.array([0.1, -1.0, 2.0, 0.0]))
    if case == "blocks":
        kept = jnp.asarray(np.random.default_rng(0).random((1, 4, 3, 5)) < 0.6)
        rules = {"mask": BlockMask.from_blocks(kept, 41, 37, block_q=16, block_kv=8)}

    @functools.partial(jax.jit, static_argnames=("quant", "implementation"))
    def run(quant, implementation):
        def loss(*x):
            out, lse = attention(
                *x, quant=quant, implementation=implementation, return_residual=True, **rules
            )
            return (out * g).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum(), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    (got, out), (want, want_out) = run(quant, "xla"), run(quant, "reference")
    assert testing.relative_l1(out, want_out) < 1e-3
    exact, _ = run(None, "reference")
    for a, b, c in zip(got, want, exact, strict=True):
        assert testing.relative_l1(a, b) < 2e-3
        assert testing.cosine(a, c) > 0.997


def test_directional_derivative():
    """Finite differences of float32 attention along the computed gradient, on a tiny shape."""
    q, k, v, g = qkvg(6, 5)
    grads = outputs(q, k, v, g, "sage_bwd")[1:]
    f = jax.jit(lambda *x: (attention(*x, implementation="reference") * g).sum())
    for i, grad in enumerate(grads):
        step = grad / jnp.linalg.norm(grad)
        moved = [
            f(*(x + e * step if j == i else x for j, x in enumerate((q, k, v))))
            for e in (1e-2, -1e-2)
        ]
        slope = float(moved[0] - moved[1]) / 2e-2
        np.testing.assert_allclose(slope, float(jnp.linalg.norm(grad)), rtol=0.02)


def test_edges():
    zeros = jnp.zeros((1, 5, 1, 8))
    for x in outputs(zeros, zeros, zeros, zeros, "sage_bwd"):
        np.testing.assert_array_equal(x, 0)
    # A query that sees nothing, and probabilities that underflow.
    q, k, v, g = qkvg(20, 20, sigma=40)
    mask = Mask.causal(-3)
    loss = lambda *x: (attention(*x, mask=mask, quant="sage_bwd") * g).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(jnp.isfinite(x).all() for x in grads) and (grads[0][:, :3] == 0).all()
    np.testing.assert_array_equal(numerics.int8_tiles(jnp.full((2, 2), 1e-42)), 0)


def test_what_it_refuses_and_says():
    x = jnp.ones((1, 8, 2, 16))
    for arguments, what in (
        ({"bias": jnp.ones((1, 1, 8, 8))}, "bias"),
        ({"logits_soft_cap": 1.0}, "cap"),
    ):
        for implementation in ("xla", "reference"):
            with pytest.raises(
                NotImplementedError, match=f"INT8 backward, which serves no .*{what}"
            ):
                attention(x, x, x, quant="sage_bwd", implementation=implementation, **arguments)
    notes = explain("attention", x, x, x, quant="sage_bwd", implementation="xla").notes
    assert notes[1] == "the gradient is that of SageBwd: INT8 products except dO V^T"
    with pytest.raises(ValueError, match="backward='int8' needs qk='int8' and smooth_q=False"):
        AttentionQuant(qk="fp8_e4m3", backward="int8")
    with pytest.raises(ValueError, match="need pv='int8'; got 'fp8_e4m3'"):
        AttentionQuant(v_granularity="per_block")
    with pytest.raises(NotImplementedError, match="ring_attention has no INT8 backward"):
        ring_attention(x, x, x, axis_name="s", quant="sage_bwd")


def test_training_follows_full_precision():
    """Forty steps of a tiny model: the losses stay within one per cent."""
    from flax import nnx

    from jaxeff import train
    from jaxeff.models import Decoder, ModelConfig

    config = ModelConfig.llama(
        vocab_size=32, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=32
    )
    rows = np.random.default_rng(0).integers(0, 8, (40, 4, 33)).cumsum(-1) % 32
    losses = {}
    for quant in (None, "sage_bwd"):
        attend = functools.partial(attention, quant=quant)
        model = Decoder(config, rngs=nnx.Rngs(0), attention_fn=attend)
        settings = train.TrainConfig(steps=40, learning_rate=3e-3)
        losses[quant] = train.fit(model, rows.astype(np.int32), settings, progress=False).losses
    np.testing.assert_allclose(losses["sage_bwd"], losses[None], rtol=0.01)
    assert losses[None][-1] < losses[None][0]
