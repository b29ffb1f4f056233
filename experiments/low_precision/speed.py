"""E4: times of FP8 and of emulated FP4 on a GPU, and the size from which FP8 pays.

Sections, each of which writes ``speed_<section>.json`` after every row:

* ``gemm``: the kernel for FP8 blocks against XLA's sum over tiles, then its rate.
* ``linear``: forward and backward of a linear layer at the two sizes of the acceptance test.
* ``quantize``: the fused quantiser against the formats, then its bandwidth beside a copy and XLA.
* ``cast``: likewise FP8 codes of a matrix and of its transpose.
* ``step``: a training step of a transformer with 1.1 billion parameters.
* ``sweep``: the linear layer over sizes, for the break-even.
"""

import dataclasses
import functools
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.low_precision.training import environment
from jaxeff.nn.rope import RopeConfig, apply_rope
from jaxeff.quant import RECIPES, Recipe, advance_history, dot_general, init_history
from pallas_kernels import QTensor, fake_quantize, matmul, quantize_fp8_both
from pallas_kernels.benchmarking import (
    Timing,
    benchmark,
    kernel_times,
    matmul_flops,
    teraflops,
)
from pallas_kernels.formats import TE_SIGNS, get_format, rht
from pallas_kernels.formats.block_format import tensor_encode_scale
from pallas_kernels.formats.counter_random import counter_key

PLAIN = (((1,), (0,)), ((), ()))
SECTIONS = ("cast", "quantize", "linear", "gemm", "step", "sweep")
ISOLATED = ("cast", "quantize", "gemm")  # kernels that may hang run in a process of their own
# The two shapes of the acceptance test: tokens, inputs, outputs.
FIRST = ((8192, 8192, 8192), (16384, 4096, 4096))
SWEEP = tuple(
    (t, k, k)
    for t, k in (
        (4096, 4096),
        (16384, 2048),
        (4096, 2048),
        (2048, 2048),
        (16384, 1024),
        (4096, 1024),
    )
)
# Products by cuBLASLt, which XLA prefers in the end: it tries Triton's for a minute before.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
Row = dict[str, Any]
Say = Callable[[str], None]


def _native(name: str) -> Recipe:
    return dataclasses.replace(RECIPES[name], execution="native")


def recipes() -> dict[str, Recipe]:
    """What is timed: real 8-bit products, and FP4 by emulation."""
    eight = {
        name: _native(name) for name in ("fp8_current", "fp8_delayed", "fp8_rowwise", "fp8_block")
    }
    return {"bf16": RECIPES["bf16"], **eight, "fp4_all_the_way": RECIPES["fp4_all_the_way"]}


