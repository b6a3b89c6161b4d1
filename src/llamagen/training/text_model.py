"""A transformer together with the text encoder that is trained along with it.

Shapes: B images, L tokens of the longest caption, T codes of an image.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import SmallTextEncoderConfig
from llamagen.models.transformer import Transformer
from llamagen.text.encoder import TextEncoder

TRANSFORMER = "transformer."
"""What the names of the transformer's weights begin with."""
_ENCODER = "encoder.model."
_NEIGHBOUR_BIAS = 6.0
"""Against 80 others, nine tenths of the attention."""


class TextModel(nn.Module):
    """Captions and codes in, loss out."""

    def __init__(
        self, transformer: Transformer, encoder: TextEncoder, *, code_sets: bool = False
    ) -> None:
        """``code_sets``: learn as well to tell from a caption alone which codes its image has."""
        super().__init__()
        self.transformer = transformer
        self.encoder = encoder
        self.code_head = None
        if code_sets:
            config = transformer.config
            self.code_head = nn.Linear(config.text_dim, config.codebook_size, bias=False)

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.transformer.config

    def forward(
        self,
        codes: Tensor,
        ids: Tensor,
        *,
        condition_mask: Tensor,
        drop_condition: Tensor | None = None,
        targets: Tensor | None = None,
        target_weights: Tensor | None = None,
    ) -> Tensor:
        """As ``Transformer.forward``, with tokens (B, L) in the place of text features.

        In training with ``code_sets`` the loss is followed by the one of the codes' sets: (2,).
        """
        features = self.encoder(ids, condition_mask)
        result: Tensor = self.transformer(
            codes,
            features,
            condition_mask=condition_mask,
            drop_condition=drop_condition,
            targets=targets,
            target_weights=target_weights,
        )
        if self.code_head is None or targets is None or not self.training:
            return result
        further = self._code_set_loss(features, condition_mask, targets, target_weights)
        return torch.stack([result, further])

    def _code_set_loss(
        self, features: Tensor, mask: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Cross-entropy of the codes that an image has, each once, to what its caption says."""
        assert self.code_head is not None
        counted = mask.unsqueeze(-1).to(features.dtype)
        pooled = (features * counted).sum(1) / counted.sum(1).clamp(min=1)
        logits = self.code_head(F.rms_norm(pooled, pooled.shape[-1:])).float()
        there = torch.zeros_like(logits).scatter_(1, targets, 1.0)
        shares = there / there.sum(1, keepdim=True)
        losses = -(shares * logits.log_softmax(1)).sum(1)
        if weights is None:
            return losses.mean()
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9)


@torch.no_grad()
def init_encoder_tensor(
    name: str, tensor: Tensor, generator: torch.Generator, config: SmallTextEncoderConfig
) -> bool:
    """Gives a weight of the text encoder its first values, T5's; False if ``name`` is none.

    T5 does not scale its attention scores: its query weights are drawn smaller instead. All heads
    but one begin by looking at a neighbour each, since words are made of neighbouring bytes: it
    takes attention long to find that out by itself.
    """
    if not name.startswith(_ENCODER):
        return False
    if name.endswith("relative_attention_bias.weight"):
        _look_at_neighbours(tensor)
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


def _look_at_neighbours(bias: Tensor) -> None:
    """Fills T5's bias (buckets, heads), by distance: the next on the left, on the right, and so on.

    The first half of the buckets are for what stands on the left, the second for the right; the
    first few of each are for single distances.
    """
    buckets, heads = bias.shape
    bias.zero_()
    for head in range(heads - 1):
        distance = min(head // 2 + 1, buckets // 4 - 1)
        bias[distance + (head % 2) * (buckets // 2), head] = _NEIGHBOUR_BIAS
