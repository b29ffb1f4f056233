"""Train the byte model under one recipe and one seed, and never lose what was computed.

Finished runs are lines of ``runs.jsonl`` in the output folder; a run that was cut off leaves a
checkpoint below ``state/`` and goes on from there with the same batches and random numbers.
"""

import functools
import importlib.metadata
import json
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxeff import checkpoint, train
from jaxeff.data import Corpus, batches, directory_corpus, stdlib_corpus
from jaxeff.models import Decoder, ModelConfig
from jaxeff.optim import monitor_gradient_noise, qaf_schedule, warmup_cosine
from jaxeff.quant import Recipe, apply_recipe, fold_step, set_phase


@dataclass(frozen=True)
class Preset:
    """Sizes of model, data and run; all dimensions are multiples of 32."""

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    seq_len: int
    batch: int
    steps: int
    learning_rate: float
    warmup_steps: int
    max_bytes: int | None
    validation_bytes: int
    dtype: str
    save_every: float = 60.0
    attention: str | None = None  # of jax.nn.dot_product_attention; None is the model's own
    with_packages: bool = False  # whether installed packages add to the text

    def model_config(self) -> ModelConfig:
        """The decoder: SwiGLU, RMSNorm, RoPE, untied head."""
        return ModelConfig.llama(
            vocab_size=256,
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            # Else an embedding is small beside what the layers add, and a run finds out that text
            # repeats itself at a step of its own, which outweighs any difference of precision.
            embed_scale=self.embed_dim**0.5,
        )