@dataclasses.dataclass
class Report:
    """Rows of one section and the clock."""

    path: Path
    deadline: float
    say: Say
    rows: list[Row] = dataclasses.field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keeps a row, says it and writes all."""
        self.rows.append(row)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        self.say("  ".join(f"{k}={v}" for k, v in shown.items()))
        content = {"environment": environment(), "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def compiled(self, name: str, function: Any, *args) -> Any:
        """A compiled program; said before and after, as compilers may hang."""
        began = time.monotonic()
        self.say(f"compiling {name}")
        program = function.lower(*args).compile(compiler_options=OPTIONS)
        self.say(f"compiled {name} in {time.monotonic() - began:.1f} s")
        return program

    @property
    def is_late(self) -> bool:
        """Whether no further measurement should begin."""
        return time.monotonic() > self.deadline


# --- the linear layer -----------------------------------------------------------------------------


def layer_step(recipe: Recipe) -> Callable:
    """Forward and backward of one linear layer, quantisation included.

    Args:
        recipe: of the layer.

    Returns:
        ``f(x [t, k], w [k, n], d [t, n], history) -> (z, gradients of x, w and history)``, to be
        compiled; the history is None but for delayed scaling.
    """

    @jax.jit
    def step(x, w, d, history):
        key = jax.random.key(0) if recipe.needs_key else None

        def product(x, w, history):
            return dot_general(recipe, key, amax_history=history)(x, w, PLAIN)

        z, pullback = jax.vjp(product, x, w, history)
        return z, *pullback(d)

    return step


def history_of(recipe: Recipe) -> jax.Array | None:
    """What delayed scaling remembers: an argument, so that no scale is a constant."""
    return None if recipe.delayed is None else init_history(recipe).at[:, 0].set(4.0)


def measure_linear(
    shapes: Iterable[tuple[int, int, int]], names: Iterable[str], report: Report, repeats: int = 6
) -> None:
    """Adds a row for each shape and name.

    A row has milliseconds, TFLOP/s over the three products, the ratio to bf16, and how many 8-bit
    cuBLASLt calls the compiled program holds.
    """
    for shape in shapes:
        if report.is_late:
            return
        t, k, n = shape
        types = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((t, k), (k, n), (t, n))]
        # Drawn in float32 and cast: bfloat16 normals have few values.
        keys = jax.random.split(jax.random.key(0), 3)
        scales = (1.0, k**-0.5, 1e-3)
        operands = [
            (jax.random.normal(key, kind.shape) * scale).astype(jnp.bfloat16)
            for key, kind, scale in zip(keys, types, scales, strict=True)
        ]
        plain, exact = None, None
        for name in names:
            if report.is_late:
                return
            recipe = recipes()[name]
            given = (*operands, history_of(recipe))
            compiled = report.compiled(name, layer_step(recipe), *given)
            outs = compiled(*given)[:3]
            timing = benchmark(compiled, *given, repeats=repeats)
            if name == "bf16":
                plain, exact = timing.median, outs
            row = {"tokens": t, "inputs": k, "outputs": n, "recipe": name}
            errors = [float(_relative(a, b)) for a, b in zip(outs, exact, strict=True)]
            row |= _numbers(timing, 3 * matmul_flops(t, n, k), plain, compiled)
            report.add(row | {"errors": errors})


@jax.jit
def _relative(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def _numbers(timing: Timing, flops: float, plain: float | None, compiled: Any) -> Row:
    text = compiled.as_text()
    return {
        "milliseconds": 1e3 * timing.median,
        "spread": timing.spread,
        "teraflops": teraflops(flops, timing),
        "speed_up": None if plain is None else plain / timing.median,
        "source": timing.source,
        "fp8_calls": len(re.findall(r"cublas\$lt\$matmul\$f8", text)),
        "fp8_in_program": "f8e4m3fn" in text,
    }


def speed_ups(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Operations of one product and ratio to bf16, by recipe, in rising order."""
    points = {}
    for row in rows:
        if row["recipe"] != "bf16" and row["speed_up"] is not None:
            flops = 2.0 * row["tokens"] * row["inputs"] * row["outputs"]
            points.setdefault(row["recipe"], []).append((flops, row["speed_up"]))
    return {name: sorted(values) for name, values in points.items()}


def break_even(points: list[tuple[float, float]]) -> Row:
    """Smallest product size from which a recipe is never slower than bf16.

    Args:
        points: operations and ratio to bf16.

    Returns:
        ``flops`` of one product (None if it never pays), and those that were slower.

    >>> break_even([(2.0, 0.5), (4.0, 1.2), (8.0, 0.9), (16.0, 1.5)])
    {'flops': 16.0, 'slower_at_flops': [2.0, 8.0]}
    """
    slower = [flops for flops, ratio in points if ratio < 1]
    above = [flops for flops, _ in points if not slower or flops > max(slower)]
    return {"flops": min(above, default=None), "slower_at_flops": slower}


# --- the quantiser --------------------------------------------------------------------------------


def nvfp4_plan(x: jax.Array):
    """The plan of the fused kernel for NVFP4."""
    from pallas_kernels.ops.quantize.mosaic_sm90_matrix import Plan

    return Plan(*x.shape, str(x.dtype), get_format("nvfp4"))


def nvfp4_factors(x: jax.Array) -> jax.Array:
    """Encode and decode scale of the tensor for both sides: the pass before the kernel's."""
    kind = get_format("nvfp4")
    top = jnp.abs(x).max().astype(jnp.float32)
    encode = tensor_encode_scale(top, kind.element_type, kind.scale_type)
    return jnp.broadcast_to(jnp.stack([encode, 1 / encode]), (2, 2))


def wide_data(shape: tuple[int, int], dtype=jnp.bfloat16) -> jax.Array:
    """Normal values whose size differs from row to row, e^±2 at one deviation."""
    x = jax.random.normal(jax.random.key(0), shape)
    return (x * jnp.exp(2 * jax.random.normal(jax.random.key(1), (shape[0], 1)))).astype(dtype)


