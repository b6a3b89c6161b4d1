"""One cache for sequences of different lengths, in the model's precision and in int8."""

import pytest
import torch

from llamagen.generation import generate_codes
from llamagen.generation.memory import sampling_batch_size
from llamagen.models.transformer import KVCache
from tests.steps import feed_codes, start_sequences
from tests.tiny_models import tiny_transformer


def with_int8_cache(model):
    model.kv_cache_dtype = torch.int8
    return model


def cache_parts(cache):
    return [*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales]


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_cached_matches_uncached_at_different_lengths(kv_heads):
    model = tiny_transformer(kv_heads=kv_heads)
    codes = torch.randint(0, 64, (3, 15), generator=torch.Generator().manual_seed(0))
    labels = [torch.tensor(label) for label in (0, 3, 4)]
    expected = model(codes, torch.stack(labels))
    cache = model.new_cache(3, 17)
    logits = [[one] for one in start_sequences(model, labels[:1], cache)]
    for index in range(4):
        logits[0].append(feed_codes(model, codes[:1, index : index + 1], cache)[0, 0])
    logits += [[one] for one in start_sequences(model, labels[1:], cache)]
    done = [4, 0, 0]
    for width in (1, 3, 2):
        own = torch.stack([codes[row, at : at + width] for row, at in enumerate(done)])
        found = feed_codes(model, own, cache)
        for row in range(3):
            logits[row] += list(found[row])
            done[row] += width
    for row in range(3):
        torch.testing.assert_close(torch.stack(logits[row]), expected[row, : done[row] + 1])


@torch.no_grad()
def test_positions_behind_a_length_are_overwritten():
    model = tiny_transformer()
    codes = torch.randint(0, 64, (2, 9))
    labels = [torch.tensor(1), torch.tensor(2)]
    expected = model(codes, torch.stack(labels))
    cache = model.new_cache(2, 17)
    start_sequences(model, labels, cache)
    torch.testing.assert_close(feed_codes(model, codes[:, :4], cache), expected[:, 1:5])
    feed_codes(model, torch.randint(0, 64, (2, 3)), cache)
    cache.lengths = [5, 5]
    torch.testing.assert_close(feed_codes(model, codes[:, 4:], cache), expected[:, 5:])


@torch.no_grad()
def test_removed_sequence_makes_room_for_the_last():
    model = with_int8_cache(tiny_transformer())
    cache = model.new_cache(3, 17)
    start_sequences(model, [torch.tensor(label) for label in range(3)], cache)
    last = [part[2].clone() for part in cache_parts(cache)]
    cache.remove(0)
    assert cache.sequences == 2
    for part, wanted in zip(cache_parts(cache), last, strict=True):
        assert torch.equal(part[0, :, :1], wanted[:, :1])


@torch.inference_mode()
def test_int8_rounds_to_half_a_step():
    model = with_int8_cache(tiny_transformer())
    cache = model.new_cache(3, 8)
    given = torch.randn(2, 3, 5, 4, model.config.head_dim)  # keys and values of five positions
    given[0, 1, 3, 2] = 0
    index = (torch.arange(3).unsqueeze(1), torch.arange(5).expand(3, 5))
    read = cache.update(index, slice(0, 3), 5, 1, *given)
    for stored, wanted in zip(read, given.transpose(2, 3), strict=True):
        step = wanted.abs().amax(-1, keepdim=True) / 127
        assert stored.dtype == torch.float32
        assert ((stored - wanted).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_matches_estimate(dtype):
    model = tiny_transformer().to(dtype)
    sizes = {}
    for cache_dtype in (None, torch.int8):
        model.kv_cache_dtype = cache_dtype
        sizes[cache_dtype] = sum(part.nbytes for part in cache_parts(model.new_cache(3, 17)))
        planned = 3 * KVCache.bytes_per_sequence(model.config, 17, model.cache_dtype)
        assert sizes[cache_dtype] == planned
    assert sizes[torch.int8] < sizes[None]


def test_more_images_fit_into_memory_in_int8(monkeypatch):
    model = tiny_transformer(dim=256, heads=2, grid=(16, 16))
    monkeypatch.setattr("llamagen.generation.memory.free_memory", lambda _: 2**27)
    floats = sampling_batch_size(model, sequences=2)
    assert sampling_batch_size(with_int8_cache(model), sequences=2) > floats


def test_several_codes_per_pass_match_one_by_one_in_int8():
    model = with_int8_cache(tiny_transformer(dim=64, heads=2, grid=(4, 6)))
    labels = torch.tensor([0, 3])
    one = generate_codes(model, labels, seeds=[5, 6], window=1)
    assert torch.equal(generate_codes(model, labels, seeds=[5, 6], window=4), one)
