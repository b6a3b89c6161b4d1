"""Tables of images and of prompts: .csv, .tsv, .jsonl, .json and .txt.

A folder of images may have a table, metadata.csv or metadata.jsonl, in the convention of the hub's
image folders: a column ``file_name`` with paths relative to the table, and any others.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamagen.data.columns import FILE_NAMES, SourceConfig, find_column, read_annotations
from llamagen.data.images import ImageFolder
from llamagen.support.errors import InputError

TABLES = ("metadata.csv", "metadata.jsonl")
"""Names of the tables of a folder."""
_REST = "more"
"""Name of the fields that a row has beyond the header's."""


def read_table(path: Path, *, text_column: str = "text") -> list[dict[str, Any]]:
    """Return the rows of a table.

    Args:
        path: .csv or .tsv with a header; .jsonl with an object or text on each line; .json with a
            list of these, or COCO's captions; .txt with a text on each line. Empty lines are left
            out.
        text_column: name of the column of plain texts.

    Raises:
        InputError: the file is of another form, damaged, or has no rows.
    """
    kind = path.suffix.lower()
    try:
        rows = _parse(path.read_text(encoding="utf-8-sig"), kind, text_column)
    except (ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as {kind or 'text'} ({reason})") from error
    if not rows:
        raise InputError(f"{path} has no rows in it; add some, or give another file")
    return rows


def find_table(folder: Path) -> Path | None:
    """Return the table of a folder, if it has one."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def open_table(
    table: Path,
    config: SourceConfig | None = None,
    *,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
) -> ImageFolder:
    """Return the images that a table lists, with their classes and captions.

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
    rows = read_table(table)
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
        reader = csv.DictReader(lines, restkey=_REST, delimiter="\t", quoting=csv.QUOTE_NONE)
        return list(reader)
    if kind == ".jsonl":
        values = [json.loads(line) for line in lines]
    elif kind == ".json":
        values = json.loads(text)
        if isinstance(values, Mapping):
            if not isinstance(values.get("annotations"), list):
                raise ValueError("expected a list, or COCO's object with annotations")
            values = values["annotations"]
        if not isinstance(values, list):
            raise ValueError("expected a list")
    else:
        raise ValueError("the name should end in .txt, .csv, .tsv, .jsonl or .json")
    rows = [{text_column: value} if isinstance(value, str) else value for value in values]
    wrong = next((row for row in rows if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"expected a text or an object, found {str(wrong)[:40]}")
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
    path = table.parent / relative
    if not path.is_file():
        raise InputError(
            f"row {number} of {table} names {name}, which is not there; add the file or remove "
            f"the row"
        )
    return path