def quantizer_programs(x: jax.Array) -> dict[str, tuple[Callable, int, int]]:
    """What is compared: a function of (x, factors), bytes moved in sizes of x, passes over it."""
    from pallas_kernels.ops.quantize.mosaic_sm90_matrix import Side, round_matrix

    words = jnp.uint32([[1, 2], [3, 0xDEADBEEF]])
    near, drawn = Side(), Side(True)

    def kernel(rows, columns):
        return lambda x, factors: round_matrix(x, factors, words, nvfp4_plan(x), rows, columns)

    def plain(axis, stochastic):
        key = {"rounding": "stochastic", "key": counter_key(words[1 - axis])} if stochastic else {}
        options = {"axis": axis, "implementation": "xla"} | key
        return lambda x, factors: fake_quantize(x, "nvfp4", **options)

    return {
        "copy": (lambda x, factors: -x, 2, 1),
        "kernel rows and columns SR": (kernel(drawn, drawn), 3, 1),
        "kernel rows SR": (kernel(drawn, None), 2, 1),
        "kernel columns SR": (kernel(None, drawn), 2, 1),
        "kernel rows RtN, columns rotated SR": (kernel(near, Side(True, TE_SIGNS)), 3, 1),
        "kernel rows RtN": (kernel(near, None), 2, 1),
        "kernel rows SR with tensor scale": (
            lambda x, factors: kernel(drawn, None)(x, nvfp4_factors(x)), 2, 2
        ),
        "amax by XLA": (lambda x, factors: jnp.abs(x).max(), 1, 1),
        "XLA rows SR": (plain(1, True), 2, 2),
        "XLA rows RtN": (plain(1, False), 2, 2),
        "XLA columns SR": (plain(0, True), 2, 2),
        "XLA columns rotated SR": (lambda x, factors: plain(0, True)(rht(x, axis=0), None), 2, 3),
    }  # fmt: skip


# Result of a kernel, and the program that must give the same.
_SAME = (
    ("kernel rows SR", 0, "XLA rows SR"),
    ("kernel rows and columns SR", 0, "XLA rows SR"),
    ("kernel rows and columns SR", 1, "XLA columns SR"),
    ("kernel rows RtN, columns rotated SR", 0, "XLA rows RtN"),
    ("kernel rows RtN, columns rotated SR", 1, "XLA columns rotated SR"),
)


def measure_quantizer(report: Report, shape: tuple[int, int] = (16384, 8192)) -> None:
    """Checks the fused quantiser bit for bit, then times it beside a copy and plain XLA.

    A float32 matrix of ragged size is checked in ``tests/quant/test_low_precision_gpu.py``.
    """
    x = jax.block_until_ready(wide_data(shape))
    factors = jnp.stack([nvfp4_factors(x)[0], nvfp4_factors(rht(x, axis=0))[0]])
    rotates = "kernel rows RtN, columns rotated SR"
    sides = {rotates: factors}  # the others take the scale of x on both sides
    given = {name: sides.get(name, nvfp4_factors(x)) for name in quantizer_programs(x)}
    with ThreadPoolExecutor(16) as pool:
        compiled = {
            name: pool.submit(jax.jit(function).lower(x, factors).compile)
            for name, (function, *_) in quantizer_programs(x).items()
        }
    compiled = {name: program.result() for name, program in compiled.items()}
    report.say("compiled")
    for kernel, index, plain in _SAME:
        got = compiled[kernel](x, given[kernel])[index]
        want = compiled[plain](x, factors)
        row = {"check": f"{kernel}: {plain}", "shape": list(shape), "dtype": str(x.dtype)}
        report.add(row | {"different": int((got != want).sum()), "of": x.size})
    for name, (_, moved, passes) in quantizer_programs(x).items():
        if report.is_late:
            return
        timing = benchmark(compiled[name], x, given[name], repeats=6)
        rate = moved * x.size * x.dtype.itemsize / timing.median / 1e12
        row = {"what": name, "microseconds": 1e6 * timing.median, "terabytes_per_second": rate}
        report.add(row | {"spread": timing.spread, "passes": passes, "source": timing.source})


