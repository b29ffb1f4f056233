"""Compile the sm90 kernels for an H200 on a machine without one: what ptxas says of each.

``python tools/compile_for_hopper.py [TEXT ...]`` compiles those whose name contains a text, all
without any. It needs CUDA's libraries but no GPU and no driver: ``pip install 'jaxeff[cuda]'``.
Registers decide how many blocks run at the same time, spilled ones are traffic, and tensor-core
products that ptxas runs one by one are slow. Kernels of several warpgroups share the launch's
registers out among them (`Config.registers`): the number printed is that of the launch.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

DUMP = tempfile.TemporaryDirectory()
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_TO": DUMP.name,
}
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from pallas_kernels import dot_product_attention  # noqa: E402
from pallas_kernels._interpret import abstract_gpu  # noqa: E402
from pallas_kernels.ops.attention import mosaic_sm90_backward as backward  # noqa: E402
from pallas_kernels.ops.attention import mosaic_sm90_backward_int8 as backward_int8  # noqa: E402
from pallas_kernels.ops.quantize import mosaic_sm90 as quantisers  # noqa: E402

# XLA's description of a device (GpuTargetConfigProto), from the card's data sheet.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  pcie_bandwidth: 34359738368 device_address_bits: 64 ecc_enabled: true
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a" model_str: "sm_9.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def kernels() -> dict[str, tuple[Callable, list]]:
    """Functions by name, with shapes and types of what they take."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    found: dict[str, tuple[Callable, list]] = {}
    for h in (64, 128):
        x, rows = array(2, 4096, 4, h), array(2, 4, 4096, dtype=jnp.float32)
        lengths = array(2, dtype=jnp.int32)
        mean = array(2, 4, h, dtype=jnp.float32)
        found |= {
            f"quantize statistics {h}": (quantisers.kv_statistics, [x, x, lengths]),
            f"quantize k {h}": (quantisers.quantize_k, [x, lengths, mean]),
            f"quantize v {h}": (quantisers.quantize_v, [x, mean, lengths]),
            f"quantize q {h}": (quantisers.quantize_q, [x, lengths, mean]),
            f"turn codes {h}": (quantisers.turn_codes, [array(2, 4096, 4, h, dtype=jnp.int8)]),
        }
        for quant in ("sage2", "sage1", "fp8", None):
            for causal in (False, True):

                def forward(q, k, v, quant=quant, causal=causal):
                    return dot_product_attention(
                        q, k, v, quant=quant, is_causal=causal, implementation="mosaic"
                    )

                name = f"attention {quant or 'bfloat16'} {h}{' causal' * causal}"
                found[name] = (forward, [x, x, x])

        def gradient(*arrays, scale=h**-0.5):
            return backward.gradient(*arrays, scale=scale)

        def gradient_int8(*arrays, scale=h**-0.5):
            return backward_int8.gradient(*arrays, scale=scale)

        found[f"gradient bfloat16 {h}"] = (gradient, [*[x] * 4, *[rows] * 2])
        found[f"gradient int8 {h}"] = (gradient_int8, [*[x] * 4, *[rows] * 3])
    return found


def compiled(function: Callable, shapes: list, sharding) -> list[str]:
    """What ptxas said of every Mosaic kernel of a function."""
    before = set(Path(DUMP.name).iterdir())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    with abstract_gpu():
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    lowered.compile()
    new = sorted(set(Path(DUMP.name).glob("*.ptxas")) - before)
    return [path.read_text() for path in new]


def main(texts: list[str]) -> None:
    """Compiles and prints."""
    topology = topologies.get_topology_desc(
        topology_name="1x1x1", platform="cuda", target_config=H200, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    for name, (function, shapes) in kernels().items():
        if texts and not any(text in name for text in texts):
            continue
        for said in compiled(function, shapes, sharding):
            registers = re.search(r"Used (\d+) registers", said)[1]
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
            serial = ", products run one by one" * ("serializ" in said)
            print(f"{name}: {registers} registers, {spilled} bytes spilled{serial}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
