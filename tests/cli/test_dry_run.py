"""``--dry-run`` of both stages: what a run would be, and that it runs."""

import collections

import psutil
import pytest

from tests.data.sets import scans, write_parquet
from tests.images import write_digits

SMALL = ["--batch-size", "4", "--gradient-accumulation", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "images")


def report(result):
    """The table that was printed, by its names, and the last line."""
    assert result.status == 0, result
    lines = result.out.strip().splitlines()
    table = dict(line.split("  ", 1) for line in lines[:-1])
    return {name: value.strip() for name, value in table.items()}, lines[-1]


def test_tokenizer_without_data(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, last = report(run("train", "tokenizer", "--recipe", "digits-tokenizer", "--dry-run"))
    assert table["data"] == "none named; two steps on noise"
    assert "2 steps taken" in last
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_with_a_folder_and_a_discriminator(run, digits, tmp_path):
    table, _ = report(
        run(
            *("train", "tokenizer", "--recipe", "digits-tokenizer", "--dry-run", *SMALL),
            *("--data", digits, "--steps", 60, "--adversarial-weight", 0.5),
            *("--validation-fraction", 0.25, "--out", tmp_path / "run"),
        )
    )
    assert table["data"] == "18 images, and 6 for validation"
    assert table["steps"] == "60 of 4 images, 13.3 times through the data"
    assert table["discriminator"].endswith("parameters")
    assert not (tmp_path / "run").exists()


def test_streamed_data(run, own_cache, tmp_path):
    folder = write_parquet(tmp_path / "set", scans(20), files=2)
    write_parquet(folder, scans(24)[20:], split="validation")
    table, _ = report(
        run(
            *("train", "tokenizer", "--recipe", "digits-tokenizer", "--dry-run", *SMALL),
            *("--data", folder, "--streaming", "--validation-split", "validation"),
        )
    )
    assert table["data"] == "streamed, 2 files in 2 parts: image, label, text"


def test_transformer(run, digits):
    table, last = report(
        run(
            *("train", "transformer", "--recipe", "digits-transformer", "--dry-run", *SMALL),
            *("--data", digits),
        )
    )
    assert table["data"].endswith("images, and 1 for validation; two steps on random codes")
    assert "2 steps taken" in last


def test_published_weights_are_not_downloaded(run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    table, _ = report(
        run(
            *("train", "transformer", "--recipe", "folder-transformer", "--dry-run", *SMALL),
            *("--size", 32, "--batch-size", 1),
        )
    )
    assert table["parameters"].startswith("110,888,448")


@pytest.mark.parametrize("name", ["c2i-3B-256", "c2i-XXL-384"])
def test_rejects_mismatched_settings_before_building(fails, monkeypatch, name):
    memory = collections.namedtuple("Memory", "available")(8e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    line = fails("train", "transformer", "--recipe", name, "--dry-run", "--device", "cpu")
    assert "GB on cpu, which has 8.0 GB free" in line


def test_published_text_models_are_not_downloaded(run, tmp_path):
    sizes = "--batch-size 2 --size 64 --dim 32 --layers 1 --heads 2 --hidden-dim 64 --no-compile"
    for recipe in ("t2i-XL-256", "t2i-XL-512"):
        # Stage II goes on from stage I, whose size is then the published one.
        more = sizes.split() if recipe == "t2i-XL-256" else ["--init", "None", *sizes.split()]
        command = ("train", "transformer", "--recipe", recipe, "--dry-run", *more)
        result = run(*command, "--device", "cpu", "--out", tmp_path / "out")
        assert result.status == 0, result.err
        assert "2 steps taken" in result.out
