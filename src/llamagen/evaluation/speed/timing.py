"""Repeated timings in turn, and their tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    progress: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Return seconds per call of each candidate, in the order A B A B ... so that drift hits all.

    Each is called once before, as a warm-up. ``progress`` is called after every call.
    """

    def timed(run: Callable[[], object]) -> float:
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        if progress is not None:
            progress()
        return time.perf_counter() - start

    for run in candidates.values():
        timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(timed(run))
    return seconds


def median_and_spread(values: Sequence[float], *, unit: float = 1.0) -> str:
    """Return the median, and the smallest and largest value, each times ``unit``."""
    low, high = min(values) * unit, max(values) * unit
    return f"{statistics.median(values) * unit:.1f} ({low:.1f}-{high:.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
