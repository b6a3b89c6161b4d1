"""Frechet distance between two Gaussians: FID and sFID of given features."""

from __future__ import annotations

import numpy as np

from llamagen.evaluation.metrics.statistics import FeatureStatistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), with covariances A and B.

    The trace of (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): both roots are
    symmetric, so nothing becomes complex, and covariances without full rank (fewer images than
    features) need no offset.

    Raises:
        ValueError: the features have different widths, or one side has fewer than two.
    """
    if a.width != b.width:
        raise ValueError(f"features of widths {a.width} and {b.width} cannot be compared")
    covariance_a, covariance_b = a.covariance, b.covariance
    product = _root(covariance_a) @ _root(covariance_b)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross
    # Rounding can give less than zero where both are the same.
    return max(0.0, float(distance))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    result: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return result
