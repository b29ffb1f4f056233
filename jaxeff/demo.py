"""One real run through every layer: train in FP4, quantise attention, compress the cache, report.

The text is the Python standard library's own source, which every machine has. Three questions are
answered with measured numbers:

1. What does training every linear layer in FP4 (split rounding) cost against full precision?
2. What does 8-bit and 4-bit attention cost the trained model?
3. What does evicting and quantising the KV cache cost when it continues held-out text?
"""

import gzip
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

import pallas_kernels
from jaxeff import checkpoint, quant, report, train
from jaxeff.data import Corpus, batches, stdlib_corpus
from jaxeff.generate import score_continuation
from jaxeff.models import Decoder, ModelConfig
from jaxeff.quant.calibrate import attention_errors

NATS_PER_BIT = float(np.log(2.0))
FP4_RECIPE = "fp4_all_the_way"
ATTENTION_VARIANTS = {"full precision": None, "8-bit (sage2)": "sage2", "FP4 (sage3)": "sage3"}


@dataclass(frozen=True)
class Preset:
    """Sizes of one demo run: the model, the training, and the evaluation."""

    model: ModelConfig
    dtype: str
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    evaluation_batches: int
    prompts: int
    prompt_tokens: int
    continuation_tokens: int
    rkv_budgets: tuple[int, int]
    rkv_buffer: int


PRESETS = {
    # Sized for two CPU cores: both trainings and all measurements in under four minutes.
    "cpu": Preset(
        model=ModelConfig.llama(
            vocab_size=256,
            num_layers=3,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=384,
        ),
        dtype="float32",
        steps=480,
        batch_size=4,
        seq_len=256,
        learning_rate=3e-3,
        evaluation_batches=32,
        prompts=4,
        prompt_tokens=160,
        continuation_tokens=64,
        rkv_budgets=(96, 48),
        rkv_buffer=16,
    ),
    "h200": Preset(
        model=ModelConfig.llama(
            vocab_size=256,
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            mlp_dim=2048,
        ),
        dtype="bfloat16",
        steps=600,
        batch_size=32,
        seq_len=1024,
        learning_rate=1.5e-3,
        evaluation_batches=8,
        prompts=16,
        prompt_tokens=512,
        continuation_tokens=256,
        rkv_budgets=(256, 128),
        rkv_buffer=64,
    ),
}


def run_demo(
    *,
    preset: str = "cpu",
    output: str | Path = "runs/demo",
    seed: int = 0,
    steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and write ``<output>/<time>/{report.html, report.json, checkpoint}``.

    Args:
      preset: ``"cpu"`` or ``"h200"``.
      output: folder under which a folder named by the time is made.
      seed: seed of weights, data order and stochastic rounding.
      steps: training steps of each run; ``None`` takes the preset's.
      console: where progress and the table go; a new one by default.

    Returns:
      What ``report.json`` holds: machine, settings, and all results.

    Raises:
      ValueError: for an unknown preset, or fewer than one step.
      ModuleNotFoundError: if matplotlib (extra ``bench``) is missing; raised before training.
    """
    settings = _settings(preset, steps)
    report.require_matplotlib()
    console = console or Console()
    folder = _new_folder(Path(output))
    started = time.perf_counter()

    corpus = stdlib_corpus()
    console.print(
        f"Python's standard library: {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.validation):,} held out ({len(corpus.validation_files)} files)"
    )
    model, training = _train_twice(settings, corpus, seed, folder, console)
    checkpoint.save_model(folder / "checkpoint", model, metadata={"seed": seed, "preset": preset})
    results = {
        "machine": report.machine(),
        "preset": preset,
        "seed": seed,
        "settings": asdict(settings),
        "training": training,
        "attention": _evaluate_attention(settings, model, corpus, console),
        "cache": _evaluate_caches(settings, model, corpus, console),
    }
    results["seconds"] = time.perf_counter() - started
    report.write(folder, results)
    console.print(report.table(results))
    console.print(f"{folder / 'report.html'} and report.json written in {results['seconds']:.0f} s")
    console.print(
        f"Continue a text: jaxeff generate --checkpoint {folder / 'checkpoint'} "
        "--prompt 'def main(' --cache rkv:256"
    )
    return results


def _settings(preset: str, steps: int | None) -> Preset:
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    if steps is None:
        return PRESETS[preset]
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return Preset(**{**PRESETS[preset].__dict__, "steps": steps})


def _new_folder(output: Path) -> Path:
    """A folder named by the time; a counter keeps two runs of one second apart."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = output / (f"{stamp}-{attempt}" if attempt else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"output {output} already holds 1000 runs of this second")


# --- 1. training -------------------------------------------------------------------------------


def _train_twice(
    settings: Preset, corpus: Corpus, seed: int, folder: Path, console: Console
) -> tuple[Decoder, dict[str, Any]]:
    """Train in full precision and in FP4 from one seed; return the full-precision model."""
    runs, models = {}, {}
    for name, recipe in (("full precision", None), ("FP4 split rounding", FP4_RECIPE)):
        model = Decoder(settings.model, rngs=nnx.Rngs(seed), dtype=jnp.dtype(settings.dtype))
        if recipe is not None:
            quant.apply_recipe(model, recipe, seed=seed)
        result = train.fit(
            model,
            batches(corpus.train, settings.batch_size, settings.seq_len, seed=seed),
            train.TrainConfig(steps=settings.steps, learning_rate=settings.learning_rate),
            log_path=folder / f"{'fp4' if recipe else 'full'}.jsonl",
            description=name,
            console=console,
        )
        validation = train.evaluate(model, _validation(settings, corpus))
        runs[name] = {
            "recipe": recipe or "none",
            "train_loss": [float(loss) for loss in result.losses],
            "validation_loss": validation,
            "bits_per_byte": validation / NATS_PER_BIT,
            "seconds": result.seconds,
        }
        models[name] = model
    full, fp4 = runs.values()
    text = _validation_text(settings, corpus).tobytes()
    return models["full precision"], {
        "runs": runs,
        "gap": fp4["validation_loss"] / full["validation_loss"] - 1.0,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "validation_bytes": len(text),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, compresslevel=9)) / len(text),
    }


