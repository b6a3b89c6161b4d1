"""Codes drawn several at a time are those drawn one by one."""

import copy
import itertools

import pytest
import torch

from llamagen.backends.decoder import CpuDecoder, TorchDecoder
from llamagen.config import SamplingConfig
from llamagen.generation import generate_codes, guide, speculative
from llamagen.generation.filters import code_probabilities
from llamagen.generation.speculative import generate_codes_in_parallel
from llamagen.support.errors import InputError, NotFiniteError
from tests.backends.variants import kernels_of
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
SAMPLES = 20_000


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture(scope="module")
def few_codes():
    """Six codes of three kinds, whose probabilities change much with those before them."""
    model = tiny_transformer(
        codebook_size=3, grid=(2, 3), dim=16, heads=2, hidden_dim=32, num_classes=2
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
        mixed = guide(logits, model(images[:, :-1], none), sampling.guidance_scale)
        stop = count if sampling.guidance_stop is None else sampling.guidance_stop
        logits = torch.cat([mixed[:, :stop], logits[:, stop:]], dim=1)
    each = code_probabilities(logits, sampling).gather(-1, images.unsqueeze(-1))
    return each.double().prod(1).squeeze(-1)


def counts_of_images(model, label, sampling, window):
    """How often each image is drawn, (V ^ T,)."""
    size, count = model.config.codebook_size, model.config.num_codes
    powers = size ** torch.arange(count - 1, -1, -1)
    labels = torch.full((SAMPLES,), label)
    drawn = generate_codes_in_parallel(
        model, labels, window=window, seeds=range(SAMPLES), sampling=sampling
    )
    assert max(drawn.passes) <= count
    assert min(drawn.passes) < count
    return (drawn.codes.flatten(1) * powers).sum(1).bincount(minlength=size**count)


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
def test_whole_images_follow_the_models_distribution(few_codes, sampling, window):
    wanted = exact_distribution(few_codes, 1, sampling)
    assert wanted.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square_p(counts_of_images(few_codes, 1, sampling, window), wanted) > 1e-3


def test_the_test_would_find_numbers_that_depend_on_each_other(few_codes, monkeypatch):
    real = speculative.uniform_draws

    def nearly_alike(seeds, count):
        numbers = real(seeds, count)
        return (numbers[:, :1] + 0.5 * numbers) % 1

    monkeypatch.setattr(speculative, "uniform_draws", nearly_alike)
    wanted = exact_distribution(few_codes, 1, PLAIN)
    assert chi_square_p(counts_of_images(few_codes, 1, PLAIN, 5), wanted) < 1e-9


def test_the_test_would_find_codes_that_are_believed_too_early(few_codes, monkeypatch):
    """A pass makes all of its codes final, right or not."""
    monkeypatch.setattr(speculative, "_unchanged", lambda _, codes: len(codes))
    wanted = exact_distribution(few_codes, 1, PLAIN)
    assert chi_square_p(counts_of_images(few_codes, 1, PLAIN, 5), wanted) < 1e-9


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, FILTERED, STOPPED])
def test_the_same_seed_gives_the_same_image(model, sampling, window):
    labels, seeds = torch.arange(15) % 5, range(30, 45)
    wanted = generate_codes(model, labels, seeds=seeds, sampling=sampling)
    drawn = generate_codes_in_parallel(model, labels, window=window, seeds=seeds, sampling=sampling)
    assert torch.equal(drawn.codes, wanted)


def test_windows_grow_where_drafts_hold_and_end_where_they_do_not():
    width = speculative._Window(None, 2)
    for _ in range(20):
        width.learn(width.width(), [width.width()])
    assert width.width() == width.most == 16
    for passes in range(40):
        if width.width() > 1:
            last = passes
        width.learn(width.width(), [1])
    assert width.width() == 1
    assert last < 40 - 1
    assert speculative._Window(None, 40).width() == 1
    assert speculative._Window(7, 40).width() == 7


