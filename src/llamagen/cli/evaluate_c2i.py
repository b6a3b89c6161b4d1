"""Draw images of all classes and compare them with a reference: FID and its relatives.

The published protocol: 50,000 samples, all classes as often, compared at 256x256 with ADM's
VIRTUAL_imagenet256_labeled.npz in Inception's features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llamagen.cli.evaluation import ClassSettings, EvaluationOptions, NetworkOptions
from llamagen.cli.options import given_settings
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ClassSettings, EvaluationOptions):
    """Options of ``llamagen evaluate c2i``."""

    model: str | None = None
    """Name (c2i-L-384), pipeline folder or hub repository."""
    reference: str | None = None
    """What samples are compared with: ADM's .npz file, or images: a folder of class folders, or
    any other source that training takes."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 50_000
    """Samples."""
    classes: Literal["balanced", "random"] = "balanced"
    """All classes as often, in random order; or the class of each drawn at random."""
    size: int | None = None
    """Side in pixels at which images are compared. Default: 256 for published models, else as they
    are drawn."""
    seed: int = 0
    """Of the classes' order, and of the first sample; the next get the next numbers."""
    batch_size: int | None = None
    """Images drawn at once. Default: as many as fit into memory."""
    npz: Path | None = None
    """Also write the samples as ADM's evaluator takes them."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)


def run(options: Options) -> None:
    """Draws, compares and reports."""
    if options.reference is None:
        raise InputError("no reference was named; give --reference an .npz file or images")
    if options.count < 2:
        raise InputError(f"--num-images is {options.count}, expected at least 2")
    from llamagen.evaluation.protocols.c2i import evaluate_classes
    from llamagen.evaluation.protocols.common import Workplace
    from llamagen.evaluation.reference import ReferenceSource
    from llamagen.evaluation.samples import SamplePlan, compared_side

    with options.processes() as device:
        pipeline = options.load(options.model, device)
        if pipeline.labels is None:
            raise InputError(f"{pipeline.name} draws texts, not classes; use evaluate t2i")
        plan = SamplePlan.of_classes(
            pipeline,
            options.count,
            order=options.classes,
            seed=options.seed,
            size=options.size,
            **given_settings(options),
        )
        reference = ReferenceSource.open(
            options.reference,
            options.source.config(),
            size=compared_side(pipeline, options.size),
        )
        network = options.compare.open(options.out, reference.images, device)
        report = evaluate_classes(
            pipeline,
            plan,
            reference,
            Workplace(out=options.out, network=network, device=device),
            order=options.classes,
            batch_size=options.batch_size,
            npz=options.npz,
        )
        options.finish(report)
