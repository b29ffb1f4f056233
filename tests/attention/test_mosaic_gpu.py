# SPDX-License-Identifier: Apache-2.0
"""The sm90 attention kernel on a GPU, against float32 attention."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gradient as gradients
from experiments.benchmarks import leaks
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import mosaic_sm90, reference
from pallas_kernels.ops.attention.mosaic_sm90_backward import gradient
from pallas_kernels.ops.attention.spec import QUANTS, AttentionSpec

pytestmark = pytest.mark.gpu


def _run(b, t, s, n, k, h, mask, *, shift=0.0, quant="sage2"):
    keys = jax.random.split(jax.random.key(t * 7 + s), 4)
    query = jax.random.normal(keys[0], (b, t, n, h))
    # "fp8" does not smooth K: a bias would show that, not the kernel.
    key_bias = (0 if quant == "fp8" else 3) * jax.random.normal(keys[3], (1, 1, 1, h))
    key = jax.random.normal(keys[1], (b, s, k, h)) + key_bias
    value = jax.random.normal(keys[2], (b, s, k, h)) + shift
    # Normal numbers drawn in bfloat16 take few values and have a skewed mean: cast afterwards.
    q, k_, v = (x.astype(jnp.bfloat16) for x in (query, key, value))
    spec = AttentionSpec(b, t, s, n, k, h, "bfloat16", h**-0.5, quant=QUANTS.get(quant))
    run = jax.jit(lambda q, k, v: mosaic_sm90.attention(q, k, v, None, None, mask, spec))
    out, lse = run(q, k_, v)
    again, _ = run(q, k_, v)
    exact = AttentionSpec(b, t, s, n, k, h, "float32", h**-0.5)
    q, k_, v = (x.astype(jnp.float32) for x in (q, k_, v))
    with jax.default_matmul_precision("highest"):
        rule = mask.as_mask() if isinstance(mask, BlockMask) else mask
        true, true_lse = reference.attention(q, k_, v, None, None, rule, exact)
    assert (out == again).all()
    error = jnp.abs(out.astype(jnp.float32) - true).sum() / jnp.abs(true).sum()
    finite = jnp.isfinite(true_lse)
    assert (jnp.isneginf(lse) == ~finite).all()
    assert float(jnp.abs(jnp.where(finite, lse - true_lse, 0)).max()) < 0.05
    return float(error)


@pytest.mark.parametrize(
    ("t", "s", "mask"),
    [
        (1024, 1024, Mask()),
        (1000, 777, Mask.causal()),
        (300, 1000, Mask.causal(700)),
        (513, 700, Mask.causal() & Mask.window(100, 0)),
        (17, 100, Mask()),
        (1, 1000, Mask.causal(999)),
    ],
)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_agrees_with_float32(t, s, mask, heads, head_dim):
    assert _run(2, t, s, *heads, head_dim, mask) < 0.045


def test_lengths_zero_rows_and_empty_sequences():
    lengths = Mask.lengths(jnp.array([600, 200]), jnp.array([700, 0]))
    assert _run(2, 600, 700, 2, 1, 128, lengths) < 0.045


def test_values_with_a_mean():
    """A running FP8 accumulator is off by .176 here."""
    assert _run(1, 2048, 15360, 2, 1, 128, Mask(), shift=1.0) < 0.005


@pytest.mark.parametrize(("quant", "bound"), [("sage1", 0.025), ("fp8", 0.06), (None, 0.006)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_other_formats_and_head_sizes(quant, bound, head_dim):
    """More configurations, each in a process under a time limit: `benchmarks.gpu_session`."""
    assert _run(1, 300, 500, 4, 2, head_dim, Mask.causal(200), quant=quant) < bound


@pytest.mark.parametrize(("quant", "bound"), [("sage2", 0.045), (None, 0.006)])
@pytest.mark.parametrize("rule", [None, Mask.causal(100)])
@pytest.mark.parametrize("block", [(128, 128), (256, 64)])
def test_listed_tiles(quant, bound, rule, block):
    """More shapes, and the times: `benchmarks.block_sparse`."""
    t, s = 1000, 777
    kept = jax.random.uniform(jax.random.key(1), (2, 4, -(-t // block[0]), -(-s // block[1]))) < 0.4
    kept = kept.at[:, 1, 2].set(False)  # rows of queries without keys
    mask = BlockMask.from_blocks(kept, t, s, block_q=block[0], block_kv=block[1], mask=rule)
    assert _run(2, t, s, 4, 2, 128, mask, quant=quant) < bound


@pytest.mark.parametrize("bounds", [{}, {"max_diff": 0}, {"max_diff": 9, "min_diff": -70}])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradient_kernels(bounds, head_dim):
    b, t, s, n, k = 2, 1000, 777, 4, 2
    keys = jax.random.split(jax.random.key(7), 4)
    shapes = ((b, t, n, head_dim), (b, s, k, head_dim), (b, s, k, head_dim), (b, t, n, head_dim))
    arrays = [
        jax.random.normal(i, x).astype(jnp.bfloat16) for i, x in zip(keys, shapes, strict=True)
    ]
    spec = AttentionSpec(b, t, s, n, k, head_dim, "float32", head_dim**-0.5)
    q, k_, v, d_out = (x.astype(jnp.float32) for x in arrays)
    with jax.default_matmul_precision("highest"):
        run = lambda *x: reference.attention(*x, None, None, Mask(**bounds), spec)  # noqa: E731
        (out, lse), pull = jax.vjp(run, q, k_, v)
        want = pull((d_out, jnp.zeros_like(lse)))
    sums = lse.swapaxes(1, 2), (out * d_out).sum(-1).swapaxes(1, 2)
    step = jax.jit(lambda *x: gradient(*x, scale=spec.scale, **bounds))
    got, again = step(*arrays, *sums), step(*arrays, *sums)
    for x, y, z in zip(got, again, want, strict=True):
        assert (x == y).all()
        assert float(jnp.abs(x - z).sum() / jnp.abs(z).sum()) < 0.01


@pytest.mark.parametrize("case", gradients.correct_cases(), ids=str)
def test_gradient_of_the_public_function(case):
    """16-bit and INT8, rules, lists; two runs to the bit. Each raises where it is out of bounds."""
    gradients.run_correct(case)


@pytest.mark.parametrize("case", leaks.cases(), ids=str)
def test_later_tokens_do_not_leak(case):
    """Every builder of a `BlockMask` through every kernel, forward and backward."""
    assert leaks.run(case)["masks"] == 22
