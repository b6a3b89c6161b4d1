import numpy as np
import pytest
from PIL import Image

from llamagen.support.errors import InputError
from llamagen.support.pictures import (
    KINDS,
    arrays_to_pil,
    image_bytes,
    image_grid,
    read_metadata,
    save_png,
    stacked,
    titled,
)


def solid(color, size=(8, 6)):
    return Image.new("RGB", size, color)


def test_metadata_round_trip(tmp_path):
    metadata = {"model": "tiny", "class": "müsli", "seed": 3, "guidance_scale": 4.0, "stop": None}
    save_png(solid("red"), tmp_path / "a.png", metadata=metadata)
    assert read_metadata(tmp_path / "a.png") == metadata
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (8, 6)
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_rejects_images_without_metadata(tmp_path):
    save_png(solid("red"), tmp_path / "a.png")
    with pytest.raises(InputError, match="does not say how it was made"):
        read_metadata(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="not a readable image"):
        read_metadata(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "c.png")


def test_grid_has_every_image():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grid = image_grid([solid(color) for color in colors], columns=2, gap=1, scale=2)
    assert grid.size == (2 * (16 + 1) + 1, 2 * (12 + 1) + 1)
    pixels = np.asarray(grid)
    for index, color in enumerate(colors):
        y, x = 1 + index // 2 * 13, 1 + index % 2 * 17
        assert (pixels[y : y + 12, x : x + 16] == color).all()


def test_captions_and_titles_enlarge_sheet():
    plain = image_grid([solid("red", (64, 64))])
    captioned = image_grid([solid("red", (64, 64))], captions=["a caption far too long for it"])
    assert captioned.height > plain.height
    assert titled(plain, "title").height > plain.height
    assert stacked([plain, captioned], gap=3).height == plain.height + captioned.height + 3


def test_rejects_empty_grid():
    with pytest.raises(InputError, match="no images"):
        image_grid([])


def test_arrays_to_images():
    pixels = np.zeros((2, 4, 5, 3), np.uint8)
    pixels[1] = 255
    pictures = arrays_to_pil(pixels)
    assert [picture.size for picture in pictures] == [(5, 4)] * 2
    assert pictures[0].getpixel((0, 0)) == (0, 0, 0)
    assert pictures[1].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", KINDS)
def test_metadata_of_every_kind(suffix, tmp_path):
    metadata = {
        "class": "müsli \udcff",
        "seed": np.int64(3),
        "scale": np.float32(0.5),
        "stop": None,
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(image_bytes(solid("red"), KINDS[suffix], metadata=metadata))
    assert read_metadata(path) == {"class": "müsli \udcff", "seed": 3, "scale": 0.5, "stop": None}
    with Image.open(path) as image:
        assert image.format == KINDS[suffix].upper()
        assert image.size == (8, 6)


def test_metadata_that_jpeg_has_no_room_for(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(image_bytes(solid("red"), "jpeg", metadata={"prompt": "x" * 70_000}))
    with pytest.raises(InputError, match="does not say how it was made"):
        read_metadata(path)


def test_descriptions_of_others_are_no_metadata(tmp_path):
    for text in ("a photo", '{"a": 1}', "[1]", "3"):
        exif = Image.Exif()
        exif[0x010E] = text
        solid("red").save(tmp_path / "a.jpg", exif=exif)
        with pytest.raises(InputError, match="does not say how it was made"):
            read_metadata(tmp_path / "a.jpg")


@pytest.mark.parametrize("columns", [0, -2])
def test_rejects_grids_without_columns(columns):
    with pytest.raises(InputError, match=f"columns is {columns}, expected at least 1"):
        image_grid([solid("red")], columns=columns)
