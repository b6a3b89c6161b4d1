import dataclasses

import pytest
import torch

from llamagen.checkpoints import find_shipped
from llamagen.evaluation.speed.speed import estimate_speed
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_pipeline, tiny_transformer

pytestmark = pytest.mark.usefixtures("nothing_downloaded")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


class TestSpeed:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_of_a_pipeline(self, model_folder, dtype):
        found = estimate_speed(model_folder, images=(3, 1), device="cpu", dtype=dtype)
        assert (found.device, found.dtype) == ("cpu", dtype)
        assert [each.images for each in found.estimates] == [1, 3]
        for each in found.estimates:
            whole = each.start_seconds + 16 * each.seconds_per_code + each.decode_seconds
            assert each.seconds_per_image == pytest.approx(whole / each.images)
            assert each.images_per_minute == pytest.approx(60 / each.seconds_per_image)
        assert "all 16 codes" in found.how

    @pytest.mark.parametrize("changes", [{"condition": "text"}, {"grid": (1, 1)}])
    def test_of_a_transformer_alone(self, tmp_path, changes):
        tiny_transformer(**changes).save_pretrained(tmp_path)
        found = estimate_speed(tmp_path, images=(2,), device="cpu")
        assert found.estimates[0].decode_seconds is None
        assert "no image tokenizer" in found.how
        assert ("6 tokens" in found.how) == ("condition" in changes)

    def test_without_guidance(self, tmp_path):
        pipe = tiny_pipeline()
        pipe.sampling = dataclasses.replace(pipe.sampling, guidance_scale=1.0)
        pipe.save_pretrained(tmp_path / "model")
        found = estimate_speed(tmp_path / "model", images=(1,), device="cpu")
        assert "without guidance" in found.how

    def test_takes_the_precision_of_drawing(self, model_folder, monkeypatch):
        monkeypatch.setattr("llamagen.support.devices._fast_dtype", lambda device: torch.bfloat16)
        assert estimate_speed(model_folder, images=(1,), device="cpu").dtype == "bfloat16"

    def test_of_what_cannot_be_measured(self, model_folder):
        with pytest.raises(InputError, match="c2i-B-256 is not on this machine"):
            estimate_speed("c2i-B-256")
        with pytest.raises(InputError, match="is an image tokenizer"):
            estimate_speed(model_folder / "tokenizer")
        with pytest.raises(InputError, match="is a text encoder"):
            estimate_speed(find_shipped("emoji") / "text_encoder")
        with pytest.raises(InputError, match="expected numbers of at least 1"):
            estimate_speed(model_folder, images=(0,))