def test_looking_ahead_pays_for_few_images_on_tiles(monkeypatch):
    fits = tiny_transformer(dim=64, heads=2).bfloat16()
    with_tiles = kernels_of("tiles")
    monkeypatch.setattr(speculative, "decoder_for", lambda model: CpuDecoder(model, with_tiles))
    assert speculative.looking_ahead_pays(fits, 4, GUIDED)
    assert speculative.looking_ahead_pays(fits, 8, PLAIN)
    assert not speculative.looking_ahead_pays(fits, 5, GUIDED)
    assert not speculative.looking_ahead_pays(fits.float(), 1, PLAIN)
    monkeypatch.setattr(speculative, "decoder_for", TorchDecoder)
    assert not speculative.looking_ahead_pays(fits, 1, PLAIN)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("stop", [None, 0, 1, 6, 16])
def test_the_most_likely_codes_are_those_drawn_one_by_one(model, window, stop):
    sampling = SamplingConfig(guidance_scale=3.0, guidance_stop=stop, temperature=0.0)
    labels, seeds = torch.arange(5), range(5)
    wanted = generate_codes(model, labels, seeds=seeds, sampling=sampling)
    drawn = generate_codes_in_parallel(model, labels, window=window, seeds=seeds, sampling=sampling)
    assert torch.equal(drawn.codes, wanted)
    assert max(drawn.passes) <= 16
    if window == 1:
        assert drawn.passes == (16,) * 5
    else:
        assert min(drawn.passes) < 16


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED, FILTERED, STOPPED])
def test_an_image_is_the_same_whatever_else_is_in_the_batch(model, sampling):
    labels = torch.arange(5).repeat(3)
    seeds = list(range(100, 115))
    together = generate_codes_in_parallel(model, labels, window=4, seeds=seeds, sampling=sampling)
    for i in (0, 7, 14):
        alone = generate_codes_in_parallel(
            model, labels[i : i + 1], window=4, seeds=[seeds[i]], sampling=sampling
        )
        assert torch.equal(alone.codes[0], together.codes[i])
        assert alone.passes == together.passes[i : i + 1]
    assert len({tuple(image.flatten().tolist()) for image in together.codes}) == 15


