"""Decoders of our own give the logits that the model gives, on every kind of processor."""

import pytest
import torch
from llamagen.backends.decoder import CpuDecoder, TorchDecoder, decoder_for

from llamagen.models.transformer.quantization import quantize
from llamagen.support.errors import InputError
from tests.backends.decoders import (
    SIZES,
    assert_close,
    join,
    logits_at_different_places,
    logits_of_scattered,
    logits_of_windows,
    logits_with_changed_cells,
    model_of,
    slots_of,
    slots_with_texts,
)
from tests.backends.variants import VARIANTS, kernels_of
from tests.tiny_models import tiny_transformer

ROWS = (1, 2, 3, 5, 8, 9, 33, 70)
STEPS = 5


def decoder_of(model, variant):
    return CpuDecoder(model, kernels_of(variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_float32(size, variant):
    model = model_of(size)
    for rows in ROWS:
        condition = torch.arange(rows) % model.config.num_classes
        caches = [model.new_cache(rows) for _ in range(2)]
        decoders = [TorchDecoder(model), decoder_of(model, variant)]
        for cache in caches:
            model.prefill(condition, cache)
        generator = torch.Generator().manual_seed(rows)
        for _ in range(STEPS):
            codes = torch.randint(model.config.codebook_size, (rows,), generator=generator)
            wanted, found = (
                decoder.next_logits(codes, cache)
                for decoder, cache in zip(decoders, caches, strict=True)
            )
            assert_close(found, wanted)
        for wanted, found in zip(
            caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True
        ):
            assert_close(found[:, :, : caches[1].length], wanted[:, :, : caches[0].length])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_bfloat16_is_no_further_from_the_truth_than_torch(size, variant):
    exact = model_of(size)
    model = model_of(size, torch.bfloat16)
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    errors = torch.zeros(2)
    for rows in ROWS:
        condition = torch.arange(rows) % model.config.num_classes
        models = [exact, model, model]
        decoders = [TorchDecoder(exact), TorchDecoder(model), decoder_of(model, variant)]
        caches = [each.new_cache(rows) for each in models]
        for each, cache in zip(models, caches, strict=True):
            each.prefill(condition, cache)
        generator = torch.Generator().manual_seed(rows)
        for _ in range(STEPS):
            codes = torch.randint(model.config.codebook_size, (rows,), generator=generator)
            truth, by_torch, ours = (
                decoder.next_logits(codes, cache).float()
                for decoder, cache in zip(decoders, caches, strict=True)
            )
            for index, found in enumerate((by_torch, ours)):
                errors[index] += (found - truth).square().mean()
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ["even", "odd heads"])
@torch.inference_mode()
def test_starting_with_a_class(size, variant):
    model = model_of(size)
    decoder = decoder_of(model, variant)
    for rows in (1, 3, 35):
        labels = torch.arange(rows) % (model.config.num_classes + 1)
        wanted_cache, cache = model.new_cache(rows), model.new_cache(rows)
        assert_close(decoder.start(labels, cache), model.prefill(labels, wanted_cache))
        assert cache.length == 1
        for wanted, found in zip(wanted_cache.parts, cache.parts, strict=True):
            assert_close(found[:, :, :1] + 1e-20, wanted[:, :, :1] + 1e-20)
        slots = slots_of(model, rows)
        found = decoder.start(labels, slots).clone()
        assert torch.equal(found, decoder.start(labels, model.new_cache(rows)))
        assert slots.lengths == [1] * rows


@pytest.mark.parametrize("label", [-1, 6])
@torch.inference_mode()
def test_a_class_that_does_not_exist(label):
    model = model_of("even")
    assert model.config.num_classes == 5
    decoder = decoder_of(model, "native")
    with pytest.raises(InputError, match="has classes 0 to 4"):
        decoder.start(torch.tensor([0, label]), model.new_cache(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_company_changes_no_bit(variant, dtype):
    # Outputs enough for several at once, of more rows than a tile has.
    model = model_of("even", dtype, codebook_size=1024)
    decoder = decoder_of(model, variant)
    codes = torch.randint(1024, (6, 40))
    found = []
    for rows in (slice(0, 40), slice(33, 36)):
        own = codes[:, rows]
        cache = model.new_cache(own.shape[1])
        logits = [decoder.start(torch.arange(40)[rows] % 5, cache).clone()]
        logits += [decoder.next_logits(step, cache).clone() for step in own]
        found.append(torch.stack(logits))
    assert torch.equal(found[0][:, 33:36], found[1])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_padded_text(variant):
    model = tiny_transformer(condition="text", dim=64, heads=2)
    features = torch.randn(3, 6, model.config.text_dim)
    mask = torch.arange(6) >= torch.tensor([[0], [2], [5]])
    codes = torch.randint(model.config.codebook_size, (3, 4))
    found = []
    for decoder in (TorchDecoder(model), decoder_of(model, variant)):
        cache = model.new_cache(3, condition_length=6)
        model.prefill(features, cache, condition_mask=mask)
        found.append(torch.stack([decoder.next_logits(code, cache).clone() for code in codes.T]))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_sequences_at_different_places(variant):
    model = model_of("even", grid=(3, 5))
    codes = torch.randint(model.config.codebook_size, (3, 12))
    wanted, found = (
        logits_at_different_places(model, decoder, codes)
        for decoder in (TorchDecoder(model), decoder_of(model, variant))
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("size", ["even", "grouped queries"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_windows(variant, size):
    model = model_of(size, grid=(3, 5))
    windows = [torch.randint(model.config.codebook_size, (3, length)) for length in (1, 4, 6)]
    wanted, found = (
        logits_of_windows(model, decoder, windows)
        for decoder in (TorchDecoder(model), decoder_of(model, variant))
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("size", ["even", "grouped queries", "odd heads"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_scattered_codes(variant, size):
    model = model_of(size, grid=(3, 5), condition="text")
    (wanted, by_torch), (found, ours) = (
        logits_of_scattered(model, decoder)
        for decoder in (TorchDecoder(model), decoder_of(model, variant))
    )
    assert_close(found, wanted)
    for kind in ("keys", "values"):
        assert_close(*(torch.stack(getattr(slots, kind)) for slots in (ours, by_torch)))


@pytest.mark.parametrize(
    ("changed", "affected"),
    [([0], [0, 1, 2]), ([6, 7], [1, 2]), ([9, 10, 11], [2]), ([13, 14], [])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["torch", *VARIANTS])
@torch.inference_mode()
def test_what_stands_behind_a_code_changes_no_bit(variant, dtype, changed, affected):
    model = model_of("grouped queries", dtype, grid=(3, 5), condition="text")
    decoder = TorchDecoder(model) if variant == "torch" else decoder_of(model, variant)
    before, after = logits_with_changed_cells(model, decoder, [5, 8, 12], changed)
    for code in range(3):
        assert torch.equal(before[:, code], after[:, code]) == (code not in affected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_codes_that_follow_each_other_may_be_fed_as_scattered_ones(variant, dtype):
    model = model_of("grouped queries", dtype, grid=(3, 5))
    decoder, codes = decoder_of(model, variant), torch.arange(15).view(3, 5)
    slots = slots_of(model, 6)
    join(model, slots, [0, 1, 2])
    wanted = decoder.extend(codes, slots).clone()
    slots = slots_of(model, 3)
    join(model, slots, [0, 1, 2])
    assert torch.equal(decoder.extend_at(codes, slots, range(5)), wanted)


def test_which_models_the_kernels_take(monkeypatch):
    kernels_of("native")  # or skip

    def takes(model, **given):
        return isinstance(decoder_for(model, **given), CpuDecoder)

    model = model_of("even")
    assert takes(model)
    assert takes(model_of("even", torch.bfloat16))
    assert not takes(model_of("even", torch.float16))
    assert not takes(tiny_transformer(dim=36, heads=1))
    assert not takes(model_of("even").train())
    quantized, mixed = model_of("even"), model_of("even")
    quantize(quantized, "int8")
    assert takes(quantized)
    mixed.output = quantized.output
    assert not takes(mixed)
    left, hole = torch.tensor([[False, True, True]]), torch.tensor([[True, False, True]])
    assert takes(model, condition_mask=left)
    assert not takes(model, condition_mask=hole)
    model.layers[0].attention.wqkv = torch.nn.Sequential(model.layers[0].attention.wqkv)
    assert not takes(model)
    monkeypatch.setattr("llamagen.backends.decoder.load_kernels", lambda: None)
    assert not takes(model_of("even"))


@torch.inference_mode()
def test_a_full_cache_is_refused():
    kernels_of("native")
    model = model_of("even")
    decoder, cache = decoder_for(model), model.new_cache(1)
    model.prefill(torch.tensor([0]), cache)
    for _ in range(model.config.num_codes):
        decoder.next_logits(torch.tensor([0]), cache)
    with pytest.raises(AssertionError, match="in a cache with room for"):
        decoder.next_logits(torch.tensor([0]), cache)


@torch.inference_mode()
def test_a_cell_past_the_image_is_refused():
    model = model_of("even", condition="text")
    decoder, slots = decoder_of(model, "native"), slots_with_texts(model)
    with pytest.raises(AssertionError, match="cell 16 of an image of 16 codes"):
        decoder.extend_at(torch.zeros(3, 1), slots, [16])


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_no_bit_depends_on_what_else_is_in_the_batch(variant, dtype, quantization):
    model = model_of("grouped queries", dtype, grid=(3, 5))
    if quantization is not None:
        quantize(model, quantization)
    decoder = decoder_of(model, variant)
    codes = torch.randint(model.config.codebook_size, (35, 6))

    def logits_of(rows, window):
        """(rows, 6, V), from windows of so many codes each."""
        slots = slots_of(model, 35)
        for row in rows:
            join(model, slots, [row % model.config.num_classes])
        found = []
        for part in codes[rows].split(window, dim=1):
            found.append(decoder.extend(part, slots).clone())
            slots.advance(part.shape[1])
        return torch.cat(found, dim=1)

    everything = logits_of(list(range(35)), 1)
    for rows, window in (([7], 1), ([7], 6), ([1, 34], 3), (list(range(11)), 2)):
        assert torch.equal(logits_of(rows, window), everything[rows])
