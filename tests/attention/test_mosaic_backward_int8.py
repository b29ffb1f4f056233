# SPDX-License-Identifier: Apache-2.0
"""The INT8 gradient kernels: their registers run by NumPy, their control flow interpreted."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx_program import Program, spilled
from test_mosaic_backward import exact, inputs, kept_tiles
from test_mosaic_control import read

from pallas_kernels._interpret import gpu_interpret_mode
from pallas_kernels.masks import Mask
from pallas_kernels.ops.attention import mosaic_sm90_backward_int8 as int8
from pallas_kernels.ops.attention.mosaic_sm90_backward import plan_of
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _SCALAR
from pallas_kernels.ops.attention.mosaic_sm90_plan import SMEM_LIMIT
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, Variant
from pallas_kernels.ops.quantize import mosaic_sm90 as quantize

SHAPE = (1, 200, 150, 2, 1, 64)  # B, T, S, N, K, H
SCALE = 0.125


def dequantized(codes, lines, block, first=0):
    """Turned operand [B, heads, H, Lp] as [B, Lp, heads, H]."""
    b, heads, head_dim, length = codes.shape
    x = np.asarray(codes, np.float64).reshape(b, heads, head_dim, -1, 16)
    x = x[..., np.argsort(quantize.V_ORDER)].reshape(b, heads, head_dim, length)
    scale = np.asarray(lines).reshape(b, heads, -1, int8.LINE)[..., first : first + head_dim // 32]
    scale = scale[:, :, : length // block].repeat(block, 2).repeat(32, 3)
    return x.transpose(0, 3, 1, 2) * scale.transpose(0, 2, 1, 3)


@pytest.fixture(scope="module")
def case():
    """Inputs whose keys have a mean, their sums, and the kernels' operands."""
    q, k, v, d_out = inputs(*SHAPE)
    k = k + jnp.linspace(-3, 3, SHAPE[-1]).astype(k.dtype)
    mask = Mask.causal(30) & Mask.window(90, None)
    arrays = (q, k, v, d_out)
    grads, lse, delta = exact(arrays, mask, SCALE)
    rest = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    with warpgroup.installed():
        found = int8.operands(
            *arrays, lse, delta - rest, rest, scale=SCALE, smooth_k=True, scale_block=128
        )
        found = {name: np.asarray(x) for name, x in jax.block_until_ready(found).items()}
    return arrays, mask, grads, (lse, delta, rest), found


