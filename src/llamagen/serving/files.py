"""Images that are fetched by URL: in memory, under names nobody can guess, for a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple


class StoredFile(NamedTuple):
    """File of an image."""

    content: bytes
    media_type: str
    expires: float


class FileStore:
    """Holds files until they expire or newer ones need their memory. Not for several threads.

    A file is kept for ``lifetime`` seconds; all of them may take ``memory`` bytes.
    """

    def __init__(
        self, *, lifetime: float, memory: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime = lifetime
        self._memory = memory
        self._clock = clock
        self._files: dict[str, StoredFile] = {}
        """The oldest first."""

    def add(self, content: bytes, media_type: str) -> str:
        """Keep a file; return its name."""
        self._forget_expired()
        name = secrets.token_urlsafe(24)
        self._files[name] = StoredFile(content, media_type, self._clock() + self._lifetime)
        size = sum(len(file.content) for file in self._files.values())
        for old in list(self._files)[:-1]:
            if size <= self._memory:
                break
            size -= len(self._files.pop(old).content)
        return name

    def get(self, name: str) -> StoredFile | None:
        """Return the file of this name; None if there is none any more."""
        self._forget_expired()
        return self._files.get(name)

    def _forget_expired(self) -> None:
        now = self._clock()
        self._files = {name: file for name, file in self._files.items() if file.expires > now}
