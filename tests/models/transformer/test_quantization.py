import json

import pytest
import torch

from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantization import QuantizedLinear, quantize
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer


def quantized(dtype=torch.float32, **settings):
    model = tiny_transformer(**{"dim": 64, "heads": 2, **settings}).to(dtype)
    quantize(model)
    return model


def test_weights_round_to_the_nearest():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    layer = QuantizedLinear(64, 48)
    layer.fill(weight)
    error = (layer.dequantized() - weight).square().mean().sqrt() / weight.std()
    assert error < 0.008
    assert not layer.dequantized()[3].any()
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().mT)


def test_scales_keep_their_precision():
    model = quantized()
    before = model.output.scales.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.output.scales, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders(dtype, tmp_path):
    model = quantized(dtype)
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
    quantized().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "quantization": "int3"}))
    with pytest.raises(InputError, match=r"int3.*int8"):
        Transformer.from_pretrained(tmp_path)
    assert values["requires_llamagen"] == "0.1.0"
    path.write_text(json.dumps({**values, "requires_llamagen": "99.1"}))
    with pytest.raises(InputError, match=r"needs llamagen 99\.1 or later, and this is"):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "quantization": None}))
    with pytest.raises(InputError, match=r"there is no weight .*scales in it"):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "quantization": "int4"}))
    with pytest.raises(InputError, match=r"int4 is no longer supported; convert .* again"):
        Transformer.from_pretrained(tmp_path)


def test_rejects_int8_weights_of_unquantised_config(tmp_path):
    model = tiny_transformer()
    tensors = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    given = [(name, lambda t=t: t.to(torch.int8)) for name, t in tensors.items()]
    with pytest.raises(InputError, match="quantised by other software cannot be loaded"):
        Transformer.from_tensors(model.config, given, shapes=shapes, source="x")


def test_rejects_a_quantised_model():
    model = quantized()
    with pytest.raises(InputError, match="cannot be quantised again; use the one that it was"):
        quantize(model)
