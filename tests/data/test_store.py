"""Stores of codes: opened without reading them, checked, and kept in the published layout."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import struct

import numpy as np
import pytest

from llamagen.config import TransformerConfig
from llamagen.data.captions import Caption
from llamagen.data.extraction import extract_store
from llamagen.data.published_codes import export_published, import_published
from llamagen.data.store import CodeStore
from llamagen.data.views import Views
from llamagen.support import artifact
from llamagen.support.errors import InputError
from tests.data.test_extraction import SIZE, encoded, image_tree
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """A store of 11 images in two views and three shards."""
    views = Views(height=SIZE, width=SIZE, kind="flip")
    captions = tuple((Caption(f"image {i}", 1.0),) for i in range(len(images)))
    out = tmp_path_factory.mktemp("store") / "codes"
    images = dataclasses.replace(images, captions=captions)
    extract_store(tiny_tokenizer(), images, views, out, shard_size=4)
    return out


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copy")


def fails_to_open(folder, *words, error=InputError):
    with pytest.raises(error) as raised:
        CodeStore.open(folder).labels  # noqa: B018
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_rows_of_any_shard(whole, images):
    store = CodeStore.open(whole)
    expected = encoded(tiny_tokenizer(), images, Views(height=SIZE, width=SIZE, kind="flip"))
    assert (len(store), store.views, store.grid, store.codebook_size) == (11, 2, (4, 4), 64)
    indices, views = np.array([10, 0, 3, 4, 3]), np.array([1, 0, 1, 1, 0])
    rows = store.rows(indices, views)
    assert rows.dtype == np.uint16
    np.testing.assert_array_equal(rows, expected[indices, views])
    np.testing.assert_array_equal(store.rows(np.arange(11)), expected[:, 0])
    assert store.rows(np.array([], dtype=int)).shape == (0, 4, 4)
    assert store.codebook_usage == len(np.unique(expected)) / 64


@pytest.mark.parametrize(("indices", "views"), [([11], 0), ([-1], 0), ([0], 2), ([0], -1)])
def test_rejects_rows_out_of_range(whole, indices, views):
    with pytest.raises(IndexError, match="the store has"):
        CodeStore.open(whole).rows(np.array(indices), views)


def test_labels_captions_and_keys(whole, images):
    store = CodeStore.open(whole)
    assert store.labels.tolist() == list(images.labels)
    assert store.class_names == ("cat", "dog", "owl")
    assert store.captions([9, 0, 5]) == [(Caption(f"image {i}", 1.0),) for i in (9, 0, 5)]
    assert store.keys([10, 4]) == [
        images.paths[i].relative_to(images.root).as_posix() for i in (10, 4)
    ]
    assert store.skipped() == []
    with pytest.raises(IndexError):
        store.keys([11])


def test_takes_the_classes_of_another_store(whole):
    store = CodeStore.open(whole)
    labels, own = store.labels, store.class_names
    names = ("new", *reversed(own))
    store.use_classes(names)
    assert store.class_names == names
    assert [names[label] for label in store.labels] == [own[label] for label in labels]
    store.use_classes(own)
    assert store.labels.tolist() == labels.tolist()
    with pytest.raises(InputError, match="a class 'cat' that the training codes do not have"):
        store.use_classes(own[1:])


def test_numbered_classes_are_indices(images, tmp_path, caplog):
    unnamed = dataclasses.replace(images, class_names=())
    views = Views(height=SIZE, width=SIZE)
    extract_store(tiny_tokenizer(), unnamed, views, tmp_path / "codes")
    store = CodeStore.open(tmp_path / "codes")
    assert store.class_names == ("class 0", "class 1", "class 2")
    labels = store.labels.tolist()
    store.use_classes(("cat", "dog", "owl", "yak"))
    assert store.labels.tolist() == labels
    assert "read as indices" in caplog.text


def test_maps_only_the_shards_it_reads(whole, monkeypatch):
    """Opening reads headers; drawing rows maps the shards that they are in, and no others."""
    loaded = []
    load = np.load

    def watched(path, **options):
        assert options == {"mmap_mode": "r"}
        loaded.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(np, "load", watched)
    store = CodeStore.open(whole)
    assert store.labels is not None
    assert loaded == []
    store.rows(np.array([4, 5]), 1)
    store.rows(np.array([6]))
    assert loaded == ["shard-00001.npy"]
    shard = store.shard(1)
    assert isinstance(shard, np.memmap)
    assert not shard.flags.writeable


def test_pickles_without_content(whole):
    store = CodeStore.open(whole)
    rows = store.rows(np.arange(11))
    content = pickle.dumps(store)
    assert rows[0].tobytes() not in content
    np.testing.assert_array_equal(pickle.loads(content).rows(np.arange(11)), rows)


def test_rejects_missing_and_incomplete_stores(tmp_path, folder):
    fails_to_open(tmp_path / "none", "extract-codes", error=FileNotFoundError)
    (folder / "manifest.json").unlink()
    fails_to_open(folder, "not complete", "again")


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00001.json"])
def test_rejects_missing_files(folder, name):
    (folder / name).unlink()
    fails_to_open(folder, name, "missing", "extract-codes again", error=FileNotFoundError)


@pytest.mark.parametrize("kept", [0, 20, 128, -1])
def test_rejects_truncated_shards(folder, kept):
    path = folder / "shard-00002.npy"
    path.write_bytes(path.read_bytes()[:kept])
    fails_to_open(folder, path.name, "delete it")


def test_rejects_damaged_headers(folder):
    path = folder / "shard-00000.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 8) + b"garbage\n")
    fails_to_open(folder, path.name, "damaged")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 2, 4, 4), np.uint32),
        np.zeros((3, 2, 4, 4), np.uint16),
        np.zeros((4, 2, 4, 5), np.uint16),
        np.zeros((4, 2, 4, 4), np.uint16, order="F"),
    ],
)
def test_rejects_other_arrays(folder, array):
    np.save(folder / "shard-00000.npy", array)
    fails_to_open(folder, "shard-00000.npy", "uint16 (4, 2, 4, 4)", "delete it")


def test_rejects_sidecars_of_other_stores(folder):
    change(folder / "shard-00001.json", plan="0123456789abcdef")
    fails_to_open(folder, "shard-00001.json", "another store")


@pytest.mark.parametrize(
    "values", [{"labels": [0, 1, "a", 2]}, {"keys": 3}, {"skipped": [["one"]]}, {"labels": [0]}]
)
def test_rejects_damaged_sidecars(folder, values):
    change(folder / "shard-00001.json", **values)
    fails_to_open(folder, "shard-00001.json", "delete it")


def test_rejects_other_versions(folder):
    change(folder / "manifest.json", version=1)
    fails_to_open(
        folder, "manifest.json", "version 1", "reads 2", "extract-codes into another folder"
    )


@pytest.mark.parametrize(
    "values", [{"format": "other"}, {"images": 12}, {"shards": [11]}, {"plan": {}}, {"extra": 1}]
)
def test_rejects_damaged_manifests(folder, values):
    change(folder / "manifest.json", **values)
    fails_to_open(folder, "manifest.json")


@pytest.mark.parametrize("label", [3, -1])
def test_rejects_labels_out_of_range(folder, label):
    change(folder / "shard-00001.json", labels=[0, 1, label, 0])
    fails_to_open(folder, "shard-00001.json", str(label), "3 classes (0 to 2)")


def test_checks_the_tokenizer(whole):
    store = CodeStore.open(whole)
    store.check_tokenizer(tiny_tokenizer().fingerprint())
    with pytest.raises(InputError, match=r"another image tokenizer .* extract the codes again"):
        store.check_tokenizer(tiny_tokenizer(seed=1).fingerprint())


def test_checks_the_transformer(whole, images, tmp_path):
    store = CodeStore.open(whole)
    fitting = {"codebook_size": 64, "grid": (4, 4), "num_classes": 3}
    store.check_fits(TransformerConfig(**fitting))
    for change, message in [
        ({"codebook_size": 32}, "64 codes"),
        ({"grid": (4, 5)}, "4x5"),
        ({"num_classes": 2}, r"label 2 \('owl'\).*2 classes"),
    ]:
        with pytest.raises(InputError, match=message):
            store.check_fits(TransformerConfig(**{**fitting, **change}))
    unlabelled = type(images).scan(images.root, labelled=False)
    views = Views(height=SIZE, width=SIZE)
    store = extract_store(tiny_tokenizer(), unlabelled, views, tmp_path / "codes").store
    assert store.labels is None
    assert store.captions([0]) is None
    store.check_fits(TransformerConfig(**fitting, condition="text"))
    with pytest.raises(InputError, match="no classes"):
        store.check_fits(TransformerConfig(**fitting))


def test_stores_codes_beyond_16_bits(images, tmp_path):
    tokenizer = tiny_tokenizer(codebook_size=2**16 + 8, codebook_dim=2)
    views = Views(height=8, width=8)
    store = extract_store(tokenizer, images, views, tmp_path / "codes", batch_size=1).store
    rows = store.rows(np.arange(len(images)))
    assert rows.dtype == np.uint32
    np.testing.assert_array_equal(rows, encoded(tokenizer, images, views)[:, 0])


# The published layout.


def test_published_layout_round_trip(whole, tmp_path):
    store = CodeStore.open(whole)
    assert export_published(store, tmp_path) == 11
    codes, labels = tmp_path / "imagenet16_codes", tmp_path / "imagenet16_labels"
    assert len(list(codes.iterdir())) == len(list(labels.iterdir())) == 11
    array, label = np.load(codes / "7.npy"), np.load(labels / "7.npy")
    assert (array.shape, array.dtype) == ((1, 2, 16), np.int64)
    np.testing.assert_array_equal(array[0, 1].reshape(4, 4), store.rows(np.array([7]), 1)[0])
    assert label.tolist() == [store.labels[7]]
    for root in (tmp_path, codes):
        done = import_published(
            tiny_tokenizer(), root, tmp_path / f"from {root.name}", shard_size=3
        )
        again = done.store
        assert (done.images, len(again.manifest.shards)) == (11, 4)
        assert (again.grid, again.views, again.codebook_size) == ((4, 4), 2, 64)
        # Sorted as numbers: 10 comes last.
        for view in (0, 1):
            everything = np.arange(11)
            np.testing.assert_array_equal(
                again.rows(everything, view), store.rows(everything, view)
            )
        assert again.labels.tolist() == store.labels.tolist()
        assert again.class_names == ("class 0", "class 1", "class 2")
        again.check_tokenizer(tiny_tokenizer().fingerprint())


def test_publishes_a_single_view_without_labels(images, tmp_path):
    unlabelled = type(images).scan(images.root, labelled=False)
    views = Views(height=SIZE, width=SIZE)
    store = extract_store(tiny_tokenizer(), unlabelled, views, tmp_path / "codes").store
    export_published(store, tmp_path, name="mine")
    assert not (tmp_path / "mine_labels").exists()
    assert np.load(tmp_path / "mine_codes" / "0.npy").shape == (1, 16)
    again = import_published(tiny_tokenizer(), tmp_path, tmp_path / "again").store
    assert again.labels is None
    np.testing.assert_array_equal(again.rows(np.arange(11)), store.rows(np.arange(11)))


def test_resumes_export(whole, tmp_path):
    store = CodeStore.open(whole)
    export_published(store, tmp_path)
    kept, lost = (tmp_path / "imagenet16_codes" / f"{i}.npy" for i in (0, 5))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    export_published(store, tmp_path)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before
    np.save(kept, np.zeros((1, 2, 16), np.int64))
    with pytest.raises(InputError, match=r"0\.npy is there with other content"):
        export_published(store, tmp_path)


def test_resumes_import(whole, tmp_path, monkeypatch):
    export_published(CodeStore.open(whole), tmp_path)
    reference = import_published(tiny_tokenizer(), tmp_path, tmp_path / "a", shard_size=4)
    write = artifact.write_npy
    written = []

    def fail_at_the_second(path, array):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, array)

    monkeypatch.setattr(artifact, "write_npy", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        import_published(tiny_tokenizer(), tmp_path, tmp_path / "b", shard_size=4)
    assert import_published(tiny_tokenizer(), tmp_path, tmp_path / "b", shard_size=4).images == 7
    for path in reference.store.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_rejects_published_files(whole, tmp_path):
    export_published(CodeStore.open(whole), tmp_path)
    codes = tmp_path / "imagenet16_codes"

    def imports(tokenizer=None, overwrite=True):
        tokenizer = tokenizer or tiny_tokenizer()
        return import_published(tokenizer, tmp_path, tmp_path / "out", overwrite=overwrite)

    def refuses(words, *, error=InputError, **options):
        with pytest.raises(error, match=words):
            imports(**options)

    refuses(r"\.npy has codes from .* 8 \(0 to 7\)", tokenizer=tiny_tokenizer(codebook_size=8))
    content = np.load(codes / "3.npy")
    for array, words in [
        (content[:, :1], r"3\.npy has 1 views"),
        (content[:, :, :9], r"3\.npy has 2 views of 9 codes"),
        (content[:, :, :7], r"3\.npy has shape \(1, 2, 7\)"),
        (content.astype(np.float32), r"3\.npy holds float32"),
    ]:
        np.save(codes / "3.npy", array)
        refuses(words)
    # A damaged file is skipped, as a damaged image is.
    (codes / "3.npy").write_bytes(b"")
    (codes / "10.npy").write_bytes((codes / "10.npy").read_bytes()[:-8])
    store = imports().store
    assert (len(store), store.manifest.skipped) == (9, 2)
    assert [name for name, _ in store.skipped()] == ["3.npy", "10.npy"]
    # Another list of files: another store.
    (codes / "9.npy").unlink()
    refuses("begun with other images", overwrite=False)
    label = tmp_path / "imagenet16_labels" / "8.npy"
    np.save(label, np.array([-1]))
    refuses(r"8\.npy holds int64 \(1,\)")
    label.write_bytes(b"")
    refuses(r"8\.npy is damaged")
    label.unlink()
    refuses(r"8\.npy does not exist", error=FileNotFoundError)
    (codes / "a.npy").write_bytes(b"")
    refuses("not named by a number")
    (tmp_path / "other_codes").mkdir()
    refuses("imagenet16_codes and other_codes")
    shutil.rmtree(codes)
    refuses("none of the 0")
    (tmp_path / "other_codes").rmdir()
    refuses("no folder", error=FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        import_published(tiny_tokenizer(), tmp_path / "missing", tmp_path / "out")
