"""Peak signal-to-noise ratio."""

from __future__ import annotations

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray, *, data_range: float = 255.0) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each pair, in dB; infinite where they are equal.

    Args:
        a: (N, H, W, C), of any number type.
        b: the same shape.
        data_range: distance from the smallest to the largest possible value; 255 for bytes.

    Returns:
        (N,) float64.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {a.shape} and {b.shape} cannot be compared")
    squared = np.square(a.astype(np.float64) - b.astype(np.float64))
    error = squared.mean(axis=tuple(range(1, a.ndim)))
    with np.errstate(divide="ignore"):
        result: np.ndarray = 10.0 * np.log10(data_range**2 / error)
    return result
