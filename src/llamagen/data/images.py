"""Collections of images; folders of images; reading of image files in any common format."""

from __future__ import annotations

import abc
import collections
import copy
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import llamagen.support.storage as storage
from llamagen.data.captions import Captions
from llamagen.data.columns import sort_names
from llamagen.support.content import files_digest
from llamagen.support.errors import InputError, one_line
from llamagen.support.labels import Labels
from llamagen.support.launch import Launch
from llamagen.support.names import normal_name
from llamagen.support.pictures import DECODING_ERRORS

EXTENSIONS = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg"),
        *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
"""Suffixes of image files, in any case."""

_log = logging.getLogger(__name__)

_NAMED = 5
"""Files, or kinds of them, that a message names."""

_WHITE = (255, 255, 255, 255)


class ImageCollection(abc.ABC):
    """Images in a fixed order, with or without classes and captions.

    It is sent to worker processes, so it holds names, not pixels.
    """

    name: str
    """Name of the source, for messages."""
    labels: tuple[int, ...] | None = None
    """Index into ``class_names`` per image; None for images without classes."""
    class_names: tuple[str, ...] = ()
    captions: tuple[Captions, ...] | None = None
    """Per image; None for images without captions."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Return the name of an image, which does not depend on the collection's location."""

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Return the image as RGB; CorruptImageError if it is none, OSError out of reach."""

    @abc.abstractmethod
    def _select(self, indices: Sequence[int]) -> None:
        """Reduce this collection to some of its images, but for labels and captions."""

    def subset(self, indices: Sequence[int]) -> Self:
        """Return some of the images, in the order given."""
        part = copy.copy(self)
        part._select(indices)
        if self.labels is not None:
            part.labels = tuple(self.labels[i] for i in indices)
        if self.captions is not None:
            part.captions = tuple(self.captions[i] for i in indices)
        return part

    def split(self, fraction: float) -> tuple[Self, Self]:
        """Return the images to train on and those held out, chosen by their keys.

        At least one image is held out if ``fraction`` is above 0, and one is kept.
        """
        rest, part = split_keys([*map(self.key, range(len(self)))], fraction)
        return self.subset(rest), self.subset(part)

    def thinned(self, count: int) -> Self:
        """Return at most ``count`` images, spread evenly over the collection."""
        return self.subset(spread(len(self), count))

    def digest(self) -> str:
        """Return a short text that depends on the names of the images."""
        keys = map(self.key, range(len(self)))
        return storage.short_digest(_key_bytes(key) + b"\0" for key in keys)

    @abc.abstractmethod
    def content_digest(self) -> str:
        """Return a short text that depends on the content of the images."""

    def annotations(self) -> bytes:
        """Return classes, labels and captions as JSON, for digests."""
        return json.dumps([self.class_names, self.labels, self.captions]).encode()


def split_keys(keys: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Return the indices of the keys to train on, and of those held out."""
    count = len(keys)
    wanted = min(count - 1, max(1, round(fraction * count))) if fraction > 0 else 0
    digests = [hashlib.sha256(_key_bytes(key)).digest() for key in keys]
    by_hash = sorted(range(count), key=digests.__getitem__)
    return sorted(by_hash[wanted:]), sorted(by_hash[:wanted])


