"""Class-conditional images against a reference (paper section 4.2; ADM's protocol)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llamagen.evaluation.features import FeatureNetwork, Features
from llamagen.evaluation.image_sets import ImageSet, write_images
from llamagen.evaluation.protocols.common import (
    SAMPLES_FOLDER,
    SHEET_IMAGES,
    Workplace,
    describe_samples,
    describe_settings,
    neighbours_sheets,
    samples_sheet,
    size_warnings,
)
from llamagen.evaluation.published import CLASS_CONDITIONAL, SAMPLES
from llamagen.evaluation.reference import INCEPTION, Reference, ReferenceSource
from llamagen.evaluation.report import Report, Table
from llamagen.evaluation.samples import LabelOrder, SamplePlan, Samples, draw_samples
from llamagen.pipeline import Pipeline
from llamagen.support import distributed
from llamagen.support.labels import Labels


def evaluate_classes(
    pipeline: Pipeline,
    plan: SamplePlan,
    reference: ReferenceSource,
    place: Workplace,
    *,
    order: LabelOrder = "balanced",
    batch_size: int | None = None,
    npz: Path | None = None,
) -> Report:
    """Generate images of all classes and compare them; called in every process of a run.

    Images and features that are in the folder are not computed again.

    Args:
        pipeline: class-conditional.
        plan: see ``SamplePlan.of_classes``.
        reference: statistics, or images at the size of the samples.
        place: network, device and folder.
        order: of the plan, for the report.
        batch_size: images generated at once; by default as many as fit into memory.
        npz: file that the samples are written to in the form of ADM's evaluator.

    Raises:
        InputError: model, reference, network and folder do not fit together.
        OSError: the disk is full.
    """
    samples = draw_samples(pipeline, plan, place.out / SAMPLES_FOLDER, batch_size=batch_size)
    if npz is not None and distributed.is_main():
        write_images(npz, samples, samples.labels)
    features = place.features(samples, "samples")
    compared = place.reference(reference)
    assert pipeline.labels is not None
    names = [pipeline.labels.name(int(prompt)) for prompt in plan.prompts[:SHEET_IMAGES]]
    report = Report(
        protocol="c2i",
        title=f"{pipeline.name}: {len(samples):,} images of {len(pipeline.labels)} classes",
        metrics={},
        reference={},
        samples=describe_samples(pipeline, samples, classes=order),
        settings=describe_settings(pipeline, samples),
        warnings=_protocol_warnings(samples, compared, place.network),
        pictures=[samples_sheet(samples, names), *neighbours_sheets(samples, features, compared)],
    )
    place.compare(report, features, compared)
    if place.network.fingerprint.startswith(INCEPTION):
        report.tables.append(_published())
    else:
        _add_classes(report, features, samples, pipeline.labels, reference.images)
    return report


def _protocol_warnings(
    samples: Samples, reference: Reference, network: FeatureNetwork
) -> list[str]:
    """Differences from the published protocol."""
    warnings = []
    if len(samples) < SAMPLES:
        warnings.append(
            f"{len(samples):,} samples instead of the protocol's {SAMPLES:,}: distances come out "
            f"higher with fewer"
        )
    if network.fingerprint.startswith(INCEPTION) and not reference.statistics_only:
        warnings.append(
            f"the reference {reference.name} is a set of images: published numbers are against "
            f"ADM's statistics of ImageNet's training images (VIRTUAL_imagenet256_labeled.npz)"
        )
    return warnings + size_warnings(samples, reference.images, "samples")


def _add_classes(
    report: Report,
    features: Features,
    samples: Samples,
    labels: Labels,
    reference: ImageSet | None,
) -> None:
    """Add how often a classifier of the reference recognises each class in its samples."""
    if reference is None or set(reference.class_names) != set(labels.names):
        return
    assert samples.labels is not None
    # The classifier's classes are those of the reference, in its order.
    classes = np.array([labels.names.index(name) for name in reference.class_names])
    found = classes[features.probabilities[:, : len(classes)].argmax(1)]
    rows = []
    for label in np.unique(samples.labels).tolist():
        own = samples.labels == label
        confused = np.bincount(found[own & (found != label)], minlength=len(labels))
        other = labels.name(int(confused.argmax())) if confused.any() else None
        rows.append(
            (labels.name(label), int(own.sum()), float((found[own] == label).mean()), other)
        )
    report.metrics["classifier_accuracy"] = float(np.mean([row[2] for row in rows]))
    report.tables.append(
        Table(
            title="Classes",
            columns=("class", "samples", "recognised", "most often taken for"),
            rows=tuple(rows),
            note="By the classifier, which was trained on the reference.",
        )
    )


def _published() -> Table:
    return Table(
        title="Published",
        columns=("model", "codes", "guidance", "FID-50k"),
        rows=tuple(
            (row.model, f"{row.grid}x{row.grid}", row.guidance_scale, row.fid)
            for row in CLASS_CONDITIONAL
        ),
        note="arXiv 2406.06525: 50,000 samples at 256x256 against ADM's training-set statistics.",
    )
