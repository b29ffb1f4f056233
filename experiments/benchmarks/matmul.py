"""Products of packed weights: are the sm90 kernels right, and how fast beside bfloat16.

``python -m experiments.benchmarks.matmul --output runs/matmul --time-budget 150`` checks the
kernels against dequantise-then-multiply on the same codes, then times them beside XLA's and torch's
bfloat16 product, XLA's way with the same codes, and an elementwise copy, all in one process, and
writes ``matmul.json`` after every case: device, versions, command, and one row per case.

Bytes are those of the weights (codes and scales), x and the result. ``over_bf16`` is the time of
XLA's bfloat16 product with as many rows over the case's, ``share_of_copy`` its bytes per second
over those of the copy. "int8" without a kernel is XLA's product of INT8 codes, whose row counts
the library calls in the optimised program; "with" and "without barrier" tell whether the barrier
that ties codes to activations costs a fusion.

Cases run in a process of their own that is ended when it says nothing for ``--limit`` seconds: a
kernel that hangs costs one case. ``--dry-run`` lowers every kernel for an abstract H200 instead.
"""

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks.attention import machine, time_torch
from experiments.benchmarks.isolated import Case, report, work
from pallas_kernels import matmul, quantize
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.benchmarking import benchmark, gigabytes_per_second, matmul_flops, teraflops
from pallas_kernels.formats import quantize_nf4
from pallas_kernels.ops.matmul import api, mosaic_sm90_rows, mosaic_sm90_tokens

FORMATS = {
    "nvfp4": lambda w: quantize(w, "nvfp4", axis=0).pack(0),
    "mxfp4": lambda w: quantize(w, "mxfp4", axis=0).pack(0),
    "int4": lambda w: quantize(w, "int4", axis=0, tile=min(128, w.shape[0])).pack(0),
    "int8": lambda w: quantize(w, "int8", axis=0, tile=None),
}
FORMATS["mxfp4_a8"] = lambda w: quantize(w, "mxfp4_int8", axis=0).pack(0)
FORMATS["int4_a8"] = lambda w: quantize(w, "int4_int8", axis=0).pack(0)
FORMATS["nvfp4_a8"] = FORMATS["nvfp4"]
FORMATS["int8_a16"] = FORMATS["int8"]  # with bfloat16 rows, as all without "_a8" but "int8"
FORMATS["fp8_a16"] = FORMATS["fp8_a8"] = lambda w: quantize(w, "fp8_e4m3", axis=0, tile=None)
ROWS_OF_8_BITS = dict.fromkeys(("int8", "int4_a8", "mxfp4_a8"), "int8")  # formats of rows
ROWS_OF_8_BITS |= dict.fromkeys(("nvfp4_a8", "fp8_a8"), "fp8_e4m3")
EIGHT = ("mxfp4_a8", "int4_a8", "nvfp4_a8", "fp8_a8")  # with the kernels for many rows
KERNELS = {"rows": mosaic_sm90_rows, "tokens": mosaic_sm90_tokens}
LARGE = {"k": 8192, "n": 8192}
# Of sum |x| |w|: float32 sums of exact products; weights rounded to bfloat16 before them.
BOUNDS = {"rows": 1e-5, "tokens": 5e-5, "tokens int4": 2.0**-8}
BOUNDS["tokens fp8_a8"] = 2.0**-9  # the tensor core's sums over 128 inputs have about 14 bits


