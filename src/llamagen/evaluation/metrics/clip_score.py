"""CLIP score (Hessel et al. 2021) of given features."""

from __future__ import annotations

import numpy as np


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return 100 times the cosine of each image's feature to its caption's, negative ones as 0.

    Args:
        images: (N, D), of any length.
        texts: (N, D), of any length.

    Returns:
        (N,) float64, from 0 to 100; papers give the mean, sometimes divided by 100.
    """
    if images.shape != texts.shape:
        raise ValueError(f"features of shapes {images.shape} and {texts.shape} do not fit")
    a, b = (x.astype(np.float64) for x in (images, texts))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / np.maximum(norms, 1e-12)
    result: np.ndarray = 100.0 * np.maximum(cosines, 0.0)
    return result
