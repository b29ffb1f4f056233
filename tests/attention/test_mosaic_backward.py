# SPDX-License-Identifier: Apache-2.0
"""The sm90 backward kernels: they lower for CUDA, and their control flow under the interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_mosaic_control import read

from pallas_kernels._interpret import abstract_gpu, gpu_interpret_mode
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import mosaic_sm90, reference, xla
from pallas_kernels.ops.attention import mosaic_sm90_backward as backward
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _SCALAR
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, Variant
from pallas_kernels.ops.attention.spec import QUANTS, AttentionSpec


def exact(arrays, mask, scale):
    """Float32 gradients, log-sum-exp [B, N, T] and delta."""
    q, k, v, d_out = (x.astype(jnp.float32) for x in arrays)
    (b, t, n, h), (_, s, heads, _) = q.shape, k.shape
    spec = AttentionSpec(b, t, s, n, heads, h, "float32", scale)
    run = lambda *x: reference.attention(*x, None, None, mask, spec)  # noqa: E731
    (out, lse), pull = jax.vjp(run, q, k, v)
    delta = (out * d_out).sum(-1)
    grads = pull((d_out, jnp.zeros_like(lse)))
    return grads, lse.swapaxes(1, 2), delta.swapaxes(1, 2)


def inputs(b, t, s, n, k, h):
    rng = np.random.default_rng(t)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    return [jnp.asarray(rng.normal(size=x), jnp.float32).astype(jnp.bfloat16) for x in shapes]


@pytest.fixture
def plain_products(monkeypatch):
    def products(*operands, shape):
        return [read(a) @ read(b).T for a, b in operands]

    def add(sums, operands):
        return tuple(
            total + a.astype(b.dtype).astype(jnp.float32) @ read(b)
            for total, (a, b) in zip(sums, operands, strict=True)
        )

    # Registers are out of the interpreter's reach; walks that are ahead are tested with INT8.
    monkeypatch.setattr(backward, "STEPS", dict.fromkeys(("q", "kv"), backward.Half))
    monkeypatch.setattr(backward, "_products", products)
    monkeypatch.setattr(backward, "add_half", add)
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **kwargs: None)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="as in test_mosaic_control")
def test_control_flow(plain_products):
    """A window on both sides, queries behind the last key's, ragged lengths, two heads per key."""
    shape, mask = (1, 260, 140, 2, 1, 64), Mask.window(70, 9)
    arrays, scale = inputs(*shape), 0.125
    want, lse, delta = exact(arrays, mask, scale)
    bounds = {"min_diff": mask.min_diff, "max_diff": mask.max_diff}
    with gpu_interpret_mode(detect_races=True):
        got = jax.jit(lambda *x: backward.gradient(*x, scale=scale, **bounds))(*arrays, lse, delta)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert float(jnp.abs(x - y).sum() / jnp.abs(y).sum()) < 0.01


