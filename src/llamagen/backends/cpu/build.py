"""Compiles the kernels when they are first needed, and keeps the result.

A compiler for C is all it takes. Without one, or with ``LLAMAGEN_KERNELS=off``, everything works
with torch's operations, more slowly. ``LLAMAGEN_KERNEL_FLAGS`` has more flags for the compiler:
``-march=x86-64-v3`` compiles for a processor without AVX-512.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
_DECODE = _SOURCES / "decode.c"
_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# The first set that a compiler takes: clang on macOS has no OpenMP, and old ones for ARM want
# -mcpu.
_VARIANTS = [["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], []]

_logger = logging.getLogger(__name__)


def compiled_library(*flags: str, source: Path = _DECODE) -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; why is logged.

    Args:
        flags: more of them for the compiler, behind its own.
        source: what is compiled; it may include the headers that lie beside this file.
    """
    if os.environ.get("LLAMAGEN_KERNELS", "").lower() in ("off", "0", "false"):
        return None
    flags = (*shlex.split(os.environ.get("LLAMAGEN_KERNEL_FLAGS", "")), *flags)
    compiler = _compiler()
    if compiler is None:
        _logger.warning(
            "decoding without its kernels, which is slower: there is no compiler for C here; "
            "install gcc or clang, or name one in CC"
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, source, flags)))
    except (OSError, subprocess.SubprocessError) as error:
        _logger.warning("decoding without its kernels, which is slower: %s", _reason(error))
        return None


def cache_folder() -> Path:
    """What outlives a process: ``LLAMAGEN_CACHE``, else ``llamagen`` in the user's cache."""
    own = os.environ.get("LLAMAGEN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen"


def _compiled(compiler: str, source: Path, flags: tuple[str, ...]) -> Path:
    """The shared library, compiled now if it was not before."""
    path = cache_folder() / "kernels" / f"{source.stem}-{_fingerprint(compiler, source, flags)}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for number, variant in enumerate(_VARIANTS, start=1):
            command = [compiler, *_FLAGS, *variant, *flags, f"-I{_SOURCES}", "-o", str(made)]
            command += [str(source), "-lm"]
            done = subprocess.run(  # noqa: S603  the compiler that the user has or names
                command, capture_output=True, text=True, timeout=120, check=False
            )
            if done.returncode == 0:
                break
            if number == len(_VARIANTS):
                raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
        # Several processes may do this at once; the last one's file stays.
        made.replace(path)
    return path


def _compiler() -> str | None:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _fingerprint(compiler: str, source: Path, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the compiler and the processor: homes are shared by machines."""
    digest = hashlib.sha256()
    for read in (*sorted(_SOURCES.glob("*.h")), source):
        digest.update(read.read_bytes())
    digest.update(f"{compiler} {_FLAGS} {_VARIANTS} {flags} {platform.machine()}".encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What a processor can do, where the system says it."""
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
