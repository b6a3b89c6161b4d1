"""Draws of the kernels: the codes that torch's ladder of filters draws."""

import itertools

import pytest
import torch
from llamagen.backends.cuda_graphs import Recorder
from llamagen.generation.draws import GraphDraws, KernelDraws, TorchDraws, draws_for

from llamagen.config import SamplingConfig
from tests.backends.tape import Tape
from tests.backends.variants import VARIANTS, kernels_of

CODES = 4096
SETTINGS = [
    SamplingConfig(guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for scale, temperature, top_k, top_p in itertools.product(
        (1.0, 0.0, 4.0), (1.0, 0.7, 0.0), (0, 1, 100, CODES, 2 * CODES), (1.0, 0.9, 0.3, 1e-6)
    )
]


def both(sampling, variant="native", rows=None):
    count = len(sampling)
    unconditional = [
        None if each.guidance_scale == 1.0 else count + i for i, each in enumerate(sampling)
    ]
    rows = rows or range(count)
    return (
        TorchDraws(sampling, rows, unconditional, torch.device("cpu")),
        KernelDraws(sampling, rows, unconditional, kernels_of(variant)),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_codes(variant):
    generator = torch.Generator().manual_seed(0)
    draws = both(SETTINGS, variant)
    same = []
    for _ in range(4):
        logits = torch.randn(2 * len(SETTINGS), CODES, generator=generator) * 3
        uniforms = torch.rand(len(SETTINGS), generator=generator)
        (wanted, usable), (found, ours) = (draw(logits, logits, uniforms) for draw in draws)
        assert usable.all()
        assert ours.all()
        same.append(wanted == found)
    # A number can fall between two codes to the last digit.
    assert torch.cat(same).float().mean() > 0.997


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 7])
def test_every_code_is_drawn_as_often_as_it_should(top_k, top_p):
    codes, count = 32, 20000
    sampling = SamplingConfig(guidance_scale=1.0, top_k=top_k, top_p=top_p)
    logits = torch.randn(1, codes, generator=torch.Generator().manual_seed(1))
    draw = KernelDraws([sampling] * count, [0] * count, [None] * count, kernels_of("native"))
    # Uniforms at equal distances: counts are exact to one.
    drawn, _ = draw(logits, logits, (torch.arange(count) + 0.5) / count)
    found = torch.bincount(drawn, minlength=codes)
    kept = logits[0].softmax(-1)
    ordered = kept.sort(descending=True)
    if top_k:
        kept = torch.where(kept >= ordered.values[top_k - 1], kept, 0)
        kept = kept / kept.sum()
    if top_p < 1:
        values, order = kept.sort(descending=True)
        behind = values.cumsum(0) - values > top_p
        kept = kept.scatter(0, order[behind], 0.0)
    wanted = kept / kept.sum() * count
    assert (found - wanted).abs().max() < 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 20, 31])
def test_top_k_of_numbers_of_every_kind(k, variant):
    # Ties, among them of both zeros, and below all others one number again and again.
    numbers = [0.5, 1e-6, 1e-20, 0.0, -0.0, -1e-20, -1e-6, 0.5]
    logits = torch.tensor([numbers + [-0.5] * 24])
    sampling = SamplingConfig(guidance_scale=1.0, top_k=k)
    kept = logits[0] >= logits[0].sort(descending=True).values[k - 1]
    draw = KernelDraws([sampling] * 1000, [0] * 1000, [None] * 1000, kernels_of(variant))
    drawn, _ = draw(logits, logits, torch.arange(1000) / 1000)
    assert set(drawn.tolist()) == set(kept.nonzero().flatten().tolist())


def test_ties_are_kept_together():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0] + [0.0] * 12])
    sampling = SamplingConfig(guidance_scale=1.0, top_k=2)
    draw = KernelDraws([sampling] * 300, [0] * 300, [None] * 300, kernels_of("native"))
    drawn, _ = draw(logits, logits, torch.arange(300) / 300)
    assert set(drawn.tolist()) == {0, 2, 3}


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_ends_of_the_interval_draw_a_code_that_can_be_drawn(uniform):
    logits = torch.full((1, 512), -1e4)
    logits[0, [100, 400]] = 5.0
    sampling = SamplingConfig(guidance_scale=1.0, top_k=2)
    draw = KernelDraws([sampling], [0], [None], kernels_of("native"))
    drawn, _ = draw(logits, logits, torch.tensor([uniform]))
    assert drawn.item() == (100 if uniform == 0.0 else 400)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_images_with_logits_that_are_not_finite_are_named(wrong):
    logits = torch.zeros(3, 64)
    logits[1, 5] = wrong
    sampling = [SamplingConfig(guidance_scale=1.0)] * 3
    draw = KernelDraws(sampling, range(3), [None] * 3, kernels_of("native"))
    drawn, finite = draw(logits, logits, torch.full((3,), 0.5))
    assert finite.tolist() == [True, False, True]
    assert 0 <= drawn.min()
    assert drawn.max() < 64


