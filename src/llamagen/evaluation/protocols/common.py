"""Shared parts of the protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llamagen.evaluation.features import FeatureNetwork, Features, compute_features
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import nearest
from llamagen.evaluation.reference import Reference, ReferenceSource
from llamagen.evaluation.report import Picture, Report
from llamagen.evaluation.samples import Samples, model_size
from llamagen.evaluation.scores import score
from llamagen.pipeline import Pipeline
from llamagen.support.pictures import image_grid

SAMPLES_FOLDER = "samples"
"""Name, in an evaluation's folder, of the folder of generated images."""
_FEATURES_FOLDER = "features"
SHEET_IMAGES = 64
_SHEET_SIDE = 64
"""Smaller images are enlarged to about this many pixels on a sheet."""
_NEIGHBOUR_ROWS = 12
_NEIGHBOURS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workplace:
    """Network and device of an evaluation, and the folder of its results."""

    out: Path
    network: FeatureNetwork
    device: torch.device

    def features(self, images: ImageSet, what: str) -> Features:
        """Features of images; see ``compute_features``."""
        return compute_features(
            self.network, images, self.out / _FEATURES_FOLDER, what=what, device=self.device
        )

    def reference(self, source: ReferenceSource) -> Reference:
        """A reference with its features; see ``ReferenceSource.compute``."""
        return source.compute(self.network, self.out / _FEATURES_FOLDER, device=self.device)

    def compare(self, report: Report, features: Features, reference: Reference) -> None:
        """Add to a report the metrics of features, their warnings, and the reference."""
        scores = score(features, reference, self.network, device=self.device)
        report.metrics |= scores.metrics
        report.warnings += scores.warnings
        count = "not said by the file" if reference.count is None else reference.count
        report.reference |= {
            "source": reference.name,
            "images": count,
            "network": self.network.name,
        }


def size_text(size: tuple[int, int]) -> str:
    """Return height and width as "WIDTHxHEIGHT"."""
    return f"{size[1]}x{size[0]}"


def precision_name(dtype: torch.dtype) -> str:
    """Return a precision as reports name it, "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe_samples(pipeline: Pipeline, samples: Samples, **more: Any) -> dict[str, Any]:
    """Return a report's entries about generated images."""
    return {
        "images": len(samples),
        "size": size_text(samples.size),
        "drawn at": size_text(model_size(pipeline)),
        "resizing": "none" if samples.plan.size is None else "bicubic, in float, before 8 bits",
        "folder": str(samples.folder),
        **more,
    }


def describe_settings(pipeline: Pipeline, samples: Samples) -> dict[str, Any]:
    """Return a report's entries about how images were generated."""
    return {
        "model": pipeline.name,
        **dataclasses.asdict(samples.plan.sampling),
        "seed": samples.plan.seed,
        "precision": precision_name(pipeline.dtype),
    }


def size_warnings(images: ImageSet, reference: ImageSet | None, what: str) -> list[str]:
    """Return a warning if images and reference differ in size."""
    if reference is None or reference.size == images.size:
        return []
    own, other = size_text(images.size), size_text(reference.size)
    return [
        f"{what} have {own} pixels, the reference {other}: resizing alone changes the distances"
    ]


def samples_sheet(
    images: ImageSet, captions: Sequence[str] = (), title: str = "Samples"
) -> Picture:
    """Return a sheet of the first images of a set."""
    arrays = images.read(0, min(len(images), SHEET_IMAGES))
    return Picture(
        title=title,
        image=_grid(arrays, columns=8, captions=list(captions[: len(arrays)])),
        note="The first ones, not picked.",
    )


def neighbours_sheets(images: ImageSet, features: Features, reference: Reference) -> list[Picture]:
    """Return a sheet of the first images, each beside the reference images nearest to it.

    None if the reference is statistics only.
    """
    if reference.images is None or reference.features is None:
        return []
    known = reference.features.pool
    count = min(len(images), _NEIGHBOUR_ROWS)
    found = nearest(features.pool[:count], known, count=min(_NEIGHBOURS, len(known)))
    arrays: list[np.ndarray] = []
    captions: list[str] = []
    for row, image in zip(found.tolist(), images.read(0, count), strict=True):
        beside = [reference.images.read(index, index + 1)[0] for index in row]
        arrays += [image, *(_resized(each, image.shape) for each in beside)]
        captions += ["sample", *(f"#{index}" for index in row)]
    sheet = _grid(np.stack(arrays), columns=2 * (found.shape[1] + 1), captions=captions)
    note = (
        "In the network's feature space, by number in the reference. A sample that equals one of "
        "them was memorised."
    )
    return [Picture(title="Nearest reference images", image=sheet, note=note)]


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if image.shape == shape:
        return image
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0])))


def _grid(arrays: np.ndarray, *, columns: int, captions: list[str]) -> Image.Image:
    scale = max(1, _SHEET_SIDE // arrays.shape[2])
    images = [Image.fromarray(np.array(array)) for array in arrays]
    return image_grid(images, columns=columns, captions=captions or None, scale=scale)
