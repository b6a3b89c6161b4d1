import numpy as np
import pytest
import torch
from PIL import Image

from llamagen.data.images import ImageFolder
from llamagen.data.loader import DataOrder, image_views, training_batches
from llamagen.data.views import Augmentation, Views, center_crop, corner_crops
from llamagen.support.errors import InputError
from tests.images import write_digits

AUGMENTATION = Augmentation(height=8, width=8, max_scale=1.5, flip=True)


@pytest.fixture
def paths(tmp_path):
    return ImageFolder.scan(write_digits(tmp_path / "digits", per_class=5)).paths


def collection(paths):
    return ImageFolder(paths[0].parents[1], tuple(paths))


def batches(paths, *, first=0, last=6, workers=0, seed=0):
    order = DataOrder(count=len(paths), batch_size=4, seed=seed)
    return list(
        training_batches(
            collection(paths), order, AUGMENTATION, first=first, last=last, workers=workers
        )
    )


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_with_workers(paths, workers):
    paths[3].write_bytes(b"")
    assert_same(batches(paths, workers=workers), batches(paths))


def test_starts_at_any_step(paths):
    assert_same(batches(paths, first=4), batches(paths)[4:])
    assert batches(paths, first=6) == []


def test_leaves_the_global_generator_unchanged(paths):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(paths)
    assert torch.equal(torch.get_rng_state(), before)


def test_augments_each_time(paths):
    first = batches(paths[:1], last=4)
    assert first[0].pixels.dtype == torch.uint8
    assert first[0].pixels.shape == (4, 3, 8, 8)
    views = torch.cat([batch.pixels for batch in first])
    assert len(torch.unique(views, dim=0)) > 4, "the same image looks different each time"


def test_replaces_a_corrupt_file_by_the_next(paths):
    for index in (3, 4, 14):
        paths[index].write_bytes(b"broken")
    damaged = batches(paths, last=8)
    order = DataOrder(count=15, batch_size=4, seed=0)
    stand_in = {3: 5, 4: 5, 14: 0}
    for step, batch in enumerate(damaged):
        wanted = [draw.index for draw in order.batch(step)]
        assert batch.indices.tolist() == [stand_in.get(index, index) for index in wanted]
    named = [error.path for batch in damaged for error in batch.skipped]
    assert sorted(named) == sorted({paths[3], paths[4], paths[14]}), "each is named once"


@pytest.mark.parametrize("workers", [0, 1])
def test_rejects_corrupt_files_only(paths, workers):
    for path in paths:
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 15 images can be read"):
        batches(paths, workers=workers)


def test_views_skip_corrupt_files(paths):
    paths[2].write_bytes(b"broken")
    found = list(
        image_views(collection(paths), Views(height=8, width=8, kind="flip"), batch_size=4)
    )
    assert [i for batch in found for i in batch.indices.tolist()] == [0, 1, *range(3, 15)]
    assert [e.path for batch in found for e in batch.skipped] == [paths[2]]
    pixels = torch.cat([batch.pixels for batch in found])
    assert pixels.shape == (14, 2, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 1].flip(-1))


def test_views_of_a_corrupt_batch_are_empty(paths):
    for path in paths[:4]:
        path.write_bytes(b"broken")
    first, *_ = image_views(collection(paths), Views(height=8, width=8), batch_size=4)
    assert len(first.indices) == 0
    assert len(first.skipped) == 4


@pytest.mark.parametrize("kind", ["center", "flip", "five-crop", "ten-crop"])
def test_number_of_views(kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    views = Views(height=32, width=32, kind=kind)
    assert len(views(image)) == len(views)
    assert {view.size for view in views(image)} == {(32, 32)}


def test_five_crops_are_the_unmirrored_ten():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    five = Views(height=32, width=32, kind="five-crop")(image)
    ten = [crop for r in (1.1, 1.05) for crop in corner_crops(image, 32, r, mirrored=True)[:5]]
    for one, other in zip(five, ten, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_rejects_oblong_ten_crops():
    with pytest.raises(InputError, match="ten-crop views are square"):
        Views(height=32, width=48, kind="ten-crop")


class TestOblongCrops:
    @pytest.mark.parametrize("size", [(100, 30), (30, 100), (7, 9), (64, 64)])
    def test_size(self, size):
        image = Image.new("RGB", size)
        rng = DataOrder(count=1, batch_size=1, seed=0).batch(0)[0]
        numbers = DataOrder(count=1, batch_size=1, seed=0).random(rng)
        augmentation = Augmentation(height=16, width=24, max_scale=1.25, flip=False)
        assert center_crop(image, 16, width=24).size == (24, 16)
        for _ in range(20):
            assert augmentation(image, numbers).size == (24, 16)

    def test_center(self):
        columns = np.tile(np.arange(48, dtype=np.uint8) * 5, (16, 1))
        image = Image.fromarray(np.stack([columns] * 3, -1))
        cropped = np.asarray(center_crop(image, 16, width=24))
        np.testing.assert_array_equal(cropped[..., 0], columns[:, 12:36])


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 2)])
def test_processes_share_every_batch(paths, world_size, workers):
    order = DataOrder(count=len(paths), batch_size=4, seed=0)

    def of(rank, world_size):
        return training_batches(
            collection(paths), order, AUGMENTATION, first=3, last=9, workers=workers,
            rank=rank, world_size=world_size,
        )  # fmt: skip

    whole = list(of(0, 1))
    parts = [list(of(rank, world_size)) for rank in range(world_size)]
    assert len(whole) == 6
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].pixels for part in parts]), batch.pixels)
        assert torch.equal(torch.cat([part[step].indices for part in parts]), batch.indices)
