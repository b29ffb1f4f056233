"""Fréchet distance on raw pixels, nearest-neighbour agreement, out-of-range share."""

import numpy as np


def _flat(x) -> np.ndarray:
    # Guidance can blow samples up: what is not finite counts as the bound it left through.
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    return np.clip(np.nan_to_num(flat, nan=1.0, posinf=1.0, neginf=-1.0), -1, 1)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """``‖m_x − m_y‖² + tr(C_x + C_y − 2(C_x C_y)^½)`` of clipped raw values, C + 1e-4·I."""
    means, covariances = [], []
    for values in (x, y):
        flat = _flat(values)
        means.append(flat.mean(0))
        covariances.append(np.cov(flat, rowvar=False) + 1e-4 * np.eye(flat.shape[1]))
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = np.trace(covariances[0]) + np.trace(covariances[1])
    gap = float(((means[0] - means[1]) ** 2).sum())
    return gap + float(trace - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def knn_agreement(samples, labels, train, train_labels, neighbours: int = 3) -> float:
    """Share of samples whose nearest training images mostly carry the label asked for."""
    a, b = _flat(samples), _flat(train)
    distance = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    near = np.asarray(train_labels)[np.argsort(distance, 1)[:, :neighbours]]
    votes = np.stack([np.bincount(row, minlength=int(np.max(train_labels)) + 1) for row in near])
    return float((votes.argmax(1) == np.asarray(labels)).mean())


def out_of_range(samples, limit: float = 3.0) -> float:
    """Share of samples with any value beyond ±limit, or not finite."""
    flat = np.asarray(samples).reshape(len(samples), -1)
    return float((~(np.abs(flat) <= limit)).any(1).mean())
