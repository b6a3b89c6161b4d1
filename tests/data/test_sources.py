"""Images by the name of their source: tables, Parquet, tars, the hub."""

import csv
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from llamagen.data import SourceConfig, open_images
from llamagen.data.captions import Caption
from llamagen.data.columns import classes_of
from llamagen.data.datasets_library import Table
from llamagen.data.images import CorruptImageError, ImageFolder
from llamagen.support.errors import InputError
from tests.data.sets import NAMES, as_dataset, scans, write_parquet, write_tars
from tests.images import write_digits

pytestmark = pytest.mark.usefixtures("own_cache")


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def same_images(collection, items):
    return len(collection) == len(items) and all(
        np.array_equal(np.asarray(collection.read(i)), pixels(content))
        for i, (content, _) in enumerate(items)
    )


class TestLabels:
    def test_integers_are_labels(self):
        assert classes_of([2, 0, 2], "here") == ((2, 0, 2), ("0", "1", "2"))
        assert classes_of(["2", "0"], "here") == ((2, 0), ("0", "1", "2"))

    def test_years_and_other_numbers_are_names(self):
        assert classes_of(["2020", "2019"], "here") == ((1, 0), ("2019", "2020"))
        assert classes_of([1, 2, 10], "here") == ((0, 1, 2), ("1", "2", "10"))
        assert classes_of(["01", "12", "1"], "here") == ((0, 2, 1), ("01", "1", "12"))
        assert classes_of([1.0, 0.0], "here") == ((1, 0), ("0", "1"))
        assert classes_of(["\u0663", "3"], "here") == ((1, 0), ("3", "\u0663"))

    def test_names_are_composed_without_spaces(self):
        values = [" caf\u00e9", "cafe\u0301", "Cat"]
        assert classes_of(values, "here") == ((1, 1, 0), ("Cat", "caf\u00e9"))

    def test_validation_is_matched_by_name(self, caplog):
        trained = ("0", "2", "10")
        assert classes_of([2, 10, 2], "here", class_names=trained) == ((1, 2, 1), trained)
        assert classes_of(["b", "A"], "here", class_names=("a", "b"))[0] == (1, 0)
        # Indices of ClassLabel's own names, in another order than in training.
        assert classes_of([0, 2], "here", typed=("x", "y", "z"))[0] == (0, 2)
        typed = {"typed": ("x", "y", "z"), "class_names": ("z", "x")}
        assert classes_of([0, 2], "here", **typed) == ((1, 0), ("z", "x"))
        assert not caplog.records
        assert classes_of([2, 0], "here", class_names=("a", "b", "c"))[0] == (2, 0)
        assert "read as indices" in caplog.text

    def test_names_are_sorted(self):
        assert classes_of(["dog", "cat", "dog"], "here") == ((1, 0, 1), ("cat", "dog"))
        assert classes_of(["dog"], "here", class_names=["dog", "ape"]) == ((0,), ("dog", "ape"))

    @pytest.mark.parametrize(
        ("values", "names", "message"),
        [
            ([0, None], None, "row 1 of here has no label"),
            (["a", ""], None, "row 1 of here has no label"),
            ([0, -1], None, "row 1 of here has the label -1"),
            ([0, 3], ("a", "b", "c"), "row 1 of here has the label 3, but the classes are 0 to 2"),
            (["b", "d"], ("a", "b"), "row 1 of here has the class 'd'"),
            ([1, 0], ("1", "2"), "row 1 of here has the class '0'"),
            ([2019, 2021], ("2019", "2020"), "row 1 of here has the class '2021'"),
            ([0, float("nan")], None, "row 1 of here has no label"),
            ([10**9], None, "is it a label at all"),
        ],
    )
    def test_rejects_labels(self, values, names, message):
        with pytest.raises(InputError, match=message):
            classes_of(values, "here", class_names=names)


