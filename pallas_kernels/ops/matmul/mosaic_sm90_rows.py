# SPDX-License-Identifier: Apache-2.0
"""Few rows times stored weights on Hopper: the weights are read once, straight into registers.

``out^T = W^T x^T`` by ``mma.sync`` m16n8k16. The operand A is 16 outputs and 16 inputs of W^T: a
thread's load of 8 or 16 bytes of a row (two inputs, as many outputs) is one register of four or
eight such operands once its nibbles are bfloat16, which is exact; 8-bit codes take two rows. The
operand B holds up to eight rows of x. A product of the inputs that share a scale starts from zero,
and is scaled and added in float32:

    acc += scale[group, output] * sum over the group of code * x

so that nothing but x and the result is ever rounded. A block owns 128 outputs, a warp 64 or all of
them; warps of the same outputs, and the blocks of a split, take turns at steps of the contraction.
Warps join in shared memory, splits in a sum over float32 parts in a fixed order. The next step's
loads are under way while one is multiplied: with three blocks on a multiprocessor and those of the
step itself that is 48 KB of weights.

Where blocks of four warpgroups and 64 outputs just fill the multiprocessors, each takes the whole
contraction, and no second kernel adds up splits (`heuristic`).

Measured and left out, since they took longer on an H100 (8192 x 8192): splits that form a cluster
and join in each other's shared memory instead of a second kernel (32 us for one row, against 20),
twice the units in a step (24 us), and more blocks than fit at once.

References: Marlin (arXiv 2408.11743), section 3; PTX ISA 8.4, section 9.7.14 (mma.m16n8k16).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels._device import current_device
from pallas_kernels.formats import QTensor
from pallas_kernels.ops.decode_attention.mosaic_sm90 import bytes_at, call, mma
from pallas_kernels.ops.matmul import mosaic_sm90_codes as codes
from pallas_kernels.ops.matmul.mosaic_sm90_codes import Weights
from pallas_kernels.ops.matmul.spec import UNIT, MatmulSpec

WARPS = 4  # of a warpgroup
ROWS = 8  # rows of x of one product


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes that change speed only.

    Args:
        own: neighbouring outputs of a thread, 8 or 16; None: 16, or 8 where more than eight rows
            or 8-bit codes take the registers.
        units: units of 16 inputs in a warp's step.
        blocks: blocks among which the work is split, if there is so much; None: three for every
            multiprocessor.
        cache: how loads of the weights treat L1 and L2, PTX qualifiers.
        groups: warpgroups of a block, 1 or 4; all of them share its outputs.
        outputs: of a block, 64 or 128.
        table: how E2M1 is decoded, see `code_pairs`.
    """

    own: int | None = None
    units: int = 2
    blocks: int | None = None
    cache: str = ".L1::no_allocate.L2::128B"
    groups: int = 1
    outputs: int = 128
    table: bool = False