PRESETS = {
    "cpu": Preset(64, 2, 4, 192, 64, 8, 160, 4e-3, 16, 6_000_000, 65_536, "float32"),
    "gpu": Preset(512, 10, 8, 1408, 512, 64, 9200, 2e-3, 200, None, 1_048_576, "bfloat16"),
    # Few and wide layers: most of the time in products, little of it in compiling. The number of
    # steps follows from the time budget, see side_by_side.
    "minutes": Preset(
        768, 4, 6, 2304, 512, 64, 0, 1.5e-3, 100, 150_000_000, 1_048_576, "bfloat16",
        attention="cudnn", with_packages=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe, and when its second phase begins.

    Attributes:
        name: Name in tables; part of the id of a run.
        recipe: The recipe of the layers.
        keep_last: As in ``apply_recipe``.
        qaf_start: Fraction of the steps after which the learning rate starts again, or None.
        phase: Whether the second phase of the recipe begins there too.
        noise_every: Steps between measurements of the gradient's noise, or None.
        batch: Sequences per step, or None for the preset's.
        trunk: Name shared by arms that are the same up to ``qaf_start``: the first one that gets
            there leaves its state for the others.
    """

    name: str
    recipe: Recipe
    keep_last: float | None = 0.0
    qaf_start: float | None = None
    phase: bool = False
    noise_every: int | None = None
    batch: int | None = None
    trunk: str | None = None


class OutOfTime(Exception):
    """The time budget is spent; what was done is on disk."""


class Runs:
    """Finished runs of one output folder, and the clock.

    Args:
        output: Folder for ``runs.jsonl`` and ``state/``.
        preset: Sizes.
        time_budget: Seconds after which no further step begins, or None.
    """

    def __init__(self, output: Path, preset: Preset, time_budget: float | None = None):
        self.output, self.preset = output, preset
        output.mkdir(parents=True, exist_ok=True)
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        path = output / "runs.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self._records = {(r["experiment"], r["arm"], r["seed"]): r for r in map(json.loads, lines)}

    def check_time(self) -> None:
        """Raises OutOfTime if the budget is spent."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime

    def get(self, experiment: str, arm: Arm, seed: int) -> dict[str, Any]:
        """The record of one run, trained now if it is not there.

        Raises:
            ValueError: if the run on disk had other sizes.
            OutOfTime: if the budget does not suffice.
        """
        known = self._records.get((experiment, arm.name, seed))
        if known is not None:
            if Preset(**known["preset"]) != self.preset:
                raise ValueError(
                    f"{self.output} holds runs of other sizes; choose another output folder"
                )
            return known
        self.check_time()
        folder = self.output / "state" / f"{experiment}_{arm.name}_{seed}".replace("/", "-")
        record = {"experiment": experiment, "arm": arm.name, "seed": seed}
        trunk = None if arm.trunk is None else folder.with_name(f"trunk_{arm.trunk}_{seed}")
        record |= _train(arm, seed, self.preset, folder, trunk, self.check_time)
        record |= {"preset": asdict(self.preset)}
        with (self.output / "runs.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        self._records[experiment, arm.name, seed] = record
        return record


@functools.cache
def corpus(max_bytes: int | None, with_packages: bool = False) -> Corpus:
    """The standard library's sources, and those of installed packages if wanted."""
    library = stdlib_corpus(max_bytes)
    room = None if max_bytes is None else max_bytes - len(library.train) - len(library.validation)
    if not with_packages or (room is not None and room < 1_000_000):
        return library
    packages = directory_corpus(sysconfig.get_paths()["purelib"], max_bytes=room, skip=())
    return Corpus(
        np.concatenate([library.train, packages.train]),
        np.concatenate([library.validation, packages.validation]),
        library.train_files + packages.train_files,
        library.validation_files + packages.validation_files,
    )


def validation_batches(preset: Preset, batch: int | None = None) -> Iterator[np.ndarray]:
    """Windows of the held-out bytes without overlap, ``batch`` (or the preset's) at a time.

    Where packages are part of the text they are spread over all of it, as the batches are; else
    they are the first ones.
    """
    batch, length = batch or preset.batch, preset.seq_len
    data = corpus(preset.max_bytes, preset.with_packages).validation
    count = min(preset.validation_bytes, len(data) - 1) // length
    stride = (len(data) - 1) // count if preset.with_packages else length
    windows = np.stack([data[i * stride : i * stride + length + 1] for i in range(count)])
    for start in range(0, count - count % batch, batch):
        yield windows[start : start + batch].astype(np.int32)


def build(arm: Arm, seed: int, preset: Preset) -> Decoder:
    """A fresh model with the arm's recipe."""
    dtype = jnp.dtype(preset.dtype)
    attention = None if preset.attention is None else _attention(preset.attention)
    model = Decoder(preset.model_config(), rngs=nnx.Rngs(seed), dtype=dtype, attention_fn=attention)
    apply_recipe(model, arm.recipe, keep_last=arm.keep_last, seed=seed)
    return model


@functools.cache
def _attention(implementation: str):
    """One object per name: a compiled step is keyed by it."""
    return functools.partial(jax.nn.dot_product_attention, implementation=implementation)


def clipped_adamw(rate) -> optax.GradientTransformation:
    """AdamW as both trainings use it; a schedule or a number, which may be traced."""
    adamw = optax.adamw(
        rate,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@functools.cache
def _optimizer(qaf_start: float | None, preset: Preset):
    """Transformation and learning rate; cached, as the compiled step is keyed by it."""
    rate = warmup_cosine(preset.learning_rate, preset.steps, warmup_steps=preset.warmup_steps)
    if qaf_start is not None:
        start = int(qaf_start * preset.steps)
        length = preset.steps - start
        # The peak is a choice of ours: a quarter of the first one, with a tenth of it at the end.
        rate = qaf_schedule(
            rate,
            start,
            steps=length,
            peak=preset.learning_rate / 4,
            warmup_steps=min(40, length // 4),
            final_fraction=0.1,
        )
    return clipped_adamw(rate)


_step = jax.jit(train.train_step, static_argnums=(0, 1), donate_argnums=2)


def _train(arm, seed, preset, folder, trunk, check_time) -> dict[str, Any]:
    model = build(arm, seed, preset)
    optimizer = _optimizer(arm.qaf_start, preset)
    graph, state = train.init_state(model, optimizer)
    curve, noise = [], []
    start_from = next((p for p in (folder, trunk) if p is not None and p.exists()), None)
    if start_from is not None:
        state = checkpoint.restore(start_from, state)
        progress = checkpoint.load_metadata(start_from)
        curve, noise = progress["curve"], progress["noise"]
    branch = None if arm.qaf_start is None else int(arm.qaf_start * preset.steps)
    switch = jnp.int32(branch) if arm.phase else None
    text = corpus(preset.max_bytes, preset.with_packages).train
    data = batches(text, arm.batch or preset.batch, preset.seq_len, seed)
    first, began = int(state.step), time.monotonic()
    saved, compiled = began, None
    for step in range(first, preset.steps):
        if step == branch and trunk is not None and not trunk.exists():
            _save(trunk, state, curve, noise)
        tokens = jnp.asarray(data[step])
        if arm.noise_every is not None and step % arm.noise_every == 0:
            noise.append({"step": step} | measure_noise(graph, state, tokens))
        state, metrics = _step(graph, optimizer, state, tokens, qaf_start=switch)
        if step % max(preset.steps // 100, 1) == 0 or step == preset.steps - 1:
            curve.append([step, float(metrics["loss"])])
            if not np.isfinite(curve[-1][1]):
                break
        if compiled is None:
            jax.block_until_ready(state)
            compiled = time.monotonic()
        if time.monotonic() - saved > preset.save_every:
            _save(folder, state, curve, noise)
            saved = time.monotonic()
        try:
            check_time()
        except OutOfTime:
            _save(folder, state, curve, noise)
            raise
    jax.block_until_ready(state)
    seconds = time.monotonic() - (compiled or began)
    nnx.update(model, state.params, state.rest)
    return {
        "validation": train.evaluate(model, validation_batches(preset)),
        "curve": curve,
        "noise": [] if arm.noise_every is None else noise,  # a branch would repeat the trunk's
        # Measurements of the noise included; not the first step, which compiles.
        "seconds_per_step": seconds / max(preset.steps - first - 1, 1),
        "bytes_seen": preset.steps * data.batch * preset.seq_len,
        "environment": environment(),
    }


def _save(folder: Path, state, curve, noise) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder, state, {"curve": curve, "noise": noise}, overwrite=True)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graph, state, tokens):
    def gradient(rest):
        def loss(params):
            model = nnx.merge(graph, params, rest)
            return train.next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])

        return jax.grad(loss)(state.params)

    here = fold_step(state.rest, state.step)
    other = fold_step(state.rest, state.step + (1 << 30))  # a key that no step uses
    # In the second phase of mode "backward" the backward pass of the same function is exact.
    return gradient(here), gradient(other), gradient(set_phase(here, True))


@jax.jit
def _ratios(first, second, reference):
    monitor = monitor_gradient_noise(every=1)
    start = monitor.init(first)
    two_key = monitor.update(first, start, noisy_pair=(first, second))[1]
    exact = monitor.update(first, start, reference=reference)[1]
    return {
        "two_key": two_key.ratio,
        "reference": exact.ratio,
        "per_leaf": exact.per_leaf,
    }


def measure_noise(graph: Any, state: train.TrainState, tokens: jax.Array) -> dict[str, Any]:
    """Ratio of gradient to quantisation noise by both estimators, and the lowest of the layers.

    The recipe must have a second phase of mode ``"backward"``, which is the reference.
    """
    return noise_ratios(*_gradients(graph, state, tokens), tokens)


def noise_ratios(first: Any, second: Any, reference: Any, tokens: jax.Array) -> dict[str, Any]:
    """The same from gradients of two roundings and the exact one."""
    ratios = jax.device_get(_ratios(first, second, reference))
    leaves, _ = jax.tree_util.tree_flatten_with_path(ratios["per_leaf"])
    layers = {
        ".".join(str(getattr(key, "key", key)) for key in path if hasattr(key, "key")): float(ratio)
        for path, ratio in leaves
        if ratio < 1e5  # what is not quantised has no noise
    }
    return {
        "two_key": float(ratios["two_key"]),
        "reference": float(ratios["reference"]),
        "tokens": int(tokens.shape[0] * (tokens.shape[1] - 1)),
        "layers": layers,
    }


def environment() -> dict[str, Any]:
    """Versions and device, without names of machines or paths."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "device": device.device_kind,
        "platform": device.platform,
    }
