"""Extraction of codes: the same store whatever interrupts it and however many processes make it."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import llamagen.support.storage as storage
from llamagen.backends.cpu.convolution import accelerate
from llamagen.data import extraction
from llamagen.data.captions import Caption
from llamagen.data.extraction import extract_store, run_children
from llamagen.data.images import ImageFolder, open_image
from llamagen.data.store import CodeStore
from llamagen.data.views import Views
from llamagen.models.tokenizer import uint8_to_images
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SIZE = 16
VIEWS = Views(height=SIZE, width=SIZE)


def image_tree(folder: Path, count: int = 11) -> ImageFolder:
    """Noise of several shapes in three classes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("cat", "dog", "owl")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + index % 5, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return ImageFolder.scan(folder)


def encoded(tokenizer, images: ImageFolder, views: Views) -> np.ndarray:
    """(N, V, rows, columns) codes, view by view."""
    return np.stack(
        [
            np.stack([_codes(tokenizer, view) for view in views(open_image(path))])
            for path in images.paths
        ]
    )


def _codes(tokenizer, view: Image.Image) -> np.ndarray:
    pixels = torch.from_numpy(np.array(view)).movedim(-1, 0)[None]
    return tokenizer.encode(uint8_to_images(pixels))[0].numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def images(tmp_path):
    return image_tree(tmp_path / "images")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("kind", ["center", "flip", "five-crop", "ten-crop"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_matches_encoding_one_by_one(tokenizer, images, tmp_path, kind, batch_size):
    views = Views(height=SIZE, width=SIZE, kind=kind)
    done = extract_store(
        tokenizer, images, views, tmp_path / "codes", shard_size=4, batch_size=batch_size
    )
    assert done.images == 11
    assert done.store.manifest.shards == (4, 4, 3)
    expected = encoded(tokenizer, images, views)
    assert done.store.views == expected.shape[1]
    np.testing.assert_array_equal(np.concatenate([done.store.shard(i) for i in range(3)]), expected)


def test_crops_of_one_range(tokenizer, images, tmp_path):
    views = Views(height=SIZE, width=SIZE, kind="ten-crop", crop_ranges=(1.25,))
    done = extract_store(tokenizer, images, views, tmp_path / "codes").store
    assert (done.views, done.manifest.plan.views.ranges) == (10, (1.25,))
    np.testing.assert_array_equal(done.shard(0), encoded(tokenizer, images, views))
    other = dataclasses.replace(views, crop_ranges=(1.1,))
    with pytest.raises(InputError, match="other views"):
        extract_store(tokenizer, images, other, tmp_path / "codes")


@pytest.mark.parametrize("ranges", [(), (0.9,), (1.1, float("nan"))])
def test_rejects_crop_ranges(ranges):
    with pytest.raises(InputError, match="crop_ranges"):
        Views(height=SIZE, width=SIZE, crop_ranges=ranges)


@pytest.mark.slow
def test_compiled_matches_eager(images, tmp_path):
    # Small, and all batches of one size: compiling is what takes the time.
    tokenizer = tiny_tokenizer(channel_multipliers=(1, 2))
    done = extract_store(tokenizer, images, VIEWS, tmp_path / "codes", compiled=True, batch_size=11)
    # Sums in another order: only a tie between two codes may be decided otherwise.
    agreement = np.mean(done.store.shard(0) == encoded(tokenizer, images, VIEWS))
    assert agreement > 0.99
    # The tokenizer that was given is as it was.
    assert tokenizer.encoder._compiled_call_impl is None


def test_encodes_oblong_images(tokenizer, images, tmp_path):
    views = Views(height=16, width=24)
    done = extract_store(tokenizer, images, views, tmp_path / "codes").store
    assert done.grid == (4, 6)
    np.testing.assert_array_equal(done.shard(0), encoded(tokenizer, images, views))


def test_encodes_in_bfloat16(tokenizer, images, tmp_path):
    low = torch.bfloat16
    done = extract_store(tokenizer, images, VIEWS, tmp_path / "a", batch_size=1, dtype=low).store
    assert done.manifest.plan.precision == "bfloat16"
    expected = encoded(accelerate(tiny_tokenizer().to(low)), images, VIEWS)
    np.testing.assert_array_equal(done.shard(0), expected)
    # The given tokenizer is as it was, and is the one that the store knows.
    assert tokenizer.dtype == torch.float32
    done.check_tokenizer(tokenizer.fingerprint())
    with pytest.raises(InputError, match="float32"):
        extract_store(tokenizer.to(low), images, VIEWS, tmp_path / "b")


def test_same_files_with_workers(tokenizer, images, tmp_path):
    for name, workers in {"a": 0, "b": 2}.items():
        extract_store(tokenizer, images, VIEWS, tmp_path / name, workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_leaves_the_tokenizer_unchanged(tokenizer, images, tmp_path):
    tokenizer.train()
    extract_store(tokenizer, images, VIEWS, tmp_path / "codes")
    assert tokenizer.training
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())


def test_keeps_finished_shards(tokenizer, images, tmp_path, monkeypatch):
    out = tmp_path / "codes"
    extract_store(tokenizer, images, VIEWS, out, shard_size=4)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    monkeypatch.setattr(extraction, "_encode", lambda *_: pytest.fail("encoded again"))
    again = extract_store(tokenizer, images, VIEWS, out, shard_size=4)
    assert again.images == 0
    assert len(again.store) == 11
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")} == before


def test_remakes_only_damaged_shards(tokenizer, images, tmp_path):
    out = tmp_path / "codes"
    extract_store(tokenizer, images, VIEWS, out, shard_size=2)
    before = contents(out)
    (out / "shard-00001.npy").unlink()
    (out / "shard-00002.npy").write_bytes(before["shard-00002.npy"][:-1])
    (out / "shard-00003.json").write_text("{")
    assert extract_store(tokenizer, images, VIEWS, out, shard_size=2).images == 6
    assert contents(out) == before


_CHILD = """
import sys, time
import torch
import llamagen.data.images as images_module
from llamagen.data.extraction import extract_store
from llamagen.data.images import ImageFolder
from llamagen.data.views import Views
from tests.tiny_models import tiny_tokenizer

torch.set_num_threads(1)
read = images_module.open_image
def slowly(path):
    time.sleep(0.01)
    return read(path)
images_module.open_image = slowly
extract_store(
    tiny_tokenizer(), ImageFolder.scan(sys.argv[1]), Views(height=16, width=16), sys.argv[2],
    shard_size=3,
)
"""


def test_resumes_after_sigkill(tokenizer, tmp_path):
    images = image_tree(tmp_path / "images", count=60)
    extract_store(tokenizer, images, VIEWS, tmp_path / "whole", shard_size=3)
    out = tmp_path / "codes"
    seed = time.time_ns()
    chance = random.Random(seed)
    command = [sys.executable, "-c", _CHILD, str(images.root), str(out)]
    child = subprocess.Popen(command, cwd=ROOT)
    wanted = chance.randrange(1, 12)
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.json"))) < wanted:
        assert child.poll() is None, "the child has ended"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.04))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, f"seed {seed}"
    with pytest.raises(InputError, match="not complete"):
        CodeStore.open(out)
    finished = {path.stem: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    done = extract_store(tokenizer, images, VIEWS, out, shard_size=3)
    assert done.images == 60 - 3 * len(finished), f"seed {seed}"
    for stem, moment in finished.items():
        assert (out / f"{stem}.json").stat().st_mtime_ns == moment, f"seed {seed}"
        assert (out / f"{stem}.npy").stat().st_mtime_ns <= moment, f"seed {seed}"
    assert contents(out) == contents(tmp_path / "whole"), f"seed {seed}"


def test_ranks_share_the_shards(tokenizer, images, tmp_path):
    """As torchrun starts them, one after another here."""
    extract_store(tokenizer, images, VIEWS, tmp_path / "one", shard_size=2, batch_size=4)
    out = tmp_path / "three"
    stores = [
        extract_store(
            tokenizer, images, VIEWS, out, shard_size=2, batch_size=4, rank=rank, world_size=3
        )
        for rank in (2, 0, 1)
    ]
    assert [done.images for done in stores] == [3, 4, 4]
    assert [done.store is None for done in stores] == [True, True, False]
    assert contents(out) == contents(tmp_path / "one")


def test_two_processes_match_one(tokenizer, images, tmp_path):
    (images.paths[4]).write_bytes(b"broken")
    options = {"shard_size": 2, "batch_size": 2}
    extract_store(tokenizer, images, VIEWS, tmp_path / "one", **options)
    done = extract_store(tokenizer, images, VIEWS, tmp_path / "two", processes=2, **options)
    assert done.images == 11
    assert len(done.store) == 10
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert multiprocessing.active_children() == []


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _run_out_of_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _work_on():
    time.sleep(60)


def _child(connection, behave):
    try:
        behave()
    except OSError as error:
        connection.send(error)


@pytest.mark.parametrize(
    ("behave", "error", "words"),
    [
        (_die, ChildProcessError, "SIGKILL"),
        pytest.param(_run_out_of_disk, OSError, "No space left", marks=pytest.mark.slow),
    ],
)
def test_failing_process_ends_the_others(monkeypatch, behave, error, words):
    # The processes import this module.
    monkeypatch.syspath_prepend(ROOT)
    start = time.monotonic()
    with pytest.raises(error, match=words):
        list(run_children(_child, [(_work_on,), (behave,)]))
    assert time.monotonic() - start < 50
    assert multiprocessing.active_children() == []


def test_lists_corrupt_images(tokenizer, images, tmp_path, caplog):
    (images.root / "cat" / "0.png").write_bytes(b"")
    (images.root / "dog" / "7.png").write_bytes(images.paths[-1].read_bytes()[:100])
    out = tmp_path / "codes"
    done = extract_store(tokenizer, images, VIEWS, out, shard_size=3).store
    assert (len(done), done.manifest.skipped, done.manifest.shards) == (9, 2, (2, 3, 2, 2))
    assert [file for file, _ in done.skipped()] == ["cat/0.png", "dog/7.png"]
    lines = (out / "skipped.txt").read_text().splitlines()
    assert lines[0] == "cat/0.png\tthe file is empty"
    assert lines[1].startswith("dog/7.png\t")
    assert "0.png cannot be read" in caplog.text
    whole = [i for i, path in enumerate(images.paths) if path.name not in ("0.png", "7.png")]
    assert done.labels.tolist() == [images.labels[i] for i in whole]
    np.testing.assert_array_equal(
        done.rows(np.arange(9)),
        [_codes(tokenizer, VIEWS(open_image(images.paths[i]))[0]) for i in whole],
    )


def test_shard_of_corrupt_images_only(tokenizer, images, tmp_path):
    for path in images.paths[2:4]:
        path.write_bytes(b"")
    done = extract_store(tokenizer, images, VIEWS, tmp_path / "codes", shard_size=2).store
    assert done.manifest.shards == (2, 0, 2, 2, 2, 1)
    assert done.keys([1, 2]) == ["cat/3.png", "dog/1.png"]
    assert done.rows(np.arange(9)).shape == (9, 4, 4)
    for path in images.paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 11 files"):
        extract_store(tokenizer, images, VIEWS, tmp_path / "none")


def other_views(tokenizer, images, out):
    extract_store(tokenizer, images, Views(height=SIZE, width=SIZE, kind="flip"), out)


def other_tokenizer(_, images, out):
    extract_store(tiny_tokenizer(seed=1), images, VIEWS, out)


def other_images(tokenizer, images, out):
    images.paths[0].unlink()
    extract_store(tokenizer, ImageFolder.scan(images.root), VIEWS, out)


def other_content(tokenizer, images, out):
    content = images.paths[0].read_bytes()
    images.paths[0].write_bytes(content[:-1] + b"\xff")
    extract_store(tokenizer, ImageFolder.scan(images.root), VIEWS, out)


def other_captions(tokenizer, images, out):
    images = dataclasses.replace(images, captions=((Caption("a caption", 1.0),),) * len(images))
    extract_store(tokenizer, images, VIEWS, out)


def other_shards(tokenizer, images, out):
    extract_store(tokenizer, images, VIEWS, out, shard_size=5)


def other_precision(tokenizer, images, out):
    extract_store(tokenizer, images, VIEWS, out, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (other_views, r"other views \(views.kind center, now flip; views.count 1, now 2\)"),
        (other_tokenizer, "another image tokenizer"),
        (other_images, "other images"),
        (other_captions, "other images, labels or captions"),
        (other_content, "other content of the images"),
        (other_shards, r"another shard size \(shard_size 4096, now 5\)"),
        (other_precision, r"another precision \(precision float32, now bfloat16\)"),
    ],
)
def test_rejects_other_settings(tokenizer, images, tmp_path, other, words):
    out = tmp_path / "codes"
    extract_store(tokenizer, images, VIEWS, out)
    before = contents(out)
    with pytest.raises(InputError, match=words + ".*overwrite"):
        other(tokenizer, images, out)
    assert contents(out) == before


