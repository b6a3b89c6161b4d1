"""Files of prompts: plain lines, or tables as those of evaluation sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from llamagen.data.columns import CAPTION_NAMES
from llamagen.data.sources import read_table
from llamagen.support.errors import InputError


class FilePrompt(NamedTuple):
    """A prompt of a file."""

    text: str
    about: dict[str, Any]
    """The other fields of its row: its category, the number of its image, and so on."""


def read_prompts(path: Path | str, *, column: str | None = None) -> list[FilePrompt]:
    """Read the prompts of a file.

    Args:
        path: see ``data.sources.read_table``.
        column: column of the prompt; by default the first of prompt, text, caption and so on that
            exists, in any case.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file is of another form, damaged, has no such column, or an empty prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of prompts")
    rows = read_table(path, text_column="prompt")
    field = _prompt_column(path, list(rows[0]), column)
    prompts = []
    for number, row in enumerate(rows, start=1):
        found = row.get(field)
        if not isinstance(found, str) or not found.strip():
            raise InputError(f"prompt {number} of {path} is empty; write one, or remove the row")
        about = {name: value for name, value in row.items() if name != field}
        prompts.append(FilePrompt(found.strip(), about))
    return prompts


def _prompt_column(path: Path, names: list[str], wanted: str | None) -> str:
    by_lower = {name.lower(): name for name in names}
    known = ("prompt", *CAPTION_NAMES)
    found = (by_lower.get(name) for name in known) if wanted is None else (wanted,)
    column = next((name for name in found if name in names), None)
    if column is None:
        missing = "no column of prompts" if wanted is None else f"no column {wanted!r}"
        raise InputError(
            f"{path} has {missing} (it has {', '.join(names)}); name one of them with "
            f"`prompt_column`"
        )
    return column
