"""Child processes that share work."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from llamagen.support.devices import keep_freed_memory


def run_children(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
) -> Generator[int, None, None]:
    """Run ``target`` in a process for each of ``arguments``; yield their reports.

    Its first argument is a connection, through which it sends integers, or the exception that ended
    it. It should begin with ``become_child``.

    If one fails or dies, the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    children: dict[Connection, SpawnProcess] = {}
    try:
        for values in arguments:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=target, args=(theirs, *values))
            child.start()
            children[ours] = child
            # The child's copy is then the only one: when it dies, reading ends.
            theirs.close()
        running = set(children)
        while running:
            for connection in multiprocessing.connection.wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except EOFError:
                    running.discard(connection)
                    _check_end(children[connection])
                    continue
                if isinstance(message, Exception):
                    raise message
                yield message
    finally:
        for child in children.values():
            child.terminate()
        for connection, child in children.items():
            child.join()
            connection.close()


def _check_end(child: SpawnProcess) -> None:
    child.join()
    if child.exitcode != 0:
        number = child.exitcode or 0
        cause = f"signal {signal.Signals(-number).name}" if number < 0 else f"status {number}"
        if number == -signal.SIGKILL:
            cause += ", most often out of memory"
        raise ChildProcessError(
            f"a process of the extraction ended ({cause}); run the same command again, "
            f"it goes on where it stopped"
        )


def become_child(threads: int) -> None:
    """Make this process end with its parent, and not at Ctrl-C."""
    # Ctrl-C reaches every process of the terminal; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()


def _end_with_parent() -> None:
    """End with the parent: otherwise a process whose parent was killed would go on for hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
