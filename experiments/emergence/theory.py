"""Gradient flow of the one-layer toy model: exact reductions, plateau times and closed forms.

The model reads ``y = W Σ_t softmax(a)_t x_t`` and must learn ``y* = W* x_T`` (tasks.py). Starting
from zero, the whole population flow lives in four numbers: the weights' component on the first
column of ``W*`` (the direction that cross-sample repetition favours) and on the others, and the
attention score of a relevant and of an irrelevant position. Two flows are offered:

* ``"full"``: gradient flow of the parameters as they are, one score for each position;
* ``"reduced"``: the paper's reduction to the single score difference ``Δa`` (App. A.3). It equals
  the full flow for one relevant position up to O(1/T), but for ``B > 1`` it adds up the gradients
  of all B relevant scores, so the plateau shrinks like ``1/B`` and not like ``1/√B``.

Time is gradient-flow time: optimiser steps times learning rate of plain gradient descent.

Reference: Zucchet et al., "The emergence of sparse attention", NeurIPS 2025, arXiv 2505.17863,
section 2 and appendix A.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.integrate import solve_ivp

Flow = Literal["reduced", "full"]

INITIAL_LOSS = 0.5
BLOWUP_CONSTANT = math.sqrt(math.pi / 2)  # ∫₀^∞ exp(−w²/2) dw
# Relative tolerance of the solver: plateau times agree with rtol=1e-11 to better than 1e-6.
_RTOL, _ATOL = 1e-9, 1e-12
# The flow is followed to this many blow-up times before a plateau counts as endless.
_HORIZON = 50.0


@dataclass(frozen=True)
class Trajectory:
    """State of the flow at the requested times; every field is float64 ``[num_times]``.

    Attributes:
        time: Flow time.
        weight: ``W·W*/‖W*‖_F``, the weights' projection on the target; its optimum is near √d.
        weight_repeated: Weight on the first column of ``W*`` (w̃ of App. A.4).
        weight_other: Weight on the other columns together (w of App. A.4).
        delta_a: Score of a relevant position minus that of an irrelevant one.
        attention: Attention on each of the B relevant positions.
        loss: Population loss on data without cross-sample repetition (p = 0, same B).
        train_loss: Population loss on the training distribution.
    """

    time: np.ndarray
    weight: np.ndarray
    weight_repeated: np.ndarray
    weight_other: np.ndarray
    delta_a: np.ndarray
    attention: np.ndarray
    loss: np.ndarray
    train_loss: np.ndarray


def _check(T: int, d: int, B: int, p: float, flow: str) -> None:
    """Reject sizes for which the task is not defined."""
    for name, value in (("T", T), ("d", d), ("B", B)):
        if isinstance(value, bool) or int(value) != value:
            raise ValueError(f"{name} must be a whole number; got {value!r}")
    if T < 2:
        raise ValueError(f"T must be at least 2 (one relevant, one irrelevant position); got {T}")
    if d < 1:
        raise ValueError(f"d must be at least 1; got {d}")
    if not 1 <= B < T:
        raise ValueError(f"B must lie in 1..T-1 = 1..{T - 1}; got {B}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1]; got {p}")
    if flow not in ("reduced", "full"):
        raise ValueError(f"flow must be 'reduced' or 'full'; got {flow!r}")


def _attention(delta_a, T: int, B: int):
    """Attention on one relevant and one irrelevant position, for a score difference Δa."""
    alpha = 1.0 / ((T - B) * np.exp(-delta_a) + B)
    return alpha, (1.0 - B * alpha) / (T - B)


def _variances(d: int, p: float) -> tuple[float, float]:
    """Second moment of the relevant vector along e_1 and along every other direction."""
    return p + (1.0 - p) / d, (1.0 - p) / d


def population_loss(weight_repeated, weight_other, delta_a, T: int, d: int, *, B: int = 1, p=0.0):
    """Exact expected loss of the aligned toy model.

    ``L = ½ [ n (w̃² + w²) + σ̃ (s w̃ − 1)² + σ (s w − √(d−1))² ]`` with ``s = Bα`` the attention on
    relevant positions, ``n = (T−B) α_i² / d`` the variance let through by the irrelevant ones.

    Args:
        weight_repeated: w̃, float or array.
        weight_other: w, float or array of the same shape.
        delta_a: Relevant minus irrelevant score, float or array of the same shape.
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        B: Number of positions that hold the relevant token, in 1..T−1.
        p: Probability of the repeated vector in the evaluated data, in [0, 1].

    Returns:
        The loss, float64 of the arguments' shape; 0.5 at the start.

    >>> float(population_loss(0.0, 0.0, 0.0, T=64, d=16))
    0.5

    Reference: appendix A.2 and A.4.
    """
    alpha, alpha_i = _attention(delta_a, T, B)
    repeated, other = _variances(d, p)
    s = B * alpha
    noise = (T - B) * alpha_i**2 / d
    return 0.5 * (
        noise * (weight_repeated**2 + weight_other**2)
        + repeated * (s * weight_repeated - 1.0) ** 2
        + other * (s * weight_other - math.sqrt(d - 1)) ** 2
    )


def _velocity(T: int, d: int, B: int, p: float, flow: Flow) -> Callable:
    """Right-hand side of the flow for the state (w̃, w, a_relevant, a_irrelevant)."""
    repeated, other = _variances(d, p)
    target = math.sqrt(d - 1)

    def velocity(_, state):
        w_rep, w_oth, a_rel, a_irr = state
        alpha, alpha_i = _attention(a_rel - a_irr, T, B)
        s = B * alpha
        noise = (T - B) * alpha_i**2 / d
        error_rep = repeated * (s * w_rep - 1.0)
        error_oth = other * (s * w_oth - target)
        # Derivatives of the loss by the attention given to one position.
        g_rel = w_rep * error_rep + w_oth * error_oth
        g_irr = alpha_i * (w_rep**2 + w_oth**2) / d
        g_mean = s * g_rel + (T - B) * alpha_i * g_irr
        if flow == "full":
            da_rel, da_irr = -alpha * (g_rel - g_mean), -alpha_i * (g_irr - g_mean)
        else:
            # One scalar moves all B scores, so it collects B gradients; a_irr stays put.
            da_rel, da_irr = -s * (g_rel - g_mean), 0.0
        return (-noise * w_rep - s * error_rep, -noise * w_oth - s * error_oth, da_rel, da_irr)

    return velocity


def plateau_time(
    T: int,
    d: int,
    *,
    B: int = 1,
    p: float = 0.0,
    threshold: float = 0.1,
    flow: Flow = "reduced",
) -> float:
    """Flow time at which the test loss first falls below ``threshold``.

    The flow is trained with cross-sample repetition ``p`` and tested without it; in-context
    repetition ``B`` is the same in both, as in the paper's Fig. 2.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        B: Copies of the relevant token in a sequence, in 1..T−1.
        p: Share of the samples whose relevant token is the one repeated vector, in [0, 1].
        threshold: Loss that ends the plateau, in (0, 0.5); the loss starts at 0.5.
        flow: ``"reduced"`` (the paper's scalar Δa) or ``"full"`` (one score a position).

    Returns:
        Time in units of steps × learning rate. ``math.inf`` if the loss has not crossed after 50
        blow-up times, as for ``p = 1``, which shows the model only one vector.

    Raises:
        ValueError: If an argument is out of its range.

    >>> round(plateau_time(64, 16), 1)
    360.4
    >>> round(plateau_time(256, 64, B=4, flow="full"), 1)
    1386.5

    Reference: sections 2.2 and 2.3, appendix A.3, A.4, D.1.
    """
    _check(T, d, B, p, flow)
    if not 0.0 < threshold < INITIAL_LOSS:
        raise ValueError(f"threshold must lie in (0, {INITIAL_LOSS}); got {threshold}")

    def crossing(_, state):
        return population_loss(state[0], state[1], state[2] - state[3], T, d, B=B) - threshold

    crossing.terminal, crossing.direction = True, -1
    solution = solve_ivp(
        _velocity(T, d, B, p, flow),
        (0.0, _HORIZON * (plateau_blowup(T, d, B=B, p=p, flow=flow) + T + d)),
        np.zeros(4),
        method="LSODA",
        rtol=_RTOL,
        atol=_ATOL,
        events=crossing,
    )
    if not solution.success:
        raise RuntimeError(f"the solver failed at {T=}, {d=}, {B=}, {p=}: {solution.message}")
    return float(solution.t_events[0][0]) if solution.t_events[0].size else math.inf


def trajectory(
    T: int, d: int, times: Sequence[float], *, B: int = 1, p: float = 0.0, flow: Flow = "reduced"
) -> Trajectory:
    """Follow the flow from zero and report its state at the given times.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        times: Increasing flow times, the first at least 0.
        B: Copies of the relevant token in a sequence, in 1..T−1.
        p: Cross-sample repetition of the training data, in [0, 1].
        flow: ``"reduced"`` or ``"full"``.

    Returns:
        A :class:`Trajectory`.

    Raises:
        ValueError: If an argument is out of its range or ``times`` does not increase.

    >>> state = trajectory(512, 64, [1000.0, 5200.0])
    >>> state.weight.round(3), state.attention.round(4)
    (array([0.243, 2.427]), array([0.002 , 0.0395]))

    Reference: Fig. 1 and appendix A.3.
    """
    _check(T, d, B, p, flow)
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or times.size == 0 or times[0] < 0 or np.any(np.diff(times) <= 0):
        raise ValueError(f"times must be a list of increasing numbers from 0 on; got {times}")
    solution = solve_ivp(
        _velocity(T, d, B, p, flow),
        (0.0, max(times[-1], 1e-9)),
        np.zeros(4),
        method="LSODA",
        rtol=_RTOL,
        atol=_ATOL,
        t_eval=times,
    )
    if not solution.success:
        raise RuntimeError(f"the solver failed at {T=}, {d=}, {B=}, {p=}: {solution.message}")
    repeated, other, a_rel, a_irr = solution.y
    delta_a = a_rel - a_irr
    return Trajectory(
        time=times,
        weight=(repeated + math.sqrt(d - 1) * other) / math.sqrt(d),
        weight_repeated=repeated,
        weight_other=other,
        delta_a=delta_a,
        attention=_attention(delta_a, T, B)[0],
        loss=population_loss(repeated, other, delta_a, T, d, B=B),
        train_loss=population_loss(repeated, other, delta_a, T, d, B=B, p=p),
    )


def growth_rate(T: int, d: int, *, B: int = 1, p: float = 0.0, flow: Flow = "reduced") -> float:
    """Rate λ at which weights and attention grow together near the origin.

    ``λ = B κ / T`` in the reduced flow, ``√B κ / T`` in the full one, with
    ``κ² = (p + (1−p)/d)² + (d−1) ((1−p)/d)²``; ``κ = 1/√d`` without cross-sample repetition.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        B: Copies of the relevant token in a sequence, in 1..T−1.
        p: Cross-sample repetition of the training data, in [0, 1].
        flow: ``"reduced"`` or ``"full"``.

    Returns:
        λ per unit of flow time, to leading order in 1/T.

    Raises:
        ValueError: If an argument is out of its range.

    >>> growth_rate(512, 64, B=4) == 4 / (8 * 512)
    True

    Reference: Eq. 5, 6 and appendix A.3.2, A.4.2.
    """
    _check(T, d, B, p, flow)
    repeated, other = _variances(d, p)
    kappa = math.hypot(repeated, math.sqrt(d - 1) * other)
    return (B if flow == "reduced" else math.sqrt(B)) * kappa / T


def linearised(
    T: int, d: int, times: Sequence[float], *, B: int = 1, flow: Flow = "reduced"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solution of the flow linearised at the origin, without cross-sample repetition.

    ``w = sinh λt``, ``Δa = cosh λt − 1``, ``L = ½ (1 − λ sinh 2λt)`` for the reduced flow; the full
    flow has ``w = √B sinh λt`` with its own λ.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        times: Flow times.
        B: Copies of the relevant token in a sequence, in 1..T−1.
        flow: ``"reduced"`` or ``"full"``.

    Returns:
        Arrays (w, Δa, L), each as long as ``times``. Good while ``λt`` is below about 1; the real
        plateau ends 3 to 4 times earlier than this solution, which misses the speed-up by Δa.

    Raises:
        ValueError: If an argument is out of its range.

    >>> w, delta_a, loss = linearised(512, 64, [500.0])
    >>> round(float(w[0]), 3), round(float(loss[0]), 5)
    (0.122, 0.49997)

    Reference: Eq. 5 and appendix A.3.2.
    """
    rate = growth_rate(T, d, B=B, flow=flow)
    phase = rate * np.asarray(times, np.float64)
    gain = 1.0 if flow == "reduced" else math.sqrt(B)
    w = gain * np.sinh(phase)
    delta_a = np.cosh(phase) - 1.0
    # Loss to second order: ½ − s w/√d with s = B (1 + Δa)/T, and B/(√d T) = λ·gain of the flow.
    return w, delta_a, 0.5 - rate * gain * w * (1.0 + delta_a)


def escape_time(T: int, d: int, epsilon: float, *, B: int = 1, flow: Flow = "reduced") -> float:
    """Time at which the *linearised* loss has dropped by the share ``epsilon``.

    ``T_ε = arcsinh(ε/λ) / 2λ``, close to ``(√d T / 2B) ln(2 ε √d T / B)`` in the reduced flow. It
    overshoots the real plateau by 3 to 4 times at ε = 0.8; use :func:`plateau_blowup` to predict.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        epsilon: Relative drop of the loss, in (0, 1).
        B: Copies of the relevant token in a sequence, in 1..T−1.
        flow: ``"reduced"`` or ``"full"``.

    Returns:
        Flow time.

    Raises:
        ValueError: If an argument is out of its range.

    >>> round(escape_time(512, 64, 0.8))
    17997

    Reference: Eq. 6 and appendix A.3.2 (the appendix's factor 2 inside the logarithm is right).
    """
    if not 0.0 < epsilon < 1.0:
        raise ValueError(f"epsilon must lie in (0, 1); got {epsilon}")
    rate = growth_rate(T, d, B=B, flow=flow)
    return math.asinh(epsilon / rate) / (2 * rate)


def plateau_blowup(T: int, d: int, *, B: int = 1, p: float = 0.0, flow: Flow = "reduced") -> float:
    """Leading-order length of the plateau: the finite time at which the early flow diverges.

    While attention is still spread out, ``dw/dτ = e^{Δa}`` and ``Δa = w²/2``, so ``w`` reaches
    infinity at ``τ = ∫₀^∞ e^{−w²/2} dw = √(π/2)``. In flow time that is ``√(π/2) / λ`` with λ of
    :func:`growth_rate`: ``1.2533 √d T / B`` for the reduced and ``1.2533 √d T / √B`` for the full
    flow, without a logarithm, and shorter by ``√(p²d + (1−p)²)`` under cross-sample repetition.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        B: Copies of the relevant token in a sequence, in 1..T−1.
        p: Cross-sample repetition of the training data, in [0, 1].
        flow: ``"reduced"`` or ``"full"``.

    Returns:
        Flow time, within 5 % of :func:`plateau_time` once T and d are large.

    Raises:
        ValueError: If an argument is out of its range.

    >>> round(plateau_blowup(4096, 64))
    41069

    Our derivation; the scaling is that of section 2.2 and appendix A.4.
    """
    return BLOWUP_CONSTANT / growth_rate(T, d, B=B, p=p, flow=flow)


def plateau_three_term(T: int, d: int) -> float:
    """Plateau length with its finite-size terms, for one relevant token and threshold 0.1.

    ``1.25331 √d T + 0.253 T + 0.916 d``: the first term is derived, the other two are fitted.

    Args:
        T: Sequence length in tokens, at least 2; fitted on 128..4096.
        d: Dimension of a token, at least 1; fitted on 16..512.

    Returns:
        Flow time, within 1.5 % of :func:`plateau_time` on the fitted range.

    Raises:
        ValueError: If an argument is out of its range.

    >>> round(plateau_three_term(512, 64))
    5322
    """
    _check(T, d, 1, 0.0, "reduced")
    return BLOWUP_CONSTANT * math.sqrt(d) * T + 0.253 * T + 0.916 * d


def repetition_scale(T: int, d: int, p: float) -> float:
    """The paper's scaling variable ``X = √d T / √(p²d + (1−p)²)`` for cross-sample repetition.

    Args:
        T: Sequence length in tokens, at least 2.
        d: Dimension of a token, at least 1.
        p: Cross-sample repetition of the training data, in [0, 1].

    Returns:
        X, in flow time.

    Raises:
        ValueError: If an argument is out of its range.

    >>> repetition_scale(512, 64, 0.0)
    4096.0

    Reference: section 2.3, Fig. 2 right.
    """
    _check(T, d, 1, p, "reduced")
    return math.sqrt(d) * T / math.sqrt(p**2 * d + (1 - p) ** 2)
