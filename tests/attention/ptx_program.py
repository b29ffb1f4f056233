# SPDX-License-Identifier: Apache-2.0
"""The main loop of a compute warpgroup as a PTX program, to ask ptxas what registers it takes.

On a GPU, Mosaic compiles the same arithmetic through LLVM; what ptxas says here of one loop over
tiles, with addresses and barriers left out, is an estimate of that. It shows configurations that
cannot fit.
"""

import itertools
import re
import subprocess

import pytest

from pallas_kernels import _ptx as ptx
from pallas_kernels.ops.attention import mosaic_sm90_kernel as kernel
from pallas_kernels.ops.attention import mosaic_sm90_tile as tile_math
from pallas_kernels.ops.attention.mosaic_sm90_plan import PART

TYPES = {"r": ".b32", "l": ".b64", "f": ".f32", "p": ".pred"}
INSTRUCTIONS = {
    "add": ("add.s32", "r"), "sub": ("sub.s32", "r"), "mul": ("mul.lo.s32", "r"),
    "div": ("div.u32", "r"), "rem": ("rem.u32", "r"), "imax": ("max.s32", "r"),
    "imin": ("min.s32", "r"), "lt": ("setp.lt.s32", "p"), "ge": ("setp.ge.s32", "p"),
    "eq": ("setp.eq.s32", "p"), "both": ("and.pred", "p"), "fadd": ("add.f32", "f"),
    "fsub": ("sub.f32", "f"), "fmul": ("mul.f32", "f"), "fdiv": ("div.rn.f32", "f"),
    "fmax": ("max.NaN.f32", "f"), "fabs": ("abs.f32", "f"), "feq": ("setp.eq.f32", "p"),
    "bits": ("mov.b32", "r"), "from_bits": ("mov.b32", "f"),
    "to_float": ("cvt.rn.f32.s32", "f"), "widen": ("cvt.s64.s32", "l"),
}  # fmt: skip


class Register:
    """A name and a kind: r, l, f or p."""

    def __init__(self, name, kind):
        self.name, self.kind = name, kind


class Program:
    """Collects instructions; its methods stand in for the functions of `pallas_kernels._ptx`."""

    def __init__(self, patch):
        self.lines, self.declared, self.number = [], [], itertools.count()
        constants = {"i32": "r", "i64": "l"}
        for name, kind in constants.items():
            patch.setattr(ptx, name, lambda v, kind=kind: Register(str(int(v)), kind))
        patch.setattr(ptx, "f32", lambda v: Register(tile_math._hex(float(v)), "f"))
        for name, (opcode, kind) in INSTRUCTIONS.items():
            patch.setattr(ptx, name, lambda *a, o=opcode, k=kind: self.add(o, k, *a))
        patch.setattr(
            ptx, "select", lambda c, a, b: self.add(f"selp{TYPES[a.kind]}", a.kind, a, b, c)
        )
        patch.setattr(ptx, "thread", lambda: self.add("mov.u32", "r", Register("%tid.x", "r")))
        patch.setattr(ptx, "shuffle_xor", self.shuffle)
        patch.setattr(ptx, "address", lambda ref, offset: self.add("add.s64", "l", ref, offset))
        patch.setattr(ptx, "asm", self.asm)

    def new(self, kind):
        register = Register(f"%{kind}{next(self.number)}", kind)
        self.declared.append(f".reg {TYPES[kind]} {register.name};")
        return register

    def add(self, opcode, kind, *sources):
        target = self.new(kind)
        self.lines.append(f"{opcode} {target.name}, {', '.join(x.name for x in sources)};")
        return target

    def load(self, kind):
        place = Register(f"[%base+{8 * next(self.number)}]", kind)
        return self.add(f"ld.global{TYPES[kind]}", kind, place)

    def shuffle(self, x, distance):
        target = self.new(x.kind)
        self.lines.append(f"shfl.sync.bfly.b32 {target.name}, {x.name}, {distance}, 31, -1;")
        return target

    def asm(self, text, outs, ins, *, tied=(), effects=False):
        changed = [self.add(f"mov{TYPES[x.kind]}", x.kind, x) for x in tied]
        written = changed + [self.new(kind) for kind in outs]
        names = [x.name for x in (*written, *changed, *ins)]
        body = re.sub(r"\$(\d+)", lambda found: names[int(found[1])], text)
        self.lines.append(f"{{\n{body}\n}}")
        return written

    def descriptors(self, count):
        base = self.load("l")
        return [self.add("add.s64", "l", base, Register(str(2 * i), "l")) for i in range(count)]


