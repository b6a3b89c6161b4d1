"""Compare any images with any others: FID and its relatives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from llamagen.cli.evaluation import EvaluationOptions, NetworkOptions
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of ``llamagen evaluate folder``."""

    images: tyro.conf.Positional[str | None] = None
    """What is evaluated: a folder of images, an .npz file with them, or any other source that
    training takes."""
    reference: tyro.conf.Positional[str | None] = None
    """What it is compared with: the same, or an .npz file of ADM's statistics."""
    size: int | None = None
    """Side in pixels that the middle square of each image is cropped to. Default: images are taken
    as they are, and must have one size."""
    save_reference: Path | None = None
    """Also write the reference's statistics, as ADM's evaluator reads them."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)


def run(options: Options) -> None:
    """Compares and reports."""
    if options.images is None or options.reference is None:
        raise InputError("two sets of images are needed: llamagen evaluate folder A B")
    from llamagen.evaluation.protocols.common import Workplace
    from llamagen.evaluation.protocols.folders import evaluate_folder
    from llamagen.evaluation.reference import ReferenceSource

    with options.processes() as device:
        config = options.source.config()
        given = ReferenceSource.open(options.images, config, size=options.size)
        if given.images is None or given.archive is not None:
            raise InputError(f"{options.images} holds statistics; give the images themselves")
        reference = ReferenceSource.open(options.reference, config, size=options.size)
        network = options.compare.open(options.out, reference.images, device)
        place = Workplace(out=options.out, network=network, device=device)
        options.finish(
            evaluate_folder(given.images, reference, place, save_reference=options.save_reference)
        )
