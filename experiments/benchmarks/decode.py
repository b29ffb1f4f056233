"""Decode attention: is the sm90 kernel right, and what share of the memory's bandwidth it reaches.

``python -m experiments.benchmarks.decode --output runs/decode --time-budget 150`` checks the kernel
against the oracle, then times it beside XLA and cuDNN, and writes ``decode.json`` after every case:
device, versions, command, and one row per case. Bytes are what is stored for the live slots: codes,
scales, and positions where they are read; queries and outputs are left out. "copy" is the rate of
an elementwise XLA operation in the same process, bytes read and written.

Cases run in a process of their own that is ended when it says nothing for ``--limit`` seconds: a
kernel that hangs costs one case. ``--dry-run`` lowers every kernel for an abstract H200 instead.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks.attention import machine
from experiments.benchmarks.isolated import Case, report, timed, work
from pallas_kernels import (
    append_to_cache,
    decode_attention,
    largest_slots,
    last_similar_keys,
    max_attention_weights,
    move_slots,
    quantize,
    testing,
)
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.benchmarking import gigabytes_per_second, teraflops
from pallas_kernels.ops.decode_attention import mosaic_sm90
from pallas_kernels.ops.decode_attention.spec import DecodeSpec

STORES = {
    "bfloat16": lambda x: x.astype(jnp.bfloat16),
    "float16": lambda x: x.astype(jnp.float16),
    "int8": lambda x: quantize(x, "int8", axis=-1),
    "fp8_e4m3": lambda x: quantize(x, "fp8_e4m3", axis=-1),
    "fp8_e5m2": lambda x: quantize(x, "fp8_e5m2", axis=-1),
    "int4": lambda x: quantize(x, "int4", axis=-1, asymmetric=True).pack(-1),
    "nvfp4": lambda x: quantize(x, "nvfp4", axis=-1, two_level=False).pack(-1),
}
LARGE = {"batch": 16, "heads": 32, "kv_heads": 8, "head_dim": 128, "capacity": 32768}


# --- cases ---------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """The core's correctness, the judged times, the other features, and sizes."""
    small = {"stage": "correct", "store": "bfloat16", "batch": 2, "steps": 1, "heads": 8,
             "kv_heads": 2, "head_dim": 128, "capacity": 2000}  # fmt: skip

    def right(**change):
        return {**small, **change}

    def fast(**change):
        return {"stage": "fast", "store": "bfloat16", **LARGE, **change}

    core = [right(store=s, ragged=True) for s in ("bfloat16", "int8", "fp8_e4m3", "int4")]
    judged = [
        {"stage": "fast", "copy": True},
        *(fast(store=s) for s in ("bfloat16", "int8", "fp8_e4m3")),
        fast(implementation="cudnn"),
        *(fast(store=s, layout=w) for s in ("bfloat16", "int8") for w in ("ragged", "even")),
        *(fast(store=s, layout="kept") for s in ("bfloat16", "int8")),
        *(fast(store=s, layout="kept", tile=16) for s in ("bfloat16", "int8")),
        fast(store="int4"),
        fast(store="nvfp4"),
        *(fast(store=s, positions=True) for s in ("bfloat16", "int8")),
    ]
    features = [
        right(head_dim=64, store="int8", ragged=True),
        right(head_dim=64, ragged=True),
        right(store="int4", head_dim=64),
        right(store="nvfp4", ragged=True),
        right(store="nvfp4", head_dim=64, tile=16, positions=True, ragged=True),
        right(store="float16", dtype="float32", ragged=True),
        *(right(store=s, dtype="float32", ragged=True, offset=True) for s in ("int8", "int4")),
        right(store="fp8_e5m2", offset=True),
        right(window=300, num_sinks=5, soft_cap=20.0, sinks=True, ragged=True),
        right(steps=3, store="int8"),
        right(steps=3, positions=True, ragged=True),
        right(store="fp8_e4m3", positions=True, ragged=True, window=500),
        right(store="int8", tile=128, positions=True, ragged=True),
        right(head_dim=64, tile=16, positions=True, ragged=True, steps=2),
        right(capacity=30000, batch=1, ragged=True),
        right(capacity=1, heads=7, kv_heads=1),
    ]
    sizes = [
        fast(store=store, config=config)
        for config in ({"blocks": 264}, {"blocks": 792})
        for store in ("bfloat16", "int8", "fp8_e4m3", "int4", "nvfp4")
    ]
    # One row of 124K leaves little to read, so that what does not shrink with it shows.
    single = [
        fast(batch=1, capacity=124032, config=config, **layout)
        for config in ({}, {"blocks": 264}, {"blocks": 792})
        for layout in ({}, {"layout": "kept", "tile": 16})
    ]
    scores = {"stage": "scores", "batch": 1, "steps": 2048, "heads": 32, "kv_heads": 8,
              "head_dim": 128}  # fmt: skip
    scored = [
        {**scores, "store": "bfloat16", "capacity": 2048, "check": True},
        {**scores, "store": "int8", "capacity": 2048, "check": True},
        {**scores, "store": "bfloat16", "capacity": 32768},
        {**scores, "store": "int8", "capacity": 32768},
        {**scores, "store": "bfloat16", "capacity": 2048, "implementation": "xla"},
        {**scores, "store": "bfloat16", "capacity": 32768, "implementation": "cudnn"},
    ]
    # R-KV at budget 1024 and buffer 128, 8 or 32 rows.
    similar = {"stage": "similar", "heads": 32, "kv_heads": 8, "head_dim": 128, "capacity": 1152}
    searched = [{**similar, "store": s, "batch": 2, "check": True} for s in ("bfloat16", "int8")]
    searched += [{**similar, "store": "bfloat16", "batch": b} for b in (8, 32)]
    searched += [{**similar, "store": "bfloat16", "batch": 32, "implementation": "xla"}]
    cut = [
        {"stage": "cut", "store": "bfloat16", "heads": 32, "kv_heads": 8, "head_dim": 128,
         "capacity": 1152, "budget": 1024, "batch": b, "implementation": name}
        for name in ("mosaic", "xla") for b in (8, 32)
    ]  # fmt: skip
    appended = [
        {"stage": "append", "store": s, **LARGE, "capacity": 4096, "implementation": name}
        for s in ("int8", "bfloat16", "int4", "fp8_e4m3")
        for name in ("mosaic", "xla")
    ]
    rest = [
        fast(store="int8", head_dim=64),
        fast(batch=1, capacity=8192),
        fast(store="int8", batch=1, capacity=8192),
        fast(batch=1, capacity=8192, implementation="cudnn"),
        fast(capacity=4096, implementation="xla"),
        fast(capacity=4096),
    ]
    return [
        *core,
        *scored[:4],
        *searched,
        *cut,
        *judged,
        *single,
        *appended,
        *sizes,
        *features,
        *scored[4:],
        *rest,
    ]


