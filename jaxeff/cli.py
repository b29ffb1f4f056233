"""The ``jaxeff`` command: run the demo, continue a text, compare caches, sample a flow.

Each subcommand is one frozen dataclass whose fields are its options; ``run`` does the work. Heavy
modules are imported inside ``run`` so that ``jaxeff --help`` answers at once.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Demo:
    """Train, quantise, compress and generate once on real text, and write a report."""

    preset: Literal["cpu", "h200"] = "cpu"
    """Model and training size: ``cpu`` for two cores, ``h200`` for one large GPU."""

    output: Path = Path("runs/demo")
    """Folder that receives ``<time>/report.html``, ``report.json`` and the checkpoint."""

    seed: int = 0
    """Seed of the weights, the data order and the stochastic rounding."""

    steps: int | None = None
    """Training steps of each of the two runs; by default the preset's."""

    def run(self) -> None:
        """Run the demo."""
        from jaxeff.demo import run_demo

        run_demo(preset=self.preset, output=self.output, seed=self.seed, steps=self.steps)


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained checkpoint, printing it as it is decoded."""

    checkpoint: Path
    """Folder of a Hugging Face checkpoint with its tokenizer.json, or the ``checkpoint`` folder of
    ``jaxeff demo`` (written by ``save_model``; its tokens are bytes)."""

    prompt: str
    """Text to continue."""

    max_new_tokens: int = 128
    """Number of tokens to decode; a stop token of the checkpoint ends the text earlier."""

    cache: str = "full"
    """Cache compression, for example ``full``, ``rkv:256``, ``kvzip:0.3``."""

    cache_dtype: str | None = None
    """Storage of the cache, for example ``bfloat16`` or ``int8``; by default the model's dtype."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""

    temperature: float = 0.0
    """0 decodes greedily; above 0 samples."""

    top_k: int | None = None
    """Sample among this many most likely tokens."""

    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of tokens with this probability mass."""

    min_p: float | None = None
    """Sample among tokens at least this many times as likely as the likeliest."""

    seed: int = 0
    """Seed of the sampling."""

    def run(self) -> None:
        """Load the model and print prompt and continuation."""
        import jax

        from jaxeff.generate import generate
        from jaxeff.text import TextStream, load_text_model

        if not self.prompt:
            raise ValueError("prompt is empty: expected some text")
        text_model = load_text_model(self.checkpoint, dtype=self.dtype)

        def write(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        stream = TextStream(text_model.decode, write, skip=text_model.stop_tokens, lead=self.prompt)
        result = generate(
            text_model.model,
            [text_model.encode(self.prompt)],
            max_new_tokens=self.max_new_tokens,
            compression=self.cache,
            cache_dtype=self.cache_dtype,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            key=jax.random.key(self.seed),
            stop_tokens=text_model.stop_tokens,
            on_tokens=stream,
            stream_every=8,
        )
        stream.close()
        write("\n")
        sys.stderr.write(
            f"{result.tokens_per_second:.0f} tokens/s, "
            f"{result.cache.allocated_bytes():,} bytes of cache ({self.cache})\n"
        )


@dataclass(frozen=True)
class EvalKV:
    """Compare cache compressions of a checkpoint: loss, agreement with the full cache, bytes."""

    checkpoint: Path
    """Folder of a Hugging Face checkpoint with its tokenizer.json, or one of ``save_model``."""

    text: Path | None = None
    """File to read; by default held-out files of Python's standard library."""

    compressions: tuple[str, ...] = ("full", "rkv:64", "snapkv:64", "kvzip:0.3")
    """Spellings of the compressions; the first is what the others are compared with."""

    prompts: int = 4
    """Pieces of the text, spread evenly over it."""

    prompt_tokens: int = 160
    """Context tokens of each piece."""

    continuation_tokens: int = 64
    """Tokens after the context that are predicted one by one."""

    cache_dtype: str = "bfloat16"
    """Storage of caches whose compression names none."""

    output: Path | None = None
    """JSON file that receives the numbers as well."""

    def run(self) -> None:
        """Score the pieces under every compression and print one line for each."""
        import json

        import numpy as np

        from jaxeff.data import stdlib_corpus
        from jaxeff.generate import score_continuation
        from jaxeff.text import load_text_model

        length = self.prompt_tokens + self.continuation_tokens
        if min(self.prompts, self.prompt_tokens, self.continuation_tokens) < 1:
            raise ValueError("prompts, prompt_tokens and continuation_tokens must be 1 or more")
        if self.text is None:
            text = stdlib_corpus().validation.tobytes().decode(errors="replace")
        else:
            text = self.text.read_text(errors="replace")
        text_model = load_text_model(self.checkpoint)
        model = text_model.model
        data = np.asarray(text_model.encode(text), np.int32)
        if len(data) < length:
            raise ValueError(f"the text has {len(data)} tokens; one piece needs {length}")
        starts = np.linspace(0, len(data) - length, self.prompts).astype(np.int64)
        rows = data[starts[:, None] + np.arange(length)]
        prompt, continuation = np.split(rows, [self.prompt_tokens], axis=1)
        results, reference = {}, None
        sys.stdout.write(f"{'compression':<40} {'nats/token':>10} {'agreement':>9} {'bytes':>12}\n")
        for name in self.compressions:
            scored = score_continuation(
                model, prompt, continuation, compression=name, cache_dtype=self.cache_dtype
            )
            best = np.asarray(scored.tokens)
            reference = best if reference is None else reference
            results[name] = {
                "loss": scored.loss,
                "agreement": float((best == reference).mean()),
                "allocated_bytes": scored.cache.allocated_bytes(),
                "tokens_per_second": scored.tokens_per_second,
            }
            sys.stdout.write(
                f"{name:<40} {scored.loss:10.4f} {results[name]['agreement']:9.3f} "
                f"{results[name]['allocated_bytes']:12,}\n"
            )
        if self.output is not None:
            self.output.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True)
