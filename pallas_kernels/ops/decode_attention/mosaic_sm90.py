# SPDX-License-Identifier: Apache-2.0
"""Decode attention on Hopper: a cache is read once, in its stored width.

The live slots of all key/value heads, one head after the other, are dealt out evenly to blocks of
four warps: heads of any lengths take the time of their bytes. A block's share may cover the end of
one head and the start of the next. For each, a warp walks over its part:

* ``S = Q K^T`` by ``mma.sync``. The operand B wants neighbouring channels of a key in a thread, so
  16 bytes of a key are operands as they stand: integer codes as integers, the bytes of a query's
  numbers being rows of A; others after they are widened to float16, exactly, and below the up to
  eight (query head, token) pairs that share the key head lies what rounding them to 16 bits left.
* ``O^T = V^T P^T``. Scores come out in the layout in which P is the operand B. V^T wants two
  tokens of a channel in a register: a byte permutation of two words. Integer codes become mantissas
  of 1024, and 1024 times the sum of P, which is one more channel, is taken off at the end.

A warp copies its steps into shared memory as they lie, some steps ahead: it is memory on its way
that reaches the rate of the card, and registers would hold less of it. K of a step to come is
copied when the scores of this one are done, V when the products are. Later the four warps join
their results there; a second kernel joins the blocks' parts by their maxima and sums.

With scales per slot, ``x_j = s_j q·k_j`` and ``out = Σ_j (p_j t_j) v_j``: p_j t_j is rounded to
float16 after a maximum of ``log2 p_j t_j`` was taken out, so that scales of any size are served.

References: Flash-Decoding (Dao et al., 2023); KIVI (arXiv 2402.02750), section 3; FlashAttention-4
(sums are multiplied only where a maximum moved far); PTX ISA 8.4, section 9.7.14 (fragments).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention.mosaic_sm90_codes import (
    ADDED,
    SMALLER,
    barrier,
    bytes_at,
    bytes_of,
    commit,
    copy,
    from_lane,
    halves,
    int_at,
    key_pairs,
    load,
    mma,
    mma_whole,
    power_above,
    read_shared,
    value_pairs,
    wait,
    warp_barrier,
    whole_keys,
    whole_values,
    word_of,
)
from pallas_kernels.ops.decode_attention.mosaic_sm90_join import JOIN_NUMBERS, join_parts
from pallas_kernels.ops.decode_attention.mosaic_sm90_plan import (
    LOG2E,
    NO_MAX,
    ROWS,
    UNIT,
    WARPS,
    Config,
    Plan,
    Shares,
)
from pallas_kernels.ops.decode_attention.spec import DecodeSpec

# P is at most 2^8 when the maximum moves, which it does when P would be above 2^12: what float16
# holds below 1 is used for small P, and sums are rarely multiplied.
HEADROOM, SLACK = 8.0, 4.0
_SCALAR = plgpu.Layout.WG_SPLAT(())


# -- what one thread does --------------------------------------------------------------------------


class _Thread:
    """Where a thread of the main kernel stands, and what it loads.

    With g = lane // 4 and c = lane % 4: of K it holds, per unit of 16 tokens, a quarter of the
    channels of tokens 4 (g // 2) + g % 2 + {0, 2}; of V an eighth of those of 4c … 4c + 3, the
    tokens of its scores.
    """

    def __init__(self, plan: Plan, refs, block, row_block, head, first, count, group):
        """Of a block, for a block of rows of a head: so many turns of it from one on.

        The block is a warpgroup, of several that were launched together, or None.
        """
        self.plan, self.refs = plan, refs
        spec, i32 = plan.spec, ptx.i32
        self.block, self.row_block, self.head = block, row_block, head
        self.group, self.shared = group, ptx.i64(0)
        if group is not None:
            self.shared = bytes_at(group, 4 * plan.shared)
        self.first = ptx.mul(first, i32(plan.turn))
        tid = ptx.thread()
        self.tid, self.warp = tid, ptx.div(tid, i32(32))
        self.lane = ptx.rem(tid, i32(32))
        self.g, self.c = ptx.div(self.lane, i32(4)), ptx.rem(self.lane, i32(4))
        pair = ptx.add(ptx.mul(ptx.div(self.g, i32(2)), i32(4)), ptx.rem(self.g, i32(2)))
        self.k_token, self.v_token = pair, ptx.mul(self.c, i32(4))
        self.k_width = min(16, plan.row_bytes // 4)
        self.v_width = min(16, plan.row_bytes // 8)
        self.batch = ptx.div(self.head, i32(spec.num_kv_heads))
        self.limit = int_at(refs["limits"], head)
        end = ptx.add(self.first, ptx.mul(count, i32(plan.turn)))
        self.last = ptx.sub(ptx.imin(self.limit, end), i32(1))  # what is beyond is not read
        if plan.pool:
            self.home = ptx.mul(self.batch, i32(plan.pool))
        else:
            self.home = ptx.mul(self.head, i32(spec.capacity))

    def _position(self, token):
        """Logical position of a query; negative for none."""
        index = ptx.add(ptx.mul(self.batch, ptx.i32(self.plan.spec.q_len)), token)
        return load(self.refs["query_positions"], bytes_at(index, 4), 4)[0]

    def start(self, i):
        """First slot of a step; warps take turns."""
        turn = ptx.add(ptx.mul(i, ptx.i32(WARPS)), self.warp)
        return ptx.add(self.first, ptx.mul(turn, ptx.i32(self.plan.step)))

    def page(self, i):
        """The tile that a step lies in; -1 for none."""
        spec = self.plan.spec
        tile = ptx.div(ptx.imin(self.start(i), self.last), ptx.i32(spec.tile))
        row = ptx.mul(self.head, ptx.i32(spec.capacity // spec.tile))
        return load(self.refs["table"], bytes_at(ptx.add(row, tile), 4), 4)[0]

    def row(self, start, page, token):
        """Index of a slot in memory; beyond the last slot that slot again."""
        slot = ptx.imin(ptx.add(start, token), self.last)
        home = self.home
        if self.plan.pool:
            tile = ptx.i32(self.plan.spec.tile)
            begin = ptx.mul(ptx.div(ptx.imin(start, self.last), tile), tile)
            home = ptx.add(home, ptx.mul(ptx.imax(page, ptx.i32(0)), tile))
            home = ptx.sub(home, begin)
        return ptx.add(home, slot)

    def _pieces(self, name):
        """The thread's first token of a unit, its place in a row, bytes of a piece, lanes."""
        if name == "k":
            return self.k_token, self.c, self.k_width, 4
        return self.v_token, self.g, self.v_width, 8

    def _apart(self, name):
        """How far the thread's tokens of a step are from the first one."""
        near = range(0, 4, 2) if name == "k" else range(4)
        return [u + t for u in range(0, self.plan.step, UNIT) for t in near]

    def _slot(self, name, i):
        """Where in shared memory the warp's K or V of a step lies."""
        plan = self.plan
        stage = ptx.add(ptx.mul(self.warp, ptx.i32(plan.stages)), ptx.rem(i, ptx.i32(plan.stages)))
        place = ptx.mul(stage, ptx.i32(2 * plan.step_bytes))
        return ptx.add(place, ptx.i32(plan.step_bytes * (name == "v")))

    def _place(self, token, piece):
        """Where 16 bytes of a token of a step lie in it."""
        quad, four = ptx.div(token, ptx.i32(4)), ptx.i32(4)
        moved = ptx.add(ptx.mul(ptx.rem(quad, ptx.i32(2)), four), ptx.land(quad, ptx.i32(2)))
        if self.plan.row_bytes >= 128:
            moved = ptx.xor(moved, ptx.mul(ptx.rem(token, ptx.i32(2)), four))
        number = ptx.add(ptx.mul(token, ptx.i32(self.plan.row_bytes // 16)), piece)
        return ptx.mul(ptx.xor(number, moved), ptx.i32(16))

    def _onward(self, tokens: int, pieces: int = 0) -> tuple[int, int]:
        """What tokens and pieces further on change a place by: an exclusive or, and a sum.

        Within 128 bytes pieces change places, so that those that threads read together lie in
        different banks: of K tokens 0 and 1 of four, of V every fourth one.
        """
        quad = tokens // 4
        moved = 4 * (quad % 2) + (quad & 2)
        moved ^= 4 * (tokens % 2) * (self.plan.row_bytes >= 128)
        number = tokens * (self.plan.row_bytes // 16) + pieces
        return 16 * (number % 8 ^ moved), 16 * (number - number % 8)

    def fetch(self, name, i, page):
        """Starts copying the warp's K or V of a step, 512 bytes at once, as one group."""
        warp_barrier()  # all have read what was there
        plan, start, slot = self.plan, self.start(i), self._slot(name, i)
        pieces = plan.row_bytes // 16
        token, piece = (f(self.lane, ptx.i32(pieces)) for f in (ptx.div, ptx.rem))
        base = ptx.address(self.refs[name], bytes_at(piece, 16))
        place = self._place(token, piece)
        for tokens in range(0, plan.step, 32 // pieces):
            row = self.row(start, page, ptx.add(token, ptx.i32(tokens)))
            changed, further = self._onward(tokens)
            where = ptx.add(ptx.xor(place, ptx.i32(changed)), slot)
            where = ptx.add(self.shared, ptx.widen(where))
            source = ptx.add(base, bytes_at(row, plan.row_bytes))
            copy(source, self.refs["shared"], where, further)
        commit()

    def words(self, name, i, facts):
        """Words of K [unit][2] or of V [unit][4] of a step whose copies have arrived.

        With scales per tile the last word of each holds those of its codes.
        """
        plan, slot, found = self.plan, self._slot(name, i), []
        token, place, width, lanes = self._pieces(name)
        byte = ptx.mul(place, ptx.i32(width))
        piece, rest = (f(byte, ptx.i32(16)) for f in (ptx.div, ptx.rem))
        place = ptx.add(self._place(token, piece), rest)
        for token in self._apart(name):
            found.append([])
            for first in range(0, plan.row_bytes, lanes * width):
                changed, further = self._onward(token, first // 16)
                where = ptx.add(ptx.xor(place, ptx.i32(changed)), slot)
                where = ptx.add(self.shared, ptx.widen(where))
                found[-1] += read_shared(self.refs["shared"], where, width // 4, "r", further)
        if plan.store.tile:
            found = [[*some, s] for some, s in zip(found, facts[f"{name}_scale"], strict=True)]
        each = len(found) // plan.units
        return [found[u : u + each] for u in range(0, len(found), each)]

    def tile_scales(self, name, i, page):
        """Scales of the tiles that the thread's codes of every token of a step lie in."""
        plan, start = self.plan, self.start(i)
        token, place, _, lanes = self._pieces(name)
        # Lanes and tiles share the row: so many tiles per lane, or lanes per tile.
        tiles = plan.spec.head_dim // plan.store.tile
        size = max(tiles // lanes, 1)
        place = ptx.div(ptx.mul(place, ptx.i32(tiles)), ptx.i32(lanes))
        text, ref = f"ld.global.nc.u{8 * size} $0, [$1];", self.refs[f"{name}_scale"]
        found = []
        for further in self._apart(name):
            row = self.row(start, page, ptx.add(token, ptx.i32(further)))
            where = bytes_at(row, tiles)
            where = ptx.add(where, ptx.widen(place))
            found += ptx.asm(text, "r", [ptx.address(ref, where)], effects=True)
        return found

    def facts(self, i, page):
        """Scales, zero points and positions of the thread's slots, [unit][4] by name."""
        plan, start = self.plan, self.start(i)
        kinds = {}
        if plan.scaled:
            kinds |= {"k_scale": "f", "v_scale": "f"}
        if plan.zero_point:
            kinds |= {"k_zero": "f", "v_zero": "f"}
        if plan.positions:
            kinds["positions"] = "r"
        out = {name: [] for name in kinds}
        if plan.store.tile:
            out |= {f"{name}_scale": self.tile_scales(name, i, page) for name in ("k", "v")}
        for u in range(plan.units):
            token = ptx.add(self.v_token, ptx.i32(UNIT * u))
            if plan.spec.capacity % 4:
                rows = [self.row(start, page, ptx.add(token, ptx.i32(t))) for t in range(4)]
            else:
                # Slots after the last one of four are read and hidden.
                rest = ptx.rem(ptx.imin(ptx.add(start, token), self.last), ptx.i32(4))
                rows = [ptx.sub(self.row(start, page, token), rest)]
            for name, kind in kinds.items():
                ref, size = self.refs[name], 16 // len(rows)
                out[name].append(
                    [x for row in rows
                     for x in load(ref, bytes_at(row, 4), size, outs=kind * (size // 4))]
                )  # fmt: skip
        return out

    def query(self):
        """Operand A of every product with K, and facts about the thread's row.

        A row's queries times scale and log2(e) are rounded to 16 bits; eight rows below hold what
        rounding left. For float16 a row is divided by the power of two above its largest number.

        Returns:
            Words [product][4], and the row's factor, bias, sum over channels and position; its
            rows beyond the last one repeat that one.
        """
        plan, spec, i32 = self.plan, self.plan.spec, ptx.i32
        row = ptx.add(ptx.mul(self.row_block, i32(ROWS)), self.g)
        row = ptx.imin(row, i32(plan.rows - 1))
        group, token = ptx.div(row, i32(spec.q_len)), ptx.rem(row, i32(spec.q_len))
        index = ptx.add(ptx.mul(self.batch, i32(spec.q_len)), token)
        name = ptx.rem(self.head, i32(spec.num_kv_heads))
        name = ptx.add(ptx.mul(name, i32(spec.groups)), group)
        index = ptx.add(ptx.mul(index, i32(spec.num_heads)), name)
        x = self._channels(self.refs["query"], index, spec.dtype)
        if plan.store.whole:
            words, facts = self._whole_query(x)
            return words, (*facts, self._position(token))
        x = [ptx.fmul(value, ptx.f32(spec.scale * LOG2E)) for value in x]
        bias = factor = total = None
        if plan.bias:
            offset = self._channels(self.refs["offset"], self.head, "float32")
            bias = self._over_row(ptx.fadd, [ptx.fmul(*p) for p in zip(x, offset, strict=True)])
        if plan.store.half == "float16":
            factor, inverse = power_above(self._over_row(ptx.fmax, [ptx.fabs(v) for v in x]))
            x = [ptx.fmul(value, inverse) for value in x]
        if plan.store.tile:
            factor = ptx.fmul(factor, ptx.f32(SMALLER))
        if plan.zero_point:
            total = self._over_row(ptx.fadd, x)
        order = [8 * (i // 8) + plan.store.order[i % 8] for i in range(len(x))]
        pairs = [[x[i] for i in order[j : j + 2]] for j in range(0, len(x), 2)]
        high = [ptx.half_x2(pair, plan.store.half) for pair in pairs]
        rest = [[ptx.fsub(*p) for p in zip(pair, halves(word, plan.store.half), strict=True)]
                for pair, word in zip(pairs, high, strict=True)]  # fmt: skip
        low = [ptx.half_x2(pair, plan.store.half) for pair in rest]
        words = [
            [high[2 * s], low[2 * s], high[2 * s + 1], low[2 * s + 1]]
            for s in range(len(high) // 2)
        ]
        return words, (factor, bias, total, self._position(token))

    def _whole_query(self, x):
        """Operands and factor, bias and sum of a row whose numbers are integers of some bytes.

        The power of two above the largest number becomes 2^14 (or 2^22): a bfloat16 of at least
        2^-7 of it is exact.
        """
        plan, f32 = self.plan, ptx.f32
        factor, inverse = power_above(self._over_row(ptx.fmax, [ptx.fabs(v) for v in x]))
        bias = total = None
        if plan.bias:
            offset = self._channels(self.refs["offset"], self.head, "float32")
            bias = self._over_row(ptx.fadd, [ptx.fmul(*p) for p in zip(x, offset, strict=True)])
            bias = ptx.fmul(bias, f32(plan.spec.scale * LOG2E))
        size = 2.0 ** (8 * plan.limbs - 2)
        numbers = [
            ptx.asm("cvt.rni.s32.f32 $0, $1;", "r", [ptx.fmul(ptx.fmul(v, inverse), f32(size))])[0]
            for v in x
        ]
        if plan.zero_point:
            total = self._over_row(ptx.fadd, [ptx.to_float(n) for n in numbers])
        order = [8 * (i // 8) + plan.store.order[i % 8] for i in range(len(x))]
        numbers = [numbers[i] for i in order]
        # Signed bytes, the largest first: what is taken for negative in one is made up in the next.
        limbs = [
            bytes_of([ptx.add(n, ptx.i32(0x8080 & (1 << 8 * i) - 1)) for n in numbers], i)
            for i in reversed(range(plan.limbs))
        ]
        limbs += [[ptx.i32(0)] * len(limbs[0])] * (plan.limbs % 2)
        words = [
            [high[s], low[s], high[s + 1], low[s + 1]]
            for high, low in zip(limbs[::2], limbs[1::2], strict=True)
            for s in range(0, len(high), 2)
        ]
        unit = plan.spec.scale * LOG2E / size
        codes = 16.0 if plan.store.bits == 4 else 1.0  # see `whole_keys`
        total = None if total is None else ptx.fmul(total, f32(codes))
        return words, (ptx.fmul(factor, f32(unit / codes)), bias, total)

    def _channels(self, ref, row, dtype: str):
        """The thread's channels of a row of [..., H] as float32, in the order of a key's codes."""
        codes, size = self.k_width * 8 // self.plan.store.bits, jnp.dtype(dtype).itemsize
        offset = ptx.add(
            bytes_at(row, size * self.plan.spec.head_dim), bytes_at(self.c, size * codes)
        )
        out = []
        for piece in range(self.plan.spec.head_dim // (4 * codes)):
            for j in range(0, size * codes, 16):
                where = ptx.add(offset, ptx.i64(4 * size * codes * piece + j))
                words = load(ref, where, 16, outs="ffff" if size == 4 else "rrrr")
                out += words if size == 4 else [x for w in words for x in halves(w, dtype)]
        return out

    def _over_row(self, combine, values):
        """Combines the numbers of the four threads of a row."""
        x = functools.reduce(combine, values)
        for distance in (1, 2):
            x = combine(x, ptx.shuffle_xor(x, distance))
        return x

    # -- arithmetic --

    def logits(self, keys, query, facts, row):
        """Scaled and capped logits in units of log 2, [unit][4]."""
        plan = self.plan
        factor, bias, total, _ = row
        out = []
        for u in range(plan.units):
            x = [None] * 4
            for e in range(2):
                x[2 * e : 2 * e + 2] = self._products(keys[u][e], query)
            for t in range(4):
                if plan.zero_point:
                    x[t] = ptx.fsub(x[t], ptx.fmul(facts["k_zero"][u][t], total))
                scale = None
                if plan.store.half == "float16":
                    scale = factor
                if plan.scaled:
                    scale = ptx.fmul(facts["k_scale"][u][t], factor)
                if scale is not None:
                    x[t] = ptx.fmul(x[t], scale)
                if plan.bias:
                    x[t] = ptx.fadd(x[t], bias)
                if plan.spec.soft_cap is not None:
                    x[t] = _capped(x[t], plan.spec.soft_cap * LOG2E)
            out.append(x)
        return out

    def _products(self, words, query):
        """Of a key of each lane and the rows of its four: two numbers."""
        store = self.plan.store
        if not store.whole:
            acc, pairs = [ptx.f32(0.0)] * 4, key_pairs(self.plan.spec.store, words)
            for s, a in enumerate(query):
                acc = mma(acc, a, pairs[2 * s : 2 * s + 2], store.half)
            return [ptx.fadd(acc[d], acc[d + 2]) for d in range(2)]
        codes, total = whole_keys(self.plan.spec.store, words), None
        each = len(codes) // 2  # products of a pair of limbs
        for first in range(0, len(query), each):
            acc = [ptx.i32(0)] * 4
            for s in range(each):
                acc = mma_whole(acc, query[first + s], codes[2 * s : 2 * s + 2])
            if total is None:
                wide = [ptx.add(ptx.mul(acc[d], ptx.i32(256)), acc[d + 2]) for d in range(2)]
                total = [ptx.to_float(x) for x in wide]
            else:  # the third limb
                total = [ptx.fma(x, ptx.f32(256.0), ptx.to_float(acc[d]))
                         for d, x in enumerate(total)]  # fmt: skip
        return total

    def seen(self, i, page, facts, row):
        """Which of the slots the thread's row sees, [unit][4]."""
        spec, start, out = self.plan.spec, self.start(i), []
        for u in range(self.plan.units):
            out.append([])
            for t in range(4):
                slot = ptx.add(start, ptx.add(self.v_token, ptx.i32(UNIT * u + t)))
                ok, place = ptx.lt(slot, self.limit), slot
                if self.plan.positions:
                    place = facts["positions"][u][t]
                    ok = ptx.both(ok, ptx.ge(place, ptx.i32(0)))
                if self.plan.pool:
                    ok = ptx.both(ok, ptx.ge(page, ptx.i32(0)))
                ok = ptx.both(ok, ptx.ge(row[3], place))
                if spec.window is not None:
                    near = ptx.lt(ptx.sub(row[3], place), ptx.i32(spec.window))
                    if spec.num_sinks:
                        near = ptx.either(near, ptx.lt(place, ptx.i32(spec.num_sinks)))
                    ok = ptx.both(ok, near)
                out[-1].append(ok)
        return out

    def clean(self, values, seen):
        """Zeros in the place of floats that no row sees: they may be NaN."""
        plan = self.plan
        if plan.spec.store in ("int8", "int4"):
            return values
        if not plan.positions and plan.spec.window is None:
            return values  # slots after the last query are never loaded
        bits = ptx.i32(0)
        for u, part in enumerate(seen):
            for t, ok in enumerate(part):
                bits = ptx.add(bits, ptx.mul(ptx.flag(ok), ptx.i32(1 << (4 * u + t))))
        if self.plan.spec.q_len > 1:
            for distance in (4, 8, 16):
                bits = ptx.asm("or.b32 $0, $1, $2;", "r", [bits, ptx.shuffle_xor(bits, distance)])[
                    0
                ]
        zero = ptx.i32(0)
        out = []
        for u, part in enumerate(values):
            out.append([])
            for t, words in enumerate(part):
                bit = ptx.asm("and.b32 $0, $1, $2;", "r", [bits, ptx.i32(1 << (4 * u + t))])[0]
                hidden = ptx.eq(bit, zero)
                out[-1].append([ptx.select(hidden, zero, word) for word in words])
        return out

    def softmax(self, x, seen, facts, state):
        """P as operand B per unit, factor on old sums, and the new maximum and sums."""
        plan, none = self.plan, ptx.f32(-math.inf)
        x = [[ptx.select(o, a, none) for o, a in zip(*p, strict=True)]
             for p in zip(seen, x, strict=True)]  # fmt: skip
        tops, scales = x, None
        if plan.scaled:
            zero = ptx.f32(0.0)
            scales = [[ptx.select(o, s, zero) for o, s in zip(*p, strict=True)]
                      for p in zip(seen, facts["v_scale"], strict=True)]  # fmt: skip
            tops = [[ptx.fadd(a, ptx.log2(ptx.fmax(s, ptx.f32(1e-30))))
                     for a, s in zip(*p, strict=True)]
                    for p in zip(x, scales, strict=True)]  # fmt: skip
        top = functools.reduce(ptx.fmax, [t for part in tops for t in part])
        for distance in (1, 2):
            top = ptx.fmax(top, ptx.shuffle_xor(top, distance))
        top = ptx.fsub(top, ptx.f32(HEADROOM))
        moves = ptx.fge(top, ptx.fadd(state["m"], ptx.f32(SLACK)))
        m = ptx.select(moves, top, state["m"])
        alpha = ptx.exp2(ptx.fsub(state["m"], m))
        total = ptx.fmul(state["l"], alpha)
        shift = ptx.fmul(state["z"], alpha) if plan.zero_point else None
        operand = []
        for u in range(plan.units):
            p = [ptx.exp2(ptx.fsub(a, m)) for a in x[u]]
            for weight in p:
                total = ptx.fadd(total, weight)
            if scales is not None:
                p = [ptx.fmul(*pair) for pair in zip(p, scales[u], strict=True)]
            words = [ptx.half_x2(p[t : t + 2], plan.store.half) for t in (0, 2)]
            if shift is not None:
                rounded = [w for word in words for w in halves(word, plan.store.half)]
                zeros = zip(seen[u], facts["v_zero"][u], strict=True)
                zeros = [ptx.select(ok, z, ptx.f32(0.0)) for ok, z in zeros]
                for weight, zero in zip(rounded, zeros, strict=True):
                    shift = ptx.fma(weight, zero, shift)
            operand.append(words)
        new = {"m": m, "l": total} | ({"z": shift} if plan.zero_point else {})
        return operand, alpha, new

    def add_values(self, out, values, operand, alpha):
        """``alpha out + V^T P^T``."""
        plan = self.plan
        out = _multiplied(out, alpha, ptx.mul(self.c, ptx.i32(8)))
        for u in range(plan.units):
            pairs = whole_values if plan.store.whole else value_pairs
            first, second = (pairs(plan.spec.store, *values[u][t : t + 2]) for t in (0, 2))
            if plan.store.whole:
                ones = [word_of(0x3C003C00)] * 2
                first, second = [*first, *ones], [*second, *ones]
            for j in range(len(out)):
                a = [*first[2 * j : 2 * j + 2], *second[2 * j : 2 * j + 2]]
                out[j] = mma(out[j], a, operand[u], plan.store.half)
        return out

    def centred(self, out):
        """Without what `whole_values` added: the last tile has sums of P, as those of ones."""
        if self.plan.store.tile:
            return [[ptx.fmul(x, ptx.f32(SMALLER)) for x in tile] for tile in out]
        if not self.plan.store.whole:
            return out
        *tiles, sums = out
        added = ADDED[self.plan.spec.store]
        return [
            [
                ptx.fmul(ptx.fma(sums[i % 2], ptx.f32(-added[i // 2][0]), x),
                         ptx.f32(1 / added[i // 2][1]))
                for i, x in enumerate(tile)
            ]
            for tile in tiles
        ]  # fmt: skip


def _multiplied(out, alpha, lane):
    """Columns of the tiles of ``out`` times alpha of a lane and of the fourth one after it.

    A warp whose factors are all 1 skips it.
    """
    numbers = [x for tile in out for x in tile]
    count = len(numbers)
    lines = [".reg .pred some; .reg .f32 x<2>; .reg .b32 other;"]
    lines += [f"setp.ne.f32 some, ${2 * count}, 0f3F800000;", "vote.sync.any.pred some, some, -1;"]
    lines += ["@!some bra DONE;", f"add.s32 other, ${2 * count + 1}, 4;"]
    lines += [f"shfl.sync.idx.b32 x0, ${2 * count}, ${2 * count + 1}, 31, -1;"]
    lines += [f"shfl.sync.idx.b32 x1, ${2 * count}, other, 31, -1;"]
    lines += [f"mul.rn.f32 ${i}, ${i}, x{i % 2};" for i in range(count)]
    text = "{ " + "\n".join(lines) + "\nDONE:\n}"
    numbers = ptx.asm(text, "", [alpha, lane], tied=numbers, effects=True)
    return [numbers[i : i + 4] for i in range(0, count, 4)]


def _capped(x, cap: float):
    """``cap * tanh(x / cap)``."""
    power = ptx.exp2(ptx.fmul(x, ptx.f32(2 * LOG2E / cap)))
    half = ptx.reciprocal(ptx.fadd(power, ptx.f32(1.0)))
    return ptx.fma(half, ptx.f32(-2 * cap), ptx.f32(cap))


# -- the main kernel -------------------------------------------------------------------------------


def _attend(plan: Plan, refs, axes):
    """What a block does: parts of neighbouring heads, for up to eight rows of each."""
    row_block, block, _, *group = axes
    group = group[0] if group else None
    if group is not None:
        block = ptx.add(ptx.mul(block, ptx.i32(plan.config.groups)), group)
    shares = Shares(plan, refs)

    def work():
        start, left = shares.of(block)
        last = ptx.sub(ptx.add(start, left), ptx.i32(1))
        first_head, last_head = shares.heads_of([start, last])

        def one_head(i, state):
            head, start, left = state
            before = shares.start_of(head)
            count = ptx.imin(ptx.sub(shares.end_of(head), start), left)
            first = ptx.sub(start, before)
            if plan.skips:
                first = ptx.add(first, int_at(refs["skips"], head))

            def walk():
                _walk(plan, _Thread(plan, refs, block, row_block, head, first, count, group), count)

            ptx.branch(ptx.lt(ptx.i32(0), count), walk, lambda: None)
            return [ptx.add(head, ptx.i32(1)), ptx.add(start, count), ptx.sub(left, count)]

        heads = ptx.add(ptx.sub(last_head, first_head), ptx.i32(1))
        ptx.loop(heads, one_head, [first_head, start, left])

    ptx.branch(ptx.lt(block, shares.blocks), work, lambda: None)


def _walk(plan: Plan, thread: _Thread, count):
    """The part of a head: ``count`` steps of every warp."""
    zero, one, stages = ptx.i32(0), ptx.i32(1), plan.stages
    # Of the steps on their way and of one more, where tiles are handed out in any order.
    pages = [thread.page(ptx.i32(s)) for s in range(stages + 1 if plan.pool else 0)]
    page_of = lambda pages, s: pages[s] if plan.pool else zero  # noqa: E731
    for s in range(stages):
        for name in ("k", "v"):
            thread.fetch(name, ptx.i32(s), page_of(pages, s))
    state = {
        "facts": thread.facts(zero, page_of(pages, 0)),
        "pages": pages,
        "out": [[ptx.f32(0.0)] * 4 for _ in range(plan.spec.head_dim // 16 + plan.store.whole)],
        "sums": {"m": ptx.f32(NO_MAX), "l": ptx.f32(0.0)}
        | ({"z": ptx.f32(0.0)} if plan.zero_point else {}),
    }
    query, row = thread.query()

    def step(i, s):
        pages, facts, far = s["pages"], s["facts"], ptx.add(i, ptx.i32(stages))
        wait(2 * stages - 1)  # groups after this step's K, and later after its V
        x = thread.logits(thread.words("k", i, facts), query, facts, row)
        thread.fetch("k", far, page_of(pages, stages))
        seen = thread.seen(i, page_of(pages, 0), facts, row)
        operand, alpha, sums = thread.softmax(x, seen, facts, s["sums"])
        wait(2 * stages - 1)
        values = thread.clean(thread.words("v", i, facts), seen)
        out = thread.add_values(s["out"], values, operand, alpha)
        thread.fetch("v", far, page_of(pages, stages))
        facts = thread.facts(ptx.add(i, one), page_of(pages, 1))
        if plan.pool:
            pages = [*pages[1:], thread.page(ptx.add(far, one))]
        return {"facts": facts, "pages": pages, "out": out, "sums": sums}

    state = ptx.loop(count, step, state)
    wait(0)
    barrier(thread.group)  # the warps' results lie where their copies did
    _join_warps(plan, thread, thread.centred(state["out"]), state["sums"])


def _partial_row(plan: Plan, thread: _Thread, row):
    """Index of a row of a block's part of a head, [parts, row blocks, 8]."""
    index = ptx.add(thread.block, thread.head)
    index = ptx.add(ptx.mul(index, ptx.i32(plan.row_blocks)), thread.row_block)
    return ptx.add(ptx.mul(index, ptx.i32(ROWS)), row)


def _join_warps(plan: Plan, thread: _Thread, out, sums):
    """Adds the four warps' results in shared memory and writes them."""
    i32, shared = ptx.i32, thread.refs["shared"]
    head_dim, slot = plan.spec.head_dim, 4 * WARPS * ROWS  # bytes of a number per warp and row

    def place(which, warp, row):
        index = ptx.add(ptx.mul(warp, i32(ROWS)), row)
        return ptx.add(thread.shared, ptx.add(bytes_at(index, 4), ptx.i64(which * slot)))

    totals = dict(sums)
    for name in totals:
        for distance in (1, 2) if name != "m" else ():
            totals[name] = ptx.fadd(totals[name], ptx.shuffle_xor(totals[name], distance))
    # The four lanes of a row store the same number.
    ptx.store(shared, place(0, thread.warp, thread.g), [totals["m"]], space="shared")
    barrier(thread.group)
    tops = [read_shared(shared, place(0, i32(w), thread.g), 1)[0] for w in range(WARPS)]
    factor = ptx.exp2(ptx.fsub(totals["m"], functools.reduce(ptx.fmax, tops)))
    for which, name in enumerate(("l", "z"), 1):
        if name in totals:
            value = ptx.fmul(totals[name], factor)
            ptx.store(shared, place(which, thread.warp, thread.g), [value], space="shared")
    lane = ptx.mul(thread.c, i32(8))
    codes = thread.v_width * 8 // plan.store.bits  # channels of a piece
    for d in range(2):
        scale = from_lane(factor, ptx.add(lane, i32(4 * d)))
        row = ptx.add(ptx.mul(thread.c, i32(2)), i32(d))
        row = ptx.add(ptx.mul(thread.warp, i32(ROWS)), row)
        base = ptx.add(bytes_at(row, 4 * head_dim), bytes_at(thread.g, 4 * codes))
        base = ptx.add(base, thread.shared)
        for channel, four in _in_order(plan, out, codes, d):
            where = ptx.add(base, ptx.i64(3 * slot + 4 * channel))
            ptx.store(shared, where, [ptx.fmul(x, scale) for x in four], space="shared")
    barrier(thread.group)
    quads = head_dim // 4
    for item in range(0, ROWS * quads, 128):
        index = ptx.add(thread.tid, i32(item))
        row, channel = ptx.div(index, i32(quads)), ptx.rem(index, i32(quads))
        total = None
        for w in range(WARPS):
            at = ptx.add(ptx.mul(ptx.add(row, i32(w * ROWS)), i32(quads)), channel)
            at = ptx.add(thread.shared, bytes_at(at, 16))
            four = read_shared(shared, at, 4, shift=3 * slot)
            total = four if total is None else [ptx.fadd(*p) for p in zip(total, four, strict=True)]
        if "z" in totals:
            shift = _sum_of_warps(shared, place, 2, row)
            total = [ptx.fsub(x, shift) for x in total]
        at = ptx.add(ptx.mul(_partial_row(plan, thread, row), i32(quads)), channel)
        exists = ptx.lt(ptx.add(ptx.mul(thread.row_block, i32(ROWS)), row), i32(plan.rows))
        ptx.store(thread.refs["partial"], bytes_at(at, 16), total, exists)
    row = ptx.rem(thread.tid, i32(ROWS))
    tops = [read_shared(shared, place(0, i32(w), row), 1)[0] for w in range(WARPS)]
    stats = [functools.reduce(ptx.fmax, tops), _sum_of_warps(shared, place, 1, row)]
    where = bytes_at(_partial_row(plan, thread, row), 8)
    ptx.store(thread.refs["stats"], where, stats, ptx.lt(thread.tid, i32(ROWS)))
    barrier(thread.group)  # before the next head's numbers


def _sum_of_warps(shared, place, which, row):
    parts = [read_shared(shared, place(which, ptx.i32(w), row), 1)[0] for w in range(WARPS)]
    return functools.reduce(ptx.fadd, parts)


def _in_order(plan: Plan, out, codes: int, d: int):
    """Row 2c + d of the thread's output as (first channel within the head, four numbers)."""
    order = [8 * (i // 8) + plan.store.order[i % 8] for i in range(codes)]
    order = range(codes) if plan.store.whole else order
    for piece in range(plan.spec.head_dim // (8 * codes)):
        numbers = {}
        for i, channel in enumerate(order):
            tile = out[(piece * codes + i) // 2]
            numbers[channel] = tile[2 * (i % 2) + d]
        for first in range(0, codes, 4):
            yield 8 * codes * piece + first, [numbers[first + j] for j in range(4)]


# -- launch ----------------------------------------------------------------------------------------


def call(body, outs, grid, args, shared=0, inplace=None, groups=1):
    """Runs ``body(refs, axes)`` in blocks of warpgroups over a three-dimensional grid.

    Args:
        body: of a dictionary of references and three block numbers, i32, and with several
            warpgroups the number of this one.
        outs: results by name.
        grid: three numbers of blocks, the first running fastest.
        args: operands by name.
        shared: float32 numbers of shared memory, named "shared"; 0 for none.
        inplace: arrays by name that the kernel changes where they lie; also among the results.
        groups: warpgroups of 128 threads in a block.
    """
    axes = ("x", "y", "z")
    changed = {name: jax.new_ref(array) for name, array in (inplace or {}).items()}
    names = (*changed, *args, *outs, *(["shared"] if shared else []))
    several = {"num_threads": groups, "thread_name": "w"} if groups > 1 else {}
    numbered = (*axes, "w") if groups > 1 else axes

    def kernel(*refs):
        @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * len(names), (_SCALAR,) * len(numbered)))
        def run(ctx, refs, numbers):
            del ctx
            body(dict(zip(names, refs, strict=True)), [ptx.unpack(a)[0] for a in numbers])

        run(tuple(refs), tuple(lax.axis_index(axis) for axis in numbered))

    result = plgpu.kernel(
        kernel,
        out_type=list(outs.values()),
        grid=grid,
        grid_names=axes,
        **several,
        scratch_types=[plgpu.SMEM((shared,), jnp.float32)] if shared else [],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*changed.values(), *args.values())
    changed = {name: jax.freeze(ref) for name, ref in changed.items()}
    return dict(zip(outs, result, strict=True)) | changed


def attention(
    query: jax.Array,
    key: jax.Array | QTensor,
    value: jax.Array | QTensor,
    length: jax.Array,
    positions: jax.Array | None,
    query_positions: jax.Array,
    table: jax.Array | None,
    key_offset: jax.Array | None,
    sinks: jax.Array | None,
    spec: DecodeSpec,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the same as `reference.attention` with the sm90 kernels.

    Args:
      query: [B, T, N, H].
      key: store [B, K, C, H], or pool [B, P, t, H] with a table; value alike.
      value: store.
      length: int32 [B, K].
      positions: int32 [B, K, C], pool: [B, P, t]; None: slots are numbered by their place.
      query_positions: int32 [B, T].
      table: int32 [B, K, M] or None.
      key_offset: float32 [B, K, 1, H] or None.
      sinks: float32 [N] or None.
      spec: static facts.
      config: sizes; None chooses.

    Returns:
      Output [B, T, N, H] in the dtype of `query`, log-sum-exp float32 [B, T, N].
    """
    plan = Plan(
        spec,
        config or Config(),
        pool=0 if table is None else key.shape[1] * key.shape[2],
        positions=positions is not None,
        skips=spec.window is not None and not spec.num_sinks and positions is None,
        zero_point=isinstance(key, QTensor) and key.zero_point is not None,
        bias=key_offset is not None,
        sinks=sinks is not None,
    )
    heads = spec.batch * spec.num_kv_heads
    args = {
        **_turns(plan, length, query_positions),
        "query": query,
        "query_positions": query_positions.astype(jnp.int32),
    }
    if key_offset is not None:
        args["offset"] = key_offset.astype(jnp.float32)
    for name, store in (("k", key), ("v", value)):
        args[name] = store.qvalue if isinstance(store, QTensor) else store
        if isinstance(store, QTensor):
            args[f"{name}_scale"] = store.scale
        if plan.zero_point:
            args[f"{name}_zero"] = store.zero_point
    if plan.positions:
        args["positions"] = positions.astype(jnp.int32)
    if plan.pool:
        args["table"] = table.astype(jnp.int32)
    rows = (plan.blocks + heads, plan.row_blocks * ROWS)
    partial = call(
        functools.partial(_attend, plan),
        {
            "partial": jax.ShapeDtypeStruct((*rows, spec.head_dim), jnp.float32),
            "stats": jax.ShapeDtypeStruct((*rows, 2), jnp.float32),
        },
        (plan.row_blocks, -(-plan.blocks // plan.config.groups), 1),
        args,
        shared=plan.shared * plan.config.groups,
        groups=plan.config.groups,
    )
    args = {"ends": args["ends"], **partial}
    if sinks is not None:
        args["sinks"] = sinks.astype(jnp.float32)
    shape = (spec.batch, spec.q_len, spec.num_heads)
    joined = call(
        functools.partial(join_parts, plan),
        {
            "out": jax.ShapeDtypeStruct((*shape, spec.head_dim), jnp.dtype(spec.dtype)),
            "lse": jax.ShapeDtypeStruct(shape, jnp.float32),
        },
        (plan.rows, heads, 1),
        args,
        shared=JOIN_NUMBERS,
    )
    return joined["out"], joined["lse"]


def _turns(plan: Plan, length, query_positions):
    """Slots that matter per head, turns of all heads up to each, and turns that a head leaves out.

    Without positions, slots after the last query matter to nobody, nor do, in a window without
    sinks, those before the first query's.
    """
    limits = jnp.clip(length.astype(jnp.int32), 0, plan.spec.capacity)
    at = query_positions.astype(jnp.int32)
    if not plan.positions:
        limits = jnp.clip(jnp.max(at, axis=1, keepdims=True) + 1, 0, limits)
    turns, out = -(-limits // plan.turn), {"limits": limits}
    if plan.skips:
        oldest = jnp.min(jnp.where(at < 0, 2**30, at), axis=1, keepdims=True)
        oldest = jnp.maximum(oldest - (plan.spec.window - 1), 0)
        out["skips"] = jnp.minimum(oldest // plan.turn, turns)
        turns = turns - out["skips"]
    # A cumulative sum in one small kernel.
    flat = turns.reshape(-1)
    order = jnp.arange(flat.size)
    out["ends"] = jnp.sum(jnp.where(order <= order[:, None], flat, 0), axis=1)
    return out
