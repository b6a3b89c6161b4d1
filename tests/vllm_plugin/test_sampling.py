"""From both streams' logits to ids. Needs no vLLM."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import apply_guidance, sample_codes, uniform_draws
from llamagen.generation.sampling import Filters
from llamagen.vllm_plugin.sampling import CodeSampling, Request
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
