"""The step in C gives the logits that the model's weights say, on every kind of processor."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen.backends.cpu import step as cpu_step
from llamagen.backends.cpu.step import CpuStep
from llamagen.config import TransformerConfig
from llamagen.models.transformer import NO_CELL, QUERY, KVCache, Tokens
from llamagen.models.transformer.quantization import quantize
from llamagen.support.errors import InputError
from tests.backends.models import SIZES, model_of
from tests.backends.variants import VARIANTS, kernels_of
from tests.tiny_models import tiny_transformer

GRID = (3, 5)
CODES = 64
CACHES = [None, torch.int8]


def quantized(model):
    quantize(model)
    return model


def cache_of(model, sequences=4, positions=24, dtype=None):
    cache = KVCache(model.config, sequences, positions, dtype=dtype or model.dtype)
    for part in (*cache.keys, *cache.values):
        part.fill_(99)  # what has not been stored must not be read
    cache.add(sequences)
    return cache


@dataclass
class Sequence:
    """Ids (T,) or features (T, text_dim) of a sequence, each with its cell."""

    tokens: torch.Tensor
    cells: list[int]

    @classmethod
    def of_class(cls, label, codes):
        return cls(torch.tensor([CODES + label, *codes]), [NO_CELL, *range(len(codes))])

    @classmethod
    def of_codes(cls, codes, cells):
        return cls(torch.tensor(codes), cells)

    @classmethod
    def of_text(cls, features):
        return cls(features, [NO_CELL] * len(features))


def feed(step, cache, pieces, *, wanted=None):
    """Logits of pieces (number in the cache, Sequence, its tokens from .. to), in one step."""
    parts = [sequence.tokens[start:end] for _, sequence, start, end in pieces]
    given = torch.cat(parts)
    is_text = given.is_floating_point()
    lengths = [end - start for _, _, start, end in pieces]
    ids = torch.zeros(len(given), dtype=torch.int64) if is_text else given
    tokens = Tokens(
        ids=ids,
        sequences=np.repeat([number for number, *_ in pieces], lengths).astype(np.int32),
        positions=np.concatenate(
            [np.arange(start, end, dtype=np.int32) for _, _, start, end in pieces]
        ),
        cells=np.concatenate([s.cells[start:end] for _, s, start, end in pieces]).astype(np.int32),
        wanted=np.arange(len(given)) if wanted is None else np.array(wanted, dtype=np.int64),
        features=given if is_text else None,
    )
    return step(tokens, cache, GRID).clone()


def rounded_to_int8(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale


def rotated(x, cells, base):
    """Heads (T, H, E) rotated by the cells' rows and columns; conditions become zero."""
    size = x.shape[-1]
    frequencies = base ** (-2 * torch.arange(size // 4) / (size // 2))
    cell = torch.tensor(cells)
    row, column = cell // GRID[1], cell % GRID[1]
    angles = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], dim=-1)
    rotation = torch.polar(torch.ones_like(angles), angles) * (cell >= 0)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)


