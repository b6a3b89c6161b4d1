"""Draw and compare at many sampling settings: which guidance scale and top-k suit a model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from llamagen.cli.evaluation import EvaluationOptions, NetworkOptions, SweepSettings
from llamagen.cli.options import given_settings
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SweepSettings, EvaluationOptions):
    """Options of ``llamagen evaluate sweep``."""

    model: str | None = None
    """Name (c2i-L-384), pipeline folder or hub repository; class-conditional."""
    reference: str | None = None
    """What samples are compared with: images that were not trained on, or ADM's .npz file."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Guidance scales to try."""
    top_ks: tuple[int, ...] = (0,)
    """Top-ks to try with each; 0 means all."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 5_000
    """Samples of each setting."""
    classes: Literal["balanced", "random"] = "balanced"
    """All classes as often, in random order; or the class of each drawn at random."""
    size: int | None = None
    """Side in pixels at which images are compared. Default: as for evaluate c2i."""
    seed: int = 0
    """Of the classes' order, and of the first sample."""
    batch_size: int | None = None
    """Images drawn at once. Default: as many as fit into memory."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)


def run(options: Options) -> None:
    """Draws, compares and reports."""
    if options.reference is None:
        raise InputError("no reference was named; give --reference an .npz file or images")
    if options.count < 2:
        raise InputError(f"--num-images is {options.count}, expected at least 2")
    if not options.guidance_scales or not options.top_ks:
        raise InputError("there are no settings to try; give --guidance-scales and --top-ks")
    from llamagen.evaluation.protocols.common import Workplace
    from llamagen.evaluation.protocols.sweep import evaluate_sweep
    from llamagen.evaluation.reference import ReferenceSource
    from llamagen.evaluation.samples import SamplePlan, compared_side

    with options.processes() as device:
        pipeline = options.load(options.model, device)
        if pipeline.labels is None:
            raise InputError(f"{pipeline.name} draws texts; evaluate sweep takes classes")
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
        report = evaluate_sweep(
            pipeline,
            plan,
            reference,
            Workplace(out=options.out, network=network, device=device),
            guidance_scales=options.guidance_scales,
            top_ks=options.top_ks,
            order=options.classes,
            batch_size=options.batch_size,
        )
        options.finish(report)
