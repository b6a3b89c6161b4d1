"""Files of prompts: one a line, or tables in the forms that evaluation sets come in."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llamagen.data.columns import CAPTION_NAMES
from llamagen.support.errors import InputError

_REST = "more"
"""What fields are called that a row has beyond the header's."""


class FilePrompt(NamedTuple):
    """A prompt of a file."""

    text: str
    about: dict[str, Any]
    """What else the file says of it: its category, the number of its image, and so on."""


def read_prompts(path: Path | str, *, column: str | None = None) -> list[FilePrompt]:
    """Reads the prompts of a file.

    Args:
        path: .txt has a prompt a line, empty lines left out; .csv and .tsv a header, as
            PartiPrompts'; .jsonl an object a line; .json a list of texts or objects, or COCO's
            captions.
        column: which column or field is the prompt; by default the first of prompt, text, caption
            and the like that is there, whatever its case.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file is of another form, damaged, has no such column, or an empty prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of prompts")
    kind = path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _rows(text, kind)
    except (ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as {kind or 'text'} ({reason})") from error
    if rows is None:
        raise InputError(
            f"{path} is no file of prompts; its name should end in .txt, .csv, .tsv, .jsonl or "
            f".json"
        )
    if not rows:
        raise InputError(f"{path} has no prompts in it")
    field = _field(path, rows, column)
    prompts = []
    for number, row in enumerate(rows, start=1):
        found = row.get(field)
        if not isinstance(found, str) or not found.strip():
            raise InputError(f"prompt {number} of {path} is empty; write one, or remove the row")
        about = {name: value for name, value in row.items() if name != field}
        prompts.append(FilePrompt(found.strip(), about))
    return prompts


def _rows(text: str, kind: str) -> list[dict[str, Any]] | None:
    """The rows of a file as objects; None if its form is not known."""
    lines = [line for line in text.splitlines() if line.strip()]
    if kind == ".txt":
        return [{"prompt": line} for line in lines]
    if kind in (".csv", ".tsv"):
        whole = text.splitlines(keepends=True)
        if kind == ".csv":
            return list(csv.DictReader(whole, restkey=_REST, strict=True))
        # A tab ends a field whatever quotes there are; PartiPrompts has lone ones.
        return list(
            csv.DictReader(
                whole, restkey=_REST, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True
            )
        )
    if kind == ".jsonl":
        return [_object(json.loads(line)) for line in lines]
    if kind == ".json":
        return _json_rows(json.loads(text))
    return None


def _json_rows(values: Any) -> list[dict[str, Any]]:
    if isinstance(values, Mapping):
        if not isinstance(values.get("annotations"), list):
            raise ValueError("expected a list, or COCO's object with annotations")
        values = values["annotations"]
    if not isinstance(values, list):
        raise ValueError("expected a list of prompts")
    return [_object(value) for value in values]


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"expected a text or an object, found {str(value)[:40]}")
    return value


def _field(path: Path, rows: list[dict[str, Any]], wanted: str | None) -> str:
    names = list(rows[0])
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{path} has no column {wanted!r}; it has {', '.join(names)}")
        return wanted
    by_lower = {name.lower(): name for name in names}
    for known in ("prompt", *CAPTION_NAMES):
        if known in by_lower:
            return by_lower[known]
    raise InputError(
        f"{path} has no column of prompts (it has {', '.join(names)}); name it with `prompt_column`"
    )