class TestMetadata:
    def folder(self, tmp_path, kind, rows=None, columns=("file_name", "label", "text")):
        (tmp_path / "sub").mkdir()
        found = []
        for i, (content, label) in enumerate(scans(6)):
            name = f"sub/ümlaut {i}.png" if i % 2 else f"{i}.png"
            (tmp_path / name).write_bytes(content)
            found.append((name, NAMES[label], f'a "{NAMES[label]}",\nhand-written'))
        rows = found if rows is None else rows
        with (tmp_path / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
            if kind == "csv":
                writer = csv.writer(file)
                writer.writerows([columns, *rows])
            else:
                file.writelines(
                    json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows
                )
        return found

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_names_classes_and_captions(self, tmp_path, kind):
        rows = self.folder(tmp_path, kind)
        images = open_images(tmp_path)
        assert images.class_names == tuple(sorted(NAMES))
        assert [images.class_names[label] for label in images.labels] == [row[1] for row in rows]
        assert images.captions == tuple((Caption(row[2], 1.0),) for row in rows)
        assert [images.key(i) for i in range(6)] == [row[0] for row in rows]
        assert same_images(images, scans(6))
        assert open_images(tmp_path / f"metadata.{kind}").digest() == images.digest()

    def test_finds_decomposed_names(self, tmp_path):
        for name in ("cafe\u0301.png", "\u00fc.png"):
            (tmp_path / name).write_bytes(scans(1)[0][0])
        (tmp_path / "metadata.csv").write_text("file_name\ncaf\u00e9.png\nu\u0308.png\n")
        images = open_images(tmp_path)
        assert [images.key(i) for i in range(2)] == ["cafe\u0301.png", "\u00fc.png"]

    def test_ignores_labels_on_request(self, tmp_path):
        self.folder(tmp_path, "csv")
        assert open_images(tmp_path, labelled=False).labels is None

    def test_takes_columns_by_name(self, tmp_path):
        columns = ("picture", "kind", "alt")
        rows = self.folder(tmp_path, "jsonl", columns=columns)
        with pytest.raises(InputError, match=r"no column of file names .*picture, kind, alt"):
            open_images(tmp_path)
        config = SourceConfig(image_column="picture", label_column="kind", caption_columns=("alt",))
        images = open_images(tmp_path, config)
        assert images.captions == tuple((Caption(row[2], 1.0),) for row in rows)
        assert images.class_names == tuple(sorted(NAMES))
        with pytest.raises(InputError, match="has no column 'colour' for the label"):
            open_images(tmp_path, SourceConfig(image_column="picture", label_column="colour"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("lost.png", "row 0 of .* names lost.png, which is not there"),
            ("../lost.png", "outside the table's folder"),
            ("/lost.png", "outside the table's folder"),
            ("", "names no file"),
        ],
    )
    def test_rejects_rows(self, tmp_path, name, message):
        self.folder(tmp_path, "csv", rows=[(name, "zero", "")])
        with pytest.raises(InputError, match=message):
            open_images(tmp_path)

    def test_rejects_damaged_tables(self, tmp_path):
        table = tmp_path / "metadata.jsonl"
        table.write_text('{"file_name": \n')
        with pytest.raises(InputError, match=r"cannot be read as \.jsonl"):
            open_images(tmp_path)
        table.write_text("[1]\n")
        with pytest.raises(InputError, match="expected a text or an object"):
            open_images(tmp_path)
        table.write_text("")
        with pytest.raises(InputError, match="has no rows in it"):
            open_images(tmp_path)


class TestLibrary:
    @pytest.mark.parametrize("form", ["folder", "data folder", "file", "pattern", "saved"])
    def test_parquet(self, tmp_path, form):
        items = scans(7)
        folder = tmp_path / "set" / ("data" if form == "data folder" else "")
        files = 1 if form == "file" else 3
        write_parquet(folder, items, files=files)
        source = tmp_path / "set"
        if form == "file":
            source = folder / "train-00000-of-00001.parquet"
        elif form == "pattern":
            source = folder / "train-*.parquet"
        elif form == "saved":
            source = tmp_path / "saved"
            as_dataset(items).save_to_disk(source)
        images = open_images(source)
        assert same_images(images, items)
        assert images.labels == tuple(label for _, label in items)
        assert images.class_names == tuple(NAMES)
        assert images.captions == tuple((Caption(f"a {NAMES[label]}", 1.0),) for _, label in items)

    def test_classes_of_another_order(self, tmp_path):
        images = open_images(
            write_parquet(tmp_path / "set", scans(7)), class_names=("two", "one", "zero")
        )
        assert images.labels == tuple(2 - label for _, label in scans(7))
        with pytest.raises(InputError, match="has the class 'one', which the training images"):
            open_images(tmp_path / "set", class_names=("two", "zero"))

    def test_tars(self, tmp_path):
        items = scans(7)
        images = open_images(write_tars(tmp_path / "set", items))
        assert same_images(images, items)
        assert images.labels == tuple(label for _, label in items)
        assert images.class_names == ("0", "1", "2")
        assert images.captions == tuple((Caption(f"a {NAMES[label]}", 1.0),) for _, label in items)

    def test_splits(self, tmp_path):
        items = scans(9)
        folder = write_parquet(tmp_path / "set", items[:6])
        write_parquet(folder, items[6:], split="validation")
        assert same_images(open_images(folder), items[:6])
        assert same_images(open_images(folder, split="validation"), items[6:])
        assert same_images(open_images(folder, SourceConfig(split="train[2:4]")), items[2:4])
        with pytest.raises(InputError, match=r"cannot be read as a data set .*test"):
            open_images(folder, split="test")

    def test_splits_and_pickles(self, tmp_path):
        items = scans(20)
        images = open_images(write_parquet(tmp_path / "set", items))
        rest, held_out = images.split(0.25)
        assert len(held_out) == 5
        keys = {rest.key(i) for i in range(15)} | {held_out.key(i) for i in range(5)}
        assert len(keys) == 20
        for i in range(len(held_out)):
            row = int(held_out.key(i))
            assert np.array_equal(np.asarray(held_out.read(i)), pixels(items[row][0]))
            assert held_out.labels[i] == items[row][1]
        sent = pickle.loads(pickle.dumps(rest))
        assert np.array_equal(np.asarray(sent.read(3)), np.asarray(rest.read(3)))

    def test_digest_changes_with_the_images_only(self, tmp_path):
        items = scans(8)
        first = open_images(write_parquet(tmp_path / "a", items)).digest()
        assert open_images(write_parquet(tmp_path / "b", items, files=3)).digest() == first
        assert open_images(write_parquet(tmp_path / "c", items[:7])).digest() != first
        assert open_images(write_parquet(tmp_path / "d", scans(9)[1:])).digest() != first

    def test_content_digest_changes_with_the_pixels_only(self, tmp_path):
        items = [*scans(8), (None, 0)]
        first = open_images(write_parquet(tmp_path / "a", items))
        packed = open_images(write_parquet(tmp_path / "b", items, files=3))
        assert packed.content_digest() == first.content_digest()
        items[3] = (items[3][0][:-1] + b"x", items[3][1])
        other = open_images(write_parquet(tmp_path / "d", items))
        # The names and sizes that the other digest is of are the same.
        assert other.digest() == first.digest()
        assert other.content_digest() != first.content_digest()

    def test_names_damaged_and_missing_images(self, tmp_path):
        good = scans(3)
        items = [good[0], (good[1][0][:60], 1), (None, 2), (b"", 0)]
        images = open_images(write_parquet(tmp_path / "set", items))
        assert images.read(0).size == (16, 16)
        for row, reason in ((1, "truncated|damaged|broken|known format"), (2, "no image")):
            with pytest.raises(CorruptImageError, match=rf"row {row} cannot be read.*({reason})"):
                images.read(row)
        with pytest.raises(CorruptImageError, match="row 3"):
            images.read(3)

    def test_reads_images_by_path(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        path = tmp_path / "a.png"
        path.write_bytes(scans(1)[0][0])
        table = datasets.Dataset.from_dict(
            {"image": [str(path)]}, features=datasets.Features({"image": datasets.Image()})
        )
        images = Table(table, "here")
        assert images.read(0).size == (16, 16)
        assert images.digest() != ""
        before = images.content_digest()
        path.write_bytes(scans(2)[1][0])
        assert images.content_digest() != before

    def test_rejects_missing_columns(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"number": [1, 2]})
        with pytest.raises(InputError, match=r"no column of images \(it has number\)"):
            Table(table, "here")

    def test_rejects_other_sources(self, tmp_path):
        (tmp_path / "notes.txt").write_text("no images")
        with pytest.raises(InputError, match="is no source of images"):
            open_images(tmp_path / "notes.txt")
        with pytest.raises(FileNotFoundError, match=r"lost\.parquet does not exist"):
            open_images(tmp_path / "lost.parquet")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_images(tmp_path / "lost")
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "train.parquet").write_bytes(b"not parquet")
        with pytest.raises(InputError, match="cannot be read as a data set"):
            open_images(tmp_path / "bad")

    def test_opens_folders(self, tmp_path):
        digits = write_digits(tmp_path / "digits", per_class=1)
        assert isinstance(open_images(digits), ImageFolder)

    def test_says_how_to_install_the_library(self, tmp_path, monkeypatch):
        folder = write_parquet(tmp_path / "set", scans(1))
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(InputError, match=r"pip install 'llamagen\[data\]'"):
            open_images(folder)
