"""Small data sets of real images in the formats that the datasets library reads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ["zero", "one", "two"]


def scans(count: int) -> list[tuple[bytes, int]]:
    """PNGs of handwritten digits 0 to 2, all different, with their labels."""
    pictures, labels = load_digits(n_class=3, return_X_y=True)
    found = []
    for scan, label in list(zip(pictures, labels, strict=True))[:count]:
        grey = (scan.reshape(8, 8) / 16 * 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grey).resize((16, 16)).convert("RGB").save(file, "PNG")
        found.append((file.getvalue(), int(label)))
    return found


def as_dataset(items: list[tuple[bytes | None, int]]) -> datasets.Dataset:
    """With a column of images, one of labels and one of captions."""
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "text": datasets.Value("string"),
    }
    columns = {
        "image": [
            None if content is None else {"bytes": content, "path": None} for content, _ in items
        ],
        "label": [label for _, label in items],
        "text": [f"a {NAMES[label]}" for _, label in items],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(
    folder: Path, items: list[tuple[bytes | None, int]], *, files: int = 1, split: str = "train"
) -> Path:
    """Files named as the hub's are; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = as_dataset(items)
    for index in range(files):
        name = f"{split}-{index:05d}-of-{files:05d}.parquet"
        whole.shard(files, index, contiguous=True).to_parquet(folder / name)
    return folder


def write_tars(folder: Path, items: list[tuple[bytes, int]], *, files: int = 1) -> Path:
    """WebDataset tars; returns ``folder``."""
    folder.mkdir(parents=True)
    for index in range(files):
        with tarfile.open(folder / f"train-{index:04d}.tar", "w") as tar:
            for number in range(index, len(items), files):
                content, label = items[number]
                members = {
                    "png": content,
                    "cls": str(label).encode(),
                    "txt": f"a {NAMES[label]}".encode(),
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder
