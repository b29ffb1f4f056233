# SPDX-License-Identifier: Apache-2.0
"""Gradient of attention on Hopper from the saved log-sum-exp.

Two kernels of one shape. A block owns 64 rows of one side for each of its compute warpgroups, and a
memory warpgroup streams tiles of the other side past them::

    P = exp(scale Q K^T - lse)    dS = P (dO V^T - delta)    delta = sum(dO O) - d lse
    dQ = scale dS K               dK = scale dS^T Q          dV = P^T dO

The kernel of queries adds dQ up, the kernel of keys walks over all query heads of its key head and
adds dK and dV up, so that nothing is added in memory and repeated runs agree to the bit. The price
is that Q K^T and dO V^T are made twice: seven products, where atomic additions would need five. The
kernel of keys computes the transposes, whose P and dS are then operands as they lie in registers.

What is done with one tile is a class of its own: `Half` here, in 16 bits; in
``mosaic_sm90_backward_int8`` with the INT8 products of SageBwd. The tiles that a block visits
follow from bounds on ``key - query``, or come as lists made of a `BlockMask`. A list names tiles of
the kernel's own size, first those that need no mask, and which of their quarters of 64 x 64 count.

References: FlashAttention-2 (arXiv 2307.08691), section 3.1.2; FlashAttention-3 (arXiv 2407.08608),
appendix B.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels.masks import EMPTY, FULL, BlockMask
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.attention.mosaic_sm90_kernel import (
    _SCALAR,
    _inline,
    _k_major,
    _mn_major,
    _opaque,
    _shape,
    _swizzle,
    _transforms,
    _wait,
    _wgmma,
)
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config, Plan, div
from pallas_kernels.ops.attention.mosaic_sm90_tile import LOG2E, ROWS, Position, Variant

HEAD_DIMS = (64, 128)
PAD = 128  # numbers per query are padded to this: whole tiles of two warpgroups
# By the side that is owned; "block_kv" rows are streamed at a time.
CONFIGS = {
    "q": Config(block_kv=128, num_stages=2, qk_split=1, schedule="none"),
    "kv": Config(block_kv=64, num_stages=4, qk_split=1, schedule="ahead"),
}
_ACC = plgpu.Layout.WGMMA
_ROW = _ACC.reduce(1)
_SIDE = {"q": _ROW, "kv": _ACC.reduce(0)}  # of numbers per query


def gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    min_diff: int | None = None,
    max_diff: int | None = None,
    blocks: BlockMask | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ, dK and dV of attention in which query t sees ``min_diff <= s - t <= max_diff``.

    Args:
        query: bfloat16 or float16 [B, T, N, H], H one of `HEAD_DIMS`.
        key: [B, S, K, H].
        value: [B, S, K, H].
        d_out: like the query.
        lse: natural log-sum-exp, float32 [B, N, T], -inf for rows with nothing to attend.
        delta: ``sum(d_out * out) - d_lse``, float32 [B, N, T].
        scale: factor on the logits.
        min_diff: lower bound, or None.
        max_diff: upper bound, or None.
        blocks: tiles to visit, with block_q and block_kv multiples of 64, or None for all; its
            token rule is not looked at, the bounds are.

    Returns:
        Arrays like query, key and value.
    """
    # Rows without keys, and those beyond the end, get P = exp(-inf) = 0.
    pad = ((0, 0), (0, 0), (0, -query.shape[1] % PAD))
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse) * LOG2E
    arrays = {"q": whole(query), "k": whole(key), "v": whole(value), "d_out": whole(d_out)}
    arrays |= {"lse": jnp.pad(lse, pad, constant_values=jnp.inf), "delta": jnp.pad(delta, pad)}
    arrays |= {"minus_lse": -arrays["lse"], "minus_delta": -arrays["delta"]}
    variant = Variant("half", "half", str(query.dtype))
    sizes = query.shape, key.shape, min_diff, max_diff
    make = lambda side, plan: STEPS[side](side, plan, scale)  # noqa: E731
    return both_sides(make, CONFIGS, variant, sizes, arrays, blocks)


def both_sides(make, configs, variant: Variant, sizes, arrays, blocks) -> tuple[jax.Array, ...]:
    """The kernels of queries and of keys, one after the other.

    Args:
        make: steps of a kernel, a function of its side and its plan.
        configs: by side.
        variant: formats.
        sizes: shapes of query and key, then the bounds; as `plan_of` takes them.
        arrays: by name, of which each kernel reads those that its steps name.
        blocks: tiles to visit, or None for all.

    Returns:
        dQ, dK and dV.
    """
    results = []
    for side, config in configs.items():
        if blocks is not None:  # a warpgroup with few tiles would wait for its turn at each
            config = dataclasses.replace(config, schedule="none")
        steps = make(side, plan_of(side, variant, *sizes, config))
        own = {name: arrays[name] for name in steps.names if name in arrays}
        results += launch(steps, own, blocks)
    return tuple(results)


