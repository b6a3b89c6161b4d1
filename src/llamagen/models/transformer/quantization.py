"""Weights in int8: decoding reads half of what bfloat16 takes.

The matrices of the blocks and the output head are quantised; embeddings, norms and everything that
is computed stay in the model's precision. A weight is an integer times a scale of its output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import TransformerConfig
from llamagen.support.errors import InputError


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


def quantize(model: Any) -> None:
    """Replace the matrices of a ``Transformer`` by int8 ones, in place; refuse if they are."""
    refuse_quantized(model.config, "be quantised again")
    make_quantized(model, fill=True)
    model.config = dataclasses.replace(model.config, quantization="int8")


def make_quantized(model: Any, *, fill: bool = False) -> None:
    """Give a ``Transformer`` quantised layers: those of its weights, or empty ones."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        if name.startswith("cls_embedding."):
            continue
        linear = model.get_submodule(name)
        quantized = QuantizedLinear(linear.in_features, linear.out_features)
        if fill:
            quantized.fill(linear.weight)
            quantized.to(linear.weight.device)
        model.set_submodule(name, quantized)


def refuse_quantized(config: TransformerConfig, action: str) -> None:
    """Raise InputError if a model is quantised, which then cannot do ``action``."""
    if config.quantization is not None:
        raise InputError(
            f"a transformer in {config.quantization} cannot {action}; use the one that it was "
            f"made from"
        )