# --- inputs --------------------------------------------------------------------------------------


def lengths(case: Case) -> np.ndarray:
    """Live slots per head.

    "ragged": log-normal with a mean of about half the capacity; "even": the same number of slots
    in all heads alike; "kept": ragged with a mean of .3 of the capacity, as KVzip leaves heads.
    """
    shape, capacity = (case["batch"], case["kv_heads"]), case["capacity"]
    kind = "ragged" if case.get("ragged") else case.get("layout", "full")
    rng = np.random.default_rng(0)
    if case["stage"] == "correct" and kind == "ragged":
        found = rng.integers(0, capacity + 1, size=shape)
        found.flat[0] = 0
        return found
    if kind == "full":
        return np.full(shape, capacity)
    mean = 0.3 if kind == "kept" else 0.5
    spread = rng.lognormal(sigma=0.6, size=shape)
    found = np.minimum(spread / spread.mean() * mean, 1.0) * capacity
    found *= mean * capacity / found.mean()
    found = np.clip(found, 1, capacity).astype(int)
    return found if kind != "even" else np.full(shape, int(found.mean()))


@functools.lru_cache(8)
def stores(store: str, shape: tuple[int, ...]):
    """Key and value with the same numbers in two places."""

    def make(key):
        return STORES[store](jax.random.normal(key, shape))

    keys = jax.jit(make)(jax.random.key(0))
    return jax.block_until_ready((keys, jax.tree.map(jnp.copy, keys)))


