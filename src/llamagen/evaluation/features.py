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

import llamagen.storage as storage
from llamagen.errors import InputError
from llamagen.evaluation.image_sets import PIECE, ImageSet
from llamagen.evaluation.metrics import FeatureStatistics

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
    folder: Path,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Computes the features that are not in the folder yet.

    Args:
        network: whose.
        images: of which images.
        folder: new, or begun with the same network and images.
        batch_size: images that the network is given at once.
        device: where the network is.
        rank: this process takes every ``world_size``-th piece, from this one on.
        world_size: processes that work on the folder.
        progress: is told how many more images are done.

    Raises:
        InputError: an image is damaged, or the network gave NaN or infinity.
        OSError: the disk is full.
    """
    _begin(network, images, folder)
    for number in range(rank, images.pieces(), world_size):
        path = _piece_path(folder, number)
        pixels = None if path.is_file() else images.read_piece(number)
        if pixels is not None:
            outputs = [network(part.to(device)) for part in _as_batch(pixels).split(batch_size)]
            _write(path, outputs, images, number)
        if progress is not None:
            progress(min(PIECE, len(images) - number * PIECE))


def load_features(images: ImageSet, folder: Path) -> Features:
    """Reads what ``compute_features`` has written, once all processes are done.

    Raises:
        InputError: a piece is missing or damaged.
    """
    parts: list[dict[str, np.ndarray]] = []
    for number in range(images.pieces()):
        path = _piece_path(folder, number)
        try:
            with np.load(path) as arrays:
                parts.append(dict(arrays))
        except (OSError, ValueError, EOFError, KeyError) as error:
            # A damaged one shall be made again next time.
            path.unlink(missing_ok=True)
            raise InputError(f"{path} is damaged ({error}); run the same command again") from error
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Features(joined["pool"], joined.get("spatial"), joined["probabilities"])


def features_of(
    network: FeatureNetwork,
    images: ImageSet,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Features:
    """Computes, in one process, and reads; see ``compute_features``."""
    compute_features(network, images, folder, device=device, progress=progress)
    return load_features(images, folder)


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


def _as_batch(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).movedim(-1, 1).contiguous()


def _write(path: Path, outputs: list[NetworkOutput], images: ImageSet, number: int) -> None:
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
                f"the network gave NaN or infinity ({name}) for piece {number} of {images.name}; "
                f"use --dtype float32"
            )
    with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **joined)  # type: ignore[arg-type]  # names are ours


def _piece_path(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.npz"
