"""Inception-v3 of 2015 once more, as plain and as slow as can be, to compare with."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Reference:
    """The graph of 2015 written out, block by block, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.used: set[str] = set()

    def take(self, name: str) -> Tensor:
        self.used.add(name)
        return self.state[name]

    def unit(self, x: Tensor, name: str, stride: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
        x = F.conv2d(x, self.take(f"{name}.conv.weight"), stride=stride, padding=pad)
        mean, var, weight, bias = (
            self.take(f"{name}.bn.{part}").view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * weight + bias).clamp(min=0)

    def row(self, x: Tensor, block: str, *layers: tuple[str, int, int]) -> Tensor:
        """Layers by name, height and width of their kernels; as large as the input."""
        for name, height, width in layers:
            x = self.unit(x, f"{block}.{name}", pad=(height // 2, width // 2))
        return x

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels = (plain_resize(image.astype(np.float32), 299) - 128) * 0.0078125
        x = torch.from_numpy(pixels)[None].double()
        x = self.unit(x, "Conv2d_1a_3x3", 2)
        x = self.unit(x, "Conv2d_2a_3x3")
        x = self.unit(x, "Conv2d_2b_3x3", pad=(1, 1))
        x = F.max_pool2d(x, 3, 2)
        x = self.unit(x, "Conv2d_3b_1x1")
        x = self.unit(x, "Conv2d_4a_3x3")
        x = F.max_pool2d(x, 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_35(x, name)
        x = self.reduction_35(x, "Mixed_6a")
        x = self.block_17(x, "Mixed_6b")
        x = self.block_17(x, "Mixed_6c")
        spatial = self.row(x, "Mixed_6d", ("branch1x1", 1, 1))[0, :7]
        x = self.block_17(x, "Mixed_6d")
        x = self.block_17(x, "Mixed_6e")
        x = self.reduction_17(x, "Mixed_7a")
        x = self.block_8(x, "Mixed_7b", plain_average)
        x = self.block_8(x, "Mixed_7c", plain_maximum)
        pool = x[0].mean((1, 2)).numpy()
        logits = self.take("fc.weight").numpy() @ pool
        return pool, spatial.numpy().transpose(1, 2, 0).ravel(), logits

    def block_35(self, x: Tensor, name: str) -> Tensor:
        one = self.row(x, name, ("branch1x1", 1, 1))
        five = self.row(x, name, ("branch5x5_1", 1, 1), ("branch5x5_2", 5, 5))
        double = self.row(
            x, name, ("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3), ("branch3x3dbl_3", 3, 3)
        )
        pooled = self.row(plain_average(x), name, ("branch_pool", 1, 1))
        return torch.cat([one, five, double, pooled], 1)

    def reduction_35(self, x: Tensor, name: str) -> Tensor:
        three = self.unit(x, f"{name}.branch3x3", 2)
        double = self.row(x, name, ("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3))
        double = self.unit(double, f"{name}.branch3x3dbl_3", 2)
        return torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)

    def block_17(self, x: Tensor, name: str) -> Tensor:
        one = self.row(x, name, ("branch1x1", 1, 1))
        seven = self.row(
            x, name, ("branch7x7_1", 1, 1), ("branch7x7_2", 1, 7), ("branch7x7_3", 7, 1)
        )
        double = self.row(
            x,
            name,
            ("branch7x7dbl_1", 1, 1),
            ("branch7x7dbl_2", 7, 1),
            ("branch7x7dbl_3", 1, 7),
            ("branch7x7dbl_4", 7, 1),
            ("branch7x7dbl_5", 1, 7),
        )
        pooled = self.row(plain_average(x), name, ("branch_pool", 1, 1))
        return torch.cat([one, seven, double, pooled], 1)

    def reduction_17(self, x: Tensor, name: str) -> Tensor:
        three = self.unit(self.unit(x, f"{name}.branch3x3_1"), f"{name}.branch3x3_2", 2)
        seven = self.row(
            x, name, ("branch7x7x3_1", 1, 1), ("branch7x7x3_2", 1, 7), ("branch7x7x3_3", 7, 1)
        )
        seven = self.unit(seven, f"{name}.branch7x7x3_4", 2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def block_8(self, x: Tensor, name: str, pooling) -> Tensor:
        one = self.row(x, name, ("branch1x1", 1, 1))
        three = self.row(x, name, ("branch3x3_1", 1, 1))
        double = self.row(x, name, ("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3))
        forks = [
            self.row(y, name, (f"{branch}{letter}", height, width))
            for y, branch in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for letter, height, width in (("a", 1, 3), ("b", 3, 1))
        ]
        pooled = self.row(pooling(x), name, ("branch_pool", 1, 1))
        return torch.cat([one, *forks, pooled], 1)


def plain_average(x: Tensor) -> Tensor:
    return neighbourhoods(x, np.nanmean)


def plain_maximum(x: Tensor) -> Tensor:
    return neighbourhoods(x, np.nanmax)


def neighbourhoods(x: Tensor, of) -> Tensor:
    """What ``of`` makes of every 3x3 positions; there is nothing beyond the edges."""
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return torch.from_numpy(of(windows, axis=(-2, -1)))


def plain_resize(image: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow 1's ResizeBilinear without half-pixel centres, pixel by pixel, in float32."""
    places = []
    for size in image.shape[1:]:
        scale = np.float32(size) / np.float32(side)
        places.append([np.float32(i) * scale for i in range(side)])
    out = np.empty((len(image), side, side), np.float32)
    for row, y in enumerate(places[0]):
        top = int(y)
        bottom = min(top + 1, image.shape[1] - 1)
        for column, x in enumerate(places[1]):
            left = int(x)
            right = min(left + 1, image.shape[2] - 1)
            across, down = x - np.float32(left), y - np.float32(top)
            a, b = image[:, top, left], image[:, bottom, left]
            a = a + (image[:, top, right] - a) * across
            b = b + (image[:, bottom, right] - b) * across
            out[:, row, column] = a + (b - a) * down
    return out
