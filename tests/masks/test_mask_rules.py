"""Masks against rules written out pair by pair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.masks import EMPTY, FULL, BlockMask, Mask

B = 2
SETTINGS = settings(max_examples=15, deadline=None)


@st.composite
def cases(draw):
    """A mask built from some rules, and the same pairs computed one by one with NumPy."""
    # Few distinct sizes: every new shape is compiled anew.
    t, s = draw(st.sampled_from([(1, 1), (5, 9), (9, 5)]))
    row, col = np.arange(t)[:, None], np.arange(s)
    allowed = np.ones((B, 1, t, s), bool)
    mask = Mask()
    small = st.integers(-3, 9)
    if draw(st.booleans()):
        offset = draw(small)
        mask, allowed = mask & Mask.causal(offset), allowed & (col <= row + offset)
    if draw(st.booleans()):
        offsets = np.array([draw(small), draw(small)])
        mask &= Mask.causal(jnp.asarray(offsets))
        allowed = allowed & (col <= row + offsets[:, None, None, None])
    if draw(st.booleans()):
        left, right = draw(st.integers(0, 4)), draw(st.integers(0, 4) | st.none())
        mask &= Mask.window(left, right, 1)
        allowed = allowed & (col >= row + 1 - left)
        allowed = allowed if right is None else allowed & (col <= row + 1 + right)
    if draw(st.booleans()):
        lengths = np.array([draw(st.integers(0, s)), draw(st.integers(0, s))])
        mask &= Mask.lengths(kv_lengths=jnp.asarray(lengths))
        allowed = allowed & (col < lengths[:, None, None, None])
    if draw(st.booleans()):
        lengths = np.array([draw(st.integers(0, t)), draw(st.integers(0, t))])
        mask &= Mask.lengths(q_lengths=jnp.asarray(lengths))
        allowed = allowed & (row < lengths[:, None, None, None])
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        q_ids, kv_ids = np.sort(rng.integers(0, 3, (B, t))), np.sort(rng.integers(0, 3, (B, s)))
        mask &= Mask.segment_ids(jnp.asarray(q_ids), jnp.asarray(kv_ids))
        allowed = allowed & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    if draw(st.booleans()):
        array = rng.random((B, 3, t, s)) < 0.6
        mask, allowed = mask & Mask.from_array(jnp.asarray(array)), allowed & array
    if draw(st.booleans()):
        mask, allowed = mask & Mask.from_predicate(_diagonals), allowed & _diagonals(row, col)
    if draw(st.booleans()):
        mask &= Mask.causal() | Mask.window(None, 0, 4)
        allowed = allowed & ((col <= row) | (col <= row + 4))
    return mask, allowed, t, s


def _diagonals(t, s):
    return (t - s) % 3 != 0


def _jit(function, *arrays):
    """The function as one program: op by op, every example would compile dozens."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arrays))


@SETTINGS
@given(cases())
def test_dense_and_transpose(case):
    mask, allowed, t, s = case
    got, other = _jit(lambda m: (m.dense(t, s), m.transpose().dense(s, t)), mask)
    np.testing.assert_array_equal(np.broadcast_to(got, allowed.shape), allowed)
    other = np.swapaxes(other, 2, 3)
    np.testing.assert_array_equal(np.broadcast_to(other, allowed.shape), allowed)


@SETTINGS
@given(cases())
def test_blocks_of_tokens_equal_parts_of_the_whole(case):
    mask, allowed, t, s = case
    rows, cols = jnp.arange(0, t, 2), jnp.arange(s - 1, s + 3)
    got = _jit(lambda m: m.block(rows, cols, t, s), mask)
    want = np.pad(allowed, ((0, 0), (0, 0), (0, 0), (0, 4)))[:, :, ::2, s - 1 : s + 3]
    np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@SETTINGS
