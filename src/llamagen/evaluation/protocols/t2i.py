"""Images of captions: FID against the captions' own images, and CLIP score (paper section 4.3)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import clip_score
from llamagen.evaluation.pieces import Pieces
from llamagen.evaluation.protocols.common import (
    SAMPLES_FOLDER,
    Workplace,
    describe_samples,
    describe_settings,
    neighbours_sheet,
    sheet_of,
)
from llamagen.evaluation.published import SIZE, TEXT_SAMPLES
from llamagen.evaluation.reference import ReferenceSource
from llamagen.evaluation.report import Report
from llamagen.evaluation.samples import SamplePlan, draw_samples
from llamagen.evaluation.scores import score
from llamagen.pipeline import Pipeline

_BATCH = 64

ClipFeatures = Callable[[Tensor], Tensor]
"""uint8 (B, 3, H, W) to features (B, D)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """CLIP's two encoders."""

    name: str
    images: ClipFeatures
    texts: Callable[[Sequence[str]], Tensor]
    """Captions to features (B, D)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSampling:
    """What is drawn, and how."""

    prompts: tuple[str, ...]
    """One image of each."""
    seed: int = 0
    size: int | None = SIZE
    """Side in pixels at which images are compared; None keeps them as they are drawn."""
    batch_size: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What ``Pipeline.__call__`` takes, where it is not the model's own."""


def evaluate_texts(
    pipeline: Pipeline,
    sampling: TextSampling,
    out: Path,
    place: Workplace | None,
    reference: ReferenceSource | None,
    clip: Clip | None,
) -> Report:
    """Draws an image of each caption and compares; to be called in every process.

    Args:
        pipeline: text-conditional.
        sampling: the captions, and how they are drawn.
        out: keeps the samples.
        place: with the network for FID; None leaves it out.
        reference: the captions' own images; None leaves the FID out.
        clip: for the CLIP score; None leaves it out.

    Raises:
        InputError: model, captions, reference and folder do not fit together.
        OSError: the disk is full.
    """
    pipeline.check_prompts(sampling.prompts)
    plan = SamplePlan(prompts=sampling.prompts, seed=sampling.seed, size=sampling.size)
    samples = draw_samples(
        pipeline, plan, out / SAMPLES_FOLDER, batch_size=sampling.batch_size, **sampling.settings
    )
    report = Report(
        protocol="t2i",
        title=f"{pipeline.name}: images of {len(samples):,} captions",
        metrics={},
        reference={"source": "none" if reference is None else reference.name},
        samples=describe_samples(pipeline, samples),
        settings=describe_settings(pipeline, samples, sampling.settings),
        warnings=_differences(len(samples), sampling.size, reference),
        pictures=[sheet_of(samples, sampling.prompts)],
    )
    if place is not None and reference is not None:
        features = place.features(samples, "samples")
        compared, _ = place.reference(reference)
        scores = score(features, compared, place.network, device=place.device)
        report.metrics |= scores.metrics
        report.warnings += scores.warnings
        report.reference |= {"images": compared.count, "network": place.network.name}
        sheet = neighbours_sheet(samples, features, compared)
        if sheet is not None:
            report.pictures.append(sheet)
    if clip is not None:
        report.metrics["clip_score"] = _mean_clip_score(samples, sampling.prompts, clip, out)
        report.settings["clip"] = clip.name
    return report


def _mean_clip_score(images: ImageSet, prompts: Sequence[str], clip: Clip, folder: Path) -> float:
    """Over all samples; every process scores a share."""

    @torch.inference_mode()
    def scored(first: int, last: int, advance: Callable[[int], object]) -> dict[str, np.ndarray]:
        scores = []
        for start in range(first, last, _BATCH):
            stop = min(last, start + _BATCH)
            pixels = torch.from_numpy(np.array(images.read(start, stop))).movedim(-1, 1)
            found = (clip.images(pixels), clip.texts(prompts[start:stop]))
            scores.append(clip_score(*(each.float().cpu().numpy() for each in found)))
            advance(stop - start)
        return {"score": np.concatenate(scores)}

    whole = hashlib.sha256(f"{clip.name} {images.identity}".encode()).hexdigest()
    pieces = Pieces(folder / f"clip-{whole[:16]}", len(images))
    pieces.make(scored, "CLIP score")
    return float(pieces.rows("score").mean())


def _differences(count: int, size: int | None, reference: ReferenceSource | None) -> list[str]:
    warnings: list[str] = []
    if reference is None:
        return warnings
    if count < TEXT_SAMPLES:
        warnings.append(
            f"{count:,} captions instead of the protocol's {TEXT_SAMPLES:,} (COCO's val2014): "
            f"distances come out higher with fewer"
        )
    if size != SIZE:
        warnings.append(
            f"images are compared at {size or 'the size they are drawn at'}, not at {SIZE}"
        )
    return warnings
