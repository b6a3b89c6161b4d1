"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from llamagen.training.config import LoopConfig


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two or more dimensions; Adam where decay is 0.

    Biases and the scales of norms have one dimension: pulling them to 0 would only distort.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        # One kernel for all tensors: for small models the many small ones cost more than the sums.
        fused=trained[0].device.type in ("cpu", "cuda"),
    )


def learning_rate(config: LoopConfig, step: int) -> float:
    """The learning rate of step ``step``, counted from 0: a function of the step alone."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives all parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
