"""The store of text features: what an encoder made of captions, at their true lengths.

``manifest.json`` says what made them and is written last. Each shard is an array of the features
of its captions one after another, bfloat16 as 16-bit integers, and a sidecar that says where each
ends. Features are found by their caption, so the store needs no order of images, and a caption
that occurs twice is encoded once.

Shapes: N captions, L tokens of a caption, W width of a feature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.config import TextConfig, config_to_dict, read_json
from llamagen.data.store import write_npy
from llamagen.data.versioned import read_versioned, write_versioned
from llamagen.support.errors import InputError
from llamagen.text.encoder import TOKENS_AT_ONCE, TextEncoder

FileT = TypeVar("FileT", "TextPlan", "TextManifest")

FORMAT = "llamagen-text"
VERSION = 1
MANIFEST_NAME = "manifest.json"
_PLAN_NAME = "plan.json"
_INDEX_NAME = "index.npy"
_AGAIN = "run llamagen extract-text again with the same options"

SHARD_SIZE = 8192
"""Captions to a shard; of 20 tokens of width 2048 each they take 671 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Everything about a store that is known before its first shard is written."""

    text: TextConfig
    """What the captions went through."""
    fingerprint: str
    """Of the encoder and what it does to captions."""
    width: int
    captions: int
    """Different captions."""
    captions_digest: str
    shard_size: int

    @property
    def identity(self) -> str:
        """A short text that two stores share only if they hold the same."""
        values = json.dumps(config_to_dict(self), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.captions / self.shard_size)

    def captions_of(self, shard: int) -> range:
        """Which captions belong to a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.captions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextManifest:
    """What a complete store holds."""

    plan: TextPlan
    tokens: int
    """Features in all."""
    longest: int
    """Features of the longest caption."""
    empty: int
    """Captions that nothing was left of once they were cleaned; they have no features."""
    llamagen: str
    """Version of the program that finished the store."""


