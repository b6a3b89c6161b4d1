"""Mean and covariance of features that arrive in parts, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

_BLOCK = 4096
"""Rows at once: their copy in float64 is all the memory needed."""


class FeatureStatistics:
    """Count, mean and covariance of a set of features, in float64.

    Parts may be added in any order and by several processes, whose statistics are merged: the
    result is that of all rows at once, up to rounding (Chan, Golub and LeVeque 1979).
    """

    def __init__(self, width: int) -> None:
        """Of no features yet, which have ``width`` numbers each."""
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))
        """Sum of the outer products of the deviations from the mean."""

    @classmethod
    def of(cls, features: np.ndarray) -> Self:
        """Return the statistics of features (N, D)."""
        return cls(_checked(features).shape[1]).update(features)

    @classmethod
    def from_moments(cls, mean: np.ndarray, covariance: np.ndarray, count: int) -> Self:
        """Return statistics of known mean (D,) and covariance (D, D; divided by count - 1).

        Raises:
            ValueError: the shapes do not fit together, or there are fewer than two features.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mean {mean.shape} and covariance {covariance.shape} do not fit")
        if count < 2:
            raise ValueError(f"the covariance of {count} features is not defined")
        made = cls(len(mean))
        made.count = count
        made.mean = mean.astype(np.float64)
        made._scatter = covariance.astype(np.float64) * (count - 1)
        return made

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), divided by count - 1.

        Raises:
            ValueError: there are fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} features is not defined")
        result: np.ndarray = self._scatter / (self.count - 1)
        return result

    def update(self, features: np.ndarray) -> Self:
        """Add features (N, D) of any float type; return itself.

        Raises:
            ValueError: they have another width, or hold NaN or infinity.
        """
        if _checked(features).shape[1] != self.width:
            raise ValueError(f"features of width {features.shape[1]}, expected {self.width}")
        for first in range(0, len(features), _BLOCK):
            rows = features[first : first + _BLOCK].astype(np.float64)
            if not np.isfinite(rows).all():
                raise ValueError("features hold NaN or infinity")
            mean = rows.mean(0)
            rows -= mean
            self._add(len(rows), mean, rows.T @ rows)
        return self

    def merge(self, other: FeatureStatistics) -> Self:
        """Add the features of another; return itself.

        Raises:
            ValueError: its features have another width.
        """
        if other.width != self.width:
            raise ValueError(f"features of width {other.width}, expected {self.width}")
        self._add(other.count, other.mean, other._scatter)
        return self

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self._scatter += scatter
        self._scatter += np.outer(difference, difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Return arrays that ``from_state`` restores exactly."""
        return {"count": self.count, "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore the result of ``state_dict``."""
        made = cls(len(state["mean"]))
        made.count = int(state["count"])
        made.mean, made._scatter = np.array(state["mean"]), np.array(state["scatter"])
        return made


def _checked(features: np.ndarray) -> np.ndarray:
    if features.ndim != 2:
        raise ValueError(f"features of shape {features.shape}, expected (N, D)")
    return features
