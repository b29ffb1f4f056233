# SPDX-License-Identifier: Apache-2.0
"""Appending to a cache on Hopper: tokens are smoothed, quantised and written in place.

One launch takes the new keys and values, and writes codes, scales, zero points and positions where
they belong; the cache is an operand that the kernel changes, so nothing else of it is touched. Four
channels of a vector lie in a thread, and a vector in 8 to 32 neighbouring threads, which find its
scale by exchanging registers. The arithmetic is that of `pallas_kernels.quantize`, bit for bit.

References: KIVI (arXiv 2402.02750), section 3; SageAttention (arXiv 2410.02367), section 4.2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention import mosaic_sm90 as decode
from pallas_kernels.ops.decode_attention import mosaic_sm90_codes as codes
from pallas_kernels.ops.decode_attention.spec import has_plain_scales

HEAD_DIMS = (32, 64, 128)
THREADS = 128
_EACH = 4  # channels of a thread
_LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0}
_SMALLEST = float(np.finfo(np.float32).tiny)  # a scale
_FLOATS = ("float32", "bfloat16", "float16")


def unsupported_reason(store, new) -> str | None:
    """Why the kernel does not append to a store of these shapes and types, or None."""
    kind = _kind(store)
    if store.shape[-1] not in HEAD_DIMS:
        return f"the sm90 append kernel serves head_dim 32, 64 and 128; got {store.shape[-1]}"
    if str(new.dtype) not in _FLOATS:
        return f"the sm90 append kernel takes 16- and 32-bit tokens; got {new.dtype}"
    if kind not in (*_FLOATS, *_LARGEST, "int4"):
        return f"the sm90 append kernel writes 16- and 32-bit floats, int8, fp8_e4m3, int4; {kind}"
    if isinstance(store, QTensor) and not has_plain_scales(store):
        return "the sm90 append kernel writes one float32 scale per slot, and packed 4-bit codes"
    if kind == "int4" and store.zero_point is None:
        return "the sm90 append kernel writes int4 with zero points"
    if kind != "int4" and isinstance(store, QTensor) and store.zero_point is not None:
        return f"the sm90 append kernel writes {kind} without zero points"
    if not (new.size and store.shape[2]):
        return "the sm90 append kernel takes one token or more, and a store with slots"
    return None


def _kind(store) -> str:
    return store.qtype if isinstance(store, QTensor) else str(store.dtype)


def append(key, value, positions, new_key, new_value, new_positions, slots, offset):
    """Writes new tokens at their slots.

    Args:
        key: [B, K, C, H], an array or a QTensor; value alike.
        value: store.
        positions: int32 [B, K, C], or None.
        new_key: floating [B, K, T, H]; new_value alike, of the same dtype.
        new_value: tokens.
        new_positions: int32 [B, T], or None.
        slots: int32 [B, K, T]; C or more writes nothing.
        offset: float32 [B, K, 1, H], taken from the keys; or None.

    Returns:
        Key, value and positions with the tokens written.
    """
    batch, heads, tokens, head_dim = new_key.shape
    stores, trees = {}, {}
    for name, store in (("k", key), ("v", value)):
        leaves, trees[name] = jax.tree.flatten(store)
        stores |= {f"{name}{i}": x for i, x in enumerate(leaves)}
    args = {"new_k": new_key, "new_v": new_value, "slots": slots.astype(jnp.int32)}
    if offset is not None:
        args["offset"] = offset.astype(jnp.float32)
    if positions is not None:
        stores["positions"] = positions
        args["new_positions"] = new_positions.astype(jnp.int32)
    sizes = (batch, heads, tokens, head_dim, key.shape[2])
    parts = {name: _parts(store, name) for name, store in (("k", key), ("v", value))}
    body = functools.partial(_append, sizes, _kind(key), str(new_key.dtype), parts)
    blocks = pl.cdiv(batch * heads * tokens * head_dim // _EACH, THREADS)
    done = decode.call(body, {}, (blocks, 1, 1), args, inplace=stores)
    rebuilt = [
        jax.tree.unflatten(tree, [done[f"{name}{i}"] for i in range(tree.num_leaves)])
        for name, tree in trees.items()
    ]
    return (*rebuilt, done.get("positions"))


def _parts(store, name: str) -> dict[str, str]:
    """Names of the arrays of a store: codes, scale, zero."""
    if not isinstance(store, QTensor):
        return {"codes": f"{name}0"}
    leaves = jax.tree.leaves(store)
    wanted = {"codes": store.qvalue, "scale": store.scale, "zero": store.zero_point}
    return {
        what: f"{name}{next(i for i, x in enumerate(leaves) if x is array)}"
        for what, array in wanted.items()
        if array is not None
    }


def _append(sizes, kind: str, dtype: str, parts, refs, axes):
    """What a block does: as many vectors as its threads hold."""
    batch, heads, tokens, head_dim, capacity = sizes
    i32, lanes = ptx.i32, head_dim // _EACH
    tid = ptx.thread()
    lane = ptx.rem(tid, i32(lanes))
    number = ptx.add(ptx.mul(axes[0], i32(THREADS // lanes)), ptx.div(tid, i32(lanes)))
    exists = ptx.lt(number, i32(batch * heads * tokens))
    number = ptx.imin(number, i32(batch * heads * tokens - 1))
    head, token = ptx.div(number, i32(tokens)), ptx.rem(number, i32(tokens))
    slot = codes.load(refs["slots"], codes.bytes_at(number, 4), 4)[0]
    inside = ptx.both(ptx.ge(slot, i32(0)), ptx.lt(slot, i32(capacity)))
    inside = ptx.both(exists, inside)
    slot = ptx.imin(ptx.imax(slot, i32(0)), i32(capacity - 1))
    place = ptx.add(ptx.mul(head, i32(capacity)), slot)
    first = ptx.both(inside, ptx.eq(lane, i32(0)))
    channel = ptx.mul(lane, i32(_EACH))
    for name in ("k", "v"):
        x = _four(refs[f"new_{name}"], number, channel, head_dim, dtype)
        if name == "k" and "offset" in refs:
            offset = _four(refs["offset"], head, channel, head_dim, "float32")
            x = [ptx.fsub(*pair) for pair in zip(x, offset, strict=True)]
        words, facts = _encoded(kind, x, lanes, lane)
        width = {"int4": _EACH // 2, "int8": _EACH, "fp8_e4m3": _EACH}.get(kind)
        width = width or _EACH * jnp.dtype(kind).itemsize
        where = ptx.add(codes.bytes_at(place, lanes * width), codes.bytes_at(lane, width))
        mine = inside
        if kind == "int4":  # the even thread has the word of both
            mine = ptx.both(inside, ptx.eq(ptx.rem(lane, i32(2)), i32(0)))
            where = ptx.select(mine, where, ptx.i64(0))
        ptx.store(refs[parts[name]["codes"]], where, words, mine)
        for what, number_of_vector in facts.items():
            ref = refs[parts[name][what]]
            ptx.store(ref, codes.bytes_at(place, 4), [number_of_vector], first)
    if "positions" in refs:
        row = ptx.add(ptx.mul(ptx.div(head, i32(heads)), i32(tokens)), token)
        position = codes.load(refs["new_positions"], codes.bytes_at(row, 4), 4)[0]
        ptx.store(refs["positions"], codes.bytes_at(place, 4), [position], first)


def _four(ref, vector, channel, head_dim: int, dtype: str):
    """Four channels of a vector as float32."""
    size = jnp.dtype(dtype).itemsize
    index = ptx.add(ptx.mul(vector, ptx.i32(head_dim)), channel)
    where = codes.bytes_at(index, size)
    if size == 4:
        return codes.load(ref, where, 16, outs="ffff")
    words = codes.load(ref, where, 8)
    return [x for word in words for x in codes.halves(word, dtype)]


def _encoded(kind: str, x, lanes: int, lane):
    """Words of codes, and the scale and zero point of the vector by name."""
    if kind == "float32":
        return x, {}
    if kind in _FLOATS:
        return [ptx.half_x2(x[i : i + 2], kind) for i in (0, 2)], {}
    if kind == "int4":
        return _int4(x, lanes, lane)
    top = _over_vector(ptx.fmax, [ptx.fabs(value) for value in x], lanes)
    scale = ptx.fmax(ptx.fdiv(top, ptx.f32(_LARGEST[kind])), ptx.f32(_SMALLEST))
    scale = ptx.select(ptx.feq(top, ptx.f32(0.0)), ptx.f32(1.0), scale)
    scale, x = _finite(top, scale, x)
    x = [ptx.fdiv(value, scale) for value in x]
    word = ptx.e4m3x4(x) if kind == "fp8_e4m3" else _int8x4(x)
    return [word], {"scale": _or_nan(top, scale)}


def _int4(x, lanes: int, lane):
    """Codes such that the least and the largest channel are codes exactly."""
    f32 = ptx.f32
    low, high = _over_vector(ptx.fmin, x, lanes), _over_vector(ptx.fmax, x, lanes)
    spread = ptx.fsub(ptx.fmul(high, f32(0.5)), ptx.fmul(low, f32(0.5)))
    scale = ptx.fdiv(spread, f32(7.5))
    alone = ptx.select(ptx.feq(low, f32(0.0)), f32(1.0), ptx.fabs(low))
    scale = ptx.select(ptx.feq(spread, f32(0.0)), alone, scale)
    scale = ptx.fmax(scale, f32(_SMALLEST))
    scale, x = _finite(spread, scale, x)
    known = ptx.feq(ptx.fsub(spread, spread), f32(0.0))
    low = ptx.select(known, low, f32(0.0))
    zero = ptx.select(known, ptx.fsub(f32(-8.0), ptx.fdiv(low, scale)), f32(0.0))
    units = [ptx.fadd(ptx.fdiv(ptx.fsub(v, low), scale), f32(-8.0)) for v in x]
    units = [ptx.select(known, v, f32(0.0)) for v in units]
    whole = [ptx.asm("cvt.rni.s32.f32 $0, $1;", "r", [v])[0] for v in units]
    half = ptx.i32(0)
    for i, number in enumerate(whole):
        code = ptx.imin(ptx.imax(number, ptx.i32(-8)), ptx.i32(7))
        half = ptx.lor(half, ptx.shl(ptx.land(code, ptx.i32(15)), ptx.i32(4 * i)))
    other = ptx.shuffle_xor(half, 1)
    word = ptx.lor(half, ptx.shl(other, ptx.i32(16)))
    return [word], {"scale": _or_nan(spread, scale), "zero": zero}


def _over_vector(combine, values, lanes: int):
    x = functools.reduce(combine, values)
    distance = 1
    while distance < lanes:
        x, distance = combine(x, ptx.shuffle_xor(x, distance)), 2 * distance
    return x


def _finite(size, scale, x):
    """Scale and channels, or 1 and zeros where a channel is not finite."""
    known = ptx.feq(ptx.fsub(size, size), ptx.f32(0.0))
    one, zero = ptx.f32(1.0), ptx.f32(0.0)
    return ptx.select(known, scale, one), [ptx.select(known, value, zero) for value in x]


def _or_nan(size, scale):
    """A scale that says whether a channel was not finite."""
    known = ptx.feq(ptx.fsub(size, size), ptx.f32(0.0))
    return ptx.select(known, scale, ptx.f32(float("nan")))


def _int8x4(x):
    text = (
        "{ .reg .s32 a, b, c, d; .reg .b32 t;\n"
        "cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2;\n"
        "cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;\n"
        "cvt.pack.sat.s8.s32.b32 t, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, t; }"
    )
    return ptx.asm(text, "r", x)[0]
