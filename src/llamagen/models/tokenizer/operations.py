"""What the blocks compute: in C on a CPU where no gradient is wanted, elsewhere with torch.

Shapes: B images, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.backends.cpu.build import compiled_library

_SOURCE = Path(__file__).with_name("convolution.c")
_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16
_PANEL = 32

_FEWEST_PIXELS = 16 * 16
"""Of an image's map; below, transforming the weights takes as long as it saves. Not of all images:
pixels shall not depend on how many are decoded at once."""


def norm_silu(norm: nn.GroupNorm, x: Tensor, *, in_place: bool = False) -> Tensor:
    """SiLU(GroupNorm(x)) of ``x`` (B, C, H, W).

    Args:
        norm: the norm, with weight and bias.
        x: what is normalised.
        in_place: ``x`` is not needed any more, and may be overwritten.
    """
    kernels = _kernels_for(x, norm.weight)
    if kernels is None or norm.num_channels % _LANES:
        return F.silu(norm(x), inplace=not torch.is_grad_enabled())
    return kernels.normalise(norm, x, in_place=in_place)


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    *,
    shortcut: Tensor | None = None,
    upsample: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """A 3x3 convolution with a pixel of zeros around ``x``: (B, C_in, H, W) to (B, C_out, H, W).

    Args:
        conv: the convolution.
        x: its input.
        shortcut: (B, C_out, H, W), added to the result.
        upsample: double ``x`` before, each pixel becoming four; H and W double.
        into: a tensor that is not needed any more, whose memory the result may take.
    """
    scale = 2 if upsample else 1
    kernels = _kernels_for(x, conv.weight)
    if kernels is not None and kernels.can_convolve(conv, scale * x.shape[2], scale * x.shape[3]):
        return kernels.convolve(conv, x, shortcut=shortcut, upsample=upsample, into=into)
    y: Tensor = conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x)
    if shortcut is None:
        return y
    if torch.is_grad_enabled() or shortcut.dtype != y.dtype:
        return shortcut + y
    return y.add_(shortcut)


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Within it, torch computes everything in this thread: what the kernels are compared with."""
    before, _switch.off = _switch.off, True
    try:
        yield
    finally:
        _switch.off = before


class _Switch(threading.local):
    off = False


_switch = _Switch()


class _Convolution(ctypes.Structure):
    """As in ``convolution.c``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("images", "height", "width", "inputs", "outputs")),
        *((name, ctypes.c_int32) for name in ("half", "upsampled", "threads", "taps_first")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "shortcut", "y", "scratch")),
    )


class _Normalisation(ctypes.Structure):
    """As in ``convolution.c``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("images", "pixels", "channels", "groups")),
        *((name, ctypes.c_int32) for name in ("half", "threads")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y", "scratch")),
    )


class _Kernels:
    """The functions of the compiled library, and the memory that they work in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.convolution_scratch.restype = ctypes.c_size_t
        library.normalisation_scratch.restype = ctypes.c_size_t
        features = int(library.convolution_features())
        self.is_fast = bool(features & 1)
        self._has_tiles = bool(features & 2)
        # Of each thread that decodes; kept, for fresh memory costs as much as the work in it.
        self._own = threading.local()

    def can_convolve(self, conv: nn.Conv2d, height: int, width: int) -> bool:
        """Whether a result of this size is computed here, and faster than by torch."""
        if conv.weight.dtype == torch.bfloat16 and self._has_tiles:
            return False
        fitting = conv.in_channels % _LANES == 0 and conv.out_channels % _PANEL == 0
        return fitting and height * width >= _FEWEST_PIXELS

    def convolve(
        self,
        conv: nn.Conv2d,
        x: Tensor,
        *,
        shortcut: Tensor | None,
        upsample: bool,
        into: Tensor | None,
    ) -> Tensor:
        """As the function of this name."""
        assert conv.bias is not None
        x = _channels_last(x)
        height, width = ((2 if upsample else 1) * side for side in x.shape[2:])
        shape = (x.shape[0], conv.out_channels, height, width)
        shortcut = None if shortcut is None else _channels_last(shortcut)
        if into is None or into.shape != shape:
            into = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        y = into
        weight = conv.weight
        taps_first = weight.is_contiguous(memory_format=torch.channels_last)
        weight = weight if taps_first else weight.contiguous()
        call = _Convolution(
            *(shape[0], height, width, conv.in_channels, conv.out_channels),
            *(x.dtype == torch.bfloat16, upsample, torch.get_num_threads(), taps_first),
            *(x.data_ptr(), weight.data_ptr(), conv.bias.data_ptr()),
            *(None if shortcut is None else shortcut.data_ptr(), y.data_ptr()),
        )
        scratch = self._scratch(self._library.convolution_scratch(ctypes.byref(call)))
        call.scratch = scratch.data_ptr()
        self._library.convolve(ctypes.byref(call))
        return y

    def normalise(self, norm: nn.GroupNorm, x: Tensor, *, in_place: bool) -> Tensor:
        """As ``norm_silu``."""
        x = _channels_last(x)
        y = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
        call = _Normalisation(
            *(x.shape[0], x.shape[2] * x.shape[3], x.shape[1], norm.num_groups),
            *(x.dtype == torch.bfloat16, torch.get_num_threads(), norm.eps),
            *(x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), y.data_ptr()),
        )
        scratch = self._scratch(self._library.normalisation_scratch(ctypes.byref(call)))
        call.scratch = scratch.data_ptr()
        self._library.normalise_and_activate(ctypes.byref(call))
        return y

    def _scratch(self, size: int) -> Tensor:
        kept: Tensor | None = getattr(self._own, "scratch", None)
        if kept is None or kept.numel() < size:
            kept = self._own.scratch = torch.empty(size, dtype=torch.uint8)
        return kept


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _kernels_for(x: Tensor, weight: Tensor) -> _Kernels | None:
    """The kernels, if they can compute with ``x`` and ``weight`` as things are."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _switch.off:
        return None
    if x.device.type != "cpu" or x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return None
    return None if torch.is_autocast_enabled("cpu") else _load_kernels()


@functools.cache
def _load_kernels() -> _Kernels | None:
    """The kernels for this machine, compiled now if they were not before."""
    library = compiled_library(source=_SOURCE)
    if library is None:
        return None
    kernels = _Kernels(library)
    return kernels if kernels.is_fast else None
