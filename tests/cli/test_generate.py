import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llamagen.pipeline.saving as saving
import llamagen.support.storage as storage
from llamagen.support.labels import Labels
from llamagen.support.pictures import read_metadata, save_png
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


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


def test_the_same_image_by_another_model(generate, run, fails, model_folder, tmp_path):
    generate("--class", "dog", "--seed", 5)
    recorded = tmp_path / "out" / "dog-5.png"
    pipe = tiny_pipeline()
    for name, names in (("ordered", "abcd"), ("numbers", "1234"), ("twins", ("dog", *"abc"))):
        pipe.labels = Labels((*names[:3], "dog", names[3]))
        pipe.save_pretrained(tmp_path / name)
    like = ("generate", "--like", recorded, "--out", tmp_path / "again")
    result = run(*like, "--model", tmp_path / "ordered")
    assert result.status == 0, result.err
    metadata = read_metadata(tmp_path / "again" / "dog-5.png")
    assert (metadata["class"], metadata["class_index"]) == ("dog", 3)
    line = fails(*like, "--model", tmp_path / "twins")
    assert "class 'dog' is ambiguous: it names 0, 3" in line
    # A name of digits is not the other model's index, and a twin is known by its own.
    numbered = tmp_path / "numbered"
    run("generate", "--model", tmp_path / "numbers", "-c", "1", "--seed", 5, "--out", numbered)
    assert read_metadata(numbered / "1-5.png")["class_index"] == 0
    other = ("--model", model_folder, "--out", tmp_path / "none")
    line = fails("generate", "--like", numbered / "1-5.png", *other)
    assert "there is no class '1'" in line
    twin = tmp_path / "twin"
    run("generate", "--model", tmp_path / "twins", "-c", "3", "--seed", 6, "--out", twin)
    again = ("--like", twin / "dog-6.png", "--model", tmp_path / "twins", "--out", twin / "again")
    assert run("generate", *again).status == 0
    assert read_metadata(twin / "again" / "dog-6.png")["class_index"] == 3


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
    real, calls = os.link, []

    def full_after_two(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(storage.os, "link", full_after_two)
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
    wanted = tmp_path / "out" / "dog-5-2.png"
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


class TestImagesStay:
    def test_the_same_command_goes_on(self, run, generate, model_folder, tmp_path, monkeypatch):
        out, saved, save = tmp_path / "out", [], saving.save_image

        def interrupted(image, path, metadata=None):
            if len(saved) == 2:
                raise KeyboardInterrupt
            saved.append(path.name)
            return save(image, path, metadata)

        command = ("--class", "dog", "red fox", "-n", 3, "--seed", 7, "--batch-size", 1)
        monkeypatch.setattr(saving, "save_image", interrupted)
        result = generate(*command)
        assert result.status == 130
        assert f"2 of 6 images are in {out}; the same command with --seed 7 goes on" in result.err
        assert sorted(path.name for path in out.iterdir()) == ["dog-7.png", "dog-8.png"]
        monkeypatch.setattr(saving, "save_image", save)
        times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        result = generate(*command)
        names = [Path(line).name for line in result.out.splitlines()]
        wanted = [*(f"dog-{seed}.png" for seed in (7, 8, 9))]
        wanted += [*(f"red-fox-{seed}.png" for seed in (10, 11, 12)), "sheet.png"]
        assert names == wanted
        assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
        run("generate", "--model", model_folder, *command, "--out", tmp_path / "whole")
        for name in wanted:
            assert np.array_equal(pixels(out / name), pixels(tmp_path / "whole" / name))

    def test_a_seed_that_was_chosen_is_named(self, generate, monkeypatch, tmp_path):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(saving, "save_image", interrupted)
        err = generate("--class", "dog").err
        assert re.search(r"0 of 1 images are in .*--seed \d+ goes on", err)

    def test_a_killed_process_leaves_whole_images(self, model_folder, tmp_path):
        out = tmp_path / "out"
        command = ("generate", "--model", model_folder, "-c", "dog", "-n", 100_000, "--seed", 0)
        command = [sys.executable, "-m", "llamagen", *map(str, command), "--out", str(out)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("*.png"))) < 3:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        found = list(out.glob("*.png"))
        assert len(found) >= 3
        assert {pixels(path).shape for path in found} == {(16, 16, 3)}

    def test_other_settings_get_other_names(self, generate, tmp_path):
        out = tmp_path / "out"
        for top_k, name in ((1, "dog-5.png"), (2, "dog-5-2.png"), (3, "dog-5-3.png")):
            for _ in range(2):
                result = generate("--class", "dog", "--seed", 5, "--top-k", top_k)
                assert result.out == f"{out / name}\n"
                assert read_metadata(out / name)["top_k"] == top_k
        assert len(list(out.iterdir())) == 3

    def test_other_weights_of_the_same_name_get_other_names(self, run, tmp_path):
        for seed, name in ((0, "dog-5.png"), (1, "dog-5-2.png")):
            pipe = tiny_pipeline(seed=seed)
            pipe.save_pretrained(tmp_path / "model")
            command = ("--model", tmp_path / "model", "-c", "dog", "--seed", 5)
            result = run("generate", *command, "--out", tmp_path / "out")
            assert Path(result.out.strip()).name == name
            found = pixels(tmp_path / "out" / name)
            assert np.array_equal(found, np.asarray(pipe("dog", seed=5).images[0]))

    def test_candidates(self, generate, tmp_path):
        command = ("--class", "dog", "-n", 3, "--seed", 5, "--best-of", 4)
        first = generate(*command)
        assert first.status == 0, first.err
        (tmp_path / "out" / "sheet.png").unlink()
        again = generate(*command)
        assert again.out == first.out
        assert len(list((tmp_path / "out").iterdir())) == 4

    def test_edits(self, run, model_folder, tmp_path):
        for number, colour in enumerate(("red", "green")):
            Image.new("RGB", (16, 16), colour).save(tmp_path / "photo.png")
            command = ("edit", "complete", tmp_path / "photo.png", "--model", model_folder)
            command += ("-c", "dog", "--seed", 5, "-n", 2, "--out", tmp_path / "out")
            for _ in range(2):
                assert run(*command).status == 0
                assert len(list((tmp_path / "out").iterdir())) == 3 * (number + 1)

    def test_prompts_without_letters(self, run, text_folder, tmp_path):
        command = ("generate", "--model", text_folder, "--seed", 5, "--out", tmp_path / "out")
        for prompt in ("!!", "🔥", "?"):
            assert run(*command, "--prompt", prompt).status == 0
        found = [read_metadata(path)["prompt"] for path in (tmp_path / "out").iterdir()]
        assert sorted(found) == ["!!", "?", "🔥"]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_other_kinds_of_files(run, model_folder, tmp_path, suffix):
    kind = "WEBP" if suffix == ".webp" else "JPEG"
    out = tmp_path / f"dog{suffix}"
    command = ("generate", "--model", model_folder, "-c", "dog", "--seed", 5)
    assert run(*command, "--out", out).status == 0
    with Image.open(out) as image:
        assert (image.format, image.size) == (kind, (16, 16))
    assert read_metadata(out)["seed"] == 5
    assert run(*command, "--out", tmp_path / "whole").status == 0
    again = run("generate", "--model", model_folder, "--like", out, "--out", tmp_path / "again")
    assert again.status == 0, again.err
    wanted = pixels(tmp_path / "whole" / "dog-5.png")
    assert np.array_equal(pixels(tmp_path / "again" / "dog-5.png"), wanted)
    assert '"class": "dog"' in run("info", out).out
    # A file that was named is written anew.
    assert run(*command, "-n", 2, "--out", out).status == 0
    with Image.open(out) as image:
        assert image.size != (16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "dog.gif"], "dog.gif is a file of another kind; give --out a folder"),
        (["--out", "dog.tiff"], "dog.tiff is a file of another kind"),
        (["--columns=-2"], "--columns is -2, expected at least 1"),
        (["--columns", "0"], "--columns is 0, expected at least 1"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--top-k", "2147483648"], "top_k is 2147483648, expected an integer"),
        (["--guidance-stop", "9999999999"], "guidance_stop is 9999999999"),
        (["--seed", "9223372036854775808"], "seed is 9223372036854775808"),
        (["--window", "0"], "window is 0"),
        (["--best-of", "0"], "best_of is 0"),
    ],
)
def test_values_outside_their_range(fails, model_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails("generate", "--model", model_folder, "-c", "dog", *arguments)
    assert list(tmp_path.rglob("*.png")) == []
    assert not (tmp_path / "dog.gif").exists()


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_a_file_of_prompts(fails, text_folder, tmp_path, size):
    (tmp_path / "p.txt").write_text("llama\n")
    command = ("generate", "--model", text_folder, "--prompts-file", tmp_path / "p.txt")
    assert "--batch-size" in fails(*command, f"--batch-size={size}", "--out", tmp_path / "out")


class TestOtherEncodings:
    def test_undecodable_prompts(self, fails, text_folder, model_folder, tmp_path):
        model = ("generate", "--model", text_folder, "--out", tmp_path / "out")
        assert "no valid UTF-8" in fails(*model, "--prompt", "\udcff\udcfe")
        assert "no valid UTF-8" in fails(*model, "--prompt", "a", "--negative-prompt", "\udcff")
        line = fails("generate", "--model", model_folder, "-c", "\udcff", "--out", tmp_path / "out")
        assert "there is no class" in line
        assert list(tmp_path.rglob("*.png")) == []

    def test_undecodable_class_names(self, run, tmp_path):
        pipe = tiny_pipeline()
        pipe.labels = Labels(("cat", "d\udcffg", "fox", "x", "y"))
        pipe.save_pretrained(tmp_path / "model")
        command = ("--model", tmp_path / "model", "--seed", 5, "--out", tmp_path / "out")
        result = run("generate", *command, "-c", "d\udcffg")
        assert result.status == 0, result.err
        (path,) = (tmp_path / "out").iterdir()
        assert read_metadata(path)["class"] == "d\udcffg"
        assert run("generate", "--like", path, *command[:2], "--out", tmp_path / "a").status == 0

    @pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
    def test_output_in_ascii(self, text_folder, tmp_path, encoding):
        def run(*arguments):
            return subprocess.run(
                [sys.executable, "-m", "llamagen", *map(str, arguments)],
                env={**os.environ, "PYTHONIOENCODING": encoding},
                capture_output=True,
                check=False,
            )

        command = ("--model", text_folder, "--prompt", "café", "--seed", 5)
        result = run("generate", *command, "--out", tmp_path / "öut")
        assert result.returncode == 0, result.stderr
        wanted = str(tmp_path / "öut" / "café-5.png")
        assert result.stdout.strip() == wanted.encode(encoding, "backslashreplace")
        described = run("info", wanted)
        assert json.loads(described.stdout.decode(encoding))["prompt"] == "café"
