"""The layers that take nearly all of a tokenizer's time, whose operations a backend can replace.

Shapes: B images, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ALIGNMENT = 64
"""Bytes, as torch allocates."""


def per_image(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``; on a CPU without gradients, computed for each image by itself.

    Torch's order of summation there depends on the batch size, and may depend on alignment and
    strides. This makes an image independent of the others in its batch.
    """
    batched = x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if batched or len(x) == 0:
        return function(x)
    images = x.split(1)
    if x.data_ptr() % _ALIGNMENT or x.stride(0) * x.itemsize % _ALIGNMENT:
        images = tuple(image.clone() for image in images)
    results = [function(image) for image in images]
    first = results[0]
    if len(results) == 1:
        return first
    # With the strides of one image: cat would choose others where a side or the channels are 1.
    strides = (first.numel(), *first.stride()[1:])
    out = first.new_empty_strided((len(x), *first.shape[1:]), strides)
    return torch.cat(results, out=out)


class TorchOperations:
    """The reference, on every device and with gradients. ``backends`` has faster subclasses."""

    def norm_silu(self, norm: nn.GroupNorm, x: Tensor, *, in_place: bool = False) -> Tensor:
        """Return SiLU(``norm`` (x)) of ``x`` (B, C, H, W), which ``in_place`` may overwrite."""
        del in_place
        inplace = not torch.is_grad_enabled()
        of_norm = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        return per_image(lambda image: F.silu(F.group_norm(image, *of_norm), inplace=inplace), x)

    def convolve(
        self, conv: Conv3x3, x: Tensor, residual: Tensor | None, upsample: bool, out: Tensor | None
    ) -> Tensor:
        """Return a 3x3 convolution with zero padding: (B, C_in, H, W) to (B, C_out, H, W).

        ``residual`` is added to the result, ``upsample`` doubles H and W of ``x`` before, by
        nearest neighbour, and ``out`` is a tensor that is not needed any more, whose memory the
        result may take.
        """
        del out
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = per_image(lambda image: F.conv2d(image, conv.weight, conv.bias, padding=1), x)
        if residual is None:
            return y
        if torch.is_grad_enabled() or residual.dtype != y.dtype:
            return residual + y
        return y.add_(residual)


class Conv2d(nn.Conv2d):
    """A convolution of which each image is independent of the batch on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, ...)."""
        return per_image(super().forward, x)


class NormSiLU(nn.GroupNorm):
    """Group normalisation and SiLU: (B, C, H, W) to the same shape."""

    operations = TorchOperations()

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """See ``TorchOperations.norm_silu``."""
        return self.operations.norm_silu(self, x, in_place=in_place)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the resolution, or doubles it first."""

    operations = TorchOperations()
    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        upsample: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """See ``TorchOperations.convolve``."""
        return self.operations.convolve(self, x, residual, upsample, out)
