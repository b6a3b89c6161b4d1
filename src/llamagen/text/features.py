"""The store of text features: an encoder's output for captions, without padding.

An artifact (``llamagen.support.artifact``) with shards of captions as pieces: ``shard-00000.npy``
has their concatenated features, bfloat16 as int16, ``shard-00000.json`` the end of each caption's.
Features are found by their caption, so a caption that occurs twice is encoded once.

Shapes: N captions, L tokens of a caption, W width of a feature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.config import TextConfig, config_from_dict, config_to_dict
from llamagen.support.artifact import Advance, Artifact, Format, Settings, read_manifest
from llamagen.support.devices import dtype_name
from llamagen.support.errors import InputError
from llamagen.text.encoder import TOKENS_AT_ONCE, TextEncoder

_INDEX_NAME = "index.npy"

SHARD_SIZE = 8192
"""Captions of a shard: 671 MB if each has 20 tokens of width 2048."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Settings of a store."""

    text: TextConfig
    fingerprint: str
    """Of the encoder and its preparation of captions."""
    width: int
    captions: int
    """Number of different captions."""
    captions_digest: str
    shard_size: int
    precision: str = ""
    """Of the encoder; empty in older stores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextManifest:
    """Settings and content of a complete store."""

    plan: TextPlan
    tokens: int
    """Number of features."""
    longest: int
    """Features of the longest caption."""
    empty: int
    """Captions that are empty after cleaning and have no features."""
    llamagen: str
    """Version that finished the store."""


def _ends(artifact: Artifact, shard: int) -> np.ndarray:
    """Check the files of a shard; return the end of each caption's features."""
    artifact.check_files(shard)
    values = artifact.read_json(shard)
    try:
        ends = np.array(values["ends"], dtype=np.int64)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise artifact.damaged(artifact.path(shard, ".json"), repr(error)) from error
    if ends.shape != (len(artifact.items_of(shard)),):
        reason = f"it has the ends of {ends.size} captions"
        raise artifact.damaged(artifact.path(shard, ".json"), reason)
    artifact.check_npy(shard, (int(ends[-1]), artifact.settings["width"]), "int16")
    return ends


FORMAT = Format(
    name="llamagen-text",
    version=1,
    noun="store of text features",
    command="llamagen extract-text",
    other_files=(_INDEX_NAME,),
    words={
        "fingerprint": "another text encoder",
        "captions_digest": "other captions",
        "shard_size": "another shard size",
        "precision": "another precision",
    },
    check=_ends,
)


def _artifact(folder: Path | str, settings: Settings) -> Artifact:
    items, piece_size = settings["captions"], settings["shard_size"]
    return Artifact(Path(folder), FORMAT, settings, items=items, piece_size=piece_size)


