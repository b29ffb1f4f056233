"""Block-sparse attention: time against density, ours beside torch FlexAttention, and the backward.

``python -m experiments.benchmarks.block_sparse --time-budget 500`` measures every implementation
that runs here on the same block masks and writes one JSON row for each: milliseconds, TFLOP/s of
the kept tiles, time relative to density x dense time of the same implementation, and the error
against float32. It also times the prediction of SpargeAttn, and forward + backward of ``sage_bwd``
and bfloat16. Implementations that cannot run here are listed with their reason. Rows are written as
they come, so that a run that is cut off keeps what it has.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.benchmarks.attention import first_line, machine, time_torch
from pallas_kernels import BlockMask, Mask, dot_product_attention, testing
from pallas_kernels.benchmarking import Timing, attention_flops, benchmark, teraflops
from pallas_kernels.ops.attention.sparge import predict

ERRORS = (NotImplementedError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Shape:
    """One attention call: ``B T N H`` queries on ``B S K H`` keys, S = T."""

    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "cpu": (Shape(1, 1024, 2, 2, 64),),
    "gpu": (Shape(1, 16384, 32, 32, 128), Shape(1, 32768, 32, 32, 128)),
}


@dataclass(frozen=True)
class Options:
    """Measure block-sparse attention and write one JSON file."""

    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """Shapes: ``auto`` takes ``gpu`` where there is one."""
    output: Path = Path("runs/benchmarks/block_sparse.json")
    """File to write."""
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    """Shares of the tiles that are kept; 1 is the dense time of the same implementation."""
    implementations: tuple[str, ...] = ("mosaic", "xla")
    """Ours to measure."""
    repeats: int = 20
    """Timed runs of each implementation."""
    time_budget: float = 500.0
    """Seconds after which nothing new is started; what was left out is listed."""


def random_mask(shape: Shape, density: float, block_q: int, block_kv: int) -> BlockMask:
    """Tiles at random, the same number in every row and at least one."""
    nq, nk = -(-shape.seq_len // block_q), -(-shape.seq_len // block_kv)
    rng = np.random.default_rng(0)
    rank = np.argsort(rng.random((shape.num_heads, nq, nk)), axis=-1)
    kept = jnp.asarray(rank < max(1, round(density * nk)))
    return BlockMask.from_blocks(
        kept, shape.seq_len, shape.seq_len, block_q=block_q, block_kv=block_kv
    )


def _ours(quant, implementation, query, key, value, mask):
    return dot_product_attention(
        query, key, value, mask=mask, quant=quant, implementation=implementation
    )


def _gradient(quant, implementation, query, key, value):
    """Output and gradients, the cotangent being the output itself."""

    def loss(*x):
        out = dot_product_attention(
            *x, quant=quant, implementation=implementation
        ).astype(jnp.float32)  # fmt: skip
        return 0.5 * (out * out).sum()

    return jax.grad(loss, (0, 1, 2))(query, key, value)


def work(options: Options, shape: Shape) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Named measurements of one shape, in the order of their worth."""
    arrays = testing.attention_inputs(
        "normal", batch=shape.batch, q_len=shape.seq_len, num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
    )  # fmt: skip
    repeats = options.repeats
    for density in options.densities:
        for quant, block_q, block_kv in ((None, 128, 128), ("sage2", 64, 128)):
            mask = random_mask(shape, density, block_q, block_kv)
            exact = _exact_rows(*arrays, mask)
            for name in options.implementations:
                row = {"what": "forward", "name": f"ours {quant or 'bf16'} {name}"}
                row |= {"density": density, "block_q": block_q, "block_kv": block_kv}
                call = partial(_ours, quant, name)
                yield (
                    row,
                    partial(_time_ours, call, (*arrays, mask), exact, shape, density, repeats),
                )
            if quant is None:
                row = {"what": "forward", "name": "torch FlexAttention bf16", "density": density}
                row |= {"block_q": block_q, "block_kv": block_kv}
                yield row, partial(_time_flex, arrays, mask, exact, shape, density, repeats)
    yield (
        {"what": "prediction", "name": "SpargeAttn topk 0.5"},
        partial(_time_simple, lambda q, k: predict(q, k, topk=0.5), arrays[:2], repeats),
    )
    for quant in (None, "sage_bwd"):
        for name in options.implementations:
            row = {"what": "forward + backward", "name": f"ours {quant or 'bf16'} {name}"}
            yield row, partial(_time_gradient, quant, name, arrays, shape, repeats)


