"""What the protocols share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llamagen.checkpoints.names import find_public
from llamagen.evaluation.features import FeatureNetwork, Features, compute_features
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import nearest
from llamagen.evaluation.published import SIZE
from llamagen.evaluation.reference import Reference, ReferenceSource
from llamagen.evaluation.report import Picture
from llamagen.evaluation.samples import Samples
from llamagen.pipeline import Pipeline
from llamagen.support.pictures import image_grid

SAMPLES_FOLDER = "samples"
"""Of what was drawn, in an evaluation's folder."""
_FEATURES_FOLDER = "features"
SHOWN = 64
"""Images on a sheet."""
_NEIGHBOUR_ROWS = 12
_NEIGHBOURS = 4
_SHEET_SIDE = 64
"""Smaller images are enlarged to about this many pixels on a sheet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where an evaluation computes, and keeps what it has computed."""

    out: Path
    network: FeatureNetwork
    device: torch.device

    def features(self, images: ImageSet, what: str) -> Features:
        """Features of images; see ``compute_features``."""
        return compute_features(
            self.network, images, self.out / _FEATURES_FOLDER, what=what, device=self.device
        )

    def reference(self, source: ReferenceSource) -> tuple[Reference, Features | None]:
        """A reference, and the features of its images; see ``ReferenceSource.compute``."""
        return source.compute(self.network, self.out / _FEATURES_FOLDER, device=self.device)


def compared_side(pipeline: Pipeline, asked: int | None) -> int | None:
    """Side in pixels at which images of a model are compared.

    What was asked for; by default 256 for the published models, as published, and for others their
    own. None if images are not square: they are then compared as they are drawn.
    """
    if asked is not None:
        return asked
    if find_public(pipeline.name) is not None:
        return SIZE
    rows, columns = pipeline.transformer.config.grid
    return rows * pipeline.tokenizer.config.downsampling if rows == columns else None


def describe_samples(pipeline: Pipeline, samples: Samples) -> dict[str, Any]:
    """What a report says of samples."""
    rows, columns = pipeline.transformer.config.grid
    side = pipeline.tokenizer.config.downsampling
    return {
        "images": len(samples),
        "size": f"{samples.size[1]}x{samples.size[0]}",
        "drawn at": f"{columns * side}x{rows * side}",
        "resizing": "none" if samples.plan.size is None else "bicubic, in float, before 8 bits",
        "folder": str(samples.folder),
    }


def describe_settings(
    pipeline: Pipeline, samples: Samples, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a report says of how samples were drawn."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {
        "model": pipeline.name,
        **dataclasses.asdict(pipeline.sampling),
        **given,
        "seed": samples.plan.seed,
        "precision": str(pipeline.dtype).removeprefix("torch."),
    }


def sheet_of(images: ImageSet, captions: Sequence[str] = (), title: str = "Samples") -> Picture:
    """The first images of a set, unpicked."""
    arrays = images.read(0, min(len(images), SHOWN))
    return Picture(
        title=title,
        image=_grid(arrays, columns=8, captions=list(captions[: len(arrays)])),
        note="The first ones, not picked.",
    )


def neighbours_sheet(images: ImageSet, features: Features, reference: Reference) -> Picture | None:
    """The first images, each beside the reference images that its features are nearest to."""
    if reference.images is None or reference.features is None:
        return None
    count = min(len(images), _NEIGHBOUR_ROWS)
    found = nearest(
        features.pool[:count],
        reference.features,
        count=min(_NEIGHBOURS, len(reference.features)),
    )
    arrays: list[np.ndarray] = []
    captions: list[str] = []
    for row, image in zip(found, images.read(0, count), strict=True):
        beside = [reference.images.read(index, index + 1)[0] for index in row.tolist()]
        arrays += [image, *(_fitted(each, image.shape) for each in beside)]
        captions += ["sample", *(f"#{index}" for index in row.tolist())]
    columns = 2 * (found.shape[1] + 1)
    return Picture(
        title="Nearest reference images",
        image=_grid(np.stack(arrays), columns=columns, captions=captions),
        note="In the network's feature space, by number in the reference. A sample that equals one "
        "of them was learnt by heart.",
    )


def _fitted(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if image.shape == shape:
        return image
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0])))


def _grid(arrays: np.ndarray, *, columns: int, captions: list[str]) -> Image.Image:
    scale = max(1, _SHEET_SIDE // arrays.shape[2])
    images = [Image.fromarray(np.array(array)) for array in arrays]
    return image_grid(images, columns=columns, captions=captions or None, scale=scale)
