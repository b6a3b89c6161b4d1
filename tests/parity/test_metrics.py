"""Metrics on given features agree with the evaluation code that the papers used."""

from __future__ import annotations

import numpy as np
import pytest

from llamagen.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)

PRECISION = 1e-6


@pytest.fixture
def metrics(read_case):
    case = read_case("metrics")
    return case.info, case.arrays


def test_frechet_distance(metrics):
    values, arrays = metrics

    def moments(rows, name):
        # Their mean is added up in the features' own float32, their covariance in float64.
        features = arrays[name][:rows]
        covariance = np.cov(features, rowvar=False)
        return FeatureStatistics.from_moments(features.mean(0), covariance, len(features))

    def distance(rows):
        return frechet_distance(
            moments(rows, "sample_features"), moments(rows, "reference_features")
        )

    assert distance(None) == pytest.approx(values["fid"], rel=PRECISION)
    # 20 rows of 24 numbers: covariances without full rank.
    assert distance(20) == pytest.approx(values["fid_rank_deficient_20"], rel=PRECISION)


def test_frechet_distance_of_double_precision(metrics):
    values, arrays = metrics
    samples, reference = (
        FeatureStatistics.of(arrays[name]) for name in ("sample_features", "reference_features")
    )
    # Further off than the rest by what their mean in float32 loses.
    assert frechet_distance(samples, reference) == pytest.approx(values["fid"], rel=3e-6)


@pytest.mark.parametrize("split", [5000, 250])
def test_inception_score(metrics, split):
    values, arrays = metrics
    score = inception_score(arrays["sample_probabilities"], split=split)
    assert score == pytest.approx(values[f"inception_score_split_{split}"], rel=PRECISION)


def test_precision_recall(metrics):
    values, arrays = metrics
    found = precision_recall(arrays["sample_features"], arrays["reference_features"])
    assert found.precision == pytest.approx(values["precision_k3"], rel=PRECISION)
    assert found.recall == pytest.approx(values["recall_k3"], rel=PRECISION)