def loop(program, variant, head_dim, config, masked, segmented):
    """One tile of keys, repeated."""
    part = PART[head_dim]
    parts, kv, is_int = head_dim // part, config.block_kv, variant.qk == "int8"
    zeros = lambda count: [program.add("mov.f32", "f", ptx.f32(0)) for _ in range(count)]  # noqa: E731
    outs, m, total = [zeros(part // 2) for _ in range(parts)], zeros(2), zeros(2)
    row_scale, count = [program.load("f"), program.load("f")], program.load("r")
    where = [program.load("r") for _ in range(5)]
    program.lines.append("LOOP:")
    half = "f32.bf16.bf16"
    kind = {"int8": "s32.s8.s8", "e4m3": "f32.e4m3.e4m3", "half": half}[variant.qk]
    steps = head_dim * variant.qk_bytes // 32
    products = [
        kernel._wgmma(
            kv // config.qk_split, program.descriptors(steps), program.descriptors(steps),
            "r" if is_int else "f", kind,
        )
        for _ in range(config.qk_split)
    ]  # fmt: skip
    scores, tops = [], ()
    for i, product in enumerate(products):
        scores += kernel._wait(config.qk_split - 1 - i, product)
        if i < config.qk_split - 1:
            tops = kernel._opaque([tile_math.maximum(scores[j::4], is_int) for j in range(4)])
    if masked:
        ids = {}
        if segmented:
            ids = {"q_ids": [program.load("r") for _ in range(2)]}
            ids["kv_ids"] = [program.load("r") for _ in range(kv // 4)]
        scores = tile_math.mask_scores(
            scores, tile_math.Position(*where[:4], None, where[4], **ids), is_int
        )
    col_scale = [] if variant.qk == "half" else [program.load("f"), program.load("f")]
    p, new_m, alpha, sums = tile_math.softmax(
        variant, scores, m, row_scale, col_scale, masked=masked, tops=tops
    )
    p, state = kernel._opaque(p), []
    for i, out in enumerate(outs):
        width = part + (variant.ones if i == parts - 1 else 0)
        a = [p[j : j + 4] for j in range(0, len(p), 4)]
        kind, transposed = (half, True) if variant.pv == "half" else ("f32.e4m3.e4m3", False)
        tile = kernel._wgmma(width, a, program.descriptors(len(a)), "f", kind, transposed)
        tile = kernel._wait(0, tile, keep=p)
        if i == parts - 1:
            new_total = tile_math.add_sums(variant, total, alpha, tile, part, sums)
        state += tile_math.add_tile(out, tile, alpha)
    old = [*(x for out in outs for x in out), *m, *total]
    for x, new in zip(old, [*state, *new_m, *new_total], strict=True):
        program.lines.append(f"mov.f32 {x.name}, {new.name};")
    close(program, count, old)


def close(program, count, results):
    """Ends the loop, and stores the results, so that nothing is left out."""
    program.lines.append(
        f"add.s32 {count.name}, {count.name}, -1;\n"
        f"setp.gt.s32 %more, {count.name}, 0; @%more bra LOOP;"
    )
    program.lines += [f"st.global.b32 [%base+{4 * i}], {x.name};" for i, x in enumerate(results)]


def spilled(path, program, old, new, count, registers):
    """Bytes that ptxas spills in a loop that carries lists of registers."""
    old, new = ([x for registers in lists for x in registers] for lists in (old, new))
    for x, y in zip(old, new, strict=True):
        program.lines.append(f"mov.b32 {x.name}, {y.name};")
    close(program, count, old)
    return assembled(path, program, registers)


def spilled_bytes(path, variant, head_dim, config, *, masked=False, segmented=False):
    """Bytes that ptxas spills in the loop, under the register limit of a compute warpgroup."""
    with pytest.MonkeyPatch.context() as patch:
        program = Program(patch)
        loop(program, variant, head_dim, config, masked, segmented)
    return assembled(path, program, config.registers)


def assembled(path, program, registers):
    """Bytes that ptxas spills under a register limit."""
    head = (
        ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry loop(.param .u64 p)\n"
        f".maxnreg {registers} {{\n.reg .b64 %base; .reg .pred %more;"
    )
    start = "ld.param.u64 %base, [p];"
    path.write_text("\n".join([head, *program.declared, start, *program.lines, "ret;\n}\n"]))
    done = subprocess.run(
        ["ptxas", "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".o"))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