class Sample:
    """Draw images from a trained flow and write them as one PNG."""

    checkpoint: Path
    """Folder written by ``save_flow`` or by an experiment in ``experiments/starflow``."""

    grid: Path = Path("samples.png")
    """PNG to write."""

    classes: tuple[int, ...] = ()
    """Class labels, one row of images each; empty draws without a condition."""

    per_class: int = 8
    """Images per class, and per row."""

    guidance: float = 0.0
    """Guidance weight; 0 samples the conditional density."""

    method: str = "scan"
    """``scan`` is token by token, ``jacobi`` solves chunks in parallel."""

    cache: str = "float32"
    """Cache of keys and values, for example ``int8``, ``window:64``, ``rkv:64``."""

    seed: int = 0
    """Seed of the noise."""

    denoise: bool = True
    """Remove the training noise with one score step, where the model was trained with noise."""

    def run(self) -> None:
        """Load the flow, sample, write the grid."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from jaxeff.images import image_grid, save_png
        from jaxeff.models.starflow.training import load_flow

        if self.per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {self.per_class}")
        flow, facts = load_flow(self.checkpoint)
        config = flow.config
        labels, batch = None, self.per_class
        if self.classes:
            if not config.num_classes:
                raise ValueError(
                    f"classes {self.classes} were asked of a flow trained without classes"
                )
            labels = jnp.repeat(jnp.asarray(self.classes, jnp.int32), self.per_class)
            batch = len(labels)
        if config.in_channels not in (1, 3):
            raise NotImplementedError(
                f"the flow makes {config.in_channels} channels; this command writes images of 1 "
                "or 3. Decode latents with jaxeff.models.starflow.vae"
            )
        sigma = float(facts.get("sigma", 0.0)) if self.denoise else 0.0
        x = flow.sample(
            jax.random.key(self.seed),
            labels,
            batch=batch,
            denoise_sigma=sigma,
            guidance=self.guidance,
            method=self.method,
            cache=self.cache,
        )
        save_png(self.grid, image_grid(np.asarray(x), self.per_class))
        sys.stdout.write(f"{batch} images of {config.img_size}² in {self.grid}\n")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[EvalKV, tyro.conf.subcommand("eval-kv")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the chosen subcommand.

    Args:
      arguments: words after the program name; by default ``sys.argv[1:]``.

    Raises:
      SystemExit: with status 2 and the message, when the input is wrong.
    """
    command = tyro.cli(Command, args=arguments, prog="jaxeff")
    try:
        command.run()
    except (ValueError, NotImplementedError) as error:
        sys.stderr.write(f"jaxeff: {error}\n")
        raise SystemExit(2) from error