def test_texts_of_different_lengths_and_negative_prompts():
    model = tiny_transformer(condition="text", kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    features, against = torch.randn(2, 3, 6, 16, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    other = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
    texts = {
        "condition_mask": mask,
        "unconditional": against,
        "unconditional_mask": other,
        "seeds": range(3),
        "sampling": SamplingConfig(guidance_scale=2.0, temperature=0.0),
    }
    drawn = generate_codes_in_parallel(model, features, window=4, **texts)
    assert torch.equal(drawn.codes, generate_codes(model, features, **texts))
    mask[1] = 0
    with pytest.raises(InputError, match="leaves no text feature"):
        generate_codes_in_parallel(model, features, window=4, **texts)


def test_what_is_finished_leaves_the_forward_pass(model, monkeypatch):
    sizes = []
    real = model.extend
    monkeypatch.setattr(speculative, "decoder_for", TorchDecoder)
    monkeypatch.setattr(
        model, "extend", lambda codes, slots: sizes.append(codes.shape) or real(codes, slots)
    )
    sampling = SamplingConfig(guidance_scale=2.0, guidance_stop=5, top_k=2, temperature=0.5)
    labels = torch.arange(5)
    drawn = generate_codes_in_parallel(model, labels, window=4, seeds=range(5), sampling=sampling)
    assert len(sizes) == max(drawn.passes) - 1
    # The first pass of all has no window: it is the condition's.
    running = [sum(passes > number for passes in drawn.passes) for number in range(1, 16)]
    rows = [rows for rows, _ in sizes]
    assert rows[0] == 10
    assert rows[-1] == running[len(rows) - 1]
    assert rows == sorted(rows, reverse=True)
    assert all(width <= 4 for _, width in sizes)


def test_codes_that_do_not_depend_on_each_other_need_few_passes(model):
    alike = tiny_transformer()
    torch.nn.init.zeros_(alike.output.weight)
    drawn = generate_codes_in_parallel(
        alike, torch.arange(5), window=15, seeds=range(5), sampling=PLAIN
    )
    # The condition's; one that replaces the guesses; one that keeps all it has drawn.
    assert max(drawn.passes) <= 4


def test_rows_are_reported_as_they_finish(model):
    seen = []
    drawn = generate_codes_in_parallel(
        model,
        torch.arange(4),
        window=9,
        seeds=range(4),
        sampling=SamplingConfig(guidance_scale=1.5, top_k=2, temperature=0.2),
        on_row=lambda row, partial: seen.append((row, partial.clone())),
    )
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    for row, partial in seen:
        assert torch.equal(partial[:, :row], drawn.codes[:, :row])
        assert not partial[:, row:].any()


@pytest.mark.parametrize("grid", [(1, 1), (2, 8), (1, 5), (5, 1)])
def test_other_grids(grid):
    model = tiny_transformer(grid=grid)
    greedy = SamplingConfig(guidance_scale=2.0, temperature=0.0)
    wanted = generate_codes(model, torch.tensor([2]), seeds=[3], sampling=greedy)
    drawn = generate_codes_in_parallel(
        model, torch.tensor([2]), window=3, seeds=[3], sampling=greedy
    )
    assert torch.equal(drawn.codes, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype):
    model = tiny_transformer().to(dtype)
    drawn = generate_codes_in_parallel(
        model, torch.tensor([0, 1]), window=4, seeds=[0, 1], sampling=FILTERED
    )
    assert drawn.codes.shape == (2, 4, 4)


def test_what_cannot_be_drawn_is_refused(model):
    with pytest.raises(InputError, match="window is 0"):
        generate_codes_in_parallel(model, torch.tensor([0]), window=0, seeds=[0])
    with pytest.raises(InputError, match="2 seeds for 1 images"):
        generate_codes_in_parallel(model, torch.tensor([0]), window=2, seeds=[0, 1])
    with pytest.raises(InputError, match="seed is -1"):
        generate_codes_in_parallel(model, torch.tensor([0]), window=2, seeds=[-1])


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_transformer()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        generate_codes_in_parallel(model, torch.tensor([0]), window=4, seeds=[0])


def test_logits_of_drafts_that_did_not_hold_may_be_anything(model, monkeypatch):
    """Behind a change the context was wrong, and what comes of it is not the image's."""
    greedy = SamplingConfig(guidance_scale=1.0, temperature=0.0)
    labels = torch.arange(5)
    wanted = generate_codes(model, labels, seeds=range(5), sampling=greedy)
    extend = model.extend

    def broken(codes, slots):
        logits = extend(codes, slots)
        follow = image[slots.lengths[0] - 1 :][: codes.shape[1]]
        right = (codes[0, : len(follow)] == follow).cumprod(0).sum()
        logits[:, right:] = torch.nan
        return logits

    monkeypatch.setattr(speculative, "decoder_for", TorchDecoder)
    monkeypatch.setattr(model, "extend", broken)
    for row, image in enumerate(wanted.flatten(1)):
        drawn = generate_codes_in_parallel(
            model, labels[row : row + 1], window=5, seeds=[row], sampling=greedy
        )
        assert torch.equal(drawn.codes.flatten(), image)


@pytest.mark.gpu
def test_the_gpu_draws_the_same_codes(model):
    greedy = SamplingConfig(guidance_scale=2.0, guidance_stop=7, temperature=0.0)
    settings = {"seeds": range(5), "sampling": greedy, "window": 4}
    on_cpu = generate_codes_in_parallel(model, torch.arange(5), **settings)
    on_gpu = generate_codes_in_parallel(copy.deepcopy(model).cuda(), torch.arange(5), **settings)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
