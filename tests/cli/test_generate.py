import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llamagen.support.storage as storage
from llamagen.support.pictures import read_metadata, save_png
from tests.tiny_models import tiny_text_pipeline


@pytest.fixture
def generate(run, model_folder, tmp_path):
    def run_generate(*arguments):
        return run("generate", "--model", model_folder, "--out", tmp_path / "out", *arguments)

    return run_generate


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_images_and_sheet(generate, tmp_path):
    result = generate("--class", "dog", "red fox", "-n", 2, "--seed", 7)
    assert result.status == 0, result.err
    names = ["dog-7.png", "dog-8.png", "red-fox-9.png", "red-fox-10.png", "sheet.png"]
    assert [Path(line).name for line in result.out.splitlines()] == names
    metadata = read_metadata(tmp_path / "out" / "red-fox-9.png")
    assert metadata["model"] == "tiny"
    assert (metadata["class"], metadata["class_index"], metadata["seed"]) == ("red fox", 2, 9)
    assert pixels(tmp_path / "out" / "dog-7.png").shape == (16, 16, 3)


def test_one_image_needs_no_sheet(generate, tmp_path):
    generate("-c", 1, "--seed", 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dog-0.png"]


def test_sheet_alone(run, model_folder, tmp_path):
    out = tmp_path / "new" / "sheet.png"
    run("generate", "--model", model_folder, "-c", "dog", "-n", 4, "--columns", 4, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]
    assert pixels(out).shape[1] > 3 * pixels(out).shape[0]


def test_the_same_image_again(generate, run, model_folder, tmp_path):
    generate("--class", "dog", "-n", 3, "--seed", 5, "--top-k", 9, "--guidance-scale", 1.5)
    wanted = tmp_path / "out" / "dog-6.png"
    result = run("generate", "--model", model_folder, "--like", wanted, "--out", tmp_path / "again")
    assert result.status == 0, result.err
    assert "note:" not in result.err
    assert np.array_equal(pixels(tmp_path / "again" / "dog-6.png"), pixels(wanted))
    assert read_metadata(tmp_path / "again" / "dog-6.png") == read_metadata(wanted)


def test_says_when_the_same_image_may_differ(generate, run, model_folder, tmp_path):
    generate("--class", "dog", "--seed", 5)
    path = tmp_path / "out" / "dog-5.png"
    recorded = {"kernels": "cpu of old", "device": "cuda", "text_encoder_dtype": "float32"}
    with Image.open(path) as image:
        save_png(image, path, metadata={**read_metadata(path), **recorded})
    result = run("generate", "--model", model_folder, "--like", path, "--out", tmp_path / "again")
    assert result.status == 0
    notes = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3
    assert f"{path} was drawn with kernels cpu of old, this with " in notes[0]


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"row_lag": 2}, "made with row_lag, which was removed"),
        ({"quantization": "int4"}, "made with int4, which was removed"),
    ],
)
def test_rejects_images_of_removed_features(
    generate, fails, model_folder, tmp_path, recorded, message
):
    generate("--class", "dog", "--seed", 5)
    path = tmp_path / "out" / "dog-5.png"
    with Image.open(path) as image:
        save_png(image, path, metadata={**read_metadata(path), **recorded})
    line = fails("generate", "--model", model_folder, "--like", path, "--out", tmp_path / "again")
    assert message in line


def test_a_transformer_with_a_tokenizer_named_apart(run, fails, model_folder, tmp_path):
    transformer = model_folder / "transformer"
    line = fails("generate", "--model", transformer, "-c", 1, "--out", tmp_path)
    assert "--tokenizer" in line
    result = run(
        "generate",
        "--model",
        transformer,
        "--tokenizer",
        model_folder / "tokenizer",
        "-c",
        1,
        "--seed",
        3,
        "--out",
        tmp_path / "out",
    )
    assert result.status == 0, result.err
    run("generate", "--model", model_folder, "-c", 1, "--seed", 3, "--out", tmp_path / "whole")
    assert np.array_equal(
        pixels(tmp_path / "out" / "class-1-3.png"), pixels(tmp_path / "whole" / "dog-3.png")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "dgo"], "did you mean 'dog'"),
        (["--class", "12"], "no class 12"),
        ([], "there is nothing to draw"),
        (["--class", "dog", "--top-k", "-1"], "top_k"),
        (["--class", "dog", "--temperature", "-1"], "temperature"),
        (["--class", "dog", "--top-p", "7"], "top_p"),
        (["--class", "dog", "--guidance-scale", "nan"], "guidance_scale"),
        (["--class", "dog", "-n", "0"], "num_images_per_prompt"),
        (["--class", "dog", "--seed", "-4"], "seed"),
        (["--class", "dog", "--row-lag", "2"], "--row-lag was removed"),
        (["--class", "dog", "--row-lag=2"], "--row-lag was removed"),
        (["--class", "dog", "--quantization", "int4"], "int4 was removed"),
        (["--class", "dog", "--quantization=int4"], "int4 was removed"),
        (["--class", "dog", "--like", "missing.png"], "missing.png"),
    ],
)
def test_bad_input(fails, model_folder, tmp_path, arguments, message):
    out = tmp_path / "out"
    assert message in fails("generate", "--model", model_folder, "--out", out, *arguments)
    assert list(tmp_path.rglob("*.png")) == []


def test_no_model_and_unknown_model(fails, tmp_path):
    assert "--model" in fails("generate", "--class", "dog", "--out", tmp_path)
    line = fails("generate", "--model", "c2i-M-384", "--class", "dog", "--out", tmp_path)
    assert "c2i-L-384" in line or "c2i-XL-384" in line


