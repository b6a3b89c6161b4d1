"""References that images are compared with: published statistics, or images.

ADM's .npz files hold ``mu``, ``sigma`` (of Inception's pooled features), ``mu_s``, ``sigma_s`` (of
its spatial ones) and ``arr_0``: images for precision and recall. Of images alone everything is
computed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

import llamagen.support.storage as storage
from llamagen.data.columns import SourceConfig
from llamagen.evaluation.features import FeatureNetwork, Features, compute_features
from llamagen.evaluation.image_sets import (
    ArchivedImages,
    CollectedImages,
    ImageSet,
    array_names,
    read_array,
)
from llamagen.evaluation.metrics import FeatureStatistics
from llamagen.support.errors import InputError

INCEPTION = "inception"
"""Start of the fingerprint of the network that ADM's statistics were made with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """One side of a comparison."""

    name: str
    count: int | None
    """Images that the statistics are of; None where the file does not say."""
    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    features: Features | None
    """Of ``images``, for precision, recall and neighbours."""
    images: ImageSet | None
    statistics_only: bool
    """Whether the statistics are of other images than ``images``."""


@dataclasses.dataclass(frozen=True)
class ReferenceSource:
    """A reference whose features may still have to be computed."""

    name: str
    images: ImageSet | None
    archive: Path | None = None
    """An .npz file with statistics."""

    @classmethod
    def open(
        cls, source: str | Path, config: SourceConfig | None = None, *, size: int | None = None
    ) -> ReferenceSource:
        """Find a reference: a folder or other source of images, or an .npz file.

        Args:
            source: where it is.
            config: columns of a data set that is more than a folder.
            size: crop the middle square of images to this side; see ``CollectedImages``.

        Raises:
            FileNotFoundError: there is none.
            InputError: it is none.
        """
        path = Path(source)
        if path.suffix.lower() != ".npz":
            return cls(str(source), CollectedImages.open(source, config, size=size))
        names = array_names(path)
        if "mu" in names:
            return cls(str(source), ArchivedImages(path) if "arr_0" in names else None, path)
        return cls(str(source), ArchivedImages(path))

    def compute(
        self, network: FeatureNetwork, root: Path, *, device: torch.device | str = "cpu"
    ) -> Reference:
        """Return the reference with the features of its images; see ``compute_features``.

        Raises:
            InputError: the statistics were made with another network, or the file is damaged.
            OSError: the disk is full.
        """
        if self.archive is not None and not network.fingerprint.startswith(INCEPTION):
            raise InputError(
                f"{self.name} holds statistics of Inception's features, which cannot be compared "
                f"with those of the {network.name}; give a folder of images"
            )
        features = None
        if self.images is not None:
            features = compute_features(network, self.images, root, what="reference", device=device)
        if self.archive is not None:
            pool, spatial, count = read_statistics(self.archive)
        else:
            assert features is not None
            pool, spatial = features.pool_statistics(), features.spatial_statistics()
            count = len(features)
        return Reference(
            name=self.name,
            count=count,
            pool=pool,
            spatial=spatial,
            features=features,
            images=self.images,
            statistics_only=self.archive is not None,
        )


def read_statistics(
    path: Path,
) -> tuple[FeatureStatistics, FeatureStatistics | None, int | None]:
    """Read statistics of pooled and of spatial features, and the number of images.

    Raises:
        InputError: the file is damaged, or its arrays do not fit together.
    """
    names = array_names(path)
    count = int(read_array(path, "count")) if "count" in names else None

    def statistics(mean: str, covariance: str) -> FeatureStatistics:
        arrays = (read_array(path, mean), read_array(path, covariance))
        if not all(np.isfinite(array).all() for array in arrays):
            raise InputError(f"{mean} or {covariance} in {path} hold NaN or infinity")
        try:
            # The number of images does not matter for a distance.
            return FeatureStatistics.from_moments(*arrays, count=max(count or 2, 2))
        except ValueError as error:
            raise InputError(f"{path}: {error}; get it again") from error

    spatial = statistics("mu_s", "sigma_s") if "mu_s" in names else None
    return statistics("mu", "sigma"), spatial, count


def write_statistics(path: Path, features: Features) -> None:
    """Write statistics as ADM's evaluator, and ``read_statistics``, read them.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    pool, spatial = features.pool_statistics(), features.spatial_statistics()
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "count": np.array(pool.count)}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # names are ours