def test_overwrites_only_the_store(tokenizer, images, tmp_path):
    out = tmp_path / "codes"
    extract_store(tokenizer, images, VIEWS, out, shard_size=1)
    (out / "notes.txt").write_text("mine")
    done = extract_store(tokenizer, images, VIEWS, out, shard_size=8, overwrite=True)
    assert done.images == 11
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("shard-*"))) == 4
    # The same plan: nothing is thrown away.
    again = extract_store(tokenizer, images, VIEWS, out, shard_size=8, overwrite=True)
    assert again.images == 0
    with pytest.raises(InputError, match="delete"):
        extract_store(tokenizer, images, VIEWS, out, overwrite=True, rank=0, world_size=2)


def test_rejects_foreign_folders(tokenizer, images, tmp_path):
    with pytest.raises(InputError, match=r"not empty and holds no store of codes \(but cat\)"):
        extract_store(tokenizer, images, VIEWS, images.root, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        extract_store(tokenizer, images, VIEWS, images.paths[0])
    # What a process left behind that was killed before it had written anything.
    out = tmp_path / "codes"
    out.mkdir()
    (out / ".plan.json.123.tmp").write_text("{")
    (out / ".shard-00000.npy.abc.tmp").write_text("half")
    extract_store(tokenizer, images, VIEWS, out)
    assert not (out / ".shard-00000.npy.abc.tmp").exists()


def test_rejects_arguments(tokenizer, images, tmp_path):
    out = tmp_path / "codes"
    for views, options, words in [
        (Views(height=15, width=16), {}, "downsampling 4"),
        (VIEWS, {"shard_size": 0}, "shard_size is 0"),
        (VIEWS, {"batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(InputError, match=words):
            extract_store(tokenizer, images, views, out, **options)
    with pytest.raises(InputError, match="processes is 0"):
        extract_store(tokenizer, images, VIEWS, out, processes=0)
    assert not out.exists()


def test_keeps_the_batch_size_of_the_first_run(tokenizer, images, tmp_path, monkeypatch):
    """What fits into memory differs from run to run, and with it may the rounding."""
    out = tmp_path / "codes"
    extract_store(tokenizer, images, VIEWS, out, shard_size=4, batch_size=3)
    (out / "shard-00001.json").unlink()
    sizes = []
    views = extraction.image_views

    def watched(*arguments, batch_size, **options):
        sizes.append(batch_size)
        return views(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(extraction, "image_views", watched)
    extract_store(tokenizer, images, VIEWS, out, shard_size=4)
    assert sizes == [3]


@pytest.mark.parametrize("full_at", ["shard-00002.npy", "shard-00002.json", "manifest.json"])
def test_resumes_after_a_full_disk(tokenizer, images, tmp_path, monkeypatch, full_at):
    extract_store(tokenizer, images, VIEWS, tmp_path / "whole", shard_size=2)
    out = tmp_path / "codes"

    def finish(path):
        if full_at in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_finish", finish)
        with pytest.raises(OSError, match="No space left") as raised:
            extract_store(tokenizer, images, VIEWS, out, shard_size=2)
    assert raised.value.errno == errno.ENOSPC
    assert not list(out.glob(".*")), "temporary files would keep the disk full"
    whole = contents(tmp_path / "whole")
    left = contents(out)
    assert "manifest.json" not in left
    assert {name: whole[name] for name in left} == left
    done = extract_store(tokenizer, images, VIEWS, out, shard_size=2)
    assert done.images == (0 if full_at == "manifest.json" else 7)
    assert contents(out) == whole