def measure_cast(report: Report, shape: tuple[int, int] = (16384, 8192)) -> None:
    """Checks FP8 codes of a matrix and of its transpose bit for bit, then times them."""
    kinds = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}

    def cast(qtype, implementation):
        return lambda x, scale: quantize_fp8_both(x, qtype, scale, implementation=implementation)

    for size in ((160, 144), shape):
        x = jax.block_until_ready(wide_data(size))
        scales = {name: jnp.abs(x).max().astype(jnp.float32) / top for name, top in kinds.items()}
        with ThreadPoolExecutor(8) as pool:
            compiled = {
                (name, how): pool.submit(jax.jit(cast(name, how)).lower(x, scale).compile)
                for name, scale in scales.items()
                for how in ("mosaic", "xla")
            }
        compiled = {name: program.result() for name, program in compiled.items()}
        for name, scale in scales.items():
            got, want = (compiled[name, how](x, scale)[:2] for how in ("mosaic", "xla"))
            wrong = [
                int((a.astype(jnp.float32) != b.astype(jnp.float32)).sum())
                for a, b in zip(got, want, strict=True)
            ]
            report.add({"check": name, "shape": list(size), "different": wrong, "of": x.size})
    for (name, how), program in compiled.items():
        timing = benchmark(program, x, scales[name], repeats=10)
        rate = 2 * x.size * x.dtype.itemsize / timing.median / 1e12  # read 2 bytes, write 1 and 1
        row = {"what": f"{name} {how}", "microseconds": 1e6 * timing.median}
        report.add(row | {"terabytes_per_second": rate, "spread": timing.spread})


