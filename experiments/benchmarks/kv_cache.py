"""E5 on a GPU: what evicting saves in time and memory, and what it costs, at the shape of Llama 8B.

``python -m experiments.benchmarks.kv_cache --output runs/e5 --time-budget 150`` writes
``kv_cache.json`` after every case. Random weights; one layer or a few stand for all 32, which cost
the same.

- attend: attention of one token over one layer's context of 124,000 tokens, full, and cut by KVzip
  to ragged heads in tiles; target .40 times the full time at ratio .3.
- score: KVzip's passes over a context, beside its prefill; target 1.2 times, and 2 % of memory.
- compact: R-KV's compaction beside the 128 decode steps that it follows; target 3 %.
- rows: caches of 32 layers, really allocated beside 16 GB, full and held at a budget.

Cases run in a process of their own, see ``experiments.benchmarks.isolated``.
"""

import dataclasses
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.benchmarks.attention import machine
from experiments.benchmarks.isolated import Case, alone, report, timed, work
from experiments.kv_cache import efficiency
from jaxeff.compress import KVzip, parse
from jaxeff.generate import _observe, _prefill, side_by_side
from jaxeff.kv_cache import DenseCache, KVCache
from jaxeff.models import Decoder, ModelConfig
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.benchmarking import gigabytes_per_second, kernel_times
from pallas_kernels.ops.decode_attention import compact as compaction

KV_HEADS, HEADS, HEAD_DIM = efficiency.KV_HEADS, efficiency.HEADS, efficiency.HEAD_DIM


def cases() -> list[Case]:
    """The judged ones first."""
    attend = [
        {"stage": "attend", "store": s, "ratio": r, "layout": "tiled" if r < 1 else "bucketed"}
        for s, r in (("bfloat16", 1.0), ("bfloat16", 0.3), ("int8", 0.3), ("bfloat16", 0.1))
    ]
    score = [
        {"stage": "score", "tokens": tokens, "joined": joined, "format": form, "quant": quant,
         "norm": norm}
        for tokens, joined, form, quant, norm in (
            (8192, True, "fp8", None, "chunk"),
            (8192, True, None, None, "chunk"),
            (8192, True, "fp8", "sage2", "chunk"),
            (8192, True, "fp8", "sage2", "full"),
            (8192, False, None, None, "chunk"),
            (32768, True, "fp8", "sage2", "chunk"),
            (32768, True, None, None, "chunk"),
        )
    ]  # fmt: skip
    compact = [
        {"stage": "compact", "batch": batch, "budget": 1024, "buffer": 128, "kernels": kernels}
        for batch, kernels in ((8, True), (32, True), (8, False), (32, False), (1, True))
    ]
    rows = [{"stage": "rows", "output": 8192, "text": t} for t in ("full", RKV)]
    return [*attend[:2], *compact[:4], *score[:3], *rows, *attend[2:], *score[3:], *compact[4:]]


RKV = "rkv(budget=1024, buffer=128)"


def run_attend(case: Case) -> dict[str, float]:
    """Milliseconds, and bytes that the layer allocates."""
    call, args = attend_call(case)
    timing = timed(call, *args, repeats=7, warmup=2)
    size = args[1].allocated_bytes()
    return {
        "ms": timing.median * 1e3,
        "bytes": size,
        "gbps": gigabytes_per_second(size, timing),
    }


def attend_call(case: Case, tokens: int = efficiency.CONTEXT):
    """What is timed, and its arguments."""
    query = jax.random.normal(jax.random.key(0), (1, 1, HEADS, HEAD_DIM)).astype(jnp.bfloat16)

    def fill(key):
        kv = jax.random.normal(key, (1, tokens, KV_HEADS, HEAD_DIM)).astype(jnp.bfloat16)
        layer = DenseCache.init(1, 1, tokens, KV_HEADS, HEAD_DIM, dtype=case["store"]).layers[0]
        return layer.update(kv, kv, positions=jnp.arange(tokens)[None])

    layer = jax.jit(fill)(jax.random.key(1))
    if case["ratio"] < 1:
        lengths = efficiency.head_lengths(case["ratio"], tokens)[0]
        layer = efficiency._cut(layer, lengths, case["layout"])
    at = jnp.full((1, 1), tokens)
    return (lambda q, layer: layer.attend(q, positions=at)), (query, layer)


def longest(compiled: jax.stages.Compiled, args, count: int = 14) -> dict[str, float]:
    """Milliseconds of the kernels of a run that take longest, and of the others."""
    with alone(), tempfile.TemporaryDirectory() as folder:
        jax.block_until_ready(compiled(*args))
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*args))
        times = kernel_times(Path(folder))
    named = {name[:80]: seconds * 1e3 for name, seconds in list(times.items())[:count]}
    others = sum(times.values()) * 1e3 - sum(named.values())
    return {name: round(ms, 4) for name, ms in {**named, "others": others}.items()}


