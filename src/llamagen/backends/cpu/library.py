"""The compiled kernels as Python sees them: structures, and functions with types.

The structures mirror those of ``matmul.h``, ``step.c`` and ``sampling.h``, field by field.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from llamagen.backends.cpu.build import compiled_library

FLOAT32, BFLOAT16, INT8 = range(3)

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


class Matrix(ctypes.Structure):
    """Weights (outputs, inputs) where they are."""

    _fields_ = fields((c_void_p, "data scales"), (c_int32, "type outputs inputs"))


class Layer(ctypes.Structure):
    """Weights of one block."""

    _fields_ = fields(
        (c_void_p, "attention_norm ffn_norm q_norm k_norm"), (Matrix, "qkv out gate up down")
    )


class Model(ctypes.Structure):
    """Sizes and weights of a transformer."""

    _fields_ = fields(
        (c_int32, "layers width hidden heads kv_heads head_dim codes is_bf16"),
        (ctypes.c_float, "eps"),
        (ctypes.POINTER(Layer), "layer"),
        (c_void_p, "norm"),
        (Matrix, "output"),
    )


class Step(ctypes.Structure):
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


class Kernels:
    """The functions of the compiled library. Their memory is the caller's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.step_scratch.restype = ctypes.c_size_t
        library.sampling_scratch.restype = ctypes.c_size_t

    @property
    def features(self) -> frozenset[str]:
        """Instruction sets that the kernels use, and "threads" if they use several."""
        found = int(self._library.cpu_features())
        names = ("avx512_bf16", "amx", "vnni", "threads")
        return frozenset(name for bit, name in enumerate(names) if found >> bit & 1)

    def scratch_bytes(self, model: Model, rows: int, positions: int, threads: int) -> int:
        """Bytes of ``Step.scratch`` for ``rows`` tokens that attend to up to ``positions``."""
        return int(self._library.step_scratch(ctypes.byref(model), rows, positions, threads))

    def run_step(self, model: Model, step: Step) -> None:
        """Compute the logits, and store the keys and values of what is fed."""
        self._library.run_step(ctypes.byref(model), ctypes.byref(step))

    def sampling_scratch_bytes(self, codes: int, threads: int) -> int:
        """Bytes of scratch that sampling takes."""
        return int(self._library.sampling_scratch(codes, threads))

    def sample_codes(self, rows: np.ndarray, codes: int, threads: int, scratch: Tensor) -> None:
        """Fill ``code`` and ``finite`` of ``rows`` (N,) of type ``SAMPLING_ROW``."""
        self._library.sample_codes(
            c_void_p(array_address(rows, SAMPLING_ROW, rows.shape)),
            len(rows),
            codes,
            threads,
            c_void_p(scratch.data_ptr()),
        )


@functools.cache
def load_kernels() -> Kernels | None:
    """Return the kernels for this machine, compiled on the first call.

    None without a compiler or with ``LLAMAGEN_KERNELS=off``.
    """
    library = compiled_library()
    return None if library is None else Kernels(library)


def address(
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
) -> int:
    """Return where a tensor begins, for the kernels.

    They check nothing, so this does: its type and shape, and that it is contiguous or has the given
    strides, in the memory of the CPU.
    """
    if tensor.dtype != dtype or tensor.shape != tuple(shape) or tensor.device.type != "cpu":
        raise ValueError(
            f"a tensor is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected "
            f"{tuple(shape)} {dtype} on a CPU"
        )
    fits = tensor.is_contiguous() if stride is None else tensor.stride() == tuple(stride)
    if not fits:
        raise ValueError(
            f"strides are {tensor.stride()}, expected {stride or 'those as allocated'}"
        )
    return tensor.data_ptr()


def array_address(array: np.ndarray, dtype: DTypeLike, shape: Sequence[int]) -> int:
    """Return where an array of NumPy's begins; see ``address``."""
    if array.dtype != dtype or array.shape != tuple(shape) or not array.flags.c_contiguous:
        raise ValueError(
            f"an array is {array.shape} {array.dtype}, expected contiguous {tuple(shape)} "
            f"{np.dtype(dtype)}"
        )
    return int(array.ctypes.data)


def row_addresses(matrix: Tensor, rows: np.ndarray) -> np.ndarray:
    """Return where rows of a matrix begin, as unsigned integers.

    Each row is contiguous; ``rows`` must have been checked.
    """
    stride = matrix.stride(0)
    start = address(matrix, matrix.dtype, matrix.shape, (stride, 1))
    return np.uintp(start) + rows.astype(np.uintp) * np.uintp(stride * matrix.itemsize)


def check_indices(values: np.ndarray, count: int, low: int, end: int, name: str) -> None:
    """Raise ValueError unless ``values`` are ``count`` integers from ``low`` to below ``end``."""
    if values.shape != (count,) or values.dtype.kind != "i":
        raise ValueError(f"{name} are {values.shape} {values.dtype}, expected {count} integers")
    if count and not (low <= values.min() and values.max() < end):
        raise ValueError(
            f"{name} run from {values.min()} to {values.max()}, expected {low} to {end - 1}"
        )