def measure_gemm(report: Report, side: int = 8192) -> None:
    """Checks the kernel for scales per 128 of k, then times it beside bf16 and one scale."""
    from pallas_kernels.ops.matmul.mosaic_sm90_fp8 import Config, block_scaled

    def codes(seed, shape):
        return jax.random.normal(jax.random.key(seed), shape).astype(jnp.float8_e4m3fn)

    def given(m, n, k, squares):
        sizes = ((k // 128, m), (k // 128, n // 128 if squares else n))
        scales = [jnp.exp(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate(sizes)]
        return codes(2, (m, k)), codes(3, (n, k)), *scales

    def exact_one(a, b):
        wide = [x.astype(jnp.float32) for x in (a, b)]
        return 0.25 * jnp.matmul(*wide, precision="highest")

    def exact(a, b, a_scale, b_scale):
        k = a.shape[1]
        b_scale = jnp.repeat(b_scale, b.shape[0] // b_scale.shape[1], 1)
        wide = [
            (x.astype(jnp.float32).reshape(-1, k // 128, 128) * s.T[..., None]).reshape(-1, k)
            for x, s in ((a, a_scale), (b, b_scale))
        ]
        return jnp.matmul(wide[0], wide[1].T, precision="highest")

    def one_scale(a, b):
        scale = jnp.full((1, 1), 0.5)
        a, b = (QTensor(x, scale, qtype="fp8_e4m3") for x in (a, b))
        return matmul(a, b, preferred_element_type=jnp.bfloat16, implementation="mosaic")

    def run(name, function, *operands):
        return report.compiled(name, jax.jit(function), *operands)(*operands)

    a, b = codes(2, (200, 1280)), codes(3, (1280, 192))
    got, want = run("one scale", one_scale, a, b), run("oracle", exact_one, a, b)
    report.add({"check": "one scale", "error": float(_relative(got, want))})
    for m, n, k, squares in (
        (200, 384, 256, True),
        (200, 192, 1280, False),
        (1024, 512, 4096, True),
    ):
        operands = given(m, n, k, squares)
        kernel = functools.partial(block_scaled, out_dtype="float32")
        compiled = report.compiled(f"kernel {m, n, k}", jax.jit(kernel), *operands)
        got, want = compiled(*operands), run("oracle", exact, *operands)
        row = {"check": [m, n, k], "squares": squares, "error": float(_relative(got, want))}
        report.add(row | {"same": bool((got == compiled(*operands)).all())})
    flops = matmul_flops(side, side, side)
    a, b = codes(2, (side, side)), codes(3, (side, side))
    wide = [x.astype(jnp.bfloat16) for x in (a, b)]
    contract = (((1,), (1,)), ((), ()))
    plain = functools.partial(
        jax.lax.dot_general, dimension_numbers=contract, preferred_element_type=jnp.bfloat16
    )
    programs = {
        "squares": (block_scaled, given(side, side, side, True)),
        "one scale, XLA": (plain, (a, b)),
        "one scale, kernel": (one_scale, (a, b.T)),
        "columns": (block_scaled, given(side, side, side, False)),
        "bf16": (plain, wide),
        "squares, no cluster": (
            functools.partial(block_scaled, config=Config(cluster=1)), given(side, side, side, True)
        ),
    }  # fmt: skip
    for name, (function, operands) in programs.items():
        if report.is_late:
            return
        compiled = report.compiled(name, jax.jit(function), *operands)
        timing = benchmark(compiled, *operands, repeats=6)
        report.add({"what": name} | _numbers(timing, flops, None, compiled))


# --- a transformer step ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A decoder as of 1B parameters: 16 layers, grouped-query attention, SwiGLU.

    What has the same input is one product: queries, keys and values, gate and up projection.
    """

    layers: int = 16
    dim: int = 2048
    heads: int = 16
    kv_heads: int = 8
    mlp: int = 8192
    vocab: int = 32768
    batch: int = 8
    seq_len: int = 2048
    attention: str | None = "cudnn"

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Shapes of the weights of a layer."""
        kv = self.kv_heads * self.head_dim
        return {
            "qkv": (self.dim, self.dim + 2 * kv),
            "out": (self.dim, self.dim),
            "gate_up": (self.dim, 2 * self.mlp),
            "down": (self.mlp, self.dim),
        }


def init_parameters(sizes: Sizes) -> dict[str, Any]:
    """Float32 weights; those of the layers apart, as the layers are not a scan."""

    def drawn(key, shapes):
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(one, shape) * shape[0] ** -0.5
            for one, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    ends = {"embed": (sizes.vocab, sizes.dim), "head": (sizes.dim, sizes.vocab)}
    first, *keys = jax.random.split(jax.random.key(0), sizes.layers + 1)
    norms = {"norms": jnp.ones((2, sizes.dim))}
    layers = [drawn(key, sizes.kernels()) | norms for key in keys]
    return drawn(first, ends) | {"norm": jnp.ones(sizes.dim), "layers": layers}


def init_histories(sizes: Sizes, recipe: Recipe) -> list[dict[str, jax.Array]]:
    """What delayed scaling remembers of every product; empty for other recipes."""
    one = history_of(recipe)
    names = () if one is None else sizes.kernels()
    # Copies: a step may overwrite each of them.
    return [{name: jnp.copy(one) for name in names} for _ in range(sizes.layers)]


def loss_of(parameters, histories, tokens, step, recipe: Recipe, sizes: Sizes) -> jax.Array:
    """Next-token loss. What lies between products is computed again for its gradient.

    So memory holds, and passes over memory move, little else than what products read and write.
    The layers are no scan, which would copy all that the backward pass needs.
    """
    names = list(sizes.kernels())
    positions = jnp.broadcast_to(jnp.arange(sizes.seq_len), (sizes.batch, sizes.seq_len))

    def layer(x, weights, seen, key):
        def product(name, value):
            own = jax.random.fold_in(key, names.index(name)) if recipe.needs_key else None
            numbers = (((value.ndim - 1,), (0,)), ((), ()))
            rounded = dot_general(recipe, own, amax_history=seen.get(name))
            return rounded(value, weights[name].astype(value.dtype), numbers)

        qkv = product("qkv", _normed(x, weights["norms"][0]))
        qkv = qkv.reshape(*x.shape[:2], -1, sizes.head_dim)
        q, k, v = jnp.split(qkv, (sizes.heads, sizes.heads + sizes.kv_heads), axis=2)
        q, k = (apply_rope(part, positions, RopeConfig()) for part in (q, k))
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=sizes.attention
        ).reshape(x.shape)
        x = x + product("out", out)
        return x + product("down", _gated(product("gate_up", _normed(x, weights["norms"][1]))))

    x = parameters["embed"][tokens[:, :-1]].astype(jnp.bfloat16)
    for index, weights in enumerate(parameters["layers"]):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), index)
        x = layer(x, weights, histories[index], key)
    logits = _normed(x, parameters["norm"]) @ parameters["head"].astype(jnp.bfloat16)
    return _cross_entropy(logits, tokens[:, 1:])


@jax.checkpoint
def _normed(x, scale):
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * factor * scale).astype(x.dtype)


@jax.checkpoint
def _gated(gate_up):
    gate, up = (x.astype(jnp.float32) for x in jnp.split(gate_up, 2, axis=-1))
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


@jax.checkpoint
def _cross_entropy(logits, targets):
    wide = logits.astype(jnp.float32)
    # Not taken by index: the gradient of that scatters into an array of all logits.
    is_target = jax.lax.broadcasted_iota(targets.dtype, wide.shape, 2) == targets[..., None]
    chosen = jnp.where(is_target, wide, 0).sum(-1)
    return (jax.nn.logsumexp(wide, -1) - chosen).mean()


OPTIMIZER = optax.adamw(1e-4)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def train_step(state, tokens, step, recipe: Recipe, sizes: Sizes):
    """One step of AdamW; returns the new state and the loss."""
    parameters, moments, histories = state
    loss, (gradient, seen) = jax.value_and_grad(loss_of, (0, 1))(
        parameters, histories, tokens, step, recipe, sizes
    )
    updates, moments = OPTIMIZER.update(gradient, moments, parameters)
    histories = advance_history(histories, seen)
    return (optax.apply_updates(parameters, updates), moments, histories), loss


def measure_steps(report: Report, sizes: Sizes = Sizes(), blocks: int = 4, length: int = 4) -> None:
    """Adds a row for bf16, FP8 and emulated FP4, timed by the host over blocks of whole steps.

    All programs are compiled first, in threads, and none is timed while another one compiles. A row
    says where the time of a step goes, by the profiler.
    """
    tokens = jax.random.randint(
        jax.random.key(1), (sizes.batch, sizes.seq_len + 1), 0, sizes.vocab, jnp.int32
    )
    initial = jax.jit(lambda: (p := init_parameters(sizes), OPTIMIZER.init(p)))
    types = jax.eval_shape(initial)
    plain = None
    for name, compiled in _step_programs(report, types, tokens, sizes).items():
        if report.is_late:
            return
        state, number = (*initial(), init_histories(sizes, recipes()[name])), itertools.count()

        def steps(count, state, compiled=compiled, number=number):
            for _ in range(count):
                state, loss = compiled(state, tokens, jnp.int32(next(number)))
            return state, float(loss)

        state, first_loss = steps(2, state)
        times = []
        for _ in range(blocks):
            began = time.perf_counter()
            state, loss = steps(length, state)
            times.append((time.perf_counter() - began) / length)
        timing = Timing(tuple(times), 0.0, "wall")
        plain = timing.median if name == "bf16" else plain
        weights = sizes.layers * sum(k * n for k, n in sizes.kernels().values())
        flops = 6.0 * tokens.size * (weights + sizes.dim * sizes.vocab)
        row = {
            "recipe": name,
            "losses": [first_loss, loss],
            "parameters": sum(x.size for x in jax.tree.leaves(state[0])),
        }
        row |= _numbers(timing, flops, plain, compiled)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, _ = steps(1, state)
            row |= {"parts": _parts(kernel_times(Path(folder)))}
        report.add(row)
        del state


def _step_programs(report: Report, types, tokens, sizes: Sizes) -> dict[str, Any]:
    """Compiled steps by recipe; those that are not ready in time are left out."""
    pool = ThreadPoolExecutor(4)
    began, programs = time.monotonic(), {}
    for name in ("bf16", "fp8_delayed", "fp4_all_the_way", "fp8_current"):
        recipe = recipes()[name]
        state = (*types, jax.eval_shape(functools.partial(init_histories, sizes, recipe)))
        lowered = train_step.lower(state, tokens, jnp.int32(0), recipe, sizes)
        programs[name] = pool.submit(lowered.compile, compiler_options=OPTIONS)
        report.say(f"{time.monotonic() - began:.0f} s: {name} traced")
    ready = {}
    for name, program in programs.items():
        try:
            ready[name] = program.result(max(0.0, report.deadline - time.monotonic() - 20))
            report.say(f"{time.monotonic() - began:.0f} s: {name} compiled")
        except (TimeoutError, RuntimeError) as error:
            report.say(f"{name} left out: {str(error)[:300] or 'not compiled in time'}")
    pool.shutdown(wait=False)
    return ready


def _parts(times: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and the largest kernels."""
    kinds = {
        "attention": ("sdpa", "flash", "fmha", "attention"),
        "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
        "rounding": ("mosaic", "kernel_mosaic", "mpmd"),
    }
    parts = dict.fromkeys((*kinds, "rest"), 0.0)
    for name, seconds in times.items():
        found = (kind for kind, marks in kinds.items() if any(m in name.lower() for m in marks))
        parts[next(found, "rest")] += 1e3 * seconds
    largest = [[name[:60], round(1e3 * seconds, 3)] for name, seconds in list(times.items())[:16]]
    return parts | {"largest": largest, "kernels": len(times)}


def run_section(section: str, report: Report) -> None:
    """Runs one of ``SECTIONS``."""
    eight = ("fp8_delayed", "fp8_current")
    if section == "linear":
        measure_linear(FIRST, ("bf16", *eight, "fp4_all_the_way"), report)
    elif section == "cast":
        measure_cast(report)
    elif section == "gemm":
        measure_gemm(report)
    elif section == "quantize":
        measure_quantizer(report)
    elif section == "step":
        measure_steps(report)
    else:
        measure_linear(SWEEP, ("bf16", *eight), report, repeats=5)
