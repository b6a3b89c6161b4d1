"""The image tokenizer's operations in C: 3x3 convolutions, and GroupNorm with SiLU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from llamagen.backends.cpu.build import compiled_library
from llamagen.backends.cpu.library import Scratch, Struct, address, fields
from llamagen.models.tokenizer.layers import Conv3x3, TorchOperations
from llamagen.models.tokenizer.model import ImageTokenizer

_SOURCE = Path(__file__).with_name("convolution.c")
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

    def norm_silu(self, norm: nn.GroupNorm, x: Tensor, *, in_place: bool = False) -> Tensor:
        """See ``TorchOperations``."""
        images, channels, dtype = x.shape[0], x.shape[1], x.dtype
        kernels = _kernels_for(x, norm.weight, norm.bias)
        is_fitting = (*norm.weight.shape, *norm.bias.shape) == (channels, channels)
        is_fitting = is_fitting and channels % norm.num_groups == 0 == channels % _LANES
        if kernels is None or not is_fitting:
            return super().norm_silu(norm, x, in_place=in_place)
        x = x.contiguous(memory_format=torch.channels_last)
        y = x if in_place else torch.empty_like(x)
        weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
        call = _Normalization(
            *(images, x.shape[2] * x.shape[3], channels, norm.num_groups, dtype == torch.bfloat16),
            *(torch.get_num_threads(), norm.eps, _pixels(x, dtype, x.shape)),
            *(address(each, dtype, (channels,)) for each in (weight, bias)),
            _pixels(y, dtype, x.shape),
        )
        kernels.run("norm_silu", call)
        return y

    def convolve(
        self, conv: Conv3x3, x: Tensor, residual: Tensor | None, upsample: bool, out: Tensor | None
    ) -> Tensor:
        """See ``TorchOperations``."""
        (outputs, inputs), scale, dtype = conv.weight.shape[:2], 2 if upsample else 1, x.dtype
        shape = (x.shape[0], outputs, scale * x.shape[2], scale * x.shape[3])
        kernels = _kernels_for(x, conv.weight, conv.bias, *([] if residual is None else [residual]))
        if (
            kernels is None
            or (x.shape[1], *conv.weight.shape[2:], *conv.bias.shape) != (inputs, 3, 3, outputs)
            or (residual is not None and residual.shape != shape)
            or inputs % _LANES
            or outputs % _PANEL
            or (dtype == torch.bfloat16 and kernels.has_amx)
        ):
            return super().convolve(conv, x, residual, upsample, out)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = conv.weight.contiguous(), conv.bias.contiguous()
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        if out is None or not _can_hold(out, shape, dtype):
            out = torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
        call = _Convolution(
            *(shape[0], *shape[2:], inputs, outputs),
            *(dtype == torch.bfloat16, upsample, torch.get_num_threads()),
            _pixels(x, dtype, x.shape),
            address(weight, dtype, (outputs, inputs, 3, 3)),
            address(bias, dtype, (outputs,)),
            None if residual is None else _pixels(residual, dtype, shape),
            _pixels(out, dtype, shape),
        )
        kernels.run("convolve", call)
        return out


class _Convolution(Struct):
    """As in ``convolution.c``."""

    _fields_ = fields(
        (c_int32, "images height width inputs outputs is_bf16 upsampled threads"),
        (c_void_p, "x weight bias residual y scratch"),
    )


class _Normalization(Struct):
    """As in ``normalization.h``."""

    _fields_ = fields(
        (c_int32, "images pixels channels groups is_bf16 threads"),
        (c_float, "eps"),
        (c_void_p, "x weight bias y scratch"),
    )


class _Kernels:
    """The compiled library, and the scratch memory of each thread that calls it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.convolve_scratch.restype = library.norm_silu_scratch.restype = ctypes.c_size_t
        features = int(library.convolution_features())
        self.is_fast, self.has_amx = bool(features & 1), bool(features & 2)
        self._scratch = Scratch()

    def run(self, function: str, call: _Convolution | _Normalization) -> None:
        """Compute ``call.y``."""
        size = getattr(self._library, f"{function}_scratch")(ctypes.byref(call))
        call.scratch = self._scratch.address(size)
        getattr(self._library, function)(ctypes.byref(call))


def _kernels_for(x: Tensor, *others: Tensor) -> _Kernels | None:
    """Return the kernels if they can compute with these tensors in the present modes of torch."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if x.dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return None
    if any(t.device.type != "cpu" or t.dtype != x.dtype or not t.numel() for t in (x, *others)):
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
