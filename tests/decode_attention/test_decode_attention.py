"""Decode attention: the oracle by hand, XLA against it, merging, appending, scores, messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.compress import kvzip, rkv
from pallas_kernels import (
    append_tokens,
    decode_attention,
    dot_product_attention,
    explain,
    max_attention_weights,
    merge_attention,
    quantize,
    window_attention_weights,
)
from pallas_kernels._device import describe
from pallas_kernels.ops.decode_attention.spec import DecodeSpec, unsupported_reason

B, T, N, K, C, H = 2, 2, 6, 2, 21, 16
STORES = {
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "int8": lambda x: quantize(x, "int8", axis=-1),
    "fp8_e4m3": lambda x: quantize(x, "fp8_e4m3", axis=-1),
    "int4": lambda x: quantize(x, "int4", axis=-1, asymmetric=True).pack(-1),
    "nvfp4": lambda x: quantize(x, "nvfp4", axis=-1, two_level=False).pack(-1),
}


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def _ragged():
    """Query, key, value, and per head other lengths and other kept positions."""
    rng = np.random.default_rng(0)
    length = np.array([[21, 4], [0, 13]])
    positions = np.sort(rng.permuted(np.tile(np.arange(30), (B, K, 1)), axis=-1)[..., :C], axis=-1)
    positions = np.where(np.arange(C) < length[..., None], positions, -1)
    q, k, v = _normal(1, B, T, N, H), _normal(2, B, K, C, H), _normal(3, B, K, C, H)
    return q, k, v, jnp.asarray(length), jnp.asarray(positions), jnp.array([[29, 30], [14, 15]])


def test_one_head_by_hand():
    key = jnp.array([[[[2.0, 0.0], [0.0, 2.0], [5.0, 5.0]]]])
    value = jnp.array([[[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]])
    query = jnp.array([[[[jnp.log(3.0) / 2, 0.0]]]])
    for name in ("reference", "xla"):
        out, lse = decode_attention(
            query, key, value, jnp.array([2]), scale=1.0, implementation=name
        )
        np.testing.assert_allclose(out[0, 0, 0], [0.75, 0.25], rtol=1e-6)
        np.testing.assert_allclose(lse[0, 0, 0], np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": 8, "sinks": True},
        {"split": 5, "local_window_size": 6, "num_sinks": 3, "logits_soft_cap": 2.0},
        {"split": 21, "local_window_size": 1, "scale": 0.7, "offset": True},
    ],
    ids=["plain", "sinks", "window", "offset"],
)
@pytest.mark.parametrize("store", STORES)
def test_xla_equals_the_oracle_on_the_same_codes(store, options):
    q, k, v, length, positions, at = _ragged()
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = _normal(4, N)
    if options.pop("offset", False):
        options["key_offset"] = _normal(5, B, K, 1, H)
    # What lies in dead slots never matters.
    dead = (jnp.arange(C) >= length[..., None])[..., None]
    poison = jnp.where(dead, jnp.nan if store == "bfloat16" else 1e4, 0.0)
    k, v = STORES[store](k + poison), STORES[store](v + poison)
    run = functools.partial(
        decode_attention, q, k, v, length, positions=positions, query_positions=at, **options
    )
    want, got = run(implementation="reference"), jax.jit(run)()
    for mine, its in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)
    if "sinks" not in options:
        assert not got[0][1, :, :3].any() and np.isneginf(got[1][1, :, :3]).all()


def test_full_rows_equal_dot_product_attention():
    q, k, v, *_ = _ragged()
    length = jnp.array([21, 9])
    out, lse = decode_attention(q, k, v, length, split=4)
    mask = jnp.arange(C) <= (length[:, None] - T + jnp.arange(T))[..., None]  # [B, T, C]
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    want, total = dot_product_attention(
        q, k, v, mask=mask[:, None], return_residual=True, implementation="reference"
    )
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("store", ["bfloat16", "int4"])
def test_tiles_of_a_pool_equal_slots_in_order(store):
    q, k, v, length, positions, at = _ragged()
    pad, tile = 24 - C, 4
    table, pool = np.full((B, K, 6), -1), np.zeros((B, 14), int)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(14), (B, 1)), axis=1)
    for row in range(B):  # tiles are handed out in any order
        taken = iter(order[row])
        for head in range(K):
            for number in range(-(-int(length[row, head]) // tile)):
                table[row, head, number] = place = next(taken)
                pool[row, place] = head * 6 + number

    def tiled(x, fill=0):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), *((0, 0),) * (x.ndim - 3)), constant_values=fill)
        x = x.reshape(B, -1, tile, *x.shape[3:])
        return jnp.take_along_axis(x, pool.reshape(B, -1, *(1,) * (x.ndim - 2)), axis=1)

    dense = [STORES[store](x) for x in (k, v)]
    paged = [jax.tree.map(tiled, x) for x in dense]
    options = {"query_positions": at, "local_window_size": 20}
    want = decode_attention(q, *dense, length, positions=positions, **options)
    for split in (None, 8):
        got = decode_attention(
            q,
            *paged,
            length,
            positions=tiled(positions, -1),
            table=jnp.asarray(table),
            split=split,
            **options,
        )
        for mine, its in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)


def test_a_context_and_a_tail_merge_to_the_whole():
    q, k, v, *_ = _ragged()
    at = jnp.broadcast_to(jnp.array([19, 20]), (B, T))
    places = jnp.broadcast_to(jnp.arange(C), (B, K, C))
    whole = decode_attention(q, k, v, positions=places, query_positions=at)
    parts = [
        decode_attention(
            q, k[:, :, cut], v[:, :, cut], positions=places[..., cut], query_positions=at
        )
        for cut in (slice(0, 15), slice(15, C))
    ]
    got = merge_attention(*zip(*parts, strict=True))
    for mine, its in zip(got, whole, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("store", STORES)
def test_appending_equals_quantising_everything(store):
    x = _normal(6, B, K, 5, H)
    empty = jax.tree.map(jnp.zeros_like, STORES[store](x))
    slots = jnp.broadcast_to(jnp.array([3, 0, 9]), (B, K, 3))  # 9 is outside and writes nothing
    got = jax.jit(append_tokens)(empty, x[:, :, :3], slots)
    want = STORES[store](x[:, :, jnp.array([1, 3, 3, 0, 3])])
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for place in (0, 3):
            np.testing.assert_array_equal(mine[:, :, place], its[:, :, place])
        assert not np.asarray(mine[:, :, 1].astype(jnp.float32)).any()


def test_scores_equal_those_of_the_methods():
    """From the log-sum-exp: KVzip's largest weight and R-KV's window, quantised keys included."""
    rows = 7
    q, k, own = _normal(7, B, rows, N, H), _normal(8, B, C, K, H), _normal(9, B, rows, K, H)
    length, valid = jnp.array([C, 9]), jnp.arange(rows) < jnp.array([[rows], [4]])
    codes = quantize(jnp.moveaxis(k, 1, 2), "int8", axis=-1)
    k = jnp.moveaxis(codes.dequantize(), 1, 2)
    want = kvzip.reconstruction_scores(q, k, own, length=length, input_valid=valid, norm="full")
    every = jnp.concatenate([k, own], axis=1)
    cached = jnp.broadcast_to((jnp.arange(C) < length[:, None])[:, None], (B, rows, C))
    causal = jnp.tril(jnp.ones((rows, rows), bool)) & valid[:, None]
    mask = jnp.concatenate([cached, causal], axis=-1)[:, None]
    _, lse = dot_product_attention(q, every, every, mask=mask, return_residual=True)
    got = max_attention_weights(q, codes, lse, length, query_valid=valid, query_block=3)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    for pooling in ("max", "mean"):
        want = rkv.scores(q, k, length=length, query_valid=valid, kernel_size=1, pooling=pooling)
        got = window_attention_weights(q, codes, length, query_valid=valid, pooling=pooling)
        np.testing.assert_allclose(got, want.importance, rtol=1e-5, atol=1e-6)


def test_explain_says_why_there_is_no_kernel():
    q = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 8, 4096, 128), jnp.bfloat16)
    said = explain("decode_attention", q, k, k)
    assert said.implementation == "xla" and "needs an NVIDIA GPU" in said.rejected["mosaic"]
    spec = DecodeSpec(1, 1, 64, 2, 1, 16, "float32", "int8", 0.25, 64)
    reason = unsupported_reason(spec, describe("gpu", "NVIDIA B200"), "mosaic")
    assert reason == "the Mosaic GPU kernel is written for sm90; NVIDIA B200 is sm100"
    with pytest.raises(NotImplementedError, match="mosaic: the Mosaic GPU kernel needs an NVIDIA"):
        decode_attention(*(jnp.zeros(x.shape) for x in (q, k, k)), implementation="mosaic")


_Q, _KV = jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, 2, 6, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: decode_attention(_Q[0], _KV, _KV), ValueError, r"query has shape \(1, 4, 8\)"),
        (lambda: decode_attention(_Q, _KV, _KV[:, :, :5]), ValueError, "value has shape"),
        (lambda: decode_attention(_Q[:, :, :3], _KV, _KV), ValueError, r"query heads \(3\)"),
        (
            lambda: decode_attention(_Q, _KV.astype(int), _KV),
            ValueError,
            "key must be floating or a QTensor; got dtype int32",
        ),
        (
            lambda: decode_attention(_Q, _KV, _KV, jnp.zeros((1, 3), int)),
            ValueError,
            r"length has shape \(1, 3\); expected \(1, 2\) or \(1,\)",
        ),
        (
            lambda: decode_attention(_Q, _KV, _KV, positions=jnp.zeros((1, 2, 6), int)),
            ValueError,
            "query_positions is None; with positions they are needed",
        ),
        (lambda: decode_attention(_Q, _KV, _KV, local_window_size=0), ValueError, "expected 1 or"),
        (lambda: decode_attention(_Q, _KV, _KV, split=0), ValueError, "split=0; expected 1 or"),
        (
            lambda: decode_attention(_Q, *[quantize(_KV, "int8", axis=2)] * 2),
            NotImplementedError,
            "served are scales along the head of every slot",
        ),
        (lambda: merge_attention((), ()), ValueError, "expected as many, 1 or more"),
        (
            lambda: max_attention_weights(_Q, _KV, jnp.zeros((1, 4, 1))),
            ValueError,
            r"lse has shape \(1, 4, 1\); expected \(1, 1, 4\)",
        ),
        (lambda: window_attention_weights(_Q, _KV, pooling="sum"), ValueError, "pooling='sum'"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
