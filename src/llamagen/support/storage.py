"""Writing files so that nothing half-written is ever seen under its final name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamagen.support.errors import InputError


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it to ``path`` if the block succeeds.

    The folder is made if need be. If the block raises, the temporary file is removed and an
    older file under ``path`` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``; renames it to ``path`` if the block succeeds.

    An older folder under ``path`` is replaced, with all that is in it, only once the new one is
    complete. If the block raises, it is left as it was.
    """
    # Absolute: the name of "." is empty.
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _finish(file)
        if path.exists():
            _swap(temporary, path)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def staged_files(folder: Path | str, *, last: str) -> Iterator[Path]:
    """Yields an empty folder; moves its files into ``folder`` if the block succeeds.

    Other files in ``folder`` stay. If the block raises, ``folder`` is left as it was, or not made
    at all. The file called ``last`` is moved after all others: its presence says that they are
    there.
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


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file atomically, in UTF-8; bytes of file names that are not, as they are."""
    _write(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path | str, values: Any) -> None:
    """Writes values as indented JSON, atomically."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # What UTF-8 cannot hold, as bytes of file names, becomes an escape, which JSON reads back.
    _write(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); restore it from its source"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _write(path: Path | str, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def cache_folder() -> Path:
    """Return the folder of what outlives a process: ``LLAMAGEN_CACHE``, else the user's cache.

    Raises:
        RuntimeError: the user has no home.
    """
    own = os.environ.get("LLAMAGEN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamagen"


def require_writable(folder: Path | str) -> Path:
    """Makes ``folder`` if need be and proves that files can be written there.

    Called before long work, so that its result is not lost for want of a place.

    Raises:
        InputError: the folder cannot be made or written to.
    """
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
    """Puts the folder ``new`` in the place of the folder ``path``."""
    # A folder cannot be renamed over a filled one: move the old one aside first, so that at every
    # moment one of the two is whole.
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
    """Gives a written file the permissions of an ordinary one and waits until it is on the disk."""
    # Temporary files can be read by their owner only, those of safetensors' save_file too.
    path.chmod(0o666 & ~_umask())
    # A file opened for reading only cannot be synced on Windows.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
