"""Atomic writing of files and folders; JSON files; digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamagen.support.errors import InputError


@contextmanager
def atomic_file(path: Path | str, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path, and rename it to ``path`` if the block succeeds.

    The folder is created if need be. If the block raises, an older file at ``path`` is unchanged;
    without ``replace`` FileExistsError is raised where there is one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary)
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        # Unlike renaming, this fails if the file exists.
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links.
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``path`` if the block succeeds.

    It then replaces an older folder at ``path``, which is unchanged if the block raises.
    """
    # Absolute: the name of "." is empty.
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", ignore_cleanup_errors=True
    ) as name:
        temporary = Path(name)
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _finish(file)
        if path.exists():
            _swap(temporary, path)
        else:
            temporary.replace(path)


@contextmanager
def staged_files(folder: Path | str, *, last: str) -> Iterator[Path]:
    """Yield an empty folder, and move its files into ``folder`` if the block succeeds.

    Other files in ``folder`` stay. If the block raises, ``folder`` is unchanged, or not created.
    The file ``last`` is moved after all others, so with it all are there.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder, which may be a mounted volume: files cannot be renamed across volumes.
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=".tmp"))
    try:
        yield staging
        files = sorted(staging.iterdir(), key=lambda file: file.name == last)
        for file in files:
            _finish(file)
        for file in files:
            file.replace(folder / file.name)
        made = False
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            folder.rmdir()


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_new(path: Path | str, content: bytes) -> bool:
    """Write a file atomically unless there is one of its name; return whether it was written."""
    try:
        with atomic_file(path, replace=False) as temporary:
            temporary.write_bytes(content)
    except FileExistsError:
        return False
    return True


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, in UTF-8; undecodable bytes of file names are kept."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path | str, values: Any) -> None:
    """Write values as indented JSON, atomically."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # Undecodable bytes of file names become escapes of JSON.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; InputError if it holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); restore it from its source"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def short_digest(parts: Iterable[bytes]) -> str:
    """Return a short text that depends on every byte of the parts, read one after another."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of what outlives a process: ``LLAMAGEN_CACHE``, else the user's cache."""
    if own := os.environ.get("LLAMAGEN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamagen"


def require_writable(folder: Path | str) -> Path:
    """Create ``folder`` if need be; InputError, before long work, if it cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror or error}); choose another folder"
        ) from error
    return folder


def _swap(new: Path, path: Path) -> None:
    """Replace the folder ``path`` by the folder ``new``."""
    # A folder cannot be renamed over a filled one. Once the old one is moved aside, one of the two
    # is complete at any time.
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    old = aside / path.name
    try:
        path.replace(old)
        new.replace(path)
    except OSError:
        if old.exists():
            old.replace(path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _finish(path: Path) -> None:
    """Wait until a file is on the disk, with default permissions."""
    # Temporary files, and those of safetensors' save_file, are readable by their owner only.
    path.chmod(0o666 & ~_umask())
    # A file opened for reading only cannot be synced on Windows.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # Reading the mask takes setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
