"""The input of the networks."""

from __future__ import annotations

import torch
from torch import Tensor

from llamagen.support.errors import InputError


def require_images(images: Tensor) -> None:
    """Raise InputError unless images are bytes: uint8 (B, 3, H, W).

    Metrics are defined on images as they are stored, rounding included.
    """
    fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0
    if images.dtype != torch.uint8 or not fits:
        raise InputError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} cannot be measured; "
            f"give uint8 of shape (B, 3, H, W)"
        )
