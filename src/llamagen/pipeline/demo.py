"""The demo: one sheet of images from the models that come with the package, within seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import llamagen.support.storage as storage
from llamagen.checkpoints.names import shipped_models
from llamagen.pipeline.pipeline import Pipeline
from llamagen.support.pictures import image_grid, save_png, stacked, titled

PER_CLASS = 8
"""Images of each class."""
PROMPTS = (
    *("sunflower", "red apple", "octopus", "hot air balloon", "red heart"),
    *("fire", "soccer ball", "hamburger", "dog face", "rainbow"),
    *("person rowing boat", "guitar", "cactus", "full moon", "butterfly"),
    *("birthday cake", "pumpkin", "snowman", "tropical fish", "alarm clock"),
)
"""For models that draw texts."""
_COLUMNS = 10
_SIDE = 64
"""Smaller images are enlarged to about this many pixels."""


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
    """Draw a sheet with every model that comes with the package; nothing is picked.

    Args:
        out: folder for ``sheet.png``.
        device: where to compute.
        seed: of the first image of each model; the next get the next numbers.
        say: takes one line of progress.

    Raises:
        InputError: ``out`` cannot be written, or a package that reads prompts is missing.
    """
    storage.require_writable(out)
    start = time.perf_counter()
    parts, images = [], 0
    for name in shipped_models():
        begun = time.perf_counter()
        pipe = Pipeline.from_pretrained(name, device=device)
        drawn, captions = _draw(pipe, seed)
        parts.append(_sheet(name, drawn, captions, per_class=pipe.labels is not None))
        images += len(drawn)
        say(f"{name}: {len(drawn)} images in {time.perf_counter() - begun:.1f} s")
    save_png(stacked(parts), out / "sheet.png")
    return DemoResult(sheet=out / "sheet.png", images=images, seconds=time.perf_counter() - start)


@torch.inference_mode()
def _draw(pipe: Pipeline, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Images, and what each is of."""
    if pipe.labels is None:
        return pipe(list(PROMPTS), seed=seed).images, list(PROMPTS)
    names = [pipe.labels.name(index) for index in range(len(pipe.labels))]
    # A row of one image of each class, then the next row.
    wanted = list(range(len(names))) * PER_CLASS
    return pipe(wanted, seed=seed).images, names


def _sheet(
    name: str, images: list[Image.Image], captions: list[str], *, per_class: bool
) -> Image.Image:
    scale = max(1, _SIDE // images[0].width)
    if not per_class:
        grid = image_grid(images, columns=_COLUMNS, captions=captions, scale=scale)
        return titled(grid, f"{name}: by name")
    columns = len(captions)
    first = image_grid(images[:columns], columns=columns, captions=captions, scale=scale)
    rest = image_grid(images[columns:], columns=columns, scale=scale)
    return titled(stacked([first, rest], gap=0), f"{name}: by class")
