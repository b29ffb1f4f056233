# SPDX-License-Identifier: Apache-2.0
"""The sm90 decode kernel that joins the parts of a head by their maxima and sums."""

from __future__ import annotations

import functools
import math

from pallas_kernels import _ptx as ptx
from pallas_kernels.ops.decode_attention.mosaic_sm90_codes import (
    barrier,
    bytes_at,
    load,
    read_shared,
)
from pallas_kernels.ops.decode_attention.mosaic_sm90_plan import LOG2E, NO_MAX, ROWS, Plan, Shares

JOIN_NUMBERS = 4 * 128 + 2 * 8  # four channels per thread; maximum and sum of up to eight teams


def join_parts(plan: Plan, refs, axes):
    """What a block does: a row of a head, four channels per thread; teams share its parts out."""
    i32, quads, at_once = ptx.i32, plan.spec.head_dim // 4, plan.at_once
    teams = 128 // quads
    row, head, _ = axes
    tid = ptx.thread()
    team, quad = ptx.div(tid, i32(quads)), ptx.rem(tid, i32(quads))
    shares = Shares(plan, refs)
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
