"""What a compressed KV cache costs, measured exactly.

A flow maps x to z without error in full precision. Decoding that z through a compressed cache must
give x back; what comes back instead is the whole cost of the compression, image by image.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.starflow.data import load_digits, shape_batches
from jaxeff.models.starflow import CacheSpec, TARFlow, cache_bytes
from jaxeff.models.starflow.training import load_flow


def formats_for(tokens: int) -> dict[str, str | CacheSpec]:
    """Cache formats to compare for an image of this many tokens."""
    table: dict[str, str | CacheSpec] = {
        name: name for name in ("float32", "bfloat16", "int8", "fp8", "int4")
    }
    for share in (2, 4):
        table[f"window 1/{share}"] = CacheSpec("bfloat16", window=tokens // share)
    table["window 1/2 int8"] = CacheSpec("int8", window=tokens // 2)
    for kept in (0.75, 0.5, 0.25) if tokens >= 16 else ():
        # Budget and buffer together are what is allocated.
        capacity = int(tokens * kept)
        buffer = max(2, capacity // 8)
        watched = max(1, min(8, (capacity - buffer) // 2))
        table[f"rkv {kept}"] = CacheSpec(
            "bfloat16", budget=capacity - buffer, buffer=buffer, observation=watched
        )
    return table


def images_for(kind: str, size: int, sigma: float, count: int, seed: int):
    """Test images of the data a flow was trained on, with its training noise, and labels."""
    image_key, noise_key = jax.random.split(jax.random.key(9000 + seed))
    if kind == "digits":
        data = load_digits()
        x, labels = jnp.asarray(data.test[:count]) / 8 - 1, jnp.asarray(data.test_labels[:count])
    else:
        x, labels = shape_batches(count, size)(image_key)
    return x + sigma * jax.random.normal(noise_key, x.shape), labels


def drift_table(
    flow: TARFlow,
    x,
    labels,
    formats: dict,
    places=("both", "deep", "shallow"),
    ready: Callable[[str], bool] = lambda name: True,
) -> list[dict]:
    """Round-trip error, NLL change and bytes of each cache format and place.

    ``ready(name)`` is asked before a format is measured; where it says no, the row says so.
    """
    z = flow(x, labels)[0]
    spread = float(jnp.std(x))
    nll = flow.nll(x, labels)
    base = cache_bytes(flow.config, "bfloat16", batch=len(x), grid=_grid(flow, x))
    rows = []
    for name, spec in formats.items():
        if not ready(name):
            rows.append({"cache": name, "skipped": "time"})
            continue
        size = cache_bytes(flow.config, spec, batch=len(x), grid=_grid(flow, x))
        for place in places if name != "float32" else ("both",):
            caches = {
                "cache": spec if place != "shallow" else "float32",
                "shallow_cache": spec if place != "deep" else "float32",
            }
            decode = lambda caches=caches: jax.block_until_ready(flow.inverse(z, labels, **caches))  # noqa: E731
            back = decode()
            started = time.perf_counter()
            decode()
            seconds = time.perf_counter() - started
            error = np.asarray(back - x)
            change = (flow.nll(back, labels) - nll) / math.log(2)
            rows.append(
                {
                    "cache": name,
                    "place": place,
                    "rms_error": float(np.sqrt((error**2).mean())),
                    "rms_error_over_std": float(np.sqrt((error**2).mean()) / spread),
                    "max_error": float(np.abs(error).max()),
                    "nll_change_bits_per_dim": float(jnp.mean(change)),
                    "nll_change_largest": float(jnp.abs(change).max()),
                    "deep_bytes_over_bfloat16": size["deep"] / base["deep"],
                    "deep_bytes": size["deep"],
                    "images_per_second": len(x) / seconds,
                }
            )
    return rows


def _grid(flow: TARFlow, x) -> tuple[int, int]:
    side = flow.config.patch_size
    return x.shape[1] // side, x.shape[2] // side


def study(checkpoint: Path, count: int, seed: int) -> dict:
    """The whole table for a trained flow."""
    flow, facts = load_flow(checkpoint)
    kind = facts.get("data", "digits")
    sigma = facts["sigma"]
    x, labels = images_for(kind, flow.config.img_size, sigma, count, seed)
    table = drift_table(flow, x, labels, formats_for(flow.config.num_tokens))
    return {"data": kind, "sigma": sigma, "tokens": flow.config.num_tokens, "rows": table}
