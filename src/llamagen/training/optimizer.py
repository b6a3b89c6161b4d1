"""The optimiser and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)

from llamagen.training.config import LoopConfig


def make_optimizer(model: nn.Module, config: LoopConfig, *, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two or more dimensions; Adam where decay is 0.

    Biases and the scales of norms have one dimension: pulling them to 0 would only distort.

    Args:
        model: its weights that take gradients are trained.
        config: everything but the learning rate.
        lr: the learning rate that ``set_learning_rate`` scales.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [{**group, "full_lr": lr} for group in groups if group["params"]],
        lr=lr,
        betas=config.betas,
        # One kernel for all tensors: for small models the many small ones cost more than the sums.
        fused=trained[0].device.type in ("cpu", "cuda"),
    )


def learning_rate(config: LoopConfig, step: int) -> float:
    """The part of the full learning rate that step ``step``, from 0, is taken with.

    A function of the step alone.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, part: float) -> None:
    """Gives all weights this part of their full learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * part


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's own tensors by the names of the weights; before the first step, zeros.

    Learning rates and the like are not in it: they are the recipe's.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
