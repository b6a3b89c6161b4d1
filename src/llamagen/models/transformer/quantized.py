"""Weights in 8 or 4 bits: what decoding reads shrinks to a half or a third of bfloat16.

Only matrices of the blocks and the output head are quantised; embeddings, norms and everything
that is computed stay in the model's precision. A weight is a whole number of 8 bits times a scale
of its output. In int4 that number is one of 4 bits times a factor, which ``GROUP`` neighbouring
inputs share: so the products of both are products of 8-bit numbers (as in QServe, Lin et al.
2405.04532).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import Quantization, TransformerConfig
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.models.transformer.model import Transformer

GROUP = 32
"""Inputs that share a scale in int4."""
_LARGEST_FACTOR = 15


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weights are whole numbers times scales.

    int8: ``weight`` (outputs, inputs) int8. int4: ``weight`` (outputs, inputs / 2) uint8, two
    numbers a byte with 8 added to each, the first in the low half, and ``factors`` (outputs,
    inputs / GROUP) uint8 from 1 to 15. ``scales`` (outputs,) are float32, whatever the model's
    precision.
    """

    weight: Tensor
    scales: Tensor
    factors: Tensor | None

    def __init__(self, inputs: int, outputs: int, quantization: Quantization) -> None:
        """Made empty: to be filled by ``fill`` or from a file."""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.quantization = quantization
        weight = torch.zeros(outputs, inputs, dtype=torch.int8)
        factors = None
        if quantization == "int4":
            weight = torch.zeros(outputs, inputs // 2, dtype=torch.uint8)
            factors = torch.ones(outputs, inputs // GROUP, dtype=torch.uint8)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", torch.zeros(outputs))
        self.register_buffer("factors", factors)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Takes the nearest numbers to ``weight`` (outputs, inputs)."""
        if self.quantization == "int4":
            self.weight, self.factors, self.scales = _to_int4(weight.float())
        else:
            self.weight, self.scales = _to_int8(weight.float())

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(outputs, inputs), rounded to ``dtype`` once."""
        numbers = self.weight
        if self.factors is not None:
            pairs = torch.stack([self.weight & 15, self.weight >> 4], dim=-1).view(torch.int8) - 8
            groups = pairs.flatten(1).unflatten(1, (-1, GROUP))
            # From -120 to 105, which 8 bits hold.
            numbers = (groups * self.factors.view(torch.int8).unsqueeze(-1)).flatten(1)
        # Into a tensor of the wanted dtype: a GPU then does it in one pass, with nothing in float32
        # that would have to be written and read again.
        weight = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
        return torch.mul(numbers, self.scales.unsqueeze(-1), out=weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        # Elsewhere than in our kernels for CPUs this saves memory, not time: the product reads the
        # weights in the precision of ``x``. torch has a product with 8-bit weights for GPUs
        # (_weight_int8pack_mm), but only of float32, so it is not used here. Not measured on a GPU.
        return F.linear(x, self.dequantized(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # A model that goes to bfloat16 takes its scales along to the device, not to bfloat16.
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.weight.device)
        return self


@torch.no_grad()
def quantize(model: Transformer, quantization: Quantization) -> None:
    """Replaces the matrices of a model by quantised ones, in place.

    Raises:
        InputError: the model is quantised already, or its sizes do not fit.
    """
    refuse_quantized(model.config, "be quantised again")
    if quantization == "int4":
        _check_groups(model.config)
    for name, linear in _linears(model):
        quantized = QuantizedLinear(linear.in_features, linear.out_features, quantization)
        quantized.fill(linear.weight)
        model.set_submodule(name, quantized.to(linear.weight.device))
    model.config = dataclasses.replace(model.config, quantization=quantization)


def make_quantized(model: Transformer, quantization: Quantization) -> None:
    """Gives a model that is being built empty quantised layers, for weights to come."""
    if quantization == "int4":
        _check_groups(model.config)
    for name, linear in _linears(model):
        empty = QuantizedLinear(linear.in_features, linear.out_features, quantization)
        model.set_submodule(name, empty)


def refuse_quantized(config: TransformerConfig, what: str) -> None:
    """Says that a model cannot ``what``, if it is quantised.

    Raises:
        InputError: it is.
    """
    if config.quantization is not None:
        raise InputError(
            f"a transformer in {config.quantization} cannot {what}; take the one that it was "
            f"made from"
        )


def _linears(model: Transformer) -> list[tuple[str, nn.Linear]]:
    found = [
        (f"layers.{index}.{name}", cast("nn.Linear", block.get_submodule(name)))
        for index, block in enumerate(model.layers)
        for name in (
            "attention.wqkv",
            "attention.wo",
            "feed_forward.w1",
            "feed_forward.w3",
            "feed_forward.w2",
        )
    ]
    return [*found, ("output", model.output)]


def _check_groups(config: TransformerConfig) -> None:
    for size in (config.dim, config.ffn_dim):
        if size % GROUP:
            raise InputError(
                f"a layer has {size} inputs, which are no multiple of {GROUP}, so int4 does not "
                f"fit this transformer; take int8"
            )


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = _scales(weight)
    numbers = (weight / scales.unsqueeze(-1)).round().clamp(-127, 127)
    return numbers.to(torch.int8), scales


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = _scales(weight)
    groups = (weight / scales.unsqueeze(-1)).unflatten(1, (-1, GROUP))
    best = torch.full_like(groups[..., :1], torch.inf)
    factors = torch.ones_like(best)
    # Fifteen factors are few enough to try them all.
    for factor in range(1, _LARGEST_FACTOR + 1):
        error = (_nearest_int4(groups, factor) * factor - groups).square().sum(-1, keepdim=True)
        factors = torch.where(error < best, factor, factors)
        best = torch.minimum(best, error)
    numbers = (_nearest_int4(groups, factors) + 8).to(torch.uint8).flatten(1)
    packed = numbers[:, 0::2] | numbers[:, 1::2] << 4
    return packed, factors.squeeze(-1).to(torch.uint8), scales


def _scales(weight: Tensor) -> Tensor:
    """(outputs,): what makes the largest weight of each output 127."""
    return weight.abs().amax(-1).clamp_min(1e-12) / 127


def _nearest_int4(groups: Tensor, factors: Tensor | int) -> Tensor:
    return (groups / factors).round().clamp(-8, 7)
