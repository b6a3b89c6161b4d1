"""Precision and recall (Kynkaanniemi et al. 2019) of given features.

Each set of features has a manifold: balls around its members, each as large as the distance to the
member's k-th nearest neighbour in the set. Distances are computed block by block, so that there is
never a matrix of all pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3
_BLOCK = 2048


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
    neighbours: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Return how many samples look real, and how much of the reference the samples cover.

    Args:
        samples: features (N, D).
        reference: features (M, D) of real images.
        neighbours: k.
        device: of the distances, which are computed in float32 around the reference's mean.

    Raises:
        ValueError: the widths differ, or a set has not more than ``neighbours`` members.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features of shapes {samples.shape} and {reference.shape} do not fit")
    if min(len(samples), len(reference)) <= neighbours:
        raise ValueError(
            f"{min(len(samples), len(reference))} features have no {neighbours} neighbours each"
        )
    # Squared distances are differences of large numbers; around the mean they are smaller.
    center = reference.mean(0, dtype=np.float64)
    a, b = (
        torch.from_numpy((features - center).astype(np.float32)).to(device)
        for features in (samples, reference)
    )
    return PrecisionRecall(
        precision=_share_inside(a, b, _radii(b, neighbours)),
        recall=_share_inside(b, a, _radii(a, neighbours)),
    )


def nearest(queries: np.ndarray, known: np.ndarray, *, count: int = 1) -> np.ndarray:
    """Return indices (N, count) of the rows of ``known`` (M, D) nearest to ``queries`` (N, D)."""
    center = known.mean(0, dtype=np.float64)
    a, b = (torch.from_numpy((x - center).astype(np.float32)) for x in (queries, known))
    found = [
        _squared_distances(rows, b).topk(count, largest=False).indices for rows in a.split(_BLOCK)
    ]
    return torch.cat(found).numpy()


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each member to its k-th nearest neighbour (N,)."""
    found = []
    for rows in features.split(_BLOCK):
        best: Tensor | None = None
        for others in features.split(_BLOCK):
            distances = _squared_distances(rows, others)
            if best is not None:
                distances = torch.cat([best, distances], dim=1)
            # One more: a member is its own nearest neighbour.
            best = distances.topk(min(neighbours + 1, distances.shape[1]), largest=False).values
        assert best is not None
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
