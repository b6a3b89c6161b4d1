"""Images through an image tokenizer and back, and what got lost on the way (paper section 4.1)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llamagen.backends.cpu.convolution import accelerate
from llamagen.data.views import center_crop
from llamagen.evaluation import image_sets
from llamagen.evaluation.features import ReferenceSource
from llamagen.evaluation.image_sets import ImageSet, PiecedImages, Pieces, as_arrays, size_text
from llamagen.evaluation.metrics import SSIM_WINDOW, codebook_use, psnr, ssim
from llamagen.evaluation.protocols.common import Workplace, few_warnings, grid
from llamagen.evaluation.report import Picture, Report, Table
from llamagen.generation.memory import decoding_batch_size
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support.artifact import Advance
from llamagen.support.devices import dtype_name
from llamagen.support.errors import InputError

_SHEET_IMAGES = 24
_RENAMED = {"fid": "rfid", "sfid": "rsfid"}
"""Metrics that have names of their own for reconstructions."""

_PUBLISHED = Table(
    title="Published",
    columns=("tokenizer", "size", "rFID", "PSNR", "SSIM as published"),
    # The SSIM is with a data range of 2 for images in [0, 1].
    rows=(
        ("VQ-16", 256, 2.19, 20.79, 0.675),
        ("VQ-16", 384, 0.94, None, None),
        ("VQ-16", 512, 0.70, None, None),
        ("VQ-8", 256, 0.59, None, None),
    ),
    note="arXiv 2406.06525: ImageNet's 50,000 validation images, against themselves at 256.",
)

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""LPIPS: two batches of images (B, 3, H, W) in [-1, 1] to distances (B,)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One image before and after, as RGB, and what ``compare`` finds between them."""

    path: Path
    original: Image.Image
    image: Image.Image
    psnr: float
    ssim: float
    ssim_published: float
    codes: np.ndarray
    """(rows, columns) int64."""


