"""An image tokenizer's reconstructions against the very images it was given (paper section 4.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import codebook_use
from llamagen.evaluation.pieces import Pieces
from llamagen.evaluation.protocols.common import Workplace
from llamagen.evaluation.published import RECONSTRUCTION
from llamagen.evaluation.reconstruction import compare
from llamagen.evaluation.reference import ReferenceSource
from llamagen.evaluation.report import Picture, Report, Table
from llamagen.evaluation.scores import score
from llamagen.generation.memory import decoding_batch_size
from llamagen.models.tokenizer import ImageTokenizer, images_to_uint8, uint8_to_images
from llamagen.support.pictures import image_grid

RECONSTRUCTIONS_FOLDER = "reconstructions"
_SHOWN = 24
_VALIDATION_IMAGES = 50_000

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""LPIPS: two batches of images (B, 3, H, W) in [-1, 1] to distances (B,)."""


class Measured(NamedTuple):
    """Of all images, in their order."""

    psnr: np.ndarray
    """(N,) dB."""
    ssim: np.ndarray
    """(N,) with the true data range; NaN below 7 pixels a side."""
    ssim_published: np.ndarray
    """(N,) as the published code computes it."""
    lpips: np.ndarray
    """(N,) NaN without LPIPS."""
    counts: np.ndarray
    """(codebook size,) how often each code occurs."""


class Reconstructions(ImageSet):
    """What a tokenizer made of images, in a folder of shards."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        originals: ImageSet,
        root: Path,
        *,
        compared_size: int | None = None,
    ) -> None:
        """Of images that ``reconstruct_all`` sends through the tokenizer.

        Args:
            tokenizer: whose.
            originals: what it is given.
            root: gets a folder for this tokenizer and these images.
            compared_size: side in pixels that reconstructions are resized to (bicubic, in float).
        """
        self.tokenizer, self.originals = tokenizer, originals
        self.compared_size = compared_size
        self.name = f"reconstructions of {originals.name}"
        about = f"{tokenizer.fingerprint()} {tokenizer.dtype} {originals.identity} {compared_size}"
        self.identity = hashlib.sha256(about.encode()).hexdigest()[:16]
        self.labels, self.class_names = originals.labels, originals.class_names
        self.pieces = Pieces(root / self.identity, len(originals))
        # A size that does not fit is found before the first image is read.
        tokenizer.config.grid_of(*originals.size)

    def __len__(self) -> int:
        return len(self.originals)

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``."""
        return self.pieces.rows("images", first, last)

    def measured(self) -> Measured:
        """All that was measured, once every process is done."""
        rows = {name: self.pieces.rows(name) for name in Measured._fields if name != "counts"}
        counts = [self.pieces.read(number)["counts"] for number in range(len(self.pieces))]
        return Measured(**rows, counts=np.sum(counts, axis=0))


def reconstruct_all(reconstructions: Reconstructions, perceptual: Perceptual | None) -> None:
    """Reconstructs what is not there yet; to be called in every process, which share the work."""

    def make(first: int, last: int, advance: Callable[[int], object]) -> dict[str, np.ndarray]:
        return _reconstruct(reconstructions, first, last, perceptual, advance)

    reconstructions.pieces.make(make, "reconstructing")


@torch.inference_mode()
def _reconstruct(
    reconstructions: Reconstructions,
    first: int,
    last: int,
    perceptual: Perceptual | None,
    advance: Callable[[int], object],
) -> dict[str, np.ndarray]:
    tokenizer, size = reconstructions.tokenizer, reconstructions.compared_size
    originals = reconstructions.originals.read(first, last)
    grid = tokenizer.config.grid_of(*originals.shape[1:3])
    step = decoding_batch_size(
        tokenizer.config, grid, device=tokenizer.device, dtype=tokenizer.dtype
    )
    parts: dict[str, list[np.ndarray]] = {}
    counts = np.zeros(tokenizer.config.codebook_size, np.int64)
    for start in range(0, len(originals), step):
        before = np.array(originals[start : start + step])
        images = uint8_to_images(torch.from_numpy(before).movedim(-1, 1).to(tokenizer.device))
        codes = tokenizer.encode(images.to(tokenizer.dtype))
        decoded = tokenizer.decode(codes).float()
        after = images_to_uint8(decoded).movedim(1, -1).cpu().numpy()
        counts += np.bincount(codes.flatten().cpu().numpy(), minlength=len(counts))
        compared = after
        if size is not None and decoded.shape[-1] != size:
            resized = F.interpolate(decoded, size=(size, size), mode="bicubic")
            compared = images_to_uint8(resized).movedim(1, -1).cpu().numpy()
        found = {"images": compared, **compare(before, after)}
        distances = np.full(len(before), np.nan)
        if perceptual is not None:
            distances = perceptual(images, decoded.clamp(-1, 1)).flatten().cpu().numpy()
        found["lpips"] = distances
        for name, array in found.items():
            parts.setdefault(name, []).append(array)
        advance(len(before))
    return {**{name: np.concatenate(each) for name, each in parts.items()}, "counts": counts}


