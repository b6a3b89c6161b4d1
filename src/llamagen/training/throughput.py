"""How much of a device's arithmetic a training step uses (model FLOPs utilisation, MFU).

Counted as the field does (Chowdhery et al. 2204.02311, appendix B): what the model needs, forward
and backward, and nothing that is computed twice to save memory.
"""

from __future__ import annotations

import torch

from llamagen.config import TransformerConfig

_PEAK_BFLOAT16 = {
    # Dense, without sparsity, in FLOP/s, from NVIDIA's data sheets. The first name that occurs in
    # the device's counts.
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def training_flops(config: TransformerConfig) -> float:
    """Floating-point operations of one training step for one image.

    Six for each weight of a matrix product and each position (two forward, four backward), and
    the attention's own products over all pairs of positions, causal or not.
    """
    positions = config.condition_length + config.num_codes - 1
    width = config.head_dim * (config.heads + 2 * config.num_kv_heads)
    block = config.dim * width + config.dim * config.dim + 3 * config.dim * config.ffn_dim
    weights = config.layers * block + config.dim * config.codebook_size
    attention = 12.0 * config.layers * config.dim * positions**2
    return 6.0 * weights * positions + attention


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What a device can do per second at a precision; None where that is not known."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_BFLOAT16.items() if known in name), None)
