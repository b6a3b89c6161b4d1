"""Configurations inferred from shapes, of published and other sizes."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from llamagen.checkpoints.load import infer_tokenizer_config, infer_transformer_config
from llamagen.checkpoints.published import Checkpoint
from llamagen.config import (
    TOKENIZER_PRESETS,
    TRANSFORMER_PRESETS,
    TokenizerConfig,
    TransformerConfig,
)
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError

OFFICIAL = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "official_checkpoint_shapes.json").read_text()
)


def checkpoint(kind, shapes, **arguments) -> Checkpoint:
    return Checkpoint(
        source="a.pt",
        kind=kind,
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        arguments=arguments,
        tensors=(),
    )


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        is_tokenizer = isinstance(config, TokenizerConfig)
        model = ImageTokenizer(config) if is_tokenizer else Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name.startswith("GPT-")])
def test_transformer_presets(name):
    size, kind = name.removeprefix("GPT-").split("/")
    condition = "class" if kind == "c2i" else "text"
    expected = dataclasses.replace(TRANSFORMER_PRESETS[size], condition=condition)
    found = infer_transformer_config(checkpoint("transformer", OFFICIAL[name]["shapes"]))
    assert found == expected


@pytest.mark.parametrize("size", TRANSFORMER_PRESETS)
def test_transformer_presets_with_text(size):
    config = dataclasses.replace(TRANSFORMER_PRESETS[size], condition="text")
    # One block tells as much as all of them, but for their number.
    shapes = shapes_of(dataclasses.replace(config, layers=1))
    first = {n: s for n, s in shapes.items() if n.startswith("layers.0.")}
    for layer in range(1, config.layers):
        shapes.update({n.replace(".0.", f".{layer}.", 1): s for n, s in first.items()})
    assert infer_transformer_config(checkpoint("transformer", shapes)) == config


@pytest.mark.parametrize("name", TOKENIZER_PRESETS)
def test_tokenizer_presets(name):
    found = infer_tokenizer_config(checkpoint("image tokenizer", OFFICIAL[name]["shapes"]))
    assert found == TOKENIZER_PRESETS[name]


OTHER_TRANSFORMERS = [
    {"dim": 48, "layers": 3, "heads": 6, "codebook_size": 100, "num_classes": 7},
    {"dim": 64, "layers": 1, "heads": 8, "kv_heads": 2, "hidden_dim": 96, "codebook_size": 32},
    {"dim": 64, "layers": 2, "heads": 8, "kv_heads": 1, "condition": "text", "text_dim": 24},
    {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 4, "num_classes": 10},
]


@pytest.mark.parametrize("values", OTHER_TRANSFORMERS)
def test_other_transformers(values):
    config = TransformerConfig(grid=(5, 9), **values)
    read = checkpoint("transformer", shapes_of(config))
    assert infer_transformer_config(read, grid=(5, 9), heads=config.heads) == config


@pytest.mark.parametrize(
    "values",
    [
        {"base_channels": 32, "channel_multipliers": (1,), "encoder_blocks": 1},
        {"base_channels": 32, "channel_multipliers": (1, 3, 2), "decoder_blocks": 1},
        {"base_channels": 64, "channel_multipliers": (2, 1), "z_channels": 12, "codebook_dim": 3},
        {"codebook_size": 4096, "codebook_dim": 256, "encoder_blocks": 4, "decoder_blocks": 2},
    ],
)
def test_other_tokenizers(values):
    config = TokenizerConfig(**values)
    assert infer_tokenizer_config(checkpoint("image tokenizer", shapes_of(config))) == config
    plain = checkpoint("image tokenizer", shapes_of(config), codebook_l2_norm=False)
    expected = dataclasses.replace(config, codebook_l2_norm=False)
    assert infer_tokenizer_config(plain) == expected


def test_unknown_heads_are_required():
    shapes = shapes_of(TransformerConfig(dim=48, layers=3, heads=6))
    with pytest.raises(InputError, match="heads cannot be read from shapes") as error:
        infer_transformer_config(checkpoint("transformer", shapes))
    assert "3 layers of width 48" in str(error.value)
    assert "`heads`" in str(error.value)
    for wrong in (5, 7, 0, -2, 48):
        with pytest.raises(InputError, match=r"a\.pt"):
            infer_transformer_config(checkpoint("transformer", shapes), heads=wrong)


def test_heads_from_the_arguments():
    config = TransformerConfig(dim=768, layers=2, heads=12)
    by_name = checkpoint("transformer", shapes_of(config), gpt_model="GPT-B")
    assert infer_transformer_config(by_name) == config
    by_number = checkpoint("transformer", shapes_of(config), n_head=6)
    assert infer_transformer_config(by_number).heads == 6
    # A preset's name on another width tells nothing.
    other = TransformerConfig(dim=48, layers=2, heads=6)
    with pytest.raises(InputError, match="heads cannot be read"):
        infer_transformer_config(checkpoint("transformer", shapes_of(other), gpt_model="GPT-B"))
    with pytest.raises(InputError, match="trained with heads 12, not 6; leave `heads` out"):
        infer_transformer_config(by_name, heads=6)


B = OFFICIAL["GPT-B/c2i"]["shapes"]


@pytest.mark.parametrize(
    ("size", "factor", "grid"), [(256, 16, (16, 16)), (384, 16, (24, 24)), (256, 8, (32, 32))]
)
def test_grid_from_the_arguments(size, factor, grid):
    read = checkpoint("transformer", B, image_size=size, downsample_size=factor)
    assert infer_transformer_config(read).grid == grid
    assert infer_transformer_config(read, grid=grid).grid == grid
    with pytest.raises(InputError, match=f"grid {grid[0]}x{grid[1]}, not 20x20"):
        infer_transformer_config(read, grid=(20, 20))


@pytest.mark.parametrize(
    "arguments", [{}, {"image_size": 384}, {"image_size": "384", "downsample_size": 16}]
)
def test_warns_of_assumed_grid(arguments, caplog):
    read = checkpoint("transformer", B, **arguments)
    with caplog.at_level(logging.WARNING):
        assert infer_transformer_config(read).grid == (16, 16)
    assert "a.pt does not say what grid it was trained on; assuming 16x16" in caplog.text
    caplog.clear()
    assert infer_transformer_config(read, grid=(24, 24)).grid == (24, 24)
    assert caplog.text == ""


def test_rejects_model_without_row_for_no_class():
    shapes = {**B, "cls_embedding.embedding_table.weight": (1000, 768)}
    with pytest.raises(InputError, match="1000 rows for 1000 classes"):
        infer_transformer_config(checkpoint("transformer", shapes, num_classes=1000))
    assert infer_transformer_config(checkpoint("transformer", shapes)).num_classes == 999


def test_rejects_impossible_shapes():
    config = TransformerConfig(dim=48, layers=2, heads=6)
    for name, shape in (
        ("tok_embeddings.weight", None),
        ("tok_embeddings.weight", (5,)),
        ("layers.0.feed_forward.w1.weight", None),
        ("cls_embedding.embedding_table.weight", ()),
        ("cls_embedding.embedding_table.weight", (1, 48)),
        ("tok_embeddings.weight", (0, 48)),
        ("tok_embeddings.weight", (5, 0)),
    ):
        shapes = shapes_of(config)
        if shape is None:
            del shapes[name]
        else:
            shapes[name] = shape
        with pytest.raises(InputError, match=r"a\.pt"):
            infer_transformer_config(checkpoint("transformer", shapes), heads=6)
    config = TokenizerConfig(base_channels=32)
    for name, shape in (
        ("encoder.conv_in.weight", None),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("encoder.conv_in.weight", (48, 3, 3, 3)),
        ("quantize.embedding.weight", (16,)),
        ("encoder.conv_blocks.2.res.0.conv1.weight", (33, 32, 3, 3)),
        ("encoder.conv_blocks.2.res.0.conv1.weight", (0, 32, 3, 3)),
    ):
        shapes = shapes_of(config)
        if shape is None:
            del shapes[name]
        else:
            shapes[name] = shape
        with pytest.raises(InputError, match=r"a\.pt"):
            infer_tokenizer_config(checkpoint("image tokenizer", shapes))
