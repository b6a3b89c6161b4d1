import copy

import pytest
import torch

from llamagen.backends import ReferenceStep
from llamagen.config import SamplingConfig
from llamagen.generation import apply_guidance, batch, generate_codes, sample_codes, uniform_draws
from llamagen.generation.sampling import Filters
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

SAMPLING = SamplingConfig(guidance_scale=3.0, top_k=20, top_p=0.95, temperature=0.9)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


def reference_codes(model, label, seed, sampling):
    """No cache, no batch: the whole sequence again for every code."""
    uniforms = uniform_draws([seed], model.config.num_codes)[0]
    codes = torch.zeros(1, 0, dtype=torch.int64)
    label, none = torch.tensor([label]), torch.tensor([model.config.num_classes])
    for index in range(model.config.num_codes):
        logits = model(codes, label)[:, -1]
        if sampling.guidance_stop is None or index < sampling.guidance_stop:
            logits = apply_guidance(logits, model(codes, none)[:, -1], sampling.guidance_scale)
        filters = Filters.of([sampling])
        drawn = sample_codes(logits, filters, uniforms[index : index + 1])
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes[0]


@torch.no_grad()
@pytest.mark.parametrize("stop", [None, 0, 1, 7, 16])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_cached_and_batched_matches_uncached(stop, kv_heads):
    model = tiny_transformer(kv_heads=kv_heads)
    sampling = SamplingConfig(guidance_scale=3.0, guidance_stop=stop, top_k=20, top_p=0.95)
    labels, seeds = [0, 3, 4], [11, 5, 99]
    codes = generate_codes(model, torch.tensor(labels), seeds=seeds, sampling=sampling)
    assert codes.shape == (3, 4, 4)
    for row, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        assert torch.equal(codes[row].flatten(), reference_codes(model, label, seed, sampling))


def test_image_does_not_depend_on_its_batch(model):
    labels = torch.arange(5).repeat(4)
    seeds = list(range(100, 120))
    together = generate_codes(model, labels, seeds=seeds, sampling=SAMPLING)
    for i in (0, 7, 19):
        alone = generate_codes(model, labels[i : i + 1], seeds=[seeds[i]], sampling=SAMPLING)
        assert torch.equal(alone[0], together[i])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 20


def test_leaves_no_state_on_the_model(model):
    attributes = set(vars(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate_codes(model, torch.tensor([1]), seeds=[0], sampling=SAMPLING)
    assert set(vars(model)) == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # A training step right after sampling: nothing made in inference mode may be in the way.
    trained = copy.deepcopy(model).train()
    trained(torch.zeros(2, 15, dtype=torch.int64), torch.tensor([0, 1])).sum().backward()
    assert trained.tok_embeddings.weight.grad is not None


def test_rows_are_reported_as_they_finish(model):
    seen = []
    codes = generate_codes(
        model,
        torch.tensor([0, 1]),
        seeds=[0, 1],
        sampling=SAMPLING,
        on_row=lambda row, partial: seen.append((row, partial.clone())),
    )
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    for row, partial in seen:
        assert torch.equal(partial[:, :row], codes[:, :row])
        assert not partial[:, row:].any()


def test_unguided_images_take_one_sequence(model, monkeypatch):
    sizes = []

    class CountingStep(ReferenceStep):
        def __call__(self, tokens, cache, grid):
            sizes.append(len(tokens))
            return super().__call__(tokens, cache, grid)

    monkeypatch.setattr(batch, "fastest_step", lambda model, times: CountingStep(model))
    plain = SamplingConfig(guidance_scale=1.0)
    generate_codes(model, torch.tensor([0, 1]), seeds=[0, 1], sampling=plain)
    assert sizes == [2] * 16
    sizes.clear()
    stopped = SamplingConfig(guidance_scale=2.0, guidance_stop=5)
    generate_codes(model, torch.tensor([0, 1]), seeds=[0, 1], sampling=stopped)
    assert sizes == [4] * 5 + [2] * 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype):
    model = tiny_transformer().to(dtype)
    codes = generate_codes(model, torch.tensor([0, 1]), seeds=[0, 1], sampling=SAMPLING)
    assert codes.shape == (2, 4, 4)
    again = generate_codes(model, torch.tensor([1]), seeds=[1], sampling=SAMPLING)
    assert torch.equal(again[0], codes[1])


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 5)])
def test_grids_other_than_square(grid):
    model = tiny_transformer(grid=grid)
    codes = generate_codes(model, torch.tensor([2]), seeds=[3], sampling=SAMPLING)
    assert codes.shape == (1, *grid)
    expected = reference_codes(model, 2, 3, SAMPLING) if grid else None
    assert torch.equal(codes.flatten(), expected)


def test_text_prompts_of_different_lengths_in_one_batch():
    model = tiny_transformer(condition="text")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 16, generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    codes = generate_codes(model, features, condition_mask=mask, seeds=[0, 1, 2], sampling=SAMPLING)
    for row in range(3):
        own = features[row : row + 1, -int(mask[row].sum()) :]
        alone = generate_codes(model, own, seeds=[row], sampling=SAMPLING)
        assert torch.equal(alone[0], codes[row])


def test_negative_condition_replaces_no_class(model):
    away = SamplingConfig(guidance_scale=3.0)
    default = generate_codes(model, torch.tensor([0]), seeds=[0], sampling=away)
    none = torch.tensor([model.config.num_classes])
    explicit = generate_codes(
        model, torch.tensor([0]), seeds=[0], sampling=away, unconditional=none
    )
    other = generate_codes(
        model, torch.tensor([0]), seeds=[0], sampling=away, unconditional=torch.tensor([3])
    )
    assert torch.equal(default, explicit)
    assert not torch.equal(default, other)


def test_rejects_bad_conditions_and_seeds(model):
    with pytest.raises(InputError, match="classes 0 to 4"):
        generate_codes(model, torch.tensor([9]), seeds=[0])
    with pytest.raises(InputError, match="2 seeds for 1 images"):
        generate_codes(model, torch.tensor([0]), seeds=[0, 1])
    with pytest.raises(InputError, match="integer"):
        generate_codes(model, torch.tensor([0.5]), seeds=[0])
    text = tiny_transformer(condition="text")
    with pytest.raises(InputError, match="text features"):
        generate_codes(text, torch.zeros(1, 6, 8), seeds=[0])
    with pytest.raises(InputError, match="mask"):
        generate_codes(text, torch.zeros(1, 6, 16), seeds=[0], condition_mask=torch.ones(1, 5))


def test_rejects_logits_that_are_not_finite():
    model = tiny_transformer()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        generate_codes(model, torch.tensor([0]), seeds=[0])


@pytest.mark.gpu
def test_gpu_matches_cpu(model):
    greedy = SamplingConfig(guidance_scale=2.0, temperature=0.0)
    labels = torch.arange(5)
    on_cpu = generate_codes(model, labels, seeds=range(5), sampling=greedy)
    on_gpu = generate_codes(copy.deepcopy(model).cuda(), labels, seeds=range(5), sampling=greedy)
    assert torch.equal(on_gpu.cpu(), on_cpu)
