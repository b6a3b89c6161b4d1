"""Settings and configurations, seeds and the ladder of sampling."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from llamagen.config import (
    SamplingConfig,
    SmallTextEncoderConfig,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
    sampling_settings,
)
from llamagen.data.columns import SourceConfig
from llamagen.generation.request import MAX_SEED, derived_seed, one_seed_each, uniform_draws
from llamagen.generation.sampling import (
    ReferenceSampler,
    Rows,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    fastest_sampler,
    guidance_scale_at,
    sample_from,
)
from llamagen.training.config import TokenizerTraining, TransformerTraining
from tests.properties.checking import JSON, TEXTS, answer, attempt, holds_for

CONFIGS = (
    *(SamplingConfig, TokenizerConfig, TransformerConfig, SmallTextEncoderConfig, TextConfig),
    *(SourceConfig, TokenizerTraining, TransformerTraining),
)
WORDS = st.sampled_from(["constant", "linear", "power-cosine", "Linear", "", "1"])
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, 0.0, -0.0, 1, 1.0, 1000, 1000.5, 2**31 - 1, 2**31, 2**63, 10**400])
)
SEEDS = st.integers(0, MAX_SEED)


def in_range(setting, value):
    """Whether a value lies in the range that a setting declares, by exact arithmetic."""
    if value is None:
        return setting.optional
    if setting.choices:
        return value in setting.choices
    if isinstance(value, bool | str) or (setting.type is int and not isinstance(value, int)):
        return False
    if not math.isfinite(value if isinstance(value, float) else 0):
        return False
    exact, least = Fraction(value), Fraction(setting.minimum)
    return (exact > least or (exact == least and not setting.exclusive_minimum)) and (
        exact <= Fraction(setting.maximum)
    )


def values_of(setting):
    """Values of a setting, in its range."""
    if setting.choices:
        return st.sampled_from(setting.choices)
    kind = st.integers if setting.type is int else st.floats
    least, most = setting.type(setting.minimum), setting.type(setting.maximum)
    numbers = kind(least, most)
    if setting.exclusive_minimum:
        numbers = numbers.filter(lambda value: value > least)
    return numbers | st.none() if setting.optional else numbers


SAMPLINGS = st.builds(
    SamplingConfig, **{each.name: values_of(each) for each in sampling_settings()}
)


@holds_for(
    setting=st.sampled_from(sampling_settings()),
    value=NUMBERS | st.none() | st.booleans() | WORDS,
)
def test_a_setting_takes_exactly_the_values_of_its_range(setting, value):
    config, refusal = attempt(lambda: SamplingConfig(**{setting.name: value}))
    assert (config is not None) == in_range(setting, value)
    if config is None:
        assert setting.name in refusal
    else:
        assert getattr(config, setting.name) == value


@holds_for(
    setting=st.sampled_from([each for each in sampling_settings() if not each.choices]),
    number=st.integers(1, 1000) | st.floats(2.0**-10, 1.0, width=16),
    kind=st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int32, np.uint16]),
    tensor=st.booleans(),
)
def test_numbers_of_arrays_are_numbers(setting, number, kind, tensor):
    array = kind(number)
    plain = array.item()
    given = torch.as_tensor(array) if tensor and kind is not np.uint16 else array
    config = answer(lambda: SamplingConfig(**{setting.name: given}))
    assert config == answer(lambda: SamplingConfig(**{setting.name: plain}))
    if config is not None:
        assert json.loads(json.dumps(dataclasses.asdict(config)))[setting.name] == plain


@holds_for(old=SAMPLINGS, name=st.sampled_from(sampling_settings()) | TEXTS, data=st.data())
def test_replacing_changes_what_is_given_and_nothing_else(old, name, data):
    if isinstance(name, str):
        assume(name not in [each.name for each in sampling_settings()])
        assert answer(lambda: old.replace(**{name: 1})) is None
        return
    value = data.draw(values_of(name))
    expected = dataclasses.asdict(old) | ({} if value is None else {name.name: value})
    assert dataclasses.asdict(old.replace(**{name.name: value})) == expected


@holds_for(
    sampling=SAMPLINGS,
    dim=st.integers(1, 8),
    heads=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    multipliers=st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple),
)
def test_configurations_come_back_from_json(sampling, dim, heads, grid, multipliers):
    transformer = TransformerConfig(dim=4 * heads * dim, heads=heads, grid=grid)
    tokenizer = TokenizerConfig(channel_multipliers=multipliers)
    for config in (sampling, transformer, tokenizer):
        values = json.loads(json.dumps(config_to_dict(config)))
        assert config_from_dict(type(config), values, "here") == config


@holds_for(cls=st.sampled_from(CONFIGS), data=st.data())
def test_a_file_with_any_values_is_read_or_refused_in_one_line(cls, data):
    names = st.sampled_from([field.name for field in dataclasses.fields(cls)])
    others = st.sampled_from([10**400, {"": None}, {"ab": 1}, "ab"])
    values = data.draw(st.dictionaries(names | TEXTS, JSON | others, max_size=3))
    config, refusal = attempt(lambda: config_from_dict(cls, values, "config.json"))
    if config is None:
        assert refusal.startswith("config.json: ")
        return
    for name, value in values.items():
        found = getattr(config, name)
        # Others become tuples, paths and configurations.
        if isinstance(value, int | float | str) and type(found) is type(value):
            assert found == value


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12)


def kept(filtered):
    return [index for index, value in enumerate(filtered.tolist()) if value > -math.inf]


@holds_for(logits=LOGITS, k=st.integers(0, 20), as_tensor=st.booleans())
def test_top_k_keeps_what_fewer_than_k_exceed(logits, k, as_tensor):
    given = torch.tensor([[k]]) if as_tensor else k
    found = apply_top_k(torch.tensor([logits]), given)[0]
    expected = [i for i, each in enumerate(logits) if k == 0 or sum(x > each for x in logits) < k]
    assert kept(found) == expected
    assert [found[i] for i in expected] == [logits[i] for i in expected]


@holds_for(logits=LOGITS.filter(lambda each: len(set(each)) == len(each)), p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_codes_that_exceed_p(logits, p):
    weights = [math.exp(each - max(logits)) for each in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    sums = [
        math.fsum(weights[i] for i in order[: n + 1]) / math.fsum(weights)
        for n in range(len(order))
    ]
    assume(all(abs(each - p) > 1e-5 for each in sums))
    needed = 1 + sum(each <= p for each in sums)
    assert kept(apply_top_p(torch.tensor([logits]), p)[0]) == sorted(order[:needed])


@holds_for(logits=LOGITS, p=st.floats(0, 1))
def test_min_p_compares_with_the_most_likely_code(logits, p):
    ratios = [math.exp(each - max(logits)) for each in logits]
    assume(all(each == 1 or abs(each - p) > 1e-5 * p for each in ratios))
    found = apply_min_p(torch.tensor([logits]), p)[0]
    assert kept(found) == [i for i, each in enumerate(ratios) if each >= p]


@holds_for(
    logits=LOGITS,
    impossible=st.sets(st.integers(0, 11)),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_uniform_number_falls_into_the_interval_of_its_code(logits, impossible, uniform):
    weights = [0.0 if i in impossible else math.exp(each) for i, each in enumerate(logits)]
    assume(any(weights))
    masked = torch.tensor([logits]).masked_fill(torch.tensor(weights) == 0, -torch.inf)
    code = int(sample_from(masked, torch.tensor([uniform])))
    total, before = math.fsum(weights), math.fsum(weights[:code])
    assert weights[code] > 0
    assert before - 1e-5 * total <= uniform * total <= before + weights[code] + 1e-5 * total


@holds_for(
    sampling=SAMPLINGS,
    temperature=st.just(0.0) | st.floats(1e-45, 1e-7),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    codes=st.sampled_from([16, 30, 64]),
)
def test_cold_sampling_takes_the_most_likely_code(sampling, temperature, seed, dtype, codes):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.permuted(np.tile(np.arange(codes), (3, 1)), axis=1)).float()
    rows = Rows(np.arange(3), np.full(3, -1), np.ones(3, np.float32))
    uniforms = torch.from_numpy(rng.random(3, dtype=np.float32))
    settings = [sampling.replace(temperature=temperature)] * 3
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for sampler in (
            ReferenceSampler(settings, torch.device("cpu")),
            fastest_sampler(settings, codes, torch.device("cpu")),
        ):
            found, finite = sampler(logits, logits, rows, uniforms)
            assert torch.equal(found, logits.argmax(-1))
            assert finite.all()
    finally:
        torch.set_default_dtype(before)


@holds_for(sampling=SAMPLINGS, total=st.integers(1, 300), data=st.data())
def test_the_guidance_scale_lies_between_its_ends(sampling, total, data):
    index = data.draw(st.integers(0, total - 1))
    scale = guidance_scale_at(sampling, index, total)
    if sampling.guidance_stop is not None and index >= sampling.guidance_stop:
        assert scale == 1
        return
    starts = {"linear": sampling.guidance_start, "power-cosine": 1.0}
    ends = starts.get(sampling.guidance_schedule, sampling.guidance_scale), sampling.guidance_scale
    slack = 1e-9 * max(ends)
    assert min(ends) - slack <= scale <= max(ends) + slack
    if index == 0 and sampling.guidance_schedule == "linear":
        assert scale == sampling.guidance_start


@holds_for(seeds=st.lists(SEEDS, min_size=1, max_size=4), count=st.integers(1, 20), data=st.data())
def test_random_numbers_belong_to_a_seed(seeds, count, data):
    draws = uniform_draws(seeds, count)
    assert (draws >= 0).all()
    assert (draws < 1).all()
    row = data.draw(st.integers(0, len(seeds) - 1))
    longer = uniform_draws(seeds[row:], count + 5)[0]
    assert torch.equal(draws[row], longer[:count])
    assert len({derived_seed(seeds[row], number) for number in range(8)}) == 8


@holds_for(
    seed=st.integers(0, MAX_SEED - 10),
    others=st.lists(SEEDS, max_size=4),
    count=st.integers(1, 4),
    kind=st.sampled_from([int, np.int64, np.uint64, torch.tensor]),
)
def test_seeds_count_up_or_are_given_each(seed, others, count, kind):
    found = one_seed_each(kind(seed), count)
    assert found == tuple(range(seed, seed + count))
    assert all(type(each) is int for each in found)
    for given in (others, np.array(others, np.uint64), torch.tensor(others, dtype=torch.int64)):
        found = answer(lambda given=given: one_seed_each(given, count))
        assert found == (tuple(others) if len(others) == count else None)
        assert all(type(each) is int for each in found or ())
