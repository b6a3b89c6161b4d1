"""Prompts in, images out."""

import pytest
import torch

from llamagen import Pipeline
from llamagen.backends import CpuStep
from llamagen.config import TextConfig
from llamagen.support.errors import InputError
from tests.tiny_models import (
    tiny_text_encoder,
    tiny_text_pipeline,
    tiny_tokenizer,
    tiny_transformer,
)


@pytest.fixture(scope="module")
def pipe():
    return tiny_text_pipeline()


def test_batch_matches_single_prompts(pipe):
    prompts = ["llama", "a red heart with an arrow", "x"]
    together = pipe(prompts, num_images_per_prompt=2, seed=0, guidance_scale=3.0)
    assert len(together.images) == 6
    assert [entry["prompt"] for entry in together.metadata[::2]] == prompts
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, num_images_per_prompt=2, seed=2 * index, guidance_scale=3.0)
        assert torch.equal(alone.codes, together.codes[2 * index : 2 * index + 2])


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_changes_no_code(dtype, has_kernels, monkeypatch):
    """Of prompts of many lengths; a bfloat16 product of other rows would round differently."""
    if not has_kernels:
        monkeypatch.setattr(CpuStep, "supports", lambda model: False)
    transformer = tiny_transformer(
        condition="text", text_length=30, text_dim=64, dim=64, hidden_dim=128
    )
    encoder = tiny_text_encoder(dim=64, heads=4)
    pipe = Pipeline(tiny_tokenizer(), transformer, text_encoder=encoder).to(dtype=dtype)
    prompts = ["a", "llama", "two llamas", "a heart", "red", "a red heart with an arrow", "ab"]
    together = pipe(prompts, seed=0, guidance_scale=3.0)
    features = encoder.encode([encoder.require_text(prompt) for prompt in prompts])
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=index, guidance_scale=3.0)
        assert torch.equal(alone.codes[0], together.codes[index])
        (own,) = encoder.encode([encoder.require_text(prompt)])
        assert torch.equal(own, features[index])


def test_codes_depend_on_the_prompt(pipe):
    assert not torch.equal(pipe("llama", seed=0).codes, pipe("heart", seed=0).codes)


def test_negative_prompts(pipe):
    def codes(negative, scale=3.0):
        return pipe("llama", seed=0, guidance_scale=scale, negative_prompt=negative).codes

    plain = pipe("llama", seed=0, guidance_scale=3.0).codes
    assert not torch.equal(codes("something else altogether"), plain)
    # What leads towards and away from the same leads nowhere.
    assert torch.equal(codes("llama"), pipe("llama", seed=0, guidance_scale=1.0).codes)
    assert torch.equal(codes("x", scale=1.0), pipe("llama", seed=0, guidance_scale=1.0).codes)
    both = pipe(["llama", "heart"], negative_prompt=["x", "a longer one"], seed=0, top_k=9)
    assert torch.equal(
        both.codes[1:], pipe("heart", negative_prompt="a longer one", seed=1, top_k=9).codes
    )
    assert both.metadata[1]["negative_prompt"] == "a longer one"
    with pytest.raises(InputError, match="3 negative prompts for 1"):
        codes(["a", "b", "c"])


@pytest.mark.parametrize("moved", [False, True])
def test_saves_the_encoder(pipe, tmp_path, moved):
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    assert (folder / "text_encoder" / "model.safetensors").is_file()
    if moved:
        # Loaded from a folder, and saved again without having been used.
        Pipeline.from_pretrained(folder, dtype="float32").save_pretrained(tmp_path / "copy")
        folder = tmp_path / "copy"
    loaded = Pipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert torch.equal(loaded("llama", seed=3).codes, pipe("llama", seed=3).codes)


def test_saves_the_name_of_a_hub_encoder(tmp_path):
    transformer = tiny_transformer(condition="text")
    config = TextConfig(encoder="owner/encoder", max_length=6, clean=False)
    pipe = Pipeline(tiny_tokenizer(), transformer, text_encoder=config)
    pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "text_encoder").exists()
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded._text == config
    # Features need no encoder.
    assert len(loaded(prompt_embeds=torch.randn(1, 3, 16), seed=0).images) == 1


def test_rejects_encoders_of_another_width(tmp_path):
    tiny_text_encoder(dim=32).save_pretrained(tmp_path / "wide")
    pipe = tiny_text_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    other = Pipeline.from_pretrained(tmp_path / "model", text_encoder=tmp_path / "wide")
    with pytest.raises(InputError, match="width 32, but tiny-text takes 16"):
        other("llama")


def test_rejects_prompts(pipe):
    for prompt, message in {"": "is empty", "a\x01": "control character"}.items():
        with pytest.raises(InputError, match=message):
            pipe(["llama", prompt])
    with pytest.raises(InputError, match="text-conditional: give a prompt"):
        pipe()
    with pytest.raises(InputError, match="prompt_embeds"):
        pipe("llama", prompt_embeds=torch.randn(1, 3, 16))
