"""Metrics: pure functions on arrays of features, of pairs of images, and of codes.

Shapes: N, M features of D numbers, or N images.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 7
"""Side of the averaging window, as in scikit-image."""

_UPDATE_ROWS = 4096
"""Rows whose copy in float64 is in memory at once."""
_BLOCK = 2048
"""Rows and columns of the blocks in which distances of all pairs are computed."""


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
        return cls(features.shape[-1]).update(features)

    @classmethod
    def from_moments(cls, mean: np.ndarray, covariance: np.ndarray, count: int) -> Self:
        """Return statistics of known mean (D,) and covariance (D, D; divided by count - 1)."""
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mean {mean.shape} and covariance {covariance.shape} do not fit")
        made = cls(len(mean))
        made.count, made.mean = count, mean.astype(np.float64)
        made._scatter = covariance.astype(np.float64) * (count - 1)
        return made

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), divided by count - 1; ValueError if there are fewer than two features."""
        if self.count < 2:
            raise ValueError(f"the covariance of {self.count} features is not defined")
        return self._scatter / (self.count - 1)

    def update(self, features: np.ndarray) -> Self:
        """Add finite features (N, D) of any float type; return itself."""
        if features.ndim != 2:
            raise ValueError(f"features of shape {features.shape}, expected (N, D)")
        if features.shape[1] != self.width:
            raise ValueError(f"features of width {features.shape[1]}, expected {self.width}")
        for first in range(0, len(features), _UPDATE_ROWS):
            rows = features[first : first + _UPDATE_ROWS].astype(np.float64)
            if not np.isfinite(rows).all():
                raise ValueError("features hold NaN or infinity")
            mean = rows.mean(0)
            rows -= mean
            self._add(len(rows), mean, rows.T @ rows)
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


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), with covariances A and B.

    The trace of (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): both roots are
    symmetric, so nothing becomes complex, and covariances without full rank (fewer images than
    features) need no offset. ValueError if widths differ, or a side has fewer than two features.
    """
    if a.width != b.width:
        raise ValueError(f"features of widths {a.width} and {b.width} cannot be compared")
    covariance_a, covariance_b = a.covariance, b.covariance
    product = _square_root(covariance_a) @ _square_root(covariance_b)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross
    # Rounding can give less than zero where both are the same.
    return max(0.0, float(distance))


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def inception_score(probabilities: np.ndarray, *, split: int = 5000) -> float:
    """Return exp(mean KL(p(y|x) || p(y))), averaged over consecutive splits (Salimans et al. 2016).

    Each split of the rows (N, classes) has its own p(y): images must come in random class order.
    Splits are by default as large as in ADM's evaluator; the last may have fewer images.
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


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the distance (KID, Binkowski et al. 2018) of random subsets of features.

    This is the squared maximum mean discrepancy of features (N, D) and (M, D), with the kernel
    (x . y / D + 1)^3: its mean, which is unbiased and so perhaps a little below zero, and its
    spread over the subsets. They are without repetition, and limited to the smaller side.
    """
    _require_same_shape("features", a, b, 1)
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{size} features are too few, expected at least 2")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        rows = (each[rng.choice(len(each), size, replace=False)] for each in (a, b))
        x, y = (each.astype(np.float64) for each in rows)
        inside = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
        values.append(inside / (size * (size - 1)) - 2.0 * _kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


class PrecisionRecall(NamedTuple):
    """Two shares, each from 0 to 1."""

    precision: float
    """Of the samples, those inside the reference's manifold."""
    recall: float
    """Of the reference, those inside the samples' manifold."""


