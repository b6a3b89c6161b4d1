"""``llamagen reconstruct``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.cli.options import DeviceOptions, require_at_least
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from llamagen.evaluation.protocols.tokenizer import Reconstruction

_SHEET_SIDE = 256
"""Images on the sheet are shrunk to this many pixels."""

_METRICS = ("psnr", "ssim", "ssim_published")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(DeviceOptions):
    """Send images through an image tokenizer and back; report PSNR and SSIM, draw both."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files and folders (searched through)."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["-t"])] = "vq-16"
    """Published name (vq-16, vq-8), folder, checkpoint file or hub repository."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("reconstructions")
    """Folder for the reconstructed images, metrics.json and sheet.png."""
    size: int | None = None
    """Crop the middle square to this side, as published evaluations do (256). Default: whole
    images, cut to whole codes."""
    max_side: int = 512
    """Without --size: shrink larger images to this long side."""
    sheet: int = 16
    """Images on the before/after sheet."""


def run(options: Reconstruct) -> None:
    """Reconstruct, save and report."""
    require_at_least(1, options, "max_side", "sheet")
    import llamagen.support.storage as storage

    paths = _find(options.images)
    storage.require_writable(options.out)
    from tqdm import tqdm

    from llamagen.checkpoints import load_tokenizer
    from llamagen.evaluation.protocols.tokenizer import prepare, reconstruct
    from llamagen.support.pictures import save_png

    # float32 unless asked otherwise: this command measures the tokenizer, not the precision.
    device, dtype = options.resolve(auto="float32")
    tokenizer = load_tokenizer(options.tokenizer, device=device, dtype=dtype)
    config = tokenizer.config
    # A size that does not fit is found before the first image is read.
    if options.size is not None:
        config.grid_of(options.size, options.size)
    fit = functools.partial(
        prepare, downsampling=config.downsampling, size=options.size, max_side=options.max_side
    )
    skipped: list[str] = []
    prepared = ((path, fit(image)) for path, image in _readable(paths, skipped))
    names = _output_names(paths)
    own = {path.resolve() for path in paths}
    for name in names.values():
        if (options.out / name).resolve() in own:
            raise InputError(
                f"{options.out / name} is one of the images; give another --out folder"
            )
    rows: list[dict[str, Any]] = []
    pairs: list[Reconstruction] = []
    codes: set[int] = set()
    found = reconstruct(tokenizer, prepared)
    for item in tqdm(found, total=len(paths), unit="image", disable=None):
        save_png(item.image, options.out / names[item.path])
        codes.update(item.codes.flatten().tolist())
        row = {"image": str(item.path), "reconstruction": names[item.path]}
        size = {"width": item.image.width, "height": item.image.height}
        rows.append({**row, **size, **{name: getattr(item, name) for name in _METRICS}})
        if len(pairs) < options.sheet:
            pairs.append(item)
    if not rows:
        raise InputError(f"none of the {len(paths)} image files could be read: {skipped[0]}")
    means = {name: statistics.fmean(row[name] for row in rows) for name in _METRICS}
    report = {"tokenizer": options.tokenizer, "images": len(rows), "skipped": skipped, **means}
    report |= {"codebook_usage": len(codes) / config.codebook_size, "per_image": rows}
    storage.write_json(options.out / "metrics.json", report)
    save_png(_sheet(pairs), options.out / "sheet.png")
    print(
        f"{len(rows)} images: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f} "
        f"(computed as published: {means['ssim_published']:.4f}), "
        f"{len(codes)} of {config.codebook_size} codes used"
        + (f"; {len(skipped)} files skipped" if skipped else "")
    )
    print(options.out / "sheet.png")


def _find(inputs: Sequence[Path]) -> list[Path]:
    from llamagen.data.images import find_images

    if not inputs:
        raise InputError("no images were named; give files or a folder")
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give image files or a folder")
    return [file for path in inputs for file in (find_images(path) if path.is_dir() else [path])]


def _readable(paths: list[Path], skipped: list[str]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images that can be read; name the others in ``skipped`` and on stderr."""
    from llamagen.data.images import CorruptImageError, open_image

    for path in paths:
        try:
            yield path, open_image(path)
        except CorruptImageError as error:
            skipped.append(str(error))
            print(f"llamagen: skipped: {error}", file=sys.stderr)


def _output_names(paths: list[Path]) -> dict[Path, str]:
    """Return a file name for each image; those of the same name get numbers."""
    names: dict[Path, str] = {}
    used = {"sheet.png"}
    for path in paths:
        candidates = (f"{path.stem}{f'-{n}' if n > 1 else ''}.png" for n in itertools.count(1))
        names[path] = next(name for name in candidates if name not in used)
        used.add(names[path])
    return names


def _sheet(pairs: Sequence[Reconstruction]) -> Image.Image:
    from PIL import Image

    from llamagen.support.pictures import image_grid

    side = min(_SHEET_SIDE, max(max(pair.original.size) for pair in pairs))
    pictures, captions = [], []
    for pair in pairs:
        for image in (pair.original, pair.image):
            small = image.copy()
            small.thumbnail((side, side))
            tile = Image.new("RGB", (side, side), "white")
            tile.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
            pictures.append(tile)
        captions += ["original", f"{pair.psnr:.1f} dB, {pair.ssim:.3f}"]
    columns = 2 if len(pairs) < 3 else 4 if len(pairs) < 9 else 8
    return image_grid(pictures, columns=columns, captions=captions)