def compile_all(calls) -> list[jax.stages.Compiled]:
    """Compiles side by side what is called with given arguments."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda call: jax.jit(call[0]).lower(*call[1]).compile(), calls))


def _model(layers: int) -> Decoder:
    config = ModelConfig.llama(
        vocab_size=1024,
        num_layers=layers,
        embed_dim=HEADS * HEAD_DIM,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        mlp_dim=14336,
    )
    return Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


def run_score(case: Case) -> dict[str, float]:
    """Milliseconds a layer of prefill and of a scoring pass, and the memory that each works in.

    A layer is the difference between models of two layers and of one: nothing needs the output of
    a pass, so its last layer only scores.
    """
    calls = []
    for layers in (1, 2):
        prefill, observe, passes = score_calls({**case, "layers": layers})
        cache = some_cache(jax.eval_shape(prefill[0], *prefill[1])[1], case["tokens"])
        calls += [prefill, (observe[0], (prefill[1][0], cache, *observe[1]))]
    compiled = compile_all(calls)
    every = zip(compiled, calls, strict=True)
    times = [timed(c, *args, repeats=3, warmup=1).median * 1e3 for c, (_, args) in every]
    first, second = times[2] - times[0], times[3] - times[1]
    temp = [c.memory_analysis().temp_size_in_bytes for c in compiled[2:]]
    whole = efficiency.WEIGHT_BYTES + efficiency.dense_bytes(case["tokens"]) + temp[0]
    return {
        "prefill_ms": first,
        "pass_ms": second,
        "passes": passes,
        "scoring_over_prefill": passes * second / first,
        "prefill_temp": temp[0],
        "pass_temp": temp[1],
        "extra_memory": max(temp[1] - temp[0], 0) / whole,
        "kernels_of_pass": longest(compiled[3], calls[3][1]),
    }


def some_cache(shapes: KVCache, tokens: int) -> KVCache:
    """What stands for the cache that a prefill leaves: every head full, of any numbers."""

    def draw(x):
        return jax.random.normal(jax.random.key(0), x.shape).astype(x.dtype)

    cache = jax.jit(lambda: jax.tree.map(draw, shapes))()
    full = jnp.full((1, KV_HEADS), tokens, jnp.int32)
    layers = tuple(dataclasses.replace(layer, length=full) for layer in cache.layers)
    return dataclasses.replace(cache, layers=layers, seen=jnp.full(1, tokens, jnp.int32))


def score_calls(case: Case):
    """Prefill and one pass, each with its arguments, and the number of passes."""
    tokens, chunk = case["tokens"], 2048
    method = KVzip(
        ratio=0.3,
        chunk=chunk,
        norm=case["norm"],
        side_by_side=case["joined"],
        pass_format=case["format"],
        pass_quant=case["quant"],
    )
    graphdef, state = nnx.split(_model(case["layers"]))
    text = np.random.default_rng(0).integers(1024, size=(1, tokens)).astype(np.int32)
    lengths = np.full(1, tokens, np.int32)
    passes = method.context_passes(text, lengths, vocab_size=1024)
    if case["joined"]:
        cache = jax.eval_shape(lambda: DenseCache.init(1, 1, tokens, KV_HEADS, HEAD_DIM))
        passes = side_by_side(passes, method.most_passes(cache), tokens)
    one = passes[len(passes) // 2]

    def prefill(state, text, lengths):
        return _prefill(graphdef, method, tokens, "bfloat16", None, None, state, text, lengths)

    def observe(state, cache, text, valid, start):
        return _observe(graphdef, method, state, cache, text, valid, start)

    inputs = (jnp.asarray(one.tokens), jnp.asarray(one.valid), jnp.int32(one.start))
    first = (prefill, (state, jnp.asarray(text), jnp.asarray(lengths)))
    return first, (observe, inputs), len(passes)


def run_compact(case: Case) -> dict[str, float]:
    """Milliseconds of a layer's compaction, of its decode step, and their ratio over a buffer."""
    compaction.MEASURED = case["kernels"]
    calls = compact_calls(case)
    compiled = compile_all(calls)
    compact, attend, block = (
        timed(c, *args, repeats=5, warmup=1).median * 1e3
        for c, (_, args) in zip(compiled, calls, strict=True)
    )
    return {
        "compact_ms": compact,
        "attend_ms": attend,
        "block_ms": block,
        "share": compact / (case["buffer"] * (attend + block)),
        "kernels": longest(compiled[0], calls[0][1]),
    }


