"""Small models for tests, with weights that make their outputs vary."""

from __future__ import annotations

import torch

from llamagen.config import SmallTextEncoderConfig, TokenizerConfig, TransformerConfig
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.pipeline import Pipeline
from llamagen.support.labels import Labels
from llamagen.text.encoder import TextEncoder


def tiny_transformer(seed: int = 0, **changes) -> Transformer:
    """An untrained transformer whose output head, zero at first, is drawn too."""
    values = {
        "dim": 32,
        "layers": 2,
        "heads": 4,
        "hidden_dim": 64,
        "codebook_size": 64,
        "grid": (4, 4),
        "num_classes": 5,
        "text_length": 6,
        "text_dim": 16,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(**values))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_tokenizer(seed: int = 0, **changes) -> ImageTokenizer:
    """An untrained tokenizer with downsampling 4 and 64 codes."""
    values = {
        "base_channels": 16,
        "channel_multipliers": (1, 1, 2),
        "norm_groups": 8,
        "z_channels": 16,
        "codebook_size": 64,
        "codebook_dim": 4,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImageTokenizer(TokenizerConfig(**values)).eval()


def tiny_pipeline(**changes) -> Pipeline:
    """Both, for five classes."""
    labels = Labels(("cat", "dog", "red fox", "grey fox", "crane"), (("n1",), (), (), (), ()))
    return Pipeline(tiny_tokenizer(), tiny_transformer(**changes), labels=labels, name="tiny")


def tiny_text_encoder(seed: int = 0, *, clean: bool = True, **changes) -> TextEncoder:
    """An untrained text encoder over bytes, as wide as the tiny transformer's text features."""
    values = {"dim": 16, "layers": 2, "heads": 2, "max_length": 30, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TextEncoder.small(SmallTextEncoderConfig(**values), clean=clean).eval()


def tiny_text_pipeline(**changes) -> Pipeline:
    """Tokenizer, text-conditional transformer and text encoder."""
    transformer = tiny_transformer(condition="text", text_length=30)
    encoder = tiny_text_encoder(**changes)
    return Pipeline(tiny_tokenizer(), transformer, name="tiny-text", text_encoder=encoder)
