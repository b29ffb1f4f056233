# SPDX-License-Identifier: Apache-2.0
"""Block rounding of a matrix on Hopper, along its rows, its columns or both, from one read.

A training step needs each operand rounded twice, with blocks along different axes. Here a warp owns
as many rows as a block has values, and 256 columns of them:

* along the columns of the matrix, every thread holds the blocks of four columns (of two, if they
  have 32 values), so that neither the largest magnitude nor a Hadamard transform needs another,
* along its rows, every thread holds 8 neighbours and shares the largest magnitude with those beside
  it,
* along both, with blocks of 16, the values that a thread has for columns are a quarter of a block
  of each row: four threads find the magnitudes of four rows together, and each makes the scale of
  one. Blocks of 32 are rounded one way after the other, the second read coming from the cache.

Values come out rounded, in the dtype of the matrix and at their places: FP4 has no arithmetic on
Hopper, so rounded values are what its products take. The scale of the tensor is given, because it
needs a pass of its own over the matrix: two passes altogether.

Stochastic rounding draws the bits of `formats.counter_random`: 23 of them, a hash of the key and of
the position in the matrix, the same as `jax.random.uniform` makes from such a key. All arithmetic
follows `formats.rounding` bit for bit; the sums of the transform are exact, and so equal, unless
the sixteen values differ by more than 2^12 in magnitude.

`cast_matrix` does for FP8 with one scale what an 8-bit product needs: codes in both orders.

Measured on an H200 (16384 x 8192, bfloat16): stochastic rounding along rows at 99 % of the
bandwidth of a copy, along columns at 79 %, both at 65 %, as long as one after the other: the
integer instructions of two hashes are the limit.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _ptx as ptx
from pallas_kernels.formats import BlockFormat
from pallas_kernels.formats.number_types import FLOAT32_MAX
from pallas_kernels.ops.quantize import mosaic_sm90 as lanes

DTYPES = ("bfloat16", "float16", "float32")
BLOCKS = (16, 32)
ROTATION = 16
WARP_COLUMNS = 256
WARPS = 4
_ROWS_AT_ONCE = 4  # of the loop along rows: loads in flight against instructions
_EXPONENT = 0x7F800000


@dataclasses.dataclass(frozen=True)
class Side:
    """How the blocks along one axis are rounded; hashable.

    Args:
        stochastic: whether the neighbour is drawn.
        signs: 16 values of ±1 of a Hadamard transform before the rounding (columns only), or None.
        scale_rule: "nearest" for E4M3 scales, "floor" or "ceil" for E8M0.
        overrange: factor on the largest magnitude.
    """

    stochastic: bool = False
    signs: tuple[int, ...] | None = None
    scale_rule: str = "nearest"
    overrange: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before the kernel runs; hashable.

    Args:
        rows: matrix rows.
        columns: matrix columns.
        dtype: of the matrix, one of `DTYPES`.
        format: element, block and scale; NVFP4-like (E4M3 scales, two levels) or MX (E8M0).
        scale_min: lower clamp of a scale.
    """

    rows: int
    columns: int
    dtype: str
    format: BlockFormat
    scale_min: float = 2.0**-9

    @property
    def block(self) -> int:
        """Values that share a scale."""
        return self.format.block

    @property
    def columns_each(self) -> int:
        """Columns of a thread where blocks lie along them: 64 values in registers."""
        return 64 // self.block

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return jnp.dtype(self.dtype).itemsize


