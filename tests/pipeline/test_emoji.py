"""The emoji model that comes with the package, by what it draws."""

import numpy as np
import pytest
from PIL import Image

from llamagen import Pipeline
from llamagen.checkpoints import find_shipped, shipped_models
from llamagen.cli.main import main
from llamagen.support.pictures import read_metadata

COLOURS = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (85, 172, 238),
    "purple": (170, 142, 214),
    "brown": (193, 105, 79),
}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("emoji", device="cpu")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def middle(image: Image.Image) -> np.ndarray:
    """Mean colour of the picture's middle."""
    side = image.width
    return pixels(image)[side * 3 // 8 : side * 5 // 8, side * 3 // 8 : side * 5 // 8].mean((0, 1))


def test_it_is_there_and_small():
    assert "emoji" in shipped_models()
    folder = find_shipped("emoji")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40e6


@pytest.mark.parametrize("shape", ["heart", "circle", "square"])
def test_colours(pipe, shape):
    names = [name for name in COLOURS if name != "yellow" or shape != "heart"]
    prompts = [f"{name} {shape}" for name in names]
    known = np.array([COLOURS[name] for name in names], dtype=float)
    found = [
        int(np.abs(known - middle(image)).sum(-1).argmin())
        for image in pipe(prompts, seed=0).images
    ]
    right = sum(a == b for a, b in enumerate(found))
    assert right >= len(names) - 1, [names[index] for index in found]


def test_skin_tones_get_darker(pipe):
    prompts = [f"waving hand {tone} skin tone" for tone in TONES]
    brightness = [middle(image).mean() for image in pipe(prompts, seed=0).images]
    assert brightness == sorted(brightness, reverse=True)


def test_another_prompt_is_another_picture(pipe):
    a, b, c = (pixels(image) for image in pipe(["llama", "LLama ", "pizza"], seed=[0, 0, 0]).images)
    # In bfloat16 a batch with prompts of other lengths rounds differently.
    assert np.abs(a - b).mean() < 5
    assert np.abs(a - c).mean() > 20


def test_command_in_a_folder_that_has_an_emoji_folder(tmp_path, monkeypatch):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "0.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "emoji", "--prompt", "llama", "--seed", "0", "--out", "a.png"])
    assert not ended.value.code
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64)
    assert read_metadata(tmp_path / "a.png")["prompt"] == "llama"
