"""SpargeAttn: the prediction by hand, the published names, the module, the tuner; and SLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.sparse import (
    SpargeAttention,
    SpargeThresholds,
    SparseLinearAttention,
    hilbert_order,
    sparse_linear_attention,
    tune_sparge,
)
from pallas_kernels import Mask, dot_product_attention, sage, testing
from pallas_kernels.ops.attention.sparge import block_means, predict, sparge_attention

TILES = {"block_q": 8, "block_kv": 4}


def qkv(t=29, s=26, n=4, k=2, h=8, seed=0):
    """Smooth along the tokens, so that blocks are alike and tiles differ."""
    rng = np.random.default_rng(seed)

    def smooth(length, heads):
        x = rng.normal(size=(1, length, heads, h)).cumsum(1) / 2
        return jnp.asarray(x - x.mean(1, keepdims=True), jnp.float32)

    return smooth(t, n), smooth(s, k), smooth(s, k)


def predict_by_hand(q, k, allowed, sim, cdf=None, topk=None, bq=8, bk=4):
    """Algorithm 1 as loops over heads and rows of tiles."""
    q, k = np.asarray(q, np.float64)[0], np.asarray(k, np.float64)[0]
    (t, n, h), (s, heads, _) = q.shape, k.shape
    nq, nk = -(-t // bq), -(-s // bk)
    kept = np.zeros((n, nq, nk), bool)

    def blocks(x, size):
        return [x[i : i + size] for i in range(0, len(x), size)]

    def alike(x):
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return (unit @ unit.T).sum() / len(x) ** 2

    for head in range(n):
        keys = k[:, head // (n // heads)]
        keys = keys - keys.mean(0)
        rows, columns = blocks(q[:, head], bq), blocks(keys, bk)
        judged = np.array([alike(x) > sim[head] for x in columns])
        for i, row in enumerate(rows):
            seen = [allowed[i * bq : i * bq + bq, j * bk : j * bk + bk].any() for j in range(nk)]
            score = np.array([row.mean(0) @ x.mean(0) for x in columns]) / np.sqrt(h)
            score = np.where(judged & seen, score, -np.inf)
            order = np.argsort(-score, kind="stable")
            if topk is not None:
                count = int(topk[head] * nk)
            else:
                top = score.max() if np.isfinite(score.max()) else 0.0
                p = np.exp(score - top)
                mass = np.cumsum(p[order] / max(p.sum(), 1e-300))
                count = np.searchsorted(mass, cdf[head], side="right")
            best = order[: max(count, 1)]
            kept[head, i, best[score[best] > -np.inf]] = True
            kept[head, i] |= ~judged | (not alike(row) > sim[head])
            kept[head, i] &= seen
    return kept


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", ["topk", "cdf"])
def test_prediction(rule, causal):
    q, k, _ = qkv()
    mask = Mask.causal(2) if causal else Mask()
    sim = np.array([-0.1, 0.6, 0.8, 1.0])
    share = np.array([0.5, 0.3, 0.8, 0.01])
    want = predict_by_hand(
        q, k, np.asarray(mask.dense(29, 26))[0, 0], sim,
        **({"topk": share} if rule == "topk" else {"cdf": share}),
    )  # fmt: skip
    names = {"topk": "topk", "cdf": "cdfthreshd"}
    run = jax.jit(functools.partial(predict, **TILES))
    got = run(q, k, mask, simthreshd1=sim, **{names[rule]: share})
    np.testing.assert_array_equal(got.to_blocks()[0], want)
    assert 0 < want.mean() < 1 and want[3].all() == (not causal)


def test_block_means_leave_padding_out():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10, 2, 4)), jnp.float32)
    live = (jnp.arange(10) < 6)[None, :, None]
    mean, alike = block_means(x.at[:, 6:].set(99.0), 4, live)
    want, want_alike = block_means(x[:, :6], 4)
    np.testing.assert_allclose(mean[:, :2], want, atol=1e-6)
    np.testing.assert_allclose(alike[:, :2], want_alike, atol=1e-6)
    assert (mean[:, 2] == 0).all() and (alike[:, 2] == 0).all()


def test_sparse_function_equals_dense_when_everything_is_kept():
    q, k, v = qkv()
    x = [jnp.asarray(y) for y in (q, k, v)]
    run = jax.jit(functools.partial(
        sparge_attention, quant=None, is_causal=True, return_sparsity=True, **TILES
    ))  # fmt: skip
    want = dot_product_attention(*x, is_causal=True)
    out, sparsity = run(*x, topk=1.0)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_array_equal(sparsity, 0)
    out, sparsity = run(*x, topk=0.3)
    kept = predict(q, k, Mask.causal(), topk=0.3, **TILES)
    np.testing.assert_allclose(out, dot_product_attention(*x, mask=kept), atol=2e-6)
    dense = 2 * Mask.causal().tile_status(29, 26, 8, 4).astype(bool).sum()
    skipped = 1 - 2 * kept.kv_num_blocks.sum(-1) / dense
    np.testing.assert_allclose(sparsity, skipped, atol=1e-6)


def test_published_names():
    q, k, v = (jnp.asarray(y, jnp.float32).swapaxes(1, 2) for y in qkv(140, 140, 2, 1))
    exact = dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), is_causal=True)
    out, sparsity = sage.spas_sage2_attn_meansim_cdf(
        q, k, v, is_causal=True, cdfthreshd=1.0, return_sparsity=True, output_dtype=jnp.bfloat16
    )
    assert out.dtype == jnp.bfloat16 and out.shape == q.shape and float(sparsity) == 0
    # Everything kept: what is left is the variant's own rounding error.
    assert testing.relative_l1(out.swapaxes(1, 2), exact) < 0.06
    out = sage.block_sparse_sage2_attn(q, k, v, jnp.zeros((1, 2, 3, 2)))
    np.testing.assert_array_equal(out, 0)
    assert sage.spas_sage2_attn_meansim_topk_cuda is sage.spas_sage2_attn_meansim_topk
    functions = (sage.spas_sage2_attn_meansim_topk, sage.spas_sage2_attn_meansim_cdf,
                 sage.block_sparse_sage2_attn)  # fmt: skip
    for function in functions:
        with pytest.raises(
            TypeError, match="takes no argument 'pvthresh'; did you mean 'pvthreshd'"
        ):
            function(q, k, v, pvthresh=50)
        with pytest.raises(NotImplementedError, match=r"dropout_p must be 0.*got 0.1"):
            function(q, k, v, dropout_p=0.1)
        with pytest.raises(ValueError, match="tensor_layout must be one of"):
            function(q, k, v, tensor_layout="BHND")
    with pytest.raises(ValueError, match="exactly one of topk and cdf.* got topk=0.5"):
        sage.spas_sage2_attn_meansim_topk(q, k, v, cdfthreshd=0.9)
    with pytest.raises(ValueError, match="exactly one of topk and cdfthreshd"):
        sage.spas_sage2_attn_meansim_topk(q, k, v, topk=None)
    with pytest.raises(NotImplementedError, match="attn_mask must be boolean"):
        sage.spas_sage2_attn_meansim_topk(q, k, v, attn_mask=jnp.zeros((140, 140)))


def test_causal_tokens_never_leak():
    """Upstream lets tokens of a diagonal tile see the future: ours must not, for given tiles."""
    q, k, v = (jnp.asarray(y).swapaxes(1, 2) for y in qkv(40, 40, 2, 1))
    blocks = jnp.ones((1, 1, 1, 1))
    run = jax.jit(lambda k, v: sage.block_sparse_sage2_attn(q, k, v, blocks, is_causal=True))
    # The future tokens change places: mean key and scales stay; whole numbers add up exactly.
    k, v = (jnp.round(4 * x) for x in (k, v))
    order = jnp.arange(40).at[21:].set(jnp.arange(40)[21:][::-1])
    np.testing.assert_array_equal(
        run(k, v)[:, :, :21], run(k[:, :, order], v[:, :, order])[:, :, :21]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"simthreshd1": 2.0}, r"simthreshd1 must be in \[-1, 1\]; got 2.0"),
        ({"topk": jnp.ones(3)}, r"topk must be a number or have shape \(4,\)"),
        ({"topk": 1.5}, r"topk must be in \[0, 1\]"),
        ({"pvthreshd": -1.0}, "pvthreshd must be in"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparge_attention(*qkv(), **TILES, **arguments)


def test_module_order_and_state():
    shape = (2, 4, 4)
    q, k, v = qkv(32, 32)
    thresholds = SpargeThresholds(topk=jnp.array([0.3, 0.5, 0.7, 1.0]))
    order = hilbert_order(shape)
    attend = SpargeAttention(thresholds, order=order, quant=None, **TILES)
    out, sparsity = attend(q, k, v, return_sparsity=True)
    plain = SpargeAttention(thresholds, quant=None, **TILES)
    want = plain(*(x[:, order] for x in (q, k, v)))
    np.testing.assert_array_equal(out[:, order], want)
    assert sparsity[0, 3] == 0 < sparsity[0, 0]
    leaves = jax.tree.leaves(nnx.state(attend))
    assert [x.shape for x in leaves] == [(), (4,)]
    assert not jax.tree.leaves(nnx.state(attend, nnx.Param))
    with pytest.raises(NotImplementedError, match="order changes which tokens are neighbours"):
        attend(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="exactly one of cdfthreshd and topk"):
        SpargeAttention(SpargeThresholds())
    with pytest.raises(ValueError, match="must be a permutation"):
        SpargeAttention(thresholds, order=np.zeros(4, int))


def test_tuner_keeps_the_bound():
    """One sharp head, one of white noise: the first becomes sparse, the second dense."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        sharp = np.repeat(np.eye(8), 8, axis=0)[:, None] * 6  # 8 groups of 8 equal tokens
        noise = rng.normal(size=(64, 1, 8))
        x = jnp.asarray(np.concatenate([sharp, noise], 1)[None], jnp.float32)
        samples.append(
            (
                x,
                x * jnp.array([1.0, 0.1])[:, None],
                jnp.asarray(rng.normal(size=x.shape), jnp.float32),
            )
        )
    found = tune_sparge(
        samples, l1=0.05, pv_l1=0.06, sims=(-1.0, 0.5), cdf_tolerance=0.02, pv_tolerance=2.0,
        quant=None, block_q=8, block_kv=8, attention_sink=False, progress=False,
    )  # fmt: skip
    assert (found.error < 0.06).all() and found.dense.tolist() == [False, True]
    assert found.sparsity[0] > 0.7 and found.sparsity[1] == 0
    assert found.thresholds.simthreshd1[1] == 1 and found.thresholds.cdfthreshd[1] == 1
    attend = SpargeAttention(
        found.thresholds, attention_sink=False, quant=None, block_q=8, block_kv=8
    )
    assert testing.relative_l1(attend(*samples[0]), dot_product_attention(*samples[0])) < 0.06
    with pytest.raises(ValueError, match="0 < l1 <= pv_l1"):
        tune_sparge(samples, l1=0.1)


