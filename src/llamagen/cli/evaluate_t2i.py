"""Draw an image of each caption and compare: FID with the captions' images, and CLIP score.

The published protocol: 30,000 captions of COCO's val2014, FID at 256x256 against those images, and
the CLIP score of ViT-B/32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llamagen.cli.evaluation import EvaluationOptions, NetworkOptions
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.evaluation.protocols.t2i import Clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
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
    guidance_scale: float | None = None
    """Default, as for the next: the model's own setting."""
    top_k: int | None = None
    """Draw from the k likeliest codes; 0 means all."""
    top_p: float | None = None
    """Draw from the likeliest codes that reach probability p; 1 means all."""
    temperature: float | None = None
    """Below 1 for less variety, above 1 for more."""
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
    from llamagen.evaluation.protocols.common import Workplace, compared_side
    from llamagen.evaluation.protocols.t2i import TextSampling, evaluate_texts
    from llamagen.evaluation.reference import ReferenceSource
    from llamagen.text.prompt_files import read_prompts

    texts = [text for text, _ in read_prompts(options.prompts_file, column=options.prompt_column)]
    kept = min(options.count, len(texts))
    names = ("guidance_scale", "top_k", "top_p", "temperature")
    sampling = TextSampling(
        prompts=tuple(texts[index * len(texts) // kept] for index in range(kept)),
        seed=options.seed,
        batch_size=options.batch_size,
        settings={name: getattr(options, name) for name in names},
    )
    with options.processes() as device:
        pipeline = options.load(options.model, device)
        if pipeline.labels is not None:
            raise InputError(f"{pipeline.name} draws classes, not texts; use evaluate c2i")
        side = compared_side(pipeline, options.size)
        sampling = dataclasses.replace(sampling, size=side)
        clip = None if without_clip else _open_clip(str(options.clip), device)
        reference = place = None
        if options.reference is not None:
            reference = ReferenceSource.open(options.reference, options.source.config(), size=side)
            network = options.compare.open(options.out, reference.images, device)
            place = Workplace(out=options.out, network=network, device=device)
        report = evaluate_texts(pipeline, sampling, options.out, place, reference, clip)
        options.finish(report)


def _open_clip(source: str, device: torch.device) -> Clip:
    from llamagen.evaluation.networks.clip import ClipEncoder
    from llamagen.evaluation.protocols.t2i import Clip
    from llamagen.support import distributed

    with distributed.main_first():
        encoder = ClipEncoder.from_pretrained(source, device=device)
    return Clip(
        name=encoder.name,
        images=encoder.encode_images,
        texts=lambda captions: encoder.encode_texts(list(captions)),
    )
