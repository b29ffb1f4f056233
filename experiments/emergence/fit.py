"""Power laws fitted in log space, with confidence intervals and censored runs.

Reference: Zucchet et al., arXiv 2505.17863, appendix D.2 (which parameters are free in which
figure); Tobin, "Estimation of relationships for limited dependent variables", 1958, for the
likelihood of censored observations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class PowerLaw:
    """``y = constant · Π feature^exponent``; unpacks as ``constant, exponents, r2``.

    Attributes:
        constant: C > 0.
        exponents: Exponent of each feature.
        r2: Share of the variance of log y explained, over the uncensored points.
        intervals: Confidence interval (low, high) of each exponent.
        constant_interval: Confidence interval of C.
        confidence: Level of the intervals, in (0, 1).
        num_points: Points used, censored ones included.
        num_censored: Points known only to lie above their value.
    """

    constant: float
    exponents: dict[str, float]
    r2: float
    intervals: dict[str, tuple[float, float]]
    constant_interval: tuple[float, float]
    confidence: float
    num_points: int
    num_censored: int

    def __iter__(self) -> Iterator[Any]:
        """Yield constant, exponents, r2."""
        return iter((self.constant, self.exponents, self.r2))

    def predict(self, **features: Any) -> np.ndarray:
        """Evaluate the law; each feature of the fit must be given, as float or array."""
        if set(features) != set(self.exponents):
            raise ValueError(
                f"features {sorted(features)} given; expected {sorted(self.exponents)}"
            )
        result = np.float64(self.constant)
        for name, exponent in self.exponents.items():
            result = result * np.asarray(features[name], np.float64) ** exponent
        return result

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {
            "constant": self.constant,
            "constant_interval": list(self.constant_interval),
            "exponents": self.exponents,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "r2": self.r2,
            "confidence": self.confidence,
            "num_points": self.num_points,
            "num_censored": self.num_censored,
        }

    def __str__(self) -> str:
        """Write the law with its intervals on one line."""
        terms = " ".join(
            f"· {name}^{value:.3f} [{self.intervals[name][0]:.3f}, {self.intervals[name][1]:.3f}]"
            for name, value in self.exponents.items()
        )
        censored = f", {self.num_censored} censored" if self.num_censored else ""
        return f"{self.constant:.3g} {terms} (R² {self.r2:.4f}, {self.num_points} points{censored})"


def _positive(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError(f"{name} must be one axis of finite numbers above 0; got {values}")
    return values


def fit_power_law(
    y: Sequence[float],
    *,
    censored: Sequence[bool] | None = None,
    confidence: float = 0.95,
    **features: Sequence[float],
) -> PowerLaw:
    """Fit ``log y = log C + Σ exponent · log feature``.

    Without censored points this is ordinary least squares with Student-t intervals. A censored
    point (a run that was stopped before its plateau ended) enters through the probability that its
    true value lies above the recorded one, under normal scatter in log y; the fit is then maximum
    likelihood with intervals from the curvature. Dropping such runs would bend the exponents down,
    because it is the long plateaus that get cut.

    Args:
        y: Positive numbers, ``[n]``.
        censored: ``[n]`` bool, True where the true value is above ``y``; all False by default.
        confidence: Level of the intervals, in (0, 1).
        **features: Positive numbers ``[n]`` by name; the names ``censored`` and ``confidence`` are
            taken.

    Returns:
        A :class:`PowerLaw`.

    Raises:
        ValueError: If lengths differ, a number is not positive, a feature does not vary on its own,
            or fewer uncensored points than parameters + 1 are left.

    >>> x = np.array([1.0, 2.0, 4.0, 8.0])
    >>> constant, exponents, r2 = fit_power_law(3 * x**0.5, x=x)
    >>> round(constant, 6), round(exponents["x"], 6), round(r2, 6)
    (3.0, 0.5, 1.0)
    """
    y = _positive("y", y)
    if not features:
        raise ValueError("no feature given; expected at least one, such as T=[64, 128]")
    names = list(features)
    columns = [_positive(name, features[name]) for name in names]
    for name, column in zip(names, columns, strict=True):
        if column.shape != y.shape:
            raise ValueError(f"{name} has {column.size} entries; y has {y.size}")
    cut = np.zeros(y.shape, bool) if censored is None else np.asarray(censored, bool)
    if cut.shape != y.shape:
        raise ValueError(f"censored has {cut.size} entries; y has {y.size}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1); got {confidence}")

    design = np.stack([np.ones_like(y), *(np.log(column) for column in columns)], axis=1)
    target = np.log(y)
    needed = design.shape[1] + 1
    if np.sum(~cut) < needed:
        raise ValueError(
            f"{np.sum(~cut)} uncensored points; {needed} are needed for {needed - 1} parameters "
            "and an interval"
        )
    if np.linalg.matrix_rank(design[~cut]) < design.shape[1]:
        raise ValueError(f"the features {names} do not vary independently in the uncensored points")

    beta, errors, freedom = _least_squares(design[~cut], target[~cut])
    if cut.any():
        beta, errors = _censored_fit(design, target, cut, beta)
    half = errors * stats.t.ppf(0.5 + confidence / 2, freedom)
    low, high = beta - half, beta + half
    residual = (target - design @ beta)[~cut]
    spread = target[~cut] - target[~cut].mean()
    total = float(spread @ spread)
    return PowerLaw(
        constant=float(np.exp(beta[0])),
        exponents={name: float(value) for name, value in zip(names, beta[1:], strict=True)},
        r2=1.0 - float(residual @ residual) / total if total > 0 else 1.0,
        intervals={
            name: (float(a), float(b)) for name, a, b in zip(names, low[1:], high[1:], strict=True)
        },
        constant_interval=(float(np.exp(low[0])), float(np.exp(high[0]))),
        confidence=confidence,
        num_points=int(y.size),
        num_censored=int(cut.sum()),
    )


def _least_squares(design: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    beta = np.linalg.lstsq(design, target)[0]
    freedom = design.shape[0] - design.shape[1]
    residual = target - design @ beta
    covariance = np.linalg.inv(design.T @ design) * (residual @ residual) / freedom
    return beta, np.sqrt(np.diag(covariance)), freedom


def _censored_fit(
    design: np.ndarray, target: np.ndarray, cut: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum likelihood with normal scatter; parameters (β, log σ), returns β and its errors."""
    residual = target[~cut] - design[~cut] @ start
    # Exact data would put σ at 0 and the likelihood at infinity.
    floor = 1e-4
    first = np.append(start, np.log(max(np.std(residual), floor)))

    def negative(parameters):
        sigma = np.exp(parameters[-1])
        z = (target - design @ parameters[:-1]) / sigma
        seen = stats.norm.logpdf(z[~cut]).sum() - np.sum(~cut) * parameters[-1]
        return -(seen + stats.norm.logsf(z[cut]).sum())

    bounds = [(None, None)] * design.shape[1] + [(np.log(floor), None)]
    found = optimize.minimize(negative, first, method="L-BFGS-B", bounds=bounds).x
    curvature = _hessian(negative, found)[:-1, :-1]
    return found[:-1], np.sqrt(np.diag(np.linalg.pinv(curvature)).clip(0.0))


def _hessian(function, point: np.ndarray) -> np.ndarray:
    """Central second differences; the step suits parameters of order one."""
    step, size = 1e-4, point.size
    result = np.empty((size, size))
    shift = np.eye(size) * step
    for i in range(size):
        for j in range(size):
            result[i, j] = (
                function(point + shift[i] + shift[j])
                - function(point + shift[i] - shift[j])
                - function(point - shift[i] + shift[j])
                + function(point - shift[i] - shift[j])
            ) / (4 * step**2)
    return result
