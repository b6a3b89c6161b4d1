"""Writing a store of codes, shard by shard, wherever the codes come from.

The list of images is cut into slices of fixed length, and every slice becomes a shard. A shard
counts as done when its sidecar is there, which is written last; so whatever was done stays done
when a run is killed, and any number of processes can work on one store without talking to one
another. What the store shall hold is written down first (``plan.json``) and cannot change.

Shapes: n images of a shard, V views of an image, rows x columns codes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.config import config_to_dict
from llamagen.data.captions import Captions, write_captions
from llamagen.data.store import (
    MANIFEST_NAME,
    PLAN_NAME,
    SKIPPED_NAME,
    CodeStore,
    Manifest,
    Sidecar,
    StorePlan,
    StoreViews,
    check_shard,
    read_plan_file,
    read_sidecar,
    shard_path,
    sidecar_path,
    write_npy,
    write_plan_file,
)
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

SHARD_SIZE = 4096
"""Images to a shard; twenty views of 256 codes each are then 42 MB."""

_log = logging.getLogger(__name__)

Report = Callable[[int], object]
"""Is told how many more image files are done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a call has done."""

    store: CodeStore | None
    """The store; None if other processes have not finished their shards yet."""
    images: int
    """Image files that this call went through; those of shards that were there do not count."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Shard:
    """The content of a shard."""

    codes: np.ndarray
    """(n, V, rows, columns)"""
    keys: list[str]
    labels: list[int] | None
    captions: list[Captions] | None
    skipped: list[tuple[str, str]]


MakeShard = Callable[[range, Report], Shard]


def code_dtype(codebook_size: int) -> str:
    """The narrowest unsigned integers that all codes fit into."""
    return "uint16" if codebook_size <= 2**16 else "uint32"


def begin(
    out: Path, plan: StorePlan, batch_size: int | None, *, overwrite: bool, alone: bool
) -> StorePlan:
    """Writes the plan, or finds the same one in the folder.

    Returns:
        The plan to follow: with the batch size of the first run unless another was asked for.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give --out a folder")
    storage.require_writable(out)
    path = out / PLAN_NAME
    # Hidden: what a killed process left behind.
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
    if path.exists():
        _check_same(out, read_plan_file(StorePlan, path), plan, overwrite=overwrite, alone=alone)
    elif others:
        raise InputError(
            f"{out} is not empty and holds no store of codes (but {min(others)}); "
            f"give --out an empty folder"
        )
    if not path.exists():
        _write_first(path, plan)
    begun = read_plan_file(StorePlan, path)
    if begun.identity != plan.identity:
        raise InputError(f"another process has just begun another store in {out}; choose another")
    return begun if batch_size is None else dataclasses.replace(begun, batch_size=batch_size)


def _check_same(
    out: Path, begun: StorePlan, plan: StorePlan, *, overwrite: bool, alone: bool
) -> None:
    """Deletes a store of another plan if that was asked for, else refuses it."""
    if begun.identity == plan.identity:
        return
    found = f"the store in {out} was begun with {_difference(begun, plan)}"
    if not overwrite:
        raise InputError(f"{found}; restore that, give another --out, or --overwrite it")
    if not alone:
        raise InputError(
            f"{found}, and processes that start at the same time cannot overwrite it; "
            f"delete {out} first"
        )
    _delete(out)


def _write_first(path: Path, plan: StorePlan) -> None:
    """Writes the plan, unless another process was faster."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_plan_file(staging, plan)
    try:
        # Unlike a renaming, this fails if the file exists.
        os.link(staging, path)
    except FileExistsError:
        pass
    except OSError:
        # A file system without links.
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


_WORDS = {
    "tokenizer_fingerprint": "another image tokenizer",
    "source_digest": "other images, labels or captions",
    "views": "other views",
    "shard_size": "another shard size",
    "precision": "another precision",
}
"""Fields of a plan in words, the most telling first."""


def _difference(begun: StorePlan, plan: StorePlan) -> str:
    for field, words in _WORDS.items():
        before, now = getattr(begun, field), getattr(plan, field)
        if before != now:
            if isinstance(before, StoreViews):
                before, now = (
                    f"{views.kind}, {views.count} of {views.width}x{views.height}"
                    for views in (before, now)
                )
            return f"{words} ({before}, now {now})"
    return "other settings"