def spread(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` indices, spread evenly over ``count``."""
    kept = min(limit, count)
    return [i * count // kept for i in range(kept)]


def _key_bytes(key: str) -> bytes:
    # Names of files may be undecodable.
    return key.encode("utf-8", "surrogateescape")


class CorruptImageError(InputError):
    """A file that cannot be read as an image: empty, truncated, or another kind of file."""

    key: str = ""
    """Of the image in its collection, set by loaders."""

    def __init__(self, path: Path, reason: str) -> None:
        # Both go to the base class, so that the exception survives the way out of a worker process.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be read as an image ({self.reason})"


def find_images(folder: Path | str) -> list[Path]:
    """Return all image files under ``folder``, sorted; InputError if there are none.

    Links are followed, hidden files left out. Whatever else is left out is counted and logged.
    """
    return _search(Path(folder)).images


@dataclasses.dataclass
class _Found:
    """Content of a folder, each list in the order of the names."""

    images: list[Path] = dataclasses.field(default_factory=list)
    others: list[Path] = dataclasses.field(default_factory=list)
    """Files of other formats."""
    lost: list[Path] = dataclasses.field(default_factory=list)
    """Links that lead nowhere, and what is no file."""
    folders: dict[str, Path] = dataclasses.field(default_factory=dict)
    """By their real paths."""
    links: list[Path] = dataclasses.field(default_factory=list)
    """Links to folders."""
    repeated: list[Path] = dataclasses.field(default_factory=list)
    """Links to folders that are among the others."""

    @classmethod
    def under(cls, root: Path) -> Self:
        """Search a folder."""
        found = cls()
        found._walk(root)
        # A folder counts where it lies, else by the first link to it; some lead in circles. The
        # list grows meanwhile.
        for link in found.links:
            found._walk(link)
        found.images.sort()
        return found

    def _walk(self, folder: Path) -> None:
        if self.folders.setdefault(os.path.realpath(folder), folder) is not folder:
            self.repeated.append(folder)
            return
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                # A link to itself is an error to an entry, but nothing to a path.
                known: Path | os.DirEntry[str] = path if entry.is_symlink() else entry
                if known is path and path.is_dir():
                    self.links.append(path)
                elif known.is_dir():
                    self._walk(path)
                elif not known.is_file():
                    self.lost.append(path)
                elif path.suffix.lower() in EXTENSIONS:
                    self.images.append(path)
                else:
                    self.others.append(path)

    def empty_folders(self, root: Path, used: Collection[str]) -> list[str]:
        """Return the folders of ``root`` that are not in ``used``, and what is in them instead."""
        empty = [
            folder
            for folder in self.folders.values()
            if folder.parent == root != folder and folder.name not in used
        ]
        others = ([path for path in self.others if folder in path.parents] for folder in empty)
        pairs = zip(empty, others, strict=True)
        return [f"{folder.name} ({_suffixes(paths) or 'empty'})" for folder, paths in pairs]


def _search(folder: Path) -> _Found:
    """Search ``folder`` as ``find_images`` does."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; give a folder with images")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that the image is in")
    found = _Found.under(folder)
    left_out = (
        (found.others, f"files of other formats ({_suffixes(found.others)})"),
        (found.lost, "links that lead nowhere, and the like"),
        (found.repeated, "links to folders that are there already"),
    )
    texts = [f"{len(paths)} {what}: {_some(paths, folder)}" for paths, what in left_out if paths]
    if not found.images:
        raise InputError(
            f"there are no images in {folder} (searched for {' '.join(sorted(EXTENSIONS))}"
            f"{'; found ' * bool(texts)}{', '.join(texts)}); give another folder"
        )
    for text in texts:
        _warn("left out of %s: %s", folder, text)
    return found


def _warn(text: str, *values: object) -> None:
    # Every process of a run searches the same folders.
    if Launch.current().rank == 0:
        _log.warning(text, *values)


def _suffixes(paths: Iterable[Path]) -> str:
    """Return how many files have each suffix, as "2 .heic, 1 .txt"."""
    counts = collections.Counter(path.suffix.lower() or "without suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(_NAMED))


def _some(paths: Sequence[Path], root: Path) -> str:
    """Return the first of the paths, within ``root``."""
    named = ", ".join(path.relative_to(root).as_posix() for path in paths[:_NAMED])
    return named + ", ..." * (len(paths) > _NAMED)


@dataclasses.dataclass
class ImageFolder(ImageCollection):
    """The images of a folder, sorted; subfolders are classes."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    captions: tuple[Captions, ...] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]  # a value of each, not of the class
        """Path of the folder."""
        return str(self.root)

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def scan(
        cls, folder: Path | str, *, labelled: bool = True, class_names: Sequence[str] | None = None
    ) -> Self:
        """Find the images in ``folder``, and their labels if ``labelled``.

        If every image lies in a subfolder, the subfolders' names are the classes, in alphabetical
        order, or numerical if all are numbers. If none does, the images have no labels.
        ``class_names`` are the classes of the training images, of a folder for validation; those
        here are found among them by name. InputError if there are no images, some lie beside the
        class folders, or a class is new.
        """
        root, found = Path(folder), _search(Path(folder))
        paths = tuple(found.images)
        parts = [path.relative_to(root).parts for path in paths]
        stray = [part[0] for part in parts if len(part) == 1]
        if not labelled or len(stray) == len(paths):
            return cls(root, paths)
        if stray:
            raise InputError(
                f"{root} has images both in class folders and beside them, such as {stray[0]}; "
                f"move each into the folder of its class"
            )
        if empty := found.empty_folders(root, {part[0] for part in parts}):
            _warn("folders of %s without images are no classes: %s", root, ", ".join(empty))
        names = [normal_name(part[0]) for part in parts]
        classes = tuple(sort_names(set(names)) if class_names is None else class_names)
        index = Labels(classes).match_all(names, str(root), "the training images")
        return cls(root, paths, tuple(index[name] for name in names), classes)

    def key(self, index: int) -> str:
        """Return the path of a file within the folder, with forward slashes."""
        return self.paths[index].relative_to(self.root).as_posix()

    def read(self, index: int) -> Image.Image:
        """Read a file; see ``open_image``."""
        return open_image(self.paths[index])

    def content_digest(self) -> str:
        """See ``ImageCollection``."""
        return files_digest(self.root, self.paths)

    def _select(self, indices: Sequence[int]) -> None:
        self.paths = tuple(self.paths[i] for i in indices)


def open_image(path: Path | str) -> Image.Image:
    """Read an image file as RGB; CorruptImageError if the content is not a whole image.

    It is rotated by its EXIF tag; transparency becomes white, 16 bits become 8, and of an
    animation it is the first frame. OSError if the file cannot be read.
    """
    # Errors of the disk or network do not mean a damaged image.
    return decode_image(Path(path).read_bytes(), Path(path))


def decode_image(content: bytes, path: Path) -> Image.Image:
    """Decode the bytes of an image file as ``open_image`` does; ``path`` is for its errors."""
    if not content:
        raise CorruptImageError(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _rgb(upright(image))
    except UnidentifiedImageError as error:
        raise CorruptImageError(path, "not an image of a known format") from error
    except DECODING_ERRORS as error:
        raise CorruptImageError(path, one_line(error) or "damaged") from error


def upright(image: Image.Image) -> Image.Image:
    """Return an image as its EXIF tag turns it."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODING_ERRORS:
        # A broken EXIF block beside undamaged pixels.
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as ``open_image`` reads it; InputError if its mode has no defined white."""
    try:
        return _rgb(upright(image))
    except ValueError as error:
        raise InputError(f"the image cannot be used: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys, which Pillow would clip."""
    greys = np.asarray(image)
    if greys.min() < 0 or greys.max() > 65535:
        raise ValueError("grey levels beyond 16 bits; save it with 8 or 16 bits")
    return Image.fromarray((greys / 257.0).round().astype(np.uint8))


class SkippedFiles:
    """Unreadable files, each logged and written to a list once."""

    def __init__(self, path: Path) -> None:
        """Read the list, a text file, if it exists."""
        self.path = path
        self._known: set[str] = set()
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            self._known = {line.split("\t")[0] for line in text.split("\n") if line}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, errors: Iterable[CorruptImageError]) -> None:
        """Log and list those of ``errors`` that are new."""
        for error in errors:
            if (name := str(error.path)) in self._known:
                continue
            self._known.add(name)
            _log.warning("skipped: %s", error)
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\t{error.reason}\n")
