"""CUDA graphs: work of a GPU that is recorded once and played again.

A step of decoding is hundreds of kernels of a few microseconds each. A CPU takes longer to launch
one than the GPU to run it; a recording is launched as a whole. What is played does the same to the
same memory, so it must take its inputs where they were, and it can never wait for the host.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

Work = Callable[[], None]
"""Launches kernels; what it computes lies in tensors that it holds."""

_K = TypeVar("_K")
_T = TypeVar("_T")

_logger = logging.getLogger(__name__)
# Reentrant: a collection of garbage inside may put something back.
_lock = threading.RLock()


def wanted(device: torch.device) -> bool:
    """Whether to record what ``device`` does: a CUDA device, unless LLAMAGEN_CUDA_GRAPHS=off."""
    off = os.environ.get("LLAMAGEN_CUDA_GRAPHS", "").lower() in ("off", "0", "false")
    return device.type == "cuda" and not off


class Tape(Protocol):
    """Something to record on."""

    def rehearse(self, work: Work) -> None:
        """Does work without recording it."""
        ...

    def record(self, work: Work) -> Work:
        """Records work *without doing it*; the result does it.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


@dataclass
class _Take:
    """What is known of one key."""

    times: int = 0
    """How often its work was done."""
    play: Work | None = None
    """Its recording, if there is one."""


class Recorder:
    """Does work that comes again and again: the first times as it is, then from a recording."""

    def __init__(self, tape: Tape | None, *, most: int, after: int = 1) -> None:
        """Nothing is recorded yet.

        Args:
            tape: None to record nothing and do all work as it is.
            most: recordings that are kept; those not played for longest go first.
            after: how often work is done as it is, at least once, before it is recorded. What
                kernels need at their first run (loading, workspaces) cannot be recorded.
        """
        self._tape = tape
        self._most, self._after = most, after
        self._takes: OrderedDict[Hashable, _Take] = OrderedDict()

    def run(self, key: Hashable, work: Work) -> None:
        """Does ``work``, which must do the same to the same memory whenever ``key`` is the same."""
        take = self._takes.pop(key, None) or _Take()
        self._takes[key] = take
        if len(self._takes) > self._most:
            self._takes.popitem(last=False)
        take.times += 1
        if take.play is None and take.times > self._after:
            take.play = self._recorded(work)
        if take.play is not None:
            take.play()
        elif self._tape is not None:
            self._tape.rehearse(work)
        else:
            work()

    def _recorded(self, work: Work) -> Work | None:
        if self._tape is None:
            return None
        try:
            return self._tape.record(work)
        except RuntimeError as error:
            self._tape = None
            reason = str(error).strip().partition("\n")[0]
            _logger.warning("going on without CUDA graphs, which is slower: %s", reason)
            return None


class CudaTape:
    """Records CUDA graphs that share one pool of memory: to be used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Nothing can be recorded on the default stream.
        self._stream = torch.cuda.Stream(device)
        self._last = torch.cuda.current_stream(device)
        self._first: torch.cuda.CUDAGraph | None = None

    def rehearse(self, work: Work) -> None:
        """See ``Tape``."""
        # On the stream that records, so that what a library keeps for each stream is there then.
        with self._aside():
            work()

    def record(self, work: Work) -> Work:
        """See ``Tape``."""
        # torch.cuda.graph would first wait for the device and give all unused memory back. Other
        # threads may go on meanwhile with what cannot be recorded ("thread_local").
        graph = torch.cuda.CUDAGraph()
        with self._aside():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        # A pool ends with its last graph and cannot be used again.
        self._first = self._first or graph

        def play() -> None:
            self._follow()
            with torch.cuda.device(self._device):
                graph.replay()

        return play

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of our own, behind what was launched before, in front of what comes."""
        current = self._follow()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _follow(self) -> torch.cuda.Stream:
        """The current stream, which goes on once the last one is done with the shared memory."""
        current = torch.cuda.current_stream(self._device)
        if current != self._last:
            current.wait_stream(self._last)
            self._last = current
        return current


def lend(shelf: MutableMapping[_K, list[_T]], key: _K, owner: object, make: Callable[[], _T]) -> _T:
    """Something that nobody else uses until ``owner`` is collected; then it is back on the shelf.

    Args:
        shelf: what nobody uses at the moment.
        key: what kind of thing.
        owner: must not be referred to by what is lent.
        make: makes a new one, if none is on the shelf.
    """
    with _lock:
        idle = shelf.get(key)
        lent = idle.pop() if idle else None
    if lent is None:
        lent = make()
    weakref.finalize(owner, _put_back, shelf, key, lent).atexit = False
    return lent


def _put_back(shelf: MutableMapping[_K, list[_T]], key: _K, lent: _T) -> None:
    with _lock:
        shelf.setdefault(key, []).append(lent)
