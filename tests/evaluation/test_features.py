"""Features are computed in pieces, once, and never mixed up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llamagen.evaluation import image_sets
from llamagen.evaluation.features import (
    NetworkOutput,
    ReferenceSource,
    compute_features,
    feature_folder,
    read_statistics,
    write_statistics,
)
from llamagen.evaluation.image_sets import CollectedImages
from llamagen.evaluation.metrics import FeatureStatistics
from llamagen.evaluation.protocols.common import Workplace
from llamagen.support.errors import InputError
from tests.evaluation.sets import CoarsePixels, noise, write_noise


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "PIECE", 4)
    return CollectedImages(write_noise(tmp_path / "images", 10))


def test_pieces_equal_one_pass(images, tmp_path):
    found = compute_features(CoarsePixels(), images, tmp_path / "f")
    pixels = torch.from_numpy(images.read(0, 10)).movedim(-1, 1)
    whole = CoarsePixels()(pixels)
    np.testing.assert_allclose(found.pool, whole.pool.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.spatial, whole.spatial.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.probabilities, whole.probabilities.numpy(), rtol=1e-6)


def test_resumes(images, tmp_path):
    network = CoarsePixels()
    first = compute_features(network, images, tmp_path / "f")
    assert network.seen == 10
    (path,) = (tmp_path / "f").rglob("piece-00002.npz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    again = compute_features(network, images, tmp_path / "f")
    # Of images 8 and 9 only.
    assert network.seen == 12
    np.testing.assert_array_equal(again.pool, first.pool)


def test_other_networks_and_images_have_other_folders(images, tmp_path):
    other = CollectedImages(write_noise(tmp_path / "other", 10, seed=1))
    pairs = [
        (CoarsePixels(), images),
        (CoarsePixels("coarse 2"), images),
        (CoarsePixels(), CollectedImages(tmp_path / "images", size=8)),
    ]
    assert len({feature_folder(tmp_path, *pair) for pair in pairs}) == 3
    # Names and sizes of files say which images they are.
    assert len(other) == len(images)


def test_rejects_nan(images, tmp_path):
    class Broken(CoarsePixels):
        def __call__(self, pixels):
            found = super().__call__(pixels)
            return NetworkOutput(found.pool / 0.0, None, found.logits)

    with pytest.raises(InputError, match=r"NaN or infinity \(pool\) for images 0 to 3 of"):
        compute_features(Broken(), images, tmp_path / "f")
    assert not list((tmp_path / "f").rglob("piece*"))


def test_writes_statistics_for_adm(images, tmp_path):
    found = compute_features(CoarsePixels(), images, tmp_path / "f")
    write_statistics(tmp_path / "s.npz", found, CoarsePixels())
    with np.load(tmp_path / "s.npz") as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(arrays)
        np.testing.assert_allclose(arrays["mu"], found.pool.mean(0), rtol=1e-6)
    pool, spatial, count = read_statistics(tmp_path / "s.npz")
    assert count == 10
    np.testing.assert_allclose(pool.covariance, np.cov(found.pool, rowvar=False), rtol=1e-6)
    assert spatial.width == 4


def test_statistics_name_their_network(images, tmp_path):
    mine, inception = CoarsePixels(), CoarsePixels("inception made up")
    found = compute_features(mine, images, tmp_path / "f")
    write_statistics(tmp_path / "mine.npz", found, mine)
    write_statistics(tmp_path / "inception.npz", found, inception)
    for network, other in ((mine, "inception"), (inception, "mine")):
        place = Workplace(out=tmp_path, network=network, device="cpu")
        own = "mine" if other == "inception" else "inception"
        assert place.reference(ReferenceSource(tmp_path / f"{own}.npz")).count == 10
        with pytest.raises(InputError, match=r"statistics of coarse pixels's features, which can"):
            place.reference(ReferenceSource(tmp_path / f"{other}.npz"))
    # Of files without a name, such as ADM's, everybody takes them for Inception's.
    write_statistics(tmp_path / "adm.npz", found)
    Workplace(out=tmp_path, network=inception, device="cpu").reference(
        ReferenceSource(tmp_path / "adm.npz")
    )
    with pytest.raises(InputError, match="statistics of Inception's features, which cannot"):
        Workplace(out=tmp_path, network=mine, device="cpu").reference(
            ReferenceSource(tmp_path / "adm.npz")
        )


def test_reads_statistics_with_images(images, tmp_path):
    # As ADM's file: statistics of many images, and a few images for precision and recall.
    network = CoarsePixels("inception made up")
    statistics = FeatureStatistics.of(np.random.default_rng(0).normal(size=(50, 12)))
    np.savez(tmp_path / "r.npz", arr_0=noise(6), mu=statistics.mean, sigma=statistics.covariance)
    source = ReferenceSource(tmp_path / "r.npz")
    reference = Workplace(out=tmp_path, network=network, device="cpu").reference(source)
    assert (reference.count, reference.features.pool.shape) == (None, (6, 12))
    np.testing.assert_allclose(reference.pool.mean, statistics.mean)
    assert reference.source.archive is not None
    with pytest.raises(InputError, match="Inception's features, which cannot be compared"):
        Workplace(out=tmp_path, network=CoarsePixels(), device="cpu").reference(source)


def test_rejects_damaged_statistics(tmp_path):
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(tmp_path / "nan.npz", **good | {"mu": np.full(3, np.nan)})
    with pytest.raises(InputError, match="hold NaN or infinity"):
        read_statistics(tmp_path / "nan.npz")
    np.savez(tmp_path / "shape.npz", **good | {"sigma": np.eye(4)})
    with pytest.raises(InputError, match="do not fit; get it again"):
        read_statistics(tmp_path / "shape.npz")
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(InputError, match="no array sigma"):
        read_statistics(tmp_path / "half.npz")
