"""The store of codes: an artifact (``llamagen.support.artifact``) with shards of images as pieces.

``shard-00000.npy`` has the codes of the images, ``shard-00000.json`` their labels, captions and so
on. ``extraction`` makes it.

Shapes: N images, V views of an image, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.artifact import Advance, Artifact, Format, Settings, read_manifest
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

SHARD_SIZE = 4096
"""Images of a shard: 42 MB with twenty views of 256 codes."""
SKIPPED_NAME = "skipped.txt"
_MISSING = {"tokenizer_config": config_to_dict(TokenizerConfig())}
"""Settings that older stores lack."""


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
        for name in ("shard_size", "batch_size", "source_images"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")

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


def shard_content(
    plan: StorePlan,
    codes: np.ndarray,
    *,
    keys: Sequence[str],
    labels: Sequence[int] | None,
    captions: Sequence[Captions] | None,
    skipped: Sequence[tuple[str, str]],
) -> Mapping[str, Any]:
    """Return the content of a shard's files; codes are (n, V, rows, columns)."""
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
    """Read the metadata of a shard; errors as of ``Artifact.read_json``."""
    values = artifact.read_json(shard)
    labels, captions = values.get("labels"), values.get("captions")
    try:
        # config_from_dict would take seconds for a million images.
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
    """Check a shard's array; see ``Artifact.check_npy``."""
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
    """Return the artifact of a store; ``settings`` is a ``StorePlan`` as plain values."""
    items, piece_size = settings["source_images"], settings["shard_size"]
    return Artifact(Path(folder), FORMAT, settings, items=items, piece_size=piece_size)


class CodeSourceBase:
    """Defaults of a source of codes whose images are all readable and fit the transformer."""

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Return these images, each unreadable one replaced by a readable one."""
        return indices

    def skipped(self) -> list[tuple[str, str]]:
        """Return the path of each unreadable file, and the reason."""
        return []

    def check_fits(self, config: TransformerConfig) -> None:
        """Check that a transformer can be trained on these codes.

        Raises:
            InputError: codebook, grid or labels are not those of ``config``.
        """


class CodeStore(CodeSourceBase):
    """Codes, labels and captions of images, read from the disk on demand."""

    def __init__(self, artifact: Artifact, manifest: Manifest) -> None:
        """See ``open``, which checks the files."""
        self.folder = artifact.folder
        self.manifest = manifest
        self.identity = artifact.identity
        """Depends on images, views and tokenizer."""
        plan = manifest.plan
        self.views = plan.views.count
        """Views of each image."""
        self.grid: Grid = plan.grid
        self.codebook_size = plan.codebook_size
        self.class_names = manifest.class_names
        self._artifact = artifact
        self._ends = np.cumsum(manifest.shards)
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
        # A memory map would be sent to another process with all its content.
        return {**self.__dict__, "_captions": None}

    @property
    def codebook_usage(self) -> float:
        """Fraction of the tokenizer's codes that occur."""
        return self.manifest.codes_used / self.codebook_size

    def rows(self, indices: np.ndarray, views: np.ndarray | int = 0) -> np.ndarray:
        """Return codes (B, rows, columns) of one view each of some images.

        Args:
            indices: (B,) images.
            views: (B,) the view of each, or one for all.

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
        """Return the codes (n, V, rows, columns) of a shard as a read-only memory map."""
        return self._artifact.array(index)

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
            info = read_shard_info(self._artifact, shard)
            labels = np.array(info.labels or (), dtype=np.int64)
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

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[Captions] | None:
        """Return the captions of some images; None for a store without captions.

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
            found[chosen] = np.array(read_shard_info(self._artifact, shard).keys, dtype=object)[
                within
            ]
        return found.tolist()

    def skipped(self) -> list[tuple[str, str]]:
        """See ``CodeSourceBase``."""
        return [entry for info in _infos(self._artifact) for entry in info.skipped]

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
        highest = int(self.labels.max(initial=0))
        if highest >= config.num_classes:
            raise InputError(
                f"the store {self.folder} has {len(self.class_names)} classes, and label {highest} "
                f"({self.class_names[highest]!r}), but the transformer has {config.num_classes} "
                f"classes (0 to {config.num_classes - 1}); raise `num_classes` or leave it out"
            )

    def _by_shard(self, indices: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return each shard that has some of the images, their positions, and rows in the shard."""
        _check_range(indices, len(self), "image")
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - np.array(self.manifest.shards)
        found = []
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            found.append((shard, chosen, indices[chosen] - starts[shard]))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """Result of ``make_store``."""

    store: CodeStore | None
    """None if other processes have not finished their shards."""
    images: int
    """Number of image files that this call processed."""
    seconds: float


def make_store(
    plan: StorePlan,
    out: Path | str,
    make: Callable[[Artifact, Advance], int],
    *,
    description: str,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Extraction:
    """Make a store; ``make`` makes its missing shards and returns their number of images.

    See ``extraction.extract_store`` for the other arguments and errors.
    """
    artifact = store_artifact(out, config_to_dict(plan))
    artifact.rank, artifact.world_size = rank, world_size
    with (
        artifact.begin(overwrite=overwrite, missing=_MISSING),
        artifact.progress_bar(description, "image", shown=progress) as bar,
    ):
        start = time.perf_counter()
        count = make(artifact, bar.update)
        seconds = time.perf_counter() - start
        return Extraction(store=finish_store(artifact), images=count, seconds=seconds)


def finish_store(artifact: Artifact) -> CodeStore | None:
    """Write the manifest, and return the store; None if shards of other processes are missing.

    Raises:
        InputError: no image is readable.
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
        # Outside the shards: training reads captions of images in any order.
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
