"""Loading of folders, pipelines, files and names, and errors of one line."""

from __future__ import annotations

import json

import pytest
import torch

from llamagen.checkpoints import load_model, load_tokenizer, load_transformer, names, sources
from llamagen.checkpoints.names import PublicModel
from llamagen.config import TOKENIZER_PRESETS, TRANSFORMER_PRESETS
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.errors import InputError
from tests.checkpoints.files import ARGUMENTS, same_weights, tokenizer, transformer
from tests.tiny_models import tiny_pipeline, tiny_tokenizer


def test_model_folders(tmp_path):
    transformer().save_pretrained(tmp_path / "t")
    # Norm groups stand in the configuration, so that any size of a folder's model loads.
    tiny_tokenizer().save_pretrained(tmp_path / "v")
    assert same_weights(load_transformer(tmp_path / "t"), transformer())
    assert same_weights(load_tokenizer(str(tmp_path / "v")), tiny_tokenizer())
    assert same_weights(load_model(tmp_path / "t", dtype=torch.bfloat16), transformer().bfloat16())
    assert isinstance(load_model(tmp_path / "v"), ImageTokenizer)
    with pytest.raises(InputError, match="describes transformer, expected image tokenizer"):
        load_tokenizer(tmp_path / "t")
    with pytest.raises(InputError, match="describes image tokenizer, expected transformer"):
        load_transformer(tmp_path / "v")


def test_parts_of_a_pipeline_folder(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "p")
    assert same_weights(load_transformer(tmp_path / "p"), pipe.transformer)
    assert same_weights(load_tokenizer(tmp_path / "p"), pipe.tokenizer)
    with pytest.raises(InputError, match="is a whole pipeline; name one of its models"):
        load_model(tmp_path / "p")


def test_rejects_arguments_that_contradict_folder(tmp_path):
    transformer().save_pretrained(tmp_path / "t")
    assert load_transformer(tmp_path / "t", grid=(4, 4), heads=4).config.grid == (4, 4)
    with pytest.raises(InputError, match="trained with grid 4x4, not 5x4; leave `grid` out"):
        load_transformer(tmp_path / "t", grid=(5, 4))
    with pytest.raises(InputError, match="trained with heads 4, not 8"):
        load_transformer(tmp_path / "t", heads=8)


def test_rejects_damaged_folders(tmp_path):
    folder = tmp_path / "t"
    transformer().save_pretrained(folder)
    config = (folder / "config.json").read_text()
    for text, message in (
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"model_type": "llama"}', "describes something else"),
        (config.replace('"dim"', '"dims"'), "dims"),
        (config.replace('"layers": 2', '"layers": 3'), "layers.2.attention.wqkv.weight"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=message) as error:
            load_transformer(folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_transformer(folder)


def test_rejects_folders_without_model(tmp_path):
    with pytest.raises(InputError, match=r"neither config\.json nor model_index\.json$"):
        load_tokenizer(tmp_path)
    transformer().save_pretrained(tmp_path / "t")
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert f"did you mean {tmp_path / 'a.pt'} or {tmp_path / 't'}?" in str(error.value)


@pytest.mark.parametrize("load", [load_tokenizer, load_transformer, load_model])
@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("c2i-L-834", "(did you mean c2i-L-384"),
        ("vq_16", "(did you mean vq-16"),
        ("./c2i", ""),
        ("/nowhere/at/all", ""),
        ("nowhere/model.pt", ""),
        ("a/b/c", ""),
        ("", ""),
        ("spaces in/it", ""),
    ],
)
def test_rejects_unknown_sources(load, source, hint):
    with pytest.raises(InputError, match="is no folder, no file, no known model") as error:
        load(source)
    assert hint in str(error.value)
    assert "no hub repository (owner/name)" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_path_is_no_hub_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="runs/tokenizer is no folder"):
        load_tokenizer("runs/tokenizer")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Two published models of a size for tests; files that "downloads" find in a folder."""
    public = (
        PublicModel(name="c2i-t", repo="o/n", file="t.pt", preset="t", grid=(2, 8)),
        PublicModel(name="vq-t", repo="o/n", file="v.pt", kind="image tokenizer", preset="v"),
    )
    monkeypatch.setattr(names, "PUBLIC_MODELS", public)
    monkeypatch.setattr(sources, "download_file", lambda repo, file: tmp_path / file)
    monkeypatch.setitem(TRANSFORMER_PRESETS, "t", transformer().config)
    monkeypatch.setitem(TOKENIZER_PRESETS, "v", tokenizer().config)
    torch.save({"model": transformer().state_dict(), "args": ARGUMENTS}, tmp_path / "t.pt")
    torch.save(tokenizer().state_dict(), tmp_path / "v.pt")
    return tmp_path


def test_published_names(published):
    loaded = load_transformer("C2I-T")
    assert same_weights(loaded, transformer())
    # What is known of a published file outweighs what it says of itself.
    assert loaded.config.grid == (2, 8)
    assert same_weights(load_tokenizer("vq-t"), tokenizer())
    assert same_weights(load_model("vq-t"), tokenizer())
    with pytest.raises(InputError, match="c2i-t was trained with grid 2x8, not 4x4"):
        load_transformer("c2i-t", grid=(4, 4))
    with pytest.raises(InputError, match="c2i-t is no image tokenizer but the name of a tr"):
        load_tokenizer("c2i-t")
    with pytest.raises(InputError, match="vq-t is no transformer but the name of a"):
        load_transformer("vq-t")


def test_rejects_published_file_of_other_model(published):
    torch.save(transformer(layers=3).state_dict(), published / "t.pt")
    with pytest.raises(InputError, match=r"there is no weight layers\.2"):
        load_transformer("c2i-t")
    torch.save(tokenizer().state_dict(), published / "t.pt")
    with pytest.raises(InputError, match="holds another model"):
        load_transformer("c2i-t")


def test_loading_keeps_random_state(tmp_path):
    transformer().save_pretrained(tmp_path / "t")
    tokenizer().save_pretrained(tmp_path / "v")
    torch.save(transformer().state_dict(), tmp_path / "t.pt")
    before = torch.get_rng_state()
    load_transformer(tmp_path / "t")
    load_transformer(tmp_path / "t.pt", heads=4)
    load_tokenizer(tmp_path / "v")
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_models_can_be_trained(tmp_path):
    torch.save({"model": transformer(condition="text").state_dict()}, tmp_path / "t.pt")
    loaded = load_transformer(tmp_path / "t.pt", heads=4, grid=(4, 4))
    codes, features = torch.zeros(2, 15, dtype=torch.long), torch.ones(2, 6, 16)
    dropped = torch.tensor([True, False])
    loaded.train()(codes, features, drop_condition=dropped).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_saves_configuration_as_json(tmp_path):
    transformer().save_pretrained(tmp_path / "t")
    values = json.loads((tmp_path / "t" / "config.json").read_text())
    assert values["kind"] == "transformer"
    assert values["grid"] == [4, 4]
