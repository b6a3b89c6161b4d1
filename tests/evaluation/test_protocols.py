"""Each protocol from images to report: what is compared, what is said of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llamagen.evaluation.features import ReferenceSource
from llamagen.evaluation.image_sets import CollectedImages
from llamagen.evaluation.metrics import FeatureStatistics, frechet_distance
from llamagen.evaluation.protocols.common import Workplace
from llamagen.evaluation.protocols.comparison import (
    evaluate_classes,
    evaluate_folder,
    evaluate_sweep,
    evaluate_texts,
)
from llamagen.evaluation.protocols.likelihood import evaluate_likelihood
from llamagen.evaluation.protocols.tokenizer import Reconstructions, evaluate_tokenizer
from llamagen.evaluation.report import save_report
from llamagen.evaluation.samples import SamplePlan
from llamagen.support.errors import InputError
from tests.evaluation.sets import CoarsePixels, noise, write_noise
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline, tiny_tokenizer


@pytest.fixture
def reference(tmp_path):
    return ReferenceSource(write_noise(tmp_path / "real", 40))


def place(tmp_path, fingerprint="inception made up"):
    return Workplace(
        out=tmp_path / "out", network=CoarsePixels(fingerprint), device=torch.device("cpu")
    )


def pooled(array):
    return CoarsePixels()(torch.from_numpy(array).movedim(-1, 1)).pool.numpy()


def test_c2i_compares_samples_of_all_classes(tmp_path, reference):
    pipe = tiny_pipeline()
    plan = SamplePlan.of_classes(pipe, 30, seed=1, guidance_scale=2.0)
    npz = tmp_path / "samples.npz"
    report = evaluate_classes(pipe, plan, reference, place(tmp_path), npz=npz)
    with np.load(npz) as arrays:
        samples, labels = arrays["arr_0"], arrays["arr_1"]
    # The numbers, computed again from what was written for other programs.
    real = FeatureStatistics.of(pooled(reference.images.read(0, 40)))
    expected = frechet_distance(FeatureStatistics.of(pooled(samples)), real)
    assert report.metrics["fid"] == pytest.approx(expected, rel=1e-6)
    assert {"sfid", "inception_score", "precision", "recall", "kid"} <= set(report.metrics)
    drawn = pipe(labels.tolist(), seed=1, guidance_scale=2.0)
    np.testing.assert_array_equal(samples, [np.asarray(image) for image in drawn.images])
    assert report.settings["guidance_scale"] == 2.0
    assert report.samples["images"] == 30
    assert report.reference["images"] == 40
    text = " / ".join(report.warnings)
    assert "30 samples instead of the protocol's 50,000" in text
    assert "is a set of images: published numbers are against ADM's statistics" in text
    assert "classifier" not in text
    assert [table.title for table in report.tables] == ["Published"]
    assert len(report.pictures) == 2


def test_metrics_of_another_network_have_other_names(tmp_path, reference):
    pipe = tiny_pipeline()
    plan = SamplePlan.of_classes(pipe, 10)
    report = evaluate_classes(pipe, plan, reference, place(tmp_path, "mine"))
    assert report.metrics
    assert all(name.startswith("classifier_") for name in report.metrics)
    assert "never with a published FID" in " ".join(report.warnings)
    # 10 samples and 12 numbers a feature.
    assert "10 samples for features of 12 numbers" in " ".join(report.warnings)
    (table,) = report.tables
    assert table.title == "Classes"
    assert sum(row[1] for row in table.rows) == 10
    assert 0 <= report.metrics["classifier_accuracy"] <= 1


class OtherClassifier(CoarsePixels):
    """The same in another order, and a class that the model does not have."""

    order = (3, 1, 4, 0, 2)
    class_names = (*(CoarsePixels.class_names[k] for k in order), "unicorn")

    def __call__(self, images):
        output = super().__call__(images)
        unicorn = torch.full((len(images), 1), 99.0)
        logits = torch.cat([output.logits[:, list(self.order)], unicorn], 1)
        return output._replace(logits=logits)


def test_classes_of_a_classifier_are_found_by_name(tmp_path, reference):
    pipe = tiny_pipeline()
    plan = SamplePlan.of_classes(pipe, 20)
    expected = evaluate_classes(pipe, plan, reference, place(tmp_path, "mine"))
    assert len({row[3] for row in expected.tables[0].rows}) > 1
    device = torch.device("cpu")
    where = Workplace(out=tmp_path / "other", network=OtherClassifier("mine"), device=device)
    report = evaluate_classes(pipe, plan, reference, where)
    assert report.tables[0].rows == expected.tables[0].rows
    where.network.class_names = ("unicorn", *OtherClassifier.class_names[1:])
    report = evaluate_classes(pipe, plan, reference, where)
    assert "classifier_accuracy" not in report.metrics
    missing = OtherClassifier.class_names[0]
    assert f"the classifier has no class '{missing}'" in " / ".join(report.warnings)


def test_tokenizer_is_compared_with_its_images(tmp_path):
    images = CollectedImages(write_noise(tmp_path / "real", 20))
    tokenizer = tiny_tokenizer()
    made = Reconstructions(tokenizer, images, tmp_path / "r")
    source = ReferenceSource(tmp_path / "real")
    report = evaluate_tokenizer("tiny", made, source, place(tmp_path))
    pixels = torch.from_numpy(images.read(0, 20)).movedim(-1, 1)
    codes = tokenizer.encode(pixels.float() / 127.5 - 1)
    assert report.metrics["codebook_usage"] == len(codes.unique()) / 64
    expected = frechet_distance(
        *(FeatureStatistics.of(pooled(each.read(0, 20))) for each in (made, images))
    )
    assert report.metrics["rfid"] == pytest.approx(expected, rel=1e-6)
    assert report.metrics["psnr"] < 30
    assert "20 images instead of the protocol's 50,000" in " ".join(report.warnings)
    assert "4.28" not in " ".join(report.warnings)


def test_reconstructions_against_statistics_are_flagged(tmp_path):
    images = CollectedImages(write_noise(tmp_path / "real", 20))
    statistics = FeatureStatistics.of(pooled(noise(30, seed=4)))
    np.savez(tmp_path / "train.npz", mu=statistics.mean, sigma=statistics.covariance)
    made = Reconstructions(tiny_tokenizer(), images, tmp_path / "r", compared_size=8)
    source = ReferenceSource(tmp_path / "train.npz")
    report = evaluate_tokenizer("tiny", made, source, place(tmp_path))
    assert made.size == (8, 8)
    assert "VQ-16 then gets 4.28 instead of its published 2.19" in report.warnings[0]
    assert "precision" not in report.metrics


def test_tokenizer_needs_no_network(tmp_path):
    images = CollectedImages(write_noise(tmp_path / "real", 6))
    made = Reconstructions(tiny_tokenizer(), images, tmp_path / "r")
    report = evaluate_tokenizer(
        "tiny",
        made,
        ReferenceSource(tmp_path / "real"),
        None,
        perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)),
    )
    assert "rfid" not in report.metrics
    assert report.metrics["lpips"] > 0
    assert "enlarged" not in " ".join(report.warnings)
    large = ReferenceSource(tmp_path / "real", size=32)
    made = Reconstructions(tiny_tokenizer(), large.images, tmp_path / "r")
    report = evaluate_tokenizer("tiny", made, large, None)
    assert "images of 16x16 pixels were enlarged to 32x32" in " ".join(report.warnings)
    odd = CollectedImages(tmp_path / "real", size=10)
    with pytest.raises(InputError, match="positive multiples of the tokenizer's downsampling 4"):
        Reconstructions(tiny_tokenizer(), odd, tmp_path)


def test_lpips_is_measured_where_it_was_left_out_before(tmp_path):
    images = CollectedImages(write_noise(tmp_path / "real", 6))
    source, found = ReferenceSource(tmp_path / "real"), []
    for perceptual in (None, lambda a, b: (a - b).abs().mean((1, 2, 3))):
        made = Reconstructions(tiny_tokenizer(), images, tmp_path / "r")
        found.append(evaluate_tokenizer("tiny", made, source, None, perceptual=perceptual).metrics)
    assert "lpips" not in found[0]
    assert found[1]["lpips"] > 0
    assert found[1]["psnr"] == found[0]["psnr"]


def test_folder_compares_two_sets(tmp_path, reference):
    folder = write_noise(tmp_path / "mine", 30, seed=2)
    images = CollectedImages(folder)
    report = evaluate_folder(images, reference, place(tmp_path))
    expected = frechet_distance(
        *(
            FeatureStatistics.of(pooled(each.read(0, len(each))))
            for each in (images, reference.images)
        )
    )
    assert report.metrics["fid"] == pytest.approx(expected, rel=1e-6)
    itself = evaluate_folder(reference.images, reference, place(tmp_path))
    assert itself.metrics["fid"] == pytest.approx(0.0, abs=1e-6)
    assert (itself.metrics["precision"], itself.metrics["recall"]) == (1.0, 1.0)


def test_copies_are_flagged(tmp_path, reference):
    folder = write_noise(tmp_path / "mine", 20, seed=2)
    (folder / "cat" / "copy.png").write_bytes((folder / "cat" / "000.png").read_bytes())
    report = evaluate_folder(CollectedImages(folder), reference, place(tmp_path))
    assert "1 of 21 images are copies of others among them (of number 0)" in report.warnings


def test_another_size_is_flagged(tmp_path, reference):
    images = CollectedImages(write_noise(tmp_path / "mine", 20, side=32))
    report = evaluate_folder(images, reference, place(tmp_path))
    assert "images have 32x32 pixels, the reference 16x16" in report.warnings[0]


def test_rejects_a_reference_of_another_network(tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(7), sigma=np.eye(7))
    images = CollectedImages(write_noise(tmp_path / "mine", 5))
    with pytest.raises(InputError, match=r"features of 7 numbers, but the network gives 12"):
        evaluate_folder(images, ReferenceSource(tmp_path / "r.npz"), place(tmp_path))


class FakeClip:
    fingerprint = "fake"
    name = "made up"

    def encode_images(self, pixels):
        return torch.ones(len(pixels), 2)

    def encode_texts(self, texts):
        return torch.tensor([[1.0, 0.0]] * len(texts))


def test_t2i_has_fid_and_clip_score(tmp_path, reference):
    pipe, out = tiny_text_pipeline(), tmp_path / "out"
    plan = SamplePlan.of_prompts(pipe, [f"a picture of {number}" for number in range(8)])
    report = evaluate_texts(pipe, plan, out, place(tmp_path), reference, FakeClip())
    assert report.metrics["clip_score"] == pytest.approx(100 / np.sqrt(2))
    assert report.metrics["fid"] > 0
    assert "8 captions instead of the protocol's 30,000" in " ".join(report.warnings)
    assert "compared at 16x16, not at 256x256" in " ".join(report.warnings)
    only_clip = evaluate_texts(pipe, plan, out, None, None, FakeClip())
    assert list(only_clip.metrics) == ["clip_score"]
    assert only_clip.warnings == []


def test_likelihood_by_class_adds_up(tmp_path):
    images = CollectedImages(write_noise(tmp_path / "real", 12))
    report = evaluate_likelihood(tiny_pipeline(), images, tmp_path / "out")
    (table,) = report.tables
    counts = np.array([row[1] for row in table.rows])
    bits = np.array([row[2] for row in table.rows])
    assert report.metrics["bits_per_code"] == pytest.approx((counts * bits).sum() / 12, rel=1e-6)
    assert report.pictures[0].title == "Bits by position in the grid"


def test_sweep_finds_the_best_pair(tmp_path, reference):
    pipe = tiny_pipeline()
    plan = SamplePlan.of_classes(pipe, 15, temperature=0.8)
    report = evaluate_sweep(
        pipe, plan, reference, place(tmp_path), guidance_scales=(3.0, 1.0), top_ks=(0, 4)
    )
    curve = next(curve for curve in report.curves if curve.title == "fid")
    assert [[x for x, _ in points] for points in curve.series.values()] == [[1.0, 3.0]] * 2
    values = {
        (k, scale): value
        for k, points in zip((0, 4), curve.series.values(), strict=True)
        for scale, value in points
    }
    assert len(set(values.values())) == 4
    best = min(values, key=values.__getitem__)
    found = (report.metrics["best_top_k"], report.metrics["best_guidance_scale"])
    assert found == best
    assert report.metrics["best_fid"] == values[best]
    assert "measure it again with another seed" in report.warnings[0]
    # One of them alone gives the same number.
    plan = SamplePlan.of_classes(pipe, 15, temperature=0.8, guidance_scale=3.0, top_k=4)
    alone = evaluate_classes(
        pipe,
        plan,
        reference,
        Workplace(out=tmp_path / "alone", network=CoarsePixels("inception made up"), device="cpu"),
    )
    assert alone.metrics["fid"] == pytest.approx(values[4, 3.0])


def test_report_is_written(tmp_path, reference):
    pipe = tiny_pipeline()
    plan = SamplePlan.of_classes(pipe, 10)
    report = evaluate_classes(pipe, plan, reference, place(tmp_path))
    save_report(report, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["metrics"] == report.metrics
    assert found["settings"]["model"] == "tiny"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Published" in page
    assert page.count("data:image/png;base64,") == 2
