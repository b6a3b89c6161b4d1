"""``llamagen extract-text``."""

import pytest
from PIL import Image

from llamagen.text.features import TextStore
from tests.tiny_models import tiny_text_encoder


@pytest.fixture
def captioned(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = ["file_name,text,aliases"]
    for number, (text, aliases) in enumerate([("red heart", "love|heart"), ("cat", ""), ("", "")]):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{text},{aliases}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    tiny_text_encoder().save_pretrained(tmp_path / "t5")
    return folder


def test_from_images_and_from_codes(run, captioned, model_folder, tmp_path):
    options = ("--text-encoder", tmp_path / "t5", "--text-length", 30)
    source = ("--caption-columns", "text", "aliases", "--caption-separator", "|")
    result = run("extract-text", captioned, *options, *source, "--out", tmp_path / "a")
    assert result.status == 0, result.err
    assert result.out.startswith("4 different captions of 6.2 tokens each, up to 10, ")
    assert len(TextStore.open(tmp_path / "a").features(["love"])[0]) == 5
    again = run("extract-text", captioned, *options, *source, "--out", tmp_path / "a")
    assert "captions/s" not in again.out
    codes = ("extract-codes", captioned, "-t", model_folder, "--size", 16, "--out", tmp_path / "c")
    assert run(*codes, *source, "--views", "center").status == 0
    result = run("extract-text", tmp_path / "c", *options, "--out", tmp_path / "b")
    assert result.out.startswith("4 different captions")


def test_bad_input(fails, captioned, tmp_path):
    options = ("--text-encoder", tmp_path / "t5", "--out", tmp_path / "out")
    (captioned / "metadata.csv").write_text("file_name\n0.png\n")
    assert "have no captions" in fails("extract-text", captioned, *options)
    assert "--shard-size is 0" in fails("extract-text", captioned, *options, "--shard-size", 0)
    assert "no column 'alt'" in fails(
        "extract-text", captioned, *options, "--caption-columns", "alt"
    )
    assert not (tmp_path / "out").exists()
