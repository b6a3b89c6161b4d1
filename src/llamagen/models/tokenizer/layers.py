"""The layers whose operations a backend can replace.

Shapes: B images, C channels, H and W height and width of a feature map.
"""

from __future__ import annotations

from torch import Tensor, nn

from llamagen.models.tokenizer.operations import Operations, TorchOperations, per_image


class Conv2d(nn.Conv2d):
    """A convolution of which each image is independent of the batch on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, ...)."""
        return per_image(super().forward, x)


class NormSiLU(nn.GroupNorm):
    """Group normalisation and SiLU: (B, C, H, W) to the same shape."""

    operations: Operations = TorchOperations()

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """See ``Operations.norm_silu``."""
        return self.operations.norm_silu(
            x, self.num_groups, self.weight, self.bias, eps=self.eps, in_place=in_place
        )


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the resolution, or doubles it first."""

    operations: Operations = TorchOperations()
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
        """See ``Operations.convolve``."""
        return self.operations.convolve(
            x, self.weight, self.bias, residual=residual, upsample=upsample, out=out
        )
