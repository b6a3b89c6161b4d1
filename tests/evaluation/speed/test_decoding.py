"""Timings of decoding on small models; no time is asserted."""

import pytest
import torch

from llamagen.backends import ReferenceStep, fastest_step, reference_only
from llamagen.config import SamplingConfig
from llamagen.evaluation.speed import SAMPLING, measure_decoding, measure_limits, time_in_turn
from llamagen.generation import generate_codes
from llamagen.generation.sampling import ReferenceSampler, fastest_sampler
from tests.backends.variants import kernels_of
from tests.tiny_models import tiny_transformer


def test_reference_runs_on_the_models_own_operations():
    model = tiny_transformer(dim=64, heads=2)
    before = type(fastest_step(model))
    with reference_only():
        assert isinstance(fastest_step(model), ReferenceStep)
        assert isinstance(fastest_sampler([SAMPLING], 64, model.device), ReferenceSampler)
    assert type(fastest_step(model)) is before
    (reference, own) = measure_decoding(model, ["float32"], [2], repeats=2)
    assert (reference.precision, own.precision) == ("reference, float32", "float32")
    assert reference.shares is None
    assert [len(each.seconds_per_code) for each in (reference, own)] == [2, 2]
    assert reference.floor == own.floor > 0


def test_shares_add_up():
    kernels_of("native")
    model = tiny_transformer(dim=64, heads=2)
    found = measure_decoding(model, ["float32", "int8"], [2], repeats=1, reference=False)
    assert [m.precision for m in found] == ["float32", "int8"]
    for each in found:
        assert set(each.shares) == {"products", "attention", "sampling", "rest"}
        assert sum(each.shares.values()) == pytest.approx(1)
        assert min(each.shares.values()) > 0
        assert max(each.shares.values()) < 1
    assert model.config.quantization is None


def test_limits_are_the_larger_of_reading_and_computing():
    limits = measure_limits(torch.device("cpu"), torch.float32)
    reading = limits.seconds(read=limits.bytes_per_second, operations=0)
    assert reading == pytest.approx(1)
    both = limits.seconds(read=limits.bytes_per_second, operations=2 * limits.operations_per_second)
    assert both == pytest.approx(2)


def test_candidates_run_in_turn():
    order = []
    candidates = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = time_in_turn(candidates, repeats=2, progress=lambda: order.append("."))
    assert "".join(order) == "a.b." * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_plain_loop_of_the_benchmarks_samples_the_same_codes(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "benchmarks")
    from plain_loop import plain_codes

    # Top-k 1 leaves both the most likely code.
    model, labels = tiny_transformer(), torch.tensor([1, 4])
    sampling = SamplingConfig(guidance_scale=3.0, top_k=1)
    ours = generate_codes(model, labels, seeds=[0, 1], sampling=sampling)
    assert torch.equal(plain_codes(model, labels, 16, sampling), ours.flatten(1))
