"""Estimates of the images that fit into memory at once."""

from __future__ import annotations

import torch

from llamagen.config import Grid, TokenizerConfig
from llamagen.models.transformer import KVCache, Transformer
from llamagen.support.devices import free_memory

MAX_BATCH = 64
"""More rows gain little throughput on any device, and make the first image later."""

_SHARE = 0.5
"""Part of the free memory that a batch may plan with; the estimates below are not exact."""


def sampling_batch_size(
    model: Transformer, *, sequences: int, condition_length: int | None = None, window: int = 1
) -> int:
    """Return how many images can be generated at once, from 1 to ``MAX_BATCH``.

    Each has ``sequences`` with ``condition_length`` positions of a condition (by default the
    model's maximum), and a pass predicts ``window`` codes of it.
    """
    config = model.config
    length = config.condition_length if condition_length is None else condition_length
    positions = length + config.num_codes * config.tokens_per_code
    cache = KVCache.bytes_per_sequence(config, positions, model.cache_dtype)
    # Activations of the prefill, and logits in float32 with their sorted and cumulated copies.
    activations = length * (8 * config.dim + 3 * config.ffn_dim) * model.dtype.itemsize
    per_sequence = cache + activations + window * 8 * 4 * config.codebook_size
    return _fit(free_memory(model.device), per_sequence * sequences)


def decoding_batch_size(
    config: TokenizerConfig, grid: Grid, *, device: torch.device, dtype: torch.dtype
) -> int:
    """Return how many images can be decoded (or encoded) at once, from 1 to ``MAX_BATCH``."""
    pixels = grid[0] * grid[1] * config.downsampling**2
    # The widest maps are those of full resolution and those that were just upsampled to it;
    # about six of them are alive at once (input, normed, two convolutions, residual, workspace).
    widest = config.base_channels * max(config.channel_multipliers[:2])
    return _fit(free_memory(device), 6 * pixels * widest * dtype.itemsize)


def _fit(free: int, per_image: int) -> int:
    return max(1, min(MAX_BATCH, int(_SHARE * free) // per_image))
