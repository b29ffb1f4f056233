# SPDX-License-Identifier: Apache-2.0
"""The sm90 decode kernels without a GPU: NumPy runs their threads, and they lower for CUDA."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import decode
from pallas_kernels import (
    decode_attention,
    explain,
    last_similar_keys,
    max_attention_weights,
    quantize,
)
from pallas_kernels._device import describe
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.ops.attention import partition
from pallas_kernels.ops.decode_attention import api, mosaic_sm90, xla
from pallas_kernels.ops.decode_attention.spec import DecodeSpec, unsupported_reason

STORES = decode.STORES | {"int4_symmetric": lambda x: quantize(x, "int4", axis=-1).pack(-1)}


def run_blocks(body, outs, grid, args, shared=0, inplace=None, groups=1):
    """The kernels' launch: every block in turn."""
    inplace, made = inplace or {}, outs
    args = inplace | args

    def run(*arrays):
        refs = dict(zip(args, map(np.array, arrays), strict=True))
        results = {name: refs[name] for name in inplace}
        for name, out in made.items():  # what no thread writes stays NaN
            raw = np.full(int(np.prod(out.shape)) * out.dtype.itemsize, 0xFF, np.uint8)
            results[name] = raw.view(out.dtype).reshape(out.shape)
        for x, y, z, w in np.ndindex(*grid, groups):
            scratch = {"shared": np.full(shared, np.nan, np.float32)} if shared else {}
            axes = (x, y, z, w) if groups > 1 else (x, y, z)
            body(refs | results | scratch, [np.full(128, i, np.int32) for i in axes])
        return results

    outs = outs | {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inplace.items()}
    return jax.pure_callback(run, outs, *args.values())


def compare(store="bfloat16", *, b=1, t=1, n=4, k=1, h=128, c=150, length=None, config=None,
            dtype="bfloat16", positions=None, at=None, table=None, poison=None, offset=False,
            sinks=False, **options):  # fmt: skip
    """The kernels against the oracle on the same codes."""
    rng = np.random.default_rng(c)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    pool = (b, k, c, h) if table is None else (b, *positions.shape[1:], h)
    q, keys, values = normal(b, t, n, h), normal(*pool), normal(*pool) + 1
    if poison is not None:
        keys, values = (np.where(poison[..., None], np.nan, x) for x in (keys, values))
    options["key_offset"] = normal(b, k, 1, h) if offset else None
    options["sinks"] = normal(n) if sinks else None

    def run(q, keys, values, implementation):
        q, keys, values = q.astype(dtype), STORES[store](keys), STORES[store](values)
        return decode_attention(
            q, keys, values, length, positions=positions, query_positions=at, table=table,
            implementation=implementation, **options,
        )  # fmt: skip

    call = jax.jit(run, static_argnames="implementation")
    config = mosaic_sm90.Config(**config or {"blocks": 2})
    partition._call.cache_clear()  # it knows specs, not configurations
    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch, abstract_gpu():
        patch.setattr(mosaic_sm90, "call", run_blocks)
        patch.setattr(mosaic_sm90, "Config", lambda: config)
        out, lse = jax.tree.map(np.asarray, call(q, keys, values, "mosaic"))
    want, want_lse = jax.tree.map(np.asarray, call(q, keys, values, "reference"))
    assert out.shape == want.shape and out.dtype == want.dtype and lse.shape == want_lse.shape
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    live = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[live], want_lse[live], atol=1e-4)
    assert not out[~live].astype(np.float32).any()
    # P is rounded to bfloat16 or float16, and so may the output be.
    bound = 1e-3 if "bfloat16" not in (dtype, store) else 1e-2
    out, want = (x.astype(np.float32) for x in (out, want))
    np.testing.assert_allclose(out, want, atol=bound, rtol=bound)


@pytest.mark.parametrize(
    ("store", "h"),
    [("bfloat16", 64), ("float16", 128), ("int8", 128), ("int8", 64), ("fp8_e4m3", 128),
     ("fp8_e5m2", 64), ("int4", 128), ("int4_symmetric", 64), ("nvfp4", 128), ("nvfp4", 64)],
)  # fmt: skip
def test_equals_the_oracle_on_the_same_codes(store, h):
    compare(store, h=h, length=jnp.array([[141]]), at=jnp.array([[140]]), dtype="float32")


