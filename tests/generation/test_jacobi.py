"""Codes sampled several per pass are those sampled one by one."""

import copy
import itertools

import pytest
import torch

from llamagen.backends import ReferenceStep
from llamagen.config import SamplingConfig
from llamagen.generation import GenerationRequest, apply_guidance, batch, generate_codes
from llamagen.generation.batch import Batch
from llamagen.generation.sampling import Filters
from llamagen.generation.schedules.jacobi import JacobiSchedule
from llamagen.support.errors import InputError, NotFiniteError
from tests.tiny_models import tiny_transformer

PLAIN = SamplingConfig(guidance_scale=1.0)
GUIDED = SamplingConfig(guidance_scale=2.5)
FILTERED = SamplingConfig(guidance_scale=1.8, temperature=1.3, top_k=2, top_p=0.9)
STOPPED = SamplingConfig(guidance_scale=3.0, guidance_stop=3)
EXACTLY = [
    pytest.param(PLAIN, 2, id="plain, window of 2"),
    pytest.param(PLAIN, 5, id="plain, all at once"),
    pytest.param(GUIDED, 3, id="guided, window of 3"),
    pytest.param(FILTERED, 4, id="filtered, window of 4"),
    pytest.param(STOPPED, 2, id="stopped, window of 2"),
    pytest.param(STOPPED, 5, id="stopped, all at once"),
]
SAMPLES = 7000
"""Nearly thirty of each of the 3^5 images, were all as likely."""


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture(scope="module")
def few_codes():
    """Five codes of three kinds, whose probabilities change much with those before them."""
    model = tiny_transformer(
        codebook_size=3, grid=(1, 5), dim=16, heads=2, hidden_dim=32, num_classes=2
    )
    with torch.no_grad():
        model.tok_embeddings.weight *= 5
        model.output.weight *= 2
    return model


@torch.no_grad()
def exact_distribution(model, label, sampling):
    """Probabilities of all images, (V ^ T,), those with small first codes first."""
    size, count = model.config.codebook_size, model.config.num_codes
    images = torch.tensor(list(itertools.product(range(size), repeat=count)))  # (V ^ T, T)
    logits = model(images[:, :-1], torch.tensor([label]).expand(len(images)))
    if sampling.guided:
        none = torch.tensor([model.config.num_classes]).expand(len(images))
        mixed = apply_guidance(logits, model(images[:, :-1], none), sampling.guidance_scale)
        stop = count if sampling.guidance_stop is None else sampling.guidance_stop
        logits = torch.cat([mixed[:, :stop], logits[:, stop:]], dim=1)
    probabilities = Filters.of([sampling])(logits).softmax(-1)
    each = probabilities.gather(-1, images.unsqueeze(-1))
    return each.double().prod(1).squeeze(-1)


def passes_of(model, labels, seeds, sampling, window):
    """Forward passes that each image takes part in; one by one it is one per code."""
    requests = [
        GenerationRequest(condition=label, seed=seed, sampling=sampling, window=window)
        for label, seed in zip(labels, seeds, strict=True)
    ]
    running = Batch(model, len(requests))
    images = running.add(requests)
    passes = [1] * len(images)
    while not all(image.is_finished for image in images):
        for number, image in enumerate(images):
            passes[number] += not image.is_finished
        running.step()
    return passes


def counts_of_images(model, label, sampling, window):
    """How often each image is drawn, (V ^ T,)."""
    size, count = model.config.codebook_size, model.config.num_codes
    powers = size ** torch.arange(count - 1, -1, -1)
    labels = torch.full((SAMPLES,), label)
    drawn = generate_codes(model, labels, window=window, seeds=range(SAMPLES), sampling=sampling)
    return (drawn.flatten(1) * powers).sum(1).bincount(minlength=size**count)


