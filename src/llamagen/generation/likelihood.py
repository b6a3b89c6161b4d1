"""Likelihoods of codes under a model.

Shapes: B images, T codes of an image, C condition length, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.models.pretrained import eval_mode
from llamagen.models.transformer import Transformer

_MAX_LOGITS = 1 << 27
"""Logits that are in memory at once."""


@torch.inference_mode()
def code_log_likelihoods(
    model: Transformer, codes: Tensor, conditions: Iterable[Tensor], *, conditional: bool = True
) -> Tensor:
    """Return log-probabilities of codes, each given those before it; without guidance and filters.

    Args:
        model: its mode does not matter.
        codes: (B, rows, columns) int64.
        conditions: of each image a label (), or text features (C, text_dim) without padding.
        conditional: False for the model's own "no class" or "no text" instead of ``conditions``.

    Returns:
        (B, rows, columns) float32 nats on the model's device.
    """
    each = list(conditions)
    by_shape: dict[torch.Size, list[int]] = {}
    for index, condition in enumerate(each):
        by_shape.setdefault(condition.shape, []).append(index)
    flat = codes.flatten(1).to(model.device)
    batch = max(1, _MAX_LOGITS // (flat.shape[1] * model.config.codebook_size))
    found = torch.empty(flat.shape, dtype=torch.float32, device=model.device)
    # Conditions of one shape go together, so that none needs padding.
    for members in (
        alike[start : start + batch]
        for alike in by_shape.values()
        for start in range(0, len(alike), batch)
    ):
        own = flat[members]
        with eval_mode(model):
            logits = model(
                own[:, :-1],
                torch.stack([each[member] for member in members]).to(model.device),
                drop_condition=torch.full((len(members),), not conditional, device=model.device),
                grid=(codes.shape[1], codes.shape[2]),
            )
        nats = F.cross_entropy(logits.float().flatten(0, 1), own.flatten(), reduction="none")
        found[members] = -nats.view(len(members), -1)
    return found.view(codes.shape)
