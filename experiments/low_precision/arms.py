"""The arms of experiments E1 to E3, as data."""

import dataclasses

from experiments.low_precision.training import Arm
from jaxeff.quant import POINTS, RECIPES, OperandQuant, Recipe
from jaxeff.quant.recipe import QAF_MODES
from pallas_kernels.formats import BlockFormat

SPLIT = RECIPES["fp4_all_the_way"]
BASELINE = Arm("bf16", RECIPES["bf16"])


def rounding_arms(preset: str) -> list[Arm]:
    """E1: where rounding is stochastic; the published recipes beside."""
    named = [
        Arm("rtn", RECIPES["fp4_rtn"]),
        Arm("sr", RECIPES["fp4_sr"]),
        Arm("split", SPLIT),
        # The recipe keeps the last 15 % of the blocks plain, which is one of two on the CPU.
        Arm("nvidia_nvfp4", RECIPES["nvidia_nvfp4"], keep_last=None),
    ]
    if preset == "cpu":  # what ten minutes allow
        return named
    if preset == "minutes":
        return [*named, Arm("quartet", RECIPES["quartet"])]
    named += [Arm(name, RECIPES[name]) for name in ("quartet", "quartet2", "tetrajet2")]
    single = [Arm("split_17/16", SPLIT.with_sr_overrange())]
    for name, rest, one in (("rtn", "fp4_rtn", "stochastic"), ("sr", "fp4_sr", "nearest")):
        for point in POINTS:
            recipe = RECIPES[rest].replace_points((point,), rounding=one)
            single.append(Arm(f"{name}_but_{point}", recipe))
    return named + single


def format_arms(preset: str) -> list[Arm]:
    """E2: types of the scale at block 16, and sizes of the block."""
    scales = ("e1m6", "e2m5", "e3m4", "e4m3", "e5m2", "e6m1", "e8m0")
    pairs = [(16, scale) for scale in scales]
    pairs += [(size, scale) for scale in ("e4m3", "e8m0") for size in (8, 32, 64, 128)]
    if preset == "cpu":
        pairs = [(16, "e1m6"), (16, "e4m3"), (16, "e8m0")]
    if preset == "minutes":
        pairs = [*((16, scale) for scale in ("e1m6", "e4m3", "e5m2", "e8m0")), (128, "e4m3")]
    return [Arm(f"b{size}_{scale}", with_format(SPLIT, size, scale)) for size, scale in pairs]


def with_format(recipe: Recipe, block: int, scale: str) -> Recipe:
    """A recipe with E2M1 elements in other blocks; two levels where the scale type is narrow."""
    kind = BlockFormat("e2m1", block, scale, two_level=scale != "e8m0")
    points = {
        point: dataclasses.replace(getattr(recipe, point), format=kind.name)
        for point in POINTS
        if getattr(recipe, point) != OperandQuant()
    }
    return dataclasses.replace(recipe, **points)


# Scales of powers of two, blocks of 128 and few tokens: the noise of FP4 made large.
FORCED = with_format(SPLIT, 128, "e8m0")


def branch_arms(setting: str) -> list[Arm]:
    """E3 side by side: bf16, FP4 that goes on, and the three modes, each its second phase alone."""
    recipe, batch = {"normal": (SPLIT, None), "forced": (FORCED, 4)}[setting]
    modes = [Arm(mode, recipe.after_switch(mode), batch=batch) for mode in QAF_MODES]
    plain = dataclasses.replace(BASELINE, batch=batch)
    return [plain, Arm("stay", recipe, batch=batch), *modes]


def qaf_arms(preset: str) -> dict[str, list[Arm]]:
    """E3: FP4 for 85 % of the steps, then five ways to go on; plain and with a forced crossing."""
    noise_every = 10 if preset == "cpu" else 50
    settings = {"forced": (FORCED, 1 if preset == "cpu" else 4)}
    if preset == "gpu":
        settings["normal"] = (SPLIT, None)
    arms = {}
    for name, (recipe, batch) in settings.items():
        stay = Arm(
            "stay",
            recipe.with_qaf("backward"),
            qaf_start=0.85,
            noise_every=noise_every,
            batch=batch,
            trunk=name,
        )
        modes = [
            dataclasses.replace(
                stay, name=mode, recipe=recipe.with_qaf(mode), phase=True, noise_every=None
            )
            for mode in QAF_MODES
        ]
        baseline = dataclasses.replace(BASELINE, qaf_start=0.85, batch=batch)
        arms[name] = [baseline, stay, *modes]
    return arms
