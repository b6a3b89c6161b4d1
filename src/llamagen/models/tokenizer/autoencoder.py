"""The convolutional encoder and decoder around the quantiser.

Module names are the keys of the public checkpoints. Shapes: B images, C channels, H and W height
and width of a feature map.
"""

from __future__ import annotations

import functools
import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import TokenizerConfig
from llamagen.models.tokenizer.layers import Conv2d, Conv3x3, NormSiLU, per_image


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions and a residual: (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1 = NormSiLU(config.norm_groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = NormSiLU(config.norm_groups, out_channels)
        self.dropout = nn.Dropout(config.dropout)
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

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
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
    """Strided 3x3 convolution: (B, C, H, W) to (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        # Padding at the bottom and right only: the public weights were trained this way.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution: (B, C, H, W) to (B, C, 2 H, 2 W)."""

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
        config: TokenizerConfig,
        blocks: int,
        channels: tuple[int, int],
        *,
        attention: bool,
        **resample: nn.Module,
    ) -> None:
        super().__init__()
        widths = [channels[0]] + [channels[1]] * blocks
        self.res = nn.ModuleList(ResidualBlock(a, b, config) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(
            SpatialAttention(channels[1], config) for _ in range(blocks if attention else 0)
        )
        self.resample_names = list(resample)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, ...) at this or the next resolution."""
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        for name in self.resample_names:
            x = self.get_submodule(name)(x)
        return x


def _middle(channels: int, config: TokenizerConfig) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, config),
        SpatialAttention(channels, config),
        ResidualBlock(channels, channels, config),
    )


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, z_channels, H / downsampling, W / downsampling)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in (1, *config.channel_multipliers)]
        *inner, last = itertools.pairwise(widths)
        level = functools.partial(Level, config, config.encoder_blocks)
        self.conv_in = Conv3x3(3, widths[0])
        self.conv_blocks = nn.Sequential(
            *(level(pair, attention=False, downsample=Downsample(pair[1])) for pair in inner),
            level(last, attention=True),
        )
        self.mid = _middle(widths[-1], config)
        self.norm_out = NormSiLU(config.norm_groups, widths[-1])
        self.conv_out = Conv3x3(widths[-1], config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to latents."""
        h = self.mid(self.conv_blocks(self.conv_in(images)))
        return self.conv_out(self.norm_out(h, in_place=True))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to images (B, 3, h * downsampling, w * downsampling)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        # Lowest resolution first.
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        *inner, last = itertools.pairwise([widths[0], *widths])
        level = functools.partial(Level, config, config.decoder_blocks)
        self.conv_in = Conv3x3(config.z_channels, widths[0])
        self.mid = _middle(widths[0], config)
        self.conv_blocks = nn.Sequential(
            *(
                level(pair, attention=number == 0, upsample=Upsample(pair[1]))
                for number, pair in enumerate(inner)
            ),
            level(last, attention=not inner),
        )
        self.norm_out = NormSiLU(config.norm_groups, widths[-1])
        self.conv_out = Conv3x3(widths[-1], 3)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents to images, about in [-1, 1]."""
        h = self.conv_blocks(self.mid(self.conv_in(latents)))
        return self.conv_out(self.norm_out(h, in_place=True))
