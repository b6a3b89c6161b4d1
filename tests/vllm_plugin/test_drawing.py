"""From both streams' logits to ids. Needs no vLLM."""

import pytest
import torch
from llamagen.vllm_plugin.drawing import CodeDraw, Request

from llamagen.config import SamplingConfig
from llamagen.generation import guide, next_codes, uniform_draws
from tests.vllm_plugin.engines import mixed_settings

CODES, FIRST, IDS, LENGTH = 50, 8, 100, 16


def expected_code(logits, sampling, seed, index):
    conditional, unconditional = logits[:CODES], logits[CODES : 2 * CODES]
    stop = sampling.guidance_stop
    if sampling.guidance_scale != 1 and (stop is None or index < stop):
        mixed = guide(conditional, unconditional, sampling.guidance_scale)
    else:
        mixed = conditional
    uniform = uniform_draws([seed], LENGTH)[0, index]
    return next_codes(mixed[None], sampling, uniform[None]).item()


def test_rows_use_their_own_settings_wherever_they_are():
    draw = CodeDraw(codebook_size=CODES, first_code=FIRST)
    rows = [
        (Request.of(settings, seed, LENGTH), settings, seed)
        for seed, settings in enumerate(mixed_settings(30, codes=LENGTH))
    ]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(30, IDS, generator=generator)
        indices = [(i + step) % LENGTH for i in range(30)]
        ids = draw(logits.clone(), [request for request, _, _ in rows], indices)
        assert ids.shape == (30, IDS)
        assert (ids.isfinite().sum(-1) == 1).all()
        assert (ids.argmax(-1) - FIRST).tolist() == [
            expected_code(logits[i], settings, seed, indices[i])
            for i, (_, settings, seed) in enumerate(rows)
        ]
        # vLLM moves requests within its batch.
        rows = [rows[i] for i in torch.randperm(30, generator=generator)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_cannot_be_drawn_gets_the_id_that_ends_it(value):
    draw = CodeDraw(codebook_size=CODES, first_code=FIRST)
    plain = Request.of(SamplingConfig(guidance_scale=1.0), 0, LENGTH)
    guided = Request.of(SamplingConfig(guidance_scale=2.0), 0, LENGTH)
    logits = torch.randn(5, IDS)
    logits[0, 3] = value
    logits[1, CODES + 3] = value
    ids = draw(logits, [plain, guided, None, plain, guided], [0, 0, 0, LENGTH, 0])
    assert ids.argmax(-1)[:4].tolist() == [FIRST - 1] * 4
    assert ids.argmax(-1)[4] >= FIRST


def test_one_stream():
    draw = CodeDraw(codebook_size=CODES, first_code=FIRST)
    logits = torch.randn(4, CODES + FIRST)
    greedy = SamplingConfig(guidance_scale=1.0, temperature=0.0)
    ids = draw(logits.clone(), [Request.of(greedy, 0, LENGTH)] * 4, [0] * 4)
    assert torch.equal(ids.argmax(-1), logits[:, :CODES].argmax(-1) + FIRST)
