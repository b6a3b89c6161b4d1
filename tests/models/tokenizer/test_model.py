import pytest
import torch

from llamagen.config import TOKENIZER_PRESETS, TokenizerConfig
from llamagen.models.tokenizer import ImageTokenizer, images_to_uint8, uint8_to_images
from llamagen.models.tokenizer.quantizers import vq
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_tokenizer


def test_preset_sizes():
    for name, count in {"VQ-16": 71_883_403, "VQ-8": 70_109_835}.items():
        with torch.device("meta"):
            model = ImageTokenizer(TOKENIZER_PRESETS[name])
        assert model.parameter_count() == count
        assert model.config.downsampling == int(name.removeprefix("VQ-"))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 4)])
def test_shapes_of_every_size(size):
    model = tiny_tokenizer()
    height, width = size
    images = torch.rand(2, 3, height, width) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (2, height // 4, width // 4)
    assert model.decode(codes).shape == images.shape
    reconstruction, quantized = model(images)
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(reconstruction, model.decode(codes), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(15, 16), (16, 2), (0, 16)])
def test_rejects_sizes_not_divisible_by_downsampling(size):
    with pytest.raises(InputError, match="downsampling 4"):
        tiny_tokenizer().encode(torch.zeros(1, 3, *size))


def test_codes_outside_the_codebook():
    with pytest.raises(InputError, match="64 codes"):
        tiny_tokenizer().decode(torch.full((1, 4, 4), 64))


@torch.no_grad()
def test_nearest_codes_in_slices_are_the_same(monkeypatch):
    model = tiny_tokenizer()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    whole = model.encode(images)
    monkeypatch.setattr(vq, "_MAX_DISTANCES", 64 * 3)
    assert torch.equal(model.encode(images), whole)


@torch.no_grad()
@pytest.mark.parametrize("l2_norm", [True, False])
def test_the_nearest_code_is_the_nearest(l2_norm):
    model = tiny_tokenizer(codebook_l2_norm=l2_norm)
    z, chosen = (
        model.quantize.compared(torch.randn(1, 4, 3, 3)),
        model.quantize(torch.randn(1, 4, 3, 3)),
    )
    chosen = model.quantize(z)
    vectors = z.movedim(1, -1).reshape(-1, 4)
    distances = torch.cdist(vectors, model.quantize.codebook())
    best = distances.min(-1).values
    torch.testing.assert_close(
        distances.gather(1, chosen.codes.view(-1, 1)).squeeze(1), best, rtol=1e-4, atol=1e-4
    )


def test_the_gradient_passes_straight_through():
    model = tiny_tokenizer().train()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, quantized = model(images)
    losses = model.quantize.losses(quantized, entropy=True)
    reconstruction.square().mean().backward(retain_graph=True)
    assert model.encoder.conv_in.weight.grad.any()
    assert model.quantize.embedding.weight.grad is None
    losses["codebook"].backward(retain_graph=True)
    assert model.quantize.embedding.weight.grad.any()


def test_bytes_and_images():
    values = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 1.5])
    # clamp(127.5 x + 128), truncated, as the paper's evaluation does it.
    assert images_to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255]
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images_to_uint8(uint8_to_images(pixels)), pixels)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_channels": 20},
        {"channel_multipliers": ()},
        {"codebook_size": 0},
        {"dropout": -0.5},
        {"norm_groups": 0},
    ],
)
def test_impossible_configurations_are_refused(changes):
    with pytest.raises(InputError):
        TokenizerConfig(**changes)


@torch.no_grad()
def test_half_precision_stays_close():
    model = tiny_tokenizer()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = model.encode(images)
    expected = model.decode(codes)
    half = model.to(torch.bfloat16)
    assert half.encode(images).shape == codes.shape
    assert (half.decode(codes).float() - expected).abs().mean() < 0.05
