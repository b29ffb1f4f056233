# SPDX-License-Identifier: Apache-2.0
"""The sm90 kernels' register code, run by NumPy for all threads of a warpgroup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup

from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import mosaic_sm90, reference
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config
from pallas_kernels.ops.attention.spec import QUANTS, AttentionSpec
from pallas_kernels.ops.quantize import mosaic_sm90 as quantize

# Relative L1 that rounding P leaves: e4m3 has 3 bits, bfloat16 7 (and rounds the output).
BOUND = {"e4m3": 0.035, "half": 0.006}


def inputs(b, t, s, n, k, h, dtype="bfloat16"):
    rng = np.random.default_rng(t * 7 + s)
    make = lambda length, heads: rng.normal(size=(b, length, heads, h))  # noqa: E731
    q, key, v = make(t, n), make(s, k) + 3 * rng.normal(size=h), make(s, k) + 1
    return [jnp.asarray(x, jnp.float32).astype(dtype) for x in (q, key, v)]


def compare(mask, quant="sage2", *, b=1, t=70, s=150, n=1, k=1, h=64, dtype="bfloat16", **kwargs):
    """The kernels' output and log-sum-exp against float32 attention on the same operands."""
    config, sinks = kwargs.get("config"), kwargs.get("sinks")
    q, key, v = inputs(b, t, s, n, k, h, dtype)
    spec = AttentionSpec(
        b, t, s, n, k, h, dtype, h**-0.5, soft_cap=kwargs.get("soft_cap"), quant=QUANTS.get(quant),
        has_sinks=sinks is not None,
    )  # fmt: skip
    seen = []

    def run(q, key, v):
        result = mosaic_sm90.forward(q, key, v, None, sinks, mask, spec, config)
        return result, seen.pop() if seen else quantize.AttentionOperands(q, key, v)

    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch:
        make = mosaic_sm90.quantize_qkv
        patch.setattr(
            mosaic_sm90, "quantize_qkv", lambda *a, **o: seen.append(make(*a, **o)) or seen[-1]
        )
        (out, lse), operands = jax.block_until_ready(jax.jit(run)(q, key, v))
    exact = AttentionSpec(b, t, s, n, k, h, "float32", h**-0.5, soft_cap=spec.soft_cap)
    arrays = warpgroup.dequantized(operands, t, s)
    rule = mask.as_mask() if isinstance(mask, BlockMask) else mask
    want, want_lse = jax.jit(
        lambda q, k, v: reference.attention(q, k, v, None, sinks, rule, exact)
    )(*arrays)
    out, lse, want_lse = (np.asarray(x, np.float64) for x in (out, lse, want_lse))
    want = np.asarray(want, np.float64)[..., :h]
    assert out.shape == want.shape and lse.shape == want_lse.shape
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    live = np.isfinite(want_lse)
    assert (out[~live] == 0).all()
    # FP8 rows are divided by the sum of their rounded P, 16-bit ones by the exact sum.
    pv = mosaic_sm90.variant_of(spec).pv
    assert np.abs(lse[live] - want_lse[live]).max() < (0.03 if pv == "e4m3" else 1e-5)
    assert np.abs(out - want).sum() / np.abs(want).sum() < BOUND[pv]


CAUSAL = (Mask.causal(190), dict(s=260, n=2, sinks=jnp.array([0.5, -1.0])))
LENGTHS = (Mask.lengths(jnp.array([65]), jnp.array([100])), dict(soft_cap=2.0))


@pytest.mark.parametrize(
    ("quant", "mask", "kwargs"),
    [("sage2", *CAUSAL), ("sage1", *CAUSAL), ("fp8", *CAUSAL), (None, *CAUSAL),
     ("sage2", *LENGTHS), (None, *LENGTHS)],
    ids=["sage2", "sage1", "fp8", "bf16", "sage2 cap", "bf16 cap"],
)  # fmt: skip
def test_agrees_with_float32(quant, mask, kwargs):
    compare(mask, quant, **kwargs)


