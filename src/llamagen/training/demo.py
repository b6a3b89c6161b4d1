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
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import llamagen.support.storage as storage
from llamagen.support.errors import importing
from llamagen.support.pictures import image_grid, save_png, stacked, titled

if TYPE_CHECKING:
    from llamagen.training import LoopConfig

SIDE = 32
"""Pixels a side that the scans are enlarged to."""
PER_DIGIT = 10
"""Generated images of each digit."""
_GREYS = 16
_SCAN_SIDE = 8
_HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingDemoResult:
    """Measurements of the demo."""

    recognised: float
    """Fraction of the generated digits that a classifier recognises as the requested one."""
    recognised_real: float
    """The same of the held-out real scans: the classifier's own limit."""
    recognised_reconstructed: float
    """The same of the held-out scans after the image tokenizer."""
    psnr: float
    """Of held-out reconstructions, in dB."""
    codebook_usage: float
    """Fraction of the codes that held-out images use."""
    bits_per_code: float
    """Loss on held-out codes, in bits."""
    seconds: dict[str, float]
    """Duration of each stage."""
    sheet: str
    """Real and generated digits."""
    curves: str
    """Loss curves of both models."""
    model: str
    """Pipeline folder, for ``llamagen generate --model``."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """The scans, split once and for all."""

    train: np.ndarray
    """(N, 8, 8) float64 from 0 (paper) to 16 (ink)."""
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


def load_digits() -> Digits:
    """Return the scans of scikit-learn; a fifth of them, the same every time, is held out.

    Raises:
        InputError: scikit-learn is not installed.
    """
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
    say: Callable[[str], None] = print,
) -> TrainingDemoResult:
    """Train both models, draw ten of each digit and measure them.

    Stages that were finished or interrupted in ``out`` before are not begun anew.

    Args:
        out: folder for everything the demo makes.
        device: as for training.
        seed: of the training and of the generated digits.
        steps: of the tokenizer and of the transformer; by default what their recipes say.
        say: takes one line of progress.

    Raises:
        InputError: ``out`` cannot be written, or scikit-learn is missing.
    """
    from llamagen.evaluation.protocols.tokenizer import reconstruct
    from llamagen.pipeline import Pipeline
    from llamagen.training import (
        TokenizerTraining,
        TransformerTraining,
        load_recipe,
        train_tokenizer,
        train_transformer,
    )

    storage.require_writable(out)
    digits = load_digits()
    start = time.perf_counter()
    data = out / "digits"
    _write_tree(data / "train", digits.train, digits.train_labels)
    _write_tree(data / "held-out", digits.held_out, digits.held_out_labels)
    say(f"{len(digits.train)} scans to train on, {len(digits.held_out)} held out, in {data}")
    seconds = {"data": time.perf_counter() - start}

    def common(loop: LoopConfig, stage: int) -> dict[str, Any]:
        loop = dataclasses.replace(
            loop, device=device, seed=seed, steps=loop.steps if steps is None else steps[stage]
        )
        return {
            "data": str(data / "train"),
            "validation_data": str(data / "held-out"),
            "loop": loop,
        }

    first = load_recipe(TokenizerTraining, "digits-tokenizer")
    first = dataclasses.replace(first, out=out / "tokenizer", **common(first.loop, 0))
    tokenizer = train_tokenizer(first)
    second = load_recipe(TransformerTraining, "digits-transformer")
    second = dataclasses.replace(
        second,
        out=out / "transformer",
        tokenizer=str(tokenizer.model),
        **common(second.loop, 1),
    )
    transformer = train_transformer(second)
    seconds |= {"tokenizer": tokenizer.seconds, "transformer": transformer.seconds}

    start = time.perf_counter()
    pipe = Pipeline.from_pretrained(transformer.model, device=device)
    generated = pipe(list(range(10)), num_images_per_prompt=PER_DIGIT, seed=seed).images
    seconds["generation"] = time.perf_counter() - start

    save_png(_sheet(digits, generated), out / "sheet.png")
    curves = [
        titled(Image.open(run.out / "curves.png").convert("RGB"), title)
        for run, title in ((tokenizer, "image tokenizer"), (transformer, "transformer"))
    ]
    save_png(stacked(curves), out / "curves.png")
    real = [enlarged(scan) for scan in digits.held_out]
    reconstructed = reconstruct(
        pipe.tokenizer, [(Path(str(index)), picture) for index, picture in enumerate(real)]
    )
    recognised = _classifier(digits)
    result = TrainingDemoResult(
        recognised=recognised(generated, np.arange(10).repeat(PER_DIGIT)),
        recognised_real=recognised(real, digits.held_out_labels),
        recognised_reconstructed=recognised(
            [item.image for item in reconstructed], digits.held_out_labels
        ),
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


def enlarged(scan: np.ndarray) -> Image.Image:
    """Return a scan (8, 8) from 0 to 16 as an image of ``SIDE`` pixels, light ink on black."""
    grey = (scan * 255 / _GREYS).round().astype(np.uint8)
    picture = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return picture.convert("RGB")


def _classifier(digits: Digits) -> Callable[[list[Image.Image], np.ndarray], float]:
    """Return a function from pictures and labels to the fraction that is recognised.

    The classifier is trained on the real training scans only.
    """
    from sklearn.svm import SVC

    # The usual settings for these scans (scikit-learn's guide): 99 % of held-out scans.
    model = SVC(gamma=0.001).fit(digits.train.reshape(len(digits.train), -1), digits.train_labels)

    def recognised(pictures: list[Image.Image], labels: np.ndarray) -> float:
        size = (_SCAN_SIDE, _SCAN_SIDE)
        scans = [
            np.asarray(picture.convert("L").resize(size, Image.Resampling.BOX), dtype=np.float64)
            * (_GREYS / 255)
            for picture in pictures
        ]
        found = model.predict(np.stack(scans).reshape(len(scans), -1))
        return float((found == labels).mean())

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
    real = []
    for digit in range(10):
        scans = digits.held_out[digits.held_out_labels == digit][:PER_DIGIT]
        real += [enlarged(scan) for scan in scans]
    parts = [
        titled(image_grid(pictures, columns=PER_DIGIT, scale=2), title)
        for pictures, title in (
            (real, "real digits (held out: no model has seen them)"),
            (generated, "generated digits (ten of each, not picked)"),
        )
    ]
    return stacked(parts, across=True)
