"""The demo: one sheet of images from the models that come with the package, within seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import llamagen.support.storage as storage
from llamagen.checkpoints import shipped_models
from llamagen.pipeline.pipeline import Pipeline
from llamagen.support.pictures import image_grid, save_png, stacked, titled

PER_CLASS = 8
"""Images of each class."""
PROMPTS: tuple[str, ...] = (
    *("sunflower", "red apple", "octopus", "hot air balloon", "red heart"),
    *("fire", "soccer ball", "hamburger", "dog face", "rainbow"),
    *("person rowing boat", "guitar", "cactus", "full moon", "butterfly"),
    *("birthday cake", "pumpkin", "snowman", "tropical fish", "alarm clock"),
)
"""For models that draw texts."""
_COLUMNS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Result of the demo."""

    sheet: Path
    """All images."""
    images: int
    seconds: float
    """Loading of the models included, imports left out."""


def run_demo(
    out: Path, *, device: str = "auto", seed: int = 0, say: Callable[[str], None] = print
) -> DemoResult:
    """Draw ``sheet.png`` with every model that comes with the package; nothing is picked.

    Each model's first image gets ``seed``, the next get the next numbers. ``say`` takes one line of
    progress. InputError if ``out`` cannot be written, or a package that reads prompts is missing.
    """
    storage.require_writable(out)
    start = time.perf_counter()
    parts, total = [], 0
    for name in shipped_models():
        begun = time.perf_counter()
        part, images = _sheet(name, Pipeline.from_pretrained(name, device=device), seed)
        parts.append(part)
        total += images
        say(f"{name}: {images} images in {time.perf_counter() - begun:.1f} s")
    save_png(stacked(parts), out / "sheet.png")
    return DemoResult(sheet=out / "sheet.png", images=total, seconds=time.perf_counter() - start)


@torch.inference_mode()
def _sheet(name: str, pipe: Pipeline, seed: int) -> tuple[Image.Image, int]:
    """Return a sheet of a model's images, and how many these are."""
    if pipe.labels is None:
        by, captions, columns = "name", PROMPTS, _COLUMNS
        images = pipe(PROMPTS, seed=seed).images
    else:
        by, captions, columns = "class", pipe.labels.names, len(pipe.labels)
        # A row of one image of each class, then the next row.
        images = pipe([*range(columns)] * PER_CLASS, seed=seed).images
    first = images[: len(captions)]
    parts = [image_grid(first, columns=columns, captions=captions, scale=None)]
    if rest := images[len(captions) :]:
        parts.append(image_grid(rest, columns=columns, scale=None))
    return titled(stacked(parts, gap=0), f"{name}: by {by}"), len(images)