def test_tuner_without_the_second_stage():
    q, k, v = qkv(64, 64)
    sizes = {"block_q": 16, "block_kv": 16, "quant": None, "attention_sink": False}
    found = tune_sparge(
        [(q, k, v)], l1=0.3, pv_l1=None, sims=(-1.0,), cdf_tolerance=0.02, progress=False, **sizes
    )
    # The bound is the one that was asked for; measured .2994 as found, .137 in all heads.
    assert found.thresholds.pvthreshd is None and (found.error < 0.3).all()
    attend = SpargeAttention(found.thresholds, **sizes)
    assert testing.relative_l1(attend(q, k, v), dot_product_attention(q, k, v)) < 0.3


# -- SLA -----------------------------------------------------------------------------------------


def test_sla_by_hand_and_gradient():
    q, k, v = qkv(32, 24)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)) / 3, jnp.float32)

    def by_hand(q, k, v, weight):
        smooth = k - k.mean(1, keepdims=True)
        scores = jnp.einsum(
            "bqnh,bknh->bnqk", q.reshape(1, 4, 8, 4, 8).mean(2),
            jnp.repeat(smooth.reshape(1, 6, 4, 2, 8).mean(2), 2, axis=2),
        )  # fmt: skip
        rank = jnp.argsort(jnp.argsort(-scores, -1), -1)
        kept = jnp.repeat(jnp.repeat(rank < 3, 8, 2), 4, 3)  # int(.5 * 6) tiles of each row
        near = dot_product_attention(q, k, v, mask=kept, implementation="reference")
        fq, fk = jax.nn.softmax(q, -1), jnp.repeat(jax.nn.softmax(k, -1), 2, axis=2)
        weights = jnp.einsum("btnh,bsnh->bnts", fq, fk)
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-5)
        return near + jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, axis=2)) @ weight

    run = functools.partial(sparse_linear_attention, topk=0.5, **TILES)
    loss = lambda f: lambda *x: jnp.sin(f(*x)).sum()  # noqa: E731
    got, grads = jax.jit(jax.value_and_grad(loss(run), (0, 1, 2, 3)))(q, k, v, weight)
    want, want_grads = jax.jit(jax.value_and_grad(loss(by_hand), (0, 1, 2, 3)))(q, k, v, weight)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_sla_module():
    q, k, v = qkv(32, 24)
    attend = SparseLinearAttention(8, topk=1.0, **TILES)
    np.testing.assert_allclose(attend(q, k, v), dot_product_attention(q, k, v), atol=2e-6)
    grads = nnx.grad(lambda m: (m(q, k, v) ** 2).sum())(attend)
    assert bool((grads.weight[...] != 0).any())
    with pytest.raises(NotImplementedError, match=r"\['is_causal'\] cannot be served"):
        attend(q, k, v, is_causal=True)
    for arguments, message in (
        ({"topk": 0.0}, "topk is 0.0"),
        ({"feature": "tanh"}, "feature is 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_linear_attention(q, k, v, jnp.zeros((8, 8)), **arguments)
