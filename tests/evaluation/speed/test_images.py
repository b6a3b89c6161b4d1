"""Seconds per image as ``llamagen info --measure`` has them; no time is asserted."""

import dataclasses

import pytest
import torch

from llamagen.checkpoints import find_shipped
from llamagen.evaluation import speed as module
from llamagen.evaluation.speed import measure_speed
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_pipeline, tiny_transformer

pytestmark = pytest.mark.usefixtures("nothing_downloaded")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measures_a_pipeline(model_folder, dtype):
    found = measure_speed(model_folder, images=(3, 1), device="cpu", dtype=dtype)
    assert (found.device, found.dtype) == ("cpu", dtype)
    assert [each.images for each in found.estimates] == [1, 3]
    for each in found.estimates:
        assert each.codes == 16
        whole = 16 * each.seconds_per_code + each.decode_seconds
        assert each.seconds_per_image == pytest.approx(whole / each.images)
        assert each.images_per_minute == pytest.approx(60 / each.seconds_per_image)
    assert "the 16 codes of an image" in found.how


def test_slow_model_is_measured_by_its_first_row(model_folder, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    (found,) = measure_speed(model_folder, images=(1,), device="cpu").estimates
    assert found.codes == 4
    whole = 16 * found.seconds_per_code + found.decode_seconds
    assert found.seconds_per_image == pytest.approx(whole)


@pytest.mark.parametrize("changes", [{"condition": "text"}, {"grid": (1, 1)}])
def test_measures_a_transformer_alone(tmp_path, changes):
    tiny_transformer(**changes).save_pretrained(tmp_path)
    found = measure_speed(tmp_path, images=(2,), device="cpu")
    assert found.estimates[0].decode_seconds is None
    assert "no image tokenizer" in found.how
    assert ("6 tokens" in found.how) == ("condition" in changes)


def test_names_guidance(tmp_path):
    pipe = tiny_pipeline()
    pipe.sampling = dataclasses.replace(pipe.sampling, guidance_scale=1.0)
    pipe.save_pretrained(tmp_path / "model")
    found = measure_speed(tmp_path / "model", images=(1,), device="cpu")
    assert "without guidance" in found.how


def test_precision_is_that_of_generate(model_folder, monkeypatch):
    monkeypatch.setattr("llamagen.support.devices._fast_dtype", lambda device: torch.bfloat16)
    assert measure_speed(model_folder, images=(1,), device="cpu").dtype == "bfloat16"


def test_rejects_sources_without_images(model_folder):
    with pytest.raises(InputError, match="c2i-B-256 is not on this machine"):
        measure_speed("c2i-B-256")
    with pytest.raises(InputError, match="is an image tokenizer"):
        measure_speed(model_folder / "tokenizer")
    with pytest.raises(InputError, match="is a text encoder"):
        measure_speed(find_shipped("emoji") / "text_encoder")
    with pytest.raises(InputError, match="expected integers of at least 1"):
        measure_speed(model_folder, images=(0,))
