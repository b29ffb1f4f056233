"""Everything about the sm90 attention kernels that needs a GPU, in the order of what matters.

``python -m experiments.benchmarks.gpu_session --output runs/gpu --time-budget 560`` works through
the stages below and writes ``<stage>.json`` after every case, so that an interrupted run keeps what
it has; a second run with the same folder goes on where the first stopped, and tries what failed
again at the end.

1. ``correct``: every configuration against float32 attention and run to run.
2. ``accurate``: the error of each variant on the input sets that separate them.
3. ``fast``: device time beside the peers, the ceilings of the same run, quantisers beside a copy.
4. ``sanitize``: compute-sanitizer's memcheck and racecheck on small shapes.
5. ``sizes``: tiles and schedules other than the untuned ones.

Cases run in a process of their own that is ended when it says nothing for ``--limit`` seconds: a
kernel that hangs costs one case. ``--dry-run`` lowers every case for an abstract H200 on any
machine instead of running it.
"""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.benchmarks import attention as bench
from experiments.benchmarks.isolated import Case, results, work
from pallas_kernels import dot_product_attention, testing
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.benchmarking import benchmark, gigabytes_per_second

STAGES = ("correct", "accurate", "fast", "sanitize", "sizes")

# Relative L1 against float32 on normal inputs; 16-bit P and V leave .0124 with INT8 scores.
BOUNDS = {"sage2": 0.045, "sage1": 0.025, "fp8": 0.06, None: 0.006}


# --- cases ---------------------------------------------------------------------------------------


def correct_cases() -> list[Case]:
    """The core first, then one feature at a time, then the pairs that share code."""
    base = {"stage": "correct", "quant": "sage2", "shape": [2, 1024, 1024, 4, 2, 128]}

    def case(**change):
        return {**base, **change}

    ragged = [[2, 1000, 777], [2, 300, 1000], [2, 17, 100], [2, 1, 1000], [1, 1, 1], [1, 17, 17]]
    cases = [case(), case(is_causal=True), {"stage": "correct", "quantizer": 128}]
    cases += [case(quant=quant, is_causal=causal) for quant in (None, "sage1", "fp8")
              for causal in (False, True)]  # fmt: skip
    cases += [case(shape=[2, 1000, 1000, 4, 2, h], is_causal=True) for h in (64, 96, 192, 256, 80)]
    cases += [{"stage": "correct", "quantizer": h} for h in (64, 96, 192, 256)]
    cases += [
        case(shape=[*bts, 4, 2, 128], is_causal=True, causal_offset=bts[2] - bts[1])
        for bts in ragged
    ]
    cases += [
        case(shape=[2, 513, 700, n, k, 128], is_causal=True) for n, k in ((2, 2), (8, 2), (7, 1))
    ]
    cases += [
        case(sinks=True),
        case(sinks=True, is_causal=True, causal_offset=-600),
        case(logits_soft_cap=5.0),
        case(local_window_size=[100, 0], is_causal=True),
        case(segments=[300, 300], is_causal=True),
        case(lengths=[[600, 200], [700, 0]]),
        case(lengths=[[1024, 1024], [1000, 3]], poison=True),
        case(causal_offset=[0, 300], is_causal=True),
        case(dtype="float16"),
        case(gradient=True, is_causal=True),
        case(shape=[1, 2048, 15360, 2, 1, 128], kind="v_plus_1", bound=0.005),
    ]
    features = {
        "sinks": dict(sinks=True, is_causal=True),
        "cap": dict(logits_soft_cap=5.0),
        "window": dict(local_window_size=[100, 0], is_causal=True),
        "segments": dict(segments=[300, 300]),
        "lengths": dict(lengths=[[600, 200], [700, 0]]),
    }
    for quant in (None, "sage1", "fp8", "sage2"):
        for h in (128, 64, 96, 192, 256):
            names = features if h in (128, 256) else ("segments",)
            cases += [
                case(quant=quant, shape=[2, 600, 700, 4, 2, h], **features[name]) for name in names
            ]
    return [dict(t) for t in {json.dumps(c, sort_keys=True): c for c in cases}.values()]


