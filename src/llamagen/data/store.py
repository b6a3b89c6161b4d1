"""The store of codes: an artifact (``llamagen.support.artifact``) with shards of images as pieces.

``shard-00000.npy`` has the codes of the images, ``shard-00000.json`` their labels, captions and so
on. ``extraction`` makes it.

Shapes: N images, V views of an image, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from llamagen.config import (
    Grid,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
    require_positive,
)
from llamagen.data.captions import Caption, Captions, CaptionTable
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.artifact import Artifact, Format, Settings, read_manifest
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

SHARD_SIZE = 4096
"""Images of a shard: 42 MB with twenty views of 256 codes."""
SKIPPED_NAME = "skipped.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreViews:
    """Views of every image that were encoded."""

    kind: str
    """As in ``Views``, or "published" for codes imported from the published layout."""
    count: int
    height: int
    """In pixels."""
    width: int
    ranges: tuple[float, ...] = ()
    """Enlargements that five or ten crops were cut from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Settings of a store."""

    tokenizer_fingerprint: str
    tokenizer_config: TokenizerConfig
    grid: Grid
    codebook_size: int
    dtype: str
    """Of the codes: uint16, or uint32 for more than 65536 codes."""
    precision: str
    """Of the tokenizer when it encoded the images."""
    views: StoreViews
    source_digest: str
    """Changes if an image is added, removed or renamed, or its label or caption changes."""
    content_digest: str = ""
    """Changes if the content of an image does; empty in older stores."""
    source_images: int
    """Image files, readable or not."""
    shard_size: int
    """Image files of a shard, of which it has the readable ones."""
    labelled: bool
    captioned: bool
    class_names: tuple[str, ...]
    """Empty if labels have no names."""
    batch_size: int
    """Views encoded at once. It changes rounding only, so it may differ."""

    def __post_init__(self) -> None:
        require_positive(self, "shard_size", "batch_size", "source_images")

    @classmethod
    def of(cls, tokenizer: ImageTokenizer, **values: Any) -> Self:
        """Return the settings for codes of a tokenizer; ``values`` are the other fields."""
        config = tokenizer.config
        return cls(
            tokenizer_fingerprint=tokenizer.fingerprint(),
            tokenizer_config=config,
            codebook_size=config.codebook_size,
            dtype="uint16" if config.codebook_size <= 2**16 else "uint32",
            **values,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Settings and content of a complete store."""

    plan: StorePlan
    images: int
    skipped: int
    """Unreadable image files."""
    shards: tuple[int, ...]
    """Number of images of each."""
    class_names: tuple[str, ...]
    codes_used: int
    """Number of different codes that occur."""
    llamagen: str
    """Version that finished the store."""

    def __post_init__(self) -> None:
        expected = math.ceil(self.plan.source_images / self.plan.shard_size)
        if len(self.shards) != expected or sum(self.shards) != self.images:
            raise InputError(
                f"{len(self.shards)} shards with {sum(self.shards)} images do not make up "
                f"{expected} shards with {self.images} images; run {FORMAT.command} again"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Everything but the codes of a shard's images."""

    keys: tuple[str, ...]
    """Names of the images, such as paths within their folder."""
    labels: tuple[int, ...] | None
    captions: tuple[Captions, ...] | None
    skipped: tuple[tuple[str, str], ...]
    """Path of each unreadable file, and the reason."""
    used: str
    """One bit for each code, set if it occurs, in hexadecimal."""


def read_shard_info(artifact: Artifact, shard: int) -> ShardInfo:
    """Read the metadata of a shard; errors as of ``Artifact.read_json``."""
    values = artifact.read_json(shard)
    labels, captions = values.get("labels"), values.get("captions")
    try:
        # config_from_dict would take seconds for a million images.
        return ShardInfo(
            keys=tuple(values["keys"]),
            labels=None if labels is None else tuple(map(operator.index, labels)),
            captions=None if captions is None else tuple(map(_captions, captions)),
            skipped=tuple((file, reason) for file, reason in values["skipped"]),
            used=values["used"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise artifact.damaged(artifact.path(shard, ".json"), repr(error)) from error


def _captions(values: Sequence[Any]) -> Captions:
    return tuple(Caption(str(text), float(weight)) for text, weight in values)


def shard_infos(artifact: Artifact) -> Iterator[ShardInfo]:
    """Yield the metadata of all shards."""
    return (read_shard_info(artifact, shard) for shard in range(len(artifact)))


def _check_codes(artifact: Artifact, shard: int, images: int) -> None:
    plan = artifact.settings
    artifact.check_npy(shard, (images, plan["views"]["count"], *plan["grid"]), plan["dtype"])


def _check_shard(artifact: Artifact, shard: int) -> None:
    _check_codes(artifact, shard, len(read_shard_info(artifact, shard).keys))


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
        "content_digest": "other content of the images",
        "views": "other views",
        "shard_size": "another shard size",
        "precision": "another precision",
    },
    check=_check_shard,
)


def store_artifact(
    folder: Path | str, settings: Settings, rank: int = 0, world_size: int = 1
) -> Artifact:
    """Return the artifact of a store; ``settings`` is a ``StorePlan`` as plain values."""
    return Artifact(
        Path(folder),
        FORMAT,
        settings,
        items=settings["source_images"],
        piece_size=settings["shard_size"],
        rank=rank,
        world_size=world_size,
    )


class CodeSourceBase:
    """Defaults of a source of codes whose images are all readable and fit the transformer."""

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Return these images, each unreadable one replaced by a readable one."""
        return indices

    def skipped(self) -> list[tuple[str, str]]:
        """Return the path of each unreadable file, and the reason."""
        return []

    def check_fits(self, config: TransformerConfig) -> None:
        """Raise InputError if codebook, grid or labels are not those of a transformer."""


class CodeStore(CodeSourceBase):
    """Codes, labels and captions of images, read from the disk on demand."""

    def __init__(self, artifact: Artifact, manifest: Manifest) -> None:
        """See ``open``, which checks the files."""
        plan = manifest.plan
        self.folder, self.manifest = artifact.folder, manifest
        self.identity = artifact.identity
        """Depends on images, views and tokenizer."""
        self.views = plan.views.count
        """Views of each image."""
        self.grid: Grid = plan.grid
        self.codebook_size, self.class_names = plan.codebook_size, manifest.class_names
        self._artifact = artifact
        self._ends = np.cumsum(manifest.shards)
        self._captions: CaptionTable | None = None

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open the store in ``folder``. Of the shards, only headers are read.

        FileNotFoundError if there is none, or a file is missing; InputError if it is not complete,
        damaged, or of another version.
        """
        settings, results = read_manifest(folder, FORMAT)
        source = str(Path(folder) / FORMAT.manifest_name)
        manifest = config_from_dict(Manifest, {"plan": settings, **results}, source)
        artifact = store_artifact(folder, settings)
        for shard, images in enumerate(manifest.shards):
            artifact.check_files(shard)
            _check_codes(artifact, shard, images)
        return cls(artifact, manifest)

    def __len__(self) -> int:
        return self.manifest.images

    def content_digest(self) -> str:
        """Return a text that depends on all codes, labels and captions."""
        return self._artifact.content_digest()

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be sent to another process with all its content.
        return {**self.__dict__, "_captions": None}

    @property
    def codebook_usage(self) -> float:
        """Fraction of the tokenizer's codes that occur."""
        return self.manifest.codes_used / self.codebook_size

    def rows(self, indices: np.ndarray, views: np.ndarray | int = 0) -> np.ndarray:
        """Return codes (B, rows, columns) of images (B,) in a view of each (B,), or one for all."""
        indices, views = np.broadcast_arrays(np.asarray(indices), np.asarray(views))
        _check_range(views, self.views, "view")
        codes = np.empty((len(indices), *self.grid), dtype=self.manifest.plan.dtype)
        for shard, chosen, within in self._by_shard(indices):
            codes[chosen] = self.shard(shard)[within, views[chosen]]
        return codes

    def shard(self, index: int) -> np.ndarray:
        """Return the codes (n, V, rows, columns) of a shard as a read-only memory map."""
        return self._artifact.array(index)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64, or InputError for a damaged shard; None for images without classes."""
        if not self.manifest.plan.labelled:
            return None
        parts, classes = [np.empty(0, dtype=np.int64)], len(self.class_names)
        for shard, images in enumerate(self.manifest.shards):
            labels = np.array(read_shard_info(self._artifact, shard).labels or (), dtype=np.int64)
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

    def use_classes(self, names: tuple[str, ...]) -> None:
        """Number the classes as in ``names``, those of training; InputError if one is not there."""
        if self.labels is None or names == self.class_names:
            return
        own = self.class_names
        if own == Labels.numbered(len(own)).names:
            own = tuple(map(str, range(len(own))))
        used = [own[label] for label in np.unique(self.labels).tolist()]
        found = Labels(names).match_all(used, str(self.folder), "the training codes")
        self.labels = np.array([found.get(name, -1) for name in own])[self.labels]
        self.class_names = names

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """Return the captions of some images; None for a store without; see ``CaptionTable``."""
        if not self.manifest.plan.captioned:
            return None
        table = self._captions = self._captions or CaptionTable(self.folder, len(self))
        wanted = np.asarray(indices, dtype=np.int64)
        _check_range(wanted, len(self), "image")
        return [table[index] for index in wanted.tolist()]

    def keys(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return the paths of some images within the folder that they came from."""
        found = np.empty(len(indices), dtype=object)
        for shard, chosen, within in self._by_shard(np.asarray(indices, dtype=np.int64)):
            keys = np.array(read_shard_info(self._artifact, shard).keys, dtype=object)
            found[chosen] = keys[within]
        return found.tolist()

    def skipped(self) -> list[tuple[str, str]]:
        """See ``CodeSourceBase``."""
        return [entry for info in shard_infos(self._artifact) for entry in info.skipped]

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise InputError if the tokenizer with this fingerprint did not make the codes."""
        if (made_by := self.manifest.plan.tokenizer_fingerprint) != fingerprint:
            raise InputError(
                f"the codes in {self.folder} were made by another image tokenizer (fingerprint "
                f"{made_by}, this one has {fingerprint}); choose that tokenizer, or extract the "
                f"codes again"
            )

    def check_fits(self, config: TransformerConfig) -> None:
        """See ``CodeSourceBase``."""
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
        if (highest := int(self.labels.max(initial=0))) >= config.num_classes:
            raise InputError(
                f"the store {self.folder} has {len(self.class_names)} classes, and label {highest} "
                f"({self.class_names[highest]!r}), but the transformer has {config.num_classes} "
                f"classes (0 to {config.num_classes - 1}); raise `num_classes` or leave it out"
            )

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each shard that has some of the images, their positions, and rows in the shard."""
        _check_range(indices, len(self), "image")
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            start = self._ends[shard] - self.manifest.shards[shard]
            yield shard, chosen, indices[chosen] - start


def _check_range(numbers: np.ndarray, count: int, noun: str) -> None:
    if len(numbers) and not (0 <= numbers.min() and numbers.max() < count):
        raise IndexError(
            f"{noun} numbers run from {numbers.min()} to {numbers.max()}, but the store has "
            f"{noun}s 0 to {count - 1}"
        )