# --- cases ---------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """Correctness of the kernels, what is judged, then sizes, row counts and remainders."""

    def right(kernel, weights, m, k, n, **change):
        return {"stage": "correct", "kernel": kernel, "format": weights, "m": m, "k": k, "n": n,
                **change}  # fmt: skip

    def fast(what, m, kernel=None, **config):
        case = {"stage": "fast", "what": what, "m": m, **LARGE}
        case |= {"kernel": kernel} if kernel else {}
        return case | ({"config": config} if config else {})

    judged = [
        right("rows", "nvfp4", 5, 1024, 512),
        right("rows", "int4", 16, 1024, 512),
        right("tokens", "nvfp4", 300, 1024, 512),
        right("tokens", "int4", 300, 1024, 512),
        right("tokens", "int8", 300, 1024, 512),
        {"stage": "fast", "what": "copy"},
        *(fast("bf16", m) for m in (1, 16, 4096)),
        fast("int8", 4096, "tokens"),
        *(fast(name, m, "rows") for name in ("nvfp4", "int4", "mxfp4") for m in (1, 16)),
        *(fast(name, 4096, "tokens") for name in ("nvfp4", "int4", "mxfp4")),
        fast("int8 from bf16", 4096),
        fast("int8", 4096),
        *(fast("nvfp4", m) for m in (1, 4096)),
        fast("torch bf16", 4096),
        fast("torch bf16", 1),
    ]
    eight_bits = [
        *(right("tokens", name, 300, 1024, 512) for name in EIGHT),
        right("rows", "nvfp4_a8", 5, 1024, 512),
        *(fast(name, 4096, "tokens") for name in EIGHT),
        *(fast(name, 4096) for name in ("mxfp4_a8", "fp8_a8")),
        *(fast(f"{name} from bf16", 4096) for name in EIGHT),
        *(fast(name, m, "rows") for name in ("mxfp4_a8", "int4_a8", "nvfp4_a8") for m in (1, 16)),
        *(right("tokens", name, 77, 300, 200, kind="groups") for name in EIGHT),
        *(right("tokens", name, 513, 2080, 144, kind="positive") for name in EIGHT),
        *(right("tokens", name, 4096, 8192, 8192, kind="positive") for name in EIGHT),
        right("tokens", "mxfp4_a8", 4096, 8192, 8192),
        right("rows", "nvfp4_a8", 17, 300, 136, kind="groups"),
        *(fast("mxfp4_a8", 4096, "tokens", **c)
          for c in ({"num_stages": 3}, {"num_stages": 5}, {"cluster": 1}, {"across": 16})),
        *(fast("fp8_a8", 4096, "tokens", **c)
          for c in ({"tile_m": 128}, {"tile_m": 128, "cluster": 1})),
        *(case for m in (128, 512, 1024) for case in (
            fast("bf16", m), fast("mxfp4_a8", m, "tokens"), fast("mxfp4", m, "tokens"))),
    ]  # fmt: skip
    eights = ("int8_a16", "fp8_a16", "int8", "fp8_a8")
    few_eights = [
        *(right("rows", name, m, 300, 136, kind="groups") for name in eights for m in (3, 17)),
        *(right("rows", name, 16, 8192, 8192) for name in eights),
        *(fast(name, m, "rows") for name in eights for m in (1, 16)),
        *(fast(name, m) for name in ("int8_a16", "int8") for m in (1, 16)),
        *(fast("int8_a16", m, "rows", **c) for m in (1, 16)
          for c in ({"own": 8}, {"own": 8, "groups": 4, "outputs": 64, "units": 1},
                    {"own": 8, "groups": 4, "outputs": 64, "units": 4})),
    ]  # fmt: skip
    whole = {"own": 8, "groups": 4, "outputs": 64}  # one block a multiprocessor, no splits
    table = {**whole, "table": True}
    whole_blocks = [
        fast("bf16", 8),
        *(fast(name, 8, "rows") for name in ("nvfp4", "int4", "mxfp4")),
        *(fast(name, m, "rows", **c, cache=".L1::no_allocate") for m in (16, 1)
          for name, c in (("nvfp4", table), ("mxfp4", table), ("int4", {**whole, "units": 4}))),
        *(fast("nvfp4", m, "rows", **c) for m in (16, 1)
          for c in (whole, {**table, "units": 4}, {"outputs": 128, "table": True},
                    {**table, "outputs": 128, "blocks": 132})),
        *(fast("int4", m, "rows", **whole, units=units) for units in (2, 8) for m in (16, 1)),
        *(fast("mxfp4", m, "rows", **table, units=4) for m in (16, 1)),
        *(right("rows", name, 16, 1024, 512, config={**table, "units": units})
          for name, units in (("nvfp4", 2), ("mxfp4", 2), ("int4", 4))),
        right("rows", "nvfp4", 3, 2080, 144, kind="groups", config=table),
        right("rows", "int4", 17, 300, 136, kind="groups", config={**whole, "units": 4}),
        right("rows", "mxfp4", 9, 1024, 512, config=whole),
        right("rows", "nvfp4", 16, 8192, 8192, config=table),
        right("rows", "int4", 16, 8192, 8192),
    ]  # fmt: skip
    rest = [
        *eight_bits,
        *whole_blocks,
        *few_eights,
        *(fast("nvfp4", 1, "rows", **c)
          for c in ({"own": 8}, {"units": 4}, {"blocks": 528}, {"blocks": 264})),
        *(fast("nvfp4", 16, "rows", **c)
          for c in ({"own": 16}, {"units": 4}, {"blocks": 528}, {"blocks": 264})),
        *(fast(name, 4096, "tokens", **c) for name in ("int8", "nvfp4")
          for c in ({"num_stages": 3}, {"cluster": 1}, {"across": 16})),
        *(case for m in (64, 256) for case in (
            fast("bf16", m), fast("nvfp4", m, "rows"), fast("nvfp4", m, "tokens", tile_m=64),
            fast("nvfp4", m, "tokens", tile_m=128), fast("nvfp4", m))),
        right("rows", "mxfp4", 3, 2080, 144, kind="groups"),
        right("rows", "nvfp4", 1, 130, 40, kind="groups"),
        right("rows", "int4", 17, 300, 136, kind="groups"),
        right("rows", "nvfp4", 16, 8192, 8192),
        right("tokens", "int8", 77, 300, 200, kind="groups"),
        right("tokens", "mxfp4", 100, 2080, 144, kind="groups"),
        right("tokens", "nvfp4", 65, 130, 40, kind="groups"),
        right("tokens", "int4", 513, 300, 392, kind="groups"),
        right("tokens", "nvfp4", 4096, 8192, 8192),
        right("tokens", "int8", 4096, 8192, 8192),
        fast("int8 codes, both K-major", 4096),
        *(fast(f"{what} {with_it} barrier", 4096)
          for what in ("nvfp4", "nf4") for with_it in ("with", "without")),
    ]  # fmt: skip
    return [*judged, *rest]


