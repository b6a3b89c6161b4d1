"""What a small text encoder begins with."""

from __future__ import annotations

import torch

from llamagen.config import SmallTextEncoderConfig
from llamagen.text.encoder import TextEncoder
from llamagen.training.next_code import init_encoder_tensor


def test_heads_begin_by_looking_at_neighbours():
    config = SmallTextEncoderConfig(dim=48, layers=1, heads=6, max_length=30)
    encoder = TextEncoder.small(config).eval()
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        assert init_encoder_tensor(f"encoder.{name}", parameter, numbers, config)
    ids, mask = encoder.tokens([list(range(10, 30))])
    encoder.model.set_attn_implementation("eager")
    output = encoder.model(ids, attention_mask=mask, output_attentions=True)
    (attention,) = output.attentions
    middle = attention[0, :, 10]
    # One left, one right, two left, two right, three left; the last looks everywhere.
    assert middle[:5].argmax(-1).tolist() == [9, 11, 8, 12, 7]
    assert (middle[:5].amax(-1) > 0.7).all()
    assert middle[5].max() < 0.3
