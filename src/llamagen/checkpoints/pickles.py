"""Reading .pt files without running what is in them, and without keeping them in memory."""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen.support.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
"""What torch.save's files begin with."""
PICKLE_MAGIC = b"\x80"
"""What they began with before torch 1.6."""


def load_pickle(path: Path, *, mapped: bool) -> Any:
    """What torch.save wrote to ``path``, on the CPU.

    Nothing but tensors, plain containers, numbers, strings and ``argparse.Namespace`` is built;
    no code of the file runs.

    Args:
        path: the file.
        mapped: leave tensors in the file until they are looked at; only files that begin with
            ``ZIP_MAGIC`` can do that.

    Raises:
        InputError: the file is damaged, or asks for anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise nearly anything.
        # EINVAL: it named a place outside of itself.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise InputError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked is not None:
        return (
            f"{path} was not loaded: it asks to run {asked[1].rstrip('.')}, which weights do not "
            f"need and which may harm this machine; get the file from its maker, best as "
            f".safetensors"
        )
    detail = " ".join(str(error).split()) or type(error).__name__
    if len(detail) > 120:
        detail = detail[:120] + "..."
    return f"{path} is truncated or not a checkpoint ({detail}); copy or download it again"


def release_pages(tensor: Tensor) -> None:
    """Frees the memory that a tensor of a mapped file takes; read again, it comes from the file.

    Pages of a mapping that were looked at stay in memory until the mapping ends, so that a file
    read from one end to the other would take its whole size. Where there is no madvise, it does.

    Only for tensors of ``load_pickle(..., mapped=True)`` that nobody has written to: anything but
    an unchanged part of a file would be lost.
    """
    if sys.platform != "linux":
        return
    storage = tensor.untyped_storage()
    # Whole pages only: a neighbour's would merely be read once more, but the call wants them.
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