def compact_calls(case: Case):
    """Compaction, attention, and the layer's products, each with its arguments."""
    batch, slots = case["batch"], case["budget"] + case["buffer"]
    method = parse(f"rkv(budget={case['budget']}, buffer={case['buffer']})")

    def fill(key):
        cache = DenseCache.init(
            1, batch, slots, KV_HEADS, HEAD_DIM, query_window=method.window, num_heads=HEADS
        )
        kv = jax.random.normal(key, (batch, slots, KV_HEADS, HEAD_DIM)).astype(jnp.bfloat16)
        queries = jnp.tile(kv, (1, 1, HEADS // KV_HEADS, 1))
        at = jnp.tile(jnp.arange(slots), (batch, 1))
        layer = cache.layers[0].update(kv, kv, positions=at, queries=queries)
        return cache.advance([layer], at >= 0), queries[:, -1:]

    cache, query = jax.jit(fill)(jax.random.key(0))
    at = jnp.full((batch, 1), slots)
    graphdef, state = nnx.split(_model(1).layers[0])
    x = jnp.ones((batch, 1, HEADS * HEAD_DIM), jnp.bfloat16)
    return (
        (method.compact, (cache,)),
        (lambda q, layer: layer.attend(q, positions=at), (query, cache.layers[0])),
        (lambda state, x: nnx.merge(graphdef, state)(x, positions=at), (state, x)),
    )


def run_rows(case: Case) -> dict[str, float]:
    """The largest batch whose cache of 32 layers fits beside the weights; all of it is made."""
    one = efficiency.generation_bytes(case["text"], 128, case["output"])
    weights = jax.block_until_ready(jnp.zeros(int(efficiency.WEIGHT_BYTES), jnp.int8))
    fitting, failing = 0, 0
    low, high = 1, int(150e9 // one)
    while low <= high:
        batch = (low + high) // 2
        shapes = efficiency.generation_cache(case["text"], 128, case["output"], batch)
        made = []
        try:
            for x in jax.tree.leaves(shapes):
                made.append(jnp.zeros(x.shape, x.dtype))
            jax.block_until_ready(made)
            fitting, low = batch, batch + 1
        except Exception:  # out of memory, in whichever words
            failing, high = batch, batch - 1
        del made
    del weights
    return {"bytes_per_row": one, "rows": fitting, "rows_too_many": failing}


def lower(case: Case) -> dict[str, Any]:
    """Lowers what a case would run, for an abstract H200."""
    if case["stage"] == "rows":
        return {"lowered": "no kernel"}
    if case["stage"] == "attend":
        calls = [attend_call(case, 2048)]
    elif case["stage"] == "score":
        first, second, _ = score_calls({**case, "layers": 2, "tokens": 6144})
        _, cache = jax.eval_shape(first[0], *first[1])
        calls = [first, (second[0], (first[1][0], cache, *second[1]))]
    else:
        compaction.MEASURED = case["kernels"]
        calls = compact_calls({**case, "batch": 1, "budget": 64, "buffer": 64})
    found = []
    with abstract_gpu():
        for call, args in calls:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
            traced = jax.jit(lambda *a, call=call: call(*a)).trace(*shapes)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            found.append(text.count("custom_call @mosaic_gpu"))
    return {"kernels": found}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time and measure what eviction saves and costs."""

    output: Path = Path("runs/e5")
    """Folder of the results."""
    time_budget: float = 150.0
    """No case is started after so many seconds."""
    limit: float = 20.0
    """A process that says nothing for four times as many seconds is ended."""
    only: str = ""
    """Cases whose JSON contains this text, or one of several: ``a|b``."""
    dry_run: bool = False
    """Lower every kernel instead of running it."""
    worker: bool = False
    """Used by the program itself: read cases from standard input, one JSON a line."""


def run(case: Case, lowering: bool = False) -> dict[str, Any]:
    """Runs a case of any stage, and says where."""
    if lowering:
        return lower(case)
    runners = {"attend": run_attend, "score": run_score, "compact": run_compact, "rows": run_rows}
    return {"machine": machine(), **runners[case["stage"]](case)}


def main(options: Options) -> None:
    """Runs the cases in order, prints and writes after each."""
    if options.worker:
        return work(functools.partial(run, lowering=options.dry_run))
    return report("kv_cache", options, cases(), _line)


def _line(row: dict[str, Any]) -> str:
    said = row.get("failed") or {
        k: round(v, 4) if isinstance(v, float) else v for k, v in row["result"].items()
    }
    return f"{row['seconds']} s {row['case']}: {said}"


if __name__ == "__main__":
    main(tyro.cli(Options))
