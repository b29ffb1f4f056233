# SPDX-License-Identifier: Apache-2.0
"""INT8 gradient kernels with integer sums: registers run by NumPy, control flow interpreted."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_mosaic_backward import exact, inputs

from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention import mosaic_sm90_backward_s32 as s32
from pallas_kernels.ops.attention.mosaic_sm90_backward import plan_of
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _SCALAR
from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant
from pallas_kernels.ops.quantize import mosaic_sm90 as quantize

SHAPE = (1, 200, 150, 2, 1, 64)  # B, T, S, N, K, H
SCALE = 0.125
MASK = Mask.causal(30) & Mask.window(90, None)


def in_order(codes):
    """Turned operand [B, heads, H, Lp] as [B, Lp, heads, H]."""
    b, heads, head_dim, length = codes.shape
    x = np.asarray(codes, np.float64).reshape(b, heads, head_dim, -1, 16)
    x = x[..., np.argsort(quantize.V_ORDER)].reshape(b, heads, head_dim, length)
    return x.transpose(0, 3, 1, 2)


def query_numbers(found):
    """Shift, scale, factor and summand, [B, N, Tp] each."""
    x = found["of_queries"]
    block = s32.CONFIGS["kv"].block_kv
    x = x.reshape(*x.shape[:2], -1, 2, block, 2).swapaxes(3, 4).reshape(*x.shape[:2], -1, 4)
    return np.moveaxis(x, -1, 0)


@pytest.fixture(scope="module")
def case():
    """Inputs whose keys have a mean, their sums, and the kernels' operands."""
    q, k, v, d_out = inputs(*SHAPE)
    k = k + jnp.linspace(-3, 3, SHAPE[-1]).astype(k.dtype)
    arrays = (q, k, v, d_out)
    grads, lse, delta = exact(arrays, MASK, SCALE)
    rest = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    with warpgroup.installed():
        found = s32.operands(
            *arrays, lse, delta - rest, rest, scale=SCALE, smooth_k=True, scale_block=128
        )
        found = {name: np.asarray(x) for name, x in jax.block_until_ready(found).items()}
    return arrays, grads, (lse, delta, rest), found


