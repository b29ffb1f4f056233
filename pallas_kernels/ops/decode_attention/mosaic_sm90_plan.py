# SPDX-License-Identifier: Apache-2.0
"""Static facts of the sm90 decode kernels: formats, sizes, and who computes which part."""

from __future__ import annotations

import dataclasses
import math

from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels._device import current_device
from pallas_kernels.ops.decode_attention.mosaic_sm90_codes import STORES, Store, int_at
from pallas_kernels.ops.decode_attention.spec import DecodeSpec

HEAD_DIMS = (64, 128)
ROWS = 8  # query rows of one block: the columns of the second product
WARPS = 4
UNIT = 16  # tokens of one mma
NO_MAX = -1e30  # finite, so that a difference of two is never NaN
LOG2E = math.log2(math.e)
RING_BYTES = 65536  # of shared memory for a block's copies; three blocks share 227 KB


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that change speed only.

    Args:
        blocks: blocks among which the slots are dealt out; None: three for every multiprocessor.
        units: units of 16 tokens in a warp's step; None chooses.
        groups: blocks that are launched as one: three have a third of the registers each, where the
            compiler would take more and leave room for two.
        stages: steps of a warp whose copies are on their way; None chooses.
        at_once: parts of a head whose loads are in flight together where parts are joined.
    """

    blocks: int | None = None
    units: int | None = None
    groups: int = 3
    stages: int | None = None
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
        # What is resident: twice as many took 2 to 7 % longer on an H200.
        wanted = self.config.blocks or 3 * (current_device().num_sms or 132)
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


class Shares:
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
        return int_at(self.ends, head)

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
