# SPDX-License-Identifier: Apache-2.0
"""Attention on Hopper: 8-bit or 16-bit scores and values, float32 sums.

One kernel computes ``softmax(scale * Q K^T) V``. Two *compute* warpgroups own 64 query rows each; a
*memory* warpgroup feeds them K and V tiles through a ring in shared memory. For each tile of keys
a compute warpgroup

1. multiplies its rows with the keys into a tile of scores (s32 for INT8: exact),
2. turns it into P, e4m3 of ``448 * exp2(x - m)`` or 16 bits, which stays in registers,
3. multiplies ``P`` with V into a *fresh* float32 tile; for 8-bit V, ``[V^T; 1]``, whose last eight
   columns are row sums,
4. adds that tile to the float32 output: ``out = alpha * out + tile``.

Step 3 starts from zero every time because the FP8 accumulator of the tensor core keeps only about
14 bits: a running sum drifts by 18 % once the values have a mean ("two-level accumulation").

Where the speed comes from:

* Tensor-core tiles start from zero by the scale-d predicate of ``wgmma``, not by writing zeros, so
  two-level accumulation costs no more instructions than one running accumulator.
* The row maximum is taken on the raw integers: a three-input maximum serves two scores. Conversion
  to float, scaling, exp2 and conversion to e4m3 are PTX for four scores at a time.
* Row sums come out of the tensor core; the factor 448 sits in the exponent.
* Q is quantised by the warpgroup that owns its rows, while the other one multiplies.
* A token lets one warpgroup multiply (values of one tile, scores of the next) while the other
  computes its softmax.
* A persistent grid hides one query tile's epilogue and the next one's first loads. A table made at
  trace time hands out tiles, longest first under a causal mask, as a dynamic scheduler would.

Which tiles of keys a query tile visits follows from the rules, or comes as lists (block masks). A
list is walked from its end; its places, not the tiles' numbers, say what needs a mask. Two listed
tiles may fill one slot of the ring, and two warpgroups may have lists of their own, of which each
tile in either is loaded once.

Measured and left out, since they did not help on an H200: starting the next tile's scores before
this tile's values are summed (ptxas inserts a full wait), 128 keys per tile with two or three
compute warpgroups, a cubic polynomial for part of the exp2, exp2 in half precision, integer
addition in place of the conversion to float, and cutting the softmax into slices that mix exp2
with conversions.

References: SageAttention2 (arXiv 2411.10958), section 3; FlashAttention-3 (arXiv 2407.08608),
section 3; PTX ISA, ``wgmma.mma_async``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import _ptx as ptx
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.attention.mosaic_sm90_plan import PART, SMEM_LIMIT, Plan, div
from pallas_kernels.ops.attention.mosaic_sm90_tile import NO_MAX, ROWS, Position
from pallas_kernels.ops.quantize.mosaic_sm90 import encode_q_tile

V_SWIZZLE = 128  # bytes, of 8-bit V
_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COL = plgpu.Layout.WGMMA.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())

# -- wgmma -----------------------------------------------------------------------------------------


def _swizzle(width_bytes: int) -> int:
    """The widest swizzle whose atoms fill rows of so many bytes."""
    return next(s for s in (128, 64, 32) if width_bytes % s == 0)


def _offsets(ref, swizzle, leading, stride, offsets) -> list[ir.Value]:
    """wgmma descriptors of an operand in shared memory at some byte offsets."""
    base = mma_utils.encode_descriptor(
        ref, leading_byte_offset=leading, stride_byte_offset=stride, swizzle=swizzle
    )
    none = llvm.IntegerOverflowFlags.none
    return [llvm.add(base, ptx.i64(offset >> 4), overflow_flags=none) for offset in offsets]


def _k_major(ref, swizzle: int, first_row: int = 0) -> list[ir.Value]:
    """Descriptors, one per 32 bytes of columns, of an operand [rows, k] with k contiguous.

    The operand is tiled (rows/8, k/swizzle, 8, swizzle) in shared memory, or comes as parts of its
    columns, one atom wide, that are tiled (parts, rows/8, 1, 8, swizzle).
    """
    shape = ir.MemRefType(ref.type).shape
    atom = 8 * swizzle
    if len(shape) == 5:
        parts, row_tiles = shape[:2]
        start = first_row // 8 * atom
        offsets = [
            start + a * row_tiles * atom + 32 * i
            for a in range(parts)
            for i in range(swizzle // 32)
        ]
        return _offsets(ref, swizzle, 0, atom, offsets)
    k_tiles = shape[1]
    start = first_row // 8 * k_tiles * atom
    offsets = [start + a * atom + 32 * i for a in range(k_tiles) for i in range(swizzle // 32)]
    return _offsets(ref, swizzle, 0, k_tiles * atom, offsets)


def _mn_major(ref, swizzle: int, first_col: int) -> list[ir.Value]:
    """Descriptors, one per 16 rows, of a 16-bit operand [k, n] with n contiguous.

    The operand is tiled (k/8, 2n/swizzle, 8, swizzle/2) in shared memory.
    """
    k_tiles, n_tiles, _, width = ir.MemRefType(ref.type).shape
    atom = 8 * swizzle
    start = first_col // width * atom
    offsets = [start + 2 * i * n_tiles * atom for i in range(k_tiles // 2)]
    return _offsets(ref, swizzle, atom, n_tiles * atom, offsets)


def _wgmma(n, a, b, acc: str, kind: str, transposed: bool = False) -> list[ir.Value]:
    """Issues ``fresh tile [64, n] = A @ B`` as one group of wgmma and commits it.

    ``a`` is a list over steps of one descriptor or of four registers, ``b`` a list of descriptors.
    The first step ignores the accumulator's old contents: no instruction is spent on clearing it.

    Args:
        n: columns.
        a: steps of the left operand.
        b: steps of the right operand.
        acc: "r" or "f".
        kind: types, as in the instruction's name.
        transposed: B is [k, n] in memory.
    """
    count = n // 2
    number = count
    k, flags = 32, "" if acc == "r" else ", 1, 1"
    if "f16" in kind:
        k = 16
        flags += (", 0" if not isinstance(a[0], list) else "") + f", {int(transposed)}"
    operands, lines = [], []
    tile = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    for step, (a_step, b_step) in enumerate(zip(a, b, strict=True)):
        a_step = a_step if isinstance(a_step, list) else [a_step]
        names = [f"${number + i}" for i in range(len(a_step) + 1)]
        number += len(names)
        operands += [*a_step, b_step]
        a_text = names[0] if len(a_step) == 1 else "{" + ",".join(names[:-1]) + "}"
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{kind} "
            f"{tile}, {a_text}, {names[-1]}, {'later' if step else 'first'}{flags};"
        )
    text = "\n".join(
        [
            "{ .reg .pred first, later;",
            "setp.ne.b32 first, 0, 0;",
            "setp.ne.b32 later, 1, 0;",
            "wgmma.fence.sync.aligned;",
            *lines,
            "wgmma.commit_group.sync.aligned;",
            "}",
        ]
    )
    return ptx.asm(text, acc * count, operands, effects=True)


def _wait(n: int, values: list[ir.Value], keep=()) -> list[ir.Value]:
    """Waits until at most ``n`` groups are in flight; ``keep`` stays alive until then."""
    text = f"wgmma.wait_group.sync.aligned {n};"
    return ptx.asm(text, "", list(keep), tied=values, effects=True)


def _opaque(values: list[ir.Value]) -> list[ir.Value]:
    """Pins values to this point of the program, in order with barriers."""
    return ptx.asm("", "", [], tied=values, effects=True)


# -- one compute warpgroup's steps -----------------------------------------------------------------


def _shape(shape, dtype, layout):
    return plgpu.ShapeDtypeStruct(tuple(shape), dtype, layout=layout)


def _transforms(swizzle, itemsize=1):
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def _inline(body, inputs, outs=()):
    """Runs ``body`` on registers.

    Args:
        body: takes a list of registers per array and the memref of each reference; returns a list
            of registers per output.
        inputs: pairs of an array and its layout, or of a reference and its transforms.
        outs: shapes, dtypes and layouts of the results.

    Returns:
        List of arrays.
    """
    types = tuple(plgpu.RefType(t) if isinstance(t, tuple) else t for _, t in inputs)

    @plgpu.inline_mgpu(arg_types=types, return_type=tuple(outs) or None)
    def run(ctx, *given):
        del ctx
        is_ref = [isinstance(t, plgpu.RefType) for t in types]
        values = body(*[g if ref else ptx.unpack(g) for g, ref in zip(given, is_ref, strict=True)])
        if not outs:
            return None
        return tuple(
            ptx.pack(v, o.shape, o.layout, o.dtype) for v, o in zip(values, outs, strict=True)
        )

    result = run(*(x for x, _ in inputs))
    return list(result) if outs else []


class Steps:
    """The kernel's steps, bound to one launch."""

    def __init__(self, plan: Plan):
        config, variant, head_dim = plan.config, plan.variant, plan.head_dim
        self.config, self.variant, self.head_dim = config, variant, head_dim
        kv, self.part = config.block_kv, PART[head_dim]
        self.parts = head_dim // self.part
        # V of 8 bits lies in one piece for each listed tile, so that each is copied whole.
        self.pieces = plan.joined if variant.pv == "e4m3" else 1
        self.k_transforms = _transforms(_swizzle(head_dim * variant.qk_bytes), variant.qk_bytes)
        wide = self.part * 2 if variant.pv == "half" else V_SWIZZLE
        # A tile of 64 8-bit tokens has rows of 64 bytes.
        self.v_swizzle = min(_swizzle(wide), kv // self.pieces * variant.pv_bytes)
        self.v_transforms = _transforms(self.v_swizzle, variant.pv_bytes)
        half = jnp.dtype(variant.half)
        self.qk_dtype = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn, "half": half}[variant.qk]
        self.pv_dtype = {"e4m3": jnp.float8_e4m3fn, "half": half}[variant.pv]
        score = jnp.int32 if variant.qk == "int8" else jnp.float32
        self.scores_type = _shape((ROWS, kv // config.qk_split), score, _ACC)
        self.tops_type = _shape((ROWS, 8), score, _ACC)
        layout = plgpu.Layout.WGMMA if variant.pv == "half" else plgpu.Layout.WGMMA_8BIT
        self.p_type = _shape((ROWS, kv), self.pv_dtype, layout)
        self.row_type = _shape((ROWS,), jnp.float32, _ROW)
        self.out_types = [_shape((ROWS, self.part), jnp.float32, _ACC)] * self.parts

    def encode_q(self, raw_ref, q_ref, scale_ref, dot_ref, mean, limit):
        """Rows of Q as 8-bit codes in shared memory, with their scales and ``q · mean(K)``.

        Args:
            raw_ref: 16-bit rows.
            q_ref: their codes.
            scale_ref: a scale per row.
            dot_ref: a product per row.
            mean: reference and its first two indices, or an empty list.
            limit: number of rows that exist.
        """
        inputs = [(raw_ref, ()), (q_ref, self.k_transforms), (scale_ref, ()), (dot_ref, ())]
        inputs += [(limit, _SCALAR)]
        inputs += [(mean[0], ()), *((x, _SCALAR) for x in mean[1:])] if mean else []

        def body(raw, codes, scales, dots, limit, *mean):
            encode_q_tile(
                raw, codes, scales, dots, (mean[0], mean[1][0], mean[2][0]) if mean else None,
                limit[0], dtype=jnp.dtype(self.variant.half), qk=self.variant.qk,
                swizzle=self.k_transforms[1].swizzle, rows=ROWS,
            )  # fmt: skip
            return []

        _inline(body, inputs)

    def issue_scores(self, q_ref, k_ref):
        """Starts Q K^T; with ``qk_split`` 2 as two products of half the keys each."""
        swizzle = self.k_transforms[1].swizzle
        width = self.config.block_kv // self.config.qk_split
        half = {"bfloat16": "f32.bf16.bf16", "float16": "f32.f16.f16"}[self.variant.half]
        kind = {"int8": "s32.s8.s8", "e4m3": "f32.e4m3.e4m3", "half": half}[self.variant.qk]
        acc = "r" if self.variant.qk == "int8" else "f"

        def body(q, k):
            return [
                _wgmma(width, _k_major(q, swizzle), _k_major(k, swizzle, i * width), acc, kind)
                for i in range(self.config.qk_split)
            ]

        inputs = [(q_ref, self.k_transforms), (k_ref, self.k_transforms)]
        return _inline(body, inputs, [self.scores_type] * self.config.qk_split)

    def wait_scores(self, scores):
        """Waits for Q K^T. The first half's maxima are taken while the second is multiplied."""
        split, is_int = self.config.qk_split, self.variant.qk == "int8"

        def body(*scores):
            halves, tops = [], []
            for part, half in enumerate(scores):
                left = split - 1 - part
                halves.append(_wait(left, half))
                if left:
                    groups = [halves[-1][i::4] for i in range(4)]
                    tops.append(_opaque([tile_math.maximum(g, is_int) for g in groups]))
            return [*halves, *tops]

        outs = [self.scores_type] * split + [self.tops_type] * (split - 1)
        return _inline(body, [(half, _ACC) for half in scores], outs)

    def softmax(self, scores, m, row_scale, col_scale, shift, positions):
        """P as an operand, new maxima, factors on old sums, and row sums of 16-bit P.

        Args:
            scores: from `wait_scores`.
            m: running maxima.
            row_scale: array of a scale per row.
            col_scale: list of arrays [8] of column scales.
            shift: list of none or one array per row, for a soft cap.
            positions: dictionaries of the fields of `Position`, one for each part of the tile from
                elsewhere in K; none where nothing is masked.
        """
        special = {"q_ids": _ROW, "kv_ids": _COL}
        inputs = [(x, _ACC) for x in scores] + [(m, _ROW), (row_scale, _ROW)]
        inputs += [(x, _COL) for x in col_scale] + [(x, _ROW) for x in shift]
        where = [item for position in positions for item in position.items()]
        inputs += [(x, special.get(name, _SCALAR)) for name, x in where]
        counts = (len(scores), 1, 1, len(col_scale), len(shift), *map(len, positions))
        split, is_int = self.config.qk_split, self.variant.qk == "int8"

        def body(*given):
            rest = iter(given)
            scores, (m,), (row_scale,), col_scale, shift, *where = (
                [next(rest) for _ in range(count)] for count in counts
            )
            tile = [r for half in scores[:split] for r in half]
            parts = len(positions)
            for part, (position, values) in enumerate(zip(positions, where, strict=True)):
                fields = {
                    name: x if name in special else x[0]
                    for name, x in zip(position, values, strict=True)
                }
                own = slice(part * len(tile) // parts, (part + 1) * len(tile) // parts)
                tile[own] = tile_math.mask_scores(tile[own], Position(**fields), is_int)
            p, m, alpha, sums = tile_math.softmax(
                self.variant, tile, m, row_scale, [s for block in col_scale for s in block],
                shift[0] if shift else (), masked=bool(positions),
                tops=[r for half in scores[split:] for r in half],
            )  # fmt: skip
            return [_opaque(p), m, alpha, *([sums] if sums else [])]

        sums = [] if self.variant.ones else [self.row_type]
        return _inline(body, inputs, [self.p_type, self.row_type, self.row_type, *sums])

    def values(self, p, v_ref, part: int):
        """Columns of P V (and the row sums, in the last part's columns of ones), waited for."""
        variant, last = self.variant, part == self.parts - 1
        width = self.part + (variant.ones if last else 0)
        names = {"bfloat16": "f32.bf16.bf16", "float16": "f32.f16.f16"}
        kind = names[variant.half] if variant.pv == "half" else "f32.e4m3.e4m3"

        def body(p, v):
            a = [p[i : i + 4] for i in range(0, len(p), 4)]
            if variant.pv == "half":
                b = _mn_major(v, self.v_swizzle, part * self.part)
            else:
                b = _k_major(v, self.v_swizzle, part * self.part)
            tile = _wgmma(width, a, b, "f", kind, transposed=variant.pv == "half")
            return [_wait(0, tile, keep=p)]

        inputs = [(p, self.p_type.layout), (v_ref, self.v_transforms)]
        return _inline(body, inputs, [_shape((ROWS, width), jnp.float32, _ACC)])[0]

    def add_tile(self, out, tile, alpha):
        """``alpha * out + tile`` for one part of the columns."""
        inputs = [(out, _ACC), (tile, _ACC), (alpha, _ROW)]
        body = lambda *x: [tile_math.add_tile(*x)]  # noqa: E731
        return _inline(body, inputs, self.out_types[:1])[0]

    def add_sums(self, total, alpha, tile, sums):
        """``alpha * total`` plus the tile's row sums."""

        def body(total, alpha, tile, *sums):
            given = sums[0] if sums else None
            return [tile_math.add_sums(self.variant, total, alpha, tile, self.part, given)]

        inputs = [(total, _ROW), (alpha, _ROW), (tile, _ACC), *((s, _ROW) for s in sums)]
        return _inline(body, inputs, [self.row_type])[0]

    def start(self):
        """Zero output, zero row sum, lowest maximum."""

        def body():
            zeros = [ptx.f32(0.0)] * (self.part // 2)
            return [*[zeros] * self.parts, [ptx.f32(0.0)] * 2, [ptx.f32(NO_MAX)] * 2]

        *outs, total, m = _inline(body, [], [*self.out_types, self.row_type, self.row_type])
        return tuple(outs), total, m

    def finish(self, total, m, const, sink):
        """Factor on the rows, and natural log-sum-exp.

        Args:
            total: row sums.
            m: maxima.
            const: list of none or one array of what smoothing took from each row's logits.
            sink: list of none or one scalar.
        """
        inputs = [(total, _ROW), (m, _ROW), *((c, _ROW) for c in const)]
        inputs += [(s, _SCALAR) for s in sink]

        def body(total, m, *rest):
            extra = {"const": rest[0]} if const else {}
            if sink:
                extra["sink"] = rest[-1][0]
            return tile_math.finish(self.variant, total, m, **extra)

        return _inline(body, inputs, [self.row_type, self.row_type])

    def scale_out(self, out, factor, v_scale):
        """One part of the output, ready to be stored."""
        inputs = [(out, _ACC), (factor, _ROW), *((s, _COL) for s in v_scale)]

        def body(out, factor, *channel):
            return [tile_math.scale_out(out, factor, channel[0] if channel else ())]

        outs = [_shape((ROWS, self.part), jnp.float32, plgpu.Layout.WGMMA)]
        return _inline(body, inputs, outs)[0]

    def write_ones(self, v_ref):
        """Fills the eight rows of ones below V^T in one stage; with equal bytes swizzle is moot."""
        if not self.variant.ones:
            return
        kv = self.config.block_kv // self.pieces
        size = (self.head_dim + 8) * kv

        def body(v):
            for first in range(self.head_dim * kv, self.pieces * size, size):
                for start in range(0, 8 * kv, 128 * 4):
                    offset = ptx.add(ptx.mul(ptx.thread(), ptx.i32(4)), ptx.i32(first))
                    where = ptx.address(v, ptx.widen(ptx.add(offset, ptx.i32(start))))
                    word = ptx.i32(0x38383838)
                    ptx.asm("st.shared.b32 [$0], $1;", "", [where, word], effects=True)
            return []

        _inline(body, [(v_ref, self.v_transforms)])


# -- the kernel ------------------------------------------------------------------------------------


def _kernel(plan: Plan, names: tuple[str, ...], scale: float, out_dtype):
    """Builds the kernel's entry function.

    Args:
        plan: static facts.
        names: what its operands are, in order; see `launch`.
        scale: factor on the logits.
        out_dtype: dtype of the output.
    """
    config, variant, head_dim = plan.config, plan.variant, plan.head_dim
    kv, stages, compute = config.block_kv, config.num_stages, config.num_compute
    steps = Steps(plan)
    i32 = jnp.int32
    groups = plan.num_heads // plan.num_kv_heads
    part, joined, tile_kv = PART[head_dim], plan.joined, kv // plan.joined

    def limits(refs, b):
        """Fields of `Position` that do not depend on the tile."""
        if plan.dynamic:
            values = [refs["bounds"][b, i] for i in range(4)]
        else:
            values = [plan.q_len, plan.kv_len, plan.min_diff, plan.max_diff]
        fields = dict(zip(("q_len", "kv_len", "min_diff", "max_diff"), values, strict=True))
        for name, present in zip(("min_diff", "max_diff"), plan.bounded, strict=True):
            if not present:
                del fields[name]
        return {name: jnp.asarray(x, i32) for name, x in fields.items()}

    def kv_range(refs, q_tile, b, n, wg=0):
        if plan.listed:
            row = 2 * q_tile + wg if plan.paired else div(q_tile, plan.listed // config.block_q)
            return [list_entry(refs, "ranges", b, n, row, i) for i in range(4)]
        if plan.dynamic:
            return [refs["tiles"][b, q_tile, i] for i in range(4)]
        return [jnp.asarray(x, i32) for x in plan.kv_tiles(q_tile)]

    def list_entry(refs, name, b, n, row, i):
        """Entry i of a row of a block mask, which batch entries and heads may share."""
        shape = refs[name].shape
        return refs[name][b if shape[0] > 1 else 0, n if shape[1] > 1 else 0, row, i]

    def tile_at(refs, place, b, n, row):
        """Number of a K/V tile from its place, which may lie before the first or after the last."""
        last = refs["list"].shape[-1] - 1
        return list_entry(refs, "list", b, n, row, lax.clamp(i32(0), place, i32(last)))

    def listed_tiles(refs, place, b, n, q_tile):
        """The tiles of one step, whose first lies at a place of the query tile's list."""
        row = div(q_tile, plan.listed // config.block_q)
        return [tile_at(refs, place - i, b, n, row) for i in range(joined)]

    def merged(refs, q_tile, b, n):
        """Walks over the tiles that either warpgroup's rows list, from the last to the first.

        A walk is the place in the first list and the tile there, or -1 at its end, and the same of
        the second list.

        Returns:
            The first walk, and a function from one to the next.
        """
        rows = (2 * q_tile, 2 * q_tile + 1)

        def at(row, place):
            return place, jnp.where(place < 0, i32(-1), tile_at(refs, place, b, n, row))

        def following(walk):
            tile = nearest(walk)
            places = [jnp.where(walk[1] == tile, walk[0] - 1, walk[0])]
            places += [jnp.where(walk[3] == tile, walk[2] - 1, walk[2])]
            return (*at(rows[0], places[0]), *at(rows[1], places[1]))

        counts = [list_entry(refs, "ranges", b, n, row, 3) for row in rows]
        return (*at(rows[0], counts[0] - 1), *at(rows[1], counts[1] - 1)), following

    def nearest(walk):
        """The tile of a walk, -1 after the last one."""
        return jnp.maximum(walk[1], walk[3])

    def for_each_tile(refs, run):
        """Runs ``run(tile, step) -> step`` over this block's tiles; steps count K/V tiles."""
        order, block = refs["order"], lax.axis_index("block")
        lax.fori_loop(
            i32(0), order[block, 0], lambda i, step: run(order[block, i + 1], step), i32(0)
        )

    def slot_of(step):
        return lax.rem(step, i32(stages))

    def memory_group(refs, smem, ready, free):
        q_smem, k_smem, v_smem, *_, raw_smem = smem
        (q_ready, k_ready, v_ready), (q_free, k_free, v_free) = ready, free
        q_target = raw_smem[0] if plan.raw_q else q_smem

        def load_v(b, head, tokens, slot, part):
            if variant.pv == "half":
                source = refs["v"].at[b, tokens, head]
                target = v_smem.at[slot, *rows_of(part)]
            else:
                source = refs["v"].at[b, head, :, tokens]
                piece = (part,) if joined > 1 else ()
                target = v_smem.at[slot, *piece, pl.ds(0, head_dim)]
            plgpu.copy_gmem_to_smem(source, target, v_ready.at[slot])

        def rows_of(part):
            """Where a listed tile goes within a slot; a slot of one tile is not cut."""
            return (pl.ds(part * tile_kv, tile_kv),) if joined > 1 else ()

        def one_tile(index, step):
            q_tile, b, n = plan.tile_of(index)
            kv_head = div(n, groups)
            lo, _, _, hi = kv_range(refs, q_tile, b, n)
            # What leads to the first K/V tile is asked for before the wait for Q's place.
            if plan.paired:
                walk, following = merged(refs, q_tile, b, n)
            elif plan.listed:
                first = listed_tiles(refs, hi - 1, b, n, q_tile)
            for w in range(compute):
                rows = pl.ds(q_tile * config.block_q + w * ROWS, ROWS)
                plgpu.barrier_wait(q_free.at[w])
                plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, n], q_target.at[w], q_ready.at[w])

            def load(step, *tiles):
                tokens, slot = [pl.ds(tile * tile_kv, tile_kv) for tile in tiles], slot_of(step)
                plgpu.barrier_wait(k_free.at[slot])
                for part, t in enumerate(tokens):
                    target = k_smem.at[slot, *rows_of(part)]
                    plgpu.copy_gmem_to_smem(refs["k"].at[b, t, kv_head], target, k_ready.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                for part, t in enumerate(tokens):
                    load_v(b, kv_head, t, slot, part)
                return step + 1

            if plan.paired:

                def load_merged(state):
                    then = following(state[1])
                    return load(state[0], nearest(state[1])), then

                return lax.while_loop(lambda x: nearest(x[1]) >= 0, load_merged, (step, walk))[0]

            def load_listed(i, state):
                step, *tiles = state
                then = listed_tiles(refs, hi - 1 - (i + 1) * joined, b, n, q_tile)
                return load(step, *tiles), *then

            if plan.listed:
                count = div(hi + joined - 1, joined)
                return lax.fori_loop(i32(0), count, load_listed, (step, *first))[0]
            return lax.fori_loop(i32(0), hi - lo, lambda i, step: load(step, hi - 1 - i), step)

        for_each_tile(refs, one_tile)

    def load_rows(refs, name, b, n, start, factor=1.0):
        """A number per row of this warpgroup's tile, as a list: empty if there is no such array."""
        if name not in refs:
            return []
        rows = refs[name].at[b, n, pl.ds(start, ROWS)]
        return [plgpu.load(rows, layout=_ROW, optimized=False) * jnp.float32(factor)]

    def compute_group(wg, refs, smem, ready, free, turn):
        q_smem, k_smem, v_smem, o_smem, lse_smem, raw_smem = smem
        (q_ready, k_ready, v_ready), (q_free, k_free, v_free) = ready, free
        hold = config.schedule == "hold"

        def take_token():
            if hold:
                plgpu.barrier_wait(turn.at[wg])

        def pass_token():
            if hold:
                plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, i32(compute))])

        def smem_rows(ref, factor):
            rows = plgpu.load(ref.at[wg], layout=_ROW, optimized=False)
            return [rows * jnp.float32(factor)]

        def row_const(refs, raw_smem, b, n, start, factor):
            """What smoothing took from each row's logits, as `load_rows`."""
            if "k_mean" in refs:
                return smem_rows(raw_smem[2], factor)
            return load_rows(refs, "row_const", b, n, start, factor)

        def encode_q(refs, smem, q_start, b, kv_head, q_len):
            plgpu.barrier_wait(q_ready.at[wg])
            raw, scales, dots = (x.at[wg] for x in smem[-1])
            mean = [refs["k_mean"], b, kv_head] if "k_mean" in refs else []
            steps.encode_q(raw, q_smem.at[wg], scales, dots, mean, q_len - q_start)

        def load_columns(name, b, start, size):
            return plgpu.load(refs[name].at[b, pl.ds(start, size)], layout=_COL, optimized=False)

        @pl.when(wg == 0)
        def _ones():
            for slot in range(stages):
                steps.write_ones(v_smem.at[slot])

        # The other warpgroup reads the ones: they must be visible before any V is loaded.
        plgpu.commit_smem()
        for slot in range(stages):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
        plgpu.barrier_arrive(q_free.at[wg])
        pl.when(wg == compute - 1)(pass_token)

        def one_tile(index, step0):
            q_tile, b, n = plan.tile_of(index)
            kv_head = div(n, groups)
            fixed = limits(refs, b)
            lo, mid_lo, mid_hi, hi = kv_range(refs, q_tile, b, n, wg)
            end = step0 + (hi - lo if joined == 1 else div(hi + joined - 1, joined))
            q_start = q_tile * config.block_q + wg * ROWS
            factor = variant.logit_factor(scale)
            capped = variant.soft_cap is not None
            if plan.raw_q:
                encode_q(refs, smem, q_start, b, kv_head, fixed["q_len"])
                # Codes are written, and the rows read: the next tile's may be loaded.
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_free.at[wg])
                row_scale = smem_rows(raw_smem[1], factor)
            else:
                row_scale = load_rows(refs, "q_scale", b, n, q_start, factor)
            row_scale = row_scale or [plgpu.layout_cast(jnp.full((ROWS,), factor), _ROW)]
            shift = row_const(refs, raw_smem, b, n, q_start, factor) if capped else []
            if capped and not shift:
                shift = [plgpu.layout_cast(jnp.zeros((ROWS,)), _ROW)]
            if plan.segmented:
                ids = refs["q_ids"].at[b, pl.ds(q_start, ROWS)]
                fixed["q_ids"] = plgpu.load(ids, layout=_ROW, optimized=False)

            def column_scales(tiles):
                if "k_scale" not in refs:
                    return []
                blocks = tile_kv // plan.scale_block
                rows = [
                    refs["k_scale"].at[b, kv_head, tile * blocks + i]
                    for tile in tiles
                    for i in range(blocks)
                ]
                return [plgpu.load(row, layout=_COL, optimized=False) for row in rows]

            def position(tile, place=None):
                where = {"row": q_start, "col": tile * tile_kv, **fixed}
                if place is not None:  # Before the list's first place there is no tile.
                    where["kv_len"] = jnp.where(place < 0, i32(0), where["kv_len"])
                if plan.segmented:
                    where["kv_ids"] = load_columns("kv_ids", b, tile * tile_kv, tile_kv)
                return where

            def visit(slot, tiles, is_last, carry, positions):
                outs, total, m = carry
                col_scale = column_scales(tiles)
                plgpu.barrier_wait(k_ready.at[slot])
                with jax.named_scope("scores"):
                    scores = steps.issue_scores(q_smem.at[wg], k_smem.at[slot])
                    scores = steps.wait_scores(scores)
                pass_token()
                plgpu.barrier_arrive(k_free.at[slot])
                if not plan.raw_q:  # After a tile's last scores, the next tile's Q may be loaded.
                    pl.when(is_last())(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                with jax.named_scope("softmax"):
                    p, m, alpha, *sums = steps.softmax(
                        scores, m, row_scale[0], col_scale, shift, positions()
                    )
                plgpu.barrier_wait(v_ready.at[slot])
                take_token()
                with jax.named_scope("values"):
                    outs = list(outs)
                    for i in range(len(outs)):
                        new = steps.values(p, v_smem.at[slot], i)
                        if i == len(outs) - 1:
                            plgpu.barrier_arrive(v_free.at[slot])
                            total = steps.add_sums(total, alpha, new, sums)
                        outs[i] = steps.add_tile(outs[i], new, alpha)
                return tuple(outs), total, m

            def skip(slot, is_last):
                """The other warpgroup's tile."""
                plgpu.barrier_wait(k_ready.at[slot])
                pass_token()
                plgpu.barrier_arrive(k_free.at[slot])
                if not plan.raw_q:
                    pl.when(is_last)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                plgpu.barrier_wait(v_ready.at[slot])
                take_token()
                plgpu.barrier_arrive(v_free.at[slot])

            def times(turns):
                """Places that so many steps take."""
                return turns if joined == 1 else turns * joined

            def one_step(step, carry, is_masked):
                outs, total, m, *tiles = carry
                slot, place = slot_of(step), hi - 1 - times(step - step0)
                # A load takes its time: the next step's tiles are asked for one step ahead.
                then = listed_tiles(refs, place - joined, b, n, q_tile) if tiles else []
                tiles = tiles or [place]
                places = [place - i for i in range(joined)] if joined > 1 else [None]

                def positions():
                    return list(map(position, tiles, places)) if is_masked else []

                is_last = lambda: step == end - 1  # noqa: E731
                return *visit(slot, tiles, is_last, (outs, total, m), positions), *then

            def run(begin, stop, carry, is_masked):
                step_fn = functools.partial(one_step, is_masked=is_masked)
                return lax.fori_loop(begin, stop, step_fn, carry)

            def run_merged(carry):
                """Walks over both warpgroups' tiles and computes this one's own."""
                walk, following = merged(refs, q_tile, b, n)

                def one_step(state):
                    step, walk, carry = state
                    place, mine = (jnp.where(wg == 0, *walk[i::2]) for i in range(2))
                    slot, tile, then = slot_of(step), nearest(walk), following(walk)
                    is_last = nearest(then) < 0

                    def seen(is_masked):
                        positions = lambda: [position(tile)] if is_masked else []  # noqa: E731
                        return lambda x: visit(slot, [tile], lambda: is_last, x, positions)

                    def unseen(carry):
                        skip(slot, is_last)
                        return carry

                    branch = (mine == tile).astype(i32)
                    branches = [unseen, seen(False)]
                    if plan.needs_mask:
                        branch *= jnp.where((place >= mid_lo) & (place < mid_hi), 1, 2)
                        branches.append(seen(True))
                    return step + 1, then, lax.switch(branch, branches, carry)

                state = (step0, walk, carry)
                end, _, carry = lax.while_loop(lambda x: nearest(x[1]) >= 0, one_step, state)
                return end, carry

            single = plan.listed and not plan.paired
            first = listed_tiles(refs, hi - 1, b, n, q_tile) if single else []
            if not plan.raw_q:
                plgpu.barrier_wait(q_ready.at[wg])
            take_token()
            carry = (*steps.start(), *first)
            if plan.paired:
                end, carry = run_merged(carry)
            elif plan.needs_mask:  # From the last keys to the first: masked, without masks, masked.
                two_sided = plan.bounded[0] or plan.dynamic or plan.listed
                right_end = step0 + (hi - mid_hi)
                left_start = step0 + (hi - mid_lo) if two_sided else end
                if joined > 1:  # A step is masked if one of its tiles is, or is missing.
                    right_end = step0 + div(hi - mid_hi + joined - 1, joined)
                    left_start = jnp.maximum(step0 + div(hi - mid_lo, joined), right_end)
                carry = run(step0, right_end, carry, True)
                carry = run(right_end, left_start, carry, False)
                if two_sided:
                    carry = run(left_start, end, carry, True)
            else:
                carry = run(step0, end, carry, False)
            pass_token()
            if plan.listed and not plan.raw_q:  # Without a single step nobody said Q was read.
                pl.when(end == step0)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
            with jax.named_scope("epilogue"):
                outs, total, m, *_ = carry
                const = [] if capped else row_const(refs, raw_smem, b, n, q_start, scale)
                sink = [refs["sinks"][n]] if "sinks" in refs else []
                factor, lse = steps.finish(total, m, const, sink)
                rows = pl.ds(q_start, ROWS)
                for i, out in enumerate(outs):
                    columns = pl.ds(i * part, part)
                    v_scale = []
                    if "v_scale" in refs:
                        channels = refs["v_scale"].at[b, kv_head, columns]
                        v_scale = [plgpu.load(channels, layout=_COL, optimized=False)]
                    out = steps.scale_out(out, factor, v_scale)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_smem.at[wg][...] = out.astype(out_dtype)
                    if i == 0:
                        lse_smem.at[wg][...] = lse
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o_smem.at[wg], refs["out"].at[b, rows, n, columns])
                    if i == 0:
                        plgpu.copy_smem_to_gmem(lse_smem.at[wg], refs["lse"].at[b, n, rows])
            return end

        for_each_tile(refs, one_tile)
        plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        refs = dict(zip((*names, "out", "lse"), refs, strict=True))
        itemsize = jnp.dtype(out_dtype).itemsize
        rows = (compute, ROWS)
        v_shape = (kv, head_dim)
        if variant.pv != "half":
            v_shape = (joined, head_dim + variant.ones, tile_kv)[joined == 1 :]
        smem = [
            plgpu.SMEM((*rows, head_dim), steps.qk_dtype, transforms=steps.k_transforms),
            plgpu.SMEM((stages, kv, head_dim), steps.qk_dtype, transforms=steps.k_transforms),
            plgpu.SMEM((stages, *v_shape), steps.pv_dtype, transforms=steps.v_transforms),
            plgpu.SMEM(
                (*rows, part),
                out_dtype,
                transforms=_transforms(_swizzle(part * itemsize), itemsize),
            ),
            plgpu.SMEM(rows, jnp.float32),
        ]
        raw = [plgpu.SMEM((*rows, head_dim), jnp.dtype(variant.half))]
        raw += [plgpu.SMEM(rows, jnp.float32)] * 2  # scales, and products with the mean key
        smem.append(raw * plan.raw_q)
        ready = [plgpu.Barrier(num_barriers=compute)]
        ready += [plgpu.Barrier(num_arrivals=joined, num_barriers=stages) for _ in range(2)]
        free = [plgpu.Barrier(num_barriers=compute)]
        free += [plgpu.Barrier(num_arrivals=compute, num_barriers=stages) for _ in range(2)]

        def body(smem, ready, free, turn):
            wg = lax.axis_index("wg")

            @pl.when(wg == compute)
            def _memory():
                plgpu.set_max_registers(config.memory_registers, action="decrease")
                memory_group(refs, smem, ready, free)

            @pl.when(wg < compute)
            def _compute():
                plgpu.set_max_registers(config.registers, action="increase")
                compute_group(wg, refs, smem, ready, free, turn)

        turn = plgpu.Barrier(num_barriers=compute)
        pl.run_scoped(body, smem, ready, free, turn, collective_axes="wg")

    return entry


def launch(plan: Plan, arrays: dict[str, jax.Array], scale: float, out_dtype):
    """Runs the kernel.

    Args:
        plan: static facts.
        arrays: "q", "k", "v", "order", and where they exist "q_scale", "k_scale", "v_scale",
            "row_const", "k_mean", "sinks", "bounds", "tiles", "q_ids", "kv_ids"; "list" and
            "ranges" of listed tiles.
        scale: factor on the logits.
        out_dtype: dtype of the output.

    Returns:
        Output [B, T, N, H] and log-sum-exp float32 [B, N, T].

    Raises:
        NotImplementedError: shared memory does not suffice.
    """
    config = plan.config
    used = config.smem_bytes(plan.head_dim, plan.variant)
    if used > SMEM_LIMIT:
        raise NotImplementedError(
            f"{config.num_stages} tiles of {config.block_kv} keys at head_dim {plan.head_dim} take "
            f"{used} bytes of shared memory; a block has {SMEM_LIMIT}: use fewer stages"
        )
    # Whole query tiles: a one-dimensional copy would run on into the next head's rows.
    padded = plan.q_tiles * config.block_q
    rows = pl.cdiv(plan.q_len, 8) * 8  # The output is copied in tiles of 8 rows.
    out, lse = plgpu.kernel(
        _kernel(plan, tuple(arrays), scale, out_dtype),
        out_type=[
            jax.ShapeDtypeStruct((plan.batch, rows, plan.num_heads, plan.head_dim), out_dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.num_heads, padded), jnp.float32),
        ],
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=config.num_compute + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )(*arrays.values())
    return out[:, : plan.q_len], lse[:, :, : plan.q_len]