def plain(found, sums, mask):
    """What the kernels compute from their operands, with P and dS not rounded."""
    b, t, s, n, k, h = SHAPE
    lse, delta, rest = (np.asarray(x, np.float64) for x in sums)
    wide = lambda x: np.asarray(x, np.float64).repeat(n // k, 2)  # noqa: E731
    scores = np.einsum(
        "bthd,bshd->bhts", found["q8"][:, :t].astype(float), wide(found["k8"][:, :s])
    )
    k_rows = found["k_rows"].repeat(n // k, 1)[:, :, None, :s]
    scores *= found["q_scale"][:, :, :t, None] * k_rows
    ok = np.asarray(mask.dense(t, s))
    with np.errstate(invalid="ignore"):
        p = np.where(ok, np.exp2(scores + found["minus_lse"][:, :, :t, None]), 0)
    v, d_out = (np.asarray(found[x], np.float64) for x in ("v", "d_out"))
    d_p = np.einsum("bthd,bshd->bhts", d_out[:, :t], wide(v[:, :s]))
    d_s = p * (d_p - (delta - rest)[..., None])
    shift, scale, factor, summand = (x[:, :, :t, None] for x in query_numbers(found))
    with np.errstate(invalid="ignore"):
        p_of_keys = np.where(
            ok, np.exp2(scores / found["q_scale"][:, :, :t, None] * scale + shift), 0
        )
    d_s_of_keys = p_of_keys * (d_p * factor + summand)
    narrow = lambda x: x.reshape(b, s, k, n // k, h).sum(3)  # noqa: E731
    d_q = np.einsum("bhts,bshd->bthd", d_s * k_rows, wide(in_order(found["k_t"])[:, :s])) * SCALE
    d_q += SCALE * rest.transpose(0, 2, 1)[..., None] * wide(found["k_mean"][:, None])
    turned = [in_order(found[name])[:, :t] for name in ("q_t", "d_out_t")]
    d_k = narrow(np.einsum("bhts,bthd->bshd", d_s_of_keys, turned[0])) * SCALE
    return d_q, d_k, narrow(np.einsum("bhts,bthd->bshd", p_of_keys, turned[1]))


def error(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.abs(got - want).sum() / np.abs(want).sum()


@contextlib.contextmanager
def registers():
    """NumPy in the place of a warpgroup, in which references are arrays."""

    def inline(body, given, outs=()):
        scalar = lambda x: [np.full(128, int(x), np.int32)]  # noqa: E731
        return body(*[scalar(x) if t is _SCALAR else x for x, t in given])

    def wgmma(n, a, b, acc, kind):
        tile = a.astype(np.float64) @ b[:n].astype(np.float64).T
        return warpgroup.accumulator(tile.astype(np.int32 if acc == "r" else np.float32))

    def accumulate(n, a, b, sums, kind):
        a = warpgroup.from_operand([word for step in a for word in step], np.dtype(np.int8))
        assert np.abs(a).max() <= 127
        tile = warpgroup.accumulator((a @ b[:n].astype(np.float64).T).astype(np.int32))
        return [x + y for x, y in zip(sums, tile, strict=True)]

    from pallas_kernels.ops.attention import mosaic_sm90_backward_int8 as int8

    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch:
        for module in (s32, int8):
            patch.setattr(module, "_inline", inline)
            patch.setattr(module, "_k_major", lambda ref, swizzle, first=0: ref[first:])
        patch.setattr(int8, "_wgmma", wgmma)
        patch.setattr(s32, "accumulate", accumulate)
        patch.setattr(s32, "_wait", lambda left, values, keep=(): values)
        patch.setattr(plgpu, "load", lambda ref, **_: warpgroup.per_column(ref))
        yield


def run_side(side, found, mask):
    """One kernel's loops, with every tile masked; results [rows, heads, H] for each sum."""
    _, t, s, n, k, h = SHAPE
    shapes = (1, t, n, h), (1, s, k, h)
    variant, bounds = Variant("int8", "half"), (mask.min_diff, mask.max_diff)
    groups = n // k
    plan = plan_of(side, variant, *shapes, *bounds, s32.CONFIGS[side])
    steps = s32.STEPS[side](side, plan, SCALE, 1 if side == "q" else groups)
    block = plan.config.block_kv
    x = {}
    for name, array in found.items():  # what lies beyond the end is copied as zeros
        token = {"q8": 1, "k8": 1, "v": 1, "d_out": 1}.get(name)
        pad = [(0, 384 * (i == token)) for i in range(array.ndim)]
        x[name] = np.pad(array, pad)[0]

    def piece(name, head, start, size):
        if name.endswith("_t"):
            return x[name][head][:, start : start + size]
        if name in steps.copied:
            width = steps.copied[name]
            return np.ascontiguousarray(x[name][head][start // size * width :][:width])
        return x[name][start : start + size, head]

    results = [
        np.zeros((plan.q_tiles * plan.config.block_q, plan.num_heads, h))
        for _ in range(steps.count)
    ]
    for head, first in np.ndindex(plan.num_heads, len(results[0]) // 64):
        row = first * 64
        own = [piece(name, head, row, 64) for name in steps.own]
        load = lambda name: warpgroup.per_row(x[name][head][row : row + 64])  # noqa: B023, E731
        fixed, sums = steps.of_owner(load), steps.start()
        streamed = [head // groups] if side == "q" else range(head * groups, (head + 1) * groups)
        for other in streamed:
            for start in range(0, plan.kv_len, block):
                ring = [[piece(name, other, start, block) for name in part] for part in steps.ring]
                where = {"row": row, "col": start, "first_col": start, "last_col": start + block}
                sums = steps.tile(
                    own, ring, fixed, None, sums, where, lambda i: None, lambda i: None
                )
        mean = x["k_mean"][head // groups] if side == "q" else None
        for result, total in zip(results, steps.finish(sums, load, mean), strict=True):
            result[row : row + 64, head] = warpgroup.from_accumulator(total, h)
    return [result[None, : plan.q_len] for result in results]


def test_registers(case):
    """All that a warpgroup does, against the same operands without rounding P and dS."""
    _, _, sums, found = case
    want = plain(found, sums, MASK)
    with registers():
        got = [*run_side("q", found, MASK), *run_side("kv", found, MASK)]
    errors = [error(x, y) for x, y in zip(got, want, strict=True)]
    assert max(errors) < 0.03, errors


def test_near_float32(case):
    """Operands, and what follows from them, against float32."""
    _, grads, sums, found = case
    lse, delta, rest = sums
    got = plain(found, (lse, delta, jnp.zeros_like(rest) * rest), MASK)
    del got
    got = plain(found, sums, MASK)
    b, t, s, n, k, h = SHAPE
    want = [np.asarray(x, np.float64) for x in grads]
    for x, y in zip(got[2:], want[2:], strict=True):
        assert error(x, y) < 0.03
