"""Images that are fetched by URL. They live in memory, under names nobody can guess, for a time."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFile:
    """An image's file."""

    content: bytes
    media_type: str
    expires: float


class FileStore:
    """Holds files until they expire or newer ones need their memory. Not for several threads."""

    def __init__(
        self, *, lifetime: float, memory: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts empty.

        Args:
            lifetime: seconds that a file is kept.
            memory: bytes that all files may take.
            clock: seconds.
        """
        self._lifetime = lifetime
        self._memory = memory
        self._clock = clock
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._size = 0

    def add(self, content: bytes, media_type: str) -> str:
        """Keeps a file; returns its name."""
        self._forget_expired()
        name = secrets.token_urlsafe(24)
        self._files[name] = StoredFile(content, media_type, self._clock() + self._lifetime)
        self._size += len(content)
        while self._size > self._memory and len(self._files) > 1:
            self._drop(next(iter(self._files)))
        return name

    def get(self, name: str) -> StoredFile | None:
        """The file of this name; None if there is none any more."""
        self._forget_expired()
        return self._files.get(name)

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._files:
            name, oldest = next(iter(self._files.items()))
            if oldest.expires > now:
                break
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._size -= len(self._files.pop(name).content)
