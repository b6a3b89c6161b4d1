"""The convolutional blocks that the encoder and the decoder are made of.

Shapes: B images, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.models.tokenizer.layers import Conv2d, Conv3x3, NormSiLU
from llamagen.models.tokenizer.operations import per_image


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions and a residual: (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = NormSiLU(groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = NormSiLU(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        normed = self.norm1(x)
        h = self.norm2(self.conv1(normed), in_place=True)
        return self.conv2(self.dropout(h), residual=self.nin_shortcut(x), out=normed)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return x + per_image(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        h = self.norm(x).movedim(1, -1).flatten(1, 2)  # (B, HW, C)
        q, k, v = (_project(h, proj).unsqueeze(1) for proj in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return _project(out, self.proj_out).mT.unflatten(-1, x.shape[2:])


def _project(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """1x1 convolution of pixels (B, HW, C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Downsample(nn.Module):
    """Halves the resolution with a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        # Padding at the bottom and right only: the public weights were trained this way.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        return self.conv(x, upsample=True)


class Level(nn.Module):
    """All blocks of one resolution, then the step to the next resolution if there is one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        attention: bool,
        resample: nn.Module | None,
        resample_name: str,
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.res = nn.ModuleList(
            ResidualBlock(a, b, groups, dropout) for a, b in itertools.pairwise(widths)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(out_channels, groups) for _ in range(blocks if attention else 0)
        )
        # The public checkpoints call this "downsample" in the encoder, "upsample" in the decoder.
        self.resample_name = resample_name
        if resample is not None:
            self.add_module(resample_name, resample)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, ...) at this or the next resolution."""
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        resample = self._modules.get(self.resample_name)
        return x if resample is None else resample(x)


def middle(channels: int, groups: int, dropout: float) -> nn.ModuleList:
    """Block, attention, block: what both halves do at the lowest resolution."""
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels, groups, dropout),
            SpatialAttention(channels, groups),
            ResidualBlock(channels, channels, groups, dropout),
        ]
    )