def test_rejects_unwritable_paths(fails, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ("generate", "--model", model_folder, "--class", "dog", "--out")
    assert "is a file" in fails(*arguments, tmp_path / "file")
    assert "cannot write" in fails(*arguments, tmp_path / "file" / "below")


def test_full_disk_leaves_only_complete_images(fails, model_folder, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def full_after_two(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(storage.os, "replace", full_after_two)
    line = fails(
        "generate",
        "--model",
        model_folder,
        "-c",
        "dog",
        "-n",
        4,
        "--seed",
        0,
        "--out",
        tmp_path / "out",
        status=1,
    )
    assert "disk is full" in line
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["dog-0.png", "dog-1.png"]
    assert all(pixels(tmp_path / "out" / name).shape == (16, 16, 3) for name in left)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    tiny_text_pipeline().save_pretrained(folder)
    return folder


class TestPrompts:
    def test_generates_reproducibly(self, run, text_folder, tmp_path):
        model = ("generate", "--model", text_folder, "--dtype", "float32")
        result = run(
            *(*model, "--prompt", "A red heart", "x/y" * 100, "-n", 2, "--seed", 3),
            *("--negative-prompt", "blue", "--out", tmp_path / "out"),
        )
        assert result.status == 0, result.err
        names = [Path(line).name for line in result.out.splitlines()]
        assert names[:2] == ["a-red-heart-3.png", "a-red-heart-4.png"]
        assert len(names) == 5
        wanted = tmp_path / "out" / "a-red-heart-4.png"
        metadata = read_metadata(wanted)
        assert (metadata["prompt"], metadata["negative_prompt"]) == ("A red heart", "blue")
        assert run(*model, "--like", wanted, "--out", tmp_path / "again").status == 0
        assert np.array_equal(pixels(tmp_path / "again" / wanted.name), pixels(wanted))

    def test_bad_input(self, fails, text_folder, model_folder, tmp_path):
        model = ("generate", "--model", text_folder, "--out", tmp_path / "out")
        assert "is empty" in fails(*model, "--prompt", " ")
        assert "not both" in fails(*model, "--prompt", "a", "--class", "b")
        assert "no folder and no hub" in fails(*model, "--prompt", "a", "--text-encoder", "a b")
        assert list(tmp_path.rglob("*.png")) == []

    def test_described(self, run, text_folder):
        assert "120 tokens" not in run("info", text_folder).out
        assert "30 tokens, captions cleaned" in run("info", text_folder).out


class TestPromptsFile:
    def test_generates_and_resumes(self, run, text_folder, tmp_path):
        (tmp_path / "p.tsv").write_text("Prompt\tCategory\nllama\tAnimals\na heart\tAbstract\n")
        command = ("generate", "--model", text_folder, "--prompts-file", tmp_path / "p.tsv")
        command += ("-n", 2, "--dtype", "float32", "--out", tmp_path / "out")
        result = run(*command)
        assert result.status == 0, result.err
        assert result.out.splitlines() == ["4 images drawn of 4", str(tmp_path / "out")]
        lines = (tmp_path / "out" / "index.jsonl").read_text().splitlines()
        assert '"Category": "Abstract"' in lines[2]
        (tmp_path / "out" / "000001-0.png").unlink()
        assert run(*command).out.startswith("1 images drawn of 4")

    def test_bad_input(self, fails, text_folder, tmp_path):
        command = ("generate", "--model", text_folder, "--out", tmp_path / "out")
        assert "does not exist" in fails(*command, "--prompts-file", tmp_path / "none.txt")
        (tmp_path / "p.txt").write_text("llama\n")
        more = ("--prompts-file", tmp_path / "p.txt")
        assert "goes without" in fails(*command, *more, "--prompt", "a")
        assert "no model" in fails("generate", *more)
        assert "expected at least 1" in fails(*command, *more, "-n", 0)


def test_a_cache_in_8_bits(generate, run, model_folder, tmp_path):
    plain = generate("--class", "dog", "--seed", 5)
    assert plain.status == 0, plain.err
    floats = pixels(tmp_path / "out" / "dog-5.png")
    result = generate("--class", "dog", "--seed", 5, "--kv-cache-dtype", "int8")
    assert result.status == 0, result.err
    wanted = tmp_path / "out" / "dog-5.png"
    assert read_metadata(wanted)["kv_cache_dtype"] == "int8"
    assert not np.array_equal(pixels(wanted), floats)
    result = run("generate", "--model", model_folder, "--like", wanted, "--out", tmp_path / "again")
    assert result.status == 0, result.err
    assert np.array_equal(pixels(tmp_path / "again" / "dog-5.png"), pixels(wanted))
    assert read_metadata(tmp_path / "again" / "dog-5.png") == read_metadata(wanted)


def test_quantized(generate, run, model_folder, tmp_path):
    result = generate("--class", "dog", "--seed", 5, "--quantization", "int8")
    assert result.status == 0, result.err
    wanted = tmp_path / "out" / "dog-5.png"
    assert read_metadata(wanted)["quantization"] == "int8"
    # What the image says is taken over.
    result = run("generate", "--model", model_folder, "--like", wanted, "--out", tmp_path / "again")
    assert result.status == 0, result.err
    assert np.array_equal(pixels(tmp_path / "again" / "dog-5.png"), pixels(wanted))
    assert read_metadata(tmp_path / "again" / "dog-5.png") == read_metadata(wanted)
