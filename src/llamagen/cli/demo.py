"""``llamagen demo`` and ``llamagen demo-train``: from nothing to a sheet of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from llamagen.cli.options import DeviceOption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw(DeviceOption):
    """Draw a sheet with the models that come with the package."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    """Folder for the sheet."""
    seed: int = 0
    """Seed of the first image of each model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(DeviceOption):
    """Train both models on scikit-learn's handwritten digits, draw ten of each, measure them."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    """Folder for everything the demo makes; an interrupted demo goes on from there."""
    seed: int = 0
    """Seed of the training and of the generated digits."""
    steps: tuple[int, int] | None = None
    """Training steps of tokenizer and transformer. Default: what their recipes say."""


def run(options: Draw | Train) -> None:
    """Run a demo and print its results."""
    print(_draw(options) if isinstance(options, Draw) else _train(options))


def _draw(options: Draw) -> str:
    from llamagen.pipeline.demo import run_demo

    result = run_demo(**vars(options))
    return f"""{result.images} images in {result.seconds:.1f} s, none picked

sheet      {result.sheet}
draw more  llamagen generate --model emoji --prompt "sunflower" -n 8
           llamagen generate --model cifar10 --class horse -n 8"""


def _train(options: Train) -> str:
    from llamagen.training.demo import run_training_demo

    result = run_training_demo(**vars(options))
    times = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    return f"""
reconstruction PSNR      {result.psnr:.1f} dB (held-out scans)
codebook usage           {100 * result.codebook_usage:.0f} % (held-out scans)
held-out loss            {result.bits_per_code:.2f} bits per code
recognised as requested  {100 * result.recognised:.0f} % of the generated digits
  the same classifier    {100 * result.recognised_real:.1f} % of held-out real scans, \
{100 * result.recognised_reconstructed:.1f} % of their reconstructions
time                     {times}

pictures   {result.sheet}
           {result.curves}
draw more  llamagen generate --model {result.model} --class 7 -n 16 --out sevens.png"""
