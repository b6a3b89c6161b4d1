"""Checkpoint files as people have them, with small models."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from tests.tiny_models import tiny_tokenizer, tiny_transformer

ARGUMENTS = argparse.Namespace(
    n_head=4, image_size=256, downsample_size=64, vocab_size=64, lr=1e-4, tags=["a"], resume=None
)
"""What a published training stores of its arguments, for ``transformer()``."""


def transformer(**changes) -> Transformer:
    return tiny_transformer(**changes)


def tokenizer(**changes) -> ImageTokenizer:
    """As small as one with the 32 norm groups of the published ones can be."""
    return tiny_tokenizer(**{"base_channels": 32, "norm_groups": 32, **changes})


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
