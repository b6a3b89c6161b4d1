"""Adversarial training of the tokenizer: discriminators and the losses of both sides.

A discriminator says "real" with a large logit, one per image or patch. Losses are float32 means.

Shapes: B images, C channels, H x W pixels, h x w positions of a feature map, G images of a group.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.support.errors import InputError
from llamagen.training.config import AdversarialLoss, DiscriminatorName

_MAX_ADAPTIVE_WEIGHT = 1e4
_ADAPTIVE_EPS = 1e-4
_SLOPE = 0.2
"""Of every leaky ReLU, for negative values."""
_MAX_GROUP = 4
"""Images whose deviation is measured together."""


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, given its logits on images and on reconstructions.

    Half the sum of both sides. "hinge" is 0 for logits that are right by a margin of 1. "vanilla"
    and "non-saturating" are the same here, the cross-entropy of real and fake.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # -log sigmoid(x) is softplus(-x), -log(1 - sigmoid(x)) is softplus(x).
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """Return the tokenizer's adversarial loss, given the logits on its reconstructions.

    "hinge" is minus their mean. "vanilla" and "non-saturating" are both ``-log D``: the original
    ``log(1 - D)`` has no gradient where the discriminator is sure, which is where one is needed.
    """
    fake = fake.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor
) -> Tensor:
    """Return the weight that makes both gradients at the last layer equally large, as in VQGAN.

    It is the ratio of the norms of the gradients of all terms that compare pixels or features, and
    of the adversarial one, from 0 to 10,000, without a gradient of its own.
    """
    norms = []
    for loss in (reconstruction_loss, generator_loss):
        # The graph stays, for the backward pass that follows.
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
    return (norms[0] / (norms[1] + _ADAPTIVE_EPS)).clamp(0.0, _MAX_ADAPTIVE_WEIGHT).detach()


def make_discriminator(name: DiscriminatorName, *, height: int, width: int) -> nn.Module:
    """Return a discriminator of images (B, 3, ``height``, ``width``) in [-1, 1].

    Its logits are one per patch, (B, 1, h, w), or one per image, (B, 1). Its first weights are
    from torch's global random numbers. Raises InputError if it cannot judge images of this size.
    """
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

    With the defaults: 2,765,633 parameters, and the state-dict keys of the public checkpoints.
    """

    def __init__(self, *, base_channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        # The last two convolutions shrink a map by one position each.
        self.smallest = 3 * 2**layers
        # Channels double up to 8 times the first; the last of these layers keeps the resolution.
        widths = [base_channels * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, base_channels, 4, stride=2, padding=1)]
        for i, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < layers else 1
            conv = nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False)
            modules += [nn.LeakyReLU(_SLOPE), conv, nn.BatchNorm2d(after)]
        last = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.main = nn.Sequential(*modules, nn.LeakyReLU(_SLOPE), last)
        # Normal weights of deviation 0.02, around 0 or, for the scales of norms, 1.
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), one per patch, of images (B, 3, H, W)."""
        return self.main(images)


class StyleDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (arXiv 1912.04958): judges whole images.

    Its weights are equalised: they start as standard normal numbers and are scaled where they are
    used, so that one learning rate suits all layers.
    """

    smallest = 16
    """Pixels of the smaller side."""

    def __init__(self, *, height: int, width: int, max_channels: int = 512) -> None:
        super().__init__()
        self.height, self.width = height, width
        halvings = _halvings(height, width)
        # 64 channels for 256 pixels, twice as many with each halving.
        widths = [min(max_channels, 8 * max_channels >> i) for i in range(halvings, -1, -1)]
        self.from_rgb = _EqualConv2d(3, widths[0], 1)
        self.blocks = nn.Sequential(*(_HalvingBlock(a, b) for a, b in itertools.pairwise(widths)))
        channels = widths[-1]
        self.conv = _EqualConv2d(channels + 1, channels, 3, padding=1)
        positions = (height >> halvings) * (width >> halvings)
        self.hidden = _EqualLinear(channels * positions, channels)
        self.out = _EqualLinear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1) of images (B, 3, H, W); InputError if they are of another size."""
        height, width = images.shape[-2:]
        if (height, width) != (self.height, self.width):
            raise InputError(
                f"images of {width}x{height} pixels were given to a stylegan discriminator of "
                f"{self.width}x{self.height}; make one for their size"
            )
        h = self.blocks(_activate(self.from_rgb(images)))
        h = _activate(self.conv(_append_deviation(h)))
        return self.out(_activate(self.hidden(h.flatten(1))))


def _halvings(height: int, width: int) -> int:
    """Return how often images are halved until their smaller side is 4 to 7 positions."""
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


class _Equalised:
    """Mixin of layers with equalised weights."""

    weight: Tensor
    bias: Any

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def scaled_weight(self) -> Tensor:
        return self.weight * (1.0 / math.sqrt(math.prod(self.weight.shape[1:])))


class _EqualConv2d(_Equalised, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.scaled_weight(), self.bias, self.stride, self.padding)


class _EqualLinear(_Equalised, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scaled_weight(), self.bias)


class _HalvingBlock(nn.Module):
    """Two convolutions and a residual: (B, C_in, 2 h, 2 w) -> (B, C_out, h, w)."""

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _EqualConv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = _EqualConv2d(in_channels, out_channels, 3, stride=2)
        self.shortcut = _EqualConv2d(in_channels, out_channels, 1, bias=False)
        # Strided convolutions alias without a low-pass filter before them.
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        self.register_buffer("kernel", line.outer(line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
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


def _activate(x: Tensor) -> Tensor:
    """Return the leaky ReLU, scaled to keep the variance."""
    return F.leaky_relu(x, _SLOPE) * math.sqrt(2.0)


def _append_deviation(x: Tensor) -> Tensor:
    """Append a channel of the mean deviation within a group of images: (B, C + 1, h, w).

    It detects reconstructions that are all alike.
    """
    batch, _, height, width = x.shape
    group = next(size for size in range(_MAX_GROUP, 0, -1) if batch % size == 0)
    # Squares underflow in half precision.
    members = x.float().unflatten(0, (group, -1))  # (G, B / G, C, h, w)
    deviation = (members.var(0, correction=0) + 1e-8).sqrt()
    mean = deviation.mean((1, 2, 3)).repeat(group)  # (B,)
    channel = mean.to(x.dtype).view(batch, 1, 1, 1).expand(batch, 1, height, width)
    return torch.cat([x, channel], 1)
