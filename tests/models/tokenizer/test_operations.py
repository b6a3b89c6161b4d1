"""The kernels compute what torch's operations compute."""

import pytest
import torch
import torch.nn.functional as F

from llamagen.config import TokenizerConfig
from llamagen.models.tokenizer import ImageTokenizer, operations
from tests.backends.variants import present
from tests.tiny_models import tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels():
    return present(operations._load_kernels())


def conv3x3(inputs, outputs, dtype):
    return torch.nn.Conv2d(inputs, outputs, 3, padding=1).to(dtype)


def error(found, exact):
    assert found.shape == exact.shape
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(36, 38), (34, 128), (2, 2)])
def test_a_convolution(kernels, size, dtype, upsample, shortcut):
    torch.manual_seed(0)
    conv = conv3x3(48, 32, dtype)
    x = torch.randn(3, 48, *size).to(dtype)
    seen = F.interpolate(x, scale_factor=2.0) if upsample else x
    added = torch.randn(3, 32, *seen.shape[2:]).to(dtype) if shortcut else None
    exact = F.conv2d(seen.double(), conv.weight.double(), conv.bias.double(), padding=1)
    exact = exact if added is None else exact + added
    found = kernels.convolve(conv, x, shortcut=added, upsample=upsample, into=None)
    assert found.dtype == dtype
    # bfloat16 is rounded once, when it is stored.
    assert error(found, exact) < (1e-5 if dtype == torch.float32 else 2**-8)


@torch.no_grad()
def test_odd_sizes_and_other_layouts_of_weights(kernels):
    conv = conv3x3(32, 64, torch.float32)
    x = torch.randn(1, 32, 37, 29)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    into = torch.empty(1, 64, 37, 29).contiguous(memory_format=torch.channels_last)
    found = kernels.convolve(conv, x, shortcut=None, upsample=False, into=into)
    assert found.data_ptr() == into.data_ptr()
    assert error(found, exact) < 1e-5
    conv = conv.to(memory_format=torch.channels_last)
    again = kernels.convolve(conv, x, shortcut=None, upsample=False, into=None)
    assert torch.equal(again, found)


@torch.no_grad()
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_many_tiles_and_threads_give_the_same_bits(kernels, dtype, upsample):
    # Few tiles, and all patches are transformed first; many, and all weights are.
    torch.manual_seed(0)
    conv = conv3x3(208, 256, dtype)
    few = torch.randn(1, 208, 18, 20).to(dtype)
    many = torch.cat([few, torch.randn(11, 208, 18, 20).to(dtype)])
    found = []
    before = torch.get_num_threads()
    try:
        for x, threads in ((few, 1), (few, 2), (few, 11), (many, 2)):
            torch.set_num_threads(threads)
            y = kernels.convolve(conv, x, shortcut=None, upsample=upsample, into=None)
            found.append(y[:1])
    finally:
        torch.set_num_threads(before)
    seen = F.interpolate(few, scale_factor=2.0) if upsample else few
    exact = F.conv2d(seen.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert error(found[0], exact) < (2e-5 if dtype == torch.float32 else 2**-8)
    assert all(torch.equal(y, found[0]) for y in found)
    conv = conv.to(memory_format=torch.channels_last)
    again = kernels.convolve(conv, few, shortcut=None, upsample=upsample, into=None)
    assert torch.equal(again, found[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm(kernels, dtype):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(16, 80, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    # Means far from zero, and more pixels than are summed in one go.
    x = (torch.randn(2, 80, 19, 31) + 100 * torch.randn(2, 80, 1, 1)).to(dtype)
    weight, bias = norm.weight.double(), norm.bias.double()
    exact = F.silu(F.group_norm(x.double(), 16, weight, bias, norm.eps))
    found = kernels.normalise(norm, x, in_place=False)
    assert error(found, exact) < (1e-5 if dtype == torch.float32 else 2**-8)
    x = x.contiguous(memory_format=torch.channels_last)
    in_place = kernels.normalise(norm, x, in_place=True)
    assert in_place.data_ptr() == x.data_ptr()
    assert torch.equal(in_place, found)


@torch.no_grad()
def test_extreme_numbers_stay_what_they_are(kernels):
    norm = torch.nn.GroupNorm(16, 16)
    norm.weight.zero_()
    norm.bias.copy_(torch.tensor([0.0, 1e4, -1e4, 3e38, -100.0, 90.0, -90.0, 20.0] * 2))
    x = torch.zeros(1, 16, 2, 2)
    found = kernels.normalise(norm, x, in_place=False)
    torch.testing.assert_close(found, F.silu(norm(x)), rtol=1e-5, atol=1e-30)
    norm.bias.fill_(float("nan"))
    assert kernels.normalise(norm, x, in_place=False).isnan().all()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = TokenizerConfig(
        base_channels=32, channel_multipliers=(1, 2, 2), z_channels=32, codebook_size=64
    )
    return ImageTokenizer(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokenizer_with_and_without_kernels(kernels, tokenizer, dtype):
    images = torch.rand(2, 3, 96, 64) * 2 - 1
    codes = torch.randint(64, (2, 24, 16))
    own = tokenizer.to(dtype)
    found = own.encode_latents(images), own.decode(codes)
    with operations.torch_only():
        expected = own.encode_latents(images), own.decode(codes)
    tokenizer.float()
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.float() - theirs.float()).abs()
        assert difference.mean() < (1e-5 if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_any_number_of_threads(kernels, tokenizer):
    codes = torch.randint(64, (2, 16, 16))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tokenizer.decode(codes))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gradients_go_through_torch(kernels, monkeypatch):
    model = tiny_tokenizer().train()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    monkeypatch.setattr(operations, "_load_kernels", lambda: pytest.fail("used in training"))
    model(images).reconstruction.square().mean().backward()
    assert model.decoder.conv_in.weight.grad.any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)


@torch.no_grad()
def test_images_do_not_depend_on_others_and_inputs_are_left_alone(kernels, tokenizer):
    block = tokenizer.decoder.mid[0]
    x = torch.randn(3, 64, 37, 41).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    together = block(x)
    assert torch.equal(x, before)
    assert torch.equal(together, torch.cat([block(image[None]) for image in x]))
