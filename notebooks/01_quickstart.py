# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: cheaper attention, training and caches
#
# Three questions, each answered in a few lines on a CPU:
#
# 1. How much does 8-bit or 4-bit attention change the output?
# 2. Does a model trained with FP4 linear layers learn like one in full precision?
# 3. What happens to the loss when the KV cache is cut to a fraction?

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import pallas_kernels as pk
from jaxeff import quant, train
from jaxeff.data import batches, stdlib_corpus
from jaxeff.generate import score_continuation
from jaxeff.models import Decoder, ModelConfig

# %% [markdown]
# ## 1. Quantised attention
#
# `dot_product_attention` takes the arguments of `jax.nn.dot_product_attention`, and `quant`. Keys
# often carry a large bias per channel; SageAttention subtracts their mean first (`smooth_k`),
# which changes nothing in exact arithmetic and much in low precision. So we test with and without
# such a bias.

# %%
rng = np.random.default_rng(0)
query, key, value = (jnp.asarray(rng.normal(size=(1, 512, 2, 64)), jnp.float32) for _ in range(3))
biased = key + 8 * jnp.asarray(rng.normal(size=(1, 1, 2, 64)), jnp.float32)


def error(key, variant):
    exact = pk.dot_product_attention(query, key, value, is_causal=True)
    approximate = pk.dot_product_attention(query, key, value, is_causal=True, quant=variant)
    return float(jnp.abs(approximate - exact).sum() / jnp.abs(exact).sum())


variants = ["sage1", "sage2", "fp8", "sage3", "sage2_int4"]
plain_errors = [error(key, name) for name in variants]
biased_errors = [error(biased, name) for name in variants]

figure, axes = plt.subplots(figsize=(7, 3))
positions = np.arange(len(variants))
axes.bar(positions - 0.2, plain_errors, 0.4, label="normal keys")
axes.bar(positions + 0.2, biased_errors, 0.4, label="keys with a channel bias")
axes.set(xticks=positions, xticklabels=variants, ylabel="relative L1 error")
axes.legend()
plt.show()

# %% [markdown]
# The smoothed variants do not notice the bias; `fp8`, which scales whole tensors and does not
# smooth, does. On this machine the variants are *emulated* (the values are those of the low-
# precision arithmetic, the speed is not):

# %%
print(pk.explain("attention", query, key, value, is_causal=True, quant="sage2"))

# %% [markdown]
# ## 2. Training in FP4
#
# `apply_recipe` replaces the matrix products of every linear layer by quantised ones. FP4 All the
# Way rounds stochastically in the backward products that average noise out, and to nearest
# elsewhere.

# %%
corpus = stdlib_corpus(max_bytes=2_000_000)
config = ModelConfig.llama(
    vocab_size=256,
    num_layers=2,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=192,
)
settings = train.TrainConfig(steps=150, learning_rate=4e-3)
models, losses = {}, {}
for name, recipe in (("full precision", None), ("FP4, split rounding", "fp4_all_the_way")):
    model = Decoder(config, rngs=nnx.Rngs(0))
    if recipe:
        quant.apply_recipe(model, recipe)
    text = batches(corpus.train, 8, 128, seed=0)
    losses[name] = train.fit(model, text, settings, progress=False).losses
    models[name] = model

figure, axes = plt.subplots(figsize=(7, 3))
for name, curve in losses.items():
    smooth = np.convolve(curve, np.ones(10) / 10, mode="valid")
    axes.plot(np.arange(len(smooth)) + 10, smooth, label=name)
axes.set(xlabel="step", ylabel="training loss (nats per byte)")
axes.legend()
plt.show()

# %% [markdown]
# The curves lie close together. A run this short says that the recipe trains, not what it costs
# at scale; `experiments/low_precision` asks that.

# %% [markdown]
# ## 3. Compressed caches
#
# A prompt is read, its cache is cut, and the true continuation is scored. R-KV also keeps cutting
# while it decodes; KVzip cuts once and keeps what reconstructing the prompt needs.

# %%
model = models["full precision"]
rows = np.stack([corpus.validation[i : i + 128] for i in range(0, 20_000, 5_000)]).astype(np.int32)
prompt, continuation = rows[:, :96], rows[:, 96:]
compressions = ["full", "rkv(budget=48, buffer=16)", "rkv(budget=24, buffer=16)", "kvzip:0.3"]
scores = {
    name: score_continuation(model, prompt, continuation, compression=name) for name in compressions
}
for name, score in scores.items():
    bits = float(score.loss) / np.log(2)
    print(f"{name:28s} {score.cache.allocated_bytes():8,} bytes   {bits:.3f} bits per byte")

# %% [markdown]
# What a cache saves is read off the arrays that are really allocated, not computed from a ratio.
# `jaxeff demo` runs the same three questions on a larger model and writes a report.