@pytest.mark.parametrize(
    ("mask", "kwargs"),
    [
        (Mask(), dict(s=260)),
        (Mask.causal() & Mask.window(20, 0), dict(t=150, s=150)),
        (Mask.causal(jnp.array([80, 20])), dict(b=2, t=17)),
        (Mask.lengths(jnp.array([9, 3]), jnp.array([0, 20])), dict(b=2, t=17, s=30)),
        (
            Mask.segment_ids(jnp.arange(70)[None] // 30, jnp.arange(150)[None] // 60),
            dict(sinks=jnp.zeros(1), soft_cap=3.0),
        ),
        (Mask(), dict(t=1, s=17, config=Config(block_kv=128, qk_split=1))),
        (Mask.causal(-60), {}),  # rows with nothing to attend
        (Mask(), dict(dtype="float16", h=80, t=17, s=30)),
        (Mask(), dict(h=192, t=17, s=30)),
        (Mask.causal(100), dict(h=256, t=17, s=140)),
    ],
)
def test_masks_and_head_sizes(mask, kwargs):
    compare(mask, **kwargs)


def blocks(t, s, heads, mask=None, block_q=128, block_kv=64, batch=1):
    """Two tiles of keys in three, at random; the last row of tiles of the first head has none."""
    grid = -(-t // block_q), -(-s // block_kv)
    kept = np.random.default_rng(3).random((batch, heads, *grid)) < 0.6
    kept[0, 0, -1] = False
    return BlockMask.from_blocks(
        jnp.asarray(kept), t, s, block_q=block_q, block_kv=block_kv, mask=mask
    )


@pytest.mark.parametrize(
    ("quant", "mask", "kwargs"),
    [
        ("sage2", blocks(300, 260, 2), dict(t=300, s=260, n=2)),
        (None, blocks(200, 400, 1, Mask.causal(190)), dict(t=200, s=400, n=2)),
        (
            "sage2",
            blocks(150, 390, 1, Mask.lengths(None, jnp.array([300, 0])), 64, 128, batch=2),
            dict(b=2, t=150, s=390, sinks=jnp.zeros(1)),
        ),
    ],
)
def test_listed_tiles(quant, mask, kwargs):
    compare(mask, quant, **kwargs)


def test_later_tokens_do_not_leak():
    """Not a bit of a query's output depends on tokens after it, whatever tiles are listed."""
    q, key, v = inputs(1, 256, 256, 1, 1, 64)
    spec = AttentionSpec(1, 256, 256, 1, 1, 64, "bfloat16", 0.125)
    mask = blocks(256, 256, 1, Mask.causal())
    last = jnp.arange(256)[:, None, None] > 170

    def run(key, v):
        return mosaic_sm90.forward(q, key, v, None, None, mask, spec)

    with warpgroup.installed():
        call = jax.jit(run)
        before = jax.block_until_ready(call(key, v))
        after = jax.block_until_ready(call(jnp.where(last, 9, key), jnp.where(last, jnp.nan, v)))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[:, :171], np.asarray(y)[:, :171])


# -- quantisers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "qk"), [(64, "int8"), (96, "e4m3"), (128, "e4m3"), (192, "int8"), (256, "int8")]
)
def test_codes_and_scales(head_dim, qk):
    """Exactly the numbers of the definition, on ragged lengths, with a channel of zeros."""
    q, k, v = inputs(2, 20, 150, 2, 1, head_dim)
    v = v.at[..., 5].set(0)
    lengths = jnp.array([150, 70])
    with warpgroup.installed():
        v_nan = v.at[1, 70:].set(jnp.nan)
        ops = quantize.quantize_qkv(q, k, v_nan, scale_block=128, qk=qk, kv_lengths=lengths)
        jax.block_until_ready(ops)
    valid = (np.arange(150) < np.asarray(lengths)[:, None])[..., None, None]
    k, v = (np.where(valid, np.asarray(x, np.float32), 0) for x in (k, v))
    q = np.asarray(q, np.float32)
    mean = k.sum(1) / np.asarray(lengths)[:, None, None]  # [B, K, H]
    top = quantize.LARGEST[qk]

    got = np.asarray(ops.row_const)[:, :, :20]
    np.testing.assert_allclose(got, np.einsum("btnh,bh->bnt", q, mean[:, 0]), rtol=1e-4, atol=1e-4)
    scale = np.abs(q).max(-1).swapaxes(1, 2) / top
    np.testing.assert_allclose(np.asarray(ops.q_scale)[:, :, :20], scale, rtol=1e-6)
    assert (np.asarray(ops.q, np.float32)[:, 20:] == 0).all()
    check_codes(ops.q[:, :20], q / scale.swapaxes(1, 2)[..., None], qk)

    smooth = np.zeros((2, 256, 1, head_dim), np.float32)
    smooth[:, :150] = np.where(valid, k - mean[:, None], 0)
    amax = np.abs(smooth).reshape(2, 2, 16, 8, head_dim).max((2, 4))  # [B, blocks, residue]
    scale = np.maximum(amax, quantize.TINY) / top
    np.testing.assert_allclose(np.asarray(ops.k_scale)[:, 0], scale, rtol=1e-5)
    wide = np.repeat(scale[:, :, None], 16, 2).reshape(2, 256, 1, 1)
    check_codes(ops.k, smooth / wide, qk)

    v_scale = np.maximum(np.abs(v).max(1), quantize.TINY) / 448
    np.testing.assert_allclose(np.asarray(ops.v_scale), v_scale, rtol=1e-6)
    stored = np.asarray(ops.v, np.float32).reshape(2, 1, head_dim, 16, 16)
    order = np.argsort(quantize.V_ORDER)  # back to the order of tokens
    tokens = stored[..., order].reshape(2, 1, head_dim, 256).transpose(0, 3, 1, 2)
    assert (tokens[:, 150:] == 0).all() and (tokens[..., 5] == 0).all()
    check_codes(tokens[:, :150], v / v_scale[:, None], "e4m3")


