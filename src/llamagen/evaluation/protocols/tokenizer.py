"""An image tokenizer's reconstructions against the very images it was given (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.metrics import codebook_use
from llamagen.evaluation.pieces import make_pieces, named_pieces
from llamagen.evaluation.protocols.common import Workplace, precision_name, size_text
from llamagen.evaluation.published import RECONSTRUCTION
from llamagen.evaluation.reconstruction import batch_limit, compare, encode_and_decode
from llamagen.evaluation.reference import ReferenceSource
from llamagen.evaluation.report import Picture, Report, Table
from llamagen.models.tokenizer import ImageTokenizer, images_to_uint8, uint8_to_images
from llamagen.support.artifact import Advance
from llamagen.support.pictures import image_grid

RECONSTRUCTIONS_FOLDER = "reconstructions"
_SHEET_IMAGES = 24
_VALIDATION_IMAGES = 50_000
_RENAMED = {"fid": "rfid", "sfid": "rsfid"}
"""Metrics that have names of their own for reconstructions."""

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""LPIPS: two batches of images (B, 3, H, W) in [-1, 1] to distances (B,)."""


class Measured(NamedTuple):
    """Measurements of all images, in their order."""

    psnr: np.ndarray
    """(N,) dB."""
    ssim: np.ndarray
    """(N,) with the true data range; NaN below 7 pixels a side."""
    ssim_published: np.ndarray
    """(N,) as the published code computes it."""
    lpips: np.ndarray
    """(N,) NaN without LPIPS."""
    counts: np.ndarray
    """(codebook size,) occurrences of each code."""


class Reconstructions(ImageSet):
    """A tokenizer's reconstructions of images, in a folder."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        originals: ImageSet,
        root: Path,
        *,
        compared_size: int | None = None,
    ) -> None:
        """Prepare; ``reconstruct_all`` computes.

        Args:
            tokenizer: reconstructs.
            originals: its input.
            root: gets a folder for this tokenizer and these images.
            compared_size: side in pixels that reconstructions are resized to (bicubic, in float).

        Raises:
            InputError: the tokenizer cannot encode images of this size.
        """
        tokenizer.config.grid_of(*originals.size)
        self.tokenizer, self.originals = tokenizer, originals
        self.compared_size = compared_size
        self.name = f"reconstructions of {originals.name}"
        self.labels, self.class_names = originals.labels, originals.class_names
        settings = {
            "tokenizer": tokenizer.fingerprint(),
            "dtype": precision_name(tokenizer.dtype),
            "images": originals.identity,
            "compared_size": compared_size,
        }
        self.pieces = named_pieces(root, "reconstructions", settings, len(originals))
        self.identity = self.pieces.identity

    def __len__(self) -> int:
        return len(self.originals)

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``."""
        return self.pieces.rows("images", first, last)

    def measured(self) -> Measured:
        """Return all measurements, once every process is done."""
        rows = {name: self.pieces.rows(name) for name in Measured._fields if name != "counts"}
        counts = [self.pieces.read_npz(piece)["counts"] for piece in range(len(self.pieces))]
        return Measured(**rows, counts=np.sum(counts, axis=0))

    @torch.inference_mode()
    def compute(
        self, items: range, perceptual: Perceptual | None, advance: Advance
    ) -> dict[str, np.ndarray]:
        """Reconstruct some images, and compare them with the originals."""
        originals, size = self.originals.read(items.start, items.stop), self.compared_size
        height, width = originals.shape[1:3]
        step = batch_limit(self.tokenizer, height, width)
        parts: dict[str, list[np.ndarray]] = {}
        counts = np.zeros(self.tokenizer.config.codebook_size, np.int64)
        for start in range(0, len(originals), step):
            before = np.array(originals[start : start + step])
            codes, decoded = encode_and_decode(self.tokenizer, before)
            after = compared = _pixels(decoded)
            if size is not None and decoded.shape[-1] != size:
                compared = _pixels(F.interpolate(decoded, size=(size, size), mode="bicubic"))
            distances = np.full(len(before), np.nan)
            if perceptual is not None:
                images = uint8_to_images(torch.from_numpy(before).movedim(-1, 1).to(decoded.device))
                distances = perceptual(images, decoded.clamp(-1, 1)).flatten().cpu().numpy()
            found = {"images": compared, **compare(before, after), "lpips": distances}
            for name, array in found.items():
                parts.setdefault(name, []).append(array)
            counts += np.bincount(codes.flatten().cpu().numpy(), minlength=len(counts))
            advance(len(before))
        return {**{name: np.concatenate(each) for name, each in parts.items()}, "counts": counts}


