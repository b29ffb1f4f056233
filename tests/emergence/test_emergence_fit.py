"""Power-law fits: exact data, the theory's exponents, intervals, censoring."""

import numpy as np
import pytest

from experiments.emergence import theory
from experiments.emergence.fit import fit_power_law


def grid(T, d, B=(1,), p=(0.0,), flow="reduced"):
    rows = [(t, k, b, q) for t in T for k in d for b in B for q in p]
    y = [theory.plateau_time(t, k, B=b, p=q, flow=flow) for t, k, b, q in rows]
    return np.array(rows).T, np.array(y)


def test_exact_law_and_prediction():
    rng = np.random.default_rng(0)
    T, d = rng.uniform(1, 9, (2, 12))
    law = fit_power_law(0.7 * T**1.5 * d**-0.25, T=T, d=d)
    assert law.exponents == pytest.approx({"T": 1.5, "d": -0.25})
    assert law.constant == pytest.approx(0.7) and law.r2 == pytest.approx(1.0)
    assert law.predict(T=4.0, d=16.0) == pytest.approx(0.7 * 8 / 2)


def test_toy_exponents_of_length_and_dimension():
    (T, d, _, _), y = grid((256, 512, 1024, 2048, 4096), (16, 32, 64, 128, 256))
    law = fit_power_law(y, T=T, d=d)
    assert law.exponents["T"] == pytest.approx(0.990, abs=0.002)
    assert law.exponents["d"] == pytest.approx(0.492, abs=0.002)
    assert law.constant == pytest.approx(1.440, rel=0.01) and law.r2 > 0.9999


@pytest.mark.parametrize("flow, exponent", [("reduced", -0.998), ("full", -0.500)])
def test_toy_exponent_of_in_context_repetition(flow, exponent):
    (_, _, B, _), y = grid((4096,), (64,), B=(1, 2, 4, 8, 16), flow=flow)
    law = fit_power_law(y, B=B)
    assert law.exponents["B"] == pytest.approx(exponent, abs=0.002)


def test_toy_exponent_of_cross_sample_repetition():
    (T, d, _, p), y = grid((4096,), (16, 32, 64, 128, 256), p=(0.0, 0.1, 0.2, 0.4))
    X = [theory.repetition_scale(int(a), int(b), c) for a, b, c in zip(T, d, p, strict=True)]
    law = fit_power_law(y, X=X)
    assert law.exponents["X"] == pytest.approx(1.008, abs=0.003)
    assert law.constant == pytest.approx(1.143, rel=0.02) and law.r2 == pytest.approx(
        0.9963, abs=1e-3
    )


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    x = np.tile([1.0, 2.0, 4.0, 8.0], 3)
    covered = 0
    for _ in range(300):
        law = fit_power_law(2 * x**0.8 * np.exp(rng.normal(0, 0.2, x.size)), x=x, confidence=0.8)
        low, high = law.intervals["x"]
        covered += low <= 0.8 <= high
    assert 0.72 <= covered / 300 <= 0.88


def test_censored_runs_unbend_the_exponent():
    """Cutting long runs flattens the law; telling the fit that they were cut restores it."""
    rng = np.random.default_rng(2)
    x = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], 8)
    y = 10 * x * np.exp(rng.normal(0, 0.3, x.size))
    cut = y > 90
    seen = np.minimum(y, 90)
    assert 6 <= cut.sum() <= 16
    naive = fit_power_law(seen[~cut], x=x[~cut])
    told = fit_power_law(seen, censored=cut, x=x)
    assert told.num_censored == cut.sum()
    assert abs(told.exponents["x"] - 1) < 0.06 < abs(naive.exponents["x"] - 1)
    assert told.intervals["x"][0] < 1 < told.intervals["x"][1]


def test_as_dict_is_json():
    import json

    law = fit_power_law([1.0, 2.1, 3.9, 8.2], x=[1.0, 2.0, 4.0, 8.0])
    assert json.loads(json.dumps(law.as_dict()))["num_points"] == 4
    assert "x^" in str(law)


@pytest.mark.parametrize(
    "y, features, message",
    [
        ([1, 2, 3, 4], {}, "no feature given"),
        ([1, 2, 3, 4], {"x": [1, 2, 3]}, "x has 3 entries; y has 4"),
        ([1, 2, 3, -4], {"x": [1, 2, 3, 4]}, "y must be one axis of finite numbers above 0"),
        ([1, 2, 3, 4], {"x": [2, 2, 2, 2]}, "do not vary independently"),
        ([1, 2], {"x": [1, 2]}, "2 uncensored points; 3 are needed"),
        ([1, 2, 3, 4], {"x": [1, 2, 3, 4], "confidence": 1.0}, "confidence must lie in"),
        ([1, 2, 3, 4], {"x": [1, 2, 3, 4], "censored": [True]}, "censored has 1 entries"),
    ],
)
def test_bad_arguments(y, features, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(y, **features)
