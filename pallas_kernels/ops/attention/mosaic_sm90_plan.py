# SPDX-License-Identifier: Apache-2.0
"""Sizes of the Hopper attention kernel, and which block computes what."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.masks import EMPTY, FULL, BlockMask, Mask
from pallas_kernels.ops.attention.mosaic_sm90_tile import ROWS, Variant

TILE_OVERHEAD = 0.7  # start and end of a query tile, in K/V tiles
SMEM_LIMIT = 232_448 - 2048  # bytes a block may use, less barriers and alignment
SCHEDULES = ("hold", "eager", "ahead", "none")
REGISTERS = 65536  # per multiprocessor
FAR = 2**30  # stands for no bound in arrays of bounds
# The product of P and V is made in parts of this many columns: a whole one of 192 or 256 columns
# would need more registers than a thread has.
PART = {64: 64, 96: 96, 128: 128, 192: 96, 256: 128}


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles and schedule of the kernel.

    Args:
        num_compute: compute warpgroups per block, each with 64 query rows.
        block_kv: keys per tile: 64, 128 or 256.
        num_stages: K/V tiles held in shared memory.
        qk_split: products that make up one tile of scores; 2 takes the maxima of the first half
            while the second is multiplied.
        schedule: "hold" passes a token so that one warpgroup at a time uses the tensor core,
            "eager" (gradients only) passes it on before the products are done, "ahead" does so with
            the next tile's first products behind this one's last, "none" leaves it to chance.
        persistent: one block per multiprocessor walks over many query tiles.
        head_group: heads whose query tiles are interleaved; their K and V should fit the L2 cache.
        registers: registers per thread of a compute warpgroup.
        memory_registers: registers per thread of the memory warpgroup.
        num_sms: blocks of a persistent grid.
        fuse_q: quantise Q in the kernel, which saves writing and reading its codes. The 16-bit rows
            of the next query tile wait in shared memory.

    Raises:
        ValueError: sizes that the instruction or the register file cannot take.

    >>> Config().block_q
    128
    """

    num_compute: int = 2
    block_kv: int = 256
    num_stages: int = 2
    qk_split: int = 2
    schedule: str = "hold"
    persistent: bool = True
    head_group: int = 8
    registers: int = 232
    memory_registers: int = 40
    num_sms: int = 132
    fuse_q: bool = True

    def __post_init__(self):
        if self.block_kv not in (64, 128, 256):
            raise ValueError(f"block_kv must be 64, 128 or 256 keys; got {self.block_kv}")
        if self.num_compute not in (2, 3):
            raise ValueError(f"num_compute must be 2 or 3; got {self.num_compute}")
        if self.qk_split not in (1, 2):
            raise ValueError(f"qk_split must be 1 or 2; got {self.qk_split}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}; got {self.schedule!r}")
        if self.num_stages < 2:
            raise ValueError(f"num_stages must be at least 2; got {self.num_stages}")
        for name in ("registers", "memory_registers"):
            count = getattr(self, name)
            if count % 8 or not 24 <= count <= 240:
                raise ValueError(f"{name} must be a multiple of 8 from 24 to 240; got {count}")
        self._check_registers()

    def _check_registers(self):
        """A warpgroup that asks for more than is left waits for ever: nothing else reports it."""
        groups = self.num_compute + 1
        # A block starts with the same number for each thread, a multiple of 8, and shares out that.
        start = REGISTERS // (128 * groups) // 8 * 8
        used = self.num_compute * self.registers + self.memory_registers
        if used > groups * start:
            raise ValueError(
                f"{self.num_compute} x {self.registers} + {self.memory_registers} registers are "
                f"{used} for every 128 threads; a block of {groups} warpgroups starts with "
                f"{groups} x {start} = {groups * start}"
            )
        if self.registers < start or self.memory_registers > start:
            raise ValueError(
                f"registers must be at least, and memory_registers at most, the {start} that a "
                f"thread starts with; got {self.registers} and {self.memory_registers}"
            )

    @property
    def block_q(self) -> int:
        """Query rows per block."""
        return self.num_compute * ROWS

    def smem_bytes(self, head_dim: int, variant: Variant | None = None) -> int:
        """Shared memory of one block.

        Args:
            head_dim: H, a key of `HEAD_DIMS`.
            variant: formats; None is INT8 and FP8.

        Returns:
            Bytes, barriers not counted.

        >>> Config(fuse_q=False).smem_bytes(128)
        184832
        """
        variant = variant or Variant()
        v_rows = head_dim + variant.ones
        stage = self.block_kv * (head_dim * variant.qk_bytes + v_rows * variant.pv_bytes)
        row = head_dim * variant.qk_bytes + PART[head_dim] * 2 + 4
        if self.fuse_q and variant.qk != "half":
            row += head_dim * 2 + 8
        return self.num_stages * stage + self.block_q * row


