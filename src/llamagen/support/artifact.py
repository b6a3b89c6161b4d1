"""Folders that are made piece by piece, by several processes, and resumed after a kill.

Stores of codes and of text features, samples and features of evaluations, and folders of images
are artifacts. Each has a ``Format`` (names and wording) and settings (JSON):

    plan.json        format, version and settings: written first, never changed
    shard-00000.*    the files of piece 0, in a fixed order: with the last one the piece is done
    manifest.json    the settings again, and results: written once all pieces are done

To make one, or to resume::

    artifact = Artifact(folder, FORMAT, settings, items=1000, piece_size=256)
    artifact.rank, artifact.world_size = distributed.rank(), distributed.world_size()
    with artifact.begin():
        artifact.make(make_piece)
        if artifact.is_done():
            artifact.finish({"total": 17})

``make_piece(items, advance)`` gets the range of items of a piece and returns the content of its
files by suffix: an array for .npy, named arrays for .npz, an object for .json, bytes for others.
Folders of other files, such as images, only use ``begin``.

Every file appears whole (``storage.atomic_file``). Processes share the pieces by number, without
communication. ``begin`` refuses a folder that holds something else, was begun with other settings,
or is in use by another run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.support.errors import InputError
from llamagen.support.locks import folder_lock
from llamagen.support.storage import read_json

Settings = Mapping[str, Any]
"""Values that JSON can hold."""
Advance = Callable[[int], object]
"""Called with the number of items newly done, such as ``tqdm.update``."""
MakePiece = Callable[[range, Advance], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Names and wording of one kind of artifact."""

    name: str
    """Written into the files, to recognise them."""
    version: int
    noun: str
    """The artifact in messages: "store of codes"."""
    command: str = "the same command"
    """Command that makes it, in messages."""
    settings_name: str = "plan.json"
    manifest_name: str = "manifest.json"
    piece_name: str = "shard"
    suffixes: tuple[str, ...] = (".npy", ".json")
    """Suffixes of the files of a piece, in the order in which they are written."""
    other_files: tuple[str, ...] = ()
    """Patterns of further files that belong to the artifact."""
    free: tuple[str, ...] = ()
    """Settings that may differ when work is resumed; those of the first run are kept."""
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Settings in words, the most important first: {"fingerprint": "another text encoder"}."""
    has_header: bool = True
    """Whether all folders name format and version; older ones of some formats do not."""
    check: Callable[[Artifact, int], object] | None = None
    """Raises InputError if a piece is damaged, beyond a file that is missing."""

    def is_in(self, folder: Path | str) -> bool:
        """Return whether a folder holds an artifact, complete or not, by the names of its files."""
        names = (self.settings_name, self.manifest_name)
        return any((Path(folder) / name).is_file() for name in names)


@dataclasses.dataclass(eq=False)
class Artifact:
    """An artifact in an existing or new folder."""

    folder: Path
    form: Format
    settings: Settings
    """Everything that determines the content of the pieces; after ``begin``, as on the disk."""
    _: dataclasses.KW_ONLY
    items: int = 0
    """Number of items, such as images."""
    piece_size: int = 1
    """Items of a piece."""
    rank: int = 0
    """Number of this process, which makes every ``world_size``-th piece."""
    world_size: int = 1
    _arrays: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.settings = json.loads(json.dumps(self.settings))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be sent to another process with all its content.
        return {**self.__dict__, "_arrays": {}}

    @property
    def identity(self) -> str:
        """Short text that depends on every setting that is not free."""
        values = {name: v for name, v in self.settings.items() if name not in self.form.free}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Return the number of pieces."""
        return math.ceil(self.items / self.piece_size)

    def items_of(self, piece: int) -> range:
        """Return the items of a piece."""
        start = piece * self.piece_size
        return range(start, min(start + self.piece_size, self.items))

    def path(self, piece: int, suffix: str) -> Path:
        """Return the path of a file of a piece."""
        return self.folder / f"{self.form.piece_name}-{piece:05d}{suffix}"

    @contextlib.contextmanager
    def begin(
        self,
        *,
        overwrite: bool | None = None,
        missing: Settings | None = None,
        timeout: float = 1.0,
    ) -> Iterator[None]:
        """Write or compare the settings; hold the folder's lock during the block.

        Args:
            overwrite: delete an artifact of this format with other settings. None where callers
                have no such option.
            missing: values, nested like the settings, of those that older folders lack.
            timeout: seconds to wait for another run in the folder; may be ``math.inf``.

        Raises:
            InputError: the folder holds something else, was begun with other settings, is in use,
                or cannot be written to.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; choose a folder (`out`)")
        storage.require_writable(self.folder)
        with folder_lock(self.folder, self.rank, self.world_size, timeout=timeout):
            path = self.folder / self.form.settings_name
            if path.exists() and overwrite and (changes := self._changes(missing)):
                self._delete(changes)
                self._write_settings()
            elif not path.exists():
                self._require_empty()
                self._write_settings()
            if changes := self._changes(missing):
                or_overwrite = "" if overwrite is None else ", or `overwrite` it"
                raise InputError(
                    f"the {self.form.noun} in {self.folder} was begun with {changes}; restore "
                    f"that, choose another folder (`out`){or_overwrite}"
                )
            self.settings = _read(path, self.form)
            yield

    def same_text(self, name: str, text: str, words: str) -> None:
        """Write or compare a text file that belongs to the settings.

        Raises:
            InputError: its content differs; ``words`` is the reason, such as "other prompts".
        """
        path = self.folder / name
        if not path.is_file():
            storage.write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"the {self.form.noun} in {self.folder} was begun with {words} ({name}); restore "
                f"them, or choose another folder (`out`)"
            )

    def make(self, make_piece: MakePiece, advance: Advance | None = None) -> int:
        """Make the pieces of this process that are missing or damaged; return the items made.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        made = 0
        for piece in self._own():
            if not self.is_piece_done(piece):
                self.write(piece, self._content(piece, make_piece, advance))
                made += len(self.items_of(piece))
        return made

    def progress_bar(self, description: str, unit: str, *, shown: bool = True) -> tqdm[NoReturn]:
        """Return a progress bar over the items of this process, including those done before."""
        sizes = {piece: len(self.items_of(piece)) for piece in self._own()}
        return tqdm(
            total=sum(sizes.values()),
            initial=sum(size for piece, size in sizes.items() if self.is_piece_done(piece)),
            desc=description,
            unit=unit,
            # None: no bar where stderr is not a terminal.
            disable=None if shown else True,
        )

    def write(self, piece: int, content: Mapping[str, Any]) -> None:
        """Write the files of a piece."""
        for suffix in self.form.suffixes:
            path, value = self.path(piece, suffix), content[suffix]
            if suffix == ".json":
                storage.write_json(path, {"plan": self.identity, **value})
                continue
            with storage.atomic_file(path) as temporary:
                if suffix == ".npy":
                    write_npy(temporary, value)
                elif suffix == ".npz":
                    with temporary.open("wb") as file:
                        np.savez(file, **value)
                else:
                    temporary.write_bytes(value)

    def finish(self, results: Settings) -> None:
        """Write the manifest; several processes may do so at once."""
        path = self.folder / self.form.manifest_name
        _write(path, {"plan": self.settings, **results}, self.form)
        # Left behind by killed processes.
        _remove(self.folder.glob(f".{self.form.piece_name}-*.tmp"))

    def is_done(self) -> bool:
        """Return whether all pieces are done."""
        return all(self.is_piece_done(piece) for piece in range(len(self)))

    def is_piece_done(self, piece: int) -> bool:
        """Return whether the files of a piece are complete."""
        try:
            self.check(piece)
        except (InputError, FileNotFoundError):
            return False
        return True

    def check(self, piece: int) -> None:
        """Check the files of a piece.

        Raises:
            FileNotFoundError: one is missing.
            InputError: one is damaged, or belongs to another artifact.
        """
        self.check_files(piece)
        if self.form.check is not None:
            self.form.check(self, piece)

    def check_files(self, piece: int) -> None:
        """Check that the files of a piece are there.

        Raises:
            FileNotFoundError: one is missing.
            InputError: an .npz file was cut off.
        """
        for suffix in self.form.suffixes:
            path = self.path(piece, suffix)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing; run {self.form.command} again: only that piece is made"
                )
            if suffix == ".npz" and not zipfile.is_zipfile(path):
                raise self.damaged(path, "it is not a whole archive")

    def read_json(self, piece: int) -> dict[str, Any]:
        """Return the content of a piece's .json file.

        Raises:
            FileNotFoundError: it is missing.
            InputError: it is damaged, or belongs to another artifact.
        """
        path = self.path(piece, ".json")
        try:
            values = read_json(path)
        except InputError as error:
            raise self.damaged(path, error) from error
        if values.get("plan") != self.identity:
            raise self.damaged(path, f"it belongs to another {self.form.noun}")
        return values

    def array(self, piece: int) -> np.ndarray:
        """Return the array of a piece's .npy file as a read-only memory map."""
        if piece not in self._arrays:
            self._arrays[piece] = np.load(self.path(piece, ".npy"), mmap_mode="r")
        return self._arrays[piece]

    def check_npy(self, piece: int, shape: tuple[int, ...], dtype: str) -> None:
        """Check header and size of a piece's .npy file; its content is not read.

        Raises:
            InputError: it is truncated, damaged, or holds another array.
        """
        path = self.path(piece, ".npy")
        with path.open("rb") as file:
            try:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("an unknown version of the format")
                there, fortran_order, found = np.lib.format.read_array_header_1_0(file)
            except (ValueError, EOFError) as error:
                raise self.damaged(path, error) from error
            start, size = file.tell(), os.fstat(file.fileno()).st_size
        if there != shape or found != np.dtype(dtype) or fortran_order:
            raise self.damaged(path, f"it holds {found} {there}, expected {dtype} {shape}")
        whole = start + math.prod(shape) * found.itemsize
        if size != whole:
            raise self.damaged(path, f"it has {size} of {whole} bytes")

    def read_npz(self, piece: int) -> dict[str, np.ndarray]:
        """Return the arrays of a piece's .npz file.

        Raises:
            InputError: it is missing or damaged; it is then removed, to be made again.
        """
        path = self.path(piece, ".npz")
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            path.unlink(missing_ok=True)
            shown = " ".join(str(error).split())
            raise InputError(
                f"{path} is damaged ({shown}); run {self.form.command} again"
            ) from error

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows, one per item, of an array of the .npz files.

        Raises:
            InputError: a piece is missing or damaged.
        """
        stop = self.items if stop is None else stop
        parts = []
        for piece in range(start // self.piece_size, math.ceil(stop / self.piece_size)):
            offset = piece * self.piece_size
            parts.append(self.read_npz(piece)[name][max(start - offset, 0) : stop - offset])
        return np.concatenate(parts)

    def damaged(self, path: Path, reason: object) -> InputError:
        """Return the error for a damaged file."""
        shown = " ".join(str(reason).split())
        return InputError(
            f"{path} is damaged ({shown}); delete it and run {self.form.command} again: only that "
            f"piece is made"
        )

    def _own(self) -> range:
        return range(self.rank, len(self), self.world_size)

    def _content(
        self, piece: int, make_piece: MakePiece, advance: Advance | None
    ) -> Mapping[str, Any]:
        items, reported = self.items_of(piece), 0

        def report(count: int) -> None:
            nonlocal reported
            reported += count
            if advance is not None and count:
                advance(count)

        content = make_piece(items, report)
        report(len(items) - reported)
        return content

    def _require_empty(self) -> None:
        # Killed processes leave hidden files behind.
        others = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        # Unless another process of this run has just written them.
        if others and not (self.folder / self.form.settings_name).exists():
            raise InputError(
                f"{self.folder} is not empty and holds no {self.form.noun} (but {min(others)}); "
                f"choose an empty folder (`out`)"
            )

    def _write_settings(self) -> None:
        """Write the settings, unless another process of the run has done so."""
        path = self.folder / self.form.settings_name
        staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        _write(staging, self.settings, self.form)
        try:
            # Unlike renaming, this fails if the file exists.
            os.link(staging, path)
        except FileExistsError:
            pass
        except OSError:
            # A file system without links.
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)

    def _changes(self, missing: Settings | None) -> str:
        """Return the differences to the settings on the disk, in words; "" if there are none."""
        form = self.form
        found = _filled(_read(self.folder / form.settings_name, form), missing or {})
        before, now = _flat(json.loads(json.dumps(found))), _flat(self.settings)
        names = [
            name
            for name in dict.fromkeys([*now, *before])
            if name.split(".")[0] not in form.free and before.get(name) != now.get(name)
        ]
        if not names:
            return ""
        known = next((k for k in form.words if any(_is_within(name, k) for name in names)), "")
        pairs = [
            f"{name} {_shortened(before.get(name))}, now {_shortened(now.get(name))}"
            for name in names
            if _is_within(name, known)
        ]
        return f"{form.words.get(known, 'other settings')} ({'; '.join(pairs)})"

    def _delete(self, changes: str) -> None:
        """Remove an artifact of other settings, but no other files in its folder."""
        folder, form = self.folder, self.form
        if self.world_size > 1:
            raise InputError(
                f"the {form.noun} in {folder} was begun with {changes}, and several processes "
                f"cannot overwrite it; delete the folder first"
            )
        # The manifest first, the settings last: after a kill, the rest is still recognised as an
        # incomplete artifact.
        (folder / form.manifest_name).unlink(missing_ok=True)
        for suffix in form.suffixes[::-1]:
            _remove(folder.glob(f"{form.piece_name}-*{suffix}"))
        for pattern in (*form.other_files, f".{form.piece_name}-*.tmp", form.settings_name):
            _remove(folder.glob(pattern))


def read_manifest(folder: Path | str, form: Format) -> tuple[Settings, Settings]:
    """Return the settings and the results of a finished artifact.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is not complete, damaged, or of another version.
    """
    folder = Path(folder)
    path = folder / form.manifest_name
    if not path.exists():
        if (folder / form.settings_name).exists():
            raise InputError(
                f"the {form.noun} in {folder} is not complete; run {form.command} again"
            )
        raise FileNotFoundError(
            f"there is no {form.noun} in {folder} ({form.manifest_name} is missing); make one with "
            f"{form.command}"
        )
    results = _read(path, form)
    settings = results.pop("plan", None)
    if not isinstance(settings, dict):
        raise InputError(f"{path} is damaged (it has no plan); run {form.command} again")
    return settings, results


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write an array as ``np.save`` does, which hides the cause of an error such as a full disk."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.reshape(-1).view(np.uint8).data)


def _write(path: Path, values: Settings, form: Format) -> None:
    storage.write_json(path, {"format": form.name, "version": form.version, **values})


def _read(path: Path, form: Format) -> dict[str, Any]:
    """Read the content that ``_write`` wrote, and check format and version."""
    values = read_json(path)
    if "format" not in values and not form.has_header:
        return values
    found, version = values.pop("format", None), values.pop("version", None)
    if found != form.name:
        raise InputError(
            f"{path} has format {found!r}, expected {form.name!r}; choose another folder"
        )
    if version != form.version:
        raise InputError(
            f"{path} has version {version}, this program reads {form.version}; use the llamagen "
            f"that wrote it, or run {form.command} into another folder"
        )
    return values


def _filled(values: Settings, missing: Settings) -> dict[str, Any]:
    """Return settings with the missing ones added at every level that exists."""
    filled = {**missing, **values}
    for name, value in filled.items():
        if isinstance(value, Mapping) and isinstance(missing.get(name), Mapping):
            filled[name] = _filled(value, missing[name])
    return filled


def _flat(values: Settings, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _is_within(name: str, setting: str) -> bool:
    return not setting or f"{name}.".startswith(f"{setting}.")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