class TextStore:
    """Features of captions, read from the disk on demand."""

    def __init__(self, artifact: Artifact, manifest: TextManifest, index: np.ndarray) -> None:
        self.folder, self.manifest = artifact.folder, manifest
        self.identity = artifact.identity
        """Depends on the captions and their encoder."""
        self.text, self.width = manifest.plan.text, manifest.plan.width
        self._artifact = artifact
        self._keys, self._positions = index["key"], index["place"]
        self._ends: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open the store in ``folder``; FileNotFoundError if it or one of its files is missing.

        InputError if it is incomplete, damaged, or of another version.
        """
        folder = Path(folder)
        settings, results = read_manifest(folder, FORMAT)
        source = str(folder / FORMAT.manifest_name)
        manifest = config_from_dict(TextManifest, {"plan": settings, **results}, source)
        artifact = _artifact(folder, settings)
        for shard in range(len(artifact)):
            artifact.check(shard)
        path = folder / _INDEX_NAME
        try:
            return cls(artifact, manifest, np.load(path, mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is damaged or missing ({error}); run {FORMAT.command} again"
            ) from error

    def __len__(self) -> int:
        return self.manifest.plan.captions

    def content_digest(self) -> str:
        """Return a text that depends on all features."""
        return self._artifact.content_digest()

    def features(self, captions: Sequence[str]) -> list[Tensor]:
        """Return features (L, W) bfloat16 of each caption; (0, W) of those that are not there."""
        found = [torch.empty(0, self.width, dtype=torch.bfloat16) for _ in captions]
        wanted = np.array([_key(caption) for caption in captions], dtype=np.uint64)
        near = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        for row in np.flatnonzero(self._keys[near] == wanted):
            found[row] = self._caption(int(self._positions[near[row]]))
        return found

    def _caption(self, position: int) -> Tensor:
        shard, row = divmod(position, self._artifact.piece_size)
        if shard not in self._ends:
            self._ends[shard] = _ends(self._artifact, shard)
        ends = self._ends[shard]
        start = int(ends[row - 1]) if row else 0
        rows = self._artifact.array(shard)[start : int(ends[row])]
        return torch.from_numpy(np.array(rows)).view(torch.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextExtraction:
    """Result of ``extract_text``."""

    store: TextStore | None
    """None if other processes have not finished their shards."""
    captions: int
    """Number of captions that this call encoded."""
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
    progress: bool = True,
) -> TextExtraction:
    """Encode captions, not cleaned and maybe with duplicates, into shards of ``shard_size``.

    The folder ``out`` is new, empty, or begun with the same arguments: shards that are there are
    kept. This process makes every ``world_size``-th one, from ``rank`` on, in batches of at most
    ``tokens_at_once`` tokens; ``progress`` shows a bar on a terminal. InputError if there are no
    captions, or the folder holds something else.
    """
    unique = list(dict.fromkeys(caption for caption in captions if caption.strip()))
    if not unique:
        raise InputError(
            "there are no captions to encode; name their column with `caption_columns`"
        )
    plan = TextPlan(
        text=encoder.config,
        fingerprint=encoder.fingerprint(),
        width=encoder.width,
        captions=len(unique),
        captions_digest=storage.short_digest(_bytes(caption) + b"\0" for caption in unique),
        shard_size=shard_size,
        precision=dtype_name(next(encoder.parameters()).dtype),
    )
    artifact = _artifact(out, config_to_dict(plan))
    artifact.rank, artifact.world_size = rank, world_size

    def encode(items: range, advance: Advance) -> dict[str, Any]:
        prepared = [encoder.prepare(unique[item]) for item in items]
        filled = [i for i, text in enumerate(prepared) if text]
        encoded = encoder.encode(
            [prepared[i] for i in filled], tokens_at_once=tokens_at_once, progress=advance
        )
        lengths = np.zeros(len(items), dtype=np.int64)
        lengths[filled] = [len(each) for each in encoded]
        whole = torch.cat([torch.empty(0, encoder.width), *encoded]).to(torch.bfloat16)
        ends = np.cumsum(lengths).tolist()
        return {".npy": whole.view(torch.int16).numpy(), ".json": {"ends": ends}}

    begun = artifact.begin(missing={"precision": plan.precision})
    with begun, artifact.progress_bar("encoding", "caption", shown=progress) as bar:
        start = time.perf_counter()
        count = artifact.make(encode, bar.update)
        seconds = time.perf_counter() - start
        return TextExtraction(store=_finish(artifact, unique), captions=count, seconds=seconds)


def _finish(artifact: Artifact, unique: Sequence[str]) -> TextStore | None:
    """Write index and manifest, if all shards are done."""
    if not artifact.is_done():
        return None
    shards = range(len(artifact))
    lengths = np.concatenate([np.diff(_ends(artifact, shard), prepend=0) for shard in shards])
    index = np.empty(len(unique), dtype=[("key", "u8"), ("place", "i8")])
    index["key"], index["place"] = [_key(text) for text in unique], np.arange(len(unique))
    index.sort(order="key")
    with storage.atomic_file(artifact.folder / _INDEX_NAME) as path, path.open("wb") as file:
        np.save(file, index)
    artifact.finish(
        {
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "empty": int((lengths == 0).sum()),
            "llamagen": importlib.metadata.version("llamagen"),
        }
    )
    return TextStore.open(artifact.folder)


def _key(caption: str) -> int:
    """Return a 64-bit hash: 50 million captions collide with a probability of 1 in 15,000."""
    return int.from_bytes(hashlib.blake2b(_bytes(caption), digest_size=8).digest(), "big")


def _bytes(caption: str) -> bytes:
    return caption.encode("utf-8", "surrogatepass")