@pytest.mark.parametrize(
    ("length", "heads", "head_dim"), [(1100, 1, 64), (40, 18, 64), (40, 5, 256)]
)
def test_several_tiles_and_heads(length, heads, head_dim):
    """More tokens than a tile and a chunk have, more heads than a block of threads."""
    q, k, v = inputs(1, 4, length, heads, heads, head_dim)
    short = length - 7
    with warpgroup.installed():
        ops = quantize.quantize_qkv(q, k, v, scale_block=112)
        again = quantize.quantize_qkv(
            q, k.at[:, short:].set(jnp.nan), v.at[:, short:].set(jnp.nan),
            scale_block=112, kv_lengths=jnp.array([short]),
        )  # fmt: skip
        jax.block_until_ready((ops, again))
    for got, count in ((ops, length), (again, short)):
        exact_k, exact_v = (np.asarray(x, np.float32)[:, :count] for x in (k, v))
        got_q, got_k, got_v = warpgroup.dequantized(
            got._replace(row_const=None, k_mean=None), 4, length
        )
        # Half an INT8 step of rows up to 4; measured .0157.
        np.testing.assert_allclose(got_q, np.asarray(q, np.float32), atol=0.017)
        error = np.asarray(got_k)[:, :count] - (exact_k - exact_k.mean(1, keepdims=True))
        assert np.abs(error).max() <= np.asarray(got.k_scale).max() * 0.51
        # Half a step of e4m3 is 1/16 of a value; measured .0588 of those above .05.
        np.testing.assert_allclose(np.asarray(got_v)[:, :count], exact_v, rtol=0.0626, atol=0.003)
        assert (np.asarray(got_k)[:, count:] == 0).all()
        assert (np.asarray(got_v)[:, count:] == 0).all()


def check_codes(codes, exact, fmt):
    """Codes are the nearest ones; a division in place of the product may tip a tie."""
    codes = np.asarray(codes, np.float32)
    if fmt == "int8":
        assert np.abs(codes - exact).max() <= 0.5 + 1e-3
    else:
        np.testing.assert_allclose(codes, exact, rtol=2.0**-4 * 1.001, atol=2.0**-10 * 1.001)


def test_v_order_makes_scores_an_operand():
    position = {token: place for place, token in enumerate(quantize.V_ORDER)}
    for t in range(4):
        assert [position[2 * t + i] for i in (0, 1)] == [4 * t, 4 * t + 1]
        assert [position[8 + 2 * t + i] for i in (0, 1)] == [4 * t + 2, 4 * t + 3]