@pytest.mark.parametrize("row_bytes", [32, 64, 128, 256])
@pytest.mark.parametrize("name", ["k", "v"])
def test_threads_read_different_banks(name, row_bytes):
    """128 bytes of shared memory are read at once, by lanes one after the other."""
    lanes = 4 if name == "k" else 8
    width, (g, c) = min(16, row_bytes // lanes), np.divmod(np.arange(128) % 32, 4)
    token, place = (4 * (g // 2) + g % 2, c) if name == "k" else (4 * c, g)
    thread = types.SimpleNamespace(plan=types.SimpleNamespace(row_bytes=row_bytes))
    with warpgroup.installed():
        for first in range(0, row_bytes, lanes * width):
            byte = place * width + first
            where = mosaic_sm90._Thread._place(thread, token, byte // 16) + byte % 16
            for group in where.reshape(-1, 128 // width):
                assert len(set(group % 128)) == len(group)


def test_chunks_join_and_empty_heads_give_zeros():
    length, at = jnp.array([[150, 0]]), jnp.array([[149]])
    for groups in (1, 3):
        compare(k=2, length=length, at=at, config={"blocks": 5, "groups": groups}, sinks=True)
    compare(n=14, k=2, c=1, length=length)  # a group of seven, one slot


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_window_and_cap(num_sinks):
    options = {"local_window_size": 20, "num_sinks": num_sinks, "logits_soft_cap": 2.0}
    compare(length=jnp.array([[140]]), at=jnp.array([[139]]), config={"blocks": 5}, **options)


@pytest.mark.parametrize("store", ["bfloat16", "nvfp4"])
def test_positions_and_several_tokens(store):
    """Slots that hold nothing may be NaN; three tokens of four heads are two blocks of rows."""
    hidden = np.random.default_rng(0).random((1, 1, 150)) < 0.2
    positions = jnp.asarray(np.where(hidden, -1, np.arange(150)))
    at = jnp.array([[100, 101, -1]])
    compare(store, t=3, positions=positions, at=at, poison=hidden, offset=True)


@pytest.mark.parametrize(("tile", "h"), [(64, 128), (16, 64)])
def test_tiles_of_a_pool(tile, h):
    """Two heads, whose slots lie in tiles handed out in any order, and a tile that is nobody's."""
    length = np.array([[100, 128]])
    table, positions = np.full((1, 2, 192 // tile), -1), np.full((1, 256 // tile, tile), -1)
    free = iter(np.random.default_rng(0).permutation(256 // tile))
    for head, live in enumerate(length[0]):
        for number in range(-(-live // tile)):
            table[0, head, number] = place = next(free)
            positions[0, place] = np.arange(tile) + number * tile
            positions[0, place, max(live - number * tile, 0) :] = -1
    compare("int8", h=h, k=2, c=192, length=jnp.asarray(length), positions=jnp.asarray(positions),
            at=jnp.array([[120]]), table=jnp.asarray(table), poison=positions < 0)  # fmt: skip


def test_capacity_that_is_no_multiple_of_four():
    compare("int4", n=7, c=149, offset=True)


@pytest.mark.parametrize("value", [1e-6, 1e6])
def test_scales_of_any_size(value):
    """Values far from one: their scales would leave float16."""
    rng = np.random.default_rng(1)
    q, keys, values = (jnp.asarray(rng.normal(size=(1, m, c, 64)), jnp.float32)
                       for m, c in ((1, 2), (1, 40), (1, 40)))  # fmt: skip
    stored = [STORES["int8"](x) for x in (keys, values * value)]
    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch, abstract_gpu():
        patch.setattr(mosaic_sm90, "call", run_blocks)
        run = jax.jit(lambda *x: decode_attention(*x, implementation="mosaic")[0])
        out = np.asarray(run(q, *stored))
    want = jax.jit(lambda *x: decode_attention(*x, implementation="reference")[0])(q, *stored)
    np.testing.assert_allclose(out / value, want / value, atol=1e-3)


@pytest.mark.parametrize(
    ("store", "half"),
    [("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("int4", "float16"), ("fp8_e4m3", "bfloat16")],
)
def test_scores_equal_those_of_xla(store, half):
    """Largest weights from the log-sum-exp; one row is not real, one saw nothing."""
    b, a, n, k, c, h = 1, 11, 6, 2, 150, 64
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    keys, lse = STORES[store](normal(b, k, c, h)), 4 + normal(b, a, n)
    query, length = normal(b, a, n, h).astype(half), jnp.array([[150, 77]])
    lse, valid = lse.at[0, 3].set(-jnp.inf), jnp.arange(a)[None] != 5

    def run(query, keys, lse, implementation):
        return max_attention_weights(
            query, keys, lse, length, query_valid=valid, implementation=implementation
        )

    call = jax.jit(run, static_argnames="implementation")
    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch, abstract_gpu():
        patch.setattr(mosaic_sm90, "call", run_blocks)
        got = np.asarray(call(query, keys, lse, "mosaic"))
    np.testing.assert_allclose(got, call(query, keys, lse, "xla"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("store", ["bfloat16", "int8", "fp8_e4m3"])
def test_similar_keys_equal_those_of_xla(store):
    """Dead slots hold NaN, some keys repeat others; the last copy counts."""
    b, k, c, h = 1, 2, 150, 64
    rng = np.random.default_rng(4)
    numbers = rng.normal(size=(b, k, c, h)).astype(np.float32)
    numbers[:, :, 40:60] = numbers[:, :, 3:4] + 0.3 * numbers[:, :, 40:60]
    numbers[:, :, 149] = numbers[:, :, 7]
    live = np.arange(c) < np.array([[150, 77]])[..., None]
    keys, live = STORES[store](jnp.asarray(numbers)), jnp.asarray(live)
    if store == "bfloat16":
        keys = jnp.where(live[..., None], keys, jnp.nan)

    call = jax.jit(last_similar_keys, static_argnames="implementation")
    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch, abstract_gpu():
        patch.setattr(mosaic_sm90, "call", run_blocks)
        last, cosine = call(keys, live, implementation="mosaic")
    want, exact = call(keys, live, implementation="xla")
    np.testing.assert_array_equal(last, want)
    np.testing.assert_allclose(cosine, exact, atol=1e-5)
    found = np.asarray(want[0, 0, :, 0])
    assert found[7] == 149 and found[149] == 7 and found[3] == 59 and found[59] == 58


# -- lowering and dispatch -------------------------------------------------------------------------


def _shapes(store, h, c=4096, n=8, k=2, t=1):
    kv = jax.eval_shape(STORES[store], jax.ShapeDtypeStruct((2, k, c, h), jnp.float32))
    return jax.ShapeDtypeStruct((2, t, n, h), jnp.bfloat16), kv, kv


@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("store", STORES)
def test_lowers_for_cuda(store, h):
    at = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    places = jax.ShapeDtypeStruct((2, 2, 4096), jnp.int32)

    def run(q, k, v, at, places):
        return decode_attention(
            q, k, v, positions=places, query_positions=at, implementation="mosaic",
            logits_soft_cap=30.0, local_window_size=100, num_sinks=4, sinks=jnp.zeros(8),
        )  # fmt: skip

    with abstract_gpu():
        traced = jax.jit(run).trace(*_shapes(store, h, t=3), at, places)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


def test_scores_lower_for_cuda():
    q, k, _ = _shapes("int8", 128, t=300)
    lse = jax.ShapeDtypeStruct((2, 300, 8), jnp.float32)
    run = functools.partial(max_attention_weights, implementation="mosaic")
    with abstract_gpu():
        text = jax.jit(run).trace(q, k, lse).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    with (
        pytest.raises(NotImplementedError, match="takes bfloat16 and float16 queries"),
        abstract_gpu(),
    ):
        jax.eval_shape(run, jax.ShapeDtypeStruct(q.shape, jnp.float32), k, lse)


@pytest.mark.parametrize("store", ["bfloat16", "int8"])
def test_similar_keys_lower_for_cuda(store):
    _, k, _ = _shapes(store, 128)
    run = functools.partial(last_similar_keys, implementation="mosaic")
    with abstract_gpu():
        text = jax.jit(run).trace(k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    with (
        pytest.raises(NotImplementedError, match="finds one slot per key; got beta=2"),
        abstract_gpu(),
    ):
        jax.eval_shape(functools.partial(run, beta=2), k)


def test_chosen_where_it_was_measured():
    with abstract_gpu():
        one = explain("decode_attention", *_shapes("int8", 128))
        many = explain("decode_attention", *_shapes("int8", 128, t=3))
        named = explain("decode_attention", *_shapes("int8", 128, t=3), implementation="mosaic")
    assert one.implementation == named.implementation == "mosaic"
    assert many.implementation == "xla" and "12 query rows share" in many.rejected["mosaic"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 80}, "serves head_dim 64 and 128; got 80"),
        ({"store": "mxfp8"}, "reads caches stored as bfloat16, float16, int8, .*; got mxfp8"),
        ({"plain": False}, "one float32 scale per slot"),
        ({"tile": 24}, "tiles of a multiple of 16 slots; got 24"),
        ({"batch": 40000}, "got 80000"),
        ({"capacity": 0}, "at least one slot"),
    ],
)
def test_limits_are_said(change, message):
    fields = {"batch": 1, "q_len": 1, "capacity": 64, "num_heads": 2, "num_kv_heads": 2,
              "head_dim": 128, "dtype": "bfloat16", "store": "int8", "scale": 0.1}  # fmt: skip
    h200 = describe("gpu", "NVIDIA H200")
    assert unsupported_reason(DecodeSpec(**fields), h200, "mosaic") is None
    reason = unsupported_reason(DecodeSpec(**fields | change), h200, "mosaic")
    assert re.search(message, reason)


def test_key_and_value_must_be_stored_alike():
    q, k, _ = _shapes("int8", 128)
    with abstract_gpu():
        said = explain("decode_attention", q, k, _shapes("bfloat16", 128)[1])
    assert "stored alike" in said.rejected["mosaic"]


# -- around the kernel: something that the compiler cannot look into -------------------------------


@pytest.fixture
def opaque(monkeypatch):
    """XLA's implementation in the place of the kernel; it sees what the spec says."""

    def stand_in(query, key, value, length, positions, *rest):
        spec = rest[-1]
        assert query.shape == (spec.batch, spec.q_len, spec.num_heads, spec.head_dim)
        assert length.shape == (spec.batch, spec.num_kv_heads)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(spec.capacity), (*length.shape, spec.capacity))
        return xla.attention(query, key, value, length, positions, *rest)

    monkeypatch.setattr(mosaic_sm90, "attention", stand_in)
    monkeypatch.setattr(api, "resolve", lambda op, name, reasons: name or "mosaic")


def _arrays(store, b=4, k=4, n=8, c=24, h=64):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    keys, values = (STORES[store](normal(b, k, c, h)) for _ in range(2))
    return normal(b, 1, n, h), keys, values, jnp.asarray(rng.integers(1, c, size=(b, k)))


@pytest.mark.multidevice
@pytest.mark.parametrize("store", ["bfloat16", "int4"])
def test_devices_keep_to_their_heads(opaque, store):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("b", "h"), axis_types=auto, devices=jax.devices()[:8])
    q, keys, values, length = _arrays(store)

    def put(x, *spec):
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec))), x)

    at = jnp.full((4, 1), 23)
    args = put(q, "b", None, "h"), put(keys, "b", "h"), put(values, "b", "h"), put(length, "b", "h")
    run = jax.jit(lambda *x: decode_attention(*x, query_positions=at))
    text = run.lower(*args).compile().as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    got, want = run(*args), run(q, keys, values, length)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, P("b", None, "h")), 4)
    for mine, its in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)


def test_vmap_folds_and_the_gradient_is_that_of_xla(opaque):
    q, keys, values, length = _arrays("float16", b=2)
    at = jnp.full((2, 1), 23)

    def run(q, keys, values, name="mosaic"):
        call = functools.partial(decode_attention, query_positions=at, implementation=name)
        return call(q, keys, values, length)[0]

    @jax.jit
    def everything(q, keys, values):
        many = jax.vmap(run, (0, None, None))(jnp.stack([q, 2 * q]), keys, values)[1]
        loss = lambda name: lambda *x: (run(*x, name) ** 2).sum()  # noqa: E731
        grads = [jax.grad(loss(name), (0, 1, 2))(q, keys, values) for name in ("mosaic", "xla")]
        return (many, *grads[0]), (run(2 * q, keys, values, "xla"), *grads[1])

    for mine, its in zip(*everything(q, keys, values), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-3)
