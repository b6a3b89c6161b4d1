"""The store of codes: a folder of shards that is read piece by piece, however large it is.

``manifest.json`` says what the store holds and is written last. Each shard is an array
``shard-00000.npy`` of codes and a sidecar ``shard-00000.json`` about its images. ``extraction.py``
writes stores. Longer than most files: half of it describes the format and its checks, for readers
and writers alike.

Shapes: N images, V views of an image, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from llamagen.config import (
    Grid,
    TokenizerConfig,
    TransformerConfig,
    config_to_dict,
    read_json,
)
from llamagen.data.captions import Caption, Captions, CaptionTable
from llamagen.data.versioned import read_versioned, write_versioned
from llamagen.support.errors import InputError

FileT = TypeVar("FileT", "StorePlan", "Manifest")

FORMAT = "llamagen-codes"
VERSION = 2
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
SKIPPED_NAME = "skipped.txt"

_AGAIN = "run llamagen extract-codes again with the same options"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreViews:
    """The views that every image of a store was encoded in."""

    kind: str
    """As in ``Views``, or "published" for codes that came in the published layout."""
    count: int
    height: int
    """Pixels that were encoded."""
    width: int
    ranges: tuple[float, ...] = ()
    """Enlargements that crops were cut from, if there are several views to each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Everything about a store that is known before its first shard is written."""

    tokenizer_fingerprint: str
    tokenizer_config: TokenizerConfig
    grid: Grid
    codebook_size: int
    dtype: str
    """Of the codes: uint16, or uint32 for codebooks beyond 65536."""
    precision: str
    """That the images were encoded with."""
    views: StoreViews
    source_digest: str
    """Changes if an image is added, removed or renamed, or its label or caption is another."""
    source_images: int
    """Image files, whether they can be read or not."""
    shard_size: int
    """Image files to a shard; those that cannot be read are missing in it."""
    labelled: bool
    captioned: bool
    class_names: tuple[str, ...]
    """Empty if labels have no names."""
    batch_size: int
    """Views encoded at once. Changes nothing but rounding, so it is not part of ``identity``."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size", "source_images"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")

    @property
    def identity(self) -> str:
        """A short text that two stores share only if they hold the same."""
        values = config_to_dict(self)
        del values["batch_size"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.source_images / self.shard_size)

    def images_of(self, shard: int) -> range:
        """Which image files belong to a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.source_images))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete store holds."""

    plan: StorePlan
    images: int
    """Images that were encoded."""
    skipped: int
    """Image files that could not be read."""
    shards: tuple[int, ...]
    """Images of each shard."""
    class_names: tuple[str, ...]
    codes_used: int
    """Different codes that occur."""
    llamagen: str
    """Version of the program that finished the store."""

    def __post_init__(self) -> None:
        if len(self.shards) != self.plan.shards or sum(self.shards) != self.images:
            raise InputError(
                f"{len(self.shards)} shards with {sum(self.shards)} images do not make up "
                f"{self.plan.shards} shards with {self.images} images; {_AGAIN}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What a shard's array does not say about its images."""

    plan: str
    """Identity of the plan that the shard was written for."""
    keys: tuple[str, ...]
    """Path of each image within its folder."""
    labels: tuple[int, ...] | None
    captions: tuple[Captions, ...] | None
    skipped: tuple[tuple[str, str], ...]
    """Path of each file that could not be read, and why."""
    used: str
    """Which codes occur: one bit each, as hexadecimal digits."""


class CodeStore:
    """Codes, labels and captions of images, read from the disk when they are asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """A store that has been checked: use ``open``."""
        self.folder = folder
        self.manifest = manifest
        self._ends = np.cumsum(manifest.shards)
        self._maps: dict[int, np.ndarray] = {}
        self._captions: CaptionTable | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Opens the store in ``folder``. Of the shards, only headers are read.

        Raises:
            FileNotFoundError: there is no store, or one of its files is missing.
            InputError: it is not complete, of another version, or a file is damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        store = cls(folder, manifest)
        for shard in range(len(manifest.shards)):
            check_shard(folder, manifest.plan, shard, images=manifest.shards[shard])
        return store

    def __len__(self) -> int:
        return self.manifest.images

    def __getstate__(self) -> dict[str, Any]:
        # A mapping would be sent to another process with all it shows.
        return {**self.__dict__, "_maps": {}, "_captions": None}

    @property
    def views(self) -> int:
        """Views of each image."""
        return self.manifest.plan.views.count

    @property
    def grid(self) -> Grid:
        """Rows and columns of an image's codes."""
        return self.manifest.plan.grid

    @property
    def codebook_size(self) -> int:
        """Codes that the tokenizer has."""
        return self.manifest.plan.codebook_size

    @property
    def codebook_usage(self) -> float:
        """Share of the tokenizer's codes that occur, from 0 to 1."""
        return self.manifest.codes_used / self.codebook_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.manifest.class_names

    @property
    def identity(self) -> str:
        """Changes if images, views or tokenizer do."""
        return self.manifest.plan.identity

    def rows(self, indices: np.ndarray, views: np.ndarray | int = 0) -> np.ndarray:
        """Codes of one view each of some images; nothing else is read.

        Args:
            indices: (B,) which images.
            views: (B,) which view of each; one number for all alike.

        Returns:
            (B, rows, columns) of the store's dtype.

        Raises:
            IndexError: there is no such image or view.
        """
        indices, views = np.broadcast_arrays(np.asarray(indices), np.asarray(views))
        _check_range(indices, len(self), "image")
        _check_range(views, self.views, "view")
        codes = np.empty((len(indices), *self.grid), dtype=self.manifest.plan.dtype)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            here = shards == shard
            start = self._ends[shard] - self.manifest.shards[shard]
            codes[here] = self.shard(int(shard))[indices[here] - start, views[here]]
        return codes

    def shard(self, index: int) -> np.ndarray:
        """A whole shard (n, V, rows, columns) as a read-only mapping of its file."""
        if index not in self._maps:
            self._maps[index] = np.load(shard_path(self.folder, index), mmap_mode="r")
        return self._maps[index]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64; None for images without classes.

        Raises:
            InputError: a label is none of the store's classes, or a sidecar is damaged.
        """
        if not self.manifest.plan.labelled:
            return None
        parts = [np.empty(0, dtype=np.int64)]
        for shard, images in enumerate(self.manifest.shards):
            labels = np.array(self._sidecar(shard).labels or (), dtype=np.int64)
            path = sidecar_path(self.folder, shard)
            if len(labels) != images:
                raise InputError(
                    f"{path} has {len(labels)} labels for {images} images; delete it and {_AGAIN}"
                )
            if images and not (0 <= labels.min() and labels.max() < len(self.class_names)):
                raise InputError(
                    f"{path} has labels from {labels.min()} to {labels.max()}, but the store has "
                    f"{len(self.class_names)} classes (0 to {len(self.class_names) - 1}); "
                    f"delete it and {_AGAIN}"
                )
            parts.append(labels)
        return np.concatenate(parts)

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """These images: those that could not be read are in no store."""
        return indices

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """The captions of some images; None for images without captions.

        Raises:
            IndexError: there is no such image.
            FileNotFoundError: the file of captions is missing.
            InputError: the file of captions is damaged.
        """
        if not self.manifest.plan.captioned:
            return None
        if self._captions is None:
            self._captions = CaptionTable(self.folder, len(self))
        wanted = np.asarray(indices, dtype=np.int64)
        _check_range(wanted, len(self), "image")
        return [self._captions[index] for index in wanted.tolist()]

    def keys(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The paths of some images within the folder that they came from.

        Raises:
            IndexError: there is no such image.
        """
        return self._told(indices, lambda sidecar: sidecar.keys)

    def skipped(self) -> list[tuple[str, str]]:
        """The path of each file that could not be read, and why."""
        return [
            entry
            for shard in range(len(self.manifest.shards))
            for entry in self._sidecar(shard).skipped
        ]

    def check_tokenizer(self, fingerprint: str) -> None:
        """Checks that the codes mean what they mean to a tokenizer (its fingerprint).

        Raises:
            InputError: another tokenizer made them.
        """
        made_by = self.manifest.plan.tokenizer_fingerprint
        if made_by != fingerprint:
            raise InputError(
                f"the codes in {self.folder} were made by another image tokenizer (fingerprint "
                f"{made_by}, this one has {fingerprint}); give --tokenizer that one, or extract "
                f"the codes again"
            )

    def check_fits(self, config: TransformerConfig) -> None:
        """Checks that a transformer can learn these codes.

        Raises:
            InputError: codebook, grid or labels are not those of ``config``.
        """
        if self.codebook_size != config.codebook_size:
            raise InputError(
                f"the codes in {self.folder} come from a tokenizer with {self.codebook_size} codes "
                f"but the transformer predicts {config.codebook_size}; use the tokenizer it was "
                f"made for"
            )
        if self.grid != tuple(config.grid):
            raise InputError(
                f"the images in {self.folder} have {self.grid[0]}x{self.grid[1]} codes but the "
                f"transformer has a grid of {config.grid[0]}x{config.grid[1]}; use another image "
                f"size"
            )
        if config.condition == "class":
            self._check_labels(config.num_classes)

    def _check_labels(self, num_classes: int) -> None:
        if self.labels is None:
            raise InputError(
                f"the images in {self.folder} have no classes; put the images of each class into "
                f"a folder of its name and extract the codes again"
            )
        highest = int(self.labels.max(initial=0))
        if highest >= num_classes:
            raise InputError(
                f"the store {self.folder} has {len(self.class_names)} classes, and label {highest} "
                f"({self.class_names[highest]!r}), but the transformer has {num_classes} classes "
                f"(0 to {num_classes - 1}); raise --num-classes or leave it out"
            )

    def _sidecar(self, shard: int) -> Sidecar:
        return read_sidecar(self.folder, self.manifest.plan, shard)

    def _told(
        self, indices: Sequence[int] | np.ndarray, tell: Callable[[Sidecar], Sequence[str]]
    ) -> list[str]:
        """One text per image, of those that sidecars hold."""
        wanted = np.asarray(indices, dtype=np.int64)
        _check_range(wanted, len(self), "image")
        texts = [""] * len(wanted)
        shards = np.searchsorted(self._ends, wanted, side="right")
        for shard in np.unique(shards):
            told = tell(self._sidecar(int(shard)))
            start = int(self._ends[shard]) - self.manifest.shards[shard]
            for place in np.flatnonzero(shards == shard):
                texts[place] = told[int(wanted[place]) - start]
        return texts


def shard_path(folder: Path, shard: int) -> Path:
    """The array of a shard."""
    return folder / f"shard-{shard:05d}.npy"


def sidecar_path(folder: Path, shard: int) -> Path:
    """What belongs to the array of a shard; written after it."""
    return folder / f"shard-{shard:05d}.json"


def write_plan_file(path: Path, content: StorePlan | Manifest) -> None:
    """Writes a plan or a manifest, with format and version."""
    write_versioned(path, content, FORMAT, VERSION)


def read_plan_file(cls: type[FileT], path: Path) -> FileT:
    """Reads what ``write_plan_file`` wrote.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file is damaged, of another version or of another format.
    """
    return read_versioned(cls, path, FORMAT, VERSION, again="extract the codes again")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in ``folder``.

    Raises:
        FileNotFoundError: there is no store.
        InputError: it is not complete, damaged, or of another version.
    """
    if not (folder / MANIFEST_NAME).exists():
        if (folder / PLAN_NAME).exists():
            raise InputError(f"the store of codes in {folder} is not complete; {_AGAIN}")
        raise FileNotFoundError(
            f"there is no store of codes in {folder} ({MANIFEST_NAME} is missing); make one with "
            f"llamagen extract-codes"
        )
    return read_plan_file(Manifest, folder / MANIFEST_NAME)


def read_sidecar(folder: Path, plan: StorePlan, shard: int) -> Sidecar:
    """The sidecar of a shard.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file is damaged, or belongs to another store.
    """
    path = sidecar_path(folder, shard)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_AGAIN}: only that shard is made anew")
    values = read_json(path)
    try:
        # By hand: checking the type of every entry would take seconds for a million images.
        sidecar = Sidecar(
            plan=values["plan"],
            keys=tuple(values["keys"]),
            labels=None
            if values["labels"] is None
            else tuple(map(operator.index, values["labels"])),
            captions=None
            if values["captions"] is None
            else tuple(
                tuple(Caption(str(text), float(weight)) for text, weight in each)
                for each in values["captions"]
            ),
            skipped=tuple((file, reason) for file, reason in values["skipped"]),
            used=values["used"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error!r}); delete it and {_AGAIN}") from error
    if sidecar.plan != plan.identity:
        raise InputError(f"{path} belongs to another store; delete it and {_AGAIN}")
    return sidecar


def check_shard(folder: Path, plan: StorePlan, shard: int, *, images: int) -> None:
    """Checks header and size of a shard's array, and that its sidecar is there.

    Raises:
        FileNotFoundError: a file is missing.
        InputError: the array is truncated, damaged, or not the one it should be.
    """
    for path in (shard_path(folder, shard), sidecar_path(folder, shard)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {_AGAIN}: only that shard is made anew")
    path = shard_path(folder, shard)
    remedy = f"delete it and {_AGAIN}: only that shard is made anew"
    with path.open("rb") as file:
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("an unknown version of the format")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        except (ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} is damaged ({reason}); {remedy}") from error
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    expected = (images, plan.views.count, *plan.grid)
    if shape != expected or dtype != np.dtype(plan.dtype) or fortran_order:
        raise InputError(
            f"{path} holds {dtype} {shape}, but the store says {plan.dtype} {expected}; {remedy}"
        )
    whole = start + math.prod(shape) * dtype.itemsize
    if size != whole:
        raise InputError(f"{path} has {size} of {whole} bytes; {remedy}")


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes an array as ``np.save`` does, but says why when the disk is full.

    numpy's own writing reports a number of elements, and loses the cause.
    """
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.reshape(-1).view(np.uint8).data)


def _check_range(numbers: np.ndarray, count: int, what: str) -> None:
    if len(numbers) and not (0 <= numbers.min() and numbers.max() < count):
        raise IndexError(
            f"{what} numbers run from {numbers.min()} to {numbers.max()}, but the store has "
            f"{what}s 0 to {count - 1}"
        )
