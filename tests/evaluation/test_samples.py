"""Samples are drawn once, whatever interrupts, and shared by processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen.evaluation import pieces
from llamagen.evaluation.samples import SamplePlan, draw_samples
from llamagen.models.tokenizer import images_to_uint8
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_pipeline


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4)
    return tiny_pipeline()


def plan(count=10, **changes):
    values = {"order": "balanced", "seed": 3, "size": None, **changes}
    return SamplePlan.of_classes(5, count, **values)


def test_labels():
    balanced = plan(50)
    assert np.bincount(balanced.prompts).tolist() == [10] * 5
    assert balanced.prompts != tuple(sorted(balanced.prompts))
    assert plan(50) == balanced
    assert plan(50, seed=4) != balanced
    assert set(plan(200, order="random").prompts) == set(range(5))


def test_images_are_those_of_the_pipeline(pipe, tmp_path):
    drawn = draw_samples(pipe, plan(), tmp_path, batch_size=3)
    whole = pipe(plan().prompts, seed=3)
    expected = np.stack([np.asarray(image) for image in whole.images])
    np.testing.assert_array_equal(drawn.read(0, 10), expected)
    np.testing.assert_array_equal(drawn.read(3, 9), expected[3:9])
    np.testing.assert_array_equal(drawn.labels, plan().prompts)


def test_resized_in_float(pipe, tmp_path):
    drawn = draw_samples(pipe, plan(4, size=12), tmp_path)
    codes = pipe(plan(4).prompts, seed=3, output_type="codes").codes
    with torch.inference_mode():
        images = pipe.tokenizer.decode(codes)
    resized = F.interpolate(images, size=(12, 12), mode="bicubic")
    np.testing.assert_array_equal(drawn.read(0, 4), images_to_uint8(resized).movedim(1, -1).numpy())


def test_goes_on_where_it_stopped(pipe, tmp_path, monkeypatch):
    settings = {"guidance_scale": 2.0}
    whole = draw_samples(pipe, plan(), tmp_path, **settings).read(0, 10)
    for name in ("piece-00000.npz", "piece-00001.npz"):
        (tmp_path / name).unlink()
    calls = []
    monkeypatch.setattr(type(pipe), "decode_in_parts", _counting(type(pipe).decode_in_parts, calls))
    again = draw_samples(pipe, plan(), tmp_path, **settings)
    assert calls == [4, 4]
    np.testing.assert_array_equal(again.read(0, 10), whole)
    (tmp_path / "piece-00000.npz").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"piece-00000.npz is damaged .* run the same command"):
        again.read(0, 10)
    assert len(draw_samples(pipe, plan(), tmp_path, **settings).read(0, 10)) == 10


def _counting(decode, calls):
    def counted(self, codes):
        calls.append(len(codes))
        return decode(self, codes)

    return counted


def test_other_settings_are_refused(pipe, tmp_path):
    draw_samples(pipe, plan(), tmp_path)
    with pytest.raises(InputError, match=r"begun with other settings .*sampling.* another --out"):
        draw_samples(pipe, plan(), tmp_path, guidance_scale=2.0)
    with pytest.raises(InputError, match=r"begun with other settings \(images, identity\)"):
        draw_samples(pipe, plan(11), tmp_path)
    with pytest.raises(InputError, match=r"begun with other settings .*weights"):
        draw_samples(tiny_pipeline(seed=1), plan(), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(InputError, match="not empty and holds no samples"):
        draw_samples(pipe, plan(), tmp_path / "other")
