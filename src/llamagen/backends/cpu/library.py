"""The compiled kernels as Python sees them: structures, and functions with types.

The structures mirror those of ``matmul.h``, ``step.c`` and ``sampling.h``, field by field.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from llamagen.backends.cpu.build import compiled_library

FLOAT32, BFLOAT16, INT8 = range(3)

MAX_CODES = 1 << 20
"""Codes of a codebook, of which sampling has a fixed amount of memory for sums."""
MAX_HEAD_DIM = 256
OUTPUTS = 16
"""Outputs of a matrix are computed so many at a time."""
INPUTS = 32
"""Inputs of a matrix are read so many at a time."""


class Matrix(ctypes.Structure):
    """Weights (outputs, inputs) where they are."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """One block."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("ffn_norm", ctypes.c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
    )


class Model(ctypes.Structure):
    """Sizes and weights of a transformer."""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("codes", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("output", Matrix),
    )


class Step(ctypes.Structure):
    """What is fed, where it goes, and where the logits go."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("rope", ctypes.c_void_p),
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("key_scales", ctypes.POINTER(ctypes.c_void_p)),
        ("value_scales", ctypes.POINTER(ctypes.c_void_p)),
        ("slot_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("seconds", ctypes.c_void_p),
    )


SAMPLING_ROW = np.dtype(
    [
        ("conditional", np.uintp),
        ("unconditional", np.uintp),
        ("guidance_scale", np.float32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("uniform", np.float64),
        ("code", np.int64),
        ("finite", np.int32),
    ],
    align=True,
)
"""What decides a row's code, and the code. An address of 0 is no unconditional row."""


class Kernels:
    """The functions of the compiled library. Their memory is the caller's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.step_scratch.restype = ctypes.c_size_t
        library.sampling_scratch.restype = ctypes.c_size_t

    @property
    def features(self) -> frozenset[str]:
        """Which of "avx512_bf16", "amx", "vnni" and "threads" the kernels use."""
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
            ctypes.c_void_p(array_address(rows, SAMPLING_ROW, rows.shape)),
            len(rows),
            codes,
            threads,
            ctypes.c_void_p(scratch.data_ptr()),
        )


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels for this machine, compiled now if they were not before.

    None where they cannot be had: no compiler, or ``LLAMAGEN_KERNELS=off``.
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

    They believe what they are told, so this is checked: its type, its shape, and that it is
    contiguous or has the given strides, in the memory of the CPU.
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


def addresses(
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
) -> ctypes.Array[ctypes.c_void_p]:
    """Return where tensors begin, as the kernels take lists of them; see ``address``."""
    found = (address(tensor, dtype, shape, stride) for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*found)


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


def _default(field: dataclasses.Field[object]) -> object:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()
