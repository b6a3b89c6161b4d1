import pytest

from llamagen.checkpoints import PUBLIC_MODELS, find_public, nearest_names
from llamagen.config import TOKENIZER_PRESETS, TRANSFORMER_PRESETS, SamplingConfig

SIDES = {"256": 16, "384": 24, "512": 32}


def test_every_published_model():
    names = [model.name for model in PUBLIC_MODELS]
    assert len(names) == len(set(names)) == 14
    files = {(model.repo, model.file) for model in PUBLIC_MODELS}
    assert len(files) == 14
    for model in PUBLIC_MODELS:
        if model.kind == "image tokenizer":
            assert model.preset in TOKENIZER_PRESETS
            assert model.tokenizer is None
            continue
        condition, preset, size = model.name.split("-")
        assert model.preset == preset
        assert preset in TRANSFORMER_PRESETS
        assert model.grid == (SIDES[size], SIDES[size])
        tokenizer = find_public(model.tokenizer)
        assert tokenizer.kind == "image tokenizer"
        if condition == "randar":
            assert (model.order, model.condition, tokenizer.name) == ("random", "class", "vq-16")
            assert model.file.endswith(".safetensors")
            scale = {"L": 3.4, "XL": 4.0}[preset]
            expected = SamplingConfig(
                guidance_schedule="linear", guidance_scale=scale, guidance_start=1.0, steps=88
            )
            assert model.sampling == expected
            continue
        assert model.order == "raster"
        assert model.condition == {"c2i": "class", "t2i": "text"}[condition]
        assert tokenizer.repo == model.repo
        scale, top_k = (4.0, 2000) if condition == "c2i" else (7.5, 1000)
        assert (model.sampling.guidance_scale, model.sampling.top_k) == (scale, top_k)


def test_case_does_not_matter():
    assert find_public("C2I-b-256").file == "c2i_B_256.pt"
    assert find_public("VQ-16").file == "vq_ds16_c2i.pt"
    assert find_public("c2i-B-512") is None


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("c2i-b-265", "c2i-B-256"),
        ("c2i_XXL_384", "c2i-XXL-384"),
        ("vq16", "vq-16"),
        ("t2i-XL-521", "t2i-XL-512"),
    ],
)
def test_suggests_nearest_names(wrong, right):
    assert nearest_names(wrong)[0] == right


def test_suggests_nothing():
    assert nearest_names("stable-diffusion") == []
