"""The image tokenizer reproduces the published model's latents, codes, images and losses."""

from __future__ import annotations

import json

import pytest
import torch

from llamagen.config import TOKENIZER_PRESETS, TokenizerConfig
from llamagen.models.tokenizer import ImageTokenizer


@pytest.fixture(params=["vq_tiny_l2norm", "vq_tiny_plain"])
def case(request, read_case):
    return read_case(request.param)


@pytest.fixture
def tokenizer(case) -> ImageTokenizer:
    public = case.info["config"]
    model = ImageTokenizer(
        TokenizerConfig(
            base_channels=public["ch"],
            channel_multipliers=tuple(public["ch_mult"]),
            z_channels=public["z_channels"],
            codebook_size=public["codebook_size"],
            codebook_dim=public["codebook_embed_dim"],
            codebook_l2_norm=public["codebook_l2_norm"],
        )
    )
    model.load_state_dict(case.weights)
    return model.eval()


@torch.no_grad()
def test_latents_codes_and_reconstruction(case, tokenizer):
    images = case.tensor("image")
    latents = tokenizer.encode_latents(images)
    torch.testing.assert_close(latents, case.tensor("pre_quant"), rtol=1e-4, atol=1e-4)
    reconstruction, quantized = tokenizer(images)
    torch.testing.assert_close(quantized.vectors, case.tensor("quant"), rtol=1e-4, atol=1e-4)
    assert torch.equal(quantized.codes, case.tensor("indices").long())
    torch.testing.assert_close(reconstruction, case.tensor("reconstruction"), rtol=0, atol=1e-3)


def test_encode_and_decode(case, tokenizer):
    codes = case.tensor("indices").long()
    assert torch.equal(tokenizer.encode(case.tensor("image")), codes)
    torch.testing.assert_close(
        tokenizer.decode(codes), case.tensor("decode_from_indices"), rtol=0, atol=1e-3
    )


def test_quantizer_losses(case, tokenizer):
    public = case.info["config"]
    quantized = tokenizer.quantize(case.tensor("pre_quant"))
    losses = tokenizer.quantize.losses(quantized, entropy=True)
    beta, ratio = public["commit_loss_beta"], public["entropy_loss_ratio"]
    assert losses["codebook"].item() == pytest.approx(case.info["vq_loss"], rel=1e-4)
    assert beta * losses["commitment"].item() == pytest.approx(case.info["commit_loss"], rel=1e-4)
    assert ratio * losses["entropy"].item() == pytest.approx(
        case.info["entropy_loss"], rel=1e-4, abs=1e-7
    )


def test_shapes_of_every_public_checkpoint(fixtures):
    official = json.loads((fixtures / "official_checkpoint_shapes.json").read_text())
    for name, config in TOKENIZER_PRESETS.items():
        with torch.device("meta"):
            model = ImageTokenizer(config)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        expected = dict(official[name]["shapes"])
        # A running statistic of the published training, not a weight.
        del expected["quantize.codebook_used"]
        assert shapes == expected
        assert model.parameter_count() == official[name]["parameters"]
