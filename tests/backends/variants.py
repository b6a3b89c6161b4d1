"""The kernels as other processors have them, as far as this one can run them."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import pytest

from llamagen.backends.cpu import build
from llamagen.backends.cpu.library import Kernels

_EMULATED_AVX512 = (
    *(f"-I{Path(__file__).parent / 'emulated'}", "-DEMULATE_AVX512", "-march=x86-64-v3", "-O1"),
    *(f"-D__AVX512{part}__" for part in ("F", "BW", "VL", "VNNI", "BF16")),
)
_EMULATED_AMX = tuple(f"-D__AMX_{part}__" for part in ("TILE", "BF16", "INT8"))

# Name -> flags of the compiler, what the processor must have, and what must then be compiled.
_VARIANTS: dict[str, tuple[tuple[str, ...], set[str], set[str] | None]] = {
    "native": ((), set(), None),
    "emulated amx": (
        (*_EMULATED_AVX512, *_EMULATED_AMX),
        {"avx2", "fma"},
        {"avx512_bf16", "amx", "vnni", "threads"},
    ),
    "avx512_bf16": (
        ("-mno-amx-tile",),
        {"avx512_bf16", "avx512_vnni"},
        {"avx512_bf16", "vnni", "threads"},
    ),
    "emulated avx512_bf16": (
        _EMULATED_AVX512,
        {"avx2", "fma"},
        {"avx512_bf16", "vnni", "threads"},
    ),
    "avx512": (("-march=skylake-avx512",), {"avx512bw"}, {"threads"}),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma"}, {"threads"}),
    "sse2": (("-march=x86-64",), {"sse2"}, {"threads"}),
    # The same code as "native", so that it need not be optimised once more.
    "one thread": (("-fno-openmp", "-O1"), set(), None),
}


@functools.cache
def processor_flags() -> set[str]:
    """Return the instruction sets of this processor, as Linux names them."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        return set()
    lines = info.read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split())


def _repeats_another(name: str) -> bool:
    """Whether this processor runs the same code by itself: as "native", or not emulated."""
    flags = processor_flags()
    kinds = {"amx": {"amx_tile"}, **{kind: needed for kind, (_, needed, _) in _VARIANTS.items()}}
    if name.startswith("emulated "):
        return kinds[name.removeprefix("emulated ")] <= flags
    best = ("amx", "avx512_bf16", "avx512", "avx2", "sse2")
    return name == next((kind for kind in best if kinds[kind] <= flags), None)


VARIANTS = [
    pytest.param(name, marks=[pytest.mark.slow] if _repeats_another(name) else [])
    for name in _VARIANTS
]


def present(found):
    """What was compiled. Skips the test where nothing can be, but not where nothing was."""
    if found is not None:
        return found
    if build._compiler() is None or os.environ.get("LLAMAGEN_KERNELS"):
        pytest.skip("needs a compiler for C")
    pytest.fail("the compiler that is here does not compile the kernels")


@functools.cache
def kernels_of(name: str) -> Kernels:
    """The kernels compiled for a kind of processor; skips the test where they cannot be had."""
    flags, needed, features = _VARIANTS[name]
    if not needed <= processor_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(needed - processor_flags()))}")
    kernels = Kernels(present(build.compiled_library(*flags)))
    assert features is None or kernels.features == features
    return kernels
