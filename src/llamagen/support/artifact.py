"""Folders that are made piece by piece, by several processes, and resumed after a kill.

Stores of codes and of text features, results of evaluations, and folders of images are artifacts.
Each has a ``Format`` (names and wording) and settings (JSON):

    plan.json        format, version and settings: written first, never changed
    shard-00000.*    the files of piece 0, in a fixed order: with the last one the piece is done
    manifest.json    the settings again, and results: written once all pieces are done

To make one, or to resume::

    artifact = Artifact(folder, FORMAT, settings, items=1000, piece_size=256)
    with artifact.begin():
        artifact.make(make_piece, bar.update)
        if artifact.is_done():
            artifact.finish({"total": 17})

Every file appears whole (``storage.atomic_file``). Processes share pieces without communication.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.support.content import files_digest
from llamagen.support.errors import InputError, one_line
from llamagen.support.locks import folder_lock
from llamagen.support.storage import read_json

Settings = Mapping[str, Any]
"""Values that JSON can hold."""
Advance = Callable[[int], object]
"""Called with the number of items newly done, such as ``tqdm.update``."""
MakePiece = Callable[[range, Advance], Mapping[str, Any]]
"""Returns the content of the files of some items by suffix: an array for .npy, named arrays for
.npz, an object for .json."""


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


class OtherSettingsError(InputError):
    """An artifact was begun with other settings: with ``changes``."""

    def __init__(self, message: str, changes: str) -> None:
        super().__init__(message)
        self.changes = changes


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
    rank: int = 0
    """Number of this process, which makes every ``world_size``-th piece."""
    world_size: int = 1
    _arrays: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.settings = _as_json(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be sent to another process with all its content.
        return {**self.__dict__, "_arrays": {}}

    @property
    def identity(self) -> str:
        """Short text that depends on every setting that is not free."""
        values = {name: v for name, v in self.settings.items() if name not in self.form.free}
        return storage.short_digest([json.dumps(values, sort_keys=True).encode()])

    def content_digest(self) -> str:
        """Return a short text that depends on the content of all pieces and further files."""
        pieces = range(len(self))
        paths = [self.path(piece, suffix) for piece in pieces for suffix in self.form.suffixes]
        others = (sorted(self.folder.glob(pattern)) for pattern in self.form.other_files)
        return files_digest(self.folder, [*paths, *itertools.chain.from_iterable(others)])

    def __len__(self) -> int:
        """Return the number of pieces."""
        return math.ceil(self.items / self.piece_size)

    def items_of(self, piece: int) -> range:
        """Return the items of a piece."""
        return range(self.items)[piece * self.piece_size : (piece + 1) * self.piece_size]

    def path(self, piece: int, suffix: str) -> Path:
        """Return the path of a file of a piece."""
        return self.folder / f"{self.form.piece_name}-{piece:05d}{suffix}"

    @contextlib.contextmanager
    def begin(
        self, *, overwrite: bool | None = None, missing: Settings | None = None
    ) -> Iterator[None]:
        """Write or compare the settings; hold the folder's lock during the block.

        ``overwrite`` deletes an artifact of other settings (None: callers have no such option);
        ``missing`` has values, nested like the settings, of those that older folders lack. Raises
        InputError if the folder holds something else or other settings, is in use or read-only.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; choose a folder (`out`)")
        storage.require_writable(self.folder)
        with folder_lock(self.folder, self.rank, self.world_size):
            path = self.folder / self.form.settings_name
            if not path.exists():
                self._require_empty()
            elif overwrite and (changes := self._changes(missing)):
                self._delete(changes)
            if not path.exists():
                self._write_settings()
            if changes := self._changes(missing):
                or_overwrite = "" if overwrite is None else ", or `overwrite` it"
                raise OtherSettingsError(
                    f"the {self.form.noun} in {self.folder} was begun with {changes}; restore "
                    f"that, choose another folder (`out`){or_overwrite}",
                    changes,
                )
            self.settings = _read(path, self.form)
            yield

    def same_text(self, name: str, text: str, words: str) -> None:
        """Write a text file that belongs to the settings; InputError if it is there and differs.

        ``words`` is the difference, such as "other prompts".
        """
        path = self.folder / name
        if not path.is_file():
            storage.write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"the {self.form.noun} in {self.folder} was begun with {words} ({name}); restore "
                f"them, or choose another folder (`out`)"
            )

    def make(self, make_piece: MakePiece, advance: Advance) -> int:
        """Make the pieces of this process that are missing or damaged; return the items made."""
        missing = (piece for piece in self._own() if not self._is_piece_done(piece))
        return sum(self._make(piece, make_piece, advance) for piece in missing)

    def _make(self, piece: int, make_piece: MakePiece, advance: Advance) -> int:
        items, reported = self.items_of(piece), 0

        def report(count: int) -> None:
            nonlocal reported
            reported += count
            advance(count)

        content = make_piece(items, report)
        for suffix in self.form.suffixes:
            path, value = self.path(piece, suffix), content[suffix]
            if suffix == ".json":
                storage.write_json(path, {"plan": self.identity, **value})
            elif suffix == ".npy":
                with storage.atomic_file(path) as temporary:
                    write_npy(temporary, value)
            else:
                with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **value)
        advance(len(items) - reported)
        return len(items)

    def progress_bar(self, description: str, unit: str, *, shown: bool = True) -> tqdm[NoReturn]:
        """Return a progress bar over the items of this process, including those done before."""
        return tqdm(
            total=sum(len(self.items_of(piece)) for piece in self._own()),
            initial=sum(len(self.items_of(p)) for p in self._own() if self._is_piece_done(p)),
            desc=description,
            unit=unit,
            # None: no bar where stderr is not a terminal.
            disable=None if shown else True,
        )

    def finish(self, results: Settings) -> None:
        """Write the manifest; several processes may do so at once."""
        _write(self.folder / self.form.manifest_name, {"plan": self.settings, **results}, self.form)
        # Left behind by killed processes.
        self._remove(f".{self.form.piece_name}-*.tmp")

    def is_done(self) -> bool:
        """Return whether all pieces are done."""
        return all(map(self._is_piece_done, range(len(self))))

    def _is_piece_done(self, piece: int) -> bool:
        try:
            self.check(piece)
        except (InputError, FileNotFoundError):
            return False
        return True

    def check(self, piece: int) -> None:
        """Raise FileNotFoundError or InputError if a file of a piece is missing or damaged."""
        self.check_files(piece)
        if self.form.check is not None:
            self.form.check(self, piece)

    def check_files(self, piece: int) -> None:
        """Raise FileNotFoundError if a file of a piece is missing; content is not checked.

        InputError if an .npz file was cut off.
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
        """Return the content of a piece's .json file; InputError if it is another artifact's."""
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
        """Raise InputError if header or size of a piece's .npy file are not those expected."""
        path = self.path(piece, ".npy")
        try:
            with path.open("rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("an unknown version of the format")
                there, fortran_order, found = np.lib.format.read_array_header_1_0(file)
                whole = file.tell() + math.prod(shape) * found.itemsize
        except (ValueError, EOFError) as error:
            raise self.damaged(path, error) from error
        if there != shape or found != np.dtype(dtype) or fortran_order:
            raise self.damaged(path, f"it holds {found} {there}, expected {dtype} {shape}")
        if (size := path.stat().st_size) != whole:
            raise self.damaged(path, f"it has {size} of {whole} bytes")

    def read_npz(self, piece: int) -> dict[str, np.ndarray]:
        """Return the arrays of a piece's .npz file; remove it, with InputError, if damaged."""
        path = self.path(piece, ".npz")
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            path.unlink(missing_ok=True)
            raise InputError(
                f"{path} is damaged ({one_line(error)}); run {self.form.command} again"
            ) from error

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows, one per item, of an array of the .npz files; errors as of ``read_npz``."""
        size, stop = self.piece_size, self.items if stop is None else stop
        return np.concatenate(
            [
                self.read_npz(piece)[name][max(start - piece * size, 0) : stop - piece * size]
                for piece in range(start // size, math.ceil(stop / size))
            ]
        )

    def damaged(self, path: Path, reason: object) -> InputError:
        """Return the error for a damaged file."""
        return InputError(
            f"{path} is damaged ({one_line(reason)}); delete it and run {self.form.command} again: "
            f"only that piece is made"
        )

    def _own(self) -> range:
        return range(self.rank, len(self), self.world_size)

    def _require_empty(self) -> None:
        # Killed processes leave hidden files behind.
        others = list(self.folder.glob("[!.]*"))
        # Unless another process of this run has just written them.
        if others and not (self.folder / self.form.settings_name).exists():
            raise InputError(
                f"{self.folder} is not empty and holds no {self.form.noun} (but "
                f"{min(others).name}); choose an empty folder (`out`)"
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
        found, now = _read(self.folder / form.settings_name, form), flattened(self.settings)
        before = flattened(_as_json(missing or {})) | flattened(found)
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
        form = self.form
        if self.world_size > 1:
            raise InputError(
                f"the {form.noun} in {self.folder} was begun with {changes}, and several processes "
                f"cannot overwrite it; delete the folder first"
            )
        # The manifest first, the settings last: after a kill it still is an incomplete artifact.
        pieces = (f"{form.piece_name}-*{suffix}" for suffix in form.suffixes[::-1])
        temporary = f".{form.piece_name}-*.tmp"
        self._remove(form.manifest_name, *pieces, *form.other_files, temporary, form.settings_name)

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)


def read_manifest(folder: Path | str, form: Format) -> tuple[Settings, Settings]:
    """Return the settings and the results of a finished artifact.

    FileNotFoundError if there is none, InputError if it is incomplete or cannot be read.
    """
    path = Path(folder) / form.manifest_name
    if not path.exists():
        if path.with_name(form.settings_name).exists():
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


def _as_json(values: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def flattened(values: Settings, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_nested = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{name}.") if is_nested else {prefix + name: value}
    return flat


def _is_within(name: str, setting: str) -> bool:
    return not setting or f"{name}.".startswith(f"{setting}.")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