def expected_logits(model, sequence, int8_cache=False):
    """Logits (T, V) in float32, from the definition of the model."""
    config = model.config
    if sequence.tokens.is_floating_point():
        x = model.cls_embedding.cap_proj(sequence.tokens)
    else:
        tables = [model.tok_embeddings.weight]
        if config.condition == "class":
            tables.append(model.cls_embedding.embedding_table.weight)
        x = torch.cat(tables)[sequence.tokens]
        if config.order == "random":
            heads = model.pos_instruct_embeddings.view(1, config.heads, config.head_dim)
            queries = rotated(heads.expand(len(x), -1, -1), sequence.cells, config.rope_base)
            x = torch.where((sequence.tokens == QUERY)[:, None], queries.flatten(1), x)
    heads = [config.heads, config.num_kv_heads, config.num_kv_heads]
    for block in model.layers:
        attention, ffn = block.attention, block.feed_forward
        projected = attention.wqkv(block.attention_norm(x)).unflatten(-1, (-1, config.head_dim))
        q, k, v = projected.split(heads, dim=1)
        if config.qk_norm:
            q, k = (
                F.rms_norm(x, x.shape[-1:], norm.weight, config.norm_eps)
                for x, norm in ((q, attention.q_norm), (k, attention.k_norm))
            )
        q, k = (rotated(each, sequence.cells, config.rope_base) for each in (q, k))
        if int8_cache:
            k, v = rounded_to_int8(k), rounded_to_int8(v)
        k, v = (
            each.repeat_interleave(config.heads // config.num_kv_heads, dim=1) for each in (k, v)
        )
        scores = torch.einsum("thd,shd->hts", q, k) / config.head_dim**0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + attention.wo(torch.einsum("hts,shd->thd", weights, v).flatten(1))
        y = block.ffn_norm(x)
        x = x + ffn.w2(F.silu(ffn.w1(y)) * ffn.w3(y))
    return model.output(model.norm(x))


def assert_close(found, wanted, tolerance=2e-5):
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


def three_sequences(length=12):
    generator = torch.Generator().manual_seed(3)
    return [
        Sequence.of_class(label, torch.randint(CODES, (length,), generator=generator).tolist())
        for label in (0, 5, 2)
    ]


# The tokens (from, to) of each of three sequences in each step: together, as windows, and ragged.
WALKS = {
    "one by one": [[(i, i + 1)] * 3 for i in range(13)],
    "windows": [[(0, 1)] * 3, [(1, 5)] * 3, [(5, 13)] * 3],
    "ragged": [
        [(0, 1), None, (0, 4)],
        [(1, 2), (0, 1), None],
        [(2, 9), (1, 2), (4, 7)],
        [None, (2, 12), (7, 8)],
        [(9, 13), (12, 13), (8, 13)],
    ],
    "at once": [[(0, 13)] * 3],
}


def walk(step, cache, sequences, steps):
    """Logits (T, V) of each sequence, fed as a walk says; to other numbers than their index."""
    numbers = [0, 2, 3]
    found = [[] for _ in sequences]
    for ranges in steps:
        pieces = [
            (numbers[i], sequences[i], *own) for i, own in enumerate(ranges) if own is not None
        ]
        logits = feed(step, cache, pieces)
        running = [i for i, own in enumerate(ranges) if own is not None]
        for i, own in zip(
            running, logits.split([end - start for *_, start, end in pieces]), strict=True
        ):
            found[i].append(own)
    return [torch.cat(own) for own in found]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_matches_the_definition(size, variant):
    model = model_of(size)
    sequences = three_sequences()
    expected = [expected_logits(model, sequence) for sequence in sequences]
    step = CpuStep(model, kernels=kernels_of(variant))
    for steps in WALKS.values():
        for found, wanted in zip(
            walk(step, cache_of(model), sequences, steps), expected, strict=True
        ):
            assert_close(found, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ["even", "grouped queries", "QK-norm"])
@torch.inference_mode()
def test_int8_weights_match_the_definition(size, variant):
    model = quantized(model_of(size))
    sequences = three_sequences()
    step = CpuStep(model, kernels=kernels_of(variant))
    for found, sequence in zip(
        walk(step, cache_of(model), sequences, WALKS["ragged"]), sequences, strict=True
    ):
        assert_close(found, expected_logits(model, sequence))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "size", ["grouped queries", "odd heads", "heads of 64", "heads of 128", "QK-norm"]
)
@torch.inference_mode()
def test_int8_cache_matches_the_definition(size, variant):
    model = model_of(size)
    sequences = three_sequences()
    step = CpuStep(model, kernels=kernels_of(variant))
    cache = cache_of(model, dtype=torch.int8)
    for found, sequence in zip(
        walk(step, cache, sequences, WALKS["ragged"]), sequences, strict=True
    ):
        wanted = expected_logits(model, sequence, int8_cache=True)
        # Here and there an integer is rounded to its neighbour.
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ["even", "odd heads", "QK-norm"])
@torch.inference_mode()
def test_bfloat16_is_near_the_definition(size, variant):
    exact, model = model_of(size), model_of(size, torch.bfloat16)
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    sequences = three_sequences()
    step = CpuStep(model, kernels=kernels_of(variant))
    for found, sequence in zip(
        walk(step, cache_of(model), sequences, WALKS["ragged"]), sequences, strict=True
    ):
        wanted = expected_logits(exact, sequence)
        assert (found - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_texts_of_different_lengths_match_the_definition(variant):
    model = model_of("even", condition="text", text_length=9)
    generator = torch.Generator().manual_seed(1)
    texts = [Sequence.of_text(torch.randn(length, 16, generator=generator)) for length in (9, 1, 4)]
    step, cache = CpuStep(model, kernels=kernels_of(variant)), cache_of(model)
    found = feed(step, cache, [(i, text, 0, len(text.cells)) for i, text in enumerate(texts)])
    for own, text in zip(found.split([9, 1, 4]), texts, strict=True):
        assert_close(own, expected_logits(model, text))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("weights", ["floats", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_company_and_windows_change_no_bit(variant, dtype, weights, cache_dtype):
    # Outputs enough for several at once, of more rows than a tile has.
    model = model_of("heads of 64", dtype, codebook_size=1024)
    if weights == "int8":
        quantize(model)
    step = CpuStep(model, kernels=kernels_of(variant))
    codes = torch.randint(CODES, (35, 6))
    sequences = [Sequence.of_codes(own.tolist(), list(range(6))) for own in codes]
    cache = cache_of(model, 35, 6, cache_dtype)
    together = torch.stack(
        [feed(step, cache, [(n, s, i, i + 1) for n, s in enumerate(sequences)]) for i in range(6)],
        dim=1,
    )
    for numbers, windows in (
        ([7], [1, 1, 1, 1, 1, 1]),
        ([7], [6]),
        ([1, 34], [3, 1, 2]),
        (list(range(0, 22, 2)), [2, 4]),
    ):
        cache = cache_of(model, 35, 6, cache_dtype)
        start = 0
        for width in windows:
            pieces = [(n, sequences[n], start, start + width) for n in numbers]
            found = feed(step, cache, pieces).unflatten(0, (-1, width))
            assert torch.equal(found, together[numbers, start : start + width])
            start += width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_wanted_logits_are_those_of_all(variant, dtype):
    model = model_of("grouped queries", dtype)
    step = CpuStep(model, kernels=kernels_of(variant))
    pieces = [(number, s, 0, 13) for number, s in enumerate(three_sequences())]
    everything = feed(step, cache_of(model), pieces)
    for wanted in ([38], [0], [12, 25, 38], list(range(5, 30)), [3, 2], list(range(39))[::-1], []):
        found = feed(step, cache_of(model), pieces, wanted=wanted)
        assert torch.equal(found, everything[wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_texts_are_independent_of_company_and_chunks(dtype):
    model = model_of("even", dtype, condition="text", text_length=20, text_dim=96)
    texts = [Sequence.of_text(torch.randn(length, 96)) for length in (20, 7, 13)]
    step, cache = CpuStep(model, kernels=kernels_of("native")), cache_of(model)
    together = feed(step, cache, [(i, text, 0, len(text.cells)) for i, text in enumerate(texts)])
    for own, text in zip(together.split([20, 7, 13]), texts, strict=True):
        cache, start = cache_of(model), 0
        while start < len(own):
            end = min(start + 6, len(own))
            assert torch.equal(feed(step, cache, [(0, text, start, end)]), own[start:end])
            start = end


@torch.inference_mode()
def test_one_step_serves_caches_grids_and_numbers_of_tokens():
    model = model_of("even")
    step = CpuStep(model, kernels=kernels_of("native"))
    first, second, third = three_sequences()
    wanted = [expected_logits(model, each) for each in (first, second, third)]
    small, large = cache_of(model, 1, 13), cache_of(model, 4, 40)
    assert_close(feed(step, small, [(0, first, 0, 2)]), wanted[0][:2])
    assert_close(feed(step, large, [(0, second, 0, 9), (3, third, 0, 13)])[9:], wanted[2])
    assert_close(feed(step, small, [(0, first, 2, 3)]), wanted[0][2:3])
    tokens = Tokens(*(np.zeros(1, np.int32),) * 4, np.zeros(1, np.int64))
    tokens = dataclasses.replace(tokens, ids=torch.zeros(1, dtype=torch.int64))
    step(tokens, small, (20, 20))
    assert_close(feed(step, large, [(0, second, 9, 13)]), wanted[1][9:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, -1])}, "ids run from -1 to 0"),
        ({"ids": torch.tensor([CODES + 6, 1])}, "classes 64 to 69"),
    ],
)
@torch.inference_mode()
def test_rejects_ids_out_of_range(change, message):
    model = model_of("even")
    with pytest.raises(InputError, match=message):
        CpuStep(model, kernels=kernels_of("native"))(two_tokens(**change), cache_of(model), GRID)


@torch.inference_mode()
def test_rejects_classes_for_a_model_without():
    model = model_of("even", condition="text")
    with pytest.raises(InputError, match=r"codes 0 to 63$"):
        CpuStep(model, kernels=kernels_of("native"))(
            two_tokens(ids=torch.tensor([0, CODES])), cache_of(model), GRID
        )


@pytest.mark.parametrize(
    "change",
    [
        {"positions": np.array([0, 24], np.int32)},
        {"positions": np.array([-1, 0], np.int32)},
        {"positions": np.array([0.0, 1.0])},
        {"positions": np.array([[0], [1]], np.int32)},
        {"sequences": np.array([0, 4], np.int32)},
        {"sequences": np.array([-1, 0], np.int32)},
        {"sequences": np.array([0], np.int32)},
        {"sequences": np.array([2**32, 2**32])},
        {"cells": np.array([0, 15], np.int32)},
        {"cells": np.array([-2, 0], np.int32)},
        {"wanted": np.array([2])},
        {"wanted": np.array([-1])},
        {"wanted": np.array([0, 1, 1])},
    ],
)
@torch.inference_mode()
def test_rejects_indices_out_of_range(change):
    model = model_of("even")
    with pytest.raises(ValueError, match=next(iter(change))):
        CpuStep(model, kernels=kernels_of("native"))(two_tokens(**change), cache_of(model), GRID)


def two_tokens(**changes):
    tokens = Tokens(
        ids=torch.tensor([0, 1]),
        sequences=np.array([0, 0], np.int32),
        positions=np.array([0, 1], np.int32),
        cells=np.array([0, 1], np.int32),
        wanted=np.array([0, 1]),
    )
    return dataclasses.replace(tokens, **changes)


@torch.inference_mode()
def test_rejects_tokens_of_a_sequence_that_are_apart():
    model = model_of("even")
    tokens = dataclasses.replace(
        two_tokens(ids=torch.zeros(3, dtype=torch.int64), cells=np.zeros(3, np.int32)),
        sequences=np.array([0, 1, 0], np.int32),
        positions=np.array([0, 0, 1], np.int32),
    )
    with pytest.raises(ValueError, match="not neighbours"):
        CpuStep(model, kernels=kernels_of("native"))(tokens, cache_of(model), GRID)


@pytest.mark.parametrize("change", ["dtype", "layers", "heads", "strides", "scales"])
@torch.inference_mode()
def test_rejects_caches_of_other_models(change):
    model, cache = model_of("even"), cache_of(model_of("even"), dtype=torch.int8)
    if change == "dtype":
        cache = cache_of(model, dtype=torch.bfloat16)
    elif change == "layers":
        cache.keys.pop()
    elif change == "heads":
        cache = cache_of(model_of("heads of 64"))
    elif change == "strides":
        cache.values[1] = cache.values[1].transpose(2, 3).contiguous().transpose(2, 3)
    else:
        cache.key_scales[0] = cache.key_scales[0].double()
    with pytest.raises(ValueError, match="expected"):
        CpuStep(model, kernels=kernels_of("native"))(two_tokens(), cache, GRID)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_default_dtype_changes_no_bit(dtype):
    model, sequences = model_of("even"), three_sequences()
    wanted = walk(CpuStep(model), cache_of(model), sequences, WALKS["ragged"])
    texts = model_of("even", condition="text")
    text = Sequence.of_text(torch.randn(4, 16))
    wanted.append(feed(CpuStep(texts), cache_of(texts), [(0, text, 0, 4)]))
    torch.set_default_dtype(dtype)
    try:
        found = walk(CpuStep(model), cache_of(model), sequences, WALKS["ragged"])
        found.append(feed(CpuStep(texts), cache_of(texts), [(0, text, 0, 4)]))
    finally:
        torch.set_default_dtype(torch.float32)
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, other)