def spec_of(case: Case, store: str) -> DecodeSpec:
    """Static facts of a case."""
    return DecodeSpec(
        case["batch"], case.get("steps", 1), case["capacity"], case["heads"], case["kv_heads"],
        case["head_dim"], case.get("dtype", "bfloat16"), store, case["head_dim"] ** -0.5,
        tile=case.get("tile", 0),
    )  # fmt: skip


def stored_bytes(case: Case) -> float:
    """Bytes of the live slots."""
    bits = {"bfloat16": 16, "float16": 16, "int4": 4, "nvfp4": 4}.get(case["store"], 8)
    scales = {16: 0, 8: 8, 4: 16}[bits]
    if case["store"] == "nvfp4":
        scales = case["head_dim"] // 8
    per_slot = 2 * case["head_dim"] * bits / 8
    positions = case.get("positions") or case.get("tile")
    per_slot += scales + 4 * bool(positions)
    return float(lengths(case).sum()) * per_slot


# --- one case ------------------------------------------------------------------------------------


def run_correct(case: Case) -> dict[str, float]:
    """Errors against the oracle on the same codes; raises where they are out of bounds."""
    args, kwargs = correct_call(case)
    got = jax.jit(functools.partial(decode_attention, implementation="mosaic", **kwargs))
    out, lse = jax.block_until_ready(got(*args))
    again = got(*args)
    oracle = functools.partial(decode_attention, implementation="reference", **kwargs)
    want, want_lse = jax.jit(oracle)(*args)
    live = jnp.isfinite(want_lse)
    result = {
        **testing.errors(out, want),
        "worst": float(jnp.abs(out.astype(jnp.float32) - want.astype(jnp.float32)).max()),
        "lse": float(jnp.abs(jnp.where(live, lse - want_lse, 0)).max()),
    }
    failed = [
        what
        for what, bad in {
            "output": not result["worst"] < (2e-3 if case.get("dtype") == "float32" else 3e-2),
            "log-sum-exp": not result["lse"] < 1e-3,
            "empty rows": bool((jnp.isneginf(lse) == live).any()),
            "two runs": not bool((out == again[0]).all() & (lse == again[1]).all()),
        }.items()
        if bad
    ]
    if failed:
        raise RuntimeError(f"{', '.join(failed)}: {result}")
    return result


