"""The convolutional encoder and decoder around the quantiser.

Module names are the keys of the public checkpoints. Shapes: B images, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from llamagen.config import TokenizerConfig
from llamagen.models.tokenizer.blocks import Downsample, Level, Upsample, middle
from llamagen.models.tokenizer.layers import Conv3x3, NormSiLU


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, z_channels, H / downsampling, W / downsampling)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = Conv3x3(3, config.base_channels)
        self.conv_blocks = nn.ModuleList(
            Level(
                config.base_channels if level == 0 else widths[level - 1],
                width,
                blocks=config.encoder_blocks,
                attention=level == last,
                resample=Downsample(width) if level != last else None,
                resample_name="downsample",
                groups=config.norm_groups,
                dropout=config.dropout,
            )
            for level, width in enumerate(widths)
        )
        self.mid = middle(widths[-1], config.norm_groups, config.dropout)
        self.norm_out = NormSiLU(config.norm_groups, widths[-1])
        self.conv_out = Conv3x3(widths[-1], config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to latents."""
        h = self.conv_in(images)
        for level in self.conv_blocks:
            h = level(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(self.norm_out(h, in_place=True))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) to images (B, 3, h * downsampling, w * downsampling)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        # Lowest resolution first.
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        last = len(widths) - 1
        self.conv_in = Conv3x3(config.z_channels, widths[0])
        self.mid = middle(widths[0], config.norm_groups, config.dropout)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(level - 1, 0)],
                width,
                blocks=config.decoder_blocks,
                attention=level == 0,
                resample=Upsample(width) if level != last else None,
                resample_name="upsample",
                groups=config.norm_groups,
                dropout=config.dropout,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = NormSiLU(config.norm_groups, widths[-1])
        self.conv_out = Conv3x3(widths[-1], 3)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive adversarial weight compares gradients."""
        return self.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        """Latents to images, about in [-1, 1]."""
        h = self.conv_in(latents)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(self.norm_out(h, in_place=True))
