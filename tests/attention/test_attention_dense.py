"""Full-precision attention against `jax.nn.dot_product_attention` and against itself."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._dispatch import explain
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.masks import BlockMask, Mask
from pallas_kernels.ops.attention import AttentionConfig
from pallas_kernels.ops.attention import dot_product_attention as attention

# (implementation, keys per chunk): the chunk of 8 forces the loop and ragged last chunks.
WAYS = [("reference", None), ("xla", None), ("xla", 8)]
WAY_IDS = ["reference", "xla_single", "xla_chunked"]


def config(block):
    return None if block is None else AttentionConfig(block_kv=block)


def qkv(t, s, n=4, k=2, h=8, b=2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def rules(t, s, n, b=2):
    rng = np.random.default_rng(1)
    dense = jnp.asarray(rng.random((b, n, t, s)) < 0.7).at[..., 0].set(True)
    return {
        "none": {},
        "causal": dict(is_causal=True),
        "window": dict(local_window_size=(3, 2)),
        "window_int": dict(local_window_size=4, is_causal=True),
        "lengths": dict(key_value_seq_lengths=jnp.array([1, s], jnp.int32)),
        "bias": dict(bias=jnp.asarray(rng.normal(size=(1, n, t, s)), jnp.float32)),
        "mask": dict(mask=dense),
        "mask_head_shared": dict(mask=dense[:, :1], is_causal=True),
        "scale": dict(scale=0.1),
    }


@functools.cache
def jax_nn(name, t, s):
    return jax.nn.dot_product_attention(*qkv(t, s), **rules(t, s, 4)[name], return_residual=True)


@pytest.mark.parametrize(("implementation", "block"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize(
    ("name", "t", "s"), [*((name, 17, 33) for name in rules(1, 1, 1)), ("causal", 1, 1)]
)
def test_agrees_with_jax_nn(name, t, s, implementation, block):
    want, want_lse = jax_nn(name, t, s)
    run = dict(implementation=implementation, config=config(block), return_residual=True)
    got, lse = attention(*qkv(t, s), **rules(t, s, 4)[name], **run)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=4e-6)
    assert lse.dtype == jnp.float32 and lse.shape == (2, t, 4)


@pytest.mark.parametrize(("groups", "block"), [(1, 8), (2, None), (4, 8), (7, None)])
def test_grouped_heads(groups, block):
    q, k, v = qkv(5, 19, n=2 * groups, k=2)
    want = jax.nn.dot_product_attention(q, k, v)
    got = attention(q, k, v, implementation="xla", config=config(block))
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize(("implementation", "block"), WAYS, ids=WAY_IDS)
def test_dtypes(dtype, atol, implementation, block):
    q, k, v = qkv(17, 33, dtype=dtype)
    want = attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="reference")
    got = attention(q, k, v, implementation=implementation, config=config(block))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)


def test_longer_than_one_chunk_without_config():
    q, k, v = qkv(1100, 1000, n=2, k=1, b=1)
    want = attention(q, k, v, is_causal=True, implementation="reference")
    got = attention(q, k, v, is_causal=True, implementation="xla")
    np.testing.assert_allclose(got, want, atol=2e-6)


# -- what jax.nn does not have: checked against logits written out by hand ----------------------


def by_hand(q, k, v, allowed, soft_cap=None, sinks=None, bias=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, n, h = q.shape
    group = n // k.shape[2]
    out, lse = np.zeros(q.shape), np.full((b, t, n), -np.inf)
    for i, j, head in itertools.product(range(b), range(t), range(n)):
        x = q[i, j, head] @ k[i, :, head // group].T / np.sqrt(h)
        x = x if soft_cap is None else soft_cap * np.tanh(x / soft_cap)
        x = x if bias is None else x + np.asarray(bias)[i, head, j]
        x = x[allowed[i, j]]
        weights, total = np.exp(x), np.exp(x).sum()
        total += 0 if sinks is None else np.exp(np.asarray(sinks, np.float64)[head])
        if total:
            out[i, j, head] = weights @ v[i, allowed[i, j], head // group] / total
            lse[i, j, head] = np.log(total)
    return out, lse


EXTRAS = ["bottom_right", "dynamic_offset", "segments", "soft_cap", "sinks", "all"]


def extra(name, t, s):
    """Keyword arguments, and the pairs they allow."""
    row, col = np.arange(t)[:, None], np.arange(s)
    yes = np.ones((2, t, s), bool)
    q_ids, kv_ids = np.arange(t) // 4, np.arange(s) // 6
    segments = np.broadcast_to(q_ids[:, None] == kv_ids, yes.shape)
    ids = tuple(jnp.tile(jnp.asarray(x)[None], (2, 1)) for x in (q_ids, kv_ids))
    offsets = np.array([0, 5])
    sinks = jnp.array([0.5, -1.0, 2.0, 0.0])
    match name:
        case "bottom_right":
            allowed = yes & (col <= row + s - t)
            return dict(is_causal=True, causal_offset=s - t), allowed
        case "dynamic_offset":
            allowed = col <= row + offsets[:, None, None]
            return dict(is_causal=True, causal_offset=jnp.asarray(offsets)), allowed
        case "segments":
            return dict(segment_ids=ids), segments
        case "soft_cap":
            return dict(logits_soft_cap=0.7), yes
        case "sinks":
            return dict(sinks=sinks), yes
        case "all":
            bias = jnp.asarray(np.random.default_rng(5).normal(size=(2, 4, t, s)), jnp.float32)
            kwargs = dict(
                segment_ids=ids, sinks=sinks, logits_soft_cap=2.0, bias=bias, is_causal=True,
                causal_offset=3, local_window_size=(6, 1), query_seq_lengths=jnp.array([t, t - 3]),
            )  # fmt: skip
            allowed = segments & (col <= row + 3) & (col >= row - 3)
            return kwargs, allowed & (row < np.array([t, t - 3])[:, None, None])


@pytest.mark.parametrize(("implementation", "block"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("name", EXTRAS)
def test_extras(name, implementation, block):
    q, k, v = qkv(13, 21)
    kwargs, allowed = extra(name, 13, 21)
    opts = {x: np.asarray(kwargs[x]) for x in ("sinks", "bias") if x in kwargs}
    want, want_lse = by_hand(q, k, v, allowed, kwargs.get("logits_soft_cap"), **opts)
    got, lse = attention(
        q, k, v, **kwargs, implementation=implementation, config=config(block),
        return_residual=True,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=4e-6)


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("name", ["none", "soft_cap", "sinks", "all"])
def test_gradients_match_the_reference(name, block):
    q, k, v = qkv(13, 21)
    kwargs = {} if name == "none" else extra(name, 13, 21)[0]
    diff = {x: kwargs.pop(x) for x in ("bias", "sinks") if x in kwargs}
    weight = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)

    def loss(args, implementation, config=None):
        (q, k, v), extra = args
        out, lse = attention(
            q, k, v, **extra, **kwargs, implementation=implementation, config=config,
            return_residual=True,
        )  # fmt: skip
        return (out * weight).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    want = jax.grad(loss)(((q, k, v), diff), "reference")
    got = jax.grad(loss)(((q, k, v), diff), "xla", config(block))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_gradient_by_finite_differences():
    q, k, v = qkv(3, 11, n=2, k=1, h=4, b=1)
    kwargs = dict(is_causal=True, causal_offset=8, logits_soft_cap=3.0, config=config(4))

    def f(*x):
        return jnp.sin(attention(*x, **kwargs)).sum()

    got = jax.grad(f, (0, 1, 2))(q, k, v)
    rng = np.random.default_rng(3)
    for i, x in enumerate((q, k, v)):
        d = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        args = lambda e, i=i, d=d: [y + e * d if i == j else y for j, y in enumerate((q, k, v))]  # noqa: E731
        slope = (f(*args(1e-2)) - f(*args(-1e-2))) / 2e-2
        np.testing.assert_allclose(jnp.vdot(got[i], d), slope, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 21), (2, 4, 13, 1), (1, 4, 1, 1), (1, 1, 13, 21)])
def test_bias_gradient_sums_over_broadcast_axes(shape):
    q, k, v = qkv(13, 21)
    bias = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    grads = [
        jax.grad(
            lambda b, kw=kw: (
                attention(q, k, v, b, is_causal=True, causal_offset=8, **kw) ** 2
            ).sum()
        )(bias)
        for kw in (dict(implementation="reference"), dict(config=config(8)))
    ]
    assert grads[1].shape == shape
    np.testing.assert_allclose(grads[1], grads[0], atol=1e-5)


def test_backward_holds_no_square_array():
    """The gradient's program has no T×S buffer in it."""
    t = 2048
    x = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v, is_causal=True, config=config(128)).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    assert f"{t}x{t}" not in text and f"{t}x128" in text


