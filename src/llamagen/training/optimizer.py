"""The optimiser, its learning rate, and a running mean of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from llamagen.training.config import LoopConfig
from llamagen.training.parallel import local


def make_optimizer(model: nn.Module, config: LoopConfig, *, lr: float) -> torch.optim.AdamW:
    """Return AdamW for the weights of ``model`` that take gradients, at a full rate of ``lr``.

    Only tensors of two or more dimensions decay: biases and scales of norms have one.
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
        # One kernel for all tensors: small models spend more on launches than on arithmetic.
        fused=trained[0].device.type in ("cpu", "cuda"),
    )


def learning_rate(config: LoopConfig, step: int) -> float:
    """Return the fraction of the full learning rate in step ``step``, from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    falling = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * falling


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors by the names of the weights; before the first step, zeros."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    # The rest, learning rates and the like, is the recipe's.
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class Ema:
    """Exponential moving average of a model's weights (Polyak averaging), sharded as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the mean with the weights after ``step`` steps."""
        # Smaller early on, so that the random first weights are soon forgotten.
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [local(weight) for weight in self._weights.values()]
        torch._foreach_lerp_([local(mean) for mean in self._means.values()], weights, 1.0 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the mean weights into the model, and back when the block ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own, mean = local(weight), local(self._means[name])
            held = own.clone()
            own.copy_(mean)
            mean.copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean weights by their names; reading a checkpoint fills them in place."""
        return dict(self._means)
