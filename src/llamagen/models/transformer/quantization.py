"""Weights in int8: decoding reads half of what bfloat16 takes.

The matrices of the blocks and the output head are quantised; embeddings, norms and everything that
is computed stay in the model's precision. A weight is an integer times a scale of its output.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import TransformerConfig
from llamagen.support.errors import InputError

_BLOCK_LINEARS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
)


class Quantizable(Protocol):
    """A transformer, as far as quantisation needs to know it."""

    config: TransformerConfig
    layers: nn.ModuleList

    def get_submodule(self, target: str) -> nn.Module: ...  # noqa: D102
    def set_submodule(self, target: str, module: nn.Module) -> None: ...  # noqa: D102


class QuantizedLinear(nn.Module):
    """A linear layer without bias: ``weight`` (outputs, inputs) int8 times ``scales`` (outputs,).

    Scales are float32, whatever the model's precision.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        """Create an empty layer, to be filled by ``fill`` or from a file."""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(outputs, dtype=torch.float32))

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Round ``weight`` (outputs, inputs) to the nearest integers."""
        weight = weight.float()
        self.scales = weight.abs().amax(-1).clamp_min(1e-12) / 127
        integers = (weight / self.scales.unsqueeze(-1)).round().clamp(-127, 127)
        self.weight = integers.to(torch.int8)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (outputs, inputs), rounded to ``dtype`` once."""
        # Into a tensor of the wanted dtype: a GPU then does it in one pass, without float32
        # intermediates.
        weight = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.weight, self.scales.unsqueeze(-1), out=weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        # Outside of the CPU kernels this saves memory, not time: the product reads the weights in
        # the precision of ``x``.
        return F.linear(x, self.dequantized(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # A model that is cast to bfloat16 moves its scales to the device, but does not cast them.
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.weight.device)
        return self


@torch.no_grad()
def quantize(model: Quantizable) -> None:
    """Replace the matrices of a model by int8 ones, in place.

    Raises:
        InputError: the model is quantised already.
    """
    refuse_quantized(model.config, "be quantised again")
    for name in _linear_names(model):
        linear = cast("nn.Linear", model.get_submodule(name))
        quantized = QuantizedLinear(linear.in_features, linear.out_features)
        quantized.fill(linear.weight)
        model.set_submodule(name, quantized.to(linear.weight.device))
    model.config = dataclasses.replace(model.config, quantization="int8")


def make_quantized(model: Quantizable) -> None:
    """Give a model that is being built empty quantised layers, for weights to come."""
    for name in _linear_names(model):
        linear = cast("nn.Linear", model.get_submodule(name))
        model.set_submodule(name, QuantizedLinear(linear.in_features, linear.out_features))


def refuse_quantized(config: TransformerConfig, action: str) -> None:
    """Raise InputError if a model is quantised, which then cannot do ``action``."""
    if config.quantization is not None:
        raise InputError(
            f"a transformer in {config.quantization} cannot {action}; use the one that it was "
            f"made from"
        )


def _linear_names(model: Quantizable) -> list[str]:
    layers = range(len(model.layers))
    return [*(f"layers.{layer}.{name}" for layer in layers for name in _BLOCK_LINEARS), "output"]