def whole(x: jax.Array) -> jax.Array:
    """Tokens rounded up to 8, the height of the tiles in which they are copied."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x


def plan_of(side: str, variant: Variant, query, key, min_diff, max_diff, config: Config) -> Plan:
    """The plan of one kernel, in which "rows" are those of the owner.

    Args:
        side: "q" owns queries and streams keys, "kv" owns keys and streams queries.
        variant: formats.
        query: shape [B, T, N, H].
        key: shape [B, S, K, H].
        min_diff: lower bound of ``key - query``, or None.
        max_diff: upper bound, or None.
        config: warpgroups, tiles and registers.
    """
    (batch, q_len, num_heads, head_dim), (_, kv_len, num_kv_heads, _) = query, key
    rows, columns, heads, bounds = q_len, kv_len, num_heads, (min_diff, max_diff)
    if side == "kv":
        rows, columns, heads = kv_len, q_len, num_kv_heads
        bounds = tuple(None if x is None else -x for x in (max_diff, min_diff))
    bounded = tuple(x is not None for x in bounds)
    return Plan(
        config, variant, batch, rows, columns, heads, num_kv_heads, head_dim, config.block_kv,
        *bounds, bounded,
    )  # fmt: skip


# -- lists -----------------------------------------------------------------------------------------


def tile_lists(
    blocks: BlockMask, side: str, plan: Plan, groups: int, latest_first: bool = False
) -> dict[str, jax.Array]:
    """The tiles of one kernel that a block mask wants, and the order of the owner's rows.

    Args:
        blocks: tiles of multiples of 64 on both sides.
        side: "q" or "kv".
        plan: sizes.
        groups: query heads of a key head.
        latest_first: tiles with and without a mask come in descending order each.

    Returns:
        "list" int32 [B or 1, N or 1, owner's tiles, streamed tiles]: 64 times a tile's number, plus
        1 << (2 w + c) where rows of warpgroup w want its c-th 64 columns; tiles without a mask come
        first. "ranges" int32 [B or 1, N or 1, owner's tiles, 2]: how many need no mask, and how
        many there are. "order" int32 [B x heads x owner's tiles]: the longest walks come first.
    """
    status = blocks.to_status().repeat(blocks.block_q // ROWS, 2).repeat(blocks.block_kv // ROWS, 3)
    status = status if side == "q" else status.swapaxes(2, 3)
    halves, tiles = plan.config.block_kv // ROWS, pl.cdiv(plan.kv_len, plan.config.block_kv)
    compute = plan.config.num_compute
    grid = (compute * plan.q_tiles, halves * tiles)
    status = status[:, :, : grid[0], : grid[1]]
    missing = [(0, want - have) for want, have in zip(grid, status.shape[2:], strict=True)]
    # What lies beyond the end is masked or has no effect.
    status = jnp.pad(status, ((0, 0), (0, 0), *missing), constant_values=EMPTY)
    quarters = status.reshape(*status.shape[:2], plan.q_tiles, compute, tiles, halves)
    quarters = quarters.swapaxes(3, 4)  # [.., owner's tiles, tiles, compute, halves]
    weight = jnp.left_shift(1, 2 * jnp.arange(compute)[:, None] + jnp.arange(halves))
    bits = ((quarters != EMPTY) * weight).sum((4, 5))
    number = jnp.arange(tiles)
    whole = (quarters == FULL).all((4, 5)) & ((number + 1) * plan.config.block_kv <= plan.kv_len)
    rank = jnp.where(whole, 0, jnp.where(bits > 0, 1, 2))
    order = jnp.argsort(rank * tiles + (tiles - 1 - number if latest_first else number), axis=-1)
    listed = jnp.take_along_axis(number * 64 + bits, order, axis=-1)
    ranges = jnp.stack([whole.sum(-1), (bits > 0).sum(-1)], -1).astype(jnp.int32)
    count = jnp.broadcast_to(ranges[..., 1], (plan.batch, plan.num_heads * groups, plan.q_tiles))
    count = count.reshape(plan.batch, plan.num_heads, groups, plan.q_tiles).sum(2)
    longest = jnp.argsort(-count.ravel(), stable=True).astype(jnp.int32)
    return {"list": listed.astype(jnp.int32), "ranges": ranges, "order": longest}


# -- one tile in 16 bits ---------------------------------------------------------------------------


def _products(*operands, shape):
    """Products ``A B^T`` of pairs of references in shared memory."""

    def run(*sums):
        for total, (a, b) in zip(sums, operands, strict=True):
            plgpu.wgmma(total, a, b.transpose((1, 0)))
        return [total[...] for total in sums]

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * len(operands))


def add_half(sums, operands):
    """``sum + A B`` for pairs of an array, rounded to 16 bits, and a reference."""

    def run(totals):
        for total, (a, b) in zip(totals, operands, strict=True):
            plgpu.wgmma(total, a.astype(b.dtype), b)

    return tuple(pl.run_state(run)(tuple(map(plgpu.ACC.init, sums))))


class Half:
    """One compute warpgroup's steps in 16 bits.

    Args:
        side: "q" or "kv".
        plan: sizes.
        scale: factor on the logits.
    """

    auto_barriers = True
    latest_first = False  # whether keys look at their queries from the last to the first
    early: tuple | None = None  # see `Registers`: no walk that is one tile ahead

    def __init__(self, side: str, plan: Plan, scale: float):
        self.side, self.plan, self.scale = side, plan, scale
        queries, keys = ("q", "d_out"), ("k", "v")
        self.own, ring = (queries, keys) if side == "q" else (keys, queries)
        self.ring = tuple((name,) for name in ring)
        self.names = ("q", "k", "v", "d_out", "lse", "delta")

    def memory(self, name: str, lead: tuple[int, ...], rows: int):
        """Shared memory for so many rows of an array."""
        width, dtype = self.plan.head_dim, jnp.dtype(self.plan.variant.half)
        return plgpu.SMEM(
            (*lead, rows, width), dtype, transforms=_transforms(_swizzle(2 * width), 2)
        )

    def source(self, ref, name: str, b, head, rows):
        """The rows of an array in global memory."""
        return ref.at[b, rows, head]

    def of_owner(self, load):
        """Numbers per row of the owner; ``load(name)`` gives those of an array [B, N, T]."""
        return [load("lse"), load("delta")] if self.side == "q" else []

    def start(self):
        """Sums of nothing: dQ, or dK and dV."""
        zeros = jnp.zeros((ROWS, self.plan.head_dim), jnp.float32)
        return (plgpu.layout_cast(zeros, _ACC),) * (1 if self.side == "q" else 2)

    def tile(self, own, ring, fixed, load, sums, where, wait, release, take, give):
        """Adds one tile to the sums.

        Args:
            own: references to the owner's rows, as `own` names them.
            ring: references to the streamed tile, as `ring` names them.
            fixed: from `of_owner`.
            load: as there, for the streamed rows.
            sums: from `start` or an earlier tile.
            where: the tile's place and what counts in it, or None where everything does.
            wait: ``wait(i)`` waits for the i-th part of the tile.
            release: ``release(i)`` gives that part back.
            take: waits for the turn to multiply, which this warpgroup has when a tile begins and
                must have when it ends.
            give: hands it to the next warpgroup.

        Returns:
            New sums.
        """
        of_queries, shape = self.side == "q", (ROWS, self.plan.config.block_kv)
        (first,), (second,) = ring
        lse, delta = fixed or map(load, ("lse", "delta"))
        wide = lambda x: lax.broadcast_in_dim(x, shape, [0 if of_queries else 1])  # noqa: E731
        wait(0)
        wait(1)
        scores, d_p = _products((own[0], first), (own[1], second), shape=shape)
        give()
        if of_queries:
            release(1)
        p = jnp.exp2(scores * (self.scale * LOG2E) - wide(lse))
        d_s = p * (d_p - wide(delta))
        if where is not None:
            ok = self._allowed(**where)
            p, d_s = jnp.where(ok, p, 0.0), jnp.where(ok, d_s, 0.0)
        take()
        sums = add_half(sums, ((d_s, first),) if of_queries else ((d_s, first), (p, second)))
        if not of_queries:
            release(1)
        release(0)
        return sums

    def _allowed(self, row, col, first_col=None, last_col=None):
        """Which pairs of the tile take part; zeros beyond the last key have a P as well."""
        plan, shape = self.plan, (ROWS, self.plan.config.block_kv)
        t, s = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_ACC) for axis in (0, 1))
        s = s + col
        away = s - (t + row)
        ok = s < plan.kv_len
        if plan.max_diff is not None:
            ok &= away <= plan.max_diff
        if plan.min_diff is not None:
            ok &= away >= plan.min_diff
        if first_col is not None:
            ok &= (s >= first_col) & (s < last_col)
        return ok

    def finish(self, sums, load, mean):
        """What is stored: dQ, or dK and dV.

        Args:
            sums: from `tile`.
            load: as in `of_owner`.
            mean: reference to "k_mean" of the head, if there is such an array.
        """
        del load, mean
        return [x * factor for x, factor in zip(sums, (self.scale, 1.0), strict=False)]


class Registers(Half):
    """`Half`, register by register.

    Numbers of streamed queries come with their tile.

    Args:
        side: "q" or "kv".
        plan: sizes.
        scale: factor on the logits.
    """

    auto_barriers = False

    def __init__(self, side: str, plan: Plan, scale: float):
        super().__init__(side, plan, scale)
        if side == "kv":
            self.ring = ("q", "minus_lse"), ("d_out", "minus_delta")
        self.names = ("q", "k", "v", "d_out", "minus_lse", "minus_delta")
        # Of the ring's parts, those that the first two products need, and those that can go before
        # the last ones: keys need Q and dO again, queries only K.
        self.early = (0, 1), ((1,) if side == "q" else ())
        head_dim, block, half = plan.head_dim, plan.config.block_kv, plan.variant.half
        self.kind = {"bfloat16": "f32.bf16.bf16", "float16": "f32.f16.f16"}[half]
        self.swizzle = _swizzle(2 * head_dim)
        self.rows = _transforms(self.swizzle, 2)
        self.tile_type = _shape((ROWS, block), jnp.float32, _ACC)
        self.pending_types = (self.tile_type,) * 2
        self.operand_type = _shape((ROWS, block), jnp.dtype(half), _ACC)
        self.sum_type = _shape((ROWS, head_dim), jnp.float32, _ACC)

    def memory(self, name: str, lead: tuple[int, ...], rows: int):
        """As `Half.memory`."""
        if name.startswith("minus"):
            return plgpu.SMEM((*lead, rows), jnp.float32)
        return super().memory(name, lead, rows)

    def source(self, ref, name: str, b, head, rows):
        """As `Half.source`."""
        return ref.at[b, head, rows] if name.startswith("minus") else ref.at[b, rows, head]

    def of_owner(self, load):
        """As `Half.of_owner`."""
        return [load("minus_lse"), load("minus_delta")] if self.side == "q" else []

    def tile(self, own, ring, fixed, load, sums, where, wait, release, take, give):
        """As `Half.tile`."""
        del load
        for part in range(len(ring)):
            wait(part)
        pending = self.begin(own, ring)
        if self.plan.config.schedule == "hold":
            pending = self.settle((), (), pending)[1]
        give()
        sums, operands = self.prepare(pending, ring, fixed, where, sums)
        take()
        sums, _ = self.settle(self.multiply(sums, operands, ring), operands, ())
        for part in reversed(range(len(ring))):
            release(part)
        return sums

    # What `tile` does, in pieces, for a walk that is one tile ahead.

    def begin(self, own, slots):
        """Starts the first two products."""
        return self.issue_scores(own[0], slots[0][0]), self.issue(own[1], slots[1][0])

    def advance(self, sums, operands, slots, own, next_slots, give):
        """Sums with the last products of a tile, and the first ones of the next, all of them done.

        The multiplier never waits: the second of the next tile's products starts while the first
        runs, when the operands of the last ones have left their registers.
        """
        sums = self.multiply(sums, operands, slots)
        scores = self.issue_scores(own[0], next_slots[0][0])
        sums, _ = self.settle(sums, operands, (), left=1)
        d_p = self.issue(own[1], next_slots[1][0])
        give()
        return sums, self.settle((), (), (scores, d_p))[1]

    def settle(self, sums, operands, pending, left: int = 0):
        """Sums and products when they are done; so many later groups are still in flight."""
        given = [*sums, *pending, *operands]
        types = [self.sum_type] * len(sums) + list(self.pending_types[: len(pending)])
        layouts = [_ACC] * len(types) + [self.operand_type.layout] * len(operands)
        done = settled(given, layouts, types, left)
        return done[: len(sums)], done[len(sums) :]

    def issue(self, own, streamed):
        """Starts a product of the owner's rows with the streamed ones."""

        def body(a, b):
            operands = (_k_major(x, self.swizzle) for x in (a, b))
            return [_wgmma(self.plan.config.block_kv, *operands, "f", self.kind)]

        return _inline(body, [(own, self.rows), (streamed, self.rows)], [self.tile_type])[0]

    issue_scores = issue

    def prepare(self, pending, slots, fixed, where, sums):
        """Sums, and operands of the last products: dS, for keys also P."""
        position, of_queries = position_of(self.plan, where), self.side == "q"
        inputs = [(x, _ACC) for x in pending]
        inputs += [(x, _ROW) for x in fixed] or [(part[1], ()) for part in slots]
        inputs += [(x, _SCALAR) for x in position.values()]

        def body(scores, d_p, *rest):
            numbers, place = rest[:2], rest[2:]
            shift, minus = map(_numbers_of_rows if of_queries else _numbers_of_columns, numbers)
            scores = _wait(1, scores)
            if position:
                fields = dict(zip(position, (x[0] for x in place), strict=True))
                scores = tile_math.mask_scores(scores, Position(**fields), is_int=False)
            factor = ptx.f32(self.scale * LOG2E)
            p = [ptx.exp2(ptx.fma(x, factor, shift(i))) for i, x in enumerate(scores)]
            words = [] if of_queries else [_opaque(self.operand(p))]
            pairs = enumerate(zip(p, _wait(0, d_p), strict=True))
            d_s = [ptx.fmul(x, ptx.fadd(y, minus(i))) for i, (x, y) in pairs]
            if position:  # what lies beyond the end may be anything
                zero = ptx.f32(0.0)
                d_s = [ptx.select(ptx.feq(x, zero), zero, y) for x, y in zip(p, d_s, strict=True)]
            return [_opaque(self.operand(d_s)), *words]

        return sums, _inline(body, inputs, [self.operand_type] * len(sums))

    def multiply(self, sums, operands, slots):
        """Starts adding the products of dS, and of P, with streamed rows."""
        count = len(sums)
        inputs = [(x, _ACC) for x in sums] + [(x, self.operand_type.layout) for x in operands]
        inputs += [(ref, self.rows) for ref in self.last(slots)]

        def body(*given):
            found = []
            for i in reversed(range(count)):  # P has waited longest
                total, words, ref = given[i::count]
                a = [words[j : j + 4] for j in range(0, len(words), 4)]
                b = _mn_major(ref, self.swizzle, 0)
                found.insert(0, accumulate(self.plan.head_dim, a, b, total, self.kind))
            return found

        return tuple(_inline(body, inputs, [self.sum_type] * count))

    def last(self, slots):
        """What dS, and P, are multiplied with."""
        return [part[0] for part in slots[: 1 if self.side == "q" else 2]]

    def operand(self, values):
        """Registers of a tile, rounded to 16 bits, as a left operand."""
        half = self.plan.variant.half
        return [ptx.half_x2(values[i : i + 2], half) for i in range(0, len(values), 2)]


STEPS = {"q": Half, "kv": Registers}


def _numbers_of_rows(values):
    """Element i's number of its row, as a function of i."""
    return lambda i: values[i // 2 % 2]


def _numbers_of_columns(ref):
    """Element i's number of its column, of an array in shared memory, as a function of i."""
    found = {}

    def number(i):
        j = i // 4
        if j not in found:
            found[j] = shared(ref, thread_columns(j, 1), 2)
        return found[j][i % 2]

    return number


def thread_columns(j: int, width: int):
    """Byte of the thread's numbers for the j-th 8 columns, ``width`` for each column."""
    column = ptx.mul(ptx.rem(ptx.thread(), ptx.i32(4)), ptx.i32(2))
    return ptx.widen(ptx.mul(ptx.add(column, ptx.i32(8 * j)), ptx.i32(4 * width)))


def shared(ref, offset, count: int):
    """Neighbouring float32 of an array in shared memory."""
    targets = ", ".join(f"${i}" for i in range(count))
    text = f"ld.shared.v{count}.f32 {{{targets}}}, [${count}];"
    if count == 1:
        text = "ld.shared.f32 $0, [$1];"
    return ptx.asm(text, "f" * count, [ptx.address(ref, offset)], effects=True)


def settled(given, layouts, types, left: int = 0) -> tuple:
    """Results of products when at most ``left`` later groups are in flight.

    Args:
        given: the results, then operands that must stay until then.
        layouts: of all of them.
        types: of the results.
        left: groups.
    """
    count = len(types)

    def body(*given):
        keep = [x for values in given[count:] for x in values]
        flat = iter(_wait(left, [x for values in given[:count] for x in values], keep=keep))
        return [[next(flat) for _ in values] for values in given[:count]]

    return tuple(_inline(body, list(zip(given, layouts, strict=True)), types))


def accumulate(n: int, a, b, sums, kind: str):
    """Issues ``sums + A B`` as one group of wgmma and commits it.

    Args:
        n: columns.
        a: four registers for each step, or a descriptor.
        b: a descriptor for each step, of a [k, n] array where 16-bit.
        sums: registers.
        kind: types, as in the instruction's name.
    """
    count, number = len(sums), 2 * len(sums)
    k, flags = (16, "1, 1, 1, 1") if "f16" in kind else (32, "1")
    tile = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    operands, lines = [], []
    for a_step, b_step in zip(a, b, strict=True):
        a_step = a_step if isinstance(a_step, list) else [a_step]
        *names, last = (f"${number + i}" for i in range(len(a_step) + 1))
        left = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{kind} {tile}, {left}, {last}, {flags};"
        )
        operands += [*a_step, b_step]
        number += len(a_step) + 1
    text = "\n".join(["wgmma.fence.sync.aligned;", *lines, "wgmma.commit_group.sync.aligned;"])
    return ptx.asm(text, "", operands, tied=sums, effects=True)


def position_of(plan: Plan, where) -> dict:
    """Fields of `Position`, in order; none without a mask."""
    if where is None:
        return {}
    fields = {
        "row": where["row"],
        "col": where["col"],
        "q_len": plan.q_len,
        "kv_len": plan.kv_len,
    }
    if plan.min_diff is not None:
        fields["min_diff"] = plan.min_diff
    if plan.max_diff is not None:
        fields["max_diff"] = plan.max_diff
    if "first_col" in where:
        fields["first_col"] = where["first_col"]
        fields["kv_len"] = jnp.minimum(where["last_col"], jnp.int32(plan.kv_len))
    return {name: jnp.asarray(x, jnp.int32) for name, x in fields.items()}


# -- the kernel ------------------------------------------------------------------------------------


def latest_first(steps) -> bool:
    """Whether a kernel walks over its tiles from the last to the first."""
    return steps.latest_first and steps.side == "kv"


def _kernel(steps, names: tuple[str, ...], groups: int, dtype):
    """Builds one kernel's entry function.

    Args:
        steps: `Half`, or what stands in its place.
        names: what the operands are, in order.
        groups: query heads of a key head.
        dtype: of the results.
    """
    plan = steps.plan
    config, block, stages, i32 = (
        plan.config,
        plan.config.block_kv,
        plan.config.num_stages,
        jnp.int32,
    )
    of_queries, listed = steps.side == "q", "list" in names
    turned = latest_first(steps)
    ahead = config.schedule == "ahead" and steps.early is not None and not listed
    heads = 1 if of_queries else groups  # streamed heads for each head of the owner
    compute = config.num_compute

    def place(refs):
        """Tile, batch and head of this block's rows; the longest walks come first."""
        index = lax.axis_index("block")
        if listed:
            index = refs["order"][index]
        head, tile = div(index, plan.q_tiles), lax.rem(index, i32(plan.q_tiles))
        if of_queries and not listed:
            tile = plan.q_tiles - 1 - tile
        return tile, div(head, plan.num_heads), lax.rem(head, i32(plan.num_heads))

    def streamed_head(head, j):
        return div(head, groups) if of_queries else head * groups + j

    def entry_of(refs, name, b, head, j, tile, i):
        """A number of the lists, which batch entries and heads may share."""
        n, shape = head if of_queries else streamed_head(head, j), refs[name].shape
        return refs[name][b if shape[0] > 1 else 0, n if shape[1] > 1 else 0, tile, i]

    def walk(refs, b, head, j, tile):
        """Places [lo, hi), and [mid_lo, mid_hi), those that need no mask."""
        if not listed:
            lo, mid_lo, mid_hi, hi = (jnp.asarray(x, i32) for x in plan.kv_tiles(tile))
            return (
                [lo, lo + hi - mid_hi, lo + hi - mid_lo, hi] if turned else [lo, mid_lo, mid_hi, hi]
            )
        whole, count = (entry_of(refs, "ranges", b, head, j, tile, i) for i in range(2))
        return [i32(0), i32(0), whole, count]

    def code_at(refs, b, head, j, tile, i):
        """What a place holds: a tile's number, or an entry of the list."""
        if not listed and not turned:
            return i
        if not listed:
            lo, _, _, hi = plan.kv_tiles(tile)
            return lo + hi - 1 - i
        last = refs["list"].shape[-1] - 1
        return entry_of(refs, "list", b, head, j, tile, jnp.minimum(i, last))

    def number_of(code):
        return div(code, 64) if listed else code

    def memory_group(own, ring, refs, ready, free):
        (own_ready, *ring_ready) = ready
        tile, b, head = place(refs)
        for w in range(compute):
            rows = pl.ds(tile * config.block_q + w * ROWS, ROWS)
            for name, smem in zip(steps.own, own, strict=True):
                source = steps.source(refs[name], name, b, head, rows)
                plgpu.copy_gmem_to_smem(source, smem.at[w], own_ready.at[w])

        def one_head(j, step):
            lo, _, _, hi = walk(refs, b, head, j, tile)

            def load(i, state):
                step, code = state
                then = code_at(refs, b, head, j, tile, i + 1)
                slot, rows = lax.rem(step, i32(stages)), pl.ds(number_of(code) * block, block)
                for part, smems, filled, empty in zip(
                    steps.ring, ring, ring_ready, free, strict=True
                ):
                    plgpu.barrier_wait(empty.at[slot])
                    for name, smem in zip(part, smems, strict=True):
                        source = steps.source(refs[name], name, b, streamed_head(head, j), rows)
                        plgpu.copy_gmem_to_smem(source, smem.at[slot], filled.at[slot])
                return step + 1, then

            return lax.fori_loop(lo, hi, load, (step, code_at(refs, b, head, j, tile, lo)))[0]

        if heads == 1:
            one_head(i32(0), i32(0))
        else:
            lax.fori_loop(i32(0), i32(heads), one_head, i32(0))

    def compute_group(wg, own, ring, refs, ready, free, turns):
        (own_ready, *ring_ready) = ready

        def take():
            if config.schedule != "none":
                plgpu.barrier_wait(turns.at[wg])

        def give():
            if config.schedule != "none":
                plgpu.barrier_arrive(turns.at[lax.rem(wg + 1, i32(compute))])

        mine = [smem.at[wg] for smem in own]
        tile, b, head = place(refs)
        start = tile * config.block_q + wg * ROWS
        for slot in range(stages):
            for empty in free:
                plgpu.barrier_arrive(empty.at[slot])
        plgpu.barrier_wait(own_ready.at[wg])

        def of_owner(name):
            rows = refs[name].at[b, head, pl.ds(start, ROWS)]
            return plgpu.load(rows, layout=_ROW, optimized=False)

        fixed = steps.of_owner(of_owner)

        def one_step(i, state, j, is_masked):
            step, code, sums = state
            then = code_at(refs, b, head, j, tile, i + 1)
            slot, number = lax.rem(step, i32(stages)), number_of(code)
            first = number * block

            def wait(part):
                plgpu.barrier_wait(ring_ready[part].at[slot])

            def release(part):
                plgpu.barrier_arrive(free[part].at[slot])

            def load(name):
                rows = refs[name].at[b, streamed_head(head, j), pl.ds(first, block)]
                return plgpu.load(rows, layout=_SIDE[steps.side], optimized=False)

            def add(sums, where=None):
                slots = [[smem.at[slot] for smem in part] for part in ring]
                return steps.tile(mine, slots, fixed, load, sums, where, wait, release, take, give)

            def skip(sums):
                """Nothing of the tile is for this warpgroup."""
                give()
                take()
                for part in range(len(free)):
                    wait(part)
                    release(part)
                return sums

            where = {"row": start, "col": first}
            if not is_masked:
                sums = add(sums)
            elif not listed:
                sums = add(sums, where)
            else:
                bits = lax.rem(lax.shift_right_logical(code, 2 * wg), i32(4))
                if block == ROWS:
                    where |= {"first_col": first, "last_col": first + ROWS}
                else:
                    where["first_col"] = first + jnp.where(bits == 2, i32(ROWS), i32(0))
                    where["last_col"] = first + jnp.where(bits == 1, i32(ROWS), i32(block))
                sums = lax.cond(bits != 0, lambda x: add(x, where), skip, sums)
            return step + 1, then, sums

        def slots_of(step):
            slot = lax.rem(step, i32(stages))
            return slot, [[smem.at[slot] for smem in part] for part in ring]

        def wait_for(parts, slot):
            for part in parts:
                plgpu.barrier_wait(ring_ready[part].at[slot])

        def one_step_ahead(i, state, j, is_masked, hi):
            """As `one_step`; the next tile's first products follow this one's at once."""
            step, code, sums, pending = state
            then, (slot, slots) = code_at(refs, b, head, j, tile, i + 1), slots_of(step)
            next_slot, _ = slots_of(step + 1)
            where = {"row": start, "col": number_of(code) * block} if is_masked else None
            sums, operands = steps.prepare(pending, slots, fixed, where, sums)
            for part in steps.early[1]:
                plgpu.barrier_arrive(free[part].at[slot])
            wait_for([x for x in range(len(free)) if x not in steps.early[0]], slot)
            pl.when(i + 1 < hi)(lambda: wait_for(steps.early[0], next_slot))
            take()
            # After the last tile the next one's products are of what lies there, for nothing.
            sums, pending = steps.advance(sums, operands, slots, mine, slots_of(step + 1)[1], give)
            for part in range(len(free)):
                if part not in steps.early[1]:
                    plgpu.barrier_arrive(free[part].at[slot])
            return step + 1, then, sums, pending

        def one_head(j, state):
            lo, mid_lo, mid_hi, hi = walk(refs, b, head, j, tile)
            step, sums = state
            state = step, code_at(refs, b, head, j, tile, lo), sums
            run = lambda is_masked: lambda i, x: one_step(i, x, j, is_masked)  # noqa: E731
            if ahead:
                pl.when(lo < hi)(lambda: wait_for(steps.early[0], lax.rem(step, i32(stages))))
                take()
                pending = steps.begin(mine, slots_of(step)[1])
                give()
                state = *state, steps.settle((), (), pending)[1]
                run = lambda is_masked: lambda i, x: one_step_ahead(i, x, j, is_masked, hi)  # noqa: E731
            if listed:
                state = lax.fori_loop(lo, mid_hi, run(False), state)
                state = lax.fori_loop(mid_hi, hi, run(True), state)
            elif not plan.needs_mask:
                state = lax.fori_loop(lo, hi, run(False), state)
            else:
                state = lax.fori_loop(lo, mid_lo, run(True), state)
                state = lax.fori_loop(mid_lo, mid_hi, run(False), state)
                state = lax.fori_loop(mid_hi, hi, run(True), state)
            return state[0], state[2]

        pl.when(wg == compute - 1)(give)
        if not ahead:
            take()
        state = i32(0), steps.start()
        state = one_head(i32(0), state) if heads == 1 else lax.fori_loop(0, heads, one_head, state)
        if not ahead:
            give()
        rows, stage = pl.ds(start, ROWS), mine[1]  # which nothing reads any more
        mean = refs["k_mean"].at[b, streamed_head(head, 0)] if "k_mean" in names else None
        for total, out in zip(steps.finish(state[1], of_owner, mean), refs["out"], strict=True):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stage, out.at[b, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def entry(*operands):
        refs = dict(zip(names, operands[: len(names)], strict=True)) | {
            "out": operands[len(names) :]
        }
        own = [steps.memory(name, (compute,), ROWS) for name in steps.own]
        ring = [[steps.memory(name, (stages,), block) for name in part] for part in steps.ring]
        ready = [plgpu.Barrier(num_arrivals=len(own), num_barriers=compute)]
        ready += [plgpu.Barrier(num_arrivals=len(part), num_barriers=stages) for part in ring]
        free = [plgpu.Barrier(num_arrivals=compute, num_barriers=stages) for _ in ring]

        def body(own, ring, ready, free, turns):
            wg = lax.axis_index("wg")

            @pl.when(wg == compute)
            def _memory():
                plgpu.set_max_registers(config.memory_registers, action="decrease")
                memory_group(own, ring, refs, ready, free)

            @pl.when(wg < compute)
            def _compute():
                plgpu.set_max_registers(config.registers, action="increase")
                compute_group(wg, own, ring, refs, ready, free, turns)

        turns = plgpu.Barrier(num_barriers=compute)
        pl.run_scoped(body, own, ring, ready, free, turns, collective_axes="wg")

    return entry


def launch(steps, arrays: dict[str, jax.Array], blocks: BlockMask | None) -> list[jax.Array]:
    """One kernel's gradients, one for the side of queries and two for that of keys.

    Args:
        steps: `Half`, or what stands in its place.
        arrays: its operands by name; the results have the type of "v", or of "d_out".
        blocks: tiles to visit, or None for all.
    """
    plan = steps.plan
    like = arrays["d_out" if steps.side == "q" else "v"]
    groups = arrays["d_out"].shape[2] // arrays["v"].shape[2]
    if blocks is not None:
        own_groups = 1 if steps.side == "q" else groups
        arrays = arrays | tile_lists(blocks, steps.side, plan, own_groups, latest_first(steps))
    out = jax.ShapeDtypeStruct(like.shape, like.dtype)
    results = plgpu.kernel(
        _kernel(steps, tuple(arrays), groups, like.dtype),
        out_type=[out] * (1 if steps.side == "q" else 2),
        grid=(plan.total,),
        grid_names=("block",),
        num_threads=plan.config.num_compute + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=not steps.auto_barriers,
        ),
    )(*arrays.values())
    return [x[:, : plan.q_len] for x in results]
