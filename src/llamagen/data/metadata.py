"""A folder of images with a table, metadata.csv or metadata.jsonl, that names classes or captions.

The convention is that of the hub's image folders: a column ``file_name`` with paths relative to
the table, and any others.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamagen.data.captions import caption_columns, captions_of
from llamagen.data.classes import classes_of
from llamagen.data.columns import FILE_NAMES, LABEL_NAMES, SourceConfig, find_column
from llamagen.data.images import ImageFolder
from llamagen.support.errors import InputError

TABLES = ("metadata.csv", "metadata.jsonl")
"""Names of tables that are looked for in a folder."""


def find_table(folder: Path) -> Path | None:
    """The table of a folder, if it has one."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def open_table(
    table: Path,
    config: SourceConfig | None = None,
    *,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
) -> ImageFolder:
    """The images that a table lists, with their classes and captions.

    Args:
        table: CSV with a header, or JSON lines.
        config: names of the columns.
        labelled: take classes, if there is a column for them.
        class_names: the classes there may be; by default those that occur.

    Raises:
        InputError: the table is empty or damaged, has no column of file names, names files that
            are not there or lie elsewhere, or a label is missing.
    """
    config = config or SourceConfig()
    rows = _read(table)
    columns = list(rows[0])
    column = find_column("file name", config.image_column, FILE_NAMES, columns, str(table))
    if column is None:
        raise InputError(
            f"{table} has no column of file names (looked for {', '.join(FILE_NAMES)}; it has "
            f"{', '.join(columns)}); name it with `image_column`"
        )
    paths = tuple(_file(table, number, row.get(column)) for number, row in enumerate(rows))
    label = find_column("label", config.label_column, LABEL_NAMES, columns, str(table))
    labels: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    if labelled and label is not None:
        values = [row.get(label) for row in rows]
        labels, names = classes_of(values, str(table), class_names=class_names)
    named = caption_columns(config, columns, str(table))
    captions = None
    if named:
        captions = tuple(captions_of(row, named, config.caption_separator) for row in rows)
    return ImageFolder(table.parent, paths, labels, names, captions)


def _read(table: Path) -> list[dict[str, Any]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix.lower() == ".csv":
            rows = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{table} cannot be read as a table ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{table} has a line that is no object; expected {{"file_name": ...}}')
    if not rows:
        raise InputError(f"{table} lists no images")
    return rows


def _file(table: Path, number: int, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise InputError(f"row {number} of {table} names no file; remove the row")
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(
            f"row {number} of {table} names {name}, outside the table's folder; move the table "
            f"above all images"
        )
    path = table.parent / relative
    if not path.is_file():
        raise InputError(
            f"row {number} of {table} names {name}, which is not there; add the file or remove "
            f"the row"
        )
    return path
