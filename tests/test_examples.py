"""The examples run with --quick, and write the files that they name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llamagen.checkpoints import shipped_models
from llamagen.support.pictures import read_metadata
from tests.tiny_models import tiny_pipeline

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {"emoji": (64, 64), "cifar10": (32, 32)}
NOWHERE = "http://127.0.0.1:9"
"""A proxy that does not answer: examples need no network."""


@pytest.fixture
def run(tmp_path):
    """Run an example in an empty folder; return its output and that folder."""
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    proxies = {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **proxies, "TMPDIR": str(temporary)}

    def run_example(name, *flags):
        before = files(EXAMPLES)
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, "--quick", *flags],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        assert files(EXAMPLES) == before
        assert not files(temporary)
        return done.stdout, here

    return run_example


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def size(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def test_readme_lists_examples():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"generate_and_edit.py", "train_on_your_folder.py", "serve_and_call.py"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in readme for name in names)


@pytest.mark.slow
def test_generate_and_edit(run):
    printed, here = run("generate_and_edit.py")
    models = shipped_models()
    out = here / "runs" / "generate-and-edit"
    kinds = ("", "-inpainted", "-outpainted")
    wanted = {f"{model}{kind}.png" for model in models for kind in kinds} | {"sheet.png"}
    assert files(here) == {f"runs/generate-and-edit/{name}" for name in wanted}
    for model in models:
        width, height = SIZES[model]
        assert size(out / f"{model}.png") == size(out / f"{model}-inpainted.png") == SIZES[model]
        assert size(out / f"{model}-outpainted.png") == (width * 3 // 2, height)
        assert read_metadata(out / f"{model}.png")["model"] == model
        assert read_metadata(out / f"{model}-inpainted.png")["edit"]["kind"] == "inpaint"
        assert f"{model}: " in printed
    width, height = size(out / "sheet.png")
    # Ten rows of about 128 pixels for each model, and four images next to one another.
    assert width >= 4 * 128
    assert height >= len(models) * 10 * 128


def test_edits_given_image(run, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    photo = tmp_path / "photo.jpg"
    Image.linear_gradient("L").resize((90, 70)).save(photo)
    more = ("--model", tmp_path / "tiny", "--prompt", "dog", "cat", "crane", "--image", photo)
    _, here = run("generate_and_edit.py", *more)
    out = here / "runs" / "generate-and-edit"
    assert read_metadata(out / "tiny.png")["class"] == "dog"
    # Pixels outside the mask stay.
    with Image.open(out / "tiny-inpainted.png") as image:
        top = image.convert("L").getpixel((8, 0))
        bottom = image.convert("L").getpixel((8, 15))
    assert top < 20
    assert bottom > 235


@pytest.mark.slow
def test_train_on_your_folder(run):
    printed, here = run("train_on_your_folder.py")
    out = here / "runs" / "train-on-your-folder-quick"
    assert {name.split("/")[1] for name in files(here)} == {out.name}
    assert len(files(out / "digits")) == 100
    # Eight images of 32 pixels, twice enlarged, in a row for each digit.
    width, height = size(out / "samples.png")
    assert width >= 8 * 64
    assert height >= 10 * 64
    assert size(out / "0.png") == (32, 32)
    assert read_metadata(out / "0.png")["class"] == "0"
    for run_folder in (out / "tokenizer", out / "transformer"):
        assert (run_folder / "curves.png").is_file()
        lines = (run_folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 4
    assert "images of runs/train-on-your-folder-quick/transformer/pipeline" in printed

    # Run again, it trains nothing.
    weights = out / "transformer" / "pipeline" / "transformer" / "model.safetensors"
    before = weights.read_bytes(), (out / "samples.png").read_bytes()
    again, _ = run("train_on_your_folder.py")
    assert (weights.read_bytes(), (out / "samples.png").read_bytes()) == before
    assert "images of" in again


def test_serve_and_call(run):
    printed, here = run("serve_and_call.py")
    out = here / "runs" / "serve-and-call"
    square = {"image-7.png", "growing-0.png", "growing-1.png", "growing-2.png", "grown.png"}
    square |= {"inpainted-0.png"}
    wanted = square | {"wider.png", "server.log"}
    assert files(here) == {f"runs/serve-and-call/{name}" for name in wanted}
    assert {size(out / name) for name in square} == {(64, 64)}
    assert size(out / "wider.png") == (96, 64)
    about = read_metadata(out / "image-7.png")
    assert (about["prompt"], about["seed"], about["guidance_scale"]) == ("sunflower", 7, 3.0)
    assert printed.endswith("the server has ended\n")
    assert "Traceback" not in (out / "server.log").read_text()


def test_names_log_of_failed_server(tmp_path):
    command = [sys.executable, EXAMPLES / "serve_and_call.py", "--model", "no-such-model"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert "server.log says why" in done.stderr
    log = (tmp_path / "runs" / "serve-and-call" / "server.log").read_text()
    assert "no-such-model" in log