def chi_square_p(counts, probabilities):
    """Pearson's test; outcomes expected less than ten times count as one."""
    counts, expected = counts.double(), probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0, "an image was drawn that cannot be"
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)])
    expected = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.mark.parametrize(("sampling", "window"), EXACTLY)
def test_images_follow_the_distribution_of_the_model(few_codes, sampling, window):
    wanted = exact_distribution(few_codes, 1, sampling)
    assert wanted.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square_p(counts_of_images(few_codes, 1, sampling, window), wanted) > 1e-3


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, FILTERED, STOPPED])
def test_matches_raster(model, sampling, window):
    labels, seeds = torch.arange(15) % 5, range(30, 45)
    wanted = generate_codes(model, labels, seeds=seeds, sampling=sampling)
    drawn = generate_codes(model, labels, window=window, seeds=seeds, sampling=sampling)
    assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("stop", [None, 0, 1, 6, 16])
def test_greedy_codes_match_raster(model, window, stop):
    sampling = SamplingConfig(guidance_scale=3.0, guidance_stop=stop, temperature=0.0)
    labels, seeds = torch.arange(5), range(5)
    wanted = generate_codes(model, labels, seeds=seeds, sampling=sampling)
    drawn = generate_codes(model, labels, window=window, seeds=seeds, sampling=sampling)
    assert torch.equal(drawn, wanted)
    passes = passes_of(model, labels, seeds, sampling, window)
    assert max(passes) <= 16
    assert passes == [16] * 5 if window == 1 else min(passes) < 16


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, FILTERED, STOPPED])
def test_image_does_not_depend_on_its_batch(model, sampling):
    labels = torch.arange(5).repeat(3)
    seeds = list(range(100, 115))
    together = generate_codes(model, labels, window=4, seeds=seeds, sampling=sampling)
    for i in (0, 7, 14):
        alone = generate_codes(
            model, labels[i : i + 1], window=4, seeds=[seeds[i]], sampling=sampling
        )
        assert torch.equal(alone[0], together[i])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 15


def test_texts_of_different_lengths_and_negative_prompts():
    model = tiny_transformer(condition="text", kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    features, negative = torch.randn(2, 3, 6, 16, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    other = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
    texts = {
        "condition_mask": mask,
        "unconditional": negative,
        "unconditional_mask": other,
        "seeds": range(3),
        "sampling": SamplingConfig(guidance_scale=2.0, temperature=0.0),
    }
    drawn = generate_codes(model, features, window=4, **texts)
    assert torch.equal(drawn, generate_codes(model, features, **texts))
    mask[1] = 0
    with pytest.raises(InputError, match="leaves no text feature"):
        generate_codes(model, features, window=4, **texts)


def test_codes_that_do_not_depend_on_each_other_need_few_passes(model):
    alike = tiny_transformer()
    torch.nn.init.zeros_(alike.output.weight)
    passes = passes_of(alike, torch.arange(5), range(5), PLAIN, 15)
    # The condition's; one that replaces the guesses; one that keeps all it has drawn.
    assert max(passes) <= 4


def test_rows_are_reported_as_they_finish(model):
    seen = []
    drawn = generate_codes(
        model,
        torch.arange(4),
        window=9,
        seeds=range(4),
        sampling=SamplingConfig(guidance_scale=1.5, top_k=2, temperature=0.2),
        on_row=lambda row, partial: seen.append((row, partial.clone())),
    )
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    for row, partial in seen:
        assert torch.equal(partial[:, :row], drawn[:, :row])
        assert not partial[:, row:].any()


@pytest.mark.parametrize("grid", [(1, 1), (2, 8), (1, 5), (5, 1)])
def test_other_grids(grid):
    model = tiny_transformer(grid=grid)
    greedy = SamplingConfig(guidance_scale=2.0, temperature=0.0)
    wanted = generate_codes(model, torch.tensor([2]), seeds=[3], sampling=greedy)
    drawn = generate_codes(model, torch.tensor([2]), window=3, seeds=[3], sampling=greedy)
    assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype):
    model = tiny_transformer().to(dtype)
    drawn = generate_codes(model, torch.tensor([0, 1]), window=4, seeds=[0, 1], sampling=FILTERED)
    assert drawn.shape == (2, 4, 4)


def test_rejects_bad_input(model):
    with pytest.raises(InputError, match="window is 0"):
        generate_codes(model, torch.tensor([0]), window=0, seeds=[0])
    with pytest.raises(InputError, match="2 seeds for 1 images"):
        generate_codes(model, torch.tensor([0]), window=2, seeds=[0, 1])
    with pytest.raises(InputError, match="seed is -1"):
        generate_codes(model, torch.tensor([0]), window=2, seeds=[-1])


def test_rejects_logits_that_are_not_finite():
    model = tiny_transformer()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        generate_codes(model, torch.tensor([0]), window=4, seeds=[0])


@pytest.mark.gpu
def test_gpu_matches_cpu(model):
    greedy = SamplingConfig(guidance_scale=2.0, guidance_stop=7, temperature=0.0)
    settings = {"seeds": range(5), "sampling": greedy, "window": 4}
    on_cpu = generate_codes(model, torch.arange(5), **settings)
    on_gpu = generate_codes(copy.deepcopy(model).cuda(), torch.arange(5), **settings)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)


