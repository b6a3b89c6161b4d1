"""Inception Score (Salimans et al. 2016) of given class probabilities."""

from __future__ import annotations

import numpy as np

SPLIT = 5000
"""Images of a split, as in ADM's evaluator."""


def inception_score(probabilities: np.ndarray, *, split: int = SPLIT) -> float:
    """Return exp(mean KL(p(y|x) || p(y))), averaged over consecutive splits.

    Each split has its own p(y): images must come in random class order.

    Args:
        probabilities: (N, classes), each row summing to 1.
        split: images of a split; the last may have fewer.

    Raises:
        ValueError: there are no images, or ``split`` is not positive.
    """
    if probabilities.ndim != 2 or len(probabilities) == 0:
        raise ValueError(f"probabilities of shape {probabilities.shape}, expected (N, classes)")
    if split < 1:
        raise ValueError(f"split is {split}, expected at least 1")
    scores = []
    for first in range(0, len(probabilities), split):
        part = probabilities[first : first + split].astype(np.float64)
        marginal = part.mean(0, keepdims=True)
        # Impossible classes (p = 0) add nothing.
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(marginal)), 0.0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))
