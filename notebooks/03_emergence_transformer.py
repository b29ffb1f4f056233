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
# # The same plateau in a transformer
#
# **Question.** The theory is about one attention layer without queries and keys. Does a real
# two-layer transformer, trained with Adam, show a plateau, a sharp drop, and lengths that grow with
# `T` and `d` and shrink with repetition?
#
# **What to expect.** We train twelve small transformers (width 64) at once: `vmap` maps one
# compiled training step over lengths, repetitions and seeds. One to two minutes on a laptop CPU. At
# the end we look at the paper-size sweep that ran on a GPU.

# %%
# %matplotlib inline
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.emergence import plot, sweep
from experiments.emergence.models import LinearObjective

# %% [markdown]
# The task: `T` random vectors, one of them (marked, at a random place) decides the answer
# `y = W* x`. `B` is how often it stands in the sequence, `p` how often it is one fixed vector.

# %%
objective = LinearObjective(T=32, d=8, embed_dim=64, eval_batch=128)
cells = [(16, 1, 0.0), (32, 1, 0.0), (32, 4, 0.0)]
group = sweep.Group(
    name="notebook",
    objective=objective,
    runs=tuple(
        {"T": T, "d": 8, "B": B, "p": p, "learning_rate": 1e-3, "seed": seed}
        for T, B, p in cells
        for seed in (0, 1)
    ),
    max_steps=600,
    eval_every=20,
)
with tempfile.TemporaryDirectory() as folder:
    records = list(sweep.train_all([group], folder, quiet=True).values())

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
single = [r for r in records if r["numbers"]["B"] == 1]
plot.curves(axes[0], single, "loss", "T")
axes[0].set(title="longer with T", ylim=(0, 0.7))
long = [r for r in records if r["numbers"]["T"] == 32]
plot.curves(axes[1], long, "loss", "B")
axes[1].set(title="shorter with B", ylim=(0, 0.7))
record = next(r for r in long if r["numbers"]["B"] == 1)
for layer in (0, 1):
    heads = np.array(record["curve"][f"relevant_{layer}"])
    axes[2].plot(record["curve"]["step"], heads, color=f"C{layer}", lw=1)
axes[2].plot(record["curve"]["step"], record["curve"]["loss"], "k", label="loss")
axes[2].set(xlabel="step", title="attention on the relevant token (a line a head)", ylim=(0, 1))
axes[2].legend(frameon=False)
for T, B, _ in cells:
    mine = [r["plateau"] for r in records if (r["numbers"]["T"], r["numbers"]["B"]) == (T, B)]
    print(
        f"T = {T}, B = {B}: plateau {np.mean(mine):.0f} steps ({min(mine):.0f} to {max(mine):.0f})"
    )

# %% [markdown]
# **Found.** The loss sits near ½ (the variance of the target), then drops; heads turn to the
# relevant token at the drop, not before. Longer sequences wait longer, repeated tokens shorter.

# %% [markdown]
# ## At the paper's size
#
# Width 256, Adam at 1e-4, three seeds, run with
# `python -m experiments.emergence.run linear --preset gpu`. The numbers are read from the results
# file that the command wrote.

# %%
path = Path("experiments/emergence/results/gpu")
result = json.loads((path / "linear.json").read_text())
print(
    "device:",
    result["device"],
    "| runs:",
    result["num_runs"],
    "| censored:",
    result["num_censored"],
)
for name, rows in result["paper"].items():
    print(name.replace("_", " "))
    for name, row in rows.items():
        low, high = row["interval"]
        print(
            f"  {name}: {row['ours']:+.2f}  [{low:+.2f}, {high:+.2f}]   paper {row['paper']:+.2f}"
        )

records = [r for r in sweep.read_records(path).values() if r["task"] == "linear"]
plot.linear_panels(result, records)

# %% [markdown]
# **Found.** Power laws with the paper's signs and nearly its sizes. Our exponents of `T` and `B`
# are lower when every cell counts, also those with `T/B = 8`; in the paper's own range, `T/B ≥ 32`,
# they come nearer, and the slopes still rise with size. Triangles are runs that were cut off: the
# fit treats them as lower bounds instead of dropping them.
#
# Repetition across samples shortens the wait 1.31-fold if the plateau ends at a loss of 0.4, as the
# paper counts where `p` varies, but only 1.09-fold if it ends at 0.1: the drop starts earlier and
# takes longer. Both are far less than in the toy flow; why is not settled by these runs.
