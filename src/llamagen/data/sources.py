"""Sources of images of any kind, and tables of images and of prompts.

A folder of images may have a table, metadata.csv or metadata.jsonl, in the convention of the hub's
image folders: a column ``file_name`` with paths relative to the table, and any others.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamagen.data import datasets_library as library
from llamagen.data.columns import (
    CAPTION_NAMES,
    FILE_NAMES,
    SourceConfig,
    find_column,
    read_annotations,
)
from llamagen.data.images import ImageCollection, ImageFolder
from llamagen.support.errors import InputError, one_line
from llamagen.support.names import is_visible

_TABLES = (".csv", ".jsonl")
"""Suffixes of tables of images; metadata.csv or metadata.jsonl is that of its folder."""
_REST = "more"
"""Key of a row's fields beyond those of the header."""


def open_images(
    source: str | Path,
    config: SourceConfig | None = None,
    *,
    split: str | None = None,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
) -> ImageCollection:
    """Return the images of a source.

    Args:
        source: a folder of images, with a subfolder for each class or a table (metadata.csv or
            metadata.jsonl) or neither; such a table; Parquet or WebDataset tar files, as one
            file, a pattern or a folder; or a data set on the hub, "hf:owner/name".
        config: columns and split.
        split: replaces that of ``config``.
        labelled: use the classes, if there are any.
        class_names: the classes of the training images, of images for validation, which are found
            among them by name; by default those that occur.

    FileNotFoundError if there is no such folder or file; InputError if there are no images, the
    source is damaged, or a class is not allowed.
    """
    config = config or SourceConfig()
    path, name = Path(source), str(source)
    if is_library_source(source):
        dataset = library.load(name, split or config.split, config)
        return library.Table(dataset, name, config, labelled=labelled, class_names=class_names)
    is_table = path.suffix.lower() in _TABLES and path.is_file()
    if table := path if is_table else _find_table(path):
        return _open_table(table, config, labelled, class_names)
    return ImageFolder.scan(path, labelled=labelled, class_names=class_names)


def is_library_source(source: str | Path) -> bool:
    """Return whether the ``datasets`` library reads a source; InputError if nothing can.

    FileNotFoundError for files of its formats that do not exist.
    """
    path, name = Path(source), str(source)
    if name.startswith(library.HUB):
        return True
    if path.is_dir():
        # A level below, too, as in the "data" folder of a data set cloned from the hub.
        entries = itertools.chain(path.glob("*"), path.glob("data/*"))
        return _find_table(path) is None and any(
            entry.suffix.lower() in library.FORMATS and entry.is_file() for entry in entries
        )
    is_known = path.suffix.lower() in library.FORMATS
    # Not Path.glob: patterns may be absolute.
    if path.is_file() or glob.glob(name):  # noqa: PTH207
        if not is_known and path.suffix.lower() not in _TABLES:
            raise InputError(
                f"{source} is no source of images; give a folder, a table (.csv, .jsonl), or "
                f"files ending in {', '.join(library.FORMATS)}"
            )
        return is_known
    if is_known:
        raise FileNotFoundError(f"{source} does not exist; give a folder or files with images")
    return False


def _read_table(path: Path, *, text_column: str = "text") -> list[dict[str, Any]]:
    """Return the rows of a table; plain texts are in ``text_column``."""
    kind = path.suffix.lower()
    try:
        rows = _parse(path.read_text(encoding="utf-8-sig"), kind, text_column)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as {kind or 'text'} ({one_line(error)})"
        ) from error
    if not rows:
        raise InputError(f"{path} has no rows in it; add some, or give another file")
    return rows


def _find_table(folder: Path) -> Path | None:
    """Return the table of a folder, if it has one."""
    tables = (folder / f"metadata{suffix}" for suffix in _TABLES)
    return next(filter(Path.is_file, tables), None)


