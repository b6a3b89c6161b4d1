"""The training demo: both models from scratch on real handwritten digits, in minutes on a laptop.

scikit-learn ships 1,797 scans of digits (8x8 pixels, 16 greys; UCI, Alpaydin and Kaynak 1998).
They are written as class folders; the rest is what a user would do with their own images:
``train_tokenizer``, ``train_transformer``, ``Pipeline``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import llamagen.support.storage as storage
from llamagen.evaluation.protocols.tokenizer import reconstruct
from llamagen.pipeline import Pipeline
from llamagen.support.errors import importing
from llamagen.support.pictures import image_grid, save_png, stacked, titled
from llamagen.training.config import TokenizerTraining, TransformerTraining
from llamagen.training.loop import TrainingResult
from llamagen.training.recipes import load_recipe
from llamagen.training.tokenizer_task import train_tokenizer
from llamagen.training.transformer_task import train_transformer

SIDE = 32
"""Pixels a side that the scans are enlarged to."""
PER_DIGIT = 10
"""Generated images of each digit."""
_GREYS = 16
_SCAN_SIDE = 8
_HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingDemoResult:
    """Measurements of the demo, of held-out scans unless they say otherwise."""

    recognised: float
    """Fraction of the generated digits that a classifier recognises as the requested one."""
    recognised_real: float
    """The same of real scans: the classifier's own limit."""
    recognised_reconstructed: float
    """The same of scans after the image tokenizer."""
    psnr: float
    """Of reconstructions, in dB."""
    codebook_usage: float
    """Fraction of the codes that occur."""
    bits_per_code: float
    seconds: dict[str, float]
    """Duration of each stage."""
    sheet: str
    """Real and generated digits."""
    curves: str
    """Loss curves of both models."""
    model: str
    """Pipeline folder, for ``llamagen generate --model``."""


class Digits(NamedTuple):
    """The scans (N, 8, 8), float64 from 0 (paper) to 16 (ink), split once and for all."""

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


def load_digits() -> Digits:
    """Return the scans of scikit-learn, a fifth held out; InputError if it is not installed."""
    with importing("the demo needs", "'llamagen[demo-train]'"):
        from sklearn.datasets import load_digits as load
    images, labels = load(return_X_y=True)
    images = images.reshape(-1, _SCAN_SIDE, _SCAN_SIDE)
    order = np.random.default_rng(0).permutation(len(images))
    cut = round(len(images) * _HELD_OUT)
    held_out, train = order[:cut], order[cut:]
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def run_training_demo(
    out: Path,
    *,
    device: str = "auto",
    seed: int = 0,
    steps: tuple[int, int] | None = None,
) -> TrainingDemoResult:
    """Train both models, draw ten of each digit and measure them.

    ``out`` is the folder for everything; stages that were finished or interrupted there are not
    begun anew. ``steps`` are those of the tokenizer and of the transformer, by default what their
    recipes say. InputError if scikit-learn is missing, or ``out`` cannot be written.
    """
    storage.require_writable(out)
    digits = load_digits()
    start = time.perf_counter()
    data = out / "digits"
    _write_tree(data / "train", digits.train, digits.train_labels)
    _write_tree(data / "held-out", digits.held_out, digits.held_out_labels)
    print(f"{len(digits.train)} scans to train on, {len(digits.held_out)} held out, in {data}")
    seconds = {"data": time.perf_counter() - start}
    tokenizer, transformer = _train(out, device, seed, steps)
    seconds |= {"tokenizer": tokenizer.seconds, "transformer": transformer.seconds}

    start = time.perf_counter()
    pipe = Pipeline.from_pretrained(transformer.model, device=device)
    generated = pipe(list(range(10)), num_images_per_prompt=PER_DIGIT, seed=seed).images
    seconds["generation"] = time.perf_counter() - start

    save_png(_sheet(digits, generated), out / "sheet.png")
    curves = [
        titled(Image.open(run.out / "curves.png").convert("RGB"), title)
        for title, run in (("image tokenizer", tokenizer), ("transformer", transformer))
    ]
    save_png(stacked(curves), out / "curves.png")
    real = [enlarged(scan) for scan in digits.held_out]
    named = ((Path(str(index)), picture) for index, picture in enumerate(real))
    reconstructed = [item.image for item in reconstruct(pipe.tokenizer, named)]
    recognised = _classifier(digits)
    result = TrainingDemoResult(
        recognised=recognised(generated, np.arange(10).repeat(PER_DIGIT)),
        recognised_real=recognised(real, digits.held_out_labels),
        recognised_reconstructed=recognised(reconstructed, digits.held_out_labels),
        psnr=tokenizer.validation["psnr"],
        codebook_usage=tokenizer.validation["codebook_usage"],
        bits_per_code=transformer.validation["bits_per_code"],
        seconds={name: round(value, 1) for name, value in seconds.items()},
        sheet=str(out / "sheet.png"),
        curves=str(out / "curves.png"),
        model=str(transformer.model),
    )
    storage.write_json(out / "summary.json", dataclasses.asdict(result))
    return result


