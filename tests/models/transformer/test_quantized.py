import dataclasses
import json

import pytest
import torch

from llamagen.backends.decoder import CpuDecoder, TorchDecoder
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantized import QuantizedLinear, quantize
from llamagen.support.errors import InputError
from tests.backends.variants import VARIANTS, kernels_of
from tests.tiny_models import tiny_transformer

KINDS = ("int8", "int4")


def quantized(kind, dtype=torch.float32, **settings):
    model = tiny_transformer(**{"dim": 64, "heads": 2, **settings}).to(dtype)
    quantize(model, kind)
    return model


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.008), ("int4", 0.12)])
def test_weights_stay_near(kind, most):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    layer = QuantizedLinear(64, 48, kind)
    layer.fill(weight)
    error = (layer.dequantized() - weight).square().mean().sqrt() / weight.std()
    assert error < most
    assert not layer.dequantized()[3].any()
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().mT)


def test_int4_is_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (16, 2, 32), generator=generator)
    factors = torch.randint(1, 16, (16, 2, 1), generator=generator)
    weight = (numbers * factors).flatten(1).float()
    weight[:, 0] = 127 * torch.tensor([1.0, -1.0]).repeat(8)  # what makes the scale 1
    layer = QuantizedLinear(64, 16, "int4")
    layer.fill(weight)
    assert torch.equal(layer.scales, torch.ones(16))
    assert torch.equal(layer.dequantized()[:, 32:], weight[:, 32:])


def test_scales_keep_their_precision():
    model = quantized("int8")
    before = model.output.scales.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.output.scales, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_folders(kind, dtype, tmp_path):
    model = quantized(kind, dtype)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.parameter_count() == tiny_transformer(dim=64, heads=2).parameter_count()
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    other = Transformer.from_pretrained(tmp_path, dtype=torch.float16)
    assert other.tok_embeddings.weight.dtype == torch.float16
    assert other.output.scales.dtype == torch.float32
    assert torch.equal(other.output.weight, model.output.weight)


def test_folders_of_other_versions(tmp_path):
    quantized("int8").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "quantization": "int3"}))
    with pytest.raises(InputError, match=r"should be .*int8.*int4"):
        Transformer.from_pretrained(tmp_path)
    assert values["requires_llamagen"] == "0.1.0"
    path.write_text(json.dumps({**values, "requires_llamagen": "99.1"}))
    with pytest.raises(InputError, match=r"needs llamagen 99\.1 or later, and this is"):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "quantization": None}))
    with pytest.raises(InputError, match=r"there is no weight .*scales in it"):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "quantization": "int4"}))
    with pytest.raises(InputError, match="has shape"):
        Transformer.from_pretrained(tmp_path)


def test_whole_numbers_without_a_config_that_says_so(tmp_path):
    model = tiny_transformer()
    tensors = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    given = [(name, lambda t=t: t.to(torch.int8)) for name, t in tensors.items()]
    with pytest.raises(InputError, match="quantised by other software cannot be loaded"):
        Transformer.from_tensors(model.config, given, shapes=shapes, source="x")


def test_what_does_not_fit():
    model = quantized("int8")
    with pytest.raises(InputError, match="cannot be quantised again; take the one that it was"):
        quantize(model, "int8")
    with pytest.raises(InputError, match="no multiple of 32, so int4 does not fit"):
        quantize(tiny_transformer(dim=48), "int4")
    with pytest.raises(InputError, match="no multiple of 32"):
        Transformer(dataclasses.replace(tiny_transformer(dim=48).config, quantization="int4"))


@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_kernels(kind, dtype, variant, dim):
    # 8-bit products take 64 inputs at a time, where a processor has them.
    model = quantized(kind, dtype, heads=4, kv_heads=2, dim=dim)
    exact = Transformer(model.config).eval()
    exact.load_state_dict(model.state_dict())
    errors, size = torch.zeros(2), 0.0
    for rows in (1, 4, 9, 35):
        condition = torch.arange(rows) % model.config.num_classes
        models = [exact, model, model]
        decoders = [
            TorchDecoder(exact),
            TorchDecoder(model),
            CpuDecoder(model, kernels_of(variant)),
        ]
        caches = [each.new_cache(rows) for each in models]
        for each, cache in zip(models, caches, strict=True):
            each.prefill(condition, cache)
        for codes in torch.randint(64, (3, rows), generator=torch.Generator().manual_seed(rows)):
            truth, by_torch, ours = (
                decoder.next_logits(codes, cache).float()
                for decoder, cache in zip(decoders, caches, strict=True)
            )
            size += truth.square().mean()
            for index, found in enumerate((by_torch, ours)):
                errors[index] += (found - truth).square().mean()
    if dtype == torch.float32:
        assert errors[1] < 1e-9 * size
    else:
        assert errors[1] <= errors[0]