def accurate_cases() -> list[Case]:
    """Input sets of the specification; 16K tokens show what accumulators lose."""
    cases = [
        {"stage": "accurate", "quant": quant, "kind": kind, "shape": [1, t, t, 4, 4, 128]}
        for t in (4096, 16384)
        for kind in ("normal", "v_plus_1", "outlier", "k_bias")
        for quant in ("sage2", "sage1", "fp8", None)
    ]
    plain = {"stage": "accurate", "quant": "sage2", "kind": "k_bias", "smooth_k": False}
    return [*cases, *({**plain, "shape": [1, t, t, 4, 4, 128]} for t in (2048, 4096))]


def fast_cases() -> list[Case]:
    """The shapes that are judged first, the ceilings, then the rest of the table."""
    judged = [(h, t, causal) for h in (128, 64) for t in (4096, 16384) for causal in (False, True)]
    chosen = bench.shapes("gpu")
    key = lambda s: (s.head_dim, s.seq_len, s.is_causal)  # noqa: E731
    first = [s for want in judged for s in chosen if key(s) == want and s.name[0] == "D"]
    rest = [s for s in chosen if s not in first and s.seq_len > 1024]

    def as_case(s):
        """Variants beside sage2 are measured where that takes little time."""
        skip = {"skip": ["sage1", "fp8"]} if s.seq_len > 8192 or s.head_dim == 64 else {}
        return {"stage": "fast", "shape": dataclasses.asdict(s), **skip}

    ceilings: list[Case] = [{"stage": "fast", "ceiling": True}]
    ceilings += [
        {"stage": "fast", "quantizers": size}
        for size in ([4, 4096, 32, 128], [4, 16384, 32, 128], [4, 4096, 32, 64])
    ]
    return [*map(as_case, first[:4]), *ceilings, *map(as_case, [*first[4:], *rest])]


def sanitize_cases() -> list[Case]:
    """Small shapes under each tool."""
    small = {"quant": "sage2", "shape": [1, 200, 300, 2, 1, 64], "is_causal": True}
    return [
        {**small, "stage": "sanitize", "tool": tool, "quant": quant}
        for tool in ("memcheck", "racecheck")
        for quant in ("sage2", None)
    ]


def sizes_cases() -> list[Case]:
    """Configurations beside the heuristic's, at the judged shapes."""
    changes: list[dict[str, Any]] = [
        {},
        {"from bf16": True},
        {"from bf16": True, "fuse_q": False},
        {"schedule": "none"},
        {"head_group": 4},
        {"head_group": 16},
        {"qk_split": 1},
        {"registers": 240, "memory_registers": 24},
        {"registers": 240, "memory_registers": 24, "qk_split": 1},
        {"registers": 232, "memory_registers": 40},
        {"block_kv": 128, "num_stages": 4},
        {"num_compute": 3, "block_kv": 128, "registers": 160, "memory_registers": 32},
    ]
    return [
        {"stage": "sizes", "shape": [4, t, 32, h], "is_causal": causal, "config": change}
        for h, t, causal in (
            (128, 4096, False),
            (128, 4096, True),
            (128, 16384, True),
            (64, 4096, False),
        )
        for change in changes
    ]


CASES = {
    "correct": correct_cases,
    "accurate": accurate_cases,
    "fast": fast_cases,
    "sanitize": sanitize_cases,
    "sizes": sizes_cases,
}


# --- one case ------------------------------------------------------------------------------------