def correct_call(case: Case):
    """Arrays, in the order of `decode_attention`, and its keyword arguments."""
    b, t, n, k = (case[name] for name in ("batch", "steps", "heads", "kv_heads"))
    h, c, tile = case["head_dim"], case["capacity"], case.get("tile")
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    length = lengths(case)
    options: dict[str, Any] = {}
    slots = -(-c // tile) * tile if tile else c
    keys, values = normal(b, k, slots, h), normal(b, k, slots, h) + 1
    dead = np.arange(slots) >= length[..., None]
    places = np.broadcast_to(np.arange(slots), (b, k, slots))
    if case.get("positions"):  # some live slots hold nothing, and no head the same tokens
        dead = dead | (rng.random((b, k, slots)) < 0.1)
        places = np.where(dead, -1, places + rng.integers(0, 2, size=(b, k, 1)))
        options["query_positions"] = jnp.asarray(np.tile(length.max(1)[:, None], (1, t)))
    elif case.get("ragged"):
        options["query_positions"] = jnp.full((b, t), c)
    poison = jnp.asarray(dead)[..., None]
    keys, values = (jnp.where(poison, jnp.nan, x) for x in (keys, values))
    keys, values = (STORES[case["store"]](x) for x in (keys, values))
    places = jnp.asarray(places)
    if tile:
        count = slots // tile
        order = rng.permuted(np.tile(np.arange(k * count), (b, 1)), axis=1)
        pool = jnp.asarray(np.argsort(order, axis=1))

        def paged(x):
            x = x.reshape(b, k * count, tile, *x.shape[3:])
            return jnp.take_along_axis(x, pool.reshape(b, -1, *(1,) * (x.ndim - 2)), axis=1)

        keys, values, places = jax.tree.map(paged, (keys, values, places))
        options["table"] = jnp.asarray(order.reshape(b, k, count))
    if case.get("positions"):
        options["positions"] = places
    if case.get("offset"):
        options["key_offset"] = normal(b, k, 1, h)
    if case.get("sinks"):
        options["sinks"] = normal(n)
    names = {"window": "local_window_size", "num_sinks": "num_sinks", "soft_cap": "logits_soft_cap"}
    options |= {new: case[old] for old, new in names.items() if old in case}
    query = normal(b, t, n, h).astype(case.get("dtype", "bfloat16"))
    return (query, keys, values, jnp.asarray(length)), options


def run_fast(case: Case) -> dict[str, float]:
    """Milliseconds and bytes per second."""
    if case.get("copy"):
        size = 2**30
        timing = timed(lambda x: x + 1, jnp.ones(size, jnp.bfloat16), repeats=7)
        return {"ms": timing.median * 1e3, "gbps": gigabytes_per_second(4.0 * size, timing)}
    function, args = fast_call(case)
    timing = timed(function, *args, repeats=5, warmup=2)
    moved = stored_bytes(case)
    return {
        "ms": timing.median * 1e3,
        "spread": timing.spread,
        "gbps": gigabytes_per_second(moved, timing),
        "compile_s": timing.compile_seconds,
    }


def fast_call(case: Case):
    """What is timed, and its arrays."""
    b, n, k, h, c = (case[x] for x in ("batch", "heads", "kv_heads", "head_dim", "capacity"))
    implementation = case.get("implementation", "mosaic")
    query = jax.random.normal(jax.random.key(1), (b, 1, n, h)).astype(jnp.bfloat16)
    if implementation == "cudnn":
        keys, values = stores("bfloat16", (b, c, k, h))
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        return attend, (query, keys, values)
    keys, values = stores(case["store"], (b, k, c, h))
    length = jnp.asarray(lengths(case), jnp.int32)
    last = jnp.max(length, axis=1)[:, None] - 1
    if implementation == "xla":
        attend = functools.partial(decode_attention, implementation="xla")
        return attend, (query, keys, values, length)
    places = table = None
    if case.get("positions") or case.get("tile"):
        places = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), (b, k, c)) + 0
    if tile := case.get("tile"):  # every head's tiles lie together, which is what packing yields
        table = jnp.arange(k * c // tile, dtype=jnp.int32).reshape(1, k, -1).repeat(b, 0)
        paged = lambda x: x.reshape(b, k * c // tile, tile, *x.shape[3:])  # noqa: E731
        keys, values, places = jax.block_until_ready(
            jax.jit(functools.partial(jax.tree.map, paged))((keys, values, places))
        )
    spec, config = spec_of(case, case["store"]), mosaic_sm90.Config(**case.get("config", {}))

    def attend(query, keys, values, length, places, last, table):
        return mosaic_sm90.attention(
            query, keys, values, length, places, last, table, None, None, spec, config
        )

    return attend, (query, keys, values, length, places, last, table)


def run_scores(case: Case) -> dict[str, float]:
    """KVzip's scores: TFLOP/s of Q Kᵀ; for "cudnn" the time of the attention they belong to."""
    function, args = scores_call(case)
    result = {}
    if case.get("check"):
        got = jax.jit(function)(*args)
        exact, _ = scores_call({**case, "implementation": "xla"})
        want = jax.jit(exact)(*args)
        result["worst"] = float(jnp.abs(got / want - 1).max())
        if not result["worst"] < 1e-2:
            raise RuntimeError(f"scores are off: {result}")
    timing = timed(function, *args, repeats=5, warmup=1)
    flops = 2.0 * args[0].size * case["capacity"]
    return result | {"ms": timing.median * 1e3, "tflops": teraflops(flops, timing)}


def scores_call(case: Case):
    """What is timed, and its arrays."""
    b, t, n, k, h, c = (
        case[x] for x in ("batch", "steps", "heads", "kv_heads", "head_dim", "capacity")
    )
    query = jax.random.normal(jax.random.key(1), (b, t, n, h)).astype(jnp.bfloat16)
    if case.get("implementation") == "cudnn":
        keys, values = stores("bfloat16", (b, c, k, h))
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        return attend, (query, keys, values)
    keys, _ = stores(case["store"], (b, k, c, h))
    lse = jax.random.normal(jax.random.key(2), (b, t, n)) + 10
    name = case.get("implementation", "mosaic")
    return functools.partial(max_attention_weights, implementation=name), (query, keys, lse)


def run_similar(case: Case) -> dict[str, float]:
    """R-KV's search for the last similar key: TFLOP/s of K Kᵀ."""
    function, args = similar_call(case)
    result = {}
    if case.get("check"):
        last, cosine = jax.jit(function)(*args)
        exact, _ = similar_call({**case, "implementation": "xla"})
        want, near = jax.jit(exact)(*args)
        # Equal but where the cosine of one of the two is a rounding error from the threshold.
        result["differ"] = float((last != want).mean())
        result["worst"] = float(jnp.abs(jnp.where(last == want, cosine - near, 0)).max())
        if not (result["differ"] < 1e-3 and result["worst"] < 1e-4):
            raise RuntimeError(f"similar keys are off: {result}")
        result["found"] = float((want >= 0).mean())
    timing = timed(function, *args, repeats=5, warmup=1)
    flops = 2.0 * case["batch"] * case["kv_heads"] * case["capacity"] ** 2 * case["head_dim"]
    return result | {"ms": timing.median * 1e3, "tflops": teraflops(flops, timing)}


def similar_call(case: Case):
    """What is timed, and its arrays: keys of which some resemble a common one."""
    b, k, c, h = (case[x] for x in ("batch", "kv_heads", "capacity", "head_dim"))

    def make(key):
        common = jax.random.normal(key, (b, k, 1, h))
        weight = jax.random.bernoulli(key, 0.3, (b, k, c, 1))
        return STORES[case["store"]](jax.random.normal(key, (b, k, c, h)) + 1.5 * weight * common)

    keys = jax.block_until_ready(jax.jit(make)(jax.random.key(3)))
    name = case.get("implementation", "mosaic")
    return functools.partial(last_similar_keys, implementation=name), (keys,)


def run_cut(case: Case) -> dict[str, float]:
    """R-KV's choice and its copy: milliseconds of each; the kernels' results are those of XLA."""
    calls = cut_calls(case)
    result = {}
    for (name, (function, args)), (_, (exact, _)) in zip(
        calls.items(), cut_calls({**case, "implementation": "xla"}).items(), strict=True
    ):
        got, want = jax.jit(function)(*args), jax.jit(exact)(*args)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), got, want)
        if not all(jax.tree.leaves(same)):
            raise RuntimeError(f"{name} differs from XLA")
        result[f"{name}_ms"] = timed(function, *args, repeats=5, warmup=1).median * 1e3
    return result


