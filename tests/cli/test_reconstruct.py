import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    """Images of several sizes and kinds, and one that is broken."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, size in {"a.png": (37, 50), "b.jpg": (64, 64), "more/a.png": (20, 31)}.items():
        array = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / name)
    Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / "grey.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


def test_a_folder_of_any_images(run, model_folder, photos, tmp_path):
    out = tmp_path / "out"
    result = run("reconstruct", photos, "--tokenizer", model_folder, "--out", out)
    assert result.status == 0, result.err
    assert "4 images: PSNR" in result.out
    assert "1 files skipped" in result.out
    assert "broken.png" in result.err
    report = json.loads((out / "metrics.json").read_text())
    assert report["images"] == 4
    sizes = {row["reconstruction"]: (row["width"], row["height"]) for row in report["per_image"]}
    # Whole codes of 4x4 pixels.
    assert sizes == {
        "a.png": (48, 36),
        "b.png": (64, 64),
        "grey.png": (40, 40),
        "a-2.png": (28, 20),
    }
    for name, size in sizes.items():
        with Image.open(out / name) as image:
            assert image.size == size
    assert report["psnr"] == pytest.approx(np.mean([row["psnr"] for row in report["per_image"]]))
    assert (out / "sheet.png").is_file()


def test_square_crops(run, model_folder, photos, tmp_path):
    out = tmp_path / "out"
    result = run(
        "reconstruct",
        photos / "a.png",
        photos / "b.jpg",
        "-t",
        model_folder / "tokenizer",
        "--size",
        24,
        "--out",
        out,
    )
    assert result.status == 0, result.err
    rows = json.loads((out / "metrics.json").read_text())["per_image"]
    assert [(row["width"], row["height"]) for row in rows] == [(24, 24)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "30"], "downsampling 4"),
        (["--size", "0"], "downsampling 4"),
        (["--max-side", "0"], "--max-side"),
        (["--tokenizer", "vq-61"], "vq-16"),
    ],
)
def test_bad_settings(fails, model_folder, photos, tmp_path, arguments, message):
    out = tmp_path / "out"
    line = fails("reconstruct", photos, "-t", model_folder, "--out", out, *arguments)
    assert message in line
    assert list(out.rglob("*")) == []


def test_no_images(fails, model_folder, tmp_path):
    arguments = ("-t", model_folder, "--out", tmp_path / "out")
    assert "no images were named" in fails("reconstruct", *arguments)
    assert "missing" in fails("reconstruct", tmp_path / "missing", *arguments)
    (tmp_path / "empty").mkdir()
    assert "empty" in fails("reconstruct", tmp_path / "empty", *arguments)
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "could be read" in fails("reconstruct", tmp_path / "broken.png", *arguments)
