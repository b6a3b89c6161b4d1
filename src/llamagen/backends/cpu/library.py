"""The compiled kernels as Python sees them: structures, and functions with types.

The structures mirror those of ``products.h``, ``decode.c`` and ``draw.h``, field by field.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llamagen.backends.cpu.build import compiled_library

FLOAT32, BFLOAT16, INT8, INT4 = range(4)

MOST_CODES = 1 << 20
"""Codes of a codebook that a draw can take."""
WIDEST_HEAD = 256
OUTPUTS = 16
"""Outputs of a matrix are computed so many at a time."""
INPUTS = 32
"""Inputs of a matrix are read so many at a time."""


class Matrix(ctypes.Structure):
    """Weights (outputs, inputs) where they lie."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
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
        ("half", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("output", Matrix),
    )


class Step(ctypes.Structure):
    """What is fed, where it goes, and where the logits go."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("cell", ctypes.c_void_p),
        ("rope", ctypes.c_void_p),
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("key_scales", ctypes.POINTER(ctypes.c_void_p)),
        ("value_scales", ctypes.POINTER(ctypes.c_void_p)),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("seconds", ctypes.c_void_p),
    )


DRAW = np.dtype(
    [
        ("conditional", np.uintp),
        ("unconditional", np.uintp),
        ("scale", np.float32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int32),
        ("uniform", np.float64),
        ("code", np.int64),
        ("finite", np.int32),
    ],
    align=True,
)
"""What decides one image's code, and the code. An address of 0 is no unconditional row."""


class Kernels:
    """The functions of the compiled library. Their memory is the caller's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.decode_scratch.restype = ctypes.c_size_t
        library.draw_room.restype = ctypes.c_size_t

    @property
    def features(self) -> frozenset[str]:
        """What this processor has of "pairs" (products of bfloat16), "tiles" (AMX), "words"
        (products of whole numbers of 16 bits) and "threads".
        """
        found = int(self._library.decode_features())
        names = ("pairs", "tiles", "words", "threads")
        return frozenset(name for bit, name in enumerate(names) if found >> bit & 1)

    def scratch_bytes(self, model: Model, rows: int, positions: int, threads: int) -> int:
        """Bytes of ``Step.scratch`` for ``rows`` sequences of up to ``positions`` positions."""
        return int(self._library.decode_scratch(ctypes.byref(model), rows, positions, threads))

    def decode_step(self, model: Model, step: Step) -> None:
        """Computes the logits, and fills one position of each sequence's keys and values."""
        self._library.decode_step(ctypes.byref(model), ctypes.byref(step))

    def draw_codes(self, draws: np.ndarray, codes: int) -> None:
        """Fills ``code`` and ``finite`` of ``draws`` (N,) of type ``DRAW``."""
        threads = min(torch.get_num_threads(), len(draws))
        room = torch.empty(int(self._library.draw_room(codes, threads)), dtype=torch.uint8)
        draws_at, room_at = (ctypes.c_void_p(at) for at in (draws.ctypes.data, room.data_ptr()))
        self._library.draw_codes(draws_at, len(draws), codes, threads, room_at)


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels for this machine, compiled now if they were not before.

    None where they cannot be had: no compiler, or ``LLAMAGEN_KERNELS=off``.
    """
    library = compiled_library()
    return None if library is None else Kernels(library)


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where tensors begin, as the kernels take lists of them."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
