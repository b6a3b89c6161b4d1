"""Images of captions: FID against the captions' own images, and CLIP score (paper section 4.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import clip_score
from llamagen.evaluation.networks.clip import ClipEncoder
from llamagen.evaluation.pieces import make_pieces, named_pieces
from llamagen.evaluation.protocols.common import (
    SAMPLES_FOLDER,
    Workplace,
    describe_samples,
    describe_settings,
    neighbours_sheets,
    samples_sheet,
)
from llamagen.evaluation.published import SIZE, TEXT_SAMPLES
from llamagen.evaluation.reference import ReferenceSource
from llamagen.evaluation.report import Report
from llamagen.evaluation.samples import SamplePlan, Samples, draw_samples
from llamagen.pipeline import Pipeline
from llamagen.support.artifact import Advance

_BATCH = 64


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

    Args:
        pipeline: text-conditional.
        plan: see ``SamplePlan.of_prompts``.
        out: folder of the samples.
        place: with the network for FID; None leaves it out.
        reference: the captions' own images; None leaves the FID out.
        clip: for the CLIP score; None leaves it out.
        batch_size: images generated at once; by default as many as fit into memory.

    Raises:
        InputError: model, captions, reference and folder do not fit together.
        OSError: the disk is full.
    """
    prompts = [str(prompt) for prompt in plan.prompts]
    pipeline.check_prompts(prompts)
    samples = draw_samples(pipeline, plan, out / SAMPLES_FOLDER, batch_size=batch_size)
    report = Report(
        protocol="t2i",
        title=f"{pipeline.name}: images of {len(samples):,} captions",
        metrics={},
        reference={"source": "none"},
        samples=describe_samples(pipeline, samples),
        settings=describe_settings(pipeline, samples),
        pictures=[samples_sheet(samples, prompts)],
    )
    if place is not None and reference is not None:
        features = place.features(samples, "samples")
        compared = place.reference(reference)
        report.warnings += _protocol_warnings(samples)
        report.pictures += neighbours_sheets(samples, features, compared)
        place.compare(report, features, compared)
    if clip is not None:
        report.metrics["clip_score"] = _mean_clip_score(samples, prompts, clip, out)
        report.settings["clip"] = clip.name
    return report


def _mean_clip_score(
    images: ImageSet, prompts: list[str], clip: ClipEncoder, folder: Path
) -> float:
    """CLIP score of all samples; every process scores a share."""

    def scores(items: range, advance: Advance) -> dict[str, Any]:
        found = []
        for start in items[::_BATCH]:
            stop = min(items.stop, start + _BATCH)
            pixels = torch.from_numpy(np.array(images.read(start, stop))).movedim(-1, 1)
            features = (clip.encode_images(pixels), clip.encode_texts(prompts[start:stop]))
            found.append(clip_score(*(each.cpu().numpy() for each in features)))
            advance(stop - start)
        return {".npz": {"score": np.concatenate(found)}}

    settings = {"clip": clip.name, "images": images.identity}
    pieces = named_pieces(folder, "clip", settings, len(images))
    make_pieces(pieces, scores, "CLIP score")
    return float(pieces.rows("score").mean())


def _protocol_warnings(samples: Samples) -> list[str]:
    """Differences from the published protocol."""
    warnings: list[str] = []
    if len(samples) < TEXT_SAMPLES:
        warnings.append(
            f"{len(samples):,} captions instead of the protocol's {TEXT_SAMPLES:,} (COCO's "
            f"val2014): distances come out higher with fewer"
        )
    if samples.size != (SIZE, SIZE):
        height, width = samples.size
        warnings.append(f"images are compared at {width}x{height}, not at {SIZE}x{SIZE}")
    return warnings