def cut_calls(case: Case):
    """What is timed, and its arrays: scores with ties and a window, and both of K and V."""
    b, k, c, h = (case[x] for x in ("batch", "kv_heads", "capacity", "head_dim"))
    scores = jnp.round(jax.random.normal(jax.random.key(0), (b, k, c)), 3)
    scores = scores.at[..., -8:].set(jnp.inf)
    layer = dict(zip("kv", stores(case["store"], (b, k, c, h)), strict=True))
    layer["positions"] = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), (b, k, c)) + 0
    kept = jax.jit(functools.partial(largest_slots, budget=case["budget"], implementation="xla"))
    source = jnp.pad(kept(scores), ((0, 0), (0, 0), (0, c - case["budget"])), constant_values=-1)
    fill = jax.tree.map(lambda _: 0, layer) | {"positions": -1}
    name = case["implementation"]
    choose = functools.partial(largest_slots, budget=case["budget"], implementation=name)
    move = functools.partial(move_slots, fill=fill, implementation=name)
    return {"choose": (choose, (scores,)), "move": (move, (layer, source))}


def run_append(case: Case) -> dict[str, float]:
    """Microseconds to quantise and write one token of every row and head to K and V, in place."""
    loop, args = append_call(case)
    if case["implementation"] == "mosaic":
        exact, _ = append_call({**case, "implementation": "xla"})
        got, want = (jax.jit(f)(*args) for f in (loop, exact))
        if not all(jax.tree.leaves(jax.tree.map(_same_bits, got, want))):
            raise RuntimeError("the kernel's cache differs from XLA's")
        del got, want
    timing = timed(loop, *args, repeats=5, warmup=1)
    copied = timed(lambda *x: jax.tree.map(lambda y: y + 0, x[:3]), *args, repeats=3, warmup=1)
    # The loop copies the cache once, since nothing is donated to it.
    return {"us": (timing.median - copied.median) / APPENDS * 1e6, "copy_us": copied.median * 1e6}