def test_window_grows_where_drafts_hold_and_ends_where_they_do_not():
    total = 10_000
    schedule = JacobiSchedule(total)
    schedule.first_pass()
    schedule.accept([0])
    for _ in range(20):
        one = schedule.next_pass(16)
        schedule.accept([0] * len(one.sample))
    assert len(schedule.next_pass(16).sample) == 16
    schedule = JacobiSchedule(total)
    schedule.first_pass()
    schedule.accept([0])
    widths = []
    for code in range(1, 60):
        widths.append(len(schedule.next_pass(16).sample))
        schedule.accept([code] * widths[-1])
    assert widths[0] > 1
    assert widths[-1] == 1
    fixed = JacobiSchedule(total, 7)
    fixed.first_pass()
    fixed.accept([0])
    assert len(fixed.next_pass(2).sample) == 7


@pytest.mark.parametrize(
    ("images", "sampling", "is_wide", "expected"),
    [
        (4, GUIDED, True, True),
        (8, PLAIN, True, True),
        (5, GUIDED, True, False),
        (1, PLAIN, False, False),
    ],
)
def test_looks_ahead_for_few_images_on_wide_backends(
    model, monkeypatch, images, sampling, is_wide, expected
):
    class Wide(ReferenceStep):
        pass

    Wide.is_wide = is_wide
    monkeypatch.setattr(batch, "fastest_step", lambda model, times: Wide(model))
    running = Batch(model, 16)
    requests = [
        GenerationRequest(condition=torch.tensor(0), seed=seed, sampling=sampling)
        for seed in range(images)
    ]
    states = running.add(requests)
    assert all(isinstance(state.schedule, JacobiSchedule) == expected for state in states)


def test_logits_behind_a_rejected_guess_may_be_anything(model, monkeypatch):
    greedy = SamplingConfig(guidance_scale=1.0, temperature=0.0)
    labels = torch.arange(5)
    wanted = generate_codes(model, labels, seeds=range(5), sampling=greedy, window=1)

    class Broken(ReferenceStep):
        def __call__(self, tokens, cache, grid):
            logits = super().__call__(tokens, cache, grid)
            if tokens.cells[0] >= 0:
                right = (tokens.ids == image[tokens.cells]).int().cumprod(0).sum()
                logits[right:] = torch.nan
            return logits

    monkeypatch.setattr(batch, "fastest_step", lambda model, times: Broken(model))
    for row, image in enumerate(wanted.flatten(1)):
        codes = generate_codes(model, labels[row : row + 1], window=5, seeds=[row], sampling=greedy)
        assert torch.equal(codes.flatten(), image)
