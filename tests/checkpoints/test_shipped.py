"""Models that come with the package are found by name."""

from __future__ import annotations

import pytest

from llamagen import Pipeline
from llamagen.checkpoints import (
    find_shipped,
    load_tokenizer,
    nearest_names,
    resolve_pipeline,
    shipped_models,
    sources,
)
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_pipeline


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of shipped models, with one in it; another folder is the current one."""
    monkeypatch.setattr(sources, "_SHIPPED", tmp_path / "models")
    tiny_pipeline().save_pretrained(tmp_path / "models" / "flowers")
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "models"


def test_finds_by_name(folder):
    assert shipped_models() == ["flowers"]
    assert find_shipped("Flowers") == folder / "flowers"
    assert find_shipped("notes") is None
    assert resolve_pipeline("flowers").folder == folder / "flowers"
    assert load_tokenizer("flowers").config == tiny_pipeline().tokenizer.config
    pipe = Pipeline.from_pretrained("flowers", dtype="float32")
    assert pipe(0, seed=1).codes.equal(tiny_pipeline()(0, seed=1).codes)


def test_no_shipped_models(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SHIPPED", tmp_path / "missing")
    assert shipped_models() == []
    assert find_shipped("emoji") is None


def test_suggests_nearest_name(folder):
    assert nearest_names("flower") == ["flowers"]
    with pytest.raises(InputError, match=r"no known model \(did you mean flowers\?\)"):
        resolve_pipeline("flower")


def test_folder_of_data_does_not_hide_model(folder, tmp_path):
    (tmp_path / "here" / "flowers").mkdir()
    (tmp_path / "here" / "flowers" / "metadata.csv").write_text("file_name,text\n")
    assert resolve_pipeline("flowers").folder == folder / "flowers"
    # A path is a path all the same.
    with pytest.raises(InputError, match="is no model folder"):
        resolve_pipeline("./flowers")


def test_model_folder_comes_first(folder, tmp_path):
    pipe = tiny_pipeline()
    pipe.name = "mine"
    pipe.save_pretrained(tmp_path / "here" / "flowers")
    assert resolve_pipeline("flowers").name == "mine"
