"""``llamagen bench`` on a small model."""

import json

import pytest

from tests.tiny_models import tiny_transformer


@pytest.mark.parametrize("flag", [(), ("--no-plain",)])
def test_measures_precisions_and_numbers_of_images(run, tmp_path, flag):
    model, out = tmp_path / "model", tmp_path / "made" / "results.json"
    tiny_transformer(dim=64, heads=2).save_pretrained(model)
    command = ("bench", "--model", model, "--images", 1, 2, "--repeats", 1, "--device", "cpu")
    result = run(*command, *flag, "--out", out)
    assert result.status == 0, result.err
    found = json.loads(out.read_text())
    assert {"date", "processor", "threads"} <= set(found["machine"])
    measured = found["results"]["measured"]
    kinds = 3 if flag else 4
    assert [m["images"] for m in measured] == [1] * kinds + [2] * kinds
    assert {len(m["seconds_per_code"]) for m in measured} == {1}
    assert min(m["floor"] for m in measured) > 0
    assert measured[0]["precision"].startswith("reference, ") == (not flag)
    assert ("x " in result.out.splitlines()[-2]) == (not flag)


def test_passes_of_random_order(run, tmp_path):
    tiny_transformer(dim=64, heads=2, order="random").save_pretrained(tmp_path / "model")
    command = ("bench", "--model", tmp_path / "model", "--images", 1, "--repeats", 1)
    result = run(*command, "--steps", 4, "--precisions", "float32", "--device", "cpu")
    assert result.status == 0, result.err
    assert "16 codes in 4 passes (random order), with guidance" in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--images", "0"), "--images is [0], expected integers of at least 1"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--preset", "Q"), "Q"),
        (("--model", "emoji"), "emoji is conditioned on text"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "cifar10", "--steps", "4"), "steps is 4, but this model predicts codes one"),
    ],
)
def test_rejects_bad_input(fails, arguments, said):
    assert said in fails("bench", *arguments, "--device", "cpu")
