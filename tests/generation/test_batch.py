"""Images of a running batch are those generated alone."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation import GenerationRequest, NativeEngine
from llamagen.generation.batch import Batch
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

SETTINGS = [
    SamplingConfig(guidance_scale=4.0),
    SamplingConfig(guidance_scale=1.0, top_k=5),
    SamplingConfig(guidance_scale=2.0, guidance_stop=3),
    SamplingConfig(guidance_scale=7.5, top_p=0.7, temperature=1.3),
    SamplingConfig(guidance_scale=3.0, temperature=0.0),
    SamplingConfig(guidance_scale=3.0, guidance_stop=0),
    SamplingConfig(guidance_scale=3.0, guidance_stop=1, top_k=20),
]
KNOWN = torch.full((16,), -1)
KNOWN[3:9] = torch.arange(6)


def image(label, seed, settings, **values):
    sampling = SETTINGS[settings % len(SETTINGS)]
    return GenerationRequest(condition=torch.tensor(label), seed=seed, sampling=sampling, **values)


def alone(model, request):
    return NativeEngine(model).generate([request]).flatten()


def run(batch, arrivals):
    """Add requests at their steps, step until all are done; return codes by request."""
    step, found = 0, {}
    while len(found) < sum(map(len, arrivals.values())):
        batch.add(arrivals.get(step, []))
        batch.step()
        for state in [state for state in batch.images if state.is_finished]:
            batch.check_finite([state])
            found[state.request] = batch.codes_of([state], batch.total)[0].clone()
            batch.remove(state)
        step += 1
    assert batch.images == []
    assert batch.sequences == 0
    return found


def assert_as_alone(model, found):
    assert found
    for request, codes in found.items():
        assert torch.equal(codes, alone(model, request))


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_mixed_settings_and_windows_join_and_leave(cache_dtype):
    model = tiny_transformer(dim=64, heads=2)
    model.kv_cache_dtype = cache_dtype
    requests = [image(k % 5, k, k, window=[None, 1, 3, 7][k % 4]) for k in range(21)]
    found = run(Batch(model, 21), {3 * k: requests[3 * k : 3 * k + 3] for k in range(7)})
    assert_as_alone(model, found)


def test_texts_of_different_lengths_and_negative_prompts():
    model = tiny_transformer(condition="text", grid=(3, 5))
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return torch.randn(length, 16, generator=generator)

    requests = [
        GenerationRequest(condition=text(own), seed=k, sampling=SETTINGS[k], negative=negative)
        for k, (own, negative) in enumerate(
            [(3, None), (6, text(2)), (1, text(4)), (5, text(5))], start=0
        )
    ]
    batch = Batch(model, 4)
    assert_as_alone(model, run(batch, {0: requests[:1], 2: requests[1:3], 5: requests[3:]}))


def test_removed_image_leaves_the_others_alone():
    model = tiny_transformer()
    batch = Batch(model, 4)
    states = batch.add([image(k, k, k) for k in range(4)])
    batch.step()
    batch.remove(states[0])
    batch.step()
    batch.remove(states[2])
    while not all(state.is_finished for state in batch.images):
        batch.step()
    for state in (states[1], states[3]):
        codes = batch.codes_of([state], batch.total)[0]
        assert torch.equal(codes, alone(model, state.request))


def test_rows_are_reused_after_images_leave():
    model = tiny_transformer()
    batch = Batch(model, 2)
    for seed in range(4):
        known = KNOWN if seed % 2 == 0 else None
        assert_as_alone(model, run(batch, {0: [image(1, seed, seed, known_codes=known)]}))


def test_rejected_requests_let_nothing_in():
    batch = Batch(tiny_transformer(), 4)
    good = image(0, 0, 0)
    with pytest.raises(InputError, match="class labels run from 9 to 9"):
        batch.add([good, image(9, 0, 0)])
    with pytest.raises(InputError, match="seed is -1"):
        batch.add([good, image(1, -1, 0)])
    assert batch.sequences == 0
    assert batch.images == []


def test_not_finite_logits_are_reported_for_their_own_image():
    model = tiny_transformer()
    with torch.no_grad():
        model.cls_embedding.embedding_table.weight[2] = torch.nan
    batch = Batch(model, 2)
    good, bad = batch.add([image(k, k, 1) for k in (1, 2)])
    while not good.is_finished:
        batch.step()
    batch.check_finite([good])
    assert torch.equal(batch.codes_of([good], batch.total)[0], alone(model, good.request))
    with pytest.raises(InputError, match="logits are not finite"):
        batch.check_finite([bad])


@pytest.mark.parametrize("window", [None, 4])
def test_edited_and_blended_images_among_others(window):
    model = tiny_transformer()
    requests = [
        image(0, 1, 0, known_codes=KNOWN, window=window),
        image(1, 2, 1),
        image(2, 3, 2, blend=torch.tensor(4), window=window),
        image(3, 4, 1, blend=torch.tensor(0), blend_share=0.2, known_codes=KNOWN.view(4, 4)),
    ]
    found = run(Batch(model, 4), {0: requests[:2], 3: requests[2:]})
    assert_as_alone(model, found)
    for request in (requests[0], requests[3]):
        assert torch.equal(found[request][3:9], torch.arange(6))


def test_known_codes_with_a_window_match_one_by_one():
    model = tiny_transformer()
    for settings in range(len(SETTINGS)):
        one, several = (
            alone(model, image(2, 5, settings, known_codes=KNOWN, window=window))
            for window in (1, 5)
        )
        assert torch.equal(one, several)


def test_blend_with_guidance_needs_three_sequences():
    batch = Batch(tiny_transformer(), 2)
    blend = image(0, 0, 0, blend=torch.tensor(1))
    plain, guided = image(0, 0, 1), image(0, 0, 0)
    assert batch.has_capacity([blend])
    assert not batch.has_capacity([blend, guided])
    assert batch.has_capacity([blend, plain])
    assert not batch.has_capacity([blend, plain, plain])
    with pytest.raises(InputError, match="needs 3 sequences"):
        Batch(tiny_transformer(), 1).check(blend)


def test_cleared_batch_has_its_whole_capacity_after_a_failed_start(monkeypatch):
    model = tiny_transformer()
    batch = Batch(model, 2)

    def fail(*_):
        raise RuntimeError("a fault")

    fail.is_wide = False
    with monkeypatch.context() as patched:
        patched.setattr(batch, "_step", fail)
        with pytest.raises(RuntimeError, match="a fault"):
            batch.add([image(0, 0, 0), image(1, 1, 1)])
    batch.clear()
    assert_as_alone(model, run(batch, {0: [image(0, 0, 0), image(1, 1, 1)]}))
