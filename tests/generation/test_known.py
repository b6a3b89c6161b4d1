"""Codes that are known before, and blends of two conditions."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import (
    UNKNOWN,
    GenerationRequest,
    NativeEngine,
    generate_codes,
    sample_codes,
    uniform_draws,
)
from llamagen.generation.generate import RowCallback
from llamagen.generation.sampling import Filters
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
def test_known_prefix_continues_as_without(model, sampling, kept):
    codes = draw(model, sampling)
    known = codes.flatten(1).clone()
    known[:, kept:] = UNKNOWN
    assert torch.equal(draw(model, sampling, known=known.view_as(codes)), codes)


@pytest.mark.parametrize("sampling", [PLAIN, STOPPED])
def test_images_of_a_batch_know_different_codes(model, sampling):
    codes = draw(model, sampling)
    known = torch.full_like(codes, UNKNOWN)
    known[0] = 7
    known[1, 0] = codes[1, 0]
    drawn = draw(model, sampling, known=known)
    assert torch.equal(drawn[0], known[0])
    assert torch.equal(drawn[1:], codes[1:])


def reference(model, label, seed, known):
    """No cache, without guidance: the whole sequence again for every code."""
    alone = torch.tensor([label])
    codes = torch.zeros(1, 0, dtype=torch.int64)
    uniforms = uniform_draws([seed], known.numel())[0]
    for index, own in enumerate(known.flatten().tolist()):
        if own == UNKNOWN:
            logits = model(codes, alone)[:, -1]
            own = int(sample_codes(logits, Filters.of([PLAIN]), uniforms[index : index + 1]))
        codes = torch.cat([codes, torch.tensor([[own]])], dim=1)
    return codes.view_as(known)


@torch.no_grad()
def test_matches_uncached_with_scattered_known_codes(model):
    known = torch.full((3, 4, 4), UNKNOWN)
    known[:, 1:3] = torch.arange(24).view(3, 2, 4)
    known[1, 2, 1] = UNKNOWN
    drawn = draw(model, PLAIN, known=known)
    for codes, label, seed, given in zip(drawn, LABELS, SEEDS, known, strict=True):
        assert torch.equal(codes, reference(model, int(label), seed, given))


def test_rows_are_reported_as_they_finish(model):
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
        (torch.zeros(2, 4, 4), "2 known codes for 3 images"),
        (torch.full((3, 4, 4), 64), "reach from 64 to 64, expected codes below 64"),
        (torch.full((3, 4, 4), -2), "reach from -2 to -2"),
    ],
)
def test_rejects_bad_known_codes(model, known, message):
    with pytest.raises(InputError, match=message):
        draw(model, PLAIN, known=known)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, STOPPED])
def test_blend_shares_of_none_and_all_match_either_condition(model, sampling):
    others = [1, 1, 2]

    def generate(labels, **blend):
        requests = [
            GenerationRequest(
                condition=torch.tensor(label),
                seed=seed,
                sampling=sampling,
                **{name: value[index] for name, value in blend.items()},
            )
            for index, (label, seed) in enumerate(zip(labels, SEEDS, strict=True))
        ]
        return NativeEngine(model).generate(requests)

    blend = [torch.tensor(other) for other in others]
    nothing = generate(LABELS.tolist(), blend=blend, blend_share=[0.0] * 3)
    assert torch.equal(nothing, draw(model, sampling))
    everything = generate(LABELS.tolist(), blend=blend, blend_share=[1.0] * 3)
    assert torch.equal(everything, draw(model, sampling, condition=torch.tensor(others)))


@torch.no_grad()
def test_blend_mixes_logits():
    model = tiny_transformer(grid=(1, 1))
    labels, other = torch.tensor([0]), torch.tensor([3])
    empty = torch.zeros(1, 0, dtype=torch.int64)
    none = torch.tensor([model.config.num_classes])
    a, b, u = (model(empty, each)[0, -1] for each in (labels, other, none))
    mixed = 0.7 * a + 0.3 * b
    wanted = (u + 3.0 * (mixed - u)).softmax(-1)
    count = 4000
    requests = [
        GenerationRequest(
            condition=labels[0],
            seed=seed,
            sampling=SamplingConfig(guidance_scale=3.0),
            blend=other[0],
            blend_share=0.3,
        )
        for seed in range(count)
    ]
    codes = NativeEngine(model).generate(requests, batch_size=1000)
    found = codes.flatten().bincount(minlength=64) / count
    # Five standard deviations of each code's share.
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((found - wanted).abs() < 5 * spread + 1e-3).all())


def test_blends_of_texts_of_different_lengths():
    model = tiny_transformer(condition="text")
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 16, generator=generator)
    blended = GenerationRequest(
        condition=first[4:], seed=1, sampling=PLAIN, blend=second[1:], blend_share=1.0
    )
    alone = GenerationRequest(condition=second[1:], seed=1, sampling=PLAIN)
    engine = NativeEngine(model)
    assert torch.equal(engine.generate([blended]), engine.generate([alone]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blend_share": 1.5}, r"blend_share is 1.5, expected a number from 0 to 1"),
        ({"blend": torch.tensor(9)}, "class labels run from 9 to 9"),
        ({"blend": torch.tensor([1, 2])}, "class labels have shape"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_rejects_bad_requests(model, values, message):
    with pytest.raises(InputError, match=message):
        NativeEngine(model).check(GenerationRequest(condition=torch.tensor(0), seed=0, **values))
