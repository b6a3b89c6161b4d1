"""Progress of long work, on the terminal of the main process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm

from llamagen import distributed


@contextlib.contextmanager
def bar(description: str, total: int, unit: str = "image") -> Iterator[Callable[[int], object]]:
    """Shows a progress bar of this process's share; yields what is told how much more is done."""
    # None: none where the output is no terminal.
    disable = None if distributed.is_main() else True
    with tqdm(total=total, desc=description, unit=unit, disable=disable) as shown:
        yield shown.update


def own_share(count: int, piece: int) -> int:
    """How many of ``count`` images, dealt out in pieces, this process has."""
    rank, world_size = distributed.rank(), distributed.world_size()
    starts = range(rank * piece, count, world_size * piece)
    return sum(min(piece, count - start) for start in starts)
