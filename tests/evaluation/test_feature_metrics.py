"""Metrics on features: streaming equals all at once, closed forms, blocks change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from llamagen.evaluation import metrics
from llamagen.evaluation.metrics import (
    FeatureStatistics,
    clip_score,
    codebook_use,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)


@pytest.fixture
def features():
    """Far from the origin and of very different scales, where one pass loses digits easily."""
    rng = np.random.default_rng(0)
    return rng.normal(100.0, np.linspace(0.1, 30.0, 40), (5000, 40))


def assert_equal_statistics(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-9)
    scale = np.sqrt(np.outer(b.covariance.diagonal(), b.covariance.diagonal()))
    np.testing.assert_allclose(a.covariance / scale, b.covariance / scale, rtol=0, atol=1e-9)


def test_statistics_equal_numpy(features):
    found = FeatureStatistics.of(features)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-12)
    covariance = np.cov(features, rowvar=False)
    np.testing.assert_allclose(np.diag(found.covariance), np.diag(covariance), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_statistics_do_not_depend_on_order_and_parts(features, seed):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(len(features), 9, replace=False))
    whole = FeatureStatistics(40)
    for part in np.split(features[rng.permutation(len(features))], cuts):
        whole.update(part)
    assert_equal_statistics(whole, FeatureStatistics.of(features))


def test_statistics_of_known_moments(features):
    found = FeatureStatistics.of(features)
    given = FeatureStatistics.from_moments(found.mean, found.covariance, found.count)
    assert_equal_statistics(given, found)


def test_statistics_of_single_precision_are_computed_in_double(features):
    single = features.astype(np.float32)
    assert_equal_statistics(
        FeatureStatistics.of(single), FeatureStatistics.of(single.astype(np.float64))
    )


def test_rejects_bad_features(features):
    with pytest.raises(ValueError, match="NaN or infinity"):
        FeatureStatistics.of(np.where(features > 150, np.nan, features))
    with pytest.raises(ValueError, match="width 3, expected 40"):
        FeatureStatistics(40).update(features[:, :3])
    with pytest.raises(ValueError, match=r"expected \(N, D\)"):
        FeatureStatistics.of(features[0])
    with pytest.raises(ValueError, match="covariance of 1 features"):
        _ = FeatureStatistics.of(features[:1]).covariance
    with pytest.raises(ValueError, match="widths 40 and 2"):
        frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(features[:, :2]))


def test_frechet_distance_in_closed_form():
    # Diagonal covariances: the sum of squared differences of means and of deviations.
    a = FeatureStatistics.from_moments(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 10)
    b = FeatureStatistics.from_moments(np.array([3.0, 1.0]), np.diag([1.0, 0.0]), 10)
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_frechet_distance_to_itself(features):
    # Of fewer rows than columns too.
    for rows in (5000, 10):
        found = FeatureStatistics.of(features[:rows])
        assert frechet_distance(found, found) == pytest.approx(0.0, abs=1e-6)


def test_inception_score_in_closed_form():
    assert inception_score(np.full((10, 4), 0.25)) == pytest.approx(1.0)
    assert inception_score(np.eye(4)) == pytest.approx(4.0)
    # In class order each split has only half of the classes.
    assert inception_score(np.eye(4), split=2) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="split is 0"):
        inception_score(np.eye(4), split=0)


def _precision_recall_of_all_pairs(samples, reference, k):
    def distances(a, b):
        return np.square(a[:, None] - b[None]).sum(-1)

    def inside(a, b):
        radii = np.sort(distances(b, b), axis=1)[:, k]
        return (distances(a, b) <= radii).any(1).mean()

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_precision_recall_does_not_depend_on_blocks(monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    rng = np.random.default_rng(3)
    samples, reference = rng.normal(0.5, 1.0, (90, 6)), rng.normal(0.0, 1.5, (130, 6))
    found = precision_recall(samples, reference, neighbours=2)
    assert found == pytest.approx(_precision_recall_of_all_pairs(samples, reference, 2))
    assert 0 < found.recall < found.precision < 1
    with pytest.raises(ValueError, match="have no 3 neighbours"):
        precision_recall(samples[:3], reference)


def test_nearest():
    rng = np.random.default_rng(0)
    known = rng.normal(50.0, 1.0, (100, 5))
    found = nearest(known[[4, 90]] + 0.001, known, count=2)
    assert found.shape == (2, 2)
    assert found[:, 0].tolist() == [4, 90]


def test_kernel_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (400, 8)), rng.normal(0, 1, (500, 8))
    same = kernel_distance(a, b, subsets=20, subset_size=200)
    other = kernel_distance(a, b + 0.5, subsets=20, subset_size=200)
    assert abs(same[0]) < 0.05 < other[0]
    assert kernel_distance(a, b, subsets=5) == kernel_distance(a, b, subsets=5)
    # One subset of everything: the unbiased estimate, written out.
    x, y = a[:3], b[:3]

    def k(u, v):
        return (u @ v / 8 + 1) ** 3

    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = 2 * sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 6
    expected -= 2 * sum(k(u, v) for u in x for v in y) / 9
    assert kernel_distance(x, y, subsets=1)[0] == pytest.approx(expected)


def test_codebook_use():
    assert codebook_use(np.array([5, 5, 5, 5])) == pytest.approx((1.0, 4.0))
    assert codebook_use(np.array([8, 0, 0, 8])) == pytest.approx((0.5, 2.0))
    with pytest.raises(ValueError, match="no codes"):
        codebook_use(np.zeros(4, int))


def test_clip_score():
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = np.array([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(clip_score(images, texts), [100.0, 0.0, 100 / np.sqrt(2)])
