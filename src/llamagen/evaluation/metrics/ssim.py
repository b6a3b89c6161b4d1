"""Structural similarity (Wang et al. 2004)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7
"""Side of the averaging window, as in scikit-image."""


def ssim(a: np.ndarray, b: np.ndarray, *, data_range: float = 255.0) -> np.ndarray:
    """Return the mean structural similarity of each pair of images, averaged over channels.

    With a uniform 7x7 window and sample covariances, as in scikit-image and the published code.
    That code used a data range of 2 for images in [0, 1], which makes its results too high:
    ``data_range=2`` on images in [0, 1] reproduces them, the true range is right.

    Args:
        a: (N, H, W, C), of any number type, H and W at least 7.
        b: the same shape.
        data_range: distance from the smallest to the largest possible value; 255 for bytes.

    Returns:
        (N,) float64, at most 1.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {a.shape} and {b.shape} cannot be compared")
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"images of {a.shape[2]}x{a.shape[1]} are smaller than the 7x7 window")
    x, y = (torch.from_numpy(i.astype(np.float64)).movedim(-1, 1) for i in (a, b))
    mean_x, mean_y = _mean(x), _mean(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_x = unbiased * (_mean(x * x) - mean_x**2)
    var_y = unbiased * (_mean(y * y) - mean_y**2)
    covariance = unbiased * (_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    result: np.ndarray = similarity.mean(dim=(1, 2, 3)).numpy()
    return result


def _mean(x: Tensor) -> Tensor:
    """Mean over each window inside the image."""
    return F.avg_pool2d(x, WINDOW, stride=1)
