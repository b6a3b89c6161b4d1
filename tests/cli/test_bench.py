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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--images", "0"), "--images is [0], expected integers of at least 1"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--preset", "Q"), "Q"),
        (("--model", "emoji"), "emoji is conditioned on text"),
        (("--model", "no-such-model"), "no-such-model"),
    ],
)
def test_rejects_bad_input(fails, arguments, said):
    assert said in fails("bench", *arguments, "--device", "cpu")
