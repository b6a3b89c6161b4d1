"""Crops are the published ones, pixel by pixel."""

from __future__ import annotations

import numpy as np
from PIL import Image

from llamagen.data.views import center_crop, corner_crops


def test_center_crop(read_case):
    case = read_case("crops")
    for entry in case.info["center"]:
        cropped = center_crop(Image.fromarray(case.arrays[entry["input"]]), entry["size"])
        np.testing.assert_array_equal(np.asarray(cropped), case.arrays[entry["center"]])


def test_ten_crop(read_case):
    case = read_case("crops")
    for entry in case.info["ten_crop"]:
        image = Image.fromarray(case.arrays[entry["input"]])
        crops = corner_crops(image, entry["size"], entry["crop_range"], mirrored=True)
        np.testing.assert_array_equal(
            np.stack([np.asarray(crop) for crop in crops]), case.arrays[entry["crops"]]
        )
