"""What draws the codes of many clients' images: the engine's interface, and our own engine.

Our own is one thread that owns the model and a running batch. Between two codes it lets in what
waits, takes out what is finished or no longer wanted, and tells each client of its finished rows.
Scaling beyond one machine's device is vLLM's business (``llamagen.vllm_plugin``).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from llamagen.config import Grid, SamplingConfig
from llamagen.generation.memory import sampling_batch_size
from llamagen.generation.running_batch import Drawing, RunningBatch
from llamagen.models.transformer import Transformer
from llamagen.support.errors import NotFiniteError

_log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """An image could not be drawn, through no fault of who asked for it."""


class CodeEngine(Protocol):
    """Draws codes for whoever asks, many images at a time."""

    grid: Grid
    """Rows and columns of an image's codes."""
    max_images: int
    """Images drawn at once; more wait."""

    @property
    def alive(self) -> bool:
        """Whether it will draw anything again; no engine comes back to life."""
        ...

    def draw(
        self,
        condition: Tensor,
        *,
        seed: int,
        sampling: SamplingConfig,
        unconditional: Tensor | None = None,
        blend: Tensor | None = None,
        blend_share: float = 0.5,
        known: Tensor | None = None,
        request: Hashable = None,
    ) -> AsyncGenerator[list[int], None]:
        """One image's codes, as they come.

        Args:
            condition: a label (), or text features (C, text_dim) without padding.
            seed: the image's own.
            sampling: how its codes are drawn.
            unconditional: what guidance leads away from, as ``condition``.
            blend: a second condition, as ``condition``, whose logits are mixed with the first's.
            blend_share: how much it counts, from 0 to 1.
            known: (T,) codes that stay as they are, -1 where one is to be drawn.
            request: whose image it is; no request waits until another's images are all drawn.

        Yields:
            All codes so far, in raster order, when a row of the grid is finished; at last all.
            Closing the iterator ends the drawing.

        Raises:
            EngineError: the engine failed; it goes on with what comes next.
            InputError: the engine cannot do this, or the model cannot take a condition, the seed or
                the known codes.
            NotFiniteError: the model's logits are not finite.
        """
        ...

    async def close(self) -> None:
        """Ends everything that is being drawn, and frees what the engine holds."""
        ...


StepObserver = Callable[[int, int, float], None]
"""Told after each step: images, sequences, seconds."""


@dataclass(eq=False)
class _Ticket:
    """An image that someone waits for."""

    drawing: Drawing
    request: Hashable
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[list[int] | Exception] = field(default_factory=asyncio.Queue)
    unwanted: bool = False
    """Nobody waits any more."""


