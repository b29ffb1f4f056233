"""Run a flow experiment and write its figures as JSON: ``python -m experiments.starflow.run``."""

import importlib.metadata
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxeff.report import command_line


@dataclass(frozen=True)
class Digits:
    """The reference run on 8×8 digits: likelihood, Bayes rule, round trip, guidance (§7.1)."""

    steps: int = 900
    """Optimiser steps; the reference has 900."""

    seed: int = 0
    """Seed of weights, batches and noise."""

    output: Path = Path("runs/starflow")
    """Folder for the JSON, the log and the checkpoint."""

    def run(self) -> dict:
        """Train, measure and save."""
        from experiments.starflow import digits
        from jaxeff.models.starflow.training import save_flow

        data, trained = digits.train(
            self.steps, self.seed, log_path=self.output / "digits_log.jsonl"
        )
        save_flow(self.output / "digits", trained.averaged, {"sigma": digits.SIGMA})
        results = {
            "seconds": trained.seconds,
            "final_train_loss": float(trained.losses[-20:].mean()),
            "last": digits.likelihood(trained.flow, data),
            "averaged": digits.likelihood(trained.averaged, data),
            "round_trip": digits.round_trip(trained.averaged),
            "denoising": digits.noise_study(trained.averaged, data),
            "guidance": digits.guidance(trained.averaged, data),
        }
        _, discrete = digits.train(self.steps, self.seed, dequantize=True)
        results["dequantised_bits_per_dim"] = digits.discrete_bits(discrete, data)
        return results


@dataclass(frozen=True)
class Cache:
    """What KV compression costs: encode exactly, decode through a compressed cache (§4, F8)."""

    checkpoint: Path = Path("runs/starflow/digits")
    """Folder of a trained flow, see ``digits`` and ``shapes32``."""

    count: int = 64
    """Images decoded."""

    seed: int = 0
    """Seed of the images and their noise."""

    output: Path = Path("runs/starflow")
    """Folder for the JSON."""

    def run(self) -> dict:
        """Measure every cache format in the deep block, the shallow blocks and both."""
        from experiments.starflow.cache_study import study

        return study(self.checkpoint, self.count, self.seed)


@dataclass(frozen=True)
class Shapes:
    """Train on procedural shapes, sample sequentially and by Jacobi, and measure both."""

    size: Literal[16, 32, 64] = 32
    """Side of the images in pixels."""

    preset: Literal["tiny", "cpu", "gpu"] = "cpu"
    """Model and batch size; ``gpu`` has over 50 million parameters."""

    time_budget: float | None = None
    """Seconds of the whole run: .3 first training, .1 second; by default the preset's steps."""

    seed: int = 0
    """Seed of weights, images and noise."""

    output: Path = Path("runs/starflow")
    """Folder for the JSON, the log, the sample grids and the checkpoint."""

    def run(self) -> dict:
        """Train, sample and measure."""
        from experiments.starflow.shapes_run import run_shapes

        return run_shapes(self.size, self.preset, self.time_budget, self.seed, self.output)


@dataclass(frozen=True)
class Layouts:
    """Deep–shallow against equal blocks, and one to four blocks of equal total depth (F5, F6)."""

    steps: int = 300
    """Optimiser steps of each model."""

    seed: int = 0
    """Seed of weights, images and noise."""

    output: Path = Path("runs/starflow")
    """Folder for the JSON."""

    def run(self) -> dict:
        """Train each layout on digits with the same budget."""
        from experiments.starflow.layouts import compare

        return compare(self.steps, self.seed)


@dataclass(frozen=True)
class Latent:
    """Train an autoencoder, a flow on its noisy latents, and the decoder on noisy latents."""

    preset: Literal["tiny", "cpu"] = "cpu"
    """Sizes and steps."""

    seed: int = 0
    """Seed of weights, images and noise."""

    output: Path = Path("runs/starflow")
    """Folder for the JSON and the sample grid."""

    def run(self) -> dict:
        """Run the whole latent pipeline on shapes."""
        from experiments.starflow.latent_run import run_latent

        return run_latent(self.preset, self.seed, self.output)


Command = (
    Annotated[Digits, tyro.conf.subcommand("digits")]
    | Annotated[Cache, tyro.conf.subcommand("cache")]
    | Annotated[Shapes, tyro.conf.subcommand("shapes")]
    | Annotated[Layouts, tyro.conf.subcommand("layouts")]
    | Annotated[Latent, tyro.conf.subcommand("latent")]
)


def environment() -> dict:
    """Versions and device, without names of machines or paths."""
    import jax

    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
    }
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **versions,
        "device": device.device_kind,
        "platform": device.platform,
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run one experiment and write ``<experiment>.json``."""
    words = sys.argv[1:] if arguments is None else arguments
    # "shapes64" reads better in a command than "shapes --size 64".
    if words and words[0].startswith("shapes") and words[0] != "shapes":
        words = ["shapes", "--size", words[0].removeprefix("shapes"), *words[1:]]
    command = tyro.cli(Command, args=words, prog="python -m experiments.starflow.run")
    command.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = command.run()
    settings = {k: v for k, v in asdict(command).items() if k not in ("output", "checkpoint")}
    name = type(command).__name__.lower() + str(settings.get("size", ""))
    report = {
        "command": command_line("experiments.starflow.run", words),
        "settings": settings,
        "environment": environment(),
        "total_seconds": time.perf_counter() - started,
        "results": results,
    }
    path = command.output / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, default=float) + "\n")
    sys.stdout.write(json.dumps(report, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
