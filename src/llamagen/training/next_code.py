"""A transformer in training: codes and conditions in, loss out.

Shapes: B images, L tokens of the longest caption, T codes of an image, V codebook size.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import SmallTextEncoderConfig
from llamagen.models.transformer import Transformer
from llamagen.text.encoder import TextEncoder
from llamagen.training.losses import chunked_cross_entropy

TRANSFORMER = "transformer."
"""Prefix of the names of the transformer's weights."""
_ENCODER = "encoder.model."
_NEIGHBOUR_BIAS = 6.0
"""Against 80 others, nine tenths of the attention."""


class NextCodeModel(nn.Module):
    """A transformer, perhaps with a text encoder that is trained along, and the loss of both.

    The loss is computed in ``forward`` because that is the call which DDP and FSDP hook: the
    weights of the output head, which the loss reads, are gathered for its duration.
    """

    def __init__(
        self,
        transformer: Transformer,
        encoder: TextEncoder | None = None,
        *,
        code_sets: bool = False,
    ) -> None:
        """``code_sets``: also learn to predict from a caption alone which codes its image has."""
        super().__init__()
        self.transformer = transformer
        self.encoder = encoder
        self.code_head: nn.Linear | None = None
        if code_sets:
            config = transformer.config
            self.code_head = nn.Linear(config.text_dim, config.codebook_size, bias=False)

    @property
    def saved(self) -> nn.Module:
        """The module whose state dict checkpoints hold: without an encoder, the transformer."""
        return self.transformer if self.encoder is None else self

    def forward(
        self,
        codes: Tensor,
        condition: Tensor,
        targets: Tensor,
        *,
        condition_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of the next codes, in nats.

        Args:
            codes: (B, T - 1) codes that the model is shown.
            condition: labels (B,) or text features; with an encoder, tokens (B, L).
            targets: (B, T) codes to be predicted.
            condition_mask: see ``Transformer.forward``.
            drop_condition: see ``Transformer.forward``.
            weights: (B,) weight of each image; by default all alike.

        Returns:
            A scalar. In training with ``code_sets`` (2,): the loss of the code sets is second.
        """
        if self.encoder is not None:
            assert condition_mask is not None
            condition = self.encoder(condition, condition_mask)
        hidden = self.transformer.hidden_states(
            codes, condition, condition_mask=condition_mask, drop_condition=drop_condition
        )
        loss = chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.transformer.output.weight,
            targets.flatten(),
            None if weights is None else weights.repeat_interleave(targets.shape[1]),
        )
        if self.code_head is None or not self.training:
            return loss
        assert condition_mask is not None
        return torch.stack([loss, self._code_set_loss(condition, condition_mask, targets, weights)])

    def _code_set_loss(
        self, features: Tensor, mask: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of the set of an image's codes, given its caption only."""
        assert self.code_head is not None
        counted = mask.unsqueeze(-1).to(features.dtype)
        pooled = (features * counted).sum(1) / counted.sum(1).clamp(min=1)
        logits = self.code_head(F.rms_norm(pooled, pooled.shape[-1:])).float()  # (B, V)
        present = torch.zeros_like(logits).scatter_(1, targets, 1.0)
        shares = present / present.sum(1, keepdim=True)
        losses = -(shares * logits.log_softmax(1)).sum(1)
        if weights is None:
            return losses.mean()
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9)


@torch.no_grad()
def init_encoder_tensor(
    name: str, tensor: Tensor, generator: torch.Generator, config: SmallTextEncoderConfig
) -> bool:
    """Fill a weight of the text encoder as T5 does; return False if ``name`` is not one of its.

    T5 does not scale its attention scores: its query weights are smaller instead. All heads but
    one start by attending to one neighbour each, since words are made of neighbouring bytes, which
    attention takes long to find out by itself.
    """
    if not name.startswith(_ENCODER):
        return False
    if name.endswith("relative_attention_bias.weight"):
        _attend_to_neighbours(tensor)
        return True
    hidden = config.hidden_dim or 2 * config.dim
    head = config.dim // config.heads
    scales = {
        r"layer_norm|final_layer_norm": None,
        r"\.q\.": (config.dim * head) ** -0.5,
        r"\.wo\.": hidden**-0.5,
        r"shared|embed_tokens": 1.0,
        r"": config.dim**-0.5,
    }
    scale = next(value for pattern, value in scales.items() if re.search(pattern, name))
    if scale is None:
        nn.init.ones_(tensor)
    else:
        nn.init.normal_(tensor, std=scale, generator=generator)
    return True


def _attend_to_neighbours(bias: Tensor) -> None:
    """Fill T5's bias (buckets, heads): the next byte on the left, on the right, and so on.

    The first half of the buckets are for bytes on the left, the second for the right; the first
    few of each are for single distances.
    """
    buckets, heads = bias.shape
    bias.zero_()
    for head in range(heads - 1):
        distance = min(head // 2 + 1, buckets // 4 - 1)
        bias[distance + (head % 2) * (buckets // 2), head] = _NEIGHBOUR_BIAS
