"""The image tokenizer's operations in C: 3x3 convolutions, and GroupNorm with SiLU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen.backends.cpu.build import compiled_library
from llamagen.backends.cpu.library import Scratch, Struct, address, fields
from llamagen.models.tokenizer.layers import TorchOperations
from llamagen.models.tokenizer.model import ImageTokenizer

_SOURCE = Path(__file__).with_name("convolution.c")
_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16
_PANEL = 32


def accelerate(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Let the kernels compute ``tokenizer`` where they can, and return it.

    Torch computes with gradients, under autocast, when compiled, and on other devices.
    """
    tokenizer.set_operations(CpuOperations())
    return tokenizer


class CpuOperations(TorchOperations):
    """The reference, replaced by the kernels where they support the arguments."""

    def norm_silu(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        *,
        eps: float,
        in_place: bool = False,
    ) -> Tensor:
        """See ``TorchOperations``."""
        kernels = _kernels_for(x, weight, bias)
        channels = x.shape[1]
        sizes = (*weight.shape, *bias.shape)
        if (
            kernels is None
            or sizes != (channels, channels)
            or channels % _LANES
            or channels % groups
        ):
            return super().norm_silu(x, groups, weight, bias, eps=eps, in_place=in_place)
        x = x.contiguous(memory_format=torch.channels_last)
        y = x if in_place else torch.empty_like(x)
        images, pixels, dtype = x.shape[0], x.shape[2] * x.shape[3], x.dtype
        weight, bias = weight.contiguous(), bias.contiguous()
        kernels.normalize(
            _Normalization(
                *(images, pixels, channels, groups, dtype == torch.bfloat16),
                *(torch.get_num_threads(), eps, _pixels(x, dtype, x.shape)),
                *(address(each, dtype, (channels,)) for each in (weight, bias)),
                _pixels(y, dtype, x.shape),
            )
        )
        return y

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        residual: Tensor | None = None,
        upsample: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """See ``TorchOperations``."""
        scale = 2 if upsample else 1
        outputs, inputs = weight.shape[:2]
        shape = (x.shape[0], outputs, scale * x.shape[2], scale * x.shape[3])
        kernels = _kernels_for(x, weight, bias, *([] if residual is None else [residual]))
        if (
            kernels is None
            or (x.shape[1], *weight.shape[2:], *bias.shape) != (inputs, 3, 3, outputs)
            or (residual is not None and residual.shape != shape)
            or inputs % _LANES
            or outputs % _PANEL
            or (x.dtype == torch.bfloat16 and kernels.has_amx)
        ):
            return super().convolve(x, weight, bias, residual=residual, upsample=upsample, out=out)
        x, dtype = x.contiguous(memory_format=torch.channels_last), x.dtype
        weight, bias = weight.contiguous(), bias.contiguous()
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        if out is None or not _can_hold(out, shape, dtype):
            out = torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
        kernels.convolve(
            _Convolution(
                *(shape[0], *shape[2:], inputs, outputs),
                *(dtype == torch.bfloat16, upsample, torch.get_num_threads()),
                _pixels(x, dtype, x.shape),
                address(weight, dtype, (outputs, inputs, 3, 3)),
                address(bias, dtype, (outputs,)),
                None if residual is None else _pixels(residual, dtype, shape),
                _pixels(out, dtype, shape),
            )
        )
        return out


class _Convolution(Struct):
    """As in ``convolution.c``."""

    _fields_ = fields(
        (c_int32, "images height width inputs outputs is_bf16 upsampled threads"),
        (c_void_p, "x weight bias residual y scratch"),
    )


class _Normalization(Struct):
    """As in ``convolution.c``."""

    _fields_ = fields(
        (c_int32, "images pixels channels groups is_bf16 threads"),
        (ctypes.c_float, "eps"),
        (c_void_p, "x weight bias y scratch"),
    )


class _Kernels:
    """Functions of the compiled library, and the scratch memory of each thread that calls them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.convolution_scratch.restype = ctypes.c_size_t
        library.normalization_scratch.restype = ctypes.c_size_t
        features = int(library.convolution_features())
        self.is_fast = bool(features & 1)
        self.has_amx = bool(features & 2)
        self._scratch = Scratch()

    def convolve(self, call: _Convolution) -> None:
        """Compute ``call.y``."""
        self._run(self._library.convolve, self._library.convolution_scratch, call)

    def normalize(self, call: _Normalization) -> None:
        """Compute ``call.y``."""
        self._run(self._library.norm_silu, self._library.normalization_scratch, call)

    def _run(self, function: Any, scratch_size: Any, call: _Convolution | _Normalization) -> None:
        call.scratch = self._scratch.address(scratch_size(ctypes.byref(call)))
        function(ctypes.byref(call))


def _kernels_for(*tensors: Tensor) -> _Kernels | None:
    """Return the kernels if they can compute with ``tensors`` in the present modes of torch."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    dtype = tensors[0].dtype
    if dtype not in _DTYPES or torch.is_autocast_enabled("cpu"):
        return None
    if any(t.device.type != "cpu" or t.dtype != dtype or t.numel() == 0 for t in tensors):
        return None
    return load_kernels()


@functools.cache
def load_kernels() -> _Kernels | None:
    """Return the kernels for this machine, compiled on the first call; None where there are none
    or torch is faster.
    """
    library = compiled_library(source=_SOURCE)
    if library is None:
        return None
    kernels = _Kernels(library)
    return kernels if kernels.is_fast else None


def _pixels(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where an image's channels, (B, C, H, W) in the order (B, H, W, C), begin."""
    images, channels, height, width = shape
    return address(x.permute(0, 2, 3, 1), dtype, (images, height, width, channels))


def _can_hold(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    is_ordered = out.is_contiguous(memory_format=torch.channels_last)
    return (out.shape, out.dtype, out.device.type, is_ordered) == (shape, dtype, "cpu", True)
