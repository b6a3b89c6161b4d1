"""Locks on folders, so that only one run writes into a folder. A kill releases them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from llamagen.support.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
_RETRY_SECONDS = 0.05

_held: set[int] = set()
"""Descriptors of this process's locks."""


def _close_in_child() -> None:
    """Leave the locks to the parent: they would outlive its death in workers that it forked."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def folder_lock(
    folder: Path | str, rank: int = 0, world_size: int = 1, *, timeout: float = 1.0
) -> Iterator[None]:
    """Lock a folder for a run while the block is executed.

    A run of one process locks it exclusively. The processes of a larger run share it, but not with
    a process of another run that has the same rank or is alone. InputError if another run still
    holds the folder, which must exist, after ``timeout`` seconds (may be ``math.inf``).
    """
    folder, deadline = Path(folder), time.monotonic() + timeout
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            held.enter_context(_lock_file(folder / _NAME, world_size == 1, deadline))
            if world_size > 1:
                held.enter_context(_lock_file(folder / f"{_NAME}-{rank}", True, deadline))
        yield


@contextlib.contextmanager
def _lock_file(path: Path, exclusive: bool, deadline: float) -> Iterator[None]:
    descriptor = _acquire(path, exclusive, deadline)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        # The exclusive lock is only given to the last holder, who removes the file.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, exclusive: bool, deadline: float) -> int:
    """Return the descriptor that holds the lock."""
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            # The previous holder may have removed the file after it was opened.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise InputError(
                    f"another run is working in {path.parent}; wait until it ends, or choose "
                    f"another folder"
                ) from error
            time.sleep(_RETRY_SECONDS)
        except OSError:
            # A file system without locks.
            return descriptor
        os.close(descriptor)
