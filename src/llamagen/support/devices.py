"""Choice of device and precision, copies from a GPU, and memory."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
import timeit
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from llamagen.support.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Numbers of options in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_WORTH_IT = 1.5
"""Speedup from which bfloat16 is used on a CPU, at the cost of precision."""


def find_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device by name, or InputError; "auto" is CUDA, else MPS, else the CPU."""
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}; use auto, cpu, cuda or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not there: this torch ({torch.__version__}) sees "
            f"{torch.cuda.device_count()} CUDA devices; use `device` cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps is not there; use `device` cpu")
    return device


def find_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return a precision by name, or InputError; "auto" or None is bfloat16 where that is fast."""
    if isinstance(name, torch.dtype):
        return name
    if name in (None, "auto"):
        return _fast_dtype(device)
    if name not in DTYPES:
        raise InputError(f"there is no precision {name!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def keep_freed_memory() -> None:
    """Make this process keep the memory of freed tensors for new ones (glibc only).

    Otherwise glibc returns blocks of more than 32 MB to the system at once, and gets new ones page
    by page: on a CPU a fifth of the time of encoding, a tenth of that of a training step. It works
    in the main thread only, and raises the peak of memory by a fifth.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        # What torch holds but does not use counts as free.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


def copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU; return a function that waits for the copy only.

    A GPU can compute in the meantime. On other devices the function makes the copy.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    tensor = tensor.contiguous()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


@functools.cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == "mps":
        return torch.float16
    # bfloat16 is several times faster than float32 with instructions for it, and much slower
    # without. Instruction sets do not tell what torch uses; a product of a few milliseconds does.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single, half = (_matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    return torch.bfloat16 if single > _WORTH_IT * half else torch.float32


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Return the best time of a product the size of a transformer's layer, on one thread."""
    a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    # The thread's CPU time, which other processes hardly change.
    return min(timeit.repeat(lambda: a @ b, timer=time.thread_time, repeat=10, number=1))
