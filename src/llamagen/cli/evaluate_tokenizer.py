"""Send images through an image tokenizer and compare them with themselves: rFID, PSNR, SSIM.

The published protocol: ImageNet's 50,000 validation images, cropped to 256x256, against the very
same images; at 384 and 512 reconstructions are resized to 256 before they are compared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llamagen.cli.evaluation import EvaluationOptions, NetworkOptions
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.evaluation.protocols.tokenizer import Perceptual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of ``llamagen evaluate tokenizer``."""

    images: tyro.conf.Positional[str | None] = None
    """Images: a folder, an .npz file, or any other source that training takes."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["-t"])] = "vq-16"
    """Name (vq-16, vq-8), folder, checkpoint file or hub repository."""
    size: int | None = None
    """Side in pixels that the middle square of each image is cropped to. Default: 256 for the
    published tokenizers, as published; for others images are taken as they are."""
    reference: str | None = None
    """Compare with this for rFID instead of the images themselves: not as published."""
    rfid: bool = True
    """Compare in a network's features."""
    lpips: Literal["auto", "yes", "no"] = "auto"
    """Measure LPIPS too; auto does where its weights are on this machine."""
    lpips_weights: Path | None = None
    """File or folder of LPIPS's weights. Default: the cache, or a download with --lpips yes."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)


def run(options: Options) -> None:
    """Reconstructs, compares and reports."""
    if options.images is None:
        raise InputError("no images were named; give a folder")
    from llamagen.checkpoints import load_tokenizer
    from llamagen.checkpoints.names import find_public
    from llamagen.evaluation.protocols.common import Workplace
    from llamagen.evaluation.protocols.tokenizer import (
        RECONSTRUCTIONS_FOLDER,
        Reconstructions,
        evaluate_tokenizer,
    )
    from llamagen.evaluation.published import SIZE
    from llamagen.evaluation.reference import ReferenceSource
    from llamagen.support import distributed
    from llamagen.support.devices import find_dtype

    # float32 unless asked otherwise: this command measures the tokenizer, not the precision.
    exact = "float32" if options.dtype == "auto" else options.dtype
    with options.processes() as device:
        size = options.size or (SIZE if find_public(options.tokenizer) else None)
        given = ReferenceSource.open(options.images, options.source.config(), size=size)
        if given.images is None or given.archive is not None:
            raise InputError(f"{options.images} holds statistics; give the images themselves")
        with distributed.main_first():
            tokenizer = load_tokenizer(
                options.tokenizer, device=device, dtype=find_dtype(exact, device)
            )
        compared = SIZE if size is not None and size > SIZE else None
        reference = ReferenceSource.open(
            options.reference or options.images,
            options.source.config(),
            size=compared or size,
        )
        reconstructions = Reconstructions(
            tokenizer,
            given.images,
            options.out / RECONSTRUCTIONS_FOLDER,
            compared_size=compared,
        )
        place = None
        if options.rfid:
            network = options.compare.open(options.out, reference.images, device)
            place = Workplace(out=options.out, network=network, device=device)
        report = evaluate_tokenizer(
            options.tokenizer,
            reconstructions,
            reference,
            place,
            perceptual=_perceptual(options, device),
        )
        options.finish(report)


def _perceptual(options: Options, device: torch.device) -> Perceptual | None:
    """LPIPS, if it is wanted and there."""
    if options.lpips == "no":
        return None
    from llamagen.evaluation.networks.lpips import FILE_NAME, load_lpips
    from llamagen.support import distributed, storage

    here = options.lpips_weights is not None or (storage.cache_folder() / FILE_NAME).is_file()
    if options.lpips == "auto" and not here:
        return None
    with distributed.main_first():
        return load_lpips(options.lpips_weights).to(device)
