"""The machine and its limits."""

from __future__ import annotations

import datetime as dt
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""On a GPU enough that its cache and the time of a launch do not matter."""
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
_TRIES = 7


def machine() -> dict[str, Any]:
    """Return the machine and software of a measurement, for its record."""
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


@dataclass(frozen=True)
class MachineLimits:
    """Rates of a device that no way of decoding can exceed."""

    bytes_per_second: float
    """Of reading memory."""
    operations_per_second: float
    """Multiplications and additions of a large matrix product."""

    def seconds(self, *, read: float, operations: float) -> float:
        """Return the minimum time to read so many bytes and compute so much, side by side."""
        return max(read / self.bytes_per_second, operations / self.operations_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype) -> MachineLimits:
    """Time a sum over 256 MB (on a GPU 2 GB) and a matrix product; the best of several tries."""
    count = _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    size = _PRODUCT_SIZE.get(device.type, _PRODUCT_SIZE["cpu"])
    numbers = torch.ones(count // 4, device=device)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    read = _best_seconds(device, numbers.sum)
    product = _best_seconds(device, lambda: matrix @ matrix)
    return MachineLimits(count / read, 2 * size**3 / product)


def _best_seconds(device: torch.device, run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _processor() -> str:
    """Model name and the instruction sets that decide the speed of bfloat16 and int8."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    pairs = (line.partition(":") for line in info.read_text().splitlines())
    lines = {name.strip(): value.strip() for name, _, value in pairs}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    found = [flag for flag in wanted if flag in lines.get("flags", "").split()]
    family = f"family {lines.get('cpu family')} model {lines.get('model')}"
    return f"{lines.get('model name', '')} ({family}; {', '.join(found)})"
