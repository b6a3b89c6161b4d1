import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from llamagen.data.images import (
    CorruptImageError,
    ImageFolder,
    SkippedFiles,
    find_images,
    open_image,
)
from llamagen.support.errors import InputError
from tests.images import write_digits

RED, WHITE = (255, 0, 0), (255, 255, 255)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def left_red(size=(6, 4), mode="RGB"):
    """Red on the left half, white on the right."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    pixels[:, : size[0] // 2] = RED
    return Image.fromarray(pixels).convert(mode)


class TestFindImages:
    def test_sorted_and_recursive(self, tmp_path):
        names = ["b.PNG", "a/2.jpg", "a/10.jpeg", "c.webp"]
        for name in names:
            save(tmp_path / name, left_red())
        (tmp_path / "notes.txt").write_text("no image")
        save(tmp_path / ".hidden.png", left_red())
        found = find_images(tmp_path)
        assert found == sorted(tmp_path / name for name in names)

    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        save(tmp_path / "elsewhere" / "x.png", left_red())
        root = tmp_path / "root"
        root.mkdir()
        (root / "cat").symlink_to(tmp_path / "elsewhere")
        (root / "loop").symlink_to(root)
        assert find_images(root) == [root / "cat" / "x.png"]

    def test_a_folder_counts_where_it_lies(self, tmp_path, caplog):
        save(tmp_path / "cat" / "x.png", left_red())
        save(tmp_path / "dog" / "y.png", left_red())
        (tmp_path / "ape").symlink_to(tmp_path / "dog")
        (tmp_path / "cat" / "friends").symlink_to(tmp_path / "dog")
        folder = ImageFolder.scan(tmp_path)
        assert [folder.key(i) for i in range(2)] == ["cat/x.png", "dog/y.png"]
        assert folder.class_names == ("cat", "dog")
        assert "2 links to folders that are there already: ape, cat/friends" in caplog.text

    def test_leaves_out_links_that_lead_nowhere(self, tmp_path, caplog):
        save(tmp_path / "cat" / "x.png", left_red())
        (tmp_path / "cat" / "lost.png").symlink_to(tmp_path / "nothing.png")
        (tmp_path / "dog").symlink_to(tmp_path / "nothing")
        (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
        os.mkfifo(tmp_path / "pipe.png")
        assert find_images(tmp_path) == [tmp_path / "cat" / "x.png"]
        assert "4 links that lead nowhere, and the like: cat/lost.png, dog, pipe.png" in caplog.text

    def test_counts_files_of_other_formats(self, tmp_path, caplog, monkeypatch):
        save(tmp_path / "x.png", left_red())
        for name in ("1.HEIC", "2.heic", "notes", ".hidden"):
            (tmp_path / name).touch()
        find_images(tmp_path)
        expected = "3 files of other formats (2 .heic, 1 without suffix): 1.HEIC, 2.heic, notes"
        assert f"left out of {tmp_path}: {expected}" in caplog.messages
        caplog.clear()
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        find_images(tmp_path)
        assert not caplog.records
        (tmp_path / "x.png").unlink()
        with pytest.raises(InputError, match=r"no images in .*found 3 files .*2 \.heic.*another"):
            find_images(tmp_path)

    def test_rejects_missing_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give a folder"):
            find_images(tmp_path / "nowhere")

    def test_rejects_empty_folders(self, tmp_path):
        with pytest.raises(InputError, match="there are no images in"):
            find_images(tmp_path)

    def test_rejects_files(self, tmp_path):
        path = save(tmp_path / "x.png", left_red())
        with pytest.raises(InputError, match="is not a folder"):
            find_images(path)


class TestImageFolder:
    def test_subfolders_are_classes(self, tmp_path):
        for name in ("dog/1.png", "cat/a/1.png", "cat/2.png"):
            save(tmp_path / name, left_red())
        folder = ImageFolder.scan(tmp_path)
        assert folder.class_names == ("cat", "dog")
        assert folder.labels == (0, 0, 1)

    def test_numbers_are_in_numerical_order(self, tmp_path):
        for number in range(11):
            save(tmp_path / str(number) / "x.png", left_red())
        assert ImageFolder.scan(tmp_path).class_names == tuple(map(str, range(11)))

    def test_other_digits_are_letters(self, tmp_path):
        for name in ("10", "9", "\u0663"):
            save(tmp_path / name / "x.png", left_red())
        assert ImageFolder.scan(tmp_path).class_names == ("10", "9", "\u0663")

    def test_names_are_composed(self, tmp_path):
        for name in ("cafe\u0301", "caf\u00e9", "dog"):
            save(tmp_path / name / "x.png", left_red())
        folder = ImageFolder.scan(tmp_path)
        assert (folder.class_names, folder.labels) == (("caf\u00e9", "dog"), (0, 0, 1))

    def test_names_folders_without_images(self, tmp_path, caplog):
        for name in ("cat", "dog"):
            save(tmp_path / name / "x.png", left_red())
        (tmp_path / "empty" / "below").mkdir(parents=True)
        (tmp_path / "phone" / "a").mkdir(parents=True)
        (tmp_path / "phone" / "a" / "x.HEIC").touch()
        assert ImageFolder.scan(tmp_path).class_names == ("cat", "dog")
        text = "without images are no classes: empty (empty), phone (1 .heic)"
        assert f"folders of {tmp_path} {text}" in caplog.messages

    def test_validation_classes_are_found_by_name(self, tmp_path):
        for name in ("1", "3", "Dog"):
            save(tmp_path / name / "x.png", left_red())
        folder = ImageFolder.scan(tmp_path, class_names=("1", "2", "3", "cat", "dog"))
        assert folder.labels == (0, 2, 4)
        assert folder.class_names == ("1", "2", "3", "cat", "dog")

    def test_flat_folder_has_no_classes(self, tmp_path):
        save(tmp_path / "x.png", left_red())
        folder = ImageFolder.scan(tmp_path)
        assert folder.labels is None
        assert folder.class_names == ()

    def test_rejects_images_beside_class_folders(self, tmp_path):
        save(tmp_path / "x.png", left_red())
        save(tmp_path / "cat" / "y.png", left_red())
        with pytest.raises(InputError, match=r"beside them, such as x\.png"):
            ImageFolder.scan(tmp_path)
        assert len(ImageFolder.scan(tmp_path, labelled=False)) == 2

    def test_rejects_unknown_validation_classes(self, tmp_path):
        save(tmp_path / "bird" / "x.png", left_red())
        with pytest.raises(InputError, match="class 'bird' that the training images do not have"):
            ImageFolder.scan(tmp_path, class_names=("cat", "dog"))

    def test_split_depends_on_names_only(self, tmp_path):
        first = ImageFolder.scan(write_digits(tmp_path / "a"))
        second = ImageFolder.scan(write_digits(tmp_path / "b"), labelled=False)
        kept, held_out = first.split(0.25)
        assert (len(kept), len(held_out)) == (18, 6)
        assert not set(kept.paths) & set(held_out.paths)
        assert len(kept.labels) == 18
        again = second.split(0.25)[1]
        assert [p.relative_to(tmp_path / "b") for p in again.paths] == [
            p.relative_to(tmp_path / "a") for p in held_out.paths
        ]

    def test_split_leaves_neither_part_empty(self, tmp_path):
        folder = ImageFolder.scan(write_digits(tmp_path, per_class=1, classes=2))
        assert [len(part) for part in folder.split(0.01)] == [1, 1]
        assert [len(part) for part in folder.split(0.99)] == [1, 1]
        assert [len(part) for part in folder.split(0.0)] == [2, 0]

    def test_thinned_covers_all_classes(self, tmp_path):
        folder = ImageFolder.scan(write_digits(tmp_path))
        assert folder.thinned(3).labels == (0, 1, 2)
        assert len(folder.thinned(1000)) == len(folder)
        assert len(folder.split(0.0)[1].thinned(5)) == 0

    def test_digest_changes_with_the_files(self, tmp_path):
        folder = write_digits(tmp_path / "a")
        before = ImageFolder.scan(folder).digest()
        assert ImageFolder.scan(folder.rename(tmp_path / "moved")).digest() == before
        (tmp_path / "moved" / "0" / "000.png").unlink()
        assert ImageFolder.scan(tmp_path / "moved").digest() != before


class TestOpenImage:
    def test_scales_16_bit_grey(self, tmp_path):
        greys = np.array([[0, 257, 32896], [65535, 128 * 257, 65278]], np.uint16)
        path = save(tmp_path / "x.png", Image.fromarray(greys))
        expected = [[0, 1, 128], [255, 128, 254]]
        np.testing.assert_array_equal(np.asarray(open_image(path))[..., 0], expected)

    def test_rejects_floating_point(self, tmp_path):
        path = save(tmp_path / "x.tiff", Image.fromarray(np.ones((2, 2), np.float32)))
        with pytest.raises(CorruptImageError, match="floating-point"):
            open_image(path)

    @pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
    def test_converts_modes_to_rgb(self, tmp_path, mode):
        suffix = {"CMYK": ".jpg", "YCbCr": ".jpg"}.get(mode, ".png")
        options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
        image = left_red((16, 16), mode)
        path = save(tmp_path / f"x{suffix}", image, **options)
        opened = open_image(path)
        assert opened.mode == "RGB"
        expected = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(np.asarray(opened).astype(int) - expected).max() <= 4

    def test_composites_transparency_over_white(self, tmp_path):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (255, 0, 0, 255))
        opened = open_image(save(tmp_path / "x.png", image))
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]

    def test_transparent_palette(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((1, 0), 1)
        opened = open_image(save(tmp_path / "x.png", image, transparency=0))
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]

    def test_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), color) for color in (RED, WHITE)]
        path = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
        assert open_image(path).getpixel((0, 0)) == RED

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        path = save(tmp_path / "x.png", left_red((6, 4)), exif=exif)
        opened = open_image(path)
        assert opened.size == (4, 6)
        assert opened.getpixel((0, 0)) == RED
        assert opened.getpixel((0, 5)) == WHITE

    def test_ignores_broken_exif(self, tmp_path):
        path = save(tmp_path / "x.jpg", left_red((16, 16)), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
        assert open_image(path).size == (16, 16)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "the file is empty"),
            (b"these are words", "not an image of a known format"),
            (b"\x89PNG\r\n\x1a\n" + bytes(40), "."),
        ],
    )
    def test_rejects_other_content(self, tmp_path, content, reason):
        path = tmp_path / "x.png"
        path.write_bytes(content)
        with pytest.raises(CorruptImageError, match=reason) as caught:
            open_image(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
    def test_rejects_truncated_files(self, tmp_path, suffix, share):
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(buffer, suffix)
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
        with pytest.raises(CorruptImageError):
            open_image(path)

    def test_missing_file_is_not_corrupt(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            open_image(tmp_path / "x.png")

    def test_error_survives_pickling(self, tmp_path):
        error = pickle.loads(pickle.dumps(CorruptImageError(tmp_path / "x.png", "damaged")))
        assert error.reason == "damaged"
        assert str(error).endswith("x.png cannot be read as an image (damaged)")


def test_skipped_files_are_listed_once(tmp_path, caplog):
    path = tmp_path / "skipped.txt"
    errors = [CorruptImageError(tmp_path / name, "damaged") for name in ("a.png", "b.png")]
    skipped = SkippedFiles(path)
    skipped.add([])
    assert not path.exists()
    skipped.add(errors[:1])
    skipped.add(errors)
    later = SkippedFiles(path)
    later.add(errors)
    assert len(skipped) == len(later) == 2
    assert path.read_text().splitlines() == [f"{e.path}\tdamaged" for e in errors]
    assert caplog.text.count("a.png cannot be read") == 1
