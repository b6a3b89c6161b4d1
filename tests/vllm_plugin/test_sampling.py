"""Settings as vLLM carries them; from both streams' logits to ids. Needs no vLLM."""

from types import SimpleNamespace

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import apply_guidance, sample_codes, uniform_draws
from llamagen.generation.sampling import Filters
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.sampling import (
    CodeSampling,
    Request,
    extra_args,
    is_addressed,
    read_settings,
)
from tests.vllm_plugin.engines import mixed_settings

CODES, FIRST, IDS, LENGTH = 50, 8, 100, 16


def expected_code(logits, sampling, seed, index):
    conditional, unconditional = logits[:CODES], logits[CODES : 2 * CODES]
    stop = sampling.guidance_stop
    mixed = conditional
    if sampling.guidance_scale != 1 and (stop is None or index < stop):
        mixed = apply_guidance(conditional, unconditional, sampling.guidance_scale)
    uniform = uniform_draws([seed], LENGTH)[0, index]
    return sample_codes(mixed[None], Filters.of([sampling]), uniform[None]).item()


def test_each_row_is_sampled_by_its_own_settings_and_seed():
    sample = CodeSampling(codebook_size=CODES, first_code=FIRST)
    rows = list(enumerate(mixed_settings(30, codes=LENGTH)))  # seed and settings
    requests = [Request.of(each, seed, LENGTH) for seed, each in rows]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(30, IDS, generator=generator)
        indices = [(i + step) % LENGTH for i in range(30)]
        ids = sample(logits.clone(), requests, indices)
        assert ids.shape == (30, IDS)
        assert (ids.isfinite().sum(-1) == 1).all()
        chosen = (ids.argmax(-1) - FIRST).tolist()
        assert chosen == [
            expected_code(own, settings, seed, index)
            for own, (seed, settings), index in zip(logits, rows, indices, strict=True)
        ]
        # Requests change rows.
        order = torch.randperm(30, generator=generator).tolist()
        requests, rows = [requests[i] for i in order], [rows[i] for i in order]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_invalid_rows_get_the_end_id(value):
    sample = CodeSampling(codebook_size=CODES, first_code=FIRST)
    plain = Request.of(SamplingConfig(guidance_scale=1.0), 0, LENGTH)
    guided = Request.of(SamplingConfig(guidance_scale=2.0), 0, LENGTH)
    logits = torch.randn(5, IDS)
    logits[0, 3] = value
    logits[1, CODES + 3] = value
    ids = sample(logits, [plain, guided, None, plain, guided], [0, 0, 0, LENGTH, 0])
    assert ids.argmax(-1)[:4].tolist() == [FIRST - 1] * 4
    assert ids.argmax(-1)[4] >= FIRST


def test_one_stream():
    sample = CodeSampling(codebook_size=CODES, first_code=FIRST)
    logits = torch.randn(4, CODES + FIRST)
    greedy = SamplingConfig(guidance_scale=1.0, temperature=0.0)
    ids = sample(logits.clone(), [Request.of(greedy, 0, LENGTH)] * 4, [0] * 4)
    assert torch.equal(ids.argmax(-1), logits[:, :CODES].argmax(-1) + FIRST)


def params(**changes):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": None, "extra_args": None}
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(guidance_scale=0.0, guidance_stop=7, temperature=0.0, top_k=3, top_p=0.2),
    ],
)
def test_round_trip(sampling):
    carried = extra_args(sampling, 2**63 - 1)
    # vLLM's own fields say something else.
    given = params(temperature=0.3, top_k=9, top_p=0.1, seed=4, extra_args=carried)
    assert read_settings(given, SamplingConfig(guidance_scale=9.0)) == (sampling, 2**63 - 1)


def test_vllms_fields_and_the_models_guidance_fill_the_rest():
    defaults = SamplingConfig(guidance_scale=7.5, guidance_stop=9, top_k=1000)
    sampling, seed = read_settings(params(temperature=0.5, top_k=-1, seed=3), defaults)
    assert sampling == SamplingConfig(guidance_scale=7.5, guidance_stop=9, temperature=0.5)
    assert seed == 3
    assert read_settings(params(), defaults)[1] == 0


def test_guidance_stop_can_be_taken_back():
    given = params(extra_args={"guidance_stop": None})
    assert read_settings(given, SamplingConfig(guidance_stop=5))[0].guidance_stop is None


def test_numbers_may_come_as_json_has_them():
    given = params(extra_args={"top_k": 20.0, "guidance_scale": 3})
    assert read_settings(given, SamplingConfig())[0] == SamplingConfig(guidance_scale=3.0, top_k=20)


def test_ignores_arguments_of_vllm_itself():
    given = params(extra_args={"kv_transfer_params": {"a": 1}, "seed": 4})
    assert read_settings(given, SamplingConfig())[1] == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": 2.0}, "no setting 'guidance'"),
        ({"top_k": "many"}, "top_k is 'many', expected an integer"),
        ({"top_k": float("inf")}, "top_k is inf, expected an integer"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a finite number"),
        ({"temperature": None}, "temperature is None"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_rejects_bad_settings(given, message):
    with pytest.raises(InputError, match=message):
        read_settings(params(extra_args=given), SamplingConfig())


def test_requests_of_other_models_are_not_addressed():
    assert not is_addressed(None)
    assert not is_addressed({"some_other_plugin": 1})
    assert is_addressed({"guidance_scale": 1, "some_other_plugin": 1})
