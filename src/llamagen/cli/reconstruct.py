"""Send images through an image tokenizer and back; report PSNR and SSIM, draw both side by side."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.cli.options import DeviceOptions
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from llamagen.evaluation.reconstruction import Reconstruction

_SHEET_SIDE = 256
"""Images on the sheet are shrunk to this many pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DeviceOptions):
    """Options of ``llamagen reconstruct``."""

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


def run(options: Options) -> None:
    """Reconstructs, saves and reports."""
    if options.max_side < 1 or options.sheet < 1:
        raise InputError("--max-side and --sheet must be at least 1")
    import llamagen.support.storage as storage

    paths = _find(options.images)
    storage.require_writable(options.out)

    from llamagen.checkpoints import load_tokenizer
    from llamagen.evaluation.reconstruction import prepare, reconstruct

    # float32 unless asked otherwise: this command measures the tokenizer, not the precision.
    exact = "float32" if options.dtype == "auto" else options.dtype
    device, dtype = dataclasses.replace(options, dtype=exact).resolve()
    tokenizer = load_tokenizer(options.tokenizer, device=device, dtype=dtype)
    downsampling = tokenizer.config.downsampling
    skipped: list[str] = []

    def prepared() -> Iterator[tuple[Path, Image.Image]]:
        for path, image in _readable(paths, skipped):
            yield (
                path,
                prepare(
                    image,
                    downsampling=downsampling,
                    size=options.size,
                    max_side=options.max_side,
                ),
            )

    # A size that does not fit is found before the first image is read.
    if options.size is not None:
        tokenizer.config.grid_of(options.size, options.size)
    done = _save_all(reconstruct(tokenizer, prepared()), paths, options)
    if not done.rows:
        raise InputError(f"none of the {len(paths)} image files could be read: {skipped[0]}")
    _report(done, skipped, tokenizer.config.codebook_size, options)


@dataclasses.dataclass
class _Done:
    """What is kept of the reconstructions: numbers of all, pictures of the first few."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pairs: list[tuple[Image.Image, Image.Image, str]] = dataclasses.field(default_factory=list)
    codes: set[int] = dataclasses.field(default_factory=set)


def _find(inputs: Sequence[Path]) -> list[Path]:
    from llamagen.data.images import find_images

    if not inputs:
        raise InputError("no images were named; give files or a folder")
    paths: list[Path] = []
    for path in inputs:
        if path.is_dir():
            paths += find_images(path)
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist; give image files or a folder")
    return paths


def _readable(paths: list[Path], skipped: list[str]) -> Iterator[tuple[Path, Image.Image]]:
    """Images that can be read; the others are named in ``skipped`` and on stderr."""
    from llamagen.data.images import CorruptImageError, open_image

    for path in paths:
        try:
            yield path, open_image(path)
        except CorruptImageError as error:
            skipped.append(str(error))
            print(f"llamagen: skipped: {error}", file=sys.stderr)


def _save_all(
    reconstructions: Iterator[Reconstruction], paths: list[Path], options: Options
) -> _Done:
    from tqdm import tqdm

    from llamagen.support.pictures import save_png

    done = _Done()
    names = _output_names(paths)
    for item in tqdm(reconstructions, total=len(paths), unit="image", disable=None):
        name = names[item.path]
        save_png(item.image, options.out / name)
        done.codes.update(item.codes.flatten().tolist())
        done.rows.append(
            {
                "image": str(item.path),
                "reconstruction": name,
                "width": item.image.width,
                "height": item.image.height,
                "psnr": item.psnr,
                "ssim": item.ssim,
                "ssim_published": item.ssim_published,
            }
        )
        if len(done.pairs) < options.sheet:
            caption = f"{item.psnr:.1f} dB, {item.ssim:.3f}"
            done.pairs.append((item.original, item.image, caption))
    return done


def _output_names(paths: list[Path]) -> dict[Path, str]:
    """A file name for each image; images of the same name in different folders get numbers."""
    names: dict[Path, str] = {}
    used: set[str] = {"sheet.png"}
    for path in paths:
        name, number = f"{path.stem}.png", 2
        while name in used:
            name, number = f"{path.stem}-{number}.png", number + 1
        used.add(name)
        names[path] = name
    return names


def _report(done: _Done, skipped: list[str], codebook_size: int, options: Options) -> None:
    import llamagen.support.storage as storage
    from llamagen.support.pictures import save_png

    means = {
        name: statistics.fmean(row[name] for row in done.rows)
        for name in ("psnr", "ssim", "ssim_published")
    }
    storage.write_json(
        options.out / "metrics.json",
        {
            "tokenizer": options.tokenizer,
            "images": len(done.rows),
            "skipped": skipped,
            **means,
            "codebook_usage": len(done.codes) / codebook_size,
            "per_image": done.rows,
        },
    )
    save_png(_sheet(done), options.out / "sheet.png")
    print(
        f"{len(done.rows)} images: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f} "
        f"(computed as published: {means['ssim_published']:.4f}), "
        f"{len(done.codes)} of {codebook_size} codes used"
        + (f"; {len(skipped)} files skipped" if skipped else "")
    )
    print(options.out / "sheet.png")


def _sheet(done: _Done) -> Image.Image:
    from PIL import Image

    from llamagen.support.pictures import image_grid

    pictures, captions = [], []
    for before, after, caption in done.pairs:
        pair = []
        for image in (before, after):
            image = image.copy()
            image.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
            tile = Image.new("RGB", (_tile(done), _tile(done)), (255, 255, 255))
            tile.paste(image, ((tile.width - image.width) // 2, (tile.height - image.height) // 2))
            pair.append(tile)
        pictures += pair
        captions += ["original", caption]
    columns = 2 if len(done.pairs) < 3 else 4 if len(done.pairs) < 9 else 8
    return image_grid(pictures, columns=columns, captions=captions)


def _tile(done: _Done) -> int:
    """Side of a tile that every image of the sheet fits into."""
    return min(_SHEET_SIDE, max(max(before.size) for before, _, _ in done.pairs))
