"""Attention: how fast and how exact, ours beside every peer that can run here.

``python -m experiments.benchmarks.attention --output attention.json`` measures each implementation
on the same inputs, in one process, and writes one row per (shape, implementation): median device
time, spread, TFLOP/s by the convention of the published tables, and the error against float32.
An implementation that cannot run here is listed with its own reason, never left out.
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pallas_kernels import dot_product_attention, testing
from pallas_kernels.benchmarking import Timing, attention_flops, benchmark, teraflops
from pallas_kernels.masks import Mask


@dataclass(frozen=True)
class Shape:
    """One attention call: ``B T N H`` queries on ``B S K H`` keys, S = T."""

    name: str
    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool


def shapes(preset: str) -> list[Shape]:
    """The shapes of the published tables (``gpu``), or small ones that show the program works."""
    if preset == "cpu":
        return [Shape("tiny", 1, 256, 4, 2, 64, causal) for causal in (False, True)]
    lengths = (1024, 2048, 4096, 8192, 16384, 32768)
    square = [
        Shape(f"D{head_dim}", 4, length, 32, 32, head_dim, causal)
        for head_dim in (64, 128)
        for length in lengths
        for causal in (False, True)
    ]
    return [*square, Shape("llama3-8b", 4, 8192, 32, 8, 128, True)]


# --- implementations -----------------------------------------------------------------------------

Runner = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]


def _ours(quant: str | None, implementation: str) -> Runner:
    def run(query, key, value, is_causal):
        return dot_product_attention(
            query, key, value, is_causal=is_causal, quant=quant, implementation=implementation
        )

    return run


def _jax_nn(implementation: str) -> Runner:
    def run(query, key, value, is_causal):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=is_causal, implementation=implementation
        )

    return run


def quantized(query, key, value, leave_q: bool = False):
    """Operands of the sm90 kernel: INT8 Q and K, FP8 V."""
    from pallas_kernels.ops.attention.mosaic_sm90_plan import heuristic
    from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant
    from pallas_kernels.ops.quantize.mosaic_sm90 import quantize_qkv

    block = heuristic(Variant(), query.shape[-1]).block_kv
    return quantize_qkv(query, key, value, scale_block=block, leave_q=leave_q)


def kernel(operands, query, is_causal, config=None):
    """The sm90 kernel on operands quantised beforehand."""
    from pallas_kernels.ops.attention.mosaic_sm90 import attention_forward

    _, length, _, head_dim = query.shape
    output, _ = attention_forward(
        operands,
        q_len=length,
        kv_len=length,
        scale=head_dim**-0.5,
        mask=Mask.causal() if is_causal else Mask(),
        out_dtype=query.dtype,
        config=config,
    )
    return output


JAX_IMPLEMENTATIONS: dict[str, Runner] = {
    "jax.nn xla (bf16)": _jax_nn("xla"),
    "jax.nn cudnn (bf16)": _jax_nn("cudnn"),
    "ours xla (bf16)": _ours(None, "xla"),
    "ours sage2 emulated": _ours("sage2", "xla"),
    "ours sage2 sm90, from bf16": _ours("sage2", "mosaic"),
    "ours sage1 sm90, from bf16": _ours("sage1", "mosaic"),
    "ours fp8 sm90, from bf16": _ours("fp8", "mosaic"),
    "ours sm90 (bf16)": _ours(None, "mosaic"),
}


def _torch_peers(shape: Shape, arrays: Sequence[jax.Array]) -> dict[str, Any]:
    """Peers that live in torch: functions that return ``[B, T, N, H]``, or why there are none."""
    try:
        import torch
    except ImportError as error:
        return {"torch": str(error)}
    if not torch.cuda.is_available():
        return {"torch": "torch sees no GPU"}
    host = [np.asarray(x, np.float32) for x in arrays]
    btnh = [torch.from_numpy(x).to("cuda", torch.bfloat16) for x in host]
    bnth = [x.transpose(1, 2).contiguous() for x in btnh]  # torch's and SageAttention's order
    sdpa = torch.nn.functional.scaled_dot_product_attention
    grouped = shape.num_heads != shape.num_kv_heads
    peers: dict[str, Any] = {
        "torch SDPA (bf16)": lambda: sdpa(
            *bnth, is_causal=shape.is_causal, enable_gqa=grouped
        ).transpose(1, 2)
    }
    try:
        from sageattention import sageattn

        peers["SageAttention"] = lambda: sageattn(*bnth, is_causal=shape.is_causal).transpose(1, 2)
    except ImportError as error:
        peers["SageAttention"] = str(error)
    try:
        from flash_attn_interface import flash_attn_func

        peers["FlashAttention-3 (bf16)"] = lambda: flash_attn_func(*btnh, causal=shape.is_causal)
    except ImportError as error:
        peers["FlashAttention-3 (bf16)"] = str(error)
    return peers


def _attempt_torch(run: Any, exact, repeats: int):
    """As ``_attempt``, timed by CUDA events with a cold L2."""
    if isinstance(run, str):
        return run
    picked, wanted = exact
    output = jnp.asarray(run()[:, picked].float().cpu().numpy())
    return time_torch(run, repeats), testing.errors(output, wanted)


def time_torch(run: Any, repeats: int) -> Timing:
    """Times a torch call by CUDA events, each time with a cold L2, after three calls to warm up."""
    import torch

    flush = torch.empty(32 * 2**20, dtype=torch.int32, device="cuda")
    seconds = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return Timing(tuple(seconds[3:]), 0.0, "cuda events")


# --- measuring -----------------------------------------------------------------------------------


def measure(shape: Shape, repeats: int, skip: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """One row per implementation on this shape, without those whose name has a part in ``skip``."""
    query, key, value = inputs(shape)
    exact = _exact_rows(query, key, value, shape.is_causal)
    rows = []
    for name, run in JAX_IMPLEMENTATIONS.items():
        if any(part in name for part in skip):
            continue
        call = partial(run, is_causal=shape.is_causal)
        rows.append(_row(shape, name, _attempt(call, (query, key, value), exact, repeats)))
    rows.append(
        _row(
            shape,
            "ours sage2 sm90, kernel only",
            _kernel_only(shape, query, key, value, exact, repeats),
        )
    )
    for name, run in _torch_peers(shape, (query, key, value)).items():
        rows.append(_row(shape, name, _attempt_torch(run, exact, repeats)))
    return rows


def inputs(shape: Shape) -> list[jax.Array]:
    """Normal query, key and value, drawn on the device in float32: bfloat16 draws are skewed."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    sizes = [(shape.batch, shape.seq_len, n, shape.head_dim) for n in heads]
    draw = jax.jit(
        lambda key, size: jax.random.normal(key, size).astype(jnp.bfloat16), static_argnums=1
    )
    return [draw(jax.random.key(i), size) for i, size in enumerate(sizes)]


