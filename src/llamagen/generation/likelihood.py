"""Likelihoods of codes under a model.

Shapes: B images, T codes of an image, C condition length, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.generation.request import uniform_draws
from llamagen.models.pretrained import eval_mode
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError

_MAX_LOGITS = 1 << 27
"""Logits that are in memory at once."""


@torch.inference_mode()
def code_log_likelihoods(
    model: Transformer,
    codes: Tensor,
    conditions: Iterable[Tensor],
    *,
    conditional: bool = True,
    orders: int = 1,
) -> Tensor:
    """Return log-probabilities of codes, each given those before it; without guidance and filters.

    A model of random order gives them in fixed random orders, the same for all images; of several,
    the mean.

    Args:
        model: its mode does not matter.
        codes: (B, rows, columns) int64.
        conditions: of each image a label (), or text features (C, text_dim) without padding.
        conditional: False for the model's own "no class" or "no text" instead of ``conditions``.
        orders: fixed orders that a model of random order is averaged over.

    Returns:
        (B, rows, columns) float32 nats on the model's device.
    """
    if orders < 1:
        raise InputError(f"orders is {orders}, expected at least 1")
    each = list(conditions)
    by_shape: dict[torch.Size, list[int]] = {}
    for index, condition in enumerate(each):
        by_shape.setdefault(condition.shape, []).append(index)
    flat = codes.flatten(1).to(model.device)
    batch = max(1, _MAX_LOGITS // (flat.shape[1] * model.config.codebook_size))
    found = torch.zeros(flat.shape, dtype=torch.float32, device=model.device)
    is_random = model.config.order == "random"
    # Conditions of one shape go together, so that none needs padding.
    for members, seed in (
        (alike[start : start + batch], seed)
        for alike in by_shape.values()
        for start in range(0, len(alike), batch)
        for seed in range(orders if is_random else 1)
    ):
        own, given = flat[members], {}
        cells = torch.arange(flat.shape[1], device=model.device)
        if is_random:
            cells = uniform_draws([seed], len(cells))[0].argsort(stable=True).to(model.device)
            given = {"order": cells.expand_as(own)}
        targets = own[:, cells]
        with eval_mode(model):
            logits = model(
                targets[:, :-1],
                torch.stack([each[member] for member in members]).to(model.device),
                drop_condition=torch.full((len(members),), not conditional, device=model.device),
                grid=(codes.shape[1], codes.shape[2]),
                **given,
            )
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        rows = torch.tensor(members, device=model.device)[:, None]
        found[rows, cells] -= nats.view(len(members), -1)
    return (found / (orders if is_random else 1)).view(codes.shape)
