"""SageAttention by its own names: variants, layouts, log-sum-exp, refusals, packed sequences."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QUANTS, AttentionQuant, dot_product_attention, sage
from pallas_kernels.testing import relative_l1

# The names are part of the variant, so that both sides of a comparison share one compilation.
SM89 = AttentionQuant("sage2_sm89", block_q=128, block_kv=64, warp_q=32)


def inputs(n=40, m=40, heads=4, kv_heads=2, dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, heads, n, dim), (2, kv_heads, m, dim), (2, kv_heads, m, dim))
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    k = k + 4 * rng.normal(size=(1, kv_heads, 1, dim))  # a mean that smoothing takes away
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def expected(q, k, v, **arguments):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return dot_product_attention(q, k, v, **arguments).swapaxes(1, 2)


def replace(name, **fields):
    return dataclasses.replace(QUANTS[name], **fields)


MAPPED = {
    "sageattn": (sage.sageattn, {}, QUANTS["sage2"]),
    "sageattn rough": (sage.sageattn, dict(smooth_k=False), replace("sage2", smooth_k=False)),
    "sageattn sage3": (sage.sageattn, dict(quant="sage3"), QUANTS["sage3"]),
    "triton": (sage.sageattn_qk_int8_pv_fp16_triton, {}, QUANTS["sage1"]),
    "fp16": (
        sage.sageattn_qk_int8_pv_fp16_cuda,
        dict(smooth_v=True),
        dataclasses.replace(SM89, name="sage2_fp16pv", pv="half", smooth_v=True),
    ),
    "fp8": (sage.sageattn_qk_int8_pv_fp8_cuda, {}, QUANTS["sage2pp"]),
    "fp8 fp32": (sage.sageattn_qk_int8_pv_fp8_cuda, dict(pv_accum_dtype="fp32+fp32"), SM89),
    "sm90": (sage.sageattn_qk_int8_pv_fp8_cuda_sm90, {}, QUANTS["sage2"]),
    "sm90 per_warp": (
        sage.sageattn_qk_int8_pv_fp8_cuda_sm90,
        dict(qk_quant_gran="per_warp"),
        replace("sage2", granularity="per_warp"),
    ),
    "sage3": (sage.sageattn3_blackwell, {}, QUANTS["sage3"]),
    "sage3 one mean": (
        sage.sageattn3_blackwell,
        dict(per_block_mean=False),
        replace("sage3", block_q=256),
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_each_name_is_its_variant(name):
    function, arguments, quant = MAPPED[name]
    q, k, v = inputs(n=130 if name == "sage3 one mean" else 40)
    np.testing.assert_array_equal(function(q, k, v, **arguments), expected(q, k, v, quant=quant))


def test_layouts_scale_and_alignment():
    q, k, v = inputs(m=56)
    nhd = [x.swapaxes(1, 2) for x in (q, k, v)]
    arguments = dict(is_causal=True, sm_scale=0.3, return_lse=True)
    out, lse = sage.sageattn(q, k, v, **arguments)
    want = expected(q, k, v, is_causal=True, scale=0.3, quant="sage2")
    np.testing.assert_array_equal(out, want)
    turned, turned_lse = sage.sageattn(*nhd, "NHD", **arguments)
    np.testing.assert_array_equal(turned.swapaxes(1, 2), want)
    np.testing.assert_array_equal(turned_lse, lse)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_sum_exp_by_hand(dtype):
    q, k, v = inputs(dtype=dtype)
    _, lse = sage.sageattn(q, k, v, is_causal=True, return_lse=True)
    x = np.einsum("bhnd,bhmd->bhnm", np.float64(q), np.repeat(np.float64(k), 2, axis=1)) / np.sqrt(
        16
    )
    x = np.where(np.tri(40, dtype=bool), x, -np.inf)
    want = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    assert lse.shape == (2, 4, 40) and lse.dtype == jnp.float32
    # Logits reach 20; without the term that smoothing took away the error would be as large.
    np.testing.assert_allclose(lse, want, atol=0.05)


@pytest.mark.parametrize("name", MAPPED)
def test_every_variant_is_near_full_precision(name):
    function, arguments, _ = MAPPED[name]
    q, k, v = inputs()
    bound = 0.35 if "sage3" in name else 0.12 if "rough" in name else 0.05
    assert relative_l1(function(q, k, v, **arguments), expected(q, k, v)) < bound


def test_sage3_is_aligned_bottom_right_and_honours_its_mask():
    q, k, v = inputs(n=24)
    want = expected(q, k, v, is_causal=True, causal_offset=16, quant="sage3")
    np.testing.assert_array_equal(sage.sageattn3_blackwell(q, k, v, is_causal=True), want)
    mask = jnp.asarray(np.random.default_rng(1).random((24, 40)) < 0.5)
    want = expected(q, k, v, mask=mask[None, None], quant="sage3")
    np.testing.assert_array_equal(sage.sageattn3_blackwell(q, k, v, mask), want)


def test_sage1_masks():
    q, k, v = inputs()
    keep = jnp.arange(40) < 30
    want = expected(q, k, v, mask=keep[None, None, None], quant="sage1")
    bias = jnp.where(keep, 0.0, -1e9)
    attend = sage.sageattn_qk_int8_pv_fp16_triton
    np.testing.assert_array_equal(attend(q, k, v, attn_mask=keep[None]), want)
    # The float mask does not say which keys are dead, so they take part in the mean of K.
    assert relative_l1(attend(q, k, v, attn_mask=bias[None, None]), want) < 0.02


# The sparse functions have arguments of their own, see test_sparge.py.
NAMES = [getattr(sage, name) for name in sage.__all__ if name.startswith("sageattn")]


@pytest.mark.parametrize("function", NAMES, ids=lambda f: f.__name__)
def test_real_signature_and_unknown_keyword(function):
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"takes no argument 'is_casual'; did you mean 'is_causal'"):
        function(q, k, v, is_casual=True)
    with pytest.raises(TypeError, match="takes no argument 'dropout_p'; attention dropout"):
        function(q, k, v, dropout_p=0.0)


def test_hints_for_torch_users():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"'attn_mask'; .*dot_product_attention\(..., mask=...\)"):
        sage.sageattn(q, k, v, attn_mask=None)
    # The fourth positional argument of scaled_dot_product_attention is the mask.
    with pytest.raises(ValueError, match="tensor_layout must be one of 'HND', 'NHD'; got a"):
        sage.sageattn(q, k, v, jnp.ones((40, 40), bool))


REFUSED = {
    "layout": (sage.sageattn, dict(tensor_layout="BHND"), ValueError, "got 'BHND'"),
    "quant": (sage.sageattn, dict(quant=None), ValueError, "quant must be a variant"),
    "unknown quant": (sage.sageattn, dict(quant="sage9"), ValueError, "got 'sage9'"),
    "granularity": (
        sage.sageattn_qk_int8_pv_fp8_cuda_sm90,
        dict(qk_quant_gran="per_block"),
        ValueError,
        "qk_quant_gran must be one of 'per_warp', 'per_thread'; got 'per_block'",
    ),
    "accumulator": (
        sage.sageattn_qk_int8_pv_fp16_cuda,
        dict(pv_accum_dtype="fp16"),
        NotImplementedError,
        "use pv_accum_dtype='fp32'",
    ),
    "single level": (
        sage.sageattn_qk_int8_pv_fp8_cuda_sm90,
        dict(pv_accum_dtype="fp32"),
        NotImplementedError,
        r"use 'fp32\+fp32'",
    ),
    "backend": (
        sage.sageattn_qk_int8_pv_fp16_triton,
        dict(quantization_backend="jax"),
        ValueError,
        "got 'jax'",
    ),
    "mask": (
        sage.sageattn3_blackwell,
        dict(attn_mask=jnp.ones(40)),
        ValueError,
        r"attn_mask must have 2 to 4 axes .* got shape \(40,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        function(*inputs(), **arguments)


def test_wrong_rank():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"q must have four axes \[B, H, N, D\].*\(4, 40, 16\)"):
        sage.sageattn(q[0], k, v)


def test_gradient_and_vmap():
    q, k, v = inputs(n=8, m=8)
    loss = lambda *x: sage.sageattn(*x, is_causal=True).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)
    stacked = jax.vmap(sage.sageattn)(*(x[None] for x in (q, k, v)))
    np.testing.assert_allclose(stacked[0], sage.sageattn(q, k, v), atol=1e-6)


# -- packed sequences --------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K = (17, 1, 0, 30), (17, 9, 5, 21)


def packed():
    rng = np.random.default_rng(2)
    total_q, total_k = sum(LENGTHS_Q), sum(LENGTHS_K)
    q = jnp.asarray(rng.normal(size=(total_q + 3, 4, 16)), jnp.float32)  # 3 tokens of no sequence
    # Every sequence has a key mean of its own, which one common mean would not remove.
    bias = np.repeat(20 * rng.normal(size=(4, 1, 16)), LENGTHS_K, axis=0)
    k = jnp.asarray(rng.normal(size=(total_k, 2, 16)) + bias, jnp.float32)
    v = jnp.asarray(rng.normal(size=(total_k, 2, 16)), jnp.float32)
    ends = [np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (LENGTHS_Q, LENGTHS_K)]
    return (q, k, v), [jnp.asarray(x) for x in ends]


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_equal_single_ones(is_causal):
    (q, k, v), (ends_q, ends_k) = packed()
    out = sage.sageattn_varlen(q, k, v, ends_q, ends_k, 30, 21, is_causal=is_causal)
    assert out.shape == q.shape
    for b, length in enumerate(LENGTHS_Q):
        if length == 0 or (b < 3 and not is_causal):
            continue
        rows = slice(int(ends_q[b]), int(ends_q[b + 1]))
        keys = slice(int(ends_k[b]), int(ends_k[b + 1]))
        one = dot_product_attention(q[rows], k[keys], v[keys], is_causal=is_causal, quant="sage1")
        np.testing.assert_allclose(out[rows], one, atol=1e-5)
    np.testing.assert_array_equal(out[-3:], 0)


def test_packed_sequences_under_jit_and_grad():
    (q, k, v), (ends_q, ends_k) = packed()

    def run(q, k, v, ends_q, ends_k, longest=30):
        return sage.sageattn_varlen(q, k, v, ends_q, ends_k, longest, 21)

    eager = run(q, k, v, ends_q, ends_k)
    np.testing.assert_allclose(jax.jit(run)(q, k, v, ends_q, ends_k), eager, atol=1e-6)
    loss = lambda *x: (run(*x, ends_q, ends_k) ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)
    # A bound that is too small cannot be seen under jit; it must not pass for a result.
    short = jax.jit(lambda *x: run(*x, longest=20))(q, k, v, ends_q, ends_k)
    assert jnp.isnan(short[18:48]).all() and not jnp.isnan(short[:18]).any()


BAD_PACKED = {
    "falls": (dict(cu_seqlens_q=jnp.array([0, 20, 10, 30, 48])), "never fall"),
    "beyond": (dict(cu_seqlens_k=jnp.array([0, 20, 30, 40, 90])), "at most at 52"),
    "longest": (dict(max_seqlen_q=20), "a sequence of 30 tokens; max_seqlen_q is 20"),
    "not static": (dict(max_seqlen_k=jnp.array(21)), "max_seqlen_k must be a positive int"),
    "float": (dict(cu_seqlens_q=jnp.ones(5)), "must be an integer array"),
    "count": (dict(cu_seqlens_q=jnp.array([0, 17, 48])), "has 3 entries and cu_seqlens_k 5"),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_packed_refused(name):
    change, message = BAD_PACKED[name]
    (q, k, v), (ends_q, ends_k) = packed()
    arguments = dict(cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, max_seqlen_q=31, max_seqlen_k=21)
    with pytest.raises(ValueError, match=message):
        sage.sageattn_varlen(q, k, v, **(arguments | change))