def _delete(out: Path) -> None:
    """Removes a store, and nothing else that may lie in its folder."""
    # The manifest first, the plan last: whatever is left by a kill is no complete store, but
    # still known as one.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in (
        "shard-*.json",
        "shard-*.npy",
        "captions.*",
        ".shard-*.tmp",
        SKIPPED_NAME,
        PLAN_NAME,
    ):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def progress_bar(
    out: Path, plan: StorePlan, shards: Iterable[int], *, shown: bool
) -> tqdm[NoReturn]:
    """A bar over the image files of some shards, which starts at those that are done."""
    sizes = {shard: len(plan.images_of(shard)) for shard in shards}
    return tqdm(
        total=sum(sizes.values()),
        initial=sum(size for shard, size in sizes.items() if _is_done(out, plan, shard)),
        desc="encoding",
        unit="image",
        # None: no bar where stderr is not a terminal.
        disable=None if shown else True,
    )


def _is_done(out: Path, plan: StorePlan, shard: int) -> bool:
    """Whether the shard is there and whole; a damaged one is made anew."""
    try:
        sidecar = read_sidecar(out, plan, shard)
        check_shard(out, plan, shard, images=len(sidecar.keys))
    except (InputError, FileNotFoundError):
        return False
    return True


def write_shards(
    plan: StorePlan, out: Path, shards: Iterable[int], make: MakeShard, report: Report
) -> int:
    """Makes the shards that are not done; returns how many image files that took."""
    count = 0
    for shard in shards:
        if _is_done(out, plan, shard):
            continue
        numbers = plan.images_of(shard)
        content = make(numbers, report)
        used = np.zeros(plan.codebook_size, dtype=bool)
        used[content.codes] = True
        sidecar = Sidecar(
            plan=plan.identity,
            keys=tuple(content.keys),
            labels=None if content.labels is None else tuple(content.labels),
            captions=None if content.captions is None else tuple(content.captions),
            skipped=tuple(content.skipped),
            used=np.packbits(used).tobytes().hex(),
        )
        with storage.atomic_file(shard_path(out, shard)) as temporary:
            write_npy(temporary, content.codes)
        storage.write_json(sidecar_path(out, shard), config_to_dict(sidecar))
        count += len(numbers)
    return count


def _all_captions(out: Path, plan: StorePlan) -> Iterator[Captions]:
    for shard in range(plan.shards):
        yield from read_sidecar(out, plan, shard).captions or ()


def complete(out: Path, plan: StorePlan) -> CodeStore | None:
    """Writes the manifest if all shards are there; several processes may do so at once.

    Raises:
        InputError: not one image could be read.
    """
    if not all(_is_done(out, plan, shard) for shard in range(plan.shards)):
        return None
    counts: list[int] = []
    skipped: list[tuple[str, str]] = []
    used = np.zeros(plan.codebook_size, dtype=bool)
    classes = 0
    for shard in range(plan.shards):
        sidecar = read_sidecar(out, plan, shard)
        counts.append(len(sidecar.keys))
        skipped += sidecar.skipped
        bits = np.frombuffer(bytes.fromhex(sidecar.used), dtype=np.uint8)
        used |= np.unpackbits(bits, count=plan.codebook_size).astype(bool)
        classes = max(classes, 1 + max(sidecar.labels or (-1,)))
    if sum(counts) == 0:
        file, reason = skipped[0]
        raise InputError(
            f"none of the {len(skipped)} files could be read: {file} ({reason}); repair them, "
            f"and give another --out"
        )
    if skipped:
        lines = [f"{file}\t{reason}\n" for file, reason in skipped]
        storage.write_text(out / SKIPPED_NAME, "".join(lines))
    if plan.captioned:
        # One table beside the shards: training reads captions of images in any order.
        write_captions(out, _all_captions(out, plan))
    names = plan.class_names or (Labels.numbered(classes).names if plan.labelled else ())
    manifest = Manifest(
        plan=read_plan_file(StorePlan, out / PLAN_NAME),
        images=sum(counts),
        skipped=len(skipped),
        shards=tuple(counts),
        class_names=names,
        codes_used=int(used.sum()),
        llamagen=importlib.metadata.version("llamagen"),
    )
    write_plan_file(out / MANIFEST_NAME, manifest)
    # Every shard is done, so these belong to nobody.
    for path in out.glob(".shard-*.tmp"):
        path.unlink(missing_ok=True)
    return CodeStore.open(out)
