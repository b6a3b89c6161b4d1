import dataclasses

import pytest
import torch

from llamagen.config import TRANSFORMER_PRESETS, TransformerConfig, preset
from llamagen.models.transformer import Transformer, rope_table
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

PARAMETERS = {
    ("B", "class"): 110_888_448,
    ("L", "class"): 342_910_976,
    ("XL", "class"): 774_699_520,
    ("XXL", "class"): 1_410_972_672,
    ("XXXL", "class"): 3_893_027_840,
    ("1B", "class"): 1_199_616_000,
    ("3B", "class"): 3_096_659_200,
    ("7B", "class"): 6_614_589_440,
}


@pytest.mark.parametrize(("name", "condition"), PARAMETERS)
def test_preset_sizes(name, condition):
    config = dataclasses.replace(TRANSFORMER_PRESETS[name], condition=condition)
    with torch.device("meta"):
        assert Transformer(config).parameter_count() == PARAMETERS[name, condition]


def test_text_preset_size():
    """The published count leaves out "no text", which is a buffer there."""
    config = dataclasses.replace(TRANSFORMER_PRESETS["XL"], condition="text")
    with torch.device("meta"):
        assert Transformer(config).parameter_count() == 777_678_080 + 120 * 2048


def test_unknown_preset():
    with pytest.raises(InputError, match="XXXL"):
        preset(TRANSFORMER_PRESETS, "XS")
    assert preset(TRANSFORMER_PRESETS, "xl") is TRANSFORMER_PRESETS["XL"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30, "heads": 4}, "head dimension"),
        ({"dim": 24, "heads": 4}, "multiple of 4"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads"),
        ({"layers": 0}, "layers"),
        ({"grid": (0, 4)}, "grid"),
        ({"condition": "sound"}, "condition"),
        ({"token_dropout": 1.0}, "token_dropout"),
        ({"codebook_size": -1}, "codebook_size"),
        ({"hidden_dim": 0}, "hidden_dim"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TransformerConfig(**{"dim": 64, "heads": 4, **changes})


def test_a_new_model_predicts_all_codes_alike():
    torch.manual_seed(0)
    model = Transformer(tiny_transformer().config)
    assert not model.output.weight.any()
    assert model.layers[0].attention.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    logits = model(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]))
    assert not logits.any()


@torch.no_grad()
def test_no_code_sees_a_later_one():
    model = tiny_transformer()
    codes = torch.randint(0, 64, (1, 15))
    changed = codes.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 64
    before, after = model(codes, torch.tensor([0])), model(changed, torch.tensor([0]))
    # Logits row t predicts code t from the codes before it.
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


@torch.no_grad()
def test_grouped_queries_equal_full_heads_with_copied_keys():
    """Grouped-query attention is full attention whose key and value heads repeat."""
    grouped = tiny_transformer(kv_heads=2)
    full = tiny_transformer()
    state = dict(grouped.state_dict())
    for layer in range(2):
        name = f"layers.{layer}.attention.wqkv.weight"
        q, k, v = state[name].split([32, 16, 16])
        k, v = (part.view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    codes, labels = torch.randint(0, 64, (3, 10)), torch.tensor([0, 1, 2])
    torch.testing.assert_close(grouped(codes, labels), full(codes, labels))


@torch.no_grad()
def test_dropping_the_condition():
    model = tiny_transformer()
    codes, labels = torch.randint(0, 64, (2, 10)), torch.tensor([0, 1])
    dropped = model(codes, labels, drop_condition=torch.tensor([True, False]))
    none = model(codes, torch.tensor([5, 1]))
    assert torch.equal(dropped, none)
    text = tiny_transformer(condition="text")
    features = torch.randn(2, 6, 16)
    dropped = text(codes, features, drop_condition=torch.tensor([True, False]))
    without = torch.stack([text.cls_embedding.uncond_embedding, features[1]])
    assert torch.equal(dropped, text(codes, without))


@torch.no_grad()
def test_rope_table_has_zeros_for_conditions():
    table = rope_table((3, 5), 8, 10000.0, torch.device("cpu"))
    assert table.shape == (15 + 1, 4, 2)
    assert not table[-1].any()
    # Cell (r, c): the first half of the pairs rotate by r, the second half by c.
    cell = table[2 * 5 + 3]
    angles = torch.tensor([2.0, 2.0 * 0.01, 3.0, 3.0 * 0.01])
    torch.testing.assert_close(cell, torch.stack([angles.cos(), angles.sin()], -1))


def test_a_text_row_without_any_feature_is_harmless():
    """All padding: the softmax of those positions must still be defined."""
    model = tiny_transformer(condition="text")
    mask = torch.zeros(1, 6, dtype=torch.bool)
    logits = model(torch.zeros(1, 5, dtype=torch.int64), torch.randn(1, 6, 16), condition_mask=mask)
    assert logits.isfinite().all()


def test_stochastic_depth_and_dropout_work_in_training_only():
    model = tiny_transformer(drop_path=0.5)
    codes, labels = torch.randint(0, 64, (4, 10)), torch.arange(4)
    assert torch.equal(model(codes, labels), model(codes, labels))
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))


def test_gradients_reach_every_weight():
    for condition in ("class", "text"):
        model = tiny_transformer(condition=condition).train()
        given = torch.arange(4) if condition == "class" else torch.randn(4, 6, 16)
        drop = torch.tensor([True, False, False, False])
        model(torch.randint(0, 64, (4, 15)), given, drop_condition=drop).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@torch.no_grad()
def test_qk_norm_normalises_each_head(tmp_path):
    model = tiny_transformer(qk_norm=True, kv_heads=2)
    attention = model.blocks[0].attention
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (8,)
    codes, labels = torch.randint(0, 64, (2, 15)), torch.tensor([0, 3])
    expected = model(codes, labels)
    # Queries and keys of another length are the same once they are normalised.
    width = 4 * 8 + 2 * 8
    attention.wqkv.weight[:width] *= 7
    torch.testing.assert_close(model(codes, labels), expected, rtol=1e-4, atol=1e-4)
    attention.q_norm.weight *= 3
    assert not torch.allclose(model(codes, labels), expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config.qk_norm
    assert torch.equal(loaded(codes, labels), model(codes, labels))


def test_qk_norm_trains():
    model = tiny_transformer(qk_norm=True).train()
    model(torch.randint(0, 64, (2, 15)), torch.tensor([0, 3])).logsumexp(-1).sum().backward()
    for block in model.blocks:
        assert block.attention.q_norm.weight.grad.abs().sum() > 0
        assert block.attention.k_norm.weight.grad.abs().sum() > 0
