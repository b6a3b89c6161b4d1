"""Features of sets of images, resumable and shared by processes, and what they are compared with.

Shapes: B images, D numbers of a pooled feature, S of a spatial one, K classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.data.columns import SourceConfig
from llamagen.evaluation import image_sets
from llamagen.evaluation.image_sets import ImageSet, Pieces
from llamagen.evaluation.metrics import FeatureStatistics
from llamagen.support.errors import InputError

_BATCH = 64
"""Images in one call of a network."""


class NetworkOutput(NamedTuple):
    """Output of a network for some images."""

    pool: Tensor
    """(B, D)"""
    spatial: Tensor | None
    """(B, S), for sFID; None from networks that have none."""
    logits: Tensor
    """(B, K)"""

    @property
    def probabilities(self) -> Tensor:
        """(B, K), for the Inception Score."""
        return self.logits.softmax(-1)


class FeatureNetwork(Protocol):
    """A network in whose feature space images are compared."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its features do."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of its first logits; empty if they are none that a model would draw."""

    def __call__(self, images: Tensor) -> NetworkOutput:
        """Return the features of uint8 (B, 3, H, W)."""


@dataclasses.dataclass(frozen=True)
class Features:
    """All features of a set of images, in its order, as float32."""

    pool: np.ndarray
    """(N, D)"""
    spatial: np.ndarray | None
    """(N, S)"""
    probabilities: np.ndarray
    """(N, K)"""

    def __len__(self) -> int:
        return len(self.pool)

    def statistics(self) -> tuple[FeatureStatistics, FeatureStatistics | None]:
        """Return the statistics for FID and for sFID."""
        spatial = None if self.spatial is None else FeatureStatistics.of(self.spatial)
        return FeatureStatistics.of(self.pool), spatial


def require_images(images: Tensor) -> None:
    """Raise InputError unless images are bytes: uint8 (B, 3, H, W).

    Metrics are defined on images as they are stored, rounding included.
    """
    fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0
    if images.dtype != torch.uint8 or not fits:
        raise InputError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} cannot be measured; "
            f"give uint8 of shape (B, 3, H, W)"
        )


def compute_features(
    network: FeatureNetwork,
    images: ImageSet,
    root: Path,
    *,
    what: str = "images",
    device: torch.device | str = "cpu",
) -> Features:
    """Return features of all images; called in every process of a run, which share the work.

    They are kept in a folder in ``root``, from which those of the same images and network are only
    read. ``what`` names the images on the progress bar. InputError if an image is damaged, or the
    network gave NaN or infinity.
    """
    pieces = Pieces(
        feature_folder(root, network, images),
        {
            "network": network.name,
            "network_fingerprint": network.fingerprint,
            "images": images.name,
            "images_identity": images.identity,
            "count": len(images),
        },
        len(images),
        noun="features",
        settings_name="about.json",
        free=("network", "images"),
    )

    def measure(pixels: Tensor, items: range) -> dict[str, np.ndarray]:
        output = network(pixels.contiguous().to(device))
        found = {name: getattr(output, name) for name in ("pool", "probabilities", "spatial")}
        arrays = {k: v.float().cpu().numpy() for k, v in found.items() if v is not None}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise InputError(
                    f"the network gave NaN or infinity ({name}) for images {items[0]} to "
                    f"{items[-1]} of {images.name}; use float32"
                )
        return arrays

    pieces.compute(image_sets.in_batches(images, _BATCH, measure), f"features of the {what}")
    parts = [pieces.read_npz(piece) for piece in range(len(pieces))]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Features(whole["pool"], whole.get("spatial"), whole["probabilities"])


def feature_folder(root: Path, network: FeatureNetwork, images: ImageSet) -> Path:
    """Return the folder in ``root`` for the features of these images by this network."""
    return root / storage.short_digest([f"{network.fingerprint} {images.identity}".encode()])


class ReferenceSource:
    """Reference of a comparison; its features may still have to be computed."""

    archive: Path | None = None
    """An .npz file with statistics, which are of other images than ``images``."""
    images: ImageSet | None = None

    def __init__(
        self, source: str | Path, config: SourceConfig | None = None, *, size: int | None = None
    ) -> None:
        """Find images (see ``CollectedImages``), or an .npz file in ADM's form.

        Such a file holds ``mu``, ``sigma`` (of Inception's pooled features), ``mu_s``, ``sigma_s``
        (of its spatial ones) and ``arr_0``: images for precision and recall. Of images alone
        everything is computed. FileNotFoundError or InputError if it is neither.
        """
        self.name, path = str(source), Path(source)
        if path.suffix.lower() != ".npz":
            self.images = image_sets.CollectedImages(source, config, size=size)
            return
        names = image_sets.array_names(path)
        self.archive = path if "mu" in names else None
        if "arr_0" in names or "mu" not in names:
            self.images = image_sets.ArchivedImages(path)


@dataclasses.dataclass(frozen=True)
class Reference:
    """One side of a comparison."""

    source: ReferenceSource
    features: Features | None
    """Of the source's images, for precision, recall and neighbours."""
    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    count: int | None
    """Images that the statistics are of; None where the file does not say."""


def read_statistics(path: Path) -> tuple[FeatureStatistics, FeatureStatistics | None, int | None]:
    """Read statistics of pooled and of spatial features, and the number of images, if it is there.

    InputError if the file is damaged, or its arrays do not fit together.
    """
    names = image_sets.array_names(path)
    count = int(image_sets.read_array(path, "count")) if "count" in names else None

    def statistics(mean: str, covariance: str) -> FeatureStatistics:
        arrays = image_sets.read_array(path, mean), image_sets.read_array(path, covariance)
        if not all(np.isfinite(array).all() for array in arrays):
            raise InputError(f"{mean} or {covariance} in {path} hold NaN or infinity")
        try:
            # The number of images does not matter for a distance.
            return FeatureStatistics.from_moments(*arrays, count=max(count or 2, 2))
        except ValueError as error:
            raise InputError(f"{path}: {error}; get it again") from error

    spatial = statistics("mu_s", "sigma_s") if "mu_s" in names else None
    return statistics("mu", "sigma"), spatial, count


def check_network(path: Path, network: FeatureNetwork) -> None:
    """Raise InputError if statistics in a file are not of the features of ``network``."""
    name, fingerprint = "Inception", "inception"
    if "network" in image_sets.array_names(path):
        name, fingerprint = (str(text) for text in image_sets.read_array(path, "network"))
    if not network.fingerprint.startswith(fingerprint):
        raise InputError(
            f"{path} holds statistics of {name}'s features, which cannot be compared with those of "
            f"the {network.name}; give a folder of images, or choose that network"
        )


def write_statistics(path: Path, features: Features, network: FeatureNetwork | None = None) -> None:
    """Write statistics as ADM's evaluator, and ``read_statistics``, read them, or nothing.

    The file then says whose features they are of, for ``check_network``.
    """
    pool, spatial = features.statistics()
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "count": np.array(pool.count)}
    if network is not None:
        arrays["network"] = np.array([network.name, network.fingerprint])
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # names are ours
