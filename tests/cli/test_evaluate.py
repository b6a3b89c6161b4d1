"""The evaluate commands, on small models and real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llamagen.support.locks import folder_lock
from tests.evaluation.sets import write_noise
from tests.tiny_models import tiny_text_pipeline

CLASSIFIER = ("--network", "classifier", "--classifier-steps", "3", "--device", "cpu")
EXACT = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """60 images of the tiny pipeline's classes."""
    return write_noise(tmp_path_factory.mktemp("real") / "images", 60)


def metrics(folder):
    return json.loads((folder / "report.json").read_text())["metrics"]


def test_c2i_and_the_same_again(run, model_folder, real, tmp_path):
    command = ("evaluate", "c2i", "--model", model_folder, "--reference", real, "-n", 40)
    command = (*command, *CLASSIFIER, "--out", tmp_path / "e", "--npz", tmp_path / "s.npz")
    result = run(*command)
    assert result.status == 0, result.err
    assert "note: 40 samples instead of the protocol's 50,000" in result.out
    assert result.out.splitlines()[-1].endswith("report.html")
    found = metrics(tmp_path / "e")
    assert found["classifier_frechet"] >= 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*.npz")}
    assert run(*command).status == 0
    assert metrics(tmp_path / "e") == found
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*.npz")}
    assert again == times, "nothing was drawn or computed twice"
    # What was written for other programs is evaluated like a folder.
    statistics = tmp_path / "r.npz"
    folder = run(
        *("evaluate", "folder", tmp_path / "s.npz", real, *CLASSIFIER, "--out", tmp_path / "f"),
        *("--classifier", tmp_path / "e" / "classifier", "--save-reference", statistics),
    )
    assert folder.status == 0, folder.err
    assert metrics(tmp_path / "f")["classifier_frechet"] == pytest.approx(
        found["classifier_frechet"]
    )
    with np.load(statistics) as arrays:
        assert arrays["count"] == 60


def test_statistics_of_a_classifier_are_known_again(run, fails, real, tmp_path):
    folder, statistics = tmp_path / "c", tmp_path / "r.npz"
    command = ("evaluate", "folder", real)
    own = (*CLASSIFIER, "--classifier", folder)
    first = run(*command, real, *own, "-o", tmp_path / "a", "--save-reference", statistics)
    assert first.status == 0, first.err
    again = run(*command, statistics, *own, "-o", tmp_path / "b")
    assert again.status == 0, again.err
    assert metrics(tmp_path / "b")["classifier_frechet"] == pytest.approx(0.0, abs=1e-6)
    other = ("--classifier", tmp_path / "d", *CLASSIFIER)
    assert run(*command, real, *other, "--classifier-flip", "-o", tmp_path / "e").status == 0
    line = fails(*command, statistics, *other, "-o", tmp_path / "f")
    assert "holds statistics of classifier trained on the reference (5 classes" in line
    assert "which cannot be compared with those of the classifier" in line


def test_a_reference_without_classes_leaves_no_classifier(fails, real, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (real / "cat").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    line = fails("evaluate", "folder", real, flat, *CLASSIFIER, "--out", tmp_path / "e")
    assert "has no classes to train a classifier on" in line
    assert list((tmp_path / "e").iterdir()) == []


def test_another_evaluation_in_the_folder(run, fails, real, tmp_path):
    command = ("evaluate", "folder", real, real, *CLASSIFIER, "--out", tmp_path)
    with folder_lock(tmp_path):
        line = fails(*command)
    assert f"another run is working in {tmp_path}" in line
    assert list(tmp_path.iterdir()) == []
    assert run(*command).status == 0


def test_tokenizer(run, model_folder, real, tmp_path):
    result = run(
        *("evaluate", "tokenizer", real, "-t", model_folder / "tokenizer", "--size", 16),
        *(*CLASSIFIER, "--out", tmp_path / "e"),
    )
    assert result.status == 0, result.err
    found = metrics(tmp_path / "e")
    assert {"classifier_frechet", "psnr", "ssim", "codebook_usage"} <= set(found)
    # Images of a tokenizer of one's own are taken as they are.
    plain = run(
        *("evaluate", "tokenizer", real, "-t", model_folder / "tokenizer"),
        *("--no-rfid", *EXACT, "--out", tmp_path / "p"),
    )
    assert plain.status == 0, plain.err
    assert metrics(tmp_path / "p")["psnr"] == pytest.approx(found["psnr"])


def test_likelihood(run, model_folder, real, tmp_path):
    result = run(
        *("evaluate", "likelihood", real, "--model", model_folder, *EXACT),
        *("--out", tmp_path / "e"),
    )
    assert result.status == 0, result.err
    found = metrics(tmp_path / "e")
    assert found["bits_per_pixel"] == pytest.approx(found["bits_per_code"] * 16 / 256)


def test_sweep(run, model_folder, real, tmp_path):
    result = run(
        *("evaluate", "sweep", "--model", model_folder, "--reference", real, "-n", 10),
        *("--guidance-scales", 1, 2, "--top-ks", 0, 3, *CLASSIFIER, "--out", tmp_path / "e"),
    )
    assert result.status == 0, result.err
    table = json.loads((tmp_path / "e" / "report.json").read_text())["tables"][0]
    assert [row[:2] for row in table["rows"]] == [["all", 1], ["all", 2], [3, 1], [3, 2]]


def test_t2i(run, real, tmp_path):
    tiny_text_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "captions.txt").write_text("a cat\na dog\na fox\n")
    command = ("evaluate", "t2i", "--model", tmp_path / "model", "--clip", "none")
    command = (*command, "--prompts-file", tmp_path / "captions.txt", *CLASSIFIER)
    result = run(*command, "--reference", real, "--out", tmp_path / "e")
    assert result.status == 0, result.err
    assert "classifier_frechet" in metrics(tmp_path / "e")
    assert json.loads((tmp_path / "e" / "report.json").read_text())["samples"]["size"] == "16x16"


