# SPDX-License-Identifier: Apache-2.0
"""Cutting a cache on Hopper: which slots have the largest scores, and moving them.

XLA would sort twice for the choice. Here a block holds the scores of a head in registers and finds
the smallest kept one bit by bit, each time counting how many are as large: 32 counts for any number
of slots, and the kept slots come out in order. The copy moves whole slots, 16 bytes a thread.

References: R-KV (arXiv 2505.24133), Algorithm 1 (top-k of the joint scores).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels.ops.decode_attention import mosaic_sm90 as decode
from pallas_kernels.ops.decode_attention import mosaic_sm90_codes as codes

THREADS = 128
MOST_SLOTS = 64 * THREADS  # scores of a thread stay in registers
_LANES = 32


def unsupported_reason(scores) -> str | None:
    """Why `largest` does not serve scores of this shape and type, or None."""
    *heads, slots = scores.shape
    if str(scores.dtype) != "float32" or not 0 < slots <= MOST_SLOTS:
        return (
            f"the sm90 selection takes float32 scores of 1 to {MOST_SLOTS} slots; got "
            f"{scores.dtype}, {slots}"
        )
    if len(heads) != 2 or not heads[0] * heads[1]:
        return f"the sm90 selection takes scores [B, K, C]; got {scores.shape}"
    return None


def unsupported_move_reason(arrays) -> str | None:
    """Why `move` does not serve arrays of these shapes and types, or None."""
    for x in arrays:
        size = _slot_bytes(x)
        if size % 4 or not size or (size >= 16 and (size % 16 or THREADS % (size // 16))):
            return f"the sm90 copy moves slots of 4, 8, 16, … 2048 bytes; got {x.dtype} {x.shape}"
        if not x.shape[2] or not x.shape[0] * x.shape[1]:
            return f"the sm90 copy takes arrays with slots; got {x.shape}"
        if x.shape[0] * x.shape[1] > 65535:
            return "the sm90 copy takes up to 65535 rows times key heads"
    return None


def _slot_bytes(x) -> int:
    size = jnp.dtype(x.dtype).itemsize
    for axis in x.shape[3:]:
        size *= axis
    return size


# -- choice ----------------------------------------------------------------------------------------


def largest(scores: jax.Array, count: jax.Array, most: int) -> jax.Array:
    """The slots of the largest scores of every head, in the order of slots.

    Args:
        scores: float32 [B, K, C]; -inf is never chosen, and of equal scores the first are.
        count: int32 [B, K], how many, at most ``most``.
        most: columns of the result.

    Returns:
        int32 [B, K, most], -1 after the last chosen slot.
    """
    batch, heads, slots = scores.shape
    out = {"kept": jax.ShapeDtypeStruct((batch, heads, most), jnp.int32)}
    args = {"scores": scores, "count": count.astype(jnp.int32)}
    body = functools.partial(_choose, slots, most)
    return decode.call(body, out, (batch * heads, 1, 1), args, shared=_SHARED)["kept"]


_SHARED = 16  # words: two sets of four counts, and the warps' sums


def _choose(slots: int, most: int, refs, axes):
    """What a block does: one head. A thread holds neighbouring slots."""
    i32, head = ptx.i32, axes[0]
    tid = ptx.thread()
    each = pl.cdiv(slots, THREADS)
    first = ptx.mul(tid, i32(each))
    home = ptx.mul(head, i32(slots))
    keys = []
    lowest = i32(-(2**31))
    for j in range(each):
        slot = ptx.add(first, i32(j))
        inside = ptx.lt(slot, i32(slots))
        where = ptx.add(home, ptx.imin(slot, i32(slots - 1)))
        x = codes.load(refs["scores"], codes.bytes_at(where, 4), 4, outs="f")[0]
        keys.append(ptx.select(inside, _ordered(x), lowest))
    bar = i32(-(2**31) + 0x7FFFFF)  # of -inf
    able = _block_sum(refs, _count([_above(key, bar) for key in keys]), 1)
    wanted = codes.load(refs["count"], codes.bytes_at(head, 4), 4)[0]
    wanted = ptx.imin(ptx.imin(wanted, i32(most)), able)

    def bit(i, least):
        mask = ptx.shl(i32(1), ptx.sub(i32(31), i))
        trial = ptx.lor(least, mask)
        as_signed = ptx.xor(trial, lowest)
        found = _count([ptx.ge(key, as_signed) for key in keys])
        found = _block_sum(refs, found, ptx.land(i, i32(1)))
        return ptx.select(ptx.ge(found, wanted), trial, least)

    least = ptx.xor(ptx.loop(32, bit, i32(0)), lowest)
    above, equal = [_above(key, least) for key in keys], [ptx.eq(key, least) for key in keys]
    # Both counts in one number.
    own = ptx.add(_count(above), ptx.mul(_count(equal), i32(2**16)))
    before, total = _before(refs, own, tid)
    more = ptx.sub(wanted, ptx.land(total, i32(0xFFFF)))
    base = codes.bytes_at(ptx.mul(head, i32(most)), 4)
    for j in range(each):
        rank = ptx.land(before, i32(0xFFFF))
        ties = ptx.shr(before, i32(16))
        rank = ptx.add(rank, ptx.imin(ties, more))
        kept = ptx.either(above[j], ptx.both(equal[j], ptx.lt(ties, more)))
        kept = ptx.both(kept, ptx.lt(rank, wanted))
        where = ptx.add(base, codes.bytes_at(ptx.select(kept, rank, i32(0)), 4))
        ptx.store(refs["kept"], where, [ptx.add(first, i32(j))], kept)
        step = ptx.add(ptx.flag(above[j]), ptx.mul(ptx.flag(equal[j]), i32(2**16)))
        before = ptx.add(before, step)
    for j in range(pl.cdiv(most, THREADS)):
        place = ptx.add(tid, i32(THREADS * j))
        empty = ptx.both(ptx.ge(place, wanted), ptx.lt(place, i32(most)))
        where = ptx.add(base, codes.bytes_at(ptx.select(empty, place, i32(0)), 4))
        ptx.store(refs["kept"], where, [i32(-1)], empty)


def _ordered(x):
    """The i32 that compares, signed, as the number does in `lax.top_k`: -0 below 0."""
    bits = ptx.bits(x)
    return ptx.select(ptx.lt(bits, ptx.i32(0)), ptx.xor(bits, ptx.i32(2**31 - 1)), bits)


def _above(a, b):
    return ptx.lt(b, a)


def _count(conditions):
    return functools.reduce(ptx.add, [ptx.flag(c) for c in conditions])


def _block_sum(refs, x, buffer):
    """Sum over the block. Calls alternate between two buffers, so that one barrier is enough."""
    for distance in (1, 2, 4, 8, 16):
        x = ptx.add(x, ptx.shuffle_xor(x, distance))
    buffer = ptx.i32(buffer) if isinstance(buffer, int) else buffer
    base = codes.bytes_at(ptx.mul(buffer, ptx.i32(4)), 4)
    warp = ptx.div(ptx.thread(), ptx.i32(_LANES))
    place = ptx.add(base, codes.bytes_at(warp, 4))
    ptx.store(refs["shared"], place, [ptx.from_bits(x)], space="shared")
    codes.barrier()
    four = codes.read_shared(refs["shared"], base, 4)
    return functools.reduce(ptx.add, [ptx.bits(v) for v in four])


def _before(refs, x, tid):
    """Sum over the threads before this one, and over all."""
    i32, lane = ptx.i32, ptx.rem(tid, ptx.i32(_LANES))
    upto = x
    for distance in (1, 2, 4, 8, 16):
        back = ptx.sub(lane, i32(distance))
        other = ptx.bits(codes.from_lane(ptx.from_bits(upto), ptx.imax(back, i32(0))))
        upto = ptx.add(upto, ptx.select(ptx.ge(back, i32(0)), other, i32(0)))
    warp = ptx.div(tid, i32(_LANES))
    place = ptx.add(ptx.i64(4 * 8), codes.bytes_at(warp, 4))
    last = ptx.eq(lane, i32(_LANES - 1))
    ptx.store(refs["shared"], place, [ptx.from_bits(upto)], last, space="shared")
    codes.barrier()
    sums = [ptx.bits(v) for v in codes.read_shared(refs["shared"], ptx.i64(4 * 8), 4)]
    earlier = i32(0)
    for w in range(3):
        earlier = ptx.add(earlier, ptx.select(ptx.lt(i32(w), warp), sums[w], i32(0)))
    return ptx.add(ptx.sub(upto, x), earlier), functools.reduce(ptx.add, sums)


# -- copy ------------------------------------------------------------------------------------------

_AT_ONCE = 64  # slots of a block


def move(arrays: list[jax.Array], source: jax.Array, fills: list[int]) -> list[jax.Array]:
    """Slots of several arrays in a new order, in one launch.

    Args:
        arrays: [B, K, C, ...] each.
        source: int32 [B, K, M], -1 for an empty slot.
        fills: per array what an empty slot holds, 0 or -1; -1 for int32 arrays only.

    Returns:
        Arrays [B, K, M, ...].
    """
    batch, heads, slots = source.shape
    names = [f"new{i}" for i in range(len(arrays))]
    out = {
        name: jax.ShapeDtypeStruct((batch, heads, slots, *x.shape[3:]), x.dtype)
        for name, x in zip(names, arrays, strict=True)
    }
    args = {f"old{i}": x for i, x in enumerate(arrays)} | {"source": source.astype(jnp.int32)}
    plan = [(_slot_bytes(x), x.shape[2], fill) for x, fill in zip(arrays, fills, strict=True)]
    body = functools.partial(_copy, plan, slots)
    made = decode.call(body, out, (pl.cdiv(slots, _AT_ONCE), batch * heads, 1), args)
    return [made[name] for name in names]


def _copy(plan, slots: int, refs, axes):
    """What a block does: 64 slots of a head in all arrays."""
    i32 = ptx.i32
    block, head, _ = axes
    tid = ptx.thread()
    for number, (size, capacity, fill) in enumerate(plan):
        width = min(size, 16)
        lanes = size // width
        lane, row = ptx.rem(tid, i32(lanes)), ptx.div(tid, i32(lanes))
        rows = min(THREADS // lanes, _AT_ONCE)
        pieces = []
        for start in range(0, _AT_ONCE, rows):
            local = ptx.add(row, i32(start))
            slot = ptx.add(ptx.mul(block, i32(_AT_ONCE)), local)
            inside = ptx.both(ptx.lt(slot, i32(slots)), ptx.lt(row, i32(rows)))
            place = ptx.add(ptx.mul(head, i32(slots)), ptx.imin(slot, i32(slots - 1)))
            source = codes.load(refs["source"], codes.bytes_at(place, 4), 4)[0]
            old = ptx.imin(ptx.imax(source, i32(0)), i32(capacity - 1))
            old = ptx.add(ptx.mul(head, i32(capacity)), old)
            offset = ptx.add(codes.bytes_at(old, size), codes.bytes_at(lane, width))
            words = codes.load(refs[f"old{number}"], offset, width)
            empty = ptx.lt(source, i32(0))
            words = [ptx.select(empty, i32(fill), word) for word in words]
            where = ptx.add(codes.bytes_at(place, size), codes.bytes_at(lane, width))
            pieces.append((where, words, inside))
        for where, words, inside in pieces:  # after all loads are on their way
            ptx.store(refs[f"new{number}"], where, words, inside)
