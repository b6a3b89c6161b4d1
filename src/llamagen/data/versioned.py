"""Configurations as files that say what they are, so that no other program's, and no other
version's, is taken for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import llamagen.support.storage as storage
from llamagen.config import config_from_dict, config_to_dict, read_json
from llamagen.support.errors import InputError

ConfigT = TypeVar("ConfigT")


def write_versioned(path: Path, content: Any, format_name: str, version: int) -> None:
    """Writes a dataclass as JSON, under the name and version of its format."""
    storage.write_json(path, {"format": format_name, "version": version, **config_to_dict(content)})


def read_versioned(
    cls: type[ConfigT], path: Path, format_name: str, version: int, *, again: str
) -> ConfigT:
    """Reads what ``write_versioned`` wrote; ``again`` says how to make what the file describes.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file is damaged, of another version or of another format.
    """
    values = read_json(path)
    found = values.pop("format", None)
    if found != format_name:
        raise InputError(
            f"{path} has format {found!r}, expected {format_name!r}; give another folder"
        )
    there = values.pop("version", None)
    if there != version:
        raise InputError(
            f"{path} has version {there}, this program reads {version}; use the llamagen that "
            f"wrote it, or {again} into another folder"
        )
    return config_from_dict(cls, values, source=str(path))
