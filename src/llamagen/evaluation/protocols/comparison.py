"""Generated images, or any others, against a reference (paper sections 4.2 and 4.3)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llamagen.evaluation.features import ReferenceSource, write_statistics
from llamagen.evaluation.image_sets import ImageSet, Pieces, in_batches, size_text, write_images
from llamagen.evaluation.metrics import clip_score
from llamagen.evaluation.networks.clip import ClipEncoder
from llamagen.evaluation.protocols.common import Scores, Workplace, few_warnings, samples_sheet
from llamagen.evaluation.report import Curve, Report, Table
from llamagen.evaluation.samples import PUBLISHED, SIZE, SamplePlan, draw_samples
from llamagen.pipeline import Pipeline
from llamagen.support import distributed
from llamagen.support.devices import dtype_name
from llamagen.support.errors import InputError

_SAMPLES_FOLDER = "samples"
_CLIP_BATCH = 64
_CHOSEN = (
    "the best of many settings, chosen on these very samples: measure it again with another seed"
)
_PUBLISHED = Table(
    title="Published",
    columns=("model", "codes", "guidance", "FID-50k"),
    rows=tuple((model, f"{grid}x{grid}", scale, fid) for model, grid, scale, fid in PUBLISHED),
    note="arXiv 2406.06525: 50,000 samples at 256x256 against ADM's training-set statistics.",
)


def evaluate_classes(
    pipeline: Pipeline,
    plan: SamplePlan,
    reference: ReferenceSource,
    place: Workplace,
    *,
    batch_size: int | None = None,
    npz: Path | None = None,
) -> Report:
    """Generate images of all classes and compare them; called in every process of a run.

    Images and features that are in the folder are not computed again; by default as many images are
    generated at once as fit into memory. A reference of images has the size of the samples, which
    are also written to ``npz`` in the form of ADM's evaluator.
    """
    samples = draw_samples(pipeline, plan, place.out / _SAMPLES_FOLDER, batch_size=batch_size)
    if npz is not None and distributed.is_main():
        write_images(npz, samples, samples.labels)
    labels = pipeline.labels
    assert labels is not None
    names = [labels.name(int(prompt)) for prompt in plan.prompts]
    warnings = few_warnings(len(samples), 50_000, "samples")
    if place.has_inception and reference.archive is None:
        warnings.append(
            f"the reference {reference.name} is a set of images: published numbers are against "
            f"ADM's statistics of ImageNet's training images (VIRTUAL_imagenet256_labeled.npz)"
        )
    report = Report(
        protocol="c2i",
        title=f"{pipeline.name}: {len(samples):,} images of {len(labels)} classes",
        samples=samples.about(pipeline) | {"classes": plan.order},
        settings=_settings(pipeline, plan),
        warnings=warnings + _size_warnings(samples, reference.images, "samples"),
        pictures=[samples_sheet(samples, names)],
    )
    features, _ = place.compare(report, samples, reference, "samples")
    if place.has_inception:
        report.tables.append(_PUBLISHED)
        return report
    classes = labels.match(place.network.class_names, place.network.name)
    outputs = {classes[n]: k for k, n in enumerate(place.network.class_names) if n in classes}
    if missing := [name for label, name in enumerate(labels.names) if label not in outputs]:
        report.warnings.append(
            f"the classifier has no class {missing[0]!r}, so it does not say what samples show"
        )
        return report
    found = features.probabilities[:, [outputs[k] for k in range(len(labels))]].argmax(1)
    assert samples.labels is not None
    _add_classes(report, found, samples.labels, labels.names)
    return report


def evaluate_sweep(
    pipeline: Pipeline,
    plan: SamplePlan,
    reference: ReferenceSource,
    place: Workplace,
    *,
    guidance_scales: Sequence[float],
    top_ks: Sequence[int],
    batch_size: int | None = None,
) -> Report:
    """Generate and compare images at every pair of settings; called in every process of a run.

    Every pair has the classes, seeds and other settings of ``plan``. See ``evaluate_classes``.
    """
    compared = place.reference(reference)
    found: dict[tuple[int, float], Scores] = {}
    pictures = []
    root = place.out / _SAMPLES_FOLDER
    for top_k, guidance in itertools.product(top_ks, guidance_scales):
        name = f"guidance {guidance:g}, top-k {top_k or 'all'}"
        sampling = plan.sampling.replace(top_k=top_k, guidance_scale=guidance)
        own = dataclasses.replace(plan, sampling=sampling)
        folder = root / f"guidance-{guidance:g}-top-k-{top_k}"
        samples = draw_samples(pipeline, own, folder, batch_size=batch_size)
        found[top_k, guidance] = place.score(place.features(samples, name), compared)
        pictures.append(samples_sheet(samples, title=name))
    metrics = list(next(iter(found.values())).metrics)
    frechet = metrics[0]
    (top_k, guidance), best = min(found.items(), key=lambda item: item[1].metrics[frechet])
    rows = tuple(
        (pair[0] or "all", pair[1], *map(scores.metrics.get, metrics))
        for pair, scores in found.items()
    )
    return Report(
        protocol="sweep",
        title=f"{pipeline.name}: {len(found)} settings of {len(plan.prompts):,} samples each",
        metrics={
            "best_guidance_scale": guidance,
            "best_top_k": float(top_k),
            f"best_{frechet}": best.metrics[frechet],
        },
        reference={
            "source": reference.name,
            "images": compared.count,
            "network": place.network.name,
        },
        samples=samples.about(pipeline) | {"folder": str(root)},
        settings={"model": pipeline.name, "seed": plan.seed, "classes": plan.order},
        warnings=[_CHOSEN, *best.warnings],
        tables=[Table(title="Settings", columns=("top-k", "guidance", *metrics), rows=rows)],
        curves=[_curve(found, name) for name in metrics],
        pictures=pictures,
    )


def evaluate_texts(
    pipeline: Pipeline,
    plan: SamplePlan,
    out: Path,
    place: Workplace | None,
    reference: ReferenceSource | None,
    clip: ClipEncoder | None,
    *,
    batch_size: int | None = None,
) -> Report:
    """Generate an image of each caption and compare; called in every process of a run.

    Without ``place`` or ``reference``, the captions' own images, the FID is left out; without
    ``clip`` the CLIP score. See ``evaluate_classes``.
    """
    prompts = [str(prompt) for prompt in plan.prompts]
    pipeline.check_prompts(prompts)
    samples = draw_samples(pipeline, plan, out / _SAMPLES_FOLDER, batch_size=batch_size)
    report = Report(
        protocol="t2i",
        title=f"{pipeline.name}: images of {len(samples):,} captions",
        reference={"source": "none"},
        samples=samples.about(pipeline),
        settings=_settings(pipeline, plan),
        pictures=[samples_sheet(samples, prompts)],
    )
    if place is not None and reference is not None:
        report.warnings += few_warnings(len(samples), 30_000, "captions", "COCO's val2014")
        if samples.size != (SIZE, SIZE):
            found = size_text(samples.size)
            report.warnings.append(f"images are compared at {found}, not at {SIZE}x{SIZE}")
        place.compare(report, samples, reference, "samples")
    if clip is not None:
        report.metrics["clip_score"] = _mean_clip_score(samples, prompts, clip, out)
        report.settings["clip"] = clip.name
    return report


def evaluate_folder(
    images: ImageSet,
    reference: ReferenceSource,
    place: Workplace,
    *,
    save_reference: Path | None = None,
) -> Report:
    """Compare two sets of images; called in every process of a run.

    The reference's statistics are written to ``save_reference`` in the form of ADM's evaluator.
    """
    if save_reference is not None and reference.archive is not None:
        raise InputError(f"{reference.name} holds statistics already")
    report = Report(
        protocol="folder",
        title=f"{images.name} against {reference.name}",
        samples={
            "source": images.name,
            "images": len(images),
            "size": size_text(images.size),
            "resizing": "none",
        },
        settings={"order": "shuffled, with seed 0"},
        warnings=_size_warnings(images, reference.images, "images"),
        pictures=[samples_sheet(images, title="Images")],
    )
    # Folders come in class order, which the Inception Score's splits must not.
    _, compared = place.compare(report, images, reference, "images", shuffled=True)
    if save_reference is not None and distributed.is_main():
        assert compared.features is not None
        write_statistics(save_reference, compared.features, place.network)
    return report


def _settings(pipeline: Pipeline, plan: SamplePlan) -> dict[str, Any]:
    """Entries of a report."""
    return {
        "model": pipeline.name,
        **dataclasses.asdict(plan.sampling),
        "seed": plan.seed,
        "precision": dtype_name(pipeline.dtype),
    }


def _size_warnings(images: ImageSet, reference: ImageSet | None, what: str) -> list[str]:
    if reference is None or reference.size == images.size:
        return []
    own, other = size_text(images.size), size_text(reference.size)
    return [
        f"{what} have {own} pixels, the reference {other}: resizing alone changes the distances"
    ]


def _add_classes(
    report: Report, found: np.ndarray, wanted: np.ndarray, names: Sequence[str]
) -> None:
    """Add how often a classifier finds each class where it was wanted."""
    rows = []
    for label in np.unique(wanted).tolist():
        own = found[wanted == label]
        confused = np.bincount(own[own != label], minlength=len(names))
        other = names[int(confused.argmax())] if confused.any() else None
        rows.append((names[label], len(own), float((own == label).mean()), other))
    report.metrics["classifier_accuracy"] = float(np.mean([row[2] for row in rows]))
    columns = ("class", "samples", "recognised", "most often taken for")
    note = "By the classifier, which was trained on the reference."
    report.tables.append(Table(title="Classes", columns=columns, rows=tuple(rows), note=note))


def _curve(found: dict[tuple[int, float], Scores], metric: str) -> Curve:
    series: dict[str, list[tuple[float, float]]] = {}
    for (top_k, guidance), scores in sorted(found.items(), key=lambda item: item[0][1]):
        series.setdefault(f"top-k {top_k or 'all'}", []).append((guidance, scores.metrics[metric]))
    return Curve(title=metric, x="guidance scale", series=series)


def _mean_clip_score(
    images: ImageSet, prompts: list[str], clip: ClipEncoder, folder: Path
) -> float:
    """CLIP score of all samples; every process scores a share."""

    def scores(pixels: Tensor, items: range) -> dict[str, np.ndarray]:
        texts = prompts[items.start : items.stop]
        features = (clip.encode_images(pixels), clip.encode_texts(texts))
        return {"score": clip_score(*(each.cpu().numpy() for each in features))}

    settings = {"clip": clip.fingerprint, "images": images.identity}
    pieces = Pieces.named(folder, "clip", settings, len(images))
    pieces.compute(in_batches(images, _CLIP_BATCH, scores), "CLIP score")
    return float(pieces.rows("score").mean())