def plain(found, sums, mask):
    """What the kernels compute from their operands, with P and dS not rounded."""
    b, t, s, n, k, h = SHAPE
    lse, delta, rest = (np.asarray(x, np.float64) for x in sums)
    wide = lambda x: np.asarray(x, np.float64).repeat(n // k, 2)  # noqa: E731
    scores = np.einsum(
        "bthd,bshd->bhts", found["q8"][:, :t].astype(float), wide(found["k8"][:, :s])
    )
    scores *= found["q_scale"][:, :, :t, None] * found["k_rows"].repeat(n // k, 1)[:, :, None, :s]
    ok = np.asarray(mask.dense(t, s))
    with np.errstate(invalid="ignore"):
        p = np.where(ok, np.exp2(scores + found["minus_lse"][:, :, :t, None]), 0)
    v, d_out = (np.asarray(found[x], np.float64) for x in ("v", "d_out"))
    d_s = p * (
        np.einsum("bthd,bshd->bhts", d_out[:, :t], wide(v[:, :s])) - (delta - rest)[..., None]
    )
    turned = [dequantized(found["k_t"], found["k_t_scale"], 128)[:, :s]]
    turned += [
        dequantized(found[name], found["q_side_scale"], 64, first)[:, :t]
        for name, first in (("q_t", 0), ("d_out_t", h // 32))
    ]
    narrow = lambda x: x.reshape(b, s, k, n // k, h).sum(3)  # noqa: E731
    d_q = np.einsum("bhts,bshd->bthd", d_s, wide(turned[0])) * SCALE
    d_q += SCALE * rest.transpose(0, 2, 1)[..., None] * wide(found["k_mean"][:, None])
    d_k = narrow(np.einsum("bhts,bthd->bshd", d_s, turned[1])) * SCALE
    return d_q, d_k, narrow(np.einsum("bhts,bthd->bshd", p, turned[2]))


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
        if isinstance(a, list):
            a = warpgroup.from_operand([word for step in a for word in step], np.dtype(np.int8))
        tile = a.astype(np.float64) @ b[:n].astype(np.float64).T
        return warpgroup.accumulator(tile.astype(np.int32 if acc == "r" else np.float32))

    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_inline", inline)
        patch.setattr(int8, "_k_major", lambda ref, swizzle, first=0: ref[first:])
        patch.setattr(int8, "_wgmma", wgmma)
        patch.setattr(int8, "_wait", lambda left, values, keep=(): values)
        patch.setattr(plgpu, "load", lambda ref, **_: warpgroup.per_column(ref))
        yield


def run_side(side, found, mask):
    """One kernel's loops, with every tile masked; results [rows, heads, H] for each sum."""
    _, t, s, n, k, h = SHAPE
    shapes = (1, t, n, h), (1, s, k, h)
    variant, bounds = Variant("int8", "half"), (mask.min_diff, mask.max_diff)
    steps = int8.Int8(side, plan_of(side, variant, *shapes, *bounds, int8.CONFIGS[side]), SCALE)
    return warpgroup.walk(steps, found, n // k)


def test_registers(case):
    """All that a warpgroup does, against the same operands without rounding P and dS."""
    _, mask, _, sums, found = case
    want = plain(found, sums, mask)
    with registers():
        got = [*run_side("q", found, mask), *run_side("kv", found, mask)]
    # Measured: dQ .0077, dK .0106, dV .0097, what rounding P and dS to 127 steps of a row leaves.
    for x, y in zip(got, want, strict=True):
        assert error(x, y) < 0.012


def test_operands_are_near(case):
    """The operands' own rounding, against float32: .02 as for P and dS in INT8 elsewhere."""
    (q, k, _, d_out), _, _, (lse, _, _), found = case
    t, h = SHAPE[1], SHAPE[-1]
    mean = np.asarray(k, np.float64).mean(1, keepdims=True)
    for name, lines, block, first, x in (
        ("k_t", "k_t_scale", 128, 0, np.asarray(k, np.float64) - mean),
        ("q_t", "q_side_scale", 64, 0, q),
        ("d_out_t", "q_side_scale", 64, h // 32, d_out),
    ):
        back = dequantized(found[name], found[lines], block, first)
        assert error(back[:, : x.shape[1]], x) < 0.012
        assert (back[:, x.shape[1] :] == 0).all()
    np.testing.assert_allclose(found["k_mean"], mean[:, 0], atol=1e-5)
    assert (found["minus_lse"][:, :, t:] == -np.inf).all() and found["k8"].shape[1] == 256
    live = np.isfinite(lse)
    const = np.einsum("bthd,bkd->bht", np.asarray(q, np.float64), mean[:, 0])
    want = -(np.asarray(lse) - const * SCALE) * LOG2E
    np.testing.assert_allclose(found["minus_lse"][:, :, :t][live], want[live], atol=1e-3)


# -- control flow ----------------------------------------------------------------------------------


def plain_tile(steps, own, ring, fixed, where):
    """P and dS of a tile, not rounded."""
    (a8, a16), (b8, b16, *numbers) = map(read, own), map(read, ring)
    block, plan = steps.plan.config.block_kv, steps.plan
    scores, d_p = a8 @ b8.T, a16 @ b16.T
    if steps.side == "q":
        scale = fixed[0][:, None] * jnp.tile(numbers[0][:8], block // 8)
        shift, delta = fixed[1][:, None], fixed[2][:, None]
    else:
        lines = numbers[0].reshape(block, 2)
        scale, shift, delta = fixed[0][:, None] * lines[:, 1], lines[:, 0], numbers[1]
    p = jnp.exp2(scores * scale + shift)
    if where is not None:
        t = where["row"] + jnp.arange(64)[:, None]
        s = where["col"] + jnp.arange(block)
        ok = s < plan.kv_len
        if plan.max_diff is not None:
            ok &= s - t <= plan.max_diff
        if plan.min_diff is not None:
            ok &= s - t >= plan.min_diff
        if "first_col" in where:
            ok &= (s >= where["first_col"]) & (s < where["last_col"])
        p = jnp.where(ok, p, 0)
    return p, p * (d_p + delta)


class PlainInt8(int8.Int8):
    """The same steps on whole arrays, without rounding P and dS."""

    def start(self):
        zeros = jnp.zeros((64, self.plan.head_dim), jnp.float32)
        return (zeros,) * self.count

    def tile(self, own, ring, fixed, load, sums, where, wait, release, take, give):
        wait(0)
        give()
        p, d_s = plain_tile(self, own, ring[0], fixed, where)
        release(0)
        wait(1)
        take()
        *turned, scales = map(read, ring[1])
        out, block = [], self.plan.config.block_kv
        for i, (total, x, b) in enumerate(zip(sums, (d_s, p), turned, strict=False)):
            width = self.plan.head_dim // 32
            b = b.reshape(-1, block // 16, 4, 2, 2).swapaxes(2, 3).reshape(-1, block)  # in order
            b = b.T * jnp.repeat(scales[i * width : (i + 1) * width], 32)
            out.append(total + x @ b)
        release(1)
        return tuple(out)

    def finish(self, sums, load, mean):
        out = [x * f for x, f in zip(sums, (self.scale, 1.0), strict=False)]
        if self.side == "q" and mean is not None:
            out[0] += load("rest")[:, None] * mean[...]
        return out


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="as in test_mosaic_control")
def test_control_flow(monkeypatch, case):
    """A window, ragged lengths, two heads per key; lists in quarters of the kernels' tiles."""
    arrays, mask, _, sums, found = case
    bounds = {"min_diff": mask.min_diff, "max_diff": mask.max_diff}
    blocks = kept_tiles(*SHAPE[1:4], 64, 64, mask)
    monkeypatch.setattr(int8, "Int8", PlainInt8)
    monkeypatch.setattr(
        int8, "operands", lambda *_, **__: {k: jnp.asarray(x) for k, x in found.items()}
    )
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **kwargs: None)
    with gpu_interpret_mode(detect_races=True):
        run = jax.jit(lambda *x: int8.gradient(*x, scale=SCALE, blocks=blocks, **bounds))
        got = run(*arrays, *sums)
    want = plain(found, sums, blocks.as_mask())
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and error(x, y) < 0.006


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["q", "kv"])
def test_shared_memory_suffices(side):
    config, shapes = int8.CONFIGS[side], ((1, 256, 2, 128), (1, 256, 2, 128))
    plan = plan_of(side, Variant("int8", "half"), *shapes, None, None, config)
    steps = int8.Int8(side, plan, SCALE)
    size = lambda x: int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize  # noqa: E731
    used = sum(size(steps.memory(name, (config.num_compute,), 64)) for name in steps.own)
    used += sum(
        size(steps.memory(name, (config.num_stages,), config.block_kv))
        for part in steps.ring
        for name in part
    )
    assert used <= SMEM_LIMIT


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas of the CUDA toolkit")
@pytest.mark.parametrize("side", ["q", "kv"])
def test_registers_suffice(tmp_path, side):
    """One tile with a mask, repeated, in the registers of a compute warpgroup."""
    shapes = (1, 512, 2, 128), (1, 512, 2, 128)
    config = int8.CONFIGS[side]
    steps = int8.Int8(side, plan_of(side, Variant("int8", "half"), *shapes, None, 0, config), SCALE)
    with pytest.MonkeyPatch.context() as patch:
        program = Program(patch)
        inline = lambda body, given, outs=(): body(  # noqa: E731
            *[[program.load("r")] if t is _SCALAR else x for x, t in given]
        )
        patch.setattr(int8, "_inline", inline)
        patch.setattr(int8, "_k_major", lambda ref, *_: program.descriptors(ref))
        sums = [[program.add("mov.f32", "f", x) for x in total] for total in steps.start()]
        fixed = [[program.load("f") for _ in range(2)] for _ in range(steps.fixed)]
        numbers, count = program.load("l"), program.load("r")
        program.lines.append("LOOP:")
        own, turned = (4, 8), [config.block_kv // 32] * steps.count
        ring = [(*own, numbers, numbers)[: 3 + (side == "kv")], (*turned, numbers)]
        new = steps.tile(own, ring, fixed, None, sums, {"row": 0, "col": 0}, *[lambda *_: None] * 4)
        assert spilled(tmp_path / "loop.ptx", program, sums, new, count, config.registers) <= 16