def prepare(
    image: Image.Image, *, downsampling: int, size: int | None = None, max_side: int | None = None
) -> Image.Image:
    """Crop an RGB image so that its sides are multiples of a tokenizer's ``downsampling``.

    To the middle square of side ``size``, as in the published evaluation; without it by less than
    ``downsampling`` pixels a side, once the long side was shrunk to ``max_side``. InputError if
    ``size`` is no such multiple, or the image is smaller than one code.
    """
    if size is not None:
        if size < 1 or size % downsampling:
            raise InputError(
                f"size {size} is not a positive multiple of the tokenizer's downsampling "
                f"{downsampling}; use {max(1, round(size / downsampling)) * downsampling}"
            )
        return center_crop(image, size)
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    width, height = (side // downsampling * downsampling for side in image.size)
    if min(width, height) == 0:
        raise InputError(
            f"an image of {image.width}x{image.height} pixels is smaller than one code of "
            f"{downsampling}x{downsampling}; give a size to enlarge it to"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def reconstruct(
    tokenizer: ImageTokenizer, images: Iterable[tuple[Path, Image.Image]]
) -> Iterator[Reconstruction]:
    """Reconstruct prepared images, neighbours of the same size in one batch."""
    for (width, height), group in itertools.groupby(images, lambda pair: pair[1].size):
        limit = batch_limit(tokenizer, height, width)
        while batch := list(itertools.islice(group, limit)):
            before = np.stack([np.asarray(image) for _, image in batch])
            pixels = torch.from_numpy(before).movedim(-1, 1)
            codes, decoded = encode_and_decode(tokenizer, pixels)
            after = as_arrays(decoded)
            measured = compare(before, after)
            for index, (path, image) in enumerate(batch):
                yield Reconstruction(
                    path=path,
                    original=image,
                    image=Image.fromarray(after[index]),
                    **{name: float(values[index]) for name, values in measured.items()},
                    codes=codes[index].cpu().numpy(),
                )


def batch_limit(tokenizer: ImageTokenizer, height: int, width: int) -> int:
    """Return how many images of a size fit into memory at once."""
    grid = tokenizer.config.grid_of(height, width)
    return decoding_batch_size(
        tokenizer.config, grid, device=tokenizer.device, dtype=tokenizer.dtype
    )


@torch.inference_mode()
def encode_and_decode(tokenizer: ImageTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (B, h, w) of uint8 (B, 3, H, W), and their float32 images (B, 3, H, W)."""
    codes = accelerate(tokenizer).encode(uint8_to_images(pixels.to(tokenizer.device)))
    return codes, tokenizer.decode(codes).float()


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Return PSNR in dB and SSIM of pairs of images (N, H, W, 3) uint8, each (N,).

    SSIM has the true data range; ``ssim_published`` is as the published code computes it, with a
    data range of 2 for images in [0, 1]. Both are NaN where a side is below 7 pixels.
    """
    similarity, published = np.full((2, len(before)), np.nan)
    if min(before.shape[1:3]) >= SSIM_WINDOW:
        similarity = ssim(before, after)
        published = ssim(before / 255.0, after / 255.0, data_range=2.0)
    return {"psnr": psnr(before, after), "ssim": similarity, "ssim_published": published}


class Reconstructions(PiecedImages):
    """A tokenizer's reconstructions of images, in a folder."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        originals: ImageSet,
        root: Path,
        *,
        compared_size: int | None = None,
    ) -> None:
        """Name their folder in ``root``, which ``compute`` fills.

        Reconstructions are resized to squares of side ``compared_size``; see ``as_arrays``.
        """
        tokenizer.config.grid_of(*originals.size)
        self.tokenizer, self.originals, self.compared_size = tokenizer, originals, compared_size
        self.name = f"reconstructions of {originals.name}"
        settings = {
            "tokenizer": tokenizer.fingerprint(),
            "dtype": dtype_name(tokenizer.dtype),
            "images": originals.identity,
            "compared_size": compared_size,
        }
        self.pieces = Pieces.named(root, "reconstructions", settings, len(originals))
        self.identity = self.pieces.identity
        self._with_lpips = Pieces.named(
            root, "reconstructions", {**settings, "lpips": True}, len(originals)
        )

    def compute(self, perceptual: Perceptual | None) -> None:
        """Make the pieces that are not there yet; called in every process of a run.

        They hold images, what ``compare`` finds, LPIPS (or NaN), and the occurrences of each code.
        """
        config = self.tokenizer.config
        if perceptual is not None:
            # Those that were measured without it do not have it.
            self.pieces = self._with_lpips

        @torch.inference_mode()
        def measure(pixels: Tensor, _: range) -> dict[str, np.ndarray]:
            codes, decoded = encode_and_decode(self.tokenizer, pixels)
            lpips = np.full(len(pixels), np.nan)
            if perceptual is not None:
                before = uint8_to_images(pixels.to(decoded.device))
                lpips = perceptual(before, decoded.clamp(-1, 1)).flatten().cpu().numpy()
            return {
                "images": as_arrays(decoded, self.compared_size),
                **compare(pixels.movedim(1, -1).numpy(), as_arrays(decoded)),
                "lpips": lpips,
                "codes": codes.cpu().numpy(),
            }

        limit = batch_limit(self.tokenizer, *self.originals.size)
        make = image_sets.in_batches(self.originals, limit, measure)

        def make_piece(items: range, advance: Advance) -> dict[str, Any]:
            found = make(items, advance)[".npz"]
            counts = np.bincount(found.pop("codes").flatten(), minlength=config.codebook_size)
            return {".npz": {**found, "counts": counts}}

        self.pieces.compute(make_piece, "reconstructing")


def evaluate_tokenizer(
    name: str,
    reconstructions: Reconstructions,
    reference: ReferenceSource,
    place: Workplace | None,
    *,
    perceptual: Perceptual | None = None,
) -> Report:
    """Reconstruct images and compare them with themselves; called in every process of a run.

    ``name`` is the tokenizer's. The reference for rFID are the images themselves, at the size they
    are compared at. Without ``place`` rFID is left out, without ``perceptual`` LPIPS.
    """
    reconstructions.compute(perceptual)
    originals, tokenizer = reconstructions.originals, reconstructions.tokenizer
    pieces = reconstructions.pieces
    decibels = pieces.rows("psnr")
    report = Report(
        protocol="tokenizer",
        title=f"{name}: {len(originals):,} reconstructions",
        reference={"source": reference.name, "images": len(originals), "network": "none"},
        samples={
            "images": len(originals),
            "source": originals.name,
            "size": size_text(originals.size),
            "compared at": reconstructions.compared_size or size_text(originals.size),
        },
        settings={
            "tokenizer": name,
            "codebook": tokenizer.config.codebook_size,
            "precision": dtype_name(tokenizer.dtype),
        },
        warnings=_protocol_warnings(originals, reference),
        pictures=[_sheet(reconstructions, decibels)],
    )
    if place is not None:
        place.compare(report, reconstructions, reference, "reconstructions", neighbours=False)
        report.metrics = {_RENAMED.get(key, key): value for key, value in report.metrics.items()}
        if place.has_inception:
            report.tables.append(_PUBLISHED)
    counts = [pieces.read_npz(piece)["counts"] for piece in range(len(pieces))]
    usage, perplexity = codebook_use(np.sum(counts, axis=0))
    finite = decibels[np.isfinite(decibels)]
    report.metrics |= {
        "psnr": float(finite.mean()) if len(finite) else float("inf"),
        "ssim": float(pieces.rows("ssim").mean()),
        "ssim_published": float(pieces.rows("ssim_published").mean()),
        "codebook_usage": usage,
        "codebook_perplexity": perplexity,
    }
    if perceptual is not None:
        report.metrics["lpips"] = float(pieces.rows("lpips").mean())
    return report


def _protocol_warnings(originals: ImageSet, reference: ReferenceSource) -> list[str]:
    """Differences from the published protocol."""
    warnings = []
    instead = f"{reference.name}, not with the images they were made of"
    if reference.archive is not None:
        warnings.append(
            f"reconstructions are compared with the statistics in {instead}: VQ-16 then gets 4.28 "
            f"instead of its published 2.19"
        )
    elif reference.name != originals.name:
        warnings.append(f"reconstructions are compared with {instead}")
    if (found := originals.enlarged_from) is not None:
        warnings.append(
            f"images of {size_text(found)} pixels were enlarged to {size_text(originals.size)}, "
            f"which are easier to reconstruct"
        )
    protocol = few_warnings(len(originals), 50_000, "images", "ImageNet's validation images")
    return warnings + protocol


def _sheet(reconstructions: Reconstructions, decibels: np.ndarray) -> Picture:
    count = min(len(reconstructions), _SHEET_IMAGES)
    sides = (each.read(0, count) for each in (reconstructions.originals, reconstructions))
    arrays = list(itertools.chain.from_iterable(zip(*sides, strict=True)))
    captions = [text for value in decibels[:count] for text in ("original", f"{value:.1f} dB")]
    return Picture(
        title="Originals and reconstructions",
        image=grid(arrays, columns=8, captions=captions, like=-1),
        note="The first ones, not picked.",
    )
