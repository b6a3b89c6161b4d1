"""The metrics of a comparison, and their warnings."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from llamagen.evaluation.features import FeatureNetwork, Features
from llamagen.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from llamagen.evaluation.reference import INCEPTION, Reference
from llamagen.support.errors import InputError

_OTHER_NAMES = {
    "fid": "classifier_frechet",
    "sfid": "classifier_spatial_frechet",
    "inception_score": "classifier_score",
    "kid": "classifier_kernel",
    "kid_std": "classifier_kernel_std",
}
"""Measurements in another network's features do not have the papers' names."""
_KERNEL_SUBSET = 1000
_DUPLICATES_NAMED = 3


@dataclasses.dataclass
class Scores:
    """Result of a comparison."""

    metrics: dict[str, float]
    """The Frechet distance first."""
    warnings: list[str]


def score(
    features: Features,
    reference: Reference,
    network: FeatureNetwork,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Scores:
    """Compute all metrics of features.

    Their names are those of the papers if the network is Inception.

    Args:
        features: of the images that are evaluated, in random class order.
        reference: the other side of the comparison.
        network: of the features.
        device: where neighbours are computed.
        seed: of the kernel distance's subsets.

    Raises:
        InputError: there are too few images, or the features are of different networks.
    """
    if features.pool.shape[1] != reference.pool.width:
        raise InputError(
            f"{reference.name} has features of {reference.pool.width} numbers, but the network "
            f"gives {features.pool.shape[1]}; it was made with another network"
        )
    if len(features) < 2:
        raise InputError(f"{len(features)} image is too few to evaluate; give at least 2")
    metrics = {"fid": frechet_distance(features.pool_statistics(), reference.pool)}
    spatial = features.spatial_statistics()
    if spatial is not None and reference.spatial is not None:
        metrics["sfid"] = frechet_distance(spatial, reference.spatial)
    metrics["inception_score"] = inception_score(features.probabilities)
    if reference.features is not None and min(len(features), len(reference.features)) > 3:
        known = reference.features.pool
        found = precision_recall(features.pool, known, device=device)
        metrics |= {"precision": found.precision, "recall": found.recall}
        # Half of the images: subsets of all would all be the same one.
        size = min(_KERNEL_SUBSET, min(len(features), len(known)) // 2)
        kernel = kernel_distance(features.pool, known, subset_size=size, seed=seed)
        metrics |= {"kid": kernel.mean, "kid_std": kernel.std}
    warnings = [*_too_few(len(features), features, "samples"), *duplicates(features)]
    if reference.count is not None:
        warnings += _too_few(reference.count, features, "reference images")
    if not network.fingerprint.startswith(INCEPTION):
        metrics = {_OTHER_NAMES.get(name, f"classifier_{name}"): v for name, v in metrics.items()}
        warnings.append(
            f"distances are in the feature space of a {network.name}: compare them with others "
            f"of the same classifier, never with a published FID"
        )
    return Scores(metrics, warnings)


def duplicates(features: Features) -> list[str]:
    """Return a warning if images occur more than once."""
    rows = np.ascontiguousarray(features.pool)
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, counts = np.unique(as_bytes, return_index=True, return_counts=True)
    repeated = sorted(first[counts > 1].tolist())
    if not repeated:
        return []
    named = ", ".join(map(str, repeated[:_DUPLICATES_NAMED]))
    if len(repeated) > _DUPLICATES_NAMED:
        named += ", ..."
    copies = int((counts - 1).sum())
    return [f"{copies} of {len(rows)} images are copies of others among them (of number {named})"]


def _too_few(count: int, features: Features, what: str) -> list[str]:
    width = features.pool.shape[1]
    if count > width:
        return []
    reason = "their covariance has no full rank, and the Frechet distance says little"
    return [f"{count} {what} for features of {width} numbers: {reason}"]
