"""CLIP's encoders, with a small CLIP whose tokens are letters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llamagen.evaluation.networks import clip
from llamagen.evaluation.networks.clip import CAPTION_PREFIX, ClipEncoder
from tests.evaluation.networks.helpers import images, one_line

SIDE = 30
LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip(folder: Path, seed: int = 0) -> None:
    """A whole CLIP with drawn weights, as ``transformers`` writes it."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "projection_dim": 8}
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            **heads,
            "vocab_size": len(tokens),
            "max_position_embeddings": LENGTH,
            "bos_token_id": vocabulary[START],
            "eos_token_id": vocabulary[END],
            "pad_token_id": vocabulary[END],
        },
        vision_config={**tower, **heads, "image_size": SIDE, "patch_size": 10},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> ClipEncoder:
    return ClipEncoder.from_pretrained(folder)


def test_features_are_those_of_transformers(encoder, folder):
    batch, texts = images(SIDE, SIDE), ["a llama", "b"]
    found = encoder.encode_images(batch), encoder.encode_texts(texts, prefix="")
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    assert tokens["input_ids"][1].tolist()[:3] == [52, 26 + 1, 53]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (clip._MEAN, clip._DEVIATION))
    with torch.no_grad():
        expected = model(pixel_values=(batch / 255 - mean) / std, **tokens)
    for features, reference in zip(
        found, (expected.image_embeds, expected.text_embeds), strict=True
    ):
        assert features.dtype == torch.float32
        assert features.shape == reference.shape
        torch.testing.assert_close(features, reference, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert encoder.width == 8
    assert not any(each.requires_grad for each in (*found, *encoder.parameters()))


@pytest.mark.parametrize("size", [(30, 30), (64, 64), (20, 20), (61, 122), (96, 60), (18, 45)])
def test_images_are_prepared_as_in_transformers(size):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    batch = images(*size)
    pictures = [Image.fromarray(image) for image in batch.movedim(1, -1).numpy()]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    # One step of a byte is 0.0149 here: not one pixel differs.
    torch.testing.assert_close(clip._prepare(batch, SIDE), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "left"), [(30, 0), (33, 2), (35, 2), (37, 4), (40, 5)])
def test_takes_the_middle_of_a_wide_image(width, left):
    """Halves go to the even neighbour, as OpenAI's code does through torchvision."""
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[:, None], (SIDE, width, 3))
    square = np.asarray(clip._square(Image.fromarray(np.ascontiguousarray(ramp)), SIDE))
    assert square[0, :, 0].tolist() == list(range(left, left + SIDE))


def test_features_do_not_depend_on_the_batch(encoder):
    batch = images(40, 50)
    torch.testing.assert_close(
        encoder.encode_images(batch)[1:2],
        encoder.encode_images(batch[1:2]),
        rtol=1e-4,
        atol=1e-5,
    )
    texts = ["a", "a much longer caption", "llama"]
    torch.testing.assert_close(
        encoder.encode_texts(texts)[:1], encoder.encode_texts(texts[:1]), rtol=1e-4, atol=1e-5
    )
    assert encoder.encode_images(batch[:0]).shape == (0, 8)
    assert encoder.encode_texts([]).shape == (0, 8)


def test_captions_have_a_prefix_by_default(encoder):
    assert CAPTION_PREFIX == "A photo depicts "
    found = encoder.encode_texts(["a llama"])
    assert torch.equal(found, encoder.encode_texts(["A photo depicts a llama"], prefix=""))
    assert not torch.allclose(found, encoder.encode_texts(["a llama"], prefix=""))


def test_truncates_long_captions(encoder):
    long = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    short = long[: 2 * (LENGTH - 2) - 1]
    assert torch.equal(
        encoder.encode_texts([long], prefix=""), encoder.encode_texts([short], prefix="")
    )


def test_autocast_has_no_effect(encoder):
    batch = images(40, 40, count=1)
    before = encoder.encode_images(batch), encoder.encode_texts(["a"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = encoder.encode_images(batch), encoder.encode_texts(["a"])
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_rejects_images_that_are_not_bytes(encoder):
    text = one_line(encoder.encode_images, torch.zeros(1, 3, 8, 8))
    assert "give uint8 of shape (B, 3, H, W)" in text


def test_fingerprint_changes_with_the_weights(encoder, folder, tmp_path):
    again = ClipEncoder.from_pretrained(str(folder))
    assert again.fingerprint == encoder.fingerprint
    assert encoder.fingerprint.startswith("clip/")
    write_clip(tmp_path, seed=1)
    assert ClipEncoder.from_pretrained(tmp_path).fingerprint != encoder.fingerprint
    assert again.name == str(folder)


def test_rejects_other_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in {
        str(tmp_path): "cannot be loaded",
        "no such thing": "is no folder and no hub repository",
        "nobody/nothing": "nobody/nothing",
    }.items():
        assert message in one_line(ClipEncoder.from_pretrained, source)
    transformers.BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    assert "family bert, expected clip" in one_line(ClipEncoder.from_pretrained, tmp_path)


def test_rejects_damaged_files(tmp_path):
    write_clip(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    text = one_line(ClipEncoder.from_pretrained, tmp_path)
    assert f"CLIP {tmp_path} cannot be loaded" in text
    path.unlink()
    assert f"CLIP {tmp_path} cannot be loaded" in one_line(ClipEncoder.from_pretrained, tmp_path)
    write_clip(tmp_path)
    whole = transformers.CLIPModel.from_pretrained(tmp_path)
    state = whole.state_dict()
    del state["text_projection.weight"]
    whole.save_pretrained(tmp_path, state_dict=state)
    text = one_line(ClipEncoder.from_pretrained, tmp_path)
    assert "lacks weights of CLIP, as text_projection.weight" in text


def test_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = one_line(ClipEncoder.from_pretrained)
    assert "pip install 'llamagen[text]'" in text