def _train(
    out: Path, device: str, seed: int, steps: tuple[int, int] | None
) -> tuple[TrainingResult, TrainingResult]:
    def recipe(kind: Any, name: str, steps: int | None, **values: Any) -> Any:
        found = load_recipe(kind, f"digits-{name}")
        steps = found.loop.steps if steps is None else steps
        loop = dataclasses.replace(found.loop, device=device, seed=seed, steps=steps)
        folder = out / "digits"
        data = {"data": str(folder / "train"), "validation_data": str(folder / "held-out")}
        return dataclasses.replace(found, out=out / name, loop=loop, **data, **values)

    first, second = steps or (None, None)
    tokenizer = train_tokenizer(recipe(TokenizerTraining, "tokenizer", first))
    of_codes = recipe(TransformerTraining, "transformer", second, tokenizer=str(tokenizer.model))
    return tokenizer, train_transformer(of_codes)


def enlarged(scan: np.ndarray) -> Image.Image:
    """Return a scan (8, 8) from 0 to 16 as an image of ``SIDE`` pixels, light ink on black."""
    grey = (scan * 255 / _GREYS).round().astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def _classifier(digits: Digits) -> Callable[[list[Image.Image], np.ndarray], float]:
    """Return a function from pictures and labels to the fraction that is recognised."""
    from sklearn.svm import SVC

    # Of real scans only; the usual settings (scikit-learn's guide): 99 % of held-out scans.
    model = SVC(gamma=0.001).fit(digits.train.reshape(len(digits.train), -1), digits.train_labels)

    def recognised(pictures: list[Image.Image], labels: np.ndarray) -> float:
        small = (_SCAN_SIDE, _SCAN_SIDE)
        greys = [p.convert("L").resize(small, Image.Resampling.BOX) for p in pictures]
        scans = np.stack([np.asarray(grey, dtype=np.float64) for grey in greys]) * (_GREYS / 255)
        return float((model.predict(scans.reshape(len(scans), -1)) == labels).mean())

    return recognised


def _write_tree(folder: Path, scans: np.ndarray, labels: np.ndarray) -> None:
    """Write the scans as ``folder``/digit/number.png, unless they are there."""
    if folder.is_dir():
        return
    with storage.atomic_folder(folder) as temporary:
        for index, (scan, label) in enumerate(zip(scans, labels, strict=True)):
            path = temporary / str(label) / f"{index:04d}.png"
            path.parent.mkdir(exist_ok=True)
            enlarged(scan).save(path)


def _sheet(digits: Digits, generated: list[Image.Image]) -> Image.Image:
    """Return real digits beside generated ones, a row of ten for each digit."""
    real = [
        enlarged(scan)
        for digit in range(10)
        for scan in digits.held_out[digits.held_out_labels == digit][:PER_DIGIT]
    ]
    sides = {
        "real digits (held out: no model has seen them)": real,
        "generated digits (ten of each, not picked)": generated,
    }
    grids = {title: image_grid(p, columns=PER_DIGIT, scale=None) for title, p in sides.items()}
    return stacked([titled(grid, title) for title, grid in grids.items()], across=True)