def _exact_rows(query, key, value, mask: BlockMask, count: int = 32):
    """Float32 attention of some evenly spread rows under the mask."""
    picked = np.linspace(0, query.shape[1] - 1, count).astype(int)
    allowed = mask.as_mask().block(jnp.asarray(picked), None, mask.q_len, mask.kv_len)
    with jax.default_matmul_precision("highest"):
        rows = (query[:, picked], key, value)
        wanted = dot_product_attention(
            *(x.astype(jnp.float32) for x in rows), mask=Mask.from_array(allowed),
            implementation="xla",
        )  # fmt: skip
    return picked, wanted


def _numbers(timing: Timing, shape: Shape, share: float) -> dict[str, Any]:
    flops = share * attention_flops(
        shape.batch, shape.seq_len, shape.seq_len, shape.num_heads, shape.head_dim
    )
    return {
        "milliseconds": timing.median * 1e3,
        "spread": timing.spread,
        "clock": timing.source,
        "tflops": teraflops(flops, timing),
    }


def _time_ours(call, arguments, exact, shape, density, repeats):
    picked, wanted = exact
    out = jax.jit(call)(*arguments)
    error = testing.errors(out[:, picked], wanted)
    timing = benchmark(call, *arguments, repeats=repeats)
    return _numbers(timing, shape, density) | error


def _time_simple(call, arguments, repeats):
    timing = benchmark(call, *arguments, repeats=repeats)
    return {"milliseconds": timing.median * 1e3, "spread": timing.spread, "clock": timing.source}


def _time_gradient(quant, implementation, arrays, shape, repeats):
    timing = benchmark(partial(_gradient, quant, implementation), *arrays, repeats=repeats)
    return _numbers(timing, shape, 3.5)  # a backward counts as 2.5 forwards


def _time_flex(arrays, mask: BlockMask, exact, shape: Shape, density: float, repeats: int):
    """Torch's kernel on the same tiles, timed by CUDA events with a cold L2."""
    try:
        import torch
        from torch.nn.attention.flex_attention import BlockMask as FlexMask
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise NotImplementedError(str(error)) from error
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    to = lambda x: torch.from_numpy(np.asarray(x)).cuda()  # noqa: E731
    query, key, value = (
        to(x.astype(jnp.float32)).to(torch.bfloat16).transpose(1, 2).contiguous() for x in arrays
    )
    # Every listed tile is whole: no partial tiles, and no token rule.
    none = torch.zeros_like(to(mask.kv_num_blocks))
    flex_mask = FlexMask.from_kv_blocks(
        none, torch.zeros_like(to(mask.kv_indices)), to(mask.kv_num_blocks), to(mask.kv_indices),
        BLOCK_SIZE=(mask.block_q, mask.block_kv),
    )  # fmt: skip
    compiled = torch.compile(flex_attention)
    run = lambda: compiled(query, key, value, block_mask=flex_mask)  # noqa: E731
    picked, wanted = exact
    out = jnp.asarray(run().transpose(1, 2)[:, picked].float().cpu().numpy())
    timing = time_torch(run, repeats)
    return _numbers(timing, shape, density) | testing.errors(out, wanted)


def relative_to_dense(rows: list[dict[str, Any]]) -> None:
    """Adds time / (density x dense time of the same implementation) to the forward rows."""
    for row in rows:
        if row["what"] != "forward" or "milliseconds" not in row:
            continue
        same = ("name", "block_q", "block_kv", "seq_len", "num_heads", "head_dim")
        dense = [
            other["milliseconds"]
            for other in rows
            if other.get("density") == 1.0 and "milliseconds" in other
            and all(other.get(key) == row.get(key) for key in same)
        ]  # fmt: skip
        if dense:
            row["over_ideal"] = row["milliseconds"] / (row["density"] * dense[0])


def main(options: Options) -> None:
    """Measure, print and write after every row."""
    console, started, rows, left_out = Console(), time.monotonic(), [], []
    on_gpu = jax.default_backend() == "gpu"
    preset = ("gpu" if on_gpu else "cpu") if options.preset == "auto" else options.preset
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES[preset]:
        for row, measure in work(options, shape):
            row = asdict(shape) | row
            if time.monotonic() - started > options.time_budget:
                left_out.append(row)
                continue
            try:
                row |= measure()
            except ERRORS as error:
                row["reason"] = first_line(error)
            rows.append(row)
            relative_to_dense(rows)
            shown = f"{row['milliseconds']:.3f} ms" if "milliseconds" in row else row["reason"]
            console.print(row["seq_len"], row["what"], row["name"], row.get("density", ""), shown)
            result = {
                "machine": machine(),
                "command": f"python -m experiments.benchmarks.block_sparse --preset {preset}",
                "rows": rows,
                "left_out": left_out,
            }
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
