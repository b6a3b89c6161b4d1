"""How the tests of this package look for an example against a property."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llamagen.support.errors import InputError

PROFILE = "LLAMAGEN_PROPERTIES"
"""Environment variable of the profile."""

# The first is reproducible by itself, the second by its seed: so neither keeps a database.
settings.register_profile(
    "quick",
    max_examples=32,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "hunt", settings.get_profile("quick"), max_examples=256, derandomize=False
)
_PROFILE = settings.get_profile(os.environ.get(PROFILE, "quick"))


def holds_for(*, cost: int = 1, **arguments: st.SearchStrategy[Any]) -> Callable[..., Any]:
    """Call a test with many examples of its arguments: with fewer if they ``cost`` more."""
    examples = max(1, _PROFILE.max_examples // cost)
    return lambda test: settings(_PROFILE, max_examples=examples)(given(**arguments)(test))


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one example; pytest's is that of all."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """A list of what the package logs during the block."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("llamagen")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of a call and "", or None and the line that refuses it."""
    try:
        return call(), ""
    except (InputError, FileNotFoundError) as error:
        refusal = str(error)
    # Also where others than line feeds break lines.
    assert len(refusal.splitlines()) == 1, repr(refusal)
    return None, refusal


def answer(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or None if it is refused in one line."""
    return attempt(call)[0]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=24)
"""Any text that can be encoded."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
"""Any value of a JSON file."""
