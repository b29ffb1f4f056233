# SPDX-License-Identifier: Apache-2.0
"""The sm90 decode kernels without a GPU: NumPy runs their threads, and they lower for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup

from pallas_kernels import decode_attention, explain, quantize
from pallas_kernels._device import describe
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.ops.decode_attention import mosaic_sm90
from pallas_kernels.ops.decode_attention.spec import DecodeSpec, unsupported_reason

STORES = {
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "float16": lambda x: x.astype(jnp.float16),
    "int8": lambda x: quantize(x, "int8", axis=-1),
    "fp8_e4m3": lambda x: quantize(x, "fp8_e4m3", axis=-1),
    "fp8_e5m2": lambda x: quantize(x, "fp8_e5m2", axis=-1),
    "int4": lambda x: quantize(x, "int4", axis=-1, asymmetric=True).pack(-1),
    "int4_symmetric": lambda x: quantize(x, "int4", axis=-1).pack(-1),
}


def run_blocks(body, outs, grid, args, shared=0):
    """The kernels' launch: every block in turn."""

    def run(*arrays):
        refs = dict(zip(args, map(np.asarray, arrays), strict=True))
        results = {}
        for name, out in outs.items():  # what no thread writes stays NaN
            raw = np.full(int(np.prod(out.shape)) * out.dtype.itemsize, 0xFF, np.uint8)
            results[name] = raw.view(out.dtype).reshape(out.shape)
        for x, y, z in np.ndindex(*grid):
            scratch = {"shared": np.full(shared, np.nan, np.float32)} if shared else {}
            body(refs | results | scratch, [np.full(128, i, np.int32) for i in (x, y, z)])
        return results

    return jax.pure_callback(run, outs, *args.values())


def compare(store="bfloat16", *, b=1, t=1, n=4, k=1, h=128, c=600, length=None, config=None,
            dtype="bfloat16", positions=None, at=None, table=None, poison=None, offset=False,
            sinks=False, seed=0, **options):  # fmt: skip
    """The kernels against the oracle on the same codes."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    pool = (b, k, c, h) if table is None else (b, *positions.shape[1:], h)
    q, keys, values = normal(b, t, n, h).astype(dtype), normal(*pool), normal(*pool) + 1
    if poison is not None:
        keys, values = (jnp.where(poison[..., None], jnp.nan, x) for x in (keys, values))
    keys, values = (STORES[store](x) for x in (keys, values))
    options["key_offset"] = normal(b, k, 1, h) if offset else None
    options["sinks"] = normal(n) if sinks else None
    call = functools.partial(
        decode_attention, q, keys, values, length, positions=positions, query_positions=at,
        table=table, **options,
    )  # fmt: skip
    with warpgroup.installed(), pytest.MonkeyPatch.context() as patch, abstract_gpu():
        patch.setattr(mosaic_sm90, "_call", run_blocks)
        if config is not None:
            patch.setattr(mosaic_sm90, "Config", lambda: config)
        out, lse = jax.block_until_ready(call(implementation="mosaic"))
    want, want_lse = call(implementation="reference")
    assert out.shape == want.shape and out.dtype == want.dtype and lse.shape == want_lse.shape
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    live = np.isfinite(np.asarray(want_lse))
    np.testing.assert_allclose(np.asarray(lse)[live], np.asarray(want_lse)[live], atol=1e-4)
    # P is rounded to bfloat16 or float16, and so may the output be.
    bound = 1e-3 if "bfloat16" not in (dtype, store) else 1e-2
    out, want = (np.asarray(x, np.float32) for x in (out, want))
    np.testing.assert_allclose(out, want, atol=bound, rtol=bound)
    return out, want


SMALL = mosaic_sm90.Config(chunk=512)


@pytest.mark.parametrize("h", [128, 64])
@pytest.mark.parametrize("store", STORES)
def test_equals_the_oracle_on_the_same_codes(store, h):
    compare(store, h=h, c=600, length=jnp.array([[590]]), dtype="float32")