@given(cases(), st.sampled_from([(2, 4), (3, 2)]))
def test_tile_status_is_safe(case, blocks):
    """A tile called empty holds no allowed pair; a tile called full holds no forbidden one."""
    mask, allowed, t, s = case
    bq, bk = blocks
    status = _jit(lambda m: m.tile_status(t, s, bq, bk), mask)
    status = np.repeat(np.repeat(status, bq, 2), bk, 3)[:, :, :t, :s]
    status, allowed = np.broadcast_arrays(status, allowed)
    assert not allowed[status == EMPTY].any()
    assert allowed[status == FULL].all()


@SETTINGS
@given(cases())
def test_live_tokens_are_never_called_dead(case):
    mask, allowed, t, s = case
    keys, queries = _jit(lambda m: (m.live_keys(t, s), m.live_queries(t, s)), mask)
    for live, axis in ((keys, 2), (queries, 3)):
        some = allowed.any(axis)
        if live is None:
            continue  # nothing is claimed
        assert np.broadcast_to(live, some.shape)[some].all()


@SETTINGS
@given(cases(), st.sampled_from([(2, 4), (3, 2)]))
def test_block_mask_keeps_every_pair(case, blocks):
    mask, allowed, t, s = case
    sizes = {"block_q": blocks[0], "block_kv": blocks[1]}

    def build(mask, allowed):
        block_mask = BlockMask.from_mask(mask, t, s, **sizes)
        again = BlockMask.from_dense(allowed, **sizes).to_dense()
        return block_mask.to_dense(), again, block_mask.kv_num_blocks, block_mask.kv_indices

    got, again, counts, lists = _jit(build, mask, allowed)
    np.testing.assert_array_equal(np.broadcast_to(got, allowed.shape), allowed)
    np.testing.assert_array_equal(again, allowed)
    for where in np.ndindex(counts.shape):
        listed = lists[where][: counts[where]]
        assert (np.diff(listed) > 0).all() and (lists[where][counts[where] :] == 0).all()


@SETTINGS
@given(cases())
def test_single_pairs_equal_parts_of_the_whole(case):
    mask, allowed, t, s = case
    rng = np.random.default_rng(0)
    b, n = rng.integers(0, B, 20), rng.integers(0, allowed.shape[1], 20)
    i, j = rng.integers(0, t, 20), rng.integers(0, s + 3, 20)
    want = np.pad(allowed, ((0, 0), (0, 0), (0, 0), (0, 3)))[b, n, i, j]
    got = _jit(lambda m: m.at(b, n, i, j, t, s), mask)
    np.testing.assert_array_equal(np.broadcast_to(got, 20), want)


def _random_blocks(seed, **arguments):
    kept = np.random.default_rng(seed).random((B, 2, 3, 5)) < 0.5
    return kept, BlockMask.from_blocks(
        jnp.asarray(kept), 20, 18, block_q=8, block_kv=4, **arguments
    )


def test_union_intersection_and_transpose():
    (_, a), (_, b) = _random_blocks(0, mask=Mask.causal(4)), _random_blocks(1)
    dense = np.asarray(a.to_dense()), np.asarray(b.to_dense())
    np.testing.assert_array_equal((a & b).to_dense(), dense[0] & dense[1])
    np.testing.assert_array_equal((a | b).to_dense(), dense[0] | dense[1])
    np.testing.assert_array_equal(
        (b & Mask.window(3, 3)).to_dense(), dense[1] & Mask.window(3, 3).dense(20, 18)
    )
    turned = a.transpose()
    np.testing.assert_array_equal(turned.to_dense(), dense[0].swapaxes(2, 3))
    np.testing.assert_array_equal(turned.transpose().to_status(), a.to_status())
    assert (turned.q_len, turned.block_q) == (18, 4)
    other = BlockMask.from_mask(Mask.causal(), 20, 18, block_q=4, block_kv=4)
    with pytest.raises(ValueError, match="both block masks must have the same"):
        a & other


