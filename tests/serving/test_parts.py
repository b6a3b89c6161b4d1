"""Files that expire, and the decoder that many wait for."""

import asyncio

import torch
from PIL import Image

from llamagen.generation.request import UNKNOWN
from llamagen.serving.files import FileStore
from llamagen.serving.models import ImageDecoder


def test_files_expire():
    now = [0.0]
    store = FileStore(lifetime=10, memory=10**6, clock=lambda: now[0])
    first = store.add(b"one", "image/png")
    now[0] = 6
    second = store.add(b"two", "image/png")
    assert store.get(first).content == b"one"
    now[0] = 10
    assert store.get(first) is None
    assert store.get(second).content == b"two"
    now[0] = 17
    assert store.get(second) is None


def test_files_have_a_limit_and_names_that_differ():
    store = FileStore(lifetime=10, memory=100)
    names = [store.add(bytes(40), "image/png") for _ in range(5)]
    assert [store.get(name) is not None for name in names] == [False, False, False, True, True]
    assert len(set(names)) == 5
    large = store.add(bytes(500), "image/png")
    assert store.get(large) is not None
    assert store.get(names[-1]) is None


def test_waiting_images_are_decoded_together():
    sizes = []

    def decode(codes):
        sizes.append(len(codes))
        return [Image.new("RGB", (4, 8), (int(grid[0, 0]), 0, 0)) for grid in codes]

    async def run():
        decoder = ImageDecoder(decode)
        images = await asyncio.gather(*[decoder.decode([k] * 8, (4, 2)) for k in range(20)])
        half = await decoder.decode([7] * 4 + [UNKNOWN] * 4, (4, 2))
        decoder.close()
        return images, half

    images, half = asyncio.run(run())
    assert [image.getpixel((0, 0))[0] for image in images] == list(range(20))
    assert len(sizes) <= 4
    assert half.getpixel((0, 3)) == (7, 0, 0)
    assert half.getpixel((0, 4)) == (128, 128, 128)


def test_cancelled_request_does_not_block_others():
    def decode(codes):
        return [Image.new("RGB", (1, 1)) for _ in codes]

    async def run():
        decoder = ImageDecoder(decode)
        gone = asyncio.create_task(decoder.decode([0], (1, 1)))
        await asyncio.sleep(0)
        gone.cancel()
        image = await asyncio.wait_for(decoder.decode([1], (1, 1)), 5)
        decoder.close()
        return image.size

    assert asyncio.run(run()) == (1, 1)


def test_missing_codes_repeat_the_nearest():
    seen = []

    def decode(codes):
        seen.append(codes.clone())
        return [Image.new("RGB", (2, 3)) for _ in codes]

    async def run():
        decoder = ImageDecoder(decode)
        first = await decoder.decode([1, 2, 3, 4, UNKNOWN, UNKNOWN], (3, 2))
        second = await decoder.decode([UNKNOWN, 2, UNKNOWN, UNKNOWN, 5, UNKNOWN], (3, 2))
        decoder.close()
        return first, second

    rows, anywhere = asyncio.run(run())
    assert torch.equal(seen[0], torch.tensor([[[1, 2], [3, 4], [3, 4]]]))
    assert torch.equal(seen[1], torch.tensor([[[2, 2], [5, 2], [5, 5]]]))
    grey = (128, 128, 128)
    assert [rows.getpixel((1, y)) == grey for y in range(3)] == [False, False, True]
    drawn = [(x, y) for y in range(3) for x in range(2) if anywhere.getpixel((x, y)) != grey]
    assert drawn == [(1, 0), (0, 2)]
