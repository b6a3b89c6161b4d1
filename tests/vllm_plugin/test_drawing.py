"""From both streams' logits to ids. Needs no vLLM."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import guide, next_codes, uniform_draws
from llamagen.vllm_plugin.drawing import CodeDraw, Request
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


def test_each_row_is_drawn_by_its_own_settings_and_place():
    draw = CodeDraw(codebook_size=CODES, first_code=FIRST)
    settings = mixed_settings(30, codes=LENGTH)
    requests = [Request.of(each, seed, LENGTH) for seed, each in enumerate(settings)]
    for step in range(3):
        logits = torch.randn(30, IDS, generator=torch.Generator().manual_seed(step))
        indices = [(i + step) % LENGTH for i in range(30)]
        ids = draw(logits.clone(), requests, indices)
        assert ids.shape == (30, IDS)
        assert (ids.isfinite().sum(-1) == 1).all()
        chosen = (ids.argmax(-1) - FIRST).tolist()
        assert chosen == [expected_code(logits[i], settings[i], i, indices[i]) for i in range(30)]
        # Rows change places.
        order = torch.randperm(30, generator=torch.Generator().manual_seed(step)).tolist()
        requests = [requests[i] for i in order]
        settings = [settings[i] for i in order]
        requests = [Request.of(each, i, LENGTH) for i, each in enumerate(settings)]


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
