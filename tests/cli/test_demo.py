"""The commands that go from nothing to a sheet of images."""

from PIL import Image

from llamagen.checkpoints import shipped_models
from llamagen.pipeline.demo import PER_CLASS, PROMPTS


def test_writes_sheets_and_prints_next_commands(run, tmp_path):
    result = run("demo", "--out", tmp_path / "demo", "--seed", 1)
    assert result.status == 0, result.err
    assert str(tmp_path / "demo" / "sheet.png") in result.out
    assert "llamagen generate --model" in result.out
    assert f"{10 * PER_CLASS + len(PROMPTS)} images" in result.out
    assert shipped_models() == ["cifar10", "emoji"]
    for name in shipped_models():
        assert f"{name}: " in result.out + result.err
    with Image.open(tmp_path / "demo" / "sheet.png") as sheet:
        # Wide enough for ten images of 64 pixels, and no wider than a page.
        assert 640 <= sheet.width <= 900
        assert sheet.height > 600


def test_a_file_is_in_the_way(fails, tmp_path):
    (tmp_path / "demo").write_text("")
    fails("demo", "--out", tmp_path / "demo")
