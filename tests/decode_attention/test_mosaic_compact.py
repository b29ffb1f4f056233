# SPDX-License-Identifier: Apache-2.0
"""Choosing and moving slots on sm90 without a GPU: NumPy runs the threads, and they lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from test_mosaic_decode import STORES, run_blocks

from pallas_kernels import largest_slots, move_slots
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.ops.decode_attention import mosaic_sm90


def on_threads(function, *args):
    """A call of ``function(*args, implementation="mosaic")`` with its threads in NumPy."""
    call = jax.jit(functools.partial(function, implementation="mosaic"))
    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch, abstract_gpu():
        patch.setattr(mosaic_sm90, "call", run_blocks)
        return jax.tree.map(np.asarray, call(*args))


def some_scores(slots):
    rng = np.random.default_rng(slots)
    scores = rng.normal(size=(2, 3, slots)).astype(np.float32)
    scores[0, 0] = np.round(scores[0, 0])  # many ties
    scores[0, 1, slots // 2 :] = -np.inf  # dead slots
    scores[0, 2, -min(8, slots) :] = np.inf  # a window that stays
    scores[1, 0] = -np.inf  # nothing to choose from
    scores[1, 1] = np.where(rng.random(slots) < 0.5, 0.0, -0.0)  # -0 below 0
    scores[1, 2] *= 1e-38
    return jnp.asarray(scores)


@pytest.mark.parametrize(("slots", "budget"), [(1152, 1024), (150, 40), (128, 128), (5, 3), (1, 1)])
def test_the_chosen_slots_are_those_of_a_sort(slots, budget):
    scores = some_scores(slots)
    got = on_threads(functools.partial(largest_slots, budget=budget), scores)
    np.testing.assert_array_equal(got, largest_slots(scores, budget, implementation="xla"))


def test_heads_may_keep_fewer():
    scores, count = some_scores(300), jnp.array([[7, 200, 0], [3, 100, 1]])
    choose = lambda x, n, implementation: largest_slots(x, 100, n, implementation=implementation)  # noqa: E731
    np.testing.assert_array_equal(on_threads(choose, scores, count), choose(scores, count, "xla"))


@pytest.mark.parametrize(("store", "h"), [("bfloat16", 128), ("int8", 64), ("nvfp4", 128)])
def test_moved_slots_are_copied_bit_for_bit(store, h):
    rng = np.random.default_rng(0)
    make = lambda: STORES[store](jnp.asarray(rng.normal(size=(2, 2, 150, h)), jnp.float32))  # noqa: E731
    layer = {"k": make(), "v": make(), "positions": jnp.arange(600).reshape(2, 2, 150)}
    source = jnp.asarray(rng.integers(-1, 150, size=(2, 2, 171)))
    fill = jax.tree.map(lambda _: 0, layer) | {"positions": -1}
    move = functools.partial(move_slots, fill=fill)
    got, want = on_threads(move, layer, source), move(layer, source, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, want))


def test_they_lower_for_cuda():
    def run(scores, store):
        kept = largest_slots(scores, 1024, implementation="mosaic")
        return move_slots(store, kept, implementation="mosaic")

    scores = jax.ShapeDtypeStruct((8, 8, 1152), jnp.float32)
    shape = jax.ShapeDtypeStruct((8, 8, 1152, 128), jnp.float32)
    for store in ("bfloat16", "int4"):
        kv = jax.eval_shape(STORES[store], shape)
        with abstract_gpu():
            text = jax.jit(run).trace(scores, kv).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 2


def test_limits_are_said():
    with abstract_gpu():
        with pytest.raises(NotImplementedError, match="1 to 8192 slots; got float32, 9000"):
            largest_slots(jnp.zeros((1, 1, 9000)), 3, implementation="mosaic")
        with pytest.raises(NotImplementedError, match="moves slots of 4, 8"):
            move_slots(jnp.zeros((1, 1, 4, 5)), jnp.zeros((1, 1, 2), int), implementation="mosaic")
    with pytest.raises(ValueError, match="expected \\[B, K, C\\] with C >= 5"):
        largest_slots(jnp.zeros((1, 1, 4)), 5)