def heuristic(
    variant: Variant, head_dim: int, segmented: bool = False, block_kv: int | None = None
) -> Config:
    """Sizes that fit registers and shared memory untuned.

    Args:
        variant: formats.
        head_dim: H, a key of `PART`.
        segmented: there are segment ids, which need a register for each column.
        block_kv: keys per tile, or None to choose.

    Returns:
        A `Config`.

    >>> heuristic(Variant(qk="half", pv="half"), 256).block_kv
    64
    """
    if block_kv is None:
        block_kv = 256 if variant.pv == "e4m3" and not segmented and head_dim <= 128 else 128
        if variant.pv == "half" and head_dim > 128:
            block_kv = 64
    split = 1 if block_kv == 64 else 2
    # At head_dim 64 more of the time goes into the softmax; 8 registers more are 4 % there.
    registers, rest = (240, 24) if head_dim == 64 else (232, 40)
    sizes = [
        Config(
            block_kv=block_kv,
            num_stages=stages,
            qk_split=split,
            fuse_q=fuse,
            registers=registers,
            memory_registers=rest,
        )
        for stages in (4, 3, 2)
        for fuse in ((False,) if variant.qk == "half" else (True, False))
    ]
    fits = [size for size in sizes if size.smem_bytes(head_dim, variant) <= SMEM_LIMIT]
    return (fits or sizes[-1:])[0]


# -- which work is done where ----------------------------------------------------------------------