def _kernel_only(shape, query, key, value, exact, repeats):
    """The sm90 kernel on operands quantised beforehand, the convention of the published tables."""
    try:
        operands = jax.block_until_ready(quantized(query, key, value))
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return first_line(error)
    return _attempt(partial(kernel, is_causal=shape.is_causal), (operands, query), exact, repeats)


def _exact_rows(
    query, key, value, is_causal: bool, count: int = 64
) -> tuple[np.ndarray, jax.Array]:
    """Float32 attention of some evenly spread query rows: the whole of 32K would not fit."""
    picked = np.linspace(0, query.shape[1] - 1, min(count, query.shape[1])).astype(int)
    query, key, value = (x.astype(jnp.float32) for x in (query[:, picked], key, value))
    mask = None
    if is_causal:
        mask = (jnp.arange(key.shape[1])[None] <= picked[:, None])[None, None]
    with jax.default_matmul_precision("highest"):
        return picked, dot_product_attention(query, key, value, mask=mask, implementation="xla")


def _attempt(call, arguments, exact, repeats: int):
    """Time and error of one implementation, or the first line of why it cannot run."""
    try:
        output = jax.jit(call)(*arguments)
        picked, wanted = exact
        error = testing.errors(output[:, picked], wanted)
        return benchmark(call, *arguments, repeats=repeats), error
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return first_line(error)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _row(shape: Shape, name: str, result: str | tuple[Timing, dict[str, float]]) -> dict[str, Any]:
    row = {**asdict(shape), "implementation": name}
    if isinstance(result, str):
        return {**row, "reason": result}
    timing, error = result
    flops = attention_flops(
        shape.batch,
        shape.seq_len,
        shape.seq_len,
        shape.num_heads,
        shape.head_dim,
        is_causal=shape.is_causal,
    )
    return {
        **row,
        "milliseconds": timing.median * 1e3,
        "spread": timing.spread,
        "clock": timing.source,
        "tflops": teraflops(flops, timing),
        **{key: float(value) for key, value in error.items()},
    }


