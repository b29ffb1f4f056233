"""Small flows shared by the STARFlow tests, with output weights that are not zero."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxeff.models.starflow import TARFlow, TARFlowConfig, from_upstream

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

TAR = TARFlowConfig(1, 4, 2, 16, (1, 2), head_dim=8)
STAR_FIELDS = {
    "scale": "softplus",
    "sos": True,
    "rope": True,
    "soft_clip": 4.0,
    "final_norm": True,
    "order": "L2R",
    "patch_order": "p_p_c",
    "head_dim": 8,
}
CASES = {
    "tarflow": TAR,
    "tarflow_class": TARFlowConfig(
        1, 4, 2, 16, (1, 1), head_dim=8, num_classes=3, cond="class_add"
    ),
    "tarflow_vp": TARFlowConfig(1, 4, 2, 16, (1, 1), head_dim=8, volume_preserving=True),
    "starflow": TARFlowConfig(2, 4, 1, 16, (1, 0, 1), **STAR_FIELDS),
    "starflow_class": TARFlowConfig(
        1,
        4,
        2,
        32,
        (1, 1, 2),
        **STAR_FIELDS | {"head_dim": 32},
        deep_width=64,
        cond="prefix_deep",
        num_classes=3,
        prefix_len=1,
        prefix_dim=4,
    ),
    "starflow_text": TARFlowConfig(
        2,
        4,
        2,
        64,
        (1, 1),
        **STAR_FIELDS | {"head_dim": 32, "final_norm": False, "order": "R2L"},
        num_heads=4,
        num_kv_heads=2,
        cond="prefix_all",
        prefix_len=3,
        prefix_dim=5,
        rope_pairs="half",
        norm="rms",
        mlp="geglu",
        qk_norm=True,
        post_norm=True,
        use_bias=False,
    ),
}


@cache
def make(name: str, scale: float = 0.3) -> TARFlow:
    """The named flow with output kernels perturbed: zero ones would make every test vacuous."""
    flow = TARFlow(CASES[name], rngs=nnx.Rngs(1))
    for index, block in enumerate(flow.blocks):
        if block is not None:
            kernel = block.proj_out.kernel
            key = jax.random.key(100 + index)
            kernel[...] = scale * jax.random.normal(key, kernel.shape) / kernel.shape[0] ** 0.5
    return flow


def condition(name: str, batch: int):
    """A condition of the named flow, with a null label in the last row where there are labels."""
    config = CASES[name]
    if config.cond == "none":
        return None
    if config.num_classes:
        return jnp.arange(batch) % config.num_classes - (jnp.arange(batch) == batch - 1)
    shape = (batch, config.prefix_len, config.prefix_dim)
    return jax.random.normal(jax.random.key(5), shape)


def data(name: str, batch: int = 3):
    """Images of the named flow's size."""
    config = CASES[name]
    shape = (batch, config.img_size, config.img_size, config.in_channels)
    return jax.random.normal(jax.random.key(7), shape)


@cache
def golden(kind: str, name: str):
    """Upstream's weights as a flow, its recorded arrays and its settings."""
    folder = GOLDEN / kind
    weights = dict(np.load(folder / f"{name}_weights.npz"))
    arrays = dict(np.load(folder / f"{name}_io.npz"))
    settings = json.loads((folder / f"{name}_config.json").read_text())
    return from_upstream(weights, settings["model"]), arrays, settings


def channels_last(x):
    """``[B, C, H, W]`` to ``[B, H, W, C]``."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)
