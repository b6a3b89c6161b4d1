import dataclasses
import errno

import numpy as np
import pytest
import torch

from llamagen.config import TransformerConfig
from llamagen.data.codes import CodeSet, extract_codes, load_or_extract, tokenizer_fingerprint
from llamagen.data.images import ImageFolder, SkippedFiles
from llamagen.data.views import Views
from llamagen.errors import InputError
from llamagen.tokenizer import uint8_to_images
from tests.images import write_digits
from tests.models import tiny_tokenizer

VIEWS = Views(height=16, width=16, kind="flip")


@pytest.fixture
def images(tmp_path):
    return ImageFolder.scan(write_digits(tmp_path / "digits", per_class=4))


@pytest.fixture
def skipped(tmp_path):
    return SkippedFiles(tmp_path / "skipped.txt")


@pytest.fixture
def codes():
    return CodeSet(
        codes=np.zeros((6, 2, 4, 4), np.uint16),
        labels=np.arange(6) % 3,
        class_names=("a", "b", "c"),
        codebook_size=64,
        origin="somewhere",
    )


def test_extraction(images, skipped):
    tokenizer = tiny_tokenizer()
    codes = extract_codes(tokenizer, images, VIEWS, skipped=skipped, batch_size=5)
    assert codes.codes.shape == (12, 2, 4, 4)
    assert codes.codes.dtype == np.uint16
    assert codes.grid == (4, 4)
    assert codes.labels.tolist() == list(images.labels)
    assert codes.class_names == ("0", "1", "2")
    from PIL import Image

    with Image.open(images.paths[7]) as image:
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None]
    alone = tokenizer.encode(uint8_to_images(torch.cat([pixels, pixels.flip(-1)])))
    np.testing.assert_array_equal(codes.codes[7], alone.numpy())


def test_corrupt_files_are_left_out(images, skipped):
    images.paths[1].write_bytes(b"broken")
    codes = extract_codes(tiny_tokenizer(), images, VIEWS, skipped=skipped)
    assert len(codes) == 11
    assert codes.labels.tolist() == [label for i, label in enumerate(images.labels) if i != 1]
    assert len(skipped) == 1
    assert str(images.paths[1]) in skipped.path.read_text()


def test_nothing_but_corrupt_files(images, skipped):
    for path in images.paths:
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 12 image files"):
        extract_codes(tiny_tokenizer(), images, VIEWS, skipped=skipped)


def test_size_that_does_not_fit(images, skipped):
    with pytest.raises(InputError, match="multiples of the tokenizer's downsampling 4"):
        extract_codes(tiny_tokenizer(), images, Views(height=18, width=18), skipped=skipped)


def test_file_round_trip(tmp_path, codes):
    for labels in (codes.labels, None):
        before = dataclasses.replace(codes, labels=labels)
        before.save(tmp_path / "codes.npz")
        after = CodeSet.load(tmp_path / "codes.npz")
        for field in dataclasses.fields(CodeSet):
            np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_file(tmp_path, codes, share):
    path = tmp_path / "codes.npz"
    codes.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match="is damaged"):
        CodeSet.load(path)


def test_failed_save_keeps_the_old_file(tmp_path, codes, monkeypatch):
    path = tmp_path / "codes.npz"
    codes.save(path)

    def full(*_args, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(codes, origin="elsewhere").save(path)
    assert CodeSet.load(path).origin == "somewhere"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 128}, "a tokenizer with 64 codes but the transformer predicts 128"),
        ({"grid": (4, 8)}, "4x4 codes but the transformer has a grid of 4x8"),
        ({"num_classes": 2}, "label 2 .'c'., but the transformer has 2 classes"),
    ],
)
def test_transformers_that_do_not_fit(codes, changes, message):
    values = {"codebook_size": 64, "grid": (4, 4), "num_classes": 3}
    codes.check_fits(TransformerConfig(**values))
    with pytest.raises(InputError, match=message):
        codes.check_fits(TransformerConfig(**{**values, **changes}))


def test_unlabelled_images(codes):
    unlabelled = dataclasses.replace(codes, labels=None)
    config = TransformerConfig(codebook_size=64, grid=(4, 4), num_classes=3)
    with pytest.raises(InputError, match="have no classes"):
        unlabelled.check_fits(config)
    unlabelled.check_fits(dataclasses.replace(config, condition="text"))


def test_fingerprint():
    assert tokenizer_fingerprint(tiny_tokenizer(0)) == tokenizer_fingerprint(tiny_tokenizer(0))
    others = [tiny_tokenizer(1), tiny_tokenizer(0, codebook_l2_norm=False)]
    changed = tiny_tokenizer(0)
    with torch.no_grad():
        changed.decoder.conv_out.bias[0] += 1e-6
    fingerprints = {tokenizer_fingerprint(t) for t in [tiny_tokenizer(0), changed, *others]}
    assert len(fingerprints) == 4


def test_codes_are_reused_only_if_they_are_the_same(tmp_path, images, skipped, monkeypatch):
    path = tmp_path / "codes" / "training.npz"
    made = []
    monkeypatch.setattr(
        "llamagen.data.codes.extract_codes",
        lambda *args, **kwargs: made.append(1) or extract_codes(*args, **kwargs),
    )

    def load(tokenizer=None, views=VIEWS, folder=images):
        load_or_extract(path, tokenizer or tiny_tokenizer(), folder, views, skipped=skipped)
        return len(made)

    assert load() == 1
    assert load() == 1
    assert load(tiny_tokenizer(1)) == 2
    assert load(tiny_tokenizer(1), Views(height=16, width=16)) == 3
    assert load(folder=images.thinned(5)) == 4
    path.write_bytes(b"broken")
    assert load(folder=images.thinned(5)) == 5
