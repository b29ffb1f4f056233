"""Forward and backward on Hopper: cases of ``experiments.benchmarks.block_sparse``.

A case names the variant in "gradient": None (16 bits), "sage_bwd" (INT8 gradient, P V in 16 bits)
or "sage_bwd_fp8" (the same with P V in FP8). "block" asks for a `BlockMask`, random tiles of that
size. A forward and backward counts as 3.5 forwards, a backward as 2.5.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import attention as bench
from pallas_kernels import QUANTS, BlockMask, Mask, dot_product_attention, testing
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.benchmarking import attention_flops, benchmark, teraflops
from pallas_kernels.ops.attention import reference
from pallas_kernels.ops.attention.spec import AttentionSpec

Case = dict[str, Any]
# Relative L1 against float32, and the smallest cosine.
BOUNDS = {None: (0.01, 0.9999), "sage_bwd": (0.06, 0.998), "sage_bwd_fp8": (0.08, 0.997)}
OUTLIERS = 0.1, 0.997  # of "sage_bwd" in inputs with outliers: a query has one scale for its dS


def correct_cases() -> list[Case]:
    """Variants, rules, lists and head sizes through `jax.vjp` of the public function."""
    base = {"group": "gradient", "stage": "correct", "shape": [2, 1000, 777, 4, 2, 128]}
    small, spread = [2, 1000, 777, 4, 2, 64], [1, 2048, 2048, 2, 2, 128]

    def case(quant, rule="none", block=None, **more):
        return {**base, "gradient": quant, "rule": rule, "block": block, **more}

    return [
        case("sage_bwd"), case(None, "causal"),
        case("sage_bwd", shape=spread, sigma=3.0),
        case(None, "causal", [128, 128]),
        case("sage_bwd", "causal", [64, 64]), case("sage_bwd", "window"),
        case("sage_bwd_fp8", "causal"), case(None, "none", [64, 128]),
        case("sage_bwd", "causal", shape=small), case(None, "none", [256, 256], shape=small),
        case("sage_bwd", "sinks"), case("sage_bwd", "causal", kind="outlier"),
        case("sage_bwd", "none", kind="k_bias"), case(None, "window"),
        case(None, "causal", dtype="float16"), case("sage_bwd", "causal", dtype="float16"),
        case("sage_bwd", "lengths", shape=[2, 300, 300, 4, 2, 128]),
        case("sage_bwd", "window", shape=small), case("sage_bwd", "sinks", shape=small),
        case("sage_bwd", "none", [128, 128], shape=small, dtype="float16"),
        case("sage_bwd", "sinks", dtype="float16"),
    ]  # fmt: skip


def fast_cases() -> list[Case]:
    """What is judged first: 4K without a mask, then causal, then the pieces, lists and 16K."""
    base = {"group": "gradient", "stage": "fast", "shape": [4, 4096, 32, 128]}
    found = []
    for causal in (False, True):
        each = {**base, "causal": causal}
        found += [{**each, "gradient": "sage_bwd"}, {**each, "gradient": None}]
        found += [{**each, "peer": "cudnn"}, {**each, "gradient": "sage_bwd_fp8"}]
    pieces = [
        ["kv", "Keys", {}], ["q", "Queries", {}], ["operands", "Keys", {}],
        ["kv", "Registers", {}], ["q", "Half", {}],
        *(["kv", "Keys", {"schedule": x}] for x in ("none", "eager")),
        *(["q", "Queries", {"schedule": x}] for x in ("none", "eager")),
        ["kv", "Half", {"schedule": "none"}], ["kv", "Registers", {"schedule": "none"}],
    ]  # fmt: skip
    found += [{**base, "causal": False, "pieces": each} for each in pieces]
    found += [{**base, "causal": causal, "peer": "sdpa"} for causal in (False, True)]
    long = {**base, "shape": [1, 16384, 32, 128]}
    for quant in ("sage_bwd", None):
        found += [{**long, "causal": False, "gradient": quant}]
        found += [{**long, "lists": quant, "block": [128, 128]}]
    return found


def quant_of(name: str | None):
    """The variant that a case names."""
    if name == "sage_bwd_fp8":  # values in FP8 in the forward
        return dataclasses.replace(QUANTS["sage2"], name=name, backward="int8")
    return name


def rules_of(case: Case) -> dict[str, Any]:
    """Keyword arguments beside the mask."""
    b, _, s, n = case["shape"][:4]
    sinks = {"sinks": jnp.linspace(-1.0, 2.0, n)}
    lengths = {"key_value_seq_lengths": jnp.array([s, s // 3])[:b]}
    return {"sinks": sinks, "lengths": lengths}.get(case["rule"], {})


def mask_of(case: Case) -> Mask | BlockMask:
    """The token rule, with random tiles if the case has a block; one row of tiles is empty."""
    b, t, s, n = case["shape"][:4]
    rules = {"causal": Mask.causal(s - t + 100), "window": Mask.window(200, 90)}
    rule = rules.get(case["rule"], Mask())
    if case["block"] is None:
        return rule
    block_q, block_kv = case["block"]
    kept = np.random.default_rng(0).random((b, n, -(-t // block_q), -(-s // block_kv))) < 0.4
    kept[0, 1, 2], kept[..., 1] = False, False
    return BlockMask.from_blocks(
        jnp.asarray(kept), t, s, block_q=block_q, block_kv=block_kv, mask=rule
    )


def pulled(quant, implementation="mosaic", **rules) -> Callable:
    """(query, key, value, d_out, mask) -> output and the three gradients."""

    def run(query, key, value, d_out, mask):
        def call(*x):
            return dot_product_attention(
                *x, mask=mask, quant=quant, implementation=implementation, **rules
            )

        out, pull = jax.vjp(call, query, key, value)
        return out, *pull(d_out)

    return run


def exact(query, key, value, d_out, mask, sinks=None, lengths=None):
    """The same in float32."""
    (b, t, n, h), (_, s, k, _) = query.shape, key.shape
    spec = AttentionSpec(b, t, s, n, k, h, "float32", h**-0.5, has_sinks=sinks is not None)
    arrays = [x.astype(jnp.float32) for x in (query, key, value, d_out)]
    mask = mask.as_mask() if isinstance(mask, BlockMask) else mask
    mask = mask if lengths is None else mask & Mask.lengths(None, lengths)
    with jax.default_matmul_precision("highest"):
        run = lambda *x: reference.attention(*x, None, sinks, mask, spec)[0]  # noqa: E731
        out, pull = jax.vjp(run, *arrays[:3])
        return out, *pull(arrays[3])


def run_correct(case: Case) -> dict[str, Any]:
    """Relative L1 and cosine of O, dQ, dK and dV; raises out of bounds or if two runs differ."""
    b, t, s, n, k, h = case["shape"]
    sizes = {"batch": b, "q_len": t, "num_heads": n, "head_dim": h}
    sizes["dtype"] = jnp.dtype(case.get("dtype", "bfloat16"))
    q, key, v = testing.attention_inputs(
        case.get("kind", "normal"), kv_len=s, num_kv_heads=k, **sizes
    )
    d_out = testing.attention_inputs("normal", **sizes)[2]
    sigma = case.get("sigma", 1.0)  # standard deviation of Q and K
    q, key = (x * jnp.asarray(sigma, x.dtype) for x in (q, key))
    mask, rules = mask_of(case), rules_of(case)
    step = jax.jit(pulled(quant_of(case["gradient"]), **rules))
    got = jax.block_until_ready(step(q, key, v, d_out, mask))
    again = step(q, key, v, d_out, mask)
    same = all(bool((x == y).all()) for x, y in zip(got, again, strict=True))
    run = partial(exact, sinks=rules.get("sinks"), lengths=rules.get("key_value_seq_lengths"))
    want = jax.jit(run)(q, key, v, d_out, mask)
    found, (limit, least) = {}, BOUNDS[case["gradient"]]
    if case.get("kind") == "outlier":
        limit, least = OUTLIERS
    if sigma > 1:  # the aim of SageBwd's paper, whose table has .9970
        limit, least = 1.0, 0.997
    for name, x, y in zip(("out", "d_query", "d_key", "d_value"), got, want, strict=True):
        found[name] = testing.relative_l1(x, y), testing.cosine(x, y)
    if not (same and all(a <= limit and b >= least for a, b in found.values())):
        said = {name: [round(float(x), 5) for x in pair] for name, pair in found.items()}
        raise RuntimeError(f"above {limit}, below {least} or two runs differ ({same}): {said}")
    return {name: error for name, (error, _) in found.items()} | {
        f"cosine {name}": cosine for name, (_, cosine) in found.items()
    }


def inputs(case: Case):
    """bfloat16 query, key, value and the output's cotangent, [B, T, N, H]."""
    batch, length, heads, head_dim = case["shape"]
    q, k, v = testing.attention_inputs(
        "normal", batch=batch, q_len=length, num_heads=heads, head_dim=head_dim
    )
    return q, k, v, jnp.roll(v, 1, axis=1)


