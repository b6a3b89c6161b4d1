"""Features of sets of images, computed piece by piece and kept, so that work can be shared and
goes on where it was interrupted.

Shapes: B images, D numbers of a pooled feature, S of a spatial one, K classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import FeatureStatistics
from llamagen.evaluation.pieces import Pieces
from llamagen.support.errors import InputError

_ABOUT_NAME = "about.json"


@dataclasses.dataclass(frozen=True)
class NetworkOutput:
    """What a network says of some images."""

    pool: Tensor
    """(B, D)"""
    spatial: Tensor | None
    """(B, S), for sFID; None from networks that have none."""
    probabilities: Tensor
    """(B, K), each row summing to 1."""


class FeatureNetwork(Protocol):
    """A network in whose feature space images are compared."""

    @property
    def name(self) -> str:
        """What it is, for reports."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its features do."""

    def __call__(self, images: Tensor) -> NetworkOutput:
        """Of uint8 (B, 3, H, W)."""


@dataclasses.dataclass(frozen=True)
class Features:
    """All features of a set of images, in its order."""

    pool: np.ndarray
    """(N, D) float32."""
    spatial: np.ndarray | None
    """(N, S) float32."""
    probabilities: np.ndarray
    """(N, K) float32."""

    def __len__(self) -> int:
        return len(self.pool)

    def pool_statistics(self) -> FeatureStatistics:
        """For FID."""
        return FeatureStatistics.of(self.pool)

    def spatial_statistics(self) -> FeatureStatistics | None:
        """For sFID."""
        return None if self.spatial is None else FeatureStatistics.of(self.spatial)


def compute_features(
    network: FeatureNetwork,
    images: ImageSet,
    root: Path,
    *,
    what: str = "images",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Features:
    """Features of all images; to be called in every process of a run, which share the work.

    What was computed before, of the same images by the same network, is only read.

    Args:
        network: whose.
        images: of which images.
        root: gets a folder for this network and these images.
        what: what the images are, for the progress bar.
        batch_size: images that the network is given at once.
        device: where the network is.

    Raises:
        InputError: an image is damaged, or the network gave NaN or infinity.
        OSError: the disk is full.
    """
    folder = feature_folder(root, network, images)
    _begin(network, images, folder)

    def compute(first: int, last: int, advance: Callable[[int], object]) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(np.array(images.read(first, last))).movedim(-1, 1)
        outputs = []
        for part in pixels.split(batch_size):
            outputs.append(network(part.contiguous().to(device)))
            advance(len(part))
        return _joined(outputs, f"images {first} to {last - 1} of {images.name}")

    pieces = Pieces(folder, len(images))
    pieces.make(compute, f"features of the {what}")
    parts = [pieces.read(number) for number in range(len(pieces))]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Features(whole["pool"], whole.get("spatial"), whole["probabilities"])


def feature_folder(root: Path, network: FeatureNetwork, images: ImageSet) -> Path:
    """Where in ``root`` these features belong: another network or other images go elsewhere."""
    both = hashlib.sha256(f"{network.fingerprint} {images.identity}".encode()).hexdigest()
    return root / both[:16]


def _begin(network: FeatureNetwork, images: ImageSet, folder: Path) -> None:
    storage.require_writable(folder)
    about = folder / _ABOUT_NAME
    if not about.is_file():
        storage.write_json(
            about,
            {
                "network": network.name,
                "network_fingerprint": network.fingerprint,
                "images": images.name,
                "images_identity": images.identity,
                "count": len(images),
            },
        )


def _joined(outputs: list[NetworkOutput], where: str) -> dict[str, np.ndarray]:
    """What a network said of a piece, as it is stored."""
    arrays = {
        "pool": [each.pool for each in outputs],
        "probabilities": [each.probabilities for each in outputs],
    }
    spatial = [each.spatial for each in outputs if each.spatial is not None]
    if spatial:
        arrays["spatial"] = spatial
    joined = {name: torch.cat(parts).float().cpu().numpy() for name, parts in arrays.items()}
    for name, array in joined.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"the network gave NaN or infinity ({name}) for {where}; use --dtype float32"
            )
    return joined
