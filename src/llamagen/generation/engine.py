"""The engines' interface, and our own engine.

It generates in the caller's thread, or for servers in one of its own that owns a running batch:
between two steps it admits what waits, takes out what is finished or no longer wanted, and
publishes finished rows. Scaling beyond one device is vLLM's business (``llamagen.vllm_plugin``).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llamagen.backends import StepTimes
from llamagen.config import Grid
from llamagen.generation.batch import Batch, GenerationState
from llamagen.generation.memory import sampling_batch_size
from llamagen.generation.request import UNKNOWN, GenerationRequest, check_request
from llamagen.generation.schedules import codes_per_pass
from llamagen.models.pretrained import eval_mode
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError, NotFiniteError

_log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """An image could not be generated, through no fault of who asked for it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A finished row of the grid, in one batch of a call."""

    first: int
    """Index of the batch's first image among the call's images."""
    row: int
    """Rows of the grid that are finished, or as many codes in any order, from 1."""
    rows: int
    """Rows of the grid."""
    codes: Tensor
    """(images of the batch, rows, columns) int64; zero where ``drawn`` is False."""
    drawn: Tensor
    """(images of the batch, rows, columns) bool: the codes that are final."""


def progress_of(codes: Tensor, first: int, row: int) -> Progress:
    """Return the progress of images with ``codes`` (images, rows, columns), or ``UNKNOWN``."""
    drawn = codes != UNKNOWN
    return Progress(first=first, row=row, rows=codes.shape[1], codes=codes * drawn, drawn=drawn)


def refuse_edits(request: GenerationRequest, engine: str) -> None:
    """Raise InputError for what only our own engine does; ``engine`` is the other one's name."""
    for name in ("known_codes", "blend", "window"):
        if getattr(request, name) is not None:
            raise InputError(
                f"{engine} samples all codes one by one, without blending; {name} goes with engine "
                f"'native'"
            )


ProgressCallback = Callable[[Progress], None]
"""Called after each finished row of a batch. An exception from it ends the generation."""


class Engine(Protocol):
    """Generates codes of requests, many images at a time."""

    name: str
    """The name by which users choose it."""
    grid: Grid
    """Rows and columns of an image's codes."""
    can_edit: bool
    """Whether requests may have known codes, a blend or a window."""
    copies_model: bool
    """Whether it computes with weights of its own, in processes that it starts."""

    def __init__(self, model: Transformer, **options: Any) -> None: ...

    @property
    def max_images(self) -> int:
        """Images generated at once by ``stream``; more wait."""

    @property
    def alive(self) -> bool:
        """Whether it will generate anything again; no engine comes back to life."""

    def check(self, request: GenerationRequest) -> None:
        """Raise InputError if the model or this engine cannot do what ``request`` asks for."""

    def batch_size(self, requests: Sequence[GenerationRequest]) -> int:
        """Return how many of some requests to generate at once."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Generate an image's codes per request; return (images, rows, columns) int64.

        ``batch_size`` images are generated at once, by default as many as memory allows.
        Raises InputError, before the first image, as ``check``, and NotFiniteError if the model's
        logits are not finite.
        """

    def stream(
        self, request: GenerationRequest, *, client: Hashable = None
    ) -> AsyncGenerator[list[int], None]:
        """Generate one image's codes, for servers; closing the iterator ends the generation.

        Yields all codes in raster order, ``UNKNOWN`` where they are not final, when as many more
        are final as a row of the grid has; at last all. No ``client`` waits until another's images
        are all generated. Raises as ``generate``, and EngineError if the engine failed, which then
        goes on with what comes next.
        """

    async def close(self) -> None:
        """End everything that is being generated, and free what the engine holds."""

    def shutdown(self) -> None:
        """As ``close``, for programs without an event loop."""


StepObserver = Callable[[int, int, float], None]
"""Called after each step with images, sequences and seconds."""


@dataclass(eq=False)
class _Handle:
    """A request that someone waits for."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[list[int] | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def send(self, update: list[int] | Exception) -> None:
        """Publish an update, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.updates.put_nowait, update)
        except RuntimeError:
            # The client's event loop has ended: nobody is left to be told.
            self.cancelled = True