@pytest.mark.slow
def test_two_processes_match_one(model_folder, real, tmp_path):
    def evaluate(out, *launcher):
        words = [*launcher, "evaluate", "c2i", "--model", str(model_folder)]
        words += ["--reference", str(real), "-n", "600", *CLASSIFIER, "--dtype", "float32"]
        # The sampled codes, and so the metrics, are those of one process.
        words += ["--classifier", str(tmp_path / "classifier"), "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, check=True, capture_output=True, timeout=300, env=environment)
        return metrics(out)

    alone = evaluate(tmp_path / "one", sys.executable, "-m", "llamagen")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    both = evaluate(tmp_path / "two", *torchrun, "-m", "llamagen")
    assert both == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_killed_and_started_again(model_folder, real, tmp_path):
    def command(out):
        words = [sys.executable, "-m", "llamagen", "evaluate", "c2i", "--model", str(model_folder)]
        # Chosen by a measurement otherwise, which other work on the machine can sway.
        words += ["--dtype", "float32"]
        words += ["--reference", str(real), "-n", "1500", *CLASSIFIER, "--out", str(out)]
        return [*words, "--classifier", str(tmp_path / "classifier")]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=300)
    samples = tmp_path / "killed" / "samples"
    for wanted in (1, 3):
        process = subprocess.Popen(command(tmp_path / "killed"), stderr=subprocess.DEVNULL)
        while len(list(samples.glob("piece-*.npz"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in samples.glob("piece-*.npz")}
    assert kept
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True, timeout=300)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_bad_input(fails, run, model_folder, real, tmp_path):
    out = ("--out", tmp_path / "e")
    assert "--reference an .npz file" in fails("evaluate", "c2i", "--model", model_folder, *out)
    assert "expected at least 2" in fails(
        "evaluate", "c2i", "--model", model_folder, "--reference", real, "-n", 1, *out
    )
    assert "give --model" in fails("evaluate", "c2i", "--reference", real, *out)
    assert "does not exist" in fails(
        "evaluate", "folder", real, tmp_path / "nowhere.npz", *CLASSIFIER, *out
    )
    assert "two sets of images" in fails("evaluate", "folder", real, *out)
    (tmp_path / "weights.pth").write_bytes(b"cut off")
    text = fails(*("evaluate", "folder", real, real, "--inception", tmp_path / "weights.pth", *out))
    assert "weights.pth" in text
    assert "--network classifier" in text
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "statistics of Inception's features" in fails(
        *("evaluate", "folder", real, tmp_path / "s.npz", *out, *CLASSIFIER),
        *("--classifier", _classifier(run, real, tmp_path)),
    )
    assert "holds statistics; give the images" in fails(
        "evaluate", "tokenizer", tmp_path / "s.npz", *out
    )
    assert "give --guidance-scales and --top-ks" in fails(
        *("evaluate", "sweep", "--model", model_folder, "--reference", real),
        *("--guidance-scales", *out),
    )


def _classifier(run, real, tmp_path) -> Path:
    assert run("evaluate", "folder", real, real, *CLASSIFIER, "--out", tmp_path / "c").status == 0
    return tmp_path / "c" / "classifier"


def test_options_of_the_other_network(fails, real, tmp_path):
    command = ("evaluate", "folder", real, real, "--out", tmp_path / "e")
    for given in (("--classifier", tmp_path), ("--classifier-steps", 3), ("--classifier-flip",)):
        assert f"{given[0]} goes with --network classifier" in fails(*command, *given)
    line = fails(*command, "--network", "classifier", "--inception", tmp_path / "weights.pth")
    assert "--inception goes with --network inception" in line
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_outside_their_range(fails, real, model_folder, tmp_path, size):
    given = (f"--size={size}", "--out", tmp_path / "e")
    for command in (
        ("folder", real, real, *CLASSIFIER),
        ("tokenizer", real, "-t", model_folder / "tokenizer", "--no-rfid"),
        ("c2i", "--model", model_folder, "--reference", real, *CLASSIFIER),
    ):
        line = fails("evaluate", *command, *given)
        assert f"--size is {size}, expected at least 1" in line
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--seed=-2", "seed is -2, expected an integer from 0"),
        ("--seed=9223372036854775808", "seed is 9223372036854775808"),
        ("--batch-size=9999999999999999999", "expected at most 2147483647"),
    ],
)
def test_numbers_outside_their_range(fails, real, model_folder, tmp_path, given, message):
    command = (
        "evaluate",
        "c2i",
        "--model",
        model_folder,
        "--reference",
        real,
        "-n",
        4,
        *CLASSIFIER,
    )
    assert message in fails(*command, *CLASSIFIER, given, "--out", tmp_path / "e")
