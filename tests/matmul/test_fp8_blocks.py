# SPDX-License-Identifier: Apache-2.0
"""The sm90 products of fp8 codes with a scale per 128 of k, and with one scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup

from pallas_kernels import explain, matmul, quantize
from pallas_kernels._device import Device
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.ops.matmul import api, mosaic_sm90_fp8, mosaic_sm90_tokens
from pallas_kernels.ops.matmul import spec as spec_lib

GPU = Device("gpu", "NVIDIA H200", (9, 0))


def operands(m, n, k, squares):
    """Codes with a scale per 1 x 128, and per 128 x 128 or 128 x 1."""
    keys = jax.random.split(jax.random.key(m + n + k))
    x, w = (jax.random.normal(key, size) for key, size in zip(keys, ((m, k), (k, n)), strict=True))
    lhs = quantize(x, "fp8_e4m3", axis=-1, tile=128)
    how = {"axis": (0, 1), "tile": (128, 128)} if squares else {"axis": 0, "tile": 128}
    return lhs, quantize(w, "fp8_e4m3", **how)


@pytest.mark.parametrize("column_scales", [False, True])
def test_promotion_scales_rows_and_columns(column_scales):
    rng = np.random.default_rng(0)
    total, tile = rng.normal(size=(2, 64, 128)).astype(np.float32)
    rows, columns = rng.normal(size=64), rng.normal(size=128)
    given = warpgroup.per_column(columns.astype(np.float32))
    if not column_scales:
        columns = np.full(128, columns[0])
        given = [np.full(128, columns[0], np.float32)]
    with warpgroup.installed():
        new = mosaic_sm90_fp8._promoted(
            warpgroup.accumulator(total), warpgroup.accumulator(tile),
            warpgroup.per_row(rows), given, column_scales,
        )  # fmt: skip
    want = total + tile * rows[:, None] * columns
    np.testing.assert_allclose(warpgroup.from_accumulator(new, 128), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("m", "n", "k", "squares"), [(200, 384, 256, True), (136, 192, 384, False)]
)
def test_lowers_for_cuda(m, n, k, squares):
    lhs, rhs = operands(m, n, k, squares)
    with abstract_gpu():
        call = jax.jit(lambda a, b: matmul(a, b, implementation="mosaic"))
        text = call.trace(lhs, rhs).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        # The only thing against it is that tests have several devices.
        assert explain("matmul", lhs, rhs).rejected.get("mosaic") in (
            None,
            spec_lib.SEVERAL_DEVICES,
        )


def test_every_block_of_a_band_gets_its_own_tile():
    config = mosaic_sm90_fp8.Config(across=2)
    plan = mosaic_sm90_fp8.Plan(700, 200, 128, ("e4m3", "e4m3"), True, "bfloat16", config)
    count = plan.row_clusters * plan.column_tiles
    tiles = {tuple(map(int, plan.tile_of(jnp.int32(block)))) for block in range(count)}
    assert tiles == {(r, c) for r in range(plan.row_clusters) for c in range(plan.column_tiles)}


@pytest.mark.parametrize(
    ("message", "sizes", "tile"),
    [
        ("one scale per 128 of k; got 2 of 512", (64, 128, 512), 256),
        ("rows in multiples of 8 and columns of 64", (64, 48, 256), 128),
    ],
)
def test_what_is_not_served(message, sizes, tile):
    m, n, k = sizes
    lhs = quantize(jnp.ones((m, k)), "fp8_e4m3", axis=-1, tile=tile)
    rhs = quantize(jnp.ones((k, n)), "fp8_e4m3", axis=0, tile=tile)
    spec = api._prepare(lhs, rhs, None)[2]
    assert message in spec_lib.unsupported_reason(spec, GPU, "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k", "squares"), [(200, 384, 256, True), (1024, 192, 4096, False)]
)
def test_on_a_gpu(m, n, k, squares):
    lhs, rhs = operands(m, n, k, squares)
    got = jax.jit(lambda a, b: matmul(a, b, implementation="mosaic"))(lhs, rhs)
    want = matmul(lhs, rhs, implementation="reference")
    # 14 bits of 128 products: a few parts in ten thousand.
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 1e-3


def one_scale(m, n, k, gradient):
    """Codes with a scale per row and column; e5m2 rows where they are a gradient."""
    keys = jax.random.split(jax.random.key(m + n + k))
    x, w = (jax.random.normal(key, size) for key, size in zip(keys, ((m, k), (k, n)), strict=True))
    lhs = quantize(x, "fp8_e5m2" if gradient else "fp8_e4m3", axis=-1, tile=None)
    return lhs, quantize(w, "fp8_e4m3", axis=0, tile=None)


@pytest.mark.parametrize("gradient", [False, True])
def test_one_scale_lowers_and_scales_float_sums(gradient):
    lhs, rhs = one_scale(200, 300, 260, gradient)
    with abstract_gpu():
        call = jax.jit(lambda a, b: matmul(a, b, implementation="mosaic"))
        text = call.trace(lhs, rhs).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        choice = explain("matmul", lhs, rhs, implementation="mosaic")
        assert "summed in float32, 128 of k at a time" in choice.notes[0]
    kernel = mosaic_sm90_tokens.Fp8(384, 200, ("e4m3", "e5m2"))
    assert kernel.kind == "f32.e4m3.e5m2"
    rng = np.random.default_rng(0)
    sums, rows, columns = rng.normal(size=128), rng.normal(size=200), rng.normal(size=384)
    sums, rows, columns = (x.astype(np.float32) for x in (sums, rows, columns))
    with warpgroup.installed():
        row, column = np.arange(128, dtype=np.int32) + 90, np.arange(0, 256, 2, dtype=np.int32)
        pair = kernel.scaled([sums, 2 * sums], row, column, rows, columns)
    factor = rows[np.minimum(row, 199)]
    np.testing.assert_allclose(pair[0], sums * factor * columns[column], rtol=1e-6)
    np.testing.assert_allclose(pair[1], 2 * sums * factor * columns[column + 1], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [False, True])
def test_one_scale_on_a_gpu(gradient):
    lhs, rhs = one_scale(200, 304, 4096, gradient)
    got = jax.jit(lambda a, b: matmul(a, b, implementation="mosaic"))(lhs, rhs)
    want = matmul(lhs, rhs, implementation="reference")
    # About 14 bits of a sum over 128 inputs.
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 5e-4
