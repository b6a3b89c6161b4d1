"""The ``transformers`` library: an optional dependency whose errors become one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llamagen.support.errors import InputError, importing, one_line
from llamagen.support.hub import hub_errors, is_repo_id


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


def load_pretrained(
    what: str, source: str, kind: str, families: Sequence[str], *, who: str, dtype: torch.dtype
) -> tuple[Any, Any, list[str]]:
    """Return a model, its tokenizer, and the names of its weights that are missing.

    ``source`` is a folder or hub repository with a model of one of ``families``; ``kind`` is its
    class without the family. Errors name it as ``what``; see ``import_transformers`` for ``who``.
    """
    transformers = import_transformers(who)
    is_local = Path(source).is_dir()
    if not is_local and not is_repo_id(source):
        raise InputError(f"{what} {source} is no folder and no hub repository (owner/name)")
    try:
        with quietly(), contextlib.nullcontext() if is_local else hub_errors(source):
            family = transformers.AutoConfig.from_pretrained(source).model_type
            if family not in families:
                raise InputError(
                    f"{what} {source} is of the family {family}, expected {families[0]}"
                )
            model, found = getattr(transformers, f"{family.upper()}{kind}").from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{what} {source} cannot be loaded ({one_line(error)[:300]}); give a folder or hub "
            f"repository with a model of the family {families[0]} and its tokenizer"
        ) from error
    return model, tokenizer, sorted(found["missing_keys"])
