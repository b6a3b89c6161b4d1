"""Sampling in C: the codes that the reference samples."""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from llamagen.backends.cpu import sampling as cpu_sampling
from llamagen.backends.cpu.sampling import CpuSampler, Rows
from llamagen.config import MAX_INTEGER, SamplingConfig
from llamagen.generation.sampling import ReferenceSampler
from tests.backends.variants import VARIANTS, kernels_of

CODES = 4096
SETTINGS = [
    SamplingConfig(guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for scale, temperature, top_k, top_p in itertools.product(
        (1.0, 0.0, 4.0), (1.0, 0.7, 0.0), (0, 1, 100, CODES, MAX_INTEGER), (1.0, 0.9, 0.3, 1e-6)
    )
]


@dataclass(frozen=True)
class Settings:
    """As ``SamplingConfig``, with min-p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def rows_of(settings, conditional=None, unconditional=None):
    count = len(settings)
    conditional = np.arange(count) if conditional is None else np.array(conditional)
    scales = np.array([getattr(each, "guidance_scale", 1.0) for each in settings], np.float32)
    if unconditional is None:
        unconditional = np.where(scales == 1.0, -1, conditional + count)
    return Rows(conditional, np.array(unconditional), scales)


def sample(settings, logits, uniforms, variant="native", rows=None):
    sampler = CpuSampler(settings, kernels=kernels_of(variant))
    return sampler(logits, logits, rows or rows_of(settings), uniforms)


def sample_evenly(setting, logits, count, variant="native"):
    """Codes of one row of logits, for uniforms at equal distances: counts are exact to one."""
    rows = rows_of([setting] * count, [0] * count, [-1] * count)
    codes, finite = sample(
        [setting] * count, logits, (torch.arange(count) + 0.5) / count, variant, rows
    )
    assert finite.all()
    return codes


@pytest.fixture(scope="module")
def samples_of_the_reference():
    """Logits, random numbers and the codes that the reference samples with every setting."""
    generator = torch.Generator().manual_seed(0)
    reference = ReferenceSampler(SETTINGS, torch.device("cpu"))
    samples = []
    for _ in range(4):
        logits = torch.randn(2 * len(SETTINGS), CODES, generator=generator) * 3
        uniforms = torch.rand(len(SETTINGS), generator=generator)
        codes, finite = reference(logits, logits, rows_of(SETTINGS), uniforms)
        assert finite.all()
        samples.append((logits, uniforms, codes))
    return samples


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_the_codes_of_the_reference(variant, samples_of_the_reference):
    sampler = CpuSampler(SETTINGS, kernels=kernels_of(variant))
    same = []
    for logits, uniforms, expected in samples_of_the_reference:
        found, finite = sampler(logits, logits, rows_of(SETTINGS), uniforms)
        assert finite.all()
        same.append(expected == found)
    # A number can fall between two codes to the last digit.
    assert torch.cat(same).float().mean() > 0.997


def filtered(logits, setting):
    """Probabilities (V,) by the definitions of the filters."""
    kept = (logits / setting.temperature).softmax(-1)
    ordered = kept.sort(descending=True)
    if setting.top_k:
        kept = torch.where(kept >= ordered.values[setting.top_k - 1], kept, 0)
        kept = kept / kept.sum()
    if setting.top_p < 1:
        values, order = kept.sort(descending=True)
        behind = values.cumsum(0) - values > setting.top_p
        kept = kept.scatter(0, order[behind], 0.0)
    if setting.min_p:
        kept = torch.where(kept >= setting.min_p * kept.max(), kept, 0)
    return kept / kept.sum()


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_code_is_sampled_as_often_as_it_should(temperature, top_k, top_p, min_p):
    codes, count = 32, 20000
    logits = torch.randn(1, codes, generator=torch.Generator().manual_seed(1))
    setting = Settings(temperature, top_k, top_p, min_p)
    found = torch.bincount(sample_evenly(setting, logits, count), minlength=codes)
    assert (found - filtered(logits[0], setting) * count).abs().max() < 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_min_p_keeps_ties_with_its_threshold(variant):
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125] + [0.0] * 12])
    codes = sample_evenly(Settings(min_p=0.25), probabilities.log().clamp(min=-100), 300, variant)
    assert set(codes.tolist()) == {0, 1, 2, 3}
    codes = sample_evenly(Settings(min_p=0.26), probabilities.log().clamp(min=-100), 300, variant)
    assert set(codes.tolist()) == {0, 1}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 20, 31])
def test_top_k_of_numbers_of_every_kind(k, variant):
    # Ties, among them of both zeros, and below all others one number again and again.
    numbers = [0.5, 1e-6, 1e-20, 0.0, -0.0, -1e-20, -1e-6, 0.5]
    logits = torch.tensor([numbers + [-0.5] * 24])
    kept = logits[0] >= logits[0].sort(descending=True).values[k - 1]
    codes = sample_evenly(Settings(top_k=k), logits, 1000, variant)
    assert set(codes.tolist()) == set(kept.nonzero().flatten().tolist())


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-38, 9e-7])
def test_temperatures_below_a_millionth_are_greedy(temperature):
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(4))
    codes = sample_evenly(Settings(temperature, top_p=0.5, min_p=0.1), logits, 50)
    assert set(codes.tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize("size", [1e33, 3e38, -3e38])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_logits_that_the_temperature_makes_infinite(size, top_p):
    logits = torch.full((1, 64), size)
    logits[0, 3:] = min(size, 0) * 1.1 if size > -1e38 else -3.3e38
    codes = sample_evenly(Settings(2e-6, top_p=top_p), logits, 50)
    assert set(codes.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_ends_of_the_interval_sample_a_code_that_can_be_sampled(uniform):
    logits = torch.full((1, 512), -1e4)
    logits[0, [100, 400]] = 5.0
    codes, _ = sample([Settings(top_k=2)], logits, torch.tensor([uniform]))
    assert codes.item() == (100 if uniform == 0.0 else 400)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_rows_with_logits_that_are_not_finite_are_named(wrong):
    logits = torch.zeros(3, 64)
    logits[1, 5] = wrong
    codes, finite = sample([Settings()] * 3, logits, torch.full((3,), 0.5))
    assert finite.tolist() == [True, False, True]
    assert 0 <= codes.min()
    assert codes.max() < 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_any_order_of_views(dtype):
    setting = SamplingConfig(guidance_scale=3.0)
    wide = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    conditional, unconditional = wide[:, :64], wide[:, 64:128]
    uniforms = torch.rand(4, generator=torch.Generator().manual_seed(3))
    order = [2, 0, 3, 1]
    codes, _ = CpuSampler([setting] * 4, kernels=kernels_of("native"))(
        conditional, unconditional, rows_of([setting] * 4, order, order), uniforms
    )
    for i, row in enumerate(order):
        reference = ReferenceSampler([setting], torch.device("cpu"))
        alone, _ = reference(
            conditional[row : row + 1],
            unconditional[row : row + 1],
            rows_of([setting], [0], [0]),
            uniforms[i : i + 1],
        )
        assert codes[i] == alone[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_changes_no_code(dtype):
    logits, uniforms = torch.randn(2 * len(SETTINGS), 64), torch.rand(len(SETTINGS))
    expected, _ = sample(SETTINGS, logits, uniforms)
    torch.set_default_dtype(dtype)
    try:
        found, _ = sample(SETTINGS, logits, uniforms)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("conditional", "unconditional", "codes", "uniforms"),
    [
        ([0, 4], [-1, -1], 64, 2),
        ([0, -1], [-1, -1], 64, 2),
        ([0, 1], [3, 4], 64, 2),
        ([0, 1, 2], [-1, -1, -1], 64, 2),
        ([0, 1], [-1, -1], 63, 2),
        ([0, 1], [-1, -1], 64, 3),
    ],
)
def test_rejects_rows_and_logits_out_of_range(conditional, unconditional, codes, uniforms):
    settings = [SamplingConfig(guidance_scale=2.0)] * 2
    logits = torch.zeros(4, codes)
    with pytest.raises(ValueError, match="expected"):
        sample(
            settings,
            logits,
            torch.zeros(uniforms),
            rows=rows_of(settings, conditional, unconditional),
        )


def test_supported_settings(monkeypatch):
    kernels_of("native")  # or skip
    cpu, every = torch.device("cpu"), SETTINGS
    assert CpuSampler.supports(every, 64, cpu)
    assert not CpuSampler.supports(every, 63, cpu)
    assert not CpuSampler.supports(every, 1 << 21, cpu)
    assert not CpuSampler.supports(every, 64, torch.device("cuda"))

    @dataclass(frozen=True)
    class Config(SamplingConfig):
        new_filter: float = 0.0

    assert CpuSampler.supports([Config()], 64, cpu)
    assert not CpuSampler.supports(
        [Config(), dataclasses.replace(Config(), new_filter=0.5)], 64, cpu
    )
    monkeypatch.setattr(cpu_sampling, "load_kernels", lambda: None)
    assert not CpuSampler.supports(every, 64, cpu)