def kept_tiles(t, s, heads, block_q, block_kv, mask=None):
    """Half of the tiles at random; a row and a column of tiles without any."""
    kept = np.random.default_rng(1).random((1, heads, -(-t // block_q), -(-s // block_kv))) < 0.5
    kept[:, 0, -1], kept[..., 0] = False, False
    return BlockMask.from_blocks(
        jnp.asarray(kept), t, s, block_q=block_q, block_kv=block_kv, mask=mask
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="as in test_mosaic_control")
def test_control_flow_over_lists(plain_products):
    """Lists of both warpgroups, in quarters of the kernels' tiles; two query heads for a key."""
    shape = (1, 200, 300, 2, 1, 64)
    arrays, scale = inputs(*shape), 0.125
    blocks = kept_tiles(*shape[1:4], 64, 64, Mask.causal(20))
    want, lse, delta = exact(arrays, blocks.as_mask(), scale)
    with gpu_interpret_mode(detect_races=True):
        run = jax.jit(lambda *x: backward.gradient(*x, scale=scale, blocks=blocks, max_diff=20))
        got = run(*arrays, lse, delta)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert float(jnp.abs(x - y).sum() / jnp.abs(y).sum()) < 0.01


def plain_gradient(q, k, v, d_out, lse, delta, *, scale, min_diff, max_diff, blocks):
    """What the kernels compute."""
    groups = q.shape[2] // k.shape[2]
    wide = lambda x: jnp.repeat(x, groups, 2)  # noqa: E731
    narrow = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)  # noqa: E731
    ok = Mask(min_diff, max_diff).dense(q.shape[1], k.shape[1])
    ok = ok if blocks is None else blocks.to_dense()
    x = jnp.einsum("bthd,bshd->bhts", q, wide(k)) * scale
    p = jnp.where(ok, jnp.exp(x - jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None]), 0)
    ds = p * (jnp.einsum("bthd,bshd->bhts", d_out, wide(v)) - delta[..., None])
    dq = jnp.einsum("bhts,bshd->bthd", ds, wide(k)) * scale
    dk = jnp.einsum("bhts,bthd->bshd", ds, q) * scale
    return dq, narrow(dk), narrow(jnp.einsum("bhts,bthd->bshd", p, d_out))


@pytest.mark.multidevice
@pytest.mark.parametrize("listed", [False, True], ids=["bounds", "lists, int8"])
def test_gradient_around_the_kernels(monkeypatch, listed):
    """Against XLA's gradient, with sinks and a padded head size; split over devices; under vmap."""

    def plain_int8(q, k, v, d_out, lse, delta, rest, *, smooth_k, scale_block, v_codes, **rules):
        assert smooth_k and scale_block == 8 and rest.shape == delta.shape
        assert not v_codes
        return plain_gradient(q, k, v, d_out, lse, delta, **rules)

    monkeypatch.setattr(mosaic_sm90.backward_int8, "gradient", plain_int8)
    monkeypatch.setattr(backward, "gradient", plain_gradient)
    monkeypatch.setattr(backward, "HEAD_DIMS", (16, 128))
    (b, t, s, n, k, h), rule = (4, 20, 24, 4, 2, 8), Mask.causal(-3)
    mask = kept_tiles(t, s, n, 8, 8, rule) if listed else rule
    dense = mask.as_mask() if listed else mask
    spec = AttentionSpec(b, t, s, n, k, h, "float32", 0.3, has_sinks=True)
    q, key, v, d_out = (x.astype(jnp.float32) for x in inputs(b, t, s, n, k, h))
    sinks = jnp.array([0.0, 1.0, 2.0, -jnp.inf])
    out, lse = xla.attention(q, key, v, None, sinks, dense, spec)
    saved, cotangents = (q, key, v, None, sinks, dense, out, lse), (d_out, jnp.sin(out[..., 0]))
    want = jax.tree.leaves(xla._flash_bwd(spec, 8, saved, cotangents))
    if listed:
        spec = dataclasses.replace(spec, quant=QUANTS["sage_bwd"])
    saved = (q, key, v, None, sinks, mask, out, lse)
    assert mosaic_sm90._has_gradient_kernel(spec, mask)
    assert not mosaic_sm90._has_gradient_kernel(spec, Mask.causal(jnp.array([1])))

    def run(saved, cotangents):
        return jax.tree.leaves(mosaic_sm90._kernel_gradient(spec, None, saved, cotangents))

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=auto, devices=jax.devices()[:4])
    four = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("b", None, "h")))  # noqa: E731
    *arrays, lists, out_, lse_ = saved
    placed = jax.tree.map(lambda x: four(x) if x.ndim > 2 else x, (arrays, out_, lse_, cotangents))
    placed = (*placed[0], lists, *placed[1:3]), placed[3]
    step = jax.jit(run)
    text = step.lower(*placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (q, key, v, out, lse, cotangents))

    def one(q, key, v, out, lse, cotangents):
        return run((q, key, v, None, sinks, mask, out, lse), cotangents)

    several = [x[1] for x in jax.vmap(one)(*twice)]
    for got in (run(saved, cotangents), step(*placed), several):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "bounds"),
    [
        ((1, 256, 512, 4, 2, 128), {}),
        ((2, 1000, 777, 4, 1, 64), {"max_diff": 0, "min_diff": -100}),
    ],
)
def test_lowers_for_cuda(shape, bounds):
    b, t, s, n, k, h = shape
    half = lambda *x: jax.ShapeDtypeStruct(x, jnp.bfloat16)  # noqa: E731
    rows = jax.ShapeDtypeStruct((b, n, t), jnp.float32)
    arrays = half(b, t, n, h), half(b, s, k, h), half(b, s, k, h), half(b, t, n, h), rows, rows
    with abstract_gpu():
        traced = jax.jit(lambda *x: backward.gradient(*x, scale=0.1, **bounds)).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("window", [None, 40], ids=["whole", "window"])
