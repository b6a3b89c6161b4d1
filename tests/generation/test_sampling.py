import itertools

import numpy as np
import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation.sampling import (
    Filters,
    ReferenceSampler,
    Rows,
    apply_guidance,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    guidance_scale_at,
    sample_codes,
    sample_from,
)
from llamagen.support.errors import InputError


def test_guidance_is_the_published_formula():
    cond, uncond = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert torch.equal(apply_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(apply_guidance(cond, uncond, 0.0), uncond)
    assert torch.equal(apply_guidance(cond, uncond, 4.0), torch.tensor([9.0, -2.0]))


def test_top_k_keeps_ties_with_the_kth():
    kept = apply_top_k(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2).isfinite()
    assert kept.tolist() == [False, True, True, True, False]


def test_top_k_larger_than_the_codebook_keeps_all():
    logits = torch.randn(3, 8)
    assert torch.equal(apply_top_k(logits, 100), logits)


def test_top_p_keeps_the_code_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert apply_top_p(logits, 0.6).isfinite().tolist() == [True, True, False, False]
    assert apply_top_p(logits, 1e-6).isfinite().tolist() == [True, False, False, False]


def test_min_p_keeps_codes_near_the_most_likely():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert apply_min_p(logits, 0.0).isfinite().all()
    assert apply_min_p(logits, 0.25).isfinite().tolist() == [True, True, True, False]
    assert apply_min_p(logits, 0.9).isfinite().tolist() == [True, False, False, False]
    assert apply_min_p(logits, 1.0).isfinite().tolist() == [True, False, False, False]
    mixed = apply_min_p(logits.expand(2, -1), torch.tensor([[0.0], [0.5]]))
    assert mixed.isfinite().tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4.0, 4.0, 4.0, 4.0]),
        ({"guidance_stop": 2}, [4.0, 4.0, 1.0, 1.0]),
        # 1 + 3 p for p = 0, 1/4, 1/2, 3/4; from 2: 2 + 2 p.
        ({"guidance_schedule": "linear"}, [1.0, 1.75, 2.5, 3.25]),
        ({"guidance_schedule": "linear", "guidance_start": 2.0}, [2.0, 2.5, 3.0, 3.5]),
        # 1 + 3 (1 - cos(pi p)) / 2: cos is 1, sqrt(1/2), 0, -sqrt(1/2).
        (
            {"guidance_schedule": "power-cosine", "guidance_power": 1.0},
            [1.0, 1.4393398282201788, 2.5, 3.5606601717798214],
        ),
        # With k = 2: angles pi/16, pi/4, 9 pi/16.
        (
            {"guidance_schedule": "power-cosine", "guidance_power": 2.0},
            [1.0, 1.0288220793951545, 1.4393398282201788, 2.792635483024193],
        ),
        ({"guidance_schedule": "power-cosine", "guidance_power": 0.0}, [4.0, 4.0, 4.0, 4.0]),
    ],
)
def test_guidance_schedules(settings, expected):
    sampling = SamplingConfig(guidance_scale=4.0, **settings)
    found = [guidance_scale_at(sampling, index, 4) for index in range(4)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_filters_apply_in_their_order():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    sampling = SamplingConfig(temperature=0.5, top_k=3, top_p=0.6)
    # Squares of 4, 3 and 2 are to each other as 16, 9 and 4; the first two exceed 0.6.
    expected = torch.tensor([[16 / 25, 9 / 25, 0, 0]])
    torch.testing.assert_close(Filters.of([sampling])(logits).softmax(-1), expected)


SETTINGS = [
    SamplingConfig(guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for scale, temperature, top_k, top_p in itertools.product(
        (1.0, 0.0, 4.0), (1.0, 0.7, 1e-40, 0.0), (0, 1, 50, 256, 512), (1.0, 0.9, 0.3, 1e-6)
    )
]


def test_rows_with_settings_of_their_own_match_each_row_alone():
    generator = torch.Generator().manual_seed(0)
    count = len(SETTINGS)
    logits = torch.randn(2 * count, 256, generator=generator) * 3
    uniforms = torch.rand(count, generator=generator)
    scales = np.array([each.guidance_scale for each in SETTINGS], dtype=np.float32)
    conditional = np.arange(count, dtype=np.int64)
    rows = Rows(conditional, np.where(scales == 1.0, -1, conditional + count), scales)
    sampler = ReferenceSampler(SETTINGS, torch.device("cpu"))
    codes, finite = sampler(logits, logits, rows, uniforms)
    assert finite.all()
    for row, sampling in enumerate(SETTINGS):
        own, other = logits[row : row + 1], logits[row + count : row + count + 1]
        scale = sampling.guidance_scale
        mixed = own if scale == 1.0 else apply_guidance(own, other, scale)
        alone = sample_codes(mixed, Filters.of([sampling]), uniforms[row : row + 1])
        assert codes[row] == alone[0], sampling


def test_not_finite_logits_are_reported_for_their_row():
    logits = torch.zeros(3, 8)
    logits[1, 4] = torch.nan
    each = np.arange(3, dtype=np.int64)
    rows = Rows(each, np.full(3, -1), np.ones(3, dtype=np.float32))
    sampler = ReferenceSampler([SamplingConfig(guidance_scale=1.0)] * 3, torch.device("cpu"))
    _, finite = sampler(logits, logits, rows, torch.zeros(3))
    assert finite.tolist() == [True, False, True]


def test_filters_do_not_edit_their_input():
    logits = torch.randn(4, 50)
    before = logits.clone()
    Filters.of([SamplingConfig(temperature=0.5, top_k=5, top_p=0.7)])(logits)
    assert torch.equal(logits, before)


def test_sampled_codes_follow_the_distribution():
    probabilities = torch.tensor([0.05, 0.0, 0.45, 0.3, 0.2, 0.0])
    count = 20_000
    # Evenly spaced numbers cut [0, 1) into exactly the probabilities' shares.
    uniforms = torch.arange(count) / count
    drawn = sample_from(probabilities.log().expand(count, -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / count
    torch.testing.assert_close(shares, probabilities, atol=2 / count, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_never_samples_a_code_of_probability_zero(uniform):
    logits = torch.full((1, 16384), -torch.inf)
    logits[0, 7] = 0.0
    assert sample_from(logits, torch.tensor([uniform])).item() == 7


def test_code_depends_on_its_own_row_only():
    logits, uniforms = torch.randn(16, 1000), torch.rand(16)
    together = sample_from(logits, uniforms)
    alone = [sample_from(logits[i : i + 1], uniforms[i : i + 1]) for i in range(16)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"guidance_stop": -2},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
    ],
)
def test_rejects_settings_out_of_range(settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        SamplingConfig(**settings)
