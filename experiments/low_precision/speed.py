"""E4: step times of FP8 and of emulated FP4 on a GPU, and the size from which FP8 pays."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.quant import RECIPES, Recipe, dot_general, init_history
from pallas_kernels.benchmarking import benchmark, matmul_flops, teraflops

PLAIN = (((1,), (0,)), ((), ()))
# Two shapes of the acceptance test first: a time budget cuts off the end of the sweep.
FIRST = ((8192, 8192, 8192), (16384, 4096, 4096), (15872, 4096, 16384))
SWEEP = tuple(itertools.product((8192, 16384), (512, 1024, 2048, 4096, 8192, 16384), (4096, 16384)))


def _native(name: str) -> Recipe:
    return dataclasses.replace(RECIPES[name], execution="native")


def recipes() -> dict[str, Recipe]:
    """What is timed: real 8-bit products, and FP4 by emulation."""
    eight = {
        name: _native(name) for name in ("fp8_current", "fp8_delayed", "fp8_rowwise", "fp8_block")
    }
    return {"bf16": RECIPES["bf16"], **eight, "fp4_all_the_way": RECIPES["fp4_all_the_way"]}


def layer_step(recipe: Recipe) -> Callable:
    """Forward and backward of one linear layer, quantisation included.

    Args:
        recipe: of the layer.

    Returns:
        ``f(x [t, k], w [k, n], d [t, n]) -> (z, gradient of x, gradient of w)``, compiled.
    """

    @jax.jit
    def step(x, w, d):
        key = jax.random.key(0) if recipe.needs_key else None
        history = None
        if recipe.delayed is not None:
            history = init_history(recipe).at[:, 0].set(4.0)
        product = dot_general(recipe, key, amax_history=history)
        z, pullback = jax.vjp(lambda x, w: product(x, w, PLAIN), x, w)
        return z, *pullback(d)

    return step


def measure(shape: tuple[int, int, int], repeats: int = 20) -> dict[str, Any]:
    """Times all recipes on one shape.

    Args:
        shape: tokens, inputs, outputs.
        repeats: timed runs of each.

    Returns:
        Row with milliseconds, TFLOP/s over the three products, ratio to bf16, and whether the
        compiled program holds an 8-bit product.
    """
    t, k, n = shape
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [
        jax.random.normal(key, size, jnp.bfloat16) * scale
        for key, size, scale in zip(
            keys, ((t, k), (k, n), (t, n)), (1.0, k**-0.5, 1e-3), strict=True
        )
    ]
    row: dict[str, Any] = {"tokens": t, "inputs": k, "outputs": n, "recipes": {}}
    for name, recipe in recipes().items():
        step = layer_step(recipe)
        text = step.lower(*operands).compile().as_text()
        timing = benchmark(step, *operands, repeats=repeats)
        row["recipes"][name] = {
            "milliseconds": 1e3 * timing.median,
            "spread": timing.spread,
            "teraflops": teraflops(3 * matmul_flops(t, n, k), timing),
            "source": timing.source,
            "fp8_custom_call": "cublas$lt$matmul$f8" in text,
            "fp8_in_program": "f8e4m3fn" in text,
        }
    bf16 = row["recipes"]["bf16"]["milliseconds"]
    for numbers in row["recipes"].values():
        numbers["speed_up"] = bf16 / numbers["milliseconds"]
    return row


def break_even(rows: list[dict[str, Any]], recipe: str) -> dict[str, Any]:
    """Smallest product size from which a recipe is never slower than bf16.

    Args:
        rows: results of ``measure``.
        recipe: name.

    Returns:
        ``flops`` of one product (None if it never pays), and the rows below.
    """
    points = sorted(
        (math.prod((r["tokens"], r["inputs"], r["outputs"])) * 2, r["recipes"][recipe]["speed_up"])
        for r in rows
    )
    slower = [flops for flops, speed_up in points if speed_up < 1]
    above = [flops for flops, _ in points if not slower or flops > max(slower)]
    return {"flops": min(above, default=None), "slower_at_flops": slower}
