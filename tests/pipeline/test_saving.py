"""Folders of images: the same after an interruption and with several processes."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen.pipeline import saving as drawing
from llamagen.pipeline.saving import (
    draw_into_folder,
    find_image,
    image_path,
    plan_images,
    save_image,
)
from llamagen.support.errors import InputError
from llamagen.support.pictures import read_metadata
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline

PROMPTS = [("a red heart", {"id": 4}), ("llama", {"id": 9}), ("x", {})]


@pytest.fixture(scope="module")
def pipe():
    return tiny_text_pipeline()


@pytest.fixture(scope="module")
def planned():
    return plan_images(PROMPTS, images_per_prompt=3, seed=10)


@pytest.fixture(scope="module")
def whole(pipe, planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert draw_into_folder(pipe, planned, folder, batch_size=2) == 9
    return folder


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in folder.glob("*.png")}


def test_writes_images_and_index(whole, pipe):
    lines = [json.loads(line) for line in (whole / "index.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(10, 19))
    assert lines[4] == {"id": 9, "file": "000001-1.png", "prompt": "llama", "seed": 14}
    assert sorted(pictures(whole)) == [line["file"] for line in lines]
    about = read_metadata(whole / "000001-1.png")
    assert (about["prompt"], about["seed"]) == ("llama", 14)
    alone = np.asarray(pipe("llama", seed=14).images[0]).tobytes()
    assert pictures(whole)["000001-1.png"] == alone


def test_resumes(whole, pipe, planned, tmp_path):
    class StopError(Exception):
        pass

    done = []

    def stop(count):
        done.append(count)
        if len(done) == 2:
            raise StopError

    out = tmp_path / "out"
    with pytest.raises(StopError):
        draw_into_folder(pipe, planned, out, batch_size=2, progress=stop)
    (out / "000000-1.png").unlink()
    # Several codes per pass make the same images, so the folder goes on with them.
    assert draw_into_folder(pipe, planned, out, batch_size=2, window=4) == 6
    assert pictures(out) == pictures(whole)
    assert draw_into_folder(pipe, planned, out, batch_size=2) == 0


def test_resumes_older_folder(whole, pipe, planned, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    settings = json.loads((out / "settings.json").read_text())
    del settings["format"], settings["version"], settings["sampling"]["min_p"]
    (out / "settings.json").write_text(json.dumps(settings))
    (out / "000001-1.png").unlink()
    assert draw_into_folder(pipe, planned, out, batch_size=2) == 1
    assert pictures(out) == pictures(whole)


def test_refuses_a_model_that_was_trained_further(whole, planned, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    (folder / "000001-1.png").unlink()
    other = tiny_text_pipeline()
    with torch.no_grad():
        other.transformer.output.weight[0, 0] += 1.0
    with pytest.raises(InputError, match=r"other settings \(weights "):
        draw_into_folder(other, planned, folder)
    with pytest.raises(InputError, match=r"other settings \(weights "):
        draw_into_folder(tiny_text_pipeline(seed=1), planned, folder)


def test_processes_share_images(whole, pipe, planned, tmp_path):
    counts = [
        draw_into_folder(pipe, planned, tmp_path, batch_size=2, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert counts == [4, 3, 2]
    assert pictures(tmp_path) == pictures(whole)


def test_gpu_generates_while_saving(whole, pipe, planned, tmp_path, monkeypatch):
    launches = 0
    second = threading.Event()
    launch, save = drawing._launch, drawing._save

    def launched(*arguments, **settings):
        nonlocal launches
        launches += 1
        if launches == 2:
            second.set()
        return launch(*arguments, **settings)

    def saved(*arguments):
        assert second.wait(60)
        save(*arguments)

    monkeypatch.setattr(drawing, "_batches_behind", lambda device: 1)
    monkeypatch.setattr(drawing, "_launch", launched)
    monkeypatch.setattr(drawing, "_save", saved)
    told = []
    assert draw_into_folder(pipe, planned, tmp_path, batch_size=4, progress=told.append) == 9
    assert told == [4, 4, 1]
    assert pictures(tmp_path) == pictures(whole)


def test_saves_batch_before_failed_one(pipe, planned, tmp_path, monkeypatch):
    launch = drawing._launch

    def failing(pipeline, left, **settings):
        if left[0].seed == 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(pipeline, left, **settings)

    monkeypatch.setattr(drawing, "_batches_behind", lambda device: 1)
    monkeypatch.setattr(drawing, "_launch", failing)
    with pytest.raises(torch.OutOfMemoryError):
        draw_into_folder(pipe, planned, tmp_path, batch_size=4)
    assert len(pictures(tmp_path)) == 4


def test_rejects_bad_prompt_before_generation(pipe, tmp_path):
    planned = plan_images([("llama", {}), ("https://example.com", {})], images_per_prompt=1, seed=0)
    with pytest.raises(InputError, match="empty once it is cleaned"):
        draw_into_folder(pipe, planned, tmp_path / "out", batch_size=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no class"):
        tiny_pipeline().check_prompts(["dog", "unknown"])


def test_refuses_other_folders(whole, pipe, planned, tmp_path):
    with pytest.raises(InputError, match="begun with other settings"):
        draw_into_folder(pipe, planned, whole, top_k=3)
    with pytest.raises(InputError, match="begun with other prompts or seeds"):
        draw_into_folder(pipe, planned[:-1], whole)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="not empty and holds no images"):
        draw_into_folder(pipe, planned, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        draw_into_folder(pipe, planned, tmp_path / "notes.txt")


def test_names_of_images(tmp_path):
    def name(**metadata):
        return image_path(tmp_path, {"seed": 5, **metadata}).name

    assert name(**{"class": "Red fox", "prompt": "x"}) == "red-fox-5.png"
    assert name(prompt="café ☕ / 日本") == "café-日本-5.png"
    assert len(name(prompt="日" * 200).encode()) < 200
    # Of prompts without letters, each has a name of its own.
    signs = ["🔥", "!!", "...", "\udcff", "../.."]
    found = {name(prompt=sign) for sign in signs}
    assert len(found) == len(signs)
    assert all(each.startswith("image-") for each in found)
    assert name(prompt="🔥") == name(prompt="🔥")


def test_no_image_is_overwritten(tmp_path):
    path, colours = tmp_path / "dog-5.png", ("red", "green", "blue")
    images = [Image.new("RGB", (4, 4), colour) for colour in colours]
    saved = [save_image(image, path, {"colour": k}) for k, image in enumerate(images)]
    assert [each.name for each in saved] == ["dog-5.png", "dog-5-2.png", "dog-5-3.png"]
    # The same image is there already.
    assert [save_image(image, path, {"colour": k}) for k, image in enumerate(images)] == saved
    assert [find_image(path, {"colour": k}) for k in range(4)] == [*saved, None]
    assert len(list(tmp_path.iterdir())) == 3


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "dog-5.png").write_bytes(b"notes")
    Image.new("RGB", (4, 4)).save(tmp_path / "dog-5-2.png")
    assert find_image(tmp_path / "dog-5.png", {"seed": 5}) is None
    saved = save_image(Image.new("RGB", (4, 4)), tmp_path / "dog-5.png", {"seed": 5})
    assert saved.name == "dog-5-3.png"
    assert (tmp_path / "dog-5.png").read_bytes() == b"notes"


def test_the_best_of_several_in_a_folder(pipe, tmp_path):
    planned = plan_images(PROMPTS, images_per_prompt=2, seed=10, best_of=3)
    assert [image.seed for image in planned] == [10, 13, 16, 19, 22, 25]
    assert draw_into_folder(pipe, planned, tmp_path, batch_size=4, best_of=3) == 6
    wanted = pipe([text for text, _ in PROMPTS], num_images_per_prompt=2, seed=10, best_of=3)
    assert [read_metadata(tmp_path / image.file) for image in planned] == [*wanted.metadata]
