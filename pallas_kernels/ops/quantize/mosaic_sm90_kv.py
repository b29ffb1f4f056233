# SPDX-License-Identifier: Apache-2.0
"""Quantisation of K and V on Hopper in one launch that reads both from memory once.

The encoders need what only a whole sequence tells: the mean key, and the largest magnitude of each
channel of V. Two launches read 268 MB twice at 4 x 4096 tokens and 32 heads of 128; the second
level cache holds some 50. So the work goes through the cache in pieces of a few heads:

    statistics of heads 0, of heads 1, of heads 2, codes of heads 0, statistics of heads 3, ...

One block of threads does one item of this list, in order: blocks start in the order of their
numbers (what CUB's scans rely on too), so whatever a block waits for is done or under way, and
nothing waits for what has not begun. A head's statistics are partial sums and maxima of many
blocks; the block that arrives last adds them up, always in the same order, and says so to those
that wait. Results are therefore equal from run to run, and to those of the separate kernels but for
the order of the sums.

References: SageAttention (arXiv 2410.02367), section 4.2; SageAttention2 (arXiv 2411.10958),
sections 3.1 to 3.3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels.ops.quantize import mosaic_sm90 as lanes
from pallas_kernels.ops.quantize.mosaic_sm90 import LARGEST, SEQ_PAD, TINY

CHUNK_BYTES = (
    2**23
)  # of K and V that are taken together; three chunks and their codes fit the cache
IN_FLIGHT = 400  # items that run at the same time: so many lie between statistics and codes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the items and their order.

    Args:
        heads: heads of all sequences, ``B * K``.
        width: heads of a chunk.
        ahead: chunks whose statistics are taken before the codes of the first.
        piece: tokens of an item of statistics.
        pieces: such items of a head.
        k_items: items of a head's K codes.
        v_items: items of a head's V codes.
    """

    heads: int
    width: int
    ahead: int
    piece: int
    pieces: int
    k_items: int
    v_items: int

    @property
    def step(self) -> int:
        """Items of a chunk."""
        return self.width * (self.pieces + self.k_items + self.v_items)

    @property
    def blocks(self) -> int:
        """Blocks of threads, those without work among them."""
        return (pl.cdiv(self.heads, self.width) + self.ahead) * self.step


