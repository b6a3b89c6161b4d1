"""Several codes per pass: images of a model of random order, alone and among others."""

import dataclasses
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen.backends import ReferenceStep
from llamagen.config import SamplingConfig, TransformerConfig
from llamagen.generation import GenerationRequest, NativeEngine, batch, generate_codes
from llamagen.generation.batch import Batch
from llamagen.generation.likelihood import code_log_likelihoods
from llamagen.generation.request import UNKNOWN, uniform_draws
from llamagen.generation.schedules import new_schedule, parallel
from llamagen.generation.schedules.parallel import (
    default_steps,
    group_sizes,
    local_order,
    random_order,
    sizes_after,
)
from llamagen.support.errors import InputError
from tests.generation.test_batch import assert_as_alone, run
from tests.tiny_models import tiny_transformer

GRID = (4, 4)
LINEAR = SamplingConfig(guidance_schedule="linear", guidance_scale=4.0)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(dim=64, heads=2, order="random")


def image(label, seed, known=None, **settings):
    sampling = dataclasses.replace(LINEAR, **settings)
    condition = torch.tensor(label)
    return GenerationRequest(condition=condition, seed=seed, sampling=sampling, known_codes=known)


@pytest.mark.parametrize("total", [1, 2, 7, 16, 64, 256, 576])
def test_every_number_of_passes_draws_all_codes(total):
    for steps in {1, min(2, total), max(1, total // 3), max(1, total - 1), total}:
        sizes = group_sizes(total, steps)
        assert len(sizes) == steps
        assert sum(sizes) == total
        assert min(sizes) >= 1
        assert sizes[0] == 1 or steps == 1
        for known in {0, 1, total // 2, total}:
            assert sum(sizes_after(known, total, steps)) == total - known
    assert 1 <= default_steps(total) <= total
    assert default_steps(256) == 88


def test_known_cells_come_first():
    priority = np.random.default_rng(0).random(16)
    known = [cell in (3, 8, 9) for cell in range(16)]
    for order in (
        random_order(known, priority),
        local_order(GRID, known, sizes_after(3, 16, 5), priority),
    ):
        assert sorted(order) == list(range(16))
        assert order[:3] == [3, 8, 9]


def test_local_groups_are_near_to_what_is_drawn_and_far_from_each_other():
    grid, sizes = (16, 16), group_sizes(256, 20)
    for seed in range(3):
        priority = np.random.default_rng(seed).random(256)
        order = local_order(grid, [False] * 256, sizes, priority)
        assert sorted(order) == list(range(256))
        cells = np.array([divmod(cell, 16) for cell in order])
        lone = together = 0
        for start, size in zip(accumulate([0, *sizes]), sizes, strict=False):
            group, before = cells[start : start + size], cells[:start]
            apart = np.abs(group[:, None] - group).max(axis=2) + 99 * np.eye(size, dtype=int)
            together += int((apart.min(axis=1) < 2).sum())
            if start:
                lone += int((np.abs(group[:, None] - before).max(axis=2).min(axis=1) > 1).sum())
        # In the middle there are not always enough cells near to what is drawn; at the end most
        # cells that are left touch each other.
        assert lone < 25
        assert together < 60
    other = local_order(grid, [False] * 256, sizes, np.random.default_rng(99).random(256))
    assert other != order


def test_orders_belong_to_the_seed():
    def order_of(seed, **settings):
        return list(
            new_schedule(
                image(0, seed, **settings), "random", (16, 16), is_wide=False, sequences=2
            ).order
        )

    for name in ("random", "local"):
        assert order_of(5, generation_order=name) == order_of(5, generation_order=name)
        assert order_of(5, generation_order=name) != order_of(6, generation_order=name)
    assert order_of(5, steps=7) == order_of(5)


def test_passes(model, monkeypatch):
    calls = []

    class Counting(ReferenceStep):
        def __call__(self, *arguments):
            calls.append(1)
            return super().__call__(*arguments)

    monkeypatch.setattr(batch, "fastest_step", lambda model, times: Counting(model))
    for steps in (1, 3, 8, 16):
        calls.clear()
        NativeEngine(model).generate([image(1, 2, steps=steps)])
        assert len(calls) == steps
    # Groups of more codes than known ones are fed at once.
    large = tiny_transformer(grid=(16, 16), order="random")
    calls.clear()
    NativeEngine(large).generate([image(1, 2, steps=4)])
    assert len(calls) == 4


def test_many_known_codes_are_fed_in_parts(monkeypatch):
    large = tiny_transformer(grid=(12, 12), order="random")
    known = torch.full((144,), UNKNOWN)
    known[7:140] = torch.arange(133) % 64
    requests = [image(1, 2, known, steps=steps) for steps in (3, 144)]
    found = NativeEngine(large).generate(requests).flatten(1)
    assert torch.equal(found[:, 7:140], known[7:140].expand(2, -1))
    monkeypatch.setattr(parallel, "_MAX_KNOWN", 144)
    assert torch.equal(NativeEngine(large).generate(requests).flatten(1), found)


def test_one_by_one_is_the_distribution_that_training_sees(model):
    """Codes drawn greedily are the most likely ones given those before, in the teacher's pass."""
    request = image(1, 3, steps=16, guidance_scale=1.0, guidance_start=1.0, temperature=0.0)
    codes = NativeEngine(model).generate([request]).view(1, -1)
    order = torch.tensor(
        new_schedule(request, "random", GRID, is_wide=False, sequences=1).order
    ).unsqueeze(0)
    drawn = codes.gather(1, order)
    with torch.no_grad():
        logits = model(drawn[:, :-1], torch.tensor([1]), order=order)
    assert torch.equal(logits.argmax(-1), drawn)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_images_join_and_leave(model, cache_dtype):
    known = torch.full((16,), UNKNOWN)
    known[5:11] = torch.arange(6)
    requests = [
        image(
            k % 5,
            k,
            known if k % 3 == 0 else None,
            steps=(None, 1, 4, 16)[k % 4],
            generation_order=("random", "local")[k % 2],
            guidance_scale=(4.0, 1.0, 7.5)[k % 3],
            guidance_start=(1.0, 2.0)[k % 2],
        )
        for k in range(18)
    ]
    model.kv_cache_dtype = cache_dtype
    found = run(Batch(model, 18), {2 * k: requests[3 * k : 3 * k + 3] for k in range(6)})
    assert_as_alone(model, found)
    model.kv_cache_dtype = None
    for request, codes in found.items():
        if request.known_codes is not None:
            assert torch.equal(codes[5:11], known[5:11])


def test_text_conditions_and_blends():
    model = tiny_transformer(condition="text", grid=(3, 5), order="random")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 16, generator=generator) for length in (1, 4, 6)]
    requests = [
        GenerationRequest(
            condition=texts[k % 3],
            seed=k,
            sampling=LINEAR.replace(steps=1 + k),
            negative=texts[(k + 1) % 3] if k % 2 else None,
            blend=texts[(k + 2) % 3] if k > 3 else None,
        )
        for k in range(7)
    ]
    assert_as_alone(model, run(Batch(model, 11), {0: requests[:4], 3: requests[4:]}))


def test_progress_says_what_is_drawn(model):
    seen = []
    codes = NativeEngine(model).generate(
        [image(0, 1, steps=6), image(3, 2, steps=9)], on_progress=seen.append
    )
    assert [progress.row for progress in seen] == [1, 2, 3, 4]
    for progress in seen:
        assert progress.drawn.flatten(1).sum(1).tolist() == [4 * progress.row] * 2
        assert torch.equal(progress.codes, codes * progress.drawn)


def test_log_likelihoods(model):
    codes = torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    one = code_log_likelihoods(model, codes, labels)
    assert one.shape == codes.shape

    def expected(seed):
        cells = uniform_draws([seed], 16)[0].argsort()
        drawn = codes.flatten(1)[:, cells]
        with torch.no_grad():
            logits = model(drawn[:, :-1], labels, order=cells.expand(3, 16))
        nats = logits.log_softmax(-1).gather(2, drawn.unsqueeze(-1)).squeeze(-1)
        return torch.zeros(3, 16).scatter(1, cells.expand(3, 16), nats).view(3, 4, 4)

    assert torch.allclose(one, expected(0), atol=1e-5)
    several = code_log_likelihoods(model, codes, labels, orders=3)
    assert torch.allclose(several, sum(map(expected, range(3))) / 3, atol=1e-5)
    with pytest.raises(InputError, match="orders is 0"):
        code_log_likelihoods(model, codes, labels, orders=0)
    raster = tiny_transformer(dim=64, heads=2)
    logits = raster(codes.flatten(1)[:, :-1], labels)
    expected = -F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
    found = code_log_likelihoods(raster, codes, labels, orders=3)
    assert torch.allclose(found.flatten(), expected, atol=1e-5)


def test_refusals(model):
    raster = tiny_transformer(dim=64, heads=2)
    labels = torch.tensor([0])
    with pytest.raises(InputError, match="steps is 4, but this model predicts codes one by one"):
        generate_codes(raster, labels, seeds=[0], sampling=SamplingConfig(steps=4))
    with pytest.raises(InputError, match="generation_order is 'local', but this model"):
        generate_codes(raster, labels, seeds=[0], sampling=SamplingConfig(generation_order="local"))
    with pytest.raises(InputError, match="window is 3, but this model predicts codes in any order"):
        generate_codes(model, labels, seeds=[0], window=3)
    with pytest.raises(InputError, match="steps is 17, expected at most the 16 codes"):
        generate_codes(model, labels, seeds=[0], sampling=SamplingConfig(steps=17))
    with pytest.raises(InputError, match="steps is 0"):
        SamplingConfig(steps=0)
    with pytest.raises(
        InputError, match="generation_order is 'spiral', expected one of random, local"
    ):
        SamplingConfig(generation_order="spiral")
    with pytest.raises(InputError, match="order is 'spiral', expected 'raster' or 'random'"):
        TransformerConfig(order="spiral")
    codes = torch.zeros(1, 15, dtype=torch.int64)
    with pytest.raises(InputError, match="order"):
        model(codes, labels)
    with pytest.raises(InputError, match="order"):
        raster(codes, labels, order=torch.arange(16).unsqueeze(0))
