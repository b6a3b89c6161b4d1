"""The compiled step computes what the model computes."""

import pytest
import torch

from llamagen.backends import CompiledStep, ReferenceStep
from llamagen.config import SamplingConfig
from llamagen.generation import GenerationRequest, batch
from llamagen.generation.batch import Batch
from tests.tiny_models import tiny_transformer


def run(model, requests, step, monkeypatch):
    monkeypatch.setattr(batch, "fastest_step", lambda model, times: step)
    running = Batch(model, len(requests))
    images = running.add(requests[:2])
    for _ in range(3):
        running.step()
    images += running.add(requests[2:])
    while not all(image.is_finished for image in images):
        running.step()
    return running.codes_of(images, running.total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "cache_dtype"),
    [({"kv_heads": 2, "qk_norm": True}, None), ({}, torch.int8), ({"order": "random"}, None)],
    ids=["grouped queries and qk-norm", "int8 cache", "random order"],
)
def test_compiled_matches_eager(settings, cache_dtype, monkeypatch):
    model = tiny_transformer(**settings)
    model.kv_cache_dtype = cache_dtype
    any_order = model.config.order == "random"
    requests = [
        GenerationRequest(
            condition=torch.tensor(k),
            seed=k,
            sampling=SamplingConfig(
                guidance_scale=[1.0, 3.0][k % 2],
                top_k=20,
                steps=[5, 9][k // 2] if any_order else None,
            ),
            window=None if any_order else [1, 3][k // 2],
        )
        for k in range(4)
    ]
    compiled = CompiledStep(model, eager_steps=2)
    found = run(model, requests, compiled, monkeypatch)
    assert compiled._compiled
    assert torch.equal(found, run(model, requests, ReferenceStep(model), monkeypatch))


def test_supports_gpus_only():
    assert not CompiledStep.supports(tiny_transformer())


@pytest.mark.gpu
def test_compiled_on_the_gpu(monkeypatch):
    model = tiny_transformer().cuda()
    assert CompiledStep.supports(model)
    greedy = SamplingConfig(guidance_scale=2.0, temperature=0.0)
    requests = [
        GenerationRequest(condition=torch.tensor(k), seed=k, sampling=greedy) for k in range(4)
    ]
    compiled = CompiledStep(model, eager_steps=0)
    found = run(model, requests, compiled, monkeypatch)
    assert torch.equal(found, run(model, requests, ReferenceStep(model), monkeypatch))
