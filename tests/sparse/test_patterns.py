"""Static patterns against their definition, orders on a grid, and pictures."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.sparse import (
    PATTERNS,
    bigbird,
    estimate_lines,
    hilbert_order,
    inverse_order,
    plot_block_mask,
    strided,
    vertical_slash,
)
from pallas_kernels import BlockMask, Mask, dot_product_attention

TILES = {"block_q": 8, "block_kv": 4}


def pairs(t, s):
    return np.arange(t)[:, None], np.arange(s)


def tiles(mask, t, s):
    """Token map of the visited tiles."""
    kept = np.asarray(mask.to_blocks())[0, 0]
    return np.kron(kept, np.ones((mask.block_q, mask.block_kv), bool))[:t, :s]


@pytest.mark.parametrize("causal", [True, False])
def test_token_level_patterns(causal):
    """The two that are exact down to the token, for lengths that are not whole tiles."""
    size = (21, 19)
    t, s = pairs(*size)
    below = (s <= t) | (not causal)
    expected = {
        "sliding_window": (({"window": 5, "sinks": 2}), (abs(t - s) < 5) | (s < 2)),
        "block_diagonal": ({"size": 7}, t // 7 == s // 7),
    }
    for name, (arguments, allowed) in expected.items():
        mask = PATTERNS[name](*size, is_causal=causal, **arguments, **TILES)
        np.testing.assert_array_equal(mask.to_dense()[0, 0], allowed & below, err_msg=name)
        # No tile is visited for nothing.
        whole = np.pad(allowed & below, ((0, 3), (0, 1))).reshape(3, 8, 5, 4).any((1, 3))
        np.testing.assert_array_equal(mask.to_blocks()[0, 0], whole, err_msg=name)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_is_causal_when_asked_and_runs(name):
    mask = PATTERNS[name](21, 21, is_causal=True, **TILES)
    t, s = pairs(21, 21)
    assert not np.asarray(mask.to_dense())[:, :, s > t].any()
    assert np.asarray(mask.to_dense())[..., np.arange(21), np.arange(21)].all()  # itself
    x = jnp.ones((1, 21, 2, 8))
    np.testing.assert_allclose(dot_product_attention(x, x, x, mask=mask), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="q_len is 0; expected at least 1"):
        PATTERNS[name](0)
    assert PATTERNS[name].__doc__ and "References" in inspect.getdoc(PATTERNS[name])


def test_tile_level_patterns():
    mask = strided(24, local=1, stride=2, is_causal=False, block_q=4, block_kv=4)
    i, j = pairs(6, 6)
    np.testing.assert_array_equal(mask.to_blocks()[0, 0], (i - j) % 2 == 0)
    mask = bigbird(48, window=3, global_tiles=1, random_tiles=2, num_heads=2, block_q=4, block_kv=4)
    kept = np.asarray(mask.to_blocks())[0]
    i, j = pairs(12, 12)
    base = (abs(i - j) <= 1) | (i < 1) | (j < 1)
    assert (kept >= base).all() and (kept[0] != kept[1]).any()
    np.testing.assert_array_equal((kept & ~base).sum(-1)[:, 1:], 2)


def test_vertical_slash_per_head_under_jit():
    rng = np.random.default_rng(0)
    verticals, slashes = rng.integers(0, 19, (2, 2)), rng.integers(-4, 15, (2, 3))
    build = jax.jit(
        lambda v, d: vertical_slash(21, 19, verticals=v, slashes=d, is_causal=False, **TILES)
    )
    got = np.asarray(build(verticals, slashes).to_blocks())[0]
    t, s = pairs(21, 19)
    for head in range(2):
        lines = np.isin(s, verticals[head]) | np.isin(t - s, slashes[head])
        want = np.pad(lines, ((0, 3), (0, 1))).reshape(3, 8, 5, 4).any((1, 3))
        np.testing.assert_array_equal(got[head], want)
    with pytest.raises(ValueError, match="slashes must be integers"):
        vertical_slash(8, slashes=(0.5,))


def test_estimated_lines_are_the_planted_ones():
    key = np.zeros((1, 32, 1, 64), np.float32)
    key[0, :, 0, :32] = 30 * np.eye(32)
    query = np.roll(key, 5, axis=1)  # query t looks at key t - 5 ...
    key[0, 7, 0, 32] = query[0, :, 0, 32] = 30.0  # ... and at key 7
    verticals, slashes = estimate_lines(
        jnp.asarray(query), jnp.asarray(key), verticals=1, slashes=1, last=8
    )
    assert (verticals.tolist(), slashes.tolist()) == ([[7]], [[5]])


@pytest.mark.parametrize("shape", [(8, 8), (4, 4, 4), (5, 3), (3, 6, 2), (1, 1)])
def test_hilbert_order(shape):
    order = hilbert_order(shape)
    np.testing.assert_array_equal(np.sort(order), np.arange(np.prod(shape)))
    np.testing.assert_array_equal(order[inverse_order(order)], np.arange(len(order)))
    points = np.stack(np.unravel_index(order, shape), -1)
    steps = abs(np.diff(points, axis=0)).sum(-1)
    if len(set(shape)) == 1:  # a full square or cube: every step goes to a neighbour
        assert (steps == 1).all()
        # The first half of the curve fills half of the grid: neighbours stay together.
        assert len(points) == 1 or np.ptp(points[: len(points) // 2], 0).min() < shape[0]
    with pytest.raises(ValueError, match="expected two or three sizes"):
        hilbert_order((4,))


def test_picture_and_text():
    mask = BlockMask.from_mask(Mask.causal(), 16, 16, block_q=4, block_kv=4)
    axes = plot_block_mask(mask)
    np.testing.assert_array_equal(axes.images[0].get_array(), mask.to_status()[0, 0])
    assert axes.get_title() == "37.5% of the tiles skipped"
    assert str(mask).splitlines()[1:] == ["▒···", "█▒··", "██▒·", "███▒"]
    assert mask.show(width=2).splitlines()[1:] == ["▒·", "█▒"]
    with pytest.raises(ValueError, match="batch must be 0 to 0; got -1"):
        mask.show(batch=-1)
    assert "BlockMask" in str(jax.eval_shape(lambda: mask))