# -- empty rows, padding, leaks -----------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "block"), WAYS, ids=WAY_IDS)
def test_rows_with_nothing_to_attend(implementation, block):
    q, k, v = qkv(6, 20)
    run = dict(implementation=implementation, config=config(block), return_residual=True)
    lengths = jnp.array([0, 20], jnp.int32)
    out, lse = attention(q, k, v, key_value_seq_lengths=lengths, **run)
    assert (out[0] == 0).all() and jnp.isneginf(lse[0]).all()
    assert (out[1] != 0).any() and jnp.isfinite(lse[1]).all()
    grads = jax.grad(
        lambda *x: attention(*x, key_value_seq_lengths=lengths, **run)[0].sum(), (0, 1, 2)
    )
    for g in grads(q, k, v):
        assert jnp.isfinite(g).all() and (g[0] == 0).all()
    # A sink is something to attend to: no value, but a log-sum-exp.
    sinks = jnp.arange(4.0)
    out, lse = attention(q, k, v, key_value_seq_lengths=lengths, sinks=sinks, **run)
    assert (out[0] == 0).all()
    np.testing.assert_allclose(lse[0], jnp.broadcast_to(sinks, (6, 4)), atol=1e-6)


NAN_RULES = {
    "lengths": dict(key_value_seq_lengths=jnp.array([9, 9]), query_seq_lengths=jnp.array([5, 5])),
    "mask": dict(mask=((jnp.arange(7)[:, None] < 5) & (jnp.arange(20) < 9))[None, None]),
    "segments": dict(
        segment_ids=(
            jnp.tile(jnp.where(jnp.arange(7) < 5, 0, 1), (2, 1)),
            jnp.tile(jnp.where(jnp.arange(20) < 9, 0, 2), (2, 1)),
        )
    ),
}


