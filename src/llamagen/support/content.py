"""What identifies data: the content of its files, not their names and sizes.

A file whose size and times are those of the last time has the digest found then. Digests are
remembered in ``content/`` in the cache folder, in a JSON file for each folder of data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import llamagen.support.storage as storage

_JOINT = " content "
_UNREADABLE = "unreadable"
_THREADS = 8
_SETTLED = 2 * 10**9
"""Nanoseconds after which a file that changes again has another time, on any file system."""


def files_digest(root: Path | str, paths: Sequence[Path]) -> str:
    """Return a text that depends on the content of files in ``root``, in this order, only.

    A file that cannot be read counts as such: whoever needs it says so.
    """
    root, known = Path(root), dict[str, list[Any]]()
    name = storage.short_digest([os.fsencode(root.absolute())])
    memory = storage.cache_folder() / "content" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        known = storage.read_json(memory)
    # Keys that do not depend on the working directory.
    now = time.time_ns()
    keys = [str(path).removeprefix(str(root)) for path in paths]
    found = {key: _stamp(path) for key, path in zip(keys, paths, strict=True)}
    changed = [i for i, key in enumerate(keys) if key not in known or known[key][:-1] != found[key]]
    bar = tqdm(desc=f"recognising {root}", total=len(changed), unit="file", delay=2, disable=None)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for i, digest in zip(changed, pool.map(_digest, [paths[i] for i in changed]), strict=True):
            known[keys[i]] = [*found[keys[i]], digest]
            bar.update()
    if changed:
        # A file that is changed again at once might keep its times; one that cannot be read now
        # may be readable later.
        settled = {
            key: entry
            for key, entry in known.items()
            if len(entry) > 1 and entry[-1] != _UNREADABLE and now - max(entry[1:-1]) > _SETTLED
        }
        with contextlib.suppress(OSError):
            storage.write_text(memory, json.dumps(settled))
    return storage.short_digest(known[key][-1].encode() for key in keys)


def identity(names: str, content: str) -> str:
    """Return the identity of data from those of its names and of its content."""
    return f"{names}{_JOINT}{content}"


def is_same(before: str | None, now: str) -> bool:
    """Whether data is the same; older versions recorded names only."""
    return before is not None and all(
        a == b for a, b in zip(before.split(_JOINT), now.split(_JOINT), strict=False)
    )


def _stamp(path: Path) -> list[int]:
    """Size and times of a file; the last one changes with the file even where tools reset mtime."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return _UNREADABLE
