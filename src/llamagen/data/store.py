"""The store of codes: a folder of shards that is read piece by piece, however large it is.

An artifact (``llamagen.support.artifact``) whose pieces are shards of images: an array
``shard-00000.npy`` of codes and ``shard-00000.json`` about its images. ``extraction`` makes it.

Shapes: N images, V views of an image, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

import llamagen.support.storage as storage
from llamagen.config import (
    Grid,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from llamagen.data.captions import Caption, Captions, CaptionTable, write_captions
from llamagen.support.artifact import Artifact, Format, Settings, read_manifest
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

SKIPPED_NAME = "skipped.txt"


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
    """Settings of a store: all that is known before its first shard is written."""

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
    """Changes if an image is added, removed or renamed, or its label or caption changes."""
    source_images: int
    """Image files, whether they can be read or not."""
    shard_size: int
    """Image files to a shard; those that cannot be read are missing in it."""
    labelled: bool
    captioned: bool
    class_names: tuple[str, ...]
    """Empty if labels have no names."""
    batch_size: int
    """Views encoded at once. Changes nothing but rounding, so it may differ."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size", "source_images"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a complete store."""

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
        expected = math.ceil(self.plan.source_images / self.plan.shard_size)
        if len(self.shards) != expected or sum(self.shards) != self.images:
            raise InputError(
                f"{len(self.shards)} shards with {sum(self.shards)} images do not make up "
                f"{expected} shards with {self.images} images; run {FORMAT.command} again"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Everything about the images of a shard but their codes."""

    keys: tuple[str, ...]
    """Path of each image within its folder."""
    labels: tuple[int, ...] | None
    captions: tuple[Captions, ...] | None
    skipped: tuple[tuple[str, str], ...]
    """Path of each file that could not be read, and why."""
    used: str
    """Codes that occur: one bit each, as hexadecimal digits."""


def shard_content(
    plan: StorePlan,
    codes: np.ndarray,
    *,
    keys: Sequence[str],
    labels: Sequence[int] | None,
    captions: Sequence[Captions] | None,
    skipped: Sequence[tuple[str, str]],
) -> Mapping[str, Any]:
    """Return the files of a shard: codes (n, V, rows, columns), and what belongs to its images."""
    used = np.zeros(plan.codebook_size, dtype=bool)
    used[codes] = True
    info = ShardInfo(
        keys=tuple(keys),
        labels=None if labels is None else tuple(labels),
        captions=None if captions is None else tuple(captions),
        skipped=tuple(skipped),
        used=np.packbits(used).tobytes().hex(),
    )
    return {".npy": codes.astype(plan.dtype, copy=False), ".json": config_to_dict(info)}