APPENDS = 256


def append_call(case: Case):
    """Many appends in one program, so that neither launching nor copying it is what is timed."""
    b, k, c, h = (case[x] for x in ("batch", "kv_heads", "capacity", "head_dim"))
    keys, values = stores(case["store"], (b, k, c, h))
    places = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), (b, k, c)) + 0
    new = [jax.random.normal(jax.random.key(n), (b, k, 1, h)).astype(jnp.bfloat16) for n in (1, 2)]
    name = case["implementation"]

    def loop(keys, values, places, *new):
        def one(cache, slot):
            slots, at = jnp.full((b, k, 1), slot), jnp.full((b, 1), slot)
            return append_to_cache(*cache, *new, at, slots, implementation=name), None

        return jax.lax.scan(one, (keys, values, places), jnp.arange(APPENDS))[0]

    return loop, (keys, values, places, *new)


def _same_bits(a, b) -> bool:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    return bool(
        (jax.lax.bitcast_convert_type(a, kind) == jax.lax.bitcast_convert_type(b, kind)).all()
    )


def lower(case: Case) -> dict[str, str]:
    """Lowers what a case would run, for an abstract H200."""
    if case.get("copy") or case.get("implementation", "mosaic") != "mosaic":
        return {"lowered": "no kernel"}
    if case["stage"] == "correct":
        args, kwargs = correct_call(case)
        call = functools.partial(decode_attention, implementation="mosaic", **kwargs)
    elif case["stage"] == "scores":
        call, args = scores_call(case)
    elif case["stage"] == "similar":
        call, args = similar_call({**case, "batch": 1})
    elif case["stage"] == "append":
        call, args = append_call({**case, "batch": 1, "capacity": 512})
    elif case["stage"] == "cut":
        calls, args = zip(*cut_calls({**case, "batch": 1}).values(), strict=True)

        def call(*args):
            return [function(*each) for function, each in zip(calls, args, strict=True)]
    else:
        call, args = fast_call({**case, "batch": 1, "capacity": 4096})
    with abstract_gpu():
        text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return {"lowered": "yes" if "mosaic_gpu" in text else "no kernel in it"}


# --- processes -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """Check and time decode attention."""

    output: Path = Path("runs/decode")
    """Folder of the results."""
    time_budget: float = 150.0
    """No case is started after so many seconds."""
    limit: float = 40.0
    """A process that says nothing for so many seconds is ended."""
    only: str = ""
    """Cases whose JSON contains this text, or one of several: ``a|b``."""
    dry_run: bool = False
    """Lower every kernel instead of running it."""
    worker: bool = False
    """Used by the program itself: read cases from standard input, one JSON a line."""


def run(case: Case) -> dict[str, Any]:
    """Runs a case of any stage, and says where."""
    runners = {
        "correct": run_correct,
        "fast": run_fast,
        "scores": run_scores,
        "similar": run_similar,
        "append": run_append,
        "cut": run_cut,
    }
    return {"machine": machine(), **runners[case["stage"]](case)}


def main(options: Options) -> None:
    """Runs the cases in order, prints and writes after each."""
    if options.worker:
        return work(lower if options.dry_run else run)
    return report("decode", options, cases(), _line, _add_shares)


def _add_shares(rows: list[dict[str, Any]]) -> None:
    """Every rate beside that of the copy."""
    timed = [row for row in rows if "gbps" in row.get("result", {})]
    copy = [row["result"]["gbps"] for row in timed if row["case"].get("copy")]
    for row in timed if copy else ():
        row["result"]["share_of_copy"] = row["result"]["gbps"] / copy[-1]


def _line(row: dict[str, Any]) -> str:
    case = {k: v for k, v in row["case"].items() if k not in ("stage",) and LARGE.get(k) != v}
    said = row.get("failed") or ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["result"].items()
    )
    return f"{row['case']['stage']} {row['seconds']} s {case}: {said}"


if __name__ == "__main__":
    main(tyro.cli(Options))
