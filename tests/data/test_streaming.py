"""Streamed training data: every image once an epoch, in the same batches however it is shared."""

import dataclasses
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from llamagen.data import SourceConfig
from llamagen.data.streaming import ImageStream, ahead
from llamagen.data.views import Augmentation
from llamagen.support.errors import InputError
from tests.data.sets import scans, write_parquet, write_tars

pytestmark = pytest.mark.usefixtures("own_cache")

PLAIN = Augmentation(height=16, width=16, max_scale=1.0, flip=False)
CONFIG = SourceConfig(streaming=True, shuffle_buffer=12, stream_parts=4)
IMAGES = 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_parquet(tmp_path_factory.mktemp("stream") / "set", scans(IMAGES), files=5))


def stream(folder, config=CONFIG, *, batch_size=8, seed=0):
    return ImageStream(folder, config, batch_size=batch_size, seed=seed)


def batches(stream, first=0, last=9, augmentation=PLAIN, **arguments):
    return list(stream.training_batches(augmentation, first=first, last=last, **arguments))


def contents(found):
    """Images of batches as bytes."""
    return [image.numpy().tobytes() for batch in found for image in batch.pixels]


def test_reads_every_image_once_an_epoch(folder):
    # 5 files in 4 parts: the parts' epochs differ in length, but each goes through all it has.
    one = SourceConfig(streaming=True, shuffle_buffer=12, stream_parts=1)
    for config, size in ((one, 6), (one, 4)):
        found = contents(batches(stream(folder, config, batch_size=size), last=2 * IMAGES // size))
        counts = Counter(found[:IMAGES])
        assert len(counts) == IMAGES
        assert counts == Counter(found[IMAGES:])
        assert found[:IMAGES] != found[IMAGES:]
    four = stream(folder)
    assert four.parts == 4
    counts = Counter(contents(batches(four, last=40)))
    assert len(counts) == IMAGES
    # Files are dealt anew each epoch, so no image stays behind for long.
    assert min(counts.values()) >= 4


def test_order_depends_on_the_seed_and_crosses_files(folder):
    first, other = (contents(batches(stream(folder, seed=seed))) for seed in (0, 1))
    assert first == contents(batches(stream(folder)))
    assert first != other
    assert first[:8] != sorted(first[:8])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_batches_without_overlap(folder, world_size):
    whole = batches(stream(folder), augmentation=dataclasses.replace(PLAIN, flip=True))
    shares = [
        batches(
            stream(folder),
            augmentation=dataclasses.replace(PLAIN, flip=True),
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert len(whole) == 9
    for step, batch in enumerate(whole):
        joined = torch.cat([share[step].pixels for share in shares])
        assert torch.equal(joined, batch.pixels)


def test_same_batches_with_workers(folder):
    whole = contents(batches(stream(folder)))
    assert len(whole) == 9 * 8
    assert contents(batches(stream(folder), workers=2)) == whole


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_resumes_exactly_with_other_processes(folder, stop):
    whole = contents(batches(stream(folder)))
    state = {}
    for rank in range(2):
        part = stream(folder)
        reading = part.training_batches(PLAIN, first=0, last=9, rank=rank, world_size=2)
        for _ in range(stop):
            next(reading)
        # What was read ahead does not count.
        state |= part.state_dict()
        reading.close()
    again = stream(folder)
    again.load_state_dict(state)
    assert contents(batches(again, first=stop)) == whole[8 * stop :]


def test_rejects_parts_that_cannot_be_shared(folder):
    with pytest.raises(InputError, match="4 parts, which 3 processes cannot share evenly"):
        batches(stream(folder), world_size=3)
    assert stream(folder, batch_size=6).parts == 3
    assert stream(folder, dataclasses.replace(CONFIG, stream_parts=64), batch_size=64).parts == 4


def test_replaces_and_names_damaged_images(tmp_path):
    good = scans(8)
    items = [(c[:50] if i % 3 == 1 else c, label) for i, (c, label) in enumerate(good)]
    folder = str(write_parquet(tmp_path / "set", items))
    found = batches(stream(folder, batch_size=4), last=2)
    assert all(len(batch.pixels) == 4 for batch in found)
    assert sum(len(batch.skipped) for batch in found) == 3
    assert all("file 0 row" in error.key for batch in found for error in batch.skipped)
    nothing = str(write_parquet(tmp_path / "nothing", [(b"x", 0)] * 4))
    with pytest.raises(InputError, match="no image of a batch can be read"):
        batches(stream(nothing, batch_size=4), last=1)


def test_names_samples_of_tars_by_key(tmp_path):
    items = [(b"no image", 0), *scans(7)]
    folder = str(write_tars(tmp_path / "set", items, files=2))
    found = batches(stream(folder, batch_size=4), last=2)
    assert [error.key for batch in found for error in batch.skipped] == ["000000"]


def test_first_images(folder):
    images = list(stream(folder).first_images(IMAGES + 5))
    assert [value["bytes"] for value in images] == [content for content, _ in scans(IMAGES)]


class TestAhead:
    def test_yields_the_same_items(self):
        assert list(ahead(iter(range(20)), 3)) == list(range(20))

    def test_raises_errors_in_order(self):
        def items():
            yield 1
            raise OSError("the network is gone")

        reading = ahead(items(), 2)
        assert next(reading) == 1
        with pytest.raises(OSError, match="network"):
            next(reading)

    def test_ends_its_thread(self):
        reading = ahead(iter(int, 1), 2)
        assert next(reading) == 0
        before = threading.active_count()
        reading.close()
        assert threading.active_count() == before - 1


def test_augmentation_differs_from_epoch_to_epoch(tmp_path):
    folder = str(write_parquet(tmp_path / "set", scans(1)))
    augmentation = Augmentation(height=8, width=8, max_scale=2.0, flip=False)
    found = contents(batches(stream(folder, batch_size=1), last=6, augmentation=augmentation))
    assert len({np.frombuffer(x, np.uint8).tobytes() for x in found}) > 1


def test_content_digest_changes_with_the_files(tmp_path):
    folder = write_tars(tmp_path / "set", scans(8), files=2)
    first = stream(str(folder)).content_digest()
    assert stream(str(folder / "train-*.tar")).content_digest() == first
    path = folder / "train-0001.tar"
    path.write_bytes(path.read_bytes().replace(b"a zero", b"a cero").replace(b"a one", b"a uno"))
    assert stream(str(folder)).content_digest() != first
