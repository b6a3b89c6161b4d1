"""Draw an image of each caption and compare: FID with the captions' images, and CLIP score.

The published protocol: 30,000 captions of COCO's val2014, FID at 256x256 against those images, and
the CLIP score of ViT-B/32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from llamagen.cli.evaluation import EvaluationOptions, NetworkOptions
from llamagen.cli.options import SettingOptions, given_settings
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SettingOptions, EvaluationOptions):
    """Options of ``llamagen evaluate t2i``."""

    model: str | None = None
    """Name (t2i-XL-256), pipeline folder or hub repository."""
    prompts_file: Path | None = None
    """Captions (.txt, .csv, .tsv, .jsonl, .json, as those of COCO and PartiPrompts)."""
    prompt_column: str | None = None
    """Column of the captions in that file. Default: prompt, text or caption."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 30_000
    """Captions at most, taken evenly from the whole file."""
    reference: str | None = None
    """The captions' own images: a folder, an .npz file, or any other source that training takes.
    Without it the FID is left out."""
    size: int | None = None
    """Side in pixels at which images are compared. Default: 256 for published models, as
    published; for others the size of their images."""
    seed: int = 0
    """Of the first image; the next get the next numbers."""
    batch_size: int | None = None
    """Images drawn at once. Default: as many as fit into memory."""
    clip: str | None = "openai/clip-vit-base-patch32"
    """CLIP model for the CLIP score: hub repository or folder; "none" leaves it out."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)


def run(options: Options) -> None:
    """Draws, compares and reports."""
    if options.prompts_file is None:
        raise InputError("no captions were named; give --prompts-file")
    without_clip = options.clip is None or options.clip.lower() == "none"
    if options.reference is None and without_clip:
        raise InputError("there is nothing to measure; give --reference or --clip")
    if options.count < 1:
        raise InputError(f"--num-images is {options.count}, expected at least 1")
    from llamagen.data.sources import read_prompts
    from llamagen.evaluation.networks.clip import ClipEncoder
    from llamagen.evaluation.protocols.common import Workplace
    from llamagen.evaluation.protocols.t2i import evaluate_texts
    from llamagen.evaluation.reference import ReferenceSource
    from llamagen.evaluation.samples import SamplePlan, compared_side
    from llamagen.support import distributed

    texts = [text for text, _ in read_prompts(options.prompts_file, column=options.prompt_column)]
    count = min(options.count, len(texts))
    with options.processes() as device:
        pipeline = options.load(options.model, device)
        if pipeline.labels is not None:
            raise InputError(f"{pipeline.name} draws classes, not texts; use evaluate c2i")
        plan = SamplePlan.of_prompts(
            pipeline,
            [texts[index * len(texts) // count] for index in range(count)],
            seed=options.seed,
            size=options.size,
            **given_settings(options),
        )
        clip = None
        if not without_clip:
            with distributed.main_first():
                clip = ClipEncoder.from_pretrained(str(options.clip), device=device)
        reference = place = None
        if options.reference is not None:
            reference = ReferenceSource.open(
                options.reference,
                options.source.config(),
                size=compared_side(pipeline, options.size),
            )
            network = options.compare.open(options.out, reference.images, device)
            place = Workplace(out=options.out, network=network, device=device)
        report = evaluate_texts(
            pipeline,
            plan,
            options.out,
            place,
            reference,
            clip,
            batch_size=options.batch_size,
        )
        options.finish(report)