@pytest.mark.parametrize(
    ("rule", "quant", "implementation", "block"),
    [
        *((rule, None, "xla", block) for rule in NAN_RULES for block in (None, 8)),
        ("lengths", None, "reference", None),
        ("lengths", "sage2", "reference", None),
        ("mask", "sage2", "xla", None),
        ("lengths", "sage3", "xla", None),
    ],
)
def test_nan_in_padding_does_not_spread(rule, quant, implementation, block):
    q, k, v = qkv(7, 20)
    poison = lambda x, n: x.at[:, n:].set(jnp.nan)  # noqa: E731
    kwargs = NAN_RULES[rule] | dict(
        quant=quant, implementation=implementation, config=config(block)
    )
    bad = (poison(q, 5), poison(k, 9), poison(v, 9))
    clean = tuple(jnp.nan_to_num(x) for x in bad)
    np.testing.assert_array_equal(attention(*bad, **kwargs), attention(*clean, **kwargs))
    if quant is not None and implementation == "reference":
        return  # the oracle of a quantised variant rounds: it has no useful derivative
    grads = jax.grad(lambda *x: (attention(*x, **kwargs) ** 2).sum(), (0, 1, 2))(*bad)
    for g, valid in zip(grads, (5, 9, 9), strict=True):
        assert jnp.isfinite(g).all() and (g[:, valid:] == 0).all()


@pytest.mark.parametrize(("implementation", "block"), WAYS, ids=WAY_IDS)
def test_later_tokens_never_change_earlier_outputs(implementation, block):
    q, k, v = qkv(16, 16)
    run = dict(is_causal=True, implementation=implementation, config=config(block))
    before = attention(q, k, v, **run)
    after = attention(q, k.at[:, 9:].add(100.0), v.at[:, 9:].add(100.0), **run)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])


def test_block_mask_and_mask_objects():
    q, k, v = qkv(20, 20)
    rule = Mask.causal() & Mask.window(6, 0)
    want = attention(q, k, v, mask=rule.dense(20, 20), implementation="reference")
    blocks = BlockMask.from_mask(rule, 20, 20, block_q=8, block_kv=4)
    for mask, block in itertools.product((rule, blocks), (None, 8)):
        cut = config(block)
        got = jax.jit(lambda m, cut=cut: attention(q, k, v, mask=m, config=cut))(mask)
        np.testing.assert_allclose(got, want, atol=2e-6)
    empty = BlockMask.from_blocks(jnp.zeros((3, 5)), 20, 20, block_q=8, block_kv=4)
    assert (attention(q, k, v, mask=empty) == 0).all()


# -- transformations ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("quant", [None, "sage2"])
def test_vmap_and_jit_and_unbatched(block, quant):
    q, k, v = qkv(6, 20)
    f = lambda *x: attention(*x, is_causal=True, quant=quant, config=config(block))  # noqa: E731
    want = f(q, k, v)
    np.testing.assert_allclose(jax.vmap(f)(q, k, v), want, atol=1e-5)
    np.testing.assert_allclose(f(q[0], k[0], v[0]), want[0], atol=1e-5)
    np.testing.assert_allclose(jax.jit(f)(q, k, v), want, atol=1e-5)
    twice = jax.vmap(jax.vmap(f))(*(x[:, None] for x in (q, k, v)))
    np.testing.assert_allclose(twice[:, 0], want, atol=1e-5)


def test_second_call_does_not_recompile():
    q, k, v = qkv(6, 20)
    f = jax.jit(lambda q, k, v, n: attention(q, k, v, key_value_seq_lengths=n))
    for n in ([3, 4], [20, 1]):
        f(q, k, v, jnp.array(n))
    assert f._cache_size() == 1


