# SPDX-License-Identifier: Apache-2.0
"""Appending on sm90 without a GPU: NumPy runs the threads, and the kernel lowers for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mosaic_compact import on_threads
from test_mosaic_decode import STORES

from pallas_kernels import append_to_cache
from pallas_kernels._interpret import abstract_gpu

STORED = STORES | {"float32": lambda x: x}


def case(store, h, b=2, k=3, c=20, t=3, dtype="bfloat16", positions=True):
    """A cache, and tokens of which one belongs nowhere."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    key, value = (STORED[store](normal(b, k, c, h)) for _ in range(2))
    slots = rng.permuted(np.tile(np.arange(c), (b, k, 1)), axis=2)[..., :t]
    slots[0, 0, 0] = c
    new_k, new_v = (normal(b, k, t, h).astype(dtype) for _ in range(2))
    new_v = new_v.at[1, 1, 1].set(0).at[0, 1, 1].set(2.5)  # vectors of one number
    places = jnp.broadcast_to(jnp.arange(c), (b, k, c)) if positions else None
    at = jnp.asarray(rng.integers(100, 200, size=(b, t))) if positions else None
    return key, value, places, new_k, new_v, at, jnp.asarray(slots)


@pytest.mark.parametrize(
    ("store", "h", "dtype"),
    [("bfloat16", 128, "bfloat16"), ("float16", 64, "float32"), ("float32", 32, "bfloat16"),
     ("int8", 128, "bfloat16"), ("int8", 64, "float32"), ("fp8_e4m3", 128, "bfloat16"),
     ("int4", 128, "bfloat16"), ("int4", 64, "float16")],
)  # fmt: skip
def test_writes_what_xla_writes(store, h, dtype):
    args = case(store, h, dtype=dtype)
    got = on_threads(append_to_cache, *args)
    want = jax.jit(functools.partial(append_to_cache, implementation="xla"))(*args)
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, np.asarray(its))


def test_keys_lose_their_offset_and_nothing_else_changes():
    args = case("int8", 64, positions=False)
    offset = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 1, 64)), jnp.float32)
    append = functools.partial(append_to_cache, key_offset=offset)
    got = on_threads(append, *args)
    want = append(*args, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, want))
    assert got[2] is None


def test_a_number_that_is_not_finite_is_said_by_the_scale():
    key, value, _, new_k, new_v, _, slots = case("int8", 64, positions=False)
    new_k = new_k.at[1, 0, 1, 5].set(jnp.nan).at[1, 2, 2, 7].set(jnp.inf)
    args = (key, value, None, new_k, new_v, None, slots)
    got, want = on_threads(append_to_cache, *args), append_to_cache(*args, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, want))
    assert np.isnan(got[0].scale).sum() == 2


@pytest.mark.parametrize("store", ["bfloat16", "int8", "int4"])
def test_lowers_for_cuda_in_place(store):
    shapes = jax.eval_shape(functools.partial(case, store, 128, c=64, t=1))
    run = functools.partial(append_to_cache, implementation="mosaic")

    def loop(key, value, places, *rest):
        step = lambda _, x: run(*x, *rest)  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, (key, value, places))

    with abstract_gpu():
        traced = jax.jit(loop, donate_argnums=(0, 1, 2)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    arrays = len(jax.tree.leaves(shapes[:3]))
    assert text.count("stablehlo.output_operand_alias<") == arrays


def test_limits_are_said():
    key, value, places, new_k, new_v, at, slots = case("nvfp4", 128)
    with abstract_gpu(), pytest.raises(NotImplementedError, match="fp8_e4m3, int4; nvfp4"):
        append_to_cache(key, value, places, new_k, new_v, at, slots, implementation="mosaic")
