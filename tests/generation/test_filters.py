import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import draw_codes, filter_logits, guide, keep_top_k, keep_top_p
from llamagen.generation.filters import code_probabilities, draw_weighted
from llamagen.support.errors import InputError


def test_guide_is_the_published_formula():
    cond, uncond = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert torch.equal(guide(cond, uncond, 1.0), cond)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    assert torch.equal(guide(cond, uncond, 4.0), torch.tensor([9.0, -2.0]))


def test_top_k_keeps_ties_with_the_kth():
    kept = keep_top_k(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2).isfinite()
    assert kept.tolist() == [False, True, True, True, False]


def test_top_k_larger_than_the_codebook_keeps_all():
    logits = torch.randn(3, 8)
    assert torch.equal(keep_top_k(logits, 100), logits)


def test_top_p_keeps_the_code_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert keep_top_p(logits, 0.6).isfinite().tolist() == [True, True, False, False]
    assert keep_top_p(logits, 1e-6).isfinite().tolist() == [True, False, False, False]


def test_probabilities_are_those_that_codes_are_drawn_with():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    cold = code_probabilities(logits, SamplingConfig(temperature=0.0, top_k=2))
    assert cold.tolist() == [[1, 0, 0, 0]]
    sampling = SamplingConfig(temperature=0.5, top_k=3, top_p=0.6)
    # Squares of 4, 3 and 2 are to each other as 16, 9 and 4; the first two exceed 0.6.
    expected = torch.tensor([[16 / 25, 9 / 25, 0, 0]])
    torch.testing.assert_close(code_probabilities(logits, sampling), expected)


def test_weights_need_not_add_up_to_one():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(4, 5)
    drawn = draw_weighted(weights, torch.tensor([0.0, 0.74, 0.76, 1 - 2**-24]))
    assert drawn.tolist() == [1, 1, 3, 3]


def test_filters_leave_their_input_alone():
    logits = torch.randn(4, 50)
    before = logits.clone()
    filter_logits(logits, SamplingConfig(temperature=0.5, top_k=5, top_p=0.7))
    assert torch.equal(logits, before)


def test_drawn_codes_follow_the_distribution():
    probabilities = torch.tensor([0.05, 0.0, 0.45, 0.3, 0.2, 0.0])
    count = 20_000
    # Evenly spaced numbers cut [0, 1) into exactly the probabilities' shares.
    uniforms = torch.arange(count) / count
    drawn = draw_codes(probabilities.log().expand(count, -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / count
    torch.testing.assert_close(shares, probabilities, atol=2 / count, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_a_code_of_probability_zero_is_never_drawn(uniform):
    logits = torch.full((1, 16384), -torch.inf)
    logits[0, 7] = 0.0
    assert draw_codes(logits, torch.tensor([uniform])).item() == 7


def test_a_code_depends_on_its_own_row_only():
    logits, uniforms = torch.randn(16, 1000), torch.rand(16)
    together = draw_codes(logits, uniforms)
    alone = [draw_codes(logits[i : i + 1], uniforms[i : i + 1]) for i in range(16)]
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
def test_absurd_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        SamplingConfig(**settings)
