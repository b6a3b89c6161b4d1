"""The class-conditional protocol at many guidance scales and top-ks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from llamagen.evaluation.protocols.common import (
    SAMPLES_FOLDER,
    Workplace,
    describe_samples,
    samples_sheet,
)
from llamagen.evaluation.reference import ReferenceSource
from llamagen.evaluation.report import Curve, Report, Table
from llamagen.evaluation.samples import LabelOrder, SamplePlan, draw_samples
from llamagen.evaluation.scores import Scores, score
from llamagen.pipeline import Pipeline

_CHOSEN = (
    "the best of many settings, chosen on these very samples: measure it again with another seed"
)


def evaluate_sweep(
    pipeline: Pipeline,
    plan: SamplePlan,
    reference: ReferenceSource,
    place: Workplace,
    *,
    guidance_scales: Sequence[float],
    top_ks: Sequence[int],
    order: LabelOrder = "balanced",
    batch_size: int | None = None,
) -> Report:
    """Generate and compare images at every pair of settings; called in every process of a run.

    Every pair has the classes, seeds and other settings of ``plan``. See ``evaluate_classes``.

    Raises:
        InputError: model, reference, network and folder do not fit together.
        OSError: the disk is full.
    """
    compared = place.reference(reference)
    found: dict[tuple[int, float], Scores] = {}
    pictures = []
    for top_k, guidance in itertools.product(top_ks, guidance_scales):
        name = f"guidance {guidance:g}, top-k {top_k or 'all'}"
        sampling = plan.sampling.replace(top_k=top_k, guidance_scale=guidance)
        samples = draw_samples(
            pipeline,
            dataclasses.replace(plan, sampling=sampling),
            place.out / SAMPLES_FOLDER / f"guidance-{guidance:g}-top-k-{top_k}",
            batch_size=batch_size,
        )
        features = place.features(samples, name)
        found[top_k, guidance] = score(features, compared, place.network, device=place.device)
        pictures.append(samples_sheet(samples, title=name))
    metrics = list(next(iter(found.values())).metrics)
    frechet = metrics[0]
    best = min(found, key=lambda pair: found[pair].metrics[frechet])
    return Report(
        protocol="sweep",
        title=f"{pipeline.name}: {len(found)} settings of {len(plan):,} samples each",
        metrics={
            "best_guidance_scale": best[1],
            "best_top_k": float(best[0]),
            f"best_{frechet}": found[best].metrics[frechet],
        },
        reference={
            "source": compared.name,
            "images": compared.count,
            "network": place.network.name,
        },
        samples={**describe_samples(pipeline, samples), "folder": str(place.out / SAMPLES_FOLDER)},
        settings={"model": pipeline.name, "seed": plan.seed, "classes": order},
        warnings=[_CHOSEN, *found[best].warnings],
        tables=[_table(found, metrics)],
        curves=[_curve(found, name) for name in metrics],
        pictures=pictures,
    )


def _table(found: dict[tuple[int, float], Scores], metrics: list[str]) -> Table:
    return Table(
        title="Settings",
        columns=("top-k", "guidance", *metrics),
        rows=tuple(
            (top_k or "all", guidance, *(scores.metrics.get(name) for name in metrics))
            for (top_k, guidance), scores in found.items()
        ),
    )


def _curve(found: dict[tuple[int, float], Scores], metric: str) -> Curve:
    series: dict[str, list[tuple[float, float]]] = {}
    for (top_k, guidance), scores in found.items():
        series.setdefault(f"top-k {top_k or 'all'}", []).append((guidance, scores.metrics[metric]))
    return Curve(
        title=metric,
        x="guidance scale",
        series={name: sorted(points) for name, points in series.items()},
    )
