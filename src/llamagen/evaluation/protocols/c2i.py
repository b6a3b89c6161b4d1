"""Class-conditional images against a reference (paper section 4.2; ADM's protocol)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llamagen.evaluation.features import FeatureNetwork, Features
from llamagen.evaluation.image_sets import ImageSet, write_images
from llamagen.evaluation.protocols.common import (
    SAMPLES_FOLDER,
    SHOWN,
    Workplace,
    compared_side,
    describe_samples,
    describe_settings,
    neighbours_sheet,
    sheet_of,
)
from llamagen.evaluation.published import CLASS_CONDITIONAL, SAMPLES, protocol_guidance
from llamagen.evaluation.reference import INCEPTION, Reference, ReferenceSource
from llamagen.evaluation.report import Report, Table
from llamagen.evaluation.samples import LabelOrder, SamplePlan, Samples, draw_samples
from llamagen.evaluation.scores import score
from llamagen.pipeline import Pipeline
from llamagen.support import distributed
from llamagen.support.labels import Labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassSampling:
    """What is drawn, and how."""

    count: int = SAMPLES
    """Images."""
    order: LabelOrder = "balanced"
    """All classes as often, in random order; or each image's class drawn at random."""
    seed: int = 0
    size: int | None = None
    """Side in pixels at which images are compared; larger ones are resized (bicubic, in float).
    Default: 256 for published models, else as they are drawn."""
    batch_size: int | None = None
    guidance_scale: float | None = None
    """Default: the paper's for published models, else the model's own setting."""
    guidance_stop: int | None = None
    top_k: int | None = None
    """Default: the paper's (all) for published models, else the model's own setting."""
    top_p: float | None = None
    temperature: float | None = None

    def compared_size(self, pipeline: Pipeline) -> int | None:
        """Side in pixels at which images of a model are compared; see ``compared_side``."""
        return compared_side(pipeline, self.size)

    def settings(self, model: str) -> dict[str, Any]:
        """What ``Pipeline.__call__`` is given."""
        names = ("guidance_scale", "guidance_stop", "top_k", "top_p", "temperature")
        settings = {name: getattr(self, name) for name in names}
        guidance = protocol_guidance(model)
        if guidance is not None:
            protocol = {"guidance_scale": guidance, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
            for name, value in protocol.items():
                if settings[name] is None:
                    settings[name] = value
        return settings


def evaluate_classes(
    pipeline: Pipeline,
    reference: ReferenceSource,
    sampling: ClassSampling,
    place: Workplace,
    *,
    npz: Path | None = None,
) -> Report:
    """Draws images of all classes and compares them; to be called in every process.

    What was drawn and computed before is not done again. ``npz`` gets the samples as ADM's
    evaluator takes them.

    Raises:
        InputError: model, reference, network and folder do not fit together.
        OSError: the disk is full.
    """
    plan, settings = plan_classes(pipeline, sampling), sampling.settings(pipeline.name)
    samples = draw_samples(
        pipeline, plan, place.out / SAMPLES_FOLDER, batch_size=sampling.batch_size, **settings
    )
    if npz is not None and distributed.is_main():
        write_images(npz, samples, samples.labels)
    features = place.features(samples, "samples")
    compared, _ = place.reference(reference)
    scores = score(features, compared, place.network, device=place.device)
    report = Report(
        protocol="c2i",
        title=f"{pipeline.name}: {len(samples):,} images of "
        f"{pipeline.transformer.config.num_classes} classes",
        metrics=scores.metrics,
        reference={
            "source": compared.name,
            "images": compared.count if compared.count is not None else "not said by the file",
            "network": place.network.name,
        },
        samples={**describe_samples(pipeline, samples), "classes": sampling.order},
        settings=describe_settings(pipeline, samples, settings),
        warnings=[*_differences(samples, compared, place.network), *scores.warnings],
    )
    names = _class_names(pipeline, samples)
    report.pictures.append(sheet_of(samples, names))
    sheet = neighbours_sheet(samples, features, compared)
    if sheet is not None:
        report.pictures.append(sheet)
    per_class = _per_class(features, samples, pipeline.labels, reference.images, place.network)
    if per_class is not None:
        report.tables.append(per_class)
        rows = [row[2] for row in per_class.rows]
        report.metrics["classifier_accuracy"] = float(np.mean(rows))
    if place.network.fingerprint.startswith(INCEPTION):
        report.tables.append(_published())
    return report


def plan_classes(pipeline: Pipeline, sampling: ClassSampling) -> SamplePlan:
    """Which classes are drawn, and at which size they are compared."""
    rows = pipeline.transformer.config.grid[0]
    drawn = rows * pipeline.tokenizer.config.downsampling
    size = sampling.compared_size(pipeline)
    return SamplePlan.of_classes(
        pipeline.transformer.config.num_classes,
        sampling.count,
        order=sampling.order,
        seed=sampling.seed,
        size=None if size == drawn else size,
    )


def _differences(samples: Samples, reference: Reference, network: FeatureNetwork) -> list[str]:
    """Where this is not the published protocol."""
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
    if reference.images is not None and reference.images.size != samples.size:
        height, width = reference.images.size
        warnings.append(
            f"samples have {samples.size[1]}x{samples.size[0]} pixels, the reference {width}x"
            f"{height}: resizing alone changes the distances"
        )
    return warnings


def _per_class(
    features: Features,
    samples: Samples,
    labels: Labels | None,
    reference: ImageSet | None,
    network: FeatureNetwork,
) -> Table | None:
    """Of each class, how often the classifier finds it in what was asked for."""
    if (
        network.fingerprint.startswith(INCEPTION)
        or labels is None
        or samples.labels is None
        or reference is None
        or set(reference.class_names) != set(labels.names)
    ):
        return None
    # The classifier's classes are those of the reference, in its order.
    classes = np.array([labels.names.index(name) for name in reference.class_names])
    found = classes[features.probabilities[:, : len(classes)].argmax(1)]
    rows = []
    for label in np.unique(samples.labels).tolist():
        own = samples.labels == label
        confused = np.bincount(found[own & (found != label)], minlength=len(labels))
        most = labels.name(int(confused.argmax())) if confused.any() else None
        rows.append((labels.name(label), int(own.sum()), float((found[own] == label).mean()), most))
    return Table(
        title="Classes",
        columns=("class", "samples", "recognised", "most often taken for"),
        rows=tuple(rows),
        note="By the classifier, which was trained on the reference.",
    )


def _class_names(pipeline: Pipeline, samples: Samples) -> list[str]:
    assert pipeline.labels is not None
    return [pipeline.labels.name(int(prompt)) for prompt in samples.plan.prompts[:SHOWN]]


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
