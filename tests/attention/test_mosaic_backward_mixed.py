# SPDX-License-Identifier: Apache-2.0
"""Gradient kernel of keys with INT8 scores: registers run by NumPy, control flow interpreted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_mosaic_backward import exact, inputs, kept_tiles
from test_mosaic_backward_s32 import MASK, SCALE, SHAPE, Plain, error, in_order, plainly_settled
from test_mosaic_control import read

from pallas_kernels._interpret import gpu_interpret_mode
from pallas_kernels.ops.attention import mosaic_sm90_backward as half
from pallas_kernels.ops.attention import mosaic_sm90_backward_mixed as mixed
from pallas_kernels.ops.attention import mosaic_sm90_backward_s32 as s32
from pallas_kernels.ops.attention.mosaic_sm90_backward import plan_of
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _SCALAR
from pallas_kernels.ops.attention.mosaic_sm90_plan import SMEM_LIMIT
from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant

VARIANT = Variant("int8", "half", "bfloat16")


@pytest.fixture(scope="module")
def case():
    """Inputs whose keys have a mean, their sums, and the kernels' operands."""
    q, k, v, d_out = inputs(*SHAPE)
    k = k + jnp.linspace(-3, 3, SHAPE[-1]).astype(k.dtype)
    arrays = (q, k, v, d_out)
    grads, lse, delta = exact(arrays, MASK, SCALE)
    with warpgroup.installed():
        found = mixed.operands(
            *arrays, lse, delta, jnp.zeros_like(lse), scale=SCALE, smooth_k=True, scale_block=128
        )
        found = {name: np.asarray(x) for name, x in jax.block_until_ready(found).items()}
    return arrays, grads, (lse, delta, jnp.zeros_like(lse)), found


