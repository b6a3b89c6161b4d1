"""Shared parts of the protocols: features and scores of a comparison, sheets of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from llamagen.evaluation import metrics
from llamagen.evaluation.features import (
    FeatureNetwork,
    Features,
    Reference,
    ReferenceSource,
    check_network,
    compute_features,
    read_statistics,
)
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.report import Picture, Report
from llamagen.support.errors import InputError
from llamagen.support.pictures import image_grid

_SHEET_IMAGES = 64
_NEIGHBOUR_ROWS = 12
_NEIGHBOURS = 4

_OTHER_NAMES = {
    "fid": "frechet",
    "sfid": "spatial_frechet",
    "inception_score": "score",
    "kid": "kernel",
    "kid_std": "kernel_std",
}
"""Measurements in another network's features do not have the papers' names."""


class Scores(NamedTuple):
    """Metrics, the Frechet distance first, and warnings of a comparison."""

    metrics: dict[str, float]
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workplace:
    """Network and device of an evaluation, and the folder of its results."""

    out: Path
    network: FeatureNetwork
    device: torch.device

    @property
    def has_inception(self) -> bool:
        """Whether published numbers, and ADM's statistics, are defined with this network."""
        return self.network.fingerprint.startswith("inception")

    def features(self, images: ImageSet, what: str) -> Features:
        """Features of images; see ``compute_features``."""
        root = self.out / "features"
        return compute_features(self.network, images, root, what=what, device=self.device)

    def reference(self, source: ReferenceSource) -> Reference:
        """Return a reference with the features of its images; see ``features``.

        InputError if its statistics are of another network.
        """
        if source.archive is not None:
            check_network(source.archive, self.network)
        features = None if source.images is None else self.features(source.images, "reference")
        if source.archive is not None:
            return Reference(source, features, *read_statistics(source.archive))
        assert features is not None
        return Reference(source, features, *features.statistics(), len(features))

    def compare(
        self,
        report: Report,
        images: ImageSet,
        source: ReferenceSource,
        what: str,
        *,
        shuffled: bool = False,
        neighbours: bool = True,
    ) -> tuple[Features, Reference]:
        """Add the metrics of images, their warnings and their reference to a report.

        ``shuffled`` scores them in random order, ``neighbours`` adds ``neighbours_sheets``. Return
        their features, and the reference with its own.
        """
        features, reference = self.features(images, what), self.reference(source)
        if neighbours:
            report.pictures += neighbours_sheets(images, features, reference)
        if shuffled:
            order = np.random.default_rng(0).permutation(len(features))
            features = dataclasses.replace(features, probabilities=features.probabilities[order])
        scores = self.score(features, reference)
        report.metrics |= scores.metrics
        report.warnings += scores.warnings
        report.reference |= {
            "source": reference.source.name,
            "images": "not said by the file" if reference.count is None else reference.count,
            "network": self.network.name,
        }
        return features, reference

    def score(self, features: Features, reference: Reference) -> Scores:
        """Compute all metrics of features, which come in random class order.

        Their names are those of the papers if the network is Inception.
        """
        count, width = features.pool.shape
        if width != reference.pool.width:
            raise InputError(
                f"{reference.source.name} has features of {reference.pool.width} numbers, but the "
                f"network gives {width}; it was made with another network"
            )
        if count < 2:
            raise InputError(f"{count} image is too few to evaluate; give at least 2")
        pool, spatial = features.statistics()
        values = {"fid": metrics.frechet_distance(pool, reference.pool)}
        if spatial is not None and reference.spatial is not None:
            values["sfid"] = metrics.frechet_distance(spatial, reference.spatial)
        values["inception_score"] = metrics.inception_score(features.probabilities)
        if reference.features is not None and min(count, len(reference.features)) > 3:
            known = reference.features.pool
            found = metrics.precision_recall(features.pool, known, device=self.device)
            # Half of the images: subsets of all would all be the same one.
            size = min(1000, min(count, len(known)) // 2)
            kid, kid_std = metrics.kernel_distance(features.pool, known, subset_size=size)
            values |= {**found._asdict(), "kid": kid, "kid_std": kid_std}
        warnings = [
            f"{number} {what} for features of {width} numbers: their covariance has no full rank, "
            f"and the Frechet distance says little"
            for number, what in ((count, "samples"), (reference.count, "reference images"))
            if number is not None and number <= width
        ]
        warnings += _duplicates(features.pool)
        if not self.has_inception:
            values = {f"classifier_{_OTHER_NAMES.get(k, k)}": v for k, v in values.items()}
            warnings.append(
                f"distances are in the feature space of a {self.network.name}: compare them with "
                f"others of the same classifier, never with a published FID"
            )
        return Scores(values, warnings)


def few_warnings(count: int, published: int, what: str, which: str = "") -> list[str]:
    """Return a warning if there are fewer images than in the published protocol."""
    if count >= published:
        return []
    protocol = f"{published:,} ({which})" if which else f"{published:,}"
    instead = f"{count:,} {what} instead of the protocol's {protocol}"
    return [f"{instead}: distances come out higher with fewer"]


def samples_sheet(
    images: ImageSet, captions: Sequence[str] = (), title: str = "Samples"
) -> Picture:
    """Return a sheet of the first images of a set."""
    count = min(len(images), _SHEET_IMAGES)
    sheet = grid(list(images.read(0, count)), columns=8, captions=captions[:count])
    return Picture(title=title, image=sheet, note="The first ones, not picked.")


def neighbours_sheets(images: ImageSet, features: Features, reference: Reference) -> list[Picture]:
    """Return a sheet of the first images beside those nearest to them, if the reference has any."""
    if reference.source.images is None or reference.features is None:
        return []
    known = reference.features.pool
    count = min(len(images), _NEIGHBOUR_ROWS)
    found = metrics.nearest(features.pool[:count], known, count=min(_NEIGHBOURS, len(known)))
    arrays: list[np.ndarray] = []
    captions: list[str] = []
    for row, image in zip(found.tolist(), images.read(0, count), strict=True):
        arrays += [image, *(reference.source.images.read(i, i + 1)[0] for i in row)]
        captions += ["sample", *(f"#{index}" for index in row)]
    picture = Picture(
        title="Nearest reference images",
        image=grid(arrays, columns=2 * (found.shape[1] + 1), captions=captions),
        note="In the network's feature space, by number in the reference. A sample that equals one "
        "of them was memorised.",
    )
    return [picture]


def grid(
    arrays: list[np.ndarray], *, columns: int, captions: Sequence[str], like: int = 0
) -> Image.Image:
    """Return a sheet of images, all at the size of the one with number ``like``."""
    images = [Image.fromarray(np.array(array)) for array in arrays]
    size = images[like].size
    images = [image if image.size == size else image.resize(size) for image in images]
    return image_grid(images, columns=columns, captions=captions or None, scale=None)


def _duplicates(pool: np.ndarray) -> list[str]:
    """A warning if features (N, D) occur more than once."""
    rows = np.ascontiguousarray(pool)
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, counts = np.unique(as_bytes, return_index=True, return_counts=True)
    repeated = sorted(first[counts > 1].tolist())
    if not repeated:
        return []
    named = ", ".join(map(str, repeated[:3])) + (", ..." if len(repeated) > 3 else "")
    copies = int((counts - 1).sum())
    return [f"{copies} of {len(rows)} images are copies of others among them (of number {named})"]
