"""E5: bytes that caches of an 8B-shaped model allocate and, on a GPU, the time of one decode step.

Bytes come from the arrays of the very cache types that a generation uses, traced without memory.
Random weights suffice; nothing here looks at accuracy.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.compress import parse
from jaxeff.kv_cache import DenseCache, KVCache, TiledLayer, tree_bytes
from pallas_kernels import benchmarking

# Llama 3.1 8B.
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 32, 8, 128
WEIGHT_BYTES = 16.06e9  # 8.03e9 parameters in bf16
CONTEXT, TILE = 124_000, 128


def dense_bytes(tokens: int, dtype: Any = jnp.bfloat16, query_window: int = 0) -> int:
    """Bytes of a dense cache with room for so many tokens, one row."""
    make = functools.partial(
        DenseCache.init,
        LAYERS,
        1,
        tokens,
        KV_HEADS,
        HEAD_DIM,
        dtype=dtype,
        query_window=query_window,
        num_heads=HEADS,
    )
    return tree_bytes(jax.eval_shape(make))


def generation_cache(text: str, prompt: int, output: int, batch: int = 1) -> KVCache:
    """Shapes of the cache that decodes ``output`` tokens after a prompt."""
    method = parse(text).fit(prompt=prompt, room=output - 1)

    def start() -> KVCache:
        capacity = method.prefill_capacity(prompt=prompt, room=output - 1)
        options = {"query_window": method.query_window, "observer": method.observer}
        cache = DenseCache.init(
            LAYERS, batch, capacity, KV_HEADS, HEAD_DIM, num_heads=HEADS, **options
        )
        return method.after_prefill(cache)

    return jax.eval_shape(start)


def generation_bytes(text: str, prompt: int, output: int) -> int:
    """Bytes of the cache that decodes ``output`` tokens after a prompt, one row."""
    return tree_bytes(generation_cache(text, prompt, output))


def head_lengths(ratio: float, tokens: int, seed: int = 0) -> np.ndarray:
    """Draw what each head keeps: log-normal as in trained models, with the wanted mean.

    Args:
        ratio: mean share kept.
        tokens: context length.
        seed: seed of the draw.

    Returns:
        int ``[LAYERS, KV_HEADS]``, between 1 and ``tokens``.
    """
    drawn = np.random.default_rng(seed).lognormal(0.0, 0.8, size=(LAYERS, KV_HEADS))
    low, high = 0.0, 100.0
    for _ in range(60):  # the mean of the clipped lengths rises with the factor
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.minimum(drawn * middle, 1).mean() < ratio else (low, middle)
        )
    return np.maximum(np.round(np.minimum(drawn * high, 1) * tokens), 1).astype(int)


def context_bytes(lengths: np.ndarray, layout: str, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of a cut context in one of the layouts of specification 4.6.

    Args:
        lengths: int ``[LAYERS, KV_HEADS]``.
        layout: ``"masked"`` (everything stored), ``"bucketed"`` (each layer as long as its longest
            head) or ``"tiled"``.
        dtype: storage.
    """
    total = 0
    for row in lengths:
        longest = {"masked": CONTEXT}.get(layout, -(-int(row.max()) // TILE) * TILE)

        def make(longest=longest, row=row):
            slots = longest if layout != "tiled" else TILE
            cache = DenseCache.init(1, 1, slots, KV_HEADS, HEAD_DIM, dtype=dtype)
            if layout != "tiled":
                return cache
            kept = jnp.zeros((1, KV_HEADS, int(row.max())), jnp.int32)
            return TiledLayer.pack(
                cache.layers[0],
                kept,
                tile=TILE,
                num_tiles=int((-(-row // TILE)).sum()),
                max_tiles=-(-int(row.max()) // TILE),
            )

        total += tree_bytes(jax.eval_shape(make))
    return total


def memory_tables() -> dict[str, Any]:
    """R-KV: bytes over output length, and the batch that fits; KVzip: bytes over layout."""
    free = 0.95 * 80e9 - WEIGHT_BYTES
    rkv, zipped = [], []
    for output in (8192, 16384):
        full = generation_bytes("full", 128, output)
        for budget, buffer in ((1024, 128), (1536, 128), (1536, 64), (3072, 128)):
            cut = generation_bytes(f"rkv(budget={budget}, buffer={buffer})", 128, output)
            rkv.append(
                {
                    "output": output,
                    "budget": budget,
                    "buffer": buffer,
                    "full_bytes": full,
                    "rkv_bytes": cut,
                    "saved": round(1 - cut / full, 4),
                    "batch_full": int(free // full),
                    "batch_rkv": int(free // cut),
                    "batch_ratio": round((free // cut) / (free // full), 2),
                }
            )
    whole = dense_bytes(CONTEXT)
    for ratio in (1.0, 0.5, 0.3, 0.1):
        lengths = head_lengths(ratio, CONTEXT)
        for layout in ("masked", "bucketed", "tiled"):
            for dtype in ("bfloat16", "int8", "int4"):
                found = context_bytes(lengths, layout, dtype)
                zipped.append(
                    {
                        "ratio": ratio,
                        "layout": layout,
                        "storage": dtype,
                        "bytes": found,
                        "over_full_bf16": round(found / whole, 4),
                    }
                )
    return {"full_context_bytes": whole, "rkv": rkv, "kvzip": zipped}


def latency_table(seconds_left: Any) -> list[dict[str, Any]]:
    """Time of attention of one token over one layer's context, by layout and storage; on a GPU."""
    rows, key = [], jax.random.key(0)
    query = jax.random.normal(key, (1, 1, HEADS, HEAD_DIM), jnp.bfloat16)
    kv = jax.random.normal(key, (1, CONTEXT, KV_HEADS, HEAD_DIM), jnp.bfloat16)
    at = jnp.full((1, 1), CONTEXT)
    for storage, ratio, layout in itertools.product(
        ("bfloat16", "int8", "fp8_e4m3"), (1.0, 0.5, 0.3, 0.1), ("bucketed", "tiled")
    ):
        if seconds_left() <= 0:
            break
        cache = DenseCache.init(1, 1, CONTEXT, KV_HEADS, HEAD_DIM, dtype=storage)
        layer = cache.layers[0].update(kv, kv, positions=jnp.arange(CONTEXT)[None])
        cut = _cut(layer, head_lengths(ratio, CONTEXT)[0], layout)
        timing = benchmarking.benchmark(lambda q, c: c.attend(q, positions=at), query, cut)
        speed = benchmarking.gigabytes_per_second(cut.allocated_bytes(), timing)
        rows.append(
            {
                "storage": storage,
                "ratio": ratio,
                "layout": layout,
                "microseconds": round(1e6 * timing.median, 1),
                "spread": round(timing.spread, 3),
                "gigabytes_per_second": round(speed, 1),
            }
        )
    return rows


def _cut(layer: Any, lengths: np.ndarray, layout: str) -> Any:
    """Return a layer whose heads keep their first so many entries."""
    slot = np.arange(-(-int(lengths.max()) // TILE) * TILE)
    indices = jnp.asarray(np.where(slot < lengths[:, None], slot, -1))[None]
    if layout == "bucketed":
        return layer.gather(indices[..., : layer.capacity])
    return TiledLayer.pack(
        layer,
        indices,
        tile=TILE,
        num_tiles=int((-(-lengths // TILE)).sum()),
        max_tiles=slot.size // TILE,
    )


def run(seconds_left: Any) -> dict[str, Any]:
    """Return the tables; latency only where there is a GPU.

    Args:
        seconds_left: called without arguments, seconds that may still be used.
    """
    report = memory_tables()
    if jax.default_backend() == "gpu":
        report["decode_latency"] = latency_table(seconds_left)
    else:
        report["decode_latency"] = "not measured: no GPU"
    return report
