"""The tokenizer's kernels compute what the reference in torch computes."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llamagen.backends.cpu import convolution
from llamagen.backends.cpu.build import compiled_library
from llamagen.backends.cpu.convolution import CpuOperations, accelerate
from llamagen.config import TokenizerConfig
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.tokenizer.layers import Conv3x3, TorchOperations
from tests.backends.variants import present
from tests.tiny_models import tiny_pipeline, tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels():
    present(compiled_library(source=convolution._SOURCE))
    found = convolution.load_kernels()
    if found is None:
        pytest.skip("torch is faster with the instructions that the kernels may use")
    if found.has_amx:
        # Then bfloat16 convolutions are torch's. Here the kernels are to compute them all.
        found = copy.copy(found)
        found.has_amx = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "load_kernels", lambda: found)
        yield found


@pytest.fixture
def only_kernels(kernels, monkeypatch):
    """Fails where torch computes."""
    for name in ("convolve", "norm_silu"):
        monkeypatch.setattr(TorchOperations, name, lambda *_, **__: pytest.fail("by torch"))


@pytest.fixture
def only_torch(kernels, monkeypatch):
    """Fails where the kernels compute."""
    monkeypatch.setattr(kernels, "run", lambda *_: pytest.fail("by the kernels"), raising=True)


def conv3x3(inputs, outputs, dtype):
    return Conv3x3(inputs, outputs).to(dtype).requires_grad_(False)


def convolve(conv, x, residual=None, upsample=False, out=None):
    return CpuOperations().convolve(conv, x, residual, upsample, out)


def norm_silu(norm, x, **options):
    return CpuOperations().norm_silu(norm, x, **options)


def exactly(conv, x):
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


def error(found, exact):
    assert found.shape == exact.shape
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(36, 38), (34, 128), (16, 16)])
def test_convolution_matches_float64(only_kernels, size, dtype, upsample, residual):
    torch.manual_seed(0)
    conv = conv3x3(48, 32, dtype)
    x = torch.randn(3, 48, *size).to(dtype)
    whole = F.interpolate(x, scale_factor=2.0) if upsample else x
    added = torch.randn(3, 32, *whole.shape[2:]).to(dtype) if residual else None
    exact = exactly(conv, whole) + (0 if added is None else added)
    found = convolve(conv, x, residual=added, upsample=upsample)
    assert found.dtype == dtype
    # bfloat16 is rounded once, when it is stored.
    assert error(found, exact) < (1e-5 if dtype == torch.float32 else 2**-8)


@torch.no_grad()
def test_convolution_of_odd_sizes_and_either_layout_of_weights(only_kernels):
    conv = conv3x3(32, 64, torch.float32)
    x = torch.randn(1, 32, 37, 29)
    out = torch.empty(1, 64, 37, 29).contiguous(memory_format=torch.channels_last)
    found = convolve(conv, x, out=out)
    assert found.data_ptr() == out.data_ptr()
    assert error(found, exactly(conv, x)) < 1e-5
    conv = conv.to(memory_format=torch.channels_last)
    assert torch.equal(convolve(conv, x), found)


@torch.no_grad()
@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 32, 16, 16),
        torch.empty(1, 32, 16, 16, dtype=torch.bfloat16),
        torch.empty(1, 32, 16, 15),
        torch.empty(1, 32, 16, 16, device="meta"),
    ],
)
def test_does_not_write_where_the_result_does_not_fit(only_kernels, out):
    conv, x = conv3x3(16, 32, torch.float32), torch.randn(1, 16, 16, 16)
    found = convolve(conv, x, out=out)
    assert found.data_ptr() != out.data_ptr()
    assert error(found, exactly(conv, x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "weight", "bias", "residual"),
    [
        # Other types, shapes and devices than the kernels read.
        (torch.zeros(1, 16, 16, 16), torch.zeros(32, 16, 3, 3), torch.zeros(32).double(), None),
        (torch.zeros(1, 16, 16, 16), torch.zeros(32, 16, 3, 3), torch.zeros(16), None),
        (torch.zeros(1, 32, 16, 16), torch.zeros(32, 16, 3, 3), torch.zeros(32), None),
        (torch.zeros(1, 16, 16, 16), torch.zeros(32, 16, 5, 5), torch.zeros(32), None),
        (torch.zeros(1, 16, 16, 16), torch.zeros(32, 16, 3, 3).half(), torch.zeros(32), None),
        (torch.zeros(1, 16, 16, 16), torch.zeros(32, 16, 3, 3), torch.zeros(32), torch.zeros(1, 1)),
        (torch.zeros(0, 16, 16, 16), torch.zeros(32, 16, 3, 3), torch.zeros(32), None),
    ],
)
def test_leaves_other_arguments_to_torch(kernels, only_torch, x, weight, bias, residual):
    def outcome(operations):
        try:
            conv = SimpleNamespace(weight=weight, bias=bias)
            return operations.convolve(conv, x, residual, False, None)
        except RuntimeError as error:
            return str(error)

    found, expected = outcome(CpuOperations()), outcome(TorchOperations())
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


@torch.no_grad()
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_many_tiles_and_threads_give_the_same_bits(only_kernels, dtype, upsample):
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
            found.append(convolve(conv, x, upsample=upsample)[:1])
    finally:
        torch.set_num_threads(before)
    exact = exactly(conv, F.interpolate(few, scale_factor=2.0) if upsample else few)
    assert error(found[0], exact) < (2e-5 if dtype == torch.float32 else 2**-8)
    assert all(torch.equal(y, found[0]) for y in found)
    conv = conv.to(memory_format=torch.channels_last)
    assert torch.equal(convolve(conv, few, upsample=upsample), found[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_matches_float64(only_kernels, dtype):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(16, 80, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    # Means far from zero, and more pixels than are summed in one go.
    x = (torch.randn(2, 80, 19, 31) + 100 * torch.randn(2, 80, 1, 1)).to(dtype)
    weight, bias = norm.weight.double(), norm.bias.double()
    exact = F.silu(F.group_norm(x.double(), 16, weight, bias, norm.eps))
    found = norm_silu(norm, x)
    assert error(found, exact) < (1e-5 if dtype == torch.float32 else 2**-8)
    x = x.contiguous(memory_format=torch.channels_last)
    in_place = norm_silu(norm, x, in_place=True)
    assert in_place.data_ptr() == x.data_ptr()
    assert torch.equal(in_place, found)


@torch.no_grad()
def test_norm_of_extreme_numbers(only_kernels):
    norm = torch.nn.GroupNorm(16, 16)
    norm.weight.zero_()
    norm.bias.copy_(torch.tensor([0.0, 1e4, -1e4, 3e38, -100.0, 90.0, -90.0, 20.0] * 2))
    x = torch.zeros(1, 16, 2, 2)
    torch.testing.assert_close(norm_silu(norm, x), F.silu(norm(x)), rtol=1e-5, atol=1e-30)
    norm.bias.fill_(float("nan"))
    assert norm_silu(norm, x).isnan().all()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = TokenizerConfig(
        base_channels=32, channel_multipliers=(1, 2, 2), z_channels=32, codebook_size=64
    )
    return accelerate(ImageTokenizer(config).eval())


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokenizer_with_and_without_kernels(kernels, tokenizer, dtype):
    images = torch.rand(2, 3, 96, 64) * 2 - 1
    codes = torch.randint(64, (2, 24, 16))
    fast = copy.deepcopy(tokenizer).to(dtype)
    plain = copy.deepcopy(fast)
    plain.set_operations(TorchOperations())
    for mine, reference in (
        (fast.encode_latents(images), plain.encode_latents(images)),
        (fast.decode(codes), plain.decode(codes)),
    ):
        difference = (mine.float() - reference.float()).abs()
        assert difference.max() > 0  # both computed it
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


def test_torch_computes_gradients_and_autocast(kernels, only_torch):
    model = accelerate(tiny_tokenizer().train())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
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


def test_a_tokenizer_uses_torch_until_a_backend_is_attached(kernels, monkeypatch):
    used = []
    monkeypatch.setattr(kernels, "run", lambda *_: used.append(1))
    model = ImageTokenizer(tiny_tokenizer(base_channels=32).config).eval()
    codes = torch.zeros(1, 16, 16, dtype=torch.int64)
    model.decode(codes)
    assert not used
    accelerate(model).decode(codes)
    assert used
    assert isinstance(tiny_pipeline().tokenizer.decoder.conv_in.operations, CpuOperations)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.decoder.conv_in.operations, CpuOperations)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_changes_no_pixel(kernels, tokenizer, dtype):
    codes = torch.randint(64, (2, 24, 16))
    wanted = tokenizer.decode(codes)
    torch.set_default_dtype(dtype)
    try:
        found = tokenizer.decode(codes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_bfloat16_keeps_denormals(only_kernels):
    norm = torch.nn.GroupNorm(16, 16).to(torch.bfloat16)
    norm.weight.zero_()
    norm.bias.fill_(2.0**-129)
    found = norm_silu(norm, torch.zeros(1, 16, 2, 2, dtype=torch.bfloat16))
    assert torch.equal(found, torch.full_like(found, 2.0**-130))
