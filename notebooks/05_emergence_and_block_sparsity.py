# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # When heads become sparse, whole tiles become superfluous
#
# **Question.** Fast sparse attention skips *tiles* of the attention matrix. Are there tiles to skip
# from the start, or only after sparse attention has emerged?
#
# **What to expect.** We train a small transformer on the linear task with long sequences and one
# relevant token, and look at its attention three ways along the training: entropy and top weight of
# each head (`jaxeff.metrics.attention_statistics`, from blocks, never the whole matrix), the share
# of tiles that exact attention could spare, and the tiles that SpargeAttn's cheap prediction
# (mean of each block, section 3.2 of arXiv 2502.18137) would skip.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.emergence import models, sweep, tasks
from experiments.emergence.metrics import sparge_skipped
from jaxeff.metrics import attention_statistics

BLOCK = 8

# %% [markdown]
# Training happens in chunks of one compiled program; after each we keep the parameters.

# %%
objective = models.LinearObjective(T=64, d=8, embed_dim=64, eval_batch=64)
group = sweep.Group(
    name="sparsity",
    objective=objective,
    runs=({"T": 64, "d": 8, "B": 4, "p": 0.0, "learning_rate": 1e-3, "seed": 0},),
    max_steps=400,
    eval_every=20,
)
programs = sweep.compile_group(group)
numbers = sweep._numbers(group)
state = programs.init(numbers)
kept, losses = [], []
for step in range(0, group.max_steps + 1, group.eval_every):
    kept.append(jax.device_get(jax.tree.map(lambda x: x[0], state["parameters"])))
    losses.append(float(programs.evaluate(state, numbers)["loss"][0]))
    state, _ = programs.chunk(state, numbers, jnp.int32(step))
steps = np.arange(0, group.max_steps + 1, group.eval_every)

# %% [markdown]
# What each layer's queries and keys say about tiles, along the training.

# %%
target = tasks.target_matrix(jax.random.key(0), 8)
batch = tasks.linear_batch(jax.random.key(1), target, batch_size=16, seq_len=64, B=4)
inputs = jnp.concatenate([batch.inputs, batch.relevant[..., None].astype(jnp.float32)], -1)


@jax.jit
def measure(parameters):
    """Entropy, top weight, spare tiles and Sparge's skipped tiles, each [layers]."""
    found = []

    def attend(query, key, value, **options):
        exact = attention_statistics(query, key, block_q=BLOCK, block_kv=BLOCK, **options)
        skipped = sparge_skipped(query, key, block_q=BLOCK, block_kv=BLOCK, cdf=0.95)
        found.append(
            jnp.stack([exact.entropy, exact.top1_mass, exact.skippable_tiles, skipped]).mean(1)
        )
        return jax.nn.dot_product_attention(query, key, value, **options)

    models.apply(objective.config, parameters, inputs, 63, attention_fn=attend)
    return jnp.stack(found)


series = np.array([measure(parameters) for parameters in kept])  # [steps, layers, 4]

# %%
figure, axes = plt.subplots(1, 4, figsize=(15, 3.3), layout="constrained")
titles = (
    "entropy / ln n",
    "largest weight",
    "tiles exact attention can spare",
    "tiles Sparge skips",
)
for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
    for layer in range(2):
        axis.plot(steps, series[:, layer, i], label=f"layer {layer + 1}")
    axis.plot(steps, np.array(losses) / losses[0] * axis.get_ylim()[1], "k:", lw=1, label="loss")
    axis.set(title=title, xlabel="step")
axes[0].legend(frameon=False)
for name, column in zip(titles, range(4), strict=True):
    print(f"{name}: {series[0, :, column].round(2)} → {series[-1, :, column].round(2)}")

# %% [markdown]
# **Found.** Before the transition attention is uniform, every tile carries its share, and nothing
# can be skipped. At the transition the first layer turns sparse: 30 % of its causal tiles of 8 × 8
# become superfluous, while the second layer, which only passes the answer on, stays spread out.
# Sparse kernels therefore gain nothing early in training, and the entropy of the heads, which costs
# one block of scores at a time, tells when and where to switch them on. Sparge's prediction finds
# a sixth of those tiles only: it sees block means, and a relevant token in a block of noise is
# averaged away in part.