# --- inputs --------------------------------------------------------------------------------------


def on_host(function):
    """Runs on the CPU, where nothing is compiled for long, and moves the result to the GPU."""

    @functools.wraps(function)
    def run(*args):
        with jax.default_device(jax.devices("cpu")[0]):
            result = function(*args)
        return jax.block_until_ready(jax.device_put(result, jax.devices()[0]))

    return run


def weights(k: int, n: int, kind: str = "normal") -> jax.Array:
    """Normal numbers; "groups" has groups of zeros and of numbers far larger and smaller.

    "positive" ones have sums that grow, as do those of the activations of that kind.
    """
    w = jax.random.normal(jax.random.key(0), (k, n))
    if kind == "positive":
        return jnp.abs(w)
    if kind == "groups":
        w = w.at[: k // 2, : n // 2].set(0).at[k // 2, ::3].set(3e4).at[-16:, 1::2].multiply(1e-6)
    return w


@functools.lru_cache(8)
@on_host
def packed(name: str, k: int, n: int, kind: str = "normal"):
    """A weight in a format; "bf16" is a plain array."""
    w = weights(k, n, kind)
    return w.astype(jnp.bfloat16) if name == "bf16" else jax.jit(FORMATS[name])(w)


@functools.lru_cache(8)
@on_host
def activations(m: int, k: int, name: str = "", kind: str = "normal") -> Any:
    """Normal numbers in bfloat16; for some weights in 8 bits with a scale per row."""
    x = jax.random.normal(jax.random.key(1), (m, k)).astype(jnp.bfloat16)
    x = jnp.abs(x) if kind == "positive" else x
    return per_row(x, ROWS_OF_8_BITS[name]) if name in ROWS_OF_8_BITS else x


@functools.partial(jax.jit, static_argnames="qtype")
def per_row(x: jax.Array, qtype: str):
    """8 bits with a scale per row."""
    return quantize(x, qtype, axis=-1, tile=None)


@on_host
def oracle(x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
    """The product in float32, and sum |x| |w|."""
    x, w = jax.device_put((x, w), jax.devices("cpu")[0])
    want = matmul(x, w, preferred_element_type=jnp.float32, implementation="reference")
    return want, jnp.abs(dense(x)) @ jnp.abs(dense(w))


def dense(x: Any) -> jax.Array:
    """float32, whatever it is."""
    return x.astype(jnp.float32) if isinstance(x, jax.Array) else x.dequantize()


def kernel_call(case: Case, x, w, out_dtype=None):
    """A kernel with the case's sizes, as a function of x and w."""
    spec, module = api._prepare(x, w, out_dtype)[2], KERNELS[case["kernel"]]
    config = module.Config(**case["config"]) if "config" in case else None  # the usual sizes
    return lambda x, w: module.matmul(x, w, spec, config)


# --- one case ------------------------------------------------------------------------------------


def run_correct(case: Case) -> dict[str, Any]:
    """Worst error against the oracle on the same codes, relative to sum |x| |w|; and two runs."""
    m, k, n, name = (case[key] for key in ("m", "k", "n", "format"))
    kind = case.get("kind", "normal")
    x, w = activations(m, k, name, kind), packed(name, k, n, kind)
    call = jax.jit(kernel_call(case, x, w, jnp.float32))
    out = jax.block_until_ready(call(x, w))
    same = bool((out == call(x, w)).all())
    want, size = oracle(x, w)
    worst = float((jnp.abs(out - want) / jnp.maximum(size, 1e-30)).max())
    bound = BOUNDS.get(f"{case['kernel']} {name}", BOUNDS[case["kernel"]])
    if not worst <= bound or not same:
        raise RuntimeError(f"worst error {worst:.3g} of {bound:.3g}, two runs equal: {same}")
    return {"worst": worst, "bound": bound}


def run_fast(case: Case) -> dict[str, Any]:
    """Milliseconds, bytes and operations per second."""
    if case["what"] == "copy":
        size = 2**30
        timing = benchmark(lambda x: x + 1, jnp.ones(size, jnp.bfloat16), repeats=7)
        return {"ms": timing.median * 1e3, "gbps": gigabytes_per_second(4.0 * size, timing)}
    if case["what"].startswith("torch"):
        timing, result = torch_timing(case), {}
        moved = 2.0 * (case["m"] * (case["k"] + case["n"]) + case["k"] * case["n"])
    else:
        function, args = fast_call(case)
        timing = benchmark(function, *args, repeats=5, warmup=2)
        result = {"compile_s": timing.compile_seconds}
        if case["what"].startswith("int8") and "kernel" not in case:
            text = jax.jit(function).lower(*args).compile().as_text()
            calls = re.findall(r'custom_call_target="([^"]+)"', text)
            result["calls"] = dict(collections.Counter(calls))
        moved = sum(a.nbytes for a in jax.tree.leaves(args)) + 2.0 * case["m"] * case["n"]
    flops = matmul_flops(case["m"], case["n"], case["k"])
    return {
        "ms": timing.median * 1e3,
        "spread": timing.spread,
        "gbps": gigabytes_per_second(moved, timing),
        "tflops": teraflops(flops, timing),
        **result,
    }


def fast_call(case: Case):
    """What is timed, and its arrays."""
    m, k, n, what = (case[key] for key in ("m", "k", "n", "what"))
    x = activations(m, k, what)
    if what in FORMATS:
        w = packed(what, k, n)
        if "kernel" in case:
            return kernel_call(case, x, w, jnp.bfloat16), (x, w)
        options = {"implementation": "xla", "preferred_element_type": jnp.bfloat16}
        return functools.partial(matmul, **options), (x, w)
    full = packed("bf16", k, n)
    if what == "bf16":
        return jnp.matmul, (x, full)
    if what.startswith("nf4"):  # as QLoRA's layers multiply, with the barrier that they have
        codes = quantize_nf4(full.T)

        def nf4(x, codes):
            if " with " in what:
                x, codes = jax.lax.optimization_barrier((x, codes))
            return x @ codes.dequantize(x.dtype).T

        return nf4, (x, codes)
    if what.startswith("nvfp4"):
        if " with " in what:
            return functools.partial(matmul, implementation="xla"), (x, packed("nvfp4", k, n))
        return lambda x, w: x @ w.dequantize(x.dtype), (x, packed("nvfp4", k, n))
    if what.endswith(" from bf16"):
        name = what.removesuffix(" from bf16")
        call = functools.partial(
            matmul, implementation="mosaic", preferred_element_type=jnp.bfloat16
        )
        return lambda x, w: call(per_row(x, ROWS_OF_8_BITS[name]), w), (x, packed(name, k, n))
    assert what == "int8 codes, both K-major", what

    def codes_only(a, b):
        return jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )  # fmt: skip

    return codes_only, (per_row(x, "int8").qvalue, jnp.array(packed("int8", k, n).qvalue.T))


def torch_timing(case: Case):
    """torch's bfloat16 product on the same numbers."""
    import torch

    arrays = activations(case["m"], case["k"]), packed("bf16", case["k"], case["n"])
    x, w = (torch.from_numpy(np.array(a, np.float32)).to("cuda", torch.bfloat16) for a in arrays)
    return time_torch(lambda: x @ w, 10)


def lower(case: Case) -> dict[str, str]:
    """Lowers what a case would run, for an abstract H200."""
    if "kernel" not in case:
        return {"lowered": "no kernel"}
    m, k, n = (case[key] for key in ("m", "k", "n"))
    name = case.get("format", case.get("what"))
    x, make = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), FORMATS[name]
    if name in ROWS_OF_8_BITS:
        x = jax.eval_shape(functools.partial(per_row, qtype=ROWS_OF_8_BITS[name]), x)
    w = jax.eval_shape(make, jax.ShapeDtypeStruct((k, n), jnp.float32))
    with abstract_gpu():
        call = jax.jit(kernel_call(case, x, w))
        text = call.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    return {"lowered": "yes" if "mosaic_gpu" in text else "no kernel in it"}


