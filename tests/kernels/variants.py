"""The kernels as other processors have them, as far as this one can run them."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import pytest

from llamagen.kernels import Kernels
from llamagen.kernels.build import compiled_library

# Name -> flags of the compiler, what the processor must have, and what must then be compiled.
_VARIANTS: dict[str, tuple[tuple[str, ...], set[str], set[str] | None]] = {
    "native": ((), set(), None),
    "tiles": (("-DEMULATED_TILES",), set(), None),
    "avx512 with bfloat16": (
        ("-mno-amx-tile",),
        {"avx512_bf16", "avx512_vnni"},
        {"pairs", "words", "threads"},
    ),
    "avx512": (("-march=skylake-avx512",), {"avx512bw"}, {"threads"}),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma"}, {"threads"}),
    "sse2": (("-march=x86-64",), {"sse2"}, {"threads"}),
    "one thread": (("-fno-openmp",), set(), None),
}
VARIANTS = tuple(_VARIANTS)


@functools.cache
def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        return set()
    lines = info.read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split())


@functools.cache
def kernels_of(name: str) -> Kernels:
    """The kernels compiled for a kind of processor; skips the test where they cannot be had."""
    flags, needed, features = _VARIANTS[name]
    if not needed <= _flags():
        pytest.skip(f"this processor has no {', '.join(sorted(needed - _flags()))}")
    library = compiled_library(*flags)
    if library is None:
        pytest.skip("needs a compiler for C")
    kernels = Kernels(library)
    assert features is None or kernels.features == features
    return kernels