def plain(found, delta, mask):
    """What the kernels compute from their operands, with P and dS not rounded."""
    b, t, s, n, k, h = SHAPE
    wide = lambda x: np.asarray(x, np.float64).repeat(n // k, 2)  # noqa: E731
    narrow = lambda x: x.reshape(b, s, k, n // k, h).sum(3)  # noqa: E731
    k_rows = found["k_rows"].repeat(n // k, 1)[:, :, None, :s]
    x = np.einsum("bthd,bshd->bhts", found["q8"][:, :t].astype(float), wide(found["k8"][:, :s]))
    x *= found["q_scale"][:, :, :t, None] * k_rows
    with np.errstate(invalid="ignore"):
        p = np.exp2(x + found["minus_lse"][:, :, :t, None])
    p = np.where(np.asarray(mask.dense(t, s)), p, 0)
    q, v, d_out = (np.asarray(found[name], np.float64) for name in ("q", "v", "d_out"))
    d_p = np.einsum("bthd,bshd->bhts", d_out[:, :t], wide(v[:, :s]))
    d_s = p * (d_p - np.asarray(delta, np.float64)[..., None])
    d_q = np.einsum("bhts,bshd->bthd", d_s * k_rows, wide(in_order(found["k_t"])[:, :s])) * SCALE
    d_k = narrow(np.einsum("bhts,bthd->bshd", d_s, q[:, :t])) * SCALE
    return d_q, d_k, narrow(np.einsum("bhts,bthd->bshd", p, d_out[:, :t]))


class Numbers(mixed.Keys):
    """The same steps, whose sums begin and end as NumPy arrays."""

    count = 2

    def start(self):
        return [[np.zeros(128, np.float32)] * (self.plan.head_dim // 2)] * 2

    def finish(self, sums, load, mean):
        return [[x * f for x in part] for part, f in zip(sums, (self.scale, 1.0), strict=True)]


def test_registers(case):
    """All that a warpgroup does, against the same operands without rounding P and dS."""
    _, grads, (_, delta, _), found = case
    _, t, s, n, k, h = SHAPE
    bf16 = np.dtype(jnp.bfloat16)

    def inline(body, given, outs=()):
        scalar = lambda x: [np.full(128, int(x), np.int32)]  # noqa: E731
        return body(*[scalar(x) if kind is _SCALAR else x for x, kind in given])

    def product(width, a, b_rows, acc, kind):
        return warpgroup.accumulator((a.astype(float) @ b_rows.astype(float).T).astype(np.float32))

    def accumulate(width, a, b, sums, kind):
        if kind == "s32.s8.s8":
            tile = a.astype(np.float64) @ b.astype(np.float64).T
            tile = warpgroup.accumulator(tile.astype(np.int32))
        else:
            words = [word for step in a for word in step]
            tile = warpgroup.from_operand(words, bf16) @ np.asarray(b, np.float64)
            tile = warpgroup.accumulator(tile.astype(np.float32))
        return [x + y for x, y in zip(sums, tile, strict=True)]

    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch:
        for module in (half, mixed):
            patch.setattr(module, "_inline", inline)
            patch.setattr(module, "_k_major", lambda ref, *_: ref)
            patch.setattr(module, "accumulate", accumulate)
            patch.setattr(module, "_wait", lambda left, values, keep=(): values)
        patch.setattr(half, "_mn_major", lambda ref, *_: ref)
        patch.setattr(half, "_wgmma", product)
        patch.setattr(half, "settled", plainly_settled)
        bounds = MASK.min_diff, MASK.max_diff
        plan = plan_of("kv", VARIANT, (1, t, n, h), (1, s, k, h), *bounds, mixed.CONFIGS["kv"])
        got = warpgroup.walk(Numbers("kv", plan, SCALE), found, n // k)
    for x, y, z in zip(got, plain(found, delta, MASK)[1:], grads[1:], strict=True):
        assert error(x, y) < 0.004  # measured: .0017, from 16 bits
        assert error(x, z) < 0.02  # measured: .0099, from INT8 scores


class PlainKeys(mixed.Keys):
    """The same steps on whole arrays, without rounding P and dS."""

    def start(self):
        return (jnp.zeros((64, self.plan.head_dim), jnp.float32),) * 2

    def issue(self, own, streamed):
        return read(own) @ read(streamed).T

    issue_scores = issue

    def settle(self, sums, operands, pending, left=0):
        return sums, pending

    def prepare(self, pending, slots, fixed, where, sums):
        (scores, d_p), lines, plan = pending, read(slots[0][1]), self.plan
        block = plan.config.block_kv
        shift, scale = lines[: 2 * block].reshape(block, 2).T
        p = jnp.exp2(scores * fixed[0][:, None] * scale + shift)
        if where is not None:
            away = where["col"] + jnp.arange(block) - (where["row"] + jnp.arange(64)[:, None])
            ok = where["col"] + jnp.arange(block) < plan.kv_len
            ok &= (away <= plan.max_diff) & (away >= plan.min_diff)
            p = jnp.where(ok, p, 0)
        return sums, (p * (d_p + lines[2 * block :]), p)

    def multiply(self, sums, operands, slots):
        refs = self.last(slots)
        return tuple(s + x @ read(r) for s, x, r in zip(sums, operands, refs, strict=True))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="as in test_mosaic_control")
@pytest.mark.parametrize("listed", [False, True], ids=["bounds", "lists"])
@pytest.mark.parametrize("schedule", ["none", "ahead"])
def test_control_flow(monkeypatch, case, listed, schedule):
    """A window, ragged lengths, two heads per key; lists in quarters of the kernels' tiles."""
    for side, config in mixed.CONFIGS.items():
        monkeypatch.setitem(mixed.CONFIGS, side, dataclasses.replace(config, schedule=schedule))
    arrays, _, sums, found = case
    bounds = {"min_diff": MASK.min_diff, "max_diff": MASK.max_diff}
    blocks = kept_tiles(*SHAPE[1:4], 64, 64, MASK) if listed else None
    monkeypatch.setattr(s32, "Running", Plain)
    monkeypatch.setattr(mixed, "Keys", PlainKeys)
    monkeypatch.setattr(
        mixed, "operands", lambda *_, **__: {k: jnp.asarray(x) for k, x in found.items()}
    )
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **kwargs: None)
    # After its last tile a walk that is ahead reads, for nothing, what may be overwritten then.
    with gpu_interpret_mode(detect_races=schedule != "ahead"):
        run = jax.jit(lambda *x: mixed.gradient(*x, scale=SCALE, blocks=blocks, **bounds))
        got = run(*arrays, *sums)
    want = plain(found, sums[1], blocks.as_mask() if listed else MASK)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and error(x, y) < 0.006


def test_shared_memory_suffices():
    config, shapes = mixed.CONFIGS["kv"], ((1, 256, 2, 128), (1, 256, 2, 128))
    plan = plan_of("kv", VARIANT, *shapes, None, None, config)
    steps = mixed.Keys("kv", plan, SCALE)
    size = lambda x: int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize  # noqa: E731
    used = sum(size(steps.memory(name, (config.num_compute,), 64)) for name in steps.own)
    used += sum(
        size(steps.memory(name, (config.num_stages,), config.block_kv))
        for part in steps.ring
        for name in part
    )
    assert used <= SMEM_LIMIT
