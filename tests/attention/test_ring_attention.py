"""Ring attention equals unsharded attention; merging partial results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.ops.attention import AttentionConfig
from pallas_kernels.ops.attention import dot_product_attention as attention
from pallas_kernels.ops.attention.ring import merge, ring_attention
from pallas_kernels.testing import relative_l1

B, L, N, K, H = 2, 64, 4, 2, 16
SEQ = P(None, "seq")
CASES = {
    "plain": {},
    "causal": dict(is_causal=True),
    "chunked window": dict(local_window_size=(20, 3), causal_offset=-5, config=AttentionConfig(8)),
    "segments": dict(segment_ids=True),
    "all": dict(
        is_causal=True,
        segment_ids=True,
        key_value_seq_lengths=[40, 3],
        query_seq_lengths=[64, 17],
        logits_soft_cap=5.0,
        sinks=[0.5, -1.0, 2.0, 0.0],
    ),
}


def mesh(devices=4):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("seq",), axis_types=auto, devices=jax.devices()[:devices])


def inputs(dtype=jnp.float32, heads=K):
    rng = np.random.default_rng(0)
    shapes = ((B, L, N, H), (B, L, heads, H), (B, L, heads, H), (B, L, N, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def arguments(case):
    case = dict(case)
    if case.pop("segment_ids", False):
        # Lengths that no device boundary respects; batch entry 1 ends with padding of its own.
        case["segment_ids"] = jnp.asarray(
            [np.repeat([0, 1, 2], [10, 30, 24]), np.repeat([0, 1, 7], [33, 20, 11])], jnp.int32
        )
    for name in ("key_value_seq_lengths", "query_seq_lengths", "sinks"):
        if name in case:
            case[name] = jnp.asarray(case[name])
    return case


def sharded(case, devices=4, residual=False):
    """The ring on global arrays: everything with a sequence axis is split."""
    arrays = {
        k: v for k, v in case.items() if k in ("segment_ids", "sinks") or k.endswith("_lengths")
    }
    static = {k: v for k, v in case.items() if k not in arrays}
    specs = {k: SEQ if k == "segment_ids" else P() for k in arrays}

    def local(q, k, v, arrays):
        return ring_attention(
            q, k, v, axis_name="seq", return_residual=residual, **static, **arrays
        )

    out = (SEQ, SEQ) if residual else SEQ
    ring = jax.shard_map(local, mesh=mesh(devices), in_specs=(SEQ, SEQ, SEQ, specs), out_specs=out)
    return lambda q, k, v: ring(q, k, v, arrays)


@pytest.mark.multidevice
@pytest.mark.parametrize("name", CASES)
def test_ring_equals_unsharded(name):
    case = arguments(CASES[name])
    q, k, v, g = inputs()

    def loss(attend):
        def run(q, k, v):
            out, lse = attend(q, k, v)
            # The log-sum-exp takes part, so that its gradient is tested too.
            finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return (out * g).sum() + (finite**2).sum(), (out, lse)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))

    whole = functools.partial(attention, return_residual=True, **case)
    (_, (out, lse)), grads = loss(sharded(case, residual=True))(q, k, v)
    (_, (want, want_lse)), want_grads = loss(whole)(q, k, v)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.multidevice
def test_gradient_of_sinks():
    q, k, v, g = (x[:1, :8] for x in inputs())
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])

    def local(q, k, v, s):
        return ring_attention(q, k, v, axis_name="seq", sinks=s)

    ring = jax.shard_map(local, mesh=mesh(2), in_specs=(SEQ, SEQ, SEQ, P()), out_specs=SEQ)
    got = jax.jit(jax.grad(lambda s: (ring(q, k, v, s) * g).sum()))(sinks)
    want = jax.jit(jax.grad(lambda s: (attention(q, k, v, sinks=s) * g).sum()))(sinks)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.multidevice
@pytest.mark.parametrize("quant", ["sage2", "sage3"])
def test_quantised_ring(quant):
    case = dict(is_causal=True, quant=quant)
    q, k, v, g = inputs()
    out, lse = jax.jit(sharded(case, 2, residual=True))(q, k, v)
    exact, exact_lse = attention(q, k, v, is_causal=True, return_residual=True)
    whole, whole_lse = attention(q, k, v, return_residual=True, **case)
    # Scales come from each chunk: the error is the variant's own, not larger.
    assert relative_l1(out, exact) < 1.25 * relative_l1(whole, exact)
    assert float(abs(lse - exact_lse).max()) < 2 * float(abs(whole_lse - exact_lse).max())


@pytest.mark.multidevice
def test_quantised_gradient_is_that_of_the_whole_sequence():
    q, k, v, g = inputs()
    ring = sharded(dict(is_causal=True, quant="sage2"), 2)
    whole = functools.partial(attention, is_causal=True)
    got, want = (
        jax.jit(jax.grad(lambda *x, f=f: (f(*x) * g).sum(), (0, 1, 2)))(q, k, v)
        for f in (ring, whole)
    )
    for a, b in zip(got, want, strict=True):
        assert relative_l1(a, b) < 0.05


@pytest.mark.multidevice
def test_keys_are_never_gathered_and_not_kept():
    q, k, v, g = inputs()
    ring = sharded(dict(is_causal=True))
    step = jax.jit(jax.grad(lambda *x: (ring(*x) * g).sum(), (0, 1, 2)))
    placed = [jax.device_put(x, jax.NamedSharding(mesh(), SEQ)) for x in (q, k, v)]
    text = step.lower(*placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "collective-permute" in text


@pytest.mark.multidevice
def test_bfloat16_eight_devices_one_key_head():
    q, k, v, _ = inputs(jnp.bfloat16, heads=1)
    out = jax.jit(sharded(dict(is_causal=True), 8))(q, k, v)
    want = attention(*(x.astype(jnp.float32) for x in (q, k, v)), is_causal=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=2e-2)


def test_ring_needs_its_axis():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="'seq' is not a mesh axis in scope"):
        ring_attention(q, k, v, axis_name="seq")
    with pytest.raises(ValueError, match=r"query must have four axes .* got shape \(64, 4, 16\)"):
        ring_attention(q[0], k, v, axis_name="seq")


def test_merge_of_halves_is_the_whole():
    q, k, v, g = inputs()

    def halves(q, k, v):
        parts = [
            attention(q, k[:, i], v[:, i], return_residual=True)
            for i in (slice(0, 20), slice(20, 64))
        ]
        return merge(*zip(*parts, strict=True))

    whole = functools.partial(attention, return_residual=True)
    for got, want in zip(halves(q, k, v), whole(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)

    def loss(attend):
        both = lambda *x: (attend(*x)[0] * g).sum() + attend(*x)[1].sum()  # noqa: E731
        return jax.jit(jax.grad(both, (0, 1, 2)))

    for got, want in zip(loss(halves)(q, k, v), loss(whole)(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_merge_by_hand():
    # Weights 1 : 3, so O = (1 * 4 + 3 * 8) / 4 = 7 and l = log 4.
    out, lse = merge(jnp.asarray([[[4.0]], [[8.0]]]), jnp.log(jnp.asarray([[1.0], [3.0]])))
    np.testing.assert_allclose(out, [[7.0]], rtol=1e-6)
    np.testing.assert_allclose(lse, np.log([4.0]), rtol=1e-6)


def test_merge_of_empty_parts():
    inf = jnp.full((1,), -jnp.inf)
    garbage, good = jnp.full((1, 2), jnp.nan), jnp.ones((1, 2))
    out, lse = merge([garbage, good], [inf, jnp.asarray([700.0])])
    assert out.tolist() == [[1.0, 1.0]] and float(lse[0]) == 700.0
    out, lse = merge([garbage, garbage], [inf, inf])
    assert out.tolist() == [[0.0, 0.0]] and jnp.isneginf(lse).all()
    grads = jax.grad(lambda o, l: merge([o, good], [l, l])[0].sum(), (0, 1))(good, inf)
    assert all(bool((g == 0).all()) for g in grads)


def test_merge_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="got 2 outputs and 1 lses"):
        merge([jnp.ones((1, 2))] * 2, [jnp.ones(1)])
    with pytest.raises(ValueError, match=r"part 0 has output shape \(1, 2\) .* shape \(1, 2\)"):
        merge([jnp.ones((1, 2))], [jnp.ones((1, 2))])
