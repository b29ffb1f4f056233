"""Finding SpargeAttn's thresholds for each head under a bound on the error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxeff.sparse.sparge import SpargeThresholds
from jaxeff.typing import Array
from pallas_kernels import dot_product_attention
from pallas_kernels.ops.attention.sparge import BLOCK_KV, BLOCK_Q, sparge_attention

__all__ = ["TuneResult", "tune_sparge"]

NO_PV_SKIP = 50.0
DEFAULT_SIMS = tuple(i / 16 for i in range(-16, 16))


class TuneResult(NamedTuple):
    """What the tuner found.

    Args:
        thresholds: f32 ``[N]`` each; ``topk`` is ``None``, and ``pvthreshd`` without that stage.
        error: f32 ``[N]``, relative L1 with these thresholds, the worst calibration input.
        sparsity: f32 ``[N]``, share of the products left out, mean over the inputs.
        dense: bool ``[N]``, heads for which sparsity did not pay.
    """

    thresholds: SpargeThresholds
    error: np.ndarray
    sparsity: np.ndarray
    dense: np.ndarray


def tune_sparge(
    inputs: Sequence[tuple[Array, Array, Array]],
    *,
    l1: float = 0.07,
    pv_l1: float | None = 0.08,
    sims: Sequence[float] = DEFAULT_SIMS,
    cdf_tolerance: float = 1e-3,
    pv_tolerance: float = 0.1,
    min_sparsity: float = 0.1,
    attention_sink: bool = True,
    quant: Any = "sage2_per_block",
    block_q: int = BLOCK_Q,
    block_kv: int = BLOCK_KV,
    implementation: str | None = None,
    progress: bool = True,
    console: Console | None = None,
    **rules: Any,
) -> TuneResult:
    """Find per head the thresholds that skip most within a relative L1 error.

    For each self-similarity threshold: bisect ``cdfthreshd`` to the smallest value whose error
    against exact attention is below ``l1``, then ``pvthreshd`` to the smallest below ``pv_l1``; go
    on to the next as long as some head still skips ``min_sparsity``. The results of all inputs at
    one threshold are a group: its largest ``cdfthreshd`` and ``pvthreshd`` hold for all of them;
    the group with the largest summed sparsity wins. Heads below ``min_sparsity`` become dense. The
    paper's code groups neighbouring points of the plane instead. All heads are tuned at once; the
    error is that of the whole variant, quantisation included.

    Args:
        inputs: calibration inputs ``(query [B, T, N, H], key [B, S, K, H], value)``, best of equal
            shapes (each shape compiles).
        l1: bound on the relative L1 error of the first stage.
        pv_l1: bound with both stages, at least ``l1``; ``None`` leaves the second stage out, which
            the sm90 kernel does not have.
        sims: values of ``simthreshd1`` to try, ascending.
        cdf_tolerance: where the bisection of ``cdfthreshd`` stops.
        pv_tolerance: where that of ``pvthreshd`` stops, in powers of two.
        min_sparsity: share of the products that a sparse head must skip.
        attention_sink: as in :class:`~jaxeff.sparse.SpargeAttention`.
        quant: as there.
        block_q: as there.
        block_kv: as there.
        implementation: as there.
        progress: whether to show a progress bar.
        console: where it is shown.
        **rules: ``is_causal``, ``scale`` and the other rules of the attention.

    Returns:
        :class:`TuneResult`; with ``l1`` below the error of the quantised variant itself every head
        is dense.

    Raises:
        ValueError: no inputs, a bound out of range or ``sims`` not ascending.

    >>> x = jnp.ones((1, 128, 1, 16))
    >>> found = tune_sparge([(x, x, x)], sims=(-1.0,), block_q=16, block_kv=16, progress=False)
    >>> bool(found.error[0] < 0.08), bool(found.sparsity[0] > 0.5)
    (True, True)

    References: Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.6.
    """
    inputs = [tuple(jnp.asarray(x) for x in each) for each in inputs]
    sims = [float(sim) for sim in sims]
    bounds = (l1, l1 if pv_l1 is None else pv_l1)
    if not inputs or not 0 < l1 <= bounds[1] or not sims or sorted(set(sims)) != sims:
        raise ValueError(
            f"expected inputs, 0 < l1 <= pv_l1 and ascending sims; got {len(inputs)} inputs, "
            f"l1={l1}, pv_l1={pv_l1}, sims={sims}"
        )
    exact = jax.jit(functools.partial(dot_product_attention, **rules))
    truths = [exact(*(x.astype(jnp.float32) for x in each)) for each in inputs]

    @jax.jit
    def measure(each, truth, sim, cdf, pv):
        out, sparsity = sparge_attention(
            *each, simthreshd1=sim, cdfthreshd=cdf, pvthreshd=None if pv_l1 is None else pv,
            attention_sink=attention_sink, quant=quant, block_q=block_q, block_kv=block_kv,
            implementation=implementation, return_sparsity=True, **rules,
        )  # fmt: skip
        axes = (0, 1, 3)
        difference = jnp.abs(out.astype(jnp.float32) - truth).sum(axes)
        return difference / jnp.maximum(jnp.abs(truth).sum(axes), 1e-30), sparsity.mean(0)

    heads = inputs[0][0].shape[2]
    points = []  # per sim and input: cdf [N], pv [N], sparsity [N]
    with Progress(console=console, disable=not progress) as bar:
        task = bar.add_task("tune", total=len(sims) * len(inputs))
        for sim in sims:
            row = []
            for each, truth in zip(inputs, truths, strict=True):
                row.append(_tune_one(
                    functools.partial(measure, each, truth, np.full(heads, sim, np.float32)),
                    heads, *bounds, cdf_tolerance, None if pv_l1 is None else pv_tolerance,
                ))  # fmt: skip
                bar.advance(task)
            points.append(row)
            if max(sparsity.max() for *_, sparsity in row) < min_sparsity:
                break  # a higher threshold computes even more
        bar.update(task, completed=len(sims) * len(inputs))
    found = _choose(points, sims, inputs, truths, measure, min_sparsity)
    if pv_l1 is None:
        found = found._replace(thresholds=found.thresholds._replace(pvthreshd=None))
    return found


def _tune_one(measure: Callable, heads: int, l1, pv_l1, cdf_tolerance, pv_tolerance):
    """cdf, pv and sparsity ``[N]`` of one input at one self-similarity threshold."""
    pv = np.full(heads, NO_PV_SKIP, np.float32)
    cdf = _bisect(lambda cdf: measure(cdf, pv)[0] < l1, heads, 1.0, 0.1, cdf_tolerance)
    if pv_tolerance is not None:
        pv = _bisect(lambda pv: measure(cdf, pv)[0] < pv_l1, heads, NO_PV_SKIP, 20.0, pv_tolerance)
    error, sparsity = (np.asarray(x) for x in measure(cdf, pv))
    # A head that misses the bound even with everything kept gains nothing from this threshold.
    return cdf, pv, np.where(error < pv_l1, sparsity, 0.0)


def _bisect(good: Callable, heads: int, top: float, first: float, tolerance: float) -> np.ndarray:
    """The smallest value in ``[0, top]``, up to the tolerance, that is good; ``top`` if none is."""
    low, high = np.zeros(heads, np.float32), np.full(heads, top, np.float32)
    middle = np.full(heads, first, np.float32)
    while (high - low).max() > tolerance:
        fine = np.asarray(good(middle))
        low, high = np.where(fine, low, middle), np.where(fine, middle, high)
        middle = (low + high) / 2
    return high.astype(np.float32)


def _choose(points, sims, inputs, truths, measure, min_sparsity: float) -> TuneResult:
    """The best group of each head, measured once more on every input."""
    sparsity = np.stack([[point[2] for point in row] for row in points])  # [sims, inputs, N]
    best = sparsity.sum(1).argmax(0)  # [N]
    head = np.arange(len(best))
    dense = sparsity.mean(1)[best, head] <= min_sparsity
    largest = [np.stack([np.max([point[i] for point in row], 0) for row in points]) for i in (0, 1)]
    cdf, pv = (np.where(dense, top, values[best, head])
               for top, values in zip((1.0, NO_PV_SKIP), largest, strict=True))  # fmt: skip
    sim = np.where(dense, 1.0, np.asarray(sims)[best])
    sim, cdf, pv = (x.astype(np.float32) for x in (sim, cdf, pv))
    found = [measure(each, truth, sim, cdf, pv) for each, truth in zip(inputs, truths, strict=True)]
    error, skipped = (
        np.stack([np.asarray(x) for x in column]) for column in zip(*found, strict=True)
    )
    arrays = (jnp.asarray(x) for x in (sim, cdf))
    thresholds = SpargeThresholds(*arrays, pvthreshd=jnp.asarray(pv))
    return TuneResult(thresholds, error.max(0), skipped.mean(0), dense)
