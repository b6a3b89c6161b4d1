import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from llamagen.evaluation.metrics import psnr, ssim


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    noise = rng.normal(0, [[[[5]]], [[[20]]], [[[60]]]], a.shape)
    return a, np.clip(a + noise, 0, 255).astype(np.uint8)


def test_psnr_in_closed_form():
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert psnr(black, black + 255)[0] == pytest.approx(0.0)
    assert psnr(black, black + 1)[0] == pytest.approx(20 * np.log10(255))
    assert psnr(black, black)[0] == np.inf


def test_psnr_equals_scikit_image(pairs):
    for a, b, value in zip(*pairs, psnr(*pairs), strict=True):
        assert value == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-12)


@pytest.mark.parametrize("data_range", [255.0, 510.0])
def test_ssim_equals_scikit_image(pairs, data_range):
    for a, b, value in zip(*pairs, ssim(*pairs, data_range=data_range), strict=True):
        expected = structural_similarity(a, b, channel_axis=-1, data_range=data_range)
        assert value == pytest.approx(expected, rel=1e-10)


def test_ssim_of_equal_images_is_one(pairs):
    np.testing.assert_allclose(ssim(pairs[0], pairs[0]), 1.0)


def test_rejects_different_shapes(pairs):
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="cannot be compared"):
            metric(pairs[0], pairs[1][:, :10])
    with pytest.raises(ValueError, match="7x7 window"):
        ssim(pairs[0][:, :5], pairs[1][:, :5])
