"""``llamagen bench`` on small models; no time is asserted."""

import json
import subprocess
import sys

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.evaluation.speed import measure_decoding, measure_limits, time_in_turn
from llamagen.evaluation.speed.plain import plain_codes
from llamagen.generation import generate_codes
from tests.backends.variants import kernels_of
from tests.tiny_models import tiny_transformer


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "llamagen", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(tmp_path):
    model = tmp_path / "model"
    tiny_transformer(dim=64, heads=2).save_pretrained(model)
    out = tmp_path / "made" / "results.json"
    done = run("--model", str(model), "--images", "1", "3", "--repeats", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"date", "processor", "threads"} <= set(found["machine"])
    measured = found["results"]["measured"]
    assert [m["images"] for m in measured] == [1] * 5 + [3] * 5
    assert all(len(m["seconds_per_code"]) == 2 for m in measured)
    assert all(m["floor"] > 0 for m in measured)
    assert measured[0]["precision"].startswith("plain loop")
    assert "x " in done.stdout.splitlines()[-2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--images", "0"), "--images is [0], expected numbers of at least 1"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--preset", "Q"), "Q"),
        (("--model", "emoji"), "emoji is conditioned on text"),
        (("--model", "no-such-model"), "no-such-model"),
    ],
)
def test_bad_input(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_plain_loop_draws_what_ours_draws():
    # The likeliest code: top-k 1 leaves one to both.
    model, labels = tiny_transformer(), torch.tensor([1, 4])
    sampling = SamplingConfig(guidance_scale=3.0, top_k=1)
    ours = generate_codes(model, labels, seeds=[0, 1], sampling=sampling)
    assert torch.equal(plain_codes(model, labels, 16, sampling), ours.flatten(1))


def test_shares_are_of_the_whole():
    kernels_of("native")
    model = tiny_transformer(dim=64, heads=2)
    found = measure_decoding(model, ["float32", "int8"], [2], repeats=1, plain=False)
    assert [m.precision for m in found] == ["float32", "int8"]
    for each in found:
        assert set(each.shares) == {"products", "attention", "drawing", "rest"}
        assert sum(each.shares.values()) == pytest.approx(1)
        assert all(0 < share < 1 for share in each.shares.values())
    assert model.config.quantization is None


def test_limits_take_the_larger():
    limits = measure_limits(torch.device("cpu"), torch.float32)
    by_reading = limits.seconds(read=limits.bytes_per_second, operations=0)
    assert by_reading == pytest.approx(1)
    both = limits.seconds(read=limits.bytes_per_second, operations=2 * limits.operations_per_second)
    assert both == pytest.approx(2)


def test_candidates_run_in_turn():
    order = []
    candidates = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = time_in_turn(candidates, repeats=2, progress=lambda: order.append("."))
    assert "".join(order) == "a.b." * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
