"""Attention split over batch and heads: XLA's own partitioning, and that of the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import AttentionConfig, api, mosaic_sm90, xla
from pallas_kernels.ops.attention import dot_product_attention as attention
from pallas_kernels.ops.attention.partition import partitioned
from pallas_kernels.ops.attention.spec import QUANTS, AttentionSpec

pytestmark = pytest.mark.multidevice
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SPEC = PartitionSpec("b", None, "h")


def mesh(batch, heads):
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: batch * heads]
    return jax.make_mesh((batch, heads), ("b", "h"), axis_types=auto, devices=devices)


def inputs(kv_heads, heads=8, length=32, batch=4):
    rng = np.random.default_rng(0)
    shape = lambda n: (batch, length, n, 8)  # noqa: E731
    return [
        jnp.asarray(rng.normal(size=shape(n)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    ]


def place(arrays, over, spec=SPEC):
    return [jax.device_put(x, NamedSharding(over, spec)) for x in arrays]


def collectives(step, *arrays):
    text = step.lower(*arrays).compile().as_text()
    return [name for name in COLLECTIVES if f"{name}(" in text or f"{name}-start(" in text]


@pytest.mark.parametrize(
    "kv_heads, options",
    [(8, {}), (4, dict(quant="sage2")), (4, dict(config=AttentionConfig(8)))],
    ids=["full", "gqa sage2", "gqa chunked"],
)
def test_jit_does_not_gather(kv_heads, options):
    over, plain = mesh(2, 4), inputs(kv_heads)
    placed = place(plain, over)

    def loss(*x):
        out = attention(*x, is_causal=True, **options)
        return (out**2).sum(), out

    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    assert collectives(step, *placed) == []
    grads, out = step(*placed)
    assert out.sharding.is_equivalent_to(NamedSharding(over, SPEC), 4)
    want_grads, want = step(*plain)
    for got, expected in zip((out, *grads), (want, *want_grads), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


# -- the wrapper of the kernels, around an implementation that the compiler cannot look into -------


def opaque(query, key, value, bias, sinks, mask, spec):
    """Stands for a kernel: sees only local arrays, and checks that the spec says so."""
    assert query.shape == (spec.batch, spec.q_len, spec.num_heads, spec.head_dim)
    assert key.shape == (spec.batch, spec.kv_len, spec.num_kv_heads, spec.head_dim)
    SEEN.append(query.shape)
    return xla.attention(query, key, value, bias, sinks, mask, spec)


SEEN = []
wrapped = partitioned(opaque)


def run(query, key, value, forward=wrapped, **arguments):
    call, spec, _ = api._prepare(query, key, value, **arguments)
    return forward(*call, spec)


@pytest.mark.parametrize(
    "kv_heads, kv_spec, spec, local",
    [
        (4, SPEC, SPEC, (2, 32, 2, 8)),
        (1, PartitionSpec("b"), SPEC, (2, 32, 2, 8)),
        (2, PartitionSpec(None, None, "b"), PartitionSpec(None, None, ("b", "h")), (4, 32, 1, 8)),
    ],
    ids=["gqa", "mqa", "more devices than kv heads"],
)
def test_wrapped_kernel_sees_its_own_part(kv_heads, kv_spec, spec, local):
    over, plain = mesh(2, 4), inputs(kv_heads)
    placed = place(plain[:1], over, spec) + place(plain[1:], over, kv_spec)
    step = jax.jit(functools.partial(run, is_causal=True))
    SEEN.clear()
    assert collectives(step, *placed) == []
    assert SEEN[-1] == local
    out, lse = step(*placed)
    want, want_lse = run(*plain, forward=xla.attention, is_causal=True)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)
    assert out.sharding.is_equivalent_to(NamedSharding(over, spec), 4)


def test_wrapped_kernel_with_everything():
    over, plain = mesh(2, 2), inputs(2, heads=4)
    rng = np.random.default_rng(1)
    arguments = dict(
        bias=jnp.asarray(rng.normal(size=(1, 4, 32, 32)), jnp.float32),
        mask=jnp.asarray(rng.random((4, 1, 1, 32)) < 0.8),
        sinks=jnp.asarray([0.0, 1.0, 2.0, -1.0]),
        segment_ids=jnp.asarray(np.sort(rng.integers(0, 3, (4, 32)), axis=1)),
        key_value_seq_lengths=jnp.asarray([32, 5, 0, 20]),
        causal_offset=jnp.asarray([0, 1, 2, 3]),
    )

    def step(q, k, v, arguments):
        return run(q, k, v, is_causal=True, quant="sage2", **arguments)

    out, lse = jax.jit(step)(*place(plain, over), arguments)
    want, want_lse = run(*plain, forward=xla.attention, is_causal=True, quant="sage2", **arguments)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_each_device_gets_its_own_lists_of_tiles():
    lists = (1, 4)  # shared by the batch
    over, plain = mesh(2, 2), inputs(2, heads=4)
    kept = jnp.asarray(np.random.default_rng(2).random((*lists, 4, 4)) < 0.6)
    mask = BlockMask.from_blocks(kept, 32, 32, block_q=8, block_kv=8, mask=Mask.causal(3))

    def listed(query, key, value, bias, sinks, mask, spec):
        want = tuple(min(x, y) for x, y in zip(lists, (2, 2), strict=True))
        assert spec.batch == 4 or mask.kv_indices.shape[:2] == want
        return xla.attention(query, key, value, bias, sinks, mask.as_mask(), spec)

    step = jax.jit(functools.partial(run, forward=partitioned(listed)))
    out, lse = step(*place(plain, over), mask=mask)
    want, want_lse = run(*plain, forward=xla.attention, mask=mask.as_mask())
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)


def test_heads_that_do_not_split_are_gathered():
    # 6 query heads over 2 devices: 3 each, but key/value heads come with 2 queries each.
    over, plain = mesh(1, 2), inputs(3, heads=6)
    placed = place(plain[:1], over) + place(plain[1:], over, PartitionSpec())
    out, _ = jax.jit(run)(*placed)
    np.testing.assert_allclose(out, run(*plain, forward=xla.attention)[0], atol=1e-6)


def test_wrapped_kernel_in_shard_map_eager_and_vmap():
    over, (q, k, v) = mesh(2, 2), inputs(2, heads=4)
    want = run(q, k, v, forward=xla.attention, is_causal=True)[0]
    causal = functools.partial(run, is_causal=True)
    np.testing.assert_allclose(causal(q, k, v)[0], want, atol=1e-6)
    split = jax.shard_map(causal, mesh=over, in_specs=(SPEC,) * 3, out_specs=(SPEC, SPEC))
    np.testing.assert_allclose(split(q, k, v)[0], want, atol=1e-6)
    lengths = jnp.asarray([[32, 5, 7, 1], [3, 2, 1, 0]])

    def one(q, n):
        return run(q, k, v, key_value_seq_lengths=n, mask=Mask.causal(n.min()))[0]

    both = jax.vmap(one)(jnp.stack([q, 2 * q]), lengths)
    for i in range(2):
        alone = run(
            (i + 1) * q, k, v, forward=xla.attention,
            key_value_seq_lengths=lengths[i], mask=Mask.causal(lengths[i].min()),
        )[0]  # fmt: skip
        np.testing.assert_allclose(both[i], alone, atol=1e-6)


TABLE = jnp.arange(32.0)[:, None, None]


def with_constant(query, key, value, bias, sinks, mask, spec):
    """Closes over an array, as a kernel with a table of its work does."""
    out, lse = xla.attention(query, key, value, bias, sinks, mask, spec)
    return out + TABLE, lse


def test_a_kernel_may_close_over_arrays():
    over, plain = mesh(2, 4), inputs(4)
    step = jax.jit(functools.partial(run, forward=partitioned(with_constant)))
    placed = place(plain, over)
    assert collectives(step, *placed) == []
    want = run(*plain, forward=with_constant)[0]
    np.testing.assert_allclose(step(*placed)[0], want, rtol=1e-6, atol=1e-5)
    several = jax.vmap(step)(*(x[:, None] for x in plain))[0]
    np.testing.assert_allclose(several[:, 0], want, rtol=1e-6, atol=1e-5)


def test_the_hopper_kernel_does_not_gather():
    """Compiled only: NumPy in the place of the kernels cannot be called inside a partition."""
    rng = np.random.default_rng(0)
    plain = [jnp.asarray(rng.normal(size=(2, 40, n, 64)), jnp.bfloat16) for n in (4, 2, 2)]
    spec = AttentionSpec(2, 40, 40, 4, 2, 64, "bfloat16", 0.125, quant=QUANTS["sage2"])

    def step(*x):
        return mosaic_sm90.attention(*x, None, None, Mask.causal(), spec)

    with warpgroup.installed():
        assert collectives(jax.jit(step), *place(plain, mesh(2, 2))) == []
