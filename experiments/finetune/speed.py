"""Step time and memory of each method on a 1B-shaped model, and where FP8 pays.

``python -m experiments.finetune.speed --preset gpu --time-budget 500`` measures, on random weights:

* one training step of LoRA on bfloat16, FALQON, QLoRA, FP8LoRA and FALQON's other modes, rank 64,
  and which kernels the time of a step goes to;
* products of one layer at growing sizes: bfloat16, FP8 on codes, FP8 with quantisation, the
  melded product, and the separate low-rank path in both precisions.

It prints and writes after every measurement. Compiling is most of the time: ``--only`` chooses
measurements, ``--layers`` shortens the model, and in the environment
``XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`` leaves products to the library, without a search
(the result has the flags). ``--preset cpu`` runs the same program on a tiny
model, to check it, not to measure.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import gc
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from experiments.finetune.measure import measure_each, results_of
from jaxeff.finetune import FALQON, FP8LoRA, LoRA, QLoRA, adapt, init_state, train_step
from jaxeff.finetune.melded import meld_weight, melded_dot
from jaxeff.models import Decoder, ModelConfig
from jaxeff.quant import quantized_dot_general, weight_bytes
from pallas_kernels import quantize
from pallas_kernels.benchmarking import benchmark, kernel_times

RESULTS = Path(__file__).parent / "results"
_STEPS = 5  # of a timed run
_PLAIN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a preset measures."""

    model: dict[str, int]
    batch: int
    seq_len: int
    rank: int
    repeats: int
    sides: tuple[int, ...]
    tokens: int


PRESETS = {
    "cpu": Sizes(
        {"vocab_size": 256, "num_layers": 1, "embed_dim": 64, "num_heads": 2, "mlp_dim": 128},
        batch=2,
        seq_len=32,
        rank=8,
        repeats=2,
        sides=(64,),
        tokens=64,
    ),
    # The shape of Llama 3.2 1B, with a vocabulary of 32,000.
    "gpu": Sizes(
        {
            "vocab_size": 32_000,
            "num_layers": 16,
            "embed_dim": 2048,
            "num_heads": 32,
            "num_kv_heads": 8,
            "mlp_dim": 8192,
        },
        batch=16,
        seq_len=512,
        rank=64,
        repeats=4,
        sides=(1024, 2048, 4096, 8192),
        tokens=8192,
    ),
}


def methods(rank: int) -> dict[str, Any]:
    """LoRA on bfloat16 is what the others are measured against."""
    return {
        "lora": LoRA(rank),
        "falqon_kernels": dataclasses.replace(
            FALQON.code(rank), scaling="delayed", implementation="mosaic"
        ),
        "falqon_code": FALQON.code(rank),
        "falqon_delayed": dataclasses.replace(
            FALQON.code(rank), scaling="delayed", implementation="xla"
        ),
        "qlora": QLoRA(rank),
        "fp8lora": FP8LoRA(rank),
        "falqon_paper": FALQON.paper(rank),
        "falqon_anchored": FALQON.anchored(rank),
    }


def cudnn(query, key, value, **options):
    """cuDNN's attention where there is a GPU: the same for every method, and the fastest."""
    on_gpu = jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn" if on_gpu else "xla", **options
    )


def training_step(method: Any, sizes: Sizes, details: Path | None = None) -> dict[str, Any]:
    """Median step time and the memory of one method, everything in the step included.

    Steps follow each other without a wait, as in training; a time is the mean of five. The
    optimised program and the seconds of all its kernels go to files named after ``details``.
    """
    config = ModelConfig.llama(**sizes.model)
    began = time.perf_counter()
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "attention_fn": cudnn}
    model = Decoder(config, rngs=nnx.Rngs(0), **options)
    # The SVD start takes minutes for a 1B model and changes no time: A is drawn at random.
    if isinstance(method, FALQON):
        method = dataclasses.replace(method, init="random")
    adapt(model, method)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    static, state, frozen = init_state(model, optimizer)
    stored = weight_bytes(model)
    # The model is dropped: its arrays live on in the state, which the step donates.
    del model
    gc.collect()
    state = state._replace(opt_state=jax.tree.map(jnp.copy, state.opt_state))
    shape = (sizes.batch, sizes.seq_len + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    jax.block_until_ready((state, frozen))
    ready = time.perf_counter()
    step = jax.jit(functools.partial(train_step, static), donate_argnums=0)
    compiled = step.lower(state, frozen, tokens).compile()
    compile_seconds = time.perf_counter() - ready
    seconds = []
    for _ in range(sizes.repeats + 1):
        start = time.perf_counter()
        for _ in range(_STEPS):
            state, metrics = compiled(state, frozen, tokens)
        jax.block_until_ready((state, metrics))
        seconds.append((time.perf_counter() - start) / _STEPS)
    analysis = compiled.memory_analysis()
    text = compiled.as_text()
    result = {
        "step_ms": 1e3 * statistics.median(seconds[1:]),
        "slowest_ms": 1e3 * max(seconds[1:]),
        "setup_seconds": ready - began,
        "compile_seconds": compile_seconds,
        "weight_bytes": stored,
        "argument_bytes": int(analysis.argument_size_in_bytes),
        "temporary_bytes": int(analysis.temp_size_in_bytes),
        "peak_bytes": int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes),
        "loss_is_finite": bool(jnp.isfinite(metrics["loss"])),
        "calls": dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
    }
    if jax.default_backend() == "gpu":
        times = _kernel_times(lambda: compiled(state, frozen, tokens))
        result["kernels_ms"] = _kernels(times)
        result["classes_ms"] = classes(times)
        if details is not None:
            details.with_suffix(".hlo").write_text(text)
            details.with_suffix(".kernels.json").write_text(json.dumps(times, indent=1))
    return result