def precision_recall(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    neighbours: int = 3,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Return how many samples look real, and how much of the reference the samples cover.

    As in Kynkaanniemi et al. 2019: each set of features, (N, D) and (M, D), has a manifold, which
    is a ball around each member as large as the distance to its k-th nearest neighbour in the set.
    Distances are computed on ``device``, in float32 around the reference's mean.
    """
    _require_same_shape("features", samples, reference, 1)
    if (fewest := min(len(samples), len(reference))) <= neighbours:
        raise ValueError(f"{fewest} features have no {neighbours} neighbours each")
    a, b = (each.to(device) for each in _centred(samples, reference))
    return PrecisionRecall(
        precision=_share_inside(a, b, _radii(b, neighbours)),
        recall=_share_inside(b, a, _radii(a, neighbours)),
    )


def nearest(queries: np.ndarray, known: np.ndarray, *, count: int = 1) -> np.ndarray:
    """Return indices (N, count) of the rows of ``known`` (M, D) nearest to ``queries`` (N, D)."""
    a, b = _centred(queries, known)
    distances = (_squared_distances(rows, b) for rows in a.split(_BLOCK))
    return torch.cat([each.topk(count, largest=False).indices for each in distances]).numpy()


def _centred(a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both in float32 around the mean of ``b``, where squared distances lose fewer digits."""
    center = b.mean(0, dtype=np.float64)
    a, b = ((each - center).astype(np.float32) for each in (a, b))
    return torch.from_numpy(a), torch.from_numpy(b)


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each member to its k-th nearest neighbour (N,)."""
    found = []
    for rows in features.split(_BLOCK):
        best = rows.new_empty(len(rows), 0)
        for others in features.split(_BLOCK):
            distances = torch.cat([best, _squared_distances(rows, others)], dim=1)
            # One more: a member is its own nearest neighbour.
            best = distances.topk(min(neighbours + 1, distances.shape[1]), largest=False).values
        found.append(best.amax(1))
    return torch.cat(found)


def _share_inside(queries: Tensor, members: Tensor, radii: Tensor) -> float:
    """Share of the queries that lie in the ball of any member."""
    inside = 0
    for rows in queries.split(_BLOCK):
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for others, limits in zip(members.split(_BLOCK), radii.split(_BLOCK), strict=True):
            found |= (_squared_distances(rows, others) <= limits).any(1)
        inside += int(found.sum())
    return inside / len(queries)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M)."""
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return squares.addmm_(a, b.T, alpha=-2.0).clamp_(min=0.0)


def psnr(a: np.ndarray, b: np.ndarray, *, data_range: float = 255.0) -> np.ndarray:
    """Return the peak signal-to-noise ratio (N,) of pairs, in dB; infinite where they are equal.

    Images are (N, H, W, C), of any number type, and ``data_range`` is the distance from the
    smallest to the largest possible value.
    """
    _require_same_shape("images", a, b)
    squared = np.square(a.astype(np.float64) - b.astype(np.float64))
    error = squared.mean(axis=tuple(range(1, a.ndim)))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def ssim(a: np.ndarray, b: np.ndarray, *, data_range: float = 255.0) -> np.ndarray:
    """Return the mean structural similarity (N,), at most 1, of pairs (Wang et al. 2004).

    Images are as for ``psnr``, H and W at least 7. Averaged over channels, with a uniform 7x7
    window and sample covariances, as in scikit-image and the published code. That code used a data
    range of 2 for images in [0, 1], which makes its results too high: ``data_range=2`` on images in
    [0, 1] reproduces them, the true range is right.
    """
    _require_same_shape("images", a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"images of {a.shape[2]}x{a.shape[1]} are smaller than the 7x7 window")
    means = functools.partial(F.avg_pool2d, kernel_size=SSIM_WINDOW, stride=1)
    x, y = (torch.from_numpy(i.astype(np.float64)).movedim(-1, 1) for i in (a, b))
    mean_x, mean_y = means(x), means(y)
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    var_x = unbiased * (means(x * x) - mean_x**2)
    var_y = unbiased * (means(y * y) - mean_y**2)
    covariance = unbiased * (means(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.mean(dim=(1, 2, 3)).numpy()


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return 100 times the cosine of features (N, D) of images and their captions, at least 0.

    As in Hessel et al. 2021: (N,) float64, from 0 to 100; papers give the mean, sometimes divided
    by 100. Features may have any length.
    """
    _require_same_shape("features", images, texts)
    a, b = (x.astype(np.float64) for x in (images, texts))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / np.maximum(norms, 1e-12)
    return 100.0 * np.maximum(cosines, 0.0)


def _require_same_shape(what: str, a: np.ndarray, b: np.ndarray, first: int = 0) -> None:
    """Raise ValueError if dimensions from the ``first`` on differ."""
    if a.ndim < 2 or a.shape[first:] != b.shape[first:]:
        raise ValueError(f"{what} of shapes {a.shape} and {b.shape} cannot be compared")


def codebook_use(counts: np.ndarray) -> tuple[float, float]:
    """Return usage and perplexity of a codebook from the occurrences of each code.

    These are the share of the codes that occur, of which there is at least one, and exp of the
    entropy of the codes' frequencies: the effective number of codes.
    """
    total = counts.sum()
    if total == 0:
        raise ValueError("there are no codes")
    frequencies = counts[counts > 0].astype(np.float64) / total
    return float((counts > 0).mean()), float(np.exp(-(frequencies * np.log(frequencies)).sum()))