def reconstruct_all(reconstructions: Reconstructions, perceptual: Perceptual | None) -> None:
    """Compute reconstructions that are not in the folder yet; called in every process of a run."""
    make_pieces(
        reconstructions.pieces,
        lambda items, advance: {".npz": reconstructions.compute(items, perceptual, advance)},
        "reconstructing",
    )


def evaluate_tokenizer(
    name: str,
    reconstructions: Reconstructions,
    reference: ReferenceSource,
    place: Workplace | None,
    *,
    perceptual: Perceptual | None = None,
) -> Report:
    """Reconstruct images and compare them with themselves; called in every process of a run.

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
    originals, tokenizer = reconstructions.originals, reconstructions.tokenizer
    report = Report(
        protocol="tokenizer",
        title=f"{name}: {len(originals):,} reconstructions",
        metrics={},
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
            "precision": precision_name(tokenizer.dtype),
        },
        warnings=_protocol_warnings(reconstructions, reference),
        pictures=[_sheet(reconstructions, measured)],
    )
    if place is not None:
        features = place.features(reconstructions, "reconstructions")
        place.compare(report, features, place.reference(reference))
        report.metrics = {_RENAMED.get(key, key): value for key, value in report.metrics.items()}
        if place.network.name.startswith("Inception"):
            report.tables.append(_published())
    use = codebook_use(measured.counts)
    finite = measured.psnr[np.isfinite(measured.psnr)]
    report.metrics |= {
        "psnr": float(finite.mean()) if len(finite) else float("inf"),
        "ssim": float(measured.ssim.mean()),
        "ssim_published": float(measured.ssim_published.mean()),
        "codebook_usage": use.usage,
        "codebook_perplexity": use.perplexity,
    }
    if perceptual is not None:
        report.metrics["lpips"] = float(measured.lpips.mean())
    return report


def _pixels(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] to bytes (B, H, W, 3)."""
    return images_to_uint8(images).movedim(1, -1).cpu().numpy()


def _protocol_warnings(reconstructions: Reconstructions, reference: ReferenceSource) -> list[str]:
    """Differences from the published protocol."""
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
        warnings.append(
            f"images of {size_text(found)} pixels were enlarged to "
            f"{size_text(reconstructions.originals.size)}, which are easier to reconstruct"
        )
    if len(reconstructions) < _VALIDATION_IMAGES:
        warnings.append(
            f"{len(reconstructions):,} images instead of the protocol's {_VALIDATION_IMAGES:,} "
            f"(ImageNet's validation images): distances come out higher with fewer"
        )
    return warnings


def _sheet(reconstructions: Reconstructions, measured: Measured) -> Picture:
    count = min(len(reconstructions), _SHEET_IMAGES)
    pictures, captions = [], []
    pairs = zip(
        reconstructions.originals.read(0, count), reconstructions.read(0, count), strict=True
    )
    for (original, reconstruction), psnr in zip(pairs, measured.psnr, strict=False):
        image = Image.fromarray(reconstruction)
        pictures += [Image.fromarray(original).resize(image.size), image]
        captions += ["original", f"{psnr:.1f} dB"]
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