def div(a, b: int):
    """Quotient of non-negative numbers, traced or not."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _rem(a, b: int):
    return a % b if isinstance(a, int) else lax.rem(a, jnp.int32(b))


def _min(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _max(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one launch, and which piece of work is what.

    Args:
        config: tiles and schedule.
        variant: formats.
        batch: B.
        q_len: T.
        kv_len: S.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H, one of `HEAD_DIMS`.
        scale_block: keys that share a set of scales.
        min_diff: lower bound of ``key - query`` where it is known now, or None.
        max_diff: upper bound of it where it is known now, or None.
        bounded: whether there is a lower and an upper bound, known now or not.
        dynamic: lengths, bounds and the tiles to visit come as arrays.
        segmented: segment ids come as arrays.
        listed: query rows of one row of a `BlockMask`, whose lists of tiles come as arrays, or 0
            where tiles follow from the rules. One row is for several query tiles or, with 64, for
            one warpgroup, whose two rows share the ring of K and V.
        joined: listed tiles that make up one tile of the kernel.
    """

    config: Config
    variant: Variant
    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale_block: int
    min_diff: int | None = None
    max_diff: int | None = None
    bounded: tuple[bool, bool] = (False, False)
    dynamic: bool = False
    segmented: bool = False
    listed: int = 0
    joined: int = 1

    @property
    def raw_q(self) -> bool:
        """Whether Q is 16-bit and becomes 8-bit in the kernel."""
        return self.config.fuse_q and self.variant.qk != "half"

    @property
    def paired(self) -> bool:
        """Whether each of two warpgroups has a list of its own."""
        return 0 < self.listed < self.config.block_q

    @property
    def q_tiles(self) -> int:
        """Query tiles of one head."""
        return pl.cdiv(self.q_len, self.config.block_q)

    @property
    def total(self) -> int:
        """Query tiles in all."""
        return self.batch * self.num_heads * self.q_tiles

    @property
    def group(self) -> int:
        """Heads whose query tiles are interleaved."""
        return math.gcd(self.config.head_group, self.batch * self.num_heads)

    @property
    def num_blocks(self) -> int:
        """Blocks of the grid."""
        return min(self.config.num_sms, self.total) if self.config.persistent else self.total

    @property
    def needs_mask(self) -> bool:
        """Whether some tile needs a mask."""
        # The last of joined tiles may be missing.
        ragged = self.kv_len % self.config.block_kv != 0 or self.joined > 1
        return any(self.bounded) or self.dynamic or ragged

    def tile_of(self, index):
        """Query tile, batch and head of a linear index, traced or not.

        Within a group of heads the longest tiles come first under a causal mask. Else all tiles
        cost the same, and those of one head, which share K and V in the L2 cache, are neighbours.
        The same holds for listed tiles, which `listed_work` orders.
        """
        tiles, group = self.q_tiles, self.group
        outer, inner = div(index, tiles * group), _rem(index, tiles * group)
        if self.max_diff is None or self.listed:
            q_tile, head = _rem(inner, tiles), outer * group + div(inner, tiles)
        else:
            q_tile, head = tiles - 1 - div(inner, group), outer * group + _rem(inner, group)
        return q_tile, div(head, self.num_heads), _rem(head, self.num_heads)

    def kv_tiles(self, q_tile):
        """K/V tiles [lo, hi) of a query tile, and [mid_lo, mid_hi), those that need no mask.

        From what is known now. Never empty: a query tile with nothing to attend walks over one
        tile that is masked out.
        """
        kv, block_q = self.config.block_kv, self.config.block_q
        first, last = q_tile * block_q, q_tile * block_q + block_q - 1
        low, high, full_low, full_high = 0, self.kv_len, 0, self.kv_len
        if self.max_diff is not None:
            high = _min(high, last + self.max_diff + 1)
            full_high = _min(full_high, first + self.max_diff + 1)
        if self.min_diff is not None:
            low = _max(low, first + self.min_diff)
            full_low = _max(full_low, last + self.min_diff)
        count = pl.cdiv(self.kv_len, kv)
        lo = _min(div(low, kv), count - 1)
        hi = _max(_min(div(_max(high, 0) + kv - 1, kv), count), lo + 1)
        mid_hi = _min(_max(div(_max(full_high, 0), kv), lo), hi)
        mid_lo = _min(_max(div(full_low + kv - 1, kv), lo), mid_hi)
        return lo, mid_lo, mid_hi, hi


@functools.lru_cache(maxsize=64)
def work_table(plan: Plan) -> np.ndarray:
    """Which query tiles each block walks over: row i is [count, tile, tile, ...].

    Every tile goes, in the order of `Plan.tile_of`, to the block that would be free first.
    """
    lists = [[] for _ in range(plan.num_blocks)]
    free = [(0.0, i) for i in range(plan.num_blocks)]
    for index in range(plan.total):
        lo, _, _, hi = plan.kv_tiles(plan.tile_of(index)[0])
        when, block = heapq.heappop(free)
        lists[block].append(index)
        heapq.heappush(free, (when + (hi - lo) + TILE_OVERHEAD, block))
    table = np.zeros((plan.num_blocks, 1 + max(map(len, lists))), np.int32)
    for row, tiles in zip(table, lists, strict=True):
        row[0] = len(tiles)
        row[1 : 1 + len(tiles)] = tiles
    return table


def dynamic_tiles(mask: Mask, plan: Plan) -> jax.Array:
    """What `Plan.kv_tiles` gives, for rules that are arrays: int32 [B, query tiles, 4].

    [lo, hi) runs from the first to the last tile that is not empty, [mid_lo, mid_hi) over the
    first run of full ones.
    """
    block_q, kv = plan.config.block_q, plan.config.block_kv
    status = mask.tile_status(plan.q_len, plan.kv_len, block_q, kv)[:, 0]  # [B or 1, nq, nk]
    count = status.shape[-1]
    tile = jnp.arange(count)
    some = status != EMPTY
    # A tile that sticks out of the array holds padded keys, which only a mask keeps out.
    full = (status == FULL) & ((tile + 1) * kv <= plan.kv_len)
    lo = jnp.where(some.any(-1), some.argmax(-1), 0)
    hi = jnp.maximum(jnp.where(some, tile + 1, 0).max(-1), lo + 1)
    mid_lo = jnp.where(full.any(-1), full.argmax(-1), lo)
    stops = ~full & (tile >= mid_lo[..., None])
    mid_hi = jnp.where(stops.any(-1), stops.argmax(-1), count)
    table = jnp.stack([lo, mid_lo, mid_hi, hi], axis=-1).astype(jnp.int32)
    return jnp.broadcast_to(table, (plan.batch, *table.shape[1:]))


