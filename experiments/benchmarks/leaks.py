"""Later tokens must not change what an earlier query reads: cases of ``block_sparse``, on a GPU.

Each case is a kernel; it goes through every builder of a `BlockMask`, with a causal rule inside the
tiles. 16-bit keys and values after a token are replaced; in a quantised variant, where tokens share
the mean key and scales, they change places with others of their scale, which leaves both as they
are (whole numbers add up exactly). What is checked are bits: outputs up to the token stay, and keys
and values after it get no gradient from outputs before it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gradient import pulled, quant_of
from pallas_kernels import BlockMask, Mask
from pallas_kernels.ops.attention.sparge import predict

LENGTH = 512


def cases() -> list[dict[str, Any]]:
    """A kernel each: formats, then 64 rows of queries to a list."""
    base = {"group": "leaks", "stage": "correct", "block": [128, 128]}
    variants = ("sage2", None, "sage_bwd", "sage1", "fp8")
    found = [{**base, "leaks": quant} for quant in variants]
    found += [{**base, "leaks": quant, "block": [64, 128]} for quant in variants[:3]]
    return found


def builders(query, key, block_q: int, block_kv: int) -> dict[str, BlockMask]:
    """One mask of each builder, whose tiles a causal rule cuts."""
    t, sizes = LENGTH, {"block_q": block_q, "block_kv": block_kv}
    nq, nk = -(-t // block_q), -(-t // block_kv)
    make, rng = {**sizes, "mask": Mask.causal()}, np.random.default_rng(6)
    scores = jnp.asarray(rng.normal(size=(1, 2, nq, nk)), jnp.float32)
    rule = lambda t, s: (s <= t) & ((t - s) % 192 < 70)  # noqa: E731
    indptr = jnp.minimum(jnp.arange(nq + 1) * 2, 2 * nq)
    indices = jnp.asarray([[i % nk, (i + 2) % nk] for i in range(nq)]).ravel()
    window = BlockMask.from_mask(Mask.window(150, 0), t, t, **sizes)
    topk = BlockMask.from_scores(scores, t, t, topk=0.5, **make)
    return {
        "mask": BlockMask.from_mask(Mask.causal(), t, t, **sizes),
        "window": window,
        "dense": BlockMask.from_dense(jnp.tril(jnp.ones((t, t), bool)), **sizes),
        "predicate": BlockMask.from_predicate(rule, t, t, **sizes),
        "topk": topk,
        "cdf": BlockMask.from_scores(scores, t, t, cdf=0.6, **make),
        "bsr": BlockMask.from_bsr(indptr, indices, t, t, **make),
        "blocks": BlockMask.from_blocks(jnp.ones((nq, nk)), t, t, **make),
        "union": topk | window,
        "intersection": topk & window,
        "sparge": predict(query, key, Mask.causal(), topk=0.5, **sizes),
    }


def inputs(heads=(2, 1, 1, 2), head_dim: int = 128) -> list[jax.Array]:
    """Small whole numbers: query, key, value and the output's cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(1, LENGTH, n, head_dim) for n in heads]
    return [jnp.asarray(rng.integers(-9, 10, shape), jnp.bfloat16) for shape in shapes]


def moved(now: int) -> np.ndarray:
    """An order of the tokens that exchanges later ones within 64 and with equal place modulo 8."""
    order = np.arange(LENGTH)
    for start in range(0, LENGTH, 64):
        for residue in range(8):
            group = np.arange(start + residue, start + 64, 8)
            group = group[group > now]
            order[group] = group[::-1]
    return order


def run(case: dict[str, Any]) -> dict[str, Any]:
    """How many masks were tried; raises at the first leak."""
    quant, (block_q, block_kv) = case["leaks"], case["block"]
    query, key, value, d_out = inputs()
    step = pulled(quant_of(quant))

    @jax.jit
    def attend(key, value, d_out, kept):
        sizes = {"block_q": block_q, "block_kv": block_kv, "mask": Mask.causal()}
        mask = BlockMask.from_blocks(kept, LENGTH, LENGTH, **sizes)
        return step(query, key, value, d_out, mask)

    count = 0
    for name, mask in builders(query, key, block_q, block_kv).items():
        kept = jnp.broadcast_to(mask.to_blocks(), (1, 2, *mask.grid))
        for now in (70, 300):
            if quant is None:
                later = (jnp.arange(LENGTH) > now)[:, None, None]
                changed = [jnp.where(later, a, x) for a, x in ((100, key), (-77, value))]
            else:
                changed = [x[:, moved(now)] for x in (key, value)]
            past = jnp.where((jnp.arange(LENGTH) <= now)[:, None, None], d_out, 0)
            before, after = attend(key, value, past, kept), attend(*changed, past, kept)
            what = {
                "an output": (before[0] == after[0])[:, : now + 1].all(),
                "a query's gradient": (before[1] == after[1])[:, : now + 1].all(),
                "a later key's gradient": (before[2][:, now + 1 :] == 0).all(),
                "a later value's gradient": (before[3][:, now + 1 :] == 0).all(),
            }
            wrong = [text for text, ok in what.items() if not bool(ok)]
            if wrong:
                raise RuntimeError(f"{name}, tokens after {now} change {', '.join(wrong)}")
            count += 1
    return {"masks": count}


def lower(case: dict[str, Any]) -> dict[str, Any]:
    """Lowers the case's program for an abstract H200."""
    from experiments.benchmarks import gradient

    shape = [1, LENGTH, LENGTH, 2, 1, 128]
    plain = {"shape": shape, "rule": "causal", "block": case["block"], "gradient": case["leaks"]}
    return gradient.lower(plain)
