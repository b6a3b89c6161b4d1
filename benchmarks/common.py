"""Shared by all benchmarks: tables, and records with machine and date."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamagen.evaluation.speed import machine, median_and_spread, table, time_in_turn

__all__ = ["evenly", "machine", "median_and_spread", "print_table", "record", "time_in_turn"]

RESULTS = Path(__file__).parent / "results"


def evenly(count: int, limit: int) -> np.ndarray:
    """Return up to ``limit`` of ``count`` indices, spread evenly."""
    kept = min(count, limit)
    return np.arange(kept) * count // kept


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(table(header, rows))


def record(name: str, results: Any) -> None:
    """Write results, with machine and date, to ``results/``."""
    about = machine()
    path = RESULTS / f"{name}-{about['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")
    print(
        f"recorded in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"
    )