_WHOLE = Config(own=8, groups=4, outputs=64, table=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of the kernel.

    Args:
        weights: of the weights.
        m: rows of x.
        width: row pitch of x, inputs.
        config: sizes.
        out_dtype: of the result, where no splits are to be added up.
    """

    weights: Weights
    m: int
    width: int
    config: Config
    out_dtype: str = "float32"

    @property
    def tiles(self) -> int:
        """Products of eight rows in a block."""
        return 1 if self.m <= ROWS else 2

    @property
    def row_blocks(self) -> int:
        """Blocks of rows; each reads the weights."""
        return pl.cdiv(self.m, ROWS * self.tiles)

    @property
    def own(self) -> int:
        """Outputs of a thread."""
        return self.config.own or (16 if self.tiles * self.lines == 2 else 8)

    @property
    def partners(self) -> int:
        """Warps of a block that have the same outputs."""
        return self.config.groups * WARPS * 8 * self.own // self.columns

    @property
    def columns(self) -> int:
        """Outputs of a block."""
        return self.config.outputs

    @property
    def units(self) -> int:
        """Units of a warp's step."""
        return min(self.config.units, self.total)

    @property
    def lines(self) -> int:
        """Rows of bytes of a thread in a unit, four inputs."""
        return 4 // self.weights.per_byte

    @property
    def total(self) -> int:
        """Units of the contraction."""
        return self.weights.inputs // UNIT

    @property
    def shared(self) -> int:
        """Units of a step that share a scale."""
        return codes.shared_units(self.weights.group, self.units)

    @property
    def turns(self) -> int:
        """Turns of a block's warps over all inputs."""
        return pl.cdiv(self.total, self.units * self.partners)

    @property
    def splits(self) -> int:
        """Blocks that share the contraction: as many turns each, or one more."""
        at_once = 1 if self.config.groups > 1 else 3  # on a multiprocessor
        wanted = self.config.blocks or at_once * (current_device().num_sms or 132)
        columns = pl.cdiv(self.weights.n, self.columns) * self.row_blocks
        return max(min(wanted // columns, self.turns), 1)

    @property
    def ragged(self) -> bool:
        """Some warp's step lies beyond the last unit, wholly or in part."""
        return self.turns * self.partners * self.units != self.total


def heuristic(weights: Weights, m: int) -> Config:
    """Sizes: one block of four warpgroups a multiprocessor where that fills them all.

    Measured on an H200 (8192 x 8192) for one row and for sixteen, in us: NVFP4 16.6 and 19.7
    against 18.2 and 22.3, since no splits are left to add up; MXFP4 16.4 and 20.9 against 16.6 and
    21.2; INT4 in groups of 128, with four units that share a scale in flight, 13.4 and 20.0
    against 15.9 and 21.3; INT8 20.3 against 24.1 for one row, but 27.1 against 25.8 for sixteen.
    """
    sms = current_device().num_sms or 132
    blocks = pl.cdiv(weights.n, _WHOLE.outputs)
    rows = 2 * ROWS if weights.per_byte == 2 else ROWS
    if m > rows or blocks < 0.9 * sms * pl.cdiv(blocks, sms):
        return Config()
    many = weights.per_byte == 2 and weights.group >= 4 * UNIT
    return dataclasses.replace(_WHOLE, units=4 if many else 2)


def _load(ref, start, offset: int, words: int, cache: str = "", kind: str = "r", ok=None):
    """One, two or four words at a constant distance from a place; zeros where ``ok`` is false."""
    names = ", ".join(f"${i}" for i in range(words))
    names, width = (names, "") if words == 1 else (f"{{{names}}}", f".v{words}")
    body = f"ld.global.nc{cache}{width}.b32 {names}, [${words}+{offset}];"
    ins = [ptx.address(ref, start)]
    if ok is not None:
        zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(words))
        body = f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {zeros} @p {body} }}"
        ins.append(ptx.flag(ok))
    return ptx.asm(body, kind * words, ins, effects=True)


