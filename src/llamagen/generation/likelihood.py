"""How likely a model finds codes.

Shapes: B images, T codes of an image, C condition length, V codes of the codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.models.transformer import Transformer

_LOGITS = 1 << 27
"""Numbers that are in memory at once, at most."""


@torch.inference_mode()
def code_log_likelihoods(
    model: Transformer,
    codes: Tensor,
    condition: Tensor,
    *,
    condition_mask: Tensor | None = None,
    conditional: bool = True,
) -> Tensor:
    """Log-probabilities of codes, each given those before it; without guidance and filters.

    Args:
        model: in eval mode.
        codes: (B, rows, columns) int64.
        condition: labels (B,) or text features (B, C, text_dim), real features last.
        condition_mask: (B, C) bool, False where text features are padding.
        conditional: False for the model's own "no class" or "no text" instead of ``condition``.

    Returns:
        (B, rows, columns) float32 nats on the model's device.
    """
    device = model.device
    flat, condition = codes.flatten(1).to(device), condition.to(device)
    mask = None if condition_mask is None else condition_mask.to(device)
    at_once = max(1, _LOGITS // (flat.shape[1] * model.config.codebook_size))
    found = []
    for first in range(0, len(flat), at_once):
        rows = slice(first, first + at_once)
        part = flat[rows]
        logits = model(
            part[:, :-1],
            condition[rows],
            condition_mask=None if mask is None else mask[rows],
            drop_condition=torch.full((len(part),), not conditional, device=device),
            grid=(codes.shape[1], codes.shape[2]),
        )
        nats = F.cross_entropy(logits.float().flatten(0, 1), part.flatten(), reduction="none")
        found.append(-nats.view(-1, *codes.shape[1:]))
    return torch.cat(found)
