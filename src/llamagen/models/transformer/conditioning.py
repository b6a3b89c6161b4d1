"""Conditions: the class or text that stands in front of the codes.

Shapes: B batch, C condition length, D model width.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from llamagen.config import TransformerConfig
from llamagen.support.errors import InputError


class ClassCondition(nn.Module):
    """A table with one embedding per class and, in the last row, one for "no class"."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Labels (B,) to embeddings (B, 1, D); rows where ``drop`` (B,) is True get "no class"."""
        if drop is not None:
            labels = labels.masked_fill(drop, self.num_classes)
        return self.embedding_table(labels).unsqueeze(1)

    def unconditional(self, labels: Tensor) -> Tensor:
        """Return the input that means "no class", one per row of ``labels``: (B,)."""
        return torch.full_like(labels, self.num_classes)

    def check(self, labels: Tensor) -> None:
        """Raise InputError unless ``labels`` is (B,) with integers from 0 to num_classes."""
        if labels.ndim != 1 or labels.is_floating_point():
            raise InputError(
                f"class labels have shape {tuple(labels.shape)} and type {labels.dtype}, "
                f"expected one integer per image"
            )
        low, high = map(int, labels.aminmax()) if labels.numel() else (0, 0)
        if low < 0 or high > self.num_classes:
            raise InputError(
                f"class labels run from {low} to {high}, but this "
                f"model has classes 0 to {self.num_classes - 1} ({self.num_classes} is no class)"
            )


class TextCondition(nn.Module):
    """A two-layer MLP over text features, and learned features that mean "no text"."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        layers = {
            "fc1": nn.Linear(config.text_dim, config.dim, bias=False),
            "gelu": nn.GELU(approximate="tanh"),
            "fc2": nn.Linear(config.dim, config.dim, bias=False),
        }
        self.cap_proj = nn.Sequential(OrderedDict(layers))
        # A buffer in the public code, so it was never trained there; a parameter here.
        self.uncond_embedding = nn.Parameter(torch.empty(config.text_length, config.text_dim))

    def forward(self, features: Tensor, drop: Tensor | None = None) -> Tensor:
        """Features (B, C, text_dim), real ones last, to embeddings (B, C, D).

        Rows where ``drop`` (B,) is True get "no text" instead.
        """
        if drop is not None:
            features = features.to(self.uncond_embedding.dtype)
            features = torch.where(drop[:, None, None], self.unconditional(features), features)
        return self.project(features)

    def project(self, features: Tensor) -> Tensor:
        """Text features (..., text_dim) to embeddings (..., D)."""
        return self.cap_proj(features.to(self.uncond_embedding.dtype))

    def unconditional(self, features: Tensor) -> Tensor:
        """Return the input that means "no text", shaped like ``features`` (B, C, text_dim).

        Features stand at the end of the condition, so C below text_length takes the last C.
        """
        return self.uncond_embedding[-features.shape[1] :].expand(features.shape)

    def check(self, features: Tensor) -> None:
        """Raise InputError unless ``features`` is (B, C, text_dim) with C <= text_length."""
        length, width = self.uncond_embedding.shape
        if features.ndim != 3 or features.shape[-1] != width or features.shape[1] > length:
            raise InputError(
                f"text features have shape {tuple(features.shape)}, expected (images, up to "
                f"{length}, {width}); use the text encoder that this model was trained with"
            )
