"""Measure how likely a model finds held-out images: bits per code, per pixel, by place."""

from __future__ import annotations

import dataclasses

import tyro

from llamagen.cli.evaluation import EvaluationOptions
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of ``llamagen evaluate likelihood``."""

    images: tyro.conf.Positional[str | None] = None
    """Images with the model's classes, or with captions: whatever training takes. Not those that
    the model was trained on."""
    model: str | None = None
    """Name, pipeline folder or hub repository."""


def run(options: Options) -> None:
    """Measures and reports."""
    if options.images is None:
        raise InputError("no images were named; give a folder")
    from llamagen.evaluation.image_sets import CollectedImages
    from llamagen.evaluation.protocols.likelihood import evaluate_likelihood

    with options.processes() as device:
        pipeline = options.load(options.model, device)
        rows, columns = pipeline.transformer.config.grid
        side = rows * pipeline.tokenizer.config.downsampling if rows == columns else None
        images = CollectedImages.open(options.images, options.source.config(), size=side)
        options.finish(evaluate_likelihood(pipeline, images, options.out))
