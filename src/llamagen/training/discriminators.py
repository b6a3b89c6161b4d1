"""Networks that tell reconstructions from images, for the adversarial term of the tokenizer's loss.

Shapes: B images, C channels, H x W pixels, h x w positions of a feature map, G images of a group.
"""

from __future__ import annotations

import itertools
import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.support.errors import InputError
from llamagen.training.config import DiscriminatorName

_SLOPE = 0.2
"""Of every leaky ReLU, for negative values."""
_MAX_GROUP = 4
"""Images whose spread is looked at together."""


def make_discriminator(name: DiscriminatorName, *, height: int, width: int) -> nn.Module:
    """A new discriminator, from torch's global random numbers.

    Args:
        name: which one.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        A module from images (B, 3, H, W) in [-1, 1] to logits, large for real images: one per
        patch, (B, 1, h, w), or one per image, (B, 1).

    Raises:
        InputError: there is no such discriminator, or it cannot look at images of this size.
    """
    if name not in get_args(DiscriminatorName):
        known = ", ".join(get_args(DiscriminatorName))
        raise InputError(f"there is no discriminator {name!r}; choose one of {known}")
    if name == "stylegan":
        return StyleDiscriminator(height=height, width=width)
    model = PatchDiscriminator()
    if min(height, width) < model.smallest:
        raise InputError(
            f"images of {width}x{height} pixels are smaller than a patch of the patchgan "
            f"discriminator: both sides must be at least {model.smallest}; train on larger images "
            f"or choose the stylegan discriminator (from {StyleDiscriminator.smallest} on)"
        )
    return model


class PatchDiscriminator(nn.Module):
    """PatchGAN: judges overlapping patches, of 70x70 pixels with 3 layers (arXiv 1611.07004).

    With the defaults it has 2,765,633 parameters and the state-dict keys of the public
    checkpoints.
    """

    def __init__(self, *, base_channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        # The last two convolutions shrink a map by one position each.
        self.smallest = 3 * 2**layers
        # Channels double up to 8 times the first; the last of these layers keeps the resolution.
        widths = [base_channels * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [
            nn.Conv2d(3, base_channels, 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
        ]
        for i, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            modules += [
                nn.Conv2d(before, after, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(_SLOPE),
            ]
        modules.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*modules)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02: convolutions around 0, scales of the norms around 1."""
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, 1, h, w), one per patch."""
        return self.main(images)


class StyleDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (arXiv 1912.04958): judges whole images.

    Its weights are equalised: they start as standard normal numbers and are scaled where they are
    used, so that one learning rate suits all layers.
    """

    smallest = 16
    """Pixels of the smaller side."""

    def __init__(self, *, height: int, width: int, max_channels: int = 512) -> None:
        """A discriminator of images of one size.

        Raises:
            InputError: the sides cannot be halved until the smaller one is 4 to 7 positions.
        """
        super().__init__()
        self.height, self.width = height, width
        halvings = _halvings(height, width)
        # 64 channels for 256 pixels, twice as many with each halving.
        widths = [min(max_channels, 8 * max_channels >> i) for i in range(halvings, -1, -1)]
        self.from_rgb = _EqualConv2d(3, widths[0], 1)
        self.blocks = nn.Sequential(*(_HalvingBlock(a, b) for a, b in itertools.pairwise(widths)))
        channels = widths[-1]
        self.conv = _EqualConv2d(channels + 1, channels, 3)
        positions = (height >> halvings) * (width >> halvings)
        self.hidden = _EqualLinear(channels * positions, channels)
        self.out = _EqualLinear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, 1).

        Raises:
            InputError: the images are of another size.
        """
        height, width = images.shape[-2:]
        if (height, width) != (self.height, self.width):
            raise InputError(
                f"images of {width}x{height} pixels were given to a stylegan discriminator of "
                f"{self.width}x{self.height}; make one for their size"
            )
        h = self.blocks(_activate(self.from_rgb(images)))
        h = _activate(self.conv(_append_spread(h)))
        h = _activate(self.hidden(h.flatten(1)))
        return self.out(h)


def _halvings(height: int, width: int) -> int:
    """How often images are halved until their smaller side is 4 to 7 positions.

    Raises:
        InputError: they are too small, or odd on the way there.
    """
    smaller = min(height, width)
    if smaller < StyleDiscriminator.smallest:
        raise InputError(
            f"images of {width}x{height} pixels are too small for the stylegan discriminator: "
            f"both sides must be at least {StyleDiscriminator.smallest}; train on larger images"
        )
    halvings = (smaller // 4).bit_length() - 1
    factor = 2**halvings
    if height % factor or width % factor:
        raise InputError(
            f"images of {width}x{height} pixels cannot be halved {halvings} times, as the "
            f"stylegan discriminator does: both sides must be multiples of {factor}; choose "
            f"another size or the patchgan discriminator"
        )
    return halvings


class _HalvingBlock(nn.Module):
    """Two convolutions around a shortcut: (B, C_in, 2 h, 2 w) -> (B, C_out, h, w)."""

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _EqualConv2d(in_channels, in_channels, 3)
        self.conv2 = _EqualConv2d(in_channels, out_channels, 3, stride=2, padding=0)
        self.shortcut = _EqualConv2d(in_channels, out_channels, 1, bias=False)
        # A strided convolution reads every other position only: without smoothing before it, what
        # lies in between would show as something else (aliasing).
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        self.register_buffer("kernel", line.outer(line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, 2 h, 2 w) to (B, C_out, h, w)."""
        h = _activate(self.conv1(x))
        # (B, C, 2 h + 1, 2 w + 1), of which the strided 3x3 convolution makes h x w.
        h = _activate(self.conv2(self._smooth(h, padding=2)))
        shortcut = self.shortcut(self._smooth(x, padding=1, stride=2))
        # Two values of variance 1 add up to one of variance 2.
        return (h + shortcut) * math.sqrt(0.5)

    def _smooth(self, x: Tensor, *, padding: int, stride: int = 1) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=channels)


class _EqualConv2d(nn.Module):
    """A convolution that keeps the resolution, unless told otherwise, with equalised weights."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = size // 2 if padding is None else padding
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = 1.0 / math.sqrt(in_channels * size * size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, ...)."""
        weight = self.weight * self.scale
        return F.conv2d(x, weight, self.bias, stride=self.stride, padding=self.padding)


class _EqualLinear(nn.Module):
    """A linear layer with equalised weights."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1.0 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) to (B, out_features)."""
        return F.linear(x, self.weight * self.scale, self.bias)


def _activate(x: Tensor) -> Tensor:
    """Leaky ReLU, scaled up by what it takes of the variance."""
    return F.leaky_relu(x, _SLOPE) * math.sqrt(2.0)


def _append_spread(x: Tensor) -> Tensor:
    """Appends a channel that tells how much the images of a group differ: (B, C + 1, h, w).

    Reconstructions that are all alike are told from images by this alone.
    """
    batch, _, height, width = x.shape
    group = next(size for size in range(_MAX_GROUP, 0, -1) if batch % size == 0)
    # Squares underflow in half precision.
    members = x.float().unflatten(0, (group, -1))  # (G, B / G, C, h, w)
    deviation = (members.var(0, correction=0) + 1e-8).sqrt()
    spread = deviation.mean((1, 2, 3)).repeat(group)  # (B,)
    channel = spread.to(x.dtype).view(batch, 1, 1, 1).expand(batch, 1, height, width)
    return torch.cat([x, channel], 1)
