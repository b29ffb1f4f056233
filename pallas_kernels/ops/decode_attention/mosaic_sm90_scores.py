# SPDX-License-Identifier: Apache-2.0
"""Scores of cached slots on Hopper: KVzip's largest softmax weight, and R-KV's similar keys.

A weight is ``exp(scale q_i·k_j - lse_i)``, so its maximum over queries is the exponential of a
maximum: no exponential and no sum per pair, and no logits in memory. A warp keeps 32 keys in
registers as operand A of ``mma.sync`` m16n8k16, widened once if they are stored as codes, and
walks over the query rows, eight at a time, which its neighbours read from the same L1. R-KV's
search for the last similar key is the same walk over the keys themselves.

References: KVzip (arXiv 2505.23416), equation 2; R-KV (arXiv 2505.24133), section 3.3; PTX ISA 8.4,
section 9.7.14.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention import mosaic_sm90 as decode
from pallas_kernels.ops.decode_attention import mosaic_sm90_codes as codes
from pallas_kernels.ops.decode_attention.mosaic_sm90_codes import STORES
from pallas_kernels.ops.decode_attention.mosaic_sm90_plan import HEAD_DIMS, LOG2E, WARPS
from pallas_kernels.ops.decode_attention.spec import has_plain_scales

KEYS = 32  # of a warp
ROWS = 8  # query rows of a step


def unsupported_reason(query, key) -> str | None:
    """Why the kernel does not serve arrays of these shapes and types, or None."""
    store = key.qtype if isinstance(key, QTensor) else str(key.dtype)
    if query.shape[-1] not in HEAD_DIMS:
        return f"the sm90 score kernel serves head_dim 64 and 128; got {query.shape[-1]}"
    if str(query.dtype) not in ("bfloat16", "float16"):
        return f"the sm90 score kernel takes bfloat16 and float16 queries; got {query.dtype}"
    if store not in STORES or (STORES[store].bits == 16 and store != str(query.dtype)):
        return (
            f"the sm90 score kernel takes keys of the query's dtype or stored as int8, fp8 or int4;"
            f" got {store} for {query.dtype}"
        )
    if isinstance(key, QTensor) and not has_plain_scales(key):
        return "the sm90 score kernel takes one float32 scale per slot, and packed 4-bit codes"
    if key.shape[0] * key.shape[1] > 65535 or not key.shape[2] or not query.shape[1]:
        return "the sm90 score kernel takes up to 65535 rows times key heads, and none of no size"
    return None


def unsupported_similar_reason(key) -> str | None:
    """The same for `last_similar`."""
    store = key.qtype if isinstance(key, QTensor) else str(key.dtype)
    if key.shape[-1] not in HEAD_DIMS:
        return f"the sm90 similarity kernel serves head_dim 64 and 128; got {key.shape[-1]}"
    if store not in STORES:
        return f"the sm90 similarity kernel takes 16-bit keys, int8, fp8 or int4; got {store}"
    if isinstance(key, QTensor) and (not has_plain_scales(key) or key.zero_point is not None):
        return "the sm90 similarity kernel takes one scale per slot and no zero points"
    if key.shape[0] * key.shape[1] > 65535 or not key.shape[2]:
        return "the sm90 similarity kernel takes up to 65535 rows times key heads, and some slots"
    return None


def max_weights(query, key, lse, real, scale: float, *, splits: int | None = None) -> jax.Array:
    """The largest weight of every slot, over the rows that are real.

    Args:
        query: bfloat16 or float16 [B, A, N, H].
        key: [B, K, C, H], of the same dtype or a QTensor with scales per slot.
        lse: float32 [B, A, N].
        real: bool [B, A].
        scale: factor on the logits.
        splits: parts of the rows that blocks of their own take; None chooses.

    Returns:
        float32 [B, K, C]; dead slots have no meaning.
    """
    batch, steps, num_heads, _ = query.shape
    _, heads, slots, _ = key.shape
    rows = steps * (num_heads // heads)
    tiles = pl.cdiv(slots, WARPS * KEYS)
    if splits is None:
        splits = max(1, min(pl.cdiv(792, tiles * batch * heads), rows // 64))
    store = key.qtype if isinstance(key, QTensor) else str(key.dtype)
    seen = real[..., None] & jnp.isfinite(lse)
    args = {"query": query, "minus": jnp.where(seen, -LOG2E * lse, -jnp.inf)}
    args["k"] = key.qvalue if isinstance(key, QTensor) else key
    if isinstance(key, QTensor):
        args["k_scale"] = key.scale
        if key.zero_point is not None:
            args["k_zero"] = key.zero_point
    body = functools.partial(
        _scores, (query.shape, heads, slots, splits), store, str(query.dtype), scale * LOG2E
    )
    out = {"best": jax.ShapeDtypeStruct((splits, batch, heads, slots), jnp.float32)}
    best = decode.call(body, out, (tiles, splits, batch * heads), args)["best"]
    return jnp.exp2(jnp.max(best, axis=0))


def _scores(sizes, store: str, half: str, factor: float, refs, axes):
    """What a block does: 128 keys against a part of the query rows of their head."""
    (_, steps, num_heads, head_dim), heads, slots, splits = sizes
    i32, groups = ptx.i32, num_heads // heads
    tile, split, head = axes
    batch, kv_head = ptx.div(head, i32(heads)), ptx.rem(head, i32(heads))
    tid = ptx.thread()
    lane = ptx.rem(tid, i32(32))
    g, c = ptx.div(lane, i32(4)), ptx.rem(lane, i32(4))
    first = ptx.add(ptx.mul(tile, i32(WARPS * KEYS)), ptx.mul(ptx.div(tid, i32(32)), i32(KEYS)))
    tokens = [ptx.add(first, ptx.add(g, i32(8 * t))) for t in range(KEYS // 8)]
    home = ptx.mul(head, i32(slots))
    at = [ptx.add(home, ptx.imin(token, i32(slots - 1))) for token in tokens]
    words = [_key(refs, store, half, head_dim, row, c) for row in at]
    factors = [_fact(refs, "k_scale", row, factor) for row in at]
    zeros = [_fact(refs, "k_zero", row, None) for row in at] if "k_zero" in refs else None

    rows = steps * groups
    share = pl.cdiv(pl.cdiv(rows, splits), ROWS) * ROWS
    begin = ptx.mul(split, i32(share))
    end = ptx.imin(ptx.add(begin, i32(share)), i32(rows))

    def index(row):
        """Index of a query row in [B, A, N]; beyond the end the last one."""
        row = ptx.imax(ptx.imin(row, ptx.sub(end, i32(1))), i32(0))
        step = ptx.add(ptx.mul(batch, i32(steps)), ptx.div(row, i32(groups)))
        name = ptx.add(ptx.mul(kv_head, i32(groups)), ptx.rem(row, i32(groups)))
        return ptx.add(ptx.mul(step, i32(num_heads)), name)

    def load(i):
        start = ptx.add(begin, ptx.mul(i, i32(ROWS)))
        row = codes.bytes_at(index(ptx.add(start, g)), 2 * head_dim)
        row = ptx.add(row, codes.bytes_at(c, 16))
        query = [
            word
            for piece in range(head_dim // 32)
            for word in codes.load(refs["query"], ptx.add(row, ptx.i64(64 * piece)), 16)
        ]
        minus = []
        for d in range(2):
            mine = ptx.add(start, ptx.add(ptx.mul(c, i32(2)), i32(d)))
            value = codes.load(refs["minus"], codes.bytes_at(index(mine), 4), 4, outs="f")[0]
            minus.append(ptx.select(ptx.lt(mine, end), value, ptx.f32(-math.inf)))
        return {"query": query, "minus": minus}

    def step(i, state):
        query, minus, best = state["query"], state["minus"], list(state["best"])
        sums = [_row_sums(query, half, c)] if zeros else []
        accs = [[ptx.f32(0.0)] * 4 for _ in range(KEYS // 16)]
        for s in range(head_dim // 16):
            for t, acc in enumerate(accs):
                low, high = words[2 * t], words[2 * t + 1]
                a = [low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]]
                accs[t] = codes.mma(acc, a, query[2 * s : 2 * s + 2], half)
        new = load(ptx.add(i, i32(1)))
        for t, acc in enumerate(accs):
            for n, x in enumerate(acc):
                token, d = 2 * t + n // 2, n % 2
                if zeros:
                    x = ptx.fsub(x, ptx.fmul(zeros[token], sums[0][d]))
                best[token] = ptx.fmax(best[token], ptx.fma(x, factors[token], minus[d]))
        return new | {"best": best}

    lowest = [ptx.f32(-math.inf)] * len(tokens)
    count = ptx.imax(ptx.sub(end, begin), i32(0))
    count = ptx.div(ptx.add(count, i32(ROWS - 1)), i32(ROWS))
    best = ptx.loop(count, step, load(i32(0)) | {"best": lowest})["best"]
    base = ptx.mul(ptx.add(ptx.mul(split, i32(sizes[0][0] * heads)), head), i32(slots))
    for token, x in zip(tokens, best, strict=True):
        for distance in (1, 2):
            x = ptx.fmax(x, ptx.shuffle_xor(x, distance))
        mine = ptx.both(ptx.lt(token, i32(slots)), ptx.eq(c, i32(0)))
        ptx.store(refs["best"], codes.bytes_at(ptx.add(base, token), 4), [x], mine)


def last_similar(key, inverse, threshold: float) -> tuple[jax.Array, jax.Array]:
    """For every slot the last other slot whose key has a cosine above the threshold.

    Args:
        key: [B, K, C, H], bfloat16 or float16, or a QTensor without zero points.
        inverse: float32 [B, K, C], one over the length of the stored numbers; 0 on dead slots.
        threshold: in [0, 1).

    Returns:
        int32 [B, K, C], -1 where there is none, and float32 [B, K, C], the cosine, 0 where none.
    """
    batch, heads, slots, _ = key.shape
    store = key.qtype if isinstance(key, QTensor) else str(key.dtype)
    args = {"k": key.qvalue if isinstance(key, QTensor) else key, "inverse": inverse}
    out = {
        "last": jax.ShapeDtypeStruct((batch, heads, slots), jnp.int32),
        "cosine": jax.ShapeDtypeStruct((batch, heads, slots), jnp.float32),
    }
    half = store if STORES[store].bits == 16 else "bfloat16"
    body = functools.partial(_similar, key.shape, store, half, threshold)
    found = decode.call(body, out, (pl.cdiv(slots, WARPS * KEYS), 1, batch * heads), args)
    return found["last"], found["cosine"]


def _similar(sizes, store: str, half: str, threshold: float, refs, axes):
    """What a block does: 128 keys against all keys of their head, in order."""
    _, _, slots, head_dim = sizes
    i32 = ptx.i32
    tile, _, head = axes
    tid = ptx.thread()
    lane = ptx.rem(tid, i32(32))
    g, c = ptx.div(lane, i32(4)), ptx.rem(lane, i32(4))
    first = ptx.add(ptx.mul(tile, i32(WARPS * KEYS)), ptx.mul(ptx.div(tid, i32(32)), i32(KEYS)))
    tokens = [ptx.add(first, ptx.add(g, i32(8 * t))) for t in range(KEYS // 8)]
    home = ptx.mul(head, i32(slots))

    def index(slot):
        return ptx.add(home, ptx.imin(slot, i32(slots - 1)))

    words = [_key(refs, store, half, head_dim, index(token), c) for token in tokens]
    mine = [_fact(refs, "inverse", index(token), 1.0) for token in tokens]
    # The least number above the threshold: `x >= bar` then says `x > threshold`.
    bar = ptx.f32(float(np.nextafter(np.float32(threshold), np.float32(1.0))))

    def load(i):
        start = ptx.mul(i, i32(ROWS))
        column = _key(refs, store, half, head_dim, index(ptx.add(start, g)), c)
        scales = []
        for d in range(2):
            other = ptx.add(start, ptx.add(ptx.mul(c, i32(2)), i32(d)))
            value = _fact(refs, "inverse", index(other), 1.0)
            scales.append(ptx.select(ptx.lt(other, i32(slots)), value, ptx.f32(0.0)))
        return {"column": column, "scales": scales}

    def step(i, state):
        column, scales = state["column"], state["scales"]
        last, cosine = list(state["last"]), list(state["cosine"])
        accs = [[ptx.f32(0.0)] * 4 for _ in range(KEYS // 16)]
        for s in range(head_dim // 16):
            for t, acc in enumerate(accs):
                low, high = words[2 * t], words[2 * t + 1]
                a = [low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]]
                accs[t] = codes.mma(acc, a, column[2 * s : 2 * s + 2], half)
        new = load(ptx.add(i, i32(1)))
        begin = ptx.add(ptx.mul(i, i32(ROWS)), ptx.mul(c, i32(2)))
        others = [ptx.add(begin, i32(d)) for d in range(2)]
        for t, acc in enumerate(accs):
            for n, x in enumerate(acc):
                token, d = 2 * t + n // 2, n % 2
                x = ptx.fmul(ptx.fmul(x, scales[d]), mine[token])
                # A slot is not similar to itself; and NaN, of dead slots, equals nothing.
                x = ptx.select(ptx.eq(others[d], tokens[token]), ptx.f32(0.0), x)
                above = ptx.feq(ptx.fmax(x, bar), x)
                last[token] = ptx.select(above, others[d], last[token])
                cosine[token] = ptx.select(above, x, cosine[token])
        return new | {"last": last, "cosine": cosine}

    nothing = {"last": [i32(-1)] * len(tokens), "cosine": [ptx.f32(0.0)] * len(tokens)}
    state = ptx.loop(i32(pl.cdiv(slots, ROWS)), step, load(i32(0)) | nothing)
    for token, last, cosine in zip(tokens, state["last"], state["cosine"], strict=True):
        for distance in (1, 2):
            other, its = ptx.shuffle_xor(last, distance), ptx.shuffle_xor(cosine, distance)
            later = ptx.lt(last, other)
            last, cosine = ptx.select(later, other, last), ptx.select(later, its, cosine)
        ok = ptx.both(ptx.lt(token, i32(slots)), ptx.eq(c, i32(0)))
        where = codes.bytes_at(ptx.add(home, token), 4)
        ptx.store(refs["last"], where, [last], ok)
        ptx.store(refs["cosine"], where, [cosine], ok)


def _key(refs, store: str, half: str, head_dim: int, row, c):
    """A quarter of a key's channels, 8 of every 32, as words of two numbers of type ``half``."""
    bits = STORES[store].bits
    offset = ptx.add(codes.bytes_at(row, head_dim * bits // 8), codes.bytes_at(c, bits))
    words = []
    for piece in range(head_dim // 32):
        where = ptx.add(offset, ptx.i64(4 * bits * piece))
        pairs = codes.key_pairs(store, codes.load(refs["k"], where, bits))
        if bits == 4:  # channels 0 2, 4 6, 1 3, 5 7
            pairs = [
                codes.permute(pairs[i], pairs[i + 2], selector)
                for i in range(2)
                for selector in (0x5410, 0x7632)
            ]
        if bits < 16 and half == "bfloat16":  # codes of up to eight bits are exact
            pairs = [ptx.half_x2(codes.halves(pair, "float16"), half) for pair in pairs]
        words += pairs
    return words


def _fact(refs, name: str, row, factor: float | None):
    """A slot's number times a factor; the factor where slots have none."""
    if name not in refs:
        return ptx.f32(factor)
    value = codes.load(refs[name], codes.bytes_at(row, 4), 4, outs="f")[0]
    return value if factor is None else ptx.fmul(value, ptx.f32(factor))


def _row_sums(query, half: str, c):
    """Sums over the channels of the two query rows whose products this thread holds."""
    total = functools.reduce(ptx.fadd, [x for word in query for x in codes.halves(word, half)])
    for distance in (1, 2):
        total = ptx.fadd(total, ptx.shuffle_xor(total, distance))
    lane = ptx.mul(c, ptx.i32(8))
    return [codes.from_lane(total, ptx.add(lane, ptx.i32(4 * d))) for d in range(2)]
