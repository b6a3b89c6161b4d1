"""The text encoder, with small T5 encoders over bytes in the place of FLAN-T5-XL."""

import logging

import pytest
import torch
import transformers

from llamagen.config import SmallTextEncoderConfig, TextConfig
from llamagen.support.errors import InputError
from llamagen.text.encoder import TextEncoder, length_batches, padded
from tests.tiny_models import tiny_text_encoder

CAPTIONS = ["a red heart", "llama", "a very long caption, of many words", "x"]


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_features_do_not_depend_on_other_captions(dtype, threads):
    encoder = tiny_text_encoder(dim=192, heads=4, layers=3).to(dtype)
    captions = [*CAPTIONS, "other", "words", "heart", "ab", "cd"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = encoder.encode(captions)
        backwards = encoder.encode(captions[::-1])[::-1]
        alone = [encoder.encode([caption])[0] for caption in captions]
    finally:
        torch.set_num_threads(before)
    assert [len(each) for each in together[:4]] == [12, 6, 30, 2]  # one for the end of each
    for a, b, c in zip(together, backwards, alone, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_batches_agree_with_captions_alone(encoder):
    alone = encoder.encode(CAPTIONS)
    for tokens_at_once in (1, 24, 1000):
        batched = encoder.encode(CAPTIONS, tokens_at_once=tokens_at_once)
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_pads_in_front(encoder):
    _, real = encoder.tokens(encoder.token_ids(CAPTIONS))
    assert real.sum(1).tolist() == [12, 6, 30, 2]
    assert not real[3, :28].any()
    assert real[3, 28:].all()
    features, mask = padded(encoder.encode(CAPTIONS))
    assert torch.equal(mask, real)
    assert torch.equal(features[~mask], torch.zeros_like(features[~mask]))


def test_progress_counts_captions(encoder):
    counts = []
    encoder.encode(CAPTIONS, tokens_at_once=12, progress=counts.append)
    assert sum(counts) == len(CAPTIONS)
    assert len(counts) > 1


@pytest.mark.parametrize("tokens_at_once", [1, 10, 16, 1000])
def test_batches_of_one_length(tokens_at_once):
    lengths = [3, 9, 2, 3, 1, 1, 3, 9]
    batches = list(length_batches(lengths, tokens_at_once))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len({lengths[i] for i in batch}) == 1
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens_at_once
    if tokens_at_once == 1000:
        assert len(batches) == 4


def test_cleans_captions_by_default(encoder):
    assert encoder.prepare(" A <b>Red</b> HEART ") == "a red heart"
    assert tiny_text_encoder(clean=False).prepare(" A Red HEART ") == "A Red HEART"


def test_composes_captions():
    for clean in (True, False):
        encoder = tiny_text_encoder(clean=clean)
        assert encoder.prepare("cafe\u0301") == encoder.prepare("caf\u00e9") == "caf\u00e9"
        assert encoder.prepare("\u200b\ufeff") == ""


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("\u200b \u2060\u3164", "is empty"),
        ("https://example.com", "empty once it is cleaned"),
        ("a\x00b", "U\\+0000"),
        ("bell \x07", "U\\+0007"),
    ],
)
def test_rejects_empty_prompts(encoder, prompt, message):
    with pytest.raises(InputError, match=message):
        encoder.require_text(prompt)


def test_warns_of_cut_prompts(encoder, caplog):
    prompt = encoder.require_text("llama " * 1700)
    with caplog.at_level(logging.WARNING):
        assert len(encoder.token_ids([prompt], warn=True)[0]) == 30
        assert len(caplog.records) == 1
        assert "only the first 30 tokens" in caplog.text
        assert len(caplog.text) < 300
        encoder.token_ids(["llama"], warn=True)
        assert len(caplog.records) == 1


def test_round_trip(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    config = TextConfig(encoder=str(tmp_path / "encoder"), max_length=30)
    loaded = TextEncoder.from_pretrained(config, dtype=torch.float32)
    for a, b in zip(loaded.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True):
        assert torch.equal(a, b)
    assert loaded.fingerprint() == encoder.fingerprint()
    # By default in bfloat16, and still known as the same.
    low = TextEncoder.from_pretrained(config)
    assert next(low.parameters()).dtype == torch.bfloat16
    assert low.fingerprint() == encoder.fingerprint()
    assert tiny_text_encoder(seed=1).fingerprint() != encoder.fingerprint()
    assert tiny_text_encoder(clean=False).fingerprint() != encoder.fingerprint()


def test_loads_the_encoder_of_a_whole_model(tmp_path):
    config = transformers.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    whole = transformers.T5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(TextConfig(encoder=str(tmp_path)), dtype=torch.float32)
    assert not any("decoder" in name for name in loaded.state_dict())
    ids, mask = loaded.tokens(loaded.token_ids(["llama"]))
    expected = whole.eval().encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded(ids, mask), expected)


def test_rejects_other_encoders(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in {
        str(tmp_path): "cannot be loaded",
        "no such thing": "no folder and no hub repository",
        "nobody/nothing": "nobody/nothing",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            TextEncoder.from_pretrained(TextConfig(encoder=source))
        assert "\n" not in str(caught.value)
    transformers.BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="family bert, expected t5"):
        TextEncoder.from_pretrained(TextConfig(encoder=str(tmp_path)))


def test_rejects_sizes():
    with pytest.raises(InputError, match="heads 3 must divide"):
        SmallTextEncoderConfig(dim=16, heads=3)
    with pytest.raises(InputError, match="max_length"):
        TextConfig(max_length=0)


def test_rejects_damaged_weights(tmp_path):
    tiny_text_encoder().save_pretrained(tmp_path / "e")
    weights = tmp_path / "e" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"text encoder .* cannot be loaded .* give a folder"):
        TextEncoder.from_pretrained(TextConfig(encoder=str(tmp_path / "e")))
