"""Any images against any others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.protocols.common import (
    Workplace,
    neighbours_sheets,
    samples_sheet,
    size_text,
    size_warnings,
)
from llamagen.evaluation.reference import ReferenceSource, write_statistics
from llamagen.evaluation.report import Report
from llamagen.support import distributed
from llamagen.support.errors import InputError


def evaluate_folder(
    images: ImageSet,
    reference: ReferenceSource,
    place: Workplace,
    *,
    save_reference: Path | None = None,
) -> Report:
    """Compare two sets of images; called in every process of a run.

    The statistics of the reference are written to ``save_reference`` in the form of ADM's
    evaluator.

    Raises:
        InputError: images, reference and network do not fit together.
        OSError: the disk is full.
    """
    features = place.features(images, "images")
    compared = place.reference(reference)
    if save_reference is not None:
        if compared.features is None or compared.statistics_only:
            raise InputError(f"{compared.name} holds statistics already")
        if distributed.is_main():
            write_statistics(save_reference, compared.features)
    report = Report(
        protocol="folder",
        title=f"{images.name} against {compared.name}",
        metrics={},
        reference={},
        samples={
            "source": images.name,
            "images": len(images),
            "size": size_text(images.size),
            "resizing": "none",
        },
        settings={"order": "shuffled, with seed 0"},
        warnings=size_warnings(images, reference.images, "images"),
        pictures=[
            samples_sheet(images, title="Images"),
            *neighbours_sheets(images, features, compared),
        ],
    )
    # Folders come in class order, which the Inception Score's splits must not.
    order = np.random.default_rng(0).permutation(len(features))
    shuffled = dataclasses.replace(features, probabilities=features.probabilities[order])
    place.compare(report, shuffled, compared)
    return report
