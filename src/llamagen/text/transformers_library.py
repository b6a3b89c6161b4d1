"""The ``transformers`` library: an optional dependency whose errors become one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamagen.models.pretrained import hub_errors
from llamagen.support.errors import InputError, importing, one_line


def import_transformers(who: str) -> Any:
    """Return the library, or raise InputError; ``who`` needs it ("text encoders need")."""
    with importing(who, "'llamagen[text]'"):
        import transformers
    return transformers


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Disable the library's progress bars."""
    import transformers

    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def loading(what: str, source: str, *, remedy: str) -> Iterator[None]:
    """Load a model in the block, without progress bars; every error becomes an InputError.

    Messages start with ``what``, a noun, and the folder or hub repository, and end with ``remedy``.
    """
    try:
        with quietly(), contextlib.nullcontext() if Path(source).is_dir() else hub_errors(source):
            yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = one_line(error)[:300]
        raise InputError(f"{what} {source} cannot be loaded ({reason}); {remedy}") from error
