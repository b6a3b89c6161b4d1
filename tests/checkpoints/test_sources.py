"""Locations of the parts of a pipeline, before loading."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from llamagen.checkpoints import (
    PipelineIndex,
    is_pipeline_folder,
    read_index,
    resolve_pipeline,
    write_index,
)
from llamagen.config import SamplingConfig
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from tests.checkpoints.files import tokenizer, transformer
from tests.tiny_models import tiny_pipeline


def test_published_names():
    found = resolve_pipeline("C2I-l-384")
    assert (found.name, found.transformer, found.tokenizer) == ("c2i-L-384", "c2i-L-384", "vq-16")
    assert found.labels == Labels.imagenet()
    assert found.sampling == SamplingConfig(guidance_scale=4.0, top_k=2000)
    assert found.folder is None
    found = resolve_pipeline("t2i-XL-512")
    assert (found.transformer, found.tokenizer) == ("t2i-XL-512", "vq-16-t2i")
    assert found.labels is None
    assert found.sampling == SamplingConfig(guidance_scale=7.5, top_k=1000)


def test_resolves_pipeline_folder(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "p")
    found = resolve_pipeline(str(tmp_path / "p"))
    assert found.name == "tiny"
    assert found.labels == pipe.labels
    assert found.sampling == pipe.sampling
    assert found.folder == tmp_path / "p"
    assert found.transformer == tmp_path / "p" / "transformer"
    assert found.tokenizer == tmp_path / "p" / "tokenizer"
    monkeypatch.chdir(tmp_path / "p")
    assert resolve_pipeline(".").name == "tiny"
    (tmp_path / "p" / "labels.json").unlink()
    assert resolve_pipeline(tmp_path / "p").labels is None


def test_resolves_single_transformer(tmp_path):
    transformer().save_pretrained(tmp_path / "mine")
    torch.save(transformer().state_dict(), tmp_path / "c2i.pt")
    for source, name in ((tmp_path / "mine", "mine"), (tmp_path / "c2i.pt", "c2i")):
        found = resolve_pipeline(source)
        assert (found.name, found.transformer) == (name, source)
        assert (found.tokenizer, found.labels, found.folder) == (None, None, None)
        assert found.sampling is None


def test_rejects_single_tokenizer(tmp_path):
    tokenizer().save_pretrained(tmp_path / "v")
    torch.save(tokenizer().state_dict(), tmp_path / "v.pt")
    for source in (tmp_path / "v", tmp_path / "v.pt", "vq-16"):
        with pytest.raises(InputError, match="is an image tokenizer; name a pipeline"):
            resolve_pipeline(source)


@pytest.mark.parametrize("source", ["c2i-B-265", "no/where/near", "missing.pt", ""])
def test_rejects_unknown_source(source):
    with pytest.raises(InputError, match="is no folder, no file, no known model"):
        resolve_pipeline(source)


def test_index_round_trip(tmp_path):
    index = PipelineIndex(name="a \u00fc", sampling=SamplingConfig(guidance_stop=9, top_p=0.5))
    assert not is_pipeline_folder(tmp_path)
    write_index(tmp_path, index)
    assert is_pipeline_folder(tmp_path)
    assert read_index(tmp_path) == index
    values = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert values["format"] == "llamagen-pipeline"
    assert values["format_version"] == 1
    assert values["llamagen_version"] == version("llamagen")
    assert values["sampling"]["top_p"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 2},
            "has format 2, but this version of llamagen reads up to 1; upgrade",
        ),
        ({"format_version": "1"}, "format_version is '1', expected a number"),
        ({"format": "diffusers"}, "does not describe a llamagen pipeline"),
        ({"sampling": {"top_k": -1}}, "top_k is -1"),
        ({"sampling": {"top_q": 1}}, "top_q"),
        ({"name": None}, "name"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_rejects_unusable_index(tmp_path, change, message):
    write_index(tmp_path, PipelineIndex(name="a"))
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message) as error:
        read_index(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_reads_integers_as_floats_in_index(tmp_path):
    write_index(tmp_path, PipelineIndex(name="a"))
    path = tmp_path / "model_index.json"
    path.write_text(path.read_text().replace("4.0", "4").replace("1.0", "1"))
    assert read_index(tmp_path).sampling == SamplingConfig()


def test_missing_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json does not exist"):
        read_index(tmp_path)
