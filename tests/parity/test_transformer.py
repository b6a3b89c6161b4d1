"""The transformer reproduces the published model's logits, loss and greedy codes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from llamagen.config import SamplingConfig, TransformerConfig, swiglu_hidden_dim
from llamagen.generation import generate_codes
from llamagen.generation.generate import without_padding
from llamagen.models.transformer import Transformer
from tests.steps import feed_codes, start_sequences

TINY = ["gpt_c2i_tiny", "gpt_c2i_gqa_tiny", "gpt_t2i_tiny"]


def config_of(case) -> TransformerConfig:
    public = case.info["config"]
    side = math.isqrt(public["block_size"])
    is_class = public["model_type"] == "c2i"
    return TransformerConfig(
        dim=public["dim"],
        layers=public["n_layer"],
        heads=public["n_head"],
        kv_heads=public.get("n_kv_head"),
        hidden_dim=swiglu_hidden_dim(
            public["dim"],
            multiplier=public.get("ffn_dim_multiplier"),
            multiple_of=public.get("multiple_of", 256),
        ),
        codebook_size=public["vocab_size"],
        grid=(side, side),
        condition="class" if is_class else "text",
        num_classes=public.get("num_classes", 1000),
        text_length=120 if is_class else public["cls_token_num"],
        text_dim=public.get("caption_dim", 2048),
        order=public.get("position_order", "raster"),
    )


def model_of(case) -> Transformer:
    model = Transformer(config_of(case))
    model.load_state_dict(case.weights)
    return model.eval()


def condition_of(case):
    if "labels" in case.arrays:
        return case.tensor("labels"), None
    return case.tensor("caption_features"), case.tensor("caption_mask").bool()


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_logits_and_loss(read_case, name):
    case = read_case(name)
    model = model_of(case)
    codes = case.tensor("tokens")
    condition, mask = condition_of(case)
    logits = model(codes[:, :-1], condition, condition_mask=mask)
    torch.testing.assert_close(logits, case.tensor("logits"), rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(case.info["loss"], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_cached_logits(read_case, name):
    """Prefill and code-by-code decoding see the same logits as the parallel pass."""
    case = read_case(name)
    model = model_of(case)
    codes = case.tensor("tokens")
    condition, mask = condition_of(case)
    conditions = without_padding(condition, mask)
    cache = model.new_cache(len(codes), model.config.condition_length + codes.shape[1])
    logits = [start_sequences(model, conditions, cache)]
    logits += [
        feed_codes(model, codes[:, index : index + 1], cache)[:, -1]
        for index in range(codes.shape[1] - 1)
    ]
    torch.testing.assert_close(
        torch.stack(logits, dim=1), case.tensor("logits"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", TINY)
def test_greedy_codes(read_case, name):
    case = read_case(name)
    model = model_of(case)
    condition, mask = condition_of(case)
    for settings in case.info["generate"]:
        # The published interval counts decoding steps after the first code, and includes its end.
        interval = settings["cfg_interval"]
        sampling = SamplingConfig(
            guidance_scale=settings["cfg_scale"],
            guidance_stop=None if interval < 0 else interval + 2,
            top_k=settings["top_k"],
            temperature=0.0,
        )
        codes = generate_codes(
            model,
            condition,
            condition_mask=mask,
            seeds=range(condition.shape[0]),
            sampling=sampling,
        )
        expected = case.tensor(settings["array"]).long()
        assert torch.equal(codes.flatten(1)[:, : expected.shape[1]], expected), settings


@torch.no_grad()
def test_preset_b_at_full_size(read_case):
    case = read_case("gpt_c2i_B")
    config = config_of(case)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(case.weights, assign=True)
    model.eval()
    codes, labels = case.tensor("tokens"), case.tensor("labels")
    logits = model(codes[:, :-1], labels)
    scale = case.tensor("logits_head").abs().max().item()
    torch.testing.assert_close(
        logits[..., :8], case.tensor("logits_head"), rtol=1e-4, atol=1e-4 * scale
    )
    torch.testing.assert_close(
        logits.mean(-1), case.tensor("logits_mean"), rtol=1e-4, atol=1e-5 * scale
    )
    # Where the argmax differs, the two codes must tie to rounding.
    best = logits.max(-1).values
    named = logits.gather(-1, case.tensor("logits_argmax").unsqueeze(-1)).squeeze(-1)
    assert (best - named).max().item() < 1e-4 * scale
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(case.info["loss"], rel=1e-5)

    (settings,) = case.info["generate"]
    # 48 codes are 3 rows of the 16 x 16 grid; the positions of the first rows do not depend on
    # how many rows follow.
    sampling = SamplingConfig(guidance_scale=settings["cfg_scale"], temperature=0.0)
    drawn = generate_codes(model, labels, seeds=[0, 1], sampling=sampling, grid=(3, 16))
    assert torch.equal(drawn.flatten(1), case.tensor(settings["array"]).long())


def test_padding_does_not_change_codes(read_case):
    """Text features alone, without the padding in front, give the same codes (SPEC section 3)."""
    case = read_case("gpt_t2i_tiny")
    model = model_of(case)
    features, mask = condition_of(case)
    settings = case.info["generate"][1]
    sampling = SamplingConfig(guidance_scale=settings["cfg_scale"], temperature=0.0)
    expected = case.tensor(settings["array"]).long()
    for row in range(features.shape[0]):
        length = int(mask[row].sum())
        codes = generate_codes(
            model, features[row : row + 1, -length:], seeds=[0], sampling=sampling
        )
        assert torch.equal(codes.flatten(1), expected[row : row + 1])


def test_shapes_of_every_public_checkpoint(fixtures):
    import json

    from llamagen.config import TRANSFORMER_PRESETS

    official = json.loads((fixtures / "official_checkpoint_shapes.json").read_text())
    cases = {name: entry for name, entry in official.items() if name.startswith("GPT-")}
    assert len(cases) == 9
    for name, entry in cases.items():
        size, kind = name.removeprefix("GPT-").split("/")
        condition = "class" if kind == "c2i" else "text"
        config = dataclasses.replace(TRANSFORMER_PRESETS[size], condition=condition)
        with torch.device("meta"):
            model = Transformer(config)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        assert shapes == entry["shapes"], name
        assert config.ffn_dim == entry["ffn_hidden"]
        if condition == "class":
            assert model.parameter_count() == entry["parameters"]
