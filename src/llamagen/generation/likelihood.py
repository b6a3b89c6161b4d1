"""How likely a model finds codes.

Shapes: B images, T codes of an image, C condition length, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.models.transformer import Transformer

_MAX_LOGITS = 1 << 27
"""Logits that are in memory at once."""


@torch.inference_mode()
def code_log_likelihoods(
    model: Transformer,
    codes: Tensor,
    conditions: Iterable[Tensor],
    *,
    conditional: bool = True,
) -> Tensor:
    """Log-probabilities of codes, each given those before it; without guidance and filters.

    Args:
        model: in eval mode.
        codes: (B, rows, columns) int64.
        conditions: of each image a label (), or text features (C, text_dim) without padding.
        conditional: False for the model's own "no class" or "no text" instead of ``conditions``.

    Returns:
        (B, rows, columns) float32 nats on the model's device.
    """
    each = list(conditions)
    grid = (codes.shape[1], codes.shape[2])
    flat = codes.flatten(1).to(model.device)
    batch = max(1, _MAX_LOGITS // (flat.shape[1] * model.config.codebook_size))
    found = torch.empty(flat.shape, dtype=torch.float32, device=model.device)
    for members in _equal_shapes(each, batch):
        own = flat[members]
        logits = model(
            own[:, :-1],
            torch.stack([each[member] for member in members]).to(model.device),
            drop_condition=torch.full((len(members),), not conditional, device=model.device),
            grid=grid,
        )
        nats = F.cross_entropy(logits.float().flatten(0, 1), own.flatten(), reduction="none")
        found[members] = -nats.view(len(members), -1)
    return found.view(codes.shape)


def _equal_shapes(tensors: Sequence[Tensor], batch: int) -> Iterator[list[int]]:
    """Indices of tensors in batches whose tensors have one shape, so that none needs padding."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(index)
    for members in by_shape.values():
        for start in range(0, len(members), batch):
            yield members[start : start + batch]
