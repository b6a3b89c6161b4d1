"""Kernel distance (KID, Binkowski et al. 2018) of given features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy over subsets."""

    mean: float
    """Unbiased, so it can be a little below zero."""
    std: float
    """Spread over the subsets."""


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Return the distance under the kernel (x . y / D + 1)^3: the mean over random subsets.

    Args:
        a: features (N, D).
        b: features (M, D).
        subsets: number of subsets.
        subset_size: features of a subset, without repetition; limited to the smaller side.
        seed: of the subsets.

    Raises:
        ValueError: the widths differ, or a side has fewer than two features.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {a.shape} and {b.shape} cannot be compared")
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{size} features are too few, expected at least 2")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[rng.choice(len(b), size, replace=False)].astype(np.float64)
        inside = _without_diagonal(_kernel(x, x)) + _without_diagonal(_kernel(y, y))
        values.append(inside / (size * (size - 1)) - 2.0 * _kernel(x, y).mean())
    return KernelDistance(mean=float(np.mean(values)), std=float(np.std(values)))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    result: np.ndarray = (a @ b.T / a.shape[1] + 1.0) ** 3
    return result


def _without_diagonal(matrix: np.ndarray) -> float:
    return float(matrix.sum() - np.trace(matrix))
