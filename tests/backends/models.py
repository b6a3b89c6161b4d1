"""Models that the kernels take."""

import torch

from tests.tiny_models import tiny_transformer

# Sizes that the kernels take: inputs in 32s, outputs in 16s.
SIZES = {
    "even": {"dim": 64, "heads": 2, "layers": 2},
    "grouped queries": {"dim": 128, "heads": 4, "kv_heads": 2, "layers": 2},
    "odd heads": {"dim": 160, "heads": 8, "layers": 2},  # head dimension 20
    "heads of 64": {"dim": 128, "heads": 2, "layers": 2},
    "heads of 128": {"dim": 256, "heads": 2, "layers": 1},
    "wide heads": {"dim": 480, "heads": 4, "layers": 1},  # head dimension 120
    "QK-norm": {"dim": 160, "heads": 8, "kv_heads": 2, "layers": 2, "qk_norm": True},
}


def model_of(size, dtype=torch.float32, **settings):
    model = tiny_transformer(**SIZES[size], **settings)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(weight, 0.5, 2.0, generator=generator)
    return model.to(dtype)
