"""The flows against independently measured values, closed forms and plain gradient descent."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments.emergence import theory

# Plateau of the reduced flow, B = 1, p = 0, threshold 0.1; columns d = 16, 32, 64, 256.
PLATEAUS = {
    64: (360.4, 508.0, 724.1, 1531.1),
    128: (697.1, 977.6, 1381.7, 2831.4),
    256: (1368.8, 1915.0, 2694.8, 5428.8),
    512: (2710.7, 3788.0, 5319.3, 10620.5),
    4096: (21479.1, 29991.3, 42042.0, 83273.7),
}
TRAJECTORY = (  # t, w, Δa, α, L at T = 512, d = 64
    (500, 0.12144, 0.00743, 0.001968, 0.499970),
    (1000, 0.24288, 0.03004, 0.002013, 0.499940),
    (2000, 0.49414, 0.12669, 0.002216, 0.499867),
    (3000, 0.77710, 0.31845, 0.002684, 0.499749),
    (4000, 1.14658, 0.70044, 0.003927, 0.499457),
    (5000, 1.90916, 1.92145, 0.013191, 0.496911),
    (5200, 2.42747, 3.04462, 0.039478, 0.488176),
    (5300, 4.19323, 6.93697, 0.668320, 0.211083),
    (5400, 7.44124, 9.16449, 0.949219, 0.006856),
    (5600, 8.27983, 9.45563, 0.961553, 1.3e-05),
    (8000, 8.31415, 9.47381, 0.962219, 2e-06),
)
BY_B = {  # (T, d, flow) -> plateau at B = 1, 2, 4, 8, 16
    (512, 64, "reduced"): (5319.3, 2666.4, 1360.3, 711.5, 387.3),
    (256, 64, "reduced"): (2694.8, 1367.3, 713.3, 387.8, 224.5),
    (256, 64, "full"): (2689.5, 1918.8, 1386.5, 1018.3, 758.6),
    (4096, 64, "reduced"): (42042.0, 20833.1, 10397.6, 5220.8, 2641.9),
    (4096, 64, "full"): (42036.8, 29575.0, 20871.9, 14782.4, 10521.2),
}
BY_P = {0: 5319.3, 0.05: 4949.0, 0.1: 4185.8, 0.2: 2893.8, 0.4: 1736.9, 0.5: 1487.0}


@pytest.mark.parametrize("T", PLATEAUS)
def test_plateau_table(T):
    got = [theory.plateau_time(T, d) for d in (16, 32, 64, 256)]
    np.testing.assert_allclose(got, PLATEAUS[T], rtol=0.0005)


@pytest.mark.parametrize("T, d, flow", BY_B)
def test_plateau_by_in_context_repetition(T, d, flow):
    got = [theory.plateau_time(T, d, B=B, flow=flow) for B in (1, 2, 4, 8, 16)]
    np.testing.assert_allclose(got, BY_B[T, d, flow], rtol=0.0005)


def test_plateau_by_cross_sample_repetition():
    got = [theory.plateau_time(512, 64, p=p) for p in BY_P]
    np.testing.assert_allclose(got, list(BY_P.values()), rtol=0.0005)


def test_trajectory_table():
    rows = np.array(TRAJECTORY)
    got = theory.trajectory(512, 64, rows[:, 0])
    np.testing.assert_allclose(got.weight, rows[:, 1], rtol=0.001)
    np.testing.assert_allclose(got.delta_a, rows[:, 2], rtol=0.001)
    np.testing.assert_allclose(got.attention, rows[:, 3], rtol=0.001)
    large = rows[:, 4] > 1e-3
    np.testing.assert_allclose(got.loss[large], rows[large, 4], rtol=0.005)
    # Without repetition both losses are one, and the two blocks of weights stay proportional.
    np.testing.assert_array_equal(got.loss, got.train_loss)
    np.testing.assert_allclose(got.weight_other, got.weight_repeated * math.sqrt(63), rtol=1e-5)


def test_weights_overshoot_and_the_transition_is_sharp():
    times = np.linspace(1, 8000, 8000)
    state = theory.trajectory(512, 64, times)
    peak = state.weight.argmax()
    assert state.weight[peak] == pytest.approx(8.3158, rel=1e-3)
    assert times[peak] == pytest.approx(6010, rel=0.01)
    width = theory.plateau_time(512, 64, threshold=0.05) - theory.plateau_time(
        512, 64, threshold=0.45
    )
    assert width == pytest.approx(74, abs=1.0)
    # The weights are well on their way while attention is still diffuse.
    early = np.searchsorted(times, 5000)
    assert state.weight[early] > 1.9 and state.attention[early] < 0.014


@pytest.mark.parametrize("T, d, steps", [(256, 64, 2698), (512, 64, 5323)])
def test_gradient_descent_takes_as_many_steps(T, d, steps):
    """lr = 1 on the reduced loss of section 3.1, written out here once more."""
    w = a = 0.0
    for step in range(2 * steps):  # noqa: B007 (used after the break)
        alpha = 1 / ((T - 1) * math.exp(-a) + 1)
        hit, noise = alpha * w - math.sqrt(d), (1 - alpha) / (d * (T - 1))
        if 0.5 * ((1 - alpha) * noise * w**2 + hit**2 / d) < 0.1:
            break
        dw = -(1 - alpha) * noise * w - alpha * hit / d
        a += alpha * (1 - alpha) * (noise * w**2 - w * hit / d)
        w += dw
    assert step == pytest.approx(steps, abs=2)


@pytest.mark.parametrize("B, p", [(1, 0.0), (3, 0.0), (1, 0.3), (4, 0.25)])
def test_full_flow_is_the_gradient_flow_of_the_real_parameters(B, p):
    """a ∈ R^T and W ∈ R^{d×d} on the population loss of section 2, by numeric gradients of it."""
    T, d = 12, 3
    sigma = np.diag([p + (1 - p) / d, *([(1 - p) / d] * (d - 1))])

    def loss(parameters, sigma):
        score, w = parameters[:T], parameters[T:].reshape(d, d)
        weights = np.exp(score - score.max())
        weights /= weights.sum()
        s = weights[T - B :].sum()
        error = s * w - np.eye(d)
        noise = (weights[: T - B] ** 2).sum() / d * (w**2).sum()
        return 0.5 * (noise + np.trace(error @ sigma @ error.T))

    def velocity(_, parameters):
        step = 1e-5 * np.eye(parameters.size)
        return [-(loss(parameters + h, sigma) - loss(parameters - h, sigma)) / 2e-5 for h in step]

    tested = np.diag([1 / d] * d)

    def crossing(_, parameters):
        return loss(parameters, tested) - 0.1

    crossing.terminal = True
    start = np.zeros(T + d * d)
    found = solve_ivp(velocity, (0, 1000), start, rtol=1e-8, atol=1e-10, events=crossing)
    expected = theory.plateau_time(T, d, B=B, p=p, flow="full")
    assert found.t_events[0][0] == pytest.approx(expected, rel=1e-4)


def test_reduced_and_full_agree_for_one_relevant_token():
    assert theory.plateau_time(4096, 64, flow="full") == pytest.approx(
        theory.plateau_time(4096, 64), rel=5e-4
    )


def test_blowup_law_is_approached():
    ratios = [
        theory.plateau_time(65536, d) / theory.plateau_blowup(65536, d)
        for d in (16, 64, 256, 1024, 4096)
    ]
    np.testing.assert_allclose(ratios, (1.0444, 1.0219, 1.0110, 1.0057, 1.0033), atol=2e-4)
    for T in (4096, 16384):
        for d in (64, 256, 512):
            ratio = theory.plateau_time(T, d) / theory.plateau_blowup(T, d)
            assert 1.0 <= ratio <= 1.03, (T, d, ratio)


def test_three_term_law():
    worst = max(
        abs(theory.plateau_three_term(T, d) / theory.plateau_time(T, d) - 1)
        for T in (128, 256, 512, 1024, 4096)
        for d in (16, 64, 512)
    )
    assert worst <= 0.015


@pytest.mark.parametrize("flow", ["reduced", "full"])
def test_linear_growth_near_the_origin(flow):
    times = [200.0, 1000.0]
    w, delta_a, loss = theory.linearised(4096, 64, times, B=4, flow=flow)
    state = theory.trajectory(4096, 64, times, B=4, flow=flow)
    np.testing.assert_allclose(state.weight, w, rtol=0.005)
    np.testing.assert_allclose(state.delta_a, delta_a, rtol=0.02)
    np.testing.assert_allclose(0.5 - state.loss, 0.5 - loss, rtol=0.03)


def test_escape_time_overshoots():
    assert theory.escape_time(512, 64, 0.8) == pytest.approx(17997, abs=1)
    assert theory.escape_time(512, 64, 0.8) > 3 * theory.plateau_time(512, 64)


def test_growth_rate_under_cross_sample_repetition():
    d, p = 64, 0.3
    paper = math.sqrt(p**2 * d + (1 - p) ** 2) / (math.sqrt(d) * 512)
    assert theory.growth_rate(512, d, p=p) == pytest.approx(paper, rel=0.05)
    assert theory.repetition_scale(512, d, p) == pytest.approx(1 / paper)


def test_endless_plateau_is_infinite():
    assert theory.plateau_time(64, 16, p=1.0) == math.inf


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"T": 1}, "T must be at least 2.*got 1"),
        ({"d": 0}, "d must be at least 1; got 0"),
        ({"d": 2.5}, "d must be a whole number; got 2.5"),
        ({"B": 64}, r"B must lie in 1\.\.T-1 = 1\.\.63; got 64"),
        ({"p": 1.5}, r"p must lie in \[0, 1\]; got 1.5"),
        ({"threshold": 0.5}, r"threshold must lie in \(0, 0.5\); got 0.5"),
        ({"flow": "scalar"}, "flow must be 'reduced' or 'full'; got 'scalar'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        theory.plateau_time(**({"T": 64, "d": 16} | arguments))
