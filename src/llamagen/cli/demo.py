"""Draw a sheet with the models that come with the package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from llamagen.cli.options import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``llamagen demo``."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    """Folder for the sheet."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    seed: int = 0
    """Seed of the first image of each model."""


def run(options: Options) -> None:
    """Draw the sheet and print where it is."""
    from llamagen.pipeline.demo import run_demo

    result = run_demo(options.out, device=options.device, seed=options.seed)
    print(
        f"""{result.images} images in {result.seconds:.1f} s, none picked

sheet      {result.sheet}
draw more  llamagen generate --model emoji --prompt "sunflower" -n 8
           llamagen generate --model cifar10 --class horse -n 8"""
    )
