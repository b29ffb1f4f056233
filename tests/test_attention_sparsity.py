"""Sparsity from blocks against the same numbers from the whole T×S matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxeff.metrics import attention_sparsity, attention_statistics

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": (3, 0)},
    "two_sided_window": {"local_window_size": 2},
    "padding": {"mask": (np.arange(11) < 7)[None, None, None]},
    "row_mask": {"mask": np.random.default_rng(5).random((2, 4, 9, 11)) < 0.4},
    "dead_rows": {"mask": (np.arange(9) > 3)[None, None, :, None]},
}


def whole(query, key, block_q, block_kv, kept, mask=None, is_causal=False, local_window_size=None):
    """Numpy oracle that holds everything, loops, and skips rows that see nothing."""
    B, T, N, H = query.shape
    S = key.shape[1]
    key = np.repeat(key, N // key.shape[2], axis=2)
    visible = np.ones((B, N, T, S), bool)
    t, s = np.arange(T)[:, None], np.arange(S)
    if is_causal:
        visible &= s <= t
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        visible &= (s - t >= -left) & (s - t <= right)
    if mask is not None:
        visible &= mask
    logits = np.einsum("btnh,bsnh->bnts", query, key) * H**-0.5
    result = []
    for n in range(N):
        rows, blocks = [], []
        for b in range(B):
            alpha = np.zeros((T, S))
            for i in range(T):
                v = visible[b, n, i]
                if not v.any():
                    continue
                e = np.exp(logits[b, n, i, v] - logits[b, n, i, v].max())
                alpha[i, v] = w = e / e.sum()
                h = -(w * np.log(w)).sum()
                rows.append((h / np.log(v.sum()) if v.sum() > 1 else 0.0, np.exp(h), w.max()))
            for i in range(0, T, block_q):
                mass = [
                    alpha[i : i + block_q, j : j + block_kv].sum()
                    for j in range(0, S, block_kv)
                    if visible[b, n, i : i + block_q, j : j + block_kv].any()
                ]
                if mass:
                    m = np.sort(mass) / np.sum(mass)
                    gini = ((2 * np.arange(1, m.size + 1) - m.size - 1) * m).sum() / m.size
                    blocks.append((gini, (np.cumsum(m) <= 1 - kept).mean()))
        result.append([*np.mean(rows, axis=0), *np.mean(blocks, axis=0)])
    return np.array(result).T


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_q, block_kv", [(4, 3), (16, 16)])
def test_against_the_whole_matrix(case, block_q, block_kv):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 9, 4, 8)).astype(np.float32) * 2
    key = rng.normal(size=(2, 11, 2, 8)).astype(np.float32)
    options = {k: jnp.asarray(v) if k == "mask" else v for k, v in CASES[case].items()}
    got = attention_statistics(
        jnp.asarray(query), jnp.asarray(key), block_q=block_q, block_kv=block_kv,
        kept_mass=0.8, **options,
    )  # fmt: skip
    expected = whole(query, key, block_q, block_kv, 0.8, **CASES[case])
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-4, atol=1e-5)


def test_one_hot_attention_is_fully_sparse():
    """Row t attends to key t only: one tile on the diagonal holds everything."""
    x = 100.0 * jnp.eye(16)[None, :, None, :]
    found = attention_statistics(x, x, block_q=4, block_kv=4)
    np.testing.assert_allclose(np.stack(found)[:, 0], [0, 1, 1, 0.75, 0.75], atol=1e-5)


def test_nothing_visible_gives_zeros():
    x = jnp.ones((1, 4, 1, 8))
    found = attention_statistics(x, x, mask=jnp.zeros((1, 1, 4, 4), bool))
    np.testing.assert_array_equal(np.stack(found), 0.0)


def test_memory_grows_with_the_block_and_not_with_the_square():
    x = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)
    trace = jax.make_jaxpr(lambda q, k: attention_statistics(q, k, is_causal=True))(x, x)

    def largest(jaxpr):
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = [
            largest(getattr(p, "jaxpr", p))
            for eqn in jaxpr.eqns
            for p in eqn.params.values()
            if hasattr(getattr(p, "jaxpr", p), "eqns")
        ]
        return max([*sizes, *inner, 0])

    assert largest(trace.jaxpr) <= 64 * 2048


def test_on_a_decoder_under_jit():
    from jaxeff.models import Decoder, ModelConfig

    config = ModelConfig.llama(
        vocab_size=32, num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2
    )
    model = Decoder(config, rngs=nnx.Rngs(0), attention_fn=jax.nn.dot_product_attention)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 32)
    found = nnx.jit(lambda m, t: attention_sparsity(m, t, block_q=8, block_kv=8))(model, tokens)
    assert all(field.shape == (3, 4) for field in found)
    assert bool(jnp.all(found.entropy > 0.6))  # fresh weights: attention is spread out
    valid = jnp.arange(24)[None] < jnp.array([[24], [20]])
    padded = nnx.jit(lambda m, t: attention_sparsity(m, t, valid=valid))(model, tokens)
    assert bool(jnp.all(jnp.isfinite(padded.entropy)))


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match="did not call attention_fn"):
        attention_sparsity(lambda x, attention_fn: x, jnp.ones((1, 4)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": jnp.ones((1, 4, 3, 8))}, r"key has 2 heads; query heads \(3\)"),
        ({"query": jnp.ones((4, 4, 8))}, "expected .B, T, N, H."),
        ({"key": jnp.ones((1, 4, 2, 4))}, "must agree in batch and head dimension"),
        ({"kept_mass": 0.0}, "kept_mass is 0.0"),
        ({"block_q": 0}, "block_q is 0"),
        ({"mask": jnp.ones((4, 4))}, "mask is float32 of shape"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"query": jnp.ones((1, 4, 4, 8)), "key": jnp.ones((1, 4, 2, 8))} | change
    with pytest.raises(ValueError, match=message):
        attention_statistics(arguments.pop("query"), arguments.pop("key"), **arguments)
