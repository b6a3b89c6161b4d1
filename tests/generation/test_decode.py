import copy

import pytest
import torch

from llamagen.backends.decoder import TorchDecoder
from llamagen.config import SamplingConfig
from llamagen.generation import filter_logits, generate_codes, guide, uniform_draws
from llamagen.generation.filters import draw_codes
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

SAMPLING = SamplingConfig(guidance_scale=3.0, top_k=20, top_p=0.95, temperature=0.9)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


def reference_codes(model, label, seed, sampling):
    """The obvious way: no cache, no batch, the whole sequence again for every code."""
    uniforms = uniform_draws([seed], model.config.num_codes)[0]
    codes = torch.zeros(1, 0, dtype=torch.int64)
    label, none = torch.tensor([label]), torch.tensor([model.config.num_classes])
    for index in range(model.config.num_codes):
        logits = model(codes, label)[:, -1]
        if sampling.guidance_stop is None or index < sampling.guidance_stop:
            logits = guide(logits, model(codes, none)[:, -1], sampling.guidance_scale)
        drawn = draw_codes(filter_logits(logits, sampling), uniforms[index : index + 1])
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes[0]


@torch.no_grad()
@pytest.mark.parametrize("stop", [None, 0, 1, 7, 16])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_cached_and_batched_equals_the_obvious_loop(stop, kv_heads):
    model = tiny_transformer(kv_heads=kv_heads)
    sampling = SamplingConfig(guidance_scale=3.0, guidance_stop=stop, top_k=20, top_p=0.95)
    labels, seeds = [0, 3, 4], [11, 5, 99]
    codes = generate_codes(model, torch.tensor(labels), seeds=seeds, sampling=sampling)
    assert codes.shape == (3, 4, 4)
    for row, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        assert torch.equal(codes[row].flatten(), reference_codes(model, label, seed, sampling))


def test_an_image_is_the_same_whatever_else_is_in_the_batch(model):
    labels = torch.arange(5).repeat(4)
    seeds = list(range(100, 120))
    together = generate_codes(model, labels, seeds=seeds, sampling=SAMPLING)
    for i in (0, 7, 19):
        alone = generate_codes(model, labels[i : i + 1], seeds=[seeds[i]], sampling=SAMPLING)
        assert torch.equal(alone[0], together[i])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 20


def test_the_model_holds_no_sampling_state(model):
    attributes = set(vars(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate_codes(model, torch.tensor([1]), seeds=[0], sampling=SAMPLING)
    assert set(vars(model)) == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # A training step right after sampling: nothing made in inference mode may be in the way.
    trained = copy.deepcopy(model).train()
    trained(torch.zeros(2, 15, dtype=torch.int64), torch.tensor([0, 1])).sum().backward()
    assert trained.tok_embeddings.weight.grad is not None


@torch.no_grad()
def test_two_generations_can_take_turns(model):
    first, second = model.new_cache(1), model.new_cache(2)
    a = model.prefill(torch.tensor([0]), first)
    b = model.prefill(torch.tensor([1, 2]), second)
    for _ in range(5):
        a = model.decode(a.argmax(-1, keepdim=True).view(1, 1), first)[:, -1]
        b = model.decode(b.argmax(-1).view(2, 1), second)[:, -1]
    alone = model.new_cache(1)
    expected = model.prefill(torch.tensor([0]), alone)
    for _ in range(5):
        expected = model.decode(expected.argmax(-1).view(1, 1), alone)[:, -1]
    assert torch.equal(a, expected)


@torch.no_grad()
def test_several_codes_at_once_and_rewinding(model):
    codes = torch.randint(0, 64, (2, 9))
    labels = torch.tensor([1, 2])
    expected = model(codes, labels)
    cache = model.new_cache(2)
    model.prefill(labels, cache)
    first = model.decode(codes[:, :4], cache)
    torch.testing.assert_close(first, expected[:, 1:5])
    model.decode(torch.randint(0, 64, (2, 3)), cache)
    cache.rewind(1 + 4)
    torch.testing.assert_close(model.decode(codes[:, 4:], cache), expected[:, 5:])


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


def test_no_guidance_takes_one_row_per_image(model, monkeypatch):
    sizes = []
    real = model.decode
    monkeypatch.setattr("llamagen.generation.decode.decoder_for", lambda m, **_: TorchDecoder(m))
    monkeypatch.setattr(
        model, "decode", lambda codes, cache: sizes.append(codes.shape[0]) or real(codes, cache)
    )
    plain = SamplingConfig(guidance_scale=1.0)
    generate_codes(model, torch.tensor([0, 1]), seeds=[0, 1], sampling=plain)
    assert set(sizes) == {2}
    sizes.clear()
    stopped = SamplingConfig(guidance_scale=2.0, guidance_stop=5)
    generate_codes(model, torch.tensor([0, 1]), seeds=[0, 1], sampling=stopped)
    assert sizes == [4] * 4 + [2] * 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype):
    model = tiny_transformer().to(dtype)
    codes = generate_codes(model, torch.tensor([0, 1]), seeds=[0, 1], sampling=SAMPLING)
    assert codes.shape == (2, 4, 4)
    again = generate_codes(model, torch.tensor([1]), seeds=[1], sampling=SAMPLING)
    assert torch.equal(again[0], codes[1])


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 5)])
def test_grids_that_are_not_square(grid):
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


def test_a_negative_condition_replaces_no_class(model):
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


def test_bad_conditions_and_seeds(model):
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


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_transformer()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        generate_codes(model, torch.tensor([0]), seeds=[0])


@pytest.mark.gpu
def test_the_gpu_draws_the_same_codes(model):
    greedy = SamplingConfig(guidance_scale=2.0, temperature=0.0)
    labels = torch.arange(5)
    on_cpu = generate_codes(model, labels, seeds=range(5), sampling=greedy)
    on_gpu = generate_codes(copy.deepcopy(model).cuda(), labels, seeds=range(5), sampling=greedy)
    assert torch.equal(on_gpu.cpu(), on_cpu)
