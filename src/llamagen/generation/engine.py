"""What generates codes: the engine's interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llamagen.config import Grid
from llamagen.generation.request import GenerationRequest


class EngineError(RuntimeError):
    """An image could not be generated, through no fault of who asked for it."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A finished row of the grid, in one batch of a call."""

    first: int
    """Index of the batch's first image among the call's images."""
    row: int
    """Finished rows of the grid, from 1."""
    rows: int
    """Rows of the grid."""
    codes: Tensor
    """(images of the batch, rows, columns) int64; unfinished rows are zero."""


ProgressCallback = Callable[[Progress], None]
"""Called after each finished row of a batch. An exception from it ends the generation."""


class Engine(Protocol):
    """Generates codes of requests, many images at a time."""

    name: str
    """As users choose it: "native" or "vllm"."""
    grid: Grid
    """Rows and columns of an image's codes."""
    max_images: int
    """Images generated at once by ``stream``; more wait."""

    @property
    def alive(self) -> bool:
        """Whether it will generate anything again; no engine comes back to life."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """Raise InputError if the model or this engine cannot do what ``request`` asks for."""
        ...

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Generate the codes of all requests; return (images, rows, columns) int64.

        Args:
            requests: one per image.
            batch_size: images generated at once; by default as many as memory allows.
            on_progress: called after each finished row of a batch.

        Raises:
            InputError: a request is not one that the model or the engine can take.
            NotFiniteError: the model's logits are not finite.
        """
        ...

    def stream(
        self, request: GenerationRequest, *, client: Hashable = None
    ) -> AsyncGenerator[list[int], None]:
        """Generate one image's codes, for servers.

        Args:
            request: the image.
            client: whose image it is; no client waits until another's images are all generated.

        Yields:
            All codes so far, in raster order, when a row of the grid is finished; at last all.
            Closing the iterator ends the generation.

        Raises:
            EngineError: the engine failed; it goes on with what comes next.
            InputError: as ``check``.
            NotFiniteError: the model's logits are not finite.
        """
        ...

    async def close(self) -> None:
        """End everything that is being generated, and free what the engine holds."""
        ...
