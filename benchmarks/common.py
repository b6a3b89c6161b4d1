"""What all benchmarks share: repeated timings in turn, a description of the machine, a record."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and software that a number was measured with."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Model name and the instruction sets that decide the speed of bfloat16 and int8."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = dict(
        (part.strip() for part in line.split(":", 1))
        for line in info.read_text().splitlines()
        if ":" in line
    )
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    found = [flag for flag in wanted if flag in lines.get("flags", "").split()]
    family = f"family {lines.get('cpu family')} model {lines.get('model')}"
    return f"{lines.get('model name', '')} ({family}; {', '.join(found)})"


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, measured A B A B ... so that drift hits all alike."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_and_spread(values: Sequence[float], *, unit: float = 1.0) -> str:
    """The median, and the smallest and largest value."""
    low, high = min(values) * unit, max(values) * unit
    return f"{statistics.median(values) * unit:.1f} ({low:.1f}-{high:.1f})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def record(name: str, results: Any) -> None:
    """Keeps results, with machine and date, in ``results/``."""
    about = machine()
    path = RESULTS / f"{name}-{about['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")
    print(
        f"recorded in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"
    )