# --- processes -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """Check and time products of packed weights."""

    output: Path = Path("runs/matmul")
    """Folder of the results."""
    time_budget: float = 150.0
    """No case is started after so many seconds."""
    limit: float = 40.0
    """A process that says nothing for so many seconds is ended."""
    only: str = ""
    """Cases whose JSON contains one of these texts, separated by |."""
    first: int | None = None
    """Only so many cases."""
    dry_run: bool = False
    """Lower every kernel instead of running it."""
    worker: bool = False
    """Used by the program itself: read cases from standard input, one JSON a line."""


def run(case: Case) -> dict[str, Any]:
    """Runs a case of any stage, and says where."""
    runners = {"correct": run_correct, "fast": run_fast}
    return {"machine": machine(), **runners[case["stage"]](case)}


def main(options: Options) -> None:
    """Runs the cases in order, prints and writes after each."""
    if options.worker:
        return work(lower if options.dry_run else run)
    return report("matmul", options, cases()[: options.first], _line, _compare)


def _compare(rows: list[dict[str, Any]]) -> None:
    """Every rate beside the copy's, every time beside bfloat16's."""
    timed = [row for row in rows if "ms" in row.get("result", {})]
    copies = [row["result"]["gbps"] for row in timed if row["case"]["what"] == "copy"]
    plain = {
        row["case"]["m"]: row["result"]["ms"] for row in timed if row["case"]["what"] == "bf16"
    }
    for row in timed:
        case, result = row["case"], row["result"]
        if copies and case["what"] != "copy":
            result["share_of_copy"] = result["gbps"] / copies[-1]
        if case.get("m") in plain:
            result["over_bf16"] = plain[case["m"]] / result["ms"]


def _line(row: dict[str, Any]) -> str:
    case = {k: v for k, v in row["case"].items() if k != "stage" and LARGE.get(k) != v}
    said = row.get("failed") or ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["result"].items()
    )
    return f"{row['case']['stage']} {row['seconds']} s {case}: {said}"


if __name__ == "__main__":
    main(tyro.cli(Options))
