import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from llamagen.support.errors import InputError
from llamagen.training.adversarial import (
    PatchDiscriminator,
    StyleDiscriminator,
    _append_deviation,
    discriminator_loss,
    make_discriminator,
)

SHAPES = Path(__file__).parents[1] / "fixtures" / "official_checkpoint_shapes.json"


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def tiny(name: str, height: int = 32, width: int = 32) -> nn.Module:
    if name == "patchgan":
        return PatchDiscriminator(base_channels=8)
    return StyleDiscriminator(height=height, width=width, max_channels=8)


def test_patchgan_is_that_of_the_public_checkpoints():
    expected = json.loads(SHAPES.read_text())["PatchGAN discriminator"]
    model = make_discriminator("patchgan", height=256, width=256)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected["shapes"]
    assert parameter_count(model) == expected["parameters"] == 2_765_633


@torch.no_grad()
def test_patchgan_starts_as_published():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    for module in model.main:
        if isinstance(module, nn.Conv2d):
            assert float(module.weight.mean()) == pytest.approx(0.0, abs=2e-3)
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert float(module.weight.mean()) == pytest.approx(1.0, abs=0.01)
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.3)
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("size", "patches"),
    [((256, 256), (30, 30)), ((32, 32), (2, 2)), ((24, 24), (1, 1)), ((24, 50), (1, 4))],
)
def test_patchgan_shapes(size, patches):
    with torch.device("meta"):
        model = PatchDiscriminator()
        assert model(torch.zeros(2, 3, *size)).shape == (2, 1, *patches)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_patchgan_of_other_depths(layers):
    model = PatchDiscriminator(base_channels=2, layers=layers)
    assert model(torch.randn(2, 3, model.smallest, model.smallest)).shape == (2, 1, 1, 1)
    assert model.main[-1].in_channels == 2 * min(2**layers, 8)


@pytest.mark.parametrize(
    "size", [(16, 16), (32, 32), (64, 64), (24, 32), (28, 28), (96, 32), (40, 56)]
)
def test_stylegan_shapes_and_gradients(size):
    torch.manual_seed(0)
    model = tiny("stylegan", *size)
    images = torch.randn(3, 3, *size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (3, 1)
    logits.square().sum().backward()
    for tensor in (images, *model.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_stylegan_at_full_size():
    with torch.device("meta"):
        model = make_discriminator("stylegan", height=256, width=384)
        assert model(torch.zeros(2, 3, 256, 384)).shape == (2, 1)
    assert model.from_rgb.weight.shape == (64, 3, 1, 1)
    assert [block.conv2.weight.shape[0] for block in model.blocks] == [128, 256, 512, 512, 512, 512]
    assert model.hidden.weight.shape == (512, 512 * 4 * 6)
    # Only weights are stored.
    assert set(model.state_dict()) == set(dict(model.named_parameters()))
    with torch.device("meta"):
        square = make_discriminator("stylegan", height=256, width=256)
    assert parameter_count(square) == 24_001_089


@torch.no_grad()
@pytest.mark.parametrize(("side", "channels"), [(16, 16), (64, 16), (64, 64)])
def test_equalised_weights_keep_the_scale(side, channels):
    """Through any number of layers, of any width."""
    torch.manual_seed(0)
    model = StyleDiscriminator(height=side, width=side, max_channels=channels)
    assert all(0.8 < p.std() < 1.2 for p in model.parameters() if p.ndim > 1 and p.numel() > 200)
    # Flat images: of noise, smoothing leaves little.
    h = model.from_rgb(torch.randn(32, 3, 1, 1).expand(32, 3, side, side))
    for block in model.blocks:
        h = block(h)
        assert 0.4 < float(h.square().mean().sqrt()) < 2


@torch.no_grad()
def test_smoothing_keeps_flat_regions():
    block = tiny("stylegan").blocks[0]
    x = torch.full((1, 8, 12, 12), 0.7)
    smooth = block._smooth(x, padding=1, stride=2)
    assert smooth.shape == (1, 8, 6, 6)
    torch.testing.assert_close(smooth[..., 1:-1, 1:-1], x[..., :4, :4])
    # The finest stripes, which every other position alone would show as a flat region, are gone.
    x[..., ::2] = -0.7
    assert block._smooth(x, padding=1, stride=2)[..., 1:-1].abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "group"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4)]
)
def test_deviation_of_groups(batch, group):
    x = torch.randn(batch, 5, 3, 4)
    out = _append_deviation(x)
    assert out.shape == (batch, 6, 3, 4)
    assert torch.equal(out[:, :5], x)
    # Group i: the images i, i + B / G, i + 2 B / G, ...
    for i in range(batch):
        members = x[i % (batch // group) :: batch // group]
        assert len(members) == group
        deviation = (members - members.mean(0)).square().mean(0).add(1e-8).sqrt()
        torch.testing.assert_close(out[i, 5], deviation.mean().expand(3, 4))


def test_deviation_of_equal_images():
    x = torch.ones(4, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    out = _append_deviation(x)
    assert out.dtype == torch.bfloat16
    assert float(out[0, 2, 0, 0].detach()) == pytest.approx(1e-4, rel=0.01)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["patchgan", "stylegan"])
def test_autocast_and_single_images(name):
    torch.manual_seed(0)
    model = tiny(name)
    image = torch.randn(1, 3, 32, 32)
    exact = model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(image).float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["patchgan", "stylegan"])
def test_they_learn_to_tell_smooth_from_rough(name):
    torch.manual_seed(0)
    model = tiny(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        rough = torch.rand(8, 3, 32, 32) * 2 - 1
        smooth = (torch.rand(8, 3, 1, 1) * 2 - 1).expand_as(rough)
        loss = discriminator_loss("hinge", model(rough), model(smooth))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_rejects_unsupported_sizes():
    with pytest.raises(InputError, match=r"images of 32x16 pixels .* at least 24; .* stylegan"):
        make_discriminator("patchgan", height=16, width=32)
    with pytest.raises(InputError, match=r"images of 8x32 pixels are too small .* at least 16"):
        make_discriminator("stylegan", height=32, width=8)
    with pytest.raises(
        InputError, match=r"36x32 pixels .* halved 3 times.* multiples of 8; .* patch"
    ):
        make_discriminator("stylegan", height=32, width=36)
    with pytest.raises(InputError, match=r"images of 64x32 pixels .* of 32x32; make one"):
        tiny("stylegan")(torch.zeros(1, 3, 32, 64))
    # The largest that is not halved once more: 31 is odd.
    with pytest.raises(InputError, match="multiples of 4"):
        make_discriminator("stylegan", height=31, width=31)


def test_every_multiple_of_a_power_of_two_is_possible():
    for halvings in (2, 3, 4):
        for rows in range(4, 8):
            for columns in range(rows, 10):
                height, width = rows << halvings, columns << halvings
                with torch.device("meta"):
                    model = StyleDiscriminator(height=height, width=width, max_channels=8)
                assert len(model.blocks) == halvings == int(math.log2(height / rows))
