"""Any images against any others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llamagen.evaluation.features import Features
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.protocols.common import (
    Workplace,
    neighbours_sheet,
    sheet_of,
)
from llamagen.evaluation.reference import ReferenceSource, write_statistics
from llamagen.evaluation.report import Report
from llamagen.evaluation.scores import score
from llamagen.support import distributed
from llamagen.support.errors import InputError


def evaluate_folder(
    images: ImageSet,
    reference: ReferenceSource,
    place: Workplace,
    *,
    save_reference: Path | None = None,
) -> Report:
    """Compares two sets of images; to be called in every process.

    ``save_reference`` gets the statistics of the reference as ADM's evaluator reads them.

    Raises:
        InputError: images, reference and network do not fit together.
        OSError: the disk is full.
    """
    features = place.features(images, "images")
    compared, known = place.reference(reference)
    if save_reference is not None:
        if known is None or compared.statistics_only:
            raise InputError(f"{compared.name} holds statistics already")
        if distributed.is_main():
            write_statistics(save_reference, known)
    warnings = []
    if reference.images is not None and reference.images.size != images.size:
        height, width = reference.images.size
        warnings.append(
            f"images have {images.size[1]}x{images.size[0]} pixels, the reference {width}x"
            f"{height}: resizing alone changes the distances"
        )
    # Folders come in class order, which the Inception Score's splits must not.
    scores = score(_shuffled(features), compared, place.network, device=place.device)
    report = Report(
        protocol="folder",
        title=f"{images.name} against {compared.name}",
        metrics=scores.metrics,
        reference={
            "source": compared.name,
            "images": compared.count if compared.count is not None else "not said by the file",
            "network": place.network.name,
        },
        samples={
            "source": images.name,
            "images": len(images),
            "size": f"{images.size[1]}x{images.size[0]}",
            "resizing": "none",
        },
        settings={"order": "shuffled, with seed 0"},
        warnings=[*warnings, *scores.warnings],
        pictures=[sheet_of(images, title="Images")],
    )
    sheet = neighbours_sheet(images, features, compared)
    if sheet is not None:
        report.pictures.append(sheet)
    return report


def _shuffled(features: Features) -> Features:
    order = np.random.default_rng(0).permutation(len(features))
    return dataclasses.replace(features, probabilities=features.probabilities[order])
