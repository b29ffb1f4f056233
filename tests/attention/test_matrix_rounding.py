# SPDX-License-Identifier: Apache-2.0
"""The sm90 kernel for block rounding: its register code against the formats, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warpgroup

from pallas_kernels import fake_quantize, fake_quantize_both, quantize
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.formats import TE_SIGNS, BlockFormat, get_format, rht
from pallas_kernels.formats.block_format import tensor_encode_scale
from pallas_kernels.formats.counter_random import counter_key
from pallas_kernels.ops.quantize import mosaic_sm90_matrix as kernel
from pallas_kernels.ops.quantize import xla
from pallas_kernels.ops.quantize.spec import make_spec

WORDS = np.uint32([[1, 0x80000002], [0xDEADBEEF, 7]])


def matrix(rows, columns, dtype):
    """Normal values over a few decades, ties, zeros of both signs and a block of zeros."""
    rng = np.random.default_rng(rows + columns)
    x = rng.normal(size=(rows, columns)) * np.exp(3 * rng.normal(size=(rows, 1)))
    x[:, ::7] = np.round(x[:, ::7])
    x[::5, ::3] *= -0.0
    x[:16, :32] = 0
    return jnp.asarray(x, jnp.float32).astype(dtype)


def plan_of(x, qtype):
    kind = get_format(qtype)
    return kernel.Plan(*x.shape, str(x.dtype), kind, kind.scale_type.smallest)


def expected(x, qtype, axis, stochastic, rule=None, overrange=1.0):
    spec = make_spec(
        x.shape, qtype, axis=axis, rounding="stochastic" if stochastic else "nearest",
        scale_rule=rule, overrange=overrange,
    )  # fmt: skip
    key = counter_key(jnp.asarray(WORDS[1 - axis])) if stochastic else None
    return xla.fake_quantize(x, key, spec)


def factors(x, qtype, overrange=1.0):
    kind = get_format(qtype)
    encode = tensor_encode_scale(
        jnp.abs(x).max().astype(jnp.float32) * overrange, kind.element_type, kind.scale_type
    )
    return jnp.broadcast_to(jnp.stack([encode, 1 / encode]), (2, 2))


def run(x, plan, factor, rows, columns):
    with warpgroup.installed():
        return jax.block_until_ready(
            kernel.round_matrix(x, factor, jnp.asarray(WORDS), plan, rows, columns)
        )


def assert_same(got, want):
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize(
    ("qtype", "rule", "dtype", "overrange"),
    [
        ("nvfp4", None, "bfloat16", 1.0),
        ("nvfp4", None, "float32", 17 / 16),
        ("mxfp4", "ceil", "float16", 1.0),
        ("mxfp8", "floor", "bfloat16", 1.0),
    ],
)
def test_equals_the_formats(qtype, rule, dtype, overrange):
    """Both axes at once, rounded to nearest and stochastically, on a ragged number of tiles."""
    x = matrix(96, 288, dtype)
    plan = plan_of(x, qtype)
    factor = factors(x, qtype, overrange) if plan.format.two_level else jnp.ones((2, 2))
    for stochastic in (False, True):
        side = kernel.Side(stochastic, None, rule or "nearest", overrange)
        by_rows, by_columns = run(x, plan, factor, side, side)
        assert_same(by_rows, expected(x, qtype, 1, stochastic, rule, overrange))
        assert_same(by_columns, expected(x, qtype, 0, stochastic, rule, overrange))


def test_transform_along_columns():
    """The weight gradient's operands of NVIDIA's recipe, beside the plain blocks along rows."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.bfloat16)
    plan, rotated = plan_of(x, "nvfp4"), rht(x, axis=0)
    with warpgroup.installed():
        top = jax.block_until_ready(kernel.rotated_amax(x, plan, TE_SIGNS))
    assert top == jnp.abs(rht(x.astype(jnp.float32), axis=0)).max()
    factor = jnp.stack([factors(x, "nvfp4")[0], factors(rotated, "nvfp4")[0]])
    by_rows, by_columns = run(x, plan, factor, kernel.Side(), kernel.Side(True, TE_SIGNS))
    assert_same(by_rows, expected(x, "nvfp4", 1, False))
    assert_same(by_columns, expected(rotated, "nvfp4", 0, True))


def test_not_finite_values_spoil_their_block_only():
    x = matrix(64, 256, "float32").at[3, 5].set(jnp.nan).at[20, 40].set(-jnp.inf)
    scale = factors(jnp.nan_to_num(x, posinf=0, neginf=0), "nvfp4")
    by_rows, by_columns = run(x, plan_of(x, "nvfp4"), scale, kernel.Side(), kernel.Side(True))
    bad = np.zeros(x.shape, bool)
    bad[3, :16] = bad[20, 32:48] = True
    np.testing.assert_array_equal(np.isnan(by_rows), bad)
    bad = np.zeros(x.shape, bool)
    bad[:16, 5] = bad[16:32, 40] = True
    np.testing.assert_array_equal(np.isnan(by_columns), bad)


@pytest.mark.parametrize("qtype", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_codes_as_they_lie_and_transposed(qtype):
    x = matrix(160, 144, "bfloat16")
    kind = BlockFormat(get_format(qtype).element, None, "bfloat16")
    want = quantize(x, kind, axis=None)
    with warpgroup.installed():
        codes, turned, tops = jax.block_until_ready(kernel.cast_matrix(x, want.scale, kind.element))
    assert tops.max() == jnp.abs(x).max()
    for got, codes_of in ((codes, want.qvalue), (turned, want.qvalue.T)):  # -0 becomes 0
        np.testing.assert_array_equal(got.astype(jnp.float32), codes_of.astype(jnp.float32))


def test_api_gives_the_kernels_numbers_under_its_name():
    """Both axes and one, with rotation and a batch, equal to XLA's; unserved calls say why."""
    x = matrix(64, 256, "bfloat16")
    key = counter_key(jnp.asarray(WORDS[0]))
    sr = {"rounding": "stochastic", "key": key, "overrange": 17 / 16}
    call = functools.partial(fake_quantize_both, x, "nvfp4", {}, sr, signs=TE_SIGNS)
    with warpgroup.installed(), abstract_gpu():
        both = jax.block_until_ready(call(implementation="mosaic"))
        one = jax.block_until_ready(
            fake_quantize(x, "nvfp4", axis=0, implementation="mosaic", **sr)
        )
        batch = jax.block_until_ready(
            jax.vmap(lambda x: fake_quantize(x, "mxfp4", implementation="mosaic"))(
                jnp.stack([x, 2 * x])
            )
        )
    for got, want in zip(both, call(implementation="xla"), strict=True):
        assert_same(got, want)
    assert_same(one, fake_quantize(x, "nvfp4", axis=0, **sr))
    assert_same(batch[1], fake_quantize(2 * x, "mxfp4"))
    with abstract_gpu():
        for message, value, qtype, options in (
            ("blocks of 16 or 32", x, "fp8_e4m3", {}),
            ("multiples of 16; got shape", x[:8], "nvfp4", {}),
            ("blocks of 1 x 16 or 16 x 1", x[None], "nvfp4", {}),
            ("keys made by counter_key", x, "nvfp4", {**sr, "key": jax.random.key(0)}),
        ):
            with pytest.raises(NotImplementedError, match=message):
                fake_quantize(value, qtype, implementation="mosaic", **options)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        fake_quantize(x, "nvfp4", implementation="mosaic")