def test_bit_equal_when_repeated():
    q, k, v = qkv(17, 33)
    f = jax.jit(lambda *x: attention(*x, quant="sage2"))
    np.testing.assert_array_equal(f(q, k, v), f(q, k, v))


# -- dispatch -----------------------------------------------------------------------------------


def test_explain_needs_only_shapes(caplog):
    x = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.bfloat16)
    said = explain("attention", x, x, x, is_causal=True, quant="sage2")
    assert said.implementation == "xla" and "GPU" in said.rejected["mosaic"]
    assert any("unquantised flash backward" in note for note in said.notes)
    with abstract_gpu():
        assert explain("attention", x, x, x).implementation == "mosaic"
    with pytest.raises(
        NotImplementedError, match=r"mosaic.*These implementations take the call: xla"
    ):
        attention(*qkv(4, 4), implementation="mosaic")


def test_rejection_is_logged_once(caplog):
    from pallas_kernels import _dispatch

    _dispatch._logged.clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(3):
            attention(*qkv(4, 4))
    assert len([r for r in caplog.records if "not mosaic" in r.message]) == 1


def test_eval_shape():
    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    out, lse = jax.eval_shape(lambda q, k, v: attention(q, k, v, return_residual=True), x, x, x)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        (2, 64, 4, 64), jnp.bfloat16, (2, 64, 4), jnp.float32,
    )  # fmt: skip


# -- messages -----------------------------------------------------------------------------------

Z = jnp.zeros
THREE_HEADS, ONE, NARROW = Z((2, 8, 3, 8)), Z((1, 8, 2, 8)), Z((2, 8, 2, 4))
BAD = {
    "heads": (dict(key=THREE_HEADS, value=THREE_HEADS), r"key has 3 heads; query heads \(4\)"),
    "batch": (dict(key=ONE, value=ONE), "key has batch size 1; query has 2"),
    "head_dim": (dict(key=NARROW, value=NARROW), "key has head_dim 4; query has 8"),
    "value": (dict(value=Z((2, 7, 2, 8))), r"value must have the shape of key, \(2, 8, 2, 8\)"),
    "rank": (dict(key=Z((8, 2, 8))), r"key must be \[B, S, K, H\]"),
    "dtype": (dict(key=Z((2, 8, 2, 8), jnp.bfloat16)), "key dtype must equal query dtype float32"),
    "int": (dict(query=Z((2, 6, 4, 8), jnp.int32)), "query dtype must be one of float32"),
    "mask": (dict(mask=Z((2, 4, 5, 8), bool)), r"broadcastable to \[B, N, T, S\] = \[2, 4, 6, 8\]"),
    "mask_rank": (dict(mask=Z((6, 8), bool)), "mask must have 3 or 4 dimensions"),
    "mask_dtype": (dict(mask=Z((1, 1, 6, 8))), "mask must be boolean"),
    "bias_dtype": (dict(bias=Z((1, 1, 6, 8), bool)), "bias must be floating point; got bool"),
    "lengths": (dict(key_value_seq_lengths=Z((3,), jnp.int32)), r"shape \(2,\); got shape \(3,\)"),
    "window": (dict(local_window_size=(-1, 0)), r"each >= 0 tokens; got \(-1, 0\)"),
    "segments": (dict(segment_ids=Z((2, 6), jnp.int32)), r"segment_ids of the key .* \(2, 8\)"),
    "offset": (dict(causal_offset=1.5), "causal_offset must be an integer"),
    "cap": (dict(logits_soft_cap=0.0), "logits_soft_cap must be finite and positive; got 0.0"),
    "scale": (dict(scale=float("nan")), "scale must be finite; got nan"),
    "sinks": (dict(sinks=Z((3,))), r"sinks must be .* shape \(4,\)"),
    "quant": (dict(quant="sage9"), "quant must be None, an AttentionQuant or one of 'sage1'"),
    "implementation": (dict(implementation="cuda"), "one of 'mosaic', 'xla', 'reference'"),
    "config": (dict(config=3), "config must be an AttentionConfig or None; got int"),
    "empty": (dict(key=Z((2, 0, 2, 8)), value=Z((2, 0, 2, 8))), "no dimension may be 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_messages(case):
    kwargs, message = BAD[case]
    call = dict(query=Z((2, 6, 4, 8)), key=Z((2, 8, 2, 8)), value=Z((2, 8, 2, 8))) | kwargs
    with pytest.raises(ValueError, match=message):
        attention(**call)


def test_array_scale_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match="Multiply the query"):
        attention(*qkv(4, 4), scale=jnp.float32(0.5))


def test_unknown_keyword():
    with pytest.raises(TypeError, match="dropout_p"):
        attention(*qkv(4, 4), dropout_p=0.1)