def evaluate_tokenizer(
    name: str,
    reconstructions: Reconstructions,
    reference: ReferenceSource,
    place: Workplace | None,
    *,
    perceptual: Perceptual | None = None,
) -> Report:
    """Reconstructs images and compares them with themselves; to be called in every process.

    Args:
        name: the tokenizer's.
        reconstructions: of the images.
        reference: for rFID: the images themselves, at the size they are compared at.
        place: with the network for rFID; None leaves it out.
        perceptual: LPIPS; None leaves it out.

    Raises:
        InputError: tokenizer, images and network do not fit together.
        OSError: the disk is full.
    """
    reconstruct_all(reconstructions, perceptual)
    measured = reconstructions.measured()
    use = codebook_use(measured.counts)
    finite = measured.psnr[np.isfinite(measured.psnr)]
    metrics = {
        "psnr": float(finite.mean()) if len(finite) else float("inf"),
        "ssim": float(measured.ssim.mean()),
        "ssim_published": float(measured.ssim_published.mean()),
        "codebook_usage": use.usage,
        "codebook_perplexity": use.perplexity,
    }
    if perceptual is not None:
        metrics["lpips"] = float(measured.lpips.mean())
    warnings = _differences(reconstructions, reference)
    network = "none"
    if place is not None:
        features = place.features(reconstructions, "reconstructions")
        compared, _ = place.reference(reference)
        scores = score(features, compared, place.network, device=place.device)
        metrics = {_as_reconstruction(k): v for k, v in scores.metrics.items()} | metrics
        warnings += scores.warnings
        network = place.network.name
    originals = reconstructions.originals
    height, width = originals.size
    return Report(
        protocol="tokenizer",
        title=f"{name}: {len(originals):,} reconstructions",
        metrics=metrics,
        reference={"source": reference.name, "images": len(originals), "network": network},
        samples={
            "images": len(originals),
            "source": originals.name,
            "size": f"{width}x{height}",
            "compared at": reconstructions.compared_size or f"{width}x{height}",
        },
        settings={
            "tokenizer": name,
            "codebook": reconstructions.tokenizer.config.codebook_size,
            "precision": str(reconstructions.tokenizer.dtype).removeprefix("torch."),
        },
        warnings=warnings,
        tables=[_published()] if network.startswith("Inception") else [],
        pictures=[_sheet(reconstructions, measured)],
    )


def _as_reconstruction(name: str) -> str:
    """RFID is the FID of reconstructions."""
    return {"fid": "rfid", "sfid": "rsfid"}.get(name, name)


def _differences(reconstructions: Reconstructions, reference: ReferenceSource) -> list[str]:
    warnings = []
    if reference.archive is not None:
        warnings.append(
            f"reconstructions are compared with the statistics in {reference.name}, not with the "
            f"images they were made of: VQ-16 then gets 4.28 instead of its published 2.19"
        )
    elif reference.name != reconstructions.originals.name:
        warnings.append(
            f"reconstructions are compared with {reference.name}, not with the images they were "
            f"made of"
        )
    found = reconstructions.originals.enlarged_from
    if found is not None:
        height, width = reconstructions.originals.size
        warnings.append(
            f"images of {found[1]}x{found[0]} pixels were enlarged to {width}x{height}, which are "
            f"easier to reconstruct"
        )
    if len(reconstructions) < _VALIDATION_IMAGES:
        warnings.append(
            f"{len(reconstructions):,} images instead of the protocol's {_VALIDATION_IMAGES:,} "
            f"(ImageNet's validation images): distances come out higher with fewer"
        )
    return warnings


def _sheet(reconstructions: Reconstructions, measured: Measured) -> Picture:
    count = min(len(reconstructions), _SHOWN)
    before = reconstructions.originals.read(0, count)
    after = reconstructions.read(0, count)
    pictures, captions = [], []
    for index in range(count):
        original = Image.fromarray(np.array(before[index]))
        image = Image.fromarray(np.array(after[index]))
        pictures += [original.resize(image.size), image]
        captions += ["original", f"{measured.psnr[index]:.1f} dB"]
    scale = max(1, 64 // pictures[0].width)
    return Picture(
        title="Originals and reconstructions",
        image=image_grid(pictures, columns=8, captions=captions, scale=scale),
        note="The first ones, not picked.",
    )


def _published() -> Table:
    return Table(
        title="Published",
        columns=("tokenizer", "size", "rFID", "PSNR", "SSIM as published"),
        rows=tuple(tuple(row) for row in RECONSTRUCTION),
        note="arXiv 2406.06525: ImageNet's 50,000 validation images, against themselves at 256.",
    )
