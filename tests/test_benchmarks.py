"""The programs in benchmarks/ fit the package; nothing is timed."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_pipeline, tiny_text_pipeline, tiny_transformer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(
    {path.stem for path in BENCHMARKS.glob("*.py")} - {"common", "cifar10_classifier"}
)


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_prints_its_help(name, monkeypatch, capsys):
    main = importlib.import_module(name).main
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("pipe", [tiny_pipeline, tiny_text_pipeline])
def test_quantization_predicts_with_and_without_a_cache(pipe):
    from quantization import code_bits, divergence, predicted

    pipe = pipe()
    prompts = ["cat", "dog"]
    codes = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = predicted(pipe, codes, prompts)
    assert exact.shape == (2, 16, 64)
    assert divergence(exact, exact).abs().max() < 1e-9
    pipe.quantize(kv_cache_dtype="int8")
    rounded = predicted(pipe, codes, prompts)
    assert 0 < float(divergence(exact, rounded).mean()) < 0.01
    assert code_bits(torch.zeros(2, 16, 64), codes).allclose(
        torch.full((2, 16), math.log2(64), dtype=torch.float64)
    )


def test_parallel_decoding_counts_passes():
    from parallel_decoding import generate, requests_of

    pipe = tiny_pipeline()
    (alone, passes), _ = generate(pipe, requests_of(pipe, [0, 1], 1, window=1))
    assert passes == 16
    (together, fewer), _ = generate(pipe, requests_of(pipe, [0, 1], 1, window=8))
    assert torch.equal(alone, together)
    assert fewer <= passes


def test_llama_cpp_times_our_step():
    from llama_cpp import own_seconds

    seconds = own_seconds(tiny_transformer(), [1, 3])
    assert set(seconds) == {1, 3}
    assert min(seconds.values()) > 0


def test_evenly_spreads_indices():
    from common import evenly

    assert evenly(10, 3).tolist() == [0, 3, 6]
    assert np.array_equal(evenly(2, 5), [0, 1])
