"""Folders for vLLM and the prompts made from them. Needs no vLLM."""

import json

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.export import (
    ExportOptions,
    export_for_vllm,
    read_exported,
    temporary_export,
)
from llamagen.vllm_plugin.prompts import Prompts
from tests.tiny_models import tiny_pipeline, tiny_tokenizer, tiny_transformer

pytest.importorskip("transformers")


def test_random_order_is_refused(tmp_path):
    with pytest.raises(InputError, match="vLLM predicts codes one after another"):
        export_for_vllm(tiny_transformer(order="random"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_has_vllms_settings(tmp_path):
    model = tiny_transformer(dim=80, kv_heads=2, num_classes=5)
    folder = export_for_vllm(model, tmp_path / "out", ExportOptions(grid=(2, 3)))
    config = read_exported(folder)
    assert config.hidden_size == 160
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.head_dim == 32
    assert (config.first_code, config.end_id, config.vocab_size) == (6, 5, 128)
    assert config.max_position_embeddings == 1 + 6
    assert config.mrope_section is None
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 6
    assert generation["eos_token_id"] == 5
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }


@pytest.mark.parametrize(
    ("options", "width", "head"),
    [
        (ExportOptions(), 64, 32),
        (ExportOptions(guidance=False), 32, 32),
        (ExportOptions(negative_prompts=True), 64, 64),
    ],
)
def test_heads_and_streams_of_texts(tmp_path, options, width, head):
    """A head of 32 has no room for the dimension that masks padding."""
    model = tiny_transformer(condition="text", dim=32, heads=1)
    config = read_exported(export_for_vllm(model, tmp_path / "out", options))
    assert (config.hidden_size, config.head_dim, config.first_code) == (width, head, 1)
    assert config.mrope_section is not None


def test_pipelines_folders_and_exports_can_be_exported(tmp_path):
    pipe = tiny_pipeline()
    pipe.sampling = SamplingConfig(guidance_scale=2.5, top_k=9)
    pipe.save_pretrained(tmp_path / "pipe")
    first = export_for_vllm(tmp_path / "pipe", tmp_path / "first")
    assert read_exported(first).default_sampling == pipe.sampling
    assert json.loads((first / "generation_config.json").read_text())["top_k"] == 9
    again = export_for_vllm(first, tmp_path / "again", ExportOptions(guidance=False))
    assert read_exported(again).streams == 1
    assert read_exported(again).default_sampling.guidance_scale == 1.0
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()
    with temporary_export(tmp_path / "pipe" / "transformer") as folder:
        assert (folder / weights).is_symlink()
        assert read_exported(folder).model == pipe.transformer.config
    assert not folder.exists()
    with temporary_export(first) as folder:
        assert folder == first


def test_rejects_invalid_sources(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="choose another name"):
        export_for_vllm(tiny_transformer(), tmp_path / "full")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="image tokenizer"):
        export_for_vllm(tmp_path / "tokenizer", tmp_path / "out")
    with pytest.raises(InputError, match="export-vllm"):
        Prompts(tmp_path / "tokenizer", torch.float32)


def test_labels_are_ids_and_pairs_are_embeddings(tmp_path):
    model = tiny_transformer()
    options = ExportOptions(negative_prompts=True)
    prompts = Prompts(export_for_vllm(model, tmp_path / "out", options), torch.float32)
    assert prompts.of(torch.tensor(3)) == {"prompt_token_ids": [3]}
    assert prompts.of(torch.tensor(3), torch.tensor(5)) == {"prompt_token_ids": [3]}
    pair = prompts.of(torch.tensor(3), torch.tensor(1))["prompt_embeds"]
    table = model.cls_embedding.embedding_table.weight
    assert torch.equal(pair, torch.cat([table[3], table[1]])[None])


def test_texts_of_two_lengths_are_padded_in_front(tmp_path):
    model = tiny_transformer(condition="text")
    options = ExportOptions(negative_prompts=True)
    prompts = Prompts(export_for_vllm(model, tmp_path / "out", options), torch.float32)
    long, short = torch.randn(5, 16), torch.randn(2, 16)
    embeds = prompts.of(short, long)["prompt_embeds"]
    assert embeds.shape == (5, 64)
    assert not embeds[:3, :32].any()
    torch.testing.assert_close(embeds[3:, :32], model.cls_embedding(short[None])[0])
    torch.testing.assert_close(embeds[:, 32:], model.cls_embedding(long[None])[0])
    own = prompts.of(short)["prompt_embeds"]
    none = model.cls_embedding.unconditional(short[None])
    torch.testing.assert_close(own[:, 32:], model.cls_embedding(none)[0])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.tensor(6), "classes 0 to 4"),
        (torch.tensor([1]), "one label"),
        (torch.tensor(0.5), "integer"),
    ],
)
def test_rejects_invalid_labels(tmp_path, condition, message):
    prompts = Prompts(export_for_vllm(tiny_transformer(), tmp_path / "out"), torch.float32)
    with pytest.raises(InputError, match=message):
        prompts.of(condition)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(7, 16), "up to 6"),
        (torch.zeros(3, 8), "up to 6"),
        (torch.zeros(0, 16), "empty"),
        (torch.zeros(1, 3, 16), "of one image"),
    ],
)
def test_rejects_mismatched_features(tmp_path, features, message):
    model = tiny_transformer(condition="text")
    prompts = Prompts(export_for_vllm(model, tmp_path / "out"), torch.float32)
    with pytest.raises(InputError, match=message):
        prompts.of(features)