def round_matrix(
    x, factors, words, plan: Plan, along_rows: Side | None, along_columns: Side | None
):
    """Rounds a matrix along one or both axes.

    Args:
        x: [rows, columns], both multiples of the block.
        factors: float32 [2, 2], encode and decode scale of the tensor for blocks along rows and
            along columns; not read by one-level formats.
        words: uint32 [2, 2], key words likewise; not read without stochastic rounding.
        plan: static facts.
        along_rows: blocks along the last axis, or None for no such result.
        along_columns: blocks along the first axis, or None.

    Returns:
        The results that were asked for, each of the shape and dtype of ``x``.
    """
    sides = [(side, index) for index, side in ((0, along_rows), (1, along_columns)) if side]
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def body(refs, axes):
        x_ref, factor_ref, word_ref, *out_refs = refs
        tile = _Tile(plan, x_ref, axes)
        rounders = [
            _Rounder(plan, side, tile, factor_ref, word_ref, index) for side, index in sides
        ]
        if len(sides) == 2 and plan.block == 16:
            return tile.along_both(rounders[0], out_refs[0], rounders[1], out_refs[1])
        # Columns first: their loads are many and independent, and fill the cache for the rows.
        for (_, index), rounder, out_ref in reversed(
            list(zip(sides, rounders, out_refs, strict=True))
        ):
            (tile.along_rows if index == 0 else tile.along_columns)(rounder, out_ref)
        return None

    args = (x, factors.astype(jnp.float32), jax.lax.bitcast_convert_type(words, jnp.int32))
    return lanes._call(body, [out] * len(sides), _grid(plan), args)


def rotated_amax(x, plan: Plan, signs: tuple[int, ...]):
    """Largest magnitude of the matrix after the transform along its columns.

    Args:
        x: [rows, columns].
        plan: static facts.
        signs: of the transform.

    Returns:
        float32 scalar; NaN and inf count as they are.
    """
    tiles, groups, _ = _grid(plan)
    partial = jax.ShapeDtypeStruct((groups, tiles, WARPS, 32), jnp.float32)

    def body(refs, axes):
        x_ref, out_ref = refs
        tile = _Tile(plan, x_ref, axes)

        def step(i, top):
            for column in zip(*tile.column_group(i)[0], strict=True):
                top = lanes._abs_max(_rotate(list(column), signs), top)
            return top

        top = tile.over_columns(step, ptx.f32(0.0))
        place = lanes._element(partial.shape, (axes[1], axes[0], tile.warp, tile.lane), 4)
        ptx.store(out_ref, place, [top])

    return lanes._call(body, [partial], _grid(plan), (x,))[0].max()


def cast_matrix(x, scale, kind: str):
    """FP8 codes of a matrix under one scale, as it lies and transposed, from one read.

    Both operands of an 8-bit product must have the contracted axis last, and there is no
    transposing load of 8 bits: whoever needs a tensor in two products needs both copies.

    Args:
        x: bfloat16 or float16 [rows, columns], multiples of 16.
        scale: float32 scalar, what a code of 1 means.
        kind: "e4m3" or "e5m2".

    Returns:
        Codes [rows, columns] and [columns, rows]: ``x / scale``, saturated, ties to even; -0 gives
        0. And float32 maxima of |x| over parts of the matrix, NaN where there is one.
    """
    rows, columns = x.shape
    dtype = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[kind]
    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, columns), (columns, rows))]
    # A warp takes 128 rows of 32 columns: eight lanes write 128 bytes of a transposed row.
    grid = (pl.cdiv(columns, 32 * WARPS), pl.cdiv(rows, 128), 1)
    outs.append(jax.ShapeDtypeStruct((grid[1], grid[0], WARPS), jnp.float32))
    whole = rows % 128 == 0 and columns % (32 * WARPS) == 0

    def body(refs, axes):
        x_ref, scale_ref, codes_ref, turned_ref, top_ref = refs
        scale = _load_f32(scale_ref, 0)
        inverse = _div(ptx.f32(1.0), scale)
        warp, lane = (f(ptx.thread(), ptx.i32(32)) for f in (ptx.div, ptx.rem))
        column = ptx.add(ptx.mul(axes[0], ptx.i32(WARPS)), warp)
        column = ptx.mul(
            ptx.add(ptx.mul(column, ptx.i32(4)), ptx.rem(lane, ptx.i32(4))), ptx.i32(8)
        )
        row = ptx.mul(axes[1], ptx.i32(128))
        row = ptx.add(row, ptx.mul(ptx.div(lane, ptx.i32(4)), ptx.i32(16)))
        ok = None
        if not whole:
            ok = ptx.both(ptx.lt(row, ptx.i32(rows)), ptx.lt(column, ptx.i32(columns)))
        place = lanes._element((rows, columns), (row, column), 1)
        source = ptx.add(place, place)  # two bytes a value
        words = [ptx.load_words(x_ref, source, 4, ok, 2 * r * columns) for r in range(16)]
        values, top = [], ptx.f32(0.0)  # [16][8]
        for r, word in enumerate(words):
            raw = lanes._floats(word, x.dtype == jnp.bfloat16)
            top = lanes._abs_max(raw, top)
            scaled = [_quotient(v, scale, inverse) for v in raw]
            packed = [_fp8x4(scaled[:4], kind), _fp8x4(scaled[4:], kind)]
            ptx.store(codes_ref, place, packed, ok, shift=r * columns)
            values.append(scaled)
        top = lanes._over_lanes(ptx.fmax, top, (1, 2, 4, 8, 16))
        part = lanes._element(outs[2].shape, (axes[1], axes[0], warp), 4)
        ptx.store(top_ref, part, [top], ptx.eq(lane, ptx.i32(0)))
        place = lanes._element((columns, rows), (column, row), 1)
        for c in range(8):
            packed = [_fp8x4([values[4 * i + r][c] for r in range(4)], kind) for i in range(4)]
            ptx.store(turned_ref, place, packed, ok, shift=c * rows)

    return lanes._call(body, outs, grid, (x, scale.astype(jnp.float32).reshape(1)))