def inputs(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of a case."""
    b, t, s, n, k, h = case["shape"]
    # Smoothing must be at work where it is part of the variant; "fp8" and 16 bits have none.
    smooth = case["stage"] == "correct" and case["quant"] in ("sage1", "sage2")
    return testing.attention_inputs(
        case.get("kind", "k_bias" if smooth else "normal"),
        batch=b, q_len=t, kv_len=s, num_heads=n, num_kv_heads=k, head_dim=h,
        dtype=jnp.dtype(case.get("dtype", "bfloat16")),
    )  # fmt: skip


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of `dot_product_attention`, without quant and implementation."""
    b, t, s, n = case["shape"][:4]
    names = ("is_causal", "logits_soft_cap")
    found = {name: case[name] for name in names if name in case}
    if "causal_offset" in case:
        offset = case["causal_offset"]
        found["causal_offset"] = offset if isinstance(offset, int) else jnp.array(offset)
    if "local_window_size" in case:
        found["local_window_size"] = tuple(case["local_window_size"])
    if "segments" in case:
        sizes = zip(case["segments"], (t, s), strict=True)
        ids = (jnp.broadcast_to(jnp.arange(length) // size, (b, length)) for size, length in sizes)
        found["segment_ids"] = tuple(ids)
    if "lengths" in case:
        q_lengths, kv_lengths = (jnp.array(x) for x in case["lengths"])
        found |= {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths}
    if case.get("sinks"):
        found["sinks"] = jnp.linspace(-1, 2, n)
    return found


def quant_of(case: Case):
    """The variant of a case."""
    from pallas_kernels.ops.attention.spec import QUANTS

    quant = case["quant"]
    if case.get("smooth_k", True):
        return quant
    return dataclasses.replace(QUANTS[quant], smooth_k=False)


def call_of(case: Case, implementation: str, quant):
    """A function of (query, key, value) with the output and the log-sum-exp."""

    def call(query, key, value):
        return dot_product_attention(
            query, key, value, quant=quant, implementation=implementation, return_residual=True,
            **options(case),
        )  # fmt: skip

    return call


def run_correct(case: Case) -> dict[str, Any]:
    """Errors against float32 attention; raises where they are out of bounds."""
    if "quantizer" in case:
        return run_quantizer(case["quantizer"])
    q, k, v = inputs(case)
    if case.get("poison"):  # What lies beyond the lengths must not matter.
        beyond = jnp.arange(k.shape[1]) >= jnp.array(case["lengths"][1])[:, None]
        k, v = (jnp.where(beyond[..., None, None], jnp.nan, x) for x in (k, v))
    call = jax.jit(call_of(case, "mosaic", quant_of(case)))
    out, lse = jax.block_until_ready(call(q, k, v))
    again = call(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = call_of(case, "xla", None)
    with jax.default_matmul_precision("highest"):
        want, want_lse = jax.jit(exact)(*wide)
    live = jnp.isfinite(want_lse)
    result = {
        **testing.errors(out, want),
        "lse": float(jnp.abs(jnp.where(live, lse - want_lse, 0)).max()),
        "empty_rows": int((~live).sum()),
    }
    limit = case.get("bound", BOUNDS[case["quant"]])
    failed = [
        what
        for what, bad in {
            f"relative L1 {result['relative_l1']:.4f} above {limit}": result["relative_l1"] > limit,
            "log-sum-exp is off": result["lse"] > 0.3,
            "empty rows differ": bool((jnp.isneginf(lse) == live).any()),
            "two runs differ": not bool((out == again[0]).all() & (lse == again[1]).all()),
        }.items()
        if bad or not np.isfinite(result["relative_l1"])
    ]
    if case.get("gradient"):
        gradients = run_gradient(case, (q, k, v), wide)
        result |= gradients
        failed += [f"{name} is off" for name, error in gradients.items() if not error <= limit]
    if failed:
        raise RuntimeError(f"{'; '.join(failed)}: {result}")
    return result


def run_gradient(case: Case, arrays, wide) -> dict[str, float]:
    """Relative L1 of the three gradients."""

    def gradient(implementation, quant, arrays):
        call = call_of(case, implementation, quant)
        loss = lambda *x: (call(*x)[0].astype(jnp.float32) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    got = gradient("mosaic", quant_of(case), arrays)
    with jax.default_matmul_precision("highest"):
        want = gradient("xla", None, wide)
    names = ("d_query", "d_key", "d_value")
    return {n: testing.relative_l1(a, b) for n, a, b in zip(names, got, want, strict=True)}


def run_quantizer(head_dim: int) -> dict[str, Any]:
    """Codes and scales of the kernels against their definition in jnp."""
    from pallas_kernels.ops.quantize.mosaic_sm90 import SEQ_PAD, V_ORDER, quantize_qkv

    q, k, v = testing.attention_inputs(
        "k_bias", batch=2, q_len=200, kv_len=777, num_heads=4, num_kv_heads=2, head_dim=head_dim
    )
    lengths = jnp.array([777, 300])
    ops = quantize_qkv(q, k, v, scale_block=256, kv_lengths=lengths)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    valid = (np.arange(777) < np.asarray(lengths)[:, None])[..., None, None]
    q, k, v = wide[0], *(np.where(valid, x, 0) for x in wide[1:])
    mean = k.sum(1) / np.asarray(lengths)[:, None, None]
    smooth = np.pad(
        np.where(valid, k - mean[:, None], 0), ((0, 0), (0, 1024 - 777), (0, 0), (0, 0))
    )
    groups = (
        np.abs(smooth).reshape(2, 4, 32, 8, 2, head_dim).max((2, 5)).transpose(0, 3, 1, 2) / 127
    )
    scale = np.tile(groups, 32).reshape(2, 2, 1024).transpose(0, 2, 1)[..., None]
    q_scale = np.abs(q).max(-1, keepdims=True) / 127
    v_scale = np.abs(v).max(1) / 448
    padded = -(-777 // SEQ_PAD) * SEQ_PAD
    tokens = np.asarray(ops.v, np.float64).reshape(2, 2, head_dim, padded // 16, 16)
    tokens = tokens[..., np.argsort(V_ORDER)].reshape(2, 2, head_dim, padded).transpose(0, 3, 1, 2)
    const = np.einsum("btnh,bnh->bnt", q, np.repeat(mean, 2, 1))
    result = {
        "q_codes": np.abs(np.asarray(ops.q, float)[:, :200] - q / q_scale).max(),
        "k_codes": np.abs(np.asarray(ops.k, float) - smooth / np.maximum(scale, 1e-30)).max(),
        "k_scale": np.abs(np.asarray(ops.k_scale) - groups).max() / groups.max(),
        "v_relative": testing.relative_l1(tokens[:, :777] * v_scale[:, None], v),
        "row_const": np.abs(np.asarray(ops.row_const)[:, :, :200] - const).max()
        / np.abs(const).max(),
    }
    result = {name: float(x) for name, x in result.items()}
    limits = {"q_codes": 0.502, "k_codes": 0.51, "k_scale": 1e-4, "v_relative": 0.03,
              "row_const": 1e-4}  # fmt: skip
    if not all(result[name] <= limit for name, limit in limits.items()):
        raise RuntimeError(f"{result} above {limits}")
    return result


def run_sanitize(case: Case) -> dict[str, Any]:
    """The kernels once and nothing else: every other program takes minutes under the tool."""
    b, t, s, n, k, h = case["shape"]
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=(b, length, heads, h)).astype(jnp.bfloat16))
        for length, heads in ((t, n), (s, k), (s, k))
    ]
    out, lse = jax.jit(call_of(case, "mosaic", quant_of(case)))(*arrays)
    found = {"out": np.asarray(out, np.float32), "lse": np.asarray(lse)}
    if not all(np.isfinite(x).all() for x in found.values()):
        raise RuntimeError("the output is not finite")
    return {name: float(np.abs(x).mean()) for name, x in found.items()}


def run_accurate(case: Case) -> dict[str, Any]:
    """Errors of 64 evenly spread rows."""
    q, k, v = inputs(case)
    picked, want = bench._exact_rows(q, k, v, False)
    out, _ = jax.jit(call_of(case, "mosaic", quant_of(case)))(q, k, v)
    return testing.errors(out[:, picked], want)


def run_fast(case: Case) -> dict[str, Any]:
    """Rows of the benchmark for one shape, or a ceiling."""
    if "ceiling" in case:
        size = 2**29
        copy = benchmark(lambda x: x + 1, jnp.ones(size, jnp.bfloat16), repeats=10)
        return {
            **bench.machine(),
            "bf16_matmul_tflops": bench.ceiling(8192, 10),
            "copy_gbps": gigabytes_per_second(4.0 * size, copy),
        }
    if "quantizers" in case:
        return run_quantizers(*case["quantizers"])
    shape = bench.Shape(**case["shape"])
    # What holds all logits, or computes in float32, takes half a minute and more.
    slow = ("xla", "emulated") if shape.seq_len > 2048 else ()
    return {"rows": bench.measure(shape, 10, (*slow, *case.get("skip", ())))}


def run_quantizers(batch: int, length: int, heads: int, head_dim: int) -> dict[str, Any]:
    """GB/s of each quantiser beside a copy of as many elements.

    The statistics read 2 bytes per element of K and V, the encoders read 2 and write 1.
    """
    from pallas_kernels.ops.quantize import mosaic_sm90 as quantisers

    shape = (batch, length, heads, head_dim)
    q, k, v = (jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i in range(3))
    lengths = jnp.full((batch,), length, jnp.int32)
    mean = jnp.zeros((batch, heads, head_dim))

    def without_q(q, k, v):
        return bench.quantized(q, k, v, leave_q=True)._replace(q=None)

    timings = {
        "copy": benchmark(lambda x: x + 1, q),
        "statistics": benchmark(lambda k, v: quantisers.kv_statistics(k, v, lengths), k, v),
        "q": benchmark(lambda q, mean: quantisers.quantize_q(q, lengths, mean), q, mean),
        "k": benchmark(lambda k, mean: quantisers.quantize_k(k, lengths, mean), k, mean),
        "v": benchmark(lambda v, mean: quantisers.quantize_v(v, mean, lengths), v, mean + 1),
        "k and v, both passes": benchmark(without_q, q, k, v),
        "all": benchmark(bench.quantized, q, k, v),
    }
    size = float(q.size)
    moved = {"copy": 4, "statistics": 4, "k and v, both passes": 10, "all": 13}
    moved = {name: size * moved.get(name, 3) for name in timings}
    rates = {name: gigabytes_per_second(moved[name], x) for name, x in timings.items()}
    return {
        **{f"{name} gbps": rate for name, rate in rates.items()},
        **{f"{name} of copy": rate / rates["copy"] for name, rate in rates.items()},
        **{f"{name} us": x.median * 1e6 for name, x in timings.items()},
    }


def run_sizes(case: Case) -> dict[str, Any]:
    """TFLOP/s of the kernel alone with another configuration."""
    from pallas_kernels.benchmarking import attention_flops, teraflops

    config = config_of(case)
    batch, length, heads, head_dim = case["shape"]
    shape = (batch, length, heads, head_dim)
    q, k, v = (jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i in range(3))
    if case["config"].get("from bf16"):
        timing = benchmark(from_bf16(case, config), q, k, v, repeats=10)
    else:
        operands = jax.block_until_ready(quantized_for(config, q, k, v))
        call = lambda operands, q: bench.kernel(operands, q, case["is_causal"], config)  # noqa: E731
        timing = benchmark(call, operands, q, repeats=10)
    flops = attention_flops(batch, length, length, heads, head_dim, is_causal=case["is_causal"])
    return {"tflops": teraflops(flops, timing), "spread": timing.spread}


def from_bf16(case: Case, config):
    """Quantisers and kernel with one configuration, a function of query, key and value."""
    from pallas_kernels.masks import Mask
    from pallas_kernels.ops.attention import mosaic_sm90
    from pallas_kernels.ops.attention.spec import QUANTS, AttentionSpec

    b, t, n, h = case["shape"]
    spec = AttentionSpec(b, t, t, n, n, h, "bfloat16", h**-0.5, quant=QUANTS["sage2"])
    mask = Mask.causal() if case["is_causal"] else Mask()
    return lambda q, k, v: mosaic_sm90.forward(q, k, v, None, None, mask, spec, config)[0]


def config_of(case: Case):
    """The heuristic's configuration with a case's changes."""
    from pallas_kernels.ops.attention.mosaic_sm90_plan import heuristic
    from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant

    changes = {name: x for name, x in case["config"].items() if name != "from bf16"}
    return dataclasses.replace(heuristic(Variant(), case["shape"][-1]), **changes)


def quantized_for(config, q, k, v):
    """Operands whose scales fit the configuration's tiles."""
    from pallas_kernels.ops.quantize.mosaic_sm90 import quantize_qkv

    return quantize_qkv(q, k, v, scale_block=config.block_kv)


def run_case(case: Case) -> dict[str, Any]:
    """Runs one case of any stage on this machine's GPU."""
    runners = {"correct": run_correct, "accurate": run_accurate, "fast": run_fast,
               "sanitize": run_sanitize, "sizes": run_sizes}  # fmt: skip
    return runners[case["stage"]](case)


def lower_case(case: Case) -> dict[str, Any]:
    """Lowers what a case would run, for an abstract H200."""
    shape = case.get("shape")
    if not isinstance(shape, list):
        return {"lowered": "not needed"}
    if case["stage"] == "sizes":
        batch, length, heads, head_dim = shape
        x = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
        config = config_of(case)
        call = lambda q, k, v: bench.kernel(quantized_for(config, q, k, v), q, case["is_causal"],  # noqa: E731
                                            config)  # fmt: skip
        if case["config"].get("from bf16"):
            call = from_bf16(case, config)
        arrays = (x, x, x)
    else:
        b, t, s, n, k, h = shape
        dtype = jnp.dtype(case.get("dtype", "bfloat16"))
        arrays = [jax.ShapeDtypeStruct((b, *x, h), dtype) for x in ((t, n), (s, k), (s, k))]
        call = call_of(case, "mosaic", quant_of(case))
    with abstract_gpu():
        lowered = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",))
    if "mosaic_gpu" not in lowered.as_text():
        raise RuntimeError("no Mosaic kernel in the program")
    return {"lowered": "yes"}


# --- processes -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """Run the stages and write their results."""

    output: Path = Path("runs/gpu_session")
    """Folder of the results."""
    stages: tuple[str, ...] = STAGES
    """Which stages, in this order."""
    time_budget: float = 560.0
    """No case is started after so many seconds."""
    limit: float = 60.0
    """A process that says nothing for so many seconds is ended."""
    dry_run: bool = False
    """Lower every case for an abstract H200 instead of running it."""
    only: str = ""
    """Cases whose JSON contains this text."""
    shard: str = "0/1"
    """``i/n``: only every n-th case from the i-th; for several processes, each with its folder."""
    worker: bool = False
    """Used by the program itself: read cases from standard input, one JSON a line."""


def main(options: Options) -> None:
    """Runs the stages in order."""
    if options.worker:
        return work(lower_case if options.dry_run else run_case)
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.time_budget
    failures = 0
    for stage in options.stages:
        if stage == "sanitize" and not options.dry_run and not shutil.which("compute-sanitizer"):
            console.print("sanitize: compute-sanitizer is not installed")
            continue
        path = options.output / f"{stage}{'_dry_run' * options.dry_run}.json"
        kept = json.loads(path.read_text()) if path.exists() else []
        rows = {json.dumps(row["case"], sort_keys=True): row for row in kept}
        shard, shards = map(int, options.shard.split("/"))
        cases = _order(CASES[stage]()[shard::shards], rows, options.only)
        for case, result in results(cases, options, deadline):
            rows[json.dumps(case, sort_keys=True)] = {"case": case, **result}
            path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
            failures += "failed" in result
            short = {k: v for k, v in case.items() if k != "stage"}
            said = result.get("failed") or _short(result["result"])
            console.print(f"{stage} {result['seconds']:.1f} s {short}: {said}", highlight=False)
        console.print(f"{stage}: {len(rows)} of {len(CASES[stage]())} cases, in {path}")
    if failures:
        sys.exit(f"{failures} cases failed")
    return None


def _order(cases: list[Case], rows: dict[str, Any], only: str) -> list[Case]:
    """Cases without a result: first those that never ran, then those that failed."""
    known = [(case, rows.get(json.dumps(case, sort_keys=True))) for case in cases]
    new = [case for case, row in known if row is None]
    failed = [case for case, row in known if row is not None and "failed" in row]
    return [case for case in (*new, *failed) if only in json.dumps(case)]


def _short(result: dict[str, Any]) -> str:
    """The numbers of one line of output."""
    rows = result.get("rows")
    if rows is None:
        return ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
        )
    timed = [f"{r['implementation']} {r['tflops']:.0f}" for r in rows if "tflops" in r]
    return "; ".join(timed) or "nothing ran"


if __name__ == "__main__":
    main(tyro.cli(Options))