def test_bsr_round_trip_also_under_jit():
    kept, blocks = _random_blocks(2)
    indptr, indices = blocks.to_bsr()
    np.testing.assert_array_equal(np.diff(indptr), kept.sum(-1))
    assert indices.shape[-1] == kept.sum((2, 3)).max()
    sizes = {"q_len": 20, "kv_len": 18, "block_q": 8, "block_kv": 4}
    again = jax.jit(lambda m: BlockMask.from_bsr(*m.to_bsr(size=15), **sizes).to_blocks())(blocks)
    np.testing.assert_array_equal(again, kept)
    with pytest.raises(ValueError, match="to_bsr needs size under jit"):
        jax.jit(lambda m: m.to_bsr())(blocks)
    with pytest.raises(ValueError, match="size must be at least"):
        blocks.to_bsr(size=1)
    with pytest.raises(ValueError, match=r"indptr must be \[.., 4\]"):
        BlockMask.from_bsr(jnp.zeros(3, int), jnp.zeros(2, int), **sizes)


def test_scores_keep_the_best_and_at_least_one():
    scores = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]))
    make = functools.partial(BlockMask.from_scores, scores, 4, 8, block_q=2, block_kv=2)
    # cumulative .5 .8 .95 1 and .4 .7 .9 1
    np.testing.assert_array_equal(make(cdf=0.85).to_blocks()[0, 0], [[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(make(cdf=0.1).to_blocks()[0, 0], [[1, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(make(topk=0.75).to_blocks()[0, 0], [[1, 1, 1, 0], [0, 1, 1, 1]])
    assert make(cdf=1.0).to_blocks().all() and make(topk=1.0).to_blocks().all()
    causal = make(topk=0.5, mask=Mask.causal()).to_blocks()[0, 0]
    np.testing.assert_array_equal(causal, [[1, 0, 0, 0], [1, 1, 0, 0]])
    per_head = jnp.broadcast_to(scores, (2, 2, 4))
    got = BlockMask.from_scores(per_head, 4, 8, block_q=2, block_kv=2, topk=jnp.array([0.25, 0.5]))
    np.testing.assert_array_equal(got.kv_num_blocks[0], [[1, 1], [2, 2]])


def test_predicate_per_head_and_its_refusals():
    rule = lambda b, n, t, s: (s <= t) & (t - s <= 2 * n + b)  # noqa: E731
    mask = BlockMask.from_predicate(rule, 20, 18, batch=B, num_heads=3, block_q=8, block_kv=4)
    grid = np.ogrid[:B, :3, :20, :18]
    np.testing.assert_array_equal(mask.to_dense(), rule(*grid))
    assert mask.kv_num_blocks.shape == (B, 3, 3)
    with pytest.raises(ValueError, match="predicate must be a function"):
        Mask.from_predicate(3)
    with pytest.raises(ValueError, match="predicate must return booleans; got int32"):
        BlockMask.from_predicate(lambda t, s: t - s, 4, 4)


def test_a_predicate_needs_no_array_of_all_pairs():
    """Building lists for 2048 x 2048 tokens touches 128 rows of queries at a time."""
    trace = jax.make_jaxpr(lambda: BlockMask.from_predicate(_diagonals, 2048, 2048).kv_indices)()

    def largest(jaxpr):
        inner = [p for eqn in jaxpr.eqns for p in eqn.params.values()]
        inner = [getattr(p, "jaxpr", p) for p in inner]
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        return max([*sizes, *(largest(p) for p in inner if hasattr(p, "eqns")), 0])

    assert largest(trace.jaxpr) <= 128 * 2048


def test_static_tiles_are_exact_for_causal():
    status = np.asarray(Mask.causal().tile_status(8, 8, 4, 4))[0, 0]
    np.testing.assert_array_equal(status, [[1, 0], [2, 1]])


def test_from_blocks_round_trip_and_tail():
    kept = np.random.default_rng(0).random((1, 2, 3, 5)) < 0.5
    blocks = BlockMask.from_blocks(jnp.asarray(kept), 20, 18, block_q=8, block_kv=4)
    np.testing.assert_array_equal(blocks.to_blocks(), kept)
    want = np.repeat(np.repeat(kept, 8, 2), 4, 3)[:, :, :20, :18]
    np.testing.assert_array_equal(blocks.to_dense(), want)
    causal = BlockMask.from_blocks(
        jnp.asarray(kept), 20, 18, block_q=8, block_kv=4, mask=Mask.causal()
    )
    np.testing.assert_array_equal(
        causal.to_dense(), want & (np.arange(18) <= np.arange(20)[:, None])
    )


def test_pytrees_pass_through_jit_and_vmap():
    mask = Mask.causal(2) & Mask.lengths(kv_lengths=jnp.array([2, 3]))
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 1  # the integer bound is static
    assert jax.tree.unflatten(tree, leaves).max_diff == 2
    got = jax.jit(lambda m: m.dense(3, 4))(mask)
    np.testing.assert_array_equal(got, mask.dense(3, 4))
    each = jax.vmap(lambda n: Mask.lengths(kv_lengths=n[None]).dense(3, 4)[0])(jnp.array([2, 3]))
    np.testing.assert_array_equal(
        each, Mask.lengths(kv_lengths=jnp.array([2, 3])).dense(3, 4) & jnp.ones((1, 1, 3, 1), bool)
    )
    blocks = jax.jit(lambda m: BlockMask.from_mask(m, 8, 8, block_q=4, block_kv=4))(Mask.causal())
    assert blocks.grid == (2, 2) and abs(float(blocks.sparsity()) - 0.25) < 1e-6


def _scored(**share):
    return BlockMask.from_scores(jnp.zeros((2, 2)), 8, 8, block_q=4, block_kv=4, **share)


def _rows(indptr, indices):
    pair = jnp.asarray(indptr), jnp.asarray(indices)
    return BlockMask.from_bsr(*pair, 8, 8, block_q=4, block_kv=4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mask.window(-1, 0), "left must be >= 0 tokens; got -1"),
        (lambda: Mask.lengths(jnp.zeros((2, 2), int)), r"q_lengths .* 1 dimension.*\(2, 2\)"),
        (lambda: Mask.segment_ids(jnp.zeros(3)), "q_ids must be an integer array with 2"),
        (lambda: Mask.from_array(jnp.ones((2, 2))), "mask must be boolean"),
        (lambda: Mask.from_array(jnp.ones((2, 2), bool)).dense(3, 3), r"T=3, S=3\]; got shape"),
        (lambda: BlockMask.from_dense(jnp.ones(3, bool)), r"mask must be \[.., T, S\]"),
        (
            lambda: BlockMask.from_blocks(jnp.ones((2, 3)), 8, 8, block_q=4, block_kv=4),
            r"blocks must be \[.., 2, 2\] for T=8, S=8 in blocks of 4 x 4; got shape \(2, 3\)",
        ),
        (lambda: _scored(topk=8), r"topk must be a share in \[0, 1\]; got 8"),
        (lambda: _scored(cdf=-0.1), r"cdf must be a share in \[0, 1\]; got -0.1"),
        (lambda: _rows([1, 2, 3], [0, 1, 1]), r"indptr must start at 0, .* got \[1, 2, 3\]"),
        (lambda: _rows([0, 2, 1], [0, 1, 1]), "indptr must start at 0, never fall"),
        (lambda: _rows([0, 1, 4], [0, 1, 1]), "end at most at 3, the number of indices"),
        (lambda: _rows([0, 1, 2], [0, -1, 9]), "indices must be from 0 to 1, .* got -1 to 0"),
        (lambda: _rows([0.0, 1.0, 2.0], [0, 1, 1]), "indptr must be integers; got float32"),
        (
            lambda: BlockMask.from_mask(Mask(), 8, 8, block_q=0),
            "block_q must be at least 1 token; got 0",
        ),
    ],
)
def test_messages(build, message):
    with pytest.raises(ValueError, match=message):
        build()
