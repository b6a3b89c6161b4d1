"""Sets of images and a network for tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llamagen.evaluation.features import NetworkOutput

CLASSES = ("cat", "dog", "red fox", "grey fox", "crane")
"""Those of the tiny pipeline."""


class CoarsePixels:
    """A network whose features are an image's pixels at 2x2, and whose classes are by colour."""

    name = "coarse pixels"
    class_names = tuple(sorted(CLASSES))

    def __init__(self, fingerprint: str = "coarse 1") -> None:
        self.fingerprint = fingerprint
        self.seen = 0

    def __call__(self, images: Tensor) -> NetworkOutput:
        self.seen += len(images)
        pool = F.adaptive_avg_pool2d(images.float() / 255.0, 2).flatten(1)
        return NetworkOutput(pool, pool[:, :4], pool[:, :5])


def noise(count: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8, no two alike."""
    numbers = np.random.default_rng(seed)
    coarse = numbers.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return coarse.repeat(side // 2, 1).repeat(side // 2, 2)


def write_noise(folder: Path, count: int, *, side: int = 16, seed: int = 0) -> Path:
    """PNGs in the class folders of the tiny pipeline."""
    for index, array in enumerate(noise(count, side, seed)):
        path = folder / CLASSES[index % len(CLASSES)] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return folder