@pytest.mark.parametrize("side", ["q", "kv"])
def test_registers(side, window):
    """What a warpgroup does for 64 rows, run by NumPy."""
    (b, t, s, n, k, h), scale = (
        (1, 128, 64, 1, 1, 64) if side == "kv" else (1, 64, 128, 1, 1, 64),
        0.125,
    )
    mask = Mask() if window is None else Mask.window(window, window)
    arrays = inputs(b, t, s, n, k, h)
    want, lse, delta = exact(arrays, mask, scale)
    variant, config = Variant("half", "half", "bfloat16"), backward.CONFIGS["kv"]
    bounds = None if window is None else -window, window
    plan = backward.plan_of(side, variant, (b, t, n, h), (b, s, k, h), *bounds, config)
    query, key, value, d_out = (np.asarray(x, np.float32)[0, :, 0] for x in arrays)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * LOG2E  # rows without keys have P = 0
    numbers = [-np.asarray(x, np.float32)[0, 0] for x in (lse, delta)]

    def product(width, a, b_rows, acc, kind):
        assert (acc, kind, width) == ("f", "f32.bf16.bf16", config.block_kv)
        return warpgroup.accumulator((a @ b_rows.T).astype(np.float32))

    def accumulate(width, a, rows, sums, kind):
        words = [word for step in a for word in step]
        tile = warpgroup.from_operand(words, np.dtype(jnp.bfloat16)) @ rows[:, :width]
        tile = warpgroup.accumulator(tile.astype(np.float32))
        return [x + y for x, y in zip(sums, tile, strict=True)]

    def inline(body, given, outs=()):
        scalar = lambda x: [np.full(128, int(x), np.int32)]  # noqa: E731
        return body(*[scalar(x) if kind is _SCALAR else x for x, kind in given])

    def done(given, layouts, types, left=0):
        return tuple(given[: len(types)])

    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_inline", inline)
        for name in ("_k_major", "_mn_major"):
            patch.setattr(backward, name, lambda ref, *_: ref)
        patch.setattr(backward, "_wgmma", product)
        patch.setattr(backward, "accumulate", accumulate)
        patch.setattr(backward, "_wait", lambda left, values, keep=(): values)
        patch.setattr(backward, "settled", done)
        steps = backward.Registers(side, plan, scale)
        own, streamed = ((key, value), (query, d_out)), ((query, d_out), (key, value))
        own, streamed = own[side == "q"], streamed[side == "q"]
        fixed = [warpgroup.per_row(x) for x in numbers] if side == "q" else []
        wanted = want[:1] if side == "q" else want[1:]
        sums = [[np.zeros(128, np.float32)] * (h // 2) for _ in wanted]
        for first in range(0, len(streamed[0]), config.block_kv):
            rows = slice(first, first + config.block_kv)
            ring = [(x[rows], number[rows]) for x, number in zip(streamed, numbers, strict=True)]
            where = None if window is None else {"row": 0, "col": first}
            sums = steps.tile(own, ring, fixed, None, sums, where, *[lambda *_: None] * 4)
        got = [warpgroup.from_accumulator(x, h) for x in sums]
    for x, y, factor in zip(got, wanted, (scale, 1.0), strict=False):
        y = np.asarray(y)[0, :, 0]
        assert np.abs(factor * x - y).sum() < 0.01 * np.abs(y).sum()
