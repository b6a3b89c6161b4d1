import json
import subprocess
import sys

import pytest

from llamagen.support.pictures import save_png
from tests.tiny_models import tiny_pipeline


def test_lists_presets_and_models(run):
    result = run("info")
    assert result.status == 0, result.err
    for name in ("XXXL", "VQ-8", "c2i-L-384", "t2i-XL-512"):
        assert name in result.out


def test_a_pipeline(run, model_folder):
    out = run("info", model_folder).out
    pipe = tiny_pipeline()
    assert f"{pipe.transformer.parameter_count():,}" in out
    assert f"{pipe.tokenizer.parameter_count():,}" in out
    assert "4 x 4 = 16 codes of 64" in out
    assert "cat, dog" in out
    assert "images: 16 x 16 pixels" in out
    for said in ("on disk", "in float32", "in int8", "KV cache", "guidance_scale 4.0"):
        assert said in out
    assert "ms/code" not in out


def test_a_tokenizer(run, model_folder):
    out = run("info", model_folder / "tokenizer").out
    assert "image tokenizer" in out
    assert "64 x 4" in out


def test_an_image(run, fails, tmp_path):
    output = tiny_pipeline()("dog", seed=3)
    save_png(output.images[0], tmp_path / "a.png", metadata=output.metadata[0])
    assert '"seed": 3' in run("info", tmp_path / "a.png").out
    save_png(output.images[0], tmp_path / "b.png")
    assert "how it was made" in fails("info", tmp_path / "b.png")


def test_unknown_things(fails, tmp_path):
    assert "c2i-B-256" in fails("info", "c2i-B-265")
    assert "missing" in fails("info", tmp_path / "missing")


def test_data(run, model_folder):
    data = json.loads(run("info", model_folder, "--json").out)
    assert data["name"] == "tiny"
    assert [part["kind"] for part in data["parts"]] == ["transformer", "image tokenizer"]
    assert data["grid"] == [4, 4]
    assert "speed" not in data
    known = json.loads(run("info", "--json").out)
    assert "emoji" in known["shipped_models"]
    assert known["transformer_presets"]["B"]["layers"] == 12


def test_measuring(run, model_folder):
    out = run("info", model_folder, "--measure").out
    assert "images/minute" in out
    assert "the 16 codes of an image" in out
    data = json.loads(run("info", model_folder, "--measure", "--json").out)
    assert data["speed"]["estimates"][0]["images"] == 1
    assert data["speed"]["estimates"][0]["seconds_per_image"] > 0


def test_rejects_measuring_other_things_than_models(fails, model_folder, tmp_path):
    assert "goes with a model" in fails("info", "--measure")
    assert "goes with a model" in fails("info", tmp_path / "a.png", "--measure")
    assert "image tokenizer" in fails("info", model_folder / "tokenizer", "--measure")


@pytest.mark.parametrize("name", ["c2i-B-256", "vq-16"])
def test_published_models_are_not_downloaded(run, monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run("info", name)
    assert result.status == 0, result.err
    assert "not here" in result.out


def test_help_does_not_load_torch():
    program = (
        "import sys\n"
        "from llamagen.cli.main import main\n"
        "try:\n"
        "    main(['info', '--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