def test_rows_in_any_order_and_views():
    sampling = [SamplingConfig(guidance_scale=3.0)] * 4
    wide = torch.randn(4, 200, generator=torch.Generator().manual_seed(2))
    conditional, unconditional = wide[:, :64], wide[:, 64:128]
    uniforms = torch.rand(4, generator=torch.Generator().manual_seed(3))
    order = [2, 0, 3, 1]
    for kind in (
        TorchDraws(sampling, order, order, torch.device("cpu")),
        KernelDraws(sampling, order, order, kernels_of("native")),
    ):
        drawn, _ = kind(conditional, unconditional, uniforms)
        alone = [
            TorchDraws(sampling[:1], [0], [0], torch.device("cpu"))(
                conditional[row : row + 1], unconditional[row : row + 1], uniforms[i : i + 1]
            )[0].item()
            for i, row in enumerate(order)
        ]
        assert drawn.tolist() == alone


def test_small_codebooks_are_left_to_torch():
    found = draws_for([SamplingConfig()], [0], [1], codebook_size=20, device=torch.device("cpu"))
    assert isinstance(found, TorchDraws)


MIXED = [
    SamplingConfig(guidance_scale=4.0, top_k=20),
    SamplingConfig(guidance_scale=1.0, temperature=0.0),
    SamplingConfig(guidance_scale=2.0, temperature=0.7, top_p=0.9),
    SamplingConfig(guidance_scale=1.0, top_k=5, top_p=0.5),
]


def settings_of(kind):
    """Settings, and the rows of unconditional logits: alike for all images or not."""
    if kind == "mixed":
        return MIXED, [4, None, 5, None]
    return [{"guided": MIXED[0], "greedy": MIXED[1], "likely": MIXED[2]}[kind]] * 4, range(4, 8)


@pytest.mark.parametrize("kind", ["guided", "greedy", "likely", "mixed"])
def test_recorded_draws(kind):
    sampling, others = settings_of(kind)
    plain = TorchDraws(sampling, range(4), others, torch.device("cpu"))
    tape = Tape()
    draws = GraphDraws(plain, 4, torch.device("cpu"), Recorder(tape, most=4, after=2))
    generator = torch.Generator().manual_seed(0)
    logits, elsewhere = torch.empty(8, 64), torch.empty(8, 64)
    uniforms = torch.rand(10, 4, generator=generator)
    kept = []
    for step in range(10):
        # The first logits come from the condition, not from the decoder.
        own = elsewhere if step == 0 else logits
        own.copy_(torch.randn(8, 64, generator=generator) * 3)
        if step == 6:
            own[2, 3] = torch.nan
        kept.append((draws(own, own, uniforms[step]), plain(own, own, uniforms[step])))
    for found, wanted in kept:  # what was drawn stays
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    assert (tape.rehearsed, tape.recorded, tape.played) == (3, 1, 7)


@pytest.mark.parametrize("kind", ["guided", "greedy", "likely", "mixed"])
def test_torch_draws_without_reading_from_the_device(kind):
    # Tensors on "meta" have no numbers to be read, and go with no tensors elsewhere.
    sampling, others = settings_of(kind)
    draws = TorchDraws(sampling, range(4), others, torch.device("meta"))
    logits = torch.zeros(8, CODES, device="meta")
    codes, finite = draws(logits, logits, torch.zeros(4, device="meta"))
    assert codes.shape == finite.shape == (4,)


def test_no_draws_are_recorded_for_a_cpu():
    found = draws_for([SamplingConfig()], [0], [1], codebook_size=20, device=torch.device("cpu"))
    assert not isinstance(found, GraphDraws)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["guided", "greedy", "likely", "mixed"])
@torch.inference_mode()
def test_gpu_draws_do_not_wait(kind, monkeypatch):
    sampling, others = settings_of(kind)
    device = torch.device("cuda")
    draws = draws_for(sampling, range(4), others, codebook_size=CODES, device=device)
    assert isinstance(draws, GraphDraws)
    monkeypatch.setenv("LLAMAGEN_CUDA_GRAPHS", "off")
    plain = draws_for(sampling, range(4), others, codebook_size=CODES, device=device)
    assert isinstance(plain, TorchDraws)
    logits = torch.empty(8, CODES, device=device)
    uniforms = torch.rand(40, 4, device=device)
    draws(logits.normal_(), logits, uniforms[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            (draws(logits.normal_(), logits, each), plain(logits, logits, each))
            for each in uniforms
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for own, wanted in found:
        assert torch.equal(own[0], wanted[0])
        assert torch.equal(own[1], wanted[1])
