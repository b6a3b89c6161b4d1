"""Real images for tests: scikit-learn's handwritten digits as image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(
    folder: Path, *, per_class: int = 8, classes: int = 3, size: int = 16, suffix: str = ".png"
) -> Path:
    """A class-per-folder tree of the first scans of each digit; returns ``folder``."""
    scans, labels = load_digits(return_X_y=True)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for number, scan in enumerate(scans[labels == label][:per_class]):
            grey = (scan.reshape(8, 8) / 16 * 255).round().astype(np.uint8)
            picture = Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC)
            picture.convert("RGB").save(folder / str(label) / f"{number:03d}{suffix}")
    return folder
