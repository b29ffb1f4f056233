# SPDX-License-Identifier: Apache-2.0
"""Timing on the device, and how much work an operation is."""

from __future__ import annotations

import dataclasses
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels._device import current_device

# H100 and H200: 50 MB of L2. Writing more than twice that leaves nothing of the inputs in it.
_FLUSH_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of repeated runs of one function.

    Args:
      seconds: one entry per run, seconds.
      compile_seconds: time of the first call, which traces and compiles, seconds.
      source: "device" for times from the profiler, "wall" for host clock around a finished run.
    """

    seconds: tuple[float, ...]
    compile_seconds: float
    source: str

    @property
    def median(self) -> float:
        """Median time of a run, seconds.

        >>> Timing((1.0, 3.0, 2.0), 0.0, "wall").median
        2.0
        """
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median, a fraction.

        >>> Timing((1.0, 1.0, 1.0, 1.0), 0.0, "wall").spread
        0.0
        """
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def benchmark(
    function: Callable,
    *args,
    repeats: int = 20,
    warmup: int = 3,
    flush_l2: bool = True,
    device_time: bool | None = None,
) -> Timing:
    """Times a function: median and spread of repeated runs with a cold L2.

    On a GPU the time of a run is the sum of the durations of its kernels as the profiler reports
    them, so neither launch latency nor the flush between runs counts. On other platforms it is
    the host clock around a run that has finished.

    Args:
      function: takes arrays, returns a pytree of arrays; compiled with `jax.jit` here, unless it is
        a `jax.stages.Compiled` already.
      *args: its arguments.
      repeats: runs that count, at least 1.
      warmup: runs before them that do not.
      flush_l2: overwrite a large buffer before each run on a GPU, so that inputs come from memory.
      device_time: True demands the profiler, False the host clock, None chooses by platform.

    Returns:
      A `Timing`.

    Raises:
      ValueError: `repeats` is below 1 or `warmup` is negative.
      NotImplementedError: device time was demanded where there is no GPU.

    >>> benchmark(lambda x: x + 1, jnp.ones(4), repeats=3).source in ("wall", "device")
    True
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0; got {repeats} and {warmup}")
    on_gpu = jax.default_backend() == "gpu"
    if device_time and not on_gpu:
        raise NotImplementedError(
            f"device time needs a GPU; this is {current_device().platform}. "
            "device_time=False uses the host clock"
        )
    compiled = function if isinstance(function, jax.stages.Compiled) else jax.jit(function)
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    compile_seconds = time.perf_counter() - start
    for _ in range(warmup):
        jax.block_until_ready(compiled(*args))
    flush = _flusher() if flush_l2 and on_gpu else lambda: None
    if on_gpu and device_time is not False:
        seconds = _device_seconds(compiled, args, repeats, flush)
        return Timing(tuple(seconds), compile_seconds, "device")
    seconds = []
    for _ in range(repeats):
        flush()
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds), compile_seconds, "wall")


def _flusher() -> Callable[[], None]:
    """A function that overwrites a buffer larger than L2."""
    write = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = [jnp.zeros(_FLUSH_BYTES // 4, jnp.int32)]

    def flush():
        state[0] = jax.block_until_ready(write(state[0]))

    return flush


def _device_seconds(compiled, args, repeats, flush) -> list[float]:
    """Sums kernel durations of each run from one profiler trace per run."""
    seconds = []
    for _ in range(repeats):
        flush()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(compiled(*args))
            seconds.append(kernel_seconds(Path(folder)))
    return seconds


def kernel_seconds(folder: Path) -> float:
    """Sum of the GPU kernel durations in a profiler trace.

    Args:
      folder: the folder given to ``jax.profiler.trace``.

    Returns:
      Seconds.

    Raises:
      ValueError: the trace holds no GPU kernel.
    """
    return sum(kernel_times(folder).values())


def kernel_times(folder: Path) -> dict[str, float]:
    """Seconds of every GPU kernel in a profiler trace, by its name.

    Args:
      folder: the folder given to ``jax.profiler.trace``.

    Returns:
      Seconds by name, the longest first; kernels of one name are added up.

    Raises:
      ValueError: the trace holds no GPU kernel.
    """
    total: dict[str, float] = {}
    for path in folder.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        devices = {
            e["pid"]
            for e in events
            if e.get("name") == "process_name" and "/device:GPU" in e["args"]["name"]
        }
        streams = {
            (e["pid"], e["tid"])
            for e in events
            if e.get("name") == "thread_name" and "Stream" in e["args"]["name"]
        }
        for e in events:
            if e.get("ph") == "X" and e["pid"] in devices and (e["pid"], e["tid"]) in streams:
                total[e["name"]] = total.get(e["name"], 0.0) + e["dur"] * 1e-6
    if not sum(total.values()):
        raise ValueError(f"no GPU kernel in the trace under {folder}")
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# -- how much work -----------------------------------------------------------------------------


def attention_flops(
    batch: int,
    q_len: int,
    kv_len: int,
    num_heads: int,
    head_dim: int,
    *,
    is_causal: bool = False,
    backward: bool = False,
) -> float:
    """Floating-point operations of attention: ``4 B N T S H``, halved when causal.

    Args:
      batch: B.
      q_len: T, tokens.
      kv_len: S, tokens.
      num_heads: N, query heads.
      head_dim: H.
      is_causal: count half, the convention of the published tables.
      backward: count the backward pass alone, 2.5 times the forward.

    Returns:
      Operations, a multiplication and an addition counting as two.

    References:
      FlashAttention-3 (arXiv 2407.08608), section 4.1.

    >>> attention_flops(1, 1024, 1024, 1, 128)
    536870912.0
    """
    forward = 4.0 * batch * num_heads * q_len * kv_len * head_dim
    return forward * (0.5 if is_causal else 1.0) * (2.5 if backward else 1.0)


def decode_bytes(
    batch: int,
    kv_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    bits: float = 16.0,
    scale_bytes: float = 0.0,
) -> float:
    """Bytes that attention of one query token must move: K, V, the query and the output.

    Args:
      batch: B.
      kv_len: S, cached tokens.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads.
      head_dim: H.
      bits: stored bits per cached number.
      scale_bytes: bytes of scales per cached token and key/value head, K and V together.

    Returns:
      Bytes; query and output count two bytes a number.

    >>> decode_bytes(1, 1000, 1, 1, 64, bits=8)
    128256.0
    """
    cache = batch * kv_len * num_kv_heads * (2 * head_dim * bits / 8 + scale_bytes)
    return cache + 2 * batch * num_heads * head_dim * 2.0


def matmul_flops(m: int, n: int, k: int) -> float:
    """Floating-point operations of ``[m, k] @ [k, n]``: ``2 m n k``.

    Args:
      m: rows of the left matrix.
      n: columns of the right matrix.
      k: contracted length.

    Returns:
      Operations.

    >>> matmul_flops(2, 3, 4)
    48.0
    """
    return 2.0 * m * n * k


def matmul_bytes(
    m: int, n: int, k: int, *, lhs_bits: float = 16, rhs_bits: float = 16, out_bits: float = 16
) -> float:
    """Bytes that a matrix product must move when every operand is read once.

    Args:
      m: rows of the left matrix.
      n: columns of the right matrix.
      k: contracted length.
      lhs_bits: stored bits per number of the left matrix, scales included.
      rhs_bits: stored bits per number of the right matrix, scales included.
      out_bits: bits per number of the result.

    Returns:
      Bytes.

    >>> matmul_bytes(2, 2, 2)
    24.0
    """
    return (m * k * lhs_bits + k * n * rhs_bits + m * n * out_bits) / 8


def teraflops(flops: float, timing: Timing) -> float:
    """Median rate in TFLOP/s.

    Args:
      flops: operations of one run.
      timing: its times.

    Returns:
      10^12 operations per second.

    >>> teraflops(2e12, Timing((1.0,), 0.0, "wall"))
    2.0
    """
    return flops / timing.median / 1e12


def gigabytes_per_second(num_bytes: float, timing: Timing) -> float:
    """Median rate in GB/s.

    Args:
      num_bytes: bytes moved by one run.
      timing: its times.

    Returns:
      10^9 bytes per second.

    >>> gigabytes_per_second(2e9, Timing((1.0,), 0.0, "wall"))
    2.0
    """
    return num_bytes / timing.median / 1e9