class TextStore:
    """Features of captions, read from the disk when they are asked for."""

    def __init__(
        self, folder: Path, manifest: TextManifest, keys: np.ndarray, places: np.ndarray
    ) -> None:
        """A store that has been checked: use ``open``."""
        self.folder = folder
        self.manifest = manifest
        self._keys, self._places = keys, places
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Opens the store in ``folder``.

        Raises:
            FileNotFoundError: there is no store, or one of its files is missing.
            InputError: it is not complete, damaged, or of another version.
        """
        folder = Path(folder)
        if not (folder / MANIFEST_NAME).is_file():
            if (folder / _PLAN_NAME).is_file():
                raise InputError(f"the text features in {folder} are not complete; {_AGAIN}")
            raise FileNotFoundError(
                f"there is no store of text features in {folder} ({MANIFEST_NAME} is missing); "
                f"make one with llamagen extract-text"
            )
        manifest = _read(TextManifest, folder / MANIFEST_NAME)
        for shard in range(manifest.plan.shards):
            _ends(folder, manifest.plan, shard)
        try:
            index = np.load(folder / _INDEX_NAME, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder / _INDEX_NAME} is damaged or missing ({error}); {_AGAIN}"
            ) from error
        return cls(folder, manifest, index["key"], index["place"])

    def __len__(self) -> int:
        return self.manifest.plan.captions

    @property
    def text(self) -> TextConfig:
        """What the captions went through."""
        return self.manifest.plan.text

    @property
    def width(self) -> int:
        """Length of a feature."""
        return self.manifest.plan.width

    @property
    def identity(self) -> str:
        """A short text that changes with what the store holds."""
        return self.manifest.plan.identity

    def features(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (L, W) bfloat16 of each caption; of those that are not there, none: (0, W)."""
        found = [torch.empty(0, self.width, dtype=torch.bfloat16) for _ in captions]
        if len(self._keys) == 0 or not captions:
            return found
        wanted = np.array([_key(caption) for caption in captions], dtype=np.uint64)
        near = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        for row in np.flatnonzero(self._keys[near] == wanted):
            found[row] = self._caption(int(self._places[near[row]]))
        return found

    def _caption(self, place: int) -> Tensor:
        shard, row = divmod(place, self.manifest.plan.shard_size)
        if shard not in self._shards:
            path = _shard_path(self.folder, shard)
            ends = _ends(self.folder, self.manifest.plan, shard)
            self._shards[shard] = np.load(path, mmap_mode="r"), ends
        array, ends = self._shards[shard]
        start = int(ends[row - 1]) if row else 0
        return torch.from_numpy(np.array(array[start : int(ends[row])])).view(torch.bfloat16)

    def __getstate__(self) -> dict[str, Any]:
        # A mapping would be sent to another process with all it shows.
        return {**self.__dict__, "_shards": {}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextExtraction:
    """What a call has done."""

    store: TextStore | None
    """None if other processes have not finished their shards yet."""
    captions: int
    """Captions that this call encoded."""
    seconds: float


def extract_text(
    encoder: TextEncoder,
    captions: Iterable[str],
    out: Path | str,
    *,
    shard_size: int = SHARD_SIZE,
    tokens_at_once: int = TOKENS_AT_ONCE,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> TextExtraction:
    """Encodes captions into a store; shards that are there are kept.

    Args:
        encoder: makes the features.
        captions: as they are, not cleaned; those that occur again count once.
        out: folder of the store; new, empty, or begun with the same arguments.
        shard_size: captions to a shard.
        tokens_at_once: tokens that are encoded at once.
        rank: this process makes every ``world_size``-th shard, from this one on.
        world_size: processes that work on the store.
        progress: is told how many more captions are done.

    Raises:
        InputError: there are no captions, or the folder holds something else.
        OSError: the disk is full, or the folder cannot be written to.
    """
    out = Path(out)
    unique = list(dict.fromkeys(caption for caption in captions if caption.strip()))
    if not unique:
        raise InputError("there are no captions to encode; name their column (--caption-columns)")
    plan = TextPlan(
        text=encoder.config,
        fingerprint=encoder.fingerprint(),
        width=encoder.width,
        captions=len(unique),
        captions_digest=_digest(unique),
        shard_size=shard_size,
    )
    _begin(out, plan)
    start, count = time.perf_counter(), 0
    for shard in range(rank, plan.shards, world_size):
        texts = [unique[i] for i in plan.captions_of(shard)]
        if not _is_done(out, plan, shard):
            _write_shard(encoder, texts, out, plan, shard, tokens_at_once)
            count += len(texts)
        if progress is not None:
            progress(len(texts))
    seconds = time.perf_counter() - start
    return TextExtraction(store=_complete(out, plan, unique), captions=count, seconds=seconds)


def _begin(out: Path, plan: TextPlan) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give --out a folder")
    storage.require_writable(out)
    path = out / _PLAN_NAME
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
    if not path.is_file():
        if others:
            raise InputError(
                f"{out} is not empty and holds no store of text features (but {min(others)}); "
                f"give --out an empty folder"
            )
        _write(path, plan)
    begun = _read(TextPlan, path)
    if begun.fingerprint != plan.fingerprint:
        raise InputError(
            f"the store in {out} was begun with another text encoder ({begun.text.encoder}, now "
            f"{plan.text.encoder}); use that one, or give another --out"
        )
    if begun.identity != plan.identity:
        raise InputError(
            f"the store in {out} was begun with other captions or another shard size; restore "
            f"them, or give another --out"
        )


def _write_shard(
    encoder: TextEncoder,
    texts: Sequence[str],
    out: Path,
    plan: TextPlan,
    shard: int,
    tokens_at_once: int,
) -> None:
    prepared = [encoder.prepare(text) for text in texts]
    kept = [i for i, text in enumerate(prepared) if text]
    encoded = encoder.encode([prepared[i] for i in kept], tokens_at_once=tokens_at_once)
    lengths = np.zeros(len(texts), dtype=np.int64)
    lengths[kept] = [len(each) for each in encoded]
    whole = torch.cat([each.to(torch.bfloat16) for each in encoded] or [torch.empty(0, plan.width)])
    with storage.atomic_file(_shard_path(out, shard)) as temporary:
        write_npy(temporary, whole.to(torch.bfloat16).view(torch.int16).numpy())
    ends = np.cumsum(lengths).tolist()
    storage.write_json(_sidecar_path(out, shard), {"plan": plan.identity, "ends": ends})


def _complete(out: Path, plan: TextPlan, unique: Sequence[str]) -> TextStore | None:
    """Writes index and manifest if all shards are there; several processes may do so at once."""
    if not all(_is_done(out, plan, shard) for shard in range(plan.shards)):
        return None
    lengths = np.concatenate(
        [np.diff(_ends(out, plan, shard), prepend=0) for shard in range(plan.shards)]
    )
    index = np.empty(len(unique), dtype=[("key", "u8"), ("place", "i8")])
    index["key"] = [_key(text) for text in unique]
    index["place"] = np.arange(len(unique))
    index.sort(order="key")
    with storage.atomic_file(out / _INDEX_NAME) as temporary, temporary.open("wb") as file:
        np.save(file, index)
    manifest = TextManifest(
        plan=plan,
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        empty=int((lengths == 0).sum()),
        llamagen=importlib.metadata.version("llamagen"),
    )
    _write(out / MANIFEST_NAME, manifest)
    return TextStore.open(out)


def _is_done(out: Path, plan: TextPlan, shard: int) -> bool:
    """Whether the shard is there and whole; a damaged one is made anew."""
    try:
        _ends(out, plan, shard)
    except (InputError, FileNotFoundError):
        return False
    return True


def _ends(folder: Path, plan: TextPlan, shard: int) -> np.ndarray:
    """Where the features of each caption of a shard end, once array and sidecar are checked.

    Raises:
        FileNotFoundError: one of the two is missing.
        InputError: one is damaged, or belongs to another store.
    """
    path, sidecar = _shard_path(folder, shard), _sidecar_path(folder, shard)
    for file in (path, sidecar):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {_AGAIN}: only that shard is made anew")
    values = read_json(sidecar)
    if values.get("plan") != plan.identity:
        raise InputError(f"{sidecar} belongs to another store; delete it and {_AGAIN}")
    try:
        ends = np.array(values["ends"], dtype=np.int64)
        array = np.load(path, mmap_mode="r")
        whole = array.shape == (int(ends[-1]), plan.width) and array.dtype == np.int16
    except (KeyError, IndexError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}); delete it and {_AGAIN}") from error
    if not whole or len(ends) != len(plan.captions_of(shard)):
        raise InputError(f"{path} is not what its sidecar says; delete it and {_AGAIN}")
    return ends


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.npy"


def _sidecar_path(folder: Path, shard: int) -> Path:
    """Written after the array: a shard is done when it is there."""
    return folder / f"shard-{shard:05d}.json"


def _write(path: Path, content: TextPlan | TextManifest) -> None:
    write_versioned(path, content, FORMAT, VERSION)


def _read(cls: type[FileT], path: Path) -> FileT:
    return read_versioned(cls, path, FORMAT, VERSION, again="extract the features again")


def _key(caption: str) -> int:
    """64 bits that stand for a caption: two of 50 million agree with a chance of 1 in 15,000."""
    digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _digest(captions: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for caption in captions:
        whole.update(caption.encode("utf-8", "surrogatepass") + b"\0")
    return whole.hexdigest()[:16]
