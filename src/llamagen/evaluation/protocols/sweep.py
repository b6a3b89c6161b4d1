"""One protocol at many sampling settings: which guidance scale, which top-k."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from llamagen.evaluation.protocols.c2i import ClassSampling, plan_classes
from llamagen.evaluation.protocols.common import (
    SAMPLES_FOLDER,
    Workplace,
    describe_samples,
    sheet_of,
)
from llamagen.evaluation.reference import ReferenceSource
from llamagen.evaluation.report import Curve, Report, Table
from llamagen.evaluation.samples import draw_samples
from llamagen.evaluation.scores import Scores, score
from llamagen.pipeline import Pipeline

_CHOSEN = (
    "the best of many settings, chosen on these very samples: measure it again with another seed"
)


def evaluate_sweep(
    pipeline: Pipeline,
    reference: ReferenceSource,
    sampling: ClassSampling,
    place: Workplace,
    *,
    guidance_scales: Sequence[float],
    top_ks: Sequence[int],
) -> Report:
    """Draws and compares at every pair of settings; to be called in every process.

    Every pair has the same classes and seeds. Those that are finished are not done again.

    Raises:
        InputError: model, reference, network and folder do not fit together.
        OSError: the disk is full.
    """
    pairs = list(itertools.product(top_ks, guidance_scales))
    compared, _ = place.reference(reference)
    found: dict[tuple[int, float], Scores] = {}
    pictures = []
    for top_k, guidance in pairs:
        at = dataclasses.replace(sampling, top_k=top_k, guidance_scale=guidance)
        name = f"guidance {guidance:g}, top-k {top_k or 'all'}"
        samples = draw_samples(
            pipeline,
            plan_classes(pipeline, at),
            place.out / SAMPLES_FOLDER / f"guidance-{guidance:g}-top-k-{top_k}",
            batch_size=at.batch_size,
            **at.settings(pipeline.name),
        )
        features = place.features(samples, name)
        found[top_k, guidance] = score(features, compared, place.network, device=place.device)
        pictures.append(sheet_of(samples, title=name))
    metrics = list(next(iter(found.values())).metrics)
    frechet = metrics[0]
    best = min(pairs, key=lambda pair: found[pair].metrics[frechet])
    return Report(
        protocol="sweep",
        title=f"{pipeline.name}: {len(pairs)} settings of {sampling.count:,} samples each",
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
        settings={"model": pipeline.name, "seed": sampling.seed, "classes": sampling.order},
        warnings=[_CHOSEN, *found[best].warnings],
        tables=[_table(found, metrics)],
        curves=[_curve(found, name, guidance_scales, top_ks) for name in metrics],
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


def _curve(
    found: dict[tuple[int, float], Scores],
    metric: str,
    guidance_scales: Sequence[float],
    top_ks: Sequence[int],
) -> Curve:
    return Curve(
        title=metric,
        x="guidance scale",
        series={
            f"top-k {top_k or 'all'}": [
                (scale, found[top_k, scale].metrics[metric]) for scale in sorted(guidance_scales)
            ]
            for top_k in top_ks
        },
    )
