"""The operations that take nearly all of a tokenizer's time, and their reference in torch.

``backends`` replaces them, see ``ImageTokenizer.set_operations``. Shapes: B images, C channels, H
and W height and width of a feature map.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Operations(Protocol):
    """Operations of the layers in ``layers.py``."""

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
        """Return SiLU(GroupNorm(x)) of ``x`` (B, C, H, W).

        Args:
            x: the input.
            groups: channels are normalised in this many groups.
            weight: (C,) scale of each channel.
            bias: (C,) offset of each channel.
            eps: added to the variance.
            in_place: ``x`` is not needed any more, and may be overwritten.
        """

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
        """Return a 3x3 convolution with zero padding: (B, C_in, H, W) to (B, C_out, H, W).

        Args:
            x: the input.
            weight: (C_out, C_in, 3, 3).
            bias: (C_out,).
            residual: (B, C_out, H, W), added to the result.
            upsample: double H and W of ``x`` before, by nearest neighbour.
            out: a tensor that is not needed any more, whose memory the result may take.
        """


class TorchOperations:
    """The reference, on every device and with gradients."""

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
        """See ``Operations``."""
        del in_place
        normed = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(normed, inplace=not torch.is_grad_enabled())

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
        """See ``Operations``."""
        del out
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = F.conv2d(x, weight, bias, padding=1)
        if residual is None:
            return y
        if torch.is_grad_enabled() or residual.dtype != y.dtype:
            return residual + y
        return y.add_(residual)
