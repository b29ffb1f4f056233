"""Attention over listed tiles: against the dense oracle, and what it must not touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import QUANTS, BlockMask, Mask, explain, testing
from pallas_kernels import dot_product_attention as attention
from pallas_kernels.ops.attention import AttentionConfig, sparse
from pallas_kernels.ops.attention.api import spec_of

B, T, S, N, K, H = 2, 21, 19, 4, 2, 8
TILES = {"block_q": 8, "block_kv": 4}


def qkv(t=T, s=S, n=N, k=K, h=H, b=B, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@functools.cache
def block_masks():
    rng = np.random.default_rng(1)
    kept = jnp.asarray(rng.random((B, N, 3, 5)) < 0.6).at[0, :2, 1].set(False)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)))), jnp.arange(S)[None].repeat(B, 0) // 7
    make = functools.partial(BlockMask.from_blocks, q_len=T, kv_len=S, **TILES)
    return {
        "causal": make(kept, mask=Mask.causal(2)),
        "segments": make(kept[:, :1], mask=Mask.segment_ids(*ids)),
        "heads": BlockMask.from_predicate(
            lambda b, n, t, s: (t + s + n + b) % 3 > 0, T, S, batch=B, num_heads=N, **TILES
        ),
        "union": make(kept, mask=Mask.causal()) | make(~kept, mask=Mask.window(2, 2)),
    }


@pytest.mark.parametrize("way", ["reference", "xla", "chunks", "tiles"])
def test_nan_in_tokens_that_only_two_rules_together_leave_out(way):
    """Rows 0 and 1 may see late keys only, and these no row above 8: causality leaves nothing."""
    t, s = jnp.arange(T)[:, None], jnp.arange(S)
    rule = jnp.where(t < 2, s >= 12, (s < 12) | (t < 8))
    dense = rule & (s <= t)
    q, k, v = qkv(seed=3)
    bad = q.at[:, :2].set(jnp.nan), k.at[:, 12:].set(jnp.nan), v.at[:, 12:].set(jnp.nan)
    options = {"mask": BlockMask.from_dense(rule, **TILES) if way == "tiles" else rule[None]}
    options |= {"implementation": "reference" if way == "reference" else "xla"}
    options |= {"config": AttentionConfig(block_kv=8) if way == "chunks" else None}

    def grad(arrays, **rules):
        run = lambda *x: (attention(*x, logits_soft_cap=2.0, **rules) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(run, (0, 1, 2))(*arrays)

    want = grad((q, k, v), mask=dense[None], implementation="reference")
    got = grad(bad, is_causal=True, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("name", ["causal", "segments", "heads", "union"])
def test_forward_and_gradient_against_the_oracle(name):
    arrays, mask = qkv(), block_masks()[name]
    sinks = jnp.array([0.1, -0.5, 1.0, 0.0]) if name == "causal" else None
    cap = 2.0 if name == "segments" else None

    def run(implementation):
        def loss(*x):
            out, lse = attention(
                *x, mask=mask, sinks=sinks, logits_soft_cap=cap, implementation=implementation,
                return_residual=True,
            )  # fmt: skip
            real = jnp.isfinite(lse)
            return (jnp.sin(out)).sum() + jnp.where(real, jnp.cos(lse), 0).sum(), (out, lse)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    ((_, (out, lse)), grads), ((_, (want, want_lse)), want_grads) = run("xla"), run("reference")
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=4e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    if name == "segments":  # a row of tiles without tiles
        assert (out[0, 8:16] == 0).all() and jnp.isneginf(lse[0, 8:16]).all()


@pytest.mark.parametrize("variant", ["sage2", "sage2_int4"])
def test_quantised_variants_against_the_oracle(variant):
    """Equal tiles of keys: P is rounded against the same running maximum."""
    quant = dataclasses.replace(QUANTS[variant], block_kv=16, block_q=32, warp_q=16)
    kept = jnp.asarray(np.random.default_rng(2).random((1, N, 3, 3)) < 0.6)
    mask = BlockMask.from_blocks(kept, 40, 45, block_q=16, block_kv=16, mask=Mask.causal(3))
    run = functools.partial(attention, *qkv(40, 45), mask=mask, quant=quant, return_residual=True)
    (out, lse), (want, want_lse) = run(implementation="xla"), run(implementation="reference")
    # Rounding flips of P: one part in 448 of a value now and then.
    assert testing.relative_l1(out, want) < 1e-3
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


def test_gradient_against_finite_differences():
    arrays = tuple(x[:1, :, :2] for x in qkv())
    arrays = arrays[0], arrays[1][:, :, :1], arrays[2][:, :, :1]
    kept = block_masks()["causal"].to_blocks()[:1, :2]
    mask = BlockMask.from_blocks(kept, T, S, mask=Mask.causal(2), **TILES)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=arrays[0].shape), jnp.float32)
    f = jax.jit(lambda *x: attention(*x, mask=mask, implementation="xla") * weight)
    grads = jax.jit(jax.grad(lambda *x: f(*x).sum(), (0, 1, 2)))(*arrays)
    rng = np.random.default_rng(4)
    for i, grad in enumerate(grads):
        step = jnp.asarray(rng.normal(size=grad.shape), jnp.float32)
        moved = [
            np.asarray(f(*(x + e * step if j == i else x for j, x in enumerate(arrays))), float)
            for e in (1e-2, -1e-2)
        ]
        np.testing.assert_allclose(
            (moved[0] - moved[1]).sum() / 2e-2, (grad * step).sum(), rtol=2e-3
        )


def test_tiles_that_a_row_does_not_list_are_not_multiplied():
    """NaN times a probability of zero is NaN, so a dense product would spread it to every row."""
    q, k, v = qkv(b=1)
    kept = jnp.ones((3, 5), bool).at[1:, 2].set(False)  # tile 2 of the keys: row 0 only
    mask = BlockMask.from_blocks(kept, T, S, **TILES)
    bad = slice(8, 12)
    args = q, k.at[:, bad].set(jnp.nan), v.at[:, bad].set(jnp.nan)
    out = attention(*args, mask=mask, implementation="xla")
    assert jnp.isnan(out[:, :8]).all() and jnp.isfinite(out[:, 8:]).all()
    dq = jax.grad(lambda *x: attention(*x, mask=mask, implementation="xla")[:, 8:].sum())(*args)
    assert jnp.isfinite(dq[:, 8:]).all()


def test_steps_follow_the_lists():
    """Rows are sorted by length: the number of tile products is that of the lists, not of nk."""
    steps = []
    kept = jnp.zeros((1, 1, 64, 64), bool).at[..., 0].set(True).at[0, 0, :16].set(True)
    mask = BlockMask.from_blocks(kept, 64, 64, block_q=1, block_kv=1)
    spec = spec_of(*qkv(64, 64, 1, 1, b=1), mask=mask)

    def step(state, own, i, j, turn):
        jax.debug.callback(lambda: steps.append(1))
        return state + turn[0]

    start = lambda own: jnp.zeros(own.shape[:4], jnp.int32)  # noqa: E731
    found = sparse._walk(mask, spec, jnp.zeros((1, 1, 1, 64, 1)), start, step)
    jax.effects_barrier()
    np.testing.assert_array_equal(found[0, 0, 0], mask.kv_num_blocks[0, 0])
    assert sparse._TILES_AT_ONCE == 16 and len(steps) == 64 + 3  # 16 rows at once


def test_second_stage_skips_products_with_v():
    """Against the loop written out: a skipped tile joins neither the sum nor the output."""
    q, k, v = qkv(16, 24, 2, 1, b=1)
    q, k = q + 2, k.at[:, :4].add(1.0)  # the first tile of keys draws all queries
    kept = np.random.default_rng(5).random((1, 2, 2, 6)) < 0.8
    kept[..., 0] = True
    mask = BlockMask.from_blocks(jnp.asarray(kept), 16, 24, **TILES)
    limits = jnp.array([2.0, 50.0])
    spec = spec_of(q, k, v, mask=mask)
    got = jax.jit(sparse.attention, static_argnums=5)(q, k, v, None, mask, spec, limits)
    out, skipped = np.zeros(q.shape), np.zeros((1, 2), int)
    for n in range(2):
        for i in range(2):
            rows = slice(8 * i, 8 * i + 8)
            m, l, acc = np.full(8, -np.inf), np.zeros(8), np.zeros((8, H))
            tiles = np.flatnonzero(kept[0, n, i])
            for j in tiles:
                cols = slice(4 * j, 4 * j + 4)
                x = np.asarray(q[0, rows, n] @ k[0, cols, 0].T) / np.sqrt(H)
                rise = (x.max(1) - m).max() * np.log2(np.e)
                new = np.maximum(m, x.max(1))
                l, acc, m = l * np.exp(m - new), acc * np.exp(m - new)[:, None], new
                if rise + limits[n] > 0 or j == tiles[-1]:
                    p = np.exp(x - m[:, None])
                    l, acc = l + p.sum(1), acc + p @ np.asarray(v[0, cols, 0])
                else:
                    skipped[0, n] += 1
            out[0, rows, n] = acc / np.where(l > 0, l, 1)[:, None]
    assert skipped[0, 0] > 0 and skipped[0, 1] == 0
    np.testing.assert_array_equal(got.skipped, skipped)
    np.testing.assert_allclose(got.out, out, atol=1e-4)


def test_vmap_and_devices():
    q, k, v = qkv()
    mask = block_masks()["causal"]
    want = attention(q, k, v, mask=mask, implementation="xla")
    run = lambda q, k, v, kept: attention(  # noqa: E731
        q, k, v, implementation="xla",
        mask=BlockMask.from_blocks(kept, T, S, mask=Mask.causal(2), **TILES),
    )  # fmt: skip
    kept = mask.to_blocks()
    np.testing.assert_allclose(jax.vmap(run)(q, k, v, kept), want, atol=1e-6)
    mesh = jax.make_mesh((2, 2), ("b", "n"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_head, by_tile = jax.P("b", None, "n"), jax.P("b", "n")
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
    split = [put(x, by_head) for x in (q, k, v)] + [put(kept, by_tile)]
    np.testing.assert_allclose(jax.jit(run)(*split), want, atol=1e-6)
    local = jax.shard_map(
        run, mesh=mesh, in_specs=(by_head,) * 3 + (by_tile,), out_specs=by_head
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(local)(*split), want, atol=1e-6)


def test_bias_and_explain():
    q, k, v = qkv()
    mask, bias = block_masks()["causal"], jnp.ones((1, 1, T, S))
    want = attention(q, k, v, mask=mask, bias=bias, implementation="reference")
    np.testing.assert_allclose(
        attention(q, k, v, bias, mask, implementation="xla"), want, atol=2e-6
    )
    (note,) = explain("attention", q, k, v, bias, mask, implementation="xla").notes
    assert "tiles that the BlockMask skips are computed" in note
    with pytest.raises(
        NotImplementedError, match="block_kv of the BlockMask must be a multiple of 16"
    ):
        attention(q, k, v, mask=mask, quant="sage3", implementation="xla")
    wrong = BlockMask.from_blocks(jnp.ones((3, 3, 5)), T, S, **TILES)
    with pytest.raises(ValueError, match="batch 1 or 2 and heads 1 or 4"):
        attention(q, k, v, mask=wrong)


# -- leaks ---------------------------------------------------------------------------------------


def _builders(t):
    rule = lambda q, k: (k <= q) & ((q - k < 5) | (k < 2))  # noqa: E731
    scores = jnp.asarray(np.random.default_rng(6).normal(size=(3, 6)), jnp.float32)
    make = {**TILES, "mask": Mask.causal()}
    dense = jnp.asarray(np.tril(np.random.default_rng(7).random((t, t)) < 0.5))
    return {
        "mask": BlockMask.from_mask(Mask.causal() & Mask.window(9, 0), t, t, **TILES),
        "dense": BlockMask.from_dense(dense, **TILES),
        "predicate": BlockMask.from_predicate(rule, t, t, **TILES),
        "topk": BlockMask.from_scores(scores, t, t, topk=0.5, **make),
        "cdf": BlockMask.from_scores(scores, t, t, cdf=0.6, **make),
        "bsr": BlockMask.from_bsr(
            jnp.array([0, 2, 5, 8]), jnp.array([1, 0, 0, 1, 3, 2, 4, 5]), t, t, **make
        ),
        "blocks": BlockMask.from_blocks(jnp.ones((3, 6)), t, t, **make),
    }


LEAK_T = 24
PER_BLOCK = dataclasses.replace(
    QUANTS["sage2"], granularity="per_block", block_q=8, block_kv=4, warp_q=1
)
LEAK_WAYS = ("xla", "reference", "xla/sage2", "xla/sage_bwd")


@functools.cache
def _leak_runner(way):
    implementation = way.partition("/")[0]
    quant = PER_BLOCK if way == "xla/sage2" else None
    if way == "xla/sage_bwd":
        quant = dataclasses.replace(QUANTS["sage_bwd"], block_q=8, block_kv=4, warp_q=1)
    # A mask as an array of tiles and a token rule of the same structure: one program for all.
    run = lambda q, k, v, kept, dense: attention(  # noqa: E731
        q, k, v, implementation=implementation, quant=quant,
        mask=BlockMask.from_blocks(
            kept, LEAK_T, LEAK_T, mask=Mask.from_array(dense), **TILES
        ),
    )  # fmt: skip
    return jax.jit(run)


@functools.cache
def _leak_masks():
    return {name: (m.to_blocks(), m.to_dense()) for name, m in _builders(LEAK_T).items()}


@pytest.mark.parametrize("way", LEAK_WAYS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_future_tokens_never_change_an_output(way, data):
    """Float: any change. Quantised: the scales and the mean key are shared, so the future tokens of
    a tile change places, which leaves these exactly as they are (whole numbers add up exactly)."""
    name = data.draw(st.sampled_from(sorted(_leak_masks())))
    now = data.draw(st.integers(0, LEAK_T - 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    q, k, v = (
        rng.integers(-9, 10, (1, LEAK_T, heads, H)).astype(np.float32) for heads in (2, 1, 1)
    )
    later_k, later_v = k.copy(), v.copy()
    if "/" in way:
        for start in range(0, LEAK_T, 4):
            future = np.arange(max(start, now + 1), start + 4)
            order = rng.permutation(future)
            later_k[:, future], later_v[:, future] = k[:, order], v[:, order]
    else:
        later_k[:, now + 1 :] = rng.normal(size=later_k[:, now + 1 :].shape) * 50
        later_v[:, now + 1 :] = rng.normal(size=later_v[:, now + 1 :].shape) * 50
    run, mask = _leak_runner(way), _leak_masks()[name]
    before, after = run(q, k, v, *mask), run(q, later_k, later_v, *mask)
    np.testing.assert_array_equal(before[:, : now + 1], after[:, : now + 1])


@pytest.mark.parametrize("name", ["predicate", "topk"])
def test_future_tokens_with_the_builders_own_rules(name):
    """The same through each builder's own token rule rather than a dense copy of it."""
    mask = _builders(LEAK_T)[name]
    q, k, v = qkv(LEAK_T, LEAK_T, b=1)
    run = jax.jit(lambda k, v: attention(q, k, v, mask=mask, implementation="xla"))
    for now in (3, 12):
        after = run(k.at[:, now + 1 :].add(9.0), v.at[:, now + 1 :].mul(-7.0))
        np.testing.assert_array_equal(run(k, v)[:, : now + 1], after[:, : now + 1])