def ceiling(size: int, repeats: int) -> float:
    """TFLOP/s of a bf16 product of two ``size × size`` matrices in this run."""
    left, right = (jnp.ones((size, size), jnp.bfloat16) * x for x in (0.5, 0.25))
    return teraflops(2.0 * size**3, benchmark(jnp.matmul, left, right, repeats=repeats))


def machine() -> dict[str, Any]:
    """Device and versions, peers included where they are installed."""
    versions = {}
    for package in ("jax", "jaxlib", "torch", "flash-attn", "sageattention"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    kind = jax.devices()[0].device_kind
    return {"device": kind, "python": platform.python_version(), "versions": versions}


@dataclass(frozen=True)
class Options:
    """Measure attention and write one JSON file and, if matplotlib is there, a plot."""

    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """Shapes: ``auto`` takes ``gpu`` where there is one."""
    output: Path = Path("runs/benchmarks/attention.json")
    """File to write; a ``.svg`` beside it holds the plot."""
    repeats: int = 20
    """Timed runs of each implementation."""
    max_seq_len: int = 32768
    """Longer sequences are left out."""


def main(options: Options) -> None:
    """Measure, print and write."""
    console = Console()
    on_gpu = jax.default_backend() == "gpu"
    if options.preset == "auto":
        options = replace(options, preset="gpu" if on_gpu else "cpu")
    chosen = [each for each in shapes(options.preset) if each.seq_len <= options.max_seq_len]
    rows = []
    for shape in track(chosen, description="attention", console=console):
        rows += measure(shape, options.repeats)
    result = {
        "machine": machine(),
        "command": f"python -m experiments.benchmarks.attention --preset {options.preset}",
        "bf16_matmul_tflops": ceiling(8192 if on_gpu else 512, options.repeats),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(_table(rows))
    plot(rows, options.output.with_suffix(".svg"))
    console.print(f"{options.output} and the plot beside it written")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s against length, one panel per (head size, mask), one line per implementation."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if "tflops" in row]
    panels = sorted({(row["head_dim"], row["is_causal"]) for row in timed})
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (head_dim, is_causal) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        inside = [r for r in timed if (r["head_dim"], r["is_causal"]) == (head_dim, is_causal)]
        for name in dict.fromkeys(row["implementation"] for row in inside):
            line = [(r["seq_len"], r["tflops"]) for r in inside if r["implementation"] == name]
            axes.plot(*zip(*sorted(line), strict=True), marker="o", label=name)
        title = f"head_dim {head_dim}, {'causal' if is_causal else 'full'}"
        axes.set(title=title, xlabel="tokens", ylabel="TFLOP/s", xscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("shape", "implementation", "ms", "TFLOP/s", "rel. L1")
    for row in rows:
        kind = "causal" if row["is_causal"] else "full"
        shape = f"{row['name']} {row['seq_len']} {kind}"
        if "reason" in row:
            table.add_row(shape, row["implementation"], "", "", row["reason"][:60])
            continue
        cells = f"{row['milliseconds']:.3f}", f"{row['tflops']:.1f}", f"{row['relative_l1']:.4f}"
        table.add_row(shape, row["implementation"], *cells)
    return table


if __name__ == "__main__":
    main(tyro.cli(Options))