def _validation_text(settings: Preset, corpus: Corpus) -> np.ndarray:
    """Bytes spread evenly over the held-out text, so that no single file decides the loss."""
    rows = settings.evaluation_batches * settings.batch_size
    return _windows(corpus.validation, rows, settings.seq_len + 1)


def _windows(data: np.ndarray, rows: int, length: int) -> np.ndarray:
    if len(data) < length:
        raise ValueError(f"validation text has {len(data)} bytes; one window needs {length}")
    starts = np.linspace(0, len(data) - length, rows).astype(np.int64)
    return data[starts[:, None] + np.arange(length)]  # [rows, length]


def _validation(settings: Preset, corpus: Corpus) -> Iterator[np.ndarray]:
    rows = _validation_text(settings, corpus).astype(np.int32)
    yield from rows.reshape(settings.evaluation_batches, settings.batch_size, -1)


# --- 2. attention ------------------------------------------------------------------------------


def _evaluate_attention(
    settings: Preset, model: Decoder, corpus: Corpus, console: Console
) -> dict[str, Any]:
    """Validation loss and per-layer error of the trained model under each attention."""
    tokens = jnp.asarray(next(_validation(settings, corpus))[:, :-1])
    results = {}
    for name, variant in ATTENTION_VARIANTS.items():
        with console.status(f"attention: {name}"):
            attention = partial(pallas_kernels.dot_product_attention, quant=variant)
            loss = train.evaluate(model, _validation(settings, corpus), attention_fn=attention)
            errors = [0.0] * settings.model.num_layers
            if variant is not None:
                errors = np.asarray(attention_errors(model, tokens, variant)).tolist()
        results[name] = {
            "quant": variant or "none",
            "validation_loss": loss,
            "bits_per_byte": loss / NATS_PER_BIT,
            "relative_l1_per_layer": errors,
        }
    return results


# --- 3. caches ---------------------------------------------------------------------------------


def _cache_variants(settings: Preset) -> dict[str, str]:
    large, small = settings.rkv_budgets
    return {
        "full": "full",
        f"R-KV {large}": f"rkv(budget={large}, buffer={settings.rkv_buffer})",
        f"R-KV {small}": f"rkv(budget={small}, buffer={settings.rkv_buffer})",
        "KVzip 30 %": "kvzip(ratio=0.3)",
        "KVzip 30 % + INT8": "kvzip(ratio=0.3, storage='int8')",
    }


def _evaluate_caches(
    settings: Preset, model: Decoder, corpus: Corpus, console: Console
) -> dict[str, Any]:
    """Loss on the true continuation of held-out prompts, bytes and speed of each cache."""
    length = settings.prompt_tokens + settings.continuation_tokens
    rows = _windows(corpus.validation, settings.prompts, length).astype(np.int32)
    prompt, continuation = np.split(rows, [settings.prompt_tokens], axis=1)
    results, reference = {}, None
    for name, compression in _cache_variants(settings).items():
        with console.status(f"cache: {name}"):
            scored = score_continuation(
                model,
                prompt,
                continuation,
                compression=compression,
                cache_dtype=jnp.bfloat16,  # what a full cache costs in practice
            )
        predicted = np.asarray(scored.tokens)
        reference = predicted if reference is None else reference
        results[name] = {
            "compression": compression,
            "allocated_bytes": scored.cache.allocated_bytes(),
            "loss": float(scored.loss),
            "bits_per_byte": float(scored.loss) / NATS_PER_BIT,
            "tokens_per_second": scored.tokens_per_second,
            "agreement": float((predicted == reference).mean()),
        }
    return results
