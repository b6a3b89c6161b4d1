"""The sheet of the shipped models."""

from PIL import Image

from llamagen.checkpoints.names import shipped_models
from llamagen.pipeline.demo import PER_CLASS, PROMPTS, run_demo


def test_every_shipped_model_is_on_the_sheet(tmp_path):
    said = []
    result = run_demo(tmp_path / "demo", say=said.append)
    assert [line.split(":")[0] for line in said] == shipped_models() == ["cifar10", "emoji"]
    assert result.images == 10 * PER_CLASS + len(PROMPTS)
    with Image.open(result.sheet) as sheet:
        # Wide enough for ten images of 64 pixels, and no wider than a page.
        assert 640 <= sheet.width <= 900
        assert sheet.height > 600
