# SPDX-License-Identifier: Apache-2.0
"""INT8 gradient kernels: registers run by NumPy, control flow interpreted."""

import contextlib
import dataclasses
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
from pallas_kernels.ops.attention import mosaic_sm90_backward as half
from pallas_kernels.ops.attention import mosaic_sm90_backward_int8 as int8
from pallas_kernels.ops.attention.mosaic_sm90_backward import plan_of
from pallas_kernels.ops.attention.mosaic_sm90_kernel import _SCALAR
from pallas_kernels.ops.attention.mosaic_sm90_plan import SMEM_LIMIT
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, Variant
from pallas_kernels.ops.quantize import mosaic_sm90 as quantize

SHAPE = (1, 200, 150, 2, 1, 64)  # B, T, S, N, K, H
SCALE = 0.125
MASK = Mask.causal(30) & Mask.window(90, None)
VARIANT = Variant("int8", "half", "bfloat16")
KINDS = {"q": int8.Queries, "kv": int8.Keys}


def in_order(codes):
    """Turned operand [B, heads, tiles, H, block] as [B, Lp, heads, H]."""
    b, heads, tiles, head_dim, block = codes.shape
    x = np.asarray(codes, np.float64).reshape(b, heads, tiles, head_dim, block // 16, 16)
    x = x[..., np.argsort(quantize.V_ORDER)].reshape(b, heads, tiles, head_dim, block)
    return x.transpose(0, 2, 4, 1, 3).reshape(b, tiles * block, heads, head_dim)


@pytest.fixture(scope="module")
def case():
    """Inputs whose keys have a mean, their sums, and the kernels' operands."""
    q, k, v, d_out = inputs(*SHAPE)
    k = k + jnp.linspace(-3, 3, SHAPE[-1]).astype(k.dtype)
    arrays = (q, k, v, d_out)
    grads, lse, delta = exact(arrays, MASK, SCALE)
    # Rows of dS add up to delta minus what the kernels get: the mean key counts so often in dQ.
    rest = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
    with warpgroup.installed():
        found = int8.operands(
            *arrays, lse, delta - rest, rest, scale=SCALE, smooth_k=True, scale_block=128
        )
        found = {name: np.asarray(x) for name, x in jax.block_until_ready(found).items()}
    return arrays, grads, (lse, delta, rest), found


def plain(found, sums, mask):
    """What the kernels compute from their operands, with P and dS not rounded."""
    b, t, s, n, k, h = SHAPE
    _, delta, rest = (np.asarray(x, np.float64) for x in sums)
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
    d_s = p * (d_p - (delta - rest)[..., None])
    d_q = np.einsum("bhts,bshd->bthd", d_s * k_rows, wide(in_order(found["k_t"])[:, :s])) * SCALE
    d_q += SCALE * rest.transpose(0, 2, 1)[..., None] * wide(found["k_mean"][:, None])
    d_k = narrow(np.einsum("bhts,bthd->bshd", d_s, q[:, :t])) * SCALE
    return d_q, d_k, narrow(np.einsum("bhts,bthd->bshd", p, d_out[:, :t]))


def error(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.abs(got - want).sum() / np.abs(want).sum()


def plainly_settled(given, layouts, types, left=0):
    return tuple(given[: len(types)])


@contextlib.contextmanager
def registers():
    """NumPy in the place of a warpgroup, in which references are arrays."""

    def inline(body, given, outs=()):
        scalar = lambda x: [np.full(128, int(x), np.int32)]  # noqa: E731
        return body(*[scalar(x) if t is _SCALAR else x for x, t in given])

    def wgmma(n, a, b, acc, kind):
        return warpgroup.accumulator((a.astype(float) @ b[:n].astype(float).T).astype(np.float32))

    def accumulate(n, a, b, sums, kind):
        b = np.asarray(b, np.float64)
        if isinstance(a, list):  # from registers; 16-bit arrays in memory are [k, n]
            dtype = np.dtype(np.int8 if kind == "s32.s8.s8" else jnp.bfloat16)
            a = warpgroup.from_operand([word for step in a for word in step], dtype)
        tile = a.astype(float) @ (b.T if kind == "s32.s8.s8" else b)
        tile = tile.astype(np.int32 if kind == "s32.s8.s8" else np.float32)
        return [x + y for x, y in zip(sums, warpgroup.accumulator(tile), strict=True)]

    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch:
        for module in (half, int8):
            patch.setattr(module, "_inline", inline)
            patch.setattr(module, "_k_major", lambda ref, *_: ref)
            patch.setattr(module, "_wgmma", wgmma)
            patch.setattr(module, "accumulate", accumulate)
            patch.setattr(module, "_wait", lambda left, values, keep=(): values)
            patch.setattr(module, "settled", plainly_settled)
        patch.setattr(half, "_mn_major", lambda ref, *_: ref)
        patch.setattr(plgpu, "load", lambda ref, **_: warpgroup.per_column(ref))
        yield


class Numbers(int8.Keys):
    """The same steps, whose sums begin and end as NumPy arrays."""

    def start(self):
        return [[np.zeros(128, np.float32)] * (self.plan.head_dim // 2)] * 2

    def finish(self, sums, load, mean):
        return [[x * f for x in part] for part, f in zip(sums, (self.scale, 1.0), strict=True)]


def run_side(side, found, mask):
    """One kernel's loops, with every tile masked; results [rows, heads, H] for each sum."""
    _, t, s, n, k, h = SHAPE
    bounds = mask.min_diff, mask.max_diff
    plan = plan_of(side, VARIANT, (1, t, n, h), (1, s, k, h), *bounds, int8.CONFIGS[side])
    steps = {"q": int8.Queries, "kv": Numbers}[side](side, plan, SCALE)
    return warpgroup.walk(steps, found, n // k)


def test_registers(case):
    """All that a warpgroup does, against the same operands without rounding P and dS."""
    _, grads, sums, found = case
    want = plain(found, sums, MASK)
    with registers():
        got = [*run_side("q", found, MASK), *run_side("kv", found, MASK)]
    errors = [error(x, y) for x, y in zip(got, want, strict=True)]
    assert errors[0] < 0.03  # measured: .0118, what one growing scale for each row leaves
    assert max(errors[1:]) < 0.004  # measured: .0017, from 16 bits
    assert error(got[2], grads[2]) < 0.02  # measured: .0099, from INT8 scores


def test_operands_are_near(case):
    """Codes of rows, the turned copy and the numbers beside them."""
    (q, k, _, _), _, (lse, delta, rest), found = case
    t, s, block = SHAPE[1], SHAPE[2], int8.CONFIGS["kv"].block_kv
    mean = np.asarray(k, np.float64).mean(1, keepdims=True)
    of_rows = lambda x: x.swapaxes(1, 2)[..., None]  # noqa: E731
    for codes, scales, x, length in (
        (found["k8"], of_rows(found["k_rows"]), np.asarray(k, np.float64) - mean, s),
        (found["q8"], of_rows(found["q_scale"]) / (SCALE * LOG2E), q, t),
    ):
        assert error((codes * scales)[:, :length], x) < 0.012  # measured: at most .0082
        assert (codes[:, length:] == 0).all()
    np.testing.assert_array_equal(in_order(found["k_t"]), found["k8"])
    lines = found["of_queries"].reshape(1, SHAPE[3], -1, 3 * block)
    pairs = lines[..., : 2 * block].reshape(1, SHAPE[3], -1, 2)
    np.testing.assert_array_equal(pairs[..., 0], found["minus_lse"])
    np.testing.assert_array_equal(pairs[..., 1], found["q_scale"])
    minus_delta = lines[..., 2 * block :].reshape(1, SHAPE[3], -1)
    np.testing.assert_array_equal(minus_delta[..., :t], -np.asarray(delta - rest))
    assert (found["minus_lse"][:, :, t:] == -np.inf).all() and (minus_delta[..., t:] == 0).all()
    live = np.isfinite(lse)
    const = np.einsum("bthd,bkd->bht", np.asarray(q, np.float64), mean[:, 0])
    want = -(np.asarray(lse) - const * SCALE) * LOG2E
    np.testing.assert_allclose(found["minus_lse"][:, :, :t][live], want[live], atol=1e-3)


@pytest.mark.parametrize("tops", [(1.0, 1.0), (3.0, 0.1), (0.01, 300.0), (0.0, 0.0), (1.0, np.nan)])
def test_scales_grow(tops):
    """Scales are the next power of two of what was largest so far; sums follow."""
    rng, largest = np.random.default_rng(0), 0.0
    with warpgroup.installed():
        sums = [rng.integers(-(2**20), 2**20, 128).astype(np.int32) for _ in range(8)]
        scales = [np.full(128, int8.SMALLEST, np.float32)] * 2
        for top in tops:
            tile = rng.uniform(-1, 1, (64, 32)).astype(np.float32) * top
            tile[:, 3] = top
            before = [x.astype(float) * scales[i // 2 % 2] for i, x in enumerate(sums)]
            started, largest = largest > 0, max(largest, top)
            sums, scales = int8.grow(sums, scales, warpgroup.accumulator(tile), 127.0)
            if np.isnan(top):
                assert np.isnan(scales).all()
                return
            words = int8.encode(warpgroup.accumulator(tile), scales)
            assert np.abs(warpgroup.from_operand(words, np.dtype(np.int8))).max() <= 127
            want = 2.0 ** np.ceil(np.log2(largest / 127)) if largest else int8.SMALLEST
            assert (np.stack(scales) == np.float32(want)).all()
            for x, y in zip(sums, before, strict=True):
                assert not started or np.abs(x * float(want) - y).max() <= want


def test_long_walks_have_smaller_codes():
    """No walk can leave 32 bits: steps x code x 127 stays below 2 ** 31."""
    for length in (4096, 131072, 1048576):
        shapes = (1, 256, 1, 128), (1, length, 1, 128)
        plan = plan_of("q", VARIANT, *shapes, None, None, int8.CONFIGS["q"])
        top_code = int8.Queries("q", plan, SCALE).top_code
        assert length * top_code * 127 <= 2**31
        assert top_code == 127 or length >= 2**17


# -- control flow ----------------------------------------------------------------------------------


def allowed(plan, where):
    """Which pairs of a tile count."""
    block = plan.config.block_kv
    s = where["col"] + jnp.arange(block)
    away = s - (where["row"] + jnp.arange(64)[:, None])
    ok = (s < plan.kv_len) & (away <= plan.max_diff) & (away >= plan.min_diff)
    if "first_col" in where:
        ok &= (s >= where["first_col"]) & (s < where["last_col"])
    return ok


class PlainQueries(int8.Queries):
    """The same steps on whole arrays, without rounding dS."""

    def start(self):
        return (jnp.zeros((64, self.plan.head_dim), jnp.float32),)

    def begin(self, own, slots):
        (a8, a16), (b8, b16, _) = map(read, own), map(read, slots[0])
        return a8 @ b8.T, a16 @ b16.T

    def prepare(self, pending, slots, fixed, where, sums):
        (scores, d_p), lines = pending, read(slots[0][2])
        k_scale = jnp.tile(lines[:8], self.plan.config.block_kv // 8)
        p = jnp.exp2(scores * fixed[0][:, None] * k_scale + fixed[1][:, None])
        if where is not None:
            p = jnp.where(allowed(self.plan, where), p, 0)
        return sums, [p * (d_p + fixed[2][:, None]) * k_scale]

    def multiply(self, sums, operands, slots):
        b, block = read(slots[1][0]), self.plan.config.block_kv
        b = b.reshape(-1, block // 16, 4, 2, 2).swapaxes(2, 3).reshape(-1, block)  # in order
        return (sums[0] + operands[0] @ b.T,)

    def settle(self, sums, operands, pending):
        return sums, pending

    def finish(self, sums, load, mean):
        return [sums[0] * self.scale + load("rest")[:, None] * mean[...]]


class PlainKeys(int8.Keys):
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
            p = jnp.where(allowed(plan, where), p, 0)
        return sums, (p * (d_p + lines[2 * block :]), p)

    def multiply(self, sums, operands, slots):
        refs = self.last(slots)
        return tuple(s + x @ read(r) for s, x, r in zip(sums, operands, refs, strict=True))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="as in test_mosaic_control")
@pytest.mark.parametrize("listed", [False, True], ids=["bounds", "lists"])
@pytest.mark.parametrize("schedule", ["none", "hold", "ahead"])
def test_control_flow(monkeypatch, case, listed, schedule):
    """A window, ragged lengths, two heads per key; lists in quarters of the kernels' tiles."""
    for side, config in int8.CONFIGS.items():
        monkeypatch.setitem(int8.CONFIGS, side, dataclasses.replace(config, schedule=schedule))
    arrays, _, sums, found = case
    bounds = {"min_diff": MASK.min_diff, "max_diff": MASK.max_diff}
    blocks = kept_tiles(*SHAPE[1:4], 64, 64, MASK) if listed else None
    monkeypatch.setattr(int8, "Queries", PlainQueries)
    monkeypatch.setattr(int8, "Keys", PlainKeys)
    monkeypatch.setattr(
        int8, "operands", lambda *_, **__: {k: jnp.asarray(x) for k, x in found.items()}
    )
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **kwargs: None)
    # After its last tile a walk that is ahead reads, for nothing, what may be overwritten then.
    with gpu_interpret_mode(detect_races=schedule != "ahead"):
        run = jax.jit(lambda *x: int8.gradient(*x, scale=SCALE, blocks=blocks, **bounds))
        got = run(*arrays, *sums)
    want = plain(found, sums, blocks.as_mask() if listed else MASK)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and error(x, y) < 0.006


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["q", "kv"])
def test_shared_memory_suffices(side):
    config, shapes = int8.CONFIGS[side], ((1, 256, 2, 128), (1, 256, 2, 128))
    steps = KINDS[side](side, plan_of(side, VARIANT, *shapes, None, None, config), SCALE)
    size = lambda x: int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize  # noqa: E731
    used = sum(size(steps.memory(name, (config.num_compute,), 64)) for name in steps.own)
    used += sum(
        size(steps.memory(name, (config.num_stages,), config.block_kv))
        for part in steps.ring
        for name in part
    )
    assert used <= SMEM_LIMIT


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas of the CUDA toolkit")
@pytest.mark.parametrize("masked", [False, True])
def test_registers_suffice(tmp_path, masked):
    """One tile of the kernel of queries, repeated, in the registers of a compute warpgroup."""
    shapes = (1, 512, 2, 128), (1, 512, 2, 128)
    config, bound = int8.CONFIGS["q"], 0 if masked else None
    steps = int8.Queries("q", plan_of("q", VARIANT, *shapes, None, bound, config), SCALE)
    with pytest.MonkeyPatch.context() as patch:
        program = Program(patch)
        inline = lambda body, given, outs=(): body(  # noqa: E731
            *[[program.load("r")] if t is _SCALAR else x for x, t in given]
        )
        patch.setattr(int8, "_inline", inline)
        patch.setattr(int8, "_k_major", lambda ref, *_: program.descriptors(ref))
        patch.setattr(int8, "settled", plainly_settled)
        move = {"f": "mov.f32", "r": "mov.b32"}
        sums = [[program.add(move[x.kind], x.kind, x) for x in part] for part in steps.start()]
        fixed = [[program.load("f") for _ in range(2)] for _ in range(3)]
        numbers, count = program.load("l"), program.load("r")
        program.lines.append("LOOP:")
        ring = [(4, 8, numbers), [config.block_kv // 32]]
        where = {"row": 0, "col": 0} if masked else None
        new = steps.tile((4, 8), ring, fixed, None, sums, where, *[lambda *_: None] * 4)
        assert spilled(tmp_path / "loop.ptx", program, sums, new, count, config.registers) <= 16
