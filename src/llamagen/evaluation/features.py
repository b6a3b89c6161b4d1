"""Features of sets of images: resumable, and shared by processes.

Shapes: B images, D numbers of a pooled feature, S of a spatial one, K classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import FeatureStatistics
from llamagen.evaluation.pieces import make_pieces, pieces_of
from llamagen.support.artifact import Advance
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True)
class NetworkOutput:
    """Output of a network for some images."""

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
        """Its name in reports."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its features do."""

    def __call__(self, images: Tensor) -> NetworkOutput:
        """Return the features of uint8 (B, 3, H, W)."""


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
        """Return the statistics for FID."""
        return FeatureStatistics.of(self.pool)

    def spatial_statistics(self) -> FeatureStatistics | None:
        """Return the statistics for sFID."""
        return None if self.spatial is None else FeatureStatistics.of(self.spatial)


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
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Features:
    """Return features of all images; called in every process of a run, which share the work.

    Features of the same images and network that are in the folder are only read.

    Args:
        network: computes them.
        images: its input.
        root: gets a folder for this network and these images.
        what: kind of images, for the progress bar.
        batch_size: images in one call of the network.
        device: the network's.

    Raises:
        InputError: an image is damaged, or the network gave NaN or infinity.
        OSError: the disk is full.
    """
    pieces = pieces_of(
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

    def compute(items: range, advance: Advance) -> dict[str, Any]:
        pixels = torch.from_numpy(np.array(images.read(items.start, items.stop))).movedim(-1, 1)
        outputs = []
        for part in pixels.split(batch_size):
            outputs.append(network(part.contiguous().to(device)))
            advance(len(part))
        return {".npz": _joined(outputs, f"images {items[0]} to {items[-1]} of {images.name}")}

    make_pieces(pieces, compute, f"features of the {what}")
    parts = [pieces.read_npz(piece) for piece in range(len(pieces))]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Features(whole["pool"], whole.get("spatial"), whole["probabilities"])


def feature_folder(root: Path, network: FeatureNetwork, images: ImageSet) -> Path:
    """Return the folder in ``root`` for the features of these images by this network."""
    both = hashlib.sha256(f"{network.fingerprint} {images.identity}".encode())
    return root / both.hexdigest()[:16]


def _joined(outputs: list[NetworkOutput], where: str) -> dict[str, np.ndarray]:
    """Outputs of a piece, as they are stored."""
    arrays = {
        "pool": [each.pool for each in outputs],
        "probabilities": [each.probabilities for each in outputs],
        "spatial": [each.spatial for each in outputs if each.spatial is not None],
    }
    joined = {
        name: torch.cat(parts).float().cpu().numpy() for name, parts in arrays.items() if parts
    }
    for name, array in joined.items():
        if not np.isfinite(array).all():
            raise InputError(f"the network gave NaN or infinity ({name}) for {where}; use float32")
    return joined