def _grid(plan: Plan) -> tuple[int, int, int]:
    """Tiles of columns, groups of rows: neighbours along the first run at the same time."""
    return pl.cdiv(plan.columns, WARP_COLUMNS), pl.cdiv(plan.rows, WARPS * plan.block), 1


# -- what one warp does ----------------------------------------------------------------------------


class _Tile:
    """The part of the matrix that a warp rounds, and the places of its threads in it."""

    def __init__(self, plan: Plan, x_ref, axes):
        self.plan, self.x_ref = plan, x_ref
        thread = ptx.thread()
        self.warp, self.lane = (f(thread, ptx.i32(32)) for f in (ptx.div, ptx.rem))
        group = ptx.add(ptx.mul(axes[1], ptx.i32(WARPS)), self.warp)
        self.first_row = ptx.mul(group, ptx.i32(plan.block))
        self.first_column = ptx.mul(axes[0], ptx.i32(WARP_COLUMNS))
        self.row_bytes = plan.columns * plan.itemsize

    def inside(self, column):
        """Whether the rows of this warp and a column are there; None if all are everywhere.

        Rows come in whole blocks, so a warp has all of its rows or none.
        """
        plan = self.plan
        if plan.rows % (WARPS * plan.block) == 0 and plan.columns % WARP_COLUMNS == 0:
            return None
        has_rows = ptx.lt(self.first_row, ptx.i32(plan.rows))
        return ptx.both(has_rows, ptx.lt(column, ptx.i32(plan.columns)))

    def column_group(self, i):
        """Values [block][columns_each] of neighbouring columns, the first one, and its place."""
        each = self.plan.columns_each
        number = ptx.add(ptx.mul(i, ptx.i32(32 * each)), ptx.mul(self.lane, ptx.i32(each)))
        column = ptx.add(self.first_column, number)
        place, ok = self._place(self.first_row, column), self.inside(column)
        rows = [self._load(place, ok, each, r) for r in range(self.plan.block)]
        return rows, column, place, ok

    def over_columns(self, step, state):
        """A loop over the groups of columns of this warp."""
        return ptx.loop(WARP_COLUMNS // (32 * self.plan.columns_each), step, state)

    def along_columns(self, rounder, out_ref):
        """Blocks along the first axis: a thread has them whole."""

        def step(i, state):
            self._round_columns(rounder, out_ref, *self.column_group(i))
            return state

        self.over_columns(step, ())

    def along_both(self, by_rows, rows_ref, by_columns, columns_ref):
        """Blocks of 16 along either axis, from one read."""

        def step(i, state):
            group = self.column_group(i)
            self._round_rows(by_rows, rows_ref, *group)
            self._round_columns(by_columns, columns_ref, *group)
            return state

        self.over_columns(step, ())

    def _round_columns(self, rounder, out_ref, rows, column, place, ok):
        """Rounds a group along columns and stores it."""
        if rounder.side.signs is not None:
            rows = self._rotated(rows, rounder.side.signs)
        columns = list(zip(*rows, strict=True))
        blocks = [rounder.block_of(lanes._abs_max(values)) for values in columns]
        blocks = [rounder.finished(block) for block in blocks]
        marks = [rounder.column_mark(ptx.add(column, ptx.i32(c))) for c in range(len(columns))]
        for r, values in enumerate(rows):
            (hashed,) = rounder.row_hashes([r])
            rounded = [
                rounder.round(value, block, hashed, mark)
                for value, block, mark in zip(values, blocks, marks, strict=True)
            ]
            self._store(out_ref, place, rounded, ok, r)

    def _round_rows(self, rounder, out_ref, rows, column, place, ok):
        """Rounds a group along rows, where four threads have a block, and stores it."""
        marks = [rounder.column_mark(ptx.add(column, ptx.i32(c))) for c in range(4)]
        for first in range(0, len(rows), 4):
            some = rows[first : first + 4]
            blocks = self._shared_blocks(rounder, [lanes._abs_max(values) for values in some])
            hashes = rounder.row_hashes(range(first, first + 4))
            for r, (values, block, hashed) in enumerate(zip(some, blocks, hashes, strict=True)):
                rounded = [
                    rounder.round(value, block, hashed, mark)
                    for value, mark in zip(values, marks, strict=True)
                ]
                self._store(out_ref, place, rounded, ok, first + r)

    def _shared_blocks(self, rounder, tops):
        """Blocks of four rows from their magnitudes in each thread: every thread makes one."""
        for distance in (1, 2):
            half, odd = len(tops) // 2, self._has_bit(distance)
            pairs = list(zip(tops[:half], tops[half:], strict=True))
            sent = [ptx.shuffle_xor(ptx.select(odd, a, b), distance) for a, b in pairs]
            kept = [ptx.select(odd, b, a) for a, b in pairs]
            tops = [ptx.fmax(a, b) for a, b in zip(kept, sent, strict=True)]
        own = rounder.block_of(tops[0])
        start = ptx.land(self.lane, ptx.i32(~3))
        blocks = []
        for row in range(4):  # the threads of the four rows: 0, 2, 1, 3
            where = ptx.add(start, ptx.i32(row // 2 + 2 * (row % 2)))
            blocks.append(rounder.finished([_from_lane(value, where) for value in own]))
        return blocks

    def _has_bit(self, distance: int):
        return ptx.eq(ptx.land(self.lane, ptx.i32(distance)), ptx.i32(distance))

    def along_rows(self, rounder, out_ref):
        """Blocks along the last axis: 8 values of a thread, and those of its neighbours."""
        column = ptx.add(self.first_column, ptx.mul(self.lane, ptx.i32(8)))
        ok = self.inside(column)
        marks = [rounder.column_mark(ptx.add(column, ptx.i32(c))) for c in range(8)]
        distances = [d for d in (1, 2, 4, 8, 16) if 8 * d < self.plan.block]

        def step(i, state):
            number = ptx.mul(i, ptx.i32(_ROWS_AT_ONCE))
            place = self._place(ptx.add(self.first_row, number), column)
            rows = [self._load(place, ok, 8, r) for r in range(_ROWS_AT_ONCE)]
            numbers = [ptx.add(number, ptx.i32(r)) for r in range(_ROWS_AT_ONCE)]
            hashes = rounder.row_hashes(numbers)
            for r, (values, hashed) in enumerate(zip(rows, hashes, strict=True)):
                top = lanes._over_lanes(ptx.fmax, lanes._abs_max(values), distances)
                block = rounder.finished(rounder.block_of(top))
                rounded = [
                    rounder.round(value, block, hashed, mark)
                    for value, mark in zip(values, marks, strict=True)
                ]
                self._store(out_ref, place, rounded, ok, r)
            return state

        ptx.loop(self.plan.block // _ROWS_AT_ONCE, step, ())

    def _rotated(self, rows, signs):
        """The transform of each column, rounded to the dtype of the matrix as `rht` does."""
        columns = [_rotate(list(column), signs) for column in zip(*rows, strict=True)]
        rows = list(zip(*columns, strict=True))
        if self.plan.dtype == "float32":
            return rows
        return [
            lanes._floats(
                [ptx.half_x2(row[i : i + 2], self.plan.dtype) for i in range(0, len(row), 2)],
                self.plan.dtype == "bfloat16",
            )
            for row in rows
        ]

    def _place(self, row, column):
        return lanes._element(
            (self.plan.rows, self.plan.columns), (row, column), self.plan.itemsize
        )

    def _load(self, place, ok, count: int, row: int):
        """Neighbouring values as float32, some rows below; zeros where there are none."""
        total = count * self.plan.itemsize // 4
        words = []
        for first in range(0, total, 4):
            shift = row * self.row_bytes + 4 * first
            words += ptx.load_words(self.x_ref, place, min(4, total - first), ok, shift)
        if self.plan.dtype == "float32":
            return [ptx.from_bits(word) for word in words]
        return lanes._floats(words, self.plan.dtype == "bfloat16")

    def _store(self, ref, place, values, ok, row: int):
        if self.plan.dtype != "float32":
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [ptx.half_x2(list(pair), self.plan.dtype) for pair in pairs]
        for first in range(0, len(values), 4):
            shift = row * self.row_bytes + 4 * first
            ptx.store(ref, place, values[first : first + 4], ok, shift=shift)


class _Rounder:
    """Scales and rounding of one side, with its key and the scale of the tensor."""

    def __init__(self, plan: Plan, side: Side, tile: _Tile, factor_ref, word_ref, index: int):
        self.plan, self.side = plan, side
        self.element = plan.format.element_type
        self.encode = self.decode = None
        if plan.format.two_level:
            self.encode, self.decode = (_load_f32(factor_ref, 8 * index + at) for at in (0, 4))
        if side.stochastic:
            first, self._second = (_load_i32(word_ref, 8 * index + at) for at in (0, 4))
            # Lane r hashes row r; a block has at most 32 rows.
            row = ptx.add(tile.first_row, tile.lane)
            self._hash = _folded(_mix(ptx.add(ptx.mul(row, _word(0x9E3779B9)), first)))

    def row_hashes(self, numbers):
        """The hashes of rows by their number in the tile, an int or the same i32 in all lanes."""
        if not self.side.stochastic:
            return [None] * len(numbers)
        numbers = [ptx.i32(n) if isinstance(n, int) else n for n in numbers]
        return [_lane_word(self._hash, n) for n in numbers]

    def column_mark(self, column):
        """What a column adds to the hash."""
        if not self.side.stochastic:
            return None
        return _folded(ptx.add(ptx.mul(column, _word(0x85EBCA77)), self._second))

    def block_of(self, top):
        """Reciprocal and scale of a block from its largest magnitude; NaN if that is not finite."""
        plan = self.plan
        if self.side.overrange != 1.0:
            larger = ptx.fmin(ptx.fmul(top, ptx.f32(self.side.overrange)), ptx.f32(FLOAT32_MAX))
            top = ptx.select(ptx.feq(top, ptx.f32(math.inf)), top, larger)
        finite = ptx.fge(ptx.f32(FLOAT32_MAX), top)
        scale = self._e4m3_scale(top) if plan.format.two_level else self._e8m0_scale(top, finite)
        scale = ptx.fmax(scale, ptx.f32(plan.scale_min))
        if not plan.format.two_level:
            scale = ptx.select(ptx.feq(top, ptx.f32(0.0)), ptx.f32(1.0), scale)
        scale = ptx.select(finite, scale, ptx.f32(math.nan))
        whole = scale if self.decode is None else ptx.fmul(scale, self.decode)
        (reciprocal,) = ptx.asm("rcp.rn.f32 $0, $1;", "f", [whole])
        return ptx.fmin(reciprocal, ptx.f32(FLOAT32_MAX)), scale

    def finished(self, block):
        """A block as `round` takes it: with what makes multiples of its scale of whole numbers.

        Those lie above 2^23. A scale of E8M0 may be too large to be multiplied by that.
        """
        reciprocal, scale = block
        factor = ptx.f32(1.0) if self.decode is None else scale
        factor = ptx.fmul(factor, ptx.f32(2.0**-self.element.mantissa_bits))
        return reciprocal, scale, factor, ptx.fmul(factor, ptx.f32(-(2.0**23)))

    def _e4m3_scale(self, top):
        largest = [ptx.f32(value) for value in (self.element.max, 1 / self.element.max)]
        wanted = ptx.fmul(_quotient(top, *largest), self.encode)
        text = (
            "{ .reg .b16 code, lo, hi; .reg .b32 pair;\n"
            "cvt.rn.satfinite.e4m3x2.f32 code, $1, $1;\n"
            "cvt.rn.f16x2.e4m3x2 pair, code;\n"
            "mov.b32 {lo, hi}, pair; cvt.f32.f16 $0, lo; }"
        )
        return ptx.asm(text, "f", [wanted])[0]

    def _e8m0_scale(self, top, finite):
        known = ptx.select(finite, top, ptx.f32(1.0))
        if self.side.scale_rule == "floor":
            exponent = ptx.sub(_exponent(known), ptx.i32(self.element.max_exponent))
        else:
            ratio = _div(known, ptx.f32(self.element.max))
            exponent = _exponent(ratio)
            above = ptx.fge(_power(exponent), ratio)  # false: the ratio needs the next power
            exponent = ptx.add(exponent, ptx.sub(ptx.i32(1), ptx.flag(above)))
        return _power(exponent)

    def round(self, x, block, row_hash, column_mark):
        """The value that ``x`` is rounded to, with its scale.

        In units of the spacing around it the magnitude is rounded to a whole number, by adding 2^23
        to it. Stochastic rounding takes the floor of its sum with the noise: rounding that sum
        downwards loses nothing that the floor would see.
        """
        reciprocal, scale, factor, offset = block
        mantissa = self.element.mantissa_bits
        u = ptx.fmin(ptx.fmul(ptx.fabs(x), reciprocal), ptx.f32(self.element.max))
        power = ptx.from_bits(ptx.land(ptx.bits(u), ptx.i32(_EXPONENT)))
        power = ptx.fmax(power, ptx.f32(2.0**self.element.min_exponent))
        per_unit = ptx.from_bits(ptx.sub(_word(254 + mantissa << 23), ptx.bits(power)))
        if not self.side.stochastic:
            whole = ptx.fma(u, per_unit, ptx.f32(2.0**23))
        else:
            units = _down("fma", u, per_unit, ptx.f32(-1.0))
            units = _down("add", units, self._noise(row_hash, column_mark))
            whole = _down("add", units, ptx.f32(2.0**23))
        # Products of a few bits, which are exact but for the last one.
        value = ptx.fma(whole, factor, offset)
        value = ptx.fmul(value, ptx.fmul(power, scale if self.decode is None else self.decode))
        sign = ptx.land(ptx.bits(x), _word(0x80000000))
        return ptx.from_bits(ptx.lor(ptx.bits(value), sign))

    def _noise(self, row_hash, column_mark):
        """1 plus a uniform number of 23 bits, as in `jax.random.uniform` before it takes the 1."""
        x = _half_mixed(ptx.xor(row_hash, column_mark))
        # The last step of the hash and the shift by 9 in one.
        bits = ptx.xor(ptx.shr(x, ptx.i32(9)), ptx.shr(x, ptx.i32(25)))
        return ptx.from_bits(ptx.lor(bits, ptx.i32(0x3F800000)))


# -- arithmetic ------------------------------------------------------------------------------------


def _word(value: int):
    """A constant of 32 bits."""
    return ptx.i32(value - (1 << 32) if value >= 1 << 31 else value)


def _lane_word(word, lane):
    """The word of another lane of the warp."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    return ptx.asm(text, "r", [word, lane], effects=True)[0]


def _from_lane(value, lane):
    return ptx.from_bits(_lane_word(ptx.bits(value), lane))


def _folded(x):
    """The first step of the hash, which of a sum without carries is that of its parts."""
    return ptx.xor(x, ptx.shr(x, ptx.i32(16)))


def _half_mixed(x):
    """The hash of `formats.counter_random` without its first and its last step."""
    x = ptx.mul(x, _word(0x7FEB352D))
    return ptx.mul(ptx.xor(x, ptx.shr(x, ptx.i32(15))), _word(0x846CA68B))


def _mix(x):
    return _folded(_half_mixed(_folded(x)))


def _down(name: str, *operands):
    """Sum ("add") or product and sum ("fma"), rounded downwards."""
    places = ", ".join(f"${i}" for i in range(len(operands) + 1))
    return ptx.asm(f"{name}.rm.f32 {places};", "f", list(operands))[0]


def _div(a, b):
    """Quotient, correctly rounded."""
    return ptx.asm("div.rn.f32 $0, $1, $2;", "f", [a, b])[0]


def _quotient(x, divisor, inverse):
    """``x / divisor``, correctly rounded, from the rounded inverse: Markstein's correction."""
    near = ptx.fmul(x, inverse)
    return ptx.fma(ptx.fma(ptx.fneg(near), divisor, x), inverse, near)


def _fp8x4(values, kind: str):
    """Four numbers as codes of one word, the first in the lowest byte."""
    if kind == "e4m3":
        return ptx.e4m3x4(values)
    text = (
        "{ .reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e5m2x2.f32 lo, $2, $1;\n"
        "cvt.rn.satfinite.e5m2x2.f32 hi, $4, $3;\n"
        "mov.b32 $0, {lo, hi}; }"
    )
    return ptx.asm(text, "r", values)[0]


def _exponent(x):
    """floor(log2 x) of a positive number, -127 for 0 and subnormals."""
    return ptx.sub(ptx.shr(ptx.bits(x), ptx.i32(23)), ptx.i32(127))


def _power(exponent):
    """2 to the exponent, which is held within -126 and 127."""
    exponent = ptx.imin(ptx.imax(exponent, ptx.i32(-126)), ptx.i32(127))
    return ptx.from_bits(ptx.shl(ptx.add(exponent, ptx.i32(127)), ptx.i32(23)))


def _rotate(values, signs):
    """``values · diag(signs) · Hadamard / 4`` by sums and differences, 16 values at a time."""
    out = []
    for first in range(0, len(values), ROTATION):
        run = [
            x if sign > 0 else ptx.fneg(x)
            for x, sign in zip(values[first : first + ROTATION], signs, strict=True)
        ]
        for distance in (1, 2, 4, 8):
            pairs = [(run[i & ~distance], run[i | distance], i & distance) for i in range(ROTATION)]
            run = [ptx.fsub(a, b) if second else ptx.fadd(a, b) for a, b, second in pairs]
        out += [ptx.fmul(x, ptx.f32(0.25)) for x in run]
    return out


def _load_f32(ref, byte: int):
    where = ptx.address(ref, ptx.i64(byte))
    return ptx.asm("ld.global.f32 $0, [$1];", "f", [where], effects=True)[0]


def _load_i32(ref, byte: int):
    where = ptx.address(ref, ptx.i64(byte))
    return ptx.asm("ld.global.b32 $0, [$1];", "r", [where], effects=True)[0]
