"""Generation with packed weights: ``python -m experiments.finetune.inference --preset gpu``.

For every storage of ``jaxeff.quant.WEIGHTS`` and for bfloat16, on random weights in the shape of
Llama 3 8B's layers: the time of a prefill, the time of a decoded token for one row and for several,
and the bytes of the blocks. Times are those of ``generate``, without compilation, the fastest of
some runs; everything of a step counts, attention, caches and the vocabulary included. It prints and
writes after every storage. ``--preset cpu`` runs the same program on a tiny model, to check it, not
to measure.
"""

import dataclasses
import functools
import gc
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from experiments.finetune.measure import measure_each, results_of
from jaxeff.generate import generate
from jaxeff.models import Decoder, ModelConfig
from jaxeff.quant import WEIGHTS, quantize_weights, weight_bytes

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a preset measures."""

    model: dict[str, int]
    prompt: int
    rows: int
    new: int
    repeats: int


PRESETS = {
    "cpu": Sizes(
        {"vocab_size": 256, "num_layers": 1, "embed_dim": 64, "num_heads": 2, "mlp_dim": 128},
        prompt=16,
        rows=2,
        new=3,
        repeats=1,
    ),
    # Layers of Llama 3 8B, four of them.
    "gpu": Sizes(
        {
            "vocab_size": 32_000,
            "num_layers": 4,
            "embed_dim": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "mlp_dim": 14_336,
        },
        prompt=4096,
        rows=16,
        new=65,
        repeats=3,
    ),
}


def generation(storage: str, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a prefill and of decoded tokens, and bytes, with one storage."""
    gc.collect()  # the model before this one
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = Decoder(ModelConfig.llama(**sizes.model), rngs=nnx.Rngs(0), **options)
    if storage != "bf16":
        quantize_weights(model, storage)
    began = time.perf_counter()
    tokens = jax.random.randint(jax.random.key(1), (1, sizes.prompt), 0, sizes.model["vocab_size"])
    one = _fastest(model, tokens, sizes)
    several = _fastest(model, jnp.tile(tokens[:, : sizes.prompt // 16], (sizes.rows, 1)), sizes)
    return {
        "block_weight_bytes": weight_bytes(model.layers),
        "prefill_ms": 1e3 * one[0],
        "token_ms": 1e3 * one[1],
        f"token_of_{sizes.rows}_rows_ms": 1e3 * several[1],
        "seconds": time.perf_counter() - began,
    }


def _fastest(model: Decoder, tokens: jax.Array, sizes: Sizes) -> tuple[float, float]:
    """Seconds of a prefill and of a decoded token."""
    runs = [generate(model, tokens, max_new_tokens=sizes.new) for _ in range(sizes.repeats + 1)]
    prefill = min(run.prefill_seconds for run in runs)
    return prefill, min(run.decode_seconds for run in runs) / (sizes.new - 1)


@dataclasses.dataclass(frozen=True)
class Command:
    """Measure generation, and write ``OUTPUT/PRESET/inference.json``."""

    preset: Literal["cpu", "gpu"] = "gpu"
    """Sizes; ``cpu`` only checks the program."""

    time_budget: float = 500.0
    """Seconds after which no further storage starts; what is missing is listed."""

    output: Path = RESULTS
    """Folder of the results; ``PRESET`` is appended."""

    only: str = ""
    """Storages, with commas. By default all."""

    def run(self) -> dict[str, Any]:
        """Measure, print and write."""
        sizes, deadline = PRESETS[self.preset], time.monotonic() + self.time_budget
        storages = ["bf16", *WEIGHTS]
        wanted = list(filter(None, self.only.split(","))) or storages
        if unknown := set(wanted) - set(storages):
            raise ValueError(f"only has {sorted(unknown)}; expected some of {storages}")
        command = f"python -m experiments.finetune.inference --preset {self.preset}"
        command += f" --only {self.only}" * bool(self.only)
        results = results_of(sizes, command, ("storages",))
        work = [("storages", name, functools.partial(generation, name, sizes)) for name in wanted]
        compare = functools.partial(_compare, results["storages"])
        path = self.output / self.preset / "inference.json"
        return measure_each(results, work, deadline, path, compare)


def _compare(storages: dict[str, dict[str, float]]) -> None:
    """Every time beside bfloat16's."""
    for row in storages.values() if "bf16" in storages else ():
        for name in [name for name in row if name.endswith("_ms")]:
            row[name.removesuffix("_ms") + "_over_bf16"] = storages["bf16"][name] / row[name]


if __name__ == "__main__":
    tyro.cli(Command).run()