class _Thread:
    """What a thread loads and multiplies.

    With g = lane // 4 and c = lane % 4: of its warp's outputs those from g · own on, of every
    unit's eight rows of bytes 2 c and 2 c + 1, and of every eight rows of x number g.
    """

    def __init__(self, plan: Plan, refs, axes):
        """Of a block of outputs, a split and a block of rows."""
        self.plan, self.refs = plan, refs
        i32, n = ptx.i32, plan.weights.n
        column, split, self.row_block, *group = axes
        self.tid = ptx.thread()
        if group:
            self.tid = ptx.add(self.tid, ptx.mul(group[0], i32(128)))
        warp = ptx.div(self.tid, i32(32))
        self.warp = ptx.rem(warp, i32(plan.partners))  # among those of the same outputs
        lane = ptx.rem(self.tid, i32(32))
        self.g, self.c = ptx.div(lane, i32(4)), ptx.rem(lane, i32(4))
        self.column = ptx.mul(column, i32(plan.columns))
        part = ptx.mul(ptx.div(warp, i32(plan.partners)), i32(8))
        self.within = ptx.mul(ptx.add(part, self.g), i32(plan.own))  # first output in the block
        self.first = ptx.add(self.column, self.within)
        if n % plan.columns:  # outputs that do not exist are read elsewhere and not written
            self.first = ptx.imin(self.first, i32(n - plan.own))
        self.split = split
        self.turn, end = (
            ptx.div(ptx.mul(place, i32(plan.turns)), i32(plan.splits))
            for place in (split, ptx.add(split, i32(1)))
        )
        self.count = ptx.sub(end, self.turn)
        row = bytes_at(ptx.mul(self.c, i32(plan.lines)), n)
        self.place = ptx.add(row, ptx.widen(self.first))
        self.x_places = []
        for t in range(plan.tiles):
            row = ptx.add(ptx.mul(self.row_block, i32(plan.tiles)), i32(t))
            row = ptx.imin(ptx.add(ptx.mul(row, i32(ROWS)), self.g), i32(plan.m - 1))
            place = bytes_at(row, 2 * plan.width)
            self.x_places.append(ptx.add(place, bytes_at(self.c, 8)))

    def loads(self, i):
        """What step ``i`` of a warp needs.

        The last step may begin too late. It then begins as late as it can, and x is zero where it
        repeats what another step has.
        """
        plan, weights, i32 = self.plan, self.plan.weights, ptx.i32
        step = ptx.add(ptx.mul(ptx.add(self.turn, i), i32(plan.partners)), self.warp)
        wanted = ptx.mul(step, i32(plan.units))
        unit = ptx.imin(wanted, i32(plan.total - plan.units)) if plan.ragged else wanted
        out: dict[str, list] = {"codes": [], "scales": [], "x": []}
        lines = UNIT // weights.per_byte  # of a unit
        start = ptx.add(self.place, bytes_at(unit, lines * weights.n))
        x_start = bytes_at(unit, 2 * UNIT)
        for u in range(plan.units):
            words = []
            for r in range(plan.lines):
                offset = (lines * u + r) * weights.n
                words += _load(self.refs["codes"], start, offset, plan.own // 4, plan.config.cache)
            out["codes"].append(words)
            ok = ptx.ge(ptx.add(unit, i32(u)), wanted) if plan.ragged else None
            out["x"].append(
                [
                    _load(self.refs["x"], ptx.add(place, x_start), 2 * UNIT * u, 2, ok=ok)
                    for place in self.x_places
                ]
            )
            if u % plan.shared == 0:
                out["scales"].append(self._scales(ptx.add(unit, i32(u))))
        return out

    def _scales(self, unit):
        """Scales of the thread's outputs in a unit."""
        weights, i32 = self.plan.weights, ptx.i32
        size = weights.scale_bytes
        group = ptx.div(ptx.mul(unit, i32(UNIT)), i32(weights.group))
        start = ptx.add(bytes_at(group, size * weights.n), bytes_at(self.first, size))
        kind = "f" if size == 4 else "r"
        own = self.plan.own
        width = min(own * size // 4, 4)  # words of a load
        pieces = [
            _load(self.refs["scale"], start, offset, width, kind=kind)
            for offset in range(0, own * size, 4 * width)
        ]
        return [word for piece in pieces for word in piece]

    def multiply(self, given, acc):
        """Adds a step's products.

        Args:
            given: from `loads`.
            acc: float32 [tiles of x][pairs of outputs][4].
        """
        plan, weights = self.plan, self.plan.weights
        acc = [[list(four) for four in tile] for tile in acc]
        for span, words in enumerate(given["scales"]):
            scale = codes.float_scales(weights.scale, words)
            units = range(span * plan.shared, (span + 1) * plan.shared)
            for quad in range(plan.own // 4):  # of outputs
                parts = [[[ptx.f32(0.0)] * 4 for _ in range(2)] for _ in range(plan.tiles)]
                for u in units:
                    lines = [given["codes"][u][plan.own // 4 * r + quad] for r in range(plan.lines)]
                    low, high = self._pairs(lines)
                    for pair in range(2):
                        own = slice(2 * pair, 2 * pair + 2)
                        a = [*low[own], *high[own]]
                        for t in range(plan.tiles):
                            b = given["x"][u][t]
                            parts[t][pair] = mma(parts[t][pair], a, b, "bfloat16")
                for t in range(plan.tiles):
                    for pair in range(2):
                        here = 2 * quad + pair
                        for i, x in enumerate(parts[t][pair]):
                            factor = scale[2 * here + i // 2]
                            acc[t][here][i] = ptx.fma(x, factor, acc[t][here][i])
        return acc

    def _pairs(self, lines):
        """Of four outputs, the first two of the thread's inputs in a unit, and the other two."""
        code = self.plan.weights.code
        if len(lines) == 4:
            return codes.byte_pairs(code, *lines[:2]), codes.byte_pairs(code, *lines[2:])
        return [codes.code_pairs(code, line, self.plan.config.table) for line in lines]

    def join(self, acc):
        """Adds the warps' sums in shared memory and writes the block's part."""
        plan, i32, shared = self.plan, ptx.i32, self.refs["shared"]
        rows = ROWS * plan.tiles
        for t in range(plan.tiles):
            for d in range(2):
                row = ptx.add(ptx.mul(self.warp, i32(rows)), i32(ROWS * t + d))
                row = ptx.add(row, ptx.mul(self.c, i32(2)))
                start = ptx.add(bytes_at(row, 4 * plan.columns), bytes_at(self.within, 4))
                own = [acc[t][i // 2][2 * (i % 2) + d] for i in range(plan.own)]
                for j in range(0, plan.own, 4):
                    where = ptx.add(start, ptx.i64(4 * j))
                    ptx.store(shared, where, own[j : j + 4], space="shared")
        ptx.asm("bar.sync 0;", "", [], effects=True)
        quads, threads = plan.columns // 4, 128 * plan.config.groups
        for item in range(0, rows * quads, threads):
            index = ptx.add(self.tid, i32(item))
            ok = None
            if rows * quads % threads:
                ok = ptx.lt(index, i32(rows * quads))
                index = ptx.imin(index, i32(rows * quads - 1))
            row, quad = ptx.div(index, i32(quads)), ptx.rem(index, i32(quads))
            total = None
            for w in range(plan.partners):
                at = ptx.add(ptx.mul(ptx.add(row, i32(w * rows)), i32(quads)), quad)
                text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
                four = ptx.asm(text, "ffff", [ptx.address(shared, bytes_at(at, 16))], effects=True)
                total = four if w == 0 else [ptx.fadd(*p) for p in zip(total, four, strict=True)]
            self._write(ptx.add(ptx.mul(self.row_block, i32(rows)), row), quad, total, ok)

    def _write(self, row, quad, values, ok):
        plan, i32 = self.plan, ptx.i32
        column = ptx.add(self.column, ptx.mul(quad, i32(4)))
        inside = ptx.both(ptx.lt(row, i32(plan.m)), ptx.lt(column, i32(plan.weights.n)))
        ok = inside if ok is None else ptx.both(ok, inside)
        if plan.splits == 1:  # what the block has is the result
            return self._write_result(row, column, values, ok)
        index = ptx.add(ptx.mul(self.split, i32(plan.m)), row)
        where = ptx.add(bytes_at(index, 4 * plan.weights.n), bytes_at(column, 4))
        return ptx.store(self.refs["out"], where, values, ok)

    def _write_result(self, row, column, values, ok):
        plan = self.plan
        if name := plan.weights.factor:
            factor = codes.row_factor(self.refs[name], row, plan.m if name == "row_scale" else 1)
            values = [ptx.fmul(x, factor) for x in values]
        size = 4 if plan.out_dtype == "float32" else 2
        if size == 2:
            values = [ptx.half_x2(values[i : i + 2], plan.out_dtype) for i in (0, 2)]
        where = ptx.add(bytes_at(row, size * plan.weights.n), bytes_at(column, size))
        ptx.store(self.refs["out"], where, values, ok)


def _body(plan: Plan, refs, axes):
    """What a block does."""
    thread = _Thread(plan, refs, axes)
    acc = [[[ptx.f32(0.0)] * 4 for _ in range(plan.own // 2)] for _ in range(plan.tiles)]

    def step(i, state):
        following = thread.loads(ptx.add(i, ptx.i32(1)))
        return {"acc": thread.multiply(state["given"], state["acc"]), "given": following}

    state = {"acc": acc, "given": thread.loads(ptx.i32(0))}
    if plan.turns > plan.splits:
        state = ptx.loop(ptx.sub(thread.count, ptx.i32(1)), step, state)
    thread.join(thread.multiply(state["given"], state["acc"]))


def matmul(
    lhs: jax.Array | QTensor, rhs: QTensor, spec: MatmulSpec, config: Config | None = None
) -> jax.Array:
    """Computes the same as `reference.matmul` for a few rows.

    Args:
      lhs: bfloat16 [..., m, k], or INT8 or FP8 with a scale per row.
      rhs: packed 4-bit, INT8 or FP8 QTensor [k, n].
      spec: static facts.
      config: sizes; None chooses.

    Returns:
      [..., m, n] in ``spec.out_dtype``.
    """
    weights, arrays = codes.prepare(lhs, rhs, spec, (1, UNIT, 16))
    plan = Plan(
        weights,
        spec.m,
        arrays["x"].shape[1],
        config or heuristic(weights, spec.m),
        str(spec.out_dtype),
    )
    split = plan.splits > 1
    factor = arrays.pop(weights.factor, None) if split else None
    shape = (plan.splits, spec.m, weights.n) if split else (spec.m, weights.n)
    out = call(
        functools.partial(_body, plan),
        {"out": jax.ShapeDtypeStruct(shape, jnp.float32 if split else spec.out_dtype)},
        (pl.cdiv(weights.n, plan.columns), plan.splits, plan.row_blocks),
        arrays,
        shared=plan.partners * ROWS * plan.tiles * plan.columns,
        groups=plan.config.groups,
    )["out"]
    if split:
        out = out.sum(0)
        out = (out if factor is None else out * factor[:, None]).astype(spec.out_dtype)
    return out[:, : spec.n].reshape(*lhs.shape[:-1], spec.n)
