"""The published layout of codes, one .npy file per image: import into a store, and export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.config import config_to_dict
from llamagen.data.extraction import Extraction, make_store, shard_content
from llamagen.data.store import SHARD_SIZE, CodeStore, StorePlan, StoreViews, store_artifact
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.artifact import Advance, write_npy
from llamagen.support.content import files_digest
from llamagen.support.errors import InputError, one_line
from llamagen.support.names import as_index

_log = logging.getLogger(__name__)


def export_published(store: CodeStore, root: Path | str, *, name: str | None = None) -> int:
    """Write a store in the published layout, one .npy per image; return the number of images.

    ``<root>/<name>_codes/N.npy`` holds the codes of image N, int64 of shape (1, V, codes), or
    (1, codes) for a single view; ``<root>/<name>_labels/N.npy`` its label, of shape (1,), if there
    are labels. The published training expects the default name: imagenet and the height of the
    images. Existing files are kept, so an interrupted export can be resumed; InputError if they
    hold other codes.
    """
    name = name or f"imagenet{store.manifest.plan.views.height}"
    codes, label_folder = (Path(root) / f"{name}_{kind}" for kind in ("codes", "labels"))
    labels = store.labels
    for folder in (codes,) if labels is None else (codes, label_folder):
        storage.require_writable(folder)
    shape = (1, -1) if store.views == 1 else (1, store.views, -1)
    rows = itertools.chain.from_iterable(map(store.shard, range(len(store.manifest.shards))))
    bar = tqdm(rows, total=len(store), desc="exporting", unit="image", disable=None)
    for index, row in enumerate(bar):
        _write_array(codes / f"{index}.npy", row.reshape(shape).astype(np.int64))
        if labels is not None:
            _write_array(label_folder / f"{index}.npy", labels[index : index + 1])
    return len(store)


def import_published(
    tokenizer: ImageTokenizer,
    root: Path | str,
    out: Path | str,
    *,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Extraction:
    """Make a store of codes in the published layout (``export_published``).

    Damaged files are skipped; an interrupted import can be resumed.

    ``tokenizer`` made the codes, of which only the range can be checked; ``root`` is the folder
    with the two folders, or the one with codes. ``overwrite`` deletes a store of other codes first.

    FileNotFoundError if there are no such folders, or a label is missing; InputError if the files
    do not hold codes of this tokenizer, or ``out`` holds something else.
    """
    source = _find(Path(root))
    size = source.side * tokenizer.config.downsampling
    plan = StorePlan.of(
        tokenizer,
        grid=(source.side, source.side),
        precision="unknown",
        views=StoreViews(kind="published", count=source.views, height=size, width=size),
        source_digest=source.digest(),
        content_digest=source.content_digest(),
        source_images=len(source.numbers),
        shard_size=shard_size,
        labelled=source.labels is not None,
        captioned=False,
        class_names=(),
        batch_size=1,
    )
    artifact = store_artifact(out, config_to_dict(plan))
    make = functools.partial(artifact.make, functools.partial(_read_shard, source, plan))
    return make_store(artifact, make, "importing", overwrite=overwrite, progress=progress)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Two folders in the published layout."""

    codes: Path
    labels: Path | None
    numbers: list[int]
    """Numbers of the files, sorted."""
    views: int
    side: int
    """Codes along a side."""

    def digest(self) -> str:
        """Return a text that depends on the list of files and the content of some."""
        listed = json.dumps([self.numbers, self.labels is not None]).encode()
        some = self.numbers[:: max(1, len(self.numbers) // 16)]
        contents = ((self.codes / f"{number}.npy").read_bytes() for number in some)
        return storage.short_digest([listed, *contents])

    def content_digest(self) -> str:
        """Return a text that depends on the content of all files."""
        folders = [folder for folder in (self.codes, self.labels) if folder is not None]
        paths = [folder / f"{number}.npy" for folder in folders for number in self.numbers]
        return files_digest(self.codes.parent, paths)


def _find(root: Path) -> _Source:
    """Find the folders; the first undamaged file gives the shape of the codes."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one with published codes")
    found = [root] if root.name.endswith("_codes") else sorted(root.glob("*_codes"))
    if not found:
        raise FileNotFoundError(
            f"there is no folder *_codes in {root}; give the folder above it, or the one itself"
        )
    codes, *others = found
    if others:
        names = " and ".join(folder.name for folder in found)
        raise InputError(f"{root} has {names}; give one of them")
    stems = [path.stem for path in codes.glob("*.npy")]
    if unexpected := [stem for stem in stems if str(as_index(stem)) != stem]:
        raise InputError(
            f"{codes / min(unexpected)}.npy is not named by a number as published codes are; "
            f"move it out of the folder"
        )
    numbers = sorted(map(int, stems))
    labels = codes.with_name(codes.name.removesuffix("_codes") + "_labels")
    for path in (codes / f"{number}.npy" for number in numbers):
        with contextlib.suppress(_DamagedFileError):
            views, side = _shape(path, _load_array(path))
            return _Source(codes, labels if labels.is_dir() else None, numbers, views, side)
    raise InputError(
        f"none of the {len(numbers)} .npy files in {codes} can be read; give another folder"
    )


def _read_shard(
    source: _Source, plan: StorePlan, items: range, advance: Advance
) -> Mapping[str, Any]:
    codes = np.empty((len(items), source.views, *plan.grid), dtype=plan.dtype)
    keys: list[str] = []
    skipped = []
    for number in source.numbers[items.start : items.stop]:
        path = source.codes / f"{number}.npy"
        try:
            codes[len(keys)] = _read_codes(path, plan)
        except _DamagedFileError as error:
            _log.warning("skipped: %s cannot be read (%s)", path, error)
            skipped.append((path.name, str(error)))
        else:
            keys.append(path.name)
        advance(1)
    labels = None if source.labels is None else [_read_label(source.labels / k) for k in keys]
    return shard_content(plan, codes, keys=keys, labels=labels, captions=None, skipped=skipped)


def _read_codes(path: Path, plan: StorePlan) -> np.ndarray:
    """Return the codes (V, rows, columns) in a file."""
    array = _load_array(path)
    views, side = _shape(path, array)
    if (views, side) != (plan.views.count, plan.grid[0]):
        raise InputError(
            f"{path} has {views} views of {side**2} codes, but the files before it have "
            f"{plan.views.count} of {plan.grid[0] ** 2}; keep only files of one extraction in the "
            f"folder"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path} holds {array.dtype}, expected integers; give another folder")
    if not (0 <= array.min() and array.max() < plan.codebook_size):
        raise InputError(
            f"{path} has codes from {array.min()} to {array.max()}, but the tokenizer has "
            f"{plan.codebook_size} (0 to {plan.codebook_size - 1}); give `tokenizer` the one that "
            f"made them"
        )
    return array.reshape(views, *plan.grid)


def _shape(path: Path, array: np.ndarray) -> tuple[int, int]:
    """Return the number of views in a file, and of codes along a side."""
    shape = array.shape
    views = shape[1] if len(shape) == 3 else 1
    side = math.isqrt(shape[-1]) if shape else 0
    if len(shape) not in (2, 3) or shape[0] != 1 or min(views, side) < 1 or side**2 != shape[-1]:
        raise InputError(
            f"{path} has shape {shape}, expected (1, codes) or (1, views, codes) with a square "
            f"number of codes; give another folder"
        )
    return views, side


def _read_label(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, but its codes do; restore it, or move the folder of labels "
            f"away"
        )
    try:
        label = _load_array(path)
    except _DamagedFileError as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from error
    if label.size != 1 or not np.issubdtype(label.dtype, np.integer) or label.min() < 0:
        raise InputError(f"{path} holds {label.dtype} {label.shape}, expected one label from 0 on")
    return int(label.item())


class _DamagedFileError(Exception):
    """A damaged .npy file; the message is the reason."""


def _load_array(path: Path) -> np.ndarray:
    # Errors of the disk or network do not mean a damaged file.
    content = path.read_bytes()
    try:
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _DamagedFileError(one_line(error) or "damaged") from error
    return array


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write an array, or check that the file has the same content."""
    if not path.exists():
        with storage.atomic_file(path) as temporary:
            write_npy(temporary, array)
        return
    with contextlib.suppress(_DamagedFileError):
        if np.array_equal(_load_array(path), array):
            return
    raise InputError(f"{path} is there with other content; give an empty folder")
