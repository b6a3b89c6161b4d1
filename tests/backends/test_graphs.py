"""The step for GPUs: what it computes and that it can be played again; on a GPU its graphs."""

import copy
import gc
import logging
import weakref

import pytest
import torch

from llamagen.backends import graphs
from llamagen.backends.cuda_graphs import Recorder, wanted
from llamagen.backends.decoder import TorchDecoder, decoder_for
from llamagen.backends.graphs import GraphDecoder, _padded, has_graphs
from llamagen.backends.static_step import attend
from llamagen.config import SamplingConfig
from llamagen.generation import generate_codes
from llamagen.models.transformer import SlotCache
from llamagen.models.transformer.quantized import quantize
from tests.backends.decoders import (
    assert_close,
    logits_at_different_places,
    logits_of_scattered,
    logits_of_windows,
    model_of,
)
from tests.backends.tape import Tape
from tests.tiny_models import tiny_transformer

SIZES = ("even", "grouped queries", "odd heads")


def decoder_of(model, tape=None, most=64):
    return GraphDecoder(model, Recorder(tape, most=most))


def both(model):
    return TorchDecoder(model), decoder_of(model, Tape())


def spoiled(cache):
    """What an allocation may hold, in front of the first position's being filled."""
    for part in cache.keys + cache.values:
        part.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_float32(size):
    model = model_of(size, grid=(9, 9))  # beyond one piece of attended positions
    codes = torch.randint(model.config.codebook_size, (3, 81))
    found, caches = [], []
    for decoder in both(model):
        cache = spoiled(model.new_cache(3))
        model.prefill(torch.arange(3), cache)
        found.append(torch.stack([decoder.next_logits(code, cache).clone() for code in codes.T]))
        caches.append(cache)
    assert_close(found[1], found[0])
    for kind in ("keys", "values"):
        assert_close(*(torch.stack(getattr(cache, kind)) for cache in reversed(caches)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_quantized(kind):
    model = model_of("even")
    quantize(model, kind)
    found = []
    for decoder in both(model):
        cache = model.new_cache(2)
        model.prefill(torch.arange(2), cache)
        codes = torch.arange(12).view(6, 2)
        found.append(torch.stack([decoder.next_logits(code, cache).clone() for code in codes]))
    assert_close(found[1], found[0])


@torch.inference_mode()
def test_scattered_codes():
    model = model_of("even", grid=(3, 5), condition="text")
    (wanted, _), (found, _) = (logits_of_scattered(model, decoder) for decoder in both(model))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_is_as_near_to_the_truth_as_torch(dtype, size):
    exact, model = model_of(size), model_of(size, dtype)
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    codes = torch.randint(model.config.codebook_size, (15, 16))
    found = []
    for own, decoder in (
        (exact, TorchDecoder(exact)),
        (model, TorchDecoder(model)),
        (model, decoder_of(model)),
    ):
        cache = own.new_cache(16)
        own.prefill(torch.arange(16) % 5, cache)
        logits = [decoder.next_logits(code, cache).float() for code in codes]
        found.append(torch.stack(logits))
    truth, by_torch, ours = found
    errors = [(x - truth).square().mean().sqrt() for x in (by_torch, ours)]
    assert errors[1] < 1.25 * errors[0]


@torch.inference_mode()
def test_heads_that_no_fused_kernel_takes():
    q, k, v = torch.randn(3, 2, 4, 6, 20).double().unbind()
    bias = torch.zeros(2, 1, 6, 6).masked_fill_(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    wanted = attend(q, k, v, bias.double())
    half = attend(*(x.bfloat16() for x in (q, k, v, bias)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("hole", [False, True])
@torch.inference_mode()
def test_padded_text(hole):
    model = tiny_transformer(condition="text", dim=64, heads=2)
    features = torch.randn(3, 6, model.config.text_dim)
    mask = torch.arange(6) >= torch.tensor([[0], [2], [5]])
    if hole:
        mask[0, 3] = False
    codes = torch.randint(model.config.codebook_size, (3, 8))
    found = []
    for decoder in both(model):
        cache = spoiled(model.new_cache(3, condition_length=6))
        model.prefill(features, cache, condition_mask=mask)
        logits = [decoder.next_logits(code, cache).clone() for code in codes.T[:4]]
        # As at the end of guidance.
        fewer = cache.first_rows(2)
        logits += [decoder.next_logits(code[:2], fewer).clone() for code in codes.T[4:]]
        found.append(torch.cat(logits))
    assert_close(found[1], found[0])


@torch.inference_mode()
def test_masks_of_caches_that_follow_each_other():
    model = tiny_transformer(condition="text", dim=64, heads=2)
    features = torch.randn(2, 6, model.config.text_dim)
    decoders = both(model)
    for first in (0, 4, 2):
        found = []
        for decoder in decoders:
            cache = model.new_cache(2, condition_length=6)
            mask = (torch.arange(6) >= first).expand(2, -1) if first else None
            model.prefill(features, cache, condition_mask=mask)
            codes = torch.arange(6).view(3, 2)
            found.append(torch.stack([decoder.next_logits(code, cache).clone() for code in codes]))
        assert_close(found[1], found[0])


@torch.inference_mode()
def test_sequences_at_different_places():
    model = model_of("even", grid=(3, 5))
    codes = torch.randint(model.config.codebook_size, (3, 12))
    wanted, found = (logits_at_different_places(model, each, codes) for each in both(model))
    assert_close(found, wanted)


@pytest.mark.parametrize("size", ["even", "grouped queries"])
@torch.inference_mode()
def test_windows(size):
    model = model_of(size, grid=(3, 5))
    windows = [torch.randint(model.config.codebook_size, (3, length)) for length in (1, 4, 6)]
    wanted, found = (logits_of_windows(model, each, windows) for each in both(model))
    assert_close(found, wanted)


@pytest.mark.parametrize("stop", [None, 7])
def test_whole_images(stop, monkeypatch):
    model = model_of("even", grid=(9, 9))
    sampling = SamplingConfig(guidance_scale=3.0, guidance_stop=stop, temperature=0.0)
    settings = {"seeds": [0, 1], "sampling": sampling}
    tape = Tape()
    found = []
    for decoder in (TorchDecoder(model), decoder_of(model, tape)):
        monkeypatch.setattr(
            "llamagen.generation.decode.decoder_for", lambda *_, decoder=decoder, **__: decoder
        )
        found += [generate_codes(model, torch.tensor([1, 3]), **settings) for _ in range(2)]
    assert all(torch.equal(codes, found[0]) for codes in found[1:])
    # Three shapes at most for each of two caches; all other steps are played.
    assert tape.rehearsed <= 6
    assert tape.rehearsed + tape.played == 2 * 80


@torch.inference_mode()
def test_a_rewound_cache():
    model = model_of("even")
    decoder, cache = decoder_of(model, Tape()), model.new_cache(1)
    model.prefill(torch.tensor([0]), cache)
    found = []
    for _ in range(3):
        found.append([decoder.next_logits(torch.tensor([c]), cache).clone() for c in (3, 5, 7)])
        cache.rewind(1)
    for again in found[1:]:
        torch.testing.assert_close(torch.stack(again), torch.stack(found[0]))


def decode(decoder, model, cache, code):
    """Feeds a code, compares, and takes the code back."""
    code = torch.tensor([code])
    logits = decoder.next_logits(code, cache).clone()
    cache.rewind(cache.length - 1)
    assert_close(logits, TorchDecoder(model).next_logits(code, cache))
    cache.rewind(cache.length - 1)


@torch.inference_mode()
def test_decoders_of_a_model_follow_each_other(monkeypatch):
    tapes = []
    monkeypatch.setattr(graphs, "CudaTape", lambda _: tapes.append(Tape()) or tapes[-1])
    model = model_of("even")
    cache = model.new_cache(1)
    model.prefill(torch.tensor([0]), cache)

    first = GraphDecoder(model)
    for code in (3, 5, 7):
        decode(first, model, cache, code)
    decode(GraphDecoder(model), model, cache, 3)  # beside the first one
    assert [(t.rehearsed, t.recorded, t.played) for t in tapes] == [(1, 1, 2), (1, 0, 0)]
    del first
    decode(GraphDecoder(model), model, cache, 4)
    assert len(tapes) == 2
    assert tapes[0].played == 3
    # What was recorded for weights elsewhere in memory is not played again.
    for block in model.blocks:
        block.attention.wo.weight = torch.nn.Parameter(block.attention.wo.weight * 2)
    decode(GraphDecoder(model), model, cache, 5)
    assert (tapes[0].rehearsed, tapes[0].played) == (2, 3)
    alive = weakref.ref(model)
    del model, block
    gc.collect()
    assert alive() is None


@torch.inference_mode()
def test_what_cannot_be_recorded_goes_on_without(caplog):
    model = model_of("even")
    decoder, cache = decoder_of(model, Tape(fails=True)), model.new_cache(1)
    wanted = model.new_cache(1)
    for own in (cache, wanted):
        model.prefill(torch.tensor([0]), own)
    with caplog.at_level(logging.WARNING):
        for code in torch.arange(5).unsqueeze(1):
            found = decoder.next_logits(code, cache).clone()
            assert_close(found, TorchDecoder(model).next_logits(code, wanted))
    assert [r.getMessage() for r in caplog.records] == [
        "going on without CUDA graphs, which is slower: operation not permitted"
    ]


def test_only_so_many_recordings_are_kept():
    tape, count = Tape(), torch.zeros(4)
    recorder = Recorder(tape, most=2)
    for key in (0, 0, 1, 1, 0, 2, 2, 0, 1):
        recorder.run(key, lambda key=key: count[key].add_(1))
    assert count.tolist() == [4, 3, 2, 0]
    # 0 was kept all along; 1 had to go for 2, which had to go when 1 came back.
    assert (tape.rehearsed, tape.recorded, tape.played) == (4, 3, 5)


def test_numbers_of_sequences_that_recordings_serve():
    found = [_padded(rows, 30) for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 30)]
    assert found == [1, 2, 4, 4, 8, 8, 16, 16, 24, 24, 30, 30]


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@torch.inference_mode()
def test_nothing_is_read_from_the_device(kind):
    # Tensors on "meta" have no numbers to be read, and go with no tensors elsewhere.
    model = model_of("grouped queries", torch.bfloat16)
    if kind is not None:
        quantize(model, kind)
    model = model.to("meta")
    decoder = decoder_of(model)
    cache = model.new_cache(3)
    cache.advance(1)
    codes = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    assert decoder.next_logits(codes[:, 0], cache).shape == (3, 64)
    assert decoder.next_logits(codes[:, 1], cache).is_meta
    slots = SlotCache.empty(
        model.config, 4, grid=(4, 4), device=model.device, dtype=model.dtype, spare=3
    )
    slots.admit(cache)
    assert decoder.extend(codes, slots).shape == (3, 4, 64)


@torch.inference_mode()
def test_a_full_cache_is_refused():
    model = model_of("even")
    decoder, cache = decoder_of(model), model.new_cache(1)
    model.prefill(torch.tensor([0]), cache)
    for _ in range(model.config.num_codes):
        decoder.next_logits(torch.tensor([0]), cache)
    with pytest.raises(AssertionError, match="in a cache with room for"):
        decoder.next_logits(torch.tensor([0]), cache)


def test_which_models_are_recorded(monkeypatch):
    model = model_of("even")
    assert not has_graphs(model)  # it is on a CPU
    monkeypatch.setattr("llamagen.backends.cuda_graphs.wanted", lambda device: True)
    monkeypatch.setattr(graphs, "CudaTape", lambda device: Tape())
    assert isinstance(decoder_for(model), GraphDecoder)
    assert not has_graphs(model_of("even").train())
    with monkeypatch.context() as under_autocast:
        under_autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not has_graphs(model)
    quantize(model, "int8")
    assert has_graphs(model)
    model.layers[0].attention.wqkv = torch.nn.Sequential(model.layers[0].attention.wqkv)
    assert not has_graphs(model)


@pytest.mark.parametrize(("value", "found"), [(None, True), ("off", False), ("0", False)])
def test_the_switch(value, found, monkeypatch):
    monkeypatch.delenv("LLAMAGEN_CUDA_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("LLAMAGEN_CUDA_GRAPHS", value)
    assert wanted(torch.device("cuda")) == found
    assert not wanted(torch.device("cpu"))


def on_gpu(size="even", dtype=torch.float32, **settings):
    return model_of(size, dtype, **settings).cuda()


def codes_of(model, monkeypatch, on, **settings):
    monkeypatch.setenv("LLAMAGEN_CUDA_GRAPHS", "on" if on else "off")
    labels = torch.arange(3, device="cuda")
    return generate_codes(model, labels, seeds=range(3), **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("stop", [None, 30])
@pytest.mark.parametrize("size", SIZES)
def test_gpu_graphs_draw_the_codes_of_eager_torch(size, stop, monkeypatch, caplog):
    model = on_gpu(size, grid=(9, 9))
    greedy = SamplingConfig(guidance_scale=2.0, guidance_stop=stop, temperature=0.0)
    with caplog.at_level(logging.WARNING):
        found = [codes_of(model, monkeypatch, True, sampling=greedy) for _ in range(3)]
    assert not [r for r in caplog.records if "CUDA graphs" in r.getMessage()]
    wanted = codes_of(model, monkeypatch, False, sampling=greedy)
    assert all(torch.equal(codes, wanted) for codes in found)


@pytest.mark.gpu
def test_gpu_seeds_hold(monkeypatch):
    model = on_gpu(grid=(9, 9))
    sampling = SamplingConfig(guidance_scale=2.0, top_k=20, top_p=0.95)
    first, second = (codes_of(model, monkeypatch, True, sampling=sampling) for _ in range(2))
    assert torch.equal(first, second)
    alone = generate_codes(model, torch.tensor([1], device="cuda"), seeds=[1], sampling=sampling)
    # Another number of rows may round otherwise, so that now and then another code is drawn.
    assert torch.equal(alone[0, 0], first[1, 0])


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_caches_elsewhere_in_memory(monkeypatch):
    model = on_gpu()
    decoder = decoder_for(model)
    assert isinstance(decoder, GraphDecoder)
    caches = [model.new_cache(2) for _ in range(4)]
    for cache in caches[:3]:
        model.prefill(torch.arange(2, device="cuda"), cache)
    model.prefill(torch.arange(2, device="cuda"), caches[3])
    for code in torch.randint(64, (9, 2), device="cuda"):
        found = [decoder.next_logits(code, cache).clone() for cache in caches[:3]]
        wanted = TorchDecoder(model).next_logits(code, caches[3])
        for logits in found:
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_gpu_models_that_change(monkeypatch):
    model = on_gpu(grid=(9, 9))
    greedy = SamplingConfig(guidance_scale=2.0, temperature=0.0)
    codes_of(model, monkeypatch, True, sampling=greedy)
    quantize(model, "int8")
    found, wanted = (codes_of(model, monkeypatch, on, sampling=greedy) for on in (True, False))
    assert torch.equal(found, wanted)
    other = copy.deepcopy(model)
    del model
    gc.collect()
    assert torch.equal(codes_of(other, monkeypatch, True, sampling=greedy), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_gpu_steps_do_not_wait(dtype):
    model = on_gpu(dtype=dtype, grid=(9, 9))
    decoder, cache = decoder_for(model), model.new_cache(4)
    model.prefill(torch.arange(4, device="cuda"), cache)
    codes = torch.zeros(4, dtype=torch.int64, device="cuda")
    decoder.next_logits(codes, cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(80):
            logits = decoder.next_logits(codes, cache)
            codes = logits.argmax(-1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()
