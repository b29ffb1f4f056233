"""Block-sparse attention on Hopper: right first, then time against density beside FlexAttention.

``python -m experiments.benchmarks.block_sparse --output runs/benchmarks --time-budget 300`` works
through the cases below, the most telling first, and writes ``block_sparse.json`` after each:

* ``correct``: lists of tiles against float32 attention under the same mask, and run to run;
  gradients of the public function, 16-bit and ``sage_bwd``, with and without lists; no later token
  leaks into an output (``experiments.benchmarks.leaks``).
* ``fast``: milliseconds at 50, 75 and 90 % skipped tiles, over density x the dense time of the
  same kernel; torch FlexAttention on the same tiles; SpargeAttn's prediction and the making of the
  lists; forward + backward beside torch's (``experiments.benchmarks.gradient``).

Each case has a group, which ``--only`` can pick: gradient, leaks, speed, predict, correct, sizes.

Cases run in a process of their own that is ended when it says nothing for ``--limit`` seconds. What
fails is a row with its reason. ``--dry-run`` lowers the kernels for an abstract H200 anywhere.
"""

import json
import os
import queue
import threading
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.benchmarks import attention as bench
from experiments.benchmarks import gradient, leaks
from experiments.benchmarks.gpu_session import BOUNDS
from experiments.benchmarks.isolated import LOCK, Case, measure_alone, results, work
from pallas_kernels import BlockMask, Mask, dot_product_attention, testing
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.benchmarking import attention_flops, benchmark, teraflops
from pallas_kernels.ops.attention import reference, sparge
from pallas_kernels.ops.attention.spec import AttentionSpec

