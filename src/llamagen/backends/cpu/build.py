"""Compiles the kernels when they are first needed, and keeps the result.

A compiler for C is all it takes. Without one, or with ``LLAMAGEN_KERNELS=off``, everything works
with torch's operations, more slowly. ``LLAMAGEN_KERNEL_FLAGS`` has more flags for the compiler:
``-march=x86-64-v3`` compiles for a processor without AVX-512.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from llamagen.support import storage

_SOURCES = Path(__file__).parent
_STEP = _SOURCES / "step.c"
_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# The first set that a compiler takes: clang on macOS has no OpenMP, and old ones for ARM want
# -mcpu.
_VARIANTS = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], []]

_logger = logging.getLogger(__name__)


def compiled_library(*flags: str, source: Path = _STEP) -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be had; the reason is logged.

    ``flags`` go to the compiler behind its own; ``source`` may include the headers beside it.
    """
    if os.environ.get("LLAMAGEN_KERNELS", "").lower() in ("off", "0", "false"):
        return None
    flags = (*shlex.split(os.environ.get("LLAMAGEN_KERNEL_FLAGS", "")), *flags)
    try:
        return _load(source, flags)
    except (OSError, subprocess.SubprocessError) as error:
        _warn_once(f"computing without compiled kernels, which is slower: {_reason(error)}")
        return None


def _load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library from the cache, where it is stored after compiling it."""
    name = f"{source.stem}-{_fingerprint(source, flags)}"
    problem: Exception | None = None
    try:
        folder = storage.cache_folder() / "kernels"
        if stored := _intact_library(folder, name):
            return ctypes.CDLL(str(stored))
    except (OSError, RuntimeError) as error:
        problem = error
    with tempfile.TemporaryDirectory() as temporary:
        compiled = _compile(source, flags, Path(temporary))
        if problem is None:
            # Several processes may do this at once; the last one's file stays.
            path = folder / f"{name}-{_checksum(compiled)}.so"
            try:
                storage.write_bytes(path, compiled.read_bytes())
                return ctypes.CDLL(str(path))
            except OSError as error:
                problem = error
        library = ctypes.CDLL(str(compiled))
    _warn_once(
        f"compiled kernels cannot be kept, so that each start compiles them: {problem}; "
        f"LLAMAGEN_CACHE names another folder"
    )
    return library


def _intact_library(folder: Path, name: str) -> Path | None:
    """The library of this name whose content has the checksum in its file's name.

    Loading a file that a crash, a full disk or a copy has damaged would end the process.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{_checksum(path)}":
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _compile(source: Path, flags: tuple[str, ...], folder: Path) -> Path:
    """Compile the shared library into a folder."""
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError(
            "there is no compiler for C here; install gcc or clang, or name one in CC"
        )
    library = folder / "kernels.so"
    for variant in _VARIANTS:
        command = [compiler, *_FLAGS, *variant, *flags, f"-I{_SOURCES}", "-o", str(library)]
        done = subprocess.run(  # noqa: S603  the compiler that the user has or names
            [*command, str(source), "-lm"], capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode == 0:
            return library
    raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)


def _compiler() -> str | None:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _fingerprint(source: Path, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the flags and the processor: homes are shared by machines.

    Not with the compiler that is found: what one has compiled serves where there is none.
    """
    compiler = os.environ.get("CC", "")
    options = f"{compiler} {_FLAGS} {_VARIANTS} {flags} {platform.machine()} {_processor()}"
    files = (*sorted(_SOURCES.glob("*.h")), source)
    return storage.short_digest([*(file.read_bytes() for file in files), options.encode()])


def _processor() -> str:
    """Return the processor's instruction sets, or its name if the system does not list them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return f"{error.cmd[0]} does not compile them ({lines[0] if lines else error.returncode})"
    return str(error)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
