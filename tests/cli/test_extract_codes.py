import json

import numpy as np
import pytest
from PIL import Image

from llamagen.data.store import CodeStore


@pytest.fixture
def photos(tmp_path):
    """Two classes of images, one of them broken."""
    rng = np.random.default_rng(0)
    for index in range(7):
        path = tmp_path / "photos" / ("cats", "dogs")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "photos"


@pytest.fixture
def extract(run, model_folder, photos, tmp_path):
    """Runs the command with the tiny tokenizer on the images."""

    def run_command(*arguments):
        options = ("-t", model_folder, "--size", 16, "--out", tmp_path / "codes")
        return run("extract-codes", photos, *options, *arguments)

    return run_command


def test_a_folder_of_classes(extract, tmp_path):
    result = extract("--views", "flip", "--shard-size", 4, "--dtype", "float32")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("6 images x 2 views of 4x4 codes in 2 shards, ")
    assert "images/s; " in lines[0]
    assert " of 64 codes used (" in lines[0]
    assert lines[1] == f"1 files could not be read; see {tmp_path / 'codes' / 'skipped.txt'}"
    assert lines[-1] == str(tmp_path / "codes")
    store = CodeStore.open(tmp_path / "codes")
    assert (len(store), store.class_names) == (6, ("cats", "dogs"))
    assert (tmp_path / "codes" / "skipped.txt").read_text().startswith("cats/6.png\t")
    # Again: nothing is left to do.
    again = extract("--views", "flip", "--shard-size", 4, "--dtype", "float32")
    assert again.status == 0
    assert "images/s" not in again.out


def test_defaults_are_the_published_views(extract, tmp_path):
    assert extract("--dtype", "bfloat16").status == 0
    plan = json.loads((tmp_path / "codes" / "manifest.json").read_text())["plan"]
    assert plan["views"] == {
        "kind": "ten-crop",
        "count": 20,
        "height": 16,
        "width": 16,
        "ranges": [1.1, 1.05],
    }
    assert plan["precision"] == "bfloat16"


def test_under_torchrun(extract, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = extract("--views", "center", "--shard-size", 2, "--dtype", "float32")
    assert "3 images done" in first.out
    assert "other processes are still at work" in first.out
    assert sorted(path.name for path in (tmp_path / "codes").glob("*.npy")) == [
        "shard-00001.npy",
        "shard-00003.npy",
    ]
    monkeypatch.setenv("RANK", "0")
    last = extract("--views", "center", "--shard-size", 2, "--dtype", "float32")
    assert "6 images x 1 views" in last.out


@pytest.mark.slow
def test_processes_of_its_own(extract, tmp_path):
    result = extract("--views", "center", "--shard-size", 2, "--processes", 2, "--workers", 1)
    assert result.status == 0, result.err
    assert len(CodeStore.open(tmp_path / "codes")) == 6


def test_published_layout_round_trip(extract, run, model_folder, tmp_path):
    result = extract("--views", "flip", "--export-published", tmp_path / "published")
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1] == str(tmp_path / "published")
    again = run(
        *("extract-codes", "--from-published", tmp_path / "published", "-t", model_folder),
        *("--out", tmp_path / "again"),
    )
    assert again.status == 0, again.err
    stores = [CodeStore.open(tmp_path / name) for name in ("codes", "again")]
    np.testing.assert_array_equal(stores[0].shard(0), stores[1].shard(0))
    # A store that is there can be exported without its images.
    result = run(
        *("extract-codes", "--out", tmp_path / "codes"),
        *("--export-published", tmp_path / "published"),
    )
    assert result.status == 0, result.err
    assert "6 images exported" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "18"], "downsampling 4"),
        (["--size", "0"], "--size is 0"),
        (["--width", "20"], "square"),
        (["--shard-size", "0"], "--shard-size"),
        (["--batch-size", "0"], "--batch-size"),
        (["--processes", "0"], "--processes"),
        (["--workers", "-1"], "--workers"),
        (["--tokenizer", "vq-61"], "vq-16"),
        (["--from-published", "there"], "not both"),
    ],
)
def test_rejects_settings(fails, photos, model_folder, tmp_path, arguments, message):
    out = tmp_path / "codes"
    options = ["-t", model_folder, "--size", 16, "--out", out, *arguments]
    assert message in fails("extract-codes", photos, *options)
    assert not out.exists()


def test_rejects_folders(fails, photos, model_folder, tmp_path):
    options = ("-t", model_folder, "--size", 16)
    out = ("--out", tmp_path / "codes")
    assert "no images were named" in fails("extract-codes", *options, *out)
    assert "does not exist" in fails("extract-codes", tmp_path / "missing", *options, *out)
    line = fails("extract-codes", photos, *options, "--out", photos)
    assert "holds no store of codes" in line
    missing = ("--from-published", tmp_path / "missing")
    assert "published codes" in fails("extract-codes", *missing, *options, *out)
    line = fails("extract-codes", *out, "--export-published", tmp_path / "published")
    assert "there is no store of codes" in line


def test_another_plan_needs_overwrite(extract, tmp_path):
    assert extract("--views", "center").status == 0
    refused = extract("--views", "flip")
    assert refused.status == 2
    assert "other views" in refused.err
    assert "--overwrite" in refused.err
    assert extract("--views", "flip", "--overwrite").status == 0
    assert CodeStore.open(tmp_path / "codes").views == 2


@pytest.mark.parametrize(
    "arguments", [["--processes", "2"], ["--from-published", "a"], ["--export-published", "a"]]
)
def test_rejects_options_under_torchrun(fails, photos, monkeypatch, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    images = [] if "--from-published" in arguments else [photos]
    assert "torchrun" in fails("extract-codes", *images, *arguments)
