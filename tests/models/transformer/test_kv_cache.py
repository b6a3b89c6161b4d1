"""Keys and values in 8 bits: what they cost in precision, and that everything works with them."""

import pytest
import torch

from llamagen.backends.decoder import CpuDecoder, TorchDecoder, decoder_for
from llamagen.backends.graphs import has_graphs
from llamagen.generation import generate_codes, generate_codes_in_parallel
from llamagen.generation.memory import sampling_batch_size
from llamagen.models.transformer import KVCache
from tests.backends.decoders import (
    logits_at_different_places,
    logits_of_scattered,
    logits_of_windows,
    model_of,
    slots_of,
)
from tests.backends.variants import VARIANTS, kernels_of
from tests.tiny_models import tiny_transformer

SIZES = ["even", "grouped queries", "odd heads", "heads of 64", "heads of 128"]


def in_int8(model):
    model.kv_cache_dtype = torch.int8
    return model


def decoders_of(model, variant):
    return TorchDecoder(model), CpuDecoder(model, kernels_of(variant))


def assert_nearly(found, wanted):
    """Up to whole numbers that are rounded to the neighbour here and there."""
    assert (found - wanted).norm() < 1e-2 * wanted.norm()


@torch.inference_mode()
def test_each_key_and_value_is_kept_to_half_a_step():
    model = in_int8(tiny_transformer())
    cache = model.new_cache(3)
    given = torch.randn(2, 3, 4, 5, model.config.head_dim)  # keys and values of five positions
    given[0, 1, 2, 3] = 0
    read = cache.append(1, *given)
    for kept, wanted in zip(read, given, strict=True):
        step = wanted.abs().amax(-1, keepdim=True) / 127
        assert kept.dtype == torch.float32
        assert ((kept - wanted).abs() <= 0.5001 * step).all()
    cache.advance(5)
    again, _ = cache.append(1, *given[:, :, :, :1])
    assert again.shape[2] == 6
    assert torch.equal(again[:, :, :5], read[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_it_takes_the_memory_that_is_planned_with(dtype):
    model = tiny_transformer().to(dtype)
    sizes = {}
    for kept in (None, torch.int8):
        model.kv_cache_dtype = kept
        cache = model.new_cache(3)
        sizes[kept] = sum(part.nbytes for part in cache.parts)
        assert sizes[kept] == 3 * KVCache.bytes_per_sequence(
            model.config, grid=model.config.grid, condition_length=1, dtype=model.cache_dtype
        )
    assert sizes[torch.int8] < sizes[None]


def test_more_images_fit_into_memory(monkeypatch):
    model = tiny_transformer(dim=256, heads=2, grid=(16, 16))
    monkeypatch.setattr("llamagen.generation.memory.free_memory", lambda _: 2**27)
    floats = sampling_batch_size(model, guided=True)
    assert sampling_batch_size(in_int8(model), guided=True) > floats


def logits_of(decoder, cache, rows):
    """Logits (36, rows, V) of classes and 35 codes, which are the same for all decoders."""
    logits = [decoder.start(torch.arange(rows) % 5, cache).float().clone()]
    codes = torch.randint(64, (35, rows), generator=torch.Generator().manual_seed(rows))
    logits += [decoder.next_logits(each, cache).float().clone() for each in codes]
    return torch.stack(logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_kernels_keep_what_torch_keeps(size, variant):
    model = in_int8(model_of(size, grid=(5, 8)))
    for rows in (1, 3, 35):
        caches = [model.new_cache(rows) for _ in range(2)]
        wanted, found = map(logits_of, decoders_of(model, variant), caches, (rows, rows))
        assert_nearly(found, wanted)
        for ours, theirs in zip(*(cache.keys + cache.values for cache in caches), strict=True):
            difference = (ours[:, :, :36].int() - theirs[:, :, :36].int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 5e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_bfloat16_is_no_further_from_the_truth_than_torch(size, variant):
    exact = model_of(size, grid=(5, 8))
    model = in_int8(model_of(size, torch.bfloat16, grid=(5, 8)))
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    errors = torch.zeros(2)
    for rows in (1, 9, 35):
        truth = logits_of(TorchDecoder(exact), exact.new_cache(rows), rows)
        for index, decoder in enumerate(decoders_of(model, variant)):
            found = logits_of(decoder, model.new_cache(rows), rows)
            errors[index] += (found - truth).square().mean()
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ["grouped queries", "heads of 64"])
@torch.inference_mode()
def test_slots(size, variant):
    model = in_int8(model_of(size, grid=(3, 5)))
    codes = torch.randint(model.config.codebook_size, (3, 12))
    windows = [torch.randint(model.config.codebook_size, (3, length)) for length in (1, 4, 6)]
    for walk, fed in ((logits_at_different_places, codes), (logits_of_windows, windows)):
        wanted, found = (walk(model, decoder, fed) for decoder in decoders_of(model, variant))
        assert_nearly(found, wanted)
    texts = in_int8(model_of(size, grid=(3, 5), condition="text"))
    wanted, found = (logits_of_scattered(texts, d)[0] for d in decoders_of(texts, variant))
    assert_nearly(found, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_padded_text(variant):
    model = in_int8(tiny_transformer(condition="text", dim=128, heads=2))
    features = torch.randn(3, 6, model.config.text_dim)
    mask = torch.arange(6) >= torch.tensor([[0], [2], [5]])
    codes = torch.randint(model.config.codebook_size, (3, 4))
    found = []
    for decoder in decoders_of(model, variant):
        cache = model.new_cache(3, condition_length=6)
        decoder.start(features, cache, condition_mask=mask)
        found.append(torch.stack([decoder.next_logits(code, cache).clone() for code in codes.T]))
    assert_nearly(found[1], found[0])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_company_changes_no_bit(variant):
    model = in_int8(model_of("heads of 64", torch.bfloat16, grid=(5, 8)))
    decoder = CpuDecoder(model, kernels_of(variant))
    codes = torch.randint(model.config.codebook_size, (20, 40))
    found = []
    for rows in (slice(0, 40), slice(7, 8)):
        own = codes[:, rows]
        cache = model.new_cache(own.shape[1])
        logits = [decoder.start(torch.arange(40)[rows] % 5, cache).clone()]
        logits += [decoder.next_logits(step, cache).clone() for step in own]
        found.append(torch.stack(logits))
    assert torch.equal(found[0][:, 7], found[1][:, 0])


@torch.inference_mode()
def test_drawing_in_parallel_gives_the_same_codes():
    model = in_int8(model_of("heads of 64", torch.bfloat16, grid=(4, 6)))
    labels = torch.tensor([0, 3])
    wanted = generate_codes(model, labels, seeds=[5, 6])
    found = generate_codes_in_parallel(model, labels, seeds=[5, 6], window=4)
    assert torch.equal(found.codes, wanted)


@torch.inference_mode()
def test_first_rows_share_their_scales():
    model = in_int8(model_of("heads of 64"))
    decoder = decoder_for(model)
    cache = model.new_cache(4)
    decoder.start(torch.tensor([0, 1, 2, 3]), cache)
    wanted = decoder.next_logits(torch.tensor([9, 8, 7, 6]), cache).clone()
    cache.rewind(1)
    half = cache.first_rows(2)
    found = decoder.next_logits(torch.tensor([9, 8]), half)
    torch.testing.assert_close(found, wanted[:2])


@torch.inference_mode()
def test_slots_pass_scales_on():
    model = in_int8(model_of("even", grid=(3, 5)))
    slots = slots_of(model, 3)
    for label in range(3):
        model.start(torch.tensor([label]), slots)
    kept = [part[2].clone() for part in slots.parts]
    slots.remove(0)
    for part, wanted in zip(slots.parts, kept, strict=True):
        assert torch.equal(part[0, :, :1], wanted[:, :1])


def test_graphs_leave_it_to_the_model(monkeypatch):
    monkeypatch.setattr("llamagen.backends.cuda_graphs.wanted", lambda _: True)
    model = model_of("even")
    assert has_graphs(model)
    assert not has_graphs(in_int8(model))
