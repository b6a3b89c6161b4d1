"""Samples are generated once, whatever interrupts, and shared by processes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen.config import SamplingConfig, sampling_settings
from llamagen.evaluation import image_sets
from llamagen.evaluation.samples import SamplePlan, draw_samples
from llamagen.models.tokenizer import images_to_uint8
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(image_sets, "PIECE", 4)
    return tiny_pipeline()


def plan(pipe, count=10, **changes):
    return SamplePlan.of_classes(pipe, count, **{"seed": 3, **changes})


def test_classes_are_balanced_or_random(pipe):
    balanced = plan(pipe, 50)
    assert np.bincount(balanced.prompts).tolist() == [10] * 5
    assert balanced.prompts != tuple(sorted(balanced.prompts))
    assert plan(pipe, 50) == balanced
    assert plan(pipe, 50, seed=4) != balanced
    assert set(plan(pipe, 200, order="random").prompts) == set(range(5))


def test_settings_are_the_papers_for_published_models(pipe):
    assert plan(pipe).sampling == pipe.sampling
    assert plan(pipe, top_k=7, top_p=None).sampling == pipe.sampling.replace(top_k=7)
    pipe.name, pipe.sampling = "c2i-XL-384", pipe.sampling.replace(top_k=9, temperature=0.5)
    published = plan(pipe, temperature=0.9)
    assert published.sampling == SamplingConfig(guidance_scale=1.75, temperature=0.9)
    assert published.size == 256


def test_every_sampling_setting_can_be_given(pipe):
    for setting in sampling_settings():
        value = setting.choices[-1] if setting.choices else setting.type(0.5) or 1
        assert getattr(plan(pipe, **{setting.name: value}).sampling, setting.name) == value


def test_images_are_those_of_the_pipeline(pipe, tmp_path):
    drawn = draw_samples(pipe, plan(pipe), tmp_path, batch_size=3)
    whole = pipe(plan(pipe).prompts, seed=3)
    expected = np.stack([np.asarray(image) for image in whole.images])
    np.testing.assert_array_equal(drawn.read(0, 10), expected)
    np.testing.assert_array_equal(drawn.read(3, 9), expected[3:9])
    np.testing.assert_array_equal(drawn.labels, plan(pipe).prompts)


def test_resizes_in_float(pipe, tmp_path):
    drawn = draw_samples(pipe, plan(pipe, 4, size=12), tmp_path)
    codes = pipe(plan(pipe, 4).prompts, seed=3, output_type="codes").codes
    with torch.inference_mode():
        images = pipe.tokenizer.decode(codes)
    resized = F.interpolate(images, size=(12, 12), mode="bicubic")
    np.testing.assert_array_equal(drawn.read(0, 4), images_to_uint8(resized).movedim(1, -1).numpy())


def test_resumes(pipe, tmp_path, monkeypatch):
    wanted = plan(pipe, guidance_scale=2.0)
    whole = draw_samples(pipe, wanted, tmp_path).read(0, 10)
    for name in ("piece-00000.npz", "piece-00001.npz"):
        (tmp_path / name).unlink()
    calls = []
    monkeypatch.setattr(type(pipe), "decode_in_parts", _counting(type(pipe).decode_in_parts, calls))
    again = draw_samples(pipe, wanted, tmp_path)
    assert calls == [4, 4]
    np.testing.assert_array_equal(again.read(0, 10), whole)
    # Damaged pieces are made again; one that is damaged later is removed.
    (tmp_path / "piece-00000.npz").write_bytes(b"truncated")
    draw_samples(pipe, wanted, tmp_path)
    assert calls == [4, 4, 4]
    (tmp_path / "piece-00000.npz").write_bytes(b"truncated")
    with pytest.raises(InputError, match=r"piece-00000.npz is damaged .* run the same command"):
        again.read(0, 10)
    assert len(draw_samples(pipe, wanted, tmp_path).read(0, 10)) == 10


def _counting(decode, calls):
    def counted(self, codes):
        calls.append(len(codes))
        return decode(self, codes)

    return counted


def test_rejects_a_folder_of_other_samples(pipe, tmp_path):
    draw_samples(pipe, plan(pipe), tmp_path)
    with pytest.raises(InputError, match=r"other settings .*guidance_scale.* choose another"):
        draw_samples(pipe, plan(pipe, guidance_scale=2.0), tmp_path)
    with pytest.raises(InputError, match=r"begun with other settings \(images 10, now 11; id"):
        draw_samples(pipe, plan(pipe, 11), tmp_path)
    with pytest.raises(InputError, match=r"begun with other settings .*weights"):
        draw_samples(tiny_pipeline(seed=1), plan(pipe), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"not empty and holds no samples \(but notes"):
        draw_samples(pipe, plan(pipe), tmp_path / "other")


def test_rejects_samples_of_another_text_encoder(pipe, tmp_path):
    first = tiny_text_pipeline()
    prompts = SamplePlan.of_prompts(first, ["a", "b"])
    before = draw_samples(first, prompts, tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    with pytest.raises(InputError, match=r"begun with other settings \(text_encoder"):
        draw_samples(tiny_text_pipeline(seed=1), prompts, tmp_path)
    # Older folders do not say which one it was, but go on.
    del settings["text_encoder"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert draw_samples(first, prompts, tmp_path).identity == before.identity


def test_progress_counts_every_image_once(pipe, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(
        image_sets.Pieces, "compute", lambda _, make, _text: make(range(10), counts.append)
    )
    draw_samples(pipe, plan(pipe), tmp_path, batch_size=3)
    assert counts == [3, 3, 3, 1]


def test_resumes_folders_of_the_first_edition(pipe, tmp_path):
    whole = draw_samples(pipe, plan(pipe), tmp_path).read(0, 10)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    first = ("guidance_scale", "guidance_stop", "temperature", "top_k", "top_p")
    assert set(settings.pop("sampling")) == set(first)
    assert set(settings) == {
        *("format", "version", "model", "weights", "dtype", "images", "identity")
    }
    settings = json.loads(path.read_text())
    del settings["format"], settings["version"]
    path.write_text(json.dumps(settings))
    (tmp_path / "piece-00001.npz").unlink()
    np.testing.assert_array_equal(draw_samples(pipe, plan(pipe), tmp_path).read(0, 10), whole)
