# SPDX-License-Identifier: Apache-2.0
"""The sm90 attention kernel under Pallas' GPU interpreter: copies, barriers, ring and schedule.

The interpreter does not run inline Mosaic. Each step of a compute warpgroup is therefore replaced
by the same step in jnp; `test_mosaic_registers` runs the steps themselves. What is left is the
kernel's control flow: a wrong slot, coordinate or order of barriers gives wrong numbers or stops.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._interpret import gpu_interpret_mode
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import mosaic_sm90, mosaic_sm90_kernel, reference
from pallas_kernels.ops.attention.mosaic_sm90_kernel import Steps
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, NO_MAX
from pallas_kernels.ops.attention.spec import AttentionSpec
from pallas_kernels.ops.quantize.mosaic_sm90 import TINY, AttentionOperands


def read(ref):
    """What wgmma reads: through the asynchronous proxy, as the copies that overwrite it."""
    x = ref[...].astype(jnp.float32)
    plgpu.commit_smem()
    return x


class PlainSteps(Steps):
    """A compute warpgroup's steps on whole arrays."""

    def encode_q(self, raw_ref, q_ref, scale_ref, dot_ref, mean, limit):
        q = read(raw_ref)
        q = jnp.where(jnp.arange(64)[:, None] < limit, q, 0)
        top = jnp.maximum(jnp.abs(q).max(1), TINY)
        q_ref[...] = jnp.round(q * (127 / top)[:, None]).astype(jnp.int8)
        scale_ref[...] = top * (1 / 127)
        dot_ref[...] = q @ mean[0][mean[1], mean[2]]

    def issue_scores(self, q_ref, k_ref):
        q, k = read(q_ref), read(k_ref)
        return [q @ k.T]

    def wait_scores(self, scores):
        return scores

    def softmax(self, scores, m, row_scale, col_scale, shift, positions):
        x = scores[0] * row_scale[:, None]  # [64, kv]
        if col_scale:
            x = x * jnp.concatenate(
                [jnp.tile(s, x.shape[1] // 8 // len(col_scale)) for s in col_scale]
            )
        width = x.shape[1] // max(1, len(positions))
        for part, position in enumerate(positions):
            row = position["row"] + jnp.arange(64)[:, None]
            col = position["col"] + jnp.arange(x.shape[1])[None] - part * width
            ok = (row < position["q_len"]) & (col < position["kv_len"])
            ok &= col - row <= position.get("max_diff", 2**30)
            ok &= col - row >= position.get("min_diff", -(2**30))
            ok |= jnp.arange(x.shape[1]) // width != part
            x = jnp.where(ok, x, -jnp.inf)
        new = jnp.maximum(m, jnp.maximum(x.max(1), NO_MAX))
        p = jnp.where(x == -jnp.inf, 0.0, jnp.exp2(x - new[:, None]))
        sums = [] if self.variant.ones else [p.sum(1)]
        return [p, new, jnp.exp2(m - new), *sums]

    def values(self, p, v_ref, part):
        v = read(v_ref)
        if self.variant.pv != "half":
            v = jnp.concatenate([*v], 1).T if v.ndim == 3 else v.T
        end = (part + 1) * self.part + (self.variant.ones if part == self.parts - 1 else 0)
        return p @ v[:, part * self.part : end]

    def add_tile(self, out, tile, alpha):
        return out * alpha[:, None] + tile[:, : self.part]

    def add_sums(self, total, alpha, tile, sums):
        return total * alpha + (tile[:, self.part] if self.variant.ones else sums[0])

    def start(self):
        zeros = jnp.zeros((64, self.part))
        return (zeros,) * self.parts, jnp.zeros(64), jnp.full(64, NO_MAX)

    def finish(self, total, m, const, sink):
        some = total > 0
        lse = m / LOG2E + jnp.log(jnp.where(some, total, 1))
        lse = lse + const[0] if const else lse
        return [jnp.where(some, 1 / total, 0), jnp.where(some, lse, -jnp.inf)]

    def scale_out(self, out, factor, v_scale):
        return out * factor[:, None] * (v_scale[0][None] if v_scale else 1)

    def write_ones(self, v_ref):
        if self.variant.ones:
            rows, width = pl.ds(self.head_dim, 8), self.config.block_kv // self.pieces
            for piece in [()] if self.pieces == 1 else [(i,) for i in range(self.pieces)]:
                v_ref[*piece, rows] = jnp.ones((8, width), self.pv_dtype)


@pytest.fixture
def plain_steps(monkeypatch):
    monkeypatch.setattr(mosaic_sm90_kernel, "Steps", PlainSteps)
    monkeypatch.setattr(plgpu, "set_max_registers", lambda *args, **kwargs: None)


def half_operands(rng, t, s, n, h):
    shapes = ((1, t, n, h), (1, s, 1, h), (1, s, 1, h))
    return AttentionOperands(*(jnp.asarray(rng.normal(size=x), jnp.bfloat16) for x in shapes))


def byte_operands(rng, t, s, n, h):
    """Codes and scales as the quantisers lay them out, for tiles of 64 keys."""
    rows, keys = -(-t // 128) * 128, -(-s // 128) * 128
    integers = lambda *shape: jnp.asarray(rng.integers(-99, 99, shape), jnp.int8)  # noqa: E731
    scales = lambda *shape: jnp.asarray(rng.uniform(0.01, 0.02, shape), jnp.float32)  # noqa: E731
    v = jnp.asarray(rng.normal(size=(1, 1, h, keys)), jnp.float8_e4m3fn).at[..., s:].set(0)
    return AttentionOperands(
        integers(1, rows, n, h), integers(1, keys, 1, h), v, scales(1, n, rows + 192),
        scales(1, 1, keys // 64, 8), scales(1, 1, h),
    )  # fmt: skip


def raw_operands(rng, t, s, n, h):
    """As `byte_operands`, with Q left to the kernel."""
    q = jnp.asarray(rng.normal(size=(1, t, n, h)), jnp.bfloat16)
    mean = jnp.asarray(rng.normal(size=(1, 1, h)), jnp.float32)
    return byte_operands(rng, t, s, n, h)._replace(q=q, q_scale=None, k_mean=mean)


def listed(t, s, mask, block_q=128):
    """Tiles of 64 keys for two heads; one row lists none, one a tile in its middle only."""
    kept = np.random.default_rng(1).random((1, 2, -(-t // block_q), -(-s // 64))) < 0.6
    kept[0, 0, 1], kept[0, 1, 0] = False, np.arange(-(-s // 64)) == 1
    return BlockMask.from_blocks(jnp.asarray(kept), t, s, block_q=block_q, block_kv=64, mask=mask)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="the interpreter of jax 0.11 refuses a kernel that ends with an unobserved arrival, "
    "which hardware allows; 0.12 refuses it only before another barrier is made",
)
@pytest.mark.parametrize(
    ("make", "mask", "t", "s", "h", "schedule"),
    [
        (half_operands, Mask.causal(20), 150, 170, 64, "hold"),
        (byte_operands, Mask.lengths(None, jnp.array([90])), 130, 150, 192, "none"),
        (raw_operands, Mask.causal(20), 300, 170, 64, "hold"),
        (half_operands, listed(300, 170, Mask.causal(20)), 300, 170, 64, "hold"),
        (raw_operands, listed(200, 192, None), 200, 192, 64, "hold"),
        (raw_operands, listed(200, 330, None), 200, 330, 64, "joined"),
        (half_operands, listed(300, 170, Mask.causal(20), 64), 300, 170, 64, "none"),
    ],
)
def test_control_flow(plain_steps, make, mask, t, s, h, schedule):
    """Two blocks share the query tiles of two heads; the interpreter looks for races."""
    operands = make(np.random.default_rng(0), t, s, 2, h)
    joined = 2 if schedule == "joined" else 1
    schedule = "hold" if joined == 2 else schedule
    config = Config(block_kv=64 * joined, qk_split=1, num_sms=2, schedule=schedule)
    with gpu_interpret_mode(detect_races=True):
        out, lse = jax.jit(
            lambda x: mosaic_sm90.attention_forward(
                x, q_len=t, kv_len=s, scale=h**-0.5, mask=mask, config=config
            )
        )(operands)
    spec = AttentionSpec(1, t, s, 2, 1, h, "float32", h**-0.5)
    exact = warpgroup.dequantized(operands, t, s, ordered=True)
    rule = mask.as_mask() if isinstance(mask, BlockMask) else mask
    want, want_lse = reference.attention(*exact, None, None, rule, spec)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=2e-2)
    np.testing.assert_allclose(lse.swapaxes(1, 2), want_lse, atol=1e-4)