class NativeEngine:
    """Continuous batching on this process's model."""

    def __init__(
        self,
        model: Transformer,
        *,
        max_images: int | None = None,
        observer: StepObserver | None = None,
    ) -> None:
        """Starts the engine's thread.

        Args:
            model: in eval mode; from now on the engine's.
            max_images: images drawn at once; by default what memory allows.
            observer: told of every step, in the engine's thread.
        """
        self.grid = model.config.grid
        self.max_images = max_images or sampling_batch_size(model, guided=True)
        self._observer = observer
        self._changed = threading.Condition()
        """Guards what follows; notified when there is something to do."""
        self._waiting: dict[Hashable, deque[_Ticket]] = {}
        """Of each request, in the order in which the requests' turns come."""
        self._closing = False
        self._running: dict[Drawing, _Ticket] = {}
        """The engine's thread alone uses it."""
        self._batch = RunningBatch(model, self.max_images)
        self._thread = threading.Thread(target=self._run, name="llamagen-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """As ``CodeEngine.alive`` says."""
        return self._thread.is_alive()

    async def draw(
        self,
        condition: Tensor,
        *,
        seed: int,
        sampling: SamplingConfig,
        unconditional: Tensor | None = None,
        blend: Tensor | None = None,
        blend_share: float = 0.5,
        known: Tensor | None = None,
        request: Hashable = None,
    ) -> AsyncGenerator[list[int], None]:
        """As ``CodeEngine.draw`` says."""
        drawing = Drawing(condition, seed, sampling, unconditional, blend, blend_share, known)
        self._batch.check(drawing)
        ticket = _Ticket(drawing, request, asyncio.get_running_loop())
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            self._waiting.setdefault(request, deque()).append(ticket)
            self._changed.notify()
        codes: list[int] = []
        try:
            while len(codes) < self._batch.codes_per_image:
                news = await ticket.news.get()
                if isinstance(news, Exception):
                    raise news
                codes = news
                yield codes
        finally:
            ticket.unwanted = True
            with self._changed:
                self._changed.notify()

    async def close(self) -> None:
        """As ``CodeEngine.close`` says."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing:
                    break
                admitted = self._next_tickets()
            try:
                self._let_in(admitted)
                self._advance()
            # Whatever it was: those who wait are told, and the engine goes on.
            except Exception as error:  # noqa: BLE001
                _log.exception("a step of the engine failed")
                self._fail_all(admitted, error)
        self._close()

    def _next_tickets(self) -> list[_Ticket]:
        """Images to let in: one of each request in turn, as far as there is room."""
        for gone in [d for d, ticket in self._running.items() if ticket.unwanted]:
            self._batch.remove(gone)
            del self._running[gone]
        chosen: list[_Ticket] = []
        while self._waiting:
            request, tickets = next(iter(self._waiting.items()))
            wanted = [] if tickets[0].unwanted else [tickets[0]]
            joining = [*chosen, *wanted]
            if self._batch.room([ticket.drawing for ticket in joining]) < len(joining):
                break
            chosen = joining
            tickets.popleft()
            del self._waiting[request]
            if tickets:
                # Its next image comes after one of everybody else's.
                self._waiting[request] = tickets
        return chosen

    def _let_in(self, tickets: list[_Ticket]) -> None:
        if not tickets:
            return
        self._batch.add([ticket.drawing for ticket in tickets])
        self._running |= {ticket.drawing: ticket for ticket in tickets}
        self._tell()

    def _advance(self) -> None:
        if not self._running:
            return
        begun, images, sequences = time.perf_counter(), len(self._running), self._batch.sequences
        self._batch.step()
        self._tell()
        if self._observer is not None:
            self._observer(images, sequences, time.perf_counter() - begun)

    def _tell(self) -> None:
        """Tells of finished rows, and lets go of finished images."""
        columns = self.grid[1]
        finished = self._batch.finished()
        for drawing, ticket in self._running.items():
            if drawing.drawn % columns == 0:
                _send(ticket, _news(drawing, done=drawing in finished))
        for drawing in finished:
            del self._running[drawing]

    def _fail_all(self, admitted: list[_Ticket], error: Exception) -> None:
        for ticket in {*admitted, *self._running.values()}:
            failure = EngineError("the image could not be drawn")
            failure.__cause__ = error
            _send(ticket, failure)
        self._running = {}
        self._batch.clear()

    def _close(self) -> None:
        with self._changed:
            left = [ticket for tickets in self._waiting.values() for ticket in tickets]
            self._waiting = {}
        for ticket in [*left, *self._running.values()]:
            _send(ticket, EngineError("the engine is closed"))


def _news(drawing: Drawing, *, done: bool) -> list[int] | Exception:
    """What is told of an image: its codes so far."""
    assert drawing.codes is not None
    if done:
        try:
            drawing.check()
        except NotFiniteError as error:
            return error
    return drawing.codes[: drawing.drawn].tolist()


def _send(ticket: _Ticket, news: list[int] | Exception) -> None:
    try:
        ticket.loop.call_soon_threadsafe(ticket.news.put_nowait, news)
    except RuntimeError:
        # The client's event loop has ended: nobody is left to tell.
        ticket.unwanted = True
