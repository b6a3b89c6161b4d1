"""Backends refuse what they do not implement; the reference computes it."""

import dataclasses

import pytest
import torch

from llamagen.backends import CompiledStep, CpuStep, ReferenceStep, fastest_step
from llamagen.backends.cpu.sampling import CpuSampler
from llamagen.config import SamplingConfig, TransformerConfig
from llamagen.generation import GenerationRequest, NativeEngine
from llamagen.generation.sampling import ReferenceSampler, fastest_sampler
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.export import export_for_vllm
from tests.tiny_models import tiny_transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterTransformerConfig(TransformerConfig):
    """A configuration with an option that no backend has heard of."""

    attention_sinks: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterSamplingConfig(SamplingConfig):
    """Settings with one that no backend has heard of."""

    typical_p: float = 1.0


def with_option(model, value):
    fields = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    model.config = LaterTransformerConfig(**fields, attention_sinks=value)
    return model


def test_kernels_step_aside_for_an_unknown_option():
    if not CpuStep.supports(tiny_transformer(dim=64, heads=2)):
        pytest.skip("no kernels here")
    assert CpuStep.supports(with_option(tiny_transformer(dim=64, heads=2), 0))
    model = with_option(tiny_transformer(dim=64, heads=2), 4)
    assert not CpuStep.supports(model)
    assert isinstance(fastest_step(model), ReferenceStep)
    codes = NativeEngine(model).generate([GenerationRequest(condition=torch.tensor(0), seed=0)])
    assert codes.shape == (1, 4, 4)


def test_compiled_step_refuses_an_unknown_option(monkeypatch):
    monkeypatch.setattr("llamagen.backends.compiled._is_on_gpu", lambda model: True)
    assert CompiledStep.supports(with_option(tiny_transformer(), 0))
    assert not CompiledStep.supports(with_option(tiny_transformer(), 4))


def test_vllm_export_refuses_an_unknown_option(tmp_path):
    model = with_option(tiny_transformer(), 4)
    with pytest.raises(InputError, match="does not implement attention_sinks"):
        export_for_vllm(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_sampling_kernels_step_aside_for_an_unknown_setting():
    cpu = torch.device("cpu")
    known, unknown = LaterSamplingConfig(), LaterSamplingConfig(typical_p=0.5)
    assert CpuSampler.supports([SamplingConfig()], 64, cpu) == CpuSampler.supports([known], 64, cpu)
    assert not CpuSampler.supports([known, unknown], 64, cpu)
    assert isinstance(fastest_sampler([known, unknown], 64, cpu), ReferenceSampler)
