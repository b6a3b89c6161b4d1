"""The compiled kernels as Python sees them: structures, functions with types, and pointers.

The structures mirror those of ``matmul.h``, ``step.c`` and ``sampling.h``, field by field.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from ctypes import byref, c_int32, c_void_p
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from llamagen.backends.cpu.build import compiled_library

WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""``Matrix.type``."""
MAX_CODES = 1 << 20
"""Largest codebook: sampling has a fixed amount of memory for sums."""
MAX_HEAD_DIM = 256
OUTPUTS = 16
"""Outputs of a matrix are a multiple of it."""
INPUTS = 32
"""Inputs of a matrix are a multiple of it."""


def fields(*groups: tuple[Any, str]) -> tuple[tuple[str, Any], ...]:
    """Return the ``_fields_`` of a structure from types, each with the names of its fields."""
    return tuple((name, kind) for kind, names in groups for name in names.split())


class Struct(ctypes.Structure):
    """A structure that refuses integers that do not fit, of which ctypes keeps the lower bits."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, int) and (getattr(self, name) or 0) != value:
            raise OverflowError(f"{name} is {value}, which the kernels cannot count")


class Matrix(Struct):
    """Weights (outputs, inputs) where they are."""

    _fields_ = fields((c_void_p, "data scales"), (c_int32, "type outputs inputs"))


class Layer(Struct):
    """Weights of one block."""

    _fields_ = fields(
        (c_void_p, "attention_norm ffn_norm q_norm k_norm"), (Matrix, "qkv out gate up down")
    )


class Model(Struct):
    """Sizes and weights of a transformer."""

    _fields_ = fields(
        (c_int32, "layers width hidden heads kv_heads head_dim codes is_bf16"),
        (ctypes.c_float, "eps"),
        (ctypes.POINTER(Layer), "layer"),
        (c_void_p, "norm"),
        (Matrix, "output"),
    )


class Step(Struct):
    """Tokens of a step, the cache, and memory for logits and scratch."""

    _fields_ = fields(
        (c_int32, "rows sequences threads outputs"),
        (c_void_p, "embeddings positions cells starts slots wanted rope"),
        (ctypes.POINTER(c_void_p), "keys values key_scales value_scales"),
        (ctypes.c_int64, "slot_stride head_stride"),
        (c_void_p, "logits scratch seconds"),
    )


SAMPLING_ROW = np.dtype(
    list(
        fields(
            (np.uintp, "conditional unconditional"),
            (np.float32, "guidance_scale temperature top_p min_p"),
            (np.int32, "top_k"),
            (np.float64, "uniform"),
            (np.int64, "code"),
            (np.int32, "finite"),
        )
    ),
    align=True,
)
"""Addresses of a row's logits (0 without unconditional ones), its settings, and the code."""


class Scratch(threading.local):
    """Memory of each thread. It is kept: fresh memory costs as much as the computation in it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def address(self, size: int) -> int:
        """Return where ``size`` bytes of it begin, whose content is arbitrary."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return address(self._memory, torch.uint8, self._memory.shape)


class Kernels:
    """The functions of the compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._scratch = Scratch()
        library.step_scratch.restype = library.sampling_scratch.restype = ctypes.c_size_t
        found, names = int(library.cpu_features()), ("avx512_bf16", "amx", "vnni", "threads")
        self.features = {name for bit, name in enumerate(names) if found >> bit & 1}
        """Instruction sets that the kernels use, and "threads" if they use several."""

    def run_step(self, model: Model, step: Step, positions: int) -> None:
        """Compute the logits, and store the keys and values of what is fed.

        Sequences have up to ``positions``.
        """
        library = self._library
        size = library.step_scratch(byref(model), step.rows, c_int32(positions), step.threads)
        step.scratch = self._scratch.address(size)
        library.run_step(byref(model), byref(step))

    def sample_codes(self, rows: np.ndarray, codes: int, threads: int) -> None:
        """Fill ``code`` and ``finite`` of ``rows`` (N,) of type ``SAMPLING_ROW``."""
        scratch = self._scratch.address(self._library.sampling_scratch(codes, threads))
        start = address(rows, SAMPLING_ROW, rows.shape)
        self._library.sample_codes(c_void_p(start), len(rows), codes, threads, c_void_p(scratch))


@functools.cache
def load_kernels() -> Kernels | None:
    """Return the kernels for this machine, compiled on the first call.

    None without a compiler or with ``LLAMAGEN_KERNELS=off``.
    """
    library = compiled_library()
    return None if library is None else Kernels(library)


def address(
    buffer: Tensor | np.ndarray,
    dtype: torch.dtype | DTypeLike,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
) -> int:
    """Return where a buffer begins. Every pointer that the kernels get is from here.

    They check nothing, so this does: type, shape, that the memory is the CPU's, and that a tensor
    has the given strides or the buffer is contiguous.
    """
    if isinstance(buffer, Tensor):
        device, start = buffer.device.type, buffer.data_ptr()
        fits = buffer.is_contiguous() if strides is None else buffer.stride() == tuple(strides)
    else:
        device, start = "cpu", buffer.__array_interface__["data"][0]
        fits = strides is None and buffer.flags.c_contiguous
    if buffer.dtype != dtype or buffer.shape != tuple(shape) or device != "cpu":
        raise ValueError(
            f"a buffer is {tuple(buffer.shape)} {buffer.dtype} on {device}, expected "
            f"{tuple(shape)} {dtype} on a CPU"
        )
    if not fits:
        raise ValueError(f"a buffer has gaps, expected {strides or 'contiguous memory'}")
    return start


def row_addresses(matrix: Tensor, dtype: torch.dtype, width: int) -> np.ndarray:
    """Return where the rows of a matrix (N, width) begin, (N,); each row is contiguous."""
    stride = matrix.stride(0)
    start = address(matrix, dtype, (len(matrix), width), (stride, 1))
    return np.uintp(start) + np.arange(len(matrix), dtype=np.uintp) * np.uintp(
        stride * matrix.itemsize
    )


def check_indices(values: np.ndarray, count: int, low: int, end: int, name: str) -> None:
    """Raise ValueError unless ``values`` are ``count`` integers from ``low`` to below ``end``."""
    if values.shape != (count,) or values.dtype.kind != "i":
        raise ValueError(f"{name} are {values.shape} {values.dtype}, expected {count} integers")
    if count and not (low <= values.min() and values.max() < end):
        raise ValueError(
            f"{name} run from {values.min()} to {values.max()}, expected {low} to {end - 1}"
        )