def plan_of(k, scale_block: int, encode_v: bool, width: int | None = None,
            ahead: int | None = None, piece: int | None = None) -> Plan:  # fmt: skip
    """The order of work for K of ``[B, S, K, H]``; numbers that are given stay as they are."""
    batch, length, heads, head_dim = k.shape
    rows = lanes._Lanes(head_dim).rows
    if width is None:
        width = max(1, min(8, batch * heads, CHUNK_BYTES // (4 * length * head_dim)))
        width = 1 << width.bit_length() - 1
    if piece is None:
        piece = 128 if length <= 8192 else 256
    pieces = pl.cdiv(length, piece)
    k_items = pl.cdiv(8 * _halves(head_dim, scale_block) * pl.cdiv(length, scale_block), rows)
    v_items = pl.cdiv(pl.cdiv(length, SEQ_PAD) * (head_dim // 32), 4) if encode_v else 0
    plan = Plan(batch * heads, width, 1, piece, pieces, k_items, v_items)
    if ahead is None:
        ahead = min(pl.cdiv(IN_FLIGHT, plan.step), pl.cdiv(plan.heads, plan.width))
    return dataclasses.replace(plan, ahead=ahead)


def _halves(head_dim: int, scale_block: int) -> int:
    """How many rows of lanes share the keys of a scale: two where a warp holds two rows."""
    return 2 if lanes._Lanes(head_dim).count < 32 and scale_block % 16 == 0 else 1


def quantize_kv(
    k, v, lengths, *, scale_block=256, smooth_k=True, qk="int8", encode_v=True, **sizes
):
    """Codes of K without its mean and, if asked, of V, each read from memory once.

    Args:
        k: bfloat16 or float16 [B, S, K, H], H one of `HEAD_DIMS`.
        v: like ``k``; not read unless ``encode_v``.
        lengths: int32 [B], valid tokens; later ones give zeros and are never read.
        scale_block: keys that share a set of eight scales; a multiple of 16.
        smooth_k: subtract the mean key first. Without it ``encode_v`` must hold, since nothing
            would need statistics: `quantize_k` does the rest.
        qk: "int8" or "e4m3".
        encode_v: make FP8 codes of V.
        **sizes: ``width``, ``ahead`` and ``piece`` of the `Plan`.

    Returns:
        Codes of K [B, Sp, K, H] and scales float32 [B, K, Sp / scale_block, 8] as of
        `quantize_k`; e4m3 [B, K, H, Sv] as of `quantize_v` and scales float32 [B, K, H], or None
        twice; mean key float32 [B, K, H], or None without smoothing.
    """
    batch, _, heads, head_dim = k.shape
    plan = plan_of(k, scale_block, encode_v, **sizes)
    k_type, scale_type = lanes.k_types(k.shape, scale_block, qk)
    channels = jax.ShapeDtypeStruct((batch, heads, head_dim), jnp.float32)
    partial = jax.ShapeDtypeStruct((batch, heads, plan.pieces * 4, head_dim), jnp.float32)
    outs = {"k": k_type, "k_scale": scale_type}
    if encode_v:
        outs |= {"v": lanes.v_type(v.shape), "v_scale": channels, "tops": partial}
    if smooth_k:
        outs |= {"mean": channels, "sums": partial}
    names = ("k_in", "v_in", "lengths", *outs, "counters")

    def body(refs, axes):
        work = _Work(plan, dict(zip(names, refs, strict=True)), k.shape, scale_block, qk,
                     k.dtype == jnp.bfloat16)  # fmt: skip
        work.run(axes[0])

    args = (k, v if encode_v else k, lengths)
    result = lanes._call(
        body, list(outs.values()), (plan.blocks, 1, 1), args, counters=batch * heads
    )
    found = dict(zip(outs, result, strict=True))
    return [found.get(name) for name in ("k", "k_scale", "v", "v_scale", "mean")]


@dataclasses.dataclass(frozen=True)
class _Work:
    """One launch: its arrays by name, and what a block does with its number."""

    plan: Plan
    refs: dict
    shape: tuple[int, ...]
    scale_block: int
    qk: str
    is_bf16: bool

    def run(self, block):
        """Finds the item of a block: statistics of a chunk, or codes of the chunk ``ahead``."""
        plan = self.plan
        chunk, item = (f(block, ptx.i32(plan.step)) for f in (ptx.div, ptx.rem))
        counts = [plan.width * n for n in (plan.pieces, plan.k_items, plan.v_items)]
        earlier = ptx.sub(chunk, ptx.i32(plan.ahead))
        starts = [0, counts[0], counts[0] + counts[1]]

        def part(i, chunk, work):
            """Neighbouring items are of neighbouring heads: their rows of memory touch."""
            local = ptx.sub(item, ptx.i32(starts[i]))
            within, index = ptx.rem(local, ptx.i32(plan.width)), ptx.div(local, ptx.i32(plan.width))
            head = ptx.add(ptx.mul(chunk, ptx.i32(plan.width)), within)
            exists = ptx.both(ptx.ge(head, ptx.i32(0)), ptx.lt(head, ptx.i32(plan.heads)))
            ptx.branch(exists, lambda: work(head, index), lambda: None)

        def codes():
            if not plan.v_items:
                return part(1, earlier, self.encode_k)
            return ptx.branch(
                ptx.lt(item, ptx.i32(starts[2])),
                lambda: part(1, earlier, self.encode_k),
                lambda: part(2, earlier, self.encode_v),
            )

        is_first = ptx.lt(item, ptx.i32(counts[0]))
        ptx.branch(is_first, lambda: part(0, chunk, self.statistics), codes)

    def place(self, head):
        """(sequence, head within it, valid tokens)."""
        b, head = (f(head, ptx.i32(self.shape[2])) for f in (ptx.div, ptx.rem))
        return b, head, lanes._load_limit(self.refs["lengths"], b)

    def ready(self, head):
        """Waits for the statistics of a head."""
        counter = lanes._offset([(head, 1)], 4)
        ptx.wait(self.refs["counters"], counter, self.plan.pieces + 1)

    def statistics(self, head, index):
        """Partial results of a piece; the last block of a head adds all of them up."""
        b, local_head, limit = self.place(head)
        inputs = {"sums": self.refs["k_in"], "tops": self.refs["v_in"]}
        wanted = {name: ref for name, ref in inputs.items() if name in self.refs}
        lanes.partial_statistics(
            wanted, self.refs, self.shape, (b, local_head, index), limit, self.plan.piece,
            self.is_bf16,
        )  # fmt: skip
        counter = lanes._offset([(head, 1)], 4)
        is_last = ptx.arrive(self.refs["counters"], counter, self.plan.pieces)

        ptx.branch(is_last, lambda: self.finish(head, limit, counter), lambda: None)

    def finish(self, head, limit, counter):
        """Mean key and scales of V of a head, from all its partial results."""
        count, largest = ptx.to_float(ptx.imax(limit, ptx.i32(1))), ptx.f32(LARGEST["e4m3"])
        rules = {
            "sums": (ptx.fadd, "mean", lambda x: ptx.fdiv(x, count)),
            "tops": (ptx.fmax, "v_scale",
                     lambda x: ptx.fdiv(ptx.fmax(x, ptx.f32(TINY)), largest)),
        }  # fmt: skip
        rules = {name: rule for name, rule in rules.items() if name in self.refs}
        rows, head_dim = self.plan.pieces * 4, self.shape[3]
        unroll = next(n for n in (32, 16, 8, 4) if rows % n == 0)
        row = lanes._offset([(head, rows * head_dim)], 4)
        for start in range(0, head_dim, 128):
            channel = ptx.add(ptx.thread(), ptx.i32(start))
            exists = ptx.lt(channel, ptx.i32(head_dim))
            first = ptx.add(row, lanes._offset([(channel, 1)], 4))

            def body(i, totals, first=first, exists=exists):
                """All loads before the first sum: the others wait for this."""
                place = ptx.add(first, lanes._offset([(i, unroll * head_dim)], 4))
                steps = [4 * head_dim * j for j in range(unroll)]
                words = {
                    name: [
                        ptx.load_words(self.refs[name], place, 1, exists, shift=step)[0]
                        for step in steps
                    ]
                    for name in rules
                }
                for name, found in words.items():
                    for word in found:
                        total = rules[name][0](totals[name], ptx.from_bits(word))
                        totals = {**totals, name: total}
                return totals

            totals = ptx.loop(rows // unroll, body, {name: ptx.f32(0.0) for name in rules})
            place = lanes._offset([(head, head_dim), (channel, 1)], 4)
            for name, (_, target, final) in rules.items():
                ptx.store(self.refs[target], place, [final(totals[name])], exists)
        ptx.arrive(self.refs["counters"], counter, self.plan.pieces + 1)

    def encode_k(self, head, index):
        """Eight residues of a tile of keys, or as many as there are rows of lanes."""
        b, local_head, limit = self.place(head)
        row, channel, exists = lanes._Lanes(self.shape[3]).place()
        unit = ptx.add(ptx.mul(index, ptx.i32(lanes._Lanes(self.shape[3]).rows)), row)
        halves, half = _halves(self.shape[3], self.scale_block), None
        if halves == 2:
            unit, half = (f(unit, ptx.i32(2)) for f in (ptx.div, ptx.rem))
        tile, residue = (f(unit, ptx.i32(8)) for f in (ptx.div, ptx.rem))
        tiles = pl.cdiv(self.shape[1], self.scale_block)
        exists = ptx.both(exists, ptx.lt(tile, ptx.i32(tiles)))
        if "mean" in self.refs:
            self.ready(head)
        lanes.encode_k(
            self.refs["k_in"], self.refs.get("mean"), self.refs["k"], self.refs["k_scale"],
            (b, local_head, tile, residue), channel, exists, limit, shape=self.shape,
            scale_block=self.scale_block, qk=self.qk, is_bf16=self.is_bf16, half=half,
        )  # fmt: skip

    def encode_v(self, head, index):
        """A warp each: 128 tokens of 32 channels."""
        b, local_head, limit = self.place(head)
        columns = self.shape[3] // 32
        warp, lane = (f(ptx.thread(), ptx.i32(32)) for f in (ptx.div, ptx.rem))
        unit = ptx.add(ptx.mul(index, ptx.i32(4)), warp)
        tile, part = (f(unit, ptx.i32(columns)) for f in (ptx.div, ptx.rem))
        there = ptx.lt(tile, ptx.i32(pl.cdiv(self.shape[1], SEQ_PAD)))
        self.ready(head)
        lanes.encode_v(
            self.refs["v_in"], self.refs["v_scale"], self.refs["v"], (b, local_head, tile, part),
            lane, there, limit, shape=self.shape, is_bf16=self.is_bf16,
        )  # fmt: skip
