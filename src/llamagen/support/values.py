"""Numbers of numpy, torch and pandas as Python's own, which JSON, seeds and settings need."""

from __future__ import annotations

from typing import Any

from llamagen.support.errors import InputError


def plain(value: Any) -> Any:
    """Return a number, an array or a column as Python's number or list; others as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def require_integer(name: str, value: Any, minimum: int | None = None) -> int:
    """Return an integer as Python's own; InputError if it is none, or below ``minimum``."""
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(f"{name} is {number!r}, expected an integer")
    if minimum is not None and number < minimum:
        raise InputError(f"{name} is {number}, expected at least {minimum}")
    return number