class NativeEngine:
    """Generates with this process's model."""

    name = "native"
    can_edit = True
    copies_model = False

    def __init__(
        self,
        model: Transformer,
        *,
        max_images: int | None = None,
        grid: Grid | None = None,
        observer: StepObserver | None = None,
        times: StepTimes | None = None,
    ) -> None:
        """Prepare to generate with ``model`` in eval mode; it has its own mode again afterwards.

        ``stream`` generates ``max_images`` at once, by default what memory allows, and calls
        ``observer`` after each step, in the engine's thread. The grid is by default the model's.
        Where the time of ``generate`` goes is added to ``times``.
        """
        self.model = model
        self.grid = grid or model.config.grid
        self._max_images = max_images
        self._batch_limit = sys.maxsize
        """Images of a batch, once a larger one has overflowed the memory."""
        self._observer, self._times = observer, times
        self._changed = threading.Condition()
        """Guards what follows; notified when there is something to do."""
        self._waiting: dict[Hashable, deque[_Handle]] = {}
        """Of each client, in the order in which the clients' turns come."""
        self._closing = False
        self._thread: threading.Thread | None = None
        self._modes = contextlib.ExitStack()
        """Closed when the thread has ended."""
        self._running: dict[GenerationState, _Handle] = {}
        """Used by the engine's thread only, as ``_batch``."""
        self._batch: Batch | None = None

    @functools.cached_property
    def max_images(self) -> int:
        """See ``Engine``."""
        return self._max_images or sampling_batch_size(self.model, sequences=2)

    @property
    def alive(self) -> bool:
        """See ``Engine``."""
        return not self._closing and (self._thread is None or self._thread.is_alive())

    def check(self, request: GenerationRequest) -> None:
        """See ``Engine``."""
        check_request(request, self.model, self.grid)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Tensor:
        """See ``Engine``; codes are on the model's device.

        A batch that overflows the GPU's memory is halved, and so are those after it.
        """
        for request in requests:
            self.check(request)
        rows, columns = self.grid
        if not requests:
            return torch.zeros(0, rows, columns, dtype=torch.int64)
        size = min(batch_size or self.batch_size(requests), self._batch_limit)
        found: list[Tensor] = []
        while (first := sum(map(len, found))) < len(requests):
            part = requests[first : first + size]
            try:
                with eval_mode(self.model):
                    found.append(self._generate_batch(part, first, on_progress))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = self._batch_limit = max(1, len(part) // 2)
                _log.warning("out of GPU memory; going on with batches of %d", size)
        return torch.cat(found).view(-1, rows, columns)

    def batch_size(self, requests: Sequence[GenerationRequest]) -> int:
        """See ``Engine``."""
        order, total = self.model.config.order, self.grid[0] * self.grid[1]
        size = sampling_batch_size(
            self.model,
            sequences=max(request.sequences for request in requests),
            condition_length=max(request.condition_length for request in requests),
            window=max(codes_per_pass(request, order, total) for request in requests),
        )
        return min(size, self._batch_limit)

    def _generate_batch(
        self, requests: Sequence[GenerationRequest], first: int, callback: ProgressCallback | None
    ) -> Tensor:
        rows, columns = self.grid
        batch = Batch(
            self.model,
            len(requests),
            max_sequences=sum(request.sequences for request in requests),
            condition_length=max(request.condition_length for request in requests),
            grid=self.grid,
            times=self._times,
        )
        images = batch.add(requests)
        for row in range(1, rows + 1):
            while min(image.final for image in images) < row * columns:
                batch.step()
            if callback is not None:
                codes = batch.codes_of(images, row * columns).view(-1, rows, columns)
                callback(progress_of(codes, first, row))
        batch.check_finite(images)
        return batch.codes_of(images, batch.total)

    async def stream(
        self, request: GenerationRequest, *, client: Hashable = None
    ) -> AsyncGenerator[list[int], None]:
        """See ``Engine``."""
        handle = _Handle(request, asyncio.get_running_loop())
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            self.start()
            assert self._batch is not None
            self._batch.check(request)
            self._waiting.setdefault(client, deque()).append(handle)
            self._changed.notify()
        codes = [UNKNOWN]
        try:
            while UNKNOWN in codes:
                update = await handle.updates.get()
                if isinstance(update, Exception):
                    raise update
                codes = update
                yield codes
        finally:
            handle.cancelled = True
            with self._changed:
                self._changed.notify()

    async def close(self) -> None:
        """See ``Engine``."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """See ``Engine``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._modes.close()

    def start(self) -> None:
        """Allocate the batch and start the thread that serves ``stream``, unless it runs."""
        if self._thread is None:
            self._modes.enter_context(eval_mode(self.model))
            self._batch = Batch(self.model, self.max_images, grid=self.grid)
            self._thread = threading.Thread(
                target=self._run, args=(self._batch,), name="llamagen-engine", daemon=True
            )
            self._thread.start()

    def _run(self, batch: Batch) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._closing:
                    break
                admitted = self._next_handles(batch)
            try:
                if admitted:
                    joined = batch.add([handle.request for handle in admitted])
                    self._running |= dict(zip(joined, admitted, strict=True))
                    self._publish(batch)
                if self._running:
                    self._advance(batch)
            # Whatever it was: those who wait are told, and the engine goes on.
            except Exception as error:  # noqa: BLE001
                _log.exception("a step of the engine failed")
                for handle in {*admitted, *self._running.values()}:
                    failure = EngineError("the image could not be generated")
                    failure.__cause__ = error
                    handle.send(failure)
                self._running = {}
                batch.clear()
        with self._changed:
            waiting, self._waiting = self._waiting, {}
        for handle in itertools.chain(*waiting.values(), self._running.values()):
            handle.send(EngineError("the engine is closed"))

    def _next_handles(self, batch: Batch) -> list[_Handle]:
        """Requests to admit: one of each client in turn, as far as there is capacity."""
        for gone in [image for image, handle in self._running.items() if handle.cancelled]:
            batch.remove(gone)
            del self._running[gone]
        chosen: list[_Handle] = []
        while self._waiting:
            client, handles = next(iter(self._waiting.items()))
            joining = chosen if handles[0].cancelled else [*chosen, handles[0]]
            if not batch.has_capacity([handle.request for handle in joining]):
                break
            chosen = joining
            handles.popleft()
            del self._waiting[client]
            if handles:
                # Its next image comes after one of everybody else's.
                self._waiting[client] = handles
        return chosen

    def _advance(self, batch: Batch) -> None:
        start, images, sequences = time.perf_counter(), len(self._running), batch.sequences
        batch.step()
        self._publish(batch)
        if self._observer is not None:
            self._observer(images, sequences, time.perf_counter() - start)

    def _publish(self, batch: Batch) -> None:
        """Publish finished rows, and take finished images out."""
        columns = self.grid[1]
        for image, handle in list(self._running.items()):
            finished = image.final // columns
            if finished > image.published_rows:
                image.published_rows, count = finished, finished * columns
                try:
                    if image.is_finished:
                        batch.check_finite([image])
                    handle.send(batch.codes_of([image], count)[0].tolist())
                except NotFiniteError as error:
                    handle.send(error)
            if image.is_finished:
                batch.remove(image)
                del self._running[image]
