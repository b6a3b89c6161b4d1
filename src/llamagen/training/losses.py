"""Losses of both models: sums of weighted terms, and the cross-entropy of the next codes.

Shapes: N positions, D width, V codebook size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.models.tokenizer import Quantizer, TokenizerOutput
from llamagen.training.config import TokenizerLossConfig

_CHUNK_LOGITS = 1 << 23
"""Logits computed at a time: 32 MB in float32. Smaller parts were slower on a CPU."""
_CHUNK_GRADS = 1 << 25
"""Gradients of logits per product: 64 MB in half precision. Smaller parts are slower, since the
gradients of the weights are then summed more often."""


@dataclasses.dataclass(frozen=True)
class Term:
    """Term of a loss."""

    value: Tensor
    """Scalar, unweighted, as it is logged."""
    weight: float | Tensor


def total_loss(terms: Mapping[str, Term]) -> Tensor:
    """Return the weighted sum of all terms."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def tokenizer_terms(
    output: TokenizerOutput, images: Tensor, quantizer: Quantizer, config: TokenizerLossConfig
) -> dict[str, Term]:
    """Return the terms of the tokenizer's loss on ``images`` (B, 3, H, W), computed in float32."""
    distance = F.mse_loss if config.reconstruction == "l2" else F.l1_loss
    reconstruction = distance(output.reconstruction.float(), images)
    terms = {"reconstruction": Term(reconstruction, config.reconstruction_weight)}
    entropy, commitment = config.entropy_weight, config.commitment_weight
    weights = {"codebook": 1.0, "commitment": commitment, "entropy": entropy}
    for name, value in quantizer.losses(output.quantized, entropy=entropy > 0).items():
        terms[name] = Term(value, config.codebook_weight * weights[name])
    return terms


def mean_psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return the mean peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1]."""
    error = (reconstructions.float().clamp(-1, 1) - images).square().flatten(1).mean(1)
    # The range is 2. An exact image counts as 100 dB.
    return (10.0 * torch.log10(4.0 / error.clamp_min(4e-10))).mean()


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of ``targets`` under the logits ``hidden @ weight.T``, in nats.

    All logits are never in memory: at 16,384 codes those of a batch of 8 x 256 positions take 134
    MB in float32, and their gradient as much again. A few hundred positions are computed at a time.

    Products are in the precision of autocast, or else of ``hidden`` (N, D) and ``weight`` (V, D);
    everything after them is in float32 (in float64 if the input is). ``row_weights`` (N,) are 1 by
    default; the mean is over their sum, or 0 if that is 0.
    """
    if row_weights is None:
        shares = hidden.new_full((len(hidden),), 1.0 / len(hidden), dtype=torch.float32)
    else:
        shares = row_weights.float() / row_weights.float().sum().clamp_min(1e-20)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        # What autocast would do to a linear layer; its gradients return in the types given.
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, shares)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients computed along with the loss, since both need the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shares: Tensor
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shares = shares.to(wide)
        loss = hidden.new_zeros((), dtype=wide)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        for rows in _parts(len(hidden), _CHUNK_GRADS // len(weight)):
            inputs, needs_any = hidden[rows], needs_hidden or needs_weight
            grad_logits = hidden.new_empty(len(inputs), len(weight)) if needs_any else None
            for part in _parts(len(inputs), _CHUNK_LOGITS // len(weight)):
                logits = (inputs[part] @ weight.T).to(wide)
                own = None if grad_logits is None else grad_logits[part]
                loss += _loss(logits, targets[rows][part], shares[rows][part], own)
            if grad_logits is not None and grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_logits is not None and needs_weight:
                product = grad_logits.T @ inputs
                # Sums of many parts: in half precision, small ones would be lost.
                grad_weight = product.to(wide) if grad_weight is None else grad_weight.add_(product)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = (
            None if grad is None else grad * grad_output.to(grad.dtype)
            for grad in ctx.saved_tensors
        )
        return hidden, weight, None, None


def _loss(logits: Tensor, targets: Tensor, shares: Tensor, grad_logits: Tensor | None) -> Tensor:
    """Return the weighted loss of rows of logits (n, V), overwritten; fill their gradient."""
    wanted, share = targets.unsqueeze(1), shares.unsqueeze(1)
    # exp, sum and log in one pass each, in place.
    logits -= logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(1, wanted)
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    if grad_logits is not None:
        # Probabilities, less one at the target.
        logits *= share / sums
        logits.scatter_add_(1, wanted, -share)
        grad_logits.copy_(logits)
    return ((sums.log() - chosen) * share).sum()


def _parts(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, count, size)]
