"""Losses as sums of weighted terms, so that a further term is one more entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.models.tokenizer import TokenizerOutput, VectorQuantizer
from llamagen.training.config import TokenizerLossConfig


@dataclasses.dataclass(frozen=True)
class Term:
    """One part of a loss."""

    value: Tensor
    """Scalar, unweighted: the number that is logged."""
    weight: float | Tensor


def total_loss(terms: Mapping[str, Term]) -> Tensor:
    """The weighted sum of all terms."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def tokenizer_terms(
    output: TokenizerOutput,
    images: Tensor,
    quantizer: VectorQuantizer,
    config: TokenizerLossConfig,
) -> dict[str, Term]:
    """The tokenizer's loss on ``images`` (B, 3, H, W), computed in float32."""
    distance = F.mse_loss if config.reconstruction == "l2" else F.l1_loss
    entropy = config.entropy_weight > 0
    quantized = quantizer.losses(output.quantized, entropy=entropy)
    weight = config.codebook_weight
    terms = {
        "reconstruction": Term(
            distance(output.reconstruction.float(), images), config.reconstruction_weight
        ),
        "codebook": Term(quantized.codebook, weight),
        "commitment": Term(quantized.commitment, weight * config.commitment_weight),
    }
    if entropy:
        terms["entropy"] = Term(quantized.entropy, weight * config.entropy_weight)
    return terms


def mean_psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean over images (B, 3, H, W) in [-1, 1] of the peak signal-to-noise ratio in dB."""
    error = (reconstructions.float().clamp(-1, 1) - images).square().flatten(1).mean(1)
    # White and black are 2 apart. An exact image counts as 100 dB, not as infinitely good.
    return (10.0 * torch.log10(4.0 / error.clamp_min(4e-10))).mean()


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of codes (B, T) under logits (B, T, V), in nats, computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def bits(nats: Tensor) -> Tensor:
    """Nats as bits."""
    return nats / math.log(2.0)