DENSITIES = (1.0, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Options:
    """Check and measure block-sparse attention; writes one JSON file."""

    output: Path = Path("runs/benchmarks")
    """Folder of the result."""
    time_budget: float = 500.0
    """No case is started after so many seconds."""
    limit: float = 60.0
    """A process that says nothing for so many seconds (four times as many where it measures) is
    ended."""
    repeats: int = 10
    """Timed runs of each implementation."""
    only: tuple[str, ...] = ()
    """Cases whose JSON contains these texts."""
    skip: str = ""
    """Of these, cases whose JSON contains this text are left out."""
    done: tuple[Path, ...] = ()
    """JSON of earlier runs whose answers are not asked for again."""
    dry_run: bool = False
    """Lower the kernels for an abstract H200 instead of running them."""
    workers: int = 1
    """Processes side by side: they compile at the same time and measure one after the other."""
    worker: bool = False
    """Used by the program itself: read cases from standard input, one JSON a line."""


def cases() -> list[Case]:
    """What answers most comes first: gradients right, then fast; lists; the rest."""
    shape = [2, 1000, 777, 4, 2, 128]  # B, T, S, N, K, H
    base = {"group": "correct", "stage": "correct", "shape": shape, "block": [128, 128]}
    base["rule"] = "none"
    fast = {"group": "speed", "stage": "fast", "shape": [1, 16384, 32, 128], "block": [128, 128]}
    long, halves = {**fast, "shape": [1, 32768, 32, 128]}, {"block": [64, 128]}
    right, times = gradient.correct_cases(), gradient.fast_cases()
    predict = {"group": "predict", "predict": "topk"}
    sizes = [
        {**base, "group": "sizes", "quant": quant, "rule": "causal", "block": block}
        | {"shape": [*shape[:5], head_dim]}
        for quant, head_dim, block in (
            ("sage2", 128, [128, 64]), ("sage2", 128, [256, 256]), (None, 64, [128, 64]),
            (None, 256, [128, 64]), ("sage2", 64, [128, 128]), ("sage1", 128, [128, 128]),
            ("fp8", 128, [128, 128]),
        )
    ]  # fmt: skip
    brief = {"brief": True}  # without tiles one by one, and with one dense kernel
    found = [right[0], {**long, **brief, "quant": "sage2"}]
    found += [{**fast, **halves, **brief, "quant": "sage2"}, *times, *leaks.cases(), *sizes]
    found += [{**long, "peer": "flex"}, {**fast, **predict}, {**long, **predict}, *right[1:]]
    found += [{**long, **brief, "quant": None}]
    found += [{**base, "quant": "sage2", "rule": "causal"}]
    found += [{**base, **halves, "quant": quant, "rule": "causal"} for quant in ("sage2", None)]
    found += [{**fast, "quant": quant} for quant in ("sage2", None)] + [{**fast, "peer": "flex"}]
    found += [{**base, "quant": "sage2", "rule": rule} for rule in ("none", "lengths", "segments")]
    found += [{**base, "quant": None, "rule": rule} for rule in ("none", "causal")]
    found += [{**base, **halves, "quant": quant} for quant in ("sage2", None)]
    return [*found, {**fast, **halves, "quant": None}]


def share_of(density: float, nk: int) -> float:
    """The share of tiles that `random_tiles` really keeps."""
    return max(1, round(density * nk)) / nk


def random_tiles(heads: tuple[int, ...], nq: int, nk: int, density: float) -> np.ndarray:
    """bool [*heads, nq, nk]: tiles at random, the same number in every row and at least one."""
    rank = np.argsort(np.random.default_rng(0).random((*heads, nq, nk)), axis=-1)
    return np.argsort(rank, axis=-1) < share_of(density, nk) * nk


@cache
def maker(t: int, s: int, block: tuple[int, int]):
    """A compiled function from a map of tiles and a token rule to a `BlockMask`."""
    sizes = {"block_q": block[0], "block_kv": block[1]}
    return jax.jit(lambda kept, rule: BlockMask.from_blocks(kept, t, s, mask=rule, **sizes))


# --- right ---------------------------------------------------------------------------------------


def rule_of(case: Case) -> Mask | None:
    """The token rule of a case."""
    _, t, s, *_ = case["shape"]
    ids = [np.minimum(np.arange(x) // 300, 2)[None].repeat(2, 0) for x in (t, s)]
    return {
        "none": lambda: None,
        "causal": lambda: Mask.causal(s - t + 100),
        "lengths": lambda: Mask.lengths(jnp.array([600, 200]), jnp.array([700, 0])),
        "segments": lambda: Mask.segment_ids(*map(jnp.asarray, ids)),
    }[case["rule"]]()


def call_of(quant):
    """The kernel's output and log-sum-exp."""

    def call(query, key, value, mask):
        return dot_product_attention(
            query, key, value, mask=mask, quant=quant, implementation="mosaic",
            return_residual=True,
        )  # fmt: skip

    return call


def exact_of(query, key, value, allowed):
    """Float32 attention over the pairs of a boolean array."""
    arrays = [x.astype(jnp.float32) for x in (query, key, value)]
    (b, t, n, h), (_, s, k, _) = query.shape, key.shape
    spec = AttentionSpec(b, t, s, n, k, h, "float32", h**-0.5)
    with jax.default_matmul_precision("highest"):
        return reference.attention(*arrays, None, None, Mask.from_array(allowed), spec)


def run_correct(case: Case) -> dict[str, Any]:
    """Errors at every density, with a row without tiles; raises where they are out of bounds."""
    b, t, s, n, k, h = case["shape"]
    block_q, block_kv = case["block"]
    rule, make = rule_of(case), maker(t, s, tuple(case["block"]))
    q, key, v = testing.attention_inputs(
        "normal", batch=b, q_len=t, kv_len=s, num_heads=n, num_kv_heads=k, head_dim=h
    )
    call, exact = jax.jit(call_of(case["quant"])), jax.jit(exact_of)
    tokens = True if rule is None else np.asarray(jax.jit(lambda: rule.dense(t, s))())
    found, limit = {}, BOUNDS[case["quant"]]
    for density in (0.5, 0.25, 0.1):
        kept = random_tiles((b, n), -(-t // block_q), -(-s // block_kv), density)
        kept[0, 1, 2] = False
        mask = make(jnp.asarray(kept), rule)
        out, lse = jax.block_until_ready(call(q, key, v, mask))
        again = call(q, key, v, mask)
        pairs = kept.repeat(block_q, 2).repeat(block_kv, 3)[:, :, :t, :s] & tokens
        want, want_lse = exact(q, key, v, jnp.asarray(pairs))
        live = jnp.isfinite(want_lse)
        error = testing.relative_l1(out, want)
        off = float(jnp.abs(jnp.where(live, lse - want_lse, 0)).max())
        failed = {
            f"relative L1 {error:.4f} above {limit}": not error <= limit,
            f"log-sum-exp is off by {off:.3f}": not off < 0.3,
            "empty rows differ": bool((jnp.isneginf(lse) == live).any()),
            "a row without keys is not zero": bool((jnp.where(live[..., None], 0, out) != 0).any()),
            "two runs differ": not bool((out == again[0]).all() & (lse == again[1]).all()),
        }
        found[f"relative_l1 at {density}"], found["lse"] = error, max(off, found.get("lse", 0))
        if any(failed.values()):
            said = "; ".join(what for what, bad in failed.items() if bad)
            raise RuntimeError(f"density {density}: {said}")
        found["empty_rows"] = int((~live).sum())
    return found


# --- fast ----------------------------------------------------------------------------------------


@cache
def kernel_of(length: int, block_kv: int | None):
    """The kernel on given operands: dense with so many keys per tile, or with a block mask."""
    from pallas_kernels.ops.attention.mosaic_sm90 import attention_forward
    from pallas_kernels.ops.attention.mosaic_sm90_plan import heuristic
    from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant

    def call(operands, mask=None):
        variant = Variant() if operands.k_scale is not None else Variant("half", "half")
        config = None if block_kv is None else heuristic(variant, 128, block_kv=block_kv)
        return attention_forward(
            operands, q_len=length, kv_len=length, scale=128**-0.5, mask=mask, config=config
        )

    return call


@cache
def lists_of(length: int, quant):
    """What is made of a block mask before the kernel starts."""
    from pallas_kernels.ops.attention import mosaic_sm90_plan as plans

    variant = plans.Variant() if quant else plans.Variant("half", "half")

    def call(mask):
        _, heads, _ = mask.kv_num_blocks.shape
        config = plans.heuristic(variant, 128, block_kv=mask.block_kv)
        sizes = (1, length, length, heads, heads, 128, 0)
        plan = plans.Plan(config, variant, *sizes, listed=mask.block_q)
        return plans.listed_work(mask, plan), plans.listed_tiles(mask, plan)

    return call


def operands_of(case: Case, arrays, block_kv: int):
    """What the kernel reads, made beforehand."""
    from pallas_kernels.ops.quantize.mosaic_sm90 import AttentionOperands, quantize_qkv

    if case["quant"] is None:
        return AttentionOperands(*arrays)
    return jax.block_until_ready(quantize_qkv(*arrays, scale_block=block_kv))


def inputs(case: Case):
    """bfloat16 [B, T, N, H], three times."""
    batch, length, heads, head_dim = case["shape"]
    return testing.attention_inputs(
        "normal", batch=batch, q_len=length, num_heads=heads, head_dim=head_dim
    )


def numbers(case: Case, timing, share: float) -> dict[str, Any]:
    """One row: time, spread and TFLOP/s of what is computed."""
    batch, length, heads, head_dim = case["shape"]
    flops = share * attention_flops(batch, length, length, heads, head_dim)
    return {"milliseconds": timing.median * 1e3, "spread": timing.spread,
            "tflops": teraflops(flops, timing)}  # fmt: skip


def run_fast(case: Case, repeats: int = 10) -> dict[str, Any]:
    """Rows of one shape and one implementation."""
    if "peer" in case:
        return {"rows": run_flex(case, repeats)}
    if "predict" in case:
        return {"rows": run_predict(case, repeats)}
    _, length, heads, _ = case["shape"]
    block_q, block_kv = case["block"]
    arrays, rows = inputs(case), []
    make = maker(length, length, (block_q, block_kv))
    brief = case.get("brief", False)
    tiles = {
        x: random_tiles((heads,), length // block_q, length // block_kv, x)
        for x in DENSITIES[brief:]
    }
    masks = {x: make(jnp.asarray(kept), None) for x, kept in tiles.items()}
    operands = operands_of(case, arrays, block_kv)
    listed = kernel_of(length, None)
    check = check_rows(jax.jit(listed)(operands, masks[0.25])[0], arrays, tiles[0.25], case)
    best = 256 if case["quant"] else 128
    for size in [best] if brief else dict.fromkeys((block_kv, best)):
        timing = benchmark(kernel_of(length, size), operands_of(case, arrays, size),
                           repeats=repeats)  # fmt: skip
        rows.append({"name": f"dense, {size} keys per tile"} | numbers(case, timing, 1.0))
    single = case["quant"] and block_q >= 128 and not brief  # else there is only one way
    kernels = {"listed": listed} | ({"listed, tile by tile": kernel_of(length, block_kv)} if single
                                    else {})  # fmt: skip
    for name, call in kernels.items():
        for density, mask in masks.items():
            timing = benchmark(call, operands, mask, repeats=repeats)
            share = share_of(density, length // block_kv)
            row = {"name": name, "density": share} | numbers(case, timing, share)
            for dense in [row for row in rows if "dense" in row["name"]]:
                over = row["milliseconds"] / (share * dense["milliseconds"])
                row[f"over density x {dense['name']}"] = over
            rows.append(row)
    if brief:
        return check | {"rows": rows}
    timing = benchmark(lists_of(length, case["quant"]), masks[0.25], repeats=repeats)
    rows.append({"name": "order and ranges of the lists", "milliseconds": timing.median * 1e3})
    return check | {"rows": rows}


def check_rows(out, arrays, kept, case: Case) -> dict[str, Any]:
    """Errors of 32 evenly spread rows at full size."""
    block_q, block_kv = case["block"]
    picked = np.linspace(0, out.shape[1] - 1, 32).astype(int)
    allowed = kept[:, picked // block_q].repeat(block_kv, -1)[None]
    q, k, v = arrays
    want, _ = jax.jit(exact_of)(q[:, picked], k, v, jnp.asarray(allowed))
    found = testing.errors(out[:, picked], want)
    if not found["relative_l1"] <= BOUNDS[case["quant"]]:
        raise RuntimeError(f"wrong at full size: {found}")
    return found


def run_flex(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Torch's kernel on the same tiles, all of them whole: no token rule."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask as FlexMask
    from torch.nn.attention.flex_attention import flex_attention

    _, length, heads, _ = case["shape"]
    query, key, value = (
        torch.from_numpy(np.asarray(x.astype(jnp.float32))).to("cuda", torch.bfloat16)
        .transpose(1, 2).contiguous() for x in inputs(case)
    )  # fmt: skip
    compiled, rows = torch.compile(flex_attention), []
    for density in DENSITIES:
        kept = random_tiles((1, heads), *(length // x for x in case["block"]), density)
        order = np.argsort(~kept, axis=-1, kind="stable").astype(np.int32)
        count, order = (torch.from_numpy(x).cuda() for x in (kept.sum(-1, dtype=np.int32), order))
        none = torch.zeros_like(count), torch.zeros_like(order)
        mask = FlexMask.from_kv_blocks(*none, count, order, BLOCK_SIZE=tuple(case["block"]))
        run = partial(compiled, query, key, value, block_mask=mask)
        run()  # compiles before it has the GPU to itself
        timing = bench.time_torch(run, repeats)
        share = share_of(density, length // case["block"][1])
        name = {"name": "torch FlexAttention (bf16)", "density": share}
        rows.append(name | numbers(case, timing, share))
    return rows


def run_predict(case: Case, repeats: int) -> list[dict[str, Any]]:
    """SpargeAttn's choice of tiles, and the part of it that turns a map into lists."""
    _, length, heads, _ = case["shape"]
    q, k, _ = inputs(case)
    rows = []
    for block, thresholds in (
        (case["block"], {"topk": 0.5}),
        ([64, 128], {"topk": 0.5}),
        (case["block"], {"cdfthreshd": 0.98, "simthreshd1": 0.6}),
    ):
        sizes = {"block_q": block[0], "block_kv": block[1]}
        timing = benchmark(partial(sparge.predict, **thresholds, **sizes), q, k, repeats=repeats)
        row = {"name": "prediction with its lists"} | sizes | thresholds
        rows.append(row | {"milliseconds": timing.median * 1e3, "spread": timing.spread})
    make, nq, nk = (
        maker(length, length, tuple(case["block"])),
        *(length // x for x in case["block"]),
    )
    timing = benchmark(make, jnp.asarray(random_tiles((heads,), nq, nk, 0.5)), None,
                       repeats=repeats)  # fmt: skip
    rows.append({"name": "lists from a map", "milliseconds": timing.median * 1e3})
    return rows


# --- processes -----------------------------------------------------------------------------------


def run_case(options: Options, case: Case) -> dict[str, Any]:
    """Runs one case on this machine's GPU."""
    is_gradient, is_correct = case["group"] == "gradient", case["stage"] == "correct"
    if case["group"] == "leaks":
        found = leaks.run(case)
    elif is_gradient and is_correct:
        found = gradient.run_correct(case)
    elif is_gradient:
        found = {"rows": gradient.run_fast(case, options.repeats)}
    else:
        found = run_correct(case) if is_correct else run_fast(case, options.repeats)
    return found | {"machine": bench.machine()}


def lower_case(case: Case) -> dict[str, Any]:
    """Lowers what a case would run, for an abstract H200."""
    if case["group"] in ("gradient", "leaks"):
        return {"gradient": gradient, "leaks": leaks}[case["group"]].lower(case)
    if "quant" not in case:
        return {"lowered": "not needed"}
    shape = case["shape"]
    b, t, s, n, k, h = shape if len(shape) == 6 else (*shape[:2], *shape[1:3], *shape[2:])
    arrays = [jax.ShapeDtypeStruct((b, *x, h), jnp.bfloat16) for x in ((t, n), (s, k), (s, k))]
    rule = rule_of(case) if "rule" in case else None
    grid = [-(-x // block) for x, block in zip((t, s), case["block"], strict=True)]
    kept = jax.ShapeDtypeStruct((b, n, *grid), bool)
    mask = jax.eval_shape(maker(t, s, tuple(case["block"])), kept, rule)
    with abstract_gpu():
        traced = jax.jit(call_of(case["quant"])).trace(*arrays, mask)
        lowered = traced.lower(lowering_platforms=("cuda",))
    if "mosaic_gpu" not in lowered.as_text():
        raise RuntimeError("no Mosaic kernel in the program")
    return {"lowered": "yes"}


def main(options: Options) -> None:
    """Runs the cases in order, prints and writes after each."""
    if options.worker:
        measure_alone()
        return work(lower_case if options.dry_run else partial(run_case, options))
    console, rows, machine = Console(), [], {}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"block_sparse{'_dry_run' * options.dry_run}.json"
    chosen = [x for x in cases() if all(text in json.dumps(x) for text in options.only)]
    chosen = [x for x in chosen if not options.skip or options.skip not in json.dumps(x)]
    for earlier in options.done:
        known = [x["case"] for x in json.loads(earlier.read_text())["cases"] if "result" in x]
        chosen = [x for x in chosen if x not in known]
    deadline = time.monotonic() + options.time_budget
    for case, result in side_by_side(chosen, options, deadline):
        machine = result.get("result", {}).pop("machine", machine)
        rows.append({"case": case} | result)
        left_out = [case for case in chosen if case not in [row["case"] for row in rows]]
        command = "python -m experiments.benchmarks.block_sparse"
        found = {"command": command, "machine": machine, "cases": rows}
        path.write_text(json.dumps(found | {"left_out": left_out}, indent=1) + "\n")
        console.print(f"{result['seconds']:.1f} s {case}", highlight=False)
        if "failed" in result:
            console.print("  FAILED", result["failed"], highlight=False)
            continue
        for row in result["result"].get("rows", []):
            console.print("  ", short(row), highlight=False)
        console.print("  ", short(result["result"]), highlight=False)
    console.print(f"{len(rows)} of {len(chosen)} cases, in {path}")
    return None


def side_by_side(chosen: list[Case], options: Options, deadline: float):
    """`results` of several workers, each with every so manieth case, as they come."""
    answers: queue.Queue = queue.Queue()
    if options.workers > 1:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        os.environ.setdefault(LOCK, str((options.output / "measuring.lock").absolute()))

    def run(own):
        for answer in results(own, options, deadline, "block_sparse"):
            answers.put(answer)
        answers.put(None)

    parts = [chosen[i :: options.workers] for i in range(options.workers)]
    for own in parts:
        threading.Thread(target=run, args=(own,), daemon=True).start()
    left = len(parts)
    while left:
        answer = answers.get()
        if answer is None:
            left -= 1
        else:
            yield answer


def short(row: dict[str, Any]) -> str:
    """Numbers of one line of output."""
    return ", ".join(
        f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}"
        for key, x in row.items()
        if not isinstance(x, list | dict)
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