def row(case: Case, name: str, timing, units: float, density: float = 1.0) -> dict[str, Any]:
    """Time, spread and TFLOP/s, where a forward is one unit."""
    batch, length, heads, head_dim = case["shape"]
    flops = density * units * attention_flops(batch, length, length, heads, head_dim)
    flops *= 0.5 if case.get("causal") else 1.0
    return {"name": name, "milliseconds": timing.median * 1e3, "spread": timing.spread,
            "tflops": teraflops(flops, timing)}  # fmt: skip


def run_fast(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case."""
    if "peer" in case:
        return {"sdpa": run_peer, "cudnn": run_cudnn}[case["peer"]](case, repeats)
    if "pieces" in case:
        return run_pieces(case, repeats)
    if "lists" in case:
        return run_lists(case, repeats)
    mask = Mask.causal() if case["causal"] else Mask()
    timing = benchmark(pulled(quant_of(case["gradient"])), *inputs(case), mask, repeats=repeats)
    return [row(case, f"{case['gradient'] or '16 bits'}, forward + backward", timing, 3.5)]


def run_pieces(case: Case, repeats: int) -> list[dict[str, Any]]:
    """One kernel of a backward on random operands, or making these."""
    from pallas_kernels.ops.attention import mosaic_sm90_backward as half
    from pallas_kernels.ops.attention import mosaic_sm90_backward_int8 as int8
    from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant

    side, kind, changed = case["pieces"]
    batch, length, heads, head_dim = shape = tuple(case["shape"])
    q, k, v, d_out = inputs(case)
    zeros = jnp.zeros((batch, heads, length))
    sums = zeros + jnp.log(float(length)), zeros, zeros
    of_kind = int8 if kind in ("Keys", "Queries") else half
    make = partial(int8.operands, scale=head_dim**-0.5, smooth_k=True, scale_block=128)
    if side == "operands":
        timing = benchmark(make, q, k, v, d_out, *sums, repeats=repeats)
        return [{"name": "operands in INT8", "milliseconds": timing.median * 1e3}]
    config = dataclasses.replace(of_kind.CONFIGS[side], **changed)
    variant = Variant("half" if of_kind is half else "int8", "half")
    plan = half.plan_of(side, variant, shape, shape, None, None, config)
    steps = getattr(of_kind, kind)(side, plan, head_dim**-0.5)
    if of_kind is half:
        own = {"q": q, "k": k, "v": v, "d_out": d_out}
        own |= {name: zeros for name in steps.names if name not in own}
    else:
        types = jax.eval_shape(make, q, k, v, d_out, *sums)
        own = {name: random_like(types[name]) for name in steps.names}
    if config.block_q > half.PAD:
        own = {name: beyond_the_end(x) for name, x in own.items()}
    timing = benchmark(lambda x: half.launch(steps, x, None), own, repeats=repeats)
    # Products of two: S, dP and dQ, or S, dP, dV and dK.
    return [row(case, f"{kind} of {side}", timing, {"q": 1.5, "kv": 2.0}[side])]


def beyond_the_end(x: jax.Array) -> jax.Array:
    """An array with room for the last tile; one of numbers per row has it at the end."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 384))) if x.ndim == 3 else x


def random_like(kind: jax.ShapeDtypeStruct) -> jax.Array:
    """Codes over their whole range, or small numbers."""
    key = jax.random.key(0)
    if kind.dtype == jnp.int8:
        return jax.random.randint(key, kind.shape, -127, 128, jnp.int8)
    return (0.01 * jax.random.normal(key, kind.shape)).astype(kind.dtype)


def run_lists(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Forward + backward over random tiles, over density x the same without a mask."""
    _, length, heads, _ = case["shape"]
    block_q, block_kv = case["block"]
    rows, step = [], pulled(quant_of(case["lists"]))
    timing = benchmark(step, *inputs(case), Mask(), repeats=repeats)
    dense = row(case, "no mask", timing, 3.5)
    make = jax.jit(
        lambda kept: BlockMask.from_blocks(kept, length, length, block_q=block_q, block_kv=block_kv)
    )
    grid = (1, heads, length // block_q, length // block_kv)
    rank = np.argsort(np.argsort(np.random.default_rng(0).random(grid), -1), -1)
    for density in (0.5, 0.25):
        mask = make(jnp.asarray(rank < density * grid[-1]))
        timing = benchmark(step, *inputs(case), mask, repeats=repeats)
        over = timing.median * 1e3 / (density * dense["milliseconds"])
        rows.append(
            row(case, f"{density} kept", timing, 3.5, density) | {"over density x dense": over}
        )
    return [dense, *rows]


def run_peer(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Torch's scaled_dot_product_attention, forward + backward, by each fast backend it has."""
    import torch
    import torch.nn.functional as functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    *arrays, d_out = (
        torch.from_numpy(np.asarray(x.astype(jnp.float32))).to("cuda", torch.bfloat16)
        .transpose(1, 2) for x in inputs(case)
    )  # fmt: skip
    arrays = [x.detach().requires_grad_() for x in arrays]
    rows = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def run(backend=backend):
            with sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(*arrays, is_causal=case["causal"])
            torch.autograd.grad(out, arrays, d_out)

        name = f"torch {backend.name.lower()}, forward + backward"
        try:
            rows.append(row(case, name, bench.time_torch(run, repeats), 3.5))
        except RuntimeError as error:
            rows.append({"name": name, "reason": bench.first_line(error)})
    return rows


def run_cudnn(case: Case, repeats: int) -> list[dict[str, Any]]:
    """cuDNN through JAX, forward + backward."""

    def run(query, key, value, d_out):
        call = partial(
            jax.nn.dot_product_attention, is_causal=case["causal"], implementation="cudnn"
        )
        out, pull = jax.vjp(call, query, key, value)
        return out, *pull(d_out)

    timing = benchmark(run, *inputs(case), repeats=repeats)
    return [row(case, "cuDNN through JAX, forward + backward", timing, 3.5)]


def lower(case: Case) -> dict[str, Any]:
    """Lowers what a case would run, for an abstract H200."""
    if "peer" in case:
        return {"lowered": "not needed"}
    shape = case["shape"]
    b, t, s, n, k, h = shape if len(shape) == 6 else (*shape[:2], *shape[1:3], *shape[2:])
    half = jnp.dtype(case.get("dtype", "bfloat16"))
    arrays = [jax.ShapeDtypeStruct((b, *x, h), half) for x in ((t, n), (s, k), (s, k), (t, n))]
    plain = {"shape": [b, t, s, n, k, h], "block": case.get("block")}
    plain["rule"] = case.get("rule", "causal" if case.get("causal") else "none")
    quant = quant_of(case.get("gradient", case.get("lists", "sage_bwd")))
    mask = jax.eval_shape(lambda: mask_of(plain))
    with abstract_gpu():
        step = jax.jit(pulled(quant, **rules_of(plain)))
        text = step.trace(*arrays, mask).lower(lowering_platforms=("cuda",)).as_text()
    if "mosaic_gpu" not in text:
        raise RuntimeError("no Mosaic kernel in the program")
    return {"lowered": "yes"}