def listed_tiles(blocks: BlockMask, plan: Plan) -> jax.Array:
    """`dynamic_tiles` as places in the lists of a block mask: int32 [B or 1, N or 1, rows, 4].

    lo is 0 and hi the number of listed tiles, which may be 0.
    """
    count = blocks.kv_num_blocks
    if blocks.mask is None and plan.kv_len % blocks.block_kv == 0:  # no tile needs a rule
        return jnp.stack([jnp.zeros_like(count)] * 2 + [count] * 2, axis=-1).astype(jnp.int32)
    place = jnp.arange(blocks.kv_indices.shape[-1])
    listed = place < count[..., None]
    # A tile that sticks out of the array holds padded keys, which only a mask keeps out.
    whole = (blocks.kv_indices + 1) * blocks.block_kv <= plan.kv_len
    full = listed & blocks.kv_full & whole
    mid_lo = jnp.where(full.any(-1), full.argmax(-1), count)
    stops = ~full & (place >= mid_lo[..., None])
    mid_hi = jnp.where(stops.any(-1), stops.argmax(-1), count)
    table = [jnp.zeros_like(count), mid_lo, jnp.minimum(mid_hi, count), count]
    return jnp.stack(table, axis=-1).astype(jnp.int32)


def listed_work(blocks: BlockMask, plan: Plan) -> jax.Array:
    """`work_table` for listed tiles, made on the device.

    Within a group of heads the longest lists come first, and those of equal length stay in order.
    They are dealt out to and fro over the blocks, so that each gets its share of long and short.
    """
    count = blocks.kv_num_blocks
    if plan.paired:
        count = jnp.pad(count, ((0, 0), (0, 0), (0, count.shape[-1] % 2)))
        count = count[..., ::2] + count[..., 1::2]
    else:
        count = jnp.repeat(count, plan.listed // plan.config.block_q, axis=-1)
        count = count[..., : plan.q_tiles]
    count = jnp.broadcast_to(count, (plan.batch, plan.num_heads, plan.q_tiles))
    count = count.reshape(-1, plan.group * plan.q_tiles)
    first = jnp.arange(0, plan.total, count.shape[1])[:, None]
    tiles = (jnp.argsort(-count, axis=-1) + first).ravel().astype(jnp.int32)
    rounds = pl.cdiv(plan.total, plan.num_blocks)
    tiles = jnp.pad(tiles, (0, rounds * plan.num_blocks - plan.total), constant_values=-1)
    tiles = tiles.reshape(rounds, plan.num_blocks)
    tiles = jnp.where(jnp.arange(rounds)[:, None] % 2 == 1, tiles[:, ::-1], tiles).T
    return jnp.concatenate([(tiles >= 0).sum(1, keepdims=True, dtype=jnp.int32), tiles], axis=1)


def bounds(mask: Mask, plan: Plan) -> jax.Array:
    """int32 [B, 4]: valid queries, valid keys, lower and upper bound of ``key - query``."""
    limits = ((mask.q_lengths, plan.q_len), (mask.kv_lengths, plan.kv_len))
    columns = [length if x is None else jnp.minimum(x, length) for x, length in limits]
    columns += [-FAR if mask.min_diff is None else jnp.clip(mask.min_diff, -FAR, FAR)]
    columns += [FAR if mask.max_diff is None else jnp.clip(mask.max_diff, -FAR, FAR)]
    full = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), (plan.batch,)) for x in columns]
    return jnp.stack(full, axis=1)