def read_shard_info(artifact: Artifact, shard: int) -> ShardInfo:
    """Return what belongs to the images of a shard.

    Raises:
        FileNotFoundError: the file is missing.
        InputError: it is damaged, or belongs to another store.
    """
    values = artifact.read_json(shard)
    labels, captions = values.get("labels"), values.get("captions")
    try:
        # By hand: checking the type of every entry would take seconds for a million images.
        return ShardInfo(
            keys=tuple(values["keys"]),
            labels=None if labels is None else tuple(map(operator.index, labels)),
            captions=None
            if captions is None
            else tuple(
                tuple(Caption(str(text), float(weight)) for text, weight in each)
                for each in captions
            ),
            skipped=tuple((file, reason) for file, reason in values["skipped"]),
            used=values["used"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise artifact.damaged(artifact.path(shard, ".json"), repr(error)) from error


def check_codes(artifact: Artifact, shard: int, *, images: int) -> None:
    """Check header and size of a shard's array; see ``Artifact.check_npy``."""
    plan = artifact.settings
    shape = (images, plan["views"]["count"], *plan["grid"])
    artifact.check_npy(shard, shape, plan["dtype"])


def _check_shard(artifact: Artifact, shard: int) -> None:
    check_codes(artifact, shard, images=len(read_shard_info(artifact, shard).keys))


FORMAT = Format(
    name="llamagen-codes",
    version=2,
    noun="store of codes",
    command="llamagen extract-codes",
    other_files=("captions.*", SKIPPED_NAME),
    free=("batch_size",),
    words={
        "tokenizer_fingerprint": "another image tokenizer",
        "source_digest": "other images, labels or captions",
        "views": "other views",
        "shard_size": "another shard size",
        "precision": "another precision",
    },
    check=_check_shard,
)


def store_artifact(folder: Path | str, settings: Settings) -> Artifact:
    """Return the artifact of a store, by the plan as plain values."""
    items, piece_size = settings["source_images"], settings["shard_size"]
    return Artifact(folder, FORMAT, settings, items=items, piece_size=piece_size)


class CodeStore:
    """Codes, labels and captions of images, read from the disk when they are asked for."""

    def __init__(self, artifact: Artifact, manifest: Manifest) -> None:
        """A store that has been checked: use ``open``."""
        self.folder = artifact.folder
        self.manifest = manifest
        self.identity = artifact.identity
        """Changes if images, views or tokenizer do."""
        self._artifact = artifact
        self._ends = np.cumsum(manifest.shards)
        self._maps: dict[int, np.ndarray] = {}
        self._captions: CaptionTable | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open the store in ``folder``. Of the shards, only headers are read.

        Raises:
            FileNotFoundError: there is no store, or one of its files is missing.
            InputError: it is not complete, of another version, or a file is damaged.
        """
        settings, results = read_manifest(folder, FORMAT)
        source = str(Path(folder) / FORMAT.manifest_name)
        manifest = config_from_dict(Manifest, {"plan": settings, **results}, source)
        artifact = store_artifact(folder, settings)
        for shard, images in enumerate(manifest.shards):
            artifact.check_files(shard)
            check_codes(artifact, shard, images=images)
        return cls(artifact, manifest)

    def __len__(self) -> int:
        return self.manifest.images

    def __getstate__(self) -> dict[str, Any]:
        # A mapping would be sent to another process with all its content.
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

    def rows(self, indices: np.ndarray, views: np.ndarray | int = 0) -> np.ndarray:
        """Return codes of one view each of some images; nothing else is read.

        Args:
            indices: (B,) which images.
            views: (B,) which view of each; one number for all alike.

        Returns:
            (B, rows, columns) of the store's dtype.

        Raises:
            IndexError: there is no such image or view.
        """
        indices, views = np.broadcast_arrays(np.asarray(indices), np.asarray(views))
        _check_range(views, self.views, "view")
        codes = np.empty((len(indices), *self.grid), dtype=self.manifest.plan.dtype)
        for shard, chosen, within in self._by_shard(indices):
            codes[chosen] = self.shard(shard)[within, views[chosen]]
        return codes

    def shard(self, index: int) -> np.ndarray:
        """Return a whole shard (n, V, rows, columns) as a read-only mapping of its file."""
        if index not in self._maps:
            self._maps[index] = np.load(self._artifact.path(index, ".npy"), mmap_mode="r")
        return self._maps[index]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64; None for images without classes.

        Raises:
            InputError: a label is none of the store's classes, or a file is damaged.
        """
        if not self.manifest.plan.labelled:
            return None
        parts = [np.empty(0, dtype=np.int64)]
        classes = len(self.class_names)
        for shard, images in enumerate(self.manifest.shards):
            labels = np.array(self._info(shard).labels or (), dtype=np.int64)
            reason = None
            if len(labels) != images:
                reason = f"it has {len(labels)} labels for {images} images"
            elif images and not (0 <= labels.min() and labels.max() < classes):
                reason = (
                    f"it has labels from {labels.min()} to {labels.max()}, but the store has "
                    f"{classes} classes (0 to {classes - 1})"
                )
            if reason is not None:
                raise self._artifact.damaged(self._artifact.path(shard, ".json"), reason)
            parts.append(labels)
        return np.concatenate(parts)

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Return these images: those that could not be read are in no store."""
        return indices

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """Return the captions of some images; None for images without captions.

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
        """Return the paths of some images within the folder that they came from.

        Raises:
            IndexError: there is no such image.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        found = np.empty(len(wanted), dtype=object)
        for shard, chosen, within in self._by_shard(wanted):
            found[chosen] = np.array(self._info(shard).keys, dtype=object)[within]
        return found.tolist()

    def skipped(self) -> list[tuple[str, str]]:
        """Return the path of each file that could not be read, and why."""
        shards = range(len(self.manifest.shards))
        return [entry for shard in shards for entry in self._info(shard).skipped]

    def check_tokenizer(self, fingerprint: str) -> None:
        """Check that the codes are those of a tokenizer, by its fingerprint.

        Raises:
            InputError: another tokenizer made them.
        """
        made_by = self.manifest.plan.tokenizer_fingerprint
        if made_by != fingerprint:
            raise InputError(
                f"the codes in {self.folder} were made by another image tokenizer (fingerprint "
                f"{made_by}, this one has {fingerprint}); choose that tokenizer, or extract the "
                f"codes again"
            )

    def check_fits(self, config: TransformerConfig) -> None:
        """Check that a transformer can learn these codes.

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
        if config.condition != "class":
            return
        if self.labels is None:
            raise InputError(
                f"the images in {self.folder} have no classes; put the images of each class into "
                f"a folder of its name and extract the codes again"
            )
        highest = int(self.labels.max(initial=0))
        if highest >= config.num_classes:
            raise InputError(
                f"the store {self.folder} has {len(self.class_names)} classes, and label {highest} "
                f"({self.class_names[highest]!r}), but the transformer has {config.num_classes} "
                f"classes (0 to {config.num_classes - 1}); raise `num_classes` or leave it out"
            )

    def _info(self, shard: int) -> ShardInfo:
        return read_shard_info(self._artifact, shard)

    def _by_shard(self, indices: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return for each shard with some of the images: itself, which of them, their rows in it.

        Raises:
            IndexError: there is no such image.
        """
        _check_range(indices, len(self), "image")
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - np.array(self.manifest.shards)
        found = []
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            found.append((shard, chosen, indices[chosen] - starts[shard]))
        return found


def finish_store(artifact: Artifact) -> CodeStore | None:
    """Complete a store if all shards are there; several processes may do so at once.

    Returns:
        The store; None if shards of other processes are missing.

    Raises:
        InputError: not one image could be read.
    """
    if not artifact.is_done():
        return None
    plan = config_from_dict(StorePlan, artifact.settings, str(artifact.folder))
    counts: list[int] = []
    skipped: list[tuple[str, str]] = []
    used = np.zeros(plan.codebook_size, dtype=bool)
    classes = 0
    for info in _infos(artifact):
        counts.append(len(info.keys))
        skipped += info.skipped
        bits = np.frombuffer(bytes.fromhex(info.used), dtype=np.uint8)
        used |= np.unpackbits(bits, count=plan.codebook_size).astype(bool)
        classes = max(classes, 1 + max(info.labels or (-1,)))
    if sum(counts) == 0:
        file, reason = skipped[0]
        raise InputError(
            f"none of the {len(skipped)} files could be read: {file} ({reason}); repair them, "
            f"and choose another folder (`out`)"
        )
    if skipped:
        lines = [f"{file}\t{reason}\n" for file, reason in skipped]
        storage.write_text(artifact.folder / SKIPPED_NAME, "".join(lines))
    if plan.captioned:
        # One table beside the shards: training reads captions of images in any order.
        captions = (each for info in _infos(artifact) for each in info.captions or ())
        write_captions(artifact.folder, captions)
    results = Manifest(
        plan=plan,
        images=sum(counts),
        skipped=len(skipped),
        shards=tuple(counts),
        class_names=plan.class_names or (Labels.numbered(classes).names if plan.labelled else ()),
        codes_used=int(used.sum()),
        llamagen=importlib.metadata.version("llamagen"),
    )
    values = config_to_dict(results)
    del values["plan"]
    artifact.finish(values)
    return CodeStore.open(artifact.folder)


def _infos(artifact: Artifact) -> Iterator[ShardInfo]:
    return (read_shard_info(artifact, shard) for shard in range(len(artifact)))


def _check_range(numbers: np.ndarray, count: int, noun: str) -> None:
    if len(numbers) and not (0 <= numbers.min() and numbers.max() < count):
        raise IndexError(
            f"{noun} numbers run from {numbers.min()} to {numbers.max()}, but the store has "
            f"{noun}s 0 to {count - 1}"
        )
