# SPDX-License-Identifier: Apache-2.0
"""The sm90 attention kernel without a GPU: it lowers for CUDA, and its schedule is sound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention import mosaic_sm90
from pallas_kernels.ops.attention.mosaic_sm90 import Config
from pallas_kernels.ops.attention.spec import QUANTS, AttentionSpec
from pallas_kernels.ops.quantize.mosaic_sm90 import V_ORDER


def _spec(b=1, t=256, s=512, n=4, k=2, h=128, dtype="bfloat16", **kwargs):
    return AttentionSpec(b, t, s, n, k, h, dtype, h**-0.5, **{"quant": QUANTS["sage2"], **kwargs})


def _lower(spec, mask, config=None, gradient=False):
    def run(q, k, v, mask):
        return mosaic_sm90.attention(q, k, v, None, None, mask, spec, config)

    def loss(q, k, v, mask):
        return run(q, k, v, mask)[0].astype(jnp.float32).sum()

    dtype = jnp.dtype(spec.dtype)
    q = jax.ShapeDtypeStruct((spec.batch, spec.q_len, spec.num_heads, spec.head_dim), dtype)
    kv = jax.ShapeDtypeStruct((spec.batch, spec.kv_len, spec.num_kv_heads, spec.head_dim), dtype)
    fn = jax.grad(loss, (0, 1, 2)) if gradient else run
    return jax.jit(fn).trace(q, kv, kv, mask).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "mask", "config"),
    [
        ({}, Mask(), None),
        ({"t": 1000, "s": 777}, Mask.causal(), None),
        ({"t": 17, "s": 100, "h": 64}, Mask.causal(83) & Mask.window(20, 0), None),
        ({"dtype": "float16"}, Mask.lengths(jnp.array([3]), jnp.array([5])), None),
        ({}, Mask(), Config(block_kv=128, num_stages=4, qk_split=1, schedule="none")),
        ({}, Mask.causal(), Config(persistent=False)),
    ],
)
def test_lowers_for_cuda(shape, mask, config):
    text = _lower(_spec(**shape), mask, config)
    assert text.count("mosaic_gpu") >= 5  # statistics, Q, K, V, attention


def test_gradient_lowers_for_cuda():
    assert "mosaic_gpu" in _lower(_spec(), Mask.causal(), gradient=True)


@pytest.mark.parametrize("max_diff", [None, 0])
@pytest.mark.parametrize("heads", [1, 8, 12])
def test_every_tile_is_handed_out_once_and_evenly(max_diff, heads):
    mask = mosaic_sm90._Mask(None, max_diff)
    plan = mosaic_sm90._Plan(Config(), mask, 2, 4096, 4096, heads, heads, 128, 256, False)
    table = mosaic_sm90._work_table(plan)
    tiles = [row[1 : 1 + row[0]] for row in table]
    assert sorted(np.concatenate(tiles)) == list(range(plan.total))
    cost = [
        sum(
            hi - lo
            for lo, _, _, hi in (plan.kv_tiles(plan.tile_of(int(i))[0], 4096, 4096) for i in row)
        )
        for row in tiles
    ]
    assert max(cost) - min(cost) <= 16  # one query tile of the longest kind


@pytest.mark.parametrize("bounds", [(None, None), (None, 0), (-100, 0), (-50, 30), (None, 700)])
def test_unmasked_tiles_are_really_free_of_masks(bounds):
    t_len, s_len = 520, 900
    plan = mosaic_sm90._Plan(
        Config(), mosaic_sm90._Mask(*bounds), 1, t_len, s_len, 1, 1, 128, 256, False
    )
    rows, cols = np.arange(5 * 128)[:, None], np.arange(1024)[None]
    allowed = np.broadcast_to(cols < s_len, (640, 1024)).copy()
    if bounds[0] is not None:
        allowed &= cols - rows >= bounds[0]
    if bounds[1] is not None:
        allowed &= cols - rows <= bounds[1]
    for q_tile in range(plan.q_tiles):
        lo, mid_lo, mid_hi, hi = plan.kv_tiles(q_tile, t_len, s_len)
        tile = allowed[q_tile * 128 : q_tile * 128 + 128].reshape(128, 4, 256)
        assert 0 <= lo <= mid_lo <= mid_hi <= hi <= 4 and lo < hi
        assert tile[:, mid_lo:mid_hi].all()
        assert not tile[:, :lo].any() and not tile[:, hi:].any()


def test_v_order_makes_scores_an_operand():
    position = {token: place for place, token in enumerate(V_ORDER)}
    for t in range(4):
        assert [position[2 * t + i] for i in (0, 1)] == [4 * t, 4 * t + 1]
        assert [position[8 + 2 * t + i] for i in (0, 1)] == [4 * t + 2, 4 * t + 3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_kv": 192}, "block_kv must be 128 or 256 keys; got 192"),
        ({"registers": 240}, "2 x 240 \\+ 40 registers for 128 threads each are 66560"),
        ({"registers": 230}, "multiple of 8"),
        ({"num_stages": 1}, "num_stages must be at least 2; got 1"),
        ({"schedule": "pair"}, "schedule must be"),
    ],
)
def test_config_is_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Config(**kwargs)


def test_too_many_stages_are_refused():
    with pytest.raises(NotImplementedError, match="shared memory"):
        _lower(_spec(), Mask(), Config(num_stages=3))


@pytest.mark.parametrize(
    ("spec", "mask", "reason"),
    [
        (_spec(quant=None), Mask(), "8-bit attention only"),
        (_spec(quant=QUANTS["sage1"]), Mask(), "pv='fp8_e4m3'"),
        (_spec(h=96), Mask(), "head_dim 64 or 128; got 96"),
        (_spec(dtype="float32"), Mask(), "bfloat16 or float16; got float32"),
        (_spec(soft_cap=3.0), Mask(), "logits_soft_cap"),
        (_spec(), Mask.segment_ids(jnp.zeros((1, 4), jnp.int32)), "segment_ids"),
        (_spec(), Mask.causal(jnp.array([3])), "causal_offset as a Python int"),
    ],
)
def test_reasons(spec, mask, reason):
    assert reason in mosaic_sm90.unsupported_reason(spec, mask)
    with pytest.raises(NotImplementedError):
        mosaic_sm90.attention(None, None, None, None, None, mask, spec)
