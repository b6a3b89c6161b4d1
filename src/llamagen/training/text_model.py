"""A transformer together with the text encoder that is trained along with it.

Shapes: B images, L tokens of the longest caption, T codes of an image.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from llamagen.config import SmallTextEncoderConfig
from llamagen.text.encoder import TextEncoder
from llamagen.transformer import Transformer

TRANSFORMER = "transformer."
"""What the names of the transformer's weights begin with."""
_ENCODER = "encoder.model."
_NEIGHBOUR_BIAS = 6.0
"""Against 80 others, nine tenths of the attention."""


class TextModel(nn.Module):
    """Captions and codes in, loss out."""

    def __init__(self, transformer: Transformer, encoder: TextEncoder) -> None:
        super().__init__()
        self.transformer = transformer
        self.encoder = encoder

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
        """As ``Transformer.forward``, with tokens (B, L) in the place of text features."""
        return self.transformer(
            codes,
            self.encoder(ids, condition_mask),
            condition_mask=condition_mask,
            drop_condition=drop_condition,
            targets=targets,
            target_weights=target_weights,
        )


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