def test_supported_models(monkeypatch):
    kernels_of("native")  # or skip
    model = model_of("even")
    assert CpuStep.supports(model)
    assert CpuStep.supports(model_of("even", torch.bfloat16))
    assert CpuStep.supports(model_of("even", condition="text"))
    assert CpuStep.supports(quantized(model_of("even")))
    assert not CpuStep.supports(model_of("even", torch.float16))
    assert not CpuStep.supports(tiny_transformer(dim=36, heads=1))
    assert not CpuStep.supports(tiny_transformer(dim=1088, heads=4))
    assert not CpuStep.supports(model_of("even").train())
    mixed = model_of("even")
    mixed.output = quantized(model_of("even")).output
    assert not CpuStep.supports(mixed)
    wrapped = model_of("even")
    wrapped.layers[0].attention.wqkv = torch.nn.Sequential(wrapped.layers[0].attention.wqkv)
    assert not CpuStep.supports(wrapped)
    monkeypatch.setattr(cpu_step, "load_kernels", lambda: None)
    assert not CpuStep.supports(model)


def test_refuses_options_that_it_does_not_know():
    @dataclass(frozen=True)
    class Config(TransformerConfig):
        new_option: bool = False

    model = model_of("even")
    values = {
        field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)
    }
    model.config = Config(**values)
    assert CpuStep.supports(model) == (cpu_step.load_kernels() is not None)
    model.config = Config(**values, new_option=True)
    assert not CpuStep.supports(model)


def test_times_are_counted():
    class Times:
        parts = np.zeros(3)

    model, times = model_of("even"), Times()
    step = CpuStep(model, times, kernels=kernels_of("native"))
    with torch.inference_mode():
        feed(step, cache_of(model), [(0, three_sequences()[0], 0, 13)], wanted=[12])
    assert (times.parts > 0).all()
