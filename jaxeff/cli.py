"""The ``jaxeff`` command: ``demo`` runs every layer once, ``generate`` continues a text.

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
    """Folder written by ``jaxeff demo`` (its ``checkpoint`` folder) or by ``save_model``."""

    prompt: str
    """Text to continue; encoded as UTF-8 bytes for the byte-level demo model."""

    max_new_tokens: int = 128
    """Number of tokens to decode."""

    cache: str = "full"
    """Cache compression, for example ``full``, ``rkv:256``, ``kvzip:0.3``."""

    temperature: float = 0.0
    """0 decodes greedily; above 0 samples."""

    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of tokens with this probability mass."""

    seed: int = 0
    """Seed of the sampling."""

    def run(self) -> None:
        """Load the model and print prompt and continuation."""
        import jax
        import numpy as np

        from jaxeff.checkpoint import load_model
        from jaxeff.generate import generate

        prompt = np.frombuffer(self.prompt.encode(), dtype=np.uint8)
        if not len(prompt):
            raise ValueError("prompt is empty: expected at least one byte of text")
        model, _ = load_model(self.checkpoint)
        if model.config.vocab_size != 256:
            raise NotImplementedError(
                f"checkpoint has a vocabulary of {model.config.vocab_size} tokens; this command "
                "serves byte-level models (256). Use jaxeff.generate.generate with your tokenizer."
            )
        result = generate(
            model,
            prompt[None].astype(np.int32),
            max_new_tokens=self.max_new_tokens,
            compression=self.cache,
            temperature=self.temperature,
            top_p=self.top_p,
            key=jax.random.key(self.seed),
        )
        text = bytes(np.asarray(result.tokens[0], dtype=np.uint8)).decode(errors="replace")
        sys.stdout.write(f"{self.prompt}{text}\n")
        sys.stderr.write(
            f"{result.tokens_per_second:.0f} tokens/s, "
            f"{result.cache.allocated_bytes():,} bytes of cache ({self.cache})\n"
        )


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
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
