"""Cross-entropy of an output head, without ever holding all logits.

At 16,384 codes the logits of a batch of 8 x 256 positions take 134 MB in float32, their gradient
as much again, and at 1,024 positions an image four times that. Here a few hundred positions are
computed at a time.

Shapes: N positions, D width, V codebook size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_LOGITS = 1 << 23
"""Logits computed at a time: 32 MB in float32. Smaller parts were slower on a CPU."""


def code_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of ``targets`` under the logits ``hidden @ weight.T``, in nats.

    Products are in the precision of autocast, or else of ``hidden``; everything after them is in
    float32 (in float64 if the input is).

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64.
        row_weights: (N,); by default 1 each. The mean is over their sum, or 0 if that is 0.

    Returns:
        A scalar.
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
    loss: Tensor = _CodeLoss.apply(hidden, weight, targets, shares)
    return loss


class _CodeLoss(torch.autograd.Function):
    """Computes the gradients along with the loss: the logits are needed for both."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shares: Tensor
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        shares = shares.to(wide)
        loss = hidden.new_zeros((), dtype=wide)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums of many chunks: in half precision, small ones would be lost.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        size = max(1, _CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            inputs, wanted, share = hidden[part], targets[part, None], shares[part, None]
            logits = (inputs @ weight.T).to(wide)
            # exp, sum and log in one pass each, in place.
            logits -= logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(1, wanted)
            sums = logits.exp_().sum(dim=-1, keepdim=True)
            loss += ((sums.log() - chosen) * share).sum()
            if not (needs_hidden or needs_weight):
                continue
            # The gradient of the logits: probabilities, less one at the target.
            logits *= share / sums
            logits.scatter_add_(1, wanted, -share)
            slopes = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slopes @ weight
            if grad_weight is not None:
                grad_weight += slopes.T @ inputs
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grads = [
            None if grad is None else grad * grad_output.to(grad.dtype)
            for grad in ctx.saved_tensors
        ]
        return grads[0], grads[1], None, None
