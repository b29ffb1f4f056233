# SPDX-License-Identifier: Apache-2.0
"""The sm90 products of packed weights without a GPU: NumPy runs their threads, and they lower."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import warpgroup

from pallas_kernels import explain, matmul
from pallas_kernels._device import Device
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.ops.matmul import (
    api,
    mosaic_sm90_codes,
    mosaic_sm90_rows,
    mosaic_sm90_tokens,
    reference,
)
from pallas_kernels.ops.matmul import spec as spec_lib
from pallas_kernels.ops.matmul.mosaic_sm90_codes import Weights
from pallas_kernels.ops.quantize.api import quantize

GPU = Device("gpu", "NVIDIA H200", (9, 0))
FORMATS = {
    "nvfp4": lambda w: quantize(w, "nvfp4", axis=0).pack(0),
    "nvfp4_one_level": lambda w: quantize(w, "nvfp4", axis=0, two_level=False).pack(0),
    "mxfp4": lambda w: quantize(w, "mxfp4", axis=0).pack(0),
    "mxfp4_int8": lambda w: quantize(w, "mxfp4_int8", axis=0).pack(0),
    "mxfp4_int8_64": lambda w: quantize(w, "mxfp4_int8", axis=0, tile=64).pack(0),
    "mxfp4_int8_whole": lambda w: quantize(w, "mxfp4_int8", axis=0, tile=None).pack(0),
    "int4_int8": lambda w: quantize(w, "int4_int8", axis=0).pack(0),
    "int4_int8_32": lambda w: quantize(w, "int4_int8", axis=0, tile=32).pack(0),
    "int4": lambda w: quantize(w, "int4", axis=0, tile=min(128, w.shape[0])).pack(0),
    "int4_32": lambda w: quantize(w, "int4", axis=0, tile=32).pack(0),
    "int8": lambda w: quantize(w, "int8", axis=0, tile=None),
    "int8_64": lambda w: quantize(w, "int8", axis=0, tile=64),
    "fp8": lambda w: quantize(w, "fp8_e4m3", axis=0, tile=None),
    "fp8_e5m2": lambda w: quantize(w, "fp8_e5m2", axis=0, tile=None),
    "mxfp8": lambda w: quantize(w, "mxfp8", axis=0),
    "int4_whole": lambda w: quantize(w, "int4", axis=0, tile=None).pack(0),
}


PER_ROW = functools.partial(quantize, qtype="int8", axis=-1, tile=None)
FP8_ROWS = functools.partial(quantize, qtype="fp8_e4m3", axis=-1, tile=None)


def weights(k, n, kind="normal"):
    rng = np.random.default_rng(k + n)
    w = rng.normal(size=(k, n)).astype(np.float32)
    if kind == "groups":  # of zeros, and of numbers far larger and far smaller than the rest
        w[: k // 2, : n // 2] = 0
        w[k // 2, ::3] = 3e4
        w[-16:, 1::2] *= 1e-6
    return jnp.asarray(w)


def activations(m, k):
    return jnp.asarray(np.random.default_rng(m).normal(size=(m, k)), jnp.bfloat16)


def run_blocks(body, outs, grid, args, shared=0, groups=1):
    """The kernel's launch: every block in turn.

    Of several warpgroups each runs twice: the second time it finds in shared memory what all of
    them wrote there before they met.
    """

    def run(*arrays):
        refs = dict(zip(args, map(np.asarray, arrays), strict=True))
        results = {name: np.full(out.shape, np.nan, out.dtype) for name, out in outs.items()}
        for axes in np.ndindex(*grid):
            scratch = {"shared": np.full(shared, np.nan, np.float32)}
            for group in range(groups if groups == 1 else 2 * groups):
                numbers = axes if groups == 1 else (*axes, group % groups)
                body(refs | results | scratch, [np.full(128, i, np.int32) for i in numbers])
        return results

    return jax.pure_callback(run, outs, *args.values())


@pytest.fixture
def on_numpy(monkeypatch):
    """The kernel for few rows runs on NumPy."""
    monkeypatch.setattr(mosaic_sm90_rows, "call", run_blocks)
    with warpgroup.installed(), abstract_gpu():
        yield


@pytest.mark.parametrize(
    ("name", "m", "k", "n", "kind", "config"),
    [
        ("nvfp4", 1, 512, 128, "normal", {}),
        ("nvfp4", 5, 130, 40, "groups", {}),
        ("nvfp4", 9, 300, 144, "normal", {"own": 8}),
        ("nvfp4_one_level", 17, 96, 144, "normal", {"blocks": 9}),
        ("mxfp4", 8, 600, 16, "groups", {"units": 2, "blocks": 3}),
        ("mxfp4", 2, 2, 1, "normal", {}),
        ("int4", 16, 300, 128, "groups", {"own": 8, "units": 8}),
        ("int4_32", 3, 64, 8, "normal", {}),
        ("int4_whole", 4, 50, 130, "normal", {}),
        ("nvfp4", 3, 1100, 136, "normal", {"own": 8, "groups": 4, "outputs": 64}),
        ("nvfp4", 7, 200, 128, "groups", {"table": True}),
        ("int4", 13, 1056, 64, "groups", {"groups": 4, "outputs": 64}),
        ("mxfp4", 12, 4096, 64, "normal", {"groups": 4, "outputs": 64, "blocks": 3}),
        ("nvfp4 int8", 9, 130, 40, "groups", {}),
        ("int8", 3, 130, 40, "groups", {}),
        ("int8 int8", 9, 300, 144, "normal", {"own": 8, "groups": 4, "outputs": 64}),
        ("int8_64", 2, 192, 16, "groups", {"units": 4}),
        ("fp8", 16, 96, 40, "groups", {"blocks": 5}),
        ("fp8_e5m2 fp8_e4m3", 1, 80, 16, "normal", {}),
        ("mxfp8", 20, 100, 24, "groups", {}),
        ("nvfp4 fp8_e4m3", 3, 1100, 136, "normal", {"own": 8, "groups": 4, "outputs": 64}),
        ("int4 int8", 1, 300, 40, "normal", {}),
        ("mxfp4_int8 int8", 2, 96, 144, "groups", {"blocks": 9}),
    ],
)
def test_few_rows_equal_the_oracle_on_the_same_codes(name, m, k, n, kind, config, on_numpy):
    name, *rows = name.split()  # and the format of the rows
    w, x = FORMATS[name](weights(k, n, kind)), activations(m, k)
    x = quantize(x, *rows, axis=-1, tile=None) if rows else x
    spec = api._prepare(x, w, jnp.float32)[2]
    assert spec_lib.unsupported_reason(spec, GPU, "mosaic") is None
    config = mosaic_sm90_rows.Config(**config)
    out = np.asarray(jax.jit(lambda x, w: mosaic_sm90_rows.matmul(x, w, spec, config))(x, w))
    want = np.asarray(reference.matmul(x, w, jnp.float32))
    x = np.asarray(x.dequantize() if rows else x, np.float32)
    bound = np.abs(x) @ np.abs(np.asarray(w.dequantize()))
    assert (np.abs(out - want) <= 2e-6 * bound + 1e-30).all()


def swizzled(tile):
    """A [rows, 128] array of bytes as a copy to shared memory with 128-byte swizzle leaves it."""
    rows = np.arange(tile.shape[0])
    pieces = tile.reshape(tile.shape[0], 8, 16)
    return np.stack([pieces[rows, piece ^ rows % 8] for piece in range(8)], 1).reshape(tile.shape)


# Row r of a warp's sixteen is output 2r, row 8 + r is output 2r + 1.
ORDER = (np.arange(64) // 16 * 16) + [2 * (r % 8) + r // 8 for r in np.arange(64) % 16]


@pytest.mark.parametrize("wg", [0, 1])
def test_the_int8_operand_is_the_transposed_weight(wg):
    w = np.random.default_rng(wg).integers(-128, 128, size=(128, 128)).astype(np.int8)
    kernel = mosaic_sm90_tokens.Int8(128, 2)
    with warpgroup.installed():
        words = kernel.finish(*kernel.fetch(swizzled(w), np.full(128, wg, np.int32)))
    got = warpgroup.from_operand(words, np.dtype(np.int8))
    np.testing.assert_array_equal(got, w[:, 64 * wg : 64 * wg + 64].T[ORDER])


def stepped_weights(name):
    """Groups of every size from the largest of their output down to 2^-6 of it, and of zeros."""
    w = np.array(weights(128, 128))
    w *= 2.0 ** -(np.arange(128)[:, None] // 32 + np.arange(128) % 7 - 3).clip(0)
    w[:, 5], w[:32, 7], w[96:, 9] = 0, 0, 2.0**-126
    return FORMATS[name](jnp.asarray(w))


@pytest.mark.parametrize("wg", [0, 1])
@pytest.mark.parametrize(
    "name",
    ["mxfp4_int8", "mxfp4_int8_64", "mxfp4_int8_whole", "int4_int8", "int4_int8_32", "int4_whole"],
)
def test_stepped_weights_are_int8_numbers(name, wg):
    w = stepped_weights(name).validate(check_values=True)
    lowest = w.qvalue.at[3, :64].set(0x88)  # -8 twice, or -0
    w = dataclasses.replace(w, qvalue=lowest, tensor_scale=jnp.full((1, 1), 3.0))
    x = PER_ROW(activations(2, 128))
    spec = api._prepare(x, w, jnp.bfloat16)[2]
    kernel, arrays = mosaic_sm90_tokens._integer(x, w, spec)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    with warpgroup.installed():
        given = swizzled(arrays["codes"]), arrays["scale"], np.full(128, wg, np.int32)
        a = kernel.finish(*kernel.fetch(*given))
    here = slice(64 * wg, 64 * wg + 64)
    got = warpgroup.from_operand(a, np.dtype(np.int8)).astype(np.float32)
    got = got * arrays["column_scale"][here][ORDER][:, None]
    want = np.asarray(w.dequantize())[:, here].T[ORDER]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_stepped_scale_that_is_nan_makes_its_output_nan():
    w = FORMATS["mxfp4_int8"](weights(64, 128).at[3, 4].set(jnp.nan))
    x = PER_ROW(activations(2, 64))
    arrays = mosaic_sm90_tokens._integer(x, w, api._prepare(x, w, None)[2])[1]
    assert np.flatnonzero(np.isnan(arrays["column_scale"])).tolist() == [4]


@pytest.mark.parametrize("wg", [0, 1])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4", "int4_32"])
def test_the_operand_of_many_rows_is_the_weight_rounded_once(name, wg):
    w = FORMATS[name](weights(64, 128, "groups"))
    spec = api._prepare(activations(2, 64), w, jnp.bfloat16)[2]
    facts, arrays = mosaic_sm90_codes.prepare(activations(2, 64), w, spec, (8, 64, 128))
    kernel = mosaic_sm90_tokens.FourBit(facts, 2)
    codes, scale = np.array(arrays["codes"]), np.array(arrays["scale"])
    with warpgroup.installed():
        words, scales = kernel.fetch(swizzled(codes), scale, np.full(128, wg, np.int32))
        words = kernel.finish(words, scales)
    got = warpgroup.from_operand(words, np.dtype(ml_dtypes.bfloat16))
    want = np.asarray(w.dequantize())[:, 64 * wg : 64 * wg + 64].T[ORDER]
    if w.tensor_scale is not None:
        want = want / np.asarray(w.tensor_scale)
    error = np.abs(got - want)
    # INT4 times a float32 scale is rounded once, E2M1 times its scale not at all.
    assert (error <= np.abs(want) * (1.01 * 2.0**-8 if "int4" in name else 1e-6)).all()


def test_blocks_take_the_whole_contraction_where_they_fill_the_multiprocessors():
    def chosen(n, m, group=16):
        return mosaic_sm90_rows.heuristic(Weights("e2m1", "e4m3", group, 64, n, None), m)

    with abstract_gpu():
        assert chosen(8192, 16).groups == chosen(16384, 1).groups == 4
        for other in ((4096, 1), (11008, 1), (8192, 17)):
            assert chosen(*other) == mosaic_sm90_rows.Config()
        assert [chosen(8192, 1, group).units for group in (16, 32, 128)] == [2, 2, 4]
    text = lowered(
        functools.partial(matmul, implementation="mosaic"), *shapes("nvfp4", 9, 64, 8192)
    )
    assert text.count("custom_call @mosaic_gpu") == 1


# -- dispatch and lowering -------------------------------------------------------------------------


def shapes(name, m, k, n, dtype=jnp.bfloat16):
    w = jax.eval_shape(FORMATS[name], jax.ShapeDtypeStruct((k, n), jnp.float32))
    return jax.ShapeDtypeStruct((m, k), dtype), w


def lowered(f, *args):
    with abstract_gpu():
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "m"), [("nvfp4", 1), ("nvfp4", 4096), ("mxfp4", 80), ("int4", 16), ("int4_whole", 200)]
)
def test_lowers_for_cuda_with_its_gradient(name, m):
    x, w = shapes(name, m, 300, 200)
    call = functools.partial(matmul, implementation="mosaic")
    assert lowered(call, x, w).count("custom_call @mosaic_gpu") == 1
    assert "mosaic_gpu" in lowered(
        jax.grad(lambda x, w: (call(x, w) ** 2).sum().astype(float)), x, w
    )
    many = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    text = lowered(jax.vmap(call, in_axes=(0, None)), many, w)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp8"])
def test_few_rows_and_8_bit_weights_lower_for_cuda(name):
    x, w = shapes(name, 9, 300, 200)
    call = functools.partial(matmul, implementation="mosaic")
    assert lowered(call, x, w).count("custom_call @mosaic_gpu") == 1
    for entries, kernels in ((2, 1), (5, 0)):  # of 18 and of 45 rows together
        many = jax.ShapeDtypeStruct((entries, *x.shape), x.dtype)
        text = lowered(jax.vmap(call, in_axes=(0, None)), many, w)
        assert text.count("custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize("m", [3, 4096])
def test_int8_lowers_for_cuda_with_its_gradient(m):
    x = jax.eval_shape(PER_ROW, jax.ShapeDtypeStruct((m, 300), jnp.bfloat16))
    w = jax.eval_shape(FORMATS["int8"], jax.ShapeDtypeStruct((300, 200), jnp.float32))
    call = functools.partial(matmul, implementation="mosaic", preferred_element_type=jnp.bfloat16)
    assert lowered(call, x, w).count("custom_call @mosaic_gpu") == 1

    def loss(scale, x, w):
        return (call(dataclasses.replace(x, scale=scale), w) ** 2).sum().astype(float)

    assert "mosaic_gpu" in lowered(jax.grad(loss), x.scale, x, w)
    many = jax.eval_shape(PER_ROW, jax.ShapeDtypeStruct((5, m, 300), jnp.bfloat16))
    text = lowered(jax.vmap(call, in_axes=(0, None)), many, w)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("name", "rows", "m", "note"),
    [
        ("nvfp4", FP8_ROWS, 4096, "to bfloat16,"),
        ("int4", PER_ROW, 70, "to bfloat16,"),
        ("mxfp4", FP8_ROWS, 3, "in registers within"),
        ("mxfp4_int8", PER_ROW, 3, "in registers within"),
        ("mxfp4_int8", PER_ROW, 4096, "become INT8 numbers"),
        ("mxfp4_int8", FP8_ROWS, 4096, "to bfloat16,"),
        ("mxfp4_int8_64", PER_ROW, 70, "become INT8 numbers"),
        ("mxfp4_int8_whole", PER_ROW, 70, "become INT8 numbers"),
        ("int4_int8", PER_ROW, 70, "become INT8 numbers"),
        ("int4_whole", PER_ROW, 70, "become INT8 numbers"),
    ],
)
def test_four_bit_weights_times_eight_bit_rows_lower_for_cuda(name, rows, m, note, monkeypatch):
    x = jax.eval_shape(rows, jax.ShapeDtypeStruct((m, 300), jnp.bfloat16))
    w = jax.eval_shape(FORMATS[name], jax.ShapeDtypeStruct((300, 200), jnp.float32))
    call = functools.partial(matmul, implementation="mosaic", preferred_element_type=jnp.bfloat16)
    assert lowered(call, x, w).count("custom_call @mosaic_gpu") == 1
    many = jax.eval_shape(rows, jax.ShapeDtypeStruct((5, m, 300), jnp.bfloat16))
    text = lowered(jax.vmap(call, in_axes=(0, None)), many, w)
    assert text.count("custom_call @mosaic_gpu") == 1
    with abstract_gpu():
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        choice = explain("matmul", x, w)
    assert choice.implementation == "mosaic" and note in choice.notes[0]


@pytest.mark.parametrize(
    ("name", "config"), [("nvfp4", {"cluster": 1}), ("int4", {"tile_m": 128}), ("mxfp4", {})]
)
def test_other_configurations_lower(name, config):
    x, w = shapes(name, 512, 256, 256)
    spec = api._prepare(x, w, None)[2]
    config = mosaic_sm90_tokens.Config(**config)
    text = lowered(lambda x, w: mosaic_sm90_tokens.matmul(x, w, spec, config), x, w)
    assert "custom_call @mosaic_gpu" in text


def test_several_devices_leave_the_product_to_xla(monkeypatch):
    x, w = shapes("nvfp4", 4, 64, 32)
    with abstract_gpu():
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        assert explain("matmul", x, w).implementation == "mosaic"
        monkeypatch.setattr(jax, "device_count", lambda: 2)
        choice = explain("matmul", x, w)
        assert choice.implementation == "xla" and "jax.shard_map" in choice.rejected["mosaic"]
        assert explain("matmul", x, w, implementation="mosaic").implementation == "mosaic"


def test_explain_says_why(monkeypatch):
    def reason(x, w, **options):
        with abstract_gpu():
            return explain("matmul", x, w, implementation="mosaic", **options).rejected.get(
                "mosaic"
            )

    x, w = shapes("nvfp4", 4, 64, 32)
    assert reason(x, w) is None
    with abstract_gpu():
        chosen = explain("matmul", x, w, implementation="mosaic")
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        w8 = jax.eval_shape(FORMATS["int8"], jax.ShapeDtypeStruct((64, 32), jnp.float32))
        few, some, many = (
            explain(
                "matmul", jax.eval_shape(PER_ROW, jax.ShapeDtypeStruct((m, 64), jnp.float32)), w8
            )
            for m in (4, 16, 100)
        )
    assert chosen.notes == (
        "w4a16: the weights are read packed and widened in registers within the product",
    )
    assert few.notes == (
        "w8a8: the weights are read in 8 bits and widened in registers within the product",
    )
    assert some.implementation == "xla" and "INT8 rows faster, got 16" in some.rejected["mosaic"]
    assert many.implementation == "mosaic"
    assert many.notes == ("w8a8: the int8 codes are multiplied directly and summed in int32",)
    assert "needs an NVIDIA GPU" in explain("matmul", x, w).rejected["mosaic"]
    assert "takes bfloat16 or 8-bit activations; got float32" in reason(
        *shapes("nvfp4", 4, 64, 32, "float32")
    )
    assert reason(x, w8) is None
    many = jax.ShapeDtypeStruct((40, 64), jnp.bfloat16)
    assert "for w8a16 takes up to 32 rows; got 40" in reason(many, w8)
    assert "one scale per output" in reason(x, quantize(jnp.ones((64, 32)), "int8", axis=None))
    assert "packed along the inputs" in reason(x, quantize(jnp.ones((64, 32)), "nvfp4", axis=0))
    shifted = quantize(jnp.ones((64, 32)), "int4", axis=0, tile=16, asymmetric=True).pack(0)
    assert "no zero points" in reason(x, shifted)
    tiles = quantize(jnp.ones((4, 64)), "int8", axis=-1, tile=16)
    assert "with one scale per row" in reason(tiles, w)
    padded = quantize(jnp.ones((64, 1)), "mxfp4", axis=(0, 1), tile=(32, 32)).pack(0)
    assert "stored without padding" in reason(x, padded)
    odd = quantize(jnp.ones((64, 32)), "int4", axis=0, tile=8).pack(0)
    assert "groups of 16, 32 or a multiple of 64 inputs; got 8" in reason(x, odd)
    assert "no empty products" in reason(jax.ShapeDtypeStruct((0, 64), jnp.bfloat16), w)
    plain = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
    assert "is for quantised weights" in reason(x, plain)
    with abstract_gpu(
        jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")
    ):
        assert "written for sm90" in explain("matmul", x, w).rejected["mosaic"]