def _kernel_times(run: Any) -> dict[str, float]:
    """Seconds of one run by name of the kernel."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return kernel_times(Path(folder))


# By what stands in a kernel's name, first come: cuBLASLt writes the types of 8-bit operands with q.
_CLASSES = {
    "attention": ("cudnn", "fmha"),
    "8-bit products": ("nvjet_sm90_q",),
    "other products": ("nvjet", "xmma", "cublas", "splitK"),
    "gated kernels": ("mosaic",),
}


def classes(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds by what kernels do; "passes" are those that XLA made.

    >>> classes({"nvjet_sm90_qqtst": 0.002, "loop_add_fusion_1": 0.001})
    {'8-bit products': 2.0, 'passes': 1.0}
    """
    total: dict[str, float] = {}
    for name, seconds in times.items():
        found = (kind for kind, parts in _CLASSES.items() if any(part in name for part in parts))
        kind = next(found, "passes")
        total[kind] = total.get(kind, 0.0) + 1e3 * seconds
    return total


def _kernels(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds by kernel, the longest; kernels that differ in a number are one."""
    total: collections.Counter[str] = collections.Counter()
    for name, seconds in times.items():
        total[re.sub(r"_\d+$", "", name)[:90]] += 1e3 * seconds
    return {"all": sum(total.values()), **dict(total.most_common(20))}


def products(side: int, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of the parts of one layer ``[side, side]``, forward."""
    keys = jax.random.split(jax.random.key(0), 4)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    x, w = normal(keys[0], (sizes.tokens, side)), normal(keys[1], (side, side))
    a, b = normal(keys[2], (side, sizes.rank)), normal(keys[3], (sizes.rank, side))
    per_tensor = functools.partial(quantize, qtype="fp8_e4m3", axis=None)
    x8, w8 = per_tensor(x).qvalue, per_tensor(w.T).qvalue
    melded = meld_weight(w.T, sizes.rank, init="random", key=keys[0])

    def codes(x8, w8):
        return jax.lax.dot_general(
            x8, w8, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
        )

    def low_rank_8(x, a, b):
        low = quantized_dot_general(x, a, _PLAIN, "fp8_current")
        return quantized_dot_general(low, b, _PLAIN, "fp8_current")

    runs = {
        "bf16": (lambda x, w: x @ w, x, w),
        "fp8_on_codes": (codes, x8, w8),
        "quantise_x": (per_tensor, x),
        "quantise_and_fp8": (lambda x, w8: codes(per_tensor(x).qvalue, w8), x, w8),
        "melded": (lambda x, m: melded_dot(x, None, m), x, melded),
        "low_rank_bf16": (lambda x, a, b: (x @ a) @ b, x, a, b),
        "low_rank_fp8": (low_rank_8, x, a, b),
    }
    compile_one = lambda run: jax.jit(run[0]).lower(*run[1:]).compile()  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(runs, pool.map(compile_one, runs.values()), strict=True))
    return {
        name: 1e3 * benchmark(programs[name], *args, repeats=sizes.repeats, warmup=1).median
        for name, (_, *args) in runs.items()
    }


@dataclasses.dataclass(frozen=True)
class Command:
    """Measure step times, memory and products, and write ``OUTPUT/PRESET/speed.json``."""

    preset: Literal["cpu", "gpu"] = "gpu"
    """Sizes; ``cpu`` only checks the program."""

    time_budget: float = 500.0
    """Seconds after which no further measurement starts; what is missing is listed."""

    output: Path = RESULTS
    """Folder of the results; ``PRESET`` is appended."""

    only: str = ""
    """Measurements to make, with commas: names of methods, sides of products, ``steps`` or
    ``products``. By default all."""

    layers: int | None = None
    """Blocks of the model, instead of the preset's; it is in the result."""

    details: bool = False
    """Whether to write every method's optimised program and all its kernels beside the result."""

    def run(self) -> dict[str, Any]:
        """Measure, print and write."""
        sizes, deadline = PRESETS[self.preset], time.monotonic() + self.time_budget
        if self.layers is not None:
            sizes = dataclasses.replace(sizes, model={**sizes.model, "num_layers": self.layers})
        command = f"python -m experiments.finetune.speed --preset {self.preset}"
        command += f" --only {self.only}" * bool(self.only)
        command += f" --layers {self.layers}" * (self.layers is not None)
        results = results_of(sizes, command, ("steps", "products")) | {"seed": 0}
        folder = self.output / self.preset

        def step(name, method):
            options = {"details": folder / name} if self.details else {}
            return "steps", name, functools.partial(training_step, method, sizes, **options)

        work = [step(*each) for each in methods(sizes.rank).items()]
        work += [
            ("products", str(side), functools.partial(products, side, sizes))
            for side in sizes.sides
        ]
        wanted = set(filter(None, self.only.split(",")))
        if unknown := wanted - {x for kind, name, _ in work for x in (kind, name)}:
            raise ValueError(f"only has {sorted(unknown)}, which are no measurements")
        chosen = [each for each in work if not wanted or wanted & set(each[:2])]
        compare = functools.partial(_compare, results["steps"])
        return measure_each(results, chosen, deadline, folder / "speed.json", compare)


def _compare(steps: dict[str, Any]) -> None:
    """Every method beside LoRA on bfloat16, as far as that was measured."""
    for row in steps.values() if "lora" in steps else ():
        row["speedup_over_lora"] = steps["lora"]["step_ms"] / row["step_ms"]
        row["peak_over_lora"] = row["peak_bytes"] / steps["lora"]["peak_bytes"]


if __name__ == "__main__":
    tyro.cli(Command).run()
