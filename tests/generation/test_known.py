"""Codes that are known before, and blends of two conditions."""

import pytest
import torch

from llamagen.backends.decoder import TorchDecoder
from llamagen.config import SamplingConfig
from llamagen.generation import draw_codes, filter_logits, generate_codes, uniform_draws
from llamagen.generation.decode import RowCallback
from llamagen.generation.known import UNKNOWN
from llamagen.generation.sequences import Blend
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

PLAIN = SamplingConfig(guidance_scale=1.0, top_k=20)
GUIDED = SamplingConfig(guidance_scale=3.0, top_p=0.9)
STOPPED = SamplingConfig(guidance_scale=3.0, guidance_stop=6)
LABELS = torch.tensor([0, 3, 4])
SEEDS = [11, 5, 99]


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


def draw(model, sampling, condition=LABELS, **settings):
    return generate_codes(model, condition, seeds=SEEDS, sampling=sampling, **settings)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, STOPPED])
@pytest.mark.parametrize("kept", [1, 2, 6, 7, 15, 16])
def test_behind_its_own_first_codes_an_image_goes_on_as_before(model, sampling, kept):
    codes = draw(model, sampling)
    known = codes.flatten(1).clone()
    known[:, kept:] = UNKNOWN
    assert torch.equal(draw(model, sampling, known=known.view_as(codes)), codes)


@pytest.mark.parametrize("sampling", [PLAIN, STOPPED])
def test_images_of_a_batch_may_know_different_codes(model, sampling):
    codes = draw(model, sampling)
    known = torch.full_like(codes, UNKNOWN)
    known[0] = 7
    known[1, 0] = codes[1, 0]
    drawn = draw(model, sampling, known=known)
    assert torch.equal(drawn[0], known[0])
    assert torch.equal(drawn[1:], codes[1:])


def reference(model, label, seed, known):
    """The obvious way, without guidance: the whole sequence again for every code."""
    alone = torch.tensor([label])
    codes = torch.zeros(1, 0, dtype=torch.int64)
    numbers = uniform_draws([seed], known.numel())[0]
    for index, own in enumerate(known.flatten().tolist()):
        if own == UNKNOWN:
            logits = filter_logits(model(codes, alone)[:, -1], PLAIN)
            own = int(draw_codes(logits, numbers[index : index + 1]))
        codes = torch.cat([codes, torch.tensor([[own]])], dim=1)
    return codes.view_as(known)


@torch.no_grad()
def test_what_is_drawn_between_known_codes_follows_from_those_before(model):
    known = torch.full((3, 4, 4), UNKNOWN)
    known[:, 1:3] = torch.arange(24).view(3, 2, 4)
    known[1, 2, 1] = UNKNOWN
    drawn = draw(model, PLAIN, known=known)
    for codes, label, seed, given in zip(drawn, LABELS, SEEDS, known, strict=True):
        assert torch.equal(codes, reference(model, int(label), seed, given))


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, STOPPED])
def test_kernels_and_torch_go_on_behind_known_codes_alike(model, sampling, monkeypatch):
    known = torch.full((3, 4, 4), UNKNOWN)
    known[:, :3] = torch.arange(36).view(3, 3, 4)
    drawn = draw(model, sampling, known=known)
    monkeypatch.setattr(
        "llamagen.generation.decode.decoder_for", lambda model, **_: TorchDecoder(model)
    )
    assert torch.equal(draw(model, sampling, known=known), drawn)


def test_rows_are_told_of_as_they_are_finished(model):
    known = torch.full((3, 4, 4), UNKNOWN)
    known[:, 3] = 5
    seen = []

    def on_row(row, codes):
        seen.append((row, codes.clone()))

    callback: RowCallback = on_row
    whole = draw(model, GUIDED, known=known, on_row=callback)
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    for row, codes in seen:
        assert torch.equal(codes[:, :row], whole[:, :row])
        assert not codes[:, row:].any()


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (torch.zeros(2, 4, 4), r"shape \(2, 4, 4\), expected \(3, 4, 4\)"),
        (torch.full((3, 4, 4), 64), "reach from 64 to 64, expected codes below 64"),
        (torch.full((3, 4, 4), -2), "reach from -2 to -2"),
    ],
)
def test_what_are_no_codes(model, known, message):
    with pytest.raises(InputError, match=message):
        draw(model, PLAIN, known=known)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, STOPPED])
def test_shares_of_none_and_all_are_either_condition(model, sampling):
    other = torch.tensor([1, 1, 2])
    nothing = draw(model, sampling, blend=Blend(other, share=0.0))
    assert torch.equal(nothing, draw(model, sampling))
    everything = draw(model, sampling, blend=Blend(other, share=1.0))
    assert torch.equal(everything, draw(model, sampling, condition=other))


@torch.no_grad()
def test_a_blend_mixes_logits():
    model = tiny_transformer(grid=(1, 1))
    labels, other = torch.tensor([0]), torch.tensor([3])
    empty = torch.zeros(1, 0, dtype=torch.int64)
    none = torch.tensor([model.config.num_classes])
    a, b, u = (model(empty, each)[0, -1] for each in (labels, other, none))
    mixed = 0.7 * a + 0.3 * b
    wanted = (u + 3.0 * (mixed - u)).softmax(-1)
    count = 4000
    drawn = generate_codes(
        model,
        labels.expand(count),
        seeds=range(count),
        sampling=SamplingConfig(guidance_scale=3.0),
        blend=Blend(other.expand(count), share=0.3),
    )
    found = drawn.flatten().bincount(minlength=64) / count
    # Five standard deviations of each code's share.
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((found - wanted).abs() < 5 * spread + 1e-3).all())


def test_blends_of_texts_of_different_lengths():
    model = tiny_transformer(condition="text")
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2, 6, 16, generator=generator)
    masks = [torch.arange(6).expand(2, 6) >= start for start in (4, 1)]
    whole = generate_codes(
        model,
        first,
        seeds=[1, 2],
        sampling=PLAIN,
        condition_mask=masks[0],
        blend=Blend(second, masks[1], 1.0),
    )
    alone = generate_codes(model, second, seeds=[1, 2], sampling=PLAIN, condition_mask=masks[1])
    assert torch.equal(whole, alone)


def test_bad_blends(model):
    with pytest.raises(InputError, match=r"blend_share is 1.5, expected a number from 0 to 1"):
        Blend(LABELS, share=1.5)
    with pytest.raises(InputError, match=r"shape \(2,\), expected \(3,\) like the first one"):
        draw(model, PLAIN, blend=Blend(LABELS[:2]))
    with pytest.raises(InputError, match="class labels run from 9 to 9"):
        draw(model, PLAIN, blend=Blend(torch.tensor([9, 9, 9])))
