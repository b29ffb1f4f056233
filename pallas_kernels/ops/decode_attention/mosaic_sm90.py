# SPDX-License-Identifier: Apache-2.0
"""Decode attention on Hopper: a cache is read once, in its stored width, straight into registers.

The live slots of all key/value heads, one head after the other, are dealt out evenly to blocks of
four warps: heads of any lengths take the time of their bytes. A block's share may cover the end of
one head and the start of the next. For each, a warp walks over its part:

* ``S = Q K^T`` by ``mma.sync`` m16n8k16. The operand B wants neighbouring channels of a key in a
  thread, so a thread's 16-byte loads of a key are operands as they stand (8- and 4-bit codes after
  they are widened to float16, exactly). The rows of A are up to eight (query head, token) pairs
  that share the key head, and below them what rounding these queries to 16 bits left over.
* ``O^T = V^T P^T``. Scores come out in the layout in which P is the operand B. V^T wants two tokens
  of a channel in a register, which is a byte permutation of two loaded words.

Nothing goes through shared memory until the four warps join their results; a second kernel joins
the blocks' parts by their maxima and sums. K of the next step is loaded when the scores of this
one are done, V when the products are, so that one of them is always on its way.

With scales per slot, ``x_j = s_j q·k_j`` and ``out = Σ_j (p_j t_j) v_j``: p_j t_j is rounded to
float16 after a maximum of ``log2 p_j t_j`` was taken out, so that scales of any size are served.

References: Flash-Decoding (Dao et al., 2023); KIVI (arXiv 2402.02750), section 3; PTX ISA 8.4,
section 9.7.14 (fragments of mma.m16n8k16).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as ptx
from pallas_kernels._device import current_device
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ops.decode_attention.spec import DecodeSpec

HEAD_DIMS = (64, 128)
ROWS = 8  # query rows of one block: the columns of the second product
WARPS = 4
UNIT = 16  # tokens of one mma
NO_MAX = -1e30  # finite, so that a difference of two is never NaN
# P is at most 2^8 when the maximum moves, which it does when P would be above 2^12: what float16
# holds below 1 is used for small P, and sums are rarely multiplied.
HEADROOM, SLACK = 8.0, 4.0
LOG2E = math.log2(math.e)
RING_BYTES = 65536  # of shared memory for a block's copies; three blocks share 227 KB
JOIN_NUMBERS = 4 * 128 + 2 * 8  # four channels per thread; maximum and sum of up to eight teams
_SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Store:
    """How codes lie in memory and what they are computed as.

    Args:
        bits: per code.
        half: 16-bit type of the products.
        order: channels of eight codes in the order in which widening yields them.
        tile: channels that share an e4m3 scale; 0 for one float32 scale per slot, or none.
        whole: keys are multiplied as integers, and values as float16 with something added.
    """

    bits: int
    half: str = "float16"
    order: tuple[int, ...] = tuple(range(8))
    tile: int = 0
    whole: bool = False


_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
STORES = {
    "bfloat16": Store(16, "bfloat16"),
    "float16": Store(16),
    "int8": Store(8, whole=True),
    "fp8_e4m3": Store(8),
    "fp8_e5m2": Store(8),
    "int4": Store(4, order=_NIBBLES, whole=True),
    "nvfp4": Store(4, order=_NIBBLES, tile=16),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that change speed only.

    Args:
        blocks: blocks among which the slots are dealt out; None: six for every multiprocessor.
        units: units of 16 tokens in a warp's step; None chooses.
        groups: blocks that are launched as one, which bounds their registers to a share each.
        stages: steps of a warp whose copies are on their way; None chooses.
        cache: how copies of the cache treat L2, a PTX qualifier.
        at_once: parts of a head whose loads are in flight together where parts are joined.
    """

    blocks: int | None = None
    units: int | None = None
    groups: int = 1
    stages: int | None = None
    cache: str = ""
    at_once: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of the kernels.

    Args:
        spec: the call.
        config: sizes.
        pool: slots of a batch entry's pool of tiles, or 0 where slots lie in order.
        positions: every slot has a position; else it is the slot's number.
        skips: turns before the window of the first query are left out.
        zero_point: codes have zero points.
        bias: keys have an offset.
        sinks: heads have a sink logit.
    """

    spec: DecodeSpec
    config: Config
    pool: int = 0
    positions: bool = False
    skips: bool = False
    zero_point: bool = False
    bias: bool = False
    sinks: bool = False

    @property
    def store(self) -> Store:
        """Facts about the format."""
        return STORES[self.spec.store]

    @property
    def scaled(self) -> bool:
        """Slots have float32 scales."""
        return self.store.bits < 16 and not self.store.tile

    @property
    def limbs(self) -> int:
        """Bytes of a query's numbers where they are multiplied as integers."""
        return 3 if self.spec.dtype == "float32" else 2

    @property
    def rows(self) -> int:
        """Query rows that share a key head."""
        return self.spec.groups * self.spec.q_len

    @property
    def row_blocks(self) -> int:
        """Blocks of `ROWS`; each reads the cache."""
        return -(-self.rows // ROWS)

    @property
    def row_bytes(self) -> int:
        """Bytes of a slot's codes."""
        return self.spec.head_dim * self.store.bits // 8

    @property
    def units(self) -> int:
        """Units of a step, which lies in one tile; three blocks share the registers there are."""
        units = self.config.units or 128 // self.spec.head_dim
        return math.gcd(units, self.spec.tile // UNIT) if self.spec.tile else units

    @property
    def step(self) -> int:
        """Tokens of a warp's step."""
        return UNIT * self.units

    @property
    def turn(self) -> int:
        """Tokens of a step of a block's warps: slots are dealt out in these."""
        return WARPS * self.step

    @property
    def step_bytes(self) -> int:
        """Bytes of K, or of V, in a warp's step."""
        return self.step * self.row_bytes

    @property
    def stages(self) -> int:
        """Steps in shared memory, so many that three blocks fill it."""
        ring = RING_BYTES * 3 // max(self.config.groups, 3)
        return self.config.stages or min(ring // (2 * WARPS * self.step_bytes), 8)

    @property
    def shared(self) -> int:
        """float32 numbers of shared memory: copies on their way, later what warps join."""
        ring = 2 * WARPS * self.stages * self.step_bytes // 4
        return max(ring, WARPS * ROWS * (self.spec.head_dim + 3))

    @property
    def at_once(self) -> int:
        """Parts that a thread loads together where parts are joined."""
        heads = self.spec.batch * self.spec.num_kv_heads
        teams = 512 // self.spec.head_dim
        return self.config.at_once or min(max(-(-self.blocks // (heads * teams)), 2), 16)

    @property
    def blocks(self) -> int:
        """Blocks among which the slots are dealt out."""
        spec = self.spec
        heads = spec.batch * spec.num_kv_heads
        # Twice what is resident: 7 % faster than once for INT8, as SMs differ in speed.
        wanted = self.config.blocks or 6 * (current_device().num_sms or 132)
        if spec.split is not None:
            wanted = -(-heads * spec.capacity // spec.split)
        return min(wanted, heads * -(-spec.capacity // self.turn))


def unsupported_reason(spec: DecodeSpec) -> str | None:
    """Why the kernel does not serve a call, or None.

    >>> unsupported_reason(DecodeSpec(1, 1, 64, 2, 1, 16, "float32", "int8", 0.25))
    'the sm90 decode kernel serves head_dim 64 and 128; got 16'
    """
    if spec.head_dim not in HEAD_DIMS:
        return f"the sm90 decode kernel serves head_dim 64 and 128; got {spec.head_dim}"
    if spec.store not in STORES:
        names = ", ".join(STORES)
        return f"the sm90 decode kernel reads caches stored as {names}; got {spec.store}"
    if spec.dtype not in ("bfloat16", "float16", "float32"):
        return f"the sm90 decode kernel takes 16- and 32-bit queries; got {spec.dtype}"
    if not spec.plain:
        return (
            "the sm90 decode kernel takes key and value stored alike, with one float32 scale per "
            "slot (nvfp4: one e4m3 scale per 16 channels) and packed 4-bit codes"
        )
    if not spec.capacity:
        return "the sm90 decode kernel takes caches of at least one slot"
    if spec.tile % UNIT:
        return f"the sm90 decode kernel takes tiles of a multiple of 16 slots; got {spec.tile}"
    if spec.batch * spec.num_kv_heads > 65535:
        return (
            "the sm90 decode kernel takes up to 65535 rows times key heads; got "
            f"{spec.batch * spec.num_kv_heads}"
        )
    return None


# -- what one thread does --------------------------------------------------------------------------


def _word(value: int):
    """A constant of 32 bits, given without sign."""
    return ptx.i32(value - 2**32 if value >= 2**31 else value)


def bytes_at(index, size: int):
    """Offset in bytes, i64, of an item."""
    return ptx.mul(ptx.widen(index), ptx.i64(size))


def load(ref, offset, size: int, cache: str = "", outs: str | None = None):
    """The 4, 8 or 16 bytes at an offset as words."""
    n = size // 4
    names = ", ".join(f"${i}" for i in range(n))
    names = names if n == 1 else f"{{{names}}}"
    width = "" if n == 1 else f".v{n}"
    text = f"ld.global.nc{cache}{width}.b32 {names}, [${n}];"
    return ptx.asm(text, outs or "r" * n, [ptx.address(ref, offset)], effects=True)


def read_shared(ref, offset, n: int, kind: str = "f", shift: int = 0):
    """Floats or words of shared memory."""
    names = ", ".join(f"${i}" for i in range(n))
    target, width = ("$0", "") if n == 1 else (f"{{{names}}}", f".v{n}")
    text = f"ld.shared{width}.b32 {target}, [${n}+{shift}];"
    return ptx.asm(text, kind * n, [ptx.address(ref, offset)], effects=True)


def copy(ref, offset, shared, place, size: int, cache: str, shift: tuple[int, int]):
    """Starts a copy of 4, 8 or 16 bytes to shared memory; ``shift`` is added to both offsets."""
    kind = "cg" if size == 16 else "ca"
    text = f"cp.async.{kind}.shared.global{cache} [$0+{shift[1]}], [$1+{shift[0]}], {size};"
    ptx.asm(text, "", [ptx.address(shared, place), ptx.address(ref, offset)], effects=True)


def commit():
    """Makes a group of the copies that the thread started since the last one."""
    ptx.asm("cp.async.commit_group;", "", [], effects=True)


def wait(groups: int):
    """Waits for the thread's copies but those of the last ``groups`` groups."""
    ptx.asm(f"cp.async.wait_group {groups};", "", [], effects=True)


def barrier(group=None):
    """Waits for the block's four warps, or those of one warpgroup of it."""
    if group is None:
        ptx.asm("bar.sync 0;", "", [], effects=True)
    else:
        ptx.asm("bar.sync $0, 128;", "", [ptx.add(group, ptx.i32(1))], effects=True)


def from_lane(x, lane):
    """The value of another lane of the warp."""
    return ptx.asm("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "f", [x, lane], effects=True)[0]


def permute(a, b, selector: int):
    """Four bytes out of eight."""
    return ptx.asm(f"prmt.b32 $0, $1, $2, {selector};", "r", [a, b])[0]


def mma(acc, a, b, half: str):
    """``acc + A B`` for A [16, 16] and B [16, 8]."""
    name = {"bfloat16": "bf16", "float16": "f16"}[half]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{$0, $1, $2, $3}}, "
        "{$8, $9, $10, $11}, {$12, $13}, {$0, $1, $2, $3};"
    )
    return ptx.asm(text, "", [*a, *b], tied=acc, effects=True)


def mma_whole(acc, a, b):
    """``acc + A B`` in integers for A [16, 32] and B [32, 8]."""
    text = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $1, $2, $3}, "
        "{$8, $9, $10, $11}, {$12, $13}, {$0, $1, $2, $3};"
    )
    return ptx.asm(text, "", [*a, *b], tied=acc, effects=True)


def bytes_of(words, which: int):
    """One byte of each of some words, four in a word."""
    near, found = 0x11 * which + 0x40, []
    for i in range(0, len(words), 4):
        a, b, c, d = words[i : i + 4]
        found.append(permute(permute(a, b, near), permute(c, d, near), 0x5410))
    return found


def _and_xor(word, mask: int, other: int):
    """``(word & mask) ^ other``."""
    text = "{ .reg .b32 t; and.b32 t, $1, $2; xor.b32 $0, t, $3; }"
    return ptx.asm(text, "r", [word, _word(mask), _word(other)])[0]


def whole_keys(store: str, words):
    """Codes of a key as bytes, in the order of `Store.order`; those of int4 times 16."""
    if store == "int8":
        return words
    text = "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, $3; and.b32 $1, $2, $3; }"
    return [part for word in words for part in ptx.asm(text, "rr", [word, _word(0xF0F0F0F0)])]


# Of the even and the odd channels of `whole_values`: what was added, and the factor before.
ADDED = {"int8": ((1152.0, 1.0), (1152.0, 1.0)), "int4": ((1032.0, 1.0), (1152.0, 16.0))}


def whole_values(store: str, first, second):
    """Codes of two tokens as words (first's, second's) of float16, one per channel, in order.

    A code is the mantissa of 1024 and what makes it positive: see `ADDED`.
    """
    out = []
    for a, b in zip(first, second, strict=True):
        if store == "int8":
            pairs = [permute(a, b, selector) for selector in (0x4400, 0x5511, 0x6622, 0x7733)]
            out += [_and_xor(pair, 0x00FF00FF, 0x64806480) for pair in pairs]
            continue
        for selector in (0x5410, 0x7632):
            low = permute(a, b, selector)
            for word in (low, ptx.shr(low, ptx.i32(8))):
                out += [_and_xor(word, 0x000F000F, 0x64086408)]
                out += [_and_xor(word, 0x00F000F0, 0x64806480)]
    return out


def _code_bytes(store: str, word):
    """A word of codes as words of one code per byte.

    Integers are biased to be unsigned; e2m1 has its bits where those of a float16 are.
    """
    if store == "nvfp4":
        text = (
            "{ .reg .b32 s, v; shl.b32 s, $2, 4; and.b32 s, s, $3; shl.b32 v, $2, 1;\n"
            "and.b32 v, v, $4; or.b32 $0, s, v;\n"
            "and.b32 s, $2, $3; shr.u32 v, $2, 3; and.b32 v, v, $4; or.b32 $1, s, v; }"
        )
        return ptx.asm(text, "rr", [word, _word(0x80808080), _word(0x0E0E0E0E)])
    if store == "int8":
        return [ptx.asm("xor.b32 $0, $1, $2;", "r", [word, _word(0x80808080)])[0]]
    if store == "int4":
        text = (
            "{ .reg .b32 t; xor.b32 t, $2, $3; and.b32 $0, t, $4;\n"
            "shr.u32 t, t, 4; and.b32 $1, t, $4; }"
        )
        return ptx.asm(text, "rr", [word, _word(0x88888888), _word(0x0F0F0F0F)])
    return [word]


def _widened(store: str, word):
    """Four codes, a byte each, as two words of two float16."""
    if store == "nvfp4":  # the byte is the upper one of a float16 2^14 times too small
        text = (
            "{ .reg .b32 lo, hi; prmt.b32 lo, $2, $3, 5124; prmt.b32 hi, $2, $3, 13348;\n"
            "mul.rn.f16x2 $0, lo, $4; mul.rn.f16x2 $1, hi, $4; }"
        )
        return ptx.asm(text, "rr", [word, ptx.i32(0), _word(0x74007400)])
    if store.startswith("fp8"):
        kind = store.removeprefix("fp8_")
        text = (
            f"{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, $2;\n"
            f"cvt.rn.f16x2.{kind}x2 $0, lo; cvt.rn.f16x2.{kind}x2 $1, hi; }}"
        )
        return ptx.asm(text, "rr", [word])
    # The byte is the mantissa of 1024 + code + bias; no rounding anywhere.
    text = (
        "{ .reg .b32 lo, hi; prmt.b32 lo, $2, $3, 16704; prmt.b32 hi, $2, $3, 17218;\n"
        "sub.rn.f16x2 $0, lo, $4; sub.rn.f16x2 $1, hi, $4; }"
    )
    offset = _word(0x64806480 if store == "int8" else 0x64086408)  # 1024 + 128, 1024 + 8
    return ptx.asm(text, "rr", [word, _word(0x64646464), offset])


def _tile_scales(a, b=None):
    """Two e4m3 scales as float16: those in the lower bytes of a word, or of two words."""
    pair = a if b is None else permute(a, b, 0x0040)
    text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.rn.f16x2.e4m3x2 $0, lo; }"
    return ptx.asm(text, "r", [pair])[0]


def _times(word, scales):
    """Products of two pairs of float16; those of e2m1 and e4m3 are exact."""
    return ptx.asm("mul.rn.f16x2 $0, $1, $2;", "r", [word, scales])[0]


def key_pairs(store: str, words):
    """Codes of one key as words of two 16-bit numbers, in the order of `Store.order`.

    With scales per tile the last word holds those of the codes' tiles.
    """
    if STORES[store].bits == 16:
        return words
    *words, tiles = words if STORES[store].tile else (*words, None)
    pairs = [[pair for part in _code_bytes(store, word) for pair in _widened(store, part)]
             for word in words]  # fmt: skip
    if tiles is not None:
        scales = _tile_scales(tiles)
        scales = [permute(scales, scales, selector) for selector in (0x1010, 0x3232)]
        per = STORES[store].tile * STORES[store].bits // 32  # words of a tile
        pairs = [[_times(pair, scales[i // per]) for pair in some] for i, some in enumerate(pairs)]
    return [pair for some in pairs for pair in some]


def value_pairs(store: str, first, second):
    """Codes of two tokens as words (first's, second's), one per channel, in `Store.order`.

    With scales per tile the last words hold that of the codes' tile.
    """
    scales = None
    if STORES[store].tile:
        *first, a = first
        *second, b = second
        scales = _tile_scales(a, b)
    out = []
    for a, b in zip(first, second, strict=True):
        if STORES[store].bits == 16:
            out += [permute(a, b, 0x5410), permute(a, b, 0x7632)]
            continue
        parts = zip(_code_bytes(store, a), _code_bytes(store, b), strict=True)
        for x, y in parts:
            for selector in (0x5140, 0x7362):
                out += _widened(store, permute(x, y, selector))
    return out if scales is None else [_times(pair, scales) for pair in out]


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
        self.limit = _int_at(refs["limits"], head)
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
        """The tile that a step lies in; -1 for none; 0 where there are no tiles."""
        spec = self.plan.spec
        if not self.plan.pool:
            return ptx.i32(0)
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
        """What the thread holds of a step: tokens, its place in a row, bytes of a piece, lanes."""
        units = range(0, self.plan.step, UNIT)
        if name == "k":
            tokens = [ptx.add(self.k_token, ptx.i32(u + 2 * e)) for u in units for e in range(2)]
            return tokens, self.c, self.k_width, 4
        tokens = [ptx.add(self.v_token, ptx.i32(u + t)) for u in units for t in range(4)]
        return tokens, self.g, self.v_width, 8

    def _slot(self, name, i, width):
        """Where in shared memory the thread's first piece of a step lies: pieces of lanes mix."""
        plan = self.plan
        stage = ptx.add(ptx.mul(self.warp, ptx.i32(plan.stages)), ptx.rem(i, ptx.i32(plan.stages)))
        place = ptx.mul(stage, ptx.i32(2 * plan.step_bytes))
        place = ptx.add(place, ptx.mul(self.lane, ptx.i32(width)))
        place = ptx.add(ptx.widen(place), ptx.i64(plan.step_bytes * (name == "v")))
        return ptx.add(self.shared, place)

    def fetch(self, name, i, page):
        """Starts the copies of the thread's part of K or V of a step, as one group."""
        plan, start = self.plan, self.start(i)
        tokens, place, width, lanes = self._pieces(name)
        slot, count = self._slot(name, i, width), plan.row_bytes // (lanes * width)
        for n, token in enumerate(tokens):
            offset = bytes_at(self.row(start, page, token), plan.row_bytes)
            offset = ptx.add(offset, bytes_at(place, width))
            for j in range(count):
                shift = (j * lanes * width, (n * count + j) * 32 * width)
                copy(self.refs[name], offset, self.refs["shared"], slot, width,
                     plan.config.cache, shift)  # fmt: skip
        commit()

    def words(self, name, i, facts):
        """Words of K [unit][2] or of V [unit][4] of a step whose copies have arrived.

        With scales per tile the last word of each holds those of its codes.
        """
        plan = self.plan
        tokens, _, width, lanes = self._pieces(name)
        slot, count = self._slot(name, i, width), plan.row_bytes // (lanes * width)
        found = [
            [
                word
                for j in range(count)
                for word in read_shared(
                    self.refs["shared"], slot, width // 4, "r", (n * count + j) * 32 * width
                )
            ]
            for n in range(len(tokens))
        ]
        if plan.store.tile:
            found = [[*some, s] for some, s in zip(found, facts[f"{name}_scale"], strict=True)]
        each = len(tokens) // plan.units
        return [found[u : u + each] for u in range(0, len(tokens), each)]

    def tile_scales(self, name, i, page):
        """Scales of the tiles that the thread's codes of every token of a step lie in."""
        plan, start = self.plan, self.start(i)
        tokens, place, _, lanes = self._pieces(name)
        # Lanes and tiles share the row: so many tiles per lane, or lanes per tile.
        tiles = plan.spec.head_dim // plan.store.tile
        size = max(tiles // lanes, 1)
        place = ptx.div(ptx.mul(place, ptx.i32(tiles)), ptx.i32(lanes))
        text, ref = f"ld.global.nc.u{8 * size} $0, [$1];", self.refs[f"{name}_scale"]
        found = []
        for token in tokens:
            where = bytes_at(self.row(start, page, token), tiles)
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
            factor, inverse = _power_above(self._over_row(ptx.fmax, [ptx.fabs(v) for v in x]))
            x = [ptx.fmul(value, inverse) for value in x]
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

        Those are 2^14 (or 2^22) at most: the bits of a bfloat16 down to 2^-7 of the largest one.
        """
        plan, f32 = self.plan, ptx.f32
        factor, inverse = _power_above(self._over_row(ptx.fmax, [ptx.fabs(v) for v in x]))
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
                ones = [_word(0x3C003C00)] * 2
                first, second = [*first, *ones], [*second, *ones]
            for j in range(len(out)):
                a = [*first[2 * j : 2 * j + 2], *second[2 * j : 2 * j + 2]]
                out[j] = mma(out[j], a, operand[u], plan.store.half)
        return out

    def centred(self, out):
        """Without what `whole_values` added: the last tile has the sum of P, of `tiles` of ones."""
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


def halves(word, half: str):
    """Two float32 from two 16-bit numbers."""
    if half == "bfloat16":
        text = (
            "{ .reg .b32 lo, hi; shl.b32 lo, $2, 16; and.b32 hi, $2, -65536;\n"
            "mov.b32 $0, lo; mov.b32 $1, hi; }"
        )
    else:
        text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }"
    return ptx.asm(text, "ff", [word])


def _power_above(x):
    """The power of two above a number (within 2^±124), and its inverse."""
    bits = ptx.asm("{ .reg .b32 t; mov.b32 t, $1; shr.u32 $0, t, 23; }", "r", [x])[0]
    bits = ptx.imin(ptx.imax(bits, ptx.i32(2)), ptx.i32(250))
    exponents = ptx.add(bits, ptx.i32(1)), ptx.sub(ptx.i32(253), bits)
    text = "{ .reg .b32 t; shl.b32 t, $1, 23; mov.b32 $0, t; }"
    return [ptx.asm(text, "f", [e])[0] for e in exponents]


def _int_at(ref, index):
    return load(ref, bytes_at(index, 4), 4)[0]


# -- who computes what -----------------------------------------------------------------------------


class _Shares:
    """How the turns of all heads, numbered through, are dealt out.

    The first ``rest`` blocks take ``size + 1`` turns, the others ``size``. With fewer turns than
    blocks, some blocks take none. A block's part of a head is number ``block + head``: from one
    part to the next exactly one of the two grows.
    """

    def __init__(self, plan: Plan, refs):
        self.plan, self.ends = plan, refs["ends"]
        self.heads = plan.spec.batch * plan.spec.num_kv_heads
        turns = self.end_of(ptx.i32(self.heads - 1))
        self.blocks = ptx.imin(turns, ptx.i32(plan.blocks))
        divisor = ptx.imax(self.blocks, ptx.i32(1))
        self.size, self.rest = ptx.div(turns, divisor), ptx.rem(turns, divisor)

    def end_of(self, head):
        """Turns of all heads up to this one."""
        return _int_at(self.ends, head)

    def start_of(self, head):
        """Turns of all heads before this one."""
        before = self.end_of(ptx.imax(ptx.sub(head, ptx.i32(1)), ptx.i32(0)))
        return ptx.select(ptx.eq(head, ptx.i32(0)), ptx.i32(0), before)

    def of(self, block):
        """First turn of a block, and how many."""
        start = ptx.add(ptx.mul(block, self.size), ptx.imin(block, self.rest))
        more = ptx.flag(ptx.lt(block, self.rest))
        return start, ptx.add(self.size, more)

    def block_of(self, turn):
        """The block that a turn belongs to."""
        wide = ptx.add(self.size, ptx.i32(1))
        edge = ptx.mul(self.rest, wide)
        beyond = ptx.imax(ptx.sub(turn, edge), ptx.i32(0))
        beyond = ptx.add(self.rest, ptx.div(beyond, ptx.imax(self.size, ptx.i32(1))))
        return ptx.select(ptx.lt(turn, edge), ptx.div(turn, wide), beyond)

    def heads_of(self, turns):
        """The head that each of some turns belongs to: heads that end before it come first."""
        lane = ptx.rem(ptx.thread(), ptx.i32(32))

        def count(i, counts):
            for j in range(4):
                head = ptx.add(ptx.mul(i, ptx.i32(128)), ptx.i32(32 * j))
                head = ptx.add(head, lane)
                exists = ptx.lt(head, ptx.i32(self.heads))
                end = self.end_of(ptx.imin(head, ptx.i32(self.heads - 1)))
                counts = [
                    ptx.add(n, ptx.flag(ptx.both(exists, ptx.ge(turn, end))))
                    for n, turn in zip(counts, turns, strict=True)
                ]
            return counts

        counts = ptx.loop(pl.cdiv(self.heads, 128), count, [ptx.i32(0)] * len(turns))
        for distance in (1, 2, 4, 8, 16):
            counts = [ptx.add(n, ptx.shuffle_xor(n, distance)) for n in counts]
        return counts


# -- the main kernel -------------------------------------------------------------------------------


def _attend(plan: Plan, refs, axes):
    """What a block does: parts of neighbouring heads, for up to eight rows of each."""
    row_block, block, _, *group = axes
    group = group[0] if group else None
    if group is not None:
        block = ptx.add(ptx.mul(block, ptx.i32(plan.config.groups)), group)
    shares = _Shares(plan, refs)

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
                first = ptx.add(first, _int_at(refs["skips"], head))

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


# -- the kernel that joins parts -------------------------------------------------------------------


def _join_parts(plan: Plan, refs, axes):
    """What a block does: a row of a head, four channels per thread; teams share its parts out."""
    i32, quads, at_once = ptx.i32, plan.spec.head_dim // 4, plan.at_once
    teams = 128 // quads
    row, head, _ = axes
    tid = ptx.thread()
    team, quad = ptx.div(tid, i32(quads)), ptx.rem(tid, i32(quads))
    shares = _Shares(plan, refs)
    start, end = shares.start_of(head), shares.end_of(head)
    first = shares.block_of(start)
    count = ptx.sub(shares.block_of(ptx.sub(end, i32(1))), first)
    count = ptx.select(ptx.lt(start, end), ptx.add(count, i32(1)), i32(0))

    def step(i, s):
        parts = []
        for j in range(at_once):
            number = ptx.add(ptx.mul(i, i32(at_once)), i32(j))
            number = ptx.add(ptx.mul(number, i32(teams)), team)
            here = ptx.add(first, ptx.imin(number, ptx.sub(count, i32(1))))
            index = ptx.add(here, head)
            index = ptx.add(ptx.mul(index, i32(plan.row_blocks * ROWS)), row)
            stats = load(refs["stats"], bytes_at(index, 8), 8, outs="ff")
            index = ptx.add(ptx.mul(index, i32(quads)), quad)
            values = load(refs["partial"], bytes_at(index, 16), 16, outs="ffff")
            parts.append((ptx.lt(number, count), stats, values))
        zero, low = ptx.f32(0.0), ptx.f32(NO_MAX)
        tops = [ptx.select(ok, m, low) for ok, (m, _), _ in parts]
        m = functools.reduce(ptx.fmax, tops, s["m"])
        alpha = ptx.exp2(ptx.fsub(s["m"], m))
        total, out = ptx.fmul(s["l"], alpha), [ptx.fmul(x, alpha) for x in s["out"]]
        for (ok, (_, part), values), top in zip(parts, tops, strict=True):
            part = ptx.select(ok, part, zero)
            factor = ptx.exp2(ptx.fsub(top, m))
            total = ptx.fma(part, factor, total)
            out = [ptx.fma(ptx.select(ok, x, zero), factor, y)
                   for x, y in zip(values, out, strict=True)]  # fmt: skip
        return {"m": m, "l": total, "out": out}

    state = {"m": ptx.f32(NO_MAX), "l": ptx.f32(0.0), "out": [ptx.f32(0.0)] * 4}
    rounds = ptx.div(ptx.add(count, i32(at_once * teams - 1)), i32(at_once * teams))
    state = _join_teams(refs["shared"], ptx.loop(rounds, step, state), team, quad, teams)
    _finish(plan, refs, (row, quad, head, ptx.eq(team, i32(0))), state)


def _join_teams(shared, state, team, quad, teams: int):
    """Adds the teams' results in shared memory: maxima and sums, then four channels a thread."""
    i32, quads, sums = ptx.i32, 128 // teams, 16 * 128

    def numbers(base):
        return [read_shared(shared, ptx.i64(base + 4 * t), 1)[0] for t in range(teams)]

    ptx.store(shared, ptx.add(bytes_at(team, 4), ptx.i64(sums)), [state["m"]], space="shared")
    barrier()
    m = functools.reduce(ptx.fmax, numbers(sums))
    factor = ptx.exp2(ptx.fsub(state["m"], m))
    place = ptx.add(bytes_at(team, 4), ptx.i64(sums + 4 * teams))
    ptx.store(shared, place, [ptx.fmul(state["l"], factor)], space="shared")
    index = ptx.add(ptx.mul(team, i32(quads)), quad)
    ptx.store(shared, bytes_at(index, 16), [ptx.fmul(x, factor) for x in state["out"]],
              space="shared")  # fmt: skip
    barrier()
    parts = [read_shared(shared, bytes_at(ptx.add(quad, i32(t * quads)), 16), 4)
             for t in range(teams)]  # fmt: skip
    out = [functools.reduce(ptx.fadd, x) for x in zip(*parts, strict=True)]
    return {"m": m, "l": functools.reduce(ptx.fadd, numbers(sums + 4 * teams)), "out": out}


def _finish(plan: Plan, refs, where, state):
    """Adds the sink, divides by the sum, and writes output and log-sum-exp."""
    spec, i32 = plan.spec, ptx.i32
    row, quad, head, mine = where
    m, total, out = state["m"], state["l"], state["out"]
    group, token = ptx.div(row, i32(spec.q_len)), ptx.rem(row, i32(spec.q_len))
    entry = ptx.div(head, i32(spec.num_kv_heads))
    name = ptx.rem(head, i32(spec.num_kv_heads))
    name = ptx.add(ptx.mul(name, i32(spec.groups)), group)
    if plan.sinks:
        sink = load(refs["sinks"], bytes_at(name, 4), 4, outs="f")[0]
        sink = ptx.fmul(sink, ptx.f32(LOG2E))
        top = ptx.fmax(m, sink)
        alpha = ptx.exp2(ptx.fsub(m, top))
        total = ptx.fadd(ptx.fmul(total, alpha), ptx.exp2(ptx.fsub(sink, top)))
        m, out = top, [ptx.fmul(x, alpha) for x in out]
    empty = ptx.feq(total, ptx.f32(0.0))
    total = ptx.select(empty, ptx.f32(1.0), total)
    out = [ptx.fdiv(x, total) for x in out]
    lse = ptx.fmul(ptx.fadd(m, ptx.log2(total)), ptx.f32(1 / LOG2E))
    lse = ptx.select(empty, ptx.f32(-math.inf), lse)
    index = ptx.add(ptx.mul(entry, i32(spec.q_len)), token)
    index = ptx.add(ptx.mul(index, i32(spec.num_heads)), name)
    ptx.store(refs["lse"], bytes_at(index, 4), [lse], ptx.both(mine, ptx.eq(quad, i32(0))))
    index = ptx.add(ptx.mul(index, i32(spec.head_dim // 4)), quad)
    if spec.dtype != "float32":
        out = [ptx.half_x2(pair, spec.dtype) for pair in (out[:2], out[2:])]
    ptx.store(refs["out"], bytes_at(index, 4 * len(out)), out, mine)


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
        functools.partial(_join_parts, plan),
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
