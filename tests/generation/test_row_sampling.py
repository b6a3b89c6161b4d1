import itertools

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import guide, next_codes, uniform_draws
from llamagen.generation.row_sampling import RowSettings, guide_rows, next_codes_of_rows

MANY = [
    SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product(
        [0.0, 0.3, 0.7, 1.0, 1.7], [0, 1, 7, 2000, 10**6], [1.0, 0.999, 0.9, 0.31, 1e-6]
    )
]


def some_logits(rows: int, codes: int = 3000, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(rows, codes, generator=torch.Generator().manual_seed(seed)) * 3
    # Ties, also at the cuts.
    return (logits * 8).round() / 8


def alone(logits, settings, uniforms):
    rows = [
        next_codes(logits[i : i + 1], setting, uniforms[i : i + 1])
        for i, setting in enumerate(settings)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_many_settings_draw_what_each_draws_alone(seed):
    logits = some_logits(len(MANY), seed=seed)
    uniforms = uniform_draws(range(len(MANY)), seed + 1)[:, seed]
    drawn = next_codes_of_rows(logits, RowSettings.of(MANY), uniforms)
    assert torch.equal(drawn, alone(logits, MANY, uniforms))


@pytest.mark.parametrize("setting", MANY[::7])
def test_rows_that_share_their_settings(setting):
    logits = some_logits(6)
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(1))
    settings = RowSettings.of([setting] * 6)
    assert settings.shared is not None
    drawn = next_codes_of_rows(logits, settings, uniforms)
    assert torch.equal(drawn, next_codes(logits, setting, uniforms))


@pytest.mark.parametrize(
    "settings",
    [
        [SamplingConfig(top_k=5), SamplingConfig(top_k=50)],
        [SamplingConfig(top_p=0.5), SamplingConfig(top_p=0.9)],
        [SamplingConfig(temperature=0.5), SamplingConfig(temperature=2.0)],
        [SamplingConfig(temperature=0.0), SamplingConfig()],
        [SamplingConfig(top_k=5), SamplingConfig(top_p=0.9)],
    ],
)
def test_pairs_of_settings(settings):
    settings = settings * 20
    logits = some_logits(len(settings))
    uniforms = torch.rand(len(settings), generator=torch.Generator().manual_seed(2))
    drawn = next_codes_of_rows(logits, RowSettings.of(settings), uniforms)
    assert torch.equal(drawn, alone(logits, settings, uniforms))


def test_settings_without_effect_on_the_draw_do_not_set_rows_apart():
    guided = [SamplingConfig(guidance_scale=scale, top_k=7) for scale in (1.0, 4.0, 9.0)]
    assert RowSettings.of(guided).shared is not None
    greedy = [SamplingConfig(temperature=0.0, top_k=k, top_p=0.5) for k in (0, 1, 9)]
    assert RowSettings.of(greedy).shared is not None
    assert RowSettings.of([*guided, *greedy]).shared is None


def test_no_rows():
    drawn = next_codes_of_rows(torch.zeros(0, 10), RowSettings.of([]), torch.zeros(0))
    assert drawn.shape == (0,)


def test_inputs_stay_as_they_are():
    logits = some_logits(len(MANY))
    before = logits.clone()
    next_codes_of_rows(logits, RowSettings.of(MANY), torch.rand(len(MANY)))
    assert torch.equal(logits, before)


def test_guidance_of_each_row():
    conditional, unconditional = some_logits(5, seed=1), some_logits(5, seed=2)
    scales = [1.0, 0.0, 4.0, 7.5, 1.65]
    mixed = guide_rows(conditional, unconditional, torch.tensor(scales))
    assert torch.equal(mixed[0], conditional[0])
    for row, scale in enumerate(scales[1:], start=1):
        assert torch.equal(mixed[row], guide(conditional[row], unconditional[row], scale))


@pytest.mark.gpu
def test_the_gpu_draws_the_same_codes():
    logits = some_logits(len(MANY))
    uniforms = uniform_draws(range(len(MANY)), 1)[:, 0]
    on_gpu = next_codes_of_rows(logits.cuda(), RowSettings.of(MANY, "cuda"), uniforms.cuda())
    on_cpu = next_codes_of_rows(logits, RowSettings.of(MANY), uniforms)
    assert (on_gpu.cpu() == on_cpu).float().mean() > 0.95