def _open_table(
    table: Path, config: SourceConfig, labelled: bool, class_names: Sequence[str] | None
) -> ImageFolder:
    rows = _read_table(table)
    columns, where = list(rows[0]), str(table)
    column = find_column("file name", config.image_column, FILE_NAMES, columns, where)
    if column is None:
        raise InputError(
            f"{table} has no column of file names (searched for {', '.join(FILE_NAMES)}; it has "
            f"{', '.join(columns)}); name it with `image_column`"
        )
    paths = tuple(_image_path(table, number, row.get(column)) for number, row in enumerate(rows))
    labels, names, captions = read_annotations(
        lambda name: [row.get(name) for row in rows],
        columns,
        config,
        where,
        labelled=labelled,
        class_names=class_names,
    )
    return ImageFolder(table.parent, paths, labels, names, captions)


def _parse(text: str, kind: str, text_column: str) -> list[dict[str, Any]]:
    # Not str.splitlines, which also splits at separators within a text, such as U+2028.
    lines = [line for line in io.StringIO(text, newline=None) if line.strip()]
    if kind == ".txt":
        return [{text_column: line.strip()} for line in lines]
    if kind == ".csv":
        file = io.StringIO(text, newline="")
        return list(csv.DictReader(file, restkey=_REST, strict=True))
    if kind == ".tsv":
        # A tab ends a field whatever quotes there are; PartiPrompts has lone ones.
        return [*csv.DictReader(lines, restkey=_REST, delimiter="\t", quoting=csv.QUOTE_NONE)]
    if kind == ".jsonl":
        values: Any = [json.loads(line) for line in lines]
    elif kind == ".json":
        values = json.loads(text)
        values = values.get("annotations") if isinstance(values, Mapping) else values
        if not isinstance(values, list):
            raise ValueError("expected a list, or COCO's object with annotations")
    else:
        raise ValueError("the name should end in .txt, .csv, .tsv, .jsonl or .json")
    rows = [{text_column: value} if isinstance(value, str) else value for value in values]
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"expected a text or an object, found {str(row)[:40]}")
    return rows


def _image_path(table: Path, number: int, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise InputError(f"row {number} of {table} names no file; remove the row")
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(
            f"row {number} of {table} names {name}, outside the table's folder; move the table "
            f"above all images"
        )
    # A Mac's disks have decomposed names, most tables composed ones.
    forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    if found := next(filter(Path.is_file, map(table.parent.joinpath, forms)), None):
        return found
    raise InputError(
        f"row {number} of {table} names {name}, which is not there; add the file or remove the row"
    )


class FilePrompt(NamedTuple):
    """A prompt of a file."""

    text: str
    about: dict[str, Any]
    """The other fields of its row: its category, the number of its image, and so on."""


def read_prompts(path: Path | str, *, column: str | None = None) -> list[FilePrompt]:
    """Read the prompts of a file.

    Args:
        path: .csv or .tsv with a header; .jsonl with an object or text on each line; .json with a
            list of these, or COCO's captions; .txt with a text on each line. Empty lines are left
            out.
        column: of the prompt; by default the first of prompt, text, caption and so on, in any case.

    InputError if the file is of another form, damaged, has no such column, or an empty prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of prompts")
    rows = _read_table(path, text_column="prompt")
    by_lower = {name.lower(): name for name in rows[0]}
    known = (by_lower.get(name) for name in ("prompt", *CAPTION_NAMES))
    field = next(filter(None, known), None) if column is None else column
    if field is None or field not in rows[0]:
        missing = "no column of prompts" if column is None else f"no column {column!r}"
        raise InputError(
            f"{path} has {missing} (it has {', '.join(rows[0])}); name one of them with "
            f"`prompt_column`"
        )
    prompts = []
    for number, row in enumerate(rows, start=1):
        found = row.get(field)
        if not isinstance(found, str) or not is_visible(found):
            raise InputError(f"prompt {number} of {path} is empty; write one, or remove the row")
        about = {name: value for name, value in row.items() if name != field}
        prompts.append(FilePrompt(found.strip(), about))
    return prompts
