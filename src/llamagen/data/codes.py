"""The codes of images: made once by an image tokenizer, then what the transformer learns.

Shapes: N images, V views of an image, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

import llamagen.storage as storage
from llamagen.config import Grid, TransformerConfig, config_to_dict
from llamagen.data.images import ImageFolder, SkippedFiles
from llamagen.data.loader import image_views
from llamagen.data.views import Views
from llamagen.errors import InputError
from llamagen.tokenizer import ImageTokenizer, uint8_to_images

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeSet:
    """Codes and labels of a set of images."""

    codes: np.ndarray
    """(N, V, rows, columns) uint16, or uint32 for codebooks beyond 65536."""
    labels: np.ndarray | None
    """(N,) int64; None for images without classes."""
    class_names: tuple[str, ...]
    codebook_size: int
    origin: str
    """Of which images and tokenizer: changes if either, or the views, do (``code_origin``)."""

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def grid(self) -> Grid:
        """Rows and columns of an image's codes."""
        return self.codes.shape[2], self.codes.shape[3]

    def check_fits(self, config: TransformerConfig) -> None:
        """Checks that a transformer can learn these codes.

        Raises:
            InputError: codebook, grid or labels are not those of ``config``.
        """
        if self.codebook_size != config.codebook_size:
            raise InputError(
                f"the codes come from a tokenizer with {self.codebook_size} codes but the "
                f"transformer predicts {config.codebook_size}; use the tokenizer it was made for"
            )
        if self.grid != tuple(config.grid):
            raise InputError(
                f"the images have {self.grid[0]}x{self.grid[1]} codes but the transformer has a "
                f"grid of {config.grid[0]}x{config.grid[1]}; use another image size"
            )
        if config.condition == "class":
            self._check_labels(config.num_classes)

    def _check_labels(self, num_classes: int) -> None:
        if self.labels is None:
            raise InputError(
                "the images have no classes; put the images of each class into a folder of its name"
            )
        highest = int(self.labels.max(initial=0))
        if highest >= num_classes:
            raise InputError(
                f"the images have {len(self.class_names)} classes, and label {highest} "
                f"({self.class_names[highest]!r}), but the transformer has {num_classes} classes "
                f"(0 to {num_classes - 1}); raise --num-classes or leave it out"
            )

    def save(self, path: Path) -> None:
        """Writes everything into one .npz file, atomically."""
        about = {
            "version": _VERSION,
            "origin": self.origin,
            "codebook_size": self.codebook_size,
            "class_names": self.class_names,
        }
        labels = np.zeros(0, np.int64) if self.labels is None else self.labels
        with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, codes=self.codes, labels=labels, about=np.array(json.dumps(about)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            InputError: the file is damaged or of another version.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                if about["version"] != _VERSION:
                    raise InputError(
                        f"{path} has version {about['version']}, this program reads {_VERSION}; "
                        f"delete it to have it made again"
                    )
                labels = arrays["labels"]
                return cls(
                    codes=arrays["codes"],
                    labels=labels if labels.size else None,
                    class_names=tuple(about["class_names"]),
                    codebook_size=about["codebook_size"],
                    origin=about["origin"],
                )
        except InputError:
            raise
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
            raise InputError(
                f"{path} is damaged ({error}); delete it to have it made again"
            ) from error


def tokenizer_fingerprint(tokenizer: ImageTokenizer) -> str:
    """A short text that two tokenizers share only if their codes mean the same."""
    whole = hashlib.sha256(json.dumps(config_to_dict(tokenizer.config)).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def code_origin(tokenizer: ImageTokenizer, images: ImageFolder, views: Views) -> str:
    """What codes depend on, in one short text."""
    parts = [tokenizer_fingerprint(tokenizer), images.digest(), repr(views)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


@torch.inference_mode()
def extract_codes(
    tokenizer: ImageTokenizer,
    images: ImageFolder,
    views: Views,
    *,
    skipped: SkippedFiles,
    batch_size: int = 64,
    workers: int = 0,
) -> CodeSet:
    """Encodes all views of all images that can be read; ``skipped`` learns of the others.

    Raises:
        InputError: no image can be read, or the size is not a multiple of the downsampling.
    """
    tokenizer.config.grid_of(views.height, views.width)
    size = tokenizer.config.codebook_size
    dtype = np.uint16 if size <= 2**16 else np.uint32
    codes: list[np.ndarray] = []
    read: list[int] = []
    per_batch = max(1, batch_size // len(views))
    batches = image_views(images.paths, views, batch_size=per_batch, workers=workers)
    with tqdm(total=len(images), desc="encoding", unit="image", disable=None) as bar:
        for batch in batches:
            skipped.add(batch.skipped)
            bar.update(len(batch.indices) + len(batch.skipped))
            if len(batch.indices) > 0:
                pixels = batch.pixels.flatten(0, 1).to(tokenizer.device)  # (B * V, 3, H, W)
                grids = tokenizer.encode(uint8_to_images(pixels))
                grids = grids.unflatten(0, batch.pixels.shape[:2])
                codes.append(grids.cpu().numpy().astype(dtype))
                read += batch.indices.tolist()
    if not read:
        raise InputError(f"none of the {len(images)} image files in {images.root} can be read")
    return CodeSet(
        codes=np.concatenate(codes),
        labels=_labels(images, read),
        class_names=images.class_names,
        codebook_size=size,
        origin=code_origin(tokenizer, images, views),
    )


def _labels(images: ImageFolder, indices: Sequence[int]) -> np.ndarray | None:
    if images.labels is None:
        return None
    return np.array([images.labels[i] for i in indices], dtype=np.int64)


def load_or_extract(
    path: Path, tokenizer: ImageTokenizer, images: ImageFolder, views: Views, **options: Any
) -> CodeSet:
    """The codes in ``path`` if they are those of these images and this tokenizer.

    Otherwise they are extracted, with ``options`` as in ``extract_codes``, and written there.
    """
    if path.exists():
        try:
            stored = CodeSet.load(path)
        except InputError:
            # A cache: whatever cannot be read is made again.
            stored = None
        if stored is not None and stored.origin == code_origin(tokenizer, images, views):
            return stored
    extracted = extract_codes(tokenizer, images, views, **options)
    extracted.save(path)
    return extracted
